"""Counts of requests and the distribution of their times, recently and since the start.

Each request counts, even if many ended together. Thread-safe.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from dataclasses import dataclass

RECENT = 1024
BOUNDS_S = tuple(step * 10.0**power for power in range(-4, 2) for step in (1, 2, 5))
"""0.1 ms to 50 s: a quantile derived from them is off by a factor of at most 2.5."""


@dataclass(frozen=True)
class Spread:
    """The distribution over the last requests, at most 1,024, in seconds."""

    p50: float = 0.0
    p99: float = 0.0
    mean: float = 0.0
    count: int = 0


class Times:
    """The durations of the last 1,024 requests. Adding one is an atomic append; the distribution is
    computed on demand."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def add(self, seconds: float, rows: int = 1) -> None:
        """rows: how many requests took this long each."""
        self._recent.append((seconds, rows))

    @property
    def spread(self) -> Spread:
        found, count = [], 0
        for seconds, rows in reversed(self._recent.copy()):
            rows = min(rows, RECENT - count)
            found.append((seconds, rows))
            count += rows
            if count == RECENT:
                break
        if not count:
            return Spread()
        found.sort()
        cumulative = list(itertools.accumulate(rows for _, rows in found))
        mean = sum(seconds * rows for seconds, rows in found) / count

        def at(index: int) -> float:
            return found[bisect_right(cumulative, index)][0]

        return Spread(at((count - 1) // 2), at(round((count - 1) * 0.99)), mean, count)


@dataclass(frozen=True)
class Histogram:
    """Of all times. counts: one for each of BOUNDS_S, and one for times above them all."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Counts:
    """received = completed + failed + refused + cancelled + waiting or in service."""

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
        self._crowded_out: Counter[str] = Counter()
        self.service = Times()
        self.waiting = Times()
        self._waited, self._served = _Tally(), _Tally()

    def received(self, count: int) -> None:
        with self._lock:
            self._received += count

    def took(self, rows: int, waited_s: float, served_s: float | None) -> None:
        """The times of each of `rows` requests.

        served_s: how long the handler ran, in mode ALL the last one; None if none started.
        waited_s: the rest of its time here.
        """
        self.waiting.add(waited_s, rows)
        if served_s is not None:
            self.service.add(served_s, rows)
        with self._lock:  # only once, as every request passes here
            self._waited.add_locked(waited_s, rows)
            if served_s is not None:
                self._served.add_locked(served_s, rows)

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

    def crowded_out(self, what: str, count: int) -> None:
        """These calls, streams or connections were closed or not admitted, to leave room."""
        with self._lock:
            self._crowded_out[what] += count

    def counts(self) -> Counts:
        with self._lock:
            refused = sum(self._causes.values())
            return Counts(self._received, self._completed, self._failed, refused, self._cancelled)

    def histograms(self) -> tuple[Histogram, Histogram]:
        """Of all waiting times and of all service times since the start."""
        with self._lock:
            return self._waited.histogram, self._served.histogram

    def causes(self) -> dict[str, int]:
        with self._lock:
            return dict(self._causes)

    def crowds(self) -> dict[str, int]:
        with self._lock:
            return dict(self._crowded_out)


class _Tally:
    """Counts durations per bound; adding many equal ones costs as much as adding one."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add_locked(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += count
        self._sum_s += seconds * count

    @property
    def histogram(self) -> Histogram:
        return Histogram(tuple(self._counts), self._sum_s)
