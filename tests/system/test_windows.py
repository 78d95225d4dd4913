"""The processes of the Windows machine on a Windows Python, under wine on this Linux machine.

The harness is tests/harness/windows.py. All tests share one wine on host 1, and those with both
hosts share one overlay.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.cluster import IDS, ROOT, until
from tests.harness.hosts import ADDRESSES, SHIPPED, CannotBuild, Hosts, ip
from tests.harness.windows import PcAndMac, Windows
from tests.project.test_launcher import STUBS, copy_project, pids_in, port_of, write_three

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wine is used on Linux only"),
    pytest.mark.timeout(400),  # the first test installs it
]

UNITS = "not hypothesis and not six"
# Without tests that start many Pythons, which takes a second each, or measure memory.
QUICK = "not killed_idle and not is_replaced and not does_not_grow and not refused_bytes"
QUICK += " and (not named_with_its_module or missing)"
TWO_MACHINES = (ROOT / "docs" / "two-machines.md").read_text(encoding="utf-8")
DOCTOR = "python client.py doctor two_hosts_config.json"
PLACES = {"pc": "192.168.1.23", "mac": "192.168.1.40"}  # as on the page
LEADER = (ADDRESSES[1], "50051")
PINK = (ADDRESSES[2], "50055")  # E, team leader on the other system
# As Windows does it: with a thread in the process that delivers CTRL_CLOSE_EVENT.
CLOSE = """
import ctypes, sys
kernel = ctypes.WinDLL("kernel32")
kernel.OpenProcess.restype = kernel.CreateRemoteThread.restype = ctypes.c_void_p
process = kernel.OpenProcess(0x1FFFFF, False, int(sys.argv[1]))
routine = ctypes.cast(ctypes.WinDLL("kernelbase").CtrlRoutine, ctypes.c_void_p)
thread = kernel.CreateRemoteThread(
    ctypes.c_void_p(process), None, ctypes.c_size_t(0), routine, ctypes.c_void_p(2), 0, None
)
sys.exit(0 if thread else 3)
"""
# Starts it without a console, as a shortcut does.
PYTHONW = """
import subprocess, sys
from pathlib import Path
words = [str(Path(sys.executable).with_name("pythonw.exe")), *sys.argv[1:]]
sys.exit(subprocess.run(words, creationflags=subprocess.DETACHED_PROCESS).returncode)
"""
STREAMS = """
import sys
open("before.txt", "w").write(f"{sys.stdin} {sys.stdout} {sys.stderr}")
from overlay.cli import stdio
stdio.complete()
print("nowhere", file=sys.stderr)
streams = [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)]
open("after.txt", "w").write(" ".join(map(str, streams)) + f" {sys.stdin.read()!r}")
"""
MINE = """
import subprocess, sys, time

def where(payload, context):
    return f"{sys.platform} {__file__}".encode()

def hang(payload, context):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)  # left-behind"])
    time.sleep(99)
"""


@pytest.fixture(scope="module")
def windows() -> Iterator[Windows]:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(contextlib.closing(Hosts()))
            windows = stack.enter_context(contextlib.closing(Windows(hosts)))
        except CannotBuild as e:
            pytest.fail(str(e)) if os.environ.get("CI") else pytest.skip(str(e))
        yield windows


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, windows: Windows) -> Iterator[PcAndMac]:
    """All six of the shipped configuration, started. A test that breaks something restores it."""
    with PcAndMac(tmp_path_factory.mktemp("both"), windows) as overlay:
        yield overlay.start()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project on a user's PC: a configuration of three processes, and a module."""
    folder = tmp_path_factory.mktemp("windows") / "Grüße & läuft (2)"
    copy_project(folder)
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    hang = {"call": "mine:hang", "run": "process", "slots": 1, "limit_s": 2}
    where = {"call": "mine:where", "run": "process", "slots": 1}
    shutil.copy(ROOT / "examples" / "search.py", folder)
    (folder / "my texts").mkdir()
    (folder / "my texts" / "höhe.txt").write_text("no\nthe needle, ä\n", encoding="utf-8")
    texts = {"folder": "Z:" + str(folder / "my texts").replace("/", "\\")}
    search = {"call": "search:search", "merge": "search:merge", "options": texts}
    handlers = {"where": where, "hang": hang, "thread": "mine:where", "search": search}
    write_three(folder / "three.json", log_dir="my logs", handlers=handlers)
    return folder


