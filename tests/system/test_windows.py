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

# Processes, threads and their clocks, files, and a gRPC server. What decides does not depend on the
# system, and the tests below cover links between two systems. The executor comes first because
# under wine starting a process takes longer the more the parent has done.
UNITS = {
    "workers/test_executor": (
        "a_handlers_answer_has_its_path_and_times",
        "any_exception_fails_one_request_and_its_text_stays_in_the_log[process-exit]",
        "any_exception_fails_one_request_and_its_text_stays_in_the_log[process-interrupt]",
        "on_free_is_called_once_for_each_slot",
        "a_process_that_dies_fails_one_request_and_the_next_one_runs",
        "if_no_process_can_be_started_a_request_fails_as_not_run",
        "a_request_ended_in_its_process_has_the_reason[1]",
        "cancelling_a_request_kills_its_process_within_a_second",
        "the_next_request_starts_after_the_killed_process_has_ended",
        "a_handler_that_exceeds_its_time_limit_is_killed",
        "a_closed_executor_leaves_no_process",
        "no_process_outlives_a_parent_that_is_killed",
        "a_handler_that_cannot_be_imported_is_named_with_its_module[missing-process]",
        "a_module_that_ends_its_process_is_named",
        "each_row_of_a_segment_is_run_and_answered_once[process]",
        "a_result_after_the_deadline_is_reported_as_late",
    ),
    "workers/test_thread_pool": (),  # all of them
    "model/test_config": (
        "a_byte_order_mark_is_accepted",
        "a_folder_cannot_be_read",
        "a_missing_file_is_named",
        "a_name_with_a_null_byte_cannot_be_read",
        "any_depth_of_nesting_is_loaded_or_reported",
        "problems_with_unprintable_names_are_printable",
        "the_digest_depends_on_the_content_and_not_on_its_layout",
        "the_shipped_file_describes_the_six_processes",
        "windows_line_endings_are_accepted",
    ),
    "calls/test_reception": (
        "a_unary_call_is_answered_or_refused_for_its_bytes",
        "a_method_may_answer_later_without_holding_a_thread",
        "calls_without_a_message_hold_no_thread_and_are_counted",
        "a_call_whose_message_is_overdue_ends_after_the_default_deadline",
        "a_watcher_gets_the_current_status_of_its_name",
        "requests_before_a_bad_message_are_answered_and_it_ends_the_call",
    ),
}
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
# Starts each without a console, as a shortcut does.
PYTHONW = """
import json, subprocess, sys
from pathlib import Path
pythonw = str(Path(sys.executable).with_name("pythonw.exe"))
for words in json.load(sys.stdin):
    done = subprocess.run([pythonw, *words], creationflags=subprocess.DETACHED_PROCESS)
    print(done.returncode)
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
CHECKS = """
import json, node, time
found = [node.main(["two_hosts_config.json", *words]) for words in (["A", "--check"], ["Z"])]
until, seen = time.perf_counter() + 0.02, set()
while time.perf_counter() < until:
    seen.add(time.monotonic())
print(json.dumps([*found, len(seen)]))
"""
# Commands of client.py in one process, each on a console with its code page.
COMMANDS = """
import json, sys
from overlay.cli.main import main
for page, words in json.load(sys.stdin):
    sys.stdout.reconfigure(encoding=page)
    sys.argv[1:] = words
    code = main()
    sys.stdout.reconfigure(encoding="utf-8")
    print(f"\\nexit code {code}")
"""
# Typed on the Windows machine: the code page and the words, by what they are.
CODE_PAGES = ("cp850", "cp1252")
REPORTS = {
    "check two_hosts_config.json": "6 of 6 processes well",
    "top --once": "workers 3 of 3",
    "top --once --json": '"ok": true',
    "logs F": "F overlay.node INFO serves on 192.168.1.2:50056",
    "--as-completed": "3 of 3 workers answered",
    "--first 1": "the others were cancelled",
    "--trace": "on the way ms",
}
TYPED = {
    "ask": ("utf-8", [*PINK, "--payload", "hello"]),
    "ask any": ("utf-8", [*PINK, "--mode", "any"]),
    "map": ("utf-8", [*PINK, "map", "lines.txt", "--out", "mapped on windows.txt"]),
    "map of a folder": ("utf-8", [*LEADER, "map", "to do", "--out-folder", r".\done"]),
    "doctor": ("utf-8", ["doctor", SHIPPED.name, "--json"]),
    **{w: ("utf-8", w.split() if "check" in w else [*LEADER, *w.split()]) for w in REPORTS},
    **{page: (page, [*PINK, "--payload", "Grüße 中文"]) for page in CODE_PAGES},
}
LINES = [f"line {i}" for i in range(500)]
TEXTS = {f"größe {n}.txt": f"text {n}" for n in range(5)}
MINE = """
import subprocess, sys, time

