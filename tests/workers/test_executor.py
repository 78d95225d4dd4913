"""The executor: running the user's handlers on threads and in processes."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from overlay.model.errors import ConfigError
from overlay.model.limits import Limits
from overlay.model.segments import Code, Column, Executed, Part, Route, Segment, Slice
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.workers.executor import Executor
from overlay.workers.request_ids import SeenIds
from tests.harness.cluster import ROOT, until

ACTS = '''
import os, sys, threading, time

gate = threading.Event()
lock = threading.Lock()
running = most = 0
seen = []

def act(payload, context):
    """Does what the payload says."""
    what, _, value = payload.decode().partition(" ")
    if what == "raise": raise ValueError("a secret")
    if what == "exit": sys.exit(3)
    if what == "interrupt": raise KeyboardInterrupt
    if what == "generator": raise GeneratorExit
    if what == "gone": os._exit(7)
    if what == "text": return "text"
    if what == "none": return None
    if what == "list": return [1]
    if what == "array": return bytearray(b"array")
    if what == "view": return memoryview(b"a view")
    if what == "options": return repr(sorted(context.options.items())).encode()
    if what == "context":
        facts = (context.process_id, context.team, context.request_id, context.attempt)
        return " ".join(map(str, facts)).encode()
    if what == "left": return str(context.remaining_s()).encode()
    if what == "note":
        with open(value, "a") as notes: notes.write("begun\\n")
        os._exit(1)
    if what == "spin":
        print("it spins", flush=True)
        end = time.monotonic() + float(value)
        while time.monotonic() < end: pass
    if what == "sleep": time.sleep(float(value))
    return str(os.getpid()).encode()

def wait(payload, context):
    """Blocks until the gate opens; counts the running calls."""
    global running, most
    with lock:
        running += 1
        most = max(most, running)
    gate.wait(20)
    with lock:
        running -= 1
    seen.append(context.cancelled)
    return payload
'''

WORKER = Process("W", "worker", "green", "h", 1)


class Bench:
    """An executor for one handler, and the outcome of each request."""

    def __init__(self, folder: Path, process: Process = WORKER, **spec: object) -> None:
        handler = HandlerSpec("h", **{"call": "acts:act", **spec})
        self.executor = Executor(Topology({"W": process}, {"h": handler}, folder=folder), process)
        self.parts: dict[int, list[Part]] = {}
        self.slices: list[tuple[int, int]] = []
        self.ends: dict[int, Callable[[Code], None]] = {}
        self.freed = 0
        self.executor.on_free = self._freed
        self._ids = 0

    def start(self, what: str, *, request_id: int = 0, left_s: float = 30.0) -> int | None:
        """Starts a request; returns its id, or None if there is no free slot."""
        return self.start_rows([what], first_id=request_id, left_s=left_s)

    def start_rows(self, rows: list[str], *, first_id: int = 0, left_s: float = 30.0) -> int | None:
        """Starts a segment; returns its first id, or None if there are not enough free slots."""
        if self.executor.claim("h", len(rows)) < len(rows):
            return None
        first_id = first_id or self._ids + 1
        self._ids = max(self._ids, first_id + len(rows) - 1) if first_id < 10_000 else self._ids
        for row in range(len(rows)):
            self.parts.setdefault(first_id + row, [])
        payloads = Column([what.encode() for what in rows])
        deadline = time.monotonic() + left_s
        segment = Segment(
            Route(handler="h", hops=("A", "B")), payloads, deadline, first_id, attempt=2
        )

        def sink(start: int, answers: Slice) -> None:
            self.slices.append((start, len(answers)))
            for row in range(len(answers)):
                self.parts[first_id + start + row].extend(answers.at(row).parts)

        end = self.executor.run(segment, 0.25, sink)
        self.ends[first_id] = lambda code, start=0, count=10_000: end(
            code, start, min(count, len(rows) - start)
        )
        return first_id

    def run(self, what: str, **more: object) -> Part:
        request_id = self.start(what, **more)
        assert request_id is not None
        return self.part(request_id)

    def part(self, request_id: int, within_s: float = 10.0) -> Part:
        until(lambda: self.parts[request_id], within_s, f"an answer to {request_id}")
        return self.parts[request_id][-1]

    @property
    def free(self) -> int:
        """The number of slots that can be claimed."""
        count = self.executor.claim("h", 10_000)
        self.executor._give_back(self.executor._handlers["h"][0], count)
        return count

    def _freed(self) -> None:
        self.freed += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the handlers' module, which is unloaded at the end."""
    made = tmp_path_factory.mktemp("handlers")
    (made / "acts.py").write_text(ACTS)
    path = list(sys.path)
    yield made
    sys.path[:] = path
    sys.modules.pop("acts", None)


