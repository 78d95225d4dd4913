"""Calls of gRPC's server that hold no thread while nothing has come, and no memory without end.

    headers --> begin, on gRPC's serving thread --> [ waits for its message, no thread ]
    message --> the method, on a thread of its pool --> its answer, now or later

gRPC for Python (1.80 to 1.85) gives a call its thread when its headers have come, and that thread
waits for the message: eight calls without one held all threads that tell a process's state. It also
keeps about 15 KB for ever of each unary message that is no protobuf, and its health service keeps
each name that it was ever asked for. So what lies between the server and the methods is here, on
grpcio's own building blocks (`_server`); tests/calls/test_reception.py says what is expected of
them.

A caller that opens more than there is room for loses its own first (calls.eviction): calls whose
message has not come, answers that are not read.

Owns no thread. Callbacks on gRPC's serving thread are marked as such; they must be quick.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc import _server
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay.calls.eviction import EvictionQueue
from overlay.calls.request_log import RequestLog, unexpected
from overlay.model import clocks as time
from overlay.model.errors import BadRequest, CrowdedOut, OverlayError
from overlay.model.limits import Limits
from overlay.transport import codec

log = logging.getLogger(__name__)

Method = Callable[..., Any]

COMING, RESTING, LEAVING = "calls without a message", "watchers", "answers that are not read"


class Call:
    """One call, in bytes. Its verbs never wait; safe from any thread.

    address: of its caller. context: what gRPC gives a method; is_over: it has ended.
    """

    __slots__ = ("_rpc", "_state", "address", "context", "is_over", "peer")

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.peer: str = context.peer()
        self.address = codec.address_in(self.peer)
        self.is_over = False
        self._state: Any = context._state
        self._rpc: Any = context._rpc_event

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Calls `then` with the next message, on gRPC's serving thread; None when none comes.

        Not before the last one has come.
        """
        state = self._state
        with state.condition:
            is_open = _server._is_rpc_state_active(state)
            if is_open:
                came = _server._receive_message(state, self._rpc.call, None)
                operations = (cygrpc.ReceiveMessageOperation(_NO_FLAGS),)
                self._rpc.call.start_server_batch(operations, partial(_came, state, came, then))
                state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
        if not is_open:
            then(None)

    def send(self, message: bytes, then: Callable[[bool], None]) -> None:
        """Calls `then` when it has left, on gRPC's serving thread; with False when it never does.

        Not before the last one has.
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
                sent = _server._send_message(state, token)
                self._rpc.call.start_server_batch(operations, partial(_sent, state, sent, then))
                state.due.add(token)
        if not is_open:
            then(False)

    def finish(self, message: bytes | None = None) -> None:
        """Ends it with the context's code, or OK; with a last message, if there is one."""
        with self._state.condition:
            if not self._state.statused:
                _server._status(self._rpc, self._state, message)

    def fail(self, error: OverlayError) -> None:
        """Ends it with the error's status."""
        self.context.set_code(codec.grpc_code(error.code))
        self.context.set_details(str(error)[: codec.LONGEST_REASON])
        self.context.set_trailing_metadata(codec.trailers(error))
        self.finish()


