"""ForwardStream served over a real connection, by a process whose handlers the test controls."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from unittest import mock

import grpc
import pytest

from overlay.calls import stream_session
from overlay.calls.reception import Reception
from overlay.calls.request_log import Ended, RequestLog
from overlay.calls.request_path import RequestPath
from overlay.model.errors import NoTimeLeft, OverlayError
from overlay.model.limits import Limits
from overlay.model.segments import (
    Caller,
    Cancel,
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    OnResult,
    PartSlice,
    Progress,
    Segment,
    Slice,
)
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.observability.map_progress import Maps
from overlay.queueing.request_queue import RequestQueue
from overlay.transport import codec, endpoints
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.timers import Deadlines
from overlay.transport.validation import Asked
from tests.harness.cluster import until

LIMITS = replace(Limits(), window_rows=64, segment_rows=64, stream_threads=8)
KIB = 1024


@dataclass(frozen=True)
class Place:
    count: int


@dataclass
class Desk:
    """A worker that answers `answer(payload)` at once, or holds what was started in `held`."""

    answer: Callable[[bytes], bytes] = lambda payload: b"W: " + payload
    places: int = 10**9
    held: list[tuple[Segment, OnResult]] | None = None
    ended: list[tuple[Code, int, int]] = field(default_factory=list)
    started: list[tuple[Segment, OnResult]] = field(default_factory=list)
    running: int = 0
    answered: int = 0
    failures: list[OverlayError] = field(default_factory=list)
    wired: bool = False
    traces_all: bool = False

    def claim(self, route, count, patient_until, streamed) -> Place | None:
        count = min(count, self.places - self.running)
        return Place(count) if count > 0 else None

    def start(self, segment: Segment, place: Place, waited_s: float, sink: OnResult) -> Cancel:
        self.running += len(segment)
        self.started.append((segment, sink))
        if self.held is None:
            self.finish(segment, sink)
        else:
            self.held.append((segment, sink))

        def end(code: Code, start: int, count: int) -> None:
            self.ended.append((code, start, count))
            column = PartSlice.missing("W", count, Detail(code, "ended", Executed.YES))
            sink(start, Slice(count, (column,), ("W",)))

        return end

    def finish(self, segment: Segment, sink: OnResult, start: int = 0, count: int = 10**9) -> None:
        rows = [self.answer(payload) for payload in segment.payloads.items[start : start + count]]
        self.running -= len(rows)
        sink(start, Slice(len(rows), (PartSlice("W", self._column(rows)),), ("W",)))

    def release(self) -> None:
        held, self.held = self.held or [], None
        for segment, sink in held:
            self.finish(segment, sink)

    def _column(self, rows: list[bytes]) -> Column:
        if not self.wired:
            return Column(rows)
        made = pb2.Column(items=rows)  # as from a process below
        return codec._read_column(made, len(rows))


class FakeRequestLog(RequestLog):
    """Reports to its desk, and traces requests only if the desk says so."""

    def __init__(self, desk: Desk) -> None:
        super().__init__("W", works=True)
        self._desk = desk
        self.wants_trace = lambda: desk.traces_all

    def record_end(self, ended: Ended) -> None:
        self._desk.answered += ended.count
        self._desk.failures += [error for _, error in ended.failures]
        super().record_end(ended)


class Served:
    """A server for one desk, and a client."""

    def __init__(self, desk: Desk, limits: Limits = LIMITS) -> None:
        self.desk = desk
        worker = Process("W", "worker", "green", "h", 1, handler="h")
        specs = {"h": HandlerSpec("h", "none:none")}
        self.queue = RequestQueue(
            "W",
            slots=9,
            in_service=9,
            max_bytes=10**9,
            claim=desk.claim,
            start=desk.start,
        )
        self.deadlines = Deadlines(lambda queued: queued.end(Code.DEADLINE_EXCEEDED))
        self.streams: list[stream_session._Session] = []
        topology = Topology({"W": worker}, specs, limits=limits)
        self.request_log = FakeRequestLog(desk)
        self.path = RequestPath(topology, "W", self.queue, self.request_log)
        self.sessions = stream_session.StreamSessions(self.path, self.deadlines)
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=endpoints.server_options(limits))
        reception = Reception(self._server, self._pool, limits, self.request_log)
        pb2_grpc.add_OverlayNodeServicer_to_server(self._servicer(), reception)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}", endpoints.channel_options(limits)
        )
        self.stub = pb2_grpc.OverlayNodeStub(self.channel)

    def start(self) -> None:
        self._server.start()
        self.deadlines.start()

    def stop(self) -> None:
        self.channel.close()
        self._server.stop(0).wait(5)
        self.deadlines.stop()
        self._pool.shutdown(wait=True)
        self.sessions.threads.close()
        self.request_log.close()
        until(lambda: not stream_threads(), 5)

    @property
    def received(self) -> int:
        return self.request_log.meter.counts().received

    def call(self, frames: Iterable[pb2.Frame]) -> grpc.Call:
        return self.stub.ForwardStream(iter(frames), timeout=20, wait_for_ready=True)

    def _servicer(self) -> pb2_grpc.OverlayNodeServicer:
        served = self

        class Servicer(pb2_grpc.OverlayNodeServicer):
            def ForwardStream(self, call, context):
                return served.sessions.serve(call, context)

        return Servicer()


@contextmanager
def serving(desk: Desk, limits: Limits = LIMITS) -> Iterator[Served]:
    served = Served(desk, limits)
    real = stream_session._Session

    def keep(*made: object) -> stream_session._Session:
        served.streams.append(real(*made))
        return served.streams[-1]

    with mock.patch.object(stream_session, "_Session", keep):
        served.start()
        try:
            yield served
        finally:
            desk.release()
            served.stop()


class Sender:
    """Frames that the test sends one by one; `close` is the half-close."""

    def __init__(self, *frames: pb2.Frame) -> None:
        self._frames: SimpleQueue[pb2.Frame | None] = SimpleQueue()
        self.send(*frames)

    def send(self, *frames: pb2.Frame) -> None:
        for frame in frames:
            self._frames.put(frame)

    def close(self) -> None:
        self._frames.put(None)

    def __iter__(self) -> Iterator[pb2.Frame]:
        return iter(self._frames.get, None)


def segment(number: int, *rows: bytes, **fields: object) -> pb2.Segment:
    fields = {"count": len(rows), **fields}
    return pb2.Segment(number=number, payloads=pb2.Column(items=rows), **fields)


def frame(*segments: pb2.Segment, cancels: Iterable[pb2.Cancel] = ()) -> pb2.Frame:
    return pb2.Frame(segments=segments, cancels=cancels)


def rows_of(frames: Iterable[pb2.Frame]) -> dict[tuple[int, int], pb2.Detail | bytes]:
    """(number, row) -> its result or failure; each must be there once."""
    found: dict[tuple[int, int], pb2.Detail | bytes] = {}
    for made in itertools.chain.from_iterable(frame.slices for frame in frames):
        failures = {
            row: detail
            for detail in made.failures
            for row in range(detail.start, detail.start + (detail.count or made.count))
        }
        assert len(made.results.items) in (0, made.count)
        for i in range(made.count):
            key = made.number, made.start + i
            assert key not in found, f"{key} was answered twice"
            found[key] = failures[i] if i in failures else made.results.items[i]
    return found


def codes(found: dict[tuple[int, int], pb2.Detail | bytes]) -> dict[tuple[int, int], int]:
    return {key: 0 if isinstance(it, bytes) else it.code for key, it in found.items()}


def is_idle(served: Served) -> bool:
    return served.queue.streamed == (0, 0, 0) and not served.deadlines._ticks


def test_each_row_of_each_segment_is_answered_once_with_its_own_result():
    sizes = [1, 5, 64, 2, 17]
    with serving(Desk()) as served:
        sent = [
            frame(segment(n, *(b"%d/%d" % (n, row) for row in range(size))))
            for n, size in enumerate(sizes)
        ]
        found = rows_of(served.call(sent))
        until(lambda: is_idle(served), 5)

    assert found == {
        (n, row): b"W: %d/%d" % (n, row) for n, size in enumerate(sizes) for row in range(size)
    }
    assert served.received == served.desk.answered == sum(sizes)
    assert (served.streams[0]._rows, served.streams[0]._held.size) == (0, 0)


def test_after_a_half_close_everything_accepted_is_answered():
    desk = Desk(held=[])
    with serving(desk) as served:
        call = served.call([frame(segment(n, b"x", b"y")) for n in range(10)])
        until(lambda: len(desk.held) == 10, 5)
        threading.Timer(0.3, desk.release).start()

        found = rows_of(call)

    assert len(found) == 20
    assert call.code() is grpc.StatusCode.OK


def test_slices_may_be_answered_in_any_order_by_many_threads():
    chance, desk = random.Random(5), Desk(held=[])
    with serving(desk) as served, ThreadPoolExecutor(4) as threads:
        payloads = [b"%d" % row for row in range(60)]
        call = served.call([frame(segment(7, *payloads))])
        ((work, sink),) = until(lambda: desk.held, 5)
        rows = list(range(60))
        chance.shuffle(rows)
        for row in rows:
            threads.submit(desk.finish, work, sink, row, 1)
        found = rows_of(call)
        desk.held = []
        until(lambda: is_idle(served), 5)

    assert found == {(7, row): b"W: %d" % row for row in range(60)}


def test_the_client_learns_that_its_stream_is_served_before_it_sends_anything():
    sender = Sender()
    with serving(Desk()) as served:
        call = served.call(sender)
        call.initial_metadata()
        until(lambda: served.queue.streamed[0] == 1, 5)

        sender.close()
        assert list(call) == []
        until(lambda: is_idle(served), 5)


def test_a_number_may_be_reused_once_its_segment_is_answered():
    sender = Sender(frame(segment(1, b"a")))
    with serving(Desk()) as served:
        call = served.call(sender)
        first = next(call)
        until(lambda: not served.streams[0]._accepted, 5)
        sender.send(frame(segment(1, b"b")))
        sender.close()

        assert rows_of([first]) == {(1, 0): b"W: a"}
        assert rows_of(call) == {(1, 0): b"W: b"}


INVALID = {
    "a number that is taken": ([segment(1, b"a"), segment(1, b"b")], "number: 1 is taken"),
    "no rows": ([segment(1)], "count: 0 is not"),
    "too many rows": ([segment(1, *[b""] * 65)], "count: 65 is not"),
}


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_frame_ends_the_call_and_its_open_requests(what):
    segments, sentence = INVALID[what]
    desk = Desk(held=[])
    with serving(desk) as served:
        call = served.call(Sender(frame(segment(9, b"before")), frame(*segments)))
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        until(lambda: is_idle(served), 5)

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith(sentence)
    assert (Code.CANCELLED, 0, 1) in desk.ended


BAD = {
    "a wrong count": (segment(1, b"a", b"b", count=3), "count: 3 is not the number"),
    "a name of another world": (segment(1, b"a", team="x" * 65), "team: 'xxxxxxxxx"),
    "no mode": (segment(1, b"a", mode=7), "mode 7 is not"),
    "too many hops": (segment(1, b"a", hops=["x"] * 65), "hops: 65 entries"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_unreadable_segment_is_refused_row_by_row_and_affects_no_other(what):
    bad, sentence = BAD[what]
    with serving(Desk()) as served:
        found = rows_of(served.call([frame(bad, segment(2, b"good"))]))

    refused = [detail for (number, _), detail in found.items() if number == 1]
    assert len(refused) == bad.count
    assert {(it.code, it.executed) for it in refused} == {(Code.INVALID_ARGUMENT, pb2.NO)}
    assert all(it.reason.startswith(sentence) for it in refused)
    assert found[2, 0] == b"W: good"


def test_an_invalid_stream_does_not_affect_others():
    sender, desk = Sender(frame(segment(1, b"a"))), Desk(held=[])
    with serving(desk) as served:
        good = served.call(sender)
        until(lambda: desk.held, 5)
        with pytest.raises(grpc.RpcError):
            list(served.call([frame(segment(1))]))
        desk.release()
        sender.close()

        assert rows_of(good) == {(1, 0): b"W: a"}


def test_a_segment_with_an_invalid_route_is_refused_for_each_row_with_proof():
    with serving(Desk()) as served:
        found = rows_of(served.call([frame(segment(1, b"a", b"b", team="pink"))]))
        served.queue.close()
        found |= rows_of(served.call([frame(segment(2, b"a"))]))

    unknown, stopping = Code.NOT_FOUND, Code.UNAVAILABLE
    assert codes(found) == {(1, 0): unknown, (1, 1): unknown, (2, 0): stopping}
    assert {detail.executed for detail in found.values()} == {pb2.NO}
    assert found[2, 0].retry_after_ms > 0


def test_cancelled_rows_are_answered_as_cancelled_and_the_others_as_usual():
    desk = Desk(held=[], places=3)
    sender = Sender(frame(segment(1, *[b"%d" % row for row in range(6)])))
    with serving(desk) as served:
        call = served.call(sender)
        until(lambda: desk.held, 5)
        sender.send(frame(cancels=[pb2.Cancel(number=1, start=2, count=2)]))
        sender.send(frame(cancels=[pb2.Cancel(number=1, start=5, count=2**32 - 1)]))
        sender.send(frame(cancels=[pb2.Cancel(number=77, start=0, count=1)]))
        sender.close()
        until(lambda: desk.ended, 5)
        desk.running = 0
        desk.release()
        served.queue.kick()

        found = rows_of(call)

    cancelled = {row for row in range(6) if codes(found)[1, row] == Code.CANCELLED}
    assert cancelled == {2, 3, 5}
    # Row 2 had started; 3 and 5 were still waiting for a place.
    assert (found[1, 2].executed, found[1, 3].executed) == (pb2.YES, pb2.NO)


def test_a_cancel_in_the_same_frame_as_its_segment_works():
    desk = Desk(held=[])
    with serving(desk) as served:
        cancel = pb2.Cancel(number=1, start=0, count=2)
        found = rows_of(served.call([frame(segment(1, b"a", b"b"), cancels=[cancel])]))
    assert set(codes(found).values()) == {Code.CANCELLED}


def test_expired_rows_are_answered_in_time_whether_started_or_not():
    desk = Desk(held=[], places=2)
    with serving(desk) as served:
        began = time.monotonic()
        found = rows_of(served.call([frame(segment(1, *[b""] * 4, remaining_us=300_000))]))
        took = time.monotonic() - began
        until(lambda: not served.deadlines._ticks, 5)

    late, refused = Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED
    assert list(codes(dict(sorted(found.items()))).values()) == [late, late, refused, refused]
    assert 0.29 < took < 10


def test_urgent_requests_of_a_stream_start_before_earlier_ones():
    desk = Desk(held=[], places=0)
    sender = Sender(
        frame(segment(1, b"a", b"b"), segment(2, b"c", priority=3)),
        frame(segment(3, b"d"), segment(4, b"e", priority=9)),
    )
    with serving(desk) as served:
        answers = served.call(sender)
        until(lambda: served.queue.streamed == (1, 5, 0), 5)
        desk.places = 9
        served.queue.kick()
        desk.release()
        sender.close()
        started = [row for segment, _ in desk.started for row in segment.payloads.items]
        assert set(codes(rows_of(answers)).values()) == {Code.OK}

    assert started == [b"e", b"c", b"a", b"b", b"d"]


def test_a_row_without_time_is_refused_with_a_time_to_retry():
    desk = Desk()
    refusal = NoTimeLeft("too late", retry_after_s=1.25)
    with serving(desk) as served, mock.patch.object(served.queue, "admit_to", side_effect=refusal):
        found = rows_of(served.call([frame(segment(1, b"a", b"b"))]))

    assert [detail.retry_after_ms for detail in found.values()] == [1250, 1250]
    assert {detail.executed for detail in found.values()} == {Executed.NO}


def test_when_a_client_vanishes_its_rows_end_and_leave_nothing_behind():
    desk = Desk(held=[], places=3)
    with serving(desk) as served:
        call = served.call(Sender(frame(segment(1, *[b""] * 5)), frame(segment(2, b""))))
        until(lambda: desk.held and served.received == 6, 5)

        call.cancel()

        until(lambda: is_idle(served), 5)
        assert desk.ended
        assert {code for code, _, _ in desk.ended} == {Code.CANCELLED}
        assert (served.queue.waiting, served.queue.active) == (0, 0)


def test_every_row_of_a_client_that_vanished_is_counted_once():
    desk = Desk(held=[], places=3)
    with serving(desk) as served:
        call = served.call(Sender(frame(segment(1, *[b""] * 5)), frame(segment(2, b""))))
        until(lambda: desk.held and served.received == 6, 5)
        call.cancel()
        until(lambda: is_idle(served), 5)

        # received = completed + failed + refused + cancelled + what is waiting or in service
        until(lambda: desk.answered == served.received, 2, "rows are in no count")
    assert {error.code for error in desk.failures} == {Code.CANCELLED}


class OverCall:
    """A call that ends before it is served, or while it is being accepted."""

    def __init__(self, has_begun: bool) -> None:
        self._has_begun = has_begun

    def invocation_metadata(self):
        return ()

    def add_callback(self, callback):
        self.callback = callback
        return self._has_begun

    def send_initial_metadata(self, metadata):
        self.callback()
        raise grpc.RpcError


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_leaves_before_it_is_accepted_leaves_no_stream(has_begun):
    with serving(Desk()) as served:
        call = OverCall(has_begun)
        with suppress(grpc.RpcError):
            served.sessions.serve(call, call)
        assert served.queue.streamed == (0, 0, 0)
        assert not served.sessions.open, "a drain waits for it until its grace is over"


def flood(payload: bytes, rows: int, count: list[int]) -> Iterator[pb2.Frame]:
    for n in itertools.count(1):
        count[0] += rows
        yield frame(segment(n, *[payload] * rows, remaining_us=3600 * 10**6))
        if n > 20_000:
            return


def settled(value: Callable[[], int]) -> int:
    """The value, once it has been stable for half a second."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        before = value()
        time.sleep(0.5)
        if value() == before:
            return before
    raise AssertionError(f"still moving: {value()}")


