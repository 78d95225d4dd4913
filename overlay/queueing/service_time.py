"""How long requests of one class take: recent service times, and estimates for the next request.

Sans-IO: the caller passes the time, as monotonic seconds. Not thread-safe; guarded by the request
queue's lock.
"""

from __future__ import annotations

import math
from collections import deque

RECENT_S = 10.0  # after this long without a completion (or three mean times) all are forgotten
MAX_SAMPLES = 32  # completions that are remembered
IDLE_S = 1.0  # after this long with nothing waiting, a class that fills up again starts afresh
MIN_SAMPLES = 8  # completions that all estimates but the mean need; the first may be slower
# The estimate is at most this many times what the quick ones take. Beyond that it is a mix of quick
# and long work, and which of them comes next is unknown. Exponential times stay within this factor
# by chance alone: with the least times instead, a quarter of the work came too late at ten times
# the load.
MAX_TO_QUICK = 8.0
PROBE_EVERY = 16  # one in this many that seem to have too little time is started all the same


class ServiceTimeEstimator:
    """How long recent requests were in service, and how many at a time.

    Only requests that a handler answered count as completed.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when one completed
        self._took: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._expired: deque[float] = deque(maxlen=MIN_SAMPLES)  # since the last completion
        self._too_short = 0  # requests so far, modulo PROBE_EVERY
        self._least_s = math.inf
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._concurrency = 0.0

    def completed(self, now: float, took_s: float, concurrency: int = 1) -> None:
        """concurrency: how many were in service, including this one."""
        self._forget_old(now)
        took = self._took
        is_least_gone = len(took) == MAX_SAMPLES and took[0] <= self._least_s
        took.append(took_s)
        self._expired.clear()
        self._least_s = min(took) if is_least_gone else min(self._least_s, took_s)
        # A mean over 16 varies so much that its low values admit too many: at ten times the load a
        # fifth of the work came too late.
        share = 1 / len(took)
        self._mean_s += (took_s - self._mean_s) * share
        self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) * share
        self._concurrency += (concurrency - self._concurrency) * share
        self.last = now

    def expired(self, now: float, took_s: float) -> None:
        """A request was in service for this long, until its deadline, without an answer."""
        self._forget_old(now)
        self._expired.append(took_s)

    def mean_s(self, now: float) -> float:
        """0 if unknown."""
        self._forget_old(now)
        return self._mean_s

    def likely_s(self, now: float) -> float:
        """How long the next request may take; 0 if unknown.

        Where times are similar, a time that few exceed; in a mix, a few times what the quick ones
        take, as it may be one of these.
        """
        # Computed like TCP's retransmission timeout. With the mean alone, 7 % of the work came too
        # late under overload where times differ by a tenth.
        if not self.is_reliable(now):
            return 0.0
        quick_s = sorted(self._took)[len(self._took) // 10]
        return min(self._mean_s + 4 * self._deviation_s, MAX_TO_QUICK * quick_s)

    def least_s(self, now: float) -> float:
        """How long even the quickest took; 0 if unknown.

        If the last ones all expired, twice the shortest time that they had: otherwise a queue whose
        first requests have always waited too long would never learn how long they take.
        """
        least_s = self._least_s if self.is_reliable(now) else 0.0
        if len(self._expired) < MIN_SAMPLES:
            return least_s
        return max(least_s, 2 * min(self._expired))

    def is_too_short(self, now: float, left_s: float) -> bool:
        """Whether this time is not enough. Says no to one in PROBE_EVERY all the same.

        Otherwise nothing would show that requests have become quicker.
        """
        if left_s >= self.least_s(now):
            return False
        self._too_short = (self._too_short + 1) % PROBE_EVERY
        return self._too_short > 0

    def is_reliable(self, now: float) -> bool:
        """Whether enough requests have completed recently."""
        self._forget_old(now)
        return len(self._took) >= MIN_SAMPLES

    @property
    def concurrency(self) -> int:
        """How many were in service at a time on average, rounded up."""
        return math.ceil(self._concurrency)

    def forget(self) -> None:
        self._took.clear()
        self._expired.clear()
        self._least_s = math.inf
        self._mean_s = self._deviation_s = self._concurrency = 0.0

    def _forget_old(self, now: float) -> None:
        if self._took and now - self.last > max(RECENT_S, 3 * self._mean_s):
            self.forget()


class ServiceClass:
    """Requests that want the same places: how many wait and run, and how long they take.

    active: rows in service. waiting: rows that wait. parked: requests that wait because no place
    was free. full_at: when the last of these stopped waiting. refused_at: when one was last refused
    for lack of time. estimator: over all requests. by_size: by payload size class, as larger
    payloads may take longer.
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
        """A request begins to wait for a place."""
        # What completed while places were free may have been other work than what holds them now.
        if not self.parked and now - self.full_at > IDLE_S:
            self.estimator.forget()
            for estimator in self.by_size.values():
                estimator.forget()
        self.parked += 1

    def unpark(self, now: float) -> None:
        self.parked -= 1
        self.full_at = now
