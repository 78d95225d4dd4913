"""Puts jobs into the leader's queue, and records what becomes of them.

    the journal's thread: take --> [commit] --> start --> queue, as one more flow of it
    any thread:           an answer --> what it makes of the job --> the journal

A job counts as running from the moment it is taken, because after that it may run. So only as many
are taken as start at once, and a few more: `ahead` of each kind grows while all of them start at
once, and shrinks while they wait. What else waits stays in the journal.

Kinds, which are callers and what they ask, take turns.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from overlay.calls.request_log import unexpected
from overlay.calls.request_path import Accepted, Finished, RequestPath, size_of
from overlay.jobs import outcome
from overlay.jobs.journal import Journal
from overlay.jobs.parts import ChunkRoom, PartWriter
from overlay.jobs.store import JobStore
from overlay.model import clocks as time
from overlay.model.errors import OverlayError
from overlay.model.jobs import JobEnd, JobState, TakenJob, WorkProgress
from overlay.model.segments import AnswerRow, Caller, Code, Column, Executed, Slice
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines

MAX_RUNNING = 2048  # jobs taken and not ended
MAX_AHEAD = 64  # jobs of a kind taken and not started yet
REST_S = 1.0  # of a kind whose jobs are refused by the overlay; then twice as long, up to
LONGEST_REST_S = 15.0  # this
ENDS = 512  # the last ends of a kind, for its rate
RATE_S = 1.0  # at least so long is looked at
JOBS = Caller("", "jobs")


class JobRunner:
    """Runs on the journal's thread, except where it says so."""

    def __init__(
        self,
        path: RequestPath,
        queue: RequestQueue,
        deadlines: Deadlines,
        on_over: Callable[[Sequence[int]], None] = lambda numbers: None,
    ) -> None:
        """on_over: told the numbers of jobs that have ended or were forgotten."""
        self.journal: Journal  # set by the owner, before the first turn
        self.repeated = 0  # attempts begun again
        self.is_stopped = False
        self.on_deposed: Callable[[], object] = lambda: None
        self._rests = False  # some kinds do, as their jobs were refused
        self._path = path
        self._queue = queue
        self._deadlines = deadlines
        self._on_over = on_over
        self._max_bytes = path.limits.window_bytes
        self._bytes = 0  # of the payloads that run
        self._flow = queue.open_flow(JOBS)
        self._running: dict[int, tuple[_Run, int]] = {}  # by number; the row of its segment
        self._requests: dict[int, tuple[_Run, int]] = {}  # the same by request id
        self._kinds: dict[int, _Kind] = {}
        self._turn = 0  # the kind that had the last turn
        self._merging = ThreadPoolExecutor(1, "jobs-merge") if path.has_merges else None
        self._room = ChunkRoom()

    def stop(self) -> None:
        """No more are taken. Any thread."""
        self.is_stopped = True

    def close(self) -> None:
        if self._merging is not None:
            self._merging.shutdown(wait=False, cancel_futures=True)

    def wants(self, store: JobStore) -> bool:
        return bool(self._plan(store))

    def take(self, store: JobStore, now: float) -> Sequence[TakenJob]:
        taken: list[TakenJob] = []
        room, size = MAX_RUNNING - len(self._running), self._bytes
        for kind, count in self._plan(store):
            if room <= 0 or size >= self._max_bytes:
                break
            found = store.take(kind, min(count, room), self._max_bytes - size, now)
            if not found:  # nothing that was counted is there: not at every turn again
                self._kinds[kind].rests_until = time.monotonic() + REST_S
            room -= len(found)
            self._turn = kind
            size += sum(len(job.payload) for job in found)
            taken += found
        return taken

    def committed(self, taken: Sequence[TakenJob], over: Sequence[int]) -> None:
        if over:
            self._on_over(over)
        if not taken:
            return
        self._bytes += sum(len(job.payload) for job in taken)
        for jobs in _together(taken, self._path.limits.small_bytes):
            self._start(jobs)
        self._queue.kick()
        for kind in {job.kind for job in taken}:
            self._kinds[kind].adjust()

    def running(self) -> Collection[int]:
        return self._running.keys()

    def deposed(self) -> None:
        runs = {id(run): run for run, _ in self._running.values()}
        self._running.clear()
        self._requests.clear()
        self._kinds.clear()
        self._bytes = 0
        for run in runs.values():
            run.is_void = True
            if run.parts is not None:
                run.parts.drop()
            if run.accepted is not None and (queued := run.accepted.queued) is not None:
                queued.end(Code.CANCELLED, 0, len(run.jobs))
                self._deadlines.forget(queued, run.accepted.segment.deadline)
                run.accepted.queued = None
        self.on_deposed()

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ends the attempts at these, which are over in the journal."""
        for number in numbers:
            run, row = self._running.get(number, (None, 0))
            if run is not None and run.accepted is not None and run.accepted.queued is not None:
                run.accepted.queued.end(Code.CANCELLED, row, 1)

    def progressed(self, made: Sequence[WorkProgress]) -> None:
        for progress in made:
            if (found := self._requests.get(progress.request_id)) is not None:
                run, row = found
                run.progress[row] = progress

    def progress_of(self, number: int) -> WorkProgress | None:
        """How far a running job has got, if its handler says it."""
        run, row = self._running.get(number, (None, 0))
        return run.progress.get(row) if run is not None else None

    def hurry(self) -> None:
        """A worker may be back: what rests because it was refused is tried again. Any thread."""
        if self._rests:
            self._rests = False
            self.journal.record(self._wake_all)

    def _wake_all(self, store: JobStore, now: float) -> None:
        for kind in self._kinds.values():
            kind.rests_until = 0.0
        store.hurry()

    def wait_s(self, kind: int, position: int) -> float:
        """About how long until the job at this position starts; 0 if that is not known."""
        found = self._kinds.get(kind)
        return found.wait_s(position, time.monotonic()) if found else 0.0

    def _plan(self, store: JobStore) -> list[tuple[int, int]]:
        """Which kinds have a turn, and how many jobs of each may be taken."""
        if self.is_stopped or len(self._running) >= MAX_RUNNING or self._bytes >= self._max_bytes:
            return []
        now = time.monotonic()
        kinds = list(store.waiting)
        at = kinds.index(self._turn) + 1 if self._turn in store.waiting else 0
        found = []
        for kind in (*kinds[at:], *kinds[:at]):
            state = self._kinds.get(kind) or self._kinds.setdefault(kind, _Kind())
            if now >= state.rests_until and (count := state.room) > 0:
                found.append((kind, count))
        if len(self._kinds) > 2 * len(kinds) + 100:
            for kind in [k for k, s in self._kinds.items() if s.is_idle and k not in store.waiting]:
                del self._kinds[kind]
        return found

    def _start(self, jobs: Sequence[TakenJob]) -> None:
        """Puts jobs that go together into the queue, as one segment."""
        first = jobs[0]
        request = pb2.Request.FromString(first.request)
        if request.in_parts and len(jobs) > 1:
            for job in jobs:
                self._start([job])
            return
        kind = self._kinds.setdefault(first.kind, _Kind())
        run = _Run(jobs, kind, self._parts_of(first) if request.in_parts else None)
        self._running.update((job.number, (run, row)) for row, job in enumerate(jobs))
        self.repeated += len(jobs) if first.attempts > 1 else 0
        request.payload, request.attempt = first.payload, first.attempts - 1
        deadline = time.monotonic() + first.limit_s
        try:
            segment = codec.read_request(request, deadline, self._path.limits)
            self._path.check(segment.route)
        except OverlayError as e:  # the configuration has changed since it was accepted
            self._record(run, [e] * len(jobs), 0)
            return
        segment = segment.with_(payloads=Column([job.payload for job in jobs]))
        if run.parts is not None:
            segment = segment.with_(on_partial=partial(_part_arrived, run, run.parts), chunks=1)
        self._requests.update((id_, (run, row)) for row, id_ in enumerate(segment.all_ids))
        accepted = run.accepted = Accepted(segment, first.caller, request.want_parts)
        self._path.admit(accepted, partial(self._answered, run), first.priority, self._flow)
        if accepted.queued is not None and accepted.queued.is_open:
            kind.waiting.append(accepted.queued)
            self._deadlines.watch(accepted.queued, deadline)

    def _parts_of(self, job: TakenJob) -> PartWriter:
        journal, give_up = self.journal, partial(self.cancel, [job.number])
        return PartWriter(job.number, journal.record, lambda: journal.problem, self._room, give_up)

    # any thread

    def _answered(self, run: _Run, start: int, answers: Slice) -> None:
        """Must not block: a merge, which is the user's own code, has a thread of its own."""
        if self._merging is not None and run.parts is None:
            self._merging.submit(self._finish, run, start, answers)
        else:
            self._finish(run, start, answers)

    def _finish(self, run: _Run, start: int, answers: Slice) -> None:
        """Counts and logs them here and now, as the journal may write them twice, or never, if
        another leader has the jobs."""
        self._record(run, self._outcomes(run, start, answers), start)

    def _record(self, run: _Run, outcomes: Sequence[_Outcome], start: int) -> None:
        """outcomes: from row `start` on."""
        self.journal.record(lambda store, now: self._write_ends(run, outcomes, start, store, now))

    def _outcomes(self, run: _Run, start: int, answers: Slice) -> Sequence[_Outcome]:
        """What the answers make of these rows: a serialized Response, or an error."""
        accepted = run.accepted
        assert accepted is not None
        size = size_of(answers)
        if answers.count > 1 and size > self._path.limits.frame_bytes:
            # The bound for the answer of one request is not one for many.
            return [
                outcome
                for row in range(answers.count)
                for outcome in self._outcomes(run, start + row, answers.slice(row, 1))
            ]
        try:
            if run.parts is not None:
                return [self._outcome_in_parts(accepted, run.parts, answers)]
            finished = self._path.finish(accepted, start, answers, size)
            failures = dict(finished.failures)
            return [
                failures.get(row) or self._response(accepted, finished, start, row)
                for row in range(answers.count)
            ]
        except Exception as e:  # noqa: BLE001 - a bug of ours costs these jobs
            failed = unexpected(e, accepted.segment.first_id)
            failed.executed = Executed.UNKNOWN
            return [failed] * answers.count

    def _outcome_in_parts(self, accepted: Accepted, parts: PartWriter, answers: Slice) -> _Outcome:
        found = parts.finish(answers)
        good = [part for part in found.values() if part.ok]
        answered = (0,) if good else ()
        finished = self._path.finish(accepted, 0, answers, size_of(answers), answered=answered)
        if finished.failures:
            return finished.failures[0][1]
        in_order = aggregate.in_order(found, self._path.order)
        hops = dict.fromkeys(hop for part in in_order if part.ok for hop in part.hops)
        answer = AnswerRow(in_order, tuple(hops))
        if not good and (failed := aggregate.failure(answer, 0.0)) is not None:
            return failed
        written = codec.write_response(answer, accepted.segment.first_id, b"", with_results=False)
        return written.SerializeToString()

    def _response(self, accepted: Accepted, finished: Finished, start: int, row: int) -> bytes:
        return codec.write_response(
            finished.answers.at(row),
            accepted.segment.all_ids[start + row],
            finished.results[row],
            with_results=accepted.want_parts,
        ).SerializeToString()

    # the journal's thread again

    def _write_ends(
        self, run: _Run, outcomes: Sequence[_Outcome], start: int, store: JobStore, now: float
    ) -> None:
        if run.is_void:  # whoever has the jobs now has found them left running
            return
        monotonic = time.monotonic()
        for row, found in enumerate(outcomes, start):
            job = run.jobs[row]
            refusal = None if run.parts is None else run.parts.refusal
            end = self._end_of(job, refusal or found, store, now)
            was_running = store.end(job.number, end, now)  # else it was cancelled
            if self._running.pop(job.number, None) is None:
                continue  # written again, after a failed commit
            self._bytes -= len(job.payload)
            if was_running:
                self._rests |= run.kind.ended(end, monotonic)
            run.left -= 1
        accepted = run.accepted
        if run.left:
            return
        if run.parts is not None:
            run.parts.close()
        if accepted is None:
            return
        for id_ in accepted.segment.all_ids:
            self._requests.pop(id_, None)
        if accepted.queued is not None:
            self._deadlines.forget(accepted.queued, accepted.segment.deadline)
            accepted.queued = None  # it refers back to this run

    def _end_of(self, job: TakenJob, found: _Outcome, store: JobStore, now: float) -> JobEnd:
        if isinstance(found, bytes):
            return outcome.done(found)
        refusals = store.refusals_of(job.number)
        return outcome.after(found, job.attempts, job.max_attempts, refusals, now)