@pytest.mark.parametrize("held", [True, False], ids=["unanswered", "unread"])
def test_a_client_that_sends_without_reading_is_bounded_by_rows(held):
    desk, sent = Desk(held=[] if held else None), [0]
    with serving(desk) as served:
        call = served.call(flood(b"x" * KIB, 8, sent))
        received = settled(lambda: served.received)
        (stream,) = served.streams

        assert stream._rows <= LIMITS.window_rows
        # Plus what is on the wire and in gRPC's buffers: a few hundred KiB each way.
        assert received <= LIMITS.window_rows + (0 if held else 1000)
        assert sent[0] < 3000
        call.cancel()
        until(lambda: is_idle(served), 5)


def test_a_frame_larger_than_the_window_is_read_as_far_as_there_is_room():
    desk = Desk(held=[], places=0)
    sender = Sender(
        frame(
            *(segment(n, *[b"x"] * 30) for n in range(5)),
            cancels=[pb2.Cancel(number=4, start=29, count=1)],
        )
    )
    with serving(desk, replace(LIMITS, window_rows=64)) as served:
        call = served.call(sender)
        until(lambda: served.queue.streamed[1] == 60, 5)
        assert settled(lambda: served.received) == 60

        desk.places = 1000
        desk.held = None
        served.queue.kick()
        sender.close()
        found = codes(rows_of(call))

    assert (len(found), served.received) == (150, 150)
    assert set(found.values()) <= {Code.OK, Code.CANCELLED}


