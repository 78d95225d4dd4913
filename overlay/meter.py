"""What GetMetrics tells: exact counts, and how times spread: of late, and since the start.

Safe from any thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass

RECENT = 1024
BOUNDS_S = tuple(step * 10.0**power for power in range(-4, 2) for step in (1, 2, 5))
"""0.1 ms to 50 s: a quantile read off them is wrong by a factor of 2.5 at most, mostly by less."""


@dataclass(frozen=True)
class Spread:
    """Of the last 1,024 measured times, in seconds."""

    p50: float = 0.0
    p99: float = 0.0
    mean: float = 0.0
    count: int = 0


class Times:
    """Keeps the last 1,024 durations. Adding is one atomic append; the sum is made when asked."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    @property
    def spread(self) -> Spread:
        ordered = sorted(self._recent.copy())
        if not ordered:
            return Spread()
        last = len(ordered) - 1
        mean = sum(ordered) / len(ordered)
        return Spread(ordered[last // 2], ordered[round(last * 0.99)], mean, len(ordered))


@dataclass(frozen=True)
class Histogram:
    """Of all times. counts: one for each bound and one for what is above them all."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


class Tally:
    """Counts durations up to each bound, since the start; many at once cost what one does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float, count: int) -> None:
        place = bisect_left(BOUNDS_S, seconds)
        with self._lock:
            self._counts[place] += count
            self._sum_s += seconds * count

    @property
    def histogram(self) -> Histogram:
        with self._lock:
            return Histogram(tuple(self._counts), self._sum_s)


@dataclass(frozen=True)
class Counts:
    """received = completed + failed + refused + cancelled + what is waiting or in service."""

    received: int = 0
    completed: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0


class Meter:
    """The counters of one process. Every received request ends in exactly one of the four ways."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received = self._completed = self._failed = self._cancelled = 0
        self._causes: Counter[str] = Counter()
        self.service = Times()
        self.waiting = Times()
        self.all_service = Tally()
        self.all_waiting = Tally()

    def received(self, count: int) -> None:
        with self._lock:
            self._received += count

    def waited(self, seconds: float, count: int) -> None:
        """Requests that waited so long until they started or were given up."""
        self.waiting.add(seconds)
        self.all_waiting.add(seconds, count)

    def served(self, seconds: float, count: int) -> None:
        self.service.add(seconds)
        self.all_service.add(seconds, count)

    def completed(self, count: int) -> None:
        with self._lock:
            self._completed += count

    def failed(self) -> None:
        with self._lock:
            self._failed += 1

    def cancelled(self) -> None:
        with self._lock:
            self._cancelled += 1

    def refused(self, cause: str) -> None:
        with self._lock:
            self._causes[cause] += 1

    def counts(self) -> Counts:
        with self._lock:
            refused = sum(self._causes.values())
            return Counts(self._received, self._completed, self._failed, refused, self._cancelled)

    def causes(self) -> dict[str, int]:
        with self._lock:
            return dict(self._causes)
