"""Bad input does not break the overlay: fuzzed configurations, messages, frames and bytes.

`--long` sends ten to a hundred times as much; a failure shows its seed, and `--seed` repeats it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from overlay.model import config
from overlay.model.errors import ConfigError
from overlay.transport.codec import pb2
from tests.conftest import Fuzz
from tests.harness import frames, mutants
from tests.harness.cluster import IDS, ROOT, Overlay, running, six_processes
from tests.harness.invariants import Watched

GOOD = json.loads((ROOT / "two_hosts_config.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with running(tmp_path_factory.mktemp("watched"), six_processes()) as overlay:
        watched = Watched(overlay)
        yield watched
        watched.stops_in_order()


def test_a_mutated_configuration_loads_or_its_problems_are_reported(
    fuzz: Fuzz, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    loaded = 0
    for number in range(fuzz.count(1_000, 10_000)):
        path.write_bytes(mutants.configuration(GOOD, fuzz.rng("configuration", number)))
        problems = problems_of(path)
        loaded += not problems
        assert all(p and p.isprintable() for p in problems), f"number {number}: {problems}"
    assert loaded > 0


def problems_of(path: Path) -> tuple[str, ...]:
    """Empty if the file is valid. Any error but a ConfigError fails the test."""
    try:
        config.load(path)
    except ConfigError as e:
        return e.problems or ("",)
    return ()


def test_node_check_exits_with_0_or_with_2_and_a_reason(fuzz: Fuzz, tmp_path: Path) -> None:
    def check(number: int) -> None:
        path = tmp_path / f"mine{number}.json"
        path.write_bytes(mutants.configuration(GOOD, fuzz.rng("configuration", number)))
        command = [sys.executable, str(ROOT / "node.py"), str(path), "A", "--check"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        case = f"number {number}: {done}"
        assert b"Traceback" not in done.stderr, case
        assert (done.returncode, bool(done.stderr)) in [(0, False), (2, True)], case
        assert done.returncode or b"mine" in done.stdout, case

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, range(fuzz.count(4, 200))))


# Protobuf: the RPCs, and messages to mutate

SEGMENT = pb2.Segment(number=1, count=2, payloads=pb2.Column(items=[b"a", b"b"]), mode=pb2.ANY)
FRAMES = [
    pb2.Frame(segments=[SEGMENT]),
    pb2.Frame(segments=[SEGMENT, pb2.Segment(number=2, count=1, payloads={"items": [b""]})]),
    pb2.Frame(segments=[SEGMENT, SEGMENT]),
    pb2.Frame(
        segments=[pb2.Segment(number=7, count=1, ids=[5], hops=["A"], payloads={"items": [b"x"]})],
        cancels=[pb2.Cancel(number=7, start=0, count=1), pb2.Cancel(number=9, start=5, count=4)],
    ),
    pb2.Frame(segments=[pb2.Segment(number=3, count=500, payloads={"items": [b"many"] * 500})]),
]
REQUESTS = [
    pb2.Request(payload=b"hello"),
    pb2.Request(payload=b"hello", mode=pb2.ANY, team="pink", handler="echo", priority=9),
    pb2.Request(payload=b"x", hops=["A"], targets=["C"], request_id=7, attempt=1, want_parts=True),
    pb2.Request(payload=b"x", mode=pb2.ANY, idempotency_key="order 7"),
]
INFOS = [
    reflection_pb2.ServerReflectionRequest(list_services="*"),
    reflection_pb2.ServerReflectionRequest(file_containing_symbol="OverlayNode"),
    reflection_pb2.ServerReflectionRequest(file_by_filename="overlay.proto"),
]
CHECKS = [health_pb2.HealthCheckRequest(service="OverlayNode"), health_pb2.HealthCheckRequest()]
FORWARD, STREAM, DRAIN = "/OverlayNode/Forward", "/OverlayNode/ForwardStream", "/OverlayAdmin/Drain"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

# Method, its cardinality, its request class, and valid requests; the large ones more often.
RPCS: list[tuple[str, str, type[Message], list[Any]]] = [
    *[(FORWARD, "unary_unary", pb2.Request, REQUESTS)] * 4,
    *[(STREAM, "stream_stream", pb2.Frame, FRAMES)] * 4,
    ("/OverlayNode/GetMetrics", "unary_unary", pb2.MetricsRequest, [pb2.MetricsRequest()]),
    (DRAIN, "unary_unary", pb2.DrainRequest, [pb2.DrainRequest(grace_s=1, no_wait=True)]),
    ("/grpc.health.v1.Health/Check", "unary_unary", health_pb2.HealthCheckRequest, CHECKS),
    ("/grpc.health.v1.Health/Watch", "unary_stream", health_pb2.HealthCheckRequest, CHECKS),
    (REFLECTION, "stream_stream", reflection_pb2.ServerReflectionRequest, INFOS),
]
WRONG = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
"""A message that parses must not end with a bug, an uncaught exception or no answer."""

INVALID_GRACE = b"\x09" + b"\0\0\0\0\0\0\xf0\xbf"  # grace_s = -1; the last one counts


def test_no_message_to_any_rpc_harms_the_overlay(fuzz: Fuzz, watched: Watched) -> None:
    channels = {i: grpc.insecure_channel(watched.overlay.address(i)) for i in IDS}

    def send(number: int) -> None:
        rng = fuzz.rng("message", number)
        method, cardinality, kind, good = rng.choice(RPCS)
        count = rng.choice([1, 2, 5]) if cardinality.startswith("stream") else 1
        bodies = [mutants.message(kind, good, rng) for _ in range(count)]
        if method == DRAIN and would_stop(bodies[0]):
            bodies = [bodies[0] + INVALID_GRACE]
        method_of = getattr(channels[rng.choice("AAABECDF")], cardinality)(method)
        call = ask(method_of, cardinality, bodies, rng)
        if call is None or call.code() not in WRONG:
            return
        sent = [parsed(kind, body) for body in bodies]
        if None in sent or may_be_an_earlier_answer(call, sent[0]):
            return
        raise AssertionError(f"{method} {call.code()} {call.details()}: {bodies!r:.2000}")

    try:
        watched.withstands(send, range(fuzz.count(1_000, 200_000)))
    finally:
        for channel in channels.values():
            channel.close()


def ask(method: Any, cardinality: str, bodies: list[bytes], rng: Random) -> Any:
    """Calls the method and may leave early. Returns the call if the server ended it."""
    stay = rng.choice(["stay", "stay", "stay", "leave", "leave soon", "short timeout"])
    timeout = 0.01 if stay == "short timeout" else 20
    if cardinality == "unary_unary":
        call = method.future(bodies[0], timeout=timeout)
    elif cardinality == "unary_stream":
        call = method(bodies[0], timeout=timeout)
        stay = "leave soon" if stay == "stay" else stay  # it does not end by itself
    else:
        call = method(iter(bodies), timeout=timeout)
    if stay == "leave":
        call.cancel()
    try:
        if cardinality == "unary_unary" and stay in ("stay", "short timeout"):
            call.result()
        elif stay == "leave soon":
            time.sleep(rng.random() * 0.01)
            call.cancel()
        else:
            for _ in call:
                pass
    except (grpc.RpcError, grpc.FutureCancelledError):
        pass
    return call if stay == "stay" else None


def parsed(kind: type[Message], body: bytes) -> Message | None:
    try:
        return kind.FromString(body)
    except DecodeError:
        return None


def may_be_an_earlier_answer(call: Any, sent: Any) -> bool:
    """An idempotency key repeats its first answer, whose call may have had a short timeout."""
    has_key = bool(getattr(sent, "idempotency_key", ""))
    return has_key and call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def would_stop(body: bytes) -> bool:
    """Whether it is a valid DrainRequest."""
    try:
        request = pb2.DrainRequest.FromString(body)
    except DecodeError:
        return False
    return not request.HasField("grace_s") or 0 <= request.grace_s <= 86_400


def test_open_reflection_streams_take_no_threads_from_requests(
    overlays: Callable[..., Overlay],
) -> None:
    overlay = overlays(queue_slots=1, in_service=1)
    with grpc.insecure_channel(overlay.address("C")) as channel:
        look = channel.stream_stream(REFLECTION)
        # C has 42 threads for requests: 1 waiting, 1 in service, 40 in reserve.
        streams = [look(iter(SimpleQueue().get, None)) for _ in range(60)]
        time.sleep(1)  # for them to arrive, which nothing shows for an idle stream

        assert overlay.ask("C", timeout=5).result == b"C: hi"
        assert not any(call.done() for call in streams)


# HTTP/2 and raw bytes


def test_no_http2_frame_harms_the_overlay(fuzz: Fuzz, watched: Watched) -> None:
    each = 4  # frames a connection; the second invalid one usually ends it

    def send(number: int) -> None:
        rng = fuzz.rng("frames", number)
        sent = frames.conversation(rng, each)
        received = frames.talk(watched.overlay.port(rng.choice("AAABECDF")), sent, rng)
        for _ in frames.replies(received):  # raises for an invalid frame
            pass

    watched.withstands(send, range(fuzz.count(500, 20_000) // each))


def test_no_bytes_on_the_port_harm_the_overlay(fuzz: Fuzz, watched: Watched) -> None:
    def send(number: int) -> None:
        rng = fuzz.rng("junk", number)
        frames.talk(watched.overlay.port(rng.choice("AAABECDF")), frames.junk(rng), rng)

    watched.withstands(send, range(fuzz.count(500, 20_000)))


def test_the_same_seed_makes_the_same_input() -> None:
    def made(number: int) -> list[bytes]:
        rng = Random(number)
        return [
            mutants.configuration(GOOD, rng),
            mutants.message(pb2.Frame, FRAMES, rng),
            frames.conversation(rng, 4),
        ]

    for number in range(30):
        assert made(number) == made(number)