@pytest.mark.parametrize("held", [True, False], ids=["unanswered", "unread"])
def test_a_client_that_sends_without_reading_is_bounded_by_bytes(held):
    limits = replace(LIMITS, window_rows=4096, window_bytes=256 * KIB)
    desk, sent = Desk(held=[] if held else None), [0]
    with serving(desk, limits) as served:
        call = served.call(flood(b"x" * 16 * KIB, 2, sent))
        received = settled(lambda: served.received)
        (stream,) = served.streams

        assert stream._held.size <= 256 * KIB + 4 * 17 * KIB
        assert received * 16 * KIB <= 256 * KIB + 4 * 17 * KIB + (0 if held else 4096 * KIB)
        call.cancel()
        until(lambda: is_idle(served), 5)


@contextmanager
def large_results(count: int) -> Iterator[tuple[Served, grpc.Call, list[int]]]:
    """A client asks for `count` results of 64 KiB, four at a time, and does not read yet."""
    limits = replace(LIMITS, window_rows=4096, window_bytes=256 * KIB)
    desk, started = Desk(answer=lambda payload: b"y" * 64 * KIB, places=4), []
    finish = desk.finish

    def later(segment: Segment, sink: OnResult) -> None:
        started.append(len(segment))
        threads.submit(finish, segment, sink)

    desk.finish = later
    with ThreadPoolExecutor(1) as threads, serving(desk, limits) as served:
        sender = Sender(frame(*[segment(n, b"") for n in range(count)]))
        sender.close()
        call = served.call(sender)
        settled(lambda: len(started))
        yield served, call, started


