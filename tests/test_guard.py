"""A message that is no protobuf ends its call, and a watcher of health holds up nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from overlay.guard import Guarded, Health

METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GOOD = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
BAD = b"\x3a\xff"  # a text that is longer than the message


class Served:
    """A server of reflection, the simplest stream there is, and of health; as bytes go."""

    def __init__(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(4))
        reflection.enable_server_reflection((reflection.SERVICE_NAME,), Guarded(self.server))
        self.health = Health(ThreadPoolExecutor(4))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, Guarded(self.server))
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.ask = self.channel.stream_stream(METHOD)
        self.check = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        self.watch = self.channel.unary_stream("/grpc.health.v1.Health/Watch")


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.channel.close()
    made.server.stop(0)
    made.health.close()


def test_what_comes_before_it_is_answered_and_it_ends_the_call(served):
    call = served.ask(iter([GOOD, BAD, GOOD]), timeout=5)

    assert reflection_pb2.ServerReflectionResponse.FromString(next(call)).list_services_response
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith("a message of 2 bytes is not protobuf")


def test_it_leaves_no_call_behind_that_the_server_would_wait_for(served):
    for _ in range(100):
        with pytest.raises(grpc.RpcError):
            next(served.ask(iter([BAD]), timeout=5))
    served.channel.close()

    assert served.server.stop(0.5).wait(5)


def test_a_unary_call_has_its_answer_or_is_refused_for_its_bytes(served):
    assert served.check(b"", timeout=5) == b"\x08\x01"  # SERVING
    assert next(served.watch(b"", timeout=5)) == b"\x08\x01"
    for bad in (lambda: served.check(b"\x0a\xff", timeout=5), watched_badly(served)):
        with pytest.raises(grpc.RpcError) as raised:
            bad()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("overlay-executed", "no") in raised.value.trailing_metadata()


def watched_badly(served: Served) -> Callable[[], object]:
    return lambda: next(served.watch(b"\x0a\xff", timeout=5))


def test_refused_bytes_leave_no_memory_behind(served):
    def refused(count: int) -> None:
        for _ in range(count):
            with contextlib.suppress(grpc.RpcError):
                served.check(b"\x0a\xff", timeout=5)

    process = psutil.Process()
    refused(300)
    before = process.memory_info().rss

    refused(1000)

    assert process.memory_info().rss - before < 5 * 2**20  # gRPC's own way keeps 15 MB


def test_unknown_methods_stay_unknown(served):
    unknown = served.channel.unary_unary("/None/None")
    with pytest.raises(grpc.RpcError) as raised:
        unknown(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


class Watcher:
    """A call of Watch, as far as health knows it."""

    def add_callback(self, leave: Callable[[], None]) -> bool:
        self.leave = leave
        return True


def test_a_watcher_that_is_being_told_holds_up_neither_checks_nor_those_who_leave():
    servicer, ask = Health(ThreadPoolExecutor(1)), health_pb2.HealthCheckRequest()
    began, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def slow(response: object) -> None:
        began.set()
        done.wait(10)  # as a sending waits for the serving thread

    def leave_and_check() -> None:
        first.leave()
        seen.append(servicer.Check(ask, None).status)

    first = Watcher()
    servicer.Watch(ask, first, lambda response: None)
    for target, args in ((servicer.Watch, (ask, Watcher(), slow)), (leave_and_check, ())):
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        assert began.wait(5)
    thread.join(2)

    assert seen == [health_pb2.HealthCheckResponse.SERVING]
    done.set()
    servicer.close()
