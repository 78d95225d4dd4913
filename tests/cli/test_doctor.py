"""client.py doctor and init: the diagnoses by table, the rest on real processes and files."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlay.cli import init as addressing
from overlay.cli.doctor import Examination, advice
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.monitor.diagnosis import Diagnosis, Finding, Grade, Observation, Reach
from overlay.monitor.poller import Poller
from overlay.monitor.protection import Protection
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.commands import run_client

SHIPPED = load(ROOT / "two_hosts_config.json")
PC, MAC = "Windows-AMD64", "Darwin-arm64"


def sees(
    process_id: str, state: str = "up", since_s: float = 5.0, reason: str = ""
) -> pb2.Neighbour:
    return pb2.Neighbour(process_id=process_id, state=state, since_s=since_s, reason=reason)


UP = {
    process.id: [sees(n.id) for n in SHIPPED.below(process.id)]
    for process in SHIPPED.processes.values()
}


def answering(process_id: str, clock_s: float = 0.0, **changes: Any) -> Observation:
    system = PC if SHIPPED.processes[process_id].host == "192.168.1.1" else MAC
    fields = {"version": "1.0", "platform": system, "config_digest": SHIPPED.digest}
    fields |= {"is_healthy": True, "neighbours": UP[process_id], **changes}
    metrics = pb2.MetricsResponse(process_id=process_id, **fields)
    return Observation(Reach.OPEN, metrics, clock_s=clock_s, is_here=system == PC)


def diagnosis(**observed: Observation) -> Diagnosis:
    """What the PC observes of six healthy processes, except for those given."""
    all_observed = {i: answering(i) for i in SHIPPED.processes} | observed
    return Diagnosis(SHIPPED, all_observed, "1.0", 1, "Windows", "mine.json")


def of(process_id: str, **observed: Observation) -> Finding:
    return diagnosis(**observed).of_process(SHIPPED.processes[process_id])


def link(asker: str, asked: str, **observed: Observation) -> Finding:
    return diagnosis(**observed).of_link(SHIPPED.processes[asker], SHIPPED.processes[asked])


def test_a_healthy_overlay_has_no_findings():
    found = [of(i) for i in SHIPPED.processes] + [link("A", "E"), link("E", "D")]

    assert {finding.grade for finding in found} == {Grade.OK}
    assert not any(finding.why or finding.do for finding in found)


@pytest.mark.parametrize(
    ("process_id", "seen", "state", "why", "do"),
    [
        ("D", Observation(Reach.REFUSED, is_here=True), "not running", "nothing listens",
         r"here: py scripts\run.py start mine.json"),
        ("F", Observation(Reach.REFUSED), "not running", "nothing listens",
         "on 192.168.1.2: python3 scripts/run.py start mine.json"),
        ("F", Observation(Reach.SILENT), "silent", "C and E at 192.168.1.2 can be reached",
         "System Settings, Network, Firewall"),
        ("D", Observation(Reach.SILENT, is_here=True), "silent", "a firewall closes the port",
         "netsh advfirewall firewall add rule name=\"overlay\" dir=in action=allow protocol=TCP "
         "localport=50051-50054"),
        ("F", Observation(Reach.NO_ROUTE), "no route", "another network", "ipconfig getifaddr en0"),
        ("F", Observation(Reach.NO_NAME), "no address", "the name '192.168.1.2'",
         "correct its host"),
        ("F", Observation(Reach.OPEN), "no answer", "another program",
         "on 192.168.1.2: lsof -nP -iTCP:50056 -sTCP:LISTEN"),
        ("D", Observation(Reach.OPEN, is_here=True), "no answer", "frozen",
         "here: netstat -ano | findstr :50054"),
        ("F", answering("C"), "is C", "process C answers at 192.168.1.2:50056",
         "change the port"),
        ("F", answering("F", is_healthy=False), "stopping", "being stopped", "start mine.json"),
        ("F", answering("F", config_digest="other"), "other config", "another configuration",
         "copy two_hosts_config.json to every machine"),
        ("F", answering("F", version="2.0", wire_format=2), "other release",
         "it runs version 2.0, which does not understand 1.0", "put the same folder"),
        ("F", answering("F", streams=SHIPPED.limits.streams), "full",
         f"of its {SHIPPED.limits.streams} places for streams are taken", "close()"),
    ],
)  # fmt: skip
def test_each_problem_has_a_cause_and_a_remedy(
    process_id: str, seen: Observation, state: str, why: str, do: str
) -> None:
    found = of(process_id, **{process_id: seen})

    assert found.grade is Grade.BAD
    assert found.state == state
    assert why in found.why
    assert do in found.do


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "0.9"}, "it runs version 0.9; this machine has 1.0"),
        ({"clock_s": -83.2}, "its clock is 83 s behind this one's"),
        ({"clock_s": 5.1}, "its clock is 5 s ahead of this one's"),
    ],
)
def test_a_harmless_finding_is_only_a_note(changes: dict[str, Any], why: str) -> None:
    found = of("F", F=answering("F", **changes))

    assert found.grade is Grade.NOTE
    assert found.why == why


def test_where_the_package_is_installed_no_script_is_named() -> None:
    observed = {i: Observation(Reach.REFUSED, is_here=True) for i in SHIPPED.processes}
    asked = Diagnosis(SHIPPED, observed, "1.0", 1, "Linux", "mine.json", is_installed=True)

    found = asked.of_process(SHIPPED.processes["F"])

    assert found.do == "start it here: overlay-node mine.json F; its log in logs says more"


def test_the_remedy_covers_both_systems_if_the_other_machines_is_unknown():
    silent = {i: Observation(Reach.SILENT) for i in "CEF"}

    found = [of(i, **silent) for i in "CEF"]

    assert "off, another address, or a firewall" in found[0].why
    assert "the firewall on 192.168.1.2: Windows, as administrator: netsh" in found[0].do
    assert "Mac: System Settings" in found[0].do
    assert len(advice([(i, finding) for i, finding in zip("CEF", found, strict=True)])) == 1


def test_a_link_down_between_two_reachable_processes_is_blamed_on_a_firewall():
    down = [sees("F", "down", 12.4, "no answer in time"), sees("D")]

    found = link("E", "F", E=answering("E", neighbours=down))

    assert found.grade is Grade.BAD
    assert found.why == "down for 12 s: no answer in time"
    assert (
        "F answers here but not there: open the firewall on 192.168.1.2: System Settings"
        in found.do
    )


def test_a_link_that_stays_down_between_reachable_processes_points_at_the_log():
    found = [
        link(
            "A", "B", A=answering("A", neighbours=[sees("B", "down", since_s, "it does not know")])
        )
        for since_s in (2.0, 60.0)
    ]

    assert "will be back in a moment" in found[0].do
    assert "or see the log of A" in found[1].do


def test_a_link_to_a_process_that_is_gone_points_at_the_process():
    down = [sees("F", "down", 2.0), sees("D")]

    found = link("E", "F", E=answering("E", neighbours=down), F=Observation(Reach.REFUSED))

    assert (found.grade, found.do) == (Grade.BAD, "see F above")


def test_links_of_an_unreachable_process_have_no_findings():
    found = link("E", "F", E=Observation(Reach.SILENT))

    assert (found.state, found.why) == ("unknown", "")


def test_the_summary_says_whether_the_overlay_is_open_and_which_certificates_expire_soon():
    found = Examination({}, (), (), Protection("open", "OPEN: anyone", ("C: it expires soon",)))

    assert found.summary()[-2:] == ["OPEN: anyone", "warning: C: it expires soon"]


# On real processes


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with running(tmp_path_factory.mktemp("doctor"), six_processes()) as found:
        yield found


def doctor(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_client("doctor", path, "--deadline", 1.5, *more)


def test_doctor_reports_a_healthy_overlay_as_healthy(six: Overlay) -> None:
    done = doctor(six.path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 processes well, 6 of 6 links up" in done.stdout
    assert "+0.0" in done.stdout or "-0.0" in done.stdout  # one clock


def test_the_json_report_has_each_process_and_link(six: Overlay) -> None:
    report = json.loads(doctor(six.path, "--json").stdout)

    assert (report["ok"], report["exit_code"]) == (True, 0)
    assert [p["id"] for p in report["processes"]] == list("ABCDEF")
    assert all(p["here"] and abs(p["clock_offset_s"]) < 1 for p in report["processes"])
    assert {(k["from"], k["to"]) for k in report["links"]} == {
        ("A", "B"), ("A", "E"), ("B", "C"), ("B", "D"), ("E", "F"), ("E", "D"),
    }  # fmt: skip


def test_doctor_looks_at_the_leaders_journal_and_its_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "Dropbox"
    folder.mkdir()
    (folder / "mine.py").write_text("import time\n\ndef slow(*_):\n    time.sleep(60)\n")
    handlers = {"slow": {"call": "mine:slow"}}
    with running(folder, six_processes(handlers=handlers, journal="journal.db")) as found:
        with found.connect("A") as client:
            job = client.later("slow", b"x")
            until(lambda: job.state == "running", 20, "it runs")
        found.kill("A")
        found.start("A")

        done = doctor(found.path)
        report = json.loads(doctor(found.path, "--json").stdout)

    words = " ".join(done.stdout.split())
    at = found.address("A").replace(":", " ")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"A: its journal is in {folder}, which Dropbox seems to keep in step" in words
    assert "A: 1 job is quarantined: an attempt may have run" in words
    assert f"client.py {at} quarantine list" in words
    assert [finding["grade"] for finding in report["journal"]] == ["note", "note"]


def test_frozen_replaced_and_missing_processes_have_different_findings(
    six: Overlay, tmp_path: Path
) -> None:
    # C is frozen, D's port has another program, F's has none; A does not know this configuration.
    config = json.loads(six.path.read_text())
    config["processes"]["F"]["port"] = free_port()
    path = tmp_path / "other.json"
    six.freeze("C")
    try:
        with socket.create_server(("127.0.0.1", 0)) as program:
            config["processes"]["D"]["port"] = program.getsockname()[1]
            path.write_text(json.dumps(config))
            done = doctor(path, "--json")
    finally:
        six.thaw("C")

    states = {p["id"]: p["state"] for p in json.loads(done.stdout)["processes"]}
    assert done.returncode == 1
    assert {i: states[i] for i in "CDF"} == {
        "C": "no answer",
        "D": "no answer",
        "F": "not running",
    }
    assert {states[i] for i in "ABE"} == {"other config"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A worker that others can reach, without certificates."""
    config = six_processes()
    config["processes"]["C"]["bind"] = "0.0.0.0"
    with Overlay(tmp_path_factory.mktemp("opened"), config) as found:
        yield found.start("C")