def test_large_unread_results_are_bounded_by_bytes_too():
    """Small requests, large answers: unread answers must not fill the memory."""
    with large_results(600) as (served, call, _):
        most = served.streams[0]._held.size
        call.cancel()
        until(lambda: is_idle(served), 5)

    # A window and what had started; 600 answers are 38 MiB.
    assert most < 4096 * KIB, f"{most:,} bytes of answers wait for a client that does not read"


def test_requests_held_back_for_a_slow_reader_resume_when_it_reads():
    with large_results(200) as (served, call, started):
        assert len(started) < 200
        found = rows_of(call)
        until(lambda: is_idle(served), 5)
    assert len(found) == 200


def test_a_client_that_resumes_reading_gets_everything():
    desk, sent = Desk(), [0]
    limits = replace(LIMITS, window_bytes=128 * KIB)
    with serving(desk, limits) as served:
        frames = itertools.islice(flood(b"x" * 4 * KIB, 4, sent), 300)
        call = served.call(frames)
        settled(lambda: served.received)
        assert sent[0] < 1200

        found = rows_of(call)

    assert len(found) == 1200
    assert served.streams[0]._rows == served.streams[0]._held.size == 0


@pytest.mark.parametrize("wired", [False, True], ids=["own", "from below"])
def test_the_window_is_whole_again_however_answers_were_split_into_frames(wired):
    limits = replace(LIMITS, frame_bytes=4 * KIB)
    desk = Desk(held=[], wired=wired)
    with serving(desk, limits) as served:
        call = served.call([frame(segment(n, *[b"x" * 900] * 16)) for n in range(4)])
        until(lambda: len(desk.held) == 4, 5)
        desk.release()
        frames = list(call)

    assert len(rows_of(frames)) == 64
    assert len(frames) > 10
    assert max(frame.ByteSize() for frame in frames) < 6 * KIB
    assert (served.streams[0]._rows, served.streams[0]._held.size) == (0, 0)


