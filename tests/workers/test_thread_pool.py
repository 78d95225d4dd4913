"""Handlers on threads, and the deadline thread."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from overlay.model.segments import Code, Column, Detail, Executed, Part, Route, Segment, Slice
from overlay.model.topology import HandlerSpec, Process
from overlay.transport.timers import Deadlines
from overlay.workers.api import Context
from overlay.workers.job import HandlerJob, HandlerSlots
from overlay.workers.thread_pool import ThreadRunner
from tests.harness.cluster import until

WORKER = Process("W", "worker", "green", "h", 1)


class Bench:
    """A thread runner for the test's handler, and the outcome of each row."""

    def __init__(self, handler: Callable[[bytes, Context], bytes], slots: int) -> None:
        spec = HandlerSpec("h", "overlay.workers.api:echo", slots=slots)
        self.slots = HandlerSlots(spec, slots, {})
        self.runner = ThreadRunner(spec, slots)
        self.runner._call = self._call
        self.slices: list[tuple[int, int]] = []
        self.parts: dict[int, list[Part]] = {}
        self.begun: Counter[int] = Counter()
        self.given_back = 0
        self.active = self.most = 0
        self._handler = handler
        self._lock = threading.Lock()
        self._ids = 0

    def submit(self, rows: int, left_s: float = 30.0) -> tuple[int, HandlerJob]:
        """Submits rows whose payloads are their numbers; returns the first id, and the job."""
        first_id = self._ids
        self._ids += rows
        payloads = Column([b"%d" % row for row in range(rows)])
        segment = Segment(Route(), payloads, time.monotonic() + left_s, first_id)
        self.parts.update({first_id + row: [] for row in range(rows)})

        def sink(start: int, answers: Slice) -> None:
            with self._lock:
                self.slices.append((first_id + start, len(answers)))
                for row in range(len(answers)):
                    self.parts[first_id + start + row] += answers.at(row).parts

        job = HandlerJob(self.slots, WORKER, segment, 0.0, sink, self._give_back, self.runner.end)
        self.runner.submit(job)
        return first_id, job

    @property
    def answered(self) -> list[int]:
        return [request_id for request_id, parts in self.parts.items() if parts]

    def wait(self, within_s: float = 10.0) -> None:
        """Waits until every row has exactly one answer."""
        until(lambda: all(self.parts.values()), within_s, "rows have no answer")
        until(lambda: self.runner.active == 0, within_s)
        assert {len(parts) for parts in self.parts.values()} == {1}

    def _call(self, payload: bytes, context: Context) -> bytes:
        with self._lock:
            self.begun[context.request_id] += 1
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            return self._handler(payload, context)
        finally:
            with self._lock:
                self.active -= 1

    def _give_back(self, count: int) -> None:
        with self._lock:
            self.given_back += count


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(handler=lambda payload, context: payload, slots: int = 3) -> Bench:
        made.append(Bench(handler, slots))
        return made[-1]

    yield make
    for bench in made:
        bench.runner.close()


class Gate:
    """A handler that is quick, except for the rows that wait for `open`."""

    def __init__(self, *stuck: bytes) -> None:
        self.stuck = set(stuck)
        self.open = threading.Event()

    def __call__(self, payload: bytes, context: Context) -> bytes:
        if payload in self.stuck:
            self.open.wait(10)
        return payload


def test_each_row_runs_once_and_is_answered_once_with_its_own_result(benches):
    bench = benches()
    for _ in range(20):
        bench.submit(50)
    bench.wait()

    assert set(bench.begun.values()) == {1}
    assert bench.given_back == 1000
    assert all(parts[0].result == b"%d" % (n % 50) for n, parts in bench.parts.items())
    assert (bench.slots.counts(0).completed, bench.slots.counts(0).failed) == (1000, 0)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_slots_are_never_exceeded_by_rows(benches, slots):
    bench = benches(lambda payload, context: time.sleep(0.002) or payload, slots)
    for _ in range(10):
        bench.submit(8)
    bench.wait()

    assert bench.most == slots
    names = [t.name for t in threading.enumerate() if t.name.startswith("handler-h-")]
    assert len(names) <= slots + 1


def test_quick_rows_of_a_segment_leave_in_few_slices(benches):
    bench = benches()
    bench.submit(1)
    bench.wait()
    bench.slots.service_s = 0.00001

    bench.submit(500)
    bench.wait()

    assert len(bench.slices) < 100
    assert sum(count for _, count in bench.slices) == 501


def test_a_slice_holds_only_consecutive_rows(benches):
    chance = random.Random(3)
    bench = benches(lambda payload, context: time.sleep(chance.random() / 500) or payload, 4)
    bench.submit(100)
    bench.wait()

    covered = sorted(row for start, count in bench.slices for row in range(start, start + count))
    assert covered == list(range(100))


def test_a_second_thread_joins_if_a_quick_handler_is_stuck(benches):
    gate = Gate(b"3")
    bench = benches(gate, slots=2)
    bench.submit(1)
    bench.wait()
    bench.slots.service_s = 0.00001

    first_id, _ = bench.submit(10)
    until(lambda: len(bench.answered) >= 7, 2, "the rows behind the stuck one")

    assert not bench.parts[first_id + 3]
    assert bench.most == 2
    gate.open.set()
    bench.wait()


