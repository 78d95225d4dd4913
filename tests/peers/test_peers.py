"""A link's bookkeeping over a stream in memory, and links to a real server in this process."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.calls.reception import Reception
from overlay.model.errors import BadResponse
from overlay.model.limits import Limits
from overlay.model.segments import (
    Cancel,
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    OnResult,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.peers import outgoing
from overlay.peers import peers as links
from overlay.peers.peers import Peers
from overlay.routing import outlier
from overlay.routing.outlier import FAILURES, State
from overlay.server.service import Service
from overlay.transport import codec, endpoints
from overlay.transport.channels import Channel
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.stream import ReconnectingStream
from overlay.workers.api import Context
from tests.harness.cluster import free_port, until

KIB = 1024
CLOSED = Part("", Code.UNAVAILABLE, "the connection was closed")
STOPPED = Part("", Code.UNAVAILABLE, "C is stopping", executed=Executed.NO)


class MemoryStream:
    """Stands in for a ReconnectingStream: does what it does when the test says so."""

    made: list[MemoryStream]

    def __init__(
        self,
        channel,
        name,
        fill,
        receive,
        lost,
        live=lambda metadata: None,
        patience_s=lambda: 0.0,
        metadata=(),
    ) -> None:
        self.name = name
        self.kicks = self.sent_now = 0
        self.patience_s = patience_s
        self._fill, self._receive, self._lost, self._live = fill, receive, lost, live

    def accept(self) -> None:
        self._live({})

    def kick(self) -> None:
        self.kicks += 1

    def send_now(self) -> None:
        self.sent_now += 1

    def start(self) -> None: ...

    def end(self) -> None: ...

    def end_pause(self) -> None: ...

    def take(self) -> list[pb2.Frame]:
        """The frames that are sent now."""
        frames = []
        while self._fill(frame := pb2.Frame()):
            frames.append(pb2.Frame.FromString(frame.SerializeToString()))
        return frames

    def answer(self, number: int, start: int, *results: bytes, worked_us: int = 0) -> None:
        column = PartSlice("C", Column(results), worked_us=worked_us)
        frame = pb2.Frame()
        codec.write_slice(frame, number, start, Slice(len(results), (column,), ("C",)))
        self.receive(pb2.Frame.FromString(frame.SerializeToString()))

    def lose(self, why: Part = CLOSED) -> None:
        self._lost(why)

    def receive(self, frame: pb2.Frame) -> None:
        try:
            self._receive(frame)
        except BadResponse as e:
            self._lost(Part("", e.code, f"it violates the protocol: {e}"))


@dataclass
class Sent:
    """A segment that the test sent, and the answers to its rows."""

    rows: list[list[Part]]
    end: Cancel
    sink: weakref.ref[OnResult]

    @property
    def parts(self) -> list[Part]:
        assert {len(found) for found in self.rows} == {1}
        return [found[0] for found in self.rows]

    @property
    def is_answered(self) -> bool:
        return all(self.rows)


class Bench:
    """The links of a process with one neighbour, over streams in memory."""

    def __init__(self, limits: Limits) -> None:
        with mock.patch.object(outgoing, "ReconnectingStream", MemoryStream):
            neighbour = Process("C", "worker", "green", "127.0.0.1", 1)
            self.links = Peers([neighbour], limits, "digest")
        self.link = self.links._links["C"]
        self.small, self.large = (sender.stream for sender in self.link._senders)
        for stream in (self.small, self.large):
            stream.accept()

    def send(self, *payloads: bytes, left_s: float = 30.0, own_ids: bool = False) -> Sent:
        self.links.reserve("C", "", len(payloads))
        route, deadline = Route(hops=("B",), targets=("C",)), time.monotonic() + left_s
        segment = Segment(route, Column(payloads), deadline, 1, own_ids=own_ids)
        rows: list[list[Part]] = [[] for _ in payloads]

        def sink(start: int, answers: Slice) -> None:
            for row in range(len(answers)):
                answer = answers.at(row)
                rows[start + row].append(answer.refused or answer.parts[0])

        return Sent(rows, self.links.send("C", segment, sink), weakref.ref(sink))

    @property
    def outstanding(self) -> int:
        return self.links.load("C", "")[0]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(Limits())
    yield made
    made.link.channel.close()


def test_sent_segments_leave_together_at_the_next_flush(bench):
    kicks = bench.small.kicks
    bench.send(b"a", b"b")
    bench.send(b"c", left_s=20)
    assert bench.small.kicks == kicks
    bench.links.flush()
    bench.links.flush()

    (frame,) = bench.small.take()

    assert bench.small.kicks == kicks + 1
    assert [list(made.payloads.items) for made in frame.segments] == [[b"a", b"b"], [b"c"]]
    assert len({made.number for made in frame.segments}) == 2


def test_answers_may_arrive_in_any_order_and_each_row_is_answered_once(bench):
    sent = bench.send(b"a", b"b", b"c", b"d")
    ((number,),) = [[made.number for made in frame.segments] for frame in bench.small.take()]

    bench.small.answer(number, 2, b"C", b"D")
    assert bench.outstanding == 2
    bench.small.answer(number, 0, b"A", b"B", b"X", b"X")
    bench.small.answer(number, 0, b"X", b"X", b"X", b"X")
    bench.small.answer(77, 0, b"X")

    assert [part.result for part in sent.parts] == [b"A", b"B", b"C", b"D"]
    assert bench.outstanding == 0


def test_a_request_never_handed_to_grpc_provably_did_not_run(bench):
    sent = bench.send(b"a", b"b")

    bench.small.lose()

    assert {(p.code, p.executed) for p in sent.parts} == {(Code.UNAVAILABLE, Executed.NO)}
    assert bench.outstanding == 0
    bench.small.accept()
    assert bench.small.take() == []  # and it never will


def test_a_request_handed_to_grpc_may_have_run(bench):
    sent = bench.send(b"a", b"b")
    bench.small.take()

    bench.small.lose()

    assert {(p.code, p.executed) for p in sent.parts} == {(Code.UNAVAILABLE, Executed.UNKNOWN)}
    assert "the connection was closed" in sent.parts[0].reason
    assert bench.outstanding == 0


def test_a_loss_answers_only_open_rows(bench):
    sent = bench.send(b"a", b"b", b"c")
    (frame,) = bench.small.take()
    bench.small.answer(frame.segments[0].number, 1, b"B")

    bench.small.lose()

    assert [part.code for part in sent.parts] == [Code.UNAVAILABLE, Code.OK, Code.UNAVAILABLE]
    assert bench.outstanding == 0


def test_a_neighbour_that_stops_in_order_proves_that_open_rows_did_not_run(bench):
    sent = bench.send(b"a", b"b", b"c")
    (frame,) = bench.small.take()
    bench.small.answer(frame.segments[0].number, 1, b"B")

    bench.small.lose(STOPPED)

    assert [part.executed for part in sent.parts] == [Executed.NO, Executed.YES, Executed.NO]
    assert bench.outstanding == 0


def test_a_stopping_neighbour_gets_no_more_requests_but_is_awaited(bench):
    bench.link._set_state("up", "")
    assert bench.links.up() == {"C"}

    bench.small.receive(pb2.Frame(stopping=True))
    assert (bench.link.state, bench.links.up(), bench.links.awaited()) == ("draining", set(), {"C"})
    bench.small.lose(STOPPED)
    assert bench.link.state == "draining", "its other stream still answers"
    bench.large.lose(STOPPED)

    assert (bench.link.state, bench.link.reason) == ("down", "it has stopped")
    assert bench.link.patience_s == Limits.restart_s
    bench.link._learn(pb2.MetricsResponse(process_id="C", is_healthy=False), 0.001)
    assert bench.link.state == "down", "it is still there for a moment, without streams"
    assert bench.links.awaited() == {"C"}


def test_a_neighbour_that_stops_for_good_is_not_awaited_until_it_is_back(bench):
    bench.link._set_state("up", "")
    awaited: list[set[str]] = []
    bench.links.on_change = lambda: awaited.append(bench.links.awaited())

    bench.small.receive(pb2.Frame(stopping=True, for_good=True))
    assert (bench.link.state, bench.link.reason) == ("draining", "it is stopping for good")
    # A probe in flight says that it is healthy, and the other stream learns of it later.
    bench.link._learn(pb2.MetricsResponse(process_id="C", is_healthy=True), 0.001)
    bench.large.receive(pb2.Frame(stopping=True))
    for stream in (bench.small, bench.large):
        stream.lose(STOPPED)

    assert (bench.link.state, bench.link.reason) == ("down", "it has stopped for good")
    assert set().union(*awaited) == set(), "nothing waits for it"
    for stream in (bench.small, bench.large):
        stream.accept()
    bench.link._learn(pb2.MetricsResponse(process_id="C", is_healthy=True), 0.001)
    bench.small.lose()
    assert bench.links.awaited() == {"C"}


def test_waiting_requests_are_notified_when_a_neighbour_stops_for_good(bench):
    bench.link._set_state("up", "")
    bench.link._learn(pb2.MetricsResponse(process_id="C", is_healthy=False), 0.001)
    assert bench.links.awaited() == {"C"}
    awaited = mock.Mock()
    bench.links.on_change = awaited

    bench.small.receive(pb2.Frame(stopping=True, for_good=True))

    assert bench.links.awaited() == set()
    assert awaited.called


def test_a_lost_stream_takes_the_link_down_while_the_other_stream_goes_on(bench):
    large = bench.send(b"x" * 100 * KIB)
    (frame,) = bench.large.take()
    bench.link.state = "up"

    bench.small.lose()

    assert bench.link.state == "down"
    bench.large.answer(frame.segments[0].number, 0, b"done")
    assert large.parts[0].result == b"done"


def test_a_request_on_a_link_without_a_stream_is_refused_at_once(bench):
    bench.small.lose()

    sent = bench.send(b"a")

    assert (sent.parts[0].code, sent.parts[0].executed) == (Code.UNAVAILABLE, Executed.NO)
    assert bench.outstanding == 0
    assert bench.small.take() == []


def test_a_request_lost_while_being_written_provably_did_not_run(bench):
    sender = bench.link._senders[0]
    sent, joinable = bench.send(b"a"), sender._joinable

    def lose_meanwhile():
        parts = joinable()
        bench.small.lose()
        return parts

    with mock.patch.object(sender, "_joinable", lose_meanwhile):
        frames = bench.small.take()

    assert frames == []
    assert sent.parts[0].executed is Executed.NO
    assert bench.outstanding == 0


def test_an_answer_from_before_a_loss_does_not_answer_a_later_request(bench):
    bench.send(b"a")
    (frame,) = bench.small.take()
    bench.small.lose()
    bench.small.accept()
    second = bench.send(b"b")
    bench.small.take()

    bench.small.answer(frame.segments[0].number, 0, b"old")

    assert not second.is_answered


def test_large_bodies_use_the_other_stream(bench):
    bench.send(b"x" * 100)
    bench.send(b"x" * 100 * KIB)
    bench.send(*[b"x" * 10] * 5000)
    (small,), (large,) = bench.small.take(), bench.large.take()
    assert [made.count for made in small.segments] == [1, 5000]
    assert [made.count for made in large.segments] == [1]


def test_frames_are_filled_up_to_their_limit(bench):
    for _ in range(100):
        bench.send(b"x" * 100 * KIB)
    frames = bench.large.take()
    assert sum(made.count for frame in frames for made in frame.segments) == 100
    assert max(frame.ByteSize() for frame in frames) < 2 * Limits().frame_bytes + 110 * KIB
    assert len(frames) < 12


def test_a_cancel_is_sent_after_its_segment_and_the_neighbour_answers_it(bench):
    sent = bench.send(b"a", b"b", b"c")
    sent.end(Code.CANCELLED, 1, 1)

    (frame,) = bench.small.take()

    (made,), (cancel,) = frame.segments, frame.cancels
    assert (cancel.number, cancel.start, cancel.count) == (made.number, 1, 1)
    assert not any(sent.rows)
    bench.small.answer(made.number, 0, b"A", b"B", b"C")
    kicks = bench.small.kicks
    sent.end(Code.CANCELLED, 0, 3)
    assert bench.small.take() == []
    assert bench.small.kicks == kicks


def test_a_cancel_waits_for_the_frame_of_its_segment(bench):
    for _ in range(15):
        bench.send(b"x" * 100 * KIB)
    last = bench.send(b"y" * 100 * KIB, left_s=20)
    last.end(Code.CANCELLED, 0, 1)

    frames = bench.large.take()

    assert len(frames) > 1
    (made,) = [made for frame in frames for made in frame.segments if made.remaining_us < 2.5e7]
    assert [cancel.number for frame in frames for cancel in frame.cancels] == [made.number]


def test_small_segments_of_one_kind_are_joined_and_answered_separately(bench):
    sent = [bench.send(*[b"%d" % n] * (n % 3 + 1)) for n in range(10)]
    other = bench.send(b"later", left_s=20)
    (frame,) = bench.small.take()
    joined, alone = frame.segments
    total = sum(len(one.rows) for one in sent)
    assert (joined.count, alone.count) == (total, 1)

    sent[4].end(Code.CANCELLED, 1, 1)
    ((cancel,),) = [frame.cancels for frame in bench.small.take()]
    before = sum(len(one.rows) for one in sent[:4])
    assert (cancel.number, cancel.start, cancel.count) == (joined.number, before + 1, 1)

    items = list(joined.payloads.items)
    bench.small.answer(joined.number, 5, *items[5:])
    assert sum(bool(row) for one in sent for row in one.rows) == total - 5
    bench.small.answer(joined.number, 0, *items)
    for n, one in enumerate(sent):
        assert [part.result for part in one.parts] == [b"%d" % n] * len(one.rows)
    assert not other.is_answered
    assert bench.outstanding == 1


def test_answered_requests_are_freed_without_the_garbage_collector(bench):
    """Or requests would cost garbage collections, and keep their payloads until then."""
    gc.disable()
    try:
        sent = [bench.send(b"a"), bench.send(b"b")]
        (frame,) = bench.small.take()
        sinks = [one.sink for one in sent]
        assert all(sink() is not None for sink in sinks), "while the answers are outstanding"
        bench.small.answer(frame.segments[0].number, 0, b"A", b"B")
        assert all(one.is_answered for one in sent)
        del sent
        # Whatever is kept of a request keeps its sink.
        assert [sink() for sink in sinks] == [None, None]
    finally:
        gc.enable()


def test_requests_with_chosen_ids_are_not_joined_with_others(bench):
    for own in (True, True, False, False, True):
        bench.send(b"x", own_ids=own)
    (frame,) = bench.small.take()
    assert [(made.own_ids, made.count) for made in frame.segments] == [
        (True, 2),
        (False, 2),
        (True, 1),
    ]


@pytest.mark.parametrize("what", ["handed over", "in the outbox"])
def test_a_loss_answers_every_member_of_a_joined_segment(bench, what):
    sent = [bench.send(b"a", b"b"), bench.send(b"c")]
    if what == "handed over":
        assert len(bench.small.take()[0].segments) == 1

    bench.small.lose()

    executed = Executed.UNKNOWN if what == "handed over" else Executed.NO
    assert {part.executed for one in sent for part in one.parts} == {executed}
    assert bench.outstanding == 0


def test_a_request_without_time_left_is_not_sent(bench):
    late = bench.send(b"a", left_s=0.0)
    good = bench.send(b"b")

    (frame,) = bench.small.take()

    assert [list(made.payloads.items) for made in frame.segments] == [[b"b"]]
    assert (late.parts[0].code, late.parts[0].executed) == (Code.DEADLINE_EXCEEDED, Executed.NO)
    assert not good.is_answered


def test_the_neighbour_gets_less_time_so_that_its_answer_arrives_in_time(bench):
    bench.send(b"a", left_s=10.0)
    (frame,) = bench.small.take()
    assert 9 < frame.segments[0].remaining_us / 1e6 < 9.96


def test_the_service_time_follows_the_answers_but_not_a_single_outlier(bench):
    def answered(worked_us: int) -> float:
        bench.send(b"a")
        (frame,) = bench.small.take()
        bench.small.answer(frame.segments[0].number, 0, b"A", worked_us=worked_us)
        return bench.links.load("C", "")[1]

    assert answered(100) == pytest.approx(0.0001)
    assert answered(1_000_000) < 0.0002
    for _ in range(60):
        last = answered(5000)
    assert last == pytest.approx(0.005, rel=0.1)


def test_a_service_time_is_recent_only_for_a_moment_after_an_answer(bench):
    assert not bench.links.load("C", "")[3]
    bench.send(b"a")
    (frame,) = bench.small.take()
    bench.small.answer(frame.segments[0].number, 0, b"A", worked_us=100)
    seen = bench.links._links["C"].service_seen[""]
    with mock.patch.object(links.time, "monotonic", return_value=seen + 0.9 * links.RECENT_S):
        assert bench.links.load("C", "")[3]
    with mock.patch.object(links.time, "monotonic", return_value=seen + 1.1 * links.RECENT_S):
        assert bench.links.load("C", "")[1:] == (0.0001, State.HEALTHY, False)


# Small requests that leave together.


def busy_neighbour(bench: Bench, worked_us: int = 100) -> int:
    """Makes the neighbour busy with work of known duration. Returns its segment's number."""
    bench.send(b"known")
    (frame,) = bench.small.take()
    bench.small.answer(frame.segments[0].number, 0, b"KNOWN", worked_us=worked_us)
    bench.send(b"first")
    (frame,) = bench.small.take()
    return frame.segments[0].number


