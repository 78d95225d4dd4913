"""What goes through one pipe to a neighbour: segments to send, those not answered yet, cancels.

    send --> outbox --> fill: what may travel in one segment is joined --> the neighbour
    sink <-- receive: a slice is given to the segments that its rows belong to <--

Few requests gather behind a neighbour that is at quick work, and leave together.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import grpc

from overlay.model.limits import Limits
from overlay.model.pending import PendingRows
from overlay.model.segments import (
    Answers,
    Code,
    End,
    Executed,
    Part,
    Route,
    Segment,
    Sink,
    end_overlap,
    shifted,
)
from overlay.transport import codec
from overlay.transport.chunks import Arriving
from overlay.transport.codec import Asked, pb2
from overlay.transport.stream import ReconnectingStream

SAME_DEADLINE_S = 0.01  # segments whose deadlines are no further apart may travel as one


class Owner(Protocol):
    """What a book needs of its link. Safe from any thread.

    metadata: what the neighbour is told with each call. to_flush: the books that have something to
    send, until `flush` kicks them.
    """

    id: str
    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]
    to_flush: set[SegmentSender]

    def flush(self) -> None: ...
    def is_quick(self, handler: str) -> bool: ...
    def time_left_s(self, deadline: float) -> float: ...
    def answered(self, route: Route, answers: Answers, is_read: bool = ...) -> None: ...
    def note_times(self, handler: str, answers: Answers) -> None: ...
    def overdue(self, handler: str, rows: int) -> None: ...
    def look_again(self) -> None: ...
    def stops(self, for_good: bool = ...) -> None: ...
    def lost(self, why: Part) -> None: ...


class _Sent:
    """A segment given to a link: each row is answered once, by the neighbour or for it."""

    __slots__ = ("early", "is_read", "message", "open", "row", "segment", "sink")

    def __init__(self, segment: Segment, sink: Sink) -> None:
        self.is_read = False  # in chunks: so it is the reader's matter when it ends, and how
        self.segment = segment
        self.sink = sink
        self.open = PendingRows(segment.count)
        self.message: _Message | None = None  # in which it was handed to gRPC; it may run then
        self.row = 0  # where it begins in that message
        # What has come before the answers: (row, worker) -> how far its chunks are.
        self.early: dict[tuple[int, str], Arriving] = {}


class _Message:
    """A segment as it was written: one of those given, or several that could be joined."""

    __slots__ = ("asked", "left", "number", "parts", "starts")

    def __init__(self, number: int, parts: list[_Sent], targets: frozenset[str] | None) -> None:
        self.number = number
        self.parts = parts
        first, rows = parts[0].segment, sum(part.segment.count for part in parts)
        self.asked = Asked(rows, targets, first.early is not None, first.chunks > 0)
        self.starts: list[int] = []
        self.left = 0
        for part in parts:
            part.message, part.row = self, self.left
            self.starts.append(self.left)
            self.left += part.segment.count


class SegmentSender:
    """What goes through one pipe: segments to send, segments not yet answered, cancels."""

    def __init__(self, link: Owner, name: str, limits: Limits) -> None:
        self.pipe = ReconnectingStream(
            link.channel,
            name,
            self._fill,
            self._receive,
            self._lost,
            self._begin,
            self._patience_s,
            link.metadata,
        )
        self.is_live = False
        self._link = link
        self._limits = limits
        self._most_bytes = limits.max_message_bytes  # that both sides take
        self._targets: tuple[tuple[str, ...] | None, frozenset[str] | None] = None, None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._outbox: deque[_Sent] = deque()
        self._cancels: deque[tuple[_Sent, int, int]] = deque()
        self._grants: deque[tuple[int, int, str, int]] = deque()  # message, row, worker, chunks
        self._messages: dict[int, _Message] = {}
        self._last_quick: _Message | None = None

    def send(self, segment: Segment, sink: Sink) -> End:
        if segment.payloads.size > self._most_bytes and self.is_live:
            return self._send_parts(segment, sink)
        return self._send(segment, sink)

    def _send_parts(self, segment: Segment, sink: Sink) -> End:
        """What is too large for the neighbour as a whole: the rows that are not too large alone."""
        ends: list[tuple[int, int, End]] = []
        for first, count in _runs_within(segment.payloads.items, self._most_bytes):
            part, part_sink = segment.slice(first, count), shifted(sink, first)
            size = len(part.payloads.items[0]) if count == 1 else 0
            if size > self._most_bytes:
                self._refuse_too_large(part, size, part_sink)
            else:
                ends.append((first, count, self._send(part, part_sink)))

        def end(code: Code, start: int, count: int) -> None:
            for first, rows, one in ends:
                end_overlap(one, first, rows, code, start, count)

        return end

    def _refuse_too_large(self, segment: Segment, size: int, sink: Sink) -> None:
        mine, theirs = self._limits.max_message_bytes, self._most_bytes
        why = f"{size:,} bytes are more than {self._link.id} takes, whose max_message_mib allows "
        why += f"{theirs:,}, and this process's {mine:,}"
        self._answer_all(_Sent(segment, sink), Code.FAILED_PRECONDITION, why, Executed.NO)

    def _send(self, segment: Segment, sink: Sink) -> End:
        sent = _Sent(segment, sink)
        with self._lock:
            live = self.is_live
            if live:
                self._outbox.append(sent)
        if live:
            self._link.to_flush.add(self)
        else:
            self._answer_all(sent, Code.UNAVAILABLE, "the link is down", Executed.NO)

        def end(code: Code, start: int, count: int) -> None:
            with self._lock:
                if not sent.open.left:
                    return
                late = 0
                if code is Code.DEADLINE_EXCEEDED and sent.message is not None and not sent.is_read:
                    late = sum(rows for _, rows in sent.open.runs(start, count))
                self._cancels.append((sent, start, count))
            if late:
                self._link.overdue(segment.route.handler, late)
            self.pipe.kick()

        return end

    # on gRPC's sending thread

    def _patience_s(self) -> float:
        """Few requests that come while the neighbour is at quick work leave when that is answered.

        Many single requests make each of their trips longer than their work; those that gather
        share one. Source of the rule: Nagle's algorithm (RFC 896), here with a bound, or a request
        that hangs would keep back the others.
        """
        if not self._outbox or self._cancels or self._grants or not self._is_at_quick_work:
            return 0.0
        try:
            first = self._outbox[0].segment
        except IndexError:  # lost since
            return 0.0
        limits = self._limits
        is_few = first.count <= limits.few_rows and len(self._outbox) < limits.gather_rows
        return limits.gather_s if is_few and self._is_quick(first) else 0.0

    def _is_quick(self, segment: Segment) -> bool:
        """Whether its answer is a matter of its way rather than of its work, bytes or number."""
        limits, count = self._limits, segment.count
        is_small = segment.payloads.size <= limits.small_bytes * count
        is_alike = is_small and count <= limits.gather_rows and segment.early is None
        return is_alike and self._link.is_quick(segment.route.handler)

    @property
    def _is_at_quick_work(self) -> bool:
        last = self._last_quick
        return last is not None and last.left > 0

    def _fill(self, frame: pb2.Frame) -> bool:
        size = 0
        while self._outbox and size < self._limits.frame_bytes:
            parts = self._joinable()
            segment = parts[0].segment
            if len(parts) > 1:
                segment = Segment.joined([part.segment for part in parts])
            left_s = self._link.time_left_s(segment.deadline)
            if left_s <= 0:
                for part in parts:
                    self._answer_all(part, Code.DEADLINE_EXCEEDED, "no time left", Executed.NO)
                continue
            number = next(self._numbers) & 0xFFFFFFFF
            with self._lock:
                live = self.is_live
                if live:
                    targets = self._targets_of(segment.route)
                    message = self._messages[number] = _Message(number, parts, targets)
                    if self._is_quick(segment):
                        self._last_quick = message
            if not live:  # lost since: this frame goes nowhere
                for part in parts:
                    self._answer_all(part, Code.UNAVAILABLE, "the link is down", Executed.NO)
                self._link.flush()
                continue
            early = segment.early is not None
            codec.write_segment(frame, number, segment, left_s, as_they_come=early)
            size += segment.payloads.size + codec.size_beside(segment)
        # After the segments: what was ended before it left is ended where it arrives.
        for _ in range(min(len(self._cancels), self._limits.frame_cancels)):
            sent, start, count = self._cancels.popleft()
            if sent.message is None and sent.open.left:  # it leaves with a later frame
                self._cancels.append((sent, start, count))
            elif sent.message is not None:
                row = sent.row + start
                frame.cancels.add(number=sent.message.number, start=row, count=count)
                size += 20
        for _ in range(min(len(self._grants), self._limits.frame_cancels)):
            number, row, worker, count = self._grants.popleft()
            frame.grants.add(number=number, row=row, process_id=worker, count=count)
            size += 20
        return size > 0

    def _targets_of(self, route: Route) -> frozenset[str] | None:
        """As a set. The same few routes come again and again."""
        last, found = self._targets
        if last is not route.targets:
            found = None if route.targets is None else frozenset(route.targets)
            self._targets = route.targets, found
        return found

    def _joinable(self) -> list[_Sent]:
        """The head of the outbox, with those after it that may travel in one segment with it."""
        parts = [self._outbox.popleft()]
        first, rows, size = parts[0].segment, parts[0].segment.count, parts[0].segment.payloads.size
        few = self._limits.few_rows  # larger ones are copied on unopened, which is cheaper
        if first.early is not None:  # whose parts are to be told apart before the answers
            return parts
        while self._outbox and rows < self._limits.join_rows and first.count <= few:
            other = self._outbox[0].segment
            rows, size = rows + other.count, size + other.payloads.size
            if (
                other.route != first.route
                or other.attempt != first.attempt
                or other.told != first.told
                or other.own_ids != first.own_ids
                or abs(other.deadline - first.deadline) > SAME_DEADLINE_S
                or other.count > few
                or other.early is not None
                or size > self._limits.frame_bytes
            ):
                break
            parts.append(self._outbox.popleft())
        return parts

    # on the pipe's thread

    def _receive(self, frame: pb2.Frame) -> None:
        if frame.stopping:
            self._link.stops(frame.for_good)
        for made in frame.slices:
            message = self._messages.get(made.number)
            if message is None:
                continue
            answers = codec.read_slice(made, message.asked)
            if made.more:
                self._pass_on(message.parts[0], made.start, answers)
            else:
                self._spread(message, made.start, answers)
        if self._outbox and not self._is_at_quick_work:
            self.pipe.hurry()
        self._link.flush()  # what was tried elsewhere

    def _pass_on(self, sent: _Sent, start: int, answers: Answers) -> None:
        """Parts of rows that are not answered yet."""
        early = sent.segment.early
        if early is not None:
            self._check_early(sent, start, answers)
            self._link.note_times(sent.segment.route.handler, answers)
            sent.is_read = sent.is_read or not all(column.is_over for column in answers.parts)
            early(start, answers.granted_by(partial(self._grant, sent, start)))

    def _check_early(self, sent: _Sent, start: int, answers: Answers) -> None:
        """Raises Misspoken for what no worker may send before its answer."""
        with self._lock:
            for column in answers.parts:
                for row in range(start, start + answers.count):
                    key = row, column.process_id
                    early = sent.early.get(key)
                    if early is None:
                        early = sent.early[key] = Arriving(sent.segment.chunks)
                    chunk = column.chunk
                    if chunk is None or column.failed is not None:
                        early.whole()
                    else:
                        early.chunk(chunk.at, len(column.results.items[0]), chunk.more)

    def _grant(self, sent: _Sent, row: int, worker: str, chunks: int) -> None:
        with self._lock:
            message = sent.message
            if message is None or not sent.open.runs(row, 1):
                return
            if early := sent.early.get((row, worker)):
                early.left += chunks
            self._grants.append((message.number, sent.row + row, worker, chunks))
        self.pipe.kick()

    def _spread(self, message: _Message, start: int, answers: Answers) -> None:
        """Gives a slice to the segments that its rows belong to."""
        if len(message.parts) == 1:
            self._answer(message.parts[0], start, answers)
            return
        stop = start + answers.count
        index = bisect.bisect_right(message.starts, start) - 1
        while start < stop and index < len(message.parts):
            part = message.parts[index]
            rows = min(stop, part.row + part.segment.count) - start
            if rows > 0:
                offset = answers.count - (stop - start)
                self._answer(part, start - part.row, answers.slice(offset, rows))
                start += rows
            index += 1

    def _begin(self, metadata: Mapping[str, str]) -> None:
        theirs = codec.read_most_bytes(metadata.items())
        mine = self._limits.max_message_bytes
        self._most_bytes = mine if theirs is None else min(mine, theirs)
        self.is_live = True
        self._link.look_again()

    def _lost(self, why: Part) -> None:
        with self._lock:
            self.is_live = False
            handed = [part for message in self._messages.values() for part in message.parts]
            unsent = list(self._outbox)
            self._outbox.clear()
            self._cancels.clear()
            self._grants.clear()
        self._link.lost(why)
        # A neighbour that stops in order proves that it has read none of this.
        ran = Executed.NO if why.executed is Executed.NO else Executed.UNKNOWN
        for part in handed:
            self._answer_all(part, Code.UNAVAILABLE, why.reason, ran)
        for part in unsent:
            self._answer_all(part, Code.UNAVAILABLE, why.reason, Executed.NO)
        self._link.flush()

    # on any thread

    def _answer_all(self, sent: _Sent, code: Code, reason: str, executed: Executed) -> None:
        reason = f"no answer from {self._link.id}: {reason}"
        part = Part(self._link.id, code, reason, executed=executed)
        self._answer(sent, 0, Answers(sent.segment.count, (), refused=part))

    def _answer(self, sent: _Sent, start: int, answers: Answers) -> None:
        message = sent.message
        with self._lock:
            before = sent.open.left
            runs = sent.open.take(start, answers.count)
            if message is not None:
                message.left -= before - sent.open.left
                if not message.left:
                    self._messages.pop(message.number, None)
                    for part in message.parts:
                        part.message = None
        for first, rows in runs:
            slice_ = answers.slice(first - start, rows)
            self._link.answered(sent.segment.route, slice_, sent.is_read)
            sent.sink(first, slice_)


def _runs_within(payloads: Sequence[bytes], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows as runs of at most so many bytes; what is larger alone is one by itself."""
    first = size = 0
    for row, payload in enumerate(payloads):
        if size + len(payload) > most and row > first:
            yield first, row - first
            first, size = row, 0
        size += len(payload)
    yield first, len(payloads) - first