def test_too_large_an_answer_fails_its_own_row_only():
    limits = replace(LIMITS, max_message_bytes=100 * KIB, frame_bytes=20 * KIB)
    answers = {b"big": b"y" * 101 * KIB, b"small": b"z"}
    rows = [b"big", *[b"small"] * 49]
    with serving(Desk(answer=answers.__getitem__), limits) as served:
        found = rows_of(served.call([frame(segment(1, *rows))]))

    failed = {row for (_, row), code in codes(found).items() if code}
    assert failed == {0}
    assert (found[1, 0].code, found[1, 0].executed) == (Code.RESOURCE_EXHAUSTED, pb2.YES)


def test_many_long_reasons_do_not_end_the_stream():
    """Reasons count as bytes: what does not fit into one message goes into the next."""
    limits = replace(Limits(), max_message_bytes=256 * KIB, frame_bytes=64 * KIB)
    desk = Desk(held=[])
    with serving(desk, limits) as served:
        call = served.call([frame(segment(1, *[b""] * 4000))])
        ((_, sink),) = until(lambda: desk.held, 5)
        failures = {row: Detail(Code.INTERNAL, "x" * 900, Executed.YES) for row in range(4000)}
        sink(0, Slice(4000, (PartSlice("W", Column([b""] * 4000), (), failures),), ("W",)))
        desk.held = []

        found = rows_of(call)

    assert len(found) == 4000