def test_a_lone_request_does_not_wait_for_others(bench):
    number = busy_neighbour(bench)
    bench.small.answer(number, 0, b"FIRST")
    bench.send(b"second")
    assert bench.small.patience_s() == 0


def test_requests_during_quick_work_are_sent_when_it_is_answered(bench):
    number = busy_neighbour(bench)
    bench.send(b"second")
    assert bench.small.patience_s() == Limits().gather_s
    assert not bench.small.sent_now

    bench.small.answer(number, 0, b"FIRST")

    assert bench.small.sent_now
    assert bench.small.patience_s() == 0


@pytest.mark.parametrize(
    ("what", "worked_us", "sent"),
    [
        ("slow work, which needs all its slots", 1000, [(b"second",)]),
        ("many rows, which need no company", 100, [(b"row",) * (Limits().few_rows + 1)]),
        ("a crowd", 100, [(b"one",)] * Limits().gather_rows),
    ],
)
def test_these_requests_are_sent_at_once(bench, what, worked_us, sent):
    busy_neighbour(bench, worked_us)
    for payloads in sent:
        bench.send(*payloads)
    assert bench.small.patience_s() == 0


def test_requests_beside_a_bulk_do_not_wait_for_its_answer(bench):
    number = busy_neighbour(bench)
    bench.small.answer(number, 0, b"FIRST")
    bench.send(*[b"row"] * (Limits().gather_rows + 1))
    bench.small.take()
    bench.send(b"second")
    assert bench.small.patience_s() == 0


