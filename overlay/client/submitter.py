"""Many requests over one stream: the engine of the client library.

    send(order) --> outbox --> segments of one kind and deadline --> frames --> the process asked
    order.deliver(...) <------------------------------------ slices <-- frames <--

An order is one request or many that were given together. What was never handed to gRPC is sent when
the connection is back; what was, and has no answer, ends as unknown and is not sent again. What
provably did not run is tried again, within a budget, after the time that the process asked for; a
map's also beyond that, for as long as the map is patient. What a process that is being stopped
gives back waits, until it is back. Where all places for streams are taken, what is to be sent waits
for one, within the client's patience.

Owns a pipe, whose thread delivers, and a deadline thread, from `start` to `close`.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from overlay.client.outbox import Outbox, Submission
from overlay.model import clocks as time
from overlay.model.limits import Limits
from overlay.model.pending import Run, consecutive
from overlay.model.segments import Answers, Code, Column, Executed, Failure, Part, Progress, Segment
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.multiplexer import SAME_DEADLINE_S, Multiplexer, OpenSegment
from overlay.transport.stream import ReconnectingStream, is_full
from overlay.transport.timers import Deadlines

LIMITS = Limits()
# One less than the process asked takes: with a full window it reads nothing, cancels neither.
WINDOW_ROWS = LIMITS.window_rows - 1
WINDOW_BYTES = LIMITS.window_bytes - 1
LATE_S = 0.1  # the process asked answers by the deadline; after so much more we do
CHUNKS_AHEAD = 4  # of each part: 512 KiB under way, 50 MB/s where all the way takes 10 ms
GATHER_S = 0.00003  # how long to wait for calls that a frame's answers may bring
GATHERINGS = 5  # and how often, while they still come
RETRIES = 3  # of one request
RETRY_SHARE = 0.09  # of all requests: with the few in hand, a tenth more at an overload
MIN_RETRIES, MAX_RETRIES = 10.0, 1000.0  # that a client has in hand
RETRY_PAUSE_S = 0.1  # when the process did not say how long
MAX_PAUSE_S = 2.0  # of one that keeps trying, where the process asks for no longer one
SETTLE_S = 5.0  # a process that is back has found its neighbours by then
SETTLE_PAUSE_S = 0.25  # and meanwhile is asked again so often
NEVER_SENT = Failure(Code.CANCELLED, "cancelled before it was sent", Executed.NO)
CLOSED = Failure(Code.CANCELLED, "this client was closed", Executed.NO)
WORTH_A_RETRY = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


class Delivery:
    """A slice of answers, opened once for all who have rows in it. is_whole: no worker is missing.

    grant: who has read a chunk in it tells this (its row here, its worker). Of a slice that was
    checked against what was asked.
    """

    __slots__ = ("_answers", "_made", "grant", "is_whole", "results")

    def __init__(
        self, made: pb2.Slice, grant: Callable[[int, str], None] = lambda row, worker: None
    ) -> None:
        self.grant = grant
        self.results = list(made.results.items)
        self.is_whole = not any(part.failures for part in made.parts)
        self._made = made
        self._answers: Answers | None = None

    @property
    def answers(self) -> Answers:
        """Parts and hops."""
        if self._answers is None:
            self._answers = codec.read_client_slice(self._made)
        return self._answers


class _Sent(OpenSegment[Submission]):
    """A segment on its way, of rows of some orders."""

    __slots__ = ("deadline", "first_id")

    deadline: float
    first_id: int


class Submitter:
    """Sends orders and delivers their answers. Safe from any thread.

    connected: set while the process asked takes requests on our stream. refused: why it would not.
    patience_s: how long an order waits for a place there before it is delivered as refused. shown:
    what the process is called in words; by default its name.
    after_frame: called when all of a frame is delivered; is_delivering: such a call is to come.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        name: str,
        patience_s: float = math.inf,
        shown: Callable[[], str] | None = None,
    ) -> None:
        self.connected = threading.Event()
        self.refused: Failure | None = None
        self.after_frame: Callable[[], None] | None = None
        self.is_delivering = False
        self.most_bytes = LIMITS.max_message_bytes
        self._shown = shown or (lambda: name)
        self._patience_s = patience_s
        self._pipe = ReconnectingStream(
            channel, name, self._fill, self._receive, self._lost, self._live, may_rest=True
        )
        self._deadlines = Deadlines(self._expire)
        self._lock = threading.Lock()
        self._outbox = Outbox()
        self._multiplexer = Multiplexer()
        self._progress: dict[int, Progress] = {}  # of maps, by number: to be told
        self._unwanted: deque[set[int]] = deque()  # the `cancelled` of orders, to be looked up
        self._woken = 0  # threads that the last frame woke, who may call again at once
        self._look_at = math.inf  # when the outbox is looked through for what has expired
        self._retries = MIN_RETRIES
        self._retrying: set[_Retry] = set()
        self._served = False  # our stream is; the process may be stopping
        self._was_lost = False  # a stream that was served
        self._settles_by = -math.inf  # the process is just back; monotonic seconds
        self._full_since: float | None = None  # all places there are taken; monotonic seconds
        self._closed = False

    @property
    def open_rows(self) -> int:
        with self._lock:
            unsent = sum(len(order.rows) for order in self._outbox.all())
            return self._multiplexer.rows + unsent + len(self._retrying)

    @property
    def is_full(self) -> bool:
        """Whether the process asked refuses our stream because all its places are taken."""
        refused = self.refused
        return refused is not None and is_full(refused)

    @property
    def rests(self) -> bool:
        """Whether our stream was let go because nothing was open; it comes with the next order."""
        return self._pipe.rests

    @property
    def is_served(self) -> bool:
        """Whether our stream is, also by a process that is being stopped and takes nothing new."""
        return self._served

    def start(self) -> None:
        self._deadlines.start()
        self._pipe.start()

    def close(self) -> None:
        """Ends the stream; what is open is delivered as cancelled. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pipe.end()
        self._deadlines.stop()
        self._end_sent(Failure(Code.CANCELLED, "this client was closed before the answer came"))
        with self._lock:
            waiting, self._retrying = self._retrying, set()
        for retry in waiting:
            self._outbox.put(retry.order)
        self._end_unsent()

    def send(self, order: Submission) -> None:
        if order.size > self.most_bytes and self._refuse_too_large(order):
            return
        if not order.attempt:  # or retries would pay for more of them
            self._retries = min(self._retries + len(order.rows) * RETRY_SHARE, MAX_RETRIES)
        self._outbox.put(order)
        due_at = self._due_at(order)
        if due_at < self._look_at:
            self._watch_outbox(due_at)
        if self._closed:
            self._end_unsent()
        else:
            self._pipe.kick()

    def remind(self, of: Callable[[], None], at: float) -> None:
        """Calls that then, in monotonic seconds, on the deadline thread; never after `close`."""
        self._deadlines.watch(of, at)

    def tell(self, progress: Progress) -> None:
        """Goes to who watches, in one of the next frames."""
        self._progress[progress.number] = progress
        self._pipe.kick()

    def wake(self) -> None:
        """Somebody waits for `connected`: a stream that was let go is wanted again."""
        self._pipe.kick()

    def _due_at(self, order: Submission) -> float:
        """When an order that waits in the outbox is to be ended."""
        since = self._full_since
        if since is None or order.is_patient or not self.is_full:
            return order.deadline
        return min(order.deadline, max(since, order.given) + self._patience_s)

    def _watch_outbox(self, deadline: float) -> None:
        """Sees to it that an order in the outbox ends then, if it is still there."""
        with self._lock:
            if deadline >= self._look_at:
                return
            self._look_at = deadline
        self._deadlines.watch(self, deadline)

    def _refuse_too_large(self, order: Submission) -> bool:
        """Such a payload would end the stream, with all that is in it."""
        most = self.most_bytes
        large = {row for row in order.rows if len(order.payloads[row]) > most}
        for row in large:
            reason = codec.too_large(len(order.payloads[row]), most)
            order.deliver((row,), Failure(Code.INVALID_ARGUMENT, reason, Executed.NO), 0, 0)
        if large:
            order.rows = [row for row in order.rows if row not in large]
            order.size = sum(len(order.payloads[row]) for row in order.rows)
        return not order.rows

    def cancel(self, order: Submission, rows: Sequence[int]) -> None:
        """Nobody waits for these rows any more; they are delivered all the same."""
        order.cancelled.update(rows)
        self._unwanted.append(order.cancelled)
        self._pipe.kick()

    def take_back(self, order: Submission, failure: Failure) -> int:
        """Delivers this for those of its rows that wait to be sent; how many they are."""
        with self._lock:
            mine = [r for r in self._retrying if r.order.cancelled is order.cancelled]
            self._retrying.difference_update(mine)
        taken = [retry.order for retry in mine]
        for one in self._outbox.all():
            if one.cancelled is order.cancelled:
                with suppress(ValueError):  # it has left
                    self._outbox.remove(one)
                    taken.append(one)
        for one in taken:
            self._deliver_all(one, failure)
        return sum(len(one.rows) for one in taken)

    # on gRPC's sending thread

    def _fill(self, frame: pb2.Frame) -> bool:
        if not self._served:
            return False  # a call that is never accepted would lose it
        self._gather()
        size = 0
        if self._unwanted:
            self._find_unwanted()
        size += self._multiplexer.write_control(frame, LIMITS.frame_cancels)
        while self._progress:
            _, progress = self._progress.popitem()
            frame.progress.append(codec.write_progress(progress))
            size += 60
        while self.connected.is_set() and size < LIMITS.frame_bytes and self._has_room():
            orders, bytes_ = self._next_orders(LIMITS.frame_bytes - size)
            if not orders:
                break
            if not self._write(frame, orders, bytes_):
                break
            size += bytes_ + 100
        return size > 0

    def _find_unwanted(self) -> None:
        # For all at once: thousands may be cancelled together, and each may be in any segment.
        unwanted = {id(self._unwanted.popleft()) for _ in range(len(self._unwanted))}
        for sent in self._multiplexer.segments():
            rows = [
                start + index
                for start, order in zip(sent.starts, sent.members, strict=False)
                if id(order.cancelled) in unwanted
                for index, row in enumerate(order.rows)
                if row in order.cancelled
            ]
            for first, count in consecutive(rows):
                self._multiplexer.cancel(sent, first, count)

    def _gather(self) -> None:
        # Threads that were woken together call together: a moment's patience makes one frame of it.
        woken, self._woken = self._woken, 0
        before = len(self._outbox)
        for _ in range(GATHERINGS if woken > 1 else 0):
            if before >= woken:
                return
            time.sleep(GATHER_S)
            now = len(self._outbox)
            if now == before:
                return
            before = now

    def _has_room(self) -> bool:
        open_ = self._multiplexer
        if open_.rows >= WINDOW_ROWS:
            return False
        try:
            next_size = self._outbox.first().size
        except IndexError:
            return False
        return open_.bytes + next_size <= WINDOW_BYTES or not open_.rows

    def _next_orders(self, most_bytes: int) -> tuple[list[Submission], int]:
        """Orders from the head of the outbox that may share a segment, and their bytes."""
        orders: list[Submission] = []
        rows, size = WINDOW_ROWS - self._multiplexer.rows, 0
        while self._outbox and rows > 0:
            order = self._outbox.take()
            if order.cancelled:
                kept = self._still_wanted(order)
                if kept is None:
                    continue
                order = kept
            if orders and not (
                (order.kind is orders[0].kind or order.kind == orders[0].kind)
                and order.attempt == orders[0].attempt
                and abs(order.deadline - orders[0].deadline) <= SAME_DEADLINE_S
                and size + order.size <= most_bytes
            ):
                self._put_back([order])
                break
            if order.size > self.most_bytes and self._refuse_too_large(order):
                continue  # it came for a process that took more
            fits = min(rows, self._rows_that_fit(order))
            if len(order.rows) > fits:
                self._put_back([order.part(order.rows[fits:], order.attempt)])
                order = order.part(order.rows[:fits], order.attempt)
            orders.append(order)
            rows -= len(order.rows)
            size += order.size
        return orders, size

    def _rows_that_fit(self, order: Submission) -> int:
        """How many of the first rows the process asked takes in one segment: all, but for large
        ones; none of them is too large alone."""
        if order.size <= self.most_bytes:
            return len(order.rows)
        size = fits = 0
        for row in order.rows:
            size += len(order.payloads[row])
            if size > self.most_bytes:
                break
            fits += 1
        return fits

    def _still_wanted(self, order: Submission) -> Submission | None:
        """The order without its cancelled rows, which are delivered as such."""
        gone = [row for row in order.rows if row in order.cancelled]
        left = [row for row in order.rows if row not in order.cancelled]
        if not gone:
            return order
        self._deliver_all(order.part(gone, order.attempt), NEVER_SENT)
        return order.part(left, order.attempt) if left else None

    def _write(self, frame: pb2.Frame, orders: list[Submission], size: int) -> bool:
        """False when the stream is over."""
        deadline = min(order.deadline for order in orders)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            late = Failure(Code.DEADLINE_EXCEEDED, "", Executed.NO)
            for order in orders:
                self._deliver_all(order, late)
            return True
        bodies = [order.payloads[row] for order in orders for row in order.rows]
        payloads = Column(bodies, size=size)
        kind, attempt = orders[0].kind, orders[0].attempt
        chunks = CHUNKS_AHEAD if kind.as_they_come else 0
        first_id = codec.new_ids()
        counts = [len(order.rows) for order in orders]
        sent = _Sent(orders, counts, size, partial=chunks > 0, chunks=chunks)
        sent.deadline, sent.first_id = deadline + LATE_S, first_id
        if not self._multiplexer.open(sent):
            self._put_back(orders)
            return False
        self._deadlines.watch(sent, sent.deadline)
        segment = Segment(
            kind.route, payloads, deadline, first_id, attempt, chunks=chunks, own_ids=True
        )
        before, more = len(frame.segments), (kind.want_parts, kind.priority, kind.as_they_come)
        try:
            codec.write_segment(frame, sent.number, segment, left_s, *more)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is of this request alone
            del frame.segments[before:]
            self._write_apart(frame, sent, e)
        return True

    def _write_apart(self, frame: pb2.Frame, sent: _Sent, error: Exception) -> None:
        """What cannot be written together: each row for itself, so that none fails for another."""
        self._close_rows(sent, 0, sent.count)
        if sent.count > 1:
            for order in sent.members:
                for row in order.rows:
                    alone = order.part((row,), order.attempt)
                    self._write(frame, [alone], alone.size)
            return
        reason = f"the request cannot be sent: {error}"
        self._deliver_all(sent.members[0], Failure(Code.INVALID_ARGUMENT, reason, Executed.NO))

    def _put_back(self, orders: list[Submission]) -> None:
        for order in reversed(orders):
            self._outbox.put_back(order)
            self._watch_outbox(self._due_at(order))
        if self._closed:
            self._end_unsent()

    # on the pipe's thread

    def _live(self, metadata: Mapping[str, str]) -> None:
        self.refused = None
        self._served = True
        self._multiplexer.is_live = not self._closed
        if self._was_lost:
            self._was_lost, self._settles_by = False, time.monotonic() + SETTLE_S
        said = codec.read_most_bytes(metadata.items())
        self.most_bytes = LIMITS.max_message_bytes if said is None else said
        self.connected.set()
        self._pipe.kick()

    def _receive(self, frame: pb2.Frame) -> None:
        woken = 0
        self._full_since = None
        if frame.stopping and self.connected.is_set():
            reason = f"the process at {self._shown()} is stopping and takes no new requests"
            self.refused = Failure(Code.UNAVAILABLE, reason, Executed.NO)
            self.connected.clear()
            self._multiplexer.is_live = False
        self.is_delivering = self.after_frame is not None
        try:
            for sent, made in self._multiplexer.answers_in(frame):
                codec.check_client_slice(made, sent.asked)
                if made.more:
                    self._pass_on(sent, made)
                else:
                    woken += self._take(sent, made)
        finally:
            self._woken = woken
            self.is_delivering = False
            if self.after_frame is not None:
                self.after_frame()
        if self._outbox:
            self._pipe.kick()

    def _pass_on(self, sent: _Sent, made: pb2.Slice) -> None:
        """Parts of rows that are not answered yet."""
        start = made.start

        def grant(row: int, worker: str) -> None:
            self._multiplexer.grant(sent, start + row, worker, 1)
            self._pipe.kick()

        came = Delivery(made, grant)
        for first, count in self._multiplexer.arrive(sent, start, came.answers):
            for order, row, rows, at in sent.members_of(first, count):
                if order.early is not None:
                    whose = order.rows[row : row + rows]
                    order.early(whose, came, at - start, sent.first_id + at)

    def _take(self, sent: _Sent, made: pb2.Slice) -> int:
        """Delivers a slice; how many threads that wakes."""
        came, start, woken = Delivery(made), made.start, 0
        failures = _failures_of(made) if made.failures else None
        for first, count in self._close_rows(sent, start, made.count):
            for order, own, size, at in sent.members_of(first, count):
                woken += order.wakes_a_thread
                rows = order.rows[own : own + size]
                if failures is None:
                    order.deliver(rows, came, at - start, sent.first_id + at)
                    continue
                for index, row in enumerate(rows, at):
                    failure = failures.get(index - start)
                    request_id = sent.first_id + index
                    if failure is None:
                        order.deliver((row,), came, index - start, request_id)
                    else:
                        self._failed(order, row, failure, request_id)
        return woken

    def _lost(self, why: Part) -> None:
        if self._closed:
            return
        was_served, self._served = self._served, False
        self.connected.clear()
        if self._pipe.rests:
            self.refused = None
        elif why.code is Code.DATA_LOSS:  # of what is not sent to it now
            reason = f"the process at {self._shown()} cannot be asked: {why.reason}"
            self.refused = Failure(why.code, reason, Executed.NO)
        elif why.executed is Executed.NO or not (was_served or why.code is Code.CANCELLED):
            self.refused = Failure(why.code, why.reason, why.executed, why.retry_after_s)
        if was_served:
            self._was_lost = not self._pipe.rests
            reason = f"no answer from {self._shown()}: {why.reason}"
            self._end_sent(Failure(Code.UNAVAILABLE, reason, why.executed))
            if why.code is Code.DATA_LOSS and self.refused is not None:
                self._end_unsent(self.refused)  # the next call may be a while
        if self.is_full:
            self._full_since = self._full_since or time.monotonic()
            self._expire_unsent()
        if self._outbox and self._pipe.rests:
            self._pipe.kick()

    # on any thread

    def _close_rows(self, sent: _Sent, start: int, count: int) -> list[Run]:
        runs = self._multiplexer.take(sent, start, count)
        if runs and not sent.pending.left:
            self._deadlines.forget(sent, sent.deadline)
        return runs

    def _end_sent(self, failure: Failure) -> None:
        for sent in self._multiplexer.lose():
            self._end_rows(sent, failure)

    def _end_rows(self, sent: _Sent, failure: Failure) -> None:
        for first, count in self._close_rows(sent, 0, sent.count):
            for order, own, size, at in sent.members_of(first, count):
                rows = order.rows[own : own + size]
                if not self._keep(order, rows, failure):
                    order.deliver(rows, failure, 0, sent.first_id + at)

    def _end_unsent(self, why: Failure = CLOSED) -> None:
        while True:
            try:
                self._deliver_all(self._outbox.take(), why)
            except IndexError:
                return

    def _deliver_all(self, order: Submission, failure: Failure) -> None:
        order.deliver(order.rows, failure, 0, 0)

    def _expire(self, due: _Sent | Submitter | _Retry | Callable[[], None]) -> None:
        if isinstance(due, _Retry):
            with self._lock:
                due_still = due in self._retrying
                self._retrying.discard(due)
            if due_still:
                self.send(due.order)
        elif isinstance(due, Submitter):
            self._expire_unsent()
        elif isinstance(due, _Sent):
            self._multiplexer.cancel(due, 0, due.count)
            self._end_rows(due, Failure(Code.DEADLINE_EXCEEDED, ""))
            self._pipe.kick()
        else:
            due()

    def _expire_unsent(self) -> None:
        with self._lock:
            self._look_at = math.inf
        now = time.monotonic()
        late, full = Failure(Code.DEADLINE_EXCEEDED, "", Executed.NO), self.refused
        for order in self._outbox.all():
            due_at = self._due_at(order)
            if due_at > now:
                self._watch_outbox(due_at)
                continue
            try:
                self._outbox.remove(order)
            except ValueError:  # it has left
                continue
            self._deliver_all(order, late if full is None or order.deadline <= now else full)

    def _keep(self, order: Submission, rows: Sequence[int], failure: Failure) -> bool:
        """Whether these rows wait for the process to be back: it stops, and gave proof."""
        gave_back = failure.executed is Executed.NO and failure.code is Code.UNAVAILABLE
        if not gave_back or self.connected.is_set() or self._closed:
            return False
        kept = order.part(rows, order.attempt)
        self._outbox.put(kept)
        self._watch_outbox(self._due_at(kept))
        if self._closed:
            self._end_unsent()
        return True

    def _failed(self, order: Submission, row: int, failure: Failure, request_id: int) -> None:
        if self._keep(order, (row,), failure):
            return
        now = time.monotonic()
        # A process that has just come back reaches nobody yet: that is no reason to give up.
        settles = failure.code is Code.UNAVAILABLE and now < self._settles_by
        pause_s = failure.retry_after_s or RETRY_PAUSE_S
        if settles:
            pause_s = max(pause_s, SETTLE_PAUSE_S)
        elif order.attempt >= RETRIES:
            pause_s = max(pause_s, min(RETRY_PAUSE_S * 2 ** min(order.attempt, 9), MAX_PAUSE_S))
        again_at = now + pause_s
        if (
            failure.executed is Executed.NO
            and failure.code in WORTH_A_RETRY
            and again_at < order.deadline
            and row not in order.cancelled
            and not self._closed
            and (settles or self._may_try_again(order))
        ):
            retry = _Retry(order.part((row,), order.attempt + (not settles)))
            with self._lock:
                self._retrying.add(retry)
            self._deadlines.watch(retry, again_at)
        else:
            order.deliver((row,), failure, 0, request_id)

    def _may_try_again(self, order: Submission) -> bool:
        if order.attempt < RETRIES and self._spend_retry():
            return True
        return order.keeps_trying()

    def _spend_retry(self) -> bool:
        with self._lock:
            if self._retries < 1:
                return False
            self._retries -= 1
            return True


@dataclass(eq=False)
class _Retry:
    """An order that waits for its next attempt."""

    order: Submission


def _failures_of(made: pb2.Slice) -> dict[int, Failure]:
    found: dict[int, Failure] = {}
    for detail in made.failures:
        rows = range(detail.start, detail.start + (detail.count or made.count))
        found.update(dict.fromkeys(rows, codec.read_failure(detail)))
    return found