@pytest.mark.parametrize("want_parts", [False, True])
def test_a_client_gets_each_workers_own_bytes_only_when_it_wants_them(want_parts):
    with serving(Desk()) as served:
        (answer,) = served.call([frame(segment(1, b"a", b"b", want_parts=want_parts))])
    (made,) = answer.slices
    (part,) = made.parts
    assert (part.process_id, list(made.hops)) == ("W", ["W"])
    assert list(part.results.items) == ([b"W: a", b"W: b"] if want_parts else [])


def test_a_process_gets_only_the_parts():
    with serving(Desk()) as served:
        asked = segment(1, b"a", b"b", hops=["A"], targets=["W"])
        (answer,) = served.call([frame(asked)])
    (made,) = answer.slices
    assert list(made.results.items) == []
    asked = Asked(2, frozenset("W"))
    assert codec.read_slice(made, asked).at(1).parts[0].result == b"W: b"


def traces(desk: Desk, asked: pb2.Segment) -> list[str]:
    with serving(desk) as served:
        (answer,) = served.call([frame(asked)])
    return [hop.process_id for hop in answer.slices[0].trace]


def test_a_slice_has_its_trace_only_if_the_client_wants_it():
    assert traces(Desk(), segment(1, b"a", want_trace=True)) == ["W"]
    assert traces(Desk(), segment(1, b"a")) == []


def test_a_trace_that_only_the_process_wants_is_not_sent_to_the_client():
    assert traces(Desk(traces_all=True), segment(1, b"a")) == []
    of_a_process = segment(1, b"a", want_trace=True, hops=["A"], targets=["W"])
    assert traces(Desk(), of_a_process) == ["W"]


def test_a_process_traces_only_requests_of_clients():
    of_a_process = segment(1, b"a", hops=["A"], targets=["W"])
    assert traces(Desk(traces_all=True), of_a_process) == []


def part(result: bytes, rows: int = 1) -> Slice:
    return Slice(rows, (PartSlice("V", Column((result,) * rows)),), ("W", "V"))


def slices_of(frames: Iterable[pb2.Frame]) -> list[tuple[int, int, int, bool, list[bytes]]]:
    made = itertools.chain.from_iterable(frame.slices for frame in frames)
    return [(m.number, m.start, m.count, m.more, list(m.parts[0].results.items)) for m in made]


def test_a_part_is_sent_before_its_rows_answer_and_never_after_it():
    with serving(Desk(held=[])) as served:
        call = served.call([frame(segment(5, b"a", b"b", as_they_come=True))])
        ((asked, sink),) = until(lambda: served.desk.held, what="it has started")
        asked.on_partial(0, part(b"both", 2))
        sink(0, part(b"first's last"))
        asked.on_partial(0, part(b"late for the first", 2))
        sink(1, part(b"second's last"))
        asked.on_partial(1, part(b"too late"))
        served.desk.held = []
        found = slices_of(call)

    assert found == [
        (5, 0, 2, True, [b"both", b"both"]),
        (5, 0, 1, False, [b"first's last"]),
        (5, 1, 1, True, [b"late for the first"]),
        (5, 1, 1, False, [b"second's last"]),
    ]


def test_unread_parts_count_in_the_window_until_they_are_written():
    limits = replace(LIMITS, window_bytes=256 * KIB)
    with serving(Desk(held=[]), limits) as served:
        sender = Sender(frame(segment(1, b"a", as_they_come=True)))
        call = served.call(sender)
        ((asked, sink),) = until(lambda: served.desk.held, what="it has started")
        (stream,) = served.streams
        for _ in range(40):
            asked.on_partial(0, part(bytes(100 * KIB)))
        until(lambda: stream.flow.paused, what="nothing more starts meanwhile")
        sink(0, part(b"last"))
        served.desk.held = []
        sender.close()
        found = slices_of(call)

        assert [more for *_, more, _ in found] == [True] * 40 + [False]
        assert (stream._rows, stream._held.size, stream._unread.size) == (0, 0, 0)
        assert not stream.flow.paused