def test_large_bodies_are_sent_at_once(bench):
    busy_neighbour(bench)
    for payload in (b"1", b"2"):
        bench.send(payload * 20 * KIB)
        assert bench.large.patience_s() == 0
        bench.large.take()


def test_a_cancel_is_sent_at_once(bench):
    busy_neighbour(bench)
    second = bench.send(b"second")
    second.end(Code.CANCELLED, 0, 1)
    assert bench.small.patience_s() == 0


def test_after_a_loss_requests_are_sent_at_once(bench):
    busy_neighbour(bench)
    bench.small.lose()
    bench.small.accept()
    bench.send(b"second")
    assert bench.small.patience_s() == 0


# What the outcomes of requests say about a neighbour.


class Two:
    """Links to C and D over streams in memory, both up; requests are sent to C."""

    def __init__(self) -> None:
        with mock.patch.object(outgoing, "ReconnectingStream", MemoryStream):
            neighbours = [Process(n, "worker", "green", "127.0.0.1", 1) for n in "CD"]
            self.links = Peers(neighbours, Limits(), "digest")
        for link in self.links._links.values():
            for sender in link._senders:
                sender.stream.accept()
            link._set_state("up", "")
        self.stream = self.links._links["C"]._senders[0].stream

    def send(self, left_s: float = 30.0) -> tuple[int, Cancel]:
        """Hands one row for C to gRPC. Returns its segment's number, and how to end it."""
        self.links.reserve("C", "", 1)
        route = Route(Mode.ANY, hops=("B",), targets=("C",))
        segment = Segment(route, Column([b"a"]), time.monotonic() + left_s, 1)
        end = self.links.send("C", segment, lambda start, answers: None)
        (frame,) = self.stream.take()
        return frame.segments[0].number, end

    def refuse(self, code: Code, executed: Executed) -> None:
        number, _ = self.send()
        frame = pb2.Frame()
        refused = Part("C", code, "why", executed=executed)
        codec.write_slice(frame, number, 0, Slice(1, (), refused=refused))
        self.stream._receive(frame)

    @property
    def state(self) -> State:
        return self.links.load("C", "")[2]

    @property
    def shown(self) -> tuple[str, str, int]:
        found = self.links.states()[0]
        return found.health, found.health_reason, found.ejections


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    for link in made.links._links.values():
        link.channel.close()