class Reception:
    """Takes the place of a server where generated code adds the methods of a service to it.

    What a method gets, and on which thread:

        unary            (request, context)  its pool's; it gives its answer, or a Future of it
        streams answers  (request, call)     its pool's; it sends by the Call, now or later
        streams          (call, context)     gRPC's serving thread; it must not wait there
        the same with a pool of its own: (requests, context), which it answers each by itself

    A pool of its own is its `experimental_thread_pool`; the others' is `pool`.
    """

    def __init__(
        self, server: grpc.Server, pool: ThreadPoolExecutor, limits: Limits, record: RequestLog
    ) -> None:
        """record: counts what is ended because there is too much of it."""
        self._server = server
        self._pool = pool
        self._limits = limits
        self._record = record
        self._lock = threading.Lock()
        self._coming: EvictionQueue[Call] = EvictionQueue(limits.unarrived_calls)
        self._resting: EvictionQueue[Call] = EvictionQueue(limits.resting_calls)
        self._leaving: EvictionQueue[Call] = EvictionQueue(limits.unread_bytes)
        self._peers: Counter[str] = Counter()

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Does nothing: the same methods come by name too, and are then added both ways."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        received = {name: self._received(handler) for name, handler in handlers.items()}
        generic = grpc.method_handlers_generic_handler(service, received)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, received)

    @property
    def unarrived(self) -> int:
        """Calls whose message has not come."""
        return len(self._coming)

    def open_peers(self) -> set[str]:
        """The callers with an open call, by gRPC's names for them."""
        with self._lock:
            return set(self._peers)

    def end_late(self) -> None:
        """Ends the calls whose message should have come by now."""
        patience_s = self._limits.default_deadline_s
        with self._lock:
            late = self._coming.pop_older(time.monotonic() - patience_s)
        for call in late:
            call.fail(CrowdedOut(f"no message came within {patience_s:g} s"))
            self._record.crowded_out(COMING, 1, call.address)

    def _received(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        parse, serialize = handler.request_deserializer, handler.response_serializer
        method = handler.unary_unary or handler.unary_stream or handler.stream_stream
        pool = getattr(method, "experimental_thread_pool", None)
        if handler.stream_stream is None:
            serve = self._answer if handler.unary_unary else self._hand_over
            begin = self._unary(partial(serve, method, parse, serialize), pool or self._pool)
        elif pool is not None:
            begin = self._each_alone(method, parse, serialize, pool)
        else:
            begin = method

        def served(requests: object, context: grpc.ServicerContext, send: object) -> None:
            begin(self._enter(context), context)

        served.experimental_non_blocking = True  # type: ignore[attr-defined]
        served.experimental_thread_pool = _AT_ONCE  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(served, None, None)

    # on gRPC's serving thread

    def _enter(self, context: grpc.ServicerContext) -> Call:
        call = Call(context)
        with self._lock:
            self._peers[call.peer] += 1
        context.add_callback(partial(self._leave, call))
        return call

    def _leave(self, call: Call) -> None:
        with self._lock:
            call.is_over = True
            for held in (self._coming, self._resting, self._leaving):
                held.discard(call)
            self._peers[call.peer] -= 1
            if not self._peers[call.peer]:
                del self._peers[call.peer]

    def _unary(self, serve: Callable[[Call, bytes], None], pool: ThreadPoolExecutor) -> Method:
        def begin(call: Call, context: grpc.ServicerContext) -> None:
            self._put(self._coming, COMING, call)
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
            is_waited_for = self._coming.discard(call)
        if message is None:
            if is_waited_for:
                call.fail(BadRequest("the call has no message"))
        else:
            _submit(pool, call, serve, call, message)

    def _each_alone(
        self, method: Method, parse: Method, serialize: Method, pool: ThreadPoolExecutor
    ) -> Method:
        """A method that waits for the next message, as one that nothing waits in."""

        def begin(call: Call, context: grpc.ServicerContext) -> None:
            self._put(self._resting, RESTING, call)
            call.receive(partial(came, call))

        def came(call: Call, message: bytes | None) -> None:
            if message is None:
                call.finish()
            else:
                _submit(pool, call, answer, call, message)

        def answer(call: Call, message: bytes) -> None:
            try:
                answers = method(iter([codec.read_message(message, parse)]), call.context)
                send(call, [serialize(made) for made in answers], True)
            except BaseException as e:  # noqa: BLE001 - as in `_answer`
                _end(call, e)

        def send(call: Call, answers: list[bytes], is_open: bool) -> None:
            if not is_open:
                return
            if answers:
                call.send(answers[0], partial(send, call, answers[1:]))
            else:
                call.receive(partial(came, call))

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
        except BaseException as e:  # noqa: BLE001 - whatever it was, its caller is answered
            _end(call, e)

    def _answer_later(self, serialize: Method, call: Call, answer: Future[Any]) -> None:
        try:
            self._finish(call, serialize(answer.result()))
        except BaseException as e:  # noqa: BLE001 - as in `_answer`
            _end(call, e)

    def _hand_over(
        self, method: Method, parse: Method, serialize: object, call: Call, message: bytes
    ) -> None:
        self._put(self._resting, RESTING, call)
        try:
            method(codec.read_message(message, parse), call)
        except BaseException as e:  # noqa: BLE001 - as in `_answer`
            _end(call, e)

    def _finish(self, call: Call, message: bytes) -> None:
        # Until it is read it takes memory, and no window of a stream bounds that.
        self._put(self._leaving, LEAVING, call, len(message))
        call.finish(message)

    def _put(self, queue: EvictionQueue[Call], what: str, call: Call, size: int = 1) -> None:
        """Adds the call to its kind, and ends the calls that are evicted for it."""
        with self._lock:
            if call.is_over:
                return
            gone = queue.add(call, call.address, size, time.monotonic())
        for other in gone:
            if queue is self._leaving:
                other.context.cancel()  # it has its status, behind what is not read
            else:
                other.fail(CrowdedOut(f"too many {what} are open"))
            self._record.crowded_out(what, 1, other.address)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, of the names that were ever set; Watch waits on no thread.

    gRPC's own remembers for ever each name that it was asked for, and sends while it holds a lock
    that gRPC's serving thread may need, which then stands still.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[str, int] = {}
        self._watchers: dict[Call, _Watcher] = {}
        for name in ("Check", "Watch"):
            setattr(self, name, on_threads_of(pool, getattr(self, name)))

    def set(self, name: str, status: int) -> None:
        """Sends it to the watchers of the name."""
        with self._lock:
            self._statuses[name] = status
            told = [watcher for watcher in self._watchers.values() if watcher.name == name]
        for watcher in told:
            watcher.tell(status)

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
            else:  # no name of this process: answered, and not remembered
                watcher, status = _Watcher(call, ""), health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if not call.context.add_callback(partial(self._forget, call)):
            self._forget(call)
        watcher.tell(status)

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

    def tell(self, status: int) -> None:
        with self._lock:
            self._newest = status
            if self._sending:
                return
            self._sending = True
        self._next(True)

    def _next(self, is_open: bool) -> None:
        with self._lock:
            status, self._newest = self._newest, None
            sends = self._sending = is_open and status is not None
        if sends:
            made = health_pb2.HealthCheckResponse(status=status)
            self._call.send(made.SerializeToString(), self._next)


def on_threads_of(pool: ThreadPoolExecutor, method: Method) -> Method:
    """The method, served by `pool`: waiting requests must not keep it waiting."""

    def served(request: object, about: object) -> object:
        return method(request, about)

    served.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return served


class _AtOnce(ThreadPoolExecutor):
    """Runs each job at once, on the caller's thread: what gRPC begins never waits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **named))
        except BaseException as e:  # noqa: BLE001 - as a pool does
            done.set_exception(e)
        return done


_AT_ONCE = _AtOnce(1)
_NO_FLAGS = 0


def _came(state: Any, came: Method, then: Callable[[bytes | None], None], event: object) -> Any:
    done = came(event)
    with state.condition:
        message, state.request = state.request, None
    _guarded(then, message)
    return done


def _sent(state: Any, sent: Method, then: Callable[[bool], None], event: object) -> Any:
    done = sent(event)
    _guarded(then, _server._is_rpc_state_active(state))
    return done


def _guarded(then: Callable[[Any], None], what: object) -> None:
    try:
        then(what)
    except Exception:  # or gRPC's serving thread would end, and the whole server with it
        log.exception("a call was left")


def _submit(pool: ThreadPoolExecutor, call: Call, serve: Method, *args: object) -> None:
    try:
        pool.submit(serve, *args)
    except RuntimeError:  # its threads have ended: the process stops
        call.context.cancel()


def _end(call: Call, error: BaseException) -> None:
    """Ends the call for what its method raised; `context.abort` has set its status before that."""
    if isinstance(error, OverlayError):
        call.fail(error)
    elif call.context.code() is not None:
        call.finish()
    else:
        call.fail(unexpected(error))