def chunk(at: int, more: bool, granted: list[int]) -> Slice:
    """Four bytes of a result, after `at` others."""
    how = Chunk(at, more, granted.append if more else None)
    return Slice(1, (PartSlice("V", Column((b"four",)), chunk=how),), ("W", "V"))


def test_chunks_pass_with_their_positions_and_grants_return_to_their_sender():
    granted: list[int] = []
    with serving(Desk(held=[])) as served:
        sender = Sender(frame(segment(5, b"a", as_they_come=True, chunks=3)))
        call = served.call(sender)
        ((asked, sink),) = until(lambda: served.desk.held, what="it has started")
        assert asked.chunks == 1
        asked.on_partial(0, chunk(0, True, granted))
        assert granted == [2]  # as many more as the client takes
        made = next(iter(call)).slices[0]
        sender.send(pb2.Frame(grants=[pb2.Grant(number=5, row=0, process_id="V", count=1)]))
        until(lambda: granted == [2, 1], what="a grant arrives")
        asked.on_partial(0, chunk(4, False, granted))
        served.desk.held = []
        sink(0, Slice(1, (), ("W",)))
        sender.send(pb2.Frame(grants=[pb2.Grant(number=5, row=0, process_id="V", count=9)]))
        sender.close()  # late grants are ignored
        rest = [m for f in call for m in f.slices]

    assert [(m.parts[0].at, m.parts[0].more) for m in (made, rest[0])] == [(0, True), (4, False)]
    assert [m.more for m in rest] == [True, False]


def test_a_slow_reader_does_not_distort_the_service_time():
    with serving(Desk(held=[])) as served:
        rows = [segment(n, b"a", as_they_come=True, chunks=1) for n in range(2)]
        call = served.call(sender := Sender(frame(*rows)))
        (asked, sink), (_, whole) = until(lambda: len(served.desk.held) == 2 and served.desk.held)
        asked.on_partial(0, chunk(0, True, []))
        sink(0, Slice(1, (), ("W",)))
        (service_class,) = served.queue._classes.values()
        assert service_class.estimator.mean_s(time.monotonic()) == 0.0
        whole(0, Slice(1, (), ("W",)))
        assert service_class.estimator.mean_s(time.monotonic()) > 0.0
        served.desk.held = []
        sender.close()
        assert sum(len(answered.slices) for answered in call) == 3


def test_a_part_that_fails_after_chunks_is_a_failure():
    with serving(Desk(held=[])) as served:
        call = served.call(sender := Sender(frame(segment(5, b"a", as_they_come=True, chunks=1))))
        ((asked, sink),) = until(lambda: served.desk.held, what="it has started")
        asked.on_partial(0, chunk(0, True, []))
        failed = PartSlice.missing("V", 1, Detail(Code.INTERNAL, "broke", Executed.YES))
        sink(0, Slice(1, (failed,), ("W", "V")))
        served.desk.held = []
        sender.close()
        first, last = (made for answered in call for made in answered.slices)

    assert (first.more, last.more, [why.code for why in last.failures]) == (True, False, [13])


def test_granting_more_than_was_sent_is_an_error():
    with serving(Desk(held=[])) as served:
        sender = Sender(frame(segment(5, b"a", as_they_come=True, chunks=3)))
        call = served.call(sender)
        ((asked, _),) = until(lambda: served.desk.held, what="it has started")
        asked.on_partial(0, chunk(0, True, []))
        sender.send(pb2.Frame(grants=[pb2.Grant(number=5, row=0, process_id="V", count=2)]))
        with pytest.raises(grpc.RpcError, match="grants: V has sent 1 chunks, not 2"):
            list(call)
        served.desk.held = []


def test_the_parts_of_a_stream_share_the_room_ahead_of_their_reader():
    limits = replace(LIMITS, window_bytes=2 * 10 * Limits.chunk_bytes)
    granted: list[int] = []
    with serving(Desk(held=[]), limits) as served:
        rows = frame(*(segment(n, b"a", as_they_come=True, chunks=5) for n in range(4)))
        sender = Sender(rows)
        call = served.call(sender)
        until(lambda: len(served.desk.held) == 4, what="all have started")
        for asked, _ in served.desk.held:
            asked.on_partial(0, chunk(0, True, granted))
        assert granted == [4, 4]
        (_, sink), *_ = served.desk.held
        sink(0, Slice(1, (), ("W",)))  # it has ended, and its room is free
        served.desk.held[3][0].on_partial(0, chunk(4, True, granted))
        assert granted == [4, 4, 4]
        served.desk.held = []
        call.cancel()