_Outcome = bytes | OverlayError


class _Run:
    """An attempt at jobs that go together. left: how many have not ended. progress: by row, as
    their handlers say it. is_void: another leader has had the jobs since. parts: of a job in parts,
    which is alone."""

    __slots__ = ("accepted", "is_void", "jobs", "kind", "left", "parts", "progress")

    def __init__(self, jobs: Sequence[TakenJob], kind: _Kind, parts: PartWriter | None) -> None:
        self.jobs = jobs
        self.kind = kind
        self.left = len(jobs)
        self.is_void = False
        self.progress: dict[int, WorkProgress] = {}
        self.accepted: Accepted | None = None
        self.parts = parts


def _part_arrived(run: _Run, parts: PartWriter, row: int, answers: Slice) -> None:
    """As OnPartial. Any thread."""
    queued = None if run.accepted is None else run.accepted.queued
    if queued is not None and any(column.chunk is not None for column in answers.parts):
        queued.is_read = True  # its time is the disk's, too
    parts.take(row, answers)


def _together(taken: Sequence[TakenJob], small: int) -> Iterable[Sequence[TakenJob]]:
    """Jobs that make one segment: neighbours that differ in nothing but small payloads."""

    def goes_with(job: TakenJob) -> object:
        alike = job.kind, job.limit_s, job.attempts, job.priority
        return alike if len(job.payload) <= small else job.number

    return [list(jobs) for _, jobs in itertools.groupby(taken, goes_with)]


