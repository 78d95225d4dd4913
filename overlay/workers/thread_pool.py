"""Runs handlers on threads, for functions that wait for files, networks or other programs.

While rows are quick, one thread runs them all in sequence, and their results leave in one slice.
More threads join if rows are slow, or if a thread seems stuck. A thread cannot be killed.
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
from overlay.workers.api import RECURSION_LIMIT, Context, Handler
from overlay.workers.job import HandlerJob, outcome_of, outcome_of_error, read_outcome

log = logging.getLogger(__name__)

QUICK_S = 0.0001  # a handler that takes less is not worth a second thread
STUCK_S = 0.001  # if a quick handler runs this long, a second thread joins
FLUSH_S = 0.001  # the longest that a result waits for later ones


class ThreadRunner:
    """Owns threads "handler-NAME-n", started on demand, which end after `close`.

    Up to `slots` of them run rows, and one may watch for stuck rows.
    """

    def __init__(
        self, spec: HandlerSpec, slots: int, max_bytes: int = Limits.max_message_bytes
    ) -> None:
        self._name = spec.name
        self._max_bytes = max_bytes
        self._slots = slots
        loaded = typed.load(spec)
        self.function = loaded.function
        self._call, self._close_loop = loaded.call, loaded.close
        self._jobs: deque[HandlerJob] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._working = 0
        self._has_watcher = False
        self._closed = False
        self._progress = 0.0
        self._buffers: set[_ResultBuffer] = set()  # of threads at work on several rows

    pids = ()  # its threads are in this process

    @property
    def active(self) -> int:
        return self._working

    def submit(self, job: HandlerJob) -> None:
        with self._changed:
            self._jobs.append(job)
            self._wake_thread_locked()

    def may_run_here(self, job: HandlerJob) -> bool:
        """Whether it is a single row that waits for nothing and is known to be quick."""
        is_quick = 0 < job.slots.service_s < QUICK_S
        return is_quick and job.waiting == 1 and not (self._working or self._jobs or job.in_chunks)

    def run_here(self, job: HandlerJob) -> None:
        """Runs the job on the calling thread, unless another one is at work by now."""
        with self._changed:
            is_free = not (self._working or self._jobs or self._closed)
            self._working += is_free
        if not is_free:
            self.submit(job)
            return
        try:
            self._work_on(job)
        finally:
            set_request(0)  # the thread goes on with work of its own
            with self._changed:
                self._working -= 1
                if self._jobs:
                    self._changed.notify_all()  # whoever waited for this thread to get stuck

    def end(self, job: HandlerJob, start: int, count: int) -> None:
        """Does nothing: the handler sees context.cancelled."""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._close_loop()

    def _wake_thread_locked(self) -> None:
        """Wakes or starts a thread, to run rows or to watch for stuck ones."""
        idle = self._threads - self._working - self._has_watcher
        if idle > 0:
            self._changed.notify()
        elif self._threads <= self._slots and not self._has_watcher:
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
                        results.flush(is_at_work=True)
            except Exception:
                log.exception("handler %s: a job was abandoned", self._name)
            if isinstance(todo, HandlerJob):
                with self._changed:
                    self._working -= 1

    def _next(self) -> HandlerJob | list[_ResultBuffer] | None:
        """A job to run, or the buffers of threads that are stuck in their next row."""
        with self._changed:
            while not self._closed:
                while self._jobs and not self._jobs[0].waiting:
                    self._jobs.popleft()
                if self._jobs and self._needs_thread_locked():
                    self._working += 1
                    job = self._jobs[0]
                    # For work that this thread cannot do meanwhile: other rows, stuck results.
                    if len(self._jobs) > 1 or job.waiting > 1 or self._buffers:
                        self._wake_thread_locked()
                    return job
                if self._has_watcher or not (self._jobs or self._ready_locked(math.inf)):
                    self._changed.wait()
                    continue
                self._has_watcher = True
                self._changed.wait(STUCK_S)
                self._has_watcher = False
                if stuck := self._ready_locked(time.monotonic() - FLUSH_S):
                    return stuck
            return None

    def _ready_locked(self, before: float) -> list[_ResultBuffer]:
        """The buffers with results older than that."""
        return [buffer for buffer in self._buffers if 0 < buffer.ready_since <= before]

    def _needs_thread_locked(self) -> bool:
        if self._working == 0 or self._working >= self._slots:
            return self._working == 0
        service_s = self._jobs[0].slots.service_s
        quick = 0 < service_s < QUICK_S
        return not quick or time.monotonic() - self._progress > STUCK_S

    def _work_on(self, job: HandlerJob) -> None:
        call, now, deadline = self._call, time.monotonic, job.segment.deadline
        in_chunks, writer = job.in_chunks, None
        results = _ResultBuffer(job)
        self._progress = now()
        try:
            while (row := job.begin_next()) is not None:
                payload = job.segment.payloads.items[row]
                if in_chunks:
                    writer = job.writer_of(row)
                outcome = _called(
                    self._name, call, payload, job.context(row), self._max_bytes, writer
                )
                ended = self._progress = now()
                if ended >= deadline:
                    outcome = job.too_late()
                read_s = writer.waited_s if writer is not None else 0.0
                if results.add(row, outcome, ended, read_s) and job.waiting:
                    with self._changed:  # another thread flushes it if the next row is stuck
                        self._buffers.add(results)
                        self._wake_thread_locked()
        finally:
            with self._changed:
                self._buffers.discard(results)
            results.flush()


class _ResultBuffer:
    """Results of one thread that leave together soon; any thread may flush it."""

    def __init__(self, job: HandlerJob) -> None:
        self.ready_since = 0.0  # when the oldest result was added; 0 if there is none
        self._job = job
        self._lock = threading.Lock()
        self._outcomes: list[tuple[int, bytes | Detail]] = []
        self._began = self._ended = time.monotonic()
        self._read_s = 0.0  # of that time, spent waiting for readers of chunks

    def add(self, row: int, outcome: bytes | Detail, ended: float, read_s: float = 0.0) -> bool:
        """Returns whether it is the first one waiting. Flushes if the oldest is too old."""
        if self.ready_since and ended - self._ended > FLUSH_S:
            self.flush(is_at_work=True)  # separately: those were quick, and this one was not
        with self._lock:
            self._outcomes.append((row, outcome))
            self._read_s += read_s
            self._ended = ended
            first = not self.ready_since
            self.ready_since = self.ready_since or ended
        if ended - self.ready_since > FLUSH_S or ended - self._began > FLUSH_S:
            self.flush()
            return False
        return first

    def flush(self, is_at_work: bool = False) -> None:
        """is_at_work: its thread started the next row as soon as the last one had ended."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
            began, worked_s = self._began, max(0.0, self._ended - self._began - self._read_s)
            self.ready_since = self._read_s = 0.0
            if outcomes and is_at_work:
                self._began = self._ended
        if outcomes:
            self._job.done(outcomes, worked_s, began)
        if outcomes and not is_at_work:
            self._began = time.monotonic()  # the flush does not count as the handler's time


def _called(
    name: str,
    call: Handler,
    payload: bytes,
    context: Context,
    max_bytes: int,
    writer: ChunkWriter | None,
) -> bytes | Detail:
    most = max_bytes if writer is None else CHUNK_BYTES
    set_request(context.request_id)
    try:
        result = call(payload, context)
        if type(result) is bytes and len(result) <= most and recursion_limit() == RECURSION_LIMIT:
            return result
        outcome = outcome_of(result, max_bytes, writer.send if writer else None)
    except BaseException as e:  # noqa: BLE001 - even SystemExit fails only one request
        sys.setrecursionlimit(RECURSION_LIMIT)  # a low one would break the error report
        outcome = outcome_of_error(e)
    sys.setrecursionlimit(RECURSION_LIMIT)  # all threads share it
    return read_outcome(name, *outcome, context.request_id)