@pytest.mark.parametrize(
    ("code", "executed", "state"),
    [
        (Code.UNAVAILABLE, Executed.UNKNOWN, State.EJECTED),
        (Code.DEADLINE_EXCEEDED, Executed.YES, State.EJECTED),
        (Code.INTERNAL, Executed.YES, State.HEALTHY),
        (Code.UNAVAILABLE, Executed.NO, State.HEALTHY),  # it is stopping, as a probe will show
        (Code.RESOURCE_EXHAUSTED, Executed.NO, State.HEALTHY),
    ],
)
def test_a_neighbour_that_does_not_answer_is_ejected_although_its_link_is_up(
    two, code, executed, state
):
    for _ in range(FAILURES):
        two.refuse(code, executed)
    assert two.state is state
    assert two.links.up() == {"C", "D"}


def test_an_ejection_is_shown_with_its_reason_and_logged_once(two, caplog):
    with caplog.at_level("INFO", "overlay.peers.peers"):
        for _ in range(2 * FAILURES):
            two.refuse(Code.UNAVAILABLE, Executed.UNKNOWN)

    reason = "ejected for 1 s: 5 requests in a row without an answer; the last: why"
    assert two.shown == ("ejected", reason, 1)
    assert caplog.messages == [f"requests to any one: C is {reason}"]


