"""The Windows half with a Windows Python, under wine on this Linux machine; see tests/windows.py.

All tests share one wine on host 1, and those of the two hosts share one overlay.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from faults.hosts import ADDRESSES, CannotBuild, Hosts
from tests.cluster import IDS, ROOT, until
from tests.hosts import SHIPPED
from tests.test_launcher import copy_project, pids_in, port_of, write_three
from tests.windows import PcAndMac, Windows

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wine is for Linux here"),
    pytest.mark.timeout(400),  # the first installs it
]

LEADER = (ADDRESSES[1], "50051")
PINK = (ADDRESSES[2], "50055")  # E, team leader on the other system
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
    """All six of the shipped configuration, started. A test that breaks something mends it."""
    overlay = PcAndMac(tmp_path_factory.mktemp("both"), windows)
    try:
        yield overlay.start()
    finally:
        overlay.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user has it on a PC, three processes and a module of their own."""
    folder = tmp_path_factory.mktemp("windows") / "Grüße & läuft (2)"
    copy_project(folder)
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    hang = {"call": "mine:hang", "run": "process", "slots": 1, "limit_s": 2}
    where = {"call": "mine:where", "run": "process", "slots": 1}
    handlers = {"where": where, "hang": hang, "thread": "mine:where"}
    write_three(folder / "three.json", log_dir="my logs", handlers=handlers)
    return folder


@pytest.fixture(scope="module")
def three(windows: Windows, project: Path) -> Iterator[str]:
    """What start_windows.bat says; its processes run, and stop at the end."""
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


def test_a_part_of_the_tests_passes_on_a_windows_python(windows: Windows) -> None:
    modules = ["configuration", "routing", "assembly", "admission", "rows", "wire", "health"]
    modules += ["picture", "lanes", "recent", "orders"]
    done = windows.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not hypothesis", "--timeout=30"),
        *(f"tests/test_{name}.py" for name in modules),
        within_s=150,
    )

    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 500


def test_the_clock_of_a_process_is_fine_enough_to_tell_who_is_quick(windows: Windows) -> None:
    count = "import node, time; until = time.perf_counter() + 0.02; seen = set()"
    count += "\nwhile time.perf_counter() < until: seen.add(time.monotonic())"
    done = windows.run("-c", f"{count}\nprint(len(seen))")

    # A tick of Windows' own is 15.6 ms, and 1 ms under wine.
    assert int(done.stdout) > 100


def test_ctrl_c_stops_a_process_in_good_order(windows: Windows, project: Path) -> None:
    write_three(project / "alone.json", log_dir="alone")
    process = windows.popen("node.py", "alone.json", "C", cwd=project)
    with process:
        assert "serves on" in process.stdout.readline()
        process.send_signal(signal.SIGINT)  # wine makes of it what a console does of Ctrl-C
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()

    log = (project / "alone" / "process_c.log").read_text(encoding="utf-8")
    assert "0 requests refused, 0 left behind" in log


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


def test_a_start_that_fails_gives_its_exit_code(windows: Windows, project: Path) -> None:
    unknown = windows.batch(r"scripts\start_windows.bat three.json Z", project)
    missing = windows.batch(r'scripts\start_windows.bat "no such file.json"', project)

    assert unknown.returncode == missing.returncode == 2
    assert "no process 'Z'" in unknown.stdout
    assert "no such file.json" in missing.stdout
    assert "Traceback" not in unknown.stdout + missing.stdout


@pytest.mark.parametrize("handler", ["where", "thread"])
def test_a_module_in_the_users_folder_serves(
    windows: Windows, project: Path, three: str, handler: str
) -> None:
    done = asked(windows, project, handler)

    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)["result"]
    assert result.startswith("win32 ")
    assert result.endswith("Grüße & läuft (2)\\mine.py")


def test_a_handler_process_and_what_it_started_end_at_the_limit(
    windows: Windows, project: Path, three: str
) -> None:
    hung = asked(windows, project, "hang")

    assert "ran longer than its limit_s 2" in hung.stdout
    until(lambda: not left_behind(), 10, "the program that the handler has started ends")
    assert asked(windows, project, "where").returncode == 0


def asked(windows: Windows, project: Path, handler: str):
    """client.py of this Linux, which asks A on loopback of host 1."""
    place = ["client.py", "127.0.0.1", str(port_of(project / "three.json", "A"))]
    return windows.hosts.run(1, sys.executable, *place, "--handler", handler, "--json")


def left_behind() -> list[int]:
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.pid for p in found if "left-behind" in " ".join(p.info["cmdline"] or ())]


# Two systems


@pytest.mark.parametrize("host", ADDRESSES)
def test_each_process_answers_across_the_two_systems(both: PcAndMac, host: int) -> None:
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


def test_output_does_not_die_on_a_windows_code_page(both: PcAndMac) -> None:
    for page in ("cp850", "cp1252"):
        done = both.windows.run(
            *("client.py", *PINK, "--payload", "Grüße 中文"), PYTHONIOENCODING=page
        )
        assert done.returncode == 0, done.stdout
        assert r"e \u4e2d\u6587" in done.stdout


def test_it_survives_a_cut_between_the_two_systems(both: PcAndMac) -> None:
    both.hosts.cut()
    try:
        until(lambda: both.ask("A", host=1, timeout=3).answered == "D", 20, "D alone answers A")
        assert both.ask("E", host=2, timeout=3).answered == "F"
    finally:
        both.hosts.heal()

    until(lambda: both.ask("A", host=1).answered == "CDF", 20, "all answer again")
    assert both.ask("E", host=2).answered == "DF"


def test_a_process_on_windows_stops_in_order_and_comes_back(both: PcAndMac) -> None:
    both.stop_file("D").touch()

    assert both.processes["D"].wait(20) == 0
    assert "0 requests refused, 0 left behind" in both.log("D")
    assert both.ask("A", mode="ANY").answered in ("C", "F")

    both.stop_file("D").unlink()
    both.start_in_turn("D")
    until(lambda: both.ask("A").answered == "CDF", 20, "all answer again")
