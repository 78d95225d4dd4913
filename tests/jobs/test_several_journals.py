"""Journals of several leaders on one log, each with its thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlay.jobs import journal as journals
from overlay.jobs import replicas
from overlay.jobs.copy_file import CopyFile
from overlay.jobs.journal import Journal
from overlay.jobs.memory_log import MemoryLog, Shared
from overlay.jobs.replicas import Replica
from overlay.jobs.store import JobStore
from overlay.model.errors import JournalFull, NoJournal
from overlay.model.jobs import JobState
from overlay.model.segments import Code, Executed
from tests.harness.cluster import until
from tests.jobs.test_journal import Bench, Runner


class Leader(Bench):
    def __init__(self, path: Path, shared: Shared, id_: str) -> None:
        self.log = MemoryLog(shared)
        self.is_deposed = 0
        file = CopyFile(path / f"{id_}.db")
        self.store = JobStore(file)
        self.runner = Runner()
        self.runner.deposed = self._deposed  # type: ignore[method-assign]
        self.replica = Replica(self.log, file, id_, f"{id_.lower()}:1")
        self.journal = Journal(self.store, self.runner, 0, self.replica)
        self.journal.start()

    def _deposed(self) -> None:
        self.runner.taken.clear()
        self.is_deposed += 1

    def starts(self, payload: bytes) -> int:
        """The number of a job that it has started."""
        number = self.number(payload)
        self.runner.room = 1
        self.journal.wake()
        until(lambda: any(job.number == number for job in self.runner.taken))
        return number

    def state(self, number: int) -> JobState | None:
        return self.journal.ask(lambda store, now: store.state(number)).result(10)


@pytest.fixture
def leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Leader]]:
    monkeypatch.setattr(replicas, "SILENCE_S", 0.5)
    monkeypatch.setattr(replicas, "JITTER_S", 0.1)
    monkeypatch.setattr(replicas, "HEAD_START_S", 0.1)
    monkeypatch.setattr(replicas, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(journals, "LOOK_S", 0.1)
    monkeypatch.setattr(journals, "FOLLOW_S", 0.02)
    monkeypatch.setattr(journals, "RETRY_S", 0.05)
    shared, made = Shared(), dict[str, Leader]()

    def one(id_: str) -> Leader:
        if id_ not in made:
            made[id_] = Leader(tmp_path, shared, id_)
            if len(made) == 1:
                until(lambda: not made[id_].journal.elsewhere)
            else:
                until(lambda: made[id_].journal.elsewhere.startswith("the jobs are with"))
        return made[id_]

    yield one
    for found in made.values():
        found.journal.close()


def test_a_leader_without_the_jobs_refuses_and_says_who_has_them(
    leader: Callable[[str], Leader],
) -> None:
    leader("A").number()
    for asked in (leader("B").submit(), leader("B").journal.ask(lambda store, now: store.jobs)):
        with pytest.raises(NoJournal, match="the jobs are with A at a:1") as caught:
            asked.result(10)
        assert (caught.value.code, caught.value.executed) == (Code.UNAVAILABLE, Executed.NO)


def test_when_a_leader_is_cut_off_another_goes_on_with_its_jobs(
    leader: Callable[[str], Leader],
) -> None:
    a, b = leader("A"), leader("B")
    ran, waits = a.starts(b"ran"), a.number(b"waits")
    a.log.is_away = True
    until(lambda: not b.journal.elsewhere)
    assert (b.state(ran), b.state(waits)) == (JobState.QUARANTINED, JobState.WAITING)
    with pytest.raises(NoJournal, match="no majority"):
        a.submit().result(10)

    a.log.is_away = False
    until(lambda: a.journal.elsewhere == "the jobs are with B at b:1")
    assert a.is_deposed == 2  # at its start, as it had none, and now
    a.end(ran, b"too late")
    time.sleep(0.3)
    assert b.state(ran) is JobState.QUARANTINED


def test_what_ends_while_no_majority_is_there_is_written_when_it_is_back(
    leader: Callable[[str], Leader],
) -> None:
    a, b = leader("A"), leader("B")
    first, second = a.starts(b"1"), a.starts(b"2")
    for one in (a, b):
        one.log.is_away = True
    until(lambda: a.journal.elsewhere)
    a.end(first, b"answer")
    time.sleep(1.5)
    for one in (b, a):
        one.log.is_away = False
    until(lambda: not a.journal.elsewhere)
    assert (a.answer(first), a.state(second)) == (b"answer", JobState.RUNNING)
    assert a.is_deposed == 1
    a.end(second, b"later")
    until(lambda: a.answer(second) == b"later")


def test_a_job_whose_start_was_not_told_waits_again(leader: Callable[[str], Leader]) -> None:
    """The log has that it runs, and no answer came, so it was not started."""
    a = leader("A")
    number = a.number()
    until(lambda: a.log.size())
    a.log.acks = 0
    a.runner.room = 1
    a.journal.wake()
    until(lambda: a.journal.elsewhere)
    a.log.acks = math.inf
    until(lambda: not a.journal.elsewhere)
    assert (a.runner.taken, a.state(number)) == ([], JobState.WAITING)


def test_a_full_log_accepts_nothing_and_loses_no_answer(leader: Callable[[str], Leader]) -> None:
    a = leader("A")
    number = a.starts(b"x")
    a.log.shared.capacity = a.log.shared.size
    with pytest.raises(JournalFull, match="the jobs' servers have no room"):
        a.submit(b"y" * 1000).result(10)
    a.end(number, b"answer")
    time.sleep(0.3)
    a.log.shared.capacity = 1 << 30
    until(lambda: a.answer(number) == b"answer")
    until(lambda: not a.journal.problem)


def test_a_leader_that_ends_gives_the_jobs_up(leader: Callable[[str], Leader]) -> None:
    a, b = leader("A"), leader("B")
    number = a.number()
    a.journal.close()
    until(lambda: not b.journal.elsewhere)
    assert b.state(number) is JobState.WAITING
    assert b.number(b"goes on")