@pytest.mark.parametrize("verb", ["doctor", "check CONFIG", "check", "top --once", "web"])
def test_each_verb_that_looks_at_an_overlay_says_that_it_is_open(
    opened: Overlay, verb: str
) -> None:
    at = ["127.0.0.1", str(opened.port("C"))]
    words = {
        "doctor": ["doctor", str(opened.path)],
        "check CONFIG": ["check", str(opened.path)],
        "check": [*at, "check"],
        "top --once": [*at, "top", "--once"],
    }
    name = str(opened.path) if words.get(verb, at)[-1] == str(opened.path) else "CONFIG"
    says = f"OPEN: anyone who can reach it can run its handlers; client.py secure {name} closes it"
    if verb == "web":
        poller = Poller(f"127.0.0.1:{opened.port('C')}").start()
        try:
            assert poller.newer(1, 10)["security"]["text"] == says
        finally:
            poller.close()
        return

    done = run_client(*words[verb])

    assert done.stdout.count(says) == 1, done.stdout + done.stderr


def test_if_no_process_answers_the_exit_code_is_4(tmp_path: Path) -> None:
    path = tmp_path / "nobody.json"
    path.write_text(json.dumps(six_processes()))

    done = doctor(path)

    assert done.returncode == 4
    assert (
        "A, B, C, D, E, F: nothing listens there: it was not started, or has ended. Start it here:"
        in done.stdout
    )


