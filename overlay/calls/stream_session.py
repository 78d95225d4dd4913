"""ForwardStream, served: many requests over one call, bounded by a window.

    a frame has come   --> segments -> check -> the stream's flow in the queue      read
    answers are there  --> combine -> slices -> a frame, what has gathered meanwhile in one   write
    a frame has left   --> its rows leave the window; the next one is written       on gRPC's thread

The stream is not read while its window is full, and so its client stops too, whose frames gRPC then
holds back. A request leaves the window when its answer has been handed to gRPC, so that a client
that does not read is bounded too; and all that do not together. A large part passes in chunks, no
further ahead of its reader than overlay.transport.chunks.ChunkWindow lets it.

Reading and writing are jobs for the process's stream threads, of each at most one a stream; between
them a stream holds no thread. An idle one makes room where more come than there are places.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial

import grpc

from overlay.calls import metrics_codec
from overlay.calls.background import BackgroundThreads
from overlay.calls.eviction import EvictionQueue
from overlay.calls.reception import Call
from overlay.calls.request_log import unexpected
from overlay.calls.request_path import Accepted, RequestPath, size_of
from overlay.model import clocks as time
from overlay.model.errors import (
    BadRequest,
    CallCancelled,
    Draining,
    MadeRoom,
    OverlayError,
    QueueFull,
)
from overlay.model.pending import PendingRows
from overlay.model.segments import ANONYMOUS, Caller, Code, Mode, Part, Route, Segment, Slice
from overlay.observability.map_progress import Maps
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.chunks import Budget, ChunkWindow, Share, Told
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines

log = logging.getLogger(__name__)

OF_ONE_ADDRESS = 3  # times the places that are left: of 1,024 it has 768 at most
OF_A_NEIGHBOUR = 4  # streams: a link has two, and those before its restart


class OpenStreams:
    """The streams that are open. Safe from any thread.

    At most `most`, and of one address three times as many as are left. An idle one is ended for a
    new one of its address. Neighbours' streams are counted apart.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: dict[_Session, str] = {}  # the oldest first, each with its address
        self._of_neighbours: dict[str, dict[_Session, None]] = {}
        self._counts: dict[str, int] = {}
        # Streams that were idle when they were listed. One that has worked since is found out when
        # its turn comes, so that a stream need not report that it works.
        self._resting: EvictionQueue[_Session] = EvictionQueue(most)

    def __iter__(self) -> Iterator[_Session]:
        with self._lock:
            found = list(self._open)
            found += [stream for held in self._of_neighbours.values() for stream in held]
        return iter(found)

    def __len__(self) -> int:
        return len(self._open) + sum(map(len, self._of_neighbours.values()))

    def enter(self, stream: _Session, address: str, neighbour: str = "") -> list[_Session]:
        """The streams that end for it. Raises QueueFull. neighbour: the process of its link."""
        with self._lock:
            if neighbour:
                held = self._of_neighbours.setdefault(neighbour, {})
                gone = list(held)[: max(0, len(held) + 1 - OF_A_NEIGHBOUR)]
                held[stream] = None
            else:
                gone = self._make_room_locked(address)
                self._open[stream] = address
                self._counts[address] = self._counts.get(address, 0) + 1
                self._list_locked(stream, address)
            # A neighbour's is not ended for others, and need not list itself.
            stream.is_listed = True
        return gone

    def rests(self, stream: _Session) -> None:
        """It is idle, and not yet listed as one that may be."""
        with self._lock:
            address = self._open.get(stream)
            if address is not None:
                self._list_locked(stream, address)

    def leave(self, stream: _Session) -> None:
        with self._lock:
            self._resting.discard(stream)
            for held in self._of_neighbours.values():
                held.pop(stream, None)
            address = self._open.pop(stream, None)
            if address is None:
                return
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def _list_locked(self, stream: _Session, address: str) -> None:
        self._resting.add(stream, address)
        stream.is_listed = True

    def _make_room_locked(self, address: str) -> list[_Session]:
        count, left = self._counts.get(address, 0), self._most - len(self._open)
        if left > 0 and count < OF_ONE_ADDRESS * left:
            return []
        while self._resting.size_of(address):
            stream = self._resting.pop_oldest(address)
            stream.is_listed = False  # before it is looked at: from now on it lists itself
            has_worked, stream.has_worked = stream.has_worked, False
            if stream.is_at_work:
                continue
            if not has_worked:
                return [stream]
            self._list_locked(stream, address)  # others have been idle for longer
        raise QueueFull(
            f"all {self._most} streams are open"
            if left <= 0
            else f"{count} of {self._most} streams are open from {address} alone, all of them at "
            f"work; let programs there share one client, or close those that are done"
        )


