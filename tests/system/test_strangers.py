"""With no more than the port: what strangers do, and that honest clients do not notice."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from faults.strangers import (
    CONTINUATION,
    FAR,
    HEADERS,
    NEAR,
    PING,
    PREFACE,
    SETTINGS,
    WINDOW_UPDATE,
    Stranger,
    Strangers,
    block,
    call_headers,
    field,
    frame,
    half,
    has_far,
    inflating,
    message,
)
from overlay.transport.codec import pb2
from tests.harness.cluster import IDS, Overlay, six_processes, until
from tests.harness.strangers import MIN_FILES, Besieged, Few, raw
from tests.harness.watch import Watched

FORWARD, STREAM = "/OverlayNode/Forward", "/OverlayNode/ForwardStream"
METRICS = "/OverlayNode/GetMetrics"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
DRAIN, LOGS = "/OverlayAdmin/Drain", "/OverlayAdmin/Logs"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
MIB = 1 << 20

HANDLERS = '''
import pathlib, time

def nap(payload, context):
    """Sleeps so many milliseconds."""
    until = time.monotonic() + int(payload) / 1000
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.005)
    return payload

def held(payload, context):
    """Until the file is there, whose name is in the options."""
    released = pathlib.Path(context.options["released"])
    while not released.exists() and not context.cancelled:
        time.sleep(0.01)
    return payload

def large(payload, context):
    return bytes(int(payload))

def endless(payload, context):
    """Far more than one may be sent, a chunk at a time."""
    for _ in range(4096):
        yield bytes(1 << 20)

def raises(payload, context):
    raise RuntimeError("on purpose")
'''

pytestmark = pytest.mark.timeout(180)
far = pytest.mark.skipif(not has_far(), reason=f"this machine has no {FAR}")
SOURCES = [pytest.param(FAR, marks=far, id="from-elsewhere"), pytest.param(NEAR, id="from-here")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("besieged")


@pytest.fixture(scope="module")
def besieged(folder: Path) -> Iterator[Besieged]:
    with six_in(folder) as found:
        yield found


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Besieged]:
    """Nothing was ever asked of these: what is freed and kept of earlier bursts is not in the
    way of those who measure."""
    with six_in(tmp_path) as found:
        yield found


@contextlib.contextmanager
def six_in(folder: Path) -> Iterator[Besieged]:
    def handler(name: str, slots: int) -> dict[str, object]:
        options = {"released": str(folder / "released")}
        return {"call": f"mine:{name}", "slots": slots, "options": options}

    (folder / "mine.py").write_text(HANDLERS)
    handlers = {
        "echo": {"call": "overlay.workers.api:echo"},
        "nap": handler("nap", 2),
        "held": handler("held", 4),
        "large": handler("large", 8),
        "endless": handler("endless", 8),
        "raises": handler("raises", 4),
    }
    six = Few(folder, six_processes(handlers=handlers))
    try:
        yield Besieged(six.start())
    finally:
        six.stop()


def ports(besieged: Besieged, ids: str) -> list[int]:
    return [besieged.six.port(process_id) for process_id in ids]


# 1. Calls that are never finished


# Only ForwardStream and the connections are bounded by address.
@pytest.mark.parametrize(
    ("method", "count", "asked", "source"),
    [
        (METRICS, 8, (), NEAR),
        (CHECK, 360, ("check",), NEAR),
        (WATCH, 8, ("watch",), NEAR),
        (DRAIN, 8, ("drain",), NEAR),
        (LOGS, 8, ("logs",), NEAR),
        (REFLECTION, 16, ("reflection",), NEAR),
        (FORWARD, 360, (), NEAR),
        pytest.param(FORWARD, 360, (), FAR, marks=far),
        (STREAM, 80, ("stream",), NEAR),
        pytest.param(STREAM, 80, ("stream",), FAR, marks=far),
    ],
)
def test_calls_without_a_message_hold_nothing_that_others_need(
    besieged: Besieged, method: str, count: int, asked: tuple[str, ...], source: str
) -> None:
    with besieged.attacked() as strangers:
        for port in ports(besieged, "ABE"):
            strangers.unfinished(port, method, count, source, says=(b"", half()))
        time.sleep(0.3)  # until they have been noticed
        besieged.serves(asked)


@far
def test_eight_calls_without_a_message_do_not_cut_the_leader_off_its_teams(besieged):
    with besieged.attacked() as strangers:
        for port in ports(besieged, "BE"):
            strangers.unfinished(port, METRICS, 4, FAR, beside=4)
            strangers.unfinished(port, WATCH, 4, FAR, beside=4)
        time.sleep(4)  # longer than a neighbour may be silent
        besieged.serves()
        assert [n.state for n in besieged.six.metrics("A").neighbours] == ["up", "up"]


# 2. Names of the health service


@pytest.mark.parametrize("method", [WATCH, CHECK])
def test_names_that_strangers_ask_the_health_of_take_no_memory(besieged, method):
    sent = [inflating(8, field(1, 8 * MIB + 8) + b"%08d" % number) for number in range(30)]
    assert sum(map(len, sent)) < MIB  # of which each makes a name of 8 MiB
    with besieged.attacked() as strangers:
        one = strangers.connect(besieged.six.port("A"), NEAR)
        for packed in sent:
            one.open(method, message(packed, True), end=True, headers=[("grpc-encoding", "gzip")])
        time.sleep(1)
        besieged.serves(["check", "watch"])


def test_many_names_of_the_health_service_are_not_kept_either(besieged):
    """8,000 of 20 KB: little by little, and 160 MB in the end."""
    with besieged.attacked() as strangers:
        for number in range(8_000):
            if number % 500 == 0:
                one = strangers.connect(besieged.six.port("B"), NEAR)
            name = b"%05d" % number + b"x" * 20_000
            packed = gzip.compress(field(1, len(name)) + name, 1)
            one.open(WATCH, message(packed, True), end=True, headers=[("grpc-encoding", "gzip")])
        time.sleep(1)
        besieged.serves(["check", "watch"])


# 3. Repeats of a key


@pytest.mark.parametrize("source", SOURCES)
def test_repeats_of_a_key_whose_callers_left_hold_no_thread(besieged, folder, source):
    released = folder / "released"
    released.unlink(missing_ok=True)
    request = pb2.Request(payload=b"x", mode=pb2.ANY, handler="held", idempotency_key="again")
    body = message(request.SerializeToString())
    try:
        with besieged.attacked() as strangers:
            first = strangers.connect(besieged.six.port("A"), source)
            first.open(FORWARD, body, end=True)
            time.sleep(0.2)
            crowd = strangers.crowd(50, besieged.six.port("A"), source=source)
            for one in crowd:
                for _ in range(8):
                    one.open(FORWARD, body, end=True)
            time.sleep(0.5)
            for one in crowd:
                one.close()
            time.sleep(0.5)
            besieged.serves()
            released.touch()
    finally:
        released.touch()


# 4. Streams, connections, descriptors


@far
@pytest.mark.parametrize("count", [70, 900])
def test_idle_streams_of_one_address_lock_nobody_else_out(besieged, count):
    with besieged.attacked() as strangers:
        for port in ports(besieged, "AB"):
            strangers.unfinished(port, STREAM, count, FAR, beside=1 if count < 100 else 10)
        time.sleep(0.3)
        besieged.serves(["stream"])
    if count > 500:
        lines = besieged.six.log("A").splitlines()
        assert [x for x in lines if FAR in x and "WARNING" in x], "nothing tells who was refused"


@far
def test_a_neighbour_that_restarts_finds_its_way_in_beside_idle_streams(besieged):
    six = besieged.six
    with besieged.attacked() as strangers:
        for port in ports(besieged, "BE"):
            strangers.unfinished(port, STREAM, 80, FAR)
        time.sleep(0.3)
        six.kill("A")
        six.start("A")
        besieged.restarted("A")
        besieged.serves()


@pytest.mark.skipif(sys.platform == "win32", reason="it counts no descriptors")
@pytest.mark.parametrize(
    ("process_id", "source"),
    [
        pytest.param("A", FAR, marks=far, id="who-can-have-more-takes-more"),
        pytest.param("E", FAR, marks=far, id="who-cannot-keeps-some-for-others"),
    ],
)
def test_more_connections_than_descriptors_shut_nobody_else_out(besieged, process_id, source):
    with besieged.attacked() as strangers:
        port = besieged.six.port(process_id)
        for says in (b"", PREFACE[:9], PREFACE):
            strangers.crowd(20, port, source=source, first=says)
        strangers.silent(MIN_FILES + 176, port, source)
        time.sleep(0.5)
        besieged.serves()
        tries = [is_let_in(port) for _ in range(200)]
    print(f"{sum(tries)} of {len(tries)} were let in")
    assert sum(tries) >= 0.9 * len(tries)


def is_let_in(port: int) -> bool:
    """Whether somebody new is greeted, who comes once."""
    with socket.create_connection((NEAR, port), 2, (NEAR, 0)) as new:
        try:
            new.sendall(PREFACE + frame(SETTINGS, 0, 0))
            return bool(new.recv(100))
        except OSError:
            return False
        finally:
            time.sleep(0.005)  # so that they meet the siege's whole course


# 5. Names of callers, keys


@far
def test_a_new_name_for_each_call_takes_no_share_from_another_address(besieged):
    made = pb2.Request(payload=b"100", mode=pb2.ANY, handler="nap").SerializeToString()
    numbers = itertools.count()
    with besieged.attacked() as strangers:
        crowd = strangers.crowd(20, besieged.six.port("A"), source=FAR)

        def more() -> None:
            for one in crowd:
                for _ in range(2):
                    name = [("overlay-caller", f"n{next(numbers)}"), ("grpc-timeout", "3S")]
                    one.open(FORWARD, message(made), end=True, headers=name)

        strangers.again(more, 0.1)  # 400 a second, and the workers can do 60
        time.sleep(1)
        answered = honest_naps(besieged.six, 20)
        besieged.serves()
    print(f"{answered} of 20; the strangers sent {next(numbers)}")
    assert answered >= 18


def honest_naps(six: Overlay, count: int) -> int:
    """How many of these calls, five at a time, are answered."""

    def ask(_: int) -> bool:
        request = pb2.Request(payload=b"20", mode=pb2.ANY, handler="nap")
        with raw(six) as channel:
            forward = channel.unary_unary(
                FORWARD, pb2.Request.SerializeToString, pb2.Response.FromString
            )
            try:
                return forward(request, timeout=2).result == b"20"
            except grpc.RpcError:
                return False

    with ThreadPoolExecutor(5) as pool:
        return sum(pool.map(ask, range(count)))


@far
def test_a_stranger_neither_takes_nor_poisons_another_ones_key(besieged):
    key = f"order {time.monotonic_ns()}"
    named = [("overlay-caller", "payroll")]

    def asked(payload: bytes) -> pb2.Request:
        return pb2.Request(payload=payload, mode=pb2.ANY, handler="echo", idempotency_key=key)

    with besieged.attacked() as strangers:
        stranger = strangers.connect(besieged.six.port("A"), FAR)
        poison = stranger.ask(FORWARD, asked(b"poison").SerializeToString(), named)
        answer = besieged.six.stub("A").Forward(asked(b"mine"), timeout=5, metadata=named)
        taken = stranger.ask(FORWARD, asked(b"mine").SerializeToString(), named)

    assert pb2.Response.FromString(poison).result.endswith(b": poison")
    assert answer.result.endswith(b": mine")
    assert taken == b""  # the stranger's own key was for another payload


@far
@pytest.mark.parametrize("process_id", ["A", "C"])
def test_a_stranger_that_calls_itself_a_process_is_told_of_by_its_address(besieged, process_id):
    request = pb2.Request(payload=b"x", mode=pb2.ANY, handler="raises", hops=["B"], targets=["C"])
    named, ids = [("overlay-caller", "A")], [time.monotonic_ns() + number for number in range(3)]
    with besieged.attacked() as strangers:
        one = strangers.connect(besieged.six.port(process_id), FAR)
        for request.request_id in ids:
            one.ask(FORWARD, request.SerializeToString(), named)
            request.hops[:] = []
        asked = pb2.MetricsRequest(requests=40)
        stories = besieged.six.stub(process_id).GetMetrics(asked, timeout=5).requests
    failed = [story.caller for story in stories if story.request_id in ids]
    assert failed
    assert all(FAR in caller for caller in failed), failed


# 6. What only processes say, and the protocol's own tricks


@far
def test_what_only_processes_say_gives_a_stranger_no_larger_share(besieged):
    numbers = itertools.count(1)
    with besieged.attacked() as strangers:
        crowd = strangers.crowd(20, besieged.six.port("A"), source=FAR)

        def more() -> None:
            for one, _ in itertools.product(crowd, range(2)):
                request = pb2.Request(
                    payload=b"100",
                    mode=pb2.ANY,
                    handler="nap",
                    hops=[f"X{next(numbers)}"],
                    targets=["C", "D", "F"],
                    attempt=next(numbers) % 2,
                    priority=9,
                )
                headers = [("grpc-timeout", "3S"), ("overlay-caller", f"n{next(numbers)}")]
                body = message(request.SerializeToString())
                one.open(FORWARD, body, end=True, headers=headers)

        strangers.again(more, 0.1)
        time.sleep(1)
        answered = honest_naps(besieged.six, 20)
        besieged.serves()
    assert answered >= 18


def parts_of(handler: str, payload: bytes, **fields: object) -> pb2.Segment:
    column = pb2.Column(items=[payload])
    return pb2.Segment(number=1, count=1, payloads=column, handler=handler, **fields)


@pytest.mark.parametrize("targets", [[], ["C", "D", "F"]], ids=["as-a-client", "as-a-process"])
def test_grants_beyond_the_window_bring_no_more_than_the_window(besieged, targets):
    asked = parts_of(
        "endless", b"", as_they_come=True, chunks=64, want_parts=True, targets=targets,
        hops=["X"] if targets else [], remaining_us=3_000_000,
    )  # fmt: skip
    grants = [pb2.Grant(number=1, process_id=i, count=2**31) for i in "CDF"]
    first = message(pb2.Frame(segments=[asked]).SerializeToString())
    more = message(pb2.Frame(grants=grants).SerializeToString())
    with besieged.attacked() as strangers:
        for one in strangers.crowd(6, besieged.six.port("A"), source=NEAR, window=0):
            stream = one.open(STREAM, first)
            for _ in range(20):
                one.say(stream, more)
        time.sleep(1)
        besieged.serves(["stream"])


def large_streams(strangers: Strangers, port: int, source: str, window: int) -> None:
    """Twenty-four, each with what one may have unread: 64 MiB."""
    column = pb2.Column(items=[b"1048576"] * 64)
    asked = pb2.Segment(number=1, count=64, payloads=column, mode=pb2.ANY, handler="large")
    body = message(pb2.Frame(segments=[asked]).SerializeToString())
    for one in strangers.crowd(24, port, source=source, window=window):
        one.open(STREAM, body)


def large_calls(strangers: Strangers, port: int, source: str, window: int) -> None:
    """A hundred of 4 MiB."""
    asked = pb2.Request(payload=b"4194304", mode=pb2.ANY, handler="large")
    body = message(asked.SerializeToString())
    for one in strangers.crowd(20, port, source=source, window=window):
        for _ in range(5):
            one.open(FORWARD, body, end=True)


@pytest.mark.parametrize(
    ("large", "source"),
    [(large_calls, NEAR), (large_streams, NEAR), pytest.param(large_streams, FAR, marks=far)],
)
def test_clients_that_do_not_read_are_bounded_together(besieged, large, source):
    """They may cost what the same clients cost that read, and a bounded share of what is left."""
    port = besieged.six.port("A")
    with besieged.attacked(memory_mib=2048) as strangers:  # they read
        large(strangers, port, source, 1 << 30)
        time.sleep(1)
    with besieged.attacked(beyond=besieged.peaks) as strangers:
        large(strangers, port, source, 0)
        time.sleep(1)
        besieged.serves(["stream"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_an_answer_that_is_not_read_is_held_no_more_than_twice(untouched):
    """Once in Python and once in gRPC: 36 to 49 MiB. With the tickets kept it was 74 to 88."""
    asked = pb2.Request(payload=b"4194304", mode=pb2.ANY, handler="large")
    body, count = message(asked.SerializeToString()), 6  # there is room for all of them
    six = untouched.six
    process = psutil.Process(six.metrics("A").pid)

    def answers(one: Stranger) -> int:
        """What A has when it has answered all of them, one after another."""
        before = six.metrics("A").completed
        for number in range(1, count + 1):
            one.open(FORWARD, body, end=True)
            until(lambda n=before + number: six.metrics("A").completed >= n, 5, "answered")
            time.sleep(0.2)
        return min(rss() for _ in range(20))  # what is only on its way is not held

    def rss() -> int:
        time.sleep(0.05)
        return process.memory_info().rss

    with untouched.attacked(memory_mib=2048) as strangers:
        read = answers(strangers.connect(six.port("A"), NEAR, window=1 << 30))
        unread = answers(strangers.connect(six.port("A"), NEAR, window=0))
    held = (unread - read) / MIB
    print(f"{held:.0f} MiB came with {count} answers of 4 MiB")
    assert held < 2.5 * 4 * count


@pytest.mark.parametrize("method", [FORWARD, STREAM, METRICS, CHECK])
def test_a_message_that_inflates_is_refused_before_it_is_large(besieged, method):
    packed = inflating(512, field(15, 512 * MIB))
    assert len(packed) < MIB
    with besieged.attacked() as strangers:
        one = strangers.connect(besieged.six.port("A"), NEAR)
        one.open(method, message(packed, True), end=True, headers=[("grpc-encoding", "gzip")])
        time.sleep(0.7)
        besieged.serves()


@pytest.mark.parametrize("method", [FORWARD, STREAM])
def test_many_messages_that_inflate_to_what_is_allowed_are_bounded_together(besieged, method):
    packed = inflating(12, field(15, 12 * MIB))
    assert 50 * len(packed) < MIB
    with besieged.attacked() as strangers:
        for one in strangers.crowd(50, besieged.six.port("A"), source=NEAR):
            one.open(method, message(packed, True), headers=[("grpc-encoding", "gzip")])
        time.sleep(0.7)
        besieged.serves()


@pytest.mark.parametrize("source", SOURCES)
def test_calls_that_are_taken_back_at_once_cost_only_their_connection(besieged, source):
    body = message(pb2.Request(payload=b"hi", mode=pb2.ANY, handler="echo").SerializeToString())
    with besieged.attacked() as strangers:
        for port in ports(besieged, "ABE"):
            crowd = strangers.crowd(4, port, source=source)

            def more(crowd: list[Stranger] = crowd) -> None:
                for one in crowd:
                    for method in (FORWARD, STREAM, METRICS, WATCH) * 3:
                        one.leave(one.open(method, body, end=True))

            strangers.again(more, 0.03)
        time.sleep(1)
        besieged.serves(["stream", "check"])


def pings(one: Stranger) -> None:
    one.send(frame(PING, 0, 0, bytes(8)) * 200)


def settings(one: Stranger) -> None:
    one.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535) * 20) * 50)


def windows(one: Stranger) -> None:
    one.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * 500)


def crumbs(one: Stranger) -> None:
    """A message of 64 KiB, one byte in each frame."""
    stream = one.open(FORWARD, half(65_000))
    for _ in range(300):
        one.say(stream, b"x")


def continuations(one: Stranger) -> None:
    made = block(call_headers(FORWARD))
    stream = one.begin()
    one.send(frame(HEADERS, 0, stream, made))
    one.send(frame(CONTINUATION, 0, stream, block([("x", "y" * 4000)])) * 20)


def large_metadata(one: Stranger) -> None:
    one.open(FORWARD, message(b""), end=True, headers=[(f"x{n}", "y" * 3000) for n in range(5)])


@pytest.mark.parametrize(
    "noise",
    [pings, settings, windows, crumbs, continuations, large_metadata],
    ids=lambda noise: noise.__name__,
)
def test_noise_on_a_connection_is_heard_by_nobody_else(besieged, noise):
    with besieged.attacked() as strangers:
        for port in ports(besieged, "AE"):
            crowd = strangers.crowd(4, port, source=NEAR)

            def more(crowd: list[Stranger] = crowd, port: int = port) -> None:
                for number, one in enumerate(crowd):
                    if one.is_gone:
                        crowd[number] = one = strangers.connect(port, NEAR)
                    noise(one)

            strangers.again(more, 0.03)
        time.sleep(0.7)
        besieged.serves()


# After all of it; the last of this file.


def test_told_to_stop_the_six_do_so_in_order(besieged):
    with besieged.attacked():
        besieged.serves()
    for process_id in IDS:
        lines = besieged.six.log(process_id).splitlines()
        assert [x for x in lines if "Traceback" in x and "on purpose" not in x] == []
    Watched(besieged.six).stops_in_order()
