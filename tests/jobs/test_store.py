"""The jobs in their file: every change, by example and by random histories with crashes."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.jobs.log import Log
from overlay.jobs.memory_log import MemoryLog, Shared
from overlay.jobs.store import MAX_POSITION, ROW_BYTES, STORY_EVENTS, JobStore, StoreLimits
from overlay.model.errors import BadRequest, ConfigError, JournalFull
from overlay.model.jobs import ENDED, JobEnd, JobSpec, JobState, numbers_of
from overlay.model.segments import Caller, Code
from tests.harness.leaders import Leader
from tests.harness.nats_servers import log_on

ANN, BOB = Caller("10.0.0.1", "ann"), Caller("10.0.0.2", "bob")
NOW = 1_000_000.0


def spec(payload: bytes = b"x", **fields: Any) -> JobSpec:
    return JobSpec(b"request", payload, **fields)


class Stored:
    """A store whose every call is a transaction of its own."""

    def __init__(
        self, path: str | Path, limits: StoreLimits | None = None, store: JobStore | None = None
    ) -> None:
        self.path, self.limits = path, limits
        self.store = store or JobStore(path, limits)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if not callable(found) or name in ("close", "counts"):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self.store.begin()
            try:
                result = found(*arguments, **named)
            except BaseException:
                self.store.rollback()
                raise
            self.store.commit()
            return result

        return call

    def accept_one(self, caller: Caller = ANN, now: float = NOW, **fields: Any) -> int:
        (id_,) = self.accept(caller, [spec(**fields)], now)
        return numbers_of(id_)[0]

    def take_all(self, now: float = NOW) -> list[Any]:
        return [job for kind in list(self.waiting) for job in self.take(kind, 10**6, 10**9, now)]

    def counted(self) -> dict[str, int]:
        counts = self.counts
        return {s.name.lower(): n for s, n in zip(JobState, counts.states, strict=True) if n}

    def reopened(self) -> Stored:
        self.store.close()
        return Stored(self.path, self.limits)


@pytest.fixture(params=["memory", "file", "log", "jetstream"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    """log, jetstream: the file is one leader's copy of the jobs of several; another's must get
    equal."""
    if request.param in ("memory", "file"):
        made = Stored(":memory:" if request.param == "memory" else tmp_path / "journal.db")
        yield made
        made.close()
        return
    shared = Shared()
    name = re.sub(r"\W", "_", request.node.name)

    def log() -> Log:
        if request.param == "log":
            return MemoryLog(shared, max_bytes=600)  # so that large changes go in several entries
        return log_on(request.getfixturevalue("servers"), name)

    leader = Leader(log(), tmp_path / "a.db").takes_over()
    yield Stored(tmp_path / "a.db", store=leader.store)
    another = Leader(log(), tmp_path / "b.db", "B").follows()
    assert another.rows == leader.rows
    another.close()
    leader.close()


def done(answer: bytes = b"answer") -> JobEnd:
    return JobEnd(JobState.DONE, answer=answer)


def test_a_job_waits_runs_and_is_done(stored: Stored) -> None:
    number = stored.accept_one(payload=b"p", priority=3, limit_s=60.0)
    assert stored.counted() == {"waiting": 1}

    (taken,) = stored.take_all(NOW + 1)
    assert (taken.number, taken.caller, taken.request, taken.payload) == (
        number,
        ANN,
        b"request",
        b"p",
    )
    assert (taken.limit_s, taken.attempts, taken.max_attempts, taken.priority) == (60.0, 1, 1, 3)
    assert stored.counted() == {"running": 1}
    assert not stored.waiting

    assert stored.end(number, done(), NOW + 2)
    record = stored.record(number, with_answer=True)
    assert (record.state, record.answer) == (JobState.DONE, b"answer")
    assert (record.accepted, record.started, record.ended) == (NOW, NOW + 1, NOW + 2)
    assert stored.take_over() == [number]
    assert not stored.end(number, done(b"another"), NOW + 3), "an answer is kept once"
    assert stored.record(number, with_answer=True).answer == b"answer"


def test_jobs_of_one_kind_are_taken_by_priority_and_then_in_order(stored: Stored) -> None:
    for payload, priority in ((b"a", 0), (b"b", 5), (b"c", 0), (b"d", 9), (b"e", 5)):
        stored.accept_one(payload=payload, priority=priority)
    assert [job.payload for job in stored.take_all()] == [b"d", b"b", b"e", b"a", b"c"]


def test_no_more_are_taken_than_their_payloads_allow_but_always_one(stored: Stored) -> None:
    for _ in range(5):
        stored.accept_one(payload=b"x" * 1000)
    (kind,) = stored.waiting
    assert len(stored.take(kind, 10, 2500, NOW)) == 2
    assert len(stored.take(kind, 10, 0, NOW)) == 1
    assert len(stored.take(kind, 1, 10**6, NOW)) == 1
    assert stored.waiting == {kind: 1}


def test_callers_and_what_they_ask_are_kinds_of_their_own(stored: Stored) -> None:
    for caller, request in ((ANN, b"r1"), (ANN, b"r2"), (BOB, b"r1"), (ANN, b"r1")):
        stored.accept(caller, [JobSpec(request, b"")], NOW)
    assert sorted(stored.waiting.values()) == [1, 1, 2]


def test_a_key_names_one_job_of_its_caller_while_the_job_is_kept(stored: Stored) -> None:
    number = stored.accept_one(key="k", max_attempts=3)
    assert stored.accept_one(key="k", max_attempts=3) == number
    with pytest.raises(BadRequest, match="'k' was used for another job"):
        stored.accept_one(key="k", payload=b"other")
    with pytest.raises(BadRequest):  # the same payload, asked of another handler
        stored.accept(ANN, [JobSpec(b"other request", b"x", key="k")], NOW)
    assert stored.accept_one(caller=BOB, key="k") != number
    stored.take_all()
    stored.end(number, done(), NOW)
    assert stored.accept_one(key="k") == number, "also when it is done"
    stored.drop([number])
    assert stored.accept_one(key="k") != number


def test_of_jobs_submitted_together_all_are_accepted_or_none(stored: Stored) -> None:
    stored.accept_one(key="used")
    before = stored.counts
    with pytest.raises(BadRequest):
        stored.accept(ANN, [spec(b"1"), spec(b"2"), spec(b"another", key="used")], NOW)
    assert stored.counts == before
    assert len(stored.take_all()) == 1


def test_an_error_undoes_its_own_change_and_no_other_of_the_transaction(stored: Stored) -> None:
    store = stored.store
    store.begin()
    store.accept(ANN, [spec(key="k")], NOW)
    with pytest.raises(BadRequest):
        store.accept(ANN, [spec(), spec(b"other", key="k")], NOW)
    store.accept(ANN, [spec()], NOW)
    store.commit()
    assert stored.counted() == {"waiting": 2}
    assert sum(stored.waiting.values()) == len(stored.take_all()) == 2


def test_a_transaction_that_is_rolled_back_leaves_nothing(stored: Stored) -> None:
    stored.accept_one()
    before, waiting = stored.counts, dict(stored.waiting)
    store = stored.store
    store.begin()
    store.accept(BOB, [JobSpec(b"new", b"p")], NOW)
    (kind,) = waiting
    store.take(kind, 1, 1000, NOW)
    store.rollback()
    assert (stored.counts, dict(stored.waiting)) == (before, waiting)
    assert store.take_over() == []
    stored.accept(BOB, [JobSpec(b"newer", b"p")], NOW)  # gets the kind's id that BOB's had
    assert {job.request for job in stored.take_all()} == {b"request", b"newer"}


def test_the_bounds_refuse_and_say_which(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "j.db", StoreLimits(max_jobs=2, max_bytes=2000))
    stored.accept_one(payload=b"x" * 500)
    with pytest.raises(JournalFull, match="max_journal_mib"):
        stored.accept_one(payload=b"x" * 1000)
    second = stored.accept_one()
    with pytest.raises(JournalFull, match="max_jobs"):
        stored.accept_one()
    stored.cancel([second], NOW)
    with pytest.raises(JournalFull):
        stored.accept_one()  # that it has ended makes no room
    stored.drop([second])
    stored.accept_one()
    stored.close()


def test_parts_are_kept_with_the_answer_and_go_with_the_job(stored: Stored) -> None:
    number, other = stored.accept_one(payload=b"p"), stored.accept_one()
    stored.take_all()
    for worker, at, chunk in [("C", 0, b"old"), ("C", 0, b"new"), ("C", 3, b"er"), ("D", 0, b"d")]:
        stored.keep_chunk(number, worker, at, chunk)
    stored.keep_chunk(other, "C", 0, b"of an attempt that comes to nothing")
    stored.drop_part(number, "D")
    stored.end(number, done(), NOW)
    stored.end(other, JobEnd(JobState.QUARANTINED), NOW)
    assert [stored.part(number, worker, 0, 100) for worker in "CD"] == [b"newer", b""]
    assert stored.part(number, "C", 2, 2) == b"we"
    assert stored.part(other, "C", 0, 100) == b""
    assert stored.counts.size == 2 * ROW_BYTES + len(b"newer") + len(b"answer") + len(b"x")
    stored.keep_chunk(number, "C", 5, b"after the end")
    assert stored.part(number, "C", 0, 100) == b"newer"
    stored.drop([number])
    assert stored.part(number, "C", 0, 100) == b""
    assert stored.counts.size == ROW_BYTES + len(b"x")


def test_of_a_part_that_has_lost_a_chunk_what_follows_is_not_read(stored: Stored) -> None:
    number = stored.accept_one()
    stored.take_all()
    for at, chunk in [(0, b"abc"), (6, b"ghi")]:  # without "def"
        stored.keep_chunk(number, "C", at, chunk)
    assert [stored.part(number, "C", at, 100) for at in (0, 1, 3, 4, 6, 9, 10)] == [
        b"abc", b"bc", b"", b"", b"ghi", b"", b"",
    ]  # fmt: skip


def test_fetched_answers_make_room_and_others_do_not(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "j.db", StoreLimits(max_jobs=2))
    first, second = stored.accept_one(), stored.accept_one()
    stored.take_all()
    for number in (first, second):
        stored.end(number, done(), NOW)
    with pytest.raises(JournalFull):
        stored.accept_one()
    assert stored.record(first).state is JobState.DONE  # looked at, without its answer
    with pytest.raises(JournalFull):
        stored.accept_one()
    stored.was_fetched(first)
    stored.accept_one()
    assert stored.record(first) is None
    assert stored.record(second).state is JobState.DONE
    stored.close()


def test_what_has_ended_is_forgotten_after_its_time_and_what_is_quarantined_is_not(
    tmp_path: Path,
) -> None:
    stored = Stored(tmp_path / "j.db", StoreLimits(keep_s=100.0))
    ends = {
        state: stored.accept_one() for state in (*ENDED, JobState.QUARANTINED) if state.value != 6
    }
    stored.take_all()
    for state, number in ends.items():
        stored.end(number, JobEnd(state, answer=b"a"), NOW)
    waiting = stored.accept_one()
    assert stored.forget_old(NOW + 99) == 0
    assert stored.forget_old(NOW + 100) == 3
    assert stored.counted() == {"waiting": 1, "quarantined": 1}
    assert stored.record(waiting)
    stored.drop([ends[JobState.QUARANTINED]])
    stored.cancel([waiting], NOW)
    stored.drop([waiting])
    assert stored.counts.size == 0
    stored.forget_kinds()
    assert stored.store._db.execute("select count(*) from kind").fetchone() == (0,)
    stored.close()


def test_a_job_waits_for_its_time(stored: Stored) -> None:
    number = stored.accept_one(due=NOW + 10)
    assert stored.counted() == {"waiting": 1}
    assert not stored.waiting
    assert stored.next_wake == NOW + 10
    stored.wake(NOW + 9.9)
    assert not stored.waiting
    stored.wake(NOW + 10)
    assert [job.number for job in stored.take_all()] == [number]
    assert stored.next_wake == math.inf


def test_a_job_that_is_not_started_in_time_expires(stored: Stored) -> None:
    late, running = (
        stored.accept_one(expires=NOW + 5),
        stored.accept_one(expires=NOW + 5, priority=9),
    )
    (kind,) = stored.waiting
    stored.take(kind, 1, 1000, NOW)
    stored.wake(NOW + 5)
    assert stored.take_over() == [late]
    assert stored.record(late).state is JobState.EXPIRED
    assert stored.record(running).state is JobState.RUNNING
    assert not stored.waiting


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.QUARANTINED])
def test_released_jobs_wait_again_with_new_attempts(stored: Stored, state: JobState) -> None:
    number = stored.accept_one(max_attempts=2, key="k")
    stored.take_all()
    stored.end(number, JobEnd(state, Code.UNAVAILABLE, "gone"), NOW)
    changed = stored.release([number], NOW + 1)
    assert changed.changed == 1
    (taken,) = stored.take_all()
    assert (taken.attempts, taken.payload) == (1, b"x")
    assert [what for _, what in stored.record(number).story] == ["attempt 1: gone", "released"]


def test_changes_say_whose_state_does_not_allow_them(stored: Stored) -> None:
    running, ended, cancelled = (stored.accept_one() for _ in range(3))
    stored.take_all()
    stored.end(ended, done(), NOW)
    waiting = stored.accept_one()
    assert stored.cancel([cancelled, ended, waiting], NOW).running == (cancelled,)
    id_of = {number: stored.record(number).id for number in (running, ended, waiting)}
    assert stored.cancel([ended], NOW).unchanged == (id_of[ended],)
    assert stored.release([running, ended], NOW).unchanged == (id_of[running], id_of[ended])
    assert stored.drop([running]).unchanged == (id_of[running],)
    schedule = stored.accept_one(every_s=60.0)
    assert stored.drop([schedule]).unchanged == (stored.record(schedule).id,)
    assert stored.drop([ended, waiting, cancelled]).changed == 3
    assert stored.counted() == {"running": 1}


def test_an_attempt_that_did_not_count_is_not_counted(stored: Stored) -> None:
    number = stored.accept_one(max_attempts=1)
    for refusals in range(3):
        (taken,) = stored.take_all()
        assert taken.attempts == 1
        assert stored.refusals_of(number) == refusals
        again = JobEnd(JobState.WAITING, Code.UNAVAILABLE, "no worker", due=NOW, counts=False)
        stored.end(number, again, NOW)
    assert stored.record(number).attempts == 0


def test_a_story_keeps_its_first_and_its_last_events(stored: Stored) -> None:
    number = stored.accept_one(max_attempts=100, key="k")
    for n in range(40):
        stored.take_all()
        stored.end(number, JobEnd(JobState.WAITING, Code.UNAVAILABLE, f"no {n}"), NOW + n)
    story = [what for _, what in stored.record(number).story]
    assert len(story) == STORY_EVENTS
    assert (story[0], story[-1]) == ("attempt 1: no 0", "attempt 40: no 39")


def test_a_position_counts_those_of_its_kind_that_go_first(stored: Stored) -> None:
    first = stored.accept_one()
    stored.accept_one(caller=BOB)
    second, urgent = stored.accept_one(), stored.accept_one(priority=1)
    assert [stored.position(n) for n in (urgent, first, second)] == [
        (1, False),
        (2, False),
        (3, False),
    ]
    stored.take_all()
    assert stored.position(first) == (0, False)


def test_a_long_position_is_only_more(stored: Stored) -> None:
    stored.accept(ANN, [spec()] * (MAX_POSITION + 5), NOW)
    last = stored.accept_one()
    assert stored.position(last) == (MAX_POSITION, True)


def test_lists_are_filtered_newest_first_and_go_on_from_a_job(stored: Stored) -> None:
    numbers = [stored.accept_one(handler="h") for _ in range(5)]
    other = stored.accept_one(caller=BOB)
    stored.cancel([numbers[1]], NOW)

    def found(*arguments: Any, **named: Any) -> list[int]:
        return [numbers_of(record.id)[0] for record in stored.listed(*arguments, **named)]

    assert found(None) == [other, *reversed(numbers)]
    assert found(ANN.address) == numbers[::-1]
    assert found(None, (JobState.CANCELLED,)) == [numbers[1]]
    assert found(BOB.address, (JobState.CANCELLED,)) == []
    assert found(None, limit=2) == [other, numbers[4]]
    assert found(None, before=numbers[2]) == [numbers[1], numbers[0]]
    assert stored.counts_of(BOB.address).states == (1, 0, 0, 0, 0, 0, 0)


def test_only_its_caller_finds_a_job(stored: Stored) -> None:
    number = stored.accept_one()
    id_ = stored.record(number).id
    assert stored.find(id_, ANN.address) == stored.find(id_, None) == number
    assert stored.find(id_, BOB.address) is None
    assert stored.find(f"{number:010x}{(numbers_of(id_)[1] + 1) % 2**24:06x}", None) is None


@pytest.mark.parametrize("text", ["", "1", "x" * 16, "0" * 17, "0" * 15 + "A", "\u0660" * 16])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="not the id of a job"):
        numbers_of(text)


# Schedules


def test_a_schedule_makes_a_job_each_time_it_is_due(stored: Stored) -> None:
    number = stored.accept_one(every_s=60.0, due=NOW + 30, payload=b"tick", key="t", max_attempts=3)
    payloads = []
    for at in (NOW, NOW + 30, NOW + 89, NOW + 90, NOW + 150):
        stored.wake(at)
        for job in stored.take_all():
            payloads.append((at, job.payload, job.max_attempts))
            stored.end(job.number, done(), at)
    assert payloads == [(at, b"tick", 3) for at in (NOW + 30, NOW + 90, NOW + 150)]
    record = stored.record(number)
    assert (record.every_s, record.due, record.missed) == (60.0, NOW + 210, 0)
    assert [r.schedule for r in stored.listed(None, (JobState.DONE,))] == [record.id] * 3


def test_missed_runs_are_counted_and_made_up_for_once(stored: Stored) -> None:
    number = stored.accept_one(every_s=60.0, due=NOW + 60)
    stored.wake(NOW + 60 + 5 * 60 + 1)  # the leader was not running for five minutes
    assert len(stored.take_all()) == 1
    assert (stored.record(number).missed, stored.record(number).due) == (5, NOW + 420)
    stored.wake(NOW + 420)  # the last one is still running
    assert stored.take_all() == []
    assert stored.record(number).missed == 6


def test_a_cancelled_schedule_makes_no_more(stored: Stored) -> None:
    number = stored.accept_one(every_s=60.0)
    assert stored.counts.schedules == 1
    assert stored.cancel([number], NOW).changed == 1
    stored.wake(NOW + 1000)
    assert stored.take_all() == []
    assert (stored.counts.schedules, stored.counts.size) == (0, 0)


# The file


def test_everything_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "j.db")
    finished = stored.accept_one(payload=b"first")
    stored.take_all()
    stored.end(finished, done(), NOW)
    waiting, later = stored.accept_one(), stored.accept_one(due=NOW + 5)
    schedule = stored.accept_one(every_s=60.0, due=NOW + 60)
    counts = stored.counts

    stored = stored.reopened()
    assert stored.counts == counts
    assert stored.record(finished, with_answer=True).answer == b"answer"
    assert stored.record(schedule).every_s == 60.0
    assert [job.number for job in stored.take_all()] == [waiting]
    stored.wake(NOW + 5)
    assert [job.number for job in stored.take_all()] == [later]
    stored.close()


def test_what_was_running_waits_again_if_it_may_and_is_quarantined_if_not(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "j.db")
    once = stored.accept_one()
    thrice = stored.accept_one(key="k", max_attempts=3)
    for attempt in range(1, 4):
        taken = {job.number: job.attempts for job in stored.take_all(NOW + attempt)}
        assert taken[thrice] == attempt
        stored = stored.reopened()
        assert stored.record(once).state is JobState.QUARANTINED
        assert stored.record(once).attempts == 1
    assert stored.record(thrice).state is JobState.QUARANTINED
    assert "the leader ended while it ran" in stored.record(once).reason
    stored.close()


@pytest.mark.parametrize("after", [JobState.WAITING, JobState.DONE, None])
def test_a_running_job_whose_cancel_was_told_is_cancelled_whatever_comes_of_its_attempt(
    tmp_path: Path, after: JobState | None
) -> None:
    """None: the leader is killed."""
    stored = Stored(tmp_path / "j.db")
    number = stored.accept_one(key="k", max_attempts=3)
    stored.take_all()
    told = stored.cancel([number], NOW + 1)
    assert (told.changed, told.running) == (1, (number,))

    if after is not None:
        assert not stored.end(number, JobEnd(after, counts=False), NOW + 2)
    stored = stored.reopened()
    record = stored.record(number)
    assert (record.state, record.code) == (JobState.CANCELLED, Code.CANCELLED)
    assert record.reason == "cancelled while it ran"
    stored.close()


def test_a_second_process_cannot_open_it(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "j.db")
    stored.accept_one()
    code = (
        "import sys; from overlay.jobs import journal_file, store\n"
        "journal_file.LOCK_S = 0.3\n"
        "try: store.JobStore(sys.argv[1])\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "j.db")],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert found.startswith("ConfigError journal: ")
    assert "another process has it open: is the leader already running?" in found
    assert stored.accept_one()
    stored.close()


def test_a_leader_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    ending = Stored(tmp_path / "j.db")
    timer = threading.Timer(0.5, ending.close)
    timer.start()
    Stored(tmp_path / "j.db").close()
    timer.join()


def _with_text(path: Path) -> None:
    path.write_text("dear diary")


def _with_bytes(path: Path) -> None:
    path.write_bytes(os.urandom(100_000))


def _with_another_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("create table diary(text)")


def _with_a_newer_format(path: Path) -> None:
    Stored(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("pragma user_version = 99")


def _with_a_torn_page(path: Path) -> None:
    stored = Stored(path)
    stored.accept(ANN, [spec(b"x" * 2000, key=f"k{n}") for n in range(200)], NOW)
    stored.close()
    with open(path, "r+b") as file:
        for page in range(1, 40):  # but the first, which says what the file is
            file.seek(4096 * page)
            file.write(os.urandom(4096))


def _as_a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_with_text, "it is not a journal, or is damaged"),
        (_with_bytes, "it is not a journal, or is damaged"),
        (_with_another_database, "is another program's file"),
        (_with_a_newer_format, "is of format 99, and this release reads 1"),
        (_with_a_torn_page, "it is damaged"),
        (_as_a_folder, "unable to open database file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None], told: str
) -> None:
    path = tmp_path / "j.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ConfigError, match=told) as caught:
        JobStore(path)
    assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Its folder must exist"):
        JobStore(tmp_path / "nowhere" / "j.db")


class History(RuleBasedStateMachine):
    """Random changes, and crashes between them, compared with a plain model of what a caller was
    told: no accepted job is lost, none runs without proof more often than it may, each has at most
    one answer."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.stored = Stored(self.folder / "j.db")
        self.now = NOW
        self.model: dict[int, tuple[JobState, int, int]] = {}  # state, attempts, max_attempts
        self.payloads: dict[int, bytes] = {}
        self.parts: dict[int, dict[str, bytes]] = {}  # of running jobs, and of those that are done

    def teardown(self) -> None:
        self.stored.close()
        shutil.rmtree(self.folder)

    @rule(
        payload=st.binary(max_size=20), attempts=st.integers(1, 3), kind=st.sampled_from([ANN, BOB])
    )
    def accept(self, payload: bytes, attempts: int, kind: Caller) -> None:
        number = self.stored.accept_one(kind, self.now, payload=payload, max_attempts=attempts)
        assert number not in self.model
        self.model[number] = JobState.WAITING, 0, attempts
        self.payloads[number] = payload

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        for kind in list(self.stored.waiting):
            for job in self.stored.take(kind, count, 10**6, self.now):
                state, attempts, max_attempts = self.model[job.number]
                assert state is JobState.WAITING
                assert (job.attempts, job.payload) == (attempts + 1, self.payloads[job.number])
                assert job.attempts <= max_attempts
                self.model[job.number] = JobState.RUNNING, attempts + 1, max_attempts

    @precondition(lambda self: self._in(JobState.RUNNING))
    @rule(data=st.data(), state=st.sampled_from([JobState.DONE, JobState.FAILED, JobState.WAITING]))
    def end(self, data: st.DataObject, state: JobState) -> None:
        number = data.draw(st.sampled_from(self._in(JobState.RUNNING)))
        _, attempts, max_attempts = self.model[number]
        counts = not (state is JobState.WAITING and attempts == max_attempts)
        end = JobEnd(state, answer=self.payloads[number] or None, counts=counts)
        assert self.stored.end(number, end, self.now)
        self.model[number] = state, attempts - (not counts), max_attempts

    @precondition(lambda self: self._in(JobState.RUNNING))
    @rule(
        data=st.data(),
        worker=st.sampled_from("CD"),
        chunk=st.binary(max_size=9),
        again=st.booleans(),
    )
    def keep_chunk(self, data: st.DataObject, worker: str, chunk: bytes, again: bool) -> None:
        number = data.draw(st.sampled_from(self._in(JobState.RUNNING)))
        kept = b"" if again else self.parts.get(number, {}).get(worker, b"")
        self.stored.keep_chunk(number, worker, len(kept), chunk)
        self.parts.setdefault(number, {})[worker] = kept + chunk

    @precondition(lambda self: self._in(JobState.WAITING, JobState.RUNNING))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self._in(JobState.WAITING, JobState.RUNNING)))
        self.stored.cancel([number], self.now)
        self.model[number] = JobState.CANCELLED, *self.model[number][1:]

    @precondition(lambda self: self._in(JobState.FAILED, JobState.QUARANTINED))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self._in(JobState.FAILED, JobState.QUARANTINED)))
        self.stored.release([number], self.now)
        self.model[number] = JobState.WAITING, 0, self.model[number][2]

    @rule(in_order=st.booleans())
    def crash(self, in_order: bool) -> None:
        if in_order:
            self.stored.store.close()
        else:  # its transaction is lost, as with kill -9
            self.stored.store.begin()
            self.stored.store.accept(ANN, [spec()], self.now)
            self.stored.store._db.close()
        self.stored = Stored(self.folder / "j.db")
        for number, (state, attempts, max_attempts) in self.model.items():
            if state is JobState.RUNNING:
                again = attempts < max_attempts
                after = JobState.WAITING if again else JobState.QUARANTINED
                self.model[number] = after, attempts, max_attempts

    @invariant()
    def all_are_there(self) -> None:
        found = {
            number: (record.state, record.attempts, record.max_attempts)
            for number in self.model
            if (record := self.stored.record(number)) is not None
        }
        assert found == self.model
        counted = Counter(state.name.lower() for state, _, _ in self.model.values())
        assert self.stored.counted() == counted
        assert sum(self.stored.waiting.values()) == counted["waiting"]
        for number, (state, _, _) in self.model.items():
            for worker, kept in self.parts.get(number, {}).items():
                is_kept = state in (JobState.RUNNING, JobState.DONE)
                assert self.stored.part(number, worker, 0, 10**6) == (kept if is_kept else b"")
            if state not in (JobState.RUNNING, JobState.DONE):
                self.parts.pop(number, None)
        db = self.stored.store._db
        (size,) = db.execute("select coalesce(sum(size), 0) from job").fetchone()
        (bodies,) = db.execute(
            "select sum(length(body)) from (select body from payload union all "
            "select body from answer union all select body from chunk)"
        ).fetchone()
        assert self.stored.counts.size == size == (bodies or 0) + len(self.model) * ROW_BYTES

    def _in(self, *states: JobState) -> list[int]:
        return [number for number, (state, _, _) in self.model.items() if state in states]


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