@pytest.fixture
def acts(folder: Path) -> Iterator[ModuleType]:
    sys.path.insert(1, str(folder))
    module = importlib.reload(importlib.import_module("acts"))
    yield module
    module.gate.set()
    until(lambda: module.running == 0)  # otherwise it would be counted in the next test


@pytest.fixture
def benches(folder: Path, acts: ModuleType) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(process: Process = WORKER, **spec: object) -> Bench:
        made.append(Bench(folder, process, **spec))
        return made[-1]

    yield make
    acts.gate.set()
    for bench in made:
        bench.executor.close()


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Bench]:
    """A handler in two processes, shared by tests that do not kill them."""
    bench = Bench(folder, run="process", slots=2)
    yield bench
    bench.executor.close()


@pytest.fixture(params=["thread", "process"])
def bench(request: pytest.FixtureRequest, benches, pool) -> Bench:
    return pool if request.param == "process" else benches(slots=2)


def own_id(bench: Bench) -> int:
    return 10_000 + len(bench.parts)


def test_a_handlers_answer_has_its_path_and_times(bench):
    part = bench.run("context", request_id=own_id(bench))

    assert (part.process_id, part.code, part.executed) == ("W", Code.OK, Executed.YES)
    assert part.result == f"W green {10_000 + len(bench.parts) - 1} 2".encode()
    assert part.hops == ("A", "B", "W")
    assert part.waited_us == 250_000
    assert part.worked_us >= 0


@pytest.mark.parametrize(("what", "result"), [("array", b"array"), ("view", b"a view")])
def test_any_bytes_like_object_is_a_valid_answer(bench, what, result):
    assert bench.run(what, request_id=own_id(bench)).result == result


@pytest.mark.parametrize("what", ["raise", "exit", "interrupt", "generator"])
def test_any_exception_fails_one_request_and_its_text_stays_in_the_log(bench, what, caplog):
    caplog.set_level(logging.ERROR, "overlay.workers.job")

    part = bench.run(what, request_id=own_id(bench))

    assert (part.code, part.executed) == (Code.INTERNAL, Executed.YES)
    assert "secret" not in part.reason
    assert part.reason.startswith("handler 'h' failed; error id ")
    error_id = part.reason.split("error id ")[1].split()[0]
    (line,) = [record for record in caplog.records if error_id in record.getMessage()]
    assert "act" in line.private
    assert line.request_id == max(bench.parts)
    assert len(bench.parts[max(bench.parts)]) == 1


@pytest.mark.parametrize(
    ("what", "kind"), [("text", "str"), ("none", "NoneType"), ("list", "list")]
)
def test_an_answer_that_is_not_bytes_is_a_failure_that_names_the_type(bench, what, kind):
    part = bench.run(what, request_id=own_id(bench))
    assert (part.code, part.reason) == (Code.INTERNAL, f"handler 'h' returned {kind}, not bytes")


def test_a_request_id_that_has_run_is_rejected_with_unknown_outcome(bench):
    request_id = own_id(bench)
    assert bench.run("pid", request_id=request_id).ok

    bench.start("pid", request_id=request_id)
    until(lambda: len(bench.parts[request_id]) == 2)

    second = bench.parts[request_id][-1]
    assert (second.code, second.executed) == (Code.ALREADY_EXISTS, Executed.UNKNOWN)
    until(lambda: bench.executor.active == 0)
    assert bench.free >= 2


def test_cancelling_a_rejected_second_run_does_nothing(bench):
    request_id = own_id(bench)
    bench.run("pid", request_id=request_id)
    bench.start("pid", request_id=request_id)
    until(lambda: len(bench.parts[request_id]) == 2)

    bench.ends[request_id](Code.CANCELLED)

    assert len(bench.parts[request_id]) == 2


