"""Sends segments to a neighbour over one stream, and hands their answers back.

    send --> outbox --> fill: small segments of one kind are joined --> the neighbour
    sink <-- receive: a slice is given to the segments that its rows belong to <--

overlay.transport.multiplexer knows which segment an answer belongs to. Single requests for a
neighbour that is busy with quick work are held for a moment and sent together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import grpc

from overlay.model.jobs import MAX_PROGRESS, WorkProgress
from overlay.model.leases import LaneReport, Lent
from overlay.model.limits import Limits
from overlay.model.segments import (
    Cancel,
    Code,
    Executed,
    OnResult,
    Part,
    Route,
    Segment,
    Slice,
    end_overlap,
    shifted,
)
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.multiplexer import SAME_DEADLINE_S, Multiplexer, OpenSegment
from overlay.transport.put_off import scope
from overlay.transport.stream import ReconnectingStream


class Owner(Protocol):
    """What a SegmentSender needs of its owner. Thread-safe.

    metadata: sent with each call. to_flush: senders with something to send, until `flush` kicks
    their streams.
    """

    id: str
    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]
    to_flush: set[SegmentSender]

    def flush(self) -> None: ...
    def is_quick(self, handler: str) -> bool: ...
    def time_left_s(self, deadline: float) -> float: ...
    def answered(self, route: Route, answers: Slice, is_read: bool = ...) -> None: ...
    def note_times(self, handler: str, answers: Slice) -> None: ...
    def overdue(self, handler: str, rows: int) -> None: ...
    def probe_now(self) -> None: ...
    def on_stopping(self, for_good: bool = ...) -> None: ...
    def reported(self, report: LaneReport) -> None: ...
    def progressed(self, made: Sequence[WorkProgress]) -> None: ...
    def lost(self, why: Part) -> None: ...


class _Member:
    """A segment given to `send`. It waits, or was sent alone or joined with others."""

    __slots__ = ("is_over", "is_read", "row", "segment", "sent_in", "sink")

    def __init__(self, segment: Segment, sink: OnResult) -> None:
        self.segment = segment
        self.sink = sink
        self.sent_in: OpenSegment[_Member] | None = None  # once it is handed to gRPC: it may run
        self.row = 0  # its first row there
        self.is_read = False  # in chunks: its reader then decides how fast it ends
        self.is_over = False  # every row has its answer


class SegmentSender:
    """Sends segments over one stream, and gives each of their rows exactly one answer.

    stream: its owner starts and ends it. is_live: the neighbour has accepted the stream.
    """

    def __init__(self, peer: Owner, name: str, limits: Limits) -> None:
        self.stream = ReconnectingStream(
            peer.channel,
            name,
            self._fill,
            self._receive,
            self._lost,
            self._accepted,
            self._patience_s,
            peer.metadata,
        )
        self._peer = peer
        self._limits = limits
        self._max_bytes = limits.max_message_bytes  # the limit of both sides
        self._targets: tuple[tuple[str, ...] | None, frozenset[str] | None] = None, None
        self._multiplexer = Multiplexer()
        self._outbox: deque[_Member] = deque()
        # Rows cancelled before they were sent.
        self._cancelled: deque[tuple[_Member, int, int]] = deque()
        self._last_quick: OpenSegment[_Member] | None = None
        self._lent: deque[Lent] = deque()

    @property
    def is_live(self) -> bool:
        return self._multiplexer.is_live

    def lend(self, lent: Lent) -> None:
        """Passes a lease on with the next frame. It is lost with the stream, and then ends."""
        self._lent.append(lent)
        self.stream.kick()

    def send(self, segment: Segment, sink: OnResult) -> Cancel:
        if segment.payloads.size > self._max_bytes and self.is_live:
            return self._send_parts(segment, sink)
        return self._send(segment, sink)

    def _send_parts(self, segment: Segment, sink: OnResult) -> Cancel:
        """Splits a segment that is too large for the neighbour. Refuses rows that are too large
        by themselves."""
        ends: list[tuple[int, int, Cancel]] = []
        for first, count in _runs_within(segment.payloads.items, self._max_bytes):
            part, part_sink = segment.slice(first, count), shifted(sink, first)
            size = len(part.payloads.items[0]) if count == 1 else 0
            if size > self._max_bytes:
                self._refuse_too_large(part, size, part_sink)
            else:
                ends.append((first, count, self._send(part, part_sink)))

        def end(code: Code, start: int, count: int) -> None:
            for first, rows, one in ends:
                end_overlap(one, first, rows, code, start, count)

        return end

    def _refuse_too_large(self, segment: Segment, size: int, sink: OnResult) -> None:
        own_limit, peer_limit = self._limits.max_message_bytes, self._max_bytes
        why = f"{size:,} bytes are more than {self._peer.id} takes, whose max_message_mib allows "
        why += f"{peer_limit:,}, and this process's {own_limit:,}"
        self._refuse(_Member(segment, sink), Code.FAILED_PRECONDITION, why)

    def _send(self, segment: Segment, sink: OnResult) -> Cancel:
        member = _Member(segment, sink)
        with self._multiplexer.lock:
            is_live = self._multiplexer.is_live
            if is_live:
                self._outbox.append(member)
        if is_live:
            self._peer.to_flush.add(self)
        else:
            self._refuse(member, Code.UNAVAILABLE, "the link is down")

        def end(code: Code, start: int, count: int) -> None:
            sent = member.sent_in
            if sent is None:
                if member.is_over:
                    return
                self._cancelled.append((member, start, count))
            else:
                rows = self._multiplexer.cancel(sent, member.row + start, count)
                if not rows:
                    return
                if code is Code.DEADLINE_EXCEEDED and not member.is_read:
                    self._peer.overdue(segment.route.handler, rows)
            self.stream.kick()

        return end

    # on the thread that sends

    def _patience_s(self) -> float:
        """How long a few requests wait for more while the neighbour is busy with quick work.

        Sent one by one, requests cost more in transit than in the handler; together they share a
        frame. They leave when the quick work is answered. This is Nagle's algorithm (RFC 896) with
        a time limit, so that a request that hangs does not hold up the others.
        """
        if not self._outbox or not self._is_busy_with_quick_work:
            return 0.0
        if self._cancelled or self._lent or self._multiplexer.has_control:
            return 0.0
        try:
            first = self._outbox[0].segment
        except IndexError:  # lost since
            return 0.0
        limits = self._limits
        is_few = first.count <= limits.few_rows and len(self._outbox) < limits.gather_rows
        return limits.gather_s if is_few and self._is_quick(first) else 0.0

    def _is_quick(self, segment: Segment) -> bool:
        """Whether transit outweighs its work, its bytes and its number of rows."""
        limits, count = self._limits, segment.count
        is_small = segment.payloads.size <= limits.small_bytes * count
        is_alike = is_small and count <= limits.gather_rows and segment.on_partial is None
        return is_alike and self._peer.is_quick(segment.route.handler)

    @property
    def _is_busy_with_quick_work(self) -> bool:
        last = self._last_quick
        return last is not None and last.pending.left > 0

    def _fill(self, frame: pb2.Frame) -> bool:
        size = 0
        while self._outbox and size < self._limits.frame_bytes:
            size += self._write(frame, self._joinable())
        # After their segments: rows cancelled before they were sent are cancelled over there.
        for _ in range(len(self._cancelled)):
            member, start, count = self._cancelled.popleft()
            sent = member.sent_in
            if sent is not None:
                self._multiplexer.cancel(sent, member.row + start, count)
            elif not member.is_over:  # it leaves in a later frame
                self._cancelled.append((member, start, count))
        size += self._multiplexer.write_control(frame, self._limits.frame_cancels)
        while self._lent:
            frame.lent.append(codec.write_lent(self._lent.popleft()))
            size += 100
        return size > 0

    def _write(self, frame: pb2.Frame, members: list[_Member]) -> int:
        """Writes them as one segment. Returns about how many bytes; 0 if they were refused."""
        segment = members[0].segment
        counts = [segment.count]
        if len(members) > 1:
            counts = [member.segment.count for member in members]
            segment = Segment.joined([member.segment for member in members])
        left_s = self._peer.time_left_s(segment.deadline)
        if left_s <= 0:
            for member in members:
                self._refuse(member, Code.DEADLINE_EXCEEDED, "no time left")
            return 0
        is_partial, targets = segment.on_partial is not None, self._targets_of(segment.route)
        size = segment.payloads.size
        sent = OpenSegment(members, counts, size, targets, is_partial, segment.chunks)
        if not self._multiplexer.open(sent):  # lost since: this frame is not sent
            for member in members:
                self._refuse(member, Code.UNAVAILABLE, "the link is down")
            self._peer.flush()
            return 0
        for member, row in zip(members, sent.starts, strict=False):
            member.row, member.sent_in = row, sent
        if self._is_quick(segment):
            self._last_quick = sent
        codec.write_segment(frame, sent.number, segment, left_s, as_they_come=is_partial)
        return size + codec.size_beside(segment)

    def _targets_of(self, route: Route) -> frozenset[str] | None:
        """As a set. The last one is cached, as the same few routes recur."""
        last, found = self._targets
        if last is not route.targets:
            found = None if route.targets is None else frozenset(route.targets)
            self._targets = route.targets, found
        return found

    def _joinable(self) -> list[_Member]:
        """Takes the head of the outbox, with those behind it that may share its segment."""
        members = [self._outbox.popleft()]
        first = members[0].segment
        rows, size = first.count, first.payloads.size
        few = self._limits.few_rows  # larger ones are copied without decoding, which is cheaper
        if first.on_partial is not None:
            return members  # parts sent ahead of its answer need a segment of its own
        while self._outbox and rows < self._limits.join_rows and first.count <= few:
            other = self._outbox[0].segment
            rows, size = rows + other.count, size + other.payloads.size
            if (
                other.route != first.route
                or other.attempt != first.attempt
                or other.log_lines != first.log_lines
                or other.own_ids != first.own_ids
                or abs(other.deadline - first.deadline) > SAME_DEADLINE_S
                or other.count > few
                or other.on_partial is not None
                or size > self._limits.frame_bytes
            ):
                break
            members.append(self._outbox.popleft())
        return members

    # on gRPC's thread of the channel

    def _receive(self, frame: pb2.Frame) -> None:
        with scope():  # all answers to one stream above leave in one frame
            self._take(frame)

    def _take(self, frame: pb2.Frame) -> None:
        if frame.stopping:
            self._peer.on_stopping(frame.for_good)
        for report in frame.lane_reports:
            self._peer.reported(codec.read_lane_report(report))
        if frame.work_progress:
            reported = frame.work_progress[:MAX_PROGRESS]
            self._peer.progressed([codec.read_progress_of(one) for one in reported])
        for sent, made in self._multiplexer.answers_in(frame):
            answers = codec.read_slice(made, sent.asked)
            if made.more:
                self._send_partial(sent, made.start, answers)
            else:
                self._answer(sent, made.start, answers)
        if self._outbox and not self._is_busy_with_quick_work:
            self.stream.send_now()
        self._peer.flush()  # the answers may have led to requests elsewhere

    def _send_partial(self, sent: OpenSegment[_Member], start: int, answers: Slice) -> None:
        """Passes parts of unanswered rows to their segment's `on_partial`."""
        (member,) = sent.members  # such segments are never joined
        on_partial = member.segment.on_partial
        assert on_partial is not None, "checked against the request"
        self._multiplexer.arrive(sent, start, answers)
        self._peer.note_times(member.segment.route.handler, answers)
        member.is_read = member.is_read or not all(column.is_over for column in answers.parts)

        def grant(row: int, worker: str, chunks: int) -> None:
            self._multiplexer.grant(sent, row, worker, chunks)
            self.stream.kick()

        on_partial(start, answers.granted_by(partial(grant, start)))

    def _answer(self, sent: OpenSegment[_Member], start: int, answers: Slice) -> None:
        """Hands a slice to the segments that its rows belong to."""
        runs = self._multiplexer.take(sent, start, answers.count)
        if not sent.pending.left:  # or both would live until a garbage collection
            for member in sent.members:
                member.is_over, member.sent_in = True, None
        for first, count in runs:
            for member, row, rows, at in sent.members_of(first, count):
                slice_ = answers.slice(at - start, rows)
                self._peer.answered(member.segment.route, slice_, member.is_read)
                member.sink(row, slice_)

    def _accepted(self, metadata: Mapping[str, str]) -> None:
        peer_limit = codec.read_max_bytes(metadata.items())
        own_limit = self._limits.max_message_bytes
        self._max_bytes = own_limit if peer_limit is None else min(own_limit, peer_limit)
        self._multiplexer.is_live = True
        self._peer.probe_now()

    def _lost(self, why: Part) -> None:
        open_segments = self._multiplexer.lose()  # from now on nothing enters the outbox
        unsent = list(self._outbox)
        self._outbox.clear()
        self._cancelled.clear()
        self._lent.clear()
        self._peer.lost(why)
        # A neighbour that stops in order proves that it has read none of these.
        ran = Executed.NO if why.executed is Executed.NO else Executed.UNKNOWN
        for sent in open_segments:
            refused = self._refusal(sent.count, Code.UNAVAILABLE, why.reason, ran)
            self._answer(sent, 0, refused)
        for member in unsent:
            self._refuse(member, Code.UNAVAILABLE, why.reason)
        self._peer.flush()

    # on any thread

    def _refuse(self, member: _Member, code: Code, reason: str) -> None:
        """Refuses a segment that was not sent."""
        member.is_over = True
        answers = self._refusal(member.segment.count, code, reason, Executed.NO)
        self._peer.answered(member.segment.route, answers)
        member.sink(0, answers)

    def _refusal(self, count: int, code: Code, reason: str, executed: Executed) -> Slice:
        reason = f"no answer from {self._peer.id}: {reason}"
        return Slice(count, (), refused=Part(self._peer.id, code, reason, executed=executed))


def _runs_within(payloads: Sequence[bytes], limit: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive rows, each within `limit` bytes; a larger row is its own run."""
    first = size = 0
    for row, payload in enumerate(payloads):
        if size + len(payload) > limit and row > first:
            yield first, row - first
            first, size = row, 0
        size += len(payload)
    yield first, len(payloads) - first