class StreamSessions:
    """Serves the ForwardStream calls of one process; what its sessions have in common."""

    def __init__(self, path: RequestPath, deadlines: Deadlines) -> None:
        limits = path.limits
        self.path = path
        self.deadlines = deadlines
        self.maps = Maps()
        self.open = OpenStreams(limits.streams)
        self.threads = BackgroundThreads(limits.stream_threads, "stream")
        self.held = Budget(limits.max_waiting_bytes)  # payloads and answers in the windows
        self.unread = Budget(limits.unread_bytes)  # answers that wait for their clients to read
        self.ahead = Budget(limits.ahead_bytes)  # chunks before their clients have asked for more

    def serve(
        self,
        call: Call,
        context: grpc.ServicerContext,
        caller: Caller = ANONYMOUS,
        neighbour: str = "",
    ) -> None:
        """Answers one call until the client's half-close. Never waits. Raises QueueFull, Draining.

        neighbour: the process above this one whose link it is, if it is one.
        """
        path, record = self.path, self.path.record
        if path.draining:
            raise Draining(f"{path.me} is stopping and takes no new requests")
        theirs = codec.read_most_bytes(context.invocation_metadata())
        session = _Session(self, call, caller, theirs)
        try:
            for other in self.open.enter(session, caller.address, neighbour):
                other.make_room()
                record.crowded_out("idle streams", 1, caller.address)
        except QueueFull:
            record.crowded_out("streams", 1, caller.address)
            session.abandon()
            raise
        if not context.add_callback(session.abandon):
            session.abandon()
            return
        # Tells the client that its stream is served, and how large a body may be.
        context.send_initial_metadata(codec.most_bytes_metadata(path.limits))
        session.begin()

    def fill(self, made: pb2.MetricsResponse) -> None:
        now = time.monotonic()
        made.maps.extend(metrics_codec.write_map(running, now) for running in self.maps.all())

    def announce_stop(self, for_good: bool) -> None:
        """Tells every client that the process stops, so that it sends no more."""
        for session in self.open:
            session.announce_stop(for_good)

    def end(self) -> None:
        """Each stream ends once all it has accepted is answered; it accepts no more.

        Its end proves to the client that nothing else it sent was read.
        """
        for session in self.open:
            session.end()


class _Accepted(Accepted):
    """A segment of the stream, until its last answer is written."""

    __slots__ = ("ahead", "good", "left", "number", "size", "unanswered", "want_trace")

    def __init__(self, made: pb2.Segment, segment: Segment, caller: Caller) -> None:
        super().__init__(segment, caller, made.want_parts)
        self.number = made.number
        self.want_trace = made.want_trace
        self.left = segment.count
        self.size = segment.payloads.size
        # As they come: the rows that may still have parts, and those that had a good one.
        self.unanswered: PendingRows | None = None
        self.good: set[int] = set()
        self.ahead = max(0, segment.chunks - 1)  # chunks of a part, beyond the first


_Gone = tuple[_Accepted, int, int, bool]
"""Answers that have been written: of which segment, how many rows, their bytes, and as below."""

_Out = tuple[_Accepted, int, Slice, int, bool]
"""Answers to be written: of which segment, its first row, they, their bytes, and whether they are
parts before the answer."""


