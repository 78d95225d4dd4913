"""The metrics for Prometheus: correct by its conventions, and no burden on the process."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from overlay.server import prometheus
from overlay.server.prometheus import Exporter
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, free_port, six_processes, until
from tests.harness.stalled_clients import STALLED_REQUESTS, held_open, timed

METRICS = pb2.MetricsResponse(
    process_id="A",
    role="leader",
    is_healthy=True,
    received=7,
    completed=4,
    refused=3,
    refused_by_reason={"queue full": 2, 'odd "reason"\n': 1},
    queue_size=5,
    waiting=pb2.Histogram(bounds_s=[0.1, 1], counts=[2, 1, 1], sum_s=9.5, count=4),
    service=pb2.Histogram(bounds_s=[0.1, 1], counts=[0, 0, 0]),
    neighbours=[pb2.Neighbour(process_id="B", state="up", asked=9)],
    version="1.0",
    python="3.11.7",
    config_digest="abc",
    handlers=[pb2.HandlerMetrics(name="echo", completed=4)],
    uptime_s=5,
    wall_time_s=1_700_000_005,
)


@pytest.fixture
def serving() -> Iterator[Callable[..., int]]:
    """Starts an exporter of METRICS and returns its port."""
    with ExitStack() as stack:

        def start(metrics: Callable[[], Any] = lambda: METRICS) -> int:
            port = free_port()
            exporter = Exporter(metrics, "127.0.0.1", port)
            stack.callback(exporter.stop)
            assert exporter.start()
            return port

        yield start


def read(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def values(text: str) -> dict[str, float]:
    """By name and labels, as in the text."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def received(port: int) -> float | None:
    """None while it does not serve yet."""
    try:
        return values(read(port))["overlay_requests_received_total"]
    except OSError:
        return None


def test_the_metrics_are_those_of_the_process(serving):
    found = values(read(serving()))

    assert found["overlay_requests_received_total"] == 7
    assert found['overlay_requests_ended_total{outcome="completed"}'] == 4
    assert found['overlay_requests_refused_total{reason="queue full"}'] == 2
    assert found['overlay_link_up{neighbour="B"}'] == 1
    assert found["overlay_start_time_seconds"] == 1_700_000_000


def test_the_expiry_of_the_certificate_is_there_only_with_tls(serving):
    closed = pb2.MetricsResponse()
    closed.CopyFrom(METRICS)
    closed.security.expires_s = 1.8e9
    name = "overlay_certificate_expiry_time_seconds"

    assert values(read(serving(lambda: closed)))[name] == 1.8e9
    assert name not in values(read(serving()))


def test_version_and_configuration_can_be_compared_between_processes(serving):
    found = values(read(serving()))

    (info,) = (name for name in found if name.startswith("overlay_info"))
    assert all(fact in info for fact in ('version="1.0"', 'python="3.11.7"', 'config="abc"'))
    assert found['overlay_link_same_config{neighbour="B"}'] == 0


def test_histogram_buckets_are_cumulative(serving):
    found = values(read(serving()))

    name = "overlay_request_waiting_seconds"
    buckets = [found[f'{name}_bucket{{le="{bound}"}}'] for bound in ("0.1", "1.0", "+Inf")]
    assert buckets == [2, 3, 4]
    assert (found[f"{name}_count"], found[f"{name}_sum"]) == (4, 9.5)


def test_names_types_and_units_follow_the_conventions(serving):
    families = list(parsed(read(serving())))

    assert len(families) > 20
    for family in families:
        assert re.fullmatch(r"(overlay|process)_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|us|milliseconds|minutes|kb|mib|percent)\b", family.name)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        else:
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))


def test_the_text_can_be_parsed_whatever_a_reason_contains(serving):
    families = {family.name: family for family in parsed(read(serving()))}

    reasons = {sample.labels["reason"] for sample in families["overlay_requests_refused"].samples}
    assert reasons == {"queue full", 'odd "reason"\n'}


def test_metrics_are_read_at_most_once_a_second(serving, monkeypatch):
    monkeypatch.setattr(prometheus, "MAX_AGE_S", 60)
    reads: list[int] = []
    port = serving(lambda: reads.append(1) or METRICS)
    reads.clear()  # the library reads once when the metrics are registered

    assert len({read(port) for _ in range(5)}) == 1
    assert len(reads) <= 1


def test_other_paths_do_not_exist(serving):
    port = serving()
    for path in ("/", "/metric", "/../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(port, path)


@pytest.mark.parametrize("sent", STALLED_REQUESTS, ids=STALLED_REQUESTS.get)
def test_a_client_is_answered_at_once_while_others_hold_connections_open(serving, sent):
    port = serving()
    with held_open(port, sent):
        took_s = min(timed(lambda: read(port)) for _ in range(3))

    assert took_s < 1


def test_a_silent_client_is_disconnected(serving):
    port = serving()
    with held_open(port, b"GET /metrics HTTP/1.1\r\n", count=1) as (slow,):
        began = time.monotonic()
        slow.settimeout(0.2)
        while time.monotonic() < began + 20:
            with suppress(TimeoutError):
                slow.sendall(b"x: y\r\n")  # a little, all the time
                if not slow.recv(1000):
                    break
    took_s = time.monotonic() - began

    assert 0.5 < took_s < 15


def test_a_taken_port_costs_a_line_in_the_log_and_no_more(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        exporter = Exporter(lambda: METRICS, "127.0.0.1", taken.getsockname()[1])

        assert not exporter.start()
        exporter.stop()

    assert "no metrics for Prometheus at 127.0.0.1 port" in caplog.text


def test_a_process_serves_metrics_at_the_configured_port(tmp_path: Path):
    config = six_processes()
    config["processes"]["C"]["metrics_port"] = port = free_port()
    worker = Overlay(tmp_path, config)
    try:
        worker.start("C")
        worker.ask("C", b"hi")
        until(lambda: received(port) == 1, 5)
        facts = next(f for f in parsed(read(port)) if f.name == "overlay_info").samples[0].labels
        assert (facts["process"], facts["role"]) == ("C", "worker")
    finally:
        worker.stop()
