"""Several leaders and one log: one has the jobs, and nothing that it told is lost with it."""

from __future__ import annotations

import contextlib
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overlay.jobs import changes, replicas, statements
from overlay.jobs.changes import BadEntry, Entry, Holder, Kind
from overlay.jobs.copy_file import CopyFile
from overlay.jobs.log import LogAway, LogError, LogFull, Outrun
from overlay.jobs.memory_log import MemoryLog, Shared
from overlay.jobs.store import JobStore
from overlay.model.errors import ConfigError
from overlay.model.jobs import JobEnd, JobSpec, JobState, numbers_of
from overlay.model.segments import Caller
from tests.harness.leaders import Leader

ANN = Caller("10.0.0.1", "ann")
ME, OTHER = Holder(b"me......", "A", "a:1"), Holder(b"other...", "B", "b:1")
NOW = 1_000_000.0


class Clock:
    """In place of the real one, for what this module tests."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(replicas, "time", found)
    return found


class Group:
    """Leaders on one log, each on a file of its own."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder, self.clock, self.shared = folder, clock, Shared()
        self.leaders: dict[str, Leader] = {}

    def __getitem__(self, id_: str) -> Leader:
        if id_ not in self.leaders:
            log = MemoryLog(self.shared, max_bytes=500)
            self.leaders[id_] = Leader(log, self.folder / f"{id_}.db", id_)
        return self.leaders[id_]

    def log(self, id_: str) -> MemoryLog:
        log = self[id_].log
        assert isinstance(log, MemoryLog)
        return log

    def takes_over(self, id_: str) -> Leader:
        """After as much silence as that needs."""
        for _ in range(200):
            self[id_].replica.turn()
            if self[id_].replica.has_jobs:
                return self[id_]
            self.clock.now += 0.1
        raise AssertionError(self[id_].replica.refusal)

    def accept(self, id_: str, payload: bytes = b"x") -> str:
        return self.change(id_, lambda store: store.accept(ANN, [JobSpec(b"r", payload)], NOW))[0]

    def change(self, id_: str, change: Callable[[JobStore], Any]) -> Any:
        """As the journal does it. Raises LogError."""
        leader = self[id_]
        try:
            leader.store.begin()
            result = change(leader.store)
            leader.store.commit()
        except LogError:
            leader.store.rollback()
            leader.replica.lose()
            raise
        return result

    def kill(self, id_: str) -> None:
        self.leaders.pop(id_).file.close()

    def close(self) -> None:
        for leader in self.leaders.values():
            leader.close()


@pytest.fixture
def group(tmp_path: Path, clock: Clock) -> Iterator[Group]:
    made = Group(tmp_path, clock)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("holder", "chance", "expected"),
    [
        (None, 0.0, 0.0),
        (None, 1.0, replicas.FREE_JITTER_S),
        (OTHER, 0.0, replicas.SILENCE_S),
        (OTHER, 1.0, replicas.SILENCE_S + replicas.JITTER_S),
        (Holder(b"earlier.", "A", "a:1"), 1.0, 0.0),
    ],
)
def test_how_much_silence_is_waited_for(
    holder: Holder | None, chance: float, expected: float
) -> None:
    assert replicas.patience_s(holder, ME, chance) == expected


@pytest.mark.parametrize(
    ("silence_s", "patience", "writable_s", "expected"),
    [
        (5.0, 4.5, 2.0, True),
        (4.4, 4.5, 2.0, False),
        (5.0, 4.5, None, False),
        (60.0, 4.5, 0.5, False),  # its servers are only just back, for the others too
        (0.1, 0.1, 0.0, True),  # nobody has the jobs
        (0.1, 0.1, None, False),
    ],
)
def test_when_a_leader_takes_over(
    silence_s: float, patience: float, writable_s: float | None, expected: bool
) -> None:
    assert replicas.may_take_over(silence_s, patience, writable_s) is expected


@pytest.mark.parametrize(
    ("log_mib", "file_mib", "expected"),
    [(63, 0, False), (65, 1, True), (65, 40, False), (81, 40, True)],
)
def test_when_the_log_is_cut(log_mib: int, file_mib: int, expected: bool) -> None:
    assert replicas.needs_snapshot(log_mib << 20, file_mib << 20) is expected


def _entry(number: int, *values: Any) -> bytes:
    return Entry(Kind.CHANGES, ME.author, changes.write_changes([(number, values)])).written()


