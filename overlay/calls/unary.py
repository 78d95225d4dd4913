"""Serves Forward: a single request, whose thread waits for its answer.

    read -> check its idempotency key -> request_path.admit -> wait -> finish -> write

A request whose key was used before gets the outcome of the first request with that key. While
there is none yet, it waits without a thread.
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
from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.errors import BadRequest, OverlayError
from overlay.model.segments import AnswerRow, Caller, Code, Column, Route, Segment, Slice
from overlay.queueing.queued_segment import QueuedSegment
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines


class UnaryRequests:
    """Thread-safe. last_arrival: when the latest request arrived, in monotonic seconds."""

    def __init__(self, path: RequestPath, keys: IdempotencyKeys, deadlines: Deadlines) -> None:
        self.last_arrival = 0.0
        self._path = path
        self._request_log = path.request_log
        self._limits = path.limits
        self._keys = keys
        self._deadlines = deadlines

    def forward(
        self,
        request: pb2.Request,
        context: grpc.ServicerContext,
        caller: Caller,
        rights: Rights = UNRESTRICTED,
    ) -> pb2.Response | Future[pb2.Response]:
        """The answer, or a Future of it while the first request with its key is running.

        rights: the caller's. Raises OverlayError, already counted and logged.
        """
        self.last_arrival = time.monotonic()
        single = self._read(request, context, caller, rights)
        try:
            if single.segment.idempotent and single.error is None:
                return self._ask_with_key(single)
            return self._ask(single)
        except OverlayError as e:
            e.request_id = e.request_id or single.segment.first_id
            raise self._path.with_retry(e) from None

    def _read(
        self, request: pb2.Request, context: grpc.ServicerContext, caller: Caller, rights: Rights
    ) -> _Single:
        """An invalid request has an `error`, and a blank route if that cannot be read."""
        deadline, error = self._deadline(context), None
        segment = Segment(Route(), Column((b"",)), deadline, request.request_id)
        traced = not request.hops and self._request_log.wants_trace()
        try:
            if request.in_parts:
                raise BadRequest("in_parts: only of a job; a stream sends parts as they come")
            segment = codec.read_request(request, deadline, self._limits, traced)
            self._path.check(segment.route, rights)
        except OverlayError as e:
            error = e
        return _Single(request, context, caller, rights, segment, error)

    def _ask(self, single: _Single) -> pb2.Response:
        segment = single.segment
        try:
            answers = self._wait(single)
            finished = self._path.finish(single, 0, answers, size_of(answers))
            if finished.failures:
                raise finished.failures[0][1]
            answer, result = finished.answers.at(0), b"".join(finished.results)
            with_parts = single.want_parts or single.from_process
            response = codec.write_response(
                answer, segment.first_id, result, with_results=with_parts
            )
            if segment.log_lines:
                codec.write_trace(response, finished.trace)
            _send_coverage(single.context, answer)
        except OverlayError:
            raise
        except Exception as e:  # noqa: BLE001 - a bug of ours costs one request
            failed = unexpected(e, segment.first_id)
            if not single.counted:
                self._request_log.count(failed)
            raise failed from None
        return response

    def _wait(self, single: _Single) -> Slice:
        segment, reply = single.segment, _OneAnswer()
        self._path.admit(single, reply.sink, single.request.priority, error=single.error)
        queued = single.queued
        if queued is None:
            return reply.answers
        # With a key the work goes on when the caller leaves, as it may ask again for the answer.
        if not segment.idempotent and not single.context.add_callback(
            partial(_cancel, weakref.ref(queued))
        ):
            queued.end(Code.CANCELLED)  # the call had already ended
        if not reply.wait(_until(segment.deadline)):
            queued.end(Code.DEADLINE_EXCEEDED)
            reply.wait(1)  # made by `end` on this thread, or at this moment on another
        return reply.answers

    def _ask_with_key(self, single: _Single) -> pb2.Response | Future[pb2.Response]:
        request = single.request
        try:
            question = _question(single.segment.route, request)
            found = self._keys.enter(single.caller, request.idempotency_key, question)
        except OverlayError as e:
            found = e
        if isinstance(found, First):
            return self._ask_first(found, single)
        self._request_log.meter.received(1)
        if isinstance(found, Waiter):
            return self._answer_later(found, single)
        return self._repeat(found, single.context)

    def _ask_first(self, first: First, single: _Single) -> pb2.Response:
        try:
            response = self._ask(single)
            answer = response.SerializeToString()
        except BaseException as e:  # whatever it is, it is the key's outcome
            first.failed(e if isinstance(e, OverlayError) else unexpected(e))
            raise
        first.answered(answer)
        return response

    def _answer_later(self, waiter: Waiter, single: _Single) -> Future[pb2.Response]:
        """Ends with the key's first request, at its own deadline, or when its caller leaves."""
        later: Future[pb2.Response] = Future()
        context = single.context  # `done` must not keep the request alive while it waits
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
        """The first request's answer again. Raises its error if it failed."""
        if isinstance(outcome, OverlayError):
            self._request_log.count(outcome)
            raise outcome
        self._request_log.meter.completed(1)
        response = pb2.Response.FromString(outcome)
        _send_coverage(context, codec.read_response(response))
        return response

    def _deadline(self, context: grpc.ServicerContext) -> float:
        # gRPC says 292 years if the client set none. Read only once: it follows the wall clock.
        remaining: float | None = context.time_remaining()
        if remaining is None or remaining > 1e9:
            remaining = self._limits.default_deadline_s
        return time.monotonic() + min(remaining, self._limits.max_deadline_s)


class _Single(Accepted):
    """A single request, until it is answered. error: why it cannot be served."""

    __slots__ = ("context", "error", "request")

    def __init__(
        self,
        request: pb2.Request,
        context: grpc.ServicerContext,
        caller: Caller,
        rights: Rights,
        segment: Segment,
        error: OverlayError | None,
    ) -> None:
        super().__init__(segment, caller, request.want_parts, rights)
        self.request = request
        self.context = context
        self.error = error


class _OneAnswer:
    """What a single request's thread waits for. A bare lock is the cheapest way to wake it."""

    def __init__(self) -> None:
        self.answers: Slice  # unset until `wait` returns True
        self._answered = threading.Lock()
        self._answered.acquire()

    def sink(self, start: int, answers: Slice) -> None:
        self.answers = answers
        self._answered.release()

    def wait(self, timeout_s: float) -> bool:
        return self._answered.acquire(timeout=timeout_s)


def _send_coverage(context: grpc.ServicerContext, answer: AnswerRow) -> None:
    """For clients older than Response.parts."""
    context.set_trailing_metadata(((codec.COVERAGE_KEY, aggregate.coverage(answer)),))


def _cancel(queued: weakref.ref[QueuedSegment]) -> None:
    """Called when the caller leaves. gRPC keeps it until the answer is read, so it must not keep
    the queued segment alive, which refers to the request and its answer."""
    found = queued()
    if found is not None:
        found.end(Code.CANCELLED)


def _question(route: Route, request: pb2.Request) -> tuple[bytes, bytes]:
    """What has to be the same when a key comes again."""
    return repr((route, request.want_parts)).encode(), request.payload


def _until(deadline: float) -> float:
    # A moment before the client gives up, so that it gets this answer even on a busy machine. This
    # costs nothing: the links reserve more than that for the way back.
    left = deadline - time.monotonic()
    return max(0.0, left - min(0.02, left * 0.05))
