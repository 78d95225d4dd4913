"""What Prometheus reads: the figures of GetMetrics, in its format, on a port of their own.

    http://127.0.0.1:51051/metrics     for a process whose metrics_port is 51051

Off unless configured. It shares nothing with requests but the process: it owns a thread,
"prometheus", which serves all its callers; it answers from values only, and makes its text at most
once a second, however often it is asked. A port that it cannot have costs a line in the log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
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

log = logging.getLogger("overlay.prometheus")

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
        yield from _process(m)
        yield from _requests(m)
        yield _histogram(
            "request_waiting", "Until a handler began: in queues and on the way.", m.waiting
        )
        yield _histogram("request_service", "While the handler ran, as its worker says.", m.service)
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
    yield _gauge("idempotency_keys", "Idempotency keys that are remembered.", m.keys)
    yield _gauge("idempotency_bytes", "Bytes of the answers kept for them.", m.key_bytes)
    yield _gauge(
        "idempotency_waiters", "Calls that wait for the first of their key.", m.key_waiters
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