@pytest.fixture(scope="module")
def three(windows: Windows, project: Path) -> Iterator[str]:
    """The output of start_windows.bat; its processes run until the end of the module."""
    started = windows.batch(r"scripts\start_windows.bat three.json", project)
    assert started.returncode == 0, started.stdout
    yield started.stdout
    windows.batch(r"scripts\stop_all.bat three.json", project)


# The programs


def test_the_commands_run_on_a_windows_python(windows: Windows) -> None:
    version = windows.run("-c", "import overlay, sys; print(sys.platform, overlay.connect)")
    checked = windows.run("node.py", SHIPPED.name, "A", "--check")
    unknown = windows.run("node.py", SHIPPED.name, "Z")

    assert version.stdout.startswith("win32 <function connect"), version.stdout
    assert checked.stdout.strip() == "two_hosts_config.json is right: 6 processes"
    assert (unknown.returncode, "no process 'Z'" in unknown.stdout) == (2, True), unknown.stdout


def test_tests_that_depend_on_the_system_pass_on_a_windows_python(windows: Windows) -> None:
    # Processes, threads, paths, files and a gRPC server. Decisions do not depend on the system, and
    # the tests below cover links between two systems. The executor comes first because under wine
    # starting a process takes longer the more the parent has done.
    modules = ["workers/test_executor", "workers/test_thread_pool", "model/test_config"]
    modules += ["calls/test_reception", "calls/test_request_log", "server/test_log_reader"]
    modules += ["observability/test_log_buffer"]
    done = windows.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", UNITS, "-k", QUICK, "--timeout=60"),
        *(f"tests/{name}.py" for name in modules),
        within_s=240,
    )

    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 280


def test_the_clock_of_a_process_has_a_resolution_well_below_a_millisecond(windows: Windows) -> None:
    count = "import node, time; until = time.perf_counter() + 0.02; seen = set()"
    count += "\nwhile time.perf_counter() < until: seen.add(time.monotonic())"
    done = windows.run("-c", f"{count}\nprint(len(seen))")

    # Windows' default resolution is 15.6 ms, and wine's 1 ms.
    assert int(done.stdout) > 100


def test_init_writes_the_addresses_that_the_user_types(windows: Windows, tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path)
    done = windows.run(str(ROOT / "client.py"), "init", cwd=tmp_path, typed="here\n10.0.0.40\n")

    assert done.returncode == 0, done.stdout
    assert f"This one: {ADDRESSES[1]}" in done.stdout
    assert r"scripts\start_windows.bat two_hosts_config.json" in done.stdout
    written = (tmp_path / SHIPPED.name).read_bytes()
    assert written == SHIPPED.read_bytes().replace(b"192.168.1.2", b"10.0.0.40")


def test_ctrl_c_stops_a_process_gracefully(windows: Windows, project: Path) -> None:
    write_three(project / "alone.json", log_dir="alone")
    process = windows.popen("node.py", "alone.json", "C", cwd=project)
    log_file = project / "alone" / "process_c.log"
    with process:
        try:
            assert "serves on" in process.stdout.readline()
            process.send_signal(signal.SIGINT)  # wine turns it into Ctrl-C
            until(lambda: "stopping: " in log_file.read_text(encoding="utf-8"), 30, "it stops")
            assert process.wait(60) == 0
        finally:
            process.kill()

    log = log_file.read_text(encoding="utf-8")
    assert "0 requests refused, 0 left behind" in log