def test_cancelling_an_answered_request_does_nothing(bench):
    request_id = own_id(bench)
    bench.run("pid", request_id=request_id)

    bench.ends[request_id](Code.CANCELLED)

    assert len(bench.parts[request_id]) == 1


def test_slots_are_never_exceeded(benches, acts):
    bench = benches(call="acts:wait", slots=3)

    started = [bench.start("x") for _ in range(10)]
    until(lambda: acts.running == 3)

    assert sum(request_id is not None for request_id in started) == 3
    assert bench.executor.active == 3
    acts.gate.set()
    until(lambda: bench.freed == 3)
    until(lambda: bench.executor.active == 0)
    assert acts.most == 3


@pytest.mark.parametrize(
    ("process", "slots", "expected"),
    [
        (Process("W", "worker", "t", "h", 1, slots=2), 5, 2),
        (Process("W", "worker", "t", "h", 1, in_service=4), 5, 4),
        (Process("W", "worker", "t", "h", 1, slots=9), 5, 5),
        (Process("W", "worker", "t", "h", 1), None, 100),
    ],
)
def test_the_smallest_limit_is_the_number_of_slots(benches, process, slots, expected):
    bench = benches(process, slots=slots)
    claimed = [bench.executor.claim("h", 2) for _ in range(expected + 3)]
    assert sum(claimed) == expected
    assert bench.executor.slots == {"h": expected}


def test_a_claim_gets_at_most_the_free_slots(benches):
    bench = benches(slots=5)
    assert [bench.executor.claim("h", count) for count in (3, 3, 3)] == [3, 2, 0]


def test_slots_are_never_exceeded_by_many_threads(benches, acts):
    bench = benches(slots=3)
    slots, _ = bench.executor._handlers["h"]
    most: list[int] = []

    def ask() -> None:
        for n in range(100):
            count = bench.executor.claim("h", n % 4)
            most.append(slots.taken)
            bench.executor._give_back(slots, count)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert max(most) <= 3
    assert bench.free == 3


@pytest.mark.parametrize(
    ("slots", "slow", "quick"),
    [(None, 90, 9), (80, 80, 18), (8, 8, 8)],
)
def test_a_handler_leaves_slots_of_its_worker_to_the_others(folder, slots, slow, quick):
    specs = {name: HandlerSpec(name, "acts:act", slots=slots) for name in ("slow", "quick")}
    worker = Process("W", "worker", "green", "h", 1)
    executor = Executor(Topology({"W": worker}, specs, folder=folder), worker)
    try:
        assert executor.claim("slow", 1000) == slow
        assert executor.claim("quick", 1000) == quick
        assert set(executor.slots.values()) == {slow}
    finally:
        executor.close()


TWO = Process("W", "worker", "green", "slow", 1, slots=1)


def test_a_worker_never_runs_more_than_its_slots_whatever_the_handlers(folder, acts):
    """Even if a handler is so quick that it may claim more than its slots."""
    specs = {"slow": HandlerSpec("slow", "acts:wait"), "quick": HandlerSpec("quick", "acts:act")}
    executor = Executor(Topology({"W": TWO}, specs, folder=folder), TWO)
    done: list[int] = []

    def run(handler: str, first_id: int) -> None:
        segment = Segment(Route(handler=handler), Column((b"",)), time.monotonic() + 9, first_id)
        executor.run(segment, 0.0, lambda start, answers: done.append(first_id))

    try:
        for n in range(1, 21):
            until(lambda: executor.claim("quick", 1))
            run("quick", n)
            until(lambda n=n: n in done)
        until(lambda: executor.claim("slow", 1))
        run("slow", 100)
        until(lambda: acts.running == 1)

        assert executor.claim("quick", 5) == 0
    finally:
        acts.gate.set()
        executor.close()


def test_a_thread_keeps_its_slot_until_its_handler_returns(benches, acts):
    bench = benches(call="acts:wait", slots=1)
    request_id = bench.start("x")
    until(lambda: acts.running == 1)

    bench.ends[request_id](Code.CANCELLED)

    assert bench.part(request_id).code is Code.CANCELLED
    assert bench.start("y") is None
    acts.gate.set()
    until(lambda: bench.freed == 1)
    until(lambda: bench.executor.active == 0)
    assert len(bench.parts[request_id]) == 1
    assert acts.seen == [True]  # the handler could see the cancellation


