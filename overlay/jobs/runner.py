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
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from overlay.calls.request_log import unexpected
from overlay.calls.request_path import Accepted, RequestPath, size_of
from overlay.jobs import outcome
from overlay.jobs.journal import Journal
from overlay.jobs.store import JobStore
from overlay.model import clocks as time
from overlay.model.errors import OverlayError
from overlay.model.jobs import JobEnd, JobState, TakenJob
from overlay.model.segments import Caller, Code, Executed, Slice
from overlay.queueing.request_queue import RequestQueue
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines

log = logging.getLogger(__name__)

MAX_RUNNING = 2048  # jobs taken and not ended
MAX_AHEAD = 64  # jobs of a kind taken and not started yet
REST_S = 1.0  # of a kind whose jobs are refused by the overlay; then twice as long, up to
LONGEST_REST_S = 15.0  # this
ENDS = 32  # the last ends of a kind, for its rate
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
        self._rests = False  # some kinds do, as their jobs were refused
        self._path = path
        self._queue = queue
        self._deadlines = deadlines
        self._on_over = on_over
        self._max_bytes = path.limits.window_bytes
        self._bytes = 0  # of the payloads that run
        self._flow = queue.open_flow(JOBS)
        self._running: dict[int, _Run] = {}
        self._kinds: dict[int, _Kind] = {}
        self._turn = 0  # the kind that had the last turn
        self._merging = ThreadPoolExecutor(1, "jobs-merge") if path.has_merges else None

    def stop(self) -> None:
        """No more are taken. Any thread."""
        self.is_stopped = True

    def close(self) -> None:
        if self._merging is not None:
            self._merging.shutdown(wait=False, cancel_futures=True)

    def wants(self, store: JobStore) -> bool:
        return next(self._plan(store), None) is not None

    def take(self, store: JobStore, now: float) -> Sequence[TakenJob]:
        taken: list[TakenJob] = []
        room = MAX_RUNNING - len(self._running)
        for kind, count in list(self._plan(store)):
            if room <= 0 or self._bytes >= self._max_bytes:
                break
            found = store.take(kind, min(count, room), self._max_bytes - self._bytes, now)
            if not found:  # nothing that was counted is there: not at every turn again
                self._kinds[kind].rests_until = time.monotonic() + REST_S
            room -= len(found)
            self._turn = kind
            self._bytes += sum(len(job.payload) for job in found)
            taken += found
        return taken

    def committed(self, taken: Sequence[TakenJob], over: Sequence[int]) -> None:
        if over:
            self._on_over(over)
        for job in taken:
            self._start(job)
        if taken:
            self._queue.kick()
            for kind in {job.kind for job in taken}:
                self._kinds[kind].adjust()

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ends those that run."""
        for number in numbers:
            if (run := self._running.get(number)) is not None:
                run.is_cancelled = True
                if run.accepted is not None and run.accepted.queued is not None:
                    run.accepted.queued.end(Code.CANCELLED)

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

    def _plan(self, store: JobStore) -> itertools.chain[tuple[int, int]]:
        """Which kinds have a turn, and how many jobs of each may be taken."""
        if self.is_stopped or len(self._running) >= MAX_RUNNING or self._bytes >= self._max_bytes:
            return itertools.chain()
        now = time.monotonic()

        def turns(kinds: Sequence[int]) -> Sequence[tuple[int, int]]:
            found = []
            for kind in kinds:
                state = self._kinds.get(kind)
                if state is None:
                    state = self._kinds[kind] = _Kind()
                if now >= state.rests_until and (count := state.room) > 0:
                    found.append((kind, count))
            return found

        kinds = list(store.waiting)
        at = kinds.index(self._turn) + 1 if self._turn in store.waiting else 0
        if len(self._kinds) > 2 * len(kinds) + 100:
            for kind in [k for k, s in self._kinds.items() if s.is_idle and k not in store.waiting]:
                del self._kinds[kind]
        return itertools.chain(turns(kinds[at:]), turns(kinds[:at]))

    def _start(self, job: TakenJob) -> None:
        kind = self._kinds.setdefault(job.kind, _Kind())
        run = _Run(job, kind)
        self._running[job.number] = run
        self.repeated += job.attempts > 1
        request = pb2.Request.FromString(job.request)
        request.payload, request.attempt = job.payload, job.attempts - 1
        deadline = time.monotonic() + job.limit_s
        sink = partial(self._answered, run)
        try:
            segment = codec.read_request(request, deadline, self._path.limits)
            self._path.check(segment.route)
        except OverlayError as e:  # the configuration has changed since it was accepted
            self._record(run, e, b"")
            return
        accepted = run.accepted = Accepted(segment, job.caller, request.want_parts)
        self._path.admit(accepted, sink, job.priority, self._flow)
        if accepted.queued is not None and accepted.queued.is_open:
            kind.unstarted.append(run)
            self._deadlines.watch(accepted.queued, deadline)

    # any thread

    def _answered(self, run: _Run, start: int, answers: Slice) -> None:
        """Must not block: it only hands over."""
        if self._merging is not None:
            self._merging.submit(self._finish, run, answers)
        else:
            self.journal.record(lambda store, now: self._end(run, answers, store, now))

    def _finish(self, run: _Run, answers: Slice) -> None:
        self._decide(run, answers)
        self.journal.record(lambda store, now: self._end(run, answers, store, now))

    def _decide(self, run: _Run, answers: Slice) -> None:
        """What the answers make of the job, once: it is noted in the log and in the counters."""
        accepted = run.accepted
        if accepted is None or run.error is not None or run.answer:
            return
        if accepted.queued is not None:
            self._deadlines.forget(accepted.queued, accepted.segment.deadline)
        try:
            finished = self._path.finish(accepted, 0, answers, size_of(answers))
            if finished.failures:
                run.error = finished.failures[0][1]
                return
            run.answer = codec.write_response(
                finished.answers.at(0),
                accepted.segment.first_id,
                b"".join(finished.results),
                with_results=accepted.want_parts,
            ).SerializeToString()
        except Exception as e:  # noqa: BLE001 - a bug of ours costs one job
            run.error = unexpected(e, accepted.segment.first_id)
            run.error.executed = Executed.UNKNOWN

    # the journal's thread again

    def _end(self, run: _Run, answers: Slice, store: JobStore, now: float) -> None:
        self._decide(run, answers)
        self._write_end(run, store, now)

    def _record(self, run: _Run, error: OverlayError, answer: bytes) -> None:
        run.error, run.answer = error, answer
        self.journal.record(lambda store, now: self._write_end(run, store, now))

    def _write_end(self, run: _Run, store: JobStore, now: float) -> None:
        job, kind = run.job, run.kind
        end = self._end_of(run, store, now)
        store.end(job.number, end, now)
        if self._running.pop(job.number, None) is None:  # written again, after a failed commit
            return
        self._bytes -= len(job.payload)
        self._rests |= kind.ended(end, time.monotonic())

    def _end_of(self, run: _Run, store: JobStore, now: float) -> JobEnd:
        if run.error is None:
            return outcome.done(run.answer)
        if run.is_cancelled and run.error.code is Code.CANCELLED:
            return outcome.cancelled()
        job = run.job
        refusals = store.refusals_of(job.number)
        return outcome.after(run.error, job.attempts, job.max_attempts, refusals, now)


class _Run:
    """One attempt. error, answer: how it ended."""

    __slots__ = ("accepted", "answer", "error", "is_cancelled", "job", "kind")

    def __init__(self, job: TakenJob, kind: _Kind) -> None:
        self.job = job
        self.kind = kind
        self.accepted: Accepted | None = None
        self.error: OverlayError | None = None
        self.answer = b""
        self.is_cancelled = False

    @property
    def waits(self) -> bool:
        """Whether it is in the queue and has not started."""
        queued = self.accepted.queued if self.accepted else None
        return queued is not None and queued.is_open and queued.started(0) is None


class _Kind:
    """What a caller asks, and how its jobs fare."""

    __slots__ = ("_ends", "_rest_s", "ahead", "rests_until", "running", "unstarted")

    def __init__(self) -> None:
        self.ahead = 2
        self.unstarted: list[_Run] = []
        self.rests_until = 0.0
        self._rest_s = REST_S
        self._ends: deque[float] = deque(maxlen=ENDS)

    @property
    def room(self) -> int:
        """How many more may be taken."""
        if self.unstarted:
            self.unstarted = [run for run in self.unstarted if run.waits]
        return self.ahead - len(self.unstarted)

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
        rate = (len(self._ends) - 1) / max(1e-6, now - self._ends[0])
        return position / rate