def test_closing_the_window_stops_a_process_gracefully(windows: Windows, project: Path) -> None:
    write_three(project / "window.json", log_dir="window")
    log = project / "window" / "process_c.log"
    process = windows.popen("node.py", "window.json", "C", cwd=project)
    with process:
        try:
            assert "serves on" in process.stdout.readline()
            serves = re.compile(r"serves on .*, pid (\d+)")
            found = until(lambda: serves.search(log.read_text(encoding="utf-8")), 10, "its pid")
            closed = windows.run("-c", CLOSE, found[1], cwd=project)
            assert (closed.returncode, process.wait(60)) == (0, 0), closed.stdout
        finally:
            process.kill()

    text = log.read_text(encoding="utf-8")
    assert "stopping: up to 3 s for running requests" in text
    assert "0 requests refused, 0 left behind" in text


def test_processes_started_by_pythonw_have_standard_streams(
    windows: Windows, project: Path
) -> None:
    checked = windows.run("-c", PYTHONW, "node.py", SHIPPED.name, "A", "--check", cwd=project)
    unknown = windows.run("-c", PYTHONW, "node.py", SHIPPED.name, "Z", cwd=project)
    wrong = windows.run("-c", PYTHONW, "client.py", "127.0.0.1", "1", "--no-such", cwd=project)
    streams = windows.run("-c", PYTHONW, "-c", STREAMS, cwd=project)

    codes = [done.returncode for done in (checked, unknown, wrong, streams)]
    assert codes == [0, 2, 2, 0], streams.stdout
    assert (project / "before.txt").read_text() == "None None None"
    assert (project / "after.txt").read_text() == "False False False ''"


# start_windows.bat and stop_all.bat


def test_the_batch_files_start_and_stop(windows: Windows, project: Path, three: str) -> None:
    again = windows.batch(r"scripts\start_windows.bat three.json C", project)
    stopped = windows.batch(r"scripts\stop_all.bat three.json", project)
    nothing = windows.batch(r"scripts\stop_all.bat three.json", project)
    restarted = windows.batch(r"scripts\start_windows.bat three.json", project)

    assert pids_in(three).keys() == {"A", "B", "C"}
    assert '"my logs\\process_a.log"' in three
    assert "already running" in again.stdout
    assert stopped.stdout.count("stopped in") == 3, stopped.stdout
    assert "nothing is running" in nothing.stdout
    assert restarted.returncode == 0, restarted.stdout


def test_a_failed_start_returns_its_exit_code(windows: Windows, project: Path) -> None:
    unknown = windows.batch(r"scripts\start_windows.bat three.json Z", project)
    missing = windows.batch(r'scripts\start_windows.bat "no such file.json"', project)

    assert unknown.returncode == missing.returncode == 2
    assert "no process 'Z'" in unknown.stdout
    assert "no such file.json" in missing.stdout
    assert "Traceback" not in unknown.stdout + missing.stdout


@pytest.mark.parametrize("handler", ["where", "thread"])
def test_a_handler_from_a_module_in_the_users_folder_runs(
    windows: Windows, project: Path, three: str, handler: str
) -> None:
    done = asked(windows, project, handler)

    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)["result"]
    assert result.startswith("win32 ")
    assert result.endswith("Grüße & läuft (2)\\mine.py")


def test_a_handlers_process_and_its_children_end_at_limit_s(
    windows: Windows, project: Path, three: str
) -> None:
    hung = asked(windows, project, "hang")

    assert "ran longer than its limit_s 2" in hung.stdout
    until(lambda: not left_behind(), 10, "the handler's child process ends")
    assert asked(windows, project, "where").returncode == 0


def test_the_search_example_accepts_a_windows_path(
    windows: Windows, project: Path, three: str
) -> None:
    done = asked(windows, project, "search", "--payload", "needle")

    assert json.loads(done.stdout)["result"] == "C: höhe.txt:2: the needle, ä"


def test_status_shows_a_drained_process_as_stopped_and_restart_starts_it(
    windows: Windows, project: Path, three: str
) -> None:
    place = ["127.0.0.1", str(port_of(project / "three.json", "C"))]
    drained = windows.run("client.py", *place, "drain", cwd=project)
    status = windows.run("scripts/run.py", "status", "three.json", cwd=project)
    restarted = windows.batch(r"python scripts\run.py restart three.json A B C", project)

    assert drained.returncode == 0, drained.stdout
    assert "0 requests refused, 0 left behind" in drained.stdout
    assert (status.returncode, "stopped in order" in status.stdout) == (1, True), status.stdout
    assert restarted.returncode == 0, restarted.stdout
    ends = re.findall(r"(?m)^(\w)  (stopped|was not running)", restarted.stdout)
    assert ends == [("C", "was not running"), ("B", "stopped"), ("A", "stopped")]
    assert asked(windows, project, "where").returncode == 0


