"""Honest callers are served whatever others do: real processes, the public library, the wire."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
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
    """The payload is the time to take in ms."""
    until = time.monotonic() + float(payload or b"0") / 1000
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.005)
    return context.process_id.encode()

def slow(payload, context):
    return work(payload, context)

def hangs_at_f(payload, context):
    while context.process_id == "F" and not context.cancelled:
        time.sleep(0.02)
    return context.process_id.encode()
'''


NAMES = "work", "slow", "hangs_at_f"
TURNS = 14  # tests that share an overlay


@dataclass(frozen=True)
class Turn:
    """The shared overlay, and handlers that no test before this one has asked for."""

    six: Overlay
    number: int

    def handler(self, name: str) -> str:
        return f"{name}_{self.number}"


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Turn]]:
    folder = tmp_path_factory.mktemp("fairness")
    (folder / "mine.py").write_text(MINE)
    call = {f"{n}_{i}": {"call": f"mine:{n}", "slots": 100} for n in NAMES for i in range(TURNS)}
    with running(folder, six_processes(handlers=call)) as six:
        yield (Turn(six, number) for number in range(TURNS))


@pytest.fixture
def turn(turns: Iterator[Turn]) -> Iterator[Turn]:
    """What was learned of a handler stays with its name; all else is idle again at the end."""
    found = next(turns)
    yield found
    until(lambda: all(is_idle(found.six, i) for i in IDS), 20, "all processes are idle")


def is_idle(six: Overlay, process_id: str) -> bool:
    found = six.metrics(process_id)
    return not (found.active_requests or found.queue_size or found.streamed_waiting)


@pytest.fixture(params=[Unary, Streamed])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = request.param()
    yield made
    made.close()


@contextlib.contextmanager
def from_address(address: str, port: int) -> Iterator[str]:
    """Where to connect to be a client that comes to `port` from this address of the machine."""
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


# What took long, or hung, does not close the way of what is quick.


@pytest.mark.parametrize("mode", [pb2.ALL, pb2.ANY])
def test_after_one_long_call_an_idle_overlay_refuses_no_short_one(
    turn: Turn, mode, way: Way
) -> None:
    six = turn.six
    way.ask(six, "A", b"2000", handler=turn.handler("work"), mode=mode)

    for _ in range(5):
        calls = way.at_once(
            six, 10, payload=b"10", handler=turn.handler("work"), mode=mode, timeout=1.5
        )
        outcomes = [Outcome(call) for call in calls]
        assert [o.details for o in outcomes if not o.ok] == []


@pytest.mark.parametrize("mode", ["all", "any"])
def test_after_one_long_call_the_library_is_refused_no_short_one(turn: Turn, mode) -> None:
    six = turn.six
    with overlay.connect(six.address("A")) as leader:
        leader.call(b"2000", handler=turn.handler("work"), mode=mode, timeout=10)
        for _ in range(20):
            assert leader.call(b"10", handler=turn.handler("work"), mode=mode, timeout=1.5).result
        found = leader.map(turn.handler("work"), [b"10"] * 100, mode=mode, timeout=5)
        assert len(list(found)) == 100


def test_a_worker_that_never_answers_costs_its_own_part_and_nobody_is_refused(
    turn: Turn, way: Way
) -> None:
    six = turn.six
    for _ in range(4):
        calls = way.at_once(six, 5, handler=turn.handler("hangs_at_f"), timeout=0.6)
        outcomes = [Outcome(call) for call in calls]
        assert [o.details for o in outcomes if not o.ok] == []
        assert {o.response.result for o in outcomes} == {b"C\nD"}


def test_a_call_at_a_time_is_answered_beside_a_worker_that_never_does(turn: Turn) -> None:
    six = turn.six
    with overlay.connect(six.address("A")) as leader:
        for timeout in (1.2, 0.6, 0.6, 0.6):
            assert (
                leader.call(b"", handler=turn.handler("hangs_at_f"), timeout=timeout).result
                == b"C\nD"
            )


# What is slow has not all the places.


@pytest.mark.parametrize("mode", [pb2.ALL, pb2.ANY])
def test_a_callers_many_slow_calls_leave_places_to_its_other_handlers(
    turn: Turn, mode, way: Way
) -> None:
    six, slow_handler = turn.six, turn.handler("slow")
    slow = way.at_once(six, 400, payload=b"8000", handler=slow_handler, mode=mode, timeout=15)
    # Of 300 slots; a stream fills what one handler may have, single calls 80 of A's places.
    busy = 75 if isinstance(way, Unary) else 200
    until(lambda: sum(six.metrics(w).active_requests for w in "CDF") >= busy)

    for handler in (turn.handler("work"), "") * 5:
        assert way.ask(six, "A", b"1", handler=handler, mode=mode, timeout=5).result
    for call in slow:
        call.cancel()


def test_another_callers_calls_are_served_beside_slow_ones(turn: Turn) -> None:
    six, handler = turn.six, turn.handler("work")
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


# A name costs nothing, and buys nothing.


@pytest.mark.parametrize("attacker", ["127.0.0.2", "127.0.0.1"])
def test_a_new_name_for_each_call_takes_no_turn_from_a_steady_one(overlays, attacker) -> None:
    six = overlays(MINE, handlers={"work": {"call": "mine:work", "slots": 2}})
    stop, numbers, ends = threading.Event(), itertools.count(), Counter[str]()

    def attack(address: str) -> None:
        request = pb2.Request(payload=b"50", handler="work", mode=pb2.ANY)
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = pb2_grpc.OverlayNodeStub(channel)
            while not stop.is_set():
                name = ((codec.CALLER_KEY, f"new {next(numbers)}"),)
                call = stub.Forward.future(request, timeout=3, metadata=name)
                ends[call.code().name] += 1
                if call.code() is not grpc.StatusCode.OK:
                    time.sleep(0.05)  # a refusal is quick; the machine is shared

    with from_address(attacker, six.port("A")) as address, ThreadPoolExecutor(64) as pool:
        for _ in range(64):
            pool.submit(attack, address)
        try:
            until(lambda: six.metrics("A").queue_size > 20)
            request = pb2.Request(payload=b"1", handler="work", mode=pb2.ANY)
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