def where(payload, context):
    return f"{sys.platform} {__file__}".encode()

def hang(payload, context):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)  # left-behind"])
    time.sleep(99)
"""


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(contextlib.closing(Hosts()))
            windows = stack.enter_context(contextlib.closing(Windows(hosts)))
        except CannotBuild as e:
            pytest.fail(str(e)) if os.environ.get("CI") else pytest.skip(str(e))
        windows.take_bytecode(ROOT)
        yield windows
        shutil.rmtree(windows.compiled(tmp_path_factory.getbasetemp()), ignore_errors=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, windows: Windows) -> Iterator[PcAndMac]:
    """All six of the shipped configuration, started. A test that breaks something restores it."""
    with PcAndMac(tmp_path_factory.mktemp("both"), windows) as overlay:
        yield overlay.start()


@pytest.fixture(scope="module")
def on_windows(both: PcAndMac) -> dict[str, tuple[str, str]]:
    """The exit codes and outputs of TYPED, all from one process: each start takes seconds."""
    (both.folder / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (both.folder / "to do").mkdir()
    for name, text in TEXTS.items():
        (both.folder / "to do" / name).write_text(text)
    typed = json.dumps(list(TYPED.values()))
    done = both.windows.run(
        "-c", COMMANDS, cwd=both.folder, within_s=150, typed=typed, PYTHONPATH=f"Z:{ROOT}"
    )
    found = re.findall(r"(?s)(.*?)\nexit code (\d+)\n", done.stdout)
    assert (done.returncode, len(found)) == (0, len(TYPED)), done.stdout
    return {name: (code, said) for name, (said, code) in zip(TYPED, found, strict=True)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, windows: Windows) -> Path:
    """The project on a user's PC: a configuration of three processes, and a module."""
    folder = tmp_path_factory.mktemp("windows") / "Grüße & läuft (2)"
    copy_project(folder)
    windows.take_bytecode(folder)
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
    kill(programs("three.json", project))


def programs(words: str, folder: Path) -> list[psutil.Process]:
    """Those that have the words and something of the folder in their command lines, wine's too."""
    found = {p: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    named = str(folder)
    return [p for p, line in found.items() if words in line and named in line.replace("\\", "/")]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# The programs


def test_a_configuration_is_checked_and_the_clock_counts_far_less_than_milliseconds(
    windows: Windows,
) -> None:
    done = windows.run("-c", CHECKS)
    checked, unknown, instants = json.loads(done.stdout.splitlines()[-1])

    assert (checked, unknown) == (0, 2), done.stdout
    assert "two_hosts_config.json is right: 6 processes" in done.stdout
    assert "no process 'Z'" in done.stdout
    # Windows' default resolution is 15.6 ms, and wine's 1 ms.
    assert instants > 100


def test_tests_that_depend_on_the_system_pass_on_a_windows_python(windows: Windows) -> None:
    tests = [f"tests/{file}.py::test_{name}" for file, names in UNITS.items() for name in names]
    tests += [f"tests/{file}.py" for file, names in UNITS.items() if not names]
    done = windows.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=60", *tests), within_s=240
    )

    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > len(tests)


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
    commands = [["node.py", SHIPPED.name, "A", "--check"], ["-c", STREAMS]]
    commands += [["client.py", "127.0.0.1", "1", "--no-such"]]
    done = windows.run("-c", PYTHONW, cwd=project, typed=json.dumps(commands))

    assert done.stdout.split() == ["0", "0", "2"], done.stdout
    assert (project / "before.txt").read_text() == "None None None"
    assert (project / "after.txt").read_text() == "False False False ''"


# start_windows.bat and stop_all.bat


def test_the_batch_file_starts_all_and_shows_where_they_log(three: str) -> None:
    assert pids_in(three).keys() == {"A", "B", "C"}
    assert '"my logs\\process_a.log"' in three


def test_stop_all_takes_the_same_arguments_as_start_windows_in_the_same_way() -> None:
    names = ("start_windows.bat", "stop_all.bat")
    texts = [(ROOT / "scripts" / name).read_text(encoding="ascii") for name in names]
    start, stop = (text.partition("setlocal")[2] for text in texts)

    assert '"%scripts%run.py" start "%config%"%ids%' in start
    assert start.replace('run.py" start', 'run.py" stop') == stop