def asked(windows: Windows, project: Path, handler: str, *more: str):
    """client.py on this Linux calls A on host 1's loopback."""
    place = ["client.py", "127.0.0.1", str(port_of(project / "three.json", "A"))]
    return windows.hosts.run(1, sys.executable, *place, "--handler", handler, "--json", *more)


def left_behind() -> list[int]:
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.pid for p in found if "left-behind" in " ".join(p.info["cmdline"] or ())]


# Windows and Linux together


@pytest.mark.parametrize("host", ADDRESSES)
def test_each_process_answers_clients_on_both_systems(both: PcAndMac, host: int) -> None:
    for process_id, workers in zip(IDS, ["CDF", "CD", "C", "D", "DF", "F"], strict=True):
        assert both.ask(process_id, host=host).answered == workers

    replies = [both.ask("A", host=host, mode="ANY") for _ in range(12)]
    assert {reply.answered for reply in replies} == {"C", "D", "F"}


@pytest.mark.parametrize("place", [LEADER, PINK])
@pytest.mark.parametrize("on_windows", [True, False])
def test_a_client_on_either_system_calls_and_maps(
    both: PcAndMac, place: tuple[str, str], on_windows: bool
) -> None:
    lines = [f"line {i}" for i in range(500)]
    (both.folder / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def client(*words: str) -> str:
        command = [str(ROOT / "client.py"), *place, *words]
        if on_windows:
            done = both.windows.run(*command, cwd=both.folder)
        else:
            done = both.hosts.run(2, sys.executable, *command)
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert re.search(r"(\d) of \1 workers answered", client("--payload", "hello"))
    assert "1 of 1 worker answered" in client("--mode", "any")
    client("map", str(both.folder / "lines.txt"), "--out", str(both.folder / "mapped.txt"))
    mapped = (both.folder / "mapped.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(": ")[2] for line in mapped] == lines
    assert {line[0] for line in mapped} <= set("CDF")


@pytest.mark.parametrize("on_windows", [True, False])
def test_the_doctor_on_either_system_finds_no_problem(both: PcAndMac, on_windows: bool) -> None:
    words = ["client.py", "doctor", str(both.path), "--json"]
    done = both.windows.run(*words) if on_windows else both.hosts.run(2, sys.executable, *words)

    report = json.loads(done.stdout)
    assert report["ok"], done.stdout
    assert [p["here"] for p in report["processes"]] == [(i in "ABD") == on_windows for i in IDS]
    there = {p["id"] for p in report["processes"] if p["platform"].startswith("Windows")}
    assert there == set("ABD")
    assert [link["state"] for link in report["links"]] == ["up"] * 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check", "two_hosts_config.json"], "6 of 6 processes well"),
        ([*LEADER, "top", "--once"], "workers 3 of 3"),
        ([*LEADER, "top", "--once", "--json"], '"ok": true'),
        ([*LEADER, "logs", "F"], "F overlay.node INFO serves on 192.168.1.2:50056"),
        ([*LEADER, "--as-completed"], "3 of 3 workers answered"),
        ([*LEADER, "--first", "1"], "the others were cancelled"),
        ([*LEADER, "--trace"], "on the way ms"),
    ],
    ids=lambda words: " ".join(words[-2:]) if isinstance(words, list) else "",
)
def test_a_report_on_windows_covers_both_systems(
    both: PcAndMac, words: list[str], expected: str
) -> None:
    done = both.windows.run(str(ROOT / "client.py"), *words, cwd=both.folder)

    assert (done.returncode, expected in done.stdout) == (0, True), done.stdout


