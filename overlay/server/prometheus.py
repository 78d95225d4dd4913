"""What Prometheus reads: the figures of GetMetrics, in its format, on a port of their own.

    http://127.0.0.1:51051/metrics     for a process whose metrics_port is 51051

Served by transport.http_door and not by prometheus_client's own server, which gives each visitor a
thread and never hangs up: 200 that say nothing hold 200 threads for good (0.26, 2026-11).

Off unless configured. It shares nothing with requests but the process: it owns a thread,
"prometheus", which serves all its callers; it answers from values only, and makes its text at most
once a second, however often it is asked. A port that it cannot have costs a line in the log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from overlay.model import clocks as time
from overlay.transport.http_door import Server, listen

log = logging.getLogger(__name__)

STOP_S = 3.0  # its thread is waited for so long, which is more than it takes to stop
FRESH_S = 1.0  # a text is given again for so long
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exporter:
    """Serves `metrics()` at host:port from `start` to `stop`, both of which may be called twice."""

    def __init__(self, metrics: Callable[[], Any], host: str, port: int) -> None:
        self._text = _Text(metrics)
        self._address = host.strip("[]"), port
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Whether it serves; if not, the log says why."""
        try:
            listening = listen(*self._address)
        except OSError as e:
            host, port = self._address
            log.warning("no metrics for Prometheus at %s port %d: %s", host, port, e.strerror or e)
            return False
        self._server = server = Server(_serving(self._text))

        def serve() -> None:
            with listening:
                server.run(sockets=[listening])

        self._thread = threading.Thread(target=serve, name="prometheus", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(STOP_S)


class Families(Collector):
    """The figures as Prometheus names them: seconds, totals, one name with labels for one thing."""

    def __init__(self, metrics: Callable[[], Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        m = self._metrics()
        who = {"process": m.process_id, "role": m.role, "team": m.team}
        what = {"version": m.version, "python": m.python, "config": m.config_digest}
        yield InfoMetricFamily("overlay", "Which process this is.", {**who, **what})
        for name, kind, samples, documentation, *labels in FAMILIES:
            family = kind(f"overlay_{name}", documentation, labels=labels)
            for *values, value in samples(m):
                family.add_metric(values, float(value))
            yield family
        for name, get, documentation in HISTOGRAMS:
            yield _histogram(f"overlay_{name}_seconds", documentation, get(m))


Samples = Callable[[Any], Iterable[tuple[Any, ...]]]
"""Of the metrics: the value of each label, and at the end that of the figure."""


def _one(name: str) -> Samples:
    return lambda m: [(getattr(m, name),)]


def _map(name: str) -> Samples:
    return lambda m: sorted(getattr(m, name).items())


def _links(name: str) -> Samples:
    return lambda m: [(link.process_id, getattr(link, name)) for link in m.neighbours]


def _handlers(name: str) -> Samples:
    return lambda m: [(handler.name, getattr(handler, name)) for handler in m.handlers]


def _started(m: Any) -> Iterable[tuple[float]]:
    return [(m.wall_time_s - m.uptime_s,)]


def _ended(m: Any) -> Iterable[tuple[str, int]]:
    return [(how, getattr(m, how)) for how in ("completed", "failed", "refused", "cancelled")]


def _links_up(m: Any) -> Iterable[tuple[str, bool]]:
    return [(link.process_id, link.state == "up") for link in m.neighbours]


def _handled(m: Any) -> Iterable[tuple[str, str, int]]:
    return [(h.name, how, getattr(h, how)) for h in m.handlers for how in ("completed", "failed")]


GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
WAITS = "Until a handler began: in queues and on the way."
CROWDED = "Calls, streams and connections ended, or not let in, because there were too many."
FAMILIES: tuple[tuple[Any, ...], ...] = (  # name, type, samples, help, labels
    ("serving", GAUGE, _one("is_healthy"), "1 while it takes requests, 0 while it stops."),
    ("start_time_seconds", GAUGE, _started, "When it started, since 1970."),
    ("log_lines_dropped", COUNTER, _one("log_lines_dropped"), "Lines that no log got."),
    ("requests_received", COUNTER, _one("received"), "Requests that came."),
    ("requests_ended", COUNTER, _ended,
     "Requests that ended: each in one of the four ways.", "outcome"),
    ("requests_refused", COUNTER, _map("refused_by_reason"),
     "Requests refused before any handler ran.", "reason"),
    ("requests_waiting", GAUGE, _one("queue_size"), "Single requests in the queue."),
    ("queue_slots", GAUGE, _one("queue_slots"), "How many can wait in the queue."),
    ("requests_in_service", GAUGE, _one("active_requests"), "Single requests in service."),
    ("service_slots", GAUGE, _one("max_capacity"), "How many can be in service."),
    ("crowded_out", COUNTER, _map("crowded_out"), CROWDED, "what"),
    ("calls_without_message", GAUGE, _one("calls_without_message"),
     "Calls whose message has not come."),
    ("idempotency_keys", GAUGE, _one("keys"), "Idempotency keys that are remembered."),
    ("idempotency_bytes", GAUGE, _one("key_bytes"), "Bytes of the answers kept for them."),
    ("idempotency_waiters", GAUGE, _one("key_waiters"),
     "Calls that wait for the first of their key."),
    ("streams", GAUGE, _one("streams"), "Streams open."),
    ("streamed_requests_waiting", GAUGE, _one("streamed_waiting"),
     "Requests of streams that wait."),
    ("streamed_requests_slots", GAUGE, _one("streamed_slots"),
     "How many requests of the streams open now may wait."),
    ("streamed_requests_in_service", GAUGE, _one("streamed_active"),
     "Requests of streams in service."),
    ("link_up", GAUGE, _links_up, "1 while the neighbour can be asked.", "neighbour"),
    ("link_same_config", GAUGE, _links("same_config"),
     "1 while it reads the same file.", "neighbour"),
    ("link_outstanding_requests", GAUGE, _links("outstanding"),
     "Asked and not answered.", "neighbour"),
    ("link_requests", COUNTER, _links("asked"), "Requests handed to the neighbour.", "neighbour"),
    ("link_failures", COUNTER, _links("failed"), "Of those, the ones that failed.", "neighbour"),
    ("link_ejections", COUNTER, _links("ejections"),
     "How often requests went round it.", "neighbour"),
    ("handler_running", GAUGE, _handlers("active"),
     "Requests that the handler works on.", "handler"),
    ("handler_slots", GAUGE, _handlers("slots"), "How many it can work on at once.", "handler"),
    ("handler_requests", COUNTER, _handled, "Requests it has worked on.", "handler", "outcome"),
)  # fmt: skip
HISTOGRAMS = (
    ("request_waiting", attrgetter("waiting"), WAITS),
    ("request_service", attrgetter("service"), "While the handler ran, as its worker says."),
)


def _histogram(name: str, documentation: str, found: Any) -> Metric:
    buckets, so_far = [], 0
    for bound, count in zip([*map(str, found.bounds_s), "+Inf"], found.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=found.sum_s)


class _Text:
    """The text of this moment, or of the last second."""

    def __init__(self, metrics: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Families(metrics))
        ProcessCollector(registry=self._registry)  # memory, CPU, files; on Linux only
        self._lock = threading.Lock()
        self._made_at = -FRESH_S
        self._text = b""

    def fresh(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made_at >= FRESH_S:
                self._text = generate_latest(self._registry)
                self._made_at = time.monotonic()
            return self._text


def _serving(text: _Text) -> Any:
    """The application. It runs on the server's event loop."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, kind, body = 200, CONTENT_TYPE, b""
        if scope["path"] != "/metrics":
            status, kind, body = 404, "text/plain; charset=utf-8", b"only /metrics is here\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, kind, body = 405, "text/plain; charset=utf-8", b"it is only read\n"
        else:
            body = text.fresh()
        headers = [("content-type", kind), ("content-length", str(len(body)))]
        named = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": named})
        await send({"type": "http.response.body", "body": body})

    return serve
