"""scripts/: the launcher, the demo, the set-up and the start scripts, with real processes.

`launcher` runs a command in this process, and `typed` as a user does: in a Python of its own.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from packaging.requirements import Requirement

import overlay
from overlay.model.identity import OPERATOR, PROCESS, Identity
from overlay.security.certificates import DAY_S
from overlay.security.tls_folder import TlsFolder
from tests.harness import same_process
from tests.harness.certificates import user_of
from tests.harness.cluster import ROOT, free_port, freeze
from tests.harness.nats_servers import free_server_ports
from tests.harness.same_process import ran

COPIED = (
    "node.py",
    "client.py",
    "overlay",
    "overlay.proto",
    "scripts",
    "examples",
    "two_hosts_config.json",
    "one_host_config.json",
)
STUBS = ("overlay_pb2.py", "overlay_pb2.pyi", "overlay_pb2_grpc.py")
THREE = {"A": ("leader", "B"), "B": ("team_leader", "AC"), "C": ("worker", "B")}
SHELLS = {"dash": ["dash"], "busybox": ["busybox", "sh"], "zsh": ["zsh"]}

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor sh")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in a folder whose name a careless script would not survive."""
    folder = tmp_path_factory.mktemp("scripts") / "Grüße & läuft (2)"
    copy_project(folder)
    yield folder
    for process in processes_of(folder):
        process.kill()