KEEP = statements.NUMBERS[statements.KEEP_PAYLOAD]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "too short"),
        (b"\x02" + _entry(KEEP, 1, b"")[1:], "of format 2, and this release reads 1"),
        (b"\x01\x09" + _entry(KEEP, 1, b"")[2:], "of kind 9"),
        (_entry(len(statements.ALL), 1, b""), f"statement {len(statements.ALL)} with 2 values"),
        (_entry(KEEP, 1), f"statement {KEEP} with 1 values"),
        (_entry(KEEP, 1, b"body")[:-1], "ends within a value"),
        (_entry(KEEP, 1, b"body")[:-7], "cannot be read"),
        (_entry(KEEP, 1, "t")[:-1] + b"\xff", "cannot be read"),
        (_entry(KEEP, 1, b"").replace(b"b\0", b"x\0"), "a value of an unknown type"),
        (Entry(Kind.TAKEOVER, ME.author, b"{}").written(), "does not say who"),
        (Entry(Kind.TAKEOVER, ME.author, b'{"id": "A\\n", "address": "x"}').written(), "properly"),
        (Entry(Kind.TAKEOVER, ME.author, b'{"id": "A", "address": 1}').written(), "properly"),
    ],
)
def test_an_entry_that_is_not_ours_is_not_used(data: bytes, told: str) -> None:
    def used(entry: Entry) -> object:
        is_takeover = entry.kind is Kind.TAKEOVER
        return changes.read_holder(entry) if is_takeover else changes.read_changes(entry.body)

    with pytest.raises(BadEntry, match=told):
        used(changes.read(data))


@pytest.mark.parametrize("most", [20, 500])
def test_changes_are_read_as_they_were_written(most: int) -> None:
    values = [None, 0, -(2**63), 2**63 - 1, 1.5, float("inf"), "Grüße", "", b"\0\xff", b"x" * 99]
    made = [(KEEP, [one, other]) for one in values for other in values]
    entries = changes.parts(ME.author, changes.write_changes(made), most)
    read = [changes.read(entry.written()) for entry in entries]
    assert all(len(entry.written()) <= most for entry in entries)
    assert [read[0].is_first, read[-1].is_last] == [True, True]
    assert changes.read_changes(b"".join(entry.body for entry in read)) == made


def test_the_first_leader_has_the_jobs_at_once_and_the_others_say_so(group: Group) -> None:
    group.takes_over("A")
    assert group.clock.now < 101
    for _ in range(50):
        group.clock.now += 1.0
        group["A"].replica.turn()
        group["B"].replica.turn()
    assert group["B"].replica.refusal == "the jobs are with A at a.example:50051"
    with pytest.raises(LogAway):
        group.accept("B")


def test_after_silence_another_has_the_jobs_and_all_of_them(group: Group) -> None:
    group.takes_over("A")
    told = [group.accept("A", b"x" * size) for size in (1, 400, 5000)]
    group["B"].follows()
    group.kill("A")
    began = group.clock.now
    store = group.takes_over("B").store
    assert replicas.SILENCE_S <= group.clock.now - began <= replicas.SILENCE_S + 1.5
    assert all(store.find(id_, None) for id_ in told)
    assert group["A"].follows().replica.refusal == "the jobs are with B at b.example:50051"
    assert group["A"].rows == group["B"].rows


def test_a_leader_that_was_frozen_changes_nothing_when_another_has_taken_over(group: Group) -> None:
    group.takes_over("A")
    group["B"].follows()
    group.takes_over("B")
    rows = group["B"].rows
    with pytest.raises(Outrun):
        group.accept("A")
    group["A"].replica.turn()
    assert group["A"].replica.refusal == "the jobs are with B at b.example:50051"
    assert not group["A"].replica.is_in_doubt
    assert group["A"].rows == rows


def test_a_leader_that_starts_again_has_its_jobs_at_once(group: Group) -> None:
    group.takes_over("A")
    id_ = group.accept("A")
    group.kill("A")
    began = group.clock.now
    assert group.takes_over("A").store.find(id_, None)
    assert group.clock.now - began < 0.5


def test_a_leader_that_ends_in_order_is_not_waited_for(group: Group) -> None:
    group.takes_over("A")
    group["B"].follows()
    group["A"].replica.leave()
    began = group.clock.now
    group.takes_over("B")
    assert group.clock.now - began < 1.0