def test_on_free_is_called_once_for_each_slot(bench):
    before = bench.freed
    for what in ("pid", "raise", "text"):
        bench.run(what, request_id=own_id(bench))
    until(lambda: bench.freed == before + 3)
    until(lambda: bench.executor.active == 0)


def test_options_of_the_process_override_those_of_the_handler(benches):
    process = Process("W", "worker", "t", "h", 1, options={"b": 3})
    bench = benches(process, options={"a": 1, "b": 2})
    assert bench.run("options").result == b"[('a', 1), ('b', 3)]"


def test_a_handler_knows_how_long_its_caller_waits(bench):
    left = float(bench.run("left", request_id=own_id(bench), left_s=5).result)
    assert 3 < left <= 5


def test_completed_and_failed_requests_are_counted(benches):
    bench = benches()
    for what in ("pid", "pid", "raise"):
        bench.run(what)
    until(lambda: bench.executor.active == 0)
    (counts,) = bench.executor.counts()
    assert (counts.completed, counts.failed, counts.active) == (2, 1, 0)
    assert counts.worked.count == 3


def test_a_process_that_dies_fails_one_request_and_the_next_one_runs(benches):
    bench = benches(run="process", slots=1)

    part = bench.run("gone")

    assert (part.code, part.executed) == (Code.INTERNAL, Executed.YES)
    assert bench.run("pid").ok
    until(lambda: bench.executor.active == 0)


@pytest.mark.parametrize("wait", [True, False])
def test_a_request_for_a_killed_idle_process_runs_in_another(benches, wait):
    bench = benches(run="process", slots=1)
    for _ in range(5):
        child = psutil.Process(int(bench.run("pid").result))
        child.kill()  # it may be between its answer and its next wait
        if wait:
            psutil.wait_procs([child], 5)

        part = bench.run("pid")

        assert part.ok
        assert int(part.result) != child.pid


def test_if_no_process_can_be_started_a_request_fails_as_not_run(benches, folder):
    wrong = folder / "wrong"
    (folder / "later.py").write_text(
        f"import os\nassert not os.path.exists({str(wrong)!r})\n"
        "def h(payload, context): return b'%d' % os.getpid()"
    )
    bench = benches(call="later:h", run="process", slots=1)
    child = psutil.Process(int(bench.run("").result))
    wrong.write_text("")
    child.kill()

    part = bench.run("", request_id=4711)

    assert (part.code, part.executed) == (Code.UNAVAILABLE, Executed.NO)
    assert "no process for handler 'h' can be started" in part.reason
    wrong.unlink()
    bench.start("", request_id=4711)
    until(lambda: len(bench.parts[4711]) == 2)
    assert bench.parts[4711][-1].ok


def test_a_started_request_is_not_given_to_another_process(benches, tmp_path):
    bench = benches(run="process", slots=2)
    notes = tmp_path / "notes"

    part = bench.run(f"note {notes}")

    assert (part.code, part.executed) == (Code.INTERNAL, Executed.YES)
    assert notes.read_text() == "begun\n"


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
def test_a_request_ended_in_its_process_has_the_reason(benches, code):
    bench = benches(run="process", slots=1)
    bench.run("pid")
    request_id = bench.start("spin 20")
    until(lambda: bench.executor.active == 1)

    bench.ends[request_id](code)

    part = bench.part(request_id)
    assert (part.code, part.executed) == (code, Executed.YES)


def test_cancelling_a_request_kills_its_process_within_a_second(benches, caplog):
    caplog.set_level(logging.INFO, "overlay.handler")
    bench = benches(run="process", slots=1)
    child = psutil.Process(int(bench.run("pid").result))
    request_id = bench.start("spin 20")
    until(lambda: "it spins" in caplog.text, 5, "the handler computes")

    bench.ends[request_id](Code.CANCELLED)

    child.wait(1)
    until(lambda: bench.executor.active == 0)
    assert bench.run("pid").ok
    assert len(bench.parts[request_id]) == 1


