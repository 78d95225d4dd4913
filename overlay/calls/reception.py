"""The calls of the gRPC server: idle ones hold no thread, and all together a bounded memory.

    headers --> begin, on gRPC's serving thread --> [ waits for its message, without a thread ]
    message --> the method, on a thread of its pool --> its answer, now or later

gRPC for Python (1.80 to 1.85) gives a call a thread as soon as its headers arrive, and that thread
waits for the message: eight calls without one took every thread that serves GetMetrics. gRPC also
leaks about 15 KB for each unary message that is not protobuf, and its health service remembers
every name it was ever asked for. So the layer between server and methods is here, built on
grpcio's internals (`_server`); tests/calls/test_reception.py states what is expected of it.

A caller that opens too many calls loses its own first (calls.eviction): those whose message has
not arrived, or whose answers are not read.

Owns no thread. Callbacks on gRPC's serving thread are marked as such; they must be quick.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc import _server
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay.calls.eviction import EvictionQueue
from overlay.calls.gate import Gate
from overlay.calls.request_log import RequestLog, unexpected
from overlay.model import clocks as time
from overlay.model.errors import BadRequest, CrowdedOut, NotAllowed, OverlayError
from overlay.model.limits import Limits
from overlay.model.segments import Executed
from overlay.transport import codec

log = logging.getLogger(__name__)

Method = Callable[..., Any]

UNARRIVED, WATCHERS, UNREAD = "calls without a message", "watchers", "answers that are not read"


class Call:
    """One call, in bytes. Its methods never block. Thread-safe.

    address: the caller's. context: what gRPC passes to a method. is_over: the call has ended.
    """

    __slots__ = ("_rpc", "_state", "address", "context", "is_over", "peer")

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.peer: str = context.peer()
        self.address = codec.address_in(self.peer)
        self.is_over = False
        self._state: Any = context._state
        self._rpc: Any = context._rpc_event

    def receive(self, callback: Callable[[bytes | None], None]) -> None:
        """Calls `callback` with the next message, or None at the end, on gRPC's serving thread.

        Must not be called again before that.
        """
        state = self._state
        with state.condition:
            is_open = _server._is_rpc_state_active(state)
            if is_open:
                finish = _server._receive_message(state, self._rpc.call, None)
                operations = (cygrpc.ReceiveMessageOperation(_NO_FLAGS),)
                self._rpc.call.start_server_batch(
                    operations, partial(_on_received, state, finish, callback)
                )
                state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        if not is_open:
            callback(None)

    def send(self, message: bytes, callback: Callable[[bool], None]) -> None:
        """Calls `callback` on gRPC's serving thread: True once it is sent, False if it never is.

        Must not be called again before that.
        """
        state = self._state
        with state.condition:
            is_open = _server._is_rpc_state_active(state)
            if is_open:
                operations = [cygrpc.SendMessageOperation(message, _NO_FLAGS)]
                token = _server._SEND_MESSAGE_TOKEN
                if state.initial_metadata_allowed:
                    operations.insert(0, _server._get_initial_metadata_operation(state, None))
                    state.initial_metadata_allowed = False
                    token = _server._SEND_INITIAL_METADATA_AND_SEND_MESSAGE_TOKEN
                finish = _server._send_message(state, token)
                self._rpc.call.start_server_batch(
                    operations, partial(_on_sent, state, finish, callback)
                )
                state.due.add(token)
        if not is_open:
            callback(False)

    def finish(self, message: bytes | None = None) -> None:
        """Ends the call with the context's code, or OK, after a last message if there is one."""
        with self._state.condition:
            if not self._state.statused:
                _server._status(self._rpc, self._state, message)

    def fail(self, error: OverlayError) -> None:
        """Ends the call with the error's status."""
        self.context.set_code(codec.grpc_code(error.code))
        self.context.set_details(str(error)[: codec.LONGEST_REASON])
        self.context.set_trailing_metadata(codec.trailers(error))
        self.finish()