@pytest.mark.parametrize("acks", range(6))
def test_what_was_appended_without_an_answer_is_there_once_or_not_at_all(
    group: Group, acks: int
) -> None:
    """Of the five entries that make this change, the last is the one that counts."""
    leader = group.takes_over("A")
    term = leader.replica.term
    group.log("A").acks = acks
    if acks < 5:
        with pytest.raises(LogAway):
            group.accept("A", b"x" * 2000)
        assert leader.replica.is_in_doubt
    else:
        group.accept("A", b"x" * 2000)
    group.log("A").acks = math.inf
    group.takes_over("A")
    assert leader.replica.term == term, "nobody else had the jobs"
    group.accept("A")
    jobs = sum(row.startswith("job ") for row in leader.rows)
    assert jobs == (2 if acks >= 4 else 1)
    assert group["B"].follows().rows == leader.rows


def test_while_no_majority_is_there_nobody_takes_over(group: Group) -> None:
    group.takes_over("A")
    group["B"].follows()
    for id_ in "AB":
        group.log(id_).is_away = True
    for _ in range(100):
        group.clock.now += 0.5
        for id_ in "AB":
            group[id_].replica.turn()
    assert "no majority of the jobs' servers" in group["A"].replica.refusal
    assert group["A"].replica.is_in_doubt
    term = group["A"].replica.term
    for id_ in "AB":
        group.log(id_).is_away = False
    for id_ in "BA":  # whoever is asked first, the one who had the jobs goes on
        group[id_].replica.turn()
    assert (group["A"].replica.has_jobs, group["A"].replica.term) == (True, term)


def test_a_full_log_refuses_and_takes_heartbeats_for_no_loss(group: Group) -> None:
    group.takes_over("A")
    group.shared.capacity = group.shared.size
    with pytest.raises(LogFull):
        group.accept("A")


def test_a_new_leader_reads_what_was_purged_from_a_snapshot(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "needs_snapshot", lambda log, file: True)
    leader = group.takes_over("A")
    group["B"].follows()
    group.kill("B")
    told = [group.accept("A", b"x" * 1000) for _ in range(300)]
    group.change("A", lambda store: store.take_up((), True, NOW))
    group.change("A", lambda store: store.cancel([numbers_of(i)[0] for i in told[1:]], NOW))
    group.change("A", lambda store: store.drop([numbers_of(i)[0] for i in told[1:]]))
    group.clock.now += 10
    leader.replica.turn()
    leader.replica.close()  # waits for the snapshot
    assert group.shared.first > 100
    assert group["D"].follows().rows == leader.rows, "when nothing came since"
    told.append(group.accept("A"))
    for id_ in "BC":  # one that knew the beginning, and one that is new
        assert group[id_].follows().rows == leader.rows
        assert group[id_].replica.refusal == "the jobs are with A at a.example:50051"


def test_a_snapshot_that_is_not_a_copy_of_jobs_is_not_used(group: Group) -> None:
    leader = group.takes_over("A")
    group.accept("A")
    path = group.folder / "snapshot"
    leader.file.back_up(path, lambda: None)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("create trigger bad after insert on job begin delete from job; end")
        db.commit()
    group.change("A", lambda store: store.forget_kinds())
    leader.log.save(leader.file.position.sequence, path)
    another = group["B"]
    another.replica.turn()
    assert "is not a whole copy of the jobs" in another.replica.problem
    assert another.rows == []


def test_an_entry_that_cannot_be_read_stops_a_copy_and_says_where(group: Group) -> None:
    group.takes_over("A")
    group.accept("A")
    log = group.log("A")
    log.append(len(group.shared.entries), b"\x07" + bytes(20))
    group["B"].replica.turn()
    assert "it is of format 7" in group["B"].replica.problem
    assert not group["B"].replica.has_jobs


def test_a_copy_of_the_jobs_of_other_servers_is_left_as_it_is(group: Group) -> None:
    group.takes_over("A")
    id_ = group.accept("A")
    group.kill("A")
    group.shared = Shared()
    again = group["A"]
    for _ in range(100):
        group.clock.now += 0.1
        again.replica.turn()
    assert "is of other servers, or these have lost their jobs" in again.replica.problem
    assert numbers_of(id_)[0] == 1
    assert len(again.rows) > 2


