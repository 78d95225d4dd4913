"""Misbehaving handlers and callers that leave, on real processes over three hops."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

import overlay
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, free_port, running, until

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX calls")

MISBEHAVIOURS = '''
import _thread, ctypes, os, signal, subprocess, sys, tempfile, threading, time

def note(context, *words):
    with open(context.options["notes"], "a") as notes:
        notes.write(" ".join(map(str, words)) + "\\n")

def patient(payload, context):
    """Runs until its caller is gone; in a process it does not check."""
    if payload == b"ready?": return b"yes"
    note(context, payload.decode(), os.getpid(), "began")
    until = time.monotonic() + 20
    while time.monotonic() < until and not (context.cancelled and payload == b"thread"):
        time.sleep(0.03)
    note(context, payload.decode(), os.getpid(), "ended", time.time())
    return b""

class NoText(Exception):
    def __str__(self): raise ValueError("no text")

class NoBytes(bytes):
    def __bytes__(self): raise ValueError("no bytes")

def deeper(n): return deeper(n + 1) + 1

def misbehave(payload, context):
    what = payload.decode()
    if what == "exit": os._exit(3)
    if what == "segfault": ctypes.string_at(0)
    if what == "abort": os.abort()
    if what == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if what == "text": return "text"
    if what == "none": return None
    if what == "released":
        view = memoryview(b"view"); view.release(); return view
    if what == "no bytes": return NoBytes(b"x")
    if what == "system exit": raise SystemExit(3)
    if what == "interrupt": raise KeyboardInterrupt
    if what == "interrupt main" and context.options["run"] == "process": _thread.interrupt_main()
    if what == "generator": raise GeneratorExit
    if what == "no text": raise NoText
    if what == "long error": raise ValueError("x" * 50_000_000)
    if what == "never": time.sleep(60 if context.options["run"] == "process" else 3)
    if what == "large": return bytes(100_000_000)
    if what == "memory":
        held = [b"x" * 10_000_000 for _ in range(60)]
        time.sleep(20)
    if what == "gigabyte":
        line = "x" * (1 << 20)
        for _ in range(1024): print(line)
    if what == "many lines":
        for n in range(20_000): print("line", n)
        for n in range(5_000): context.log.info("line %d", n)
        for n in range(5_000): print("line", n, file=sys.stderr)
    if what == "no line end":
        for _ in range(200): print("x" * 100_000, end="")
    if what == "programs":
        subprocess.run([sys.executable, "-c", "print('x' * 1_000_000)"], stdout=sys.stdout)
        if context.options["run"] == "process":  # on a thread it is the node's own output
            subprocess.run([sys.executable, "-c", "print('x' * 1_000_000)"])
            os.write(1, b"x" * 1_000_000)
            os.write(2, b"x" * 1_000_000)
    if what == "holds the pipes":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4)"], close_fds=False)
    if what == "fork holds the pipes":
        if not os.fork():
            time.sleep(4)
            os._exit(0)
        os._exit(3)
    if what == "fork comes back": os.fork()
    if what == "forks and returns":
        if not os.fork():
            time.sleep(4)
            os._exit(0)
    if what == "closes all": os.closerange(3, 256)
    if what == "closes stdout": sys.stdout.close(); sys.stderr.buffer.close(); print("more")
    if what == "no stdout": sys.stdout = sys.stderr = None
    if what == "elsewhere":
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            if os.name != "posix": os.chdir("..")
    if what == "where":
        try: return os.getcwd().encode()
        except OSError: return b"nowhere"
    if what == "low limit": sys.setrecursionlimit(80)
    if what == "low limit, raises":
        sys.setrecursionlimit(len(sys._current_frames()) + 60)
        raise ValueError("low")
    if what == "limit": return b"%d" % sys.getrecursionlimit()
    if what == "recursion": return deeper(0)
    if what == "deep recursion":
        sys.setrecursionlimit(10**9)
        threading.stack_size(64 * 1024)
        f = lambda *a: sorted([1, 2], key=lambda _: f())
        thread = threading.Thread(target=f); thread.start(); thread.join()
    if what == "signals":
        for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    if what == "thread stays":
        again = lambda: [print("again") or time.sleep(0.01) for _ in range(200)]
        threading.Thread(target=again).start()
    if what == "pid": return str(os.getpid()).encode()
    return b"done"
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("misbehaving")


@pytest.fixture(scope="module")
def three(folder: Path) -> Iterator[Overlay]:
    """A, B and C: a leader, a team leader, a worker. Their output is a pipe that is not read."""
    (folder / "mine.py").write_text(MISBEHAVIOURS)
    (folder / "notes").write_text("")
    with running(folder, three_processes(folder / "notes")) as overlay:
        yield overlay


def three_processes(notes: Path, **top: object) -> dict[str, object]:
    def process(id_: str, role: str, *neighbors: str) -> dict[str, object]:
        place = {"host": "127.0.0.1", "port": free_port()}
        return {"id": id_, "role": role, "team": "t", **place, "neighbors": list(neighbors)}

    def handler(function: str, run: str, **more: object) -> dict[str, object]:
        options = {"notes": str(notes), "run": run}
        return {"call": f"mine:{function}", "run": run, "options": options, **more}

    return {
        "processes": {
            "A": process("A", "leader", "B"),
            "B": process("B", "team_leader", "A", "C"),
            "C": process("C", "worker", "B"),
        },
        "handlers": {
            "thread": handler("misbehave", "thread", slots=20),
            "process": handler("misbehave", "process", slots=1, memory_mib=300),
            "patient-thread": handler("patient", "thread", slots=1),
            "patient-process": handler("patient", "process", slots=1),
        },
        **top,
    }


def ask(three: Overlay, what: str, run: str, timeout: float = 20) -> tuple[str, str]:
    """The name of the status, and the result or the reason."""
    try:
        answer = three.ask("A", what.encode(), handler=run, mode=pb2.ANY, timeout=timeout)
    except grpc.RpcError as e:
        return e.code().name, e.details()
    return "OK", answer.result.decode()


BOTH = ("thread", "process")
IN_PROCESS = ("process",)

# What the handler does, where it can, the caller's status, part of the result or reason.
TABLE = [
    ("text", BOTH, "INTERNAL", "returned str, not bytes"),
    ("none", BOTH, "INTERNAL", "returned NoneType, not bytes"),
    ("released", BOTH, "INTERNAL", "error id"),
    ("no bytes", BOTH, "INTERNAL", "error id"),
    ("system exit", BOTH, "INTERNAL", "error id"),
    ("interrupt", BOTH, "INTERNAL", "error id"),
    ("interrupt main", IN_PROCESS, "OK", "done"),
    ("generator", BOTH, "INTERNAL", "error id"),
    ("no text", BOTH, "INTERNAL", "error id"),
    ("long error", BOTH, "INTERNAL", "error id"),
    ("large", BOTH, "RESOURCE_EXHAUSTED", "returned 100,000,000 bytes, more than max_message_mib"),
    ("no line end", BOTH, "OK", "done"),
    ("programs", IN_PROCESS, "OK", "done"),
    ("holds the pipes", BOTH, "OK", "done"),
    ("closes stdout", BOTH, "OK", "done"),
    ("low limit", BOTH, "OK", "done"),
    ("low limit, raises", BOTH, "INTERNAL", "error id"),
    ("recursion", BOTH, "INTERNAL", "error id"),
    ("exit", IN_PROCESS, "INTERNAL", "error id"),
    ("memory", IN_PROCESS, "INTERNAL", "more than its memory_mib 300"),
    ("no stdout", IN_PROCESS, "OK", "done"),
    ("elsewhere", IN_PROCESS, "OK", "done"),
    ("thread stays", IN_PROCESS, "OK", "done"),
    ("signals", IN_PROCESS, "OK", "done"),
]
ON_POSIX = [
    ("segfault", IN_PROCESS, "INTERNAL", "error id"),
    ("abort", IN_PROCESS, "INTERNAL", "error id"),
    ("killed", IN_PROCESS, "INTERNAL", "error id"),
    ("deep recursion", IN_PROCESS, "INTERNAL", "error id"),
    ("closes all", IN_PROCESS, "INTERNAL", "error id"),
    ("fork holds the pipes", IN_PROCESS, "INTERNAL", "error id"),
    ("fork comes back", IN_PROCESS, "OK", "done"),
    ("forks and returns", IN_PROCESS, "OK", "done"),
]


def cases() -> Iterator[object]:
    for table, marks in ((TABLE, ()), (ON_POSIX, POSIX)):
        for what, runs, code, words in table:
            for run in runs:
                yield pytest.param(what, run, code, words, marks=marks, id=f"{what}-{run}")


@pytest.mark.parametrize(("what", "run", "code", "words"), list(cases()))
def test_a_misbehaving_handler_costs_one_request(three, what, run, code, words):
    worker = three.metrics("C").pid
    limit, where = ask(three, "limit", run), ask(three, "where", run)

    found, text = ask(three, what, run)

    assert found == code, text
    assert words in text
    assert ask(three, "limit", run) == limit
    assert ask(three, "where", run) == where
    assert three.metrics("C").pid == worker
    until(lambda: three.metrics("C").active_requests == 0, 5)


@pytest.mark.parametrize("run", BOTH)
def test_a_handler_that_never_returns_costs_only_its_own_request(three, run):
    code, text = ask(three, "never", run, timeout=0.5)

    assert code == "DEADLINE_EXCEEDED", text
    assert ask(three, "pid", run)[0] == "OK"


def test_what_a_handler_prints_goes_to_the_workers_log_with_the_request_id(three):
    ask(three, "closes stdout", "process")
    line = re.compile(r"overlay\.handler INFO request [0-9a-f]{16}: more$", re.MULTILINE)
    until(lambda: line.search(three.log("C")), what="the line with the request's id")


def test_output_of_handlers_fills_neither_the_log_nor_memory(three, folder):
    worker = psutil.Process(three.metrics("C").pid)
    before = worker.memory_info().rss
    dropped = three.metrics("C").log_lines_dropped

    for run in BOTH:
        assert ask(three, "many lines", run) == ("OK", "done")
        assert ask(three, "gigabyte", run) == ("OK", "done")

    assert worker.memory_info().rss - before < 50 << 20
    assert three.metrics("C").log_lines_dropped > dropped + 20_000
    assert sum(file.stat().st_size for file in (folder / "logs").glob("process_c*")) < 21 << 20
    assert "handlers write more lines than the log takes" in three.log("C")


@POSIX
def test_a_worker_whose_working_directory_was_deleted_still_starts_processes(three):
    assert ask(three, "elsewhere", "thread") == ("OK", "done")
    assert ask(three, "exit", "process")[0] == "INTERNAL"
    assert ask(three, "pid", "process")[0] == "OK"
    assert three.ask("A", b"hi").result == b"C: hi"


# Callers that leave


@pytest.fixture(scope="module")
def client(three: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(three.address("A")) as found:
        yield found


def unary(three: Overlay, client: overlay.Client, run: str, timeout: float):
    request = pb2.Request(payload=run.encode(), handler=f"patient-{run}", mode=pb2.ANY)
    return three.stub("A").Forward.future(request, timeout=timeout)


def streamed(three: Overlay, client: overlay.Client, run: str, timeout: float):
    return client.submit(f"patient-{run}", run.encode(), timeout=timeout)


# Mode any only: test_rules.py cancels requests to all, and a worker sees no difference. Nor does it
# see which way the request came to the leader, so each end is shown for each way and each run.
@pytest.mark.parametrize(
    ("way", "run", "end"),
    [
        (unary, "thread", "cancel"),
        (unary, "process", "deadline"),
        (streamed, "process", "cancel"),
        (streamed, "thread", "deadline"),
    ],
)
def test_a_cancel_or_deadline_at_the_client_ends_the_handler(three, client, folder, way, run, end):
    notes = folder / "notes"
    notes.write_text("")
    assert ask(three, "ready?", f"patient-{run}") == ("OK", "yes")

    call = way(three, client, run, 30 if end == "cancel" else 1.5)
    pid = int(until(notes.read_text).split()[1])
    worker = three.metrics("C").pid
    if end == "cancel":
        call.cancel()

    if run == "thread":
        until(lambda: "ended" in notes.read_text())
    else:
        assert pid != worker
        until(lambda: not psutil.pid_exists(pid))
    until(lambda: three.metrics("C").active_requests == 0)
    # There is one slot, so this starts only when it is free again.
    second = unary(three, client, run, 30)
    until(lambda: notes.read_text().count("began") == 2)
    second.cancel()
    until(lambda: three.metrics("C").active_requests == 0)
