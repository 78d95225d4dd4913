"""Sends many requests over one stream: the core of the client library.

    send(submission) --> outbox --> segments --> frames --> the process asked
    submission.deliver(...) <------- slices <-- frames <--

A submission is one request, or many that were submitted together; submissions of one kind and
nearly the same deadline share a segment. If the connection is lost, requests that were never handed
to gRPC are sent when it is back; the others fail with an unknown outcome and are not sent again.

Requests that provably did not run are retried, within a budget, after the pause that the process
asked for; those of a map also beyond the budget, for the map's patience. Requests that a stopping
process returns wait until it is back. If the process has no place for another stream, unsent
requests wait for one, for the client's patience.

A stream to a worker that was lent (`lease`, see client.lanes) never retries: what provably did not
run, or was not sent, is handed back.

overlay.transport.multiplexer matches answers to segments. Owns a stream, whose thread delivers, and
a deadline thread, from `start` to `close`.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import grpc

from overlay.client.outbox import CallKind, Outbox, Submission
from overlay.model import clocks as time
from overlay.model.errors import BadResponse
from overlay.model.leases import ENDED_UNRUN, Lease, LeaseRequest
from overlay.model.limits import Limits
from overlay.model.pending import Run, consecutive
from overlay.model.segments import Code, Column, Detail, Executed, Part, Progress, Segment, Slice
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.multiplexer import SAME_DEADLINE_S, Multiplexer, OpenSegment
from overlay.transport.stream import ReconnectingStream, is_full
from overlay.transport.timers import Deadlines

LIMITS = Limits()
# One less than the window of the process: when that is full it reads nothing, not even cancels.
WINDOW_ROWS = LIMITS.window_rows - 1
WINDOW_BYTES = LIMITS.window_bytes - 1
LATE_S = 0.1  # after the deadline: time for an answer that the process sent before it
CHUNKS_AHEAD = 4  # of each part: 512 KiB in flight, 50 MB/s at a round trip of 10 ms
GATHER_S = 0.00003  # a wait for the next requests of those whom a frame's answers woke
QUICK_S = 0.0005  # a request whose handler takes less is cheaper in a frame with others
GATHERED_S = 0.003  # the longest that requests wait for others while quick work is under way
KNOWN_HANDLERS = 100  # whose service times are remembered
GATHERINGS = 5  # at most this many waits, while calls keep arriving
RETRIES = 3  # per request
RETRY_SHARE = 0.09  # retries earned per request: about a tenth more load under overload
MIN_RETRIES, MAX_RETRIES = 10.0, 1000.0  # the retry budget: at the start, and at most
RETRY_PAUSE_S = 0.1  # if the process does not ask for another pause
MAX_PAUSE_S = 2.0  # between retries beyond RETRIES, unless the process asks for a longer pause
SETTLING_S = 5.0  # a restarted process has connected to its neighbours by then
SETTLING_PAUSE_S = 0.25  # between two attempts during that time
NEVER_SENT = Detail(Code.CANCELLED, "cancelled before it was sent", Executed.NO)
CLOSED = Detail(Code.CANCELLED, "this client was closed", Executed.NO)
RETRYABLE = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


class Delivery:
    """A validated slice of answers, decoded once for all submissions with rows in it.

    results: one per row; empty bytes for a failure. is_whole: no worker is missing. grant: called
    with (row here, worker) when a chunk was read.
    """

    __slots__ = ("_answers", "_slice", "grant", "is_whole", "results")

    def __init__(
        self, slice_: pb2.Slice, grant: Callable[[int, str], None] = lambda row, worker: None
    ) -> None:
        self.grant = grant
        self.results = list(slice_.results.items)
        self.is_whole = not any(part.failures for part in slice_.parts)
        self._slice = slice_
        self._answers: Slice | None = None

    @property
    def answers(self) -> Slice:
        """Parts and hops."""
        if self._answers is None:
            self._answers = codec.read_client_slice(self._slice)
        return self._answers


class Elsewhere(Protocol):
    """Other ways for submissions; documented in overlay.client.lanes.Lanes."""

    @property
    def is_delivering(self) -> bool: ...
    @property
    def open_rows(self) -> int: ...
    def take(self, submission: Submission) -> bool: ...
    def cancel(self, submission: Submission, rows: Sequence[int]) -> None: ...
    def take_back(self, submission: Submission, failure: Detail) -> int: ...
    def close(self) -> None: ...


class _SentSegment(OpenSegment[Submission]):
    """A segment of one or more submissions. deadline: when it expires; monotonic seconds."""

    __slots__ = ("deadline", "first_id")

    deadline: float
    first_id: int


class Submitter:
    """Sends submissions and delivers their answers. Safe from any thread.

    connected: set while the process takes requests on the stream. refused: the reason if it does
    not. patience_s: how long a submission waits for a place at the process before it fails. shown:
    the process's name in messages. after_frame: called when everything in a frame is delivered;
    is_delivering: such a call will follow. lanes: take submissions instead, if they can. on_lease:
    called with what is lent.

    Of a lane: window_rows: how many requests may be unanswered. hand_back: takes what the worker
    did not run. on_lost: called when the stream has ended. was_served: it was up.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        name: str,
        patience_s: float = math.inf,
        shown: Callable[[], str] | None = None,
        lease: int = 0,
    ) -> None:
        """lease: of a worker, whose stream this is."""
        self.connected = threading.Event()
        self.refused: Detail | None = None
        self.after_frame: Callable[[], None] | None = None
        self.lanes: Elsewhere | None = None
        self.on_lease: Callable[[Lease], None] = lambda lease: None
        self.on_lost: Callable[[], None] = lambda: None
        self.hand_back: Callable[[Submission], None] | None = None
        self.window_rows = WINDOW_ROWS
        self.was_served = False
        self._lease = lease
        self._lease_requests: deque[LeaseRequest] = deque()
        self._delivers = False
        self.max_bytes = LIMITS.max_message_bytes
        self._shown = shown or (lambda: name)
        self._patience_s = patience_s
        callbacks = self._fill, self._receive, self._lost, self._live, self._patience_to_send
        metadata = codec.lease_metadata(lease) if lease else ()
        self._stream = ReconnectingStream(
            channel, name, *callbacks, metadata=metadata, may_rest=True
        )
        self._deadlines = Deadlines(self._expire)
        self._lock = threading.Lock()
        self._outbox = Outbox()
        self._multiplexer = Multiplexer()
        self._progress: dict[int, Progress] = {}  # of maps, by number; unsent
        self._cancelled: deque[set[int]] = deque()  # `cancelled` of submissions
        self._service_s: dict[str, float] = {}  # of a request, smoothed, by handler
        self._quick: _SentSegment | None = None  # the last one of quick work that was sent
        self._is_gathering = False  # the last frame's callers are asking again
        self._next_check = math.inf  # when the outbox is next searched for expired submissions
        self._retries = MIN_RETRIES
        self._retrying: set[_Retry] = set()
        self._served = False  # the process serves the stream, but may be stopping
        self._was_lost = False  # a served stream was lost
        self._settling_until = -math.inf  # the end of the time after a restart; monotonic s
        self._full_since: float | None = None  # when its places were all taken; monotonic s
        self._closed = False

    @property
    def open_rows(self) -> int:
        with self._lock:
            unsent = sum(len(submission.rows) for submission in self._outbox.all())
            here = self._multiplexer.rows + unsent + len(self._retrying)
        lanes = self.lanes
        return here + (lanes.open_rows if lanes else 0)

    @property
    def unanswered(self) -> int:
        """About how many requests are on the stream or wait for it; quick to compute."""
        return self._multiplexer.rows + len(self._outbox)

    @property
    def is_delivering(self) -> bool:
        lanes = self.lanes
        return self._delivers or (lanes is not None and lanes.is_delivering)

    def service_s(self, handler: str) -> float:
        """How long its requests run, by the answers so far; 0 if that is not known."""
        return self._service_s.get(handler, 0.0)

    def learn(self, handler: str, service_s: float) -> None:
        """How long its requests run elsewhere."""
        self._service_s[handler] = service_s

    @property
    def is_full(self) -> bool:
        """Whether the process rejects the stream because all its places are taken."""
        refused = self.refused
        return refused is not None and is_full(refused)

    @property
    def rests(self) -> bool:
        """Whether the idle stream was closed; the next submission reopens it."""
        return self._stream.rests

    @property
    def is_served(self) -> bool:
        """Whether the process serves the stream, even if it is stopping and takes no requests."""
        return self._served

    def start(self) -> None:
        self._deadlines.start()
        self._stream.start()

    def close(self) -> None:
        """Ends the stream; open requests are delivered as cancelled. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        lanes, self.lanes = self.lanes, None
        if lanes is not None:
            lanes.close()  # what they hand back ends here
        self._stream.end()
        self._deadlines.stop()
        self._end_sent(Detail(Code.CANCELLED, "this client was closed before the answer came"))
        with self._lock:
            waiting, self._retrying = self._retrying, set()
        for retry in waiting:
            self._outbox.put(retry.submission)
        self._end_unsent()

    def send(self, submission: Submission) -> None:
        lanes = self.lanes if self.connected.is_set() and not self._closed else None
        if lanes is None or submission.size > self.max_bytes or not lanes.take(submission):
            self.send_here(submission)

    def send_here(self, submission: Submission) -> None:
        """Sends it over this stream."""
        if submission.size > self.max_bytes and self._refuse_too_large(submission):
            return
        if not submission.attempt:  # retries must not earn retries
            self._retries = min(self._retries + len(submission.rows) * RETRY_SHARE, MAX_RETRIES)
        self._outbox.put(submission)
        due_at = self._due_at(submission)
        if due_at < self._next_check:
            self._watch_outbox(due_at)
        if self._closed or (self.hand_back is not None and not self.connected.is_set()):
            self._end_unsent()
        else:
            self._stream.kick()

    def remind(self, of: Callable[[], None], at: float) -> None:
        """Calls `of` at that time (monotonic) on the deadline thread; not after `close`."""
        self._deadlines.watch(of, at)

    def send_progress(self, progress: Progress) -> None:
        """Sends the progress of a map in one of the next frames."""
        self._progress[progress.number] = progress
        self._stream.kick()

    def ask_lease(self, request: LeaseRequest) -> None:
        """Asks for a lease in one of the next frames."""
        self._lease_requests.append(request)
        self._stream.kick()

    def wake(self) -> None:
        """Reopens an idle stream, for a caller that waits for `connected`."""
        self._stream.kick()

    def _due_at(self, submission: Submission) -> float:
        """When a submission in the outbox expires."""
        since = self._full_since
        if since is None or submission.is_patient or not self.is_full:
            return submission.deadline
        return min(submission.deadline, max(since, submission.submitted_at) + self._patience_s)

    def _watch_outbox(self, deadline: float) -> None:
        """Schedules a search of the outbox for expired submissions."""
        with self._lock:
            if deadline >= self._next_check:
                return
            self._next_check = deadline
        self._deadlines.watch(self, deadline)

    def _refuse_too_large(self, submission: Submission) -> bool:
        """Fails the rows that are too large; returns whether no others are left.

        Such a payload would end the stream, and with it all open requests.
        """
        most = self.max_bytes
        large = {row for row in submission.rows if len(submission.payloads[row]) > most}
        for row in large:
            reason = codec.too_large(len(submission.payloads[row]), most)
            submission.deliver((row,), Detail(Code.INVALID_ARGUMENT, reason, Executed.NO), 0, 0)
        if large:
            submission.rows = [row for row in submission.rows if row not in large]
            submission.size = sum(len(submission.payloads[row]) for row in submission.rows)
        return not submission.rows

    def cancel(self, submission: Submission, rows: Sequence[int]) -> None:
        """Stops the work on rows that are no longer wanted. They are delivered nevertheless."""
        submission.cancelled.update(rows)
        if (lanes := self.lanes) is not None:
            lanes.cancel(submission, rows)
        self._cancelled.append(submission.cancelled)
        self._stream.kick()

    def take_back(self, submission: Submission, failure: Detail) -> int:
        """Fails its unsent rows; returns how many they are."""
        with self._lock:
            mine = [r for r in self._retrying if r.submission.cancelled is submission.cancelled]
            self._retrying.difference_update(mine)
        taken = [retry.submission for retry in mine]
        for one in self._outbox.all():
            if one.cancelled is submission.cancelled:
                with suppress(ValueError):  # it is being sent
                    self._outbox.remove(one)
                    taken.append(one)
        for one in taken:
            self._deliver_all(one, failure)
        lanes = self.lanes
        elsewhere = lanes.take_back(submission, failure) if lanes else 0
        return sum(len(one.rows) for one in taken) + elsewhere

    # on the thread that sends

    def _patience_to_send(self) -> float:
        """How long the requests in the outbox wait for more, in seconds.

        While quick work is under way, single requests are held, and leave together when it is
        answered: a frame for each would cost more than their work. As on links (see
        SegmentSender), this is Nagle's algorithm with a time limit.
        """
        if not (self._quick or self._is_gathering) or self._cancelled:
            return 0.0
        if self._multiplexer.has_control or not self.connected.is_set():
            return 0.0
        try:
            first = self._outbox.first()
        except IndexError:
            return 0.0
        is_few = len(first.rows) <= LIMITS.few_rows and len(self._outbox) < LIMITS.gather_rows
        if not is_few or not self._is_quick(first.kind, first.size):
            return 0.0
        return math.inf if self._is_gathering else GATHERED_S

    def _is_quick(self, kind: CallKind, size: int) -> bool:
        is_small = size <= LIMITS.small_bytes and not kind.as_they_come
        return is_small and self._service_s.get(kind.route.handler, QUICK_S) < QUICK_S

    def _learn_service_time(self, handler: str, slice_: pb2.Slice) -> None:
        for part in slice_.parts:
            if part.worked_us or not part.failures:
                found, known = max(1, part.worked_us) / 1e6, self._service_s.get(handler)
                if known is not None:  # one outlier counts as at most four times the others
                    found = 0.8 * known + 0.2 * min(found, 4 * known + 1e-5)
                elif len(self._service_s) >= KNOWN_HANDLERS:
                    self._service_s.clear()
                self._service_s[handler] = found
                return

    def _fill(self, frame: pb2.Frame) -> bool:
        if not self._served:
            return False  # the call may be rejected, and the frame would be lost
        size = 0
        if self._cancelled:
            self._cancel_rows()
        size += self._multiplexer.write_control(frame, LIMITS.frame_cancels)
        while self._lease_requests:
            frame.lease_requests.append(codec.write_lease_request(self._lease_requests.popleft()))
            size += 60
        while self._progress:
            _, progress = self._progress.popitem()
            frame.progress.append(codec.write_progress(progress))
            size += 60
        while self.connected.is_set() and size < LIMITS.frame_bytes and self._has_room():
            submissions, bytes_ = self._next_submissions(LIMITS.frame_bytes - size)
            if not submissions:
                break
            if not self._write(frame, submissions, bytes_):
                break
            size += bytes_ + 100
        return size > 0

    def _cancel_rows(self) -> None:
        # All in one pass: thousands may be cancelled together, each in any segment.
        cancelled = {id(self._cancelled.popleft()) for _ in range(len(self._cancelled))}
        for sent in self._multiplexer.segments():
            rows = [
                start + index
                for start, submission in zip(sent.starts, sent.members, strict=False)
                if id(submission.cancelled) in cancelled
                for index, row in enumerate(submission.rows)
                if row in submission.cancelled
            ]
            for first, count in consecutive(rows):
                self._multiplexer.cancel(sent, first, count)

    def _has_room(self) -> bool:
        open_ = self._multiplexer
        if open_.rows >= self.window_rows:
            return False
        try:
            next_size = self._outbox.first().size
        except IndexError:
            return False
        return open_.bytes + next_size <= WINDOW_BYTES or not open_.rows

    def _next_submissions(self, max_bytes: int) -> tuple[list[Submission], int]:
        """Submissions from the head of the outbox that may share a segment, and their bytes."""
        submissions: list[Submission] = []
        rows, size = self.window_rows - self._multiplexer.rows, 0
        while self._outbox and rows > 0:
            submission = self._outbox.take()
            if submission.cancelled:
                kept = self._still_wanted(submission)
                if kept is None:
                    continue
                submission = kept
            if submissions and not (
                (submission.kind is submissions[0].kind or submission.kind == submissions[0].kind)
                and submission.attempt == submissions[0].attempt
                and abs(submission.deadline - submissions[0].deadline) <= SAME_DEADLINE_S
                and size + submission.size <= max_bytes
            ):
                self._put_back([submission])
                break
            if submission.size > self.max_bytes and self._refuse_too_large(submission):
                continue  # it was submitted when the process accepted larger messages
            fits = min(rows, self._rows_that_fit(submission))
            if len(submission.rows) > fits:
                self._put_back([submission.part(submission.rows[fits:], submission.attempt)])
                submission = submission.part(submission.rows[:fits], submission.attempt)
            submissions.append(submission)
            rows -= len(submission.rows)
            size += submission.size
        return submissions, size

    def _rows_that_fit(self, submission: Submission) -> int:
        """How many of its first rows fit into one message; no single row is too large."""
        if submission.size <= self.max_bytes:
            return len(submission.rows)
        size = fits = 0
        for row in submission.rows:
            size += len(submission.payloads[row])
            if size > self.max_bytes:
                break
            fits += 1
        return fits

    def _still_wanted(self, submission: Submission) -> Submission | None:
        """The submission without its cancelled rows, which are delivered as cancelled."""
        cancelled = [row for row in submission.rows if row in submission.cancelled]
        left = [row for row in submission.rows if row not in submission.cancelled]
        if not cancelled:
            return submission
        self._deliver_all(submission.part(cancelled, submission.attempt), NEVER_SENT)
        return submission.part(left, submission.attempt) if left else None

    def _write(self, frame: pb2.Frame, submissions: list[Submission], size: int) -> bool:
        """Returns False if the stream has ended."""
        deadline = min(submission.deadline for submission in submissions)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            late = Detail(Code.DEADLINE_EXCEEDED, "", Executed.NO)
            for submission in submissions:
                self._deliver_all(submission, late)
            return True
        bodies = [submission.payloads[row] for submission in submissions for row in submission.rows]
        payloads = Column(bodies, size=size)
        kind, attempt = submissions[0].kind, submissions[0].attempt
        chunks = CHUNKS_AHEAD if kind.as_they_come else 0
        first_id = codec.new_ids()
        counts = [len(submission.rows) for submission in submissions]
        sent = _SentSegment(submissions, counts, size, partial=chunks > 0, chunks=chunks)
        sent.deadline, sent.first_id = deadline + LATE_S, first_id
        if not self._multiplexer.open(sent):
            self._put_back(submissions)
            return False
        self._deadlines.watch(sent, sent.deadline)
        if self._is_quick(kind, size):
            self._quick = sent
        segment = Segment(
            kind.route, payloads, deadline, first_id, attempt, chunks=chunks, own_ids=True
        )
        before, more = len(frame.segments), (kind.want_parts, kind.priority, kind.as_they_come)
        try:
            codec.write_segment(frame, sent.number, segment, left_s, *more)
        except Exception as e:  # noqa: BLE001 - an error fails only this segment
            del frame.segments[before:]
            self._write_apart(frame, sent, e)
        return True

    def _write_apart(self, frame: pb2.Frame, sent: _SentSegment, error: Exception) -> None:
        """Writes each row by itself, so that only the rows that cannot be written fail."""
        self._close_rows(sent, 0, sent.count)
        if sent.count > 1:
            for submission in sent.members:
                for row in submission.rows:
                    alone = submission.part((row,), submission.attempt)
                    self._write(frame, [alone], alone.size)
            return
        reason = f"the request cannot be sent: {error}"
        self._deliver_all(sent.members[0], Detail(Code.INVALID_ARGUMENT, reason, Executed.NO))

    def _put_back(self, submissions: list[Submission]) -> None:
        for submission in reversed(submissions):
            self._outbox.put_back(submission)
            self._watch_outbox(self._due_at(submission))
        if self._closed:
            self._end_unsent()

    # on the stream's thread (_live, _lost), or on gRPC's thread of the channel

    def _live(self, metadata: Mapping[str, str]) -> None:
        if self._lease and codec.read_lease_id(metadata.items()) != self._lease:
            raise BadResponse("it does not know the lease, so it is not the worker that was lent")
        self.refused = None
        self._served = self.was_served = True
        self._multiplexer.is_live = not self._closed
        if self._was_lost:
            self._was_lost, self._settling_until = False, time.monotonic() + SETTLING_S
        max_bytes = codec.read_max_bytes(metadata.items())
        self.max_bytes = LIMITS.max_message_bytes if max_bytes is None else max_bytes
        self.connected.set()
        self._stream.kick()

    def _receive(self, frame: pb2.Frame) -> None:
        answered = 0
        self._full_since = None
        if frame.stopping and self.connected.is_set():
            reason = f"the process at {self._shown()} is stopping and takes no new requests"
            self.refused = Detail(Code.UNAVAILABLE, reason, Executed.NO)
            self.connected.clear()
            self._multiplexer.is_live = False
            if self.hand_back is not None:
                self._end_unsent()
        for lease in frame.leases:
            self.on_lease(codec.read_lease(lease))
        self._delivers = self.after_frame is not None
        self._is_gathering = True
        try:
            for sent, slice_ in self._multiplexer.answers_in(frame):
                codec.check_client_slice(slice_, sent.asked)
                if slice_.more:
                    self._deliver_partial(sent, slice_)
                else:
                    self._deliver_slice(sent, slice_)
                    answered += slice_.count
        finally:
            self._delivers = False
            if self.after_frame is not None:
                self.after_frame()
            if answered > 1 and not self._quick:
                self._gather(answered)
            self._is_gathering = False
        if self._outbox:
            self._stream.kick()
            if not self._quick:
                self._stream.send_now()

    def _gather(self, answered: int) -> None:
        # Those whose requests were answered together often ask again together: a short wait puts
        # their requests in one frame.
        before = len(self._outbox)
        for _ in range(GATHERINGS):
            if before >= answered:
                return
            time.sleep(GATHER_S)
            now = len(self._outbox)
            if now == before:
                return
            before = now

    def _deliver_partial(self, sent: _SentSegment, slice_: pb2.Slice) -> None:
        """Delivers parts of rows that have no answer yet."""
        start = slice_.start

        def grant(row: int, worker: str) -> None:
            self._multiplexer.grant(sent, start + row, worker, 1)
            self._stream.kick()

        delivery = Delivery(slice_, grant)
        for first, count in self._multiplexer.arrive(sent, start, delivery.answers):
            for submission, row, rows, at in sent.members_of(first, count):
                if submission.on_partial is not None:
                    their_rows = submission.rows[row : row + rows]
                    submission.on_partial(their_rows, delivery, at - start, sent.first_id + at)

    def _deliver_slice(self, sent: _SentSegment, slice_: pb2.Slice) -> None:
        delivery, start = Delivery(slice_), slice_.start
        self._learn_service_time(sent.members[0].kind.route.handler, slice_)
        failures = _failures_of(slice_) if slice_.failures else None
        for first, count in self._close_rows(sent, start, slice_.count):
            for submission, own, size, at in sent.members_of(first, count):
                rows = submission.rows[own : own + size]
                if failures is None:
                    submission.deliver(rows, delivery, at - start, sent.first_id + at)
                    continue
                for index, row in enumerate(rows, at):
                    failure = failures.get(index - start)
                    request_id = sent.first_id + index
                    if failure is None:
                        submission.deliver((row,), delivery, index - start, request_id)
                    else:
                        self._failed(submission, row, failure, request_id)

    def _lost(self, why: Part) -> None:
        if self._closed:
            return
        was_served, self._served = self._served, False
        self.connected.clear()
        if self._stream.rests:
            self.refused = None
        elif why.code is Code.DATA_LOSS:  # unsent requests fail for this reason too
            reason = f"the process at {self._shown()} cannot be asked: {why.reason}"
            self.refused = Detail(why.code, reason, Executed.NO)
        elif why.executed is Executed.NO or not (was_served or why.code is Code.CANCELLED):
            self.refused = Detail(why.code, why.reason, why.executed, why.retry_after_s)
        if was_served:
            self._was_lost = not self._stream.rests
            reason = f"no answer from {self._shown()}: {why.reason}"
            self._end_sent(Detail(Code.UNAVAILABLE, reason, why.executed))
            if why.code is Code.DATA_LOSS and self.refused is not None:
                self._end_unsent(self.refused)  # the next stream may take a while
        if self.is_full:
            self._full_since = self._full_since or time.monotonic()
            self._expire_unsent()
        if self._lease:
            self.on_lost()
        elif self._outbox and self._stream.rests:
            self._stream.kick()

    # on any thread

    def hand_unsent_back(self) -> None:
        """Of a lane that ends."""
        self._end_unsent()

    def _close_rows(self, sent: _SentSegment, start: int, count: int) -> list[Run]:
        runs = self._multiplexer.take(sent, start, count)
        if runs and not sent.pending.left:
            self._deadlines.forget(sent, sent.deadline)
            if sent is self._quick:  # it would keep its callers alive
                self._quick = None
        return runs

    def _end_sent(self, failure: Detail) -> None:
        for sent in self._multiplexer.lose():
            self._end_rows(sent, failure)

    def _end_rows(self, sent: _SentSegment, failure: Detail) -> None:
        for first, count in self._close_rows(sent, 0, sent.count):
            for submission, own, size, at in sent.members_of(first, count):
                rows = submission.rows[own : own + size]
                if not self._keep(submission, rows, failure):
                    submission.deliver(rows, failure, 0, sent.first_id + at)

    def _end_unsent(self, why: Detail = CLOSED) -> None:
        while True:
            try:
                submission = self._outbox.take()
            except IndexError:
                return
            if self.hand_back is not None:
                self.hand_back(submission)
            else:
                self._deliver_all(submission, why)

    def _deliver_all(self, submission: Submission, failure: Detail) -> None:
        submission.deliver(submission.rows, failure, 0, 0)

    def _expire(self, due: _SentSegment | Submitter | _Retry | Callable[[], None]) -> None:
        if isinstance(due, _Retry):
            with self._lock:
                is_due = due in self._retrying
                self._retrying.discard(due)
            if is_due:
                self.send(due.submission)
        elif isinstance(due, Submitter):
            self._expire_unsent()
        elif isinstance(due, _SentSegment):
            self._multiplexer.cancel(due, 0, due.count)
            self._end_rows(due, Detail(Code.DEADLINE_EXCEEDED, ""))
            self._stream.kick()
        else:
            due()

    def _expire_unsent(self) -> None:
        with self._lock:
            self._next_check = math.inf
        now = time.monotonic()
        late, refused = Detail(Code.DEADLINE_EXCEEDED, "", Executed.NO), self.refused
        for submission in self._outbox.all():
            due_at = self._due_at(submission)
            if due_at > now:
                self._watch_outbox(due_at)
                continue
            try:
                self._outbox.remove(submission)
            except ValueError:  # it is being sent
                continue
            why = late if refused is None or submission.deadline <= now else refused
            self._deliver_all(submission, why)

    def _keep(self, submission: Submission, rows: Sequence[int], failure: Detail) -> bool:
        """Puts rows back into the outbox if a stopping process returned them; returns whether."""
        gave_back = failure.executed is Executed.NO and failure.code is Code.UNAVAILABLE
        if not gave_back or self.connected.is_set() or self._closed:
            return False
        kept = submission.part(rows, submission.attempt)
        if self.hand_back is not None:
            self.hand_back(kept)
            return True
        self._outbox.put(kept)
        self._watch_outbox(self._due_at(kept))
        if self._closed:
            self._end_unsent()
        return True

    def _failed(self, submission: Submission, row: int, failure: Detail, request_id: int) -> None:
        if self._keep(submission, (row,), failure):
            return
        is_refused = failure.executed is Executed.NO and failure.code not in ENDED_UNRUN
        if self.hand_back is not None and is_refused and row not in submission.cancelled:
            self.hand_back(submission.part((row,), submission.attempt))
            return
        now = time.monotonic()
        # A restarted process has not connected to its neighbours yet: not a reason to give up.
        is_settling = failure.code is Code.UNAVAILABLE and now < self._settling_until
        pause_s = failure.retry_after_s or RETRY_PAUSE_S
        if is_settling:
            pause_s = max(pause_s, SETTLING_PAUSE_S)
        elif submission.attempt >= RETRIES:
            pause_s = max(
                pause_s, min(RETRY_PAUSE_S * 2 ** min(submission.attempt, 9), MAX_PAUSE_S)
            )
        again_at = now + pause_s
        if (
            failure.executed is Executed.NO
            and failure.code in RETRYABLE
            and again_at < submission.deadline
            and row not in submission.cancelled
            and not self._closed
            and (is_settling or self._may_retry(submission))
        ):
            retry = _Retry(submission.part((row,), submission.attempt + (not is_settling)))
            with self._lock:
                self._retrying.add(retry)
            self._deadlines.watch(retry, again_at)
        else:
            submission.deliver((row,), failure, 0, request_id)

    def _may_retry(self, submission: Submission) -> bool:
        if submission.attempt < RETRIES and self._spend_retry():
            return True
        return submission.keeps_trying()

    def _spend_retry(self) -> bool:
        with self._lock:
            if self._retries < 1:
                return False
            self._retries -= 1
            return True


@dataclass(eq=False)
class _Retry:
    """A submission waiting for its next attempt."""

    submission: Submission


def _failures_of(slice_: pb2.Slice) -> dict[int, Detail]:
    found: dict[int, Detail] = {}
    for detail in slice_.failures:
        rows = range(detail.start, detail.start + (detail.count or slice_.count))
        found.update(dict.fromkeys(rows, codec.read_failure(detail)))
    return found
