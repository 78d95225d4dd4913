"""What GetMetrics tells: exact counts, and the spread of recent times. Safe from any thread."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass

RECENT = 1024


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

    def received(self, count: int) -> None:
        with self._lock:
            self._received += count

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
