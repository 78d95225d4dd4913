"""Serves ForwardStream: many requests over one call, bounded by a window.

    a frame arrives   --> segments -> check -> the stream's flow in the queue     read
    answers arrive    --> combine -> slices -> one frame for all that are ready   write
    a frame is sent   --> its rows leave the window; the next frame is written    gRPC's thread

While its window is full a stream is not read, and gRPC's flow control stops the client. A request
leaves the window when its answer has been handed to gRPC, so a client that does not read is bounded
too, and so are all such clients together. A large part passes through in chunks, as far ahead of
its reader as overlay.transport.chunks.ChunkWindow allows.

Leases of workers (overlay.calls.leases, .lender) travel in the same frames. A stream that carries
the requests of a lease is served like any other, within what the lease allows.

Reading and writing are jobs of the process's stream threads, at most one of each per stream; in
between a stream holds no thread. When there are too many streams, an idle one is ended.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import grpc

from overlay.calls import metrics_codec
from overlay.calls.background import BackgroundThreads
from overlay.calls.leases import HeldLease, Leases
from overlay.calls.lender import Lender
from overlay.calls.open_streams import OpenStreams
from overlay.calls.reception import Call
from overlay.calls.request_log import unexpected
from overlay.calls.request_path import Accepted, RequestPath, size_of
from overlay.model import access
from overlay.model import clocks as time
from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.errors import (
    BadRequest,
    CallCancelled,
    Draining,
    MadeRoom,
    NotLent,
    OverlayError,
    QueueFull,
)
from overlay.model.jobs import MAX_PROGRESS, WorkProgress
from overlay.model.leases import LaneReport, Lease
from overlay.model.pending import PendingRows
from overlay.model.segments import ANONYMOUS, Caller, Code, Mode, Part, Route, Segment, Slice
from overlay.observability.map_progress import Maps
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.chunks import Budget, ChunkWindow, GrantCall, Share
from overlay.transport.codec import pb2
from overlay.transport.put_off import put_off
from overlay.transport.timers import Deadlines

log = logging.getLogger(__name__)

MAX_LEASE_REQUESTS = 16  # of one frame; further ones are ignored


StartHere = Callable[[Callable[[], None]], None]
"""Calls the queue's kick, and perhaps runs a handler here: see Executor.start_here."""


def just_kick(kick: Callable[[], None]) -> None:
    """For a process without handlers."""
    kick()


class StreamSessions:
    """Serves the ForwardStream calls of one process, and holds what its sessions share."""

    def __init__(
        self,
        path: RequestPath,
        deadlines: Deadlines,
        start: StartHere = just_kick,
        leases: Leases | None = None,
        lender: Lender | None = None,
    ) -> None:
        """start: starts what can start, on the thread that has read a frame. lender: None for a
        process that has nothing to lend."""
        limits = path.limits
        self.leases = leases
        self.lender = lender
        self.path = path
        self.deadlines = deadlines
        self.start = start
        self.maps = Maps()
        self.open: OpenStreams[_Session] = OpenStreams(limits.streams)
        self.threads = BackgroundThreads(limits.stream_threads, "stream")
        self.held = Budget(limits.max_waiting_bytes)  # payloads and answers in the windows
        self.unread = Budget(limits.unread_bytes)  # answers that their clients have not read
        self.ahead = Budget(limits.ahead_bytes)  # chunks that their clients have not granted yet

    def serve(
        self,
        call: Call,
        context: grpc.ServicerContext,
        caller: Caller = ANONYMOUS,
        neighbour: str = "",
        rights: Rights = UNRESTRICTED,
        certificate_name: str = "",
    ) -> None:
        """Serves one call until the client's half-close. Never blocks. Raises QueueFull, Draining,
        NotLent.

        neighbour: the process above this one, if the call is its link. rights: the caller's.
        certificate_name: whose certificate it shows; empty without TLS.
        """
        path, request_log = self.path, self.path.request_log
        if path.draining:
            raise Draining(f"{path.me} is stopping and takes no new requests")
        client_limit = codec.read_max_bytes(context.invocation_metadata())
        session = _Session(self, call, caller, client_limit, rights)
        session.neighbour, session.certificate_name = neighbour, certificate_name
        lease_id = codec.read_lease_id(context.invocation_metadata())
        try:
            if lease_id is not None:
                session.open_lease(lease_id)
            for other in self.open.enter(session, caller.address, neighbour):
                other.make_room()
                request_log.crowded_out("idle streams", 1, caller.address)
        except OverlayError as e:
            if isinstance(e, QueueFull):
                request_log.crowded_out("streams", 1, caller.address)
            session.abandon()
            raise
        if not context.add_callback(session.abandon):
            session.abandon()
            return
        # So that the client knows that its stream is served, and how large a body may be.
        echo = codec.lease_metadata(lease_id) if lease_id is not None else ()
        context.send_initial_metadata((*codec.max_bytes_metadata(path.limits), *echo))
        session.begin()

    def fill(self, response: pb2.MetricsResponse) -> None:
        now = time.monotonic()
        response.maps.extend(metrics_codec.write_map(running, now) for running in self.maps.all())

    def report_progress(self, made: Sequence[WorkProgress]) -> None:
        """Passes handlers' progress to each process above, over one of its streams."""
        for session in {one.neighbour: one for one in self.open if one.neighbour}.values():
            session.report_progress(made)

    def announce_stop(self, for_good: bool) -> None:
        """Tells every client that the process is stopping, so that it sends no more."""
        for session in self.open:
            session.announce_stop(for_good)

    def end(self) -> None:
        """Each stream accepts no more, and ends once all that it has accepted is answered.

        Its end proves to the client that nothing else was read.
        """
        for session in self.open:
            session.end()


