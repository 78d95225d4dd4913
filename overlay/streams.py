"""ForwardStream, served: many requests over one call, bounded by a window.

    reader   frames -> segments -> check -> the stream's lane in the intake
    writer   answers -> combine -> slices -> frames, what has gathered meanwhile in one

The reader stops while the window is full, and so does the client, whose frames gRPC then holds
back. A request leaves the window when its answer has been handed to gRPC, so that a client that
does not read is bounded too. A large part passes in pieces, no further ahead of its reader than
overlay.pieces.Passage lets it.

Each stream owns one thread, "stream-reader", and holds the rpc thread that writes; both end with
the call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import grpc

from overlay import assembly, routing, wire
from overlay.deadlines import Deadlines
from overlay.errors import BadRequest, Cancelled, Draining, OverlayError
from overlay.intake import Intake, Ticket, refusal
from overlay.limits import Limits
from overlay.pieces import Passage, Told
from overlay.record import Ended
from overlay.rows import OpenRows
from overlay.topology import Topology
from overlay.values import NOBODY, Answers, Caller, Code, Executed, Hop, Mode, Part, Route, Segment
from overlay.wire import pb2

log = logging.getLogger("overlay.streams")

Combine = Callable[[Segment, Answers], "tuple[Sequence[bytes], list[tuple[int, OverlayError]]]"]
"""What a client gets of a slice: a result per row, and the failures by row."""


@dataclass(frozen=True)
class Desk:
    """What a stream needs of its process."""

    me: str
    topology: Topology
    intake: Intake
    deadlines: Deadlines
    combine: Combine
    received: Callable[[int], None]
    ended: Callable[[Ended], None]  # counts them, and sets their trace where it is wanted
    wants_trace: Callable[[], bool]  # of the next segment that a client sends
    streams: set[_Stream] = field(default_factory=set)  # open now

    @property
    def limits(self) -> Limits:
        return self.topology.limits

    def announce_stop(self) -> None:
        """Tells every client that the process stops, so that it sends no more."""
        for stream in list(self.streams):
            stream.announce_stop()

    def end_streams(self) -> None:
        """Each stream ends once all it has accepted is answered; it accepts no more.

        Its end proves to the client that nothing else it sent was read.
        """
        for stream in list(self.streams):
            stream.end()


def serve(
    desk: Desk, frames: Iterable[pb2.Frame], context: grpc.ServicerContext, caller: Caller = NOBODY
) -> Iterator[pb2.Frame]:
    """Answers one ForwardStream call. caller: who takes turns with others."""
    stream = _Stream(desk, caller)
    if not context.add_callback(stream.abandon):
        stream.abandon()
        return
    stream.answer_within(wire.read_most_bytes(context.invocation_metadata()))
    reader = threading.Thread(target=stream.read, args=(frames,), name="stream-reader", daemon=True)
    reader.start()
    desk.streams.add(stream)
    try:
        # Tells the client that its stream is served, and how large a body may be.
        context.send_initial_metadata(wire.most_bytes_metadata(desk.limits))
        yield from stream.write()
    finally:
        desk.streams.discard(stream)
        stream.abandon()
        stream.count_rest()
    if stream.broken is not None:
        context.abort(wire.grpc_code(stream.broken.code), str(stream.broken))
    if stream.parting is not None:
        context.set_trailing_metadata(wire.trailers(stream.parting))
        context.abort(wire.grpc_code(stream.parting.code), str(stream.parting))


class _Accepted:
    """A segment of the stream, until its last answer is written."""

    __slots__ = (
        "ahead",
        "counted",
        "from_process",
        "good",
        "left",
        "number",
        "segment",
        "size",
        "ticket",
        "unanswered",
        "want_parts",
        "want_trace",
    )

    def __init__(self, made: pb2.Segment, segment: Segment) -> None:
        self.number = made.number
        self.segment = segment
        self.want_parts = made.want_parts
        self.want_trace = made.want_trace
        self.from_process = segment.route.targets is not None
        self.left = segment.count
        self.counted = 0  # rows told to the desk as answered
        self.size = segment.payloads.size
        self.ticket: Ticket | None = None
        # As they come: the rows that may still have parts, and those that had a good one.
        self.unanswered: OpenRows | None = None
        self.good: set[int] = set()
        self.ahead = max(0, segment.pieces - 1)  # pieces of a part, beyond the first


_Out = tuple[_Accepted, int, Answers, int, bool]
"""Answers to be written: of which segment, its first row, they, their bytes, and whether they are
parts before the answer."""


class _Stream:
    def __init__(self, desk: Desk, caller: Caller) -> None:
        self._desk = desk
        self._caller = caller
        self._limits = desk.limits
        self._theirs: int | None = None  # the largest answer that the client takes, if it says so
        self._most_bytes = desk.limits.max_message_bytes
        self._lane = desk.intake.open_lane(caller)
        self._changed = threading.Condition()
        self._out: deque[_Out] = deque()
        self._accepted: dict[int, _Accepted] = {}
        self._rows = 0  # accepted and not yet written
        self._bytes = 0
        self._unread = 0  # bytes of answers that wait for the client to read
        self._passage = Passage(desk.limits.window_bytes // 2 // desk.limits.piece_bytes)
        self._frame_bytes = min(self._limits.frame_bytes, self._most_bytes // 2)
        self._routes: dict[object, Route] = {}  # read and checked; a stream's are few
        self._no_more = False
        self._reader_waits = False
        self._abandoned = False
        self._stopping = False
        self._has_news = False  # to be told, also when there is no answer to send
        self.broken: OverlayError | None = None
        self.parting: OverlayError | None = None

    def answer_within(self, theirs: int | None) -> None:
        """theirs: the largest answer that the client takes, where it says so; before any comes."""
        self._theirs = theirs
        self._most_bytes = min(self._most_bytes, theirs or self._most_bytes)
        self._frame_bytes = min(self._frame_bytes, self._most_bytes // 2)

    def read(self, frames: Iterable[pb2.Frame]) -> None:
        """Takes frames in until the client's half-close; on the reader's thread."""
        try:
            for frame in frames:
                self._take(frame)
                if not self._wait_for_window():
                    return
        except OverlayError as e:
            self.broken = e
        except Exception as e:  # noqa: BLE001 - gRPC raises a bare Exception when the call is over
            if not self._abandoned:
                log.debug("a stream ended: %r", e)
        finally:
            with self._changed:
                self._no_more = True
                self._changed.notify_all()

    def write(self) -> Iterator[pb2.Frame]:
        """Frames of answers, until all that was accepted is answered; on the rpc's thread."""
        while True:
            with self._changed:
                while not (self._out or self._has_news or self._is_over_locked()):
                    self._changed.wait()
                if self._is_over_locked() and not self._out:
                    return
                if self._abandoned:
                    return
                taken = self._some_locked()
                self._has_news = False
                frame = pb2.Frame(stopping=self._stopping)
            for accepted, start, answers, size, more in taken:
                if more:
                    self._write_parts(frame, accepted, start, answers, size)
                else:
                    self._write_slice(frame, accepted, start, answers, size)
            yield frame
            # Handed to gRPC: only now it leaves the window.
            self._leave_window(taken)

    def announce_stop(self) -> None:
        with self._changed:
            self._stopping = self._has_news = True
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            if not self._no_more:
                me = self._desk.me
                self.parting = Draining(f"{me} is stopping and takes no new requests")
                self._no_more = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """The call is over: ends what it still wanted. May be called twice."""
        with self._changed:
            if self._abandoned:
                return
            self._abandoned = True
            open_ones = list(self._accepted.values())
            self._changed.notify_all()
        for accepted in open_ones:
            if accepted.ticket is not None:
                accepted.ticket.end(Code.CANCELLED)
                self._desk.deadlines.forget(accepted.ticket, accepted.segment.deadline)
        self._desk.intake.close_lane(self._lane)

    def count_rest(self) -> None:
        """Counts what was received and will not be answered any more, as cancelled."""
        with self._changed:
            rest, self._accepted = list(self._accepted.values()), {}
        for accepted in rest:
            rows = accepted.segment.count - accepted.counted
            gone: OverlayError = Cancelled("the caller left")
            left = Part(self._desk.me, gone.code, str(gone))
            failures = [(row, gone) for row in range(rows)]
            answers = Answers(rows, (), refused=left)
            self._answered(accepted, accepted.counted, answers, failures, None)

    def _is_over_locked(self) -> bool:
        if self._abandoned or self.broken is not None:
            return True
        return self._no_more and not self._rows

    def _take(self, frame: pb2.Frame) -> None:
        now = time.monotonic()
        for made in frame.segments:
            self._accept(made, now)
        self._desk.intake.kick()
        for cancel in frame.cancels:
            accepted = self._accepted.get(cancel.number)
            if accepted is not None and accepted.ticket is not None:
                rows = accepted.segment.count
                start = min(cancel.start, rows)
                accepted.ticket.end(Code.CANCELLED, start, min(cancel.count, rows - start))
        for grant in frame.grants:
            self._grant(grant)

    def _grant(self, made: pb2.Grant) -> None:
        with self._changed:
            accepted = self._accepted.get(made.number)
            if accepted is None:
                return
            key = made.number, made.row, made.process_id
            told = self._passage.granted(key, made.count, not accepted.from_process)
        if told is not None:
            tell, pieces = told
            tell(pieces)

    def _accept(self, made: pb2.Segment, now: float) -> None:
        desk = self._desk
        wrong: OverlayError | None = None
        try:
            traced = not made.hops and desk.wants_trace()
            segment = wire.read_segment(made, now, self._limits, self._route(made), traced)
        except OverlayError as e:
            unread = wire.unread_segment(made, now, self._limits)
            if unread is None:
                raise  # no rows to answer for: that ends the stream
            segment, wrong = unread, e
        if made.number in self._accepted:
            raise BadRequest(f"number: {made.number} is taken by a segment not answered yet")
        accepted = _Accepted(made, segment)
        if made.as_they_come and segment.route.mode is Mode.ALL:
            pieces = min(1, segment.pieces)  # more of them as there is room
            segment = replace(segment, early=partial(self._pass_on, accepted), pieces=pieces)
            accepted.segment, accepted.unanswered = segment, OpenRows(segment.count)
        with self._changed:
            if self._abandoned or self.parting is not None:
                return
            self._accepted[made.number] = accepted
            self._rows += accepted.left
            self._bytes += accepted.size
        desk.received(segment.count)
        sink = partial(self._answer, accepted)
        try:
            if wrong is not None:
                raise wrong
            ticket = desk.intake.admit_to(self._lane, segment, sink, made.priority)
        except OverlayError as e:
            sink(0, Answers(segment.count, (), refused=refusal(desk.me, e)))
            return
        accepted.ticket = ticket
        if ticket.is_open:
            desk.deadlines.watch(ticket, segment.deadline)
        if self._abandoned:
            ticket.end(Code.CANCELLED)

    def _route(self, made: pb2.Segment) -> Route:
        key = wire.route_key(made, self._limits)
        route = self._routes.get(key)
        if route is None:
            route = wire.read_route(made, self._limits)
            routing.check(self._desk.topology, self._desk.me, route)
            if len(self._routes) < 100:
                self._routes[key] = route
        return route

    def _answer(self, accepted: _Accepted, start: int, answers: Answers) -> None:
        size = _size(answers)
        with self._changed:
            if accepted.unanswered is not None:
                accepted.unanswered.take(start, answers.count)
                self._passage.end_rows(accepted.number, start, answers.count)
            self._put_locked((accepted, start, answers, size, False))

    def _pass_on(self, accepted: _Accepted, start: int, answers: Answers) -> None:
        """Parts before the answer; none after it, when the segment's number may be another's."""
        told = []
        with self._changed:
            assert accepted.unanswered is not None
            for first, count in accepted.unanswered.runs(start, answers.count):
                rows = answers.slice(first - start, count)
                accepted.good.update(first + i for i in range(count) if _has_good(rows, i))
                told += self._pieces_locked(accepted, first, rows)
                self._put_locked((accepted, first, rows, _size(rows), True))
        for tell, pieces in told:
            tell(pieces)

    def _pieces_locked(self, accepted: _Accepted, row: int, answers: Answers) -> list[Told]:
        """Who of those whose pieces go up here may send more."""
        told = []
        for column in answers.parts:
            key = accepted.number, row, column.process_id
            if column.piece is None:  # a failure, it may be after pieces
                self._passage.end(key)
                continue
            if accepted.ticket is not None:
                accepted.ticket.is_read = True
            if more := self._passage.passes(key, column.piece, accepted.ahead):
                told.append(more)
        return told

    def _put_locked(self, out: _Out) -> None:
        size = out[3]
        self._out.append(out)
        self._bytes += size
        self._unread += size
        self._lane.paused = self._unread >= self._limits.window_bytes // 2
        if len(self._out) == 1:
            self._changed.notify_all()

    def _some_locked(self) -> list[_Out]:
        taken: list[_Out] = []
        room = self._frame_bytes
        while self._out and room > 0:
            accepted, start, answers, size, more = self._out.popleft()
            if size > room and answers.count > 1:
                answers, rest = _split(answers, room)
                whole, size, rest_size = size, _size(answers), _size(rest)
                self._out.appendleft((accepted, start + answers.count, rest, rest_size, more))
                self._bytes += size + rest_size - whole
                self._unread += size + rest_size - whole
            taken.append((accepted, start, answers, size, more))
            room -= size
        return taken

    def _write_slice(
        self, frame: pb2.Frame, accepted: _Accepted, start: int, answers: Answers, size: int
    ) -> None:
        early = accepted.unanswered is not None
        if size * (2 if accepted.want_parts and not early else 1) > self._most_bytes:
            answers = self._too_large(answers, size)
        results, failures = self._desk.combine(accepted.segment, answers)
        merged = sum(map(len, results))  # by the user's own function: of any size
        if merged > self._most_bytes - (size if accepted.want_parts else 0):
            answers = self._too_large(answers, merged)
            results, failures = self._desk.combine(accepted.segment, answers)
        if early:  # what came before may have been better
            failures = [(row, why) for row, why in failures if start + row not in accepted.good]
        accepted.counted += answers.count
        trace = self._answered(accepted, start, answers, failures, accepted.ticket)
        if accepted.from_process:
            wire.write_slice(frame, accepted.number, start, answers, trace)
        else:
            to_tell = trace if accepted.want_trace else ()
            wire.write_client_slice(
                frame,
                accepted.number,
                start,
                answers,
                results,
                failures,
                accepted.want_parts or early,
                to_tell,
            )

    def _answered(
        self,
        accepted: _Accepted,
        start: int,
        answers: Answers,
        failures: list[tuple[int, OverlayError]],
        ticket: Ticket | None,
    ) -> tuple[Hop, ...]:
        ended = Ended(accepted.segment, self._caller, start, answers, failures, ticket)
        self._desk.ended(ended)
        return ended.trace

    def _write_parts(
        self, frame: pb2.Frame, accepted: _Accepted, start: int, answers: Answers, size: int
    ) -> None:
        if size > self._most_bytes:
            refused = self._too_large(answers, size).refused
            ids = tuple(column.process_id for column in answers.parts)
            answers = assembly.from_branch(Answers(answers.count, (), refused=refused), ids)
        wire.write_slice(frame, accepted.number, start, answers, more=True)

    def _too_large(self, answers: Answers, size: int) -> Answers:
        # More than the other side receives would end its stream, with all that is in it.
        most = self._limits.max_message_bytes
        reason = f"the answer has {size:,} bytes, more than max_message_mib allows ({most:,})"
        if self._theirs is not None and self._theirs < most:
            reason += f" at the process that asked ({self._theirs:,})"
        part = Part(self._desk.me, Code.RESOURCE_EXHAUSTED, reason, executed=Executed.YES)
        return Answers(answers.count, (), answers.hops, part)

    def _leave_window(self, taken: list[_Out]) -> None:
        ended = []
        with self._changed:
            for accepted, _, answers, size, more in taken:
                self._bytes -= size
                self._unread -= size
                if more:
                    continue
                self._rows -= answers.count
                accepted.left -= answers.count
                if not accepted.left:
                    self._bytes -= accepted.size
                    self._accepted.pop(accepted.number, None)
                    ended.append(accepted)
            if self._reader_waits:
                self._changed.notify_all()
            resume = self._lane.paused and self._unread < self._limits.window_bytes // 2
            self._lane.paused = self._lane.paused and not resume
        if resume:
            self._desk.intake.kick()
        for accepted in ended:
            if accepted.ticket is not None:
                self._desk.deadlines.forget(accepted.ticket, accepted.segment.deadline)
                accepted.ticket = None  # it leads back here

    def _wait_for_window(self) -> bool:
        """Waits while too much is unanswered, until half is free; False when the call is over."""
        limits = self._limits
        with self._changed:
            if self._rows >= limits.window_rows or self._bytes >= limits.window_bytes:
                self._reader_waits = True
                while not self._abandoned and (
                    self._rows > limits.window_rows // 2 or self._bytes > limits.window_bytes // 2
                ):
                    self._changed.wait()
                self._reader_waits = False
            return not self._abandoned


def _split(answers: Answers, room: int) -> tuple[Answers, Answers]:
    """The first rows that fit into `room` bytes, at least one, and the rest."""
    rows = max(1, answers.count * room // _size(answers))
    while rows > 1 and _size(answers.slice(0, rows)) > room:
        rows //= 2  # a large one among small ones goes alone
    return answers.slice(0, rows), answers.slice(rows, answers.count - rows)


def _has_good(answers: Answers, row: int) -> bool:
    return any(c.failed is None and row not in c.failures and c.is_over for c in answers.parts)


def _size(answers: Answers) -> int:
    """Bytes of a slice, about; a reason is told with its part and with its row."""
    size, rows = 50 * len(answers.parts), answers.count
    if answers.refused is not None:
        size += rows * (50 + 2 * len(answers.refused.reason))
    for column in answers.parts:
        size += column.results.size
        if column.failed is not None:
            size += rows * (50 + 2 * len(column.failed.reason))
        for failure in column.failures.values():
            size += 50 + 2 * len(failure.reason)
    return size