def test_the_next_request_starts_after_the_killed_process_has_ended(benches, caplog):
    caplog.set_level(logging.INFO, "overlay.handler")
    bench = benches(run="process", slots=1)
    child = psutil.Process(int(bench.run("pid").result))
    request_id = bench.start("spin 20")
    until(lambda: "it spins" in caplog.text, 5, "the handler computes")

    bench.ends[request_id](Code.CANCELLED)
    until(lambda: bench.executor.active == 0)
    following = bench.run("pid")

    assert int(following.result) != child.pid
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_handler_that_exceeds_its_time_limit_is_killed(benches):
    bench = benches(run="process", slots=1, limit_s=0.3)

    part = bench.run("spin 20")

    assert part.code is Code.INTERNAL
    assert "longer than its limit_s 0.3" in part.reason
    assert part.worked_us < 2_000_000
    assert bench.run("pid").ok


def test_a_process_is_replaced_after_max_requests(benches):
    bench = benches(run="process", slots=1, max_requests=2)
    pids = [bench.run("pid").result for _ in range(5)]
    assert [pids.index(pid) for pid in pids] == [0, 0, 2, 2, 4]


def test_a_closed_executor_leaves_no_process(benches):
    bench = benches(run="process", slots=2)
    child = psutil.Process(int(bench.run("pid").result))

    bench.executor.close()
    bench.executor.close()

    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


PARENT = """
import sys, time
sys.path[:0] = [{root!r}, {folder!r}]
from pathlib import Path
import psutil
from overlay.workers.executor import Executor
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.model.segments import Column, Route, Segment

if __name__ == "__main__":
    me = Process("W", "worker", "t", "h", 1)
    spec = HandlerSpec("h", "acts:act", run="process", slots=3)
    executor = Executor(Topology({{"W": me}}, {{"h": spec}}, folder=Path({folder!r})), me)
    done = []
    for n, what in enumerate((b"spin 15", b"sleep 15", b"pid")):
        segment = Segment(Route(handler="h"), Column((what,)), time.monotonic() + 60, n + 1)
        while not executor.claim("h", 1):
            time.sleep(0.01)
        executor.run(segment, 0.0, lambda start, answers: done.append(answers))
    while not done:
        time.sleep(0.01)
    time.sleep(0.2)
    print(done[0].at(0).parts[0].result.decode(), flush=True)
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    time.sleep(60)
"""


