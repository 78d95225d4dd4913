"""Honest callers are served whatever others do: on real processes, by the library and by gRPC."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest

import overlay
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import IDS, Overlay, running, six_processes, until
from tests.harness.ways import Outcome, Streamed, Unary, Way

MINE = '''
import os, time

def work(payload, context):
    """payload: milliseconds."""
    until = time.monotonic() + float(payload or b"0") / 1000
    while (left := until - time.monotonic()) > 0 and not context.cancelled:
        time.sleep(min(left, 0.03))
    return context.process_id.encode()

def slow(payload, context):
    return work(payload, context)

def hangs_at_f(payload, context):
    while context.process_id == "F" and not context.cancelled:
        time.sleep(0.02)
    return context.process_id.encode()
'''


NAMES = "work", "slow", "hangs_at_f"
SHARING = 16  # handlers of each kind, for as many tests or ways


@dataclass(frozen=True)
class Shared:
    """The shared overlay, and handlers that no earlier test has used."""

    six: Overlay
    number: int

    def handler(self, name: str) -> str:
        return f"{name}_{self.number}"


@pytest.fixture(scope="module")
def all_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Shared]]:
    folder = tmp_path_factory.mktemp("fairness")
    (folder / "mine.py").write_text(MINE)
    call = {f"{n}_{i}": {"call": f"mine:{n}", "slots": 100} for n in NAMES for i in range(SHARING)}
    call |= {f"narrow_{i}": {"call": "mine:work", "slots": 2} for i in range(SHARING)}
    with running(folder, six_processes(handlers=call)) as six:
        yield (Shared(six, number) for number in range(SHARING))


@pytest.fixture
def take(all_shared: Iterator[Shared]) -> Iterator[Callable[[], Shared]]:
    """The overlay remembers how long a handler takes; otherwise a test leaves it idle."""
    taken: list[Shared] = []

    def more() -> Shared:
        taken.append(next(all_shared))
        return taken[-1]

    yield more
    six = taken[0].six
    until(lambda: all(is_idle(six, i) for i in IDS), 20, "all processes are idle")


@pytest.fixture
def shared(take: Callable[[], Shared]) -> Shared:
    return take()


def is_idle(six: Overlay, process_id: str) -> bool:
    found = six.metrics(process_id)
    return not (found.active_requests or found.queue_size or found.streamed_waiting)


@pytest.fixture(params=[Unary, Streamed])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def ways() -> Iterator[list[Way]]:
    """Both, for tests in which most time is waiting."""
    made: list[Way] = [Unary(), Streamed()]
    yield made
    for way in made:
        way.close()


@contextlib.contextmanager
def from_address(address: str, port: int) -> Iterator[str]:
    """A proxy's address: connections to it reach `port` from this address of the machine."""
    try:
        socket.create_connection(("127.0.0.1", port), source_address=(address, 0)).close()
    except OSError:
        pytest.skip(f"{address} is no address of this machine")
    server = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = [server]

    def pass_on(near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", port), source_address=(address, 0))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        for end in ends:
            end.close()


# Slow or hanging calls do not block quick ones


def test_after_one_long_call_an_idle_overlay_refuses_no_short_call(
    take: Callable[[], Shared], ways: list[Way]
) -> None:
    kinds = [(way, mode, take()) for way in ways for mode in (pb2.ALL, pb2.ANY)]
    six = kinds[0][2].six
    kinds = [(way, {"handler": own.handler("work"), "mode": mode}) for way, mode, own in kinds]
    long_ones = [way.at_once(six, 1, payload=b"2000", **request) for way, request in kinds]
    assert all(Outcome(call).ok for (call,) in long_ones)

    for way, request in kinds:
        for _ in range(5):
            calls = way.at_once(six, 10, payload=b"10", timeout=1.5, **request)
            outcomes = [Outcome(call) for call in calls]
            assert [o.details for o in outcomes if not o.ok] == []


def test_after_one_long_call_the_library_gets_all_short_calls_answered(
    take: Callable[[], Shared],
) -> None:
    shared = {mode: take() for mode in ("all", "any")}
    handlers = {mode: own.handler("work") for mode, own in shared.items()}
    with overlay.connect(shared["all"].six.address("A")) as leader:
        long_ones = [
            leader.submit(handler, b"2000", mode=mode, timeout=10)
            for mode, handler in handlers.items()
        ]
        assert all(call.result() for call in long_ones)
        for mode, handler in handlers.items():
            for _ in range(20):
                assert leader.call(b"10", handler=handler, mode=mode, timeout=1.5).result
            found = leader.map(handler, [b"10"] * 100, mode=mode, timeout=5)
            assert len(list(found)) == 100


def test_a_worker_that_never_answers_costs_only_its_own_part_and_no_call_is_refused(
    take: Callable[[], Shared], ways: list[Way]
) -> None:
    shared = {way: take() for way in ways}
    for _ in range(4):
        calls = [
            call
            for way, own in shared.items()
            for call in way.at_once(own.six, 5, handler=own.handler("hangs_at_f"), timeout=0.6)
        ]
        outcomes = [Outcome(call) for call in calls]
        assert [o.details for o in outcomes if not o.ok] == []
        assert {o.response.result for o in outcomes} == {b"C\nD"}


def test_sequential_calls_are_answered_although_one_worker_never_answers(shared: Shared) -> None:
    six = shared.six
    with overlay.connect(six.address("A")) as leader:
        for timeout in (1.2, 0.6, 0.6):
            answer = leader.call(b"", handler=shared.handler("hangs_at_f"), timeout=timeout)
            assert answer.result == b"C\nD"


# Slow calls do not take all the slots


@pytest.mark.parametrize("mode", [pb2.ALL, pb2.ANY])
def test_a_callers_many_slow_calls_leave_slots_for_its_other_handlers(
    shared: Shared, mode, way: Way
) -> None:
    six, slow_handler = shared.six, shared.handler("slow")
    slow = way.at_once(six, 400, payload=b"8000", handler=slow_handler, mode=mode, timeout=15)
    # Of 300 slots. A stream fills one handler's share; single calls fill 80 of A's slots.
    busy = 75 if isinstance(way, Unary) else 200
    until(lambda: sum(six.metrics(w).active_requests for w in "CDF") >= busy)

    for handler in (shared.handler("work"), "") * 5:
        assert way.ask(six, "A", b"1", handler=handler, mode=mode, timeout=5).result
    for call in slow:
        call.cancel()


def test_another_caller_is_served_despite_slow_calls(shared: Shared) -> None:
    six, handler = shared.six, shared.handler("work")
    with from_address("127.0.0.2", six.port("A")) as address:
        slow = Unary().at_once(six, 290, payload=b"8000", handler=handler, timeout=15)
        until(lambda: six.metrics("A").active_requests >= 80)
        assert six.metrics("A").active_requests == 80
        with grpc.insecure_channel(address) as channel:
            stub = pb2_grpc.OverlayNodeStub(channel)
            for _ in range(10):  # the same handler
                answer = stub.Forward(pb2.Request(payload=b"1", handler=handler), timeout=5)
                assert answer.result == b"C\nD\nF"
        for call in slow:
            call.cancel()


# A new caller name gains nothing


@pytest.mark.parametrize("attacker", ["127.0.0.2", "127.0.0.1"])
def test_a_new_name_for_each_call_takes_no_turn_from_a_steady_caller(
    shared: Shared, attacker: str
) -> None:
    six, handler = shared.six, shared.handler("narrow")
    stop, numbers, ends = threading.Event(), itertools.count(), Counter[str]()

    def attack(address: str) -> None:
        request = pb2.Request(payload=b"50", handler=handler, mode=pb2.ANY)
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = pb2_grpc.OverlayNodeStub(channel)
            while not stop.is_set():
                name = ((codec.CALLER_KEY, f"new {next(numbers)}"),)
                call = stub.Forward.future(request, timeout=3, metadata=name)
                ends[call.code().name] += 1
                if call.code() is not grpc.StatusCode.OK:
                    time.sleep(0.05)  # refusals are quick, and would use all of this machine

    with from_address(attacker, six.port("A")) as address, ThreadPoolExecutor(64) as pool:
        for _ in range(64):
            pool.submit(attack, address)
        try:
            until(lambda: six.metrics("A").queue_size > 20)
            request = pb2.Request(payload=b"1", handler=handler, mode=pb2.ANY)
            name = ((codec.CALLER_KEY, "steady"),)
            answered, took = 0, []
            for _ in range(20):
                began = time.monotonic()
                with contextlib.suppress(grpc.RpcError):
                    six.stub("A").Forward(request, timeout=3, metadata=name)
                    answered += 1
                    took.append(time.monotonic() - began)
        finally:
            stop.set()
    assert answered >= 19, ends
    assert sorted(took)[len(took) // 2] < 1.5, took
