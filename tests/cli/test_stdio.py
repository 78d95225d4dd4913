"""Programs with closed standard streams, as with cron and `>&-`, and closed terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlay.server.shutdown import StopFile
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, six_processes, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sh, signals and terminals")

ALL_CLOSED = "<&- >&- 2>&-"
MINE = '''
import os, subprocess, sys, time

CHILD = """
import os
null = os.stat(os.devnull)
print(*(os.path.samestat(os.fstat(fd), null) for fd in (0, 2)))
"""

def look(payload, context):
    """Whether each descriptor is /dev/null, here and in a child process."""
    print("printed", payload.decode())
    null = os.stat(os.devnull)
    here = [os.path.samestat(os.fstat(fd), null) for fd in range(3)]
    child = subprocess.run([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    return f"{here} {child.stdout.strip()}".encode()

def gate(payload, context):
    """Prints once the test has opened the gate."""
    while not os.path.exists("open"):
        time.sleep(0.01)
    print("through the gate", flush=True)
    return payload
'''
HANDLERS = {
    "look": "mine:look",
    "gate": "mine:gate",
    "apart": {"call": "mine:look", "run": "process", "slots": 1},
}


class Lone(Overlay):
    """A single worker, started in a given way."""

    def __init__(self, folder: Path) -> None:
        processes = six_processes()["processes"]
        config = {"processes": {i: processes[i] for i in "ABC"}, "handlers": HANDLERS}
        processes["A"]["neighbors"], processes["B"]["neighbors"] = ["B"], ["A", "C"]
        super().__init__(folder, config)
        (folder / "mine.py").write_text(MINE)
        self.stop_file = StopFile(folder / "c.stop")

    def start_by(self, **how: Any) -> subprocess.Popen[str]:
        """how: arguments of Popen; `sh`: what a shell adds to the command."""
        command = [*self._node("C"), "--stop-file", str(self.stop_file.path)]
        if words := how.pop("sh", ""):
            command = ["sh", "-c", f'exec "$@" {words}', "sh", *command]
        process = subprocess.Popen(command, cwd=self.folder, text=True, **how)
        self.processes["C"] = process
        self.metrics("C")
        return process

    def begin_gated(self) -> Any:
        asked = pb2.Request(payload=b"x", handler="gate")
        call = self.stub("C").Forward.future(asked, timeout=30)
        until(lambda: self.metrics("C").active_requests == 1, what="it runs")
        return call

    def open_gate(self) -> None:
        (self.folder / "open").touch()


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Lone]:
    made = Lone(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lone]:
    """A worker started without standard streams."""
    made = Lone(tmp_path_factory.mktemp("bare"))
    try:
        made.start_by(sh=ALL_CLOSED)
        yield made
    finally:
        made.stop()


# Without standard streams


@pytest.mark.parametrize("handler", ["look", "apart"])
def test_a_node_reserves_descriptors_0_to_2_if_they_are_closed(bare: Lone, handler: str) -> None:
    answer = bare.ask("C", b"this", handler=handler)

    assert answer.result == b"[True, True, True] True True"
    until(lambda: "printed this" in bare.log("C"), what="what it printed is in the log")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ALL_CLOSED])
def test_client_py_works_with_closed_standard_streams(bare: Lone, closed: str) -> None:
    asked = shell(closed, "client.py", "127.0.0.1", bare.port("C"))

    assert asked.returncode == 0
    assert ("C: hello" in asked.stdout or ">&-" in closed, asked.stderr) == (True, "")


@pytest.mark.parametrize("closed", ["<&- >&-", ALL_CLOSED])
def test_client_py_complains_on_standard_error_if_that_is_open(bare: Lone, closed: str) -> None:
    wrong = shell(closed, "client.py", "127.0.0.1", bare.port("C"), "--no-such")

    assert wrong.returncode == 2
    assert ("--no-such" in wrong.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["client.py", "127.0.0.1", "PORT", "map", "-"], 0),
        (["client.py", "init", "overlay.json"], 2),
        (["test_system.py", "127.0.0.1", "PORT"], 0),
        (["node.py", "overlay.json", "C", "--check"], 0),
        (["node.py", "overlay.json", "Z"], 2),
        (["scripts/run.py", "status", "overlay.json"], 1),  # the other processes are not running
    ],
    ids=lambda words: " ".join(words[:1]) if isinstance(words, list) else "",
)
def test_the_other_programs_work_with_closed_standard_streams(
    bare: Lone, words: list[str], code: int
) -> None:
    before = bare.path.read_text()
    at_port = [str(bare.port("C")) if word == "PORT" else word for word in words]

    done = shell(ALL_CLOSED, *at_port, cwd=bare.folder)

    assert done.returncode == code
    assert bare.path.read_text() == before


def test_closed_output_is_not_a_terminal(bare: Lone) -> None:
    code = "import sys; from overlay.cli import stdio; stdio.complete(); stdio.complete(); "
    code += "open('said.txt', 'w').write(str([s.isatty() for s in "
    code += "(sys.stdin, sys.stdout, sys.__stderr__)] + [sys.stdin.read()])); print('ä\\udcff')"

    done = shell(ALL_CLOSED, "-c", code, cwd=bare.folder, PYTHONPATH=str(ROOT))

    assert done.returncode == 0
    assert (bare.folder / "said.txt").read_text() == "[False, False, False, '']"


def shell(
    redirected: str, script: str, *words: object, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program of ours in a shell."""
    script = script if script.startswith("-") else str(ROOT / script)
    command = [sys.executable, script, *map(str, words)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
    )


# Closed terminals


def test_sighup_is_a_graceful_stop_however_often_it_is_sent(lone: Lone) -> None:
    process = lone.start_by(stdout=subprocess.DEVNULL)
    call = lone.begin_gated()
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    until(lambda: not lone.metrics("C").is_healthy, what="it stops")
    lone.open_gate()

    assert call.result().result == b"x"
    assert process.wait(20) == 0
    assert "0 requests refused, 0 left behind" in lone.log("C")


def test_a_process_under_nohup_keeps_serving(lone: Lone) -> None:
    process = lone.start_by(
        stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)

    assert lone.metrics("C").is_healthy
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize("is_left_running", [False, True])
def test_a_handler_can_print_after_its_terminal_is_closed(
    lone: Lone, is_left_running: bool
) -> None:
    """is_left_running: in the background of a shell that sends it no signal when it exits."""
    ours, theirs = os.openpty()
    how = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    how = how if is_left_running else {"preexec_fn": _takes_terminal(theirs)}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = lone.start_by(start_new_session=True, **streams, **how)
    os.close(theirs)
    call = lone.begin_gated()
    os.close(ours)  # closes the terminal
    if is_left_running:
        time.sleep(0.5)
    else:
        until(lambda: not lone.metrics("C").is_healthy, what="it stops")
    lone.open_gate()

    assert call.result().result == b"x"
    if not is_left_running:
        assert process.wait(20) == 0
        assert "0 requests refused, 0 left behind" in lone.log("C")


def _takes_terminal(fd: int) -> Callable[[], object]:
    import fcntl
    import termios

    return lambda: fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