@pytest.mark.parametrize("service_s", [0.0, 0.00001], ids=["unknown pace", "quick so far"])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_result_does_not_wait_for_a_stuck_row_behind_it(benches, slots, service_s):
    gate = Gate(b"1", b"2", b"3")
    bench = benches(gate, slots)
    bench.slots.service_s = service_s

    first_id, _ = bench.submit(4)

    try:
        until(lambda: bench.parts[first_id], 1, "the first row's own answer")
    finally:
        gate.open.set()
    bench.wait()
    assert bench.most <= slots


def test_a_result_leaves_even_if_every_thread_is_running_a_row(benches):
    gate = Gate(*[b"%d" % row for row in range(1, 14)])
    made = [benches(gate, 100) for _ in range(10)]  # the assignment of rows to threads differs
    firsts = [(bench, bench.submit(14)[0]) for bench in made]
    try:
        until(lambda: all(bench.parts[first] for bench, first in firsts))
    finally:
        gate.open.set()
    for bench in made:
        bench.wait()


def test_with_one_slot_the_rows_behind_a_stuck_one_wait(benches):
    gate = Gate(b"1")
    bench = benches(gate, slots=1)
    bench.submit(1)
    bench.wait()
    bench.slots.service_s = 0.00001
    first_id, _ = bench.submit(4)
    until(lambda: bench.begun[first_id + 1])

    time.sleep(0.05)

    assert bench.begun[first_id + 2] == 0
    assert bench.most == 1
    gate.open.set()
    bench.wait()


def test_cancelled_waiting_rows_never_start_and_free_their_slots(benches):
    gate = Gate(b"0")
    bench = benches(gate, slots=1)
    first_id, job = bench.submit(6)
    until(lambda: bench.begun[first_id])

    job.end(Code.CANCELLED, 2, 3)
    job.end(Code.CANCELLED, 2, 3)

    assert bench.given_back == 3
    assert bench.answered == [first_id + row for row in (2, 3, 4)]
    part = bench.parts[first_id + 3][0]
    assert (part.code, part.executed) == (Code.CANCELLED, Executed.NO)
    assert "before the handler 'h' began" in part.reason
    gate.open.set()
    bench.wait()
    assert sorted(bench.begun) == [first_id + row for row in (0, 1, 5)]
    assert bench.given_back == 6


def test_a_cancelled_running_row_is_answered_at_once_and_sees_the_cancellation(benches):
    seen: list[tuple[int, bool]] = []
    go = threading.Event()

    def handler(payload: bytes, context: Context) -> bytes:
        go.wait(10)
        seen.append((context.request_id, context.cancelled))
        return payload

    bench = benches(handler, slots=2)
    first_id, job = bench.submit(2)
    until(lambda: len(bench.begun) == 2)

    job.end(Code.CANCELLED, 1, 1)

    assert bench.answered == [first_id + 1]
    assert bench.parts[first_id + 1][0].executed is Executed.YES
    assert bench.given_back == 0  # its thread is still running
    go.set()
    bench.wait()
    assert sorted(seen) == [(first_id, False), (first_id + 1, True)]
    assert bench.given_back == 2


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
def test_ending_a_job_answers_every_row_with_the_given_code(benches, code):
    gate = Gate(b"0")
    bench = benches(gate, slots=1)
    first_id, job = bench.submit(5)
    until(lambda: bench.begun[first_id])

    job.end(code, 0, 5)

    assert {parts[0].code for parts in bench.parts.values()} == {code}
    gate.open.set()
    until(lambda: bench.given_back == 5)


def test_each_row_is_answered_once_when_threads_run_and_cancel_rows(benches):
    chance = random.Random(7)
    bench = benches(lambda payload, context: time.sleep(0.0005) or payload, 4)
    batches = [bench.submit(20)[1] for _ in range(20)]

    def end(job: HandlerJob, start: int) -> None:
        job.end(Code.CANCELLED, start, 5)

    enders = [threading.Thread(target=end, args=(job, chance.randint(0, 15))) for job in batches]
    for ender in enders:
        ender.start()
    for ender in enders:
        ender.join(10)
    bench.wait()

    until(lambda: bench.given_back == 400)
    never = [parts[0] for n, parts in bench.parts.items() if not bench.begun[n]]
    assert {part.executed for part in never} <= {Executed.NO}
    ran = [parts[0] for n, parts in bench.parts.items() if bench.begun[n]]
    assert Executed.NO not in {part.executed for part in ran}


def test_a_failing_row_does_not_affect_other_rows(benches):
    def handler(payload: bytes, context: Context) -> bytes:
        if payload == b"2":
            raise SystemExit(3)
        return payload

    bench = benches(handler, slots=1)
    first_id, _ = bench.submit(5)
    bench.wait()

    assert [n for n, parts in bench.parts.items() if not parts[0].ok] == [first_id + 2]
    assert (bench.slots.counts(0).completed, bench.slots.counts(0).failed) == (4, 1)


