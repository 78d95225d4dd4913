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
from collections.abc import Callable, Iterator
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
from overlay.observability import metric_families
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
        for family in metric_families.FAMILIES:
            name = f"overlay_{family.name}"
            metric = _KINDS[family.kind](name, family.help, labels=family.labels)
            for *values, value in family.samples(m):
                metric.add_metric(values, float(value))
            yield metric
        for name, get, documentation in HISTOGRAMS:
            yield _histogram(f"overlay_{name}_seconds", documentation, get(m))


_KINDS: dict[str, Any] = {
    metric_families.GAUGE: GaugeMetricFamily,
    metric_families.COUNTER: CounterMetricFamily,
}
WAITING = "Time until a handler started: in queues and on the network."
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