def test_trials_are_made_one_at_a_time_and_an_answer_heals(two, caplog):
    for _ in range(FAILURES):
        two.refuse(Code.UNAVAILABLE, Executed.UNKNOWN)
    two.links._links["C"].health[""].retry_at = 0.0  # its time is over
    assert two.state is State.HALF_OPEN

    number, _ = two.send()
    assert two.state is State.EJECTED

    with caplog.at_level("INFO", "overlay.peers.peers"):
        two.stream.answer(number, 0, b"A")
    assert two.state is State.HEALTHY
    assert two.shown == ("healthy", "", 1)
    assert caplog.messages[-1] == "requests to any one: C answers again"


def test_rows_without_any_answer_count_as_failures(two):
    for _ in range(FAILURES):
        _, end = two.send()
        end(Code.DEADLINE_EXCEEDED, 0, 1)
    assert two.state is State.EJECTED
    assert "no answer from C within the deadline" in two.shown[1]


def test_results_that_a_slow_reader_leaves_unread_do_not_count(two):
    """The neighbour answers: its results come in chunks, and their reader is slow."""
    stream = two.links._links["C"]._senders[1].stream
    parts: list[Slice] = []
    for _ in range(2 * FAILURES):
        two.links.reserve("C", "", 1)
        route, deadline = Route(hops=("B",), targets=("C",)), time.monotonic() + 30
        segment = Segment(route, Column([b"a"]), deadline, 1, chunks=1)
        segment.on_partial = lambda start, answers: parts.append(answers)
        end = two.links.send("C", segment, lambda start, answers: None)
        (frame,) = stream.take()
        number = frame.segments[0].number
        frame = pb2.Frame()
        part = PartSlice("C", Column([b"some"]), chunk=Chunk(0, True))
        codec.write_slice(frame, number, 0, Slice(1, (part,)), more=True)
        stream._receive(frame)
        parts.pop().parts[0].chunk.grant(1)
        end(Code.DEADLINE_EXCEEDED, 0, 1)
        (frame,) = stream.take()
        assert [(made.number, made.process_id) for made in frame.grants] == [(number, "C")]
        late = PartSlice.missing("C", 1, Detail(Code.DEADLINE_EXCEEDED, "", Executed.YES))
        frame = pb2.Frame()
        codec.write_slice(frame, number, 0, Slice(1, (late,)))
        stream._receive(frame)
    assert two.state is State.HEALTHY


def test_rows_cancelled_by_their_callers_do_not_count(two):
    for _ in range(2 * FAILURES):
        _, end = two.send()
        end(Code.CANCELLED, 0, 1)
    assert two.state is State.HEALTHY


