"""Runs handlers on threads: those that wait for files, networks, other programs.

While rows are quick, one thread runs them all, one after the other, and their results leave in one
slice. A second thread joins when they are not, or when the first seems stuck. A thread cannot be
ended from outside.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections import deque
from sys import getrecursionlimit as recursion_limit

from overlay.model import clocks as time
from overlay.model.limits import Limits
from overlay.model.segments import Detail
from overlay.model.topology import HandlerSpec
from overlay.observability.log_file import set_request
from overlay.transport.chunks import CHUNK_BYTES, ChunkWriter
from overlay.workers import typed
from overlay.workers.api import RECURSION, Context, Handler
from overlay.workers.job import HandlerJob, outcome_of, outcome_of_error, read_outcome

log = logging.getLogger(__name__)

QUICK_S = 0.0001  # a handler that takes less is not worth a second thread
STUCK_S = 0.001  # a quick handler that has not ended for so long gets a second thread
FLUSH_S = 0.001  # the longest that a result waits for those after it


class ThreadRunner:
    """Owns up to `slots` threads, "handler-NAME-n", made when needed; they end after `close`."""

    def __init__(
        self, spec: HandlerSpec, slots: int, most_bytes: int = Limits.max_message_bytes
    ) -> None:
        self._name = spec.name
        self._most_bytes = most_bytes
        self._slots = slots
        loaded = typed.load(spec)
        self.function = loaded.function
        self._call, self._close_loop = loaded.call, loaded.close
        self._jobs: deque[HandlerJob] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._working = 0
        self._watched = False
        self._closed = False
        self._progress = 0.0
        self._collecting: set[_Results] = set()  # of threads at work on several rows

    pids = ()  # its threads are in this process

    @property
    def active(self) -> int:
        return self._working

    def submit(self, job: HandlerJob) -> None:
        with self._changed:
            self._jobs.append(job)
            self._call_up_locked()

    def end(self, job: HandlerJob, start: int, count: int) -> None:
        """Does nothing: the handler sees context.cancelled."""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._close_loop()

    def _call_up_locked(self) -> None:
        """Gets a thread to look at the jobs: to work, or to watch those at work."""
        idle = self._threads - self._working - self._watched
        if idle > 0:
            self._changed.notify()
        elif self._threads <= self._slots and not self._watched:
            self._threads += 1
            name = f"handler-{self._name}-{self._threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (todo := self._next()) is not None:
            try:
                if isinstance(todo, HandlerJob):
                    self._work_on(todo)
                else:
                    for results in todo:
                        results.pass_on(is_at_work=True)
            except Exception:
                log.exception("handler %s: a job was abandoned", self._name)
            if isinstance(todo, HandlerJob):
                with self._changed:
                    self._working -= 1

    def _next(self) -> HandlerJob | list[_Results] | None:
        """A job to work on, or results whose thread is stuck in the next row."""
        with self._changed:
            while not self._closed:
                while self._jobs and not self._jobs[0].waiting:
                    self._jobs.popleft()
                if self._jobs and self._wants_one_more_locked():
                    self._working += 1
                    job = self._jobs[0]
                    # For what this thread cannot do meanwhile: other rows, watching over results.
                    if len(self._jobs) > 1 or job.waiting > 1 or self._collecting:
                        self._call_up_locked()
                    return job
                if self._watched or not (self._jobs or self._ready_locked(math.inf)):
                    self._changed.wait()
                    continue
                self._watched = True
                self._changed.wait(STUCK_S)
                self._watched = False
                if stuck := self._ready_locked(time.monotonic() - FLUSH_S):
                    return stuck
            return None

    def _ready_locked(self, before: float) -> list[_Results]:
        """Those that hold results from before then."""
        return [held for held in self._collecting if 0 < held.ready_since <= before]

    def _wants_one_more_locked(self) -> bool:
        if self._working == 0 or self._working >= self._slots:
            return self._working == 0
        service_s = self._jobs[0].slots.service_s
        quick = 0 < service_s < QUICK_S
        return not quick or time.monotonic() - self._progress > STUCK_S

    def _work_on(self, job: HandlerJob) -> None:
        call, now, deadline = self._call, time.monotonic, job.segment.deadline
        in_chunks, writer = job.in_chunks, None
        results = _Results(job)
        self._progress = now()
        try:
            while (row := job.begin_next()) is not None:
                payload = job.segment.payloads.items[row]
                if in_chunks:
                    writer = job.writer_of(row)
                outcome = _called(
                    self._name, call, payload, job.context(row), self._most_bytes, writer
                )
                ended = self._progress = now()
                if ended >= deadline:
                    outcome = job.too_late()
                read_s = writer.waited_s if writer is not None else 0.0
                if results.take(row, outcome, ended, read_s) and job.waiting:
                    with self._changed:  # another thread passes them on if the next row is stuck
                        self._collecting.add(results)
                        self._call_up_locked()
        finally:
            with self._changed:
                self._collecting.discard(results)
            results.pass_on()


class _Results:
    """Results of one thread that leave together soon; any thread may pass them on."""

    def __init__(self, job: HandlerJob) -> None:
        self.ready_since = 0.0  # when the oldest result came; 0 when there is none
        self._job = job
        self._lock = threading.Lock()
        self._outcomes: list[tuple[int, bytes | Detail]] = []
        self._began = self._ended = time.monotonic()
        self._read_s = 0.0  # of that time, spent waiting for readers of chunks: not the handler's

    def take(self, row: int, outcome: bytes | Detail, ended: float, read_s: float = 0.0) -> bool:
        """True when it is the first one waiting. Passes all on when the oldest is too old."""
        if self.ready_since and ended - self._ended > FLUSH_S:
            self.pass_on(is_at_work=True)  # those were quick, and this one is not
        with self._lock:
            self._outcomes.append((row, outcome))
            self._read_s += read_s
            self._ended = ended
            first = not self.ready_since
            self.ready_since = self.ready_since or ended
        if ended - self.ready_since > FLUSH_S or ended - self._began > FLUSH_S:
            self.pass_on()
            return False
        return first

    def pass_on(self, is_at_work: bool = False) -> None:
        """is_at_work: its thread began its next row as soon as the last one had ended."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
            began, worked_s = self._began, max(0.0, self._ended - self._began - self._read_s)
            self.ready_since = self._read_s = 0.0
            if outcomes and is_at_work:
                self._began = self._ended
        if outcomes:
            self._job.done(outcomes, worked_s, began)
        if outcomes and not is_at_work:
            self._began = time.monotonic()  # passing on is not the handler's time


def _called(
    name: str,
    call: Handler,
    payload: bytes,
    context: Context,
    most_bytes: int,
    writer: ChunkWriter | None,
) -> bytes | Detail:
    most = most_bytes if writer is None else CHUNK_BYTES
    set_request(context.request_id)
    try:
        result = call(payload, context)
        if type(result) is bytes and len(result) <= most and recursion_limit() == RECURSION:
            return result
        outcome = outcome_of(result, most_bytes, writer.send if writer else None)
    except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
        sys.setrecursionlimit(RECURSION)  # a low one would break the report of the failure
        outcome = outcome_of_error(e)
    sys.setrecursionlimit(RECURSION)  # all threads share it
    return read_outcome(name, *outcome, context.request_id)
