"""The jobs of a leader in one SQLite file.

    accept -> waiting -> take -> running -> end -> done | failed | quarantined | cancelled | waiting
                 |                                     quarantined, failed -> release -> waiting
                 +--> expire -> expired                 each that ended -> forget

Every method belongs into a transaction of its owner (`begin`, `commit`, `rollback`), which is the
only thread that uses the store. Nothing is ever dropped to make room but what its caller has
fetched; beyond the bounds a job is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from overlay.jobs import journal_file, statements
from overlay.jobs.copy_file import CopyFile
from overlay.model import clocks as time
from overlay.model.errors import BadRequest, JournalFull, OverlayError, Refused
from overlay.model.jobs import (
    ENDED,
    MARK_BITS,
    SCHEDULE_BIT,
    JobCounts,
    JobEnd,
    JobRecord,
    JobSpec,
    JobState,
    TakenJob,
    job_id,
    numbers_of,
)
from overlay.model.segments import Caller, Code

ROW_BYTES = 300  # of a job, besides its payload and answer
STORY_EVENTS = 16  # the first, and the last ones
MAX_POSITION = 10_000  # beyond it a position is only "more": counting up to here takes 1 ms
LONGEST_LOOK_S = 0.25  # of one question; the journal's thread does nothing else meanwhile
WOKEN = 1000  # jobs whose time has come, in one transaction
LEFT_RUNNING = "the leader ended while it ran"
CANCELLED = JobEnd(JobState.CANCELLED, Code.CANCELLED, "cancelled while it ran")
NOT_STARTED = JobEnd(JobState.WAITING, Code.UNAVAILABLE, "it was not started", counts=False)


class StoreLimits(NamedTuple):
    """max_jobs: in the file, whatever their state. max_bytes: of their payloads and answers.
    keep_s: how long a job that has ended is kept."""

    max_jobs: int = 1_000_000
    max_bytes: int = 1 << 30
    keep_s: float = 86_400.0


class Changed(NamedTuple):
    """What became of a change to several jobs. unchanged: ids of those whose state does not allow
    it. running: those that are to be cancelled where they run, by number."""

    changed: int
    unchanged: tuple[str, ...]
    running: tuple[int, ...] = ()


class JobStore:
    """Opens the file, or makes it. Raises ConfigError if it cannot be used; it is left as it is.

    path: ":memory:" for one that is kept nowhere; or a leader's copy of jobs that several leaders
    keep, which holds nothing for this store before `take_up`.
    """

    def __init__(self, path: str | Path | CopyFile, limits: StoreLimits | None = None) -> None:
        self.path = path.path if isinstance(path, CopyFile) else path
        self.limits = limits or StoreLimits()
        self.waiting: Counter[int] = Counter()  # jobs that can start now, by kind
        self._fetched: set[int] = set()  # jobs whose answers were read
        self.over: list[int] = []  # numbers of jobs that ended or were forgotten, until taken
        self._wake_at: float | None = None  # None: to be looked up
        self.recovered = 0  # jobs that were running when the last leader ended
        self._states: Counter[int] = Counter()
        self._totals: Counter[str] = Counter()  # bytes, schedules
        self._undo: list[tuple[Counter[Any], Any, int]] = []
        self._kinds: dict[int, tuple[Caller, bytes]] = {}  # by id; looked up as they are needed
        self._db: CopyFile | sqlite3.Connection
        if isinstance(path, CopyFile):
            self._db = path
            return
        self._db = journal_file.opened(path, self._recover)
        self._undo.clear()
        self.over.clear()

    # transactions

    def begin(self) -> None:
        self._db.execute("begin immediate")

    def commit(self) -> None:
        """Returns when everything is on the disk. Raises sqlite3.Error; then `rollback`."""
        self._db.execute("commit")
        self._undo.clear()

    def take_over(self) -> list[int]:
        """The numbers of the jobs that have ended or were forgotten since the last time."""
        found, self.over = self.over, []
        return found

    def rollback(self) -> None:
        self._undo_to(0)
        self.over.clear()
        self._wake_at = None
        with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            self._db.execute("rollback")

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("pragma wal_checkpoint(truncate)")
        self._db.close()

    # several leaders

    def take_up(self, running: Collection[int], is_new: bool, now: float) -> None:
        """This leader has the jobs from here on, or again. running: those that do run here; the
        others were left running. is_new: another one had them before; else they were not started.
        """
        self.lay_down()
        self._count_all()
        for number, attempts, max_attempts, at in self._left_running():
            if number not in running:
                end = _left(attempts, max_attempts) if is_new else NOT_STARTED
                self.end(number, end, at if is_new else now)
                self.recovered += is_new

    def lay_down(self) -> None:
        """Another leader has the jobs, or may have them."""
        for counter in (self.waiting, self._states, self._totals):
            counter.clear()
        self._fetched.clear()
        self._kinds.clear()
        self._undo.clear()
        self.over.clear()
        self._wake_at = None

    # accepting

    def accept(self, caller: Caller, specs: Sequence[JobSpec], now: float) -> list[str]:
        """The ids of the jobs; of one whose key is known, that of the earlier job.

        Raises JournalFull, and BadRequest for a key that was used for another request; then none
        is accepted.
        """
        with self._all_or_nothing():
            return [
                self._schedule(caller, spec, now)
                if spec.every_s
                else self._accept(caller, spec, now)
                for spec in specs
            ]

    def _accept(
        self, caller: Caller, spec: JobSpec, now: float, schedule: int | None = None
    ) -> str:
        kind, digest = self._kind_of(caller, spec), None
        if spec.key:
            digest = hashlib.blake2b(spec.request + b"\0" + spec.payload, digest_size=16).digest()
            if known := self._known(caller, spec.key):
                if known[2] != digest:
                    raise BadRequest(f"key: '{spec.key}' was used for another job")
                return job_id(*known[:2])
        size = ROW_BYTES + len(spec.payload)
        self._check_room(size)
        mark, ready = secrets.randbits(MARK_BITS), spec.due <= now
        number = self._db.execute(
            statements.ACCEPT,
            (mark, kind, ready, spec.priority, spec.due, spec.expires, now, spec.limit_s,
             spec.max_attempts, size, spec.key or None, digest, schedule),
        ).lastrowid  # fmt: skip
        assert number is not None
        self._db.execute(statements.KEEP_PAYLOAD, (number, spec.payload))
        self._count(self._states, int(JobState.WAITING), 1)
        self._count(self._totals, "bytes", size)
        if ready:
            self._count(self.waiting, kind, 1)
        else:
            self._wakes(spec.due)
        self._wakes(spec.expires)
        return job_id(number, mark)

    def _known(self, caller: Caller, key: str) -> tuple[int, int, bytes] | None:
        """The caller's job with this key, whatever it asks."""
        found: tuple[int, int, bytes] | None = self._db.execute(
            "select job.id, mark, digest from kind join job on job.kind = kind.id and key = ? "
            "where address = ? and name = ?",
            (key, *caller),
        ).fetchone()
        return found

    def _check_room(self, size: int, jobs: int = 1) -> None:
        limits = self.limits

        def too_many() -> bool:
            return bool(jobs) and self.jobs + jobs > limits.max_jobs

        def too_large() -> bool:
            return self._totals["bytes"] + size > limits.max_bytes

        if too_many() or too_large():
            self._note_fetched()
        while too_many() or too_large():
            if not self._forget("fetched = 1", (), 100):
                break
        if too_many():
            raise JournalFull(f"the journal has {self.jobs:,} jobs, as many as it may (max_jobs)")
        if too_large():
            raise JournalFull(
                f"the journal has {self._totals['bytes']:,} bytes of the {limits.max_bytes:,} that "
                "it may have (max_journal_mib)"
            )

    def _kind_of(self, caller: Caller, spec: JobSpec) -> int:
        key = (*caller, spec.request)
        found = self._db.execute(
            "select id from kind where address = ? and name = ? and request = ?", key
        ).fetchone()
        if found is None:
            made = self._db.execute(statements.MAKE_KIND, (*key, spec.handler)).lastrowid
            assert made is not None
            return made
        return int(found[0])

    # running

    def take(self, kind: int, count: int, most_bytes: int, now: float) -> list[TakenJob]:
        """Marks the next jobs of a kind as running, and returns them, at least one if any waits.

        most_bytes: of their payloads.
        """
        numbers: list[int] = []
        for number, size in self._db.execute(
            "select id, size from job where state = 0 and ready = 1 and kind = ? "
            "order by priority desc, id limit ?",
            (kind, count),
        ):
            most_bytes -= size - ROW_BYTES
            if numbers and most_bytes < 0:
                break
            numbers.append(number)
        if not numbers:
            return []
        caller, request = self._kind(kind)
        taken = []
        for number in numbers:
            payload, limit_s, attempts, max_attempts, priority = self._db.execute(
                statements.TAKE, (now, number)
            ).fetchone()
            self._moved(number, JobState.WAITING, JobState.RUNNING)
            asked = number, kind, caller, request
            taken.append(TakenJob(*asked, payload, limit_s, attempts, max_attempts, priority))
        self._count(self.waiting, kind, -len(taken))
        return taken

    def end(self, number: int, end: JobEnd, now: float) -> bool:
        """Records what an attempt made of a running job. Returns whether it was running."""
        found = self._db.execute(
            "select kind, story, attempts, size, coalesce((select length(body) from payload where "
            "job = job.id), 0) from job where id = ? and state = 1",
            (number,),
        ).fetchone()
        if found is None:
            return False
        kind, story, attempts, before, payload_bytes = found
        if end.state is JobState.DONE:
            answer = end.answer or b""
            self._db.execute(statements.DROP_PAYLOAD, (number,))
            self._db.execute(statements.KEEP_ANSWER, (number, answer))
            size = before - payload_bytes + len(answer)
            self._count(self._totals, "bytes", size - before)
            self._db.execute(statements.DONE, (now, size, number))
        else:
            self._drop_chunks(statements.DROP_PARTS, number)
            attempts -= not end.counts
            what = f"attempt {attempts + (not end.counts)}: {end.reason}"
            ended = now if end.state in ENDED else None
            ready = end.due <= now
            self._db.execute(
                statements.END,
                (int(end.state), ended, attempts, not end.counts, end.due, ready, int(end.code),
                 end.reason, _told(story, now, what), number),
            )  # fmt: skip
            if end.state is JobState.WAITING:
                if ready:
                    self._count(self.waiting, kind, 1)
                self._wake_at = None  # its due, or its expiry again
        self._moved(number, JobState.RUNNING, end.state)
        return True

    def keep_chunk(self, number: int, worker: str, at: int, chunk: bytes) -> None:
        """Of a worker's part of a running job, `at` bytes after the part's start; the first one
        replaces what was kept of it. Raises JournalFull."""
        if self.state(number) is not JobState.RUNNING:
            return
        if not at:
            self.drop_part(number, worker)
        if chunk:
            self._check_room(len(chunk), jobs=0)
            self._db.execute(statements.KEEP_CHUNK, (number, worker, at, chunk))
            self._grow(number, len(chunk))

    def drop_part(self, number: int, worker: str) -> None:
        """Forgets what was kept of a worker's part."""
        self._drop_chunks(statements.DROP_PART, number, worker)

    def wake(self, now: float) -> None:
        """Makes those ready whose time has come, expires those that waited too long, and runs the
        schedules. `next_wake` says whether there are more."""
        for (kind,) in self._db.execute(statements.MAKE_READY, (now, WOKEN)).fetchall():
            self._count(self.waiting, kind, 1)
        expired = self._db.execute(statements.EXPIRE, (now, now, WOKEN)).fetchall()
        for number, kind, ready in expired:
            self._count(self.waiting, kind, -ready)
            self._moved(number, JobState.WAITING, JobState.EXPIRED)
        self._run_schedules(now)
        self._wake_at = None

    def hurry(self) -> None:
        """Makes those ready that wait for another attempt, and not for a time of their caller's."""
        for (kind,) in self._db.execute(statements.HURRY, (WOKEN,)).fetchall():
            self._count(self.waiting, kind, 1)

    @property
    def next_wake(self) -> float:
        """When `wake` may have something to do."""
        if self._wake_at is None:
            (found,) = self._db.execute(
                "select min(at) from (select min(due) as at from job where state = 0 and ready = 0 "
                "union all select min(expires) from job where state = 0 and expires is not null "
                "union all select min(next) from schedule)"
            ).fetchone()
            self._wake_at = math.inf if found is None else float(found)
        return self._wake_at

    def _wakes(self, at: float | None) -> None:
        if at is not None and self._wake_at is not None and at < self._wake_at:
            self._wake_at = at

    def refusals_of(self, number: int) -> int:
        """How often in a row it was refused with proof that it had not run."""
        found = self._db.execute("select refusals from job where id = ?", (number,)).fetchone()
        return int(found[0]) if found else 0

    # what people ask

    def kind_of(self, number: int) -> int:
        """What `waiting` counts it under; 0 for a schedule, or if there is no such job."""
        found = self._db.execute("select kind from job where id = ?", (number,)).fetchone()
        return int(found[0]) if found else 0

    def find(self, id_: str, owner: str | None) -> int | None:
        """The number of a job or schedule. owner: the address of its caller; None: anybody's."""
        number, mark = numbers_of(id_)
        table = "schedule" if number & SCHEDULE_BIT else "job"
        found = self._db.execute(
            f"select address from {table} join kind on kind.id = kind "
            f"where {table}.id = ? and mark = ?",
            (number & ~SCHEDULE_BIT, mark),
        ).fetchone()
        return number if found and owner in (None, found[0]) else None

    def state(self, number: int) -> JobState | None:
        found = self._db.execute("select state from job where id = ?", (number,)).fetchone()
        return JobState(found[0]) if found else None

    def record(self, number: int, with_answer: bool = False) -> JobRecord | None:
        if number & SCHEDULE_BIT:
            return self._schedule_record(number & ~SCHEDULE_BIT)
        record = self._record(self._row("where job.id = ?", (number,)))
        if record is None or record.state is not JobState.DONE or not with_answer:
            return record
        (answer,) = self._db.execute("select body from answer where job = ?", (number,)).fetchone()
        return replace(record, answer=answer)

    def part(self, number: int, worker: str, at: int, most: int) -> bytes:
        """At most so many bytes of a worker's part, from there on; fewer where some are lost."""
        found = bytearray()
        for begins, body in self._db.execute(
            "select at, body from chunk where job = ? and worker = ? and at >= (select "
            "coalesce(max(at), 0) from chunk where job = ? and worker = ? and at <= ?) order by at",
            (number, worker, number, worker, at),
        ):
            known = at + len(found) - begins
            if not 0 <= known <= len(body):
                break
            found += body[known:]
            if len(found) >= most:
                break
        return bytes(found[:most])

    def was_fetched(self, number: int) -> None:
        """Its answer was read. It counts from the next `forget_old` on: a disk should not have to
        be waited for in order to read."""
        self._fetched.add(number)

    def position(self, number: int) -> tuple[int, bool]:
        """How many jobs of its caller and kind go before it, with itself; whether it is more."""
        found = self._db.execute(
            "select kind, priority from job where id = ? and state = 0 and ready = 1", (number,)
        ).fetchone()
        if found is None:
            return 0, False
        kind, priority = found
        before = 0
        go_first = ("priority > ?", (priority,)), ("priority = ? and id < ?", (priority, number))
        for more, values in go_first:
            (count,) = self._db.execute(
                "select count(*) from (select 1 from job where state = 0 and ready = 1 and "
                f"kind = ? and {more} limit {MAX_POSITION})",
                (kind, *values),
            ).fetchone()
            before += count
        return min(before + 1, MAX_POSITION), before + 1 > MAX_POSITION

    def listed(
        self,
        owner: str | None,
        states: Collection[JobState] = (),
        handler: str = "",
        limit: int = 100,
        before: int = 0,
    ) -> list[JobRecord]:
        """The newest first; schedules before all jobs. before: only jobs with a lower number.

        Raises Refused if that takes too long, as few of very many jobs are wanted.
        """
        wanted, values = ["1"], []
        if owner is not None:
            wanted.append("address = ?")
            values.append(owner)
        if handler:
            wanted.append("handler = ?")
            values.append(handler)
        schedules: list[JobRecord] = []
        if not before and (not states or JobState.WAITING in states):
            for (number,) in self._db.execute(
                "select schedule.id from schedule join kind on kind.id = kind where "
                f"{' and '.join(wanted)} order by schedule.id desc limit ?",
                (*values, limit),
            ).fetchall():
                if (found := self._schedule_record(number)) is not None:
                    schedules.append(found)
        if before:
            wanted.append("job.id < ?")
            values.append(before)  # type: ignore[arg-type]
        if states:
            wanted.append(f"state in ({', '.join(str(int(state)) for state in states)})")
        where = f"where {' and '.join(wanted)} order by job.id desc limit ?"
        with self._quickly():
            rows = self._rows(where, (*values, limit - len(schedules)))
        return [*schedules, *(record for row in rows if (record := self._record(row)))]

    def cancel(self, numbers: Iterable[int], now: float) -> Changed:
        """Ends those that wait or run. Those that ran are named in `running`; whatever becomes of
        their attempt, they are over."""
        changed, unchanged, running = 0, [], []
        for number in numbers:
            if number & SCHEDULE_BIT:
                gone = self._db.execute(
                    statements.CANCEL_SCHEDULE, (number & ~SCHEDULE_BIT,)
                ).fetchone()
                if gone is not None:
                    self._count(self._totals, "schedules", -1)
                    self._count(self._totals, "bytes", -(ROW_BYTES + gone[0]))
                    changed += 1
                continue
            found = self._db.execute(statements.CANCEL, (now, number)).fetchone()
            if found is not None:
                self._count(self.waiting, found[0], -found[1])
                self._moved(number, JobState.WAITING, JobState.CANCELLED)
                changed += 1
            elif self.end(number, CANCELLED, now):
                running.append(number)
                changed += 1
            else:
                unchanged.append(self._id_of(number))
        return Changed(changed, tuple(unchanged), tuple(running))

    def release(self, numbers: Iterable[int], now: float) -> Changed:
        """Those that are quarantined or failed wait again, with as many attempts as at first."""
        changed, unchanged = 0, []
        for number in numbers:
            found = self._db.execute(
                "select kind, state, story from job where id = ? and state in (3, 4)", (number,)
            ).fetchone()
            if found is None:
                unchanged.append(self._id_of(number))
                continue
            kind, state, story = found
            self._db.execute(statements.RELEASE, (_told(story, now, "released"), number))
            self._count(self.waiting, kind, 1)
            self._moved(number, JobState(state), JobState.WAITING)
            changed += 1
        return Changed(changed, tuple(unchanged))

    def drop(self, numbers: Iterable[int]) -> Changed:
        """Those that have ended or are quarantined are forgotten."""
        changed, unchanged = 0, []
        for number in numbers:
            if self._forget("id = ? and state in (2, 3, 4, 5, 6)", (number,), 1):
                changed += 1
            else:
                unchanged.append(self._id_of(number))
        return Changed(changed, tuple(unchanged))

    def in_states(self, states: Collection[JobState], owner: str | None, limit: int) -> list[int]:
        """The numbers of jobs in these states, the oldest first."""
        marks = ", ".join(str(int(state)) for state in states)
        mine = "" if owner is None else "and kind in (select id from kind where address = ?)"
        values = () if owner is None else (owner,)
        rows = self._db.execute(
            f"select id from job where state in ({marks}) {mine} order by id limit ?",
            (*values, limit),
        )
        return [number for (number,) in rows]

    def forget_old(self, now: float, limit: int = 500) -> int:
        """Forgets jobs that ended `keep_s` ago. Returns how many; there may be more."""
        self._note_fetched()
        return self._forget("ended <= ?", (now - self.limits.keep_s,), limit)

    def _note_fetched(self) -> None:
        for number in self._fetched:
            self._db.execute(statements.NOTE_FETCHED, (number,))
        self._fetched.clear()  # if this is not committed, they are only kept for longer

    def forget_kinds(self) -> None:
        """Forgets which requests were once asked, of which there is no job any more."""
        self._db.execute(statements.FORGET_KINDS)
        self._kinds.clear()

    @property
    def jobs(self) -> int:
        return sum(self._states.values())

    @property
    def counts(self) -> JobCounts:
        """Kept in memory; may be read by any thread."""
        states = tuple(self._states[int(state)] for state in JobState)
        return JobCounts(states, self._totals["bytes"], self._totals["schedules"])

    def counts_of(self, owner: str | None) -> JobCounts:
        """Those of one caller, by its address; None: of all. Without those that take too long to
        count."""
        if owner is None:
            return self.counts
        states: Counter[int] = Counter()
        size = 0
        with contextlib.suppress(Refused), self._quickly():
            for state, count, their_bytes in self._db.execute(
                "select state, count(*), sum(size) from job where kind in "
                "(select id from kind where address = ?) group by state",
                (owner,),
            ):
                states[state] = count
                size += their_bytes
        return JobCounts(tuple(states[int(state)] for state in JobState), size)

    # schedules

    def _schedule(self, caller: Caller, spec: JobSpec, now: float) -> str:
        size = ROW_BYTES + len(spec.payload)
        self._check_room(size)
        mark, first = secrets.randbits(MARK_BITS), spec.due if spec.due > now else now
        expires_s = None if spec.expires is None else spec.expires - now
        number = self._db.execute(
            statements.MAKE_SCHEDULE,
            (mark, self._kind_of(caller, spec), spec.priority, spec.limit_s, spec.max_attempts,
             spec.key or None, spec.every_s, first, expires_s, now, spec.payload),
        ).lastrowid  # fmt: skip
        assert number is not None
        self._wakes(first)
        self._count(self._totals, "schedules", 1)
        self._count(self._totals, "bytes", size)
        return job_id(number | SCHEDULE_BIT, mark)

    def _run_schedules(self, now: float) -> None:
        """Makes the jobs of the schedules that are due: one each, however many were missed."""
        for row in self._db.execute(
            "select id, kind, priority, limit_s, max_attempts, key, every_s, next, expires_s, "
            "payload, last from schedule where next <= ?",
            (now,),
        ).fetchall():
            number, kind, priority, limit_s, max_attempts, key, every_s, at, expires_s, *rest = row
            payload, last = rest
            due = int((now - at) // every_s) + 1  # this one, and those missed before it
            is_busy = last is not None and self.state(last) in (JobState.WAITING, JobState.RUNNING)
            missed, made = due - 1 + is_busy, last
            if not is_busy:
                caller, request = self._kind(kind)
                spec = JobSpec(
                    request, payload, "", f"{key} {at + (due - 1) * every_s:.0f}" if key else "",
                    priority, limit_s, max_attempts, 0.0,
                    None if expires_s is None else now + expires_s,
                )  # fmt: skip
                try:
                    made, _ = numbers_of(self._accept(caller, spec, now, number))
                except (JournalFull, BadRequest):
                    missed += 1
            self._db.execute(statements.RUN_SCHEDULE, (at + due * every_s, missed, made, number))

    def _schedule_record(self, number: int) -> JobRecord | None:
        found = self._db.execute(
            "select mark, kind, priority, max_attempts, key, every_s, next, accepted, missed, "
            "length(payload) from schedule where id = ?",
            (number,),
        ).fetchone()
        if found is None:
            return None
        mark, kind, priority, max_attempts, key, every_s, next_, accepted, missed, size = found
        caller, request = self._kind(kind)
        return JobRecord(
            job_id(number | SCHEDULE_BIT, mark), JobState.WAITING, caller, request, key or "",
            priority, accepted, due=next_, max_attempts=max_attempts, size=size + ROW_BYTES,
            every_s=every_s, missed=missed,
        )  # fmt: skip

    # inside

    def _recover(self, db: sqlite3.Connection) -> None:
        """What ran when the last leader ended may have run: it waits again if it has attempts left,
        else it is quarantined."""
        self._db = db
        self._count_all()
        for number, attempts, max_attempts, at in self._left_running():
            self.end(number, _left(attempts, max_attempts), at)
            self.recovered += 1

    def _count_all(self) -> None:
        found = self._db.execute("select state, count(*), sum(size) from job group by state")
        rows = found.fetchall()
        self._states.update({state: count for state, count, _ in rows})
        schedules, their_bytes = self._db.execute(
            f"select count(*), coalesce(sum(length(payload) + {ROW_BYTES}), 0) from schedule"
        ).fetchone()
        self._totals["bytes"] = sum(size for _, _, size in rows) + their_bytes
        self._totals["schedules"] = schedules
        for kind, count in self._db.execute(
            "select kind, count(*) from job where state = 0 and ready = 1 group by kind"
        ):
            self.waiting[kind] = count

    def _left_running(self) -> list[tuple[int, int, int, float]]:
        """(number, attempts, most attempts, when it was started)"""
        return self._db.execute(
            "select id, attempts, max_attempts, started from job where state = 1"
        ).fetchall()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within the transaction: an error undoes what was done inside, and nothing else."""
        begun = len(self._undo)
        self._db.execute("savepoint step")
        try:
            yield
        except OverlayError:
            self._db.execute("rollback to step")
            self._undo_to(begun)
            raise
        finally:
            with contextlib.suppress(sqlite3.Error):  # a failed transaction has none any more
                self._db.execute("release step")

    @contextlib.contextmanager
    def _quickly(self) -> Iterator[None]:
        """For a question that may have to look at every job: others wait meanwhile. Raises
        Refused."""
        until = time.monotonic() + LONGEST_LOOK_S
        self._db.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        try:
            yield
        except sqlite3.OperationalError as e:
            if "interrupted" not in str(e):
                raise
            raise Refused("it takes too long to find these among all jobs: ask for less") from None
        finally:
            self._db.set_progress_handler(None, 0)

    def _undo_to(self, begun: int) -> None:
        for counter, key, change in reversed(self._undo[begun:]):
            counter[key] -= change
            if not counter[key]:
                del counter[key]
        del self._undo[begun:]
        self._kinds.clear()  # one of them may have been made there

    def _count(self, counter: Counter[Any], key: Any, change: int) -> None:
        if change:
            counter[key] += change
            if not counter[key]:
                del counter[key]
            self._undo.append((counter, key, change))

    def _drop_chunks(self, statement: str, *values: int | str) -> None:
        """values: the job's number first."""
        dropped = sum(size for (size,) in self._db.execute(statement, values))
        if dropped:
            self._grow(int(values[0]), -dropped)

    def _grow(self, number: int, size: int) -> None:
        self._db.execute(statements.GROW, (size, number))
        self._count(self._totals, "bytes", size)

    def _moved(self, number: int, before: JobState, after: JobState) -> None:
        self._count(self._states, int(before), -1)
        self._count(self._states, int(after), 1)
        if after.is_over:
            self.over.append(number)

    def _kind(self, kind: int) -> tuple[Caller, bytes]:
        found = self._kinds.get(kind)
        if found is None:
            address, name, request = self._db.execute(
                "select address, name, request from kind where id = ?", (kind,)
            ).fetchone()
            if len(self._kinds) > 1000:
                self._kinds.clear()
            found = self._kinds[kind] = Caller(address, name), request
        return found

    def _id_of(self, number: int) -> str:
        table = "schedule" if number & SCHEDULE_BIT else "job"
        found = self._db.execute(
            f"select mark from {table} where id = ?", (number & ~SCHEDULE_BIT,)
        ).fetchone()
        return job_id(number, found[0]) if found else ""

    def _forget(self, which: str, values: tuple[Any, ...], limit: int) -> int:
        numbers = [
            number
            for (number,) in self._db.execute(
                f"select id from job where {which} order by ended limit ?", (*values, limit)
            )
        ]
        for number in numbers:
            state, size = self._db.execute(statements.FORGET, (number,)).fetchone()
            self._db.execute(statements.DROP_PAYLOAD, (number,))
            self._db.execute(statements.DROP_ANSWER, (number,))
            self._db.execute(statements.DROP_PARTS, (number,)).fetchall()
            self._count(self._states, state, -1)
            self._count(self._totals, "bytes", -size)
            self.over.append(number)
        return len(numbers)

    def _rows(self, where: str, values: tuple[Any, ...]) -> list[Any]:
        return self._db.execute(
            "select job.id, job.mark, state, address, name, request, job.key, job.priority, "
            "job.accepted, started, ended, due, expires, attempts, job.max_attempts, code, reason, "
            "size, story, schedule, (select mark from schedule where schedule.id = job.schedule) "
            f"from job join kind on kind.id = job.kind {where}",
            values,
        ).fetchall()

    def _row(self, where: str, values: tuple[Any, ...]) -> Any:
        return next(iter(self._rows(where, values)), None)

    def _record(self, row: Any) -> JobRecord | None:
        if row is None:
            return None
        (number, mark, state, address, name, request, key, priority, accepted, started, ended, due,
         expires, attempts, max_attempts, code, reason, size, story, schedule,
         made_by) = row  # fmt: skip
        return JobRecord(
            job_id(number, mark), JobState(state), Caller(address, name), request, key or "",
            priority, accepted, started or 0.0, ended or 0.0, due or 0.0, expires or 0.0, attempts,
            max_attempts, Code(code), reason, size,
            story=tuple((at, what) for at, what in json.loads(story)),
            schedule="" if made_by is None else job_id(schedule | SCHEDULE_BIT, made_by),
        )  # fmt: skip


def _left(attempts: int, max_attempts: int) -> JobEnd:
    state = JobState.WAITING if attempts < max_attempts else JobState.QUARANTINED
    return JobEnd(state, Code.UNAVAILABLE, LEFT_RUNNING)


def _told(story: str, now: float, what: str) -> str:
    events = [*json.loads(story), [now, what[:500]]]
    if len(events) > STORY_EVENTS:
        del events[1]
    return json.dumps(events)
