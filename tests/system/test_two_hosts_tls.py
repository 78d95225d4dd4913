"""Two machines from two fresh copies of the project to a closed overlay, and a machine that was
off for too long. Each in a network namespace, see tests/harness/hosts.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.model.identity import OPERATOR, PROCESS, Identity
from overlay.security.certificates import DAY_S, key_pem, new_key, pem_of
from overlay.security.tls_folder import USER, TlsFolder
from tests.harness.cluster import ROOT, until
from tests.harness.hosts import ADDRESSES, SHIPPED, Hosts
from tests.project.test_launcher import copy_project
from tests.system.test_two_hosts import hosts_or_reason

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="network namespaces need Linux"
)

LEADER = (ADDRESSES[1], "50051")
PINK = (ADDRESSES[2], "50055")  # E, on the second machine
WELL = "6 of 6 processes well, 6 of 6 links up"
ALL_ANSWER = "3 of 3 workers answered"
LOST = (-400 * DAY_S, -35 * DAY_S)  # a certificate's days, of a machine that was off for a year
WHISPER, SHOUT = "whispered-to-all-workers", "shouted-in-plaintext"
LISTEN = """
import select, socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # 3: every protocol
wire.settimeout(0.1)
print("listening", flush=True)
seen = b""
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        seen += wire.recv(65536)
    except TimeoutError:
        pass
print(*(word for word in sys.argv[1:] if word.encode() in seen))
"""
SHOUTING = f"""
import socket
with socket.create_connection({LEADER!r}, 5) as connection:
    connection.sendall(b"{SHOUT}")
"""


class Machine:
    """A copy of the project on a host."""

    def __init__(self, folder: Path, hosts: Hosts, host: int) -> None:
        self.folder = folder / f"machine {host}"
        self.hosts = hosts
        self.host = host
        self.address = ADDRESSES[host]
        self.tls = TlsFolder(self.folder / "tls")
        copy_project(self.folder)

    def client(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(self.host, sys.executable, "client.py", *words, cwd=self.folder)

    def launcher(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = sys.executable, "scripts/launcher.py", verb, SHIPPED.name, *words
        return self.hosts.run(self.host, *command, cwd=self.folder, within_s=90)

    def stranger(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """A caller on this machine that has no certificate."""
        command = sys.executable, str(ROOT / "client.py"), *words
        return self.hosts.run(self.host, *command, cwd=folder)


class TwoMachines:
    """`first` has the leader and the authority's key."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder = folder
        self.first, self.second = (Machine(folder, hosts, host) for host in ADDRESSES)

    def stop(self) -> None:
        for machine in (self.first, self.second):
            machine.launcher("stop", "--grace-s", "3")

    def until_well(self) -> None:
        until(lambda: WELL in self.first.client("doctor", SHIPPED.name).stdout, 20, WELL)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMachines]:
    """As a newcomer does it: `secure`, start, and on the other machine `join`, start."""
    with hosts_or_reason() as hosts:
        made = TwoMachines(tmp_path_factory.mktemp("closed"), hosts)
        try:
            secured = made.first.client("secure", SHIPPED.name)
            assert secured.returncode == 0, secured.stdout
            started(made.first, "ABD")
            joined = made.second.client("join", line_in(secured.stdout))
            assert joined.returncode == 0, joined.stdout
            assert f"{SHIPPED.name} was another one here" in joined.stdout
            started(made.second, "CEF")
            made.until_well()
            yield made
        finally:
            made.stop()


def started(machine: Machine, ids: str) -> None:
    done = machine.launcher("start")
    assert (done.returncode, re.findall(r"(?m)^([A-F])  ", done.stdout)) == (0, list(ids)), done


def line_in(said: str) -> str:
    return re.search(r"join (overlay-1\S+)", said)[1]


# A closed overlay