def test_a_machine_without_a_configured_address_is_shown_its_own(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.json"
    no_name = "x" * 70  # too long for a name, so no DNS query is sent
    path.write_text((ROOT / "two_hosts_config.json").read_text().replace("192.168.1.", no_name))

    done = doctor(path)

    assert "none of them is on this machine, which has" in done.stdout
    assert done.stdout.count("this machine does not know the name") == 2
    assert not done.stderr


def test_an_invalid_configuration_is_reported(tmp_path: Path) -> None:
    done = doctor(tmp_path / "none.json")

    assert done.returncode == 2
    assert done.stderr == f"client.py: no configuration file at '{tmp_path / 'none.json'}'\n"


# init


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "two_hosts_config.json"
    path.write_bytes((ROOT / "two_hosts_config.json").read_bytes())
    return path


def init(path: Path, *more: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return run_client("init", path, *more, stdin=typed.encode())


def hosts_in(path: Path) -> str:
    return " ".join(p.host for p in load(path).processes.values())


def test_init_writes_the_answers_and_keeps_the_format_of_the_file(file: Path) -> None:
    before = file.read_text()

    done = init(file, typed="10.0.0.5\nmac.local\n")

    assert done.returncode == 0, done.stderr
    assert file.read_text() == before.replace("192.168.1.1", "10.0.0.5").replace(
        "192.168.1.2", "mac.local"
    )
    assert f"client.py doctor {file}" in done.stdout


def test_enter_keeps_an_address_and_an_invalid_answer_is_asked_for_again(file: Path) -> None:
    done = init(file, typed="\nhttp://mac/\n10.0.0.600\n10.0.0.6\n")

    assert done.returncode == 0, done.stderr
    assert "'http://mac/' is not a name or an address of a machine" in done.stdout
    assert "'10.0.0.600' is not an address: four numbers from 0 to 255" in done.stdout
    assert hosts_in(file) == "192.168.1.1 192.168.1.1 10.0.0.6 192.168.1.1 10.0.0.6 10.0.0.6"


@pytest.mark.parametrize("answer", ["127.0.0.1", "here"])
def test_one_machine_is_enough_and_the_summary_has_all_its_processes(
    file: Path, answer: str
) -> None:
    done = init(file, typed=f"{answer}\n" * 2)

    assert done.returncode == 0, done.stderr
    assert "One machine is enough" in done.stdout
    assert addressing.OF_ONE_HOST in done.stdout
    (host,) = set(hosts_in(file).split())
    written = done.stdout.partition(f"{host}: ")[2]
    assert [word for word in written.split() if word in tuple("ABCDEF")] == list("ABDCEF")
    assert "(this machine)" in written
    assert "It is for one machine; start it there" in written
    assert "Careful" not in written
    assert "every machine" not in written


def test_two_addresses_can_be_swapped(file: Path) -> None:
    done = init(file, "--host", "192.168.1.1=192.168.1.2", "--host", "192.168.1.2=192.168.1.1")

    assert done.returncode == 0, done.stderr
    assert hosts_in(file) == (
        "192.168.1.2 192.168.1.2 192.168.1.1 192.168.1.2 192.168.1.1 192.168.1.1"
    )


@pytest.mark.parametrize(
    ("arguments", "typed", "complaint"),
    [
        ([], "10.0.0.5\n", "an answer is missing"),
        (["--host", "1.2.3.4=10.0.0.5"], "", "no process has the host '1.2.3.4'; there are"),
        (["--host", "192.168.1.1"], "", "'192.168.1.1' is not OLD=NEW"),
        (["--host", "192.168.1.1=a b"], "", "'a b' is not a name or an address"),
    ],
)
def test_a_file_that_cannot_be_written_is_unchanged(
    file: Path, arguments: list[str], typed: str, complaint: str
) -> None:
    before = file.read_bytes()

    done = init(file, *arguments, typed=typed)

    assert done.returncode == 2
    assert complaint in done.stderr
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_host_that_would_give_two_processes_one_address_is_rejected(file: Path) -> None:
    raw = json.loads(file.read_text())
    raw["processes"]["F"]["port"] = raw["processes"]["A"]["port"]
    file.write_text(json.dumps(raw))

    with pytest.raises(ConfigError, match=r"port 50051 on 10.0.0.5 is process A's already"):
        addressing.write(file, {"192.168.1.1": "10.0.0.5", "192.168.1.2": "10.0.0.5"})

    assert json.loads(file.read_text()) == raw


def test_only_the_hosts_of_processes_change(file: Path) -> None:
    raw = json.loads(file.read_text())
    raw["processes"]["C"]["options"] = {"host": "192.168.1.2"}
    file.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + json.dumps(raw), encoding="utf-8")

    addressing.write(file, {"192.168.1.2": "10.0.0.6"})

    assert load(file).processes["C"].options == {"host": "192.168.1.2"}
    assert load(file).processes["C"].host == "10.0.0.6"
