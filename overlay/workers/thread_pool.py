"""Handlers that wait: for files, networks, other programs. A thread ends only by itself.

While rows are quick one thread takes them all, one after the other, and their results leave in one
slice; a second one joins when they are not, or when the first seems stuck.
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
from overlay.model.segments import Failure
from overlay.model.topology import HandlerSpec
from overlay.observability.log_file import work_on
from overlay.transport.chunks import CHUNK_BYTES, ChunkWriter
from overlay.workers import typed
from overlay.workers.api import RECURSION, Context, Handler
from overlay.workers.job import HandlerJob, outcome_of, outcome_of_error, read_outcome

log = logging.getLogger(__name__)

QUICK_S = 0.0001  # a handler below this is not worth a second thread
STUCK_S = 0.001  # a quick handler that has not ended for so long gets company
FLUSH_S = 0.001  # results do not wait longer than this for those after them


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
        self._batches: deque[HandlerJob] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._working = 0
        self._minded = False
        self._closed = False
        self._progress = 0.0
        self._hands: set[_Thread] = set()  # at work on segments of several rows

    pids = ()  # its threads are in this process

    @property
    def active(self) -> int:
        return self._working

    def submit(self, batch: HandlerJob) -> None:
        with self._changed:
            self._batches.append(batch)
            self._call_up_locked()

    def end(self, batch: HandlerJob, start: int, count: int) -> None:
        """Nothing can be done from here: the handler sees context.cancelled."""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()
        self._close_loop()

    def _call_up_locked(self) -> None:
        """Gets a thread to look at the batches: to work, or to mind that those who do go on."""
        idle = self._threads - self._working - self._minded
        if idle > 0:
            self._changed.notify()
        elif self._threads <= self._slots and not self._minded:
            self._threads += 1
            name = f"handler-{self._name}-{self._threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (todo := self._next()) is not None:
            try:
                if isinstance(todo, HandlerJob):
                    self._work_on(todo)
                else:
                    for hand in todo:
                        hand.pass_on(is_at_work=True)
            except Exception:
                log.exception("handler %s: a batch was left", self._name)
            if isinstance(todo, HandlerJob):
                with self._changed:
                    self._working -= 1

    def _next(self) -> HandlerJob | list[_Thread] | None:
        """A batch to work on, or hands that are stuck with results in them."""
        with self._changed:
            while not self._closed:
                while self._batches and not self._batches[0].waiting:
                    self._batches.popleft()
                if self._batches and self._wants_one_more_locked():
                    self._working += 1
                    batch = self._batches[0]
                    # For what this thread leaves undone: other rows, results that nobody minds.
                    if len(self._batches) > 1 or batch.waiting > 1 or self._hands:
                        self._call_up_locked()
                    return batch
                if self._minded or not (self._batches or self._ready_locked(math.inf)):
                    self._changed.wait()
                    continue
                self._minded = True
                self._changed.wait(STUCK_S)
                self._minded = False
                if stuck := self._ready_locked(time.monotonic() - FLUSH_S):
                    return stuck
            return None

    def _ready_locked(self, before: float) -> list[_Thread]:
        """The hands with results that came before then."""
        return [hand for hand in self._hands if 0 < hand.ready_since <= before]

    def _wants_one_more_locked(self) -> bool:
        if self._working == 0 or self._working >= self._slots:
            return self._working == 0
        service_s = self._batches[0].desk.service_s
        quick = 0 < service_s < QUICK_S
        return not quick or time.monotonic() - self._progress > STUCK_S

    def _work_on(self, batch: HandlerJob) -> None:
        call, now, deadline = self._call, time.monotonic, batch.segment.deadline
        in_chunks, outlet = batch.in_chunks, None
        hand = _Thread(batch)
        self._progress = now()
        try:
            while (row := batch.begin_next()) is not None:
                payload = batch.segment.payloads.items[row]
                if in_chunks:
                    outlet = batch.outlet(row)
                outcome = _called(
                    self._name, call, payload, batch.context(row), self._most_bytes, outlet
                )
                ended = self._progress = now()
                if ended >= deadline:
                    outcome = batch.too_late()
                read_s = outlet.waited_s if outlet is not None else 0.0
                if hand.take(row, outcome, ended, read_s) and batch.waiting:
                    with self._changed:  # a minder passes it on, should the next row be stuck
                        self._hands.add(hand)
                        self._call_up_locked()
        finally:
            with self._changed:
                self._hands.discard(hand)
            hand.pass_on()


class _Thread:
    """Results of one thread that leave together, soon; taken by it, passed on by anyone."""

    def __init__(self, batch: HandlerJob) -> None:
        self.ready_since = 0.0  # when the oldest result came, 0 when there is none
        self._batch = batch
        self._lock = threading.Lock()
        self._outcomes: list[tuple[int, bytes | Failure]] = []
        self._began = self._ended = time.monotonic()
        self._read_s = 0.0  # of that time, for those who read: it is not the handler's

    def take(self, row: int, outcome: bytes | Failure, ended: float, read_s: float = 0.0) -> bool:
        """True when it is the first that waits; passes all on when the oldest waits too long."""
        if self.ready_since and ended - self._ended > FLUSH_S:
            self.pass_on(is_at_work=True)  # they were quick, and this one is not
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
        """is_at_work: its thread has been at the next row since the last one ended."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
            began, worked_s = self._began, max(0.0, self._ended - self._began - self._read_s)
            self.ready_since = self._read_s = 0.0
            if outcomes and is_at_work:
                self._began = self._ended
        if outcomes:
            self._batch.done(outcomes, worked_s, began)
        if outcomes and not is_at_work:
            self._began = time.monotonic()  # passing on is not the handler's time


def _called(
    name: str,
    call: Handler,
    payload: bytes,
    context: Context,
    most_bytes: int,
    outlet: ChunkWriter | None,
) -> bytes | Failure:
    most = most_bytes if outlet is None else CHUNK_BYTES
    work_on(context.request_id)
    try:
        result = call(payload, context)
        if type(result) is bytes and len(result) <= most and recursion_limit() == RECURSION:
            return result
        outcome = outcome_of(result, most_bytes, outlet.send if outlet else None)
    except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
        sys.setrecursionlimit(RECURSION)  # a low one would end what tells of the failure
        outcome = outcome_of_error(e)
    sys.setrecursionlimit(RECURSION)  # it is every thread's
    return read_outcome(name, *outcome, context.request_id)