def test_who_listens_on_the_wire_reads_neither_payloads_nor_answers(closed: TwoMachines) -> None:
    hosts = closed.first.hosts
    command = sys.executable, "-c", LISTEN, WHISPER, SHOUT
    with hosts.popen(1, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listening:
        assert listening.stdin is not None
        assert listening.stdout is not None
        assert listening.stdout.readline() == "listening\n"
        asked = closed.second.client(*LEADER, "--payload", WHISPER)
        hosts.run(2, sys.executable, "-c", SHOUTING)  # that it does hear what is plaintext
        found, _ = listening.communicate("end\n", timeout=20)

    assert asked.stdout.count(WHISPER) == 3, "all workers' answers"
    assert found.split() == [SHOUT]


@pytest.mark.parametrize(
    ("host", "words", "expected"),
    [
        (1, PINK, "2 of 2 workers answered"),
        (2, LEADER, ALL_ANSWER),
        (2, ("doctor", SHIPPED.name), WELL),  # the first machine's, too, before the first test
        (2, (*LEADER, "logs", "F"), "F overlay.node INFO mutual TLS as process F"),
    ],
    ids=["team leader", "leader", "doctor", "logs"],
)
def test_each_side_is_answered(
    closed: TwoMachines, host: int, words: tuple[str, ...], expected: str
) -> None:
    machine = closed.first if host == 1 else closed.second
    done = machine.client(*words)

    assert (done.returncode, expected in done.stdout) == (0, True), done.stdout


def test_both_copies_have_one_configuration_and_one_has_the_authority(closed: TwoMachines) -> None:
    first, second = closed.first, closed.second
    configuration = (first.folder / SHIPPED.name).read_bytes()

    assert b'"tls": "tls"' in configuration
    assert (second.folder / SHIPPED.name).read_bytes() == configuration
    assert (first.tls.can_issue, second.tls.can_issue) == (True, False)
    assert {path.stat().st_mode & 0o077 for path in second.tls.path.glob("*_*.pem")} == {0}


def test_plaintext_from_the_other_machine_is_refused_with_the_reason(
    closed: TwoMachines, tmp_path: Path
) -> None:
    done = closed.second.stranger(tmp_path, *LEADER)

    assert done.returncode == 4
    assert "it wants TLS and a certificate, and there are none here" in done.stdout
    assert "'client.py join LINE' takes it here" in done.stdout


def test_plaintext_on_the_leaders_own_machine_is_answered_but_for_operators(
    closed: TwoMachines, tmp_path: Path
) -> None:
    asked = closed.first.stranger(tmp_path, "127.0.0.1", LEADER[1])
    drained = closed.first.stranger(tmp_path, "127.0.0.1", LEADER[1], "drain")

    assert (asked.returncode, ALL_ANSWER in asked.stdout) == (0, True), asked.stdout
    assert drained.returncode == 1
    assert "drain is for operators" in drained.stdout


def test_the_second_machines_user_is_revoked_and_its_processes_go_on(closed: TwoMachines) -> None:
    name = next(i.name for i in identities(closed) if i.name.endswith("192-168-1-2"))

    revoked = closed.first.client("revoke", name)

    assert revoked.stdout == f"revoked: operator {name}\n"
    for place in (LEADER, PINK):  # E hears of it from the leader

        def refused(place: tuple[str, str] = place) -> bool:
            done = closed.second.client(*place)
            return f"the certificate of operator {name} was revoked" in done.stdout

        until(refused, 5, f"{name} is refused at {place}")
    assert ALL_ANSWER in closed.first.client(*LEADER).stdout
    restarted = closed.second.launcher("restart", "C")  # with the process's own certificate
    assert (restarted.returncode, "serves again" in restarted.stdout) == (0, True), restarted.stdout


def identities(closed: TwoMachines) -> list[Identity]:
    from overlay.security.certificates import identity_of

    return [identity_of(one) for _, one in closed.first.tls.issued()]


# A machine that was off for too long, and clocks


def test_a_machine_off_past_expiry_says_what_to_do_and_joins_again_with_a_clock_a_day_off(
    closed: TwoMachines,
) -> None:
    first, second = closed.first, closed.second
    assert second.launcher("stop").returncode == 0
    for process_id in "CEF":
        age(closed, process_id, *LOST)
    age(closed, "", *LOST)

    refused = second.launcher("start")
    asked = second.client(*LEADER)
    assert refused.returncode == 1
    assert "process C: the certificate of process C expired on" in refused.stdout
    assert "35 days ago by this machine's clock" in refused.stdout
    assert "'client.py invite NAME --host HOST' makes a line" in refused.stdout
    assert re.search(
        r"certificate of operator me expired on .*'client.py invite NAME'", asked.stdout
    )

    line = line_in(first.client("invite", "pc-2", "--host", second.address, "--operator").stdout)
    assert second.client("join", line).returncode == 0
    age(closed, "C", 0.99 * DAY_S)  # as if the leader's clock, by which it issued this, were ahead
    started(second, "CEF")
    closed.until_well()
    assert ALL_ANSWER in second.client(*LEADER).stdout


def test_a_clock_that_is_five_days_off_says_so(closed: TwoMachines) -> None:
    """As if the leader's clock, by which it issued this certificate, were ahead."""
    first, second = closed.first, closed.second
    age(closed, "C", 5 * DAY_S)  # the running process takes it for a renewal

    def doctor_says_it() -> bool:
        said = first.client("doctor", SHIPPED.name).stdout
        return "the certificate of process C is valid only from" in said

    until(doctor_says_it, 15, "doctor says it")
    refused = second.launcher("restart", "C")
    assert refused.returncode == 1
    assert re.search(r"that is in 4 days; one of the two clocks is wrong; set this", refused.stdout)


def age(closed: TwoMachines, process_id: str, since_s: float, valid_s: float = 365 * DAY_S) -> None:
    """Gives a process of the second machine, or its user, a certificate with these days."""
    tls, key = closed.second.tls, new_key()
    authority = closed.first.tls.authority()
    identity = Identity(authority.cluster, OPERATOR, "me")
    if process_id:
        identity = Identity(authority.cluster, PROCESS, process_id)
    stem = TlsFolder.stem(process_id) if process_id else USER
    made = authority.issue(key.public_key(), identity, (), valid_s, since_s)
    tls.write_holder(stem, key_pem(key), pem_of(made))
