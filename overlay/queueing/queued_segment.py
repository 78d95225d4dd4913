"""One segment in a process, from its admission to its last answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from overlay.model.errors import NoTimeLeft, OverlayError
from overlay.model.pending import PendingRows, Run
from overlay.model.segments import (
    Cancel,
    Code,
    Executed,
    OnResult,
    Part,
    Route,
    Segment,
    Slice,
    end_overlap,
)
from overlay.queueing import admission
from overlay.queueing.fair_queue import Place
from overlay.queueing.flow import Flow
from overlay.queueing.service_time import ServiceClass

log = logging.getLogger(__name__)

Start = Callable[[Segment, Any, float, OnResult], Cancel]
"""(rows, their places, seconds waited, sink) -> how to cancel them."""


class Owner(Protocol):
    """What a queued segment needs of its queue."""

    me: str

    def withdraw(self, queued: QueuedSegment, start: int, count: int) -> list[Run]: ...
    def answered(
        self, queued: QueuedSegment, rows: int, answers: Slice, started: float | None
    ) -> None: ...
    def kick(self) -> None: ...


class QueuedSegment:
    """Thread-safe, except for what the request queue's lock guards.

    Exactly one answer to each row is passed on, even if a handler, a broken link and a cancel all
    answer it. Times are monotonic seconds.
    """

    def __init__(
        self,
        owner: Owner,
        segment: Segment,
        sink: OnResult,
        flow: Flow[QueuedSegment],
        service_class: ServiceClass,
        wants: Route,
        number: int,
        now: float,
        priority: int = 0,
    ):
        self.segment = segment
        self.route = segment.route
        self.wants = wants
        self.flow = flow
        self.service_class = service_class
        size_class = admission.size_class(segment.payloads.size // segment.count)
        self.estimator = service_class.estimator_of(size_class)
        self.priority = priority
        self.urgency = admission.urgency(now, priority)
        self.admitted = now
        self.number = number
        self.patient_until = (now + segment.deadline) / 2
        self.is_read = False  # in chunks, at its reader's pace: its time does not measure the work
        # Guarded by the queue's lock:
        self.unstarted = PendingRows(segment.count)
        self.blocked = False  # no place was free when its flow's turn came
        self.has_slot = False
        self.is_parked = False  # it waits for a place, so it is refused when it becomes hopeless
        self._owner = owner
        self._sink = sink
        self._lock = threading.Lock()
        self._open = PendingRows(segment.count)
        self._cancels: list[tuple[int, int, Cancel]] = []
        self._cancelled: list[tuple[Code, int, int]] = []
        self._starts: list[tuple[int, int, float]] = []  # (first row, rows, when they started)

    @property
    def is_open(self) -> bool:
        return self._open.left > 0

    def end(self, code: Code, start: int = 0, count: int | None = None) -> None:
        """Cancels the rows: those that wait never start, those that run are interrupted.

        Rows without an answer are answered with `code` immediately; later answers are dropped.
        """
        count = self.segment.count - start if count is None else count
        if not self._open.left:
            return
        self.refuse_runs(self._owner.withdraw(self, start, count), unstarted(self._owner.me, code))
        with self._lock:
            self._cancelled.append((code, start, count))
            cancels = list(self._cancels)
        for first, rows, cancel in cancels:
            end_overlap(cancel, first, rows, code, start, count)

    def refuse(self, error: OverlayError, start: int = 0) -> None:
        """Refuses the rows from `start` on that have not started."""
        runs = self._owner.withdraw(self, start, self.segment.count - start)
        self.refuse_runs(runs, refusal(self._owner.me, error))

    def refuse_runs(self, runs: list[Run], refused: Part) -> None:
        """Answers rows that have been withdrawn."""
        for first, rows in runs:
            self._settle(first, Slice(rows, (), refused=refused))

    def started(self, row: int) -> float | None:
        """When the row started; None if it has not."""
        for first, rows, started in list(self._starts):
            if first <= row < first + rows:
                return started
        return None

    def run(self, start: Start, first: int, place: Place, now: float) -> None:
        """Starts rows in these places. Outside the queue's lock."""
        count = place.count

        def sink(row: int, answers: Slice) -> None:
            self._settle(first + row, answers, now)
            self._owner.kick()

        rows = self.segment.slice(first, count)
        self._starts.append((first, count, now))
        try:
            cancel = start(rows, place, now - self.admitted, sink)
        except Exception as e:
            # Our own bug costs these rows but no place; whether a handler saw them is unknown.
            log.exception("requests could not be started")
            reason = f"could not be started: {type(e).__name__}"
            sink(0, Slice(count, (), refused=Part(self._owner.me, Code.INTERNAL, reason)))
            return
        with self._lock:
            if self._open.left:
                self._cancels.append((first, count, cancel))
            cancelled = list(self._cancelled)
        for code, begin, size in cancelled:  # between the claim and now
            end_overlap(cancel, first, count, code, begin, size)

    def _settle(self, start: int, answers: Slice, started: float | None = None) -> None:
        """Passes on answers to rows without one. This alone ensures one answer per row."""
        with self._lock:
            runs = self._open.take(start, answers.count)
            if not self._open.left:
                self._cancels.clear()  # a reference cycle, for the garbage collector otherwise
        if runs:
            self._owner.answered(self, sum(rows for _, rows in runs), answers, started)
        for first, rows in runs:
            self._sink(first, answers.slice(first - start, rows))


def refusal(me: str, error: OverlayError) -> Part:
    """The answer to rows that `me` refused with this error."""
    return Part(
        me,
        error.code,
        str(error),
        executed=error.executed,
        retry_after_s=error.retry_after_s,
        cause=error.cause,
    )


def unstarted(me: str, code: Code) -> Part:
    """The answer to rows that were cancelled before they started."""
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        return refusal(me, NoTimeLeft(reason))
    return Part(me, code, "the caller left while the request waited", executed=Executed.NO)
