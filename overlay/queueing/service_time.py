"""How long requests of one kind take: recent service times, and what one more can expect.

Sans-IO: the caller passes the time in, as monotonic seconds. Not safe from several threads; the
request queue's lock guards it.
"""

from __future__ import annotations

import math
from collections import deque

RECENT_S = 10.0  # an older figure (or one thrice its own time ago) no longer counts
RECENT = 32  # completions that are remembered
ERA_S = 1.0  # with nothing waiting, and what was learnt of a class is forgotten when it fills again
PROOF = 8  # completions without which no single request is judged; the first may be slower
# The upper bound of what most take is at most this many times what the quick ones took; otherwise
# it is a mix of quick and long work, and which comes next is unknown. Exponential times stay about
# there by chance alone: at ten times the load, with the least times instead, a quarter of the work
# came too late.
OF_QUICK = 8.0
ODD = 16  # one in so many that seem to have too little time is tried all the same


class ServiceTimeEstimator:
    """How long recent requests were in service, and how many at a time.

    Only requests that a handler answered are recorded as completed.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when one completed
        self._took: deque[float] = deque(maxlen=RECENT)
        self._lost: deque[float] = deque(maxlen=PROOF)  # since the last that was answered
        self._tried = 0
        self._least_s = math.inf
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._concurrency = 0.0

    def completed(self, now: float, took_s: float, concurrency: int = 1) -> None:
        """concurrency: how many were in service, with this one."""
        self._forget_old(now)
        took = self._took
        is_least_gone = len(took) == RECENT and took[0] <= self._least_s
        took.append(took_s)
        self._lost.clear()
        self._least_s = min(took) if is_least_gone else min(self._least_s, took_s)
        # A mean over 16 wavers so much that a queue as long as its least value allows is left with
        # too little time: at ten times the load a fifth of the work came too late.
        share = 1 / len(took)
        self._mean_s += (took_s - self._mean_s) * share
        self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) * share
        self._concurrency += (concurrency - self._concurrency) * share
        self.last = now

    def lost(self, now: float, took_s: float) -> None:
        """One was in service for so long without an answer, until its deadline."""
        self._forget_old(now)
        self._lost.append(took_s)

    def mean_s(self, now: float) -> float:
        """0 when it is not known."""
        self._forget_old(now)
        return self._mean_s

    def likely_s(self, now: float) -> float:
        """What one more takes if it is lucky; 0 when it is not known.

        Where times are alike, what few exceed; of a mix, a few times what the quick ones take,
        since it may be one of these.
        """
        # As TCP computes its retransmission timeout. With the mean alone, under overload 7 % of
        # the work came too late where times differ by a tenth.
        if not self.is_proven(now):
            return 0.0
        quick_s = sorted(self._took)[len(self._took) // 10]
        return min(self._mean_s + 4 * self._deviation_s, OF_QUICK * quick_s)

    def least_s(self, now: float) -> float:
        """What even the quickest took; 0 when it is not known.

        Where none was answered recently, twice the time that was too little for each: otherwise a
        queue whose first requests have always waited too long never learns how long they take.
        """
        least_s = self._least_s if self.is_proven(now) else 0.0
        return max(least_s, 2 * min(self._lost)) if len(self._lost) == PROOF else least_s

    def is_too_little(self, now: float, left_s: float) -> bool:
        """Whether this time is not enough; now and then one that seems so is tried all the same.

        Otherwise it would never be seen that requests have become quicker.
        """
        if left_s >= self.least_s(now):
            return False
        self._tried = (self._tried + 1) % ODD
        return self._tried > 0

    def is_proven(self, now: float) -> bool:
        """Whether more than one or two have completed recently."""
        self._forget_old(now)
        return len(self._took) >= PROOF

    @property
    def concurrency(self) -> int:
        """How many were in service at a time, rounded up."""
        return math.ceil(self._concurrency)

    def forget(self) -> None:
        self._took.clear()
        self._lost.clear()
        self._least_s = math.inf
        self._mean_s = self._deviation_s = self._concurrency = 0.0

    def _forget_old(self, now: float) -> None:
        if self._took and now - self.last > max(RECENT_S, 3 * self._mean_s):
            self.forget()


class ServiceClass:
    """Requests that want the same places: how many wait and run, and how long they take.

    active: rows in service. waiting: rows that wait. parked: requests that wait because no place
    was free. full_at: when one of these last left. refused_at: when one was last refused for its
    time. estimator: of all. by_size: by the class of the payloads' sizes, which may tell how much
    work they are.
    """

    __slots__ = ("active", "by_size", "estimator", "full_at", "parked", "refused_at", "waiting")

    def __init__(self) -> None:
        self.active = self.waiting = self.parked = 0
        self.full_at = self.refused_at = -math.inf
        self.estimator = ServiceTimeEstimator()
        self.by_size: dict[int, ServiceTimeEstimator] = {}

    @property
    def is_idle(self) -> bool:
        return not (self.active or self.waiting)

    def estimator_of(self, size_class: int) -> ServiceTimeEstimator:
        found = self.by_size.get(size_class)
        if found is None:
            found = self.by_size[size_class] = ServiceTimeEstimator()
        return found

    def park(self, now: float) -> None:
        """One found no place free."""
        # What completed while places were free may have been other work than what holds them now.
        if not self.parked and now - self.full_at > ERA_S:
            self.estimator.forget()
            for estimator in self.by_size.values():
                estimator.forget()
        self.parked += 1

    def unpark(self, now: float) -> None:
        """It no longer waits."""
        self.parked -= 1
        self.full_at = now
