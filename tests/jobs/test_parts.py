"""Parts of a job in parts: what is kept of what arrives, and when a worker may send more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.jobs.journal import Journal
from overlay.jobs.parts import CHUNKS_AHEAD, ChunkRoom, PartWriter, ReceivedParts, Step
from overlay.jobs.store import ROW_BYTES, JobStore, StoreLimits
from overlay.model.jobs import JobEnd, JobSpec, JobState, TakenJob, numbers_of
from overlay.model.segments import (
    Caller,
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    PartSlice,
    Slice,
)
from tests.harness.cluster import until

ANN = Caller("10.0.0.1", "ann")
WORKERS = ("C", "D")


def whole(worker: str, result: bytes) -> PartSlice:
    return PartSlice(worker, Column((result,)), ("A", "B", worker))


def chunk(
    worker: str,
    at: int,
    result: bytes,
    more: bool = True,
    grant: Callable[[int], None] = lambda count: None,
) -> PartSlice:
    return whole(worker, result).with_(chunk=Chunk(at, more, grant if more else None))


def lost(worker: str) -> PartSlice:
    return PartSlice.missing(worker, 1, Detail(Code.UNAVAILABLE, "gone", Executed.UNKNOWN))


# What is kept


@pytest.mark.parametrize(
    ("columns", "steps", "sizes"),
    [
        ([whole("C", b"abc")], [Step("C", 0, b"abc")], {"C": 3}),
        ([whole("C", b"")], [Step("C", 0, b"")], {"C": 0}),
        (
            [chunk("C", 0, b"ab"), chunk("C", 2, b"c", more=False)],
            [Step("C", 0, b"ab"), Step("C", 2, b"c")],
            {"C": 3},
        ),
        (  # from its start again, and then to its end
            [chunk("C", 0, b"ab"), chunk("C", 0, b"ab"), chunk("C", 2, b"c", more=False)],
            [Step("C", 0, b"ab"), Step("C", 0, b"ab"), Step("C", 2, b"c")],
            {"C": 3},
        ),
        ([whole("C", b"1"), whole("C", b"22")], [Step("C", 0, b"1"), None], {"C": 1}),
        ([whole("C", b"1"), lost("C")], [Step("C", 0, b"1"), None], {"C": 1}),
        ([chunk("C", 0, b"ab"), lost("C")], [Step("C", 0, b"ab"), Step("C", 0, None)], {}),
        (  # a gap
            [chunk("C", 0, b"ab"), chunk("C", 3, b"d"), chunk("C", 4, b"e", more=False)],
            [Step("C", 0, b"ab"), Step("C", 0, None), Step("C", 0, None)],
            {},
        ),
        (
            [lost("C"), whole("C", b"after all")],
            [Step("C", 0, None), Step("C", 0, b"after all")],
            {"C": 9},
        ),
        (
            [chunk("C", 0, b"ab"), whole("D", b"1"), chunk("C", 2, b"c", more=False)],
            [Step("C", 0, b"ab"), Step("D", 0, b"1"), Step("C", 2, b"c")],
            {"C": 3, "D": 1},
        ),
    ],
)
def test_the_first_whole_part_of_a_worker_is_kept(
    columns: list[PartSlice], steps: list[Step | None], sizes: dict[str, int]
) -> None:
    received = ReceivedParts()
    assert [received.take(column) for column in columns] == steps
    found = received.parts
    assert {worker: part.size for worker, part in found.items() if part.ok} == sizes
    assert not any(part.result for part in found.values())


def test_a_part_that_broke_off_says_where() -> None:
    received = ReceivedParts()
    received.take(chunk("C", 0, b"ab"))
    received.take(chunk("C", 7, b"x", more=False))
    part = received.parts["C"]
    assert (part.code, part.reason) == (Code.DATA_LOSS, "its answer broke off after 2 bytes")


def test_a_part_that_neither_ended_nor_failed_is_dropped_at_the_end() -> None:
    received = ReceivedParts()
    received.take(whole("C", b"1"))
    received.take(chunk("D", 0, b"begun"))
    received.take(chunk("E", 0, b"begun"))
    received.take(lost("E"))
    assert received.drop_unfinished() == [Step("D", 0, None)]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(WORKERS),
        st.integers(0, 6),
        st.binary(max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    max_size=25,
)


@given(STEPS)
def test_whatever_arrives_what_is_kept_is_what_the_parts_say(
    steps: list[tuple[str, int, bytes, bool, bool]],
) -> None:
    received = ReceivedParts()
    kept: dict[str, bytes] = {}
    for worker, at, result, more, fails in steps:
        step = received.take(lost(worker) if fails else chunk(worker, at, result, more))
        if step is None:
            continue
        if step.chunk is None:
            kept.pop(worker, None)
        else:
            assert step.at == (len(kept.get(worker, b"")) if step.at else 0), "no gaps"
            kept[worker] = (kept[worker] if step.at else b"") + step.chunk
    for unfinished in received.drop_unfinished():
        del kept[unfinished.worker]
    assert {w: part.size for w, part in received.parts.items() if part.ok} == {
        worker: len(result) for worker, result in kept.items()
    }


# The journal


class Runner:
    """Takes what waits."""

    def __init__(self) -> None:
        self.taken: list[TakenJob] = []

    def wants(self, store: JobStore) -> bool:
        return bool(store.waiting)

    def take(self, store: JobStore, now: float) -> list[TakenJob]:
        return [job for kind in list(store.waiting) for job in store.take(kind, 9, 10**9, now)]

    def committed(self, taken: list[TakenJob], over: list[int]) -> None:
        self.taken += taken

    def running(self) -> list[int]:
        return [job.number for job in self.taken]

    def deposed(self) -> None:
        pass


class Bench:
    """A journal with one job that runs. grants: of chunks, by worker."""

    def __init__(self, path: Path, limits: StoreLimits) -> None:
        self.store = JobStore(path, limits)
        self.journal = Journal(self.store, Runner(), reserve_bytes=0)
        self.journal.start()
        spec = JobSpec(b"r", b"payload")
        (id_,) = self.journal.do(lambda store, now: store.accept(ANN, [spec], now)).result(10)
        self.number, _ = numbers_of(id_)
        until(lambda: self.ask(lambda store: store.state(self.number)) is JobState.RUNNING)
        self.room = ChunkRoom()
        self.problem = ""
        self.gave_up = 0
        self.grants: dict[str, int] = {}
        self.writer = PartWriter(
            self.number, self.journal.record, lambda: self.problem, self.room, self._give_up
        )

    def _give_up(self) -> None:
        self.gave_up += 1

    def ask(self, question: Callable[[JobStore], Any]) -> Any:
        return self.journal.ask(lambda store, now: question(store)).result(10)

    def send(self, worker: str, at: int, result: bytes, more: bool = True) -> None:
        def grant(count: int) -> None:
            self.grants[worker] = self.grants.get(worker, 0) + count

        self.writer.take(0, Slice(1, (chunk(worker, at, result, more, grant),)))

    def end(self, state: JobState = JobState.DONE) -> None:
        end = JobEnd(state, answer=b"answer")
        ended: Future[Any] = self.journal.record(
            lambda store, now: store.end(self.number, end, now)
        )
        ended.result(10)

    def part(self, worker: str, at: int = 0, most: int = 10**9) -> bytes:
        found: bytes = self.ask(lambda store: store.part(self.number, worker, at, most))
        return found

    @property
    def size(self) -> int:
        return self.store.counts.size - ROW_BYTES


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "j.db", StoreLimits(max_bytes=100_000))
    yield made
    made.journal.close()


def test_chunks_are_read_back_from_wherever_one_has_got_to(bench: Bench) -> None:
    for at in range(0, 50, 10):
        bench.send("C", at, b"%010d" % at, more=at < 40)
    bench.send("D", 0, b"of another", more=False)
    bench.end()
    kept = b"".join(b"%010d" % at for at in range(0, 50, 10))
    assert bench.part("C") == kept
    assert [bench.part("C", at, 13) for at in (0, 7, 10, 45, 50)] == [
        kept[0:13], kept[7:20], kept[10:23], kept[45:], b"",
    ]  # fmt: skip
    assert bench.part("D") == b"of another"
    assert bench.part("E") == b""
    assert bench.size == len(kept) + len(b"of another") + len(b"answer")


def test_a_worker_may_send_more_only_when_its_chunks_are_on_the_disk(bench: Bench) -> None:
    gate = threading.Event()
    bench.journal.ask(lambda store, now: gate.wait(10))
    for at in range(5):
        bench.send("C", at, b"x")
    assert bench.grants == {"C": CHUNKS_AHEAD}, "those that it may send at first"
    gate.set()
    until(lambda: bench.grants == {"C": CHUNKS_AHEAD + 5})


def test_a_part_that_comes_again_does_not_wait_for_ever(bench: Bench) -> None:
    bench.send("C", 0, b"all of it", more=False)
    bench.send("C", 0, b"all", more=True)
    until(lambda: bench.grants == {"C": CHUNKS_AHEAD + 1})
    bench.end()
    assert bench.part("C") == b"all of it"


@pytest.mark.parametrize("state", [JobState.WAITING, JobState.FAILED, JobState.QUARANTINED])
def test_of_an_attempt_without_an_answer_no_part_is_kept(bench: Bench, state: JobState) -> None:
    bench.send("C", 0, b"some of it")
    bench.end(state)
    assert bench.part("C") == b""
    assert bench.size == len(b"payload")


def test_a_job_that_is_forgotten_leaves_no_chunk(bench: Bench) -> None:
    bench.send("C", 0, b"result", more=False)
    bench.end()
    bench.journal.do(lambda store, now: store.drop([bench.number])).result(10)
    rows = bench.ask(lambda store: store._db.execute("select count(*) from chunk").fetchone()[0])
    assert (rows, bench.store.counts.size) == (0, 0)


def test_a_part_for_which_the_journal_has_no_room_ends_the_attempt_once(bench: Bench) -> None:
    bench.send("C", 0, b"x" * 60_000)
    bench.send("C", 60_000, b"x" * 60_000)
    bench.send("C", 120_000, b"x", more=False)
    until(lambda: bench.writer.refusal is not None)
    bench.ask(lambda store: None)
    assert bench.gave_up == 1
    assert "the part of C could not be kept" in str(bench.writer.refusal)
    assert "max_journal_mib" in str(bench.writer.refusal)
    assert bench.writer.refusal is not None
    assert bench.writer.refusal.executed is Executed.UNKNOWN


def test_while_the_journal_accepts_nothing_it_keeps_no_parts_either(bench: Bench) -> None:
    bench.problem = "the leader's disk has only 3 MiB left"
    bench.send("C", 0, b"x", more=False)
    until(lambda: bench.writer.refusal is not None)
    assert "only 3 MiB left" in str(bench.writer.refusal)


def test_what_comes_with_the_answer_is_kept_with_what_came_before(bench: Bench) -> None:
    bench.send("C", 0, b"before, ")
    bench.send("D", 0, b"never ends")
    found = bench.writer.finish(Slice(1, (chunk("C", 8, b"with it", more=False), lost("F"))))
    bench.end()
    assert (found["C"].size, found["F"].reason) == (15, "gone")
    assert "D" not in found
    assert (bench.part("C"), bench.part("D")) == (b"before, with it", b"")


def test_after_the_end_of_an_attempt_nothing_is_kept_or_granted(bench: Bench) -> None:
    bench.writer.close()
    bench.send("C", 0, b"too late")
    bench.end()
    assert bench.part("C") == b""
    for _ in range(1000):  # and no room is lost to those that were too late
        bench.send("C", 0, b"too late")
    another = PartWriter(1, bench.journal.record, lambda: "", bench.room, lambda: None)
    granted: list[int] = []
    another.take(0, Slice(1, (chunk("C", 0, b"x", grant=granted.append),)))
    assert granted[:1] == [CHUNKS_AHEAD]


def test_a_failed_commit_loses_no_chunk_of_a_job_that_ends_in_it(bench: Bench) -> None:
    """What is written again after a failure includes the chunks that came before the end."""
    gate, failures = threading.Event(), iter([True])

    def fail_once(store: JobStore, now: float) -> None:
        if next(failures, False):
            bench.writer.close()  # as the runner does, when it writes the end
            store._db.execute("select no_such_column from job")

    bench.journal.ask(lambda store, now: gate.wait(10))
    bench.send("C", 0, b"kept", more=False)
    ended = bench.journal.record(
        lambda store, now: store.end(bench.number, JobEnd(JobState.DONE, answer=b"a"), now)
    )
    bench.journal.record(fail_once)
    gate.set()
    ended.result(10)
    assert bench.part("C") == b"kept"