def copy_project(folder):
    ignore = shutil.ignore_patterns(".demo.json")  # not the bytecode: no start compiles it again
    for name in (*COPIED, *STUBS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy2(source, folder / name)
    for compiled in ROOT.glob("__pycache__"):
        shutil.copytree(compiled, folder / compiled.name)


@pytest.fixture
def fresh(project, tmp_path, request):
    """A configuration of three loopback processes, which are stopped at the end if they run."""
    config = write_three(
        project / f"{request.node.name[:40]}.json", log_dir=f"logs/{tmp_path.name}"
    )
    yield config
    stop_all(project, config)


@pytest.fixture(scope="module")
def shared(project):
    config = write_three(project / "shared.json", log_dir="logs/shared")
    yield config
    stop_all(project, config)


@pytest.fixture
def three(project, shared):
    """Three processes that run: what other tests have stopped or killed is started again."""
    return all_started(project, shared)


def all_started(project, config):
    started = launcher(project, "start", config)
    assert started.returncode == 0, started.stdout + started.stderr
    return config


def stop_all(project, config):
    launcher(project, "stop", config, "--grace-s", "5")
    assert processes_of(config.parent, config.name) == []


def write_three(path, **extra):
    # All three are held for a moment, so that they differ.
    held = [socket.create_server(("127.0.0.1", 0)) for _ in THREE]
    processes = {}
    for (name, (role, neighbors)), one in zip(THREE.items(), held, strict=True):
        port = one.getsockname()[1]
        one.close()
        processes[name] = {"id": name, "role": role, "team": "green", "host": "127.0.0.1"}
        processes[name] |= {"port": port, "neighbors": list(neighbors)}
    path.write_text(json.dumps({"processes": processes, **extra}), encoding="utf-8")
    return path


@functools.cache
def launcher_main():
    path = list(sys.path)
    try:
        return runpy.run_path(str(ROOT / "scripts" / "launcher.py"))["main"]
    finally:
        sys.path[:] = path


def launcher(project, *arguments):
    """Runs a command of the launcher to its end, in this process."""
    words = [str(word) for word in arguments]
    return ran(lambda: launcher_main()(words), "launcher.py", *words, folder=project)


def client(project, *arguments):
    """Runs a command of client.py to its end, in this process."""
    return same_process.client(*arguments, folder=project)


def typed(project, *arguments, script="launcher.py"):
    """Runs a script to its end as a user does, in a Python of its own."""
    command = [sys.executable, str(project / "scripts" / script), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=90,
    )


def processes_of(folder, *words):
    """The live processes that have the folder and all the words in their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if all(word in line for word in (str(folder), *words)):
            found.append(process)
    return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE and p.pid != os.getpid()]


def pids_in(table):
    """The pids by process id, from the table that start or status has printed."""
    rows = re.findall(r"(?m)^(\w+) +\w+ +green +127\.0\.0\.1:\d+ +(\d+)", table)
    return {name: int(pid) for name, pid in rows}


def port_of(config, name):
    return json.loads(config.read_text(encoding="utf-8"))["processes"][name]["port"]


def logs_of(config):
    settings = json.loads(config.read_text(encoding="utf-8"))
    return config.parent / settings.get("log_dir", "logs")


def log_of(config, name):
    return (logs_of(config) / f"process_{name.lower()}.log").read_text(encoding="utf-8")


def wait_for(condition, within_s=20.0):
    until = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < until, f"still {value!r} after {within_s:g} s"
        time.sleep(0.05)
    return value


def needs(tool):
    """Skips the test on a laptop without the tool; CI must have it."""
    if shutil.which(tool) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{tool} is not installed")
        pytest.skip(f"{tool} is not installed")


# The launcher


def test_status_shows_and_stop_ends_what_start_has_started(project, fresh):
    started = typed(project, "start", fresh)
    assert started.returncode == 0, started.stderr
    seen = typed(project, "status", fresh)
    stopped = typed(project, "stop", fresh)
    again = launcher(project, "stop", fresh)

    assert pids_in(started.stdout).keys() == set(THREE)
    assert re.search(r"(?m)^C .* \d+ ms ", started.stdout)
    assert seen.returncode == 0
    assert seen.stdout.count("serves\n") == 3
    assert pids_in(seen.stdout) == pids_in(started.stdout)
    assert stopped.returncode == 0
    assert stopped.stdout.count("stopped in") == 3
    assert processes_of(project, fresh.name) == []
    assert again.returncode == 0
    assert "nothing is running" in again.stdout
    kept = sorted(path.suffix for path in logs_of(fresh).iterdir())
    assert kept == [".lock"] * 3 + [".log"] * 3 + [".out"] * 3


def test_a_second_start_starts_only_what_is_missing(project, three):
    pids = pids_in(launcher(project, "status", three).stdout)
    psutil.Process(pids["C"]).kill()
    wait_for(lambda: not processes_of(project, three.name, " C "))
    seen = launcher(project, "status", three)
    second = launcher(project, "start", three)

    assert seen.returncode == 1
    assert re.search(r"(?m)^C: it died without a message after 20\d\d-.*kill -9", seen.stdout)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("already running") == 2
    assert {n: pids_in(second.stdout)[n] for n in "AB"} == {n: pids[n] for n in "AB"}
    assert pids_in(second.stdout)["C"] != pids["C"]


def test_status_does_not_say_that_a_drained_process_died(project, three):
    with overlay.connect(f"127.0.0.1:{port_of(three, 'C')}") as client:
        client.drain(grace_s=0.1)
    wait_for(lambda: not processes_of(project, three.name, " C "))
    seen = launcher(project, "status", three)
    again = launcher(project, "start", three)

    assert seen.returncode == 1
    assert re.search(r"(?m)^C: it stopped in order", seen.stdout)
    assert again.returncode == 0, again.stderr


def test_stop_restart_and_status_count_the_requests_left_behind(project, tmp_path):
    (project / "stuck.py").write_text("import time\ndef stuck(p, c): time.sleep(60)\n")
    config = write_three(
        project / "left.json",
        log_dir=f"logs/{tmp_path.name}",
        handlers={"stuck": "stuck:stuck"},
        drain_grace_s=0.2,
    )

    def leave_one(*verb):
        launcher(project, "start", config, "C")
        client = overlay.connect(f"127.0.0.1:{port_of(config, 'C')}")
        client.submit("stuck", "x")
        wait_for(lambda: client.metrics().active_requests == 1)
        found = verb[0](client) if callable(verb[0]) else launcher(project, *verb)
        client.close()
        return found

    restarted = leave_one("restart", config, "C")
    stopped = leave_one("stop", config, "C")
    leave_one(lambda client: client.drain(grace_s=0.1))
    wait_for(lambda: not processes_of(project, config.name, " C "))
    seen = launcher(project, "status", config)
    rest = launcher(project, "stop", config)

    assert re.search(r"C  stopped in .* s, 1 request left behind, serves again", restarted.stdout)
    assert re.search(r"(?m)^C .*stopped in .* s, 1 request left behind$", stopped.stdout)
    assert stopped.returncode == 1
    assert re.search(r"(?m)^C: it stopped, 1 request left behind\.", seen.stdout)
    assert rest.returncode == 0, rest.stdout


def test_when_a_process_cannot_start_the_reason_is_printed_and_the_others_stop(project, fresh):
    with socket.create_server(("127.0.0.1", port_of(fresh, "C"))):
        failed = launcher(project, "start", fresh)

    assert failed.returncode == 1
    assert "process C ended with exit code 2; the end of" in failed.stderr
    assert f"port {port_of(fresh, 'C')}" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "A, B did start and were stopped again" in failed.stderr
    assert processes_of(project, fresh.name) == []
    assert list(logs_of(fresh).glob("*.pid")) == []


@posix_only
def test_a_python_that_no_longer_exists_is_named_and_the_others_are_not_touched(project, three):
    python = "/no/such/python"
    packages = Path(grpc.__file__).parent.parent

    def without_python(*arguments):
        return subprocess.run(
            [python, str(project / "scripts" / "launcher.py"), *map(str, arguments)],
            executable=sys.executable,
            cwd=project,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(packages)},
            timeout=90,
        )

    launcher(project, "stop", three, "C")
    before = pids_in(launcher(project, "status", three).stdout)
    failed = without_python("start", three)
    half = without_python("restart", three)
    seen = launcher(project, "status", three)

    why = f"cannot be started: {python}: No such file or directory\n"
    assert before.keys() == {"A", "B"}
    assert (failed.returncode, failed.stderr) == (2, f"process C {why}")
    down = "process B is down; the others were not touched\n"
    assert (half.returncode, half.stderr) == (1, f"process B {why}{down}")
    assert pids_in(seen.stdout) == {"A": before["A"]}
    assert len(processes_of(project, three.name)) == 1


def test_only_the_named_processes_are_started_and_stopped_and_status_agrees_with_check(
    project, fresh
):
    started = launcher(project, "start", fresh, "B", "C")
    two = launcher(project, "status", fresh.name)
    checked = client(project, "check", fresh.name)
    stopped = launcher(project, "stop", fresh, "C")
    status = [project, "status", fresh]
    wait_for(lambda: re.search(r"(?m)^B to C: ", launcher(*status).stdout))
    seen = launcher(*status)
    unknown = launcher(project, "start", fresh, "Z")

    assert pids_in(started.stdout).keys() == {"B", "C"}
    summary = two.stdout.partition("\n\n")[2]
    assert summary.startswith("2 of 3 processes well, 1 of 2 links up\nA: nothing listens there")
    assert summary == checked.stdout.partition("\n\n")[2]
    assert re.search(r"(?m)^C +\d+ +stopped in", stopped.stdout)
    assert re.search(r"(?m)^A .*not running$", seen.stdout)
    assert unknown.returncode == 2
    assert "no process 'Z'" in unknown.stderr


def test_two_configurations_do_not_share_a_log_folder(project, three):
    other = write_three(project / "other.json", log_dir=str(logs_of(three)))
    refused = launcher(project, "start", other)
    stopped = launcher(project, "stop", other)

    assert refused.returncode == 2
    assert re.search(f"process [ABC] of {three.name} runs", refused.stderr)
    assert "nothing is running" in stopped.stdout
    assert len(processes_of(project, three.name)) == 3


def test_a_pid_that_now_belongs_to_another_program_is_never_touched(project, fresh):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        created = psutil.Process(sleeper.pid).create_time() - 100
        stale = {"id": "C", "rank": 0, "pid": sleeper.pid, "create_time": created, "port": 1}
        stale |= {"config": str(fresh), "token": "t", "stop_file": str(logs_of(fresh) / "c.stop")}
        logs_of(fresh).mkdir(parents=True)
        (logs_of(fresh) / "process_c.pid").write_text(json.dumps(stale), encoding="utf-8")
        stopped = launcher(project, "stop", fresh)

        assert stopped.returncode == 0
        assert "had ended before" in stopped.stdout
        assert sleeper.poll() is None
        assert list(logs_of(fresh).iterdir()) == []
    finally:
        sleeper.kill()
        sleeper.wait()


def test_restart_replaces_each_process_and_waits_until_its_neighbours_see_it(project, three):
    before = pids_in(launcher(project, "status", three).stdout)
    log_of_b = log_of(three, "B")
    restarted = launcher(project, "restart", three)
    seen = launcher(project, "status", three)

    after = pids_in(seen.stdout)
    assert restarted.returncode == 0, restarted.stderr
    order = re.findall(r"(?m)^(\w)  stopped in .* s, serves again after \d+ ms", restarted.stdout)
    assert order == ["C", "B", "A"]  # the leader last
    written = log_of(three, "B").removeprefix(log_of_b)
    assert re.search(r"link to C .*: it is stopping$", written, re.MULTILINE)
    assert seen.stdout.count("serves\n") == 3
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_a_restart_of_named_processes_leaves_the_others_alone(project, three):
    before = pids_in(launcher(project, "status", three).stdout)
    psutil.Process(before["C"]).kill()
    wait_for(lambda: not processes_of(project, three.name, " C "))
    restarted = launcher(project, "restart", three, "C", "B")
    seen = launcher(project, "status", three)

    after = pids_in(seen.stdout)
    assert restarted.returncode == 0, restarted.stderr
    # The second while the system still has an entry for what was killed.
    assert re.search("C  (was not running|had ended before), serves again", restarted.stdout)
    assert {n for n in "ABC" if before[n] == after[n]} == {"A"}


def test_a_restart_ends_at_the_first_process_that_does_not_come_back(project, three):
    before = pids_in(launcher(project, "status", three).stdout)
    launcher(project, "stop", three, "B")
    with socket.create_server(("127.0.0.1", port_of(three, "B"))):
        restarted = launcher(project, "restart", three, "B", "A")
    seen = launcher(project, "status", three)

    assert restarted.returncode == 1
    assert "process B ended with exit code 2; the end of" in restarted.stderr
    assert "process B is down; the others were not touched" in restarted.stderr
    assert pids_in(seen.stdout)["A"] == before["A"]


@posix_only
def test_a_stuck_process_is_killed_after_its_grace_period(project, three):
    freeze(pids_in(launcher(project, "status", three).stdout)["C"])
    seen = launcher(project, "status", three)
    stopped = launcher(project, "stop", three, "C", "--grace-s", "0.2")

    assert re.search(r"(?m)^C: it runs as pid \d+ but does not answer at", seen.stdout)
    assert "killed after 0.2 s" in stopped.stdout
    assert stopped.returncode == 1
    assert processes_of(project, three.name, " C ") == []


@posix_only
def test_an_interrupted_start_leaves_nothing_running(project, fresh):
    command = [sys.executable, str(project / "scripts" / "launcher.py"), "start", str(fresh)]
    starting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: processes_of(project, fresh.name, "node.py"))
    starting.send_signal(signal.SIGINT)
    _, errors = starting.communicate(timeout=30)

    assert starting.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert processes_of(project, fresh.name) == []
    assert list(logs_of(fresh).glob("*.pid")) == []


def test_running_processes_can_be_stopped_when_their_file_is_broken(project, three):
    config = write_three(project / "broken.json")  # its logs are in the default folder
    launcher(project, "start", config, "C")
    config.write_text("{", encoding="utf-8")
    stopped = launcher(project, "stop", config)

    assert re.search(r"(?m)^C +\d+ +stopped in", stopped.stdout)
    assert "broken.json is not JSON" in stopped.stderr
    assert processes_of(project, config.name) == []


def test_a_file_without_a_process_for_this_machine_is_rejected_with_all_addresses(project):
    text = (ROOT / "two_hosts_config.json").read_text(encoding="utf-8")
    config = project / "elsewhere.json"
    # From a reserved range: no machine has these addresses, and none can be reached.
    config.write_text(text.replace("192.168.1.", "240.0.0."), encoding="utf-8")
    refused = launcher(project, "start", config)

    assert refused.returncode == 2
    assert "240.0.0.1 (A, B, D), 240.0.0.2 (C, E, F); this machine has" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["start", "x.json", "--no-such"], "unrecognized arguments: --no-such; run.py start"),
        (["stop", "--grace-s", "x", "x.json"], "--grace-s: invalid float value: 'x'; run.py stop"),
        (["restart"], "required: CONFIG; run.py restart"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_a_wrong_option_points_to_the_help_of_its_verb(project, words, says):
    done = launcher(project, *words)

    assert done.returncode == 2
    assert says in done.stderr
    assert "--help tells more" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# With certificates


@pytest.fixture(scope="module")
def secured(project):
    """Three processes in a folder of their own, after `client.py secure`."""
    config = own_folder(project, "secured")
    secure(project, config)
    return config


@pytest.fixture
def closed(project, tmp_path, secured):
    """A copy of them with other ports; they are stopped at the end if they run."""
    config = copy_of(project, tmp_path.name, secured)
    yield config
    stop_all(project, config)


@pytest.fixture(scope="module")
def shared_closed(project, secured):
    config = copy_of(project, "shared", secured)
    yield config
    stop_all(project, config)


@pytest.fixture
def closed_three(project, shared_closed):
    """Like `three`, with certificates."""
    return all_started(project, shared_closed)


def own_folder(project, name, **extra):
    folder = project / f"Büro {name}"
    folder.mkdir()
    return write_three(folder / "three.json", **extra)


def copy_of(project, name, secured):
    keys = json.loads(secured.read_text(encoding="utf-8"))
    del keys["processes"]
    config = own_folder(project, name, **keys)
    shutil.copytree(secured.parent / "tls", config.parent / "tls")
    return config


def secure(project, config):
    done = client(project, "secure", config)
    assert done.returncode == 0, done.stderr
    assert json.loads(config.read_text(encoding="utf-8"))["tls"] == "tls"


def system_script(folder, config):
    return subprocess.run(
        [sys.executable, str(ROOT / "test_system.py"), "127.0.0.1", str(port_of(config, "A"))],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


CLOSED = r"(?m)^closed: mutual TLS, certificates until 20\d\d-\d\d-\d\d$"


def test_an_overlay_with_certificates_is_started_shown_tested_and_stopped(
    project, closed, tmp_path
):
    started = launcher(project, "start", closed)
    seen = launcher(project, "status", closed)
    tested = system_script(closed.parent, closed)
    kept_out = system_script(tmp_path, closed)
    again = launcher(project, "start", closed)
    stopped = launcher(project, "stop", closed)

    assert started.returncode == 0, started.stderr
    assert pids_in(started.stdout).keys() == set(THREE)
    assert len(re.findall(CLOSED, started.stdout)) == 1
    assert seen.returncode == 0, seen.stdout
    assert seen.stdout.count("serves\n") == 3
    assert "3 of 3 processes well, 2 of 2 links up" in seen.stdout
    assert len(re.findall(CLOSED, seen.stdout)) == 1
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert kept_out.returncode == 4
    assert "it wants TLS and a certificate, and there are none here" in kept_out.stderr
    assert "docs/security.md says how to be let in" in kept_out.stderr
    assert again.stdout.count("already running") == 3
    assert len(re.findall(CLOSED, again.stdout)) == 1
    assert stopped.returncode == 0
    assert stopped.stdout.count("stopped in") == 3


def test_a_restart_with_certificates_loses_no_request(project, closed_three):
    before = pids_in(launcher(project, "status", closed_three).stdout)
    restarting = threading.Thread(
        target=lambda: restarts.append(typed(project, "restart", closed_three))
    )
    restarts, sent = [], []

    def payloads():
        """One after another, until the restart is over and there were more than 50.

        While the leader is away the map's window holds them back, the longer on a busy machine.
        """
        restarting.start()
        while restarting.is_alive() or len(sent) <= 50:
            sent.append(str(len(sent)))
            yield sent[-1]
            time.sleep(0.02)

    with overlay.connect(
        f"127.0.0.1:{port_of(closed_three, 'A')}", tls=closed_three.parent / "tls", patience_s=30
    ) as leader:
        answers = list(leader.map("echo", payloads(), window=8, timeout=30))
    after = pids_in(launcher(project, "status", closed_three).stdout)

    assert restarts[0].returncode == 0, restarts[0].stderr
    assert answers == [f"C: {number}".encode() for number in sent]
    assert len(sent) > 50
    assert before.keys() == after.keys() == set(THREE)
    assert not set(before.values()) & set(after.values())


def test_start_and_status_say_that_an_overlay_is_open_and_a_restart_closes_it(project, tmp_path):
    config = own_folder(project, tmp_path.name)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"port"', '"bind": "0.0.0.0", "port"'), encoding="utf-8")
    started = launcher(project, "start", config)
    open_ = launcher(project, "status", config)
    secure(project, config)
    between = launcher(project, "status", config)
    restarted = launcher(project, "restart", config)
    seen = launcher(project, "status", config)
    stopped = launcher(project, "stop", config)

    says = "OPEN: anyone who can reach it can run its handlers; client.py secure "
    for done in (started, open_):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(says) == 1
        assert re.search(rf'(?m)^{says}"Büro .*three.json" closes it$', done.stdout)
        assert "closed" not in done.stdout
    assert between.returncode == 1
    assert "it speaks plaintext, and this side wants TLS" in between.stdout
    assert "or restart it: " in between.stdout
    assert restarted.returncode == 0, restarted.stderr
    assert seen.returncode == 0, seen.stdout
    assert len(re.findall(CLOSED, seen.stdout)) == 1
    assert says not in seen.stdout
    assert stopped.stdout.count("stopped in") == 3


@pytest.mark.parametrize("missing", ["user.pem", "process_c.pem", "ca.pem"])
def test_a_start_says_what_makes_a_certificate_that_is_missing(project, closed, missing):
    (closed.parent / "tls" / missing).unlink()
    failed = launcher(project, "start", closed, "C")

    assert failed.returncode != 0
    assert "three.json asks for TLS, and" in failed.stderr
    assert f"{missing} cannot be read: No such file or directory" in failed.stderr
    assert "makes certificates with 'client.py secure three.json'" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert processes_of(closed.parent) == []


def test_a_start_works_without_a_valid_certificate_of_the_user_and_warns(project, closed, tmp_path):
    tls = TlsFolder(closed.parent / "tls")
    expired = user_of(tls, tmp_path / "expired", valid_s=-DAY_S / 2)
    shutil.copy(expired.holder("user"), tls.path)
    started = launcher(project, "start", closed, "C")

    assert started.returncode == 0, started.stderr
    assert "warning: the certificate of caller anna expired on 20" in started.stdout
    assert "'client.py secure CONFIG' makes a new one" in started.stdout


def test_a_start_does_not_wait_in_silence_for_a_process_whose_certificate_expired(
    project, closed, tmp_path
):
    tls = TlsFolder(closed.parent / "tls")
    identity = Identity(tls.authority().cluster, PROCESS, "C")
    expired = user_of(tls, tmp_path / "expired", identity=identity, valid_s=-DAY_S / 2)
    shutil.copy(expired.holder("user"), tls.path / "process_c.pem")
    (tls.path / "ca.key").unlink()  # with it the process would make itself a new one
    failed = launcher(project, "start", closed, "C")

    assert failed.returncode == 1
    assert "process C ended with exit code 2" in failed.stderr
    assert "the certificate of process C expired on" in failed.stderr
    assert "'client.py invite NAME --host HOST' makes a line" in failed.stderr
    assert processes_of(closed.parent) == []


def test_a_start_warns_of_a_certificate_that_expires_within_a_month(
    project, closed_three, tmp_path
):
    tls = TlsFolder(closed_three.parent / "tls")
    soon = user_of(tls, tmp_path / "soon", kind=OPERATOR, valid_s=9.5 * DAY_S)
    before = tls.holder("user").read_bytes()
    shutil.copy(soon.holder("user"), tls.path)
    try:
        started = launcher(project, "start", closed_three)
        seen = launcher(project, "status", closed_three)
    finally:
        tls.holder("user").write_bytes(before)

    assert started.returncode == seen.returncode == 0, started.stderr
    for done in (started, seen):
        assert "warning: the certificate of operator anna expires in 9 days" in done.stdout


# The first function, as in the README


def test_the_readmes_first_function_runs_and_stop_is_for_good(project, tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    page = page.partition("## Your own function")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?ms)^```\w+\n(.*?)^```$", page)
    module, entry, commands = (block.strip() for block in blocks[:3])
    folder = project / "first function"
    copy_project(folder)
    (folder / "mine.py").write_text(module, encoding="utf-8")
    config = folder / "one_host_config.json"
    text = config.read_text(encoding="utf-8").replace('"processes"', f'{entry} "processes"')
    for port in range(50051, 50057):  # which may be taken here
        text = text.replace(str(port), str(free_port()))
    config.write_text(text, encoding="utf-8")

    def run(command):
        words = shlex.split(command.replace("50051", str(port_of(config, "A"))))
        assert words.pop(0).startswith("python")
        if words[0] == "scripts/run.py":  # it would set up the copy first
            words[0] = "scripts/launcher.py"
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    start, activate, ask_all, ask_any = commands.splitlines()
    stop = start.replace(" start ", " stop ")
    run(start)
    to_all, to_any = run(ask_all), run(ask_any)
    run(f"{stop} F")
    wait_for(lambda: "link to F" in log_of(config, "E").partition("stopping")[0])
    log_of_e = log_of(config, "E")
    run(stop)

    assert activate.startswith(". .venv/bin/activate")
    assert all(f"HELLO from {worker}" in to_all for worker in "CDF")
    assert "HELLO from" in to_any
    assert re.search(r"link to F .* is draining: it is stopping for good$", log_of_e, re.MULTILINE)
    assert processes_of(folder) == []


# The demo


@pytest.fixture(scope="module")
def demos(project):
    """A demo, a second beside it, and a third after the first was killed."""
    command = [sys.executable, str(project / "scripts" / "demo.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as first:
        try:
            page = page_of(read_until(first.stdout, "watch them work"))
            second = typed(project, "--once", script="demo.py")
        finally:
            first.kill()
    left = processes_of(project, ".demo.json", "node.py")
    third = typed(project, "--once", script="demo.py")
    return first.pid, second, left, third, page


def read_until(stream, words):
    """The output up to the line with these words, which is included."""
    output = ""
    while words not in output:
        line = stream.readline()
        assert line, f"it ended without '{words}':\n{output}"
        output += line
    return output


def page_of(output):
    """The page at the address that the demo has printed."""
    address = re.search(r"watch them work: (http://\S+)", output)
    with urllib.request.urlopen(address[1], timeout=10) as answer:
        return answer.read().decode()


def test_the_demo_shows_right_answers_and_leaves_nothing_running(project, demos):
    shown = demos[3]

    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "its path: A B C E D F; answered: 3 of 3" in shown.stdout
    assert "0 failed, 0 refused" in shown.stdout
    assert len(list((project / "logs" / "demo" / "thumbnails").glob("*.jpg"))) > 3
    assert processes_of(project, ".demo.json") == []


@pytest.fixture(scope="module")
def beside_closed(tmp_path_factory):
    """A demo beside a closed configuration, which stays up until Ctrl-C ends it."""
    folder = tmp_path_factory.mktemp("beside") / "closed"
    copy_project(folder)
    secure(folder, folder / "one_host_config.json")
    command = [sys.executable, str(folder / "scripts" / "demo.py")]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as demo:
        try:
            output = read_until(demo.stdout, "press Ctrl-C")
            page = page_of(output)
            demo.send_signal(signal.SIGINT)
            output += demo.communicate(timeout=60)[0]
        finally:
            demo.kill()
    return demo.returncode, output, page, processes_of(folder)


@posix_only
def test_the_demo_runs_in_plaintext_beside_a_closed_configuration(beside_closed):
    code, output, page, _ = beside_closed

    assert code == 0, output
    assert "NOT RIGHT" not in output
    assert "<title>overlay</title>" in page


@posix_only
def test_ctrl_c_ends_the_demo_and_its_processes(beside_closed):
    _, output, _, left = beside_closed

    assert "all six processes have stopped" in output
    assert "Traceback" not in output
    assert left == []


@posix_only
def test_the_commands_that_the_demo_prints_use_its_own_python(beside_closed):
    command = re.search(r"(?m)^  (.*client\.py.*)$", beside_closed[1])[1]
    assert os.path.abspath(shlex.split(command)[0]) == sys.executable


def test_a_second_demo_says_that_one_is_running(demos):
    pid, second, *_ = demos

    assert second.returncode == 2
    assert f"already running as pid {pid}" in second.stderr
    assert "run.py stop" in second.stderr


def test_the_next_demo_stops_what_a_killed_one_has_left_running(demos):
    left, third = demos[2:4]

    assert len(left) == 6
    assert "stopped A, B, C, D, E, F, left by a demo that was killed" in third.stdout
    assert not any(process.is_running() for process in left)


def test_the_demos_page_ends_also_when_the_demo_is_killed(project, demos):
    assert "<title>overlay</title>" in demos[4]
    wait_for(lambda: not processes_of(project, "client.py"))


# The start scripts


@posix_only
@pytest.mark.parametrize("shell", SHELLS)
def test_the_start_and_stop_scripts_run_in_every_shell(shell, tmp_path):
    needs(SHELLS[shell][0])
    stamp = ROOT / ".venv" / "overlay-setup.json"
    if not stamp.exists():
        assert not os.environ.get("CI"), "CI runs the tests through scripts/run.py"
        pytest.skip(".venv was not made by scripts/run.py")
    folder = tmp_path / "mit Leerzeichen ß"
    folder.mkdir()
    config = write_three(folder / "three.json")

    def script(name, *arguments):
        call = [*SHELLS[shell], str(ROOT / "scripts" / name), "three.json", *arguments]
        return subprocess.run(call, cwd=folder, capture_output=True, encoding="utf-8", timeout=60)

    started = script("start_macos.sh", "C")
    stopped = script("stop_all.sh")

    assert started.returncode == 0, started.stderr
    assert pids_in(started.stdout).keys() == {"C"}
    assert stopped.returncode == 0, stopped.stderr
    assert re.search(r"(?m)^C +\d+ +stopped in", stopped.stdout)
    assert processes_of(config.parent) == []


@pytest.mark.parametrize(
    "script", ["scripts/start_macos.sh", "scripts/stop_all.sh", "build_proto.sh", ".ci/run"]
)
def test_shellcheck_finds_no_problem_in_a_script(script):
    needs("shellcheck")
    dialect = "bash" if script == ".ci/run" else "sh"
    command = ["shellcheck", "-s", dialect, "-S", "style", str(ROOT / script)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["start_windows.bat", "stop_all.bat"])
def test_batch_files_have_windows_line_ends_and_only_ascii(name):
    text = (ROOT / "scripts" / name).read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n")
    assert text.isascii()


# The set-up


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without packages, and a project that was not set up yet."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    project = folder / "project"
    copy_project(project)
    scripts = folder / "python" / ("Scripts" if os.name == "nt" else "bin")
    return scripts / "python", project


@pytest.mark.parametrize("is_half_there", [False, True])
@pytest.mark.parametrize("verb", ["stop", "status"])
def test_stop_and_status_install_nothing(bare, verb, is_half_there):
    python, project = bare
    if is_half_there and not (project / ".venv").exists():
        shutil.copytree(python.parent.parent, project / ".venv", symlinks=True)
    before = sorted(path for path in project.rglob("*") if "__pycache__" not in path.parts)
    command = [python, project / "scripts" / "run.py", verb, "one_host_config.json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)

    assert before == sorted(path for path in project.rglob("*") if "__pycache__" not in path.parts)
    if verb == "stop":
        assert (done.returncode, done.stderr) == (0, "")
        assert "nothing is running that was started here" in done.stdout
    else:
        assert done.returncode == 2
        assert "nothing is set up here" in done.stderr


@pytest.mark.parametrize("log_dir", ["logs", "mine"])
def test_stop_says_so_when_the_set_up_that_it_needs_is_gone(bare, log_dir):
    python, project = bare
    config = write_three(project / "started.json", log_dir=log_dir)
    (project / log_dir).mkdir(exist_ok=True)
    pid_file = project / log_dir / "process_a.pid"
    pid_file.touch()
    try:
        command = [python, project / "scripts" / "run.py", "stop", config]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=30)
    finally:
        pid_file.unlink()

    assert done.returncode == 2
    assert "set it up, which needs the network, and try again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def environment(tmp_path):
    """The names in scripts/environment.py, whose paths lead into an empty folder."""
    names = runpy.run_path(str(ROOT / "scripts" / "environment.py"))
    places = names["prepare"].__globals__
    places["ROOT"], places["VENV"] = tmp_path, tmp_path / ".venv"
    places["STAMP"] = tmp_path / ".venv" / "overlay-setup.json"
    places["INSTALLING"] = tmp_path / ".venv" / "overlay-installing"
    return places


def test_an_old_python_says_in_one_sentence_that_it_is_too_old():
    source = (ROOT / "scripts" / "run.py").read_text(encoding="ascii")
    ast.parse(source, feature_version=(3, 4))  # it has no f-strings and the like
    pretend = "import sys; sys.version_info = (3, 9, 18); exec(sys.stdin.read())"
    done = subprocess.run(
        [sys.executable, "-c", pretend], input=source, capture_output=True, encoding="utf-8"
    )

    assert done.returncode == 2
    assert "Python 3.10 or later is needed, this is 3.9" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_stubs_are_made_again_only_when_the_proto_or_protobuf_changed(environment, tmp_path):
    proto = tmp_path / "overlay.proto"
    proto.write_bytes((ROOT / "overlay.proto").read_bytes())
    facts = environment["probe"](sys.executable)

    def made():
        environment["make_stubs"](sys.executable, facts)
        return [(tmp_path / name).stat().st_mtime_ns for name in STUBS]

    first = made()
    assert made() == first
    proto.write_bytes(proto.read_bytes() + b"// changed\n")
    second = made()
    assert all(new > old for new, old in zip(second, first, strict=True))
    facts["protobuf"] = "0.0"
    assert made() != second


def test_a_half_made_environment_is_not_used(environment, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment["VENV"]], check=True)
    assert not environment["is_whole"]()  # killed before pip was in it
    environment["STAMP"].touch()
    assert environment["is_whole"]()
    environment["INSTALLING"].touch()
    assert not environment["is_whole"]()  # killed while pip worked


def test_a_failed_installation_says_why_and_leaves_the_environment_usable(environment, tmp_path):
    environment["VENV"].mkdir()
    lock = tmp_path / "requirements.lock"
    lock.write_text("nowhere-at-all==1.0 --hash=sha256:" + "0" * 64 + "\n", encoding="utf-8")
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        with pytest.raises(
            environment["Problem"], match=r"could not install requirements\.lock; it needs"
        ):
            environment["pip_install"](sys.executable, lock)
    finally:
        del os.environ["PIP_NO_INDEX"]
    assert not environment["INSTALLING"].exists()


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-nats"])
def test_a_lock_file_pins_every_requirement_and_names_no_index(name):
    lock = (ROOT / f"{name}.lock").read_text(encoding="utf-8")
    pins = {}  # some have two, for different systems
    for pinned, version in re.findall(r"(?m)^([a-z0-9-]+)==([^ ]+)", lock):
        pins.setdefault(pinned, []).append(version)
    lines = (ROOT / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]

    assert [n for n in wanted if not list(n.specifier.filter(pins[n.name.lower()]))] == []
    assert "://" not in lock
    assert "--find-links" not in lock


def test_the_servers_of_jobs_run_beside_the_processes_and_are_stopped_after_them(project, fresh):
    ports = free_server_ports(3)
    written = json.loads(fresh.read_text())
    journal = "nats://" + ",".join(f"127.0.0.1:{port}" for port in ports)
    fresh.write_text(json.dumps({**written, "journal": journal, "max_journal_mib": 64}))
    all_started(project, fresh)

    shown = launcher(project, "status", fresh).stdout
    servers = [line.split() for line in shown.splitlines() if line.startswith("nats-")]
    assert [(words[0], words[-1]) for words in servers] == [
        (f"nats-{port}", "runs") for port in ports
    ]
    address = written["processes"]["A"]["host"], written["processes"]["A"]["port"]
    with overlay.connect("{}:{}".format(*address), patience_s=20) as leader:
        assert leader.later(None, b"hello").result(30) == b"C: hello"
    restarted = launcher(project, "restart", fresh)
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    assert "nats-" not in restarted.stdout, "they go on"

    stopped = launcher(project, "stop", fresh)
    assert [line.split()[0] for line in stopped.stdout.splitlines() if "nats-" in line]
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1).close()


def test_a_restart_after_secure_closes_the_servers_of_jobs_and_keeps_the_jobs(project):
    config = own_folder(project, "of jobs", log_dir="logs/closed-jobs")
    ports = free_server_ports(3)
    journal = "nats://" + ",".join(f"127.0.0.1:{port}" for port in ports)
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "journal": journal, "max_journal_mib": 64}))
    address = f"127.0.0.1:{port_of(config, 'A')}"
    try:
        all_started(project, config)
        with overlay.connect(address, tls=False, patience_s=20) as leader:
            job = leader.later(None, b"before")
            assert job.result(30) == b"C: before"
        made = client(project, "secure", config)
        assert made.returncode == 0, made.stderr
        assert "certificates made for 3 servers: " in made.stdout
        early = launcher(project, "start", config)
        assert early.returncode == 1
        assert early.stdout.count("it runs with an older configuration; this one is taken") == 3
        shown = launcher(project, "status", config).stdout
        assert shown.count("older configuration") == 3
        closed = launcher(project, "restart", config)
        assert closed.returncode == 0, closed.stdout + closed.stderr
        assert closed.stdout.count("serves again, pid") == 3, closed.stdout
        with overlay.connect(address, tls=config.parent / "tls", patience_s=30) as leader:
            assert leader.job(job.id).result(60) == b"C: before"
            assert leader.later(None, b"after").result(30) == b"C: after"
        again = launcher(project, "restart", config)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "nats-" not in again.stdout, "they have read their files, and go on"
        launcher(project, "stop", config)
        (config.parent / "tls" / f"server_127.0.0.1-{ports[1]}.pem").unlink()
        failed = launcher(project, "start", config)
        assert failed.returncode == 2
        assert "asks for TLS, and " in failed.stderr
        assert "makes certificates with 'client.py secure" in failed.stderr
    finally:
        stop_all(project, config)