class _Accepted(Accepted):
    """A segment of a stream, until its last answer is written."""

    __slots__ = ("ahead", "left", "number", "size", "succeeded", "unanswered", "want_trace")

    def __init__(self, message: pb2.Segment, segment: Segment, caller: Caller) -> None:
        super().__init__(segment, caller, message.want_parts)
        self.number = message.number
        self.want_trace = message.want_trace
        self.left = segment.count
        self.size = segment.payloads.size
        # With `as_they_come`: rows that may still get parts, and those that got a successful one.
        self.unanswered: PendingRows | None = None
        self.succeeded: set[int] = set()
        self.ahead = max(0, segment.chunks - 1)  # chunks of a part after the first


_Written = tuple[_Accepted, int, int, bool]
"""Written answers: their segment, number of rows, bytes, whether they are early parts."""

_Outgoing = tuple[_Accepted, int, Slice, int, bool]
"""Answers to write: their segment, first row, they, their bytes, whether they are early parts."""


class _Session:
    def __init__(
        self,
        sessions: StreamSessions,
        call: Call,
        caller: Caller,
        client_limit: int | None = None,
        rights: Rights = UNRESTRICTED,
    ) -> None:
        """client_limit: the largest answer that the client takes, if it says so."""
        self._sessions = sessions
        self._path = sessions.path
        self._call = call
        self.caller = caller
        self.neighbour = ""  # the process above whose link it is
        self.certificate_name = ""
        self._lease: HeldLease | None = None  # whose requests the stream carries
        self._has_asked = False  # for a lease
        self._leases: list[Lease] = []  # to be sent, as are these
        self._reports: list[LaneReport] = []
        self._progress: list[WorkProgress] = []
        self._rights = rights
        self._limits = limits = sessions.path.limits
        self._client_limit = client_limit
        self._max_bytes = min(limits.max_message_bytes, client_limit or limits.max_message_bytes)
        self.flow = self._path.queue.open_flow(caller, rights)
        self._lock = threading.Lock()
        self._out: deque[_Outgoing] = deque()
        self._in_flight: list[_Written] = []  # in the frame that is being sent
        self._accepted: dict[int, _Accepted] = {}
        self._rows = 0  # accepted and not yet written
        self._held = Share(sessions.held)  # bytes in its window
        self._unread = Share(sessions.unread)  # bytes of answers that the client has not read
        # In OpenStreams' list of idle streams; guarded by its lock, as is the next.
        self.is_listed = False
        self.was_active = False
        self._chunks = ChunkWindow(limits.window_bytes // 2 // limits.chunk_bytes, sessions.ahead)
        self._frame_bytes = min(limits.frame_bytes, self._max_bytes // 2)
        self._routes: dict[object, Route] = {}  # read and checked; a stream has few
        self._no_more = False
        self._read_later = False  # once its window has room again
        self._frame: pb2.Frame | None = None  # the one being read, and when it arrived
        self._frame_at = 0.0
        self._segments: deque[pb2.Segment] = deque()  # of that frame, still to be read
        self._writes = False  # a job is writing, or a frame is being sent
        self._abandoned = False
        self._rest_is_cancelled = False  # what was open when it was abandoned
        self._stopping = self._for_good = False
        self._has_news = False  # `stopping`, to be sent even without an answer
        self._broken: OverlayError | None = None
        self._closing_error: OverlayError | None = None

    @property
    def is_active(self) -> bool:
        return self._rows > 0

    @property
    def unanswered(self) -> int:
        return self._rows

    def open_lease(self, lease_id: int) -> None:
        """Raises NotLent."""
        leases = self._sessions.leases
        if leases is None:
            raise NotLent(f"{self._path.me} has no leases")
        self._lease = leases.open(lease_id, self.certificate_name, self)

    def offer(self, lease: Lease) -> None:
        """Tells the client of a lease; `tell` of a change in its own."""
        with self._lock:
            if self._abandoned:
                return
            self._leases.append(lease)
            self._has_news = True
        self._write_on()

    tell = offer

    def report_progress(self, made: Sequence[WorkProgress]) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._progress = [*self._progress, *made][-MAX_PROGRESS:]
            self._has_news = True
        self._write_on()

    def _report(self, report: LaneReport) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._reports.append(report)
            self._has_news = True
        self._write_on()

    def begin(self) -> None:
        self._call.receive(self._on_message)

    def announce_stop(self, for_good: bool) -> None:
        with self._lock:
            self._stopping = self._has_news = True
            self._for_good = for_good
        self._write_on()

    def end(self) -> None:
        """Ends the call once all that it has accepted is answered."""
        self._close_with(Draining(f"{self._path.me} is stopping and takes no new requests"))

    def make_room(self) -> None:
        """Ends an idle stream for others; its client opens a new one when it has requests."""
        self._close_with(MadeRoom(f"{self._path.me} has too many clients; this one was idle"))

    def abandon(self) -> None:
        """The call is over: cancels what is open. May be called twice."""
        with self._lock:
            if self._abandoned:
                return
            self._abandoned = True
        self._sessions.open.leave(self)
        self._sessions.maps.forget(self)
        if self._has_asked and self._sessions.lender is not None:
            self._sessions.lender.left(self)
        self._path.queue.close_flow(self.flow)
        self._sessions.threads.run(self._cancel_rest)

    def _cancel_rest(self) -> None:
        with self._lock:
            open_ones = list(self._accepted.values())
        for accepted in open_ones:
            if accepted.queued is not None:
                accepted.queued.end(Code.CANCELLED)
                self._sessions.deadlines.forget(accepted.queued, accepted.segment.deadline)
        with self._lock:
            self._rest_is_cancelled, counts = True, not self._writes
        if counts:
            self._count_rest()

    def _close_with(self, error: OverlayError) -> None:
        with self._lock:
            if not self._no_more:
                self._closing_error = error
                self._no_more = True
        self._write_on()

    # reading

    def _on_message(self, message: bytes | None) -> None:
        """On gRPC's serving thread."""
        if message is not None:
            self._sessions.threads.run(partial(self._read, message))
            return
        with self._lock:
            self._no_more = True
        self._write_on()

    def _read(self, message: bytes | None = None) -> None:
        """Reads a frame, or the rest of the last one, as far as there is room."""
        try:
            if message is not None:
                self._frame, self._frame_at = codec.read_frame(message), time.monotonic()
                self._segments.extend(self._frame.segments)
            while self._segments:
                rows = self._segments[0].count  # an oversized segment ends the call instead
                if rows <= self._limits.segment_rows and not self._has_room(rows):
                    self._start()
                    return  # from here on another job may continue
                self._accept(self._segments.popleft(), self._frame_at)
            if self._frame is not None:
                self._take_rest(self._frame)
                self._frame = None
        except OverlayError as e:
            self._break(e)
        except Exception as e:  # noqa: BLE001 - a bug of ours costs one stream
            self._break(unexpected(e))
        if self._has_room():
            self._call.receive(self._on_message)
        self._start()  # last, as a handler may run here: the next frame then has another thread

    def _start(self) -> None:
        self._sessions.start(self._path.queue.kick)

    def _break(self, error: OverlayError) -> None:
        with self._lock:
            self._broken = self._broken or error
            self._no_more = True
        self._write_on()

    def _has_room(self, rows: int = 1) -> bool:
        """Whether `rows` fit now; if not, reading resumes when half of the window is free."""
        with self._lock:
            if self._abandoned or self._broken is not None:
                return False
            self._read_later = self._is_full_locked(1, rows)
            return not self._read_later

    def _is_full_locked(self, parts: int, rows: int = 1) -> bool:
        """Whether `rows` more would exceed the window divided by `parts`."""
        if not self._rows:
            return False
        if self._rows + rows > self._limits.window_rows // parts:
            return True
        return not self._held.is_within(self._limits.window_bytes // parts)

    # writing

    def _write_on(self) -> None:
        """Starts a job that writes what is ready, unless one is running."""
        with self._lock:
            if self._writes or not self._has_work_locked():
                return
            self._writes = True
        if self._path.has_merges:  # the user's own code, which may take its time
            self._sessions.threads.run(self._write)
        else:
            put_off(self._write, self._sessions.threads.run)

    def _has_work_locked(self) -> bool:
        return bool(self._out) or self._has_news or self._is_over_locked()

    def _is_over_locked(self) -> bool:
        if self._abandoned or self._broken is not None:
            return True
        return self._no_more and not self._rows

    def _write(self) -> None:
        """Sends a frame of answers, or ends the call once all that was accepted is answered."""
        with self._lock:
            is_over = self._abandoned or (self._is_over_locked() and not self._out)
            taken = [] if is_over else self._next_answers_locked()
            # Not the answers themselves, or they would take memory twice until the client reads.
            self._in_flight = [(out[0], out[2].count, out[3], out[4]) for out in taken]
            self._has_news = False
            frame = pb2.Frame(stopping=self._stopping, for_good=self._for_good)
            frame.leases.extend(map(codec.write_lease, self._leases))
            frame.lane_reports.extend(map(codec.write_lane_report, self._reports))
            frame.work_progress.extend(map(codec.write_progress_of, self._progress))
            self._leases, self._reports, self._progress = [], [], []
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
        except Exception as e:  # noqa: BLE001 - a bug of ours costs one stream
            self._break(unexpected(e))
            self._on_sent(False)
            return
        del taken, frame
        self._call.send(message, self._on_sent)

    def _on_sent(self, is_open: bool) -> None:
        """A frame was handed to gRPC, so its rows leave the window. On gRPC's serving thread."""
        taken, self._in_flight = self._in_flight, []
        resumes, ended = self._leave_window(taken)
        for accepted in ended:
            if accepted.queued is not None:
                self._sessions.deadlines.forget(accepted.queued, accepted.segment.deadline)
                accepted.queued = None  # it refers back to this stream
        with self._lock:
            self._writes = writes = self._has_work_locked()
            reads = self._read_later and not self._is_full_locked(2)
            self._read_later = self._read_later and not reads
        if writes:
            self._sessions.threads.run(self._write)
        if resumes:
            self._sessions.threads.run(self._path.queue.kick)
        if reads and self._frame is not None:
            self._sessions.threads.run(self._read)
        elif reads:
            self._call.receive(self._on_message)

    def _finish(self) -> None:
        with self._lock:
            self._writes = False
            is_abandoned, counts = self._abandoned, self._rest_is_cancelled
            error = self._broken or self._closing_error
        if is_abandoned:
            if counts:  # or `_cancel_rest` counts it
                self._count_rest()
        elif error is not None:
            self._call.fail(error)
        else:
            self._call.finish()

    def _count_rest(self) -> None:
        """Counts what will not be answered any more as cancelled."""
        with self._lock:
            rest, self._accepted = list(self._accepted.values()), {}
            self._rows = 0
            self._out.clear()
            self._chunks.close()
            self._held.add(-self._held.size)
            self._unread.add(-self._unread.size)
        for accepted in rest:
            rows = accepted.segment.count - accepted.counted
            error: OverlayError = CallCancelled("the caller left")
            refused = Part(self._path.me, error.code, str(error))
            failures = [(row, error) for row in range(rows)]
            accepted.queued = None
            answers = Slice(rows, (), refused=refused)
            self._path.note(accepted, accepted.counted, answers, failures)

    def _keep_answers_locked(self, size: int) -> None:
        """Adds to the bytes that the client has not read; with too many, its flow pauses."""
        self._held.add(size)
        self._unread.add(size)
        self.flow.paused = not self._unread.is_within(self._limits.window_bytes // 2)

    def _take_rest(self, frame: pb2.Frame) -> None:
        for cancel in frame.cancels:
            accepted = self._accepted.get(cancel.number)
            if accepted is not None and accepted.queued is not None:
                rows = accepted.segment.count
                start = min(cancel.start, rows)
                accepted.queued.end(Code.CANCELLED, start, min(cancel.count, rows - start))
        for grant in frame.grants:
            self._grant(grant)
        for reported in frame.progress if access.may(self._rights, access.REQUESTS) else ():
            progress = codec.read_progress(reported, self._limits)
            self._sessions.maps.add(self, self.caller, progress)
        self._take_leases(frame)
        if self._abandoned:  # perhaps just now, after `abandon` removed its maps
            self._sessions.maps.forget(self)

    def _take_leases(self, frame: pb2.Frame) -> None:
        leases, lender = self._sessions.leases, self._sessions.lender
        if self.neighbour and leases is not None:
            for lent in frame.lent:
                leases.take(codec.read_lent(lent, self._limits), self._report)
        elif lender is not None and not self._path.draining:
            for made in frame.lease_requests[:MAX_LEASE_REQUESTS]:
                request = codec.read_lease_request(made, self._limits)
                route = Route(Mode.ANY, request.team, request.handler)
                with suppress(OverlayError):  # its requests are refused, and say why
                    self._path.check(route, self._rights)
                    self._has_asked = True
                    lender.ask(self, request)

    def _grant(self, message: pb2.Grant) -> None:
        with self._lock:
            accepted = self._accepted.get(message.number)
            if accepted is None:
                return
            key = message.number, message.row, message.process_id
            call = self._chunks.granted(key, message.count, not accepted.from_process)
        if call is not None:
            grant, chunks = call
            grant(chunks)

    def _accept(self, message: pb2.Segment, now: float) -> None:
        segment, error = self._read_segment(message, now)
        if message.number in self._accepted:
            raise BadRequest(f"number: {message.number} is taken by a segment not answered yet")
        accepted = _Accepted(message, segment, self.caller)
        if self._lease is not None:
            error = error or self._beyond_lease(accepted)
            accepted.on_ended = self._lease.note
        # In mode ANY only chunks: what is not cut into chunks comes with the answer.
        is_all = segment.route.mode is Mode.ALL
        if message.as_they_come and (is_all or segment.chunks):
            chunks = min(1, segment.chunks)  # more as there is room
            segment = segment.with_(on_partial=partial(self._pass_on, accepted), chunks=chunks)
            accepted.segment, accepted.unanswered = segment, PendingRows(segment.count)
        with self._lock:
            if self._abandoned or self._closing_error is not None:
                return
            self.was_active = True
            self._accepted[message.number] = accepted
            self._rows += accepted.left
            self._held.add(accepted.size)
        sink = partial(self._answer, accepted)
        self._path.admit(accepted, sink, message.priority, self.flow, error)
        queued = accepted.queued
        if queued is None:
            return
        if queued.is_open:
            self._sessions.deadlines.watch(queued, segment.deadline)
        if self._abandoned:
            queued.end(Code.CANCELLED)

    def _beyond_lease(self, accepted: _Accepted) -> OverlayError | None:
        assert self._lease is not None
        try:
            self._lease.check(accepted.segment.route, accepted.segment.count)
        except OverlayError as e:
            return e
        return None

    def _read_segment(
        self, message: pb2.Segment, now: float
    ) -> tuple[Segment, OverlayError | None]:
        """The segment, and why it is invalid; with blank rows if it cannot be read."""
        traced = not message.hops and self._path.request_log.wants_trace()
        try:
            route, error = self._route(message)
            return codec.read_segment(message, now, self._limits, route, traced), error
        except OverlayError as e:
            unread = codec.unread_segment(message, now, self._limits)
            if unread is None:
                raise  # no rows to answer: that ends the stream
            return unread, e

    def _route(self, message: pb2.Segment) -> tuple[Route, OverlayError | None]:
        key = codec.route_key(message, self._limits)
        route = self._routes.get(key)
        if route is None:
            route = codec.read_route(message, self._limits)
            try:
                self._path.check(route, self._rights)
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
                self._chunks.end_rows(accepted.number, start, answers.count)
            is_first = self._put_locked((accepted, start, answers, size, False))
        if is_first:
            self._write_on()

    def _pass_on(self, accepted: _Accepted, start: int, answers: Slice) -> None:
        """Sends parts ahead of the answer; none after it, as the number may then be reused."""
        grants = []
        is_first = False
        with self._lock:
            assert accepted.unanswered is not None
            if self._abandoned:  # its room has been released
                return
            for first, count in accepted.unanswered.runs(start, answers.count):
                rows = answers.slice(first - start, count)
                accepted.succeeded.update(first + i for i in range(count) if _has_success(rows, i))
                grants += self._chunks_locked(accepted, first, rows)
                is_first |= self._put_locked((accepted, first, rows, size_of(rows), True))
        for grant, chunks in grants:
            grant(chunks)
        if is_first:
            self._write_on()

    def _chunks_locked(self, accepted: _Accepted, row: int, answers: Slice) -> list[GrantCall]:
        """The grants for the workers whose chunks these are."""
        grants = []
        for column in answers.parts:
            key = accepted.number, row, column.process_id
            if column.chunk is None:  # a failure, perhaps after chunks
                self._chunks.end(key)
                continue
            if accepted.queued is not None:
                accepted.queued.is_read = True
            if more := self._chunks.passes(key, column.chunk, accepted.ahead):
                grants.append(more)
        return grants

    def _put_locked(self, out: _Outgoing) -> bool:
        """Whether nothing else was waiting to be written."""
        if self._abandoned:
            return False
        self._out.append(out)
        self._keep_answers_locked(out[3])
        return len(self._out) == 1

    def _next_answers_locked(self) -> list[_Outgoing]:
        taken: list[_Outgoing] = []
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
        finished = self._path.finish(
            accepted, start, answers, size, self._client_limit, accepted.succeeded
        )
        if accepted.from_process:
            codec.write_slice(frame, accepted.number, start, finished.answers, finished.trace)
        else:
            codec.write_client_slice(
                frame,
                accepted.number,
                start,
                finished.answers,
                finished.results,
                finished.failures,
                accepted.want_parts or accepted.unanswered is not None,
                finished.trace if accepted.want_trace else (),
            )

    def _write_parts(
        self, frame: pb2.Frame, accepted: _Accepted, start: int, answers: Slice, size: int
    ) -> None:
        if size > self._max_bytes:
            refused = self._path.too_large(answers, size, self._client_limit).refused
            ids = tuple(column.process_id for column in answers.parts)
            answers = aggregate.from_branch(Slice(answers.count, (), refused=refused), ids)
        codec.write_slice(frame, accepted.number, start, answers, more=True)

    def _leave_window(self, taken: list[_Written]) -> tuple[bool, list[_Accepted]]:
        """Whether the flow resumes, and the segments that are now fully answered."""
        ended = []
        with self._lock:
            was_paused, size = self.flow.paused, 0
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
                self._sessions.open.became_idle(self)
            return was_paused and not self.flow.paused, ended


def _split(answers: Slice, room: int) -> tuple[Slice, Slice]:
    """The first rows that fit into `room` bytes, but at least one, and the rest."""
    rows = max(1, answers.count * room // size_of(answers))
    while rows > 1 and size_of(answers.slice(0, rows)) > room:
        rows //= 2  # a large row among small ones goes alone
    return answers.slice(0, rows), answers.slice(rows, answers.count - rows)


def _has_success(answers: Slice, row: int) -> bool:
    return any(c.failed is None and row not in c.failures and c.is_over for c in answers.parts)
