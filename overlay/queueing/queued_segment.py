"""One segment's stay in a process, from its admission to its last answer."""

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
"""(rows, their places, seconds waited, sink) -> how to end them."""


class Owner(Protocol):
    """What a queued segment needs of its queue."""

    me: str

    def withdraw(self, queued: QueuedSegment, start: int, count: int) -> list[Run]: ...
    def answered(
        self, queued: QueuedSegment, rows: int, answers: Slice, started: float | None
    ) -> None: ...
    def kick(self) -> None: ...


class QueuedSegment:
    """Safe from any thread, but for what the request queue's lock guards.

    Of each row exactly one answer is passed on, whatever comes how often: of a handler, of a link
    that broke, of a cancel. Times are monotonic seconds.
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
        self.is_read = False  # in chunks: so its time is its reader's, and no measure of its work
        # Guarded by the queue's lock:
        self.unstarted = PendingRows(segment.count)
        self.found_none = False  # no place was free when it was its flow's turn
        self.has_slot = False
        self.is_parked = False  # it had to wait for a place: so its time is the queue's to judge
        self._owner = owner
        self._sink = sink
        self._lock = threading.Lock()
        self._open = PendingRows(segment.count)
        self._ends: list[tuple[int, int, Cancel]] = []
        self._ended: list[tuple[Code, int, int]] = []
        self._starts: list[tuple[int, int, float]] = []  # (first row, rows, when they started)

    @property
    def is_open(self) -> bool:
        return self._open.left > 0

    def end(self, code: Code, start: int = 0, count: int | None = None) -> None:
        """Ends the rows: those that wait never start, those that run are cut short.

        What is open of them is answered with `code` at once. Later answers are dropped.
        """
        count = self.segment.count - start if count is None else count
        if not self._open.left:
            return
        self.refuse_runs(self._owner.withdraw(self, start, count), unstarted(self._owner.me, code))
        with self._lock:
            self._ended.append((code, start, count))
            ends = list(self._ends)
        for first, rows, end in ends:
            end_overlap(end, first, rows, code, start, count)

    def refuse(self, error: OverlayError, start: int = 0) -> None:
        """Answers every row from `start` that has not started with this refusal."""
        runs = self._owner.withdraw(self, start, self.segment.count - start)
        self.refuse_runs(runs, refusal(self._owner.me, error))

    def refuse_runs(self, runs: list[Run], refused: Part) -> None:
        """Answers rows that have been withdrawn."""
        for first, rows in runs:
            self._settle(first, Slice(rows, (), refused=refused))

    def started(self, row: int) -> float | None:
        """When the row started; None when it never did."""
        for first, rows, started in list(self._starts):
            if first <= row < first + rows:
                return started
        return None

    def run(self, start: Start, first: int, place: Place, now: float) -> None:
        """Starts the rows that have these places. Outside the queue's lock."""
        count = place.count

        def sink(row: int, answers: Slice) -> None:
            self._settle(first + row, answers, now)
            self._owner.kick()

        rows = self.segment.slice(first, count)
        self._starts.append((first, count, now))
        try:
            end = start(rows, place, now - self.admitted, sink)
        except Exception as e:
            # A fault of ours costs these rows and no place; whether some ran is not known.
            log.exception("requests could not be started")
            reason = f"could not be started: {type(e).__name__}"
            sink(0, Slice(count, (), refused=Part(self._owner.me, Code.INTERNAL, reason)))
            return
        with self._lock:
            if self._open.left:
                self._ends.append((first, count, end))
            ended = list(self._ended)
        for code, begin, size in ended:  # ended between its claim and now
            end_overlap(end, first, count, code, begin, size)

    def _settle(self, start: int, answers: Slice, started: float | None = None) -> None:
        """Passes on the rows that are still open. The one place where each is answered once."""
        with self._lock:
            runs = self._open.take(start, answers.count)
            if not self._open.left:
                self._ends.clear()  # they lead back here, and would wait for the garbage collector
        if runs:
            self._owner.answered(self, sum(rows for _, rows in runs), answers, started)
        for first, rows in runs:
            self._sink(first, answers.slice(first - start, rows))


def refusal(me: str, error: OverlayError) -> Part:
    """What the callers of rows get that `me` refused with this."""
    return Part(
        me,
        error.code,
        str(error),
        executed=error.executed,
        retry_after_s=error.retry_after_s,
        cause=error.cause,
    )


def unstarted(me: str, code: Code) -> Part:
    """What the callers of rows get that were ended before they started."""
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        return refusal(me, NoTimeLeft(reason))
    return Part(me, code, "the caller left while the request waited", executed=Executed.NO)