class _Session:
    def __init__(
        self, sessions: StreamSessions, call: Call, caller: Caller, theirs: int | None = None
    ) -> None:
        """theirs: the largest answer that the client takes, where it says so."""
        self._sessions = sessions
        self._path = sessions.path
        self._call = call
        self._caller = caller
        self._limits = limits = sessions.path.limits
        self._theirs = theirs
        self._most_bytes = min(limits.max_message_bytes, theirs or limits.max_message_bytes)
        self._lane = self._path.queue.open_flow(caller)
        self._lock = threading.Lock()
        self._out: deque[_Out] = deque()
        self._leaving: list[_Gone] = []  # in the frame that is being written
        self._accepted: dict[int, _Accepted] = {}
        self._rows = 0  # accepted and not yet written
        self._held = Share(sessions.held)  # bytes in its window
        self._unread = Share(sessions.unread)  # bytes of answers that wait for the client to read
        # As one that may be idle; guarded by the list's lock, as is the next.
        self.is_listed = False
        self.has_worked = False
        self._passage = ChunkWindow(limits.window_bytes // 2 // limits.chunk_bytes, sessions.ahead)
        self._frame_bytes = min(limits.frame_bytes, self._most_bytes // 2)
        self._routes: dict[object, Route] = {}  # read and checked; a stream's are few
        self._no_more = False
        self._reads_later = False  # when its window has room again
        self._frame: pb2.Frame | None = None  # that is being taken, when it came,
        self._frame_at = 0.0
        self._segments: deque[pb2.Segment] = deque()  # and those of it that are still to be taken
        self._writes = False  # a job does, or a frame is leaving
        self._abandoned = False
        self._rest_is_ended = False  # after that
        self._stopping = self._for_good = False
        self._has_news = False  # to be sent even without an answer
        self._broken: OverlayError | None = None
        self._parting: OverlayError | None = None

    @property
    def is_at_work(self) -> bool:
        return self._rows > 0

    def begin(self) -> None:
        self._call.receive(self._came)

    def announce_stop(self, for_good: bool) -> None:
        with self._lock:
            self._stopping = self._has_news = True
            self._for_good = for_good
        self._write_on()

    def end(self) -> None:
        """Ends the call once all it has accepted is answered."""
        me = self._path.me
        self._part_with(Draining(f"{me} is stopping and takes no new requests"))

    def make_room(self) -> None:
        """It is idle and ends for others; its client comes back when it has something to ask."""
        self._part_with(
            MadeRoom(f"{self._path.me} has more clients than places; this one was idle")
        )

    def abandon(self) -> None:
        """The call is over: ends what it still wanted. May be called twice."""
        with self._lock:
            if self._abandoned:
                return
            self._abandoned = True
        self._sessions.open.leave(self)
        self._sessions.maps.forget(self)
        self._path.queue.close_flow(self._lane)
        self._sessions.threads.run(self._end_rest)

    def _end_rest(self) -> None:
        with self._lock:
            open_ones = list(self._accepted.values())
        for accepted in open_ones:
            if accepted.ticket is not None:
                accepted.ticket.end(Code.CANCELLED)
                self._sessions.deadlines.forget(accepted.ticket, accepted.segment.deadline)
        with self._lock:
            self._rest_is_ended, counts = True, not self._writes
        if counts:
            self._count_rest()

    def _part_with(self, error: OverlayError) -> None:
        with self._lock:
            if not self._no_more:
                self._parting = error
                self._no_more = True
        self._write_on()

    # reading

    def _came(self, message: bytes | None) -> None:
        """On gRPC's serving thread."""
        if message is not None:
            self._sessions.threads.run(partial(self._read, message))
            return
        with self._lock:
            self._no_more = True
        self._write_on()

    def _read(self, message: bytes | None = None) -> None:
        """Takes a frame that has come, or the rest of the last one, as far as there is room."""
        try:
            if message is not None:
                self._frame, self._frame_at = codec.read_frame(message), time.monotonic()
                self._segments.extend(self._frame.segments)
            while self._segments:
                rows = self._segments[0].count  # more than a segment may have ends the call
                if rows <= self._limits.segment_rows and not self._has_room(rows):
                    self._path.queue.kick()
                    return  # from here on another job may go on with it
                self._accept(self._segments.popleft(), self._frame_at)
            if self._frame is not None:
                self._take_rest(self._frame)
                self._frame = None
        except OverlayError as e:
            self._break(e)
        except Exception as e:  # noqa: BLE001 - a fault of ours costs one stream
            self._break(unexpected(e))
        if self._has_room():
            self._call.receive(self._came)

    def _break(self, error: OverlayError) -> None:
        with self._lock:
            self._broken = self._broken or error
            self._no_more = True
        self._write_on()

    def _has_room(self, rows: int = 1) -> bool:
        """Whether so many may come now; if not they do when half of the window is free."""
        with self._lock:
            if self._abandoned or self._broken is not None:
                return False
            self._reads_later = self._is_full_locked(1, rows)
            return not self._reads_later

    def _is_full_locked(self, parts: int, rows: int = 1) -> bool:
        """Whether so many more are too many for one of so many parts of the window."""
        if not self._rows:
            return False
        if self._rows + rows > self._limits.window_rows // parts:
            return True
        return not self._held.is_within(self._limits.window_bytes // parts)

    # writing

    def _write_on(self) -> None:
        """Starts a job that writes what there is to write, unless one is under way."""
        with self._lock:
            if self._writes or not self._has_work_locked():
                return
            self._writes = True
        self._sessions.threads.run(self._write)

    def _has_work_locked(self) -> bool:
        return bool(self._out) or self._has_news or self._is_over_locked()

    def _is_over_locked(self) -> bool:
        if self._abandoned or self._broken is not None:
            return True
        return self._no_more and not self._rows

    def _write(self) -> None:
        """One frame of answers, or the end of the call when all that was accepted is answered."""
        with self._lock:
            is_over = self._abandoned or (self._is_over_locked() and not self._out)
            taken = [] if is_over else self._some_locked()
            # Not the answers themselves: they would be there twice until the client reads them.
            self._leaving = [(out[0], out[2].count, out[3], out[4]) for out in taken]
            self._has_news = False
            frame = pb2.Frame(stopping=self._stopping, for_good=self._for_good)
        if is_over:
            self._finish()
            return
        try:
            for accepted, start, answers, size, more in taken:
                if more:
                    self._write_parts(frame, accepted, start, answers, size)
                else:
                    self._write_slice(frame, accepted, start, answers, size)
            message = frame.SerializeToString()
        except Exception as e:  # noqa: BLE001 - a fault of ours costs one stream
            self._break(unexpected(e))
            self._left(False)
            return
        del taken, frame
        self._call.send(message, self._left)

    def _left(self, is_open: bool) -> None:
        """A frame has been handed to gRPC: only now it leaves the window. On its serving thread."""
        taken, self._leaving = self._leaving, []
        goes_on, ended = self._leave_window(taken)
        for accepted in ended:
            if accepted.ticket is not None:
                self._sessions.deadlines.forget(accepted.ticket, accepted.segment.deadline)
                accepted.ticket = None  # it leads back here
        with self._lock:
            self._writes = writes = self._has_work_locked()
            reads = self._reads_later and not self._is_full_locked(2)
            self._reads_later = self._reads_later and not reads
        if writes:
            self._sessions.threads.run(self._write)
        if goes_on:
            self._sessions.threads.run(self._path.queue.kick)
        if reads and self._frame is not None:
            self._sessions.threads.run(self._read)
        elif reads:
            self._call.receive(self._came)

    def _finish(self) -> None:
        with self._lock:
            self._writes = False
            is_abandoned, counts = self._abandoned, self._rest_is_ended
            error = self._broken or self._parting
        if is_abandoned:
            if counts:  # or it is counted when it has been ended
                self._count_rest()
        elif error is not None:
            self._call.fail(error)
        else:
            self._call.finish()

    def _count_rest(self) -> None:
        """Counts what was received and will not be answered any more, as cancelled."""
        with self._lock:
            rest, self._accepted = list(self._accepted.values()), {}
            self._out.clear()
            self._passage.close()
            self._held.add(-self._held.size)
            self._unread.add(-self._unread.size)
        for accepted in rest:
            rows = accepted.segment.count - accepted.counted
            gone: OverlayError = CallCancelled("the caller left")
            left = Part(self._path.me, gone.code, str(gone))
            failures = [(row, gone) for row in range(rows)]
            accepted.ticket = None
            answers = Slice(rows, (), refused=left)
            self._path.note(accepted, accepted.counted, answers, failures)

    def _keep_answers_locked(self, size: int) -> None:
        """Adds to the bytes that its client has not read; with too many its lane pauses."""
        self._held.add(size)
        self._unread.add(size)
        self._lane.paused = not self._unread.is_within(self._limits.window_bytes // 2)

    def _take_rest(self, frame: pb2.Frame) -> None:
        self._path.queue.kick()
        for cancel in frame.cancels:
            accepted = self._accepted.get(cancel.number)
            if accepted is not None and accepted.ticket is not None:
                rows = accepted.segment.count
                start = min(cancel.start, rows)
                accepted.ticket.end(Code.CANCELLED, start, min(cancel.count, rows - start))
        for grant in frame.grants:
            self._grant(grant)
        for told in frame.progress:
            progress = codec.read_progress(told, self._limits)
            self._sessions.maps.add(self, self._caller, progress)
        if self._abandoned:  # perhaps only now: `abandon` has forgotten what was there before
            self._sessions.maps.forget(self)

    def _grant(self, made: pb2.Grant) -> None:
        with self._lock:
            accepted = self._accepted.get(made.number)
            if accepted is None:
                return
            key = made.number, made.row, made.process_id
            told = self._passage.granted(key, made.count, not accepted.from_process)
        if told is not None:
            tell, chunks = told
            tell(chunks)

    def _accept(self, made: pb2.Segment, now: float) -> None:
        segment, wrong = self._read_segment(made, now)
        if made.number in self._accepted:
            raise BadRequest(f"number: {made.number} is taken by a segment not answered yet")
        accepted = _Accepted(made, segment, self._caller)
        if made.as_they_come and segment.route.mode is Mode.ALL:
            chunks = min(1, segment.chunks)  # more of them as there is room
            segment = segment.with_(on_partial=partial(self._pass_on, accepted), chunks=chunks)
            accepted.segment, accepted.unanswered = segment, PendingRows(segment.count)
        with self._lock:
            if self._abandoned or self._parting is not None:
                return
            self.has_worked = True
            self._accepted[made.number] = accepted
            self._rows += accepted.left
            self._held.add(accepted.size)
        sink = partial(self._answer, accepted)
        self._path.admit(accepted, sink, made.priority, self._lane, wrong)
        ticket = accepted.ticket
        if ticket is None:
            return
        if ticket.is_open:
            self._sessions.deadlines.watch(ticket, segment.deadline)
        if self._abandoned:
            ticket.end(Code.CANCELLED)

    def _read_segment(self, made: pb2.Segment, now: float) -> tuple[Segment, OverlayError | None]:
        """The segment, and what is wrong with it; blank rows where it cannot be read."""
        traced = not made.hops and self._path.record.wants_trace()
        try:
            route, wrong = self._route(made)
            return codec.read_segment(made, now, self._limits, route, traced), wrong
        except OverlayError as e:
            unread = codec.unread_segment(made, now, self._limits)
            if unread is None:
                raise  # no rows to answer for: that ends the stream
            return unread, e

    def _route(self, made: pb2.Segment) -> tuple[Route, OverlayError | None]:
        key = codec.route_key(made, self._limits)
        route = self._routes.get(key)
        if route is None:
            route = codec.read_route(made, self._limits)
            try:
                self._path.check(route)
            except OverlayError as e:
                return route, e
            if len(self._routes) < 100:
                self._routes[key] = route
        return route, None

    def _answer(self, accepted: _Accepted, start: int, answers: Slice) -> None:
        size = size_of(answers)
        with self._lock:
            if accepted.unanswered is not None:
                accepted.unanswered.take(start, answers.count)
                self._passage.end_rows(accepted.number, start, answers.count)
            is_first = self._put_locked((accepted, start, answers, size, False))
        if is_first:
            self._write_on()

    def _pass_on(self, accepted: _Accepted, start: int, answers: Slice) -> None:
        """Parts before the answer; none after it, when the segment's number may be another's."""
        told = []
        is_first = False
        with self._lock:
            assert accepted.unanswered is not None
            if self._abandoned:  # its room has been given back
                return
            for first, count in accepted.unanswered.runs(start, answers.count):
                rows = answers.slice(first - start, count)
                accepted.good.update(first + i for i in range(count) if _has_good(rows, i))
                told += self._chunks_locked(accepted, first, rows)
                is_first |= self._put_locked((accepted, first, rows, size_of(rows), True))
        for tell, chunks in told:
            tell(chunks)
        if is_first:
            self._write_on()

    def _chunks_locked(self, accepted: _Accepted, row: int, answers: Slice) -> list[Told]:
        """The workers whose chunks pass here and that may send more."""
        told = []
        for column in answers.parts:
            key = accepted.number, row, column.process_id
            if column.chunk is None:  # a failure, it may be after chunks
                self._passage.end(key)
                continue
            if accepted.ticket is not None:
                accepted.ticket.is_read = True
            if more := self._passage.passes(key, column.chunk, accepted.ahead):
                told.append(more)
        return told

    def _put_locked(self, out: _Out) -> bool:
        """Whether nothing else waits to be written."""
        if self._abandoned:
            return False
        self._out.append(out)
        self._keep_answers_locked(out[3])
        return len(self._out) == 1

    def _some_locked(self) -> list[_Out]:
        taken: list[_Out] = []
        room = self._frame_bytes
        while self._out and room > 0:
            accepted, start, answers, size, more = self._out.popleft()
            if size > room and answers.count > 1:
                answers, rest = _split(answers, room)
                whole, size, rest_size = size, size_of(answers), size_of(rest)
                self._out.appendleft((accepted, start + answers.count, rest, rest_size, more))
                self._keep_answers_locked(size + rest_size - whole)
            taken.append((accepted, start, answers, size, more))
            room -= size
        return taken

    def _write_slice(
        self, frame: pb2.Frame, accepted: _Accepted, start: int, answers: Slice, size: int
    ) -> None:
        made = self._path.finish(accepted, start, answers, size, self._theirs, accepted.good)
        if accepted.from_process:
            codec.write_slice(frame, accepted.number, start, made.answers, made.trace)
        else:
            codec.write_client_slice(
                frame,
                accepted.number,
                start,
                made.answers,
                made.results,
                made.failures,
                accepted.want_parts or accepted.unanswered is not None,
                made.trace if accepted.want_trace else (),
            )

    def _write_parts(
        self, frame: pb2.Frame, accepted: _Accepted, start: int, answers: Slice, size: int
    ) -> None:
        if size > self._most_bytes:
            refused = self._path.too_large(answers, size, self._theirs).refused
            ids = tuple(column.process_id for column in answers.parts)
            answers = aggregate.from_branch(Slice(answers.count, (), refused=refused), ids)
        codec.write_slice(frame, accepted.number, start, answers, more=True)

    def _leave_window(self, taken: list[_Gone]) -> tuple[bool, list[_Accepted]]:
        """Whether its lane goes on, and the segments that are answered in full."""
        ended = []
        with self._lock:
            was_paused, size = self._lane.paused, 0
            for accepted, rows, bytes_, more in taken:
                size += bytes_
                if more:
                    continue
                self._rows -= rows
                accepted.left -= rows
                if not accepted.left:
                    self._held.add(-accepted.size)
                    self._accepted.pop(accepted.number, None)
                    ended.append(accepted)
            self._keep_answers_locked(-size)
            if not self._rows and not self.is_listed:
                self._sessions.open.rests(self)
            return was_paused and not self._lane.paused, ended


def _split(answers: Slice, room: int) -> tuple[Slice, Slice]:
    """The first rows that fit into `room` bytes, at least one, and the rest."""
    rows = max(1, answers.count * room // size_of(answers))
    while rows > 1 and size_of(answers.slice(0, rows)) > room:
        rows //= 2  # a large one among small ones goes alone
    return answers.slice(0, rows), answers.slice(rows, answers.count - rows)


def _has_good(answers: Slice, row: int) -> bool:
    return any(c.failed is None and row not in c.failures and c.is_over for c in answers.parts)