def test_a_journal_of_its_own_is_no_copy(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "j.db")
    store.begin()
    store.accept(ANN, [JobSpec(b"r", b"p")], NOW)
    store.commit()
    store.close()
    with pytest.raises(ConfigError, match="holds jobs of its own"):
        CopyFile(tmp_path / "j.db")


def test_a_copy_can_be_used_as_a_journal_and_is_no_copy_afterwards(group: Group) -> None:
    group.takes_over("A")
    id_ = group.accept("A")
    group.kill("A")
    alone = JobStore(group.folder / "A.db")
    assert alone.find(id_, None)
    alone.close()
    with pytest.raises(ConfigError, match="holds jobs of its own"):
        CopyFile(group.folder / "A.db")


class Together(RuleBasedStateMachine):
    """Three leaders, of which any is killed, frozen, cut off or does not get its answers: what was
    told is kept, and of two that believe to have the jobs one can change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.real, replicas.time = replicas.time, self.clock  # type: ignore[assignment]
        self.folder = Path(tempfile.mkdtemp())
        self.group = Group(self.folder, self.clock)
        self.terms: dict[str, int] = {}
        self.told: list[str] = []
        self.unsure = 0

    def teardown(self) -> None:
        for id_ in "ABC":
            self.group.log(id_).is_away = False
            self.group.log(id_).acks = math.inf
        for _ in range(300):
            self.clock.now += 0.1
            for id_ in "ABC":
                self.group[id_].replica.turn()
        holders = [id_ for id_ in "ABC" if self.group[id_].replica.has_jobs]
        files = [self.group[id_].rows for id_ in "ABC"]
        store = self.group[holders[0]].store
        lost = [id_ for id_ in self.told if store.find(id_, None) is None]
        jobs = sum(row.startswith("job ") for row in files[0])
        self.group.close()
        replicas.time = self.real
        shutil.rmtree(self.folder)
        assert len(holders) == 1
        assert lost == []
        assert len(self.told) <= jobs <= len(self.told) + self.unsure
        assert files[0] == files[1] == files[2]

    @rule(last=st.booleans(), size=st.sampled_from([1, 900]), ends=st.booleans())
    def changes(self, last: bool, size: int, ends: bool) -> None:
        """By one that believes to have the jobs, as its journal does it."""
        having = [id_ for id_ in "ABC" if self.group[id_].replica.has_jobs]
        if not having:
            return
        id_ = having[-last]
        leader = self.group[id_]

        def change(store: JobStore) -> list[str]:
            if self.terms.get(id_) != leader.replica.term:
                store.take_up((), True, NOW)
            for kind in list(store.waiting) if ends else ():
                for job in store.take(kind, 2, 10**6, NOW):
                    store.end(job.number, JobEnd(JobState.DONE, answer=b"a"), NOW)
            return store.accept(ANN, [JobSpec(b"r", b"x" * size)], NOW)

        try:
            self.told += self.group.change(id_, change)
            self.terms[id_] = leader.replica.term
        except Outrun:
            self.terms.pop(id_, None)
        except LogError:
            self.unsure += 1
            self.terms.pop(id_, None)

    @rule(ids=st.permutations("ABC"), s=st.sampled_from([0.1, 0.5, 3.0, 6.0]))
    def turns(self, ids: list[str], s: float) -> None:
        self.clock.now += s
        for id_ in ids:
            self.group[id_].replica.turn()

    @rule(id_=st.sampled_from("ABC"))
    def is_frozen(self, id_: str) -> None:
        for _ in range(8):
            self.clock.now += 1.0
            for other in "ABC":
                if other != id_:
                    self.group[other].replica.turn()

    @rule(id_=st.sampled_from("ABC"), away=st.booleans())
    def is_cut_off(self, id_: str, away: bool) -> None:
        self.group.log(id_).is_away = away

    @rule(id_=st.sampled_from("ABC"), acks=st.sampled_from([0, 1, 2, math.inf]))
    def gets_no_answers(self, id_: str, acks: float) -> None:
        self.group.log(id_).acks = acks

    @rule(id_=st.sampled_from("ABC"))
    def is_killed(self, id_: str) -> None:
        self.group[id_]
        self.group.kill(id_)
        self.terms.pop(id_, None)

    @invariant()
    def only_who_took_over_last_has_appended(self) -> None:
        author = b""
        for data in self.group.shared.entries:
            entry = changes.read(data)
            if entry.kind is Kind.TAKEOVER:
                author = entry.author
            assert entry.author == author


TestTogether = Together.TestCase
TestTogether.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
