"""Nothing that comes from outside breaks the overlay: fuzzed files, messages, frames and bytes.

A short lane runs with the other tests. `--long` takes ten to a hundred times as many; a failure
names its seed, and `--seed` gives the same ones again.
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
from tests.conftest import Lane
from tests.harness import frames, mutants
from tests.harness.cluster import IDS, ROOT, Overlay, running, six_processes
from tests.harness.watch import Watched

GOOD = json.loads((ROOT / "two_hosts_config.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with running(tmp_path_factory.mktemp("watched"), six_processes()) as overlay:
        watched = Watched(overlay)
        yield watched
        watched.stops_in_order()


def test_a_spoiled_configuration_is_right_or_says_what_is_wrong(lane: Lane, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    loaded = 0
    for number in range(lane.count(1_000, 10_000)):
        path.write_bytes(mutants.configuration(GOOD, lane.chance("configuration", number)))
        problems = problems_of(path)
        loaded += not problems
        assert all(p and p.isprintable() for p in problems), f"number {number}: {problems}"
    assert loaded > 0


def problems_of(path: Path) -> tuple[str, ...]:
    """None when it is right. Any error but a ConfigError fails the test."""
    try:
        config.load(path)
    except ConfigError as e:
        return e.problems or ("",)
    return ()


def test_node_checks_a_spoiled_configuration_and_ends_with_0_or_a_reason_and_2(
    lane: Lane, tmp_path: Path
) -> None:
    def check(number: int) -> None:
        path = tmp_path / f"mine{number}.json"
        path.write_bytes(mutants.configuration(GOOD, lane.chance("configuration", number)))
        command = [sys.executable, str(ROOT / "node.py"), str(path), "A", "--check"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        said = f"number {number}: {done}"
        assert b"Traceback" not in done.stderr, said
        assert (done.returncode, bool(done.stderr)) in [(0, False), (2, True)], said
        assert done.returncode or b"mine" in done.stdout, said

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, range(lane.count(6, 200))))


# Protobuf: each RPC with the messages that are spoiled for it.

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

# Method, its shape on a channel, the kind of its request, and good ones; often the large ones.
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
"""What nothing that parses may end with: a fault inside, an exception nobody caught, no answer."""

NEVER_A_GRACE = b"\x09" + b"\0\0\0\0\0\0\xf0\xbf"  # grace_s = -1; the last one counts


def test_no_message_to_any_rpc_harms_the_overlay(lane: Lane, watched: Watched) -> None:
    channels = {i: grpc.insecure_channel(watched.overlay.address(i)) for i in IDS}

    def send(number: int) -> None:
        chance = lane.chance("message", number)
        method, shape, kind, good = chance.choice(RPCS)
        count = chance.choice([1, 2, 5]) if shape.startswith("stream") else 1
        bodies = [mutants.message(kind, good, chance) for _ in range(count)]
        if method == DRAIN and would_stop(bodies[0]):
            bodies = [bodies[0] + NEVER_A_GRACE]
        method_of = getattr(channels[chance.choice("AAABECDF")], shape)(method)
        call = ask(method_of, shape, bodies, chance)
        if call is None or call.code() not in WRONG:
            return
        sent = [parsed(kind, body) for body in bodies]
        if None in sent or is_kept(call, sent[0]):
            return
        raise AssertionError(f"{method} {call.code()} {call.details()}: {bodies!r:.2000}")

    try:
        watched.withstands(send, range(lane.count(2_000, 200_000)))
    finally:
        for channel in channels.values():
            channel.close()


def ask(method: Any, shape: str, bodies: list[bytes], chance: Random) -> Any:
    """Calls it and stays until its end, or leaves before. The call, if its end came from there."""
    stay = chance.choice(["stay", "stay", "stay", "leave", "look and leave", "hurry"])
    timeout = 0.01 if stay == "hurry" else 20
    if shape == "unary_unary":
        call = method.future(bodies[0], timeout=timeout)
    elif shape == "unary_stream":
        call = method(bodies[0], timeout=timeout)
        stay = "look and leave" if stay == "stay" else stay  # it has no end of its own
    else:
        call = method(iter(bodies), timeout=timeout)
    if stay == "leave":
        call.cancel()
    try:
        if shape == "unary_unary" and stay in ("stay", "hurry"):
            call.result()
        elif stay == "look and leave":
            time.sleep(chance.random() * 0.01)
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


def is_kept(call: Any, sent: Any) -> bool:
    """Whether it is its key's first answer, whose caller may have been in a hurry."""
    keyed = bool(getattr(sent, "idempotency_key", ""))
    return keyed and call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def would_stop(body: bytes) -> bool:
    """Whether it is a Drain that a process obeys."""
    try:
        request = pb2.DrainRequest.FromString(body)
    except DecodeError:
        return False
    return not request.HasField("grace_s") or 0 <= request.grace_s <= 86_400


def test_tools_that_keep_reflection_open_leave_the_requests_their_threads(
    overlays: Callable[..., Overlay],
) -> None:
    overlay = overlays(queue_slots=1, in_service=1)
    with grpc.insecure_channel(overlay.address("C")) as channel:
        look = channel.stream_stream(REFLECTION)
        # C has 42 threads for requests: 1 waiting, 1 in service, 40 to refuse.
        open_ones = [look(iter(SimpleQueue().get, None)) for _ in range(60)]
        time.sleep(1)  # for them to arrive: nothing tells that an idle stream has

        assert overlay.ask("C", timeout=5).result == b"C: hi"
        assert not any(call.done() for call in open_ones)


# HTTP/2 and below.


def test_no_http2_frame_harms_the_overlay(lane: Lane, watched: Watched) -> None:
    each = 4  # most connections do not outlive their second wrong one

    def send(number: int) -> None:
        chance = lane.chance("frames", number)
        sent = frames.conversation(chance, each)
        came = frames.talk(watched.overlay.port(chance.choice("AAABECDF")), sent, chance)
        for _ in frames.replies(came):  # a frame that is wrong is an error
            pass

    watched.withstands(send, range(lane.count(500, 20_000) // each))


def test_no_bytes_on_the_port_harm_the_overlay(lane: Lane, watched: Watched) -> None:
    def send(number: int) -> None:
        chance = lane.chance("junk", number)
        frames.talk(watched.overlay.port(chance.choice("AAABECDF")), frames.junk(chance), chance)

    watched.withstands(send, range(lane.count(500, 20_000)))


def test_what_was_sent_is_made_again_from_its_seed() -> None:
    def made(number: int) -> list[bytes]:
        chance = Random(number)
        return [
            mutants.configuration(GOOD, chance),
            mutants.message(pb2.Frame, FRAMES, chance),
            frames.conversation(chance, 4),
        ]

    for number in range(30):
        assert made(number) == made(number)