def test_a_link_that_comes_back_starts_with_a_clean_record(two):
    for _ in range(FAILURES):
        two.refuse(Code.UNAVAILABLE, Executed.UNKNOWN)
    two.send()
    two.stream.lose()
    assert two.shown[:2] == ("healthy", "")

    two.links._links["C"]._set_state("up", "")
    assert two.state is State.HEALTHY


def test_new_workers_behind_a_neighbour_make_its_trial_due(two):
    for _ in range(FAILURES):
        two.refuse(Code.UNAVAILABLE, Executed.UNKNOWN)
    behind = [pb2.Process(id="C", slots={"echo": 4})]
    found = pb2.MetricsResponse(process_id="C", is_healthy=True, topology=behind)
    two.links._links["C"]._learn(found, 0.001)
    assert two.state is State.HALF_OPEN

    two.send()
    two.links._links["C"]._learn(found, 0.001)
    assert two.state is State.EJECTED, "they are no longer new"


def test_a_neighbour_is_slow_compared_with_its_peers(two):
    paces = {n: two.links._links[n].service_s for n in "CD"}
    paces["D"][""] = 0.005
    with mock.patch.object(outlier, "COMPARE_S", 0.0):
        for look in range(2):
            number, _ = two.send()
            two.stream.answer(number, 0, b"A", worked_us=50_000 + look)
            two.links._compare_service_times()

    assert two.state is State.SLOW
    assert two.shown[:2] == ("slow", "slow: 50 ms where its peers take 5 ms")


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "take", "answer", "end", "lose", "accept"]),
        st.integers(0, 10),
        st.integers(0, 10),
    ),
    max_size=40,
)


@given(ACTIONS)
@settings(max_examples=150, deadline=None)
def test_each_row_is_answered_once_and_nothing_stays_outstanding_whatever_happens(actions):
    bench = Bench(replace(Limits(), frame_bytes=300))
    sent: list[Sent] = []
    open_numbers: dict[int, int] = {}
    try:
        for action, one, two in actions:
            if action == "send":
                sent.append(bench.send(*[b"x"] * (one + 1)))
            elif action == "take":
                for made in [made for frame in bench.small.take() for made in frame.segments]:
                    open_numbers[made.number] = made.count
            elif action == "answer" and open_numbers:
                number = list(open_numbers)[one % len(open_numbers)]
                bench.small.answer(number, two, *[b"r"] * (one + 1))
            elif action == "end" and sent:
                chosen = sent[one % len(sent)]
                chosen.end(Code.CANCELLED, 0, len(chosen.rows))
            elif action == "lose":
                bench.small.lose()
                open_numbers.clear()
            else:
                bench.small.accept()
            answered = sum(bool(row) for one_sent in sent for row in one_sent.rows)
            total = sum(len(one_sent.rows) for one_sent in sent)
            assert bench.outstanding == total - answered
        bench.small.lose()
    finally:
        bench.link.channel.close()

    assert all(len(row) == 1 for one_sent in sent for row in one_sent.rows)
    assert bench.outstanding == 0
    (sender, _) = bench.link._senders
    assert (sender._multiplexer.segments(), list(sender._outbox)) == ([], [])


# Real links, to a real worker in this process.

GATE = threading.Event()
RAN: list[bytes] = []


def handler(payload: bytes, context: Context) -> bytes:
    RAN.append(payload)
    if payload.startswith(b"wait"):
        GATE.wait(10)
    return b"C: " + payload


class Worker:
    """Process C, served on its own port."""

    def __init__(self, topology: Topology, port: int) -> None:
        self.service = Service(topology, "C")
        service, self._pool = self.service, ThreadPoolExecutor(16)

        class Servicer(pb2_grpc.OverlayNodeServicer):
            def GetMetrics(self, request, context):
                return service.metrics()

            def ForwardStream(self, call, context):
                return service.forward_stream(call, context)

        self._server = grpc.server(self._pool, options=endpoints.server_options(topology.limits))
        reception = Reception(self._server, self._pool, topology.limits, service.request_log)
        pb2_grpc.add_OverlayNodeServicer_to_server(Servicer(), reception)
        assert self._server.add_insecure_port(f"127.0.0.1:{port}") == port
        self._server.start()
        self.service.start()

    def stop(self) -> None:
        self._server.stop(0).wait(5)
        self.service.close()
        self._pool.shutdown(wait=False)


@dataclass
class Pair:
    topology: Topology
    worker: Worker
    links: Peers
    ids: Iterator[int]

    def send(self, *payloads: bytes, left_s: float = 20.0) -> Sent:
        rows: list[list[Part]] = [[] for _ in payloads]
        self.links.reserve("C", "h", len(payloads))
        route = Route(Mode.ALL, "", "h", ("B",), ("C",))
        first_id = next(self.ids) * 10_000
        deadline = time.monotonic() + left_s
        segment = Segment(route, Column(payloads), deadline, first_id)

        def sink(start: int, answers: Slice) -> None:
            for row in range(len(answers)):
                answer = answers.at(row)
                rows[start + row].append(answer.refused or answer.parts[0])

        sent = Sent(rows, self.links.send("C", segment, sink), weakref.ref(sink))
        self.links.flush()
        return sent

    def restart(self) -> None:
        self.worker = Worker(self.topology, self.topology.processes["C"].port)

    @property
    def is_up(self) -> bool:
        return self.links.up() == {"C"}


