"""What Prometheus reads: the figures of GetMetrics, in its format, on a port of their own.

    http://127.0.0.1:51051/metrics     for a process whose metrics_port is 51051

Off unless configured. It shares nothing with requests but the process: it owns a thread,
"prometheus", and at most four more for its callers; it answers from values only, and makes its text
at most once a second, however often it is asked. A port that it cannot have costs a line in the
log.
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
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

log = logging.getLogger("overlay.prometheus")

CALLERS = 4  # at once; Prometheus is one
CALLER_S = 5.0  # a caller that says nothing for so long is hung up on
FRESH_S = 1.0  # a text is given again for so long
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exporter:
    """Serves `metrics()` at host:port from `start` to `stop`, both of which may be called twice."""

    def __init__(self, metrics: Callable[[], Any], host: str, port: int) -> None:
        self._text = _Text(metrics)
        self._address = host.strip("[]"), port
        self._server: _Server | None = None

    def start(self) -> bool:
        """Whether it serves; if not, the log says why."""
        try:
            self._server = _Server(self._address, self._text)
        except OSError as e:
            host, port = self._address
            log.warning("no metrics for Prometheus at %s port %d: %s", host, port, e.strerror or e)
            return False
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.2,), name="prometheus", daemon=True).start()
        return True

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class Families(Collector):
    """The figures as Prometheus names them: seconds, totals, one name with labels for one thing."""

    def __init__(self, metrics: Callable[[], Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        m = self._metrics()
        yield from _process(m)
        yield from _requests(m)
        yield _histogram("request_waiting", "Time of requests in the queue.", m.waiting)
        yield _histogram(
            "request_service", "Time of requests from leaving the queue to the answer.", m.service
        )
        yield from _links(m.neighbours)
        yield from _handlers(m.handlers)


def _process(m: Any) -> Iterator[Metric]:
    who = {"process": m.process_id, "role": m.role, "team": m.team}
    what = {"version": m.version, "python": m.python, "config": m.config_digest}
    yield InfoMetricFamily("overlay", "Which process this is.", {**who, **what})
    yield _gauge("serving", "1 while it takes requests, 0 while it stops.", m.is_healthy)
    yield _gauge("start_time_seconds", "When it started, since 1970.", m.wall_time_s - m.uptime_s)
    yield _counter("log_lines_dropped", "Lines that no log got.", m.log_lines_dropped)


def _requests(m: Any) -> Iterator[Metric]:
    yield _counter("requests_received", "Requests that came.", m.received)
    ended = CounterMetricFamily(
        "overlay_requests_ended",
        "Requests that ended: each in one of the four ways.",
        labels=["outcome"],
    )
    for outcome in ("completed", "failed", "refused", "cancelled"):
        ended.add_metric([outcome], getattr(m, outcome))
    yield ended
    refused = CounterMetricFamily(
        "overlay_requests_refused", "Requests refused before any handler ran.", labels=["reason"]
    )
    for reason, count in sorted(m.refused_by_reason.items()):
        refused.add_metric([reason], count)
    yield refused
    yield _gauge("requests_waiting", "Single requests in the queue.", m.queue_size)
    yield _gauge("queue_slots", "How many can wait in the queue.", m.queue_slots)
    yield _gauge("requests_in_service", "Single requests in service.", m.active_requests)
    yield _gauge("service_slots", "How many can be in service.", m.max_capacity)
    crowded = CounterMetricFamily(
        "overlay_crowded_out",
        "Calls, streams and connections ended, or not let in, because there were too many.",
        labels=["what"],
    )
    for what, count in sorted(m.crowded_out.items()):
        crowded.add_metric([what], count)
    yield crowded
    yield _gauge(
        "calls_without_message", "Calls whose message has not come.", m.calls_without_message
    )
    yield _gauge("streams", "Streams open.", m.streams)
    yield _gauge("streamed_requests_waiting", "Requests of streams that wait.", m.streamed_waiting)
    yield _gauge(
        "streamed_requests_in_service", "Requests of streams in service.", m.streamed_active
    )


def _links(neighbours: Any) -> Iterator[Metric]:
    for kind, name, documentation, of in (
        (GaugeMetricFamily, "up", "1 while the neighbour can be asked.", _is_up),
        (GaugeMetricFamily, "same_config", "1 while it reads the same file.", _same_config),
        (GaugeMetricFamily, "outstanding_requests", "Asked and not answered.", _outstanding),
        (CounterMetricFamily, "requests", "Requests handed to the neighbour.", _asked),
        (CounterMetricFamily, "failures", "Of those, the ones that failed.", _failed),
        (CounterMetricFamily, "ejections", "How often requests went round it.", _ejections),
    ):
        family = kind(f"overlay_link_{name}", documentation, labels=["neighbour"])
        for neighbour in neighbours:
            family.add_metric([neighbour.process_id], of(neighbour))
        yield family


def _handlers(handlers: Any) -> Iterator[Metric]:
    active = GaugeMetricFamily(
        "overlay_handler_running", "Requests that the handler works on.", labels=["handler"]
    )
    slots = GaugeMetricFamily(
        "overlay_handler_slots", "How many it can work on at once.", labels=["handler"]
    )
    ended = CounterMetricFamily(
        "overlay_handler_requests", "Requests it has worked on.", labels=["handler", "outcome"]
    )
    for handler in handlers:
        active.add_metric([handler.name], handler.active)
        slots.add_metric([handler.name], handler.slots)
        ended.add_metric([handler.name, "completed"], handler.completed)
        ended.add_metric([handler.name, "failed"], handler.failed)
    yield from (active, slots, ended)


def _is_up(neighbour: Any) -> float:
    return float(neighbour.state == "up")


def _same_config(neighbour: Any) -> float:
    return float(neighbour.same_config)


def _outstanding(neighbour: Any) -> float:
    return float(neighbour.outstanding)


def _asked(neighbour: Any) -> float:
    return float(neighbour.asked)


def _failed(neighbour: Any) -> float:
    return float(neighbour.failed)


def _ejections(neighbour: Any) -> float:
    return float(neighbour.ejections)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"overlay_{name}", documentation, value=float(value))


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"overlay_{name}", documentation, value=float(value))


def _histogram(name: str, documentation: str, found: Any) -> Metric:
    buckets, so_far = [], 0
    for bound, count in zip([*map(str, found.bounds_s), "+Inf"], found.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return HistogramMetricFamily(
        f"overlay_{name}_seconds", documentation, buckets=buckets, sum_value=found.sum_s
    )


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


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = os.name == "posix"  # elsewhere it would allow to share the port
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], text: _Text) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.text = text
        self._places = threading.BoundedSemaphore(CALLERS)
        super().__init__(address, _Caller)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a caller of the metrics went wrong", exc_info=True)


class _Caller(BaseHTTPRequestHandler):
    timeout = CALLER_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        text = self.server.text.fresh()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def version_string(self) -> str:
        return "overlay"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is no access log."""