def test_no_process_outlives_a_parent_that_is_killed(folder, tmp_path):
    """Neither one that is idle, nor those that spin or sleep."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=str(ROOT), folder=str(folder)), encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        idle = int(parent.stdout.readline())
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    finally:
        parent.kill()
        parent.wait(5)
        parent.stdout.close()

    assert len(children) >= 3
    assert idle in [child.pid for child in children]
    try:
        _, alive = psutil.wait_procs(children, 4)
        assert not alive
    finally:
        for child in children:
            if child.is_running():
                child.kill()


IMPORTS = {
    "missing": (None, "module 'missing' cannot be imported (ModuleNotFoundError"),
    "broken": ("def h(:", "module 'broken' cannot be imported (SyntaxError"),
    "raises": ("1/0", "module 'raises' cannot be imported (ZeroDivisionError"),
    "exits": ("import sys; sys.exit(1)", "module 'exits' cannot be imported (SystemExit"),
    "empty": ("", "module 'empty' has no function 'h'"),
    "number": ("h = 5", "module 'number' has 'h', which is not a function"),
    "talks": ("raise ValueError('two\\nlines')", "module 'talks' cannot be imported (ValueError"),
}


@pytest.mark.parametrize("run", ["thread", "process"])
@pytest.mark.parametrize("module", IMPORTS)
def test_a_handler_that_cannot_be_imported_is_named_with_its_module(benches, folder, module, run):
    text, sentence = IMPORTS[module]
    if text is not None:
        (folder / f"{module}.py").write_text(text)
        importlib.invalidate_caches()

    with pytest.raises(ConfigError) as raised:
        benches(call=f"{module}:h", run=run)

    (problem,) = raised.value.problems
    assert problem.startswith(f"handler 'h': {sentence}")
    assert "\n" not in problem


def test_a_module_that_ends_its_process_is_named(benches, folder):
    (folder / "ends.py").write_text("import os; os._exit(3)")

    with pytest.raises(ConfigError) as raised:
        benches(call="ends:h", run="process")

    assert "handler 'h'" in str(raised.value)
    assert "'ends" in str(raised.value)


def test_a_handler_that_cannot_be_imported_leaves_no_process(folder, acts):
    before = set(psutil.Process().children())
    specs = {
        "good": HandlerSpec("good", "acts:act", run="process", slots=1),
        "bad": HandlerSpec("bad", "missing:h"),
    }

    with pytest.raises(ConfigError):
        Executor(Topology({"W": WORKER}, specs, folder=folder), WORKER)

    left = set(psutil.Process().children()) - before
    assert [p for p in left if "spawn_main" in " ".join(p.cmdline())] == []


# Segments with many rows, on threads and in processes.


def test_each_row_of_a_segment_is_run_and_answered_once(bench):
    first_id = own_id(bench)

    bench.start_rows(["context", "raise"], first_id=first_id)
    until(lambda: bench.parts[first_id] and bench.parts[first_id + 1])

    assert bench.parts[first_id][0].result == b"W green %d 2" % first_id
    assert bench.parts[first_id + 1][0].code is Code.INTERNAL
    assert [len(bench.parts[first_id + row]) for row in range(2)] == [1, 1]
    until(lambda: bench.executor.active == 0)
    until(lambda: bench.free >= 2)


def test_rows_that_have_run_before_are_rejected_and_the_others_run(bench):
    first_id = own_id(bench)
    assert bench.run("pid", request_id=first_id + 1).ok
    until(lambda: bench.free >= 2)

    bench.start_rows(["pid", "pid"], first_id=first_id)
    until(lambda: bench.parts[first_id] and len(bench.parts[first_id + 1]) == 2)

    assert bench.parts[first_id][0].ok
    assert bench.parts[first_id + 1][1].code is Code.ALREADY_EXISTS
    until(lambda: bench.free >= 2)


def test_rows_that_ended_before_they_started_may_be_sent_again(benches, capsys):
    bench = benches(slots=1)
    bench.run("pid")
    ((slots, _),) = bench.executor._handlers.values()
    slots.service_s = 0.0001  # so quick that the worker claims more rows than slots
    until(lambda: bench.free >= 4)
    first_id = bench.start_rows(["spin 1", "pid", "pid", "pid"], first_id=20_000)
    until(lambda: "it spins" in capsys.readouterr().out)  # the first row has started

    bench.ends[first_id](Code.DEADLINE_EXCEEDED)

    ended = [bench.parts[first_id + row][0].executed for row in range(4)]
    assert ended == [Executed.YES, Executed.NO, Executed.NO, Executed.NO]
    until(lambda: bench.executor.active == 0)
    slots.service_s = 0.0001
    until(lambda: bench.free >= 4)
    bench.start_rows(["pid"] * 4, first_id=first_id)
    until(lambda: all(len(bench.parts[first_id + row]) == 2 for row in range(4)))
    again = [bench.parts[first_id + row][1].code for row in range(4)]
    assert again == [Code.ALREADY_EXISTS, Code.OK, Code.OK, Code.OK]


def test_if_no_more_ids_can_be_remembered_a_row_is_rejected_as_not_run(benches):
    bench = benches(slots=2)
    bench.executor._seen = SeenIds(replace(Limits(), chosen_ids=1))
    assert bench.run("pid", request_id=1000).ok

    part = bench.run("pid", request_id=2000)

    assert (part.code, part.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)
    assert part.reason.startswith("no room for more request ids chosen by callers: this worker")
    bench.start("pid", request_id=1000)
    until(lambda: len(bench.parts[1000]) == 2)
    assert bench.parts[1000][1].code is Code.ALREADY_EXISTS
    until(lambda: bench.free >= 2)


def test_cancelling_rows_does_not_affect_the_processes_of_other_rows(benches):
    bench = benches(run="process", slots=2)
    bench.run("pid")
    until(lambda: bench.free == 2)
    first_id = bench.start_rows(["sleep 20", "sleep 0.5"])

    bench.ends[first_id](Code.CANCELLED, 0, 1)

    assert bench.parts[first_id][0].code is Code.CANCELLED
    assert bench.part(first_id + 1).ok
    until(lambda: bench.free == 2)


def test_a_result_after_the_deadline_is_reported_as_late(bench):
    part = bench.run("sleep 0.4", request_id=own_id(bench), left_s=0.15)
    assert (part.code, part.executed) == (Code.DEADLINE_EXCEEDED, Executed.YES)