@pytest.fixture
def pair() -> Iterator[Pair]:
    GATE.clear()
    RAN.clear()
    port = free_port()
    processes = {
        "B": Process("B", "team_leader", "green", "127.0.0.1", free_port(), ("C",)),
        "C": Process("C", "worker", "green", "127.0.0.1", port, ("B",), handler="h"),
    }
    topology = Topology(
        processes, {"h": HandlerSpec("h", "tests.peers.test_peers:handler", slots=8)}
    )
    made = Peers([processes["C"]], topology.limits, "")
    pair = Pair(topology, Worker(topology, port), made, itertools.count(1))
    made.start()
    try:
        until(lambda: pair.is_up, 10, "the link is up")
        yield pair
    finally:
        GATE.set()
        made.close()
        pair.worker.stop()


def is_idle(pair: Pair) -> Callable[[], bool]:
    return lambda: pair.links.load("C", "h")[0] == 0


def test_rows_are_answered_over_a_real_stream(pair):
    sent = [pair.send(*[b"%d" % row for row in range(n)]) for n in (1, 50, 300)]
    until(lambda: all(one.is_answered for one in sent), 10)

    for one in sent:
        assert [part.result for part in one.parts] == [
            b"C: %d" % row for row in range(len(one.rows))
        ]
    until(is_idle(pair))


def test_large_and_small_bodies_share_a_link(pair):
    large = pair.send(*[b"x" * 300 * KIB] * 20)
    small = pair.send(b"small")
    until(lambda: large.is_answered and small.is_answered, 10)
    assert all(part.ok for part in large.parts + small.parts)


def test_a_cancel_reaches_the_worker(pair):
    sent = pair.send(b"wait", b"b")
    until(lambda: b"wait" in RAN, 5)

    sent.end(Code.CANCELLED, 0, 1)

    until(lambda: sent.is_answered, 5)
    assert (sent.parts[0].code, sent.parts[0].executed) == (Code.CANCELLED, Executed.YES)
    assert sent.parts[1].ok


def test_when_a_server_dies_its_open_rows_are_answered_at_once_as_unknown(pair):
    sent = pair.send(b"wait 1", b"wait 2")
    until(lambda: len(RAN) == 2, 5)

    pair.worker.stop()

    until(lambda: sent.is_answered, 2, "the rows of a lost link")
    assert {part.executed for part in sent.parts} == {Executed.UNKNOWN}
    until(lambda: not pair.is_up)
    until(is_idle(pair))


def test_a_neighbour_that_died_while_idle_costs_no_request_its_deadline(pair):
    pair.worker.stop()

    # At once, while the link may still look up.
    sent = [pair.send(b"%d" % n) for n in range(20)]

    until(lambda: all(one.is_answered for one in sent), 2, "answers from a link that is gone")
    assert {one.parts[0].code for one in sent} == {Code.UNAVAILABLE}
    assert RAN == []


def test_a_link_comes_back_and_works_again(pair):
    pair.worker.stop()
    until(lambda: not pair.is_up)
    refused = pair.send(b"while down")
    until(lambda: refused.is_answered)
    assert refused.parts[0].code is Code.UNAVAILABLE

    pair.restart()
    until(lambda: pair.is_up, 10, "the link is back")

    sent = pair.send(b"again")
    until(lambda: sent.is_answered, 5)
    assert sent.parts[0].result == b"C: again"
    assert RAN == [b"again"]


def test_a_link_is_up_only_with_its_streams(pair):
    """Otherwise the first requests would wait for a stream, or be refused."""
    for _ in range(3):
        pair.worker.stop()
        until(lambda: not pair.is_up)
        pair.restart()
        until(lambda: pair.is_up, 10)
        sent = [pair.send(b"x"), pair.send(b"y" * 100 * KIB)]
        until(lambda sent=sent: all(one.is_answered for one in sent), 5)
        assert all(one.parts[0].ok for one in sent)


def test_many_threads_over_one_link(pair):
    with ThreadPoolExecutor(8) as threads:

        def ask(n: int) -> list[Sent]:
            return [pair.send(*[b"%d/%d" % (n, i)] * (i % 5 + 1)) for i in range(40)]

        sent = [one for found in threads.map(ask, range(8)) for one in found]
        until(lambda: all(one.is_answered for one in sent), 10)

    assert all(part.ok for one in sent for part in one.parts)
    until(is_idle(pair))


def test_closing_answers_open_requests(pair):
    sent = pair.send(b"wait")
    until(lambda: b"wait" in RAN, 5)

    pair.links.close()

    until(lambda: sent.is_answered)
    assert sent.parts[0].executed is Executed.UNKNOWN


def test_closing_logs_nothing_about_the_neighbour(pair, caplog):
    pair.links.close()

    assert not caplog.records


# Streams.


