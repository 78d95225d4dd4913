"""Forward, served: a single request, whose thread waits for its answer.

    read -> its idempotency key -> request_path.admit -> wait -> finish -> write

A request whose key was used before gets the outcome of the first one with that key. Where there is
none yet it waits for it without a thread.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from functools import partial

import grpc

from overlay.calls.idempotency import First, IdempotencyKeys, Outcome, Waiter
from overlay.calls.request_log import unexpected
from overlay.calls.request_path import Accepted, RequestPath, size_of
from overlay.model import clocks as time
from overlay.model.errors import OverlayError
from overlay.model.segments import AnswerRow, Caller, Code, Column, Route, Segment, Slice
from overlay.queueing.queued_segment import QueuedSegment
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines


class UnaryRequests:
    """Safe from any thread. last_came: when the latest request did, in monotonic seconds."""

    def __init__(self, path: RequestPath, keys: IdempotencyKeys, deadlines: Deadlines) -> None:
        self.last_came = 0.0
        self._path = path
        self._record = path.record
        self._limits = path.limits
        self._keys = keys
        self._deadlines = deadlines

    def forward(
        self, request: pb2.Request, context: grpc.ServicerContext, caller: Caller
    ) -> pb2.Response | Future[pb2.Response]:
        """The answer, or a Future of it where the first request of its key has none yet.

        Raises OverlayError: why there is none, counted and logged.
        """
        self.last_came = time.monotonic()
        single = self._read(request, context, caller)
        try:
            if single.segment.idempotent and single.wrong is None:
                return self._ask_with_key(single)
            return self._ask(single)
        except OverlayError as e:
            e.request_id = e.request_id or single.segment.first_id
            raise self._path.with_retry(e) from None

    def _read(self, request: pb2.Request, context: grpc.ServicerContext, caller: Caller) -> _Single:
        """What is wrong with it is said there; its route is blank where that cannot be read."""
        deadline, wrong = self._deadline(context), None
        segment = Segment(Route(), Column((b"",)), deadline, request.request_id)
        traced = not request.hops and self._record.wants_trace()
        try:
            segment = codec.read_request(request, deadline, self._limits, traced)
            self._path.check(segment.route)
        except OverlayError as e:
            wrong = e
        return _Single(request, context, caller, segment, wrong)

    def _ask(self, single: _Single) -> pb2.Response:
        segment = single.segment
        try:
            answers = self._wait(single)
            made = self._path.finish(single, 0, answers, size_of(answers))
            if made.failures:
                raise made.failures[0][1]
            answer, result = made.answers.at(0), b"".join(made.results)
            with_parts = single.want_parts or single.from_process
            response = codec.write_response(
                answer, segment.first_id, result, with_results=with_parts
            )
            if segment.log_lines:
                codec.write_trace(response, made.trace)
            _tell_coverage(single.context, answer)
        except OverlayError:
            raise
        except Exception as e:  # noqa: BLE001 - a fault of ours costs one request
            failed = unexpected(e, segment.first_id)
            if not single.counted:
                self._record.count(failed)
            raise failed from None
        return response

    def _wait(self, single: _Single) -> Slice:
        segment, only = single.segment, _OneAnswer()
        self._path.admit(single, only.sink, single.request.priority, wrong=single.wrong)
        ticket = single.ticket
        if ticket is None:
            return only.answers
        # With a key the work goes on when its caller has left, who may come again for the answer.
        if not segment.idempotent and not single.context.add_callback(
            partial(_cancel, weakref.ref(ticket))
        ):
            ticket.end(Code.CANCELLED)  # the call was over before it began
        if not only.wait(_until(segment.deadline)):
            ticket.end(Code.DEADLINE_EXCEEDED)
            only.wait(1)  # it is made on this thread, or just now by another
        return only.answers

    def _ask_with_key(self, single: _Single) -> pb2.Response | Future[pb2.Response]:
        request = single.request
        try:
            question = _question(single.segment.route, request)
            found = self._keys.enter(single.caller, request.idempotency_key, question)
        except OverlayError as e:
            found = e
        if isinstance(found, First):
            return self._ask_first(found, single)
        self._record.meter.received(1)
        if isinstance(found, Waiter):
            return self._answer_later(found, single)
        return self._repeat(found, single.context)

    def _ask_first(self, first: First, single: _Single) -> pb2.Response:
        try:
            response = self._ask(single)
            answer = response.SerializeToString()
        except BaseException as e:  # whatever it is, it is what came of the key
            first.failed(e if isinstance(e, OverlayError) else unexpected(e))
            raise
        first.answered(answer)
        return response

    def _answer_later(self, waiter: Waiter, single: _Single) -> Future[pb2.Response]:
        """Ends with the first of its key, at its own deadline, or when its caller leaves."""
        later: Future[pb2.Response] = Future()
        context = single.context  # alone: `done` must not keep the request while it waits
        due = time.monotonic() + _until(single.segment.deadline)

        def done(outcome: Outcome) -> None:
            self._deadlines.forget(waiter, due)
            try:
                later.set_result(self._repeat(outcome, context))
            except OverlayError as e:
                later.set_exception(self._path.with_retry(e))

        self._deadlines.watch(waiter, due)
        waiter.on_done(done)
        if not context.add_callback(waiter.cancel):
            waiter.cancel()
        return later

    def _repeat(self, outcome: Outcome, context: grpc.ServicerContext) -> pb2.Response:
        """What the first of a key was answered. Raises what it was refused with."""
        if isinstance(outcome, OverlayError):
            self._record.count(outcome)
            raise outcome
        self._record.meter.completed(1)
        response = pb2.Response.FromString(outcome)
        _tell_coverage(context, codec.read_response(response))
        return response

    def _deadline(self, context: grpc.ServicerContext) -> float:
        # Without a client's deadline gRPC says 292 years. Read once: it follows the wall clock.
        remaining: float | None = context.time_remaining()
        if remaining is None or remaining > 1e9:
            remaining = self._limits.default_deadline_s
        return time.monotonic() + min(remaining, self._limits.max_deadline_s)


class _Single(Accepted):
    """A single request, until it is answered. wrong: why it cannot be served."""

    __slots__ = ("context", "request", "wrong")

    def __init__(
        self,
        request: pb2.Request,
        context: grpc.ServicerContext,
        caller: Caller,
        segment: Segment,
        wrong: OverlayError | None,
    ) -> None:
        super().__init__(segment, caller, request.want_parts)
        self.request = request
        self.context = context
        self.wrong = wrong


class _OneAnswer:
    """Where a single request's thread waits; a bare lock wakes it cheapest."""

    def __init__(self) -> None:
        self.answers: Slice  # not there before `wait` has said so
        self._came = threading.Lock()
        self._came.acquire()

    def sink(self, start: int, answers: Slice) -> None:
        self.answers = answers
        self._came.release()

    def wait(self, timeout_s: float) -> bool:
        return self._came.acquire(timeout=timeout_s)


def _tell_coverage(context: grpc.ServicerContext, answer: AnswerRow) -> None:
    """For a client that is older than the parts of a response."""
    context.set_trailing_metadata(((codec.COVERAGE_KEY, aggregate.coverage(answer)),))


def _cancel(ticket: weakref.ref[QueuedSegment]) -> None:
    """The caller has left. gRPC keeps this for as long as the answer is not read, and so it must
    not keep the ticket, which leads to the request and to its answer."""
    found = ticket()
    if found is not None:
        found.end(Code.CANCELLED)


def _question(route: Route, request: pb2.Request) -> tuple[bytes, bytes]:
    """What has to be the same when a key comes again."""
    return repr((route, request.want_parts)).encode(), request.payload


def _until(deadline: float) -> float:
    # A moment before the client's own clock, so that it hears what came rather than nothing, on a
    # busy machine too. Nothing is lost by it: the links keep back more for the way home.
    left = deadline - time.monotonic()
    return max(0.0, left - min(0.02, left * 0.05))
