"""Exports the metrics of GetMetrics to Prometheus, on a port of their own.

    http://127.0.0.1:51051/metrics     for a process whose metrics_port is 51051

Served by transport.http_server rather than prometheus_client's own server, which never closes a
connection and gives each a thread: 200 silent clients hold 200 threads for good (0.26, 2026-11).

Off unless configured. It never delays requests: one thread, "prometheus", serves all its clients,
never blocks on anything, and makes the text at most once a second. If the port cannot be opened, a
line in the log says so.
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
from overlay.transport.http_server import Server, listen

log = logging.getLogger(__name__)

STOP_S = 3.0  # how long to wait for its thread, which takes less
MAX_AGE_S = 1.0  # of a text that is served again
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exporter:
    """Serves `metrics()` at host:port from `start` to `stop`, both of which may be called twice."""

    def __init__(self, metrics: Callable[[], Any], host: str, port: int) -> None:
        self._text = _CachedText(metrics)
        self._address = host.strip("[]"), port
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Whether it could start; if not, the log says why."""
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
    """The metrics by Prometheus's conventions: seconds, totals, labels instead of more names."""

    def __init__(self, metrics: Callable[[], Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        m = self._metrics()
        identity = {"process": m.process_id, "role": m.role, "team": m.team}
        build = {"version": m.version, "python": m.python, "config": m.config_digest}
        yield InfoMetricFamily("overlay", "Which process this is.", {**identity, **build})
        for name, kind, samples, documentation, *labels in FAMILIES:
            family = kind(f"overlay_{name}", documentation, labels=labels)
            for *values, value in samples(m):
                family.add_metric(values, float(value))
            yield family
        for name, get, documentation in HISTOGRAMS:
            yield _histogram(f"overlay_{name}_seconds", documentation, get(m))


Samples = Callable[[Any], Iterable[tuple[Any, ...]]]
"""Samples of a metric: the value of each label, then the sample's own."""


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
WAITING = "Time until a handler started: in queues and on the network."
CROWDED = "Calls, streams and connections ended or refused because there were too many."
FAMILIES: tuple[tuple[Any, ...], ...] = (  # name, type, samples, help, labels
    ("serving", GAUGE, _one("is_healthy"), "1 while it takes requests, 0 while it stops."),
    ("start_time_seconds", GAUGE, _started, "When it started, since 1970."),
    ("log_lines_dropped", COUNTER, _one("log_lines_dropped"), "Log lines not written."),
    ("requests_received", COUNTER, _one("received"), "Requests received."),
    ("requests_ended", COUNTER, _ended,
     "Requests that ended, each with one of four outcomes.", "outcome"),
    ("requests_refused", COUNTER, _map("refused_by_reason"),
     "Requests refused before any handler ran.", "reason"),
    ("requests_waiting", GAUGE, _one("queue_size"), "Single requests in the queue."),
    ("queue_slots", GAUGE, _one("queue_slots"), "How many requests the queue can hold."),
    ("requests_in_service", GAUGE, _one("active_requests"), "Single requests in service."),
    ("service_slots", GAUGE, _one("max_capacity"), "How many can be in service."),
    ("crowded_out", COUNTER, _map("crowded_out"), CROWDED, "what"),
    ("calls_without_message", GAUGE, _one("calls_without_message"),
     "Calls whose message has not arrived."),
    ("idempotency_keys", GAUGE, _one("keys"), "Idempotency keys kept."),
    ("idempotency_bytes", GAUGE, _one("key_bytes"), "Bytes of the answers kept for them."),
    ("idempotency_waiters", GAUGE, _one("key_waiters"),
     "Calls waiting for the first with their key."),
    ("streams", GAUGE, _one("streams"), "Open streams."),
    ("streamed_requests_waiting", GAUGE, _one("streamed_waiting"),
     "Waiting requests of streams."),
    ("streamed_requests_slots", GAUGE, _one("streamed_slots"),
     "How many requests of the open streams may wait."),
    ("streamed_requests_in_service", GAUGE, _one("streamed_active"),
     "Requests of streams in service."),
    ("link_up", GAUGE, _links_up, "1 while requests can be sent.", "neighbour"),
    ("link_same_config", GAUGE, _links("same_config"),
     "1 if its configuration is the same.", "neighbour"),
    ("link_outstanding_requests", GAUGE, _links("outstanding"),
     "Requests sent and not yet answered.", "neighbour"),
    ("link_requests", COUNTER, _links("asked"), "Requests sent to the neighbour.", "neighbour"),
    ("link_failures", COUNTER, _links("failed"), "Of those, how many failed.", "neighbour"),
    ("link_ejections", COUNTER, _links("ejections"),
     "How often it was ejected.", "neighbour"),
    ("handler_running", GAUGE, _handlers("active"),
     "Requests that the handler is running.", "handler"),
    ("handler_slots", GAUGE, _handlers("slots"), "How many it can run at once.", "handler"),
    ("handler_requests", COUNTER, _handled, "Requests it has run.", "handler", "outcome"),
)  # fmt: skip
HISTOGRAMS = (
    ("request_waiting", attrgetter("waiting"), WAITING),
    ("request_service", attrgetter("service"), "Time in the handler, measured by its worker."),
)


def _histogram(name: str, documentation: str, found: Any) -> Metric:
    buckets, so_far = [], 0
    for bound, count in zip([*map(str, found.bounds_s), "+Inf"], found.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=found.sum_s)


class _CachedText:
    """The metrics as text, at most a second old."""

    def __init__(self, metrics: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Families(metrics))
        ProcessCollector(registry=self._registry)  # memory, CPU, files; on Linux only
        self._lock = threading.Lock()
        self._made_at = -MAX_AGE_S
        self._text = b""

    def fresh(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made_at >= MAX_AGE_S:
                self._text = generate_latest(self._registry)
                self._made_at = time.monotonic()
            return self._text


def _serving(text: _CachedText) -> Any:
    """The ASGI application."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, kind, body = 200, CONTENT_TYPE, b""
        if scope["path"] != "/metrics":
            status, kind, body = 404, "text/plain; charset=utf-8", b"only /metrics is here\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, kind, body = 405, "text/plain; charset=utf-8", b"use GET\n"
        else:
            body = text.fresh()
        headers = [("content-type", kind), ("content-length", str(len(body)))]
        named = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": named})
        await send({"type": "http.response.body", "body": body})

    return serve