class RecordingStream:
    """A real stream, and what each of its frames contained."""

    def __init__(self, pair: Pair, patience_s: float) -> None:
        address = pair.topology.processes["C"].address
        self.channel = Channel(address)
        self.waiting: list[int] = []
        self.sent: list[list[int]] = []
        self.patience_s = patience_s
        served = threading.Event()
        self.stream = ReconnectingStream(
            self.channel,
            "test",
            self.fill,
            lambda frame: None,
            lambda why: None,
            lambda metadata: served.set(),
            lambda: self.patience_s if self.waiting else 0.0,
        )
        self.stream.start()
        assert served.wait(5)

    def fill(self, frame: pb2.Frame) -> bool:
        taken, self.waiting = self.waiting, []
        if taken:
            frame.cancels.add(number=1)
            self.sent.append(taken)
        return bool(taken)

    def add(self, number: int) -> None:
        self.waiting.append(number)
        self.stream.kick()

    def close(self) -> None:
        self.stream.end()
        self.channel.close()


def test_requests_that_wait_in_a_stream_leave_together_on_send_now(pair):
    recorder = RecordingStream(pair, patience_s=30)
    try:
        for number in range(3):
            recorder.add(number)
            time.sleep(0.02)
        assert not recorder.sent
        recorder.stream.send_now()
        until(lambda: recorder.sent == [[0, 1, 2]])
    finally:
        recorder.close()


def test_waiting_for_more_requests_ends_by_itself(pair):
    recorder = RecordingStream(pair, patience_s=0.2)
    try:
        recorder.add(0)
        recorder.add(1)
        until(lambda: recorder.sent == [[0, 1]])
    finally:
        recorder.close()


def test_a_stream_that_waits_for_more_ends_at_once(pair):
    recorder = RecordingStream(pair, patience_s=30)
    recorder.add(0)
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 15


def test_the_sender_of_a_lost_call_takes_nothing_from_the_next_one(pair):
    """It may still be in `fill` when the call ends: what it takes then would never arrive."""
    outbox, lost, entered, go = [], threading.Event(), threading.Event(), threading.Event()
    taken_by: dict[bytes, int] = {}

    def fill(frame: pb2.Frame) -> bool:
        entered.set()
        go.wait(5)
        if not outbox:
            return False
        taken_by[outbox.pop()] = threading.get_ident()
        frame.cancels.add(number=1)
        return True

    channel = Channel(pair.topology.processes["C"].address)
    served = threading.Event()
    stream = ReconnectingStream(
        channel,
        "test",
        fill,
        lambda frame: None,
        lambda why: lost.set(),
        lambda metadata: served.set(),
    )
    stream.start()
    try:
        assert served.wait(5)
        kicking = threading.Thread(target=stream.kick)
        kicking.start()
        assert entered.wait(5)
        pair.worker.stop()
        was_lost = lost.wait(1)
        outbox.append(b"after the loss")
        stream.kick()
        go.set()
        time.sleep(0.1)
        assert not was_lost or b"after the loss" not in taken_by
    finally:
        go.set()
        kicking.join()
        stream.end()
        channel.close()


def test_ctrl_c_while_a_frame_is_filled_ends_its_call_and_the_next_one_works(pair):
    recorder = RecordingStream(pair, patience_s=0)
    fill, lost = recorder.stream._fill, threading.Event()

    def interrupted(frame: pb2.Frame) -> bool:
        recorder.stream._fill = fill
        raise KeyboardInterrupt

    recorder.stream._lost = lambda why: lost.set()
    recorder.stream._fill = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            recorder.add(0)
        assert lost.wait(10), "what may be noted as sent is answered"
        recorder.add(1)
        until(lambda: recorder.sent == [[0, 1]], what="the next call takes what is left")
    finally:
        recorder.close()


def test_the_slots_behind_a_new_neighbour_are_known_as_soon_as_it_knows_them():
    port, asked, linked = free_port(), itertools.count(1), threading.Event()
    leader = Process("E", "team_leader", "pink", "127.0.0.1", port, ("D", "F"))

    class TeamLeader(pb2_grpc.OverlayNodeServicer):
        """Knows its second worker's slots only some time after the link has come up."""

        def GetMetrics(self, request, context):
            known = "DF" if linked.is_set() and next(asked) > 8 else "D"
            at, slots = "127.0.0.1:1", {"echo": 4}
            behind = [pb2.Process(id=w, role="worker", address=at, slots=slots) for w in known]
            behind.append(pb2.Process(id="E", role="team_leader", address=at))
            return pb2.MetricsResponse(process_id="E", is_healthy=True, topology=behind)

        def ForwardStream(self, frames, context):
            context.send_initial_metadata(())
            linked.set()
            yield from ()
            GATE.wait(30)

    GATE.clear()
    server = grpc.server(ThreadPoolExecutor(8))
    pb2_grpc.add_OverlayNodeServicer_to_server(TeamLeader(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    limits = replace(Limits(), probe_interval_s=3600.0)  # else it would only take a second longer
    made = Peers([leader], limits, "", workers="CDF")
    made.start()
    try:
        until(lambda: made.slots("E", "F", "echo") == 4, 10, "the slots of F")
    finally:
        GATE.set()
        made.close()
        server.stop(0)