def test_map_reads_one_folder_and_writes_another(both: PcAndMac) -> None:
    texts = {f"größe {n}.txt": f"text {n}" for n in range(5)}
    (both.folder / "to do").mkdir()
    for name, text in texts.items():
        (both.folder / "to do" / name).write_text(text)

    words = ["map", "to do", "--out-folder", r".\done"]
    done = both.windows.run(str(ROOT / "client.py"), *LEADER, *words, cwd=both.folder)

    assert done.returncode == 0, done.stdout
    results = {path.name: path.read_text() for path in (both.folder / "done").iterdir()}
    assert {name: text[3:] for name, text in results.items()} == texts


def test_the_web_page_is_served_on_windows_until_ctrl_c(both: PcAndMac) -> None:
    web = [str(ROOT / "client.py"), *LEADER, "web", "--web-port", "0"]
    with both.windows.popen(*web, cwd=both.folder) as server:
        try:
            page = re.search(r"http://\S+/", server.stdout.readline())[0]
            shown = both.hosts.run(1, "curl", "-s", page)
            script = both.hosts.run(1, "curl", "-sI", f"{page}page.js")
            curl = ["curl", "-sN", f"{page}frames"]
            with both.hosts.popen(1, *curl, stdout=subprocess.PIPE) as frames:
                events = [frames.stdout.readline() for _ in range(5)]
                server.send_signal(signal.SIGINT)
                assert server.wait(20) == 0
        finally:
            server.kill()

    assert "<title>" in shown.stdout
    assert "content-type: text/javascript" in script.stdout.lower()
    snapshots = [json.loads(line[6:]) for line in events if line.startswith("data: ")]
    assert [len(snapshot["processes"]) for snapshot in snapshots][-1] == 6


def test_output_that_a_windows_code_page_lacks_is_escaped(both: PcAndMac) -> None:
    for page in ("cp850", "cp1252"):
        done = both.windows.run(
            *("client.py", *PINK, "--payload", "Grüße 中文"), PYTHONIOENCODING=page
        )
        assert done.returncode == 0, done.stdout
        assert r"e \u4e2d\u6587" in done.stdout


def test_the_overlay_recovers_from_a_cut_between_the_two_systems(both: PcAndMac) -> None:
    both.hosts.cut()
    try:
        until(lambda: both.ask("A", host=1, timeout=3).answered == "D", 20, "D alone answers A")
        assert both.ask("E", host=2, timeout=3).answered == "F"
    finally:
        both.hosts.heal()

    until(lambda: both.ask("A", host=1).answered == "CDF", 20, "all answer again")
    assert both.ask("E", host=2).answered == "DF"


def test_a_process_on_windows_stops_gracefully_and_comes_back(both: PcAndMac) -> None:
    both.stop_file("D").touch()

    assert both.processes["D"].wait(20) == 0
    assert "0 requests refused, 0 left behind" in both.log("D")
    assert both.ask("A", mode="ANY").answered in ("C", "F")

    both.stop_file("D").unlink()
    both.start_in_turn("D")
    until(lambda: both.ask("A").answered == "CDF", 20, "all answer again")


# docs/two-machines.md


