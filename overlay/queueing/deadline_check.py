"""Whether requests can be answered before their deadlines, by recent service times. Sans-IO.

The request queue checks under its lock: when a request finds no place, and when its turn comes.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterator

from overlay.model.errors import NoTimeLeft
from overlay.queueing import admission
from overlay.queueing.fair_queue import FairQueue
from overlay.queueing.queued_segment import QueuedSegment


class DeadlineCheck:
    """Over one fair queue. Times are monotonic seconds."""

    def __init__(self, order: FairQueue[QueuedSegment], return_margin_s: float) -> None:
        """return_margin_s: how much of a request's time is reserved for its return path."""
        self._order = order
        self._return_margin_s = return_margin_s

    def check(self, queued: QueuedSegment, before: int = -1) -> None:
        """Raises NoTimeLeft when it cannot be answered in time.

        before: how many rows of its FIFO are before it, in addition to those that wait there; -1
        for the last of these.
        """
        service_class, now = queued.service_class, queued.admitted
        share = admission.share_of_time(now - service_class.refused_at)
        try:
            ahead, needs_s = self._needs(queued, before)
            admission.check_time(self._left_s(queued, now), ahead, needs_s, share)
        except NoTimeLeft:
            service_class.refused_at = now
            raise

    def late_rows(
        self, fresh: Collection[QueuedSegment]
    ) -> Iterator[tuple[QueuedSegment, int, NoTimeLeft]]:
        """The rows of streamed segments that are too late, as (segment, its first such row, why).

        fresh: segments that found no place, in order of arrival. The caller may withdraw what is
        yielded before it goes on.
        """
        after: Counter[tuple[object, ...]] = Counter()  # rows of a FIFO, from the one checked on
        for queued in fresh:
            after[_fifo(queued)] += queued.unstarted.left
        for queued in fresh:
            fifo = _fifo(queued)
            first_late, why = self._first_late(queued, after[fifo])
            after[fifo] -= queued.unstarted.left
            if why is not None:
                yield queued, first_late, why

    def is_hopeless(self, queued: QueuedSegment, now: float) -> bool:
        """Whether it has too little time left, while another request waits for its place."""
        if queued.service_class.waiting <= queued.unstarted.left:
            return False  # no other request wants the place
        return queued.estimator.is_too_short(now, self._left_s(queued, now))

    def _first_late(self, queued: QueuedSegment, after: int) -> tuple[int, NoTimeLeft | None]:
        """The first row that cannot be answered in time, and why; or all rows and None.

        after: how many rows its FIFO has from its own first row on. Refuses none without reliable
        service times, since thousands may arrive at once.
        """
        rows, service_class, now = queued.segment.count, queued.service_class, queued.admitted
        if not queued.is_parked or not service_class.estimator.is_reliable(now):
            return rows, None
        first, _ = queued.unstarted.first_run() or (0, 0)
        if self._needs(queued, -after)[0] <= 0:
            return rows, None
        share = admission.share_of_time(now - service_class.refused_at)
        limit_s = share * self._left_s(queued, now)

        def is_late(row: int) -> bool:
            return self._needs(queued, row - first - after)[1] > limit_s

        try:
            self.check(queued, rows - 1 - first - after)
        except NoTimeLeft as e:
            return first + bisect.bisect_left(range(first, rows - 1), True, key=is_late), e
        return rows, None

    def _needs(self, queued: QueuedSegment, before: int) -> tuple[int, float]:
        """How many rows start before it, and how long its answer takes. before: as in `check`."""
        service_class, now = queued.service_class, queued.admitted
        ahead = self._order.ahead_of(queued.flow, service_class, queued.priority, before)
        estimator = service_class.estimator
        concurrency = max(service_class.active, estimator.concurrency)
        mean_s, likely_s = estimator.mean_s(now), queued.estimator.likely_s(now)
        return ahead, admission.answer_s(ahead, concurrency, mean_s, likely_s)

    def _left_s(self, queued: QueuedSegment, now: float) -> float:
        """About how much of its time a worker gets."""
        left_s = queued.segment.deadline - now
        return left_s - min(self._return_margin_s, left_s / 2)


def _fifo(queued: QueuedSegment) -> tuple[object, ...]:
    return queued.flow, queued.service_class, queued.priority