def test_a_failing_result_callback_does_not_end_the_threads(benches):
    bench = benches(slots=1)

    def broken(start: int, answers: Slice) -> None:
        raise RuntimeError("a fault of ours")

    segment = Segment(Route(), Column([b"x"]), time.monotonic() + 9, 999)
    job = HandlerJob(bench.slots, WORKER, segment, 0.0, broken, bench._give_back, bench.runner.end)
    bench.runner.submit(job)
    bench.submit(3)

    bench.wait()


def test_the_threads_of_a_closed_runner_end(benches):
    bench = benches()
    bench.submit(10)
    bench.wait()

    bench.runner.close()
    bench.runner.close()

    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("handler-h-")])


def test_outcomes_with_gaps_are_answered_as_runs():
    slots = HandlerSlots(HandlerSpec("h", "x:y"), 9, {})
    slices: list[tuple[int, list[bytes]]] = []

    def sink(start: int, answers: Slice) -> None:
        slices.append((start, [answers.at(row).parts[0].result for row in range(len(answers))]))

    segment = Segment(Route(), Column([b""] * 9), 1e12, 1)
    job = HandlerJob(slots, WORKER, segment, 0.0, sink, lambda count: None, lambda *what: None)
    outcomes = [(0, b"a"), (1, b"b"), (4, Detail(Code.INTERNAL, "")), (5, b"f"), (8, b"i")]
    job.done(outcomes, 0.1, time.monotonic())

    assert slices == [(0, [b"a", b"b"]), (4, [b"", b"f"]), (8, [b"i"])]


# Deadlines.


@pytest.fixture
def expired() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def deadlines(expired) -> Iterator[Deadlines]:
    made = Deadlines(lambda thing: expired.append((thing, time.monotonic())))
    made.start()
    yield made
    made.stop()


def test_a_watched_item_expires_soon_after_its_deadline_and_never_before(deadlines, expired):
    now, chance = time.monotonic(), random.Random(1)
    due = {f"thing {n}": now + chance.random() * 0.4 for n in range(200)}
    for thing, deadline in due.items():
        deadlines.watch(thing, deadline)
    until(lambda: len(expired) == 200)

    assert len({thing for thing, _ in expired}) == 200
    assert all(0 <= when - due[thing] < 0.2 for thing, when in expired)


def test_a_forgotten_item_never_expires(deadlines, expired):
    soon = time.monotonic() + 0.05
    for thing in ("a", "b", "c"):
        deadlines.watch(thing, soon)
    deadlines.forget("b", soon)
    deadlines.forget("b", soon)
    deadlines.forget("nobody", soon)
    until(lambda: len(expired) == 2)
    time.sleep(0.1)

    assert {thing for thing, _ in expired} == {"a", "c"}
    assert not deadlines._ticks


def test_a_deadline_is_noticed_when_nothing_else_is_watched(deadlines, expired):
    time.sleep(0.1)
    deadlines.watch("late", time.monotonic() + 0.02)
    until(lambda: expired)


def test_an_earlier_deadline_wakes_the_thread_that_sleeps_until_a_later_one(deadlines, expired):
    deadlines.watch("late", time.monotonic() + 60)
    time.sleep(0.05)
    deadlines.watch("early", time.monotonic() + 0.02)
    until(lambda: [thing for thing, _ in expired] == ["early"])


def test_a_deadline_in_ten_thousand_years_is_valid(deadlines, expired):
    deadlines.watch("then", time.monotonic() + 3e11)
    time.sleep(0.05)
    deadlines.watch("now", time.monotonic())
    until(lambda: [thing for thing, _ in expired] == ["now"])


def test_deadlines_forgotten_in_time_do_not_wake_the_thread(deadlines, expired, monkeypatch):
    looks = []
    look = Deadlines._due_locked
    monkeypatch.setattr(Deadlines, "_due_locked", lambda self: looks.append(1) or look(self))
    for n in range(20):
        due = time.monotonic() + 30
        deadlines.watch(n, due)
        time.sleep(0.01)
        deadlines.forget(n, due)

    assert not expired
    assert len(looks) <= 2  # for the first one


def test_an_item_whose_expiry_fails_does_not_stop_the_thread():
    ended: list[str] = []

    def expire(thing: str) -> None:
        if thing == "bad":
            raise RuntimeError("a fault of ours")
        ended.append(thing)

    made = Deadlines(expire)
    made._thread = threading.Thread(target=_quietly, args=(made._run,), daemon=True)
    made.start()
    made.watch("bad", time.monotonic())
    time.sleep(0.1)
    made.watch("good", time.monotonic())
    try:
        until(lambda: ended == ["good"])
    finally:
        made.stop()


def _quietly(run: Callable[[], None]) -> None:
    try:
        run()
    except RuntimeError:
        return


def test_the_deadline_thread_ends():
    made = Deadlines(lambda thing: None)
    made.start()
    made.watch("x", time.monotonic() + 99)

    made.stop()
    made.stop()

    made._thread.join(1)
    assert not made._thread.is_alive()
