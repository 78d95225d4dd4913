"""The metrics of one process over time: rates between two answers, and their recent series.

Sans-IO: an answer is a MetricsResponse, and the caller says when it arrived, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from overlay.transport.codec import pb2

MAX_POINTS = 300  # of a series: five minutes at one a second
COUNTERS = ("received", "completed", "failed", "refused", "cancelled")
FIGURES = (*COUNTERS, "waiting", "in_service", "p50_ms", "p99_ms")


class Timeseries:
    """The series of one process. Not thread-safe."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}  # per second, by counter; empty if unknown
        self.cores: float | None = None  # in use; None if unknown
        self.asked: dict[str, float] = {}  # per second, by neighbour
        self.worked: dict[str, float] = {}  # per second, by handler
        self._service_ms: dict[str, float] = {}  # of the requests since the previous answer
        self._metrics: pb2.MetricsResponse | None = None
        self._at = 0.0
        self._series: dict[str, deque[float | None]] = {
            name: deque(maxlen=MAX_POINTS) for name in FIGURES
        }

    def answered(self, metrics: pb2.MetricsResponse, at: float) -> None:
        """Adds an answer. A restarted process counts from 0 again, and has no rates yet."""
        before, past_s = self._metrics, at - self._at
        self._metrics, self._at = metrics, at
        self._service_ms = {}
        if before is None or before.pid != metrics.pid or metrics.received < before.received:
            self._forget_rates()
        elif past_s > 0:
            counters = {name: getattr(metrics, name) for name in COUNTERS}
            old = {name: getattr(before, name) for name in COUNTERS}
            self.rates = _rates(old, counters, past_s)
            if metrics.memory_bytes:  # an older release reports neither
                self.cores = max(0.0, metrics.cpu_s - before.cpu_s) / past_s
            self.asked = _rates(_asked(before), _asked(metrics), past_s)
            self.worked = _rates(_worked(before), _worked(metrics), past_s)
            self._service_ms = _service_ms(before.service, metrics.service)

    def failed(self) -> None:
        """The process did not answer, so its rates are unknown."""
        self._metrics = None
        self._forget_rates()

    def add_point(self) -> None:
        """Adds a point to every series, from the last answer; None where it is unknown."""
        now = self._figures()
        for name, series in self._series.items():
            series.append(now.get(name))

    def series(self, name: str, last: int = MAX_POINTS) -> list[float | None]:
        """The last points, oldest first, one per round."""
        return [None if p is None else round(p, 2) for p in list(self._series[name])[-last:]]

    def _figures(self) -> dict[str, float]:
        metrics = self._metrics
        if metrics is None:
            return {}
        now = {"waiting": waiting(metrics), "in_service": in_service(metrics)}
        return now | self.rates | self._service_ms

    def _forget_rates(self) -> None:
        self.rates, self.asked, self.worked, self._service_ms = {}, {}, {}, {}
        self.cores = None


def waiting(metrics: pb2.MetricsResponse) -> int:
    """Waiting requests: single ones in the queue, and those of streams."""
    return int(metrics.queue_size + metrics.streamed_waiting)


def in_service(metrics: pb2.MetricsResponse) -> int:
    """Running handlers on a worker; elsewhere the requests handed down."""
    streamed = 0 if metrics.role == "worker" else metrics.streamed_active
    return int(metrics.active_requests + streamed)


def _asked(metrics: pb2.MetricsResponse) -> dict[str, int]:
    return {n.process_id: n.asked for n in metrics.neighbours}


def _worked(metrics: pb2.MetricsResponse) -> dict[str, int]:
    return {h.name: h.completed + h.failed for h in metrics.handlers}


def _service_ms(old: pb2.Histogram, new: pb2.Histogram) -> dict[str, float]:
    """p50 and p99 of the times added to the histogram; empty if there were none."""
    if list(old.bounds_s) != list(new.bounds_s):
        return {}
    added = [n - o for o, n in zip(old.counts, new.counts, strict=True)]
    if sum(added) <= 0:
        return {}
    return {
        "p50_ms": quantile(new.bounds_s, added, 0.5) * 1e3,
        "p99_ms": quantile(new.bounds_s, added, 0.99) * 1e3,
    }


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float:
    """The value below which `part` of the values lie, interpolated linearly within its bucket.

    counts: one more than bounds; values above all bounds, in the last one, count as the last bound.
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