def test_a_failed_start_returns_its_exit_code(windows: Windows, project: Path) -> None:
    missing = windows.batch(r'scripts\start_windows.bat "no such file.json"', project)

    assert missing.returncode == 2
    assert "no such file.json" in missing.stdout
    assert "Traceback" not in missing.stdout


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
    drained = windows.hosts.run(1, sys.executable, "client.py", *place, "drain")
    status = until(  # a Windows Python takes its time to end
        lambda: stopped_in_order(windows, project), 30, "C is shown as stopped in order"
    )
    restarted = windows.batch(r"python scripts\launcher.py restart three.json B C", project)

    assert drained.returncode == 0, drained.stdout
    assert "0 requests refused, 0 left behind" in drained.stdout
    assert status.returncode == 1, status.stdout
    assert status.stdout.count("serves\n") == 2, status.stdout
    assert restarted.returncode == 0, restarted.stdout
    ends = re.findall(r"(?m)^(\w)  (stopped|was not running)", restarted.stdout)
    assert ends == [("C", "was not running"), ("B", "stopped")]
    assert asked(windows, project, "where").returncode == 0


def stopped_in_order(windows: Windows, project: Path):
    status = windows.run("scripts/launcher.py", "status", "three.json", cwd=project)
    return status if "stopped in order" in status.stdout else None


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


def test_a_client_on_windows_calls_and_maps(
    both: PcAndMac, on_windows: dict[str, tuple[str, str]]
) -> None:
    done = [on_windows[name] for name in ("ask", "ask any", "map")]

    assert_called_and_mapped(done, both.folder / "mapped on windows.txt")