def test_chunks_of_any_one_workers_result_are_sent_ahead_of_the_last():
    with serving(Desk(held=[])) as served:
        asked_for = segment(5, b"a", mode=1, as_they_come=True, chunks=3)
        call = served.call(sender := Sender(frame(asked_for)))
        ((asked, sink),) = until(lambda: served.desk.held, what="it has started")
        asked.on_partial(0, chunk(0, True, []))
        sink(0, chunk(4, False, []))
        served.desk.held = []
        sender.close()
        first, last = (made for answered in call for made in answered.slices)

    assert [(m.more, m.parts[0].at, m.parts[0].more) for m in (first, last)] == [
        (True, 0, True),
        (False, 4, False),
    ]
    assert list(last.parts[0].results.items) == [b"four"]
    assert list(last.results.items) in ([], [b""])
    assert not last.failures


def test_a_client_that_does_not_ask_for_parts_gets_none_before_the_answer():
    with serving(Desk(held=[])) as served:
        call = served.call([frame(segment(5, b"a"), segment(6, b"a", mode=1, as_they_come=True))])
        until(lambda: len(served.desk.held) == 2, what="both have started")
        assert [asked.on_partial for asked, _ in served.desk.held] == [None, None]
        served.desk.release()
        assert [more for *_, more, _ in slices_of(call)] == [False, False]


def test_concurrent_streams_each_get_their_own_answers():
    with serving(Desk()) as served, ThreadPoolExecutor(5) as threads:

        def ask(client: int) -> dict:
            rows = [b"%d" % client] * 20
            return rows_of(served.call([frame(segment(n, *rows)) for n in range(30)]))

        found = list(threads.map(ask, range(5)))
        until(lambda: is_idle(served), 5)

    for client, rows in enumerate(found):
        assert Counter(rows.values()) == {b"W: %d" % client: 600}


def test_a_stream_that_waits_for_its_client_or_for_answers_holds_no_thread():
    with serving(Desk(held=[])) as served:
        senders = [Sender(frame(segment(1, b""))) for _ in range(40)]
        calls = [served.call(sender) for sender in senders]
        until(lambda: served.received == 40, 5)
        assert stream_threads() <= 8

        served.desk.release()
        assert [rows_of([next(call)]) for call in calls] == [{(1, 0): b"W: "}] * 40
        assert stream_threads() <= 8
        for call in calls:
            call.cancel()
        until(lambda: is_idle(served), 5)


def stream_threads() -> int:
    return sum(thread.name.startswith("stream") for thread in threading.enumerate())


def test_an_ended_idle_stream_tells_its_client_not_to_reconnect_yet():
    limits = replace(LIMITS, streams=4)
    with serving(Desk(), limits) as served:
        senders = [Sender(frame(segment(1, b"x"))) for _ in range(3)]
        calls = []
        for sender in senders:
            calls.append(served.call(sender))
            next(calls[-1])
            until(lambda: not served.streams[-1]._rows)
        newest = served.call([frame(segment(1, b"y"))])

        assert rows_of(newest) == {(1, 0): b"W: y"}
        with pytest.raises(grpc.RpcError) as raised:
            next(calls[0])
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        trailers = dict(raised.value.trailing_metadata())
        assert (trailers["overlay-idle"], trailers["overlay-executed"]) == ("1", "no")
        for sender in senders:
            sender.close()


def test_clients_that_do_not_read_are_bounded_together():
    limits = replace(LIMITS, window_rows=4096, window_bytes=1024 * KIB, unread_bytes=512 * KIB)
    desk = Desk(answer=lambda payload: b"y" * 64 * KIB)
    with serving(desk, limits) as served:
        senders = [Sender(frame(*[segment(n, b"") for n in range(4)])) for _ in range(20)]
        calls = [served.call(sender) for sender in senders]
        settled(lambda: served.received)
        for n in range(4, 16):
            for sender in senders:
                sender.send(frame(segment(n, b"")))
        settled(lambda: sum(stream._unread.size for stream in served.streams))

        unread = sum(stream._unread.size for stream in served.streams)
        assert unread < 20 * 4 * 65 * KIB + 512 * KIB, "what had started, and what they share"
        for sender, call in zip(senders, calls, strict=True):
            sender.close()
            assert len(rows_of(call)) == 16
        until(lambda: is_idle(served), 5)
        assert served.sessions.unread.left == 512 * KIB
        assert served.sessions.held.left == limits.max_waiting_bytes


def test_progress_reported_while_the_stream_ends_is_not_kept():
    class Late(Maps):
        """Ends the stream just before its map is noted."""

        def add(self, stream: stream_session._Session, caller: Caller, progress: Progress) -> None:
            stream.abandon()
            super().add(stream, caller, progress)
            noted.set()

    noted, maps = threading.Event(), Late()
    with serving(Desk()) as served:
        served.sessions.maps = maps
        call = served.call([pb2.Frame(progress=[pb2.Progress(number=1)])])
        assert noted.wait(10)
        until(lambda: not maps.all())
        call.cancel()