class Machines:
    """A PC and a Mac, each with a new copy of the project, on which the page's commands are typed.

    leader: "pc" or "mac"; A, B and D run there, and its key signs. Wine has no `py` and cannot
    create a `.venv`, so `python` replaces both.
    """

    def __init__(self, folder: Path, windows: Windows, leader: str) -> None:
        self.windows = windows
        self.leader, self.other = (leader, "mac") if leader == "pc" else (leader, "pc")
        self.folders = {"pc": folder / "my pc", "mac": folder / "mac"}
        for machine in self.folders.values():
            copy_project(machine)
            for name in STUBS:
                (machine / name).unlink()
            for lock in ROOT.glob("requirements*"):
                shutil.copy(lock, machine)
        (self.folders["mac"] / ".venv").symlink_to(sys.prefix)

    def init(self) -> str:
        """The first command, and the answers to its questions."""
        addresses = [PLACES[self.leader], PLACES[self.other]]
        typed = "".join(f"{address}\n" for address in addresses)
        if self.leader == "pc":
            assert r"py scripts\run.py init" in TWO_MACHINES
            folder = self.folders["pc"]
            return self.windows.run("scripts/run.py", "init", cwd=folder, typed=typed).stdout
        return self.typed("mac", f"printf '{typed}' | ", "python3 scripts/run.py init")[1]

    def run(self, machine: str, on_windows: str, on_mac: str, *more: str) -> tuple[int, str]:
        """Types the page's command there; returns its exit code and all that it printed."""
        if machine == "mac":
            return self.typed("mac", "", on_mac, *more)
        self.assert_on_page(on_windows)
        line = re.sub(r"^(py|\.venv\\Scripts\\python) ", "python ", " ".join((on_windows, *more)))
        done = self.windows.batch(line, self.folders["pc"])
        return done.returncode, done.stdout

    def typed(self, machine: str, before: str, line: str, *more: str) -> tuple[int, str]:
        self.assert_on_page(line)
        command = f"cd '{self.folders[machine]}' && . .venv/bin/activate && {before}{line}"
        done = self.windows.hosts.run(2, "dash", "-c", " ".join((command, *more)), within_s=90)
        return done.returncode, done.stdout

    def assert_on_page(self, command: str) -> None:
        assert command.replace(PLACES[self.leader], PLACES["pc"]) in TWO_MACHINES

    def start(self, machine: str) -> None:
        code, said = self.run(machine, r"scripts\start_windows.bat", "scripts/start_macos.sh")
        ids = list("ABD" if machine == self.leader else "CEF")
        assert (code, re.findall(rf"(?m)^(\w) .*{PLACES[machine]}", said)) == (0, ids), said

    def stop(self) -> list[str]:
        command = r"scripts\stop_all.bat", "scripts/stop_all.sh"
        return [self.run(machine, *command)[1] for machine in (self.leader, self.other)]

    def logs(self) -> str:
        found = [log for one in self.folders.values() for log in one.glob("logs/*.log")]
        return "".join(log.read_text(encoding="utf-8") for log in found)


@pytest.fixture(scope="module")
def wired(windows: Windows) -> Windows:
    """The hosts have the page's addresses too."""
    if not (Path(sys.prefix) / "overlay-setup.json").exists():
        pytest.skip("this Python was not set up by scripts/run.py")
    for name, address in zip(windows.hosts.names.values(), PLACES.values(), strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
    return windows


@pytest.mark.parametrize("leader", ["pc", "mac"])
def test_the_page_about_two_machines_is_true(wired: Windows, tmp_path: Path, leader: str) -> None:
    """Five commands, and what follows them."""
    machines = Machines(tmp_path, wired, leader)
    other, address = machines.other, PLACES[leader]

    said = machines.init()
    assert f"{address}: A (leader), B (team_leader), D (worker)  (this machine)" in said, said
    code, said = machines.run(
        leader,
        r"py scripts\run.py secure two_hosts_config.json",
        "python3 scripts/run.py secure two_hosts_config.json",
    )
    assert (code, "join overlay-1." in said) == (0, True), said
    line = re.search(r"overlay-1\S+", said)[0]
    try:
        machines.start(leader)
        join = r"py scripts\run.py join", "python3 scripts/run.py join"
        code, said = machines.run(other, *join, line)
        assert (code, "and those of the processes C, E, F" in said) == (0, True), said
        machines.start(other)

        well = "6 of 6 processes well, 6 of 6 links up"
        for machine in PLACES:
            until(lambda m=machine: well in machines.run(m, DOCTOR, DOCTOR)[1], 20, well)
        ask = f"python client.py {address} 50051"
        assert "3 of 3 workers answered" in machines.run(other, ask, ask)[1]
        assert [line for line in machines.logs().splitlines() if "INFO" not in line] == []
    finally:
        stopped = machines.stop()
    assert [said.count("stopped in") for said in stopped] == [3, 3], stopped
    keys = [*machines.folders[leader].glob("tls/*_*.pem"), machines.folders[leader] / "tls/ca.key"]
    keys += machines.folders[other].glob("tls/*_*.pem")
    assert len(keys) == 7
    assert {key.name: key.stat().st_mode & 0o007 for key in keys} == {key.name: 0 for key in keys}