def test_a_client_of_a_process_on_windows_calls_and_maps(both: PcAndMac) -> None:
    (both.folder / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    mapped = both.folder / "mapped.txt"

    files = str(both.folder / "lines.txt"), "--out", str(mapped)
    typed = [["--payload", "hello"], ["--mode", "any"], ["map", *files]]
    command = [sys.executable, "client.py", *LEADER]
    runs = [both.hosts.run(2, *command, *words) for words in typed]

    assert_called_and_mapped([(str(run.returncode), run.stdout) for run in runs], mapped)


def assert_called_and_mapped(done: list[tuple[str, str]], mapped: Path) -> None:
    assert [code for code, _ in done] == ["0"] * 3, done
    assert re.search(r"(\d) of \1 workers answered", done[0][1])
    assert "1 of 1 worker answered" in done[1][1]
    results = mapped.read_text(encoding="utf-8").splitlines()
    assert [line.partition(": ")[2] for line in results] == LINES
    assert {line[0] for line in results} <= set("CDF")


def test_map_on_windows_reads_one_folder_and_writes_another(
    both: PcAndMac, on_windows: dict[str, tuple[str, str]]
) -> None:
    code, said = on_windows["map of a folder"]

    assert code == "0", said
    results = {path.name: path.read_text() for path in (both.folder / "done").iterdir()}
    assert {name: text[3:] for name, text in results.items()} == TEXTS


@pytest.mark.parametrize("on", ["Windows", "Linux"])
def test_the_doctor_on_either_system_finds_no_problem(
    both: PcAndMac, on: str, request: pytest.FixtureRequest
) -> None:
    if on == "Windows":
        _, said = request.getfixturevalue("on_windows")["doctor"]
    else:
        words = ["client.py", "doctor", str(both.path), "--json"]
        said = both.hosts.run(2, sys.executable, *words).stdout

    report = json.loads(said)
    assert report["ok"], said
    assert [p["here"] for p in report["processes"]] == [
        (i in "ABD") == (on == "Windows") for i in IDS
    ]
    there = {p["id"] for p in report["processes"] if p["platform"].startswith("Windows")}
    assert there == set("ABD")
    assert [link["state"] for link in report["links"]] == ["up"] * 6


def test_the_reports_on_windows_cover_both_systems(on_windows: dict[str, tuple[str, str]]) -> None:
    for words, expected in REPORTS.items():
        code, said = on_windows[words]
        assert (code, expected in said) == ("0", True), f"{words}: {said}"


def test_output_that_a_windows_code_page_lacks_is_escaped(
    on_windows: dict[str, tuple[str, str]],
) -> None:
    for code, said in (on_windows[page] for page in CODE_PAGES):
        assert (code, r"e \u4e2d\u6587" in said) == ("0", True), said


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


def test_the_overlay_recovers_from_a_cut_between_the_two_systems(both: PcAndMac) -> None:
    both.hosts.cut()
    try:
        until(lambda: both.ask("A", host=1, timeout=3).answered == "D", 20, "D alone answers A")
        assert both.ask("E", host=2, timeout=3).answered == "F"
    finally:
        both.hosts.heal()

    until(lambda: both.ask("A", host=1).answered == "CDF", 20, "all answer again")
    assert both.ask("E", host=2).answered == "DF"


def test_ctrl_c_stops_a_process_on_windows_gracefully(both: PcAndMac) -> None:
    """The last of these tests, as wine may give a late Ctrl-C to the next process too."""
    both.processes["D"].send_signal(signal.SIGINT)  # wine turns it into Ctrl-C

    assert both.processes["D"].wait(60) == 0
    assert "0 requests refused, 0 left behind" in both.log("D")
    assert both.ask("A", mode="ANY").answered in ("C", "F")


# docs/two-machines.md


class Machines:
    """A PC and a Mac, each with a new copy of the project, on which the page's commands are typed.

    leader: "pc" or "mac"; A, B and D run there, and its key signs. Wine has no `py` and cannot
    create a `.venv`, so `python` replaces both.
    """

    def __init__(self, folder: Path, windows: Windows) -> None:
        self.windows = windows
        self.leader, self.other = "pc", "mac"
        self.folders = {"pc": folder / "my pc", "mac": folder / "mac"}
        for machine in self.folders.values():
            copy_project(machine)
            for name in STUBS:
                (machine / name).unlink()
            for lock in ROOT.glob("requirements*"):
                shutil.copy(lock, machine)
        windows.take_bytecode(self.folders["pc"])
        (self.folders["mac"] / ".venv").symlink_to(sys.prefix)

    def begin_again(self) -> None:
        """As if nothing had been configured, and with the leader on the other machine."""
        self.leader, self.other = self.other, self.leader
        for machine in self.folders.values():
            shutil.copy(SHIPPED, machine)
            shutil.rmtree(machine / "tls")
            shutil.rmtree(machine / "logs")

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

    def stop(self, machine: str) -> str:
        return self.run(machine, r"scripts\stop_all.bat", "scripts/stop_all.sh")[1]

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


def test_the_page_about_two_machines_is_true(wired: Windows, tmp_path: Path) -> None:
    """Five commands, and what follows them; then the same commands with the leader on the Mac."""
    machines = Machines(tmp_path, wired)
    try:
        close_and_start(machines)
        stopped = [machines.stop(machine) for machine in PLACES]
        assert [said.count("stopped in") for said in stopped] == [3, 3], stopped

        machines.begin_again()
        close_and_start(machines)
    finally:
        kill(programs("node.py", tmp_path))


def close_and_start(machines: Machines) -> None:
    """From nothing to a closed overlay that answers."""
    leader, other, address = machines.leader, machines.other, PLACES[machines.leader]
    said = machines.init()
    assert re.search(rf"This one: .*{re.escape(address)}", said), said
    assert f"{address}: A (leader), B (team_leader), D (worker)  (this machine)" in said, said
    assert r"scripts\start_windows.bat two_hosts_config.json" in said
    wanted = SHIPPED.read_bytes().replace(b"192.168.1.2", PLACES[other].encode())
    wanted = re.sub(rb"192\.168\.1\.1\b", address.encode(), wanted)
    assert (machines.folders[leader] / SHIPPED.name).read_bytes() == wanted
    code, said = machines.run(
        leader,
        r"py scripts\run.py secure two_hosts_config.json",
        "python3 scripts/run.py secure two_hosts_config.json",
    )
    assert (code, "join overlay-1." in said) == (0, True), said
    line = re.search(r"overlay-1\S+", said)[0]
    machines.start(leader)
    join = r"py scripts\run.py join", "python3 scripts/run.py join"
    code, said = machines.run(other, *join, line)
    assert (code, "and those of the processes C, E, F" in said) == (0, True), said
    machines.start(other)

    well = "6 of 6 processes well, 6 of 6 links up"
    for machine in ("mac", "pc"):  # under wine a command takes far longer to ask again
        until(lambda m=machine: well in machines.run(m, DOCTOR, DOCTOR)[1], 20, well)
    ask = f"python client.py {address} 50051"
    assert "3 of 3 workers answered" in machines.run(other, ask, ask)[1]
    assert [line for line in machines.logs().splitlines() if "INFO" not in line] == []
    keys = [*machines.folders[leader].glob("tls/*_*.pem"), machines.folders[leader] / "tls/ca.key"]
    keys += machines.folders[other].glob("tls/*_*.pem")
    assert len(keys) == 7
    assert {key.name: key.stat().st_mode & 0o007 for key in keys} == {key.name: 0 for key in keys}