class _Kind:
    """What a caller asks, and how its jobs fare."""

    __slots__ = ("_ends", "_rest_s", "ahead", "rests_until", "waiting")

    def __init__(self) -> None:
        self.ahead = 2
        self.waiting: list[QueuedSegment] = []  # in the queue
        self.rests_until = 0.0
        self._rest_s = REST_S
        self._ends: deque[float] = deque(maxlen=ENDS)

    @property
    def room(self) -> int:
        """How many more may be taken."""
        if self.waiting:
            self.waiting = [queued for queued in self.waiting if queued.unstarted.left]
        return self.ahead - sum(queued.unstarted.left for queued in self.waiting)

    @property
    def is_idle(self) -> bool:
        return self.room == self.ahead

    def adjust(self) -> None:
        """After some were started."""
        if self.room == self.ahead:
            self.ahead = min(MAX_AHEAD, self.ahead * 2)
        else:
            self.ahead = max(1, self.ahead // 2)

    def ended(self, end: JobEnd, now: float) -> bool:
        """Returns whether it rests now."""
        if end.state is JobState.WAITING and not end.counts:  # nobody to run it, or no room
            self.rests_until = now + self._rest_s
            self._rest_s = min(LONGEST_REST_S, self._rest_s * 2)
            return True
        self._rest_s = REST_S
        self._ends.append(now)
        return False

    def wait_s(self, position: int, now: float) -> float:
        if len(self._ends) < 2 or position <= 0:
            return 0.0
        # Many end at once where there are many slots, so the time since the last end counts too.
        took_s = max(now - self._ends[0], RATE_S)
        return position * took_s / len(self._ends)
