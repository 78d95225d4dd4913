"""A call gets a thread when its message arrives; a bad message ends only its own call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from overlay.calls.gate import Gate
from overlay.calls.reception import Health, Reception, on_threads_of
from overlay.calls.request_log import RequestLog
from overlay.model.errors import BadRequest
from overlay.model.limits import Limits
from tests.harness.cluster import until

METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GOOD = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
SERVING = health_pb2.HealthCheckResponse.SERVING
BAD = b"\x3a\xff"  # a string that is longer than the message


class Served:
    """A server of reflection, the simplest stream there is, and of health, spoken in bytes."""

    def __init__(self, **limits: object) -> None:
        pool = ThreadPoolExecutor(4, "few")
        self.server = grpc.server(pool)
        self.request_log = RequestLog("A", works=False)
        self.gate = Gate()
        limits_ = replace(Limits(), **limits)
        self.reception = Reception(self.server, pool, limits_, self.request_log, self.gate)
        look = reflection.ReflectionServicer((reflection.SERVICE_NAME,))
        look.ServerReflectionInfo = on_threads_of(pool, look.ServerReflectionInfo)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(look, self.reception)
        self.health = Health(pool)
        self.health.set("", SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.reception)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.ask = self.channel.stream_stream(METHOD)
        self.check = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        self.watch = self.channel.unary_stream("/grpc.health.v1.Health/Watch")
        # A client may open a call without sending its message yet.
        self.check_later = self.channel.stream_unary("/grpc.health.v1.Health/Check")

    def stop(self) -> None:
        self.channel.close()
        self.server.stop(0)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


def test_requests_before_a_bad_message_are_answered_and_it_ends_the_call(served):
    call = served.ask(iter([GOOD, BAD, GOOD]), timeout=5)

    assert reflection_pb2.ServerReflectionResponse.FromString(next(call)).list_services_response
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith("a message of 2 bytes is not protobuf")


def test_a_bad_message_leaves_no_call_that_the_server_waits_for(served):
    for _ in range(100):
        with pytest.raises(grpc.RpcError):
            next(served.ask(iter([BAD]), timeout=5))
    served.channel.close()

    assert served.server.stop(0.5).wait(5)


def test_a_unary_call_is_answered_or_refused_for_its_bytes(served):
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

    assert process.memory_info().rss - before < 5 * 2**20  # gRPC's own server leaks 15 MB


def test_unknown_methods_stay_unknown(served):
    unknown = served.channel.unary_unary("/None/None")
    with pytest.raises(grpc.RpcError) as raised:
        unknown(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def watched(call: Iterator[bytes]) -> int:
    return health_pb2.HealthCheckResponse.FromString(next(call)).status


def test_calls_without_a_message_hold_no_thread_and_are_counted(served):
    silent = [SimpleQueue() for _ in range(40)]
    calls = [served.check_later.future(iter(box.get, None), timeout=20) for box in silent]
    until(lambda: served.reception.unarrived == 40)

    assert served.check(b"", timeout=5) == b"\x08\x01"

    silent[0].put(b"")
    silent[0].put(None)
    assert calls[0].result(5) == b"\x08\x01", "its message may come late"
    for call in calls:
        call.cancel()
    until(lambda: served.reception.unarrived == 0 and not served.gate.peers())
    for box in silent:
        box.put(None)


def test_a_call_that_ends_without_a_message_is_refused_with_the_reason(served):
    with pytest.raises(grpc.RpcError) as raised:
        served.check_later(iter(()), timeout=5)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == "the call has no message"


def test_the_oldest_call_without_a_message_makes_room_for_a_new_one():
    served = Served(unarrived_calls=3)
    boxes = [SimpleQueue() for _ in range(4)]
    calls = []
    for n, box in enumerate(boxes):
        calls.append(served.check_later.future(iter(box.get, None), timeout=20))
        until(lambda n=n: served.reception.unarrived == min(3, n + 1))

    with pytest.raises(grpc.RpcError) as raised:
        calls[0].result(5)

    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("overlay-executed", "no") in raised.value.trailing_metadata()
    until(lambda: served.request_log.meter.crowds() == {"calls without a message": 1})
    boxes[3].put(b"")
    boxes[3].put(None)
    assert calls[3].result(5) == b"\x08\x01"
    for box in boxes:
        box.put(None)
    served.stop()


def test_a_call_whose_message_is_overdue_ends_after_the_default_deadline():
    served = Served(default_deadline_s=0.2)
    box: SimpleQueue[bytes | None] = SimpleQueue()
    call = served.check_later.future(iter(box.get, None), timeout=20)
    until(lambda: served.reception.unarrived == 1)
    time.sleep(0.2)

    served.reception.end_late()

    with pytest.raises(grpc.RpcError) as raised:
        call.result(5)
    assert raised.value.details() == "no message arrived within 0.2 s"
    box.put(None)
    served.stop()


def test_a_watcher_gets_the_current_status_of_its_name(served):
    served.health.set("one", SERVING)
    calls = [served.watch(name_of(name), timeout=20) for name in ("", "one", "never set")]
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert [watched(call) for call in calls] == [SERVING, SERVING, unknown]

    served.health.set("one", health_pb2.HealthCheckResponse.NOT_SERVING)

    assert watched(calls[1]) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as raised:
        served.check(name_of("never set"), timeout=5)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    for call in calls:
        call.cancel()
    until(lambda: not served.health._watchers)


def name_of(name: str) -> bytes:
    return bytes(health_pb2.HealthCheckRequest(service=name).SerializeToString())


def test_an_unknown_name_is_answered_as_unknown_and_not_kept(served):
    for n in range(300):
        call = served.watch(name_of("x" * 10_000 + str(n)), timeout=20)
        watched(call)
        call.cancel()

    until(lambda: not served.gate.peers())
    assert list(served.health._statuses) == [""]
    assert not served.health._watchers


def test_watchers_are_bounded_the_oldest_ends_first_and_none_holds_a_thread():
    served = Served(resting_calls=20)
    first = served.watch(b"", timeout=20)
    assert watched(first) == SERVING
    calls = [served.watch(b"", timeout=20) for _ in range(29)]

    assert served.check(b"", timeout=5) == b"\x08\x01"
    until(lambda: served.request_log.meter.crowds() == {"watchers": 10})
    with pytest.raises(grpc.RpcError) as raised:
        next(first)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    served.stop()


def test_a_reflection_client_holds_no_thread(served):
    boxes = [SimpleQueue() for _ in range(20)]
    calls = [served.ask(iter(box.get, None), timeout=20) for box in boxes]
    for _ in range(2):
        for box, call in zip(boxes, calls, strict=True):
            box.put(GOOD)
            next(call)

    assert served.check(b"", timeout=5) == b"\x08\x01"
    for box, call in zip(boxes, calls, strict=True):
        box.put(None)
        assert list(call) == []


def test_a_method_may_answer_later_without_holding_a_thread():
    asked: SimpleQueue[tuple[bytes, Future[bytes]]] = SimpleQueue()

    def later(request: bytes, context: object) -> Future[bytes]:
        answer: Future[bytes] = Future()
        asked.put((request, answer))
        return answer

    pool = ThreadPoolExecutor(1, "one")
    server = grpc.server(pool)
    handler = grpc.unary_unary_rpc_method_handler(later, bytes, bytes)
    request_log = RequestLog("A", works=False)
    Reception(server, pool, Limits(), request_log).add_registered_method_handlers(
        "s", {"Later": handler}
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [channel.unary_unary("/s/Later").future(b"%d" % n, timeout=20) for n in range(5)]
        for request, answer in [asked.get(timeout=5) for _ in range(5)]:
            if request == b"0":
                answer.set_exception(BadRequest("no"))
            else:
                answer.set_result(request)
        assert [call.result(5) for call in calls[1:]] == [b"1", b"2", b"3", b"4"]
        assert calls[0].code() is grpc.StatusCode.INVALID_ARGUMENT
    server.stop(0)