class Reception:
    """Stands in for a server where generated code adds a service's methods to it.

    What a method is called with, and on which thread:

        unary             (request, context)   its pool; returns its answer, or a Future of it
        response stream   (request, call)      its pool; sends with the Call, now or later
        both streams      (call, context)      gRPC's serving thread; must not block
        the same with a pool of its own: (requests, context), called once for each request

    A method's own pool is its `experimental_thread_pool`; all others share `pool`.
    """

    def __init__(
        self,
        server: grpc.Server,
        pool: ThreadPoolExecutor,
        limits: Limits,
        request_log: RequestLog,
        gate: Gate | None = None,
    ) -> None:
        """request_log: counts the calls that are ended because there are too many. gate: decides
        who may call what."""
        self._server = server
        self._pool = pool
        self._limits = limits
        self._request_log = request_log
        self._lock = threading.Lock()
        self._unarrived: EvictionQueue[Call] = EvictionQueue(limits.unarrived_calls)
        self._watchers: EvictionQueue[Call] = EvictionQueue(limits.resting_calls)
        self._unread: EvictionQueue[Call] = EvictionQueue(limits.unread_bytes)
        self._gate = gate or Gate()
        self._open: set[Call] = set()  # with TLS: ended when their certificate is revoked

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: `add_registered_method_handlers` adds the same methods both ways."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        wrapped = {name: self._wrapped(name, handler) for name, handler in handlers.items()}
        generic = grpc.method_handlers_generic_handler(service, wrapped)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, wrapped)

    @property
    def unarrived(self) -> int:
        """Calls whose message has not arrived."""
        return len(self._unarrived)

    def end_untrusted(self) -> None:
        """Ends the calls whose certificates were revoked or have expired since they began."""
        if self._gate.is_open:
            return
        with self._lock:
            calls = list(self._open)
        for call in calls:
            try:
                self._gate.identity(call.context)
            except OverlayError as e:
                if not self._gate.invitation(call.context)[0]:
                    e.executed = Executed.UNKNOWN  # accepted requests may have run
                    call.fail(e)

    def end_late(self) -> None:
        """Ends the calls whose message is overdue."""
        patience_s = self._limits.default_deadline_s
        with self._lock:
            late = self._unarrived.pop_older(time.monotonic() - patience_s)
        for call in late:
            call.fail(CrowdedOut(f"no message arrived within {patience_s:g} s"))
            self._request_log.crowded_out(UNARRIVED, 1, call.address)

    def _wrapped(self, name: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        parse, serialize = handler.request_deserializer, handler.response_serializer
        method = handler.unary_unary or handler.unary_stream or handler.stream_stream
        pool = getattr(method, "experimental_thread_pool", None)
        if handler.stream_stream is None:
            serve = self._answer if handler.unary_unary else self._answer_by_stream
            begin = self._unary(partial(serve, method, parse, serialize), pool or self._pool)
        elif pool is not None:
            begin = self._message_by_message(method, parse, serialize, pool)
        else:
            begin = method

        def served(requests: object, context: grpc.ServicerContext, send: object) -> None:
            call = self._enter(context)
            try:
                self._gate.enter(context, call.peer, name)
                self._gate.check_verb(context, name)
            except OverlayError as e:
                if isinstance(e, NotAllowed):
                    self._request_log.not_allowed(e, call.address)
                call.fail(e)
            else:
                begin(call, context)

        served.experimental_non_blocking = True  # type: ignore[attr-defined]
        served.experimental_thread_pool = _INLINE  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(served, None, None)

    # on gRPC's serving thread

    def _enter(self, context: grpc.ServicerContext) -> Call:
        call = Call(context)
        if not self._gate.is_open:
            with self._lock:
                self._open.add(call)
        context.add_callback(partial(self._leave, call))
        return call

    def _leave(self, call: Call) -> None:
        with self._lock:
            call.is_over = True
            for queue in (self._unarrived, self._watchers, self._unread):
                queue.discard(call)
            self._open.discard(call)
        self._gate.leave(call.context, call.peer)

    def _unary(self, serve: Callable[[Call, bytes], None], pool: ThreadPoolExecutor) -> Method:
        def begin(call: Call, context: grpc.ServicerContext) -> None:
            self._put(self._unarrived, UNARRIVED, call)
            call.receive(partial(self._arrived, serve, pool, call))

        return begin

    def _arrived(
        self,
        serve: Callable[[Call, bytes], None],
        pool: ThreadPoolExecutor,
        call: Call,
        message: bytes | None,
    ) -> None:
        with self._lock:
            was_awaited = self._unarrived.discard(call)
        if message is None:
            if was_awaited:
                call.fail(BadRequest("the call has no message"))
        else:
            _submit(pool, call, serve, call, message)

    def _message_by_message(
        self, method: Method, parse: Method, serialize: Method, pool: ThreadPoolExecutor
    ) -> Method:
        """Makes a method that waits for each message into one that holds no thread."""

        def begin(call: Call, context: grpc.ServicerContext) -> None:
            self._put(self._watchers, WATCHERS, call)
            call.receive(partial(on_message, call))

        def on_message(call: Call, message: bytes | None) -> None:
            if message is None:
                call.finish()
            else:
                _submit(pool, call, answer, call, message)

        def answer(call: Call, message: bytes) -> None:
            try:
                answers = method(iter([codec.read_message(message, parse)]), call.context)
                send(call, [serialize(response) for response in answers], True)
            except BaseException as e:  # noqa: BLE001 - as in `_answer`
                _end(call, e)

        def send(call: Call, answers: list[bytes], is_open: bool) -> None:
            if not is_open:
                return
            if answers:
                call.send(answers[0], partial(send, call, answers[1:]))
            else:
                call.receive(partial(on_message, call))

        return begin

    # on the method's threads

    def _answer(
        self, method: Method, parse: Method, serialize: Method, call: Call, message: bytes
    ) -> None:
        try:
            answer = method(codec.read_message(message, parse), call.context)
            if isinstance(answer, Future):
                answer.add_done_callback(partial(self._answer_later, serialize, call))
            else:
                self._finish(call, serialize(answer))
        except BaseException as e:  # noqa: BLE001 - whatever it is, the caller gets an answer
            _end(call, e)

    def _answer_later(self, serialize: Method, call: Call, answer: Future[Any]) -> None:
        try:
            self._finish(call, serialize(answer.result()))
        except BaseException as e:  # noqa: BLE001 - as in `_answer`
            _end(call, e)

    def _answer_by_stream(
        self, method: Method, parse: Method, serialize: object, call: Call, message: bytes
    ) -> None:
        self._put(self._watchers, WATCHERS, call)
        try:
            method(codec.read_message(message, parse), call)
        except BaseException as e:  # noqa: BLE001 - as in `_answer`
            _end(call, e)

    def _finish(self, call: Call, message: bytes) -> None:
        # It takes memory until it is read, and no stream's window bounds that.
        self._put(self._unread, UNREAD, call, len(message))
        call.finish(message)

    def _put(self, queue: EvictionQueue[Call], kind: str, call: Call, size: int = 1) -> None:
        """Adds the call, and ends the calls that are evicted for it."""
        with self._lock:
            if call.is_over:
                return
            evicted = queue.add(call, call.address, size, time.monotonic())
        for evictee in evicted:
            if queue is self._unread:
                evictee.context.cancel()  # its status is already queued, behind the unread answer
            else:
                evictee.fail(CrowdedOut(f"too many {kind} are open"))
            self._request_log.crowded_out(kind, 1, evictee.address)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, for the names that were set; Watch holds no thread.

    gRPC's own remembers every name it was ever asked for, and sends while it holds a lock, which
    can block gRPC's serving thread.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[str, int] = {}
        self._watchers: dict[Call, _Watcher] = {}
        for name in ("Check", "Watch"):
            setattr(self, name, on_threads_of(pool, getattr(self, name)))

    def set(self, name: str, status: int) -> None:
        """Also sends the status to the watchers of the name."""
        with self._lock:
            self._statuses[name] = status
            watchers = [watcher for watcher in self._watchers.values() if watcher.name == name]
        for watcher in watchers:
            watcher.send(status)

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    def Watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        with self._lock:
            status = self._statuses.get(request.service)
            if status is not None:
                watcher = self._watchers[call] = _Watcher(call, request.service)
            else:  # not a name of this process: answered, not remembered
                watcher, status = _Watcher(call, ""), health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if not call.context.add_callback(partial(self._forget, call)):
            self._forget(call)
        watcher.send(status)

    def _forget(self, call: Call) -> None:
        with self._lock:
            self._watchers.pop(call, None)


class _Watcher:
    """Sends one call the newest status, one message at a time."""

    def __init__(self, call: Call, name: str) -> None:
        self.name = name
        self._call = call
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._sending = False

    def send(self, status: int) -> None:
        with self._lock:
            self._newest = status
            if self._sending:
                return
            self._sending = True
        self._next(True)

    def _next(self, is_open: bool) -> None:
        with self._lock:
            status, self._newest = self._newest, None
            has_status = self._sending = is_open and status is not None
        if has_status:
            response = health_pb2.HealthCheckResponse(status=status)
            self._call.send(response.SerializeToString(), self._next)


def on_threads_of(pool: ThreadPoolExecutor, method: Method) -> Method:
    """The method, served by `pool`, so that waiting requests do not hold it up."""

    def served(request: object, about: object) -> object:
        return method(request, about)

    served.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return served


class _InlineExecutor(ThreadPoolExecutor):
    """Runs each job at once, on the caller's thread: `begin` never blocks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **named))
        except BaseException as e:  # noqa: BLE001 - as a pool does
            done.set_exception(e)
        return done


_INLINE = _InlineExecutor(1)
_NO_FLAGS = 0


def _on_received(
    state: Any, finish: Method, callback: Callable[[bytes | None], None], event: object
) -> Any:
    done = finish(event)
    with state.condition:
        message, state.request = state.request, None
    _call_safely(callback, message)
    return done


def _on_sent(state: Any, finish: Method, callback: Callable[[bool], None], event: object) -> Any:
    done = finish(event)
    _call_safely(callback, _server._is_rpc_state_active(state))
    return done


def _call_safely(callback: Callable[[Any], None], value: object) -> None:
    try:
        callback(value)
    except Exception:  # or gRPC's serving thread would end, and the whole server with it
        log.exception("a callback failed; its call is left as it is")


def _submit(pool: ThreadPoolExecutor, call: Call, serve: Method, *args: object) -> None:
    try:
        pool.submit(serve, *args)
    except RuntimeError:  # the pool is shut down: the process is stopping
        call.context.cancel()


def _end(call: Call, error: BaseException) -> None:
    """Ends the call with what its method raised, or the status that `context.abort` has set."""
    if isinstance(error, OverlayError):
        call.fail(error)
    elif call.context.code() is not None:
        call.finish()
    else:
        call.fail(unexpected(error))
