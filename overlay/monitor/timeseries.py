"""How the figures of one process go: rates between two looks, and their recent course. Pure.

A look is a MetricsResponse; when it was, in seconds, is said by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

KEPT = 300  # points of a course: five minutes at one a second
COUNTERS = ("received", "completed", "failed", "refused", "cancelled")
FIGURES = (*COUNTERS, "waiting", "in_service", "p50_ms", "p99_ms")


class Timeseries:
    """Of one process. Not safe from several threads."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}  # a second, by counter; empty when not known
        self.cores: float | None = None  # busy with it; None when not known
        self.asked: dict[str, float] = {}  # a second, by neighbour
        self.worked: dict[str, float] = {}  # a second, by handler
        self._took: dict[str, float] = {}  # by those that ended since the look before
        self._metrics: Any = None
        self._at = 0.0
        self._courses: dict[str, deque[float | None]] = {
            name: deque(maxlen=KEPT) for name in FIGURES
        }

    def saw(self, metrics: Any, at: float) -> None:
        """A new look. A process that was restarted counts anew, and has no rates yet."""
        before, past_s = self._metrics, at - self._at
        self._metrics, self._at = metrics, at
        self._took = {}
        if before is None or before.pid != metrics.pid or metrics.received < before.received:
            self._forget_rates()
        elif past_s > 0:
            counters = {name: getattr(metrics, name) for name in COUNTERS}
            old = {name: getattr(before, name) for name in COUNTERS}
            self.rates = _rates(old, counters, past_s)
            if metrics.memory_bytes:  # an older release tells neither
                self.cores = max(0.0, metrics.cpu_s - before.cpu_s) / past_s
            self.asked = _rates(_asked(before), _asked(metrics), past_s)
            self.worked = _rates(_worked(before), _worked(metrics), past_s)
            self._took = _took(before.service, metrics.service)

    def missed(self) -> None:
        """It gave no answer: nothing is known of what it does."""
        self._metrics = None
        self._forget_rates()

    def point(self) -> None:
        """Adds a point to every course, from the last look; None for what is not known."""
        now = self._figures()
        for name, course in self._courses.items():
            course.append(now.get(name))

    def course(self, name: str, last: int = KEPT) -> list[float | None]:
        """Oldest first, one a round, the latest `last`."""
        return [None if p is None else round(p, 2) for p in list(self._courses[name])[-last:]]

    def _figures(self) -> dict[str, float]:
        metrics = self._metrics
        if metrics is None:
            return {}
        now = {"waiting": waiting(metrics), "in_service": in_service(metrics)}
        return now | self.rates | self._took

    def _forget_rates(self) -> None:
        self.rates, self.asked, self.worked, self._took = {}, {}, {}, {}
        self.cores = None


def waiting(metrics: Any) -> int:
    """Single requests in the queue, and those of streams."""
    return int(metrics.queue_size + metrics.streamed_waiting)


def in_service(metrics: Any) -> int:
    """On a worker handlers running, on the others requests handed down."""
    streamed = 0 if metrics.role == "worker" else metrics.streamed_active
    return int(metrics.active_requests + streamed)


def _asked(metrics: Any) -> dict[str, int]:
    return {n.process_id: n.asked for n in metrics.neighbours}


def _worked(metrics: Any) -> dict[str, int]:
    return {h.name: h.completed + h.failed for h in metrics.handlers}


def _took(old: Any, new: Any) -> dict[str, float]:
    """The middle and the slow end of the times that came to a histogram; empty when none came."""
    if list(old.bounds_s) != list(new.bounds_s):
        return {}
    came = [n - o for o, n in zip(old.counts, new.counts, strict=True)]
    if sum(came) <= 0:
        return {}
    return {
        "p50_ms": quantile(new.bounds_s, came, 0.5) * 1e3,
        "p99_ms": quantile(new.bounds_s, came, 0.99) * 1e3,
    }


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float:
    """The value that `part` of those counted do not pass, by a straight line inside its bucket.

    counts: one more than bounds, the last of those above all bounds, which count as the last bound.
    """
    wanted, below = part * sum(counts), 0
    for i, (upper, count) in enumerate(zip(bounds, counts, strict=False)):
        if count and below + count >= wanted:
            lower = bounds[i - 1] if i else 0.0
            return lower + (upper - lower) * (wanted - below) / count
        below += count
    return bounds[-1] if bounds else 0.0


def _rates(old: Mapping[str, int], new: Mapping[str, int], past_s: float) -> dict[str, float]:
    return {name: max(0, new[name] - old.get(name, 0)) / past_s for name in new}
