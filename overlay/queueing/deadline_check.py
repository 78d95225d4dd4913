"""Whether what waits can be answered before its deadline, as recent service times say. Sans-IO.

The request queue asks under its lock: when a request finds no place, and when its turn comes.
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
        """return_margin_s: what the processes below keep of a request's time for its way back."""
        self._order = order
        self._return_margin_s = return_margin_s

    def check(self, queued: QueuedSegment, before: int = -1) -> None:
        """Raises NoTimeLeft when it cannot be answered in time.

        before: how many rows of its line are before it, beyond those in the line: -1 for one that
        is the last of them.
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
        """Of streamed segments that found no place: (segment, its first row that is too late, why).

        fresh: in the order in which they came. What is yielded may be withdrawn at once.
        """
        after: Counter[tuple[object, ...]] = Counter()  # rows of a line from the one checked on
        for queued in fresh:
            after[_line(queued)] += queued.unstarted.left
        for queued in fresh:
            line = _line(queued)
            first_late, why = self._first_late(queued, after[line])
            after[line] -= queued.unstarted.left
            if why is not None:
                yield queued, first_late, why

    def is_hopeless(self, queued: QueuedSegment, now: float) -> bool:
        """Whether its place is of more use to another that waits for it too."""
        if queued.service_class.waiting <= queued.unstarted.left:
            return False  # no other would have the place
        return queued.estimator.is_too_little(now, self._left_s(queued, now))

    def _first_late(self, queued: QueuedSegment, after: int) -> tuple[int, NoTimeLeft | None]:
        """The first row that cannot be answered in time, and why; or all rows and None.

        after: how many rows its line has from its first one on. It takes proof to refuse any, since
        thousands may come at once: some of its class have completed recently.
        """
        rows, service_class, now = queued.segment.count, queued.service_class, queued.admitted
        if not queued.is_parked or not service_class.estimator.is_proven(now):
            return rows, None
        first, _ = queued.unstarted.first_run() or (0, 0)
        if self._needs(queued, -after)[0] <= 0:
            return rows, None
        share = admission.share_of_time(now - service_class.refused_at)
        most_s = share * self._left_s(queued, now)

        def is_late(row: int) -> bool:
            return self._needs(queued, row - first - after)[1] > most_s

        try:
            self.check(queued, rows - 1 - first - after)
        except NoTimeLeft as e:
            return first + bisect.bisect_left(range(first, rows - 1), True, key=is_late), e
        return rows, None

    def _needs(self, queued: QueuedSegment, before: int) -> tuple[int, float]:
        """How many start before it, and how long its answer takes. before: see `check`."""
        service_class, now = queued.service_class, queued.admitted
        ahead = self._order.ahead_of(queued.flow, service_class, queued.priority, before)
        estimator = service_class.estimator
        concurrency = max(service_class.active, estimator.concurrency)
        mean_s, likely_s = estimator.mean_s(now), queued.estimator.likely_s(now)
        return ahead, admission.answer_s(ahead, concurrency, mean_s, likely_s)

    def _left_s(self, queued: QueuedSegment, now: float) -> float:
        """What a worker gets of its time, about."""
        left_s = queued.segment.deadline - now
        return left_s - min(self._return_margin_s, left_s / 2)


def _line(queued: QueuedSegment) -> tuple[object, ...]:
    return queued.flow, queued.service_class, queued.priority
