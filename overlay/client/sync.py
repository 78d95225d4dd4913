"""The client library: `connect("host:port")` gives a Client that any number of threads may share.

    with overlay.connect("192.168.1.1:50051") as client:
        answer = client.call(b"hello")
        print(answer.result, answer.coverage, answer.missing)
        for thumbnail in client.map("pictures", photos):
            ...

A call has an answer or raises a CallFailed that says what happened and whether a handler saw the
request; every call has a deadline. A request is sent again only on proof that it did not run.

All requests of a client share one stream, whose threads client.submitter owns; metrics and health
are calls of their own.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

from overlay.client.arguments import (
    DEFAULT_TIMEOUT_S,
    HIGHEST_ID,
    MapAsked,
    as_address,
    as_body,
    as_first,
    as_flag,
    as_grace,
    as_id,
    as_key,
    as_patience,
    as_payloads,
    as_timeout,
    as_whole,
    check_mode_of_args,
    handler_of,
    kind_of,
    map_of,
    parts_wanted,
)
from overlay.client.callbacks import Callbacks
from overlay.client.connection import PATIENCE_S, Connection
from overlay.client.map_window import NOTHING_YET, MapRun, raising, with_values
from overlay.client.outbox import CallKind, Submission
from overlay.client.partials import Parts
from overlay.client.results import (
    NOT_PICKLED,
    Answer,
    CallCancelled,
    CallFailed,
    DeadlinePassed,
    HandlerFailed,
    Incomplete,
    InvalidCall,
    NameNotFound,
    NoSuchHost,
    NotReached,
    Refused,
    Unavailable,
    result_of,
    value_of,
)
from overlay.model import clocks as time
from overlay.model.segments import Failure, Hop, Part
from overlay.transport import codec
from overlay.transport.channels import split

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "NOTHING_YET",
    "Answer",
    "CallCancelled",
    "CallFailed",
    "Client",
    "DeadlinePassed",
    "HandlerFailed",
    "Incomplete",
    "InvalidCall",
    "NameNotFound",
    "NoSuchHost",
    "NotReached",
    "Refused",
    "Unavailable",
    "connect",
]

Args = Mapping[str, Any]
"""The arguments of a typed function, by name; whatever pydantic can write as JSON."""


def connect(address: str, *, patience_s: float = PATIENCE_S) -> Client:
    """A client for the process at `host:port`. Does not wait: the first call does.

    patience_s: how long a call waits for a connection that is not up before it raises NotReached.
    Raises ValueError for an address that is not host:port, RuntimeError where gevent or eventlet
    has replaced the threads that gRPC needs.
    """
    address, patience_s = as_address(address), as_patience(patience_s)
    split(address)
    return Client(address, patience_s)


def new_request_id() -> int:
    """One that nobody else has, for `forward`."""
    return codec.new_ids()


def read_trace(hops: Sequence[codec.pb2.Hop]) -> tuple[Hop, ...]:
    """The hops of a story that GetMetrics told."""
    return codec.read_trace(hops)


class Client(concurrent.futures.Executor):
    """The verbs of one kept connection. Safe from any thread; close() may be called twice.

    As an Executor it takes the name of a handler where others take a function (None: each worker's
    default), and payloads where others take arguments.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self._patience_s = patience_s
        self._connection = Connection(address, patience_s)
        self._asked = weakref.ref(self._connection)  # also after a shutdown

    @property
    def shown(self) -> str:
        """The address, with what its name stands for on this machine as far as that is known."""
        return self._connection.shown

    def call(
        self,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "all",
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        want_parts: bool = False,
        idempotency_key: str = "",
        priority: int = 0,
    ) -> Answer:
        """Asks every worker in scope (mode "all") or the least loaded one ("any").

        payload: text is sent as UTF-8. args: instead of it, the arguments of a typed function by
        name; the answer's `value` or `values` are what it returned. team, handler: names of the
        configuration; empty for every team and each worker's default. timeout: seconds, the wait
        for the connection included.
        idempotency_key: asked again with it, also after a failure, the same request runs no second
        time within ten minutes and has the same answer. priority: 0 to 9, among this client's own
        requests; each step is worth two seconds of waiting. Raises CallFailed, whose subclasses
        mirror the statuses.
        """
        if as_key(idempotency_key):
            return self.forward(
                payload,
                args=args,
                mode=mode,
                team=team,
                handler=handler,
                timeout=timeout,
                want_parts=want_parts,
                idempotency_key=idempotency_key,
                priority=priority,
            )
        body, timeout_s = as_body(payload, args), as_timeout(timeout)
        deadline = time.monotonic() + timeout_s
        waiter = _Waiter()
        want_parts = parts_wanted(want_parts, args, mode)
        kind = kind_of(mode, team, handler, want_parts, priority)
        order = Submission(kind, (body,), deadline, waiter.deliver, wakes_a_thread=True)
        self._connection.send(order, timeout_s)
        try:
            came = waiter.wait()
        except BaseException:  # Ctrl-C: nobody waits any more
            self._connection.cancel(order)
            raise
        return self._connection.read(*came, timeout_s)

    def forward(
        self,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "all",
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        want_parts: bool = False,
        idempotency_key: str = "",
        priority: int = 0,
        want_trace: bool = False,
        request_id: int = 0,
    ) -> Answer:
        """As `call`, by a unary Forward of its own, as any gRPC client asks.

        So it stands in the leader's queue, and is Refused when all its slots are taken, where a
        call waits in the stream's window. On proof that nothing ran, an Unavailable one is sent
        again for as long as a connection is waited for. want_trace: fill the answer's trace, and
        leave a line in each process's log. request_id: to know it before there is an answer; it
        must be nobody else's.
        """
        want_parts = parts_wanted(want_parts, args, mode)
        kind = kind_of(mode, team, handler, want_parts, priority)
        request = codec.pb2.Request(
            payload=as_body(payload, args),
            mode=kind.route.mode.name,
            team=kind.route.team,
            handler=kind.route.handler,
            want_parts=kind.want_parts,
            idempotency_key=as_key(idempotency_key),
            priority=kind.priority,
            want_trace=as_flag("want_trace", want_trace),
            request_id=as_whole("request_id", request_id, most=HIGHEST_ID),
        )
        try:
            response = self._connection.forward(request, as_timeout(timeout))
        except CallFailed as e:
            if not isinstance(e, NotReached):
                e.request_id = e.request_id or request_id
            raise
        read = codec.read_response(response)
        trace = codec.read_trace(response.trace)
        return Answer(response.result, read.parts, read.hops, response.request_id, trace)

    def submit(  # type: ignore[override]
        self,
        handler: str | None,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> Future[Any]:
        """A Future of the result, of one worker (mode "any") or of all.

        The result is bytes; with `args` the JSON value that a typed function returned. Its
        exception is a CallFailed; its cancel() ends the work. Raises NotReached when nobody serves
        at the address.
        """
        body, timeout_s = as_body(payload, args), as_timeout(timeout)
        kind = kind_of(mode, team, handler_of(handler), False, priority)
        check_mode_of_args(args, mode)
        reply = (_Reply if args is None else _ValueReply)(self._connection, timeout_s)
        deadline = time.monotonic() + timeout_s
        reply.order = Submission(kind, (body,), deadline, reply.deliver)
        replies = self._connection.replies
        replies.add(reply)
        try:
            self._connection.send(reply.order, timeout_s)
        except BaseException:  # nobody has it
            replies.discard(reply)
            raise
        return reply

    def map(  # type: ignore[override]
        self,
        handler: str | None,
        payloads: Iterable[bytes | str] | None = None,
        *,
        args: Iterable[Args] | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> Iterator[Any]:
        """The results of many payloads, in their order; at most `window` are in flight at once.

        args: instead of payloads, the arguments of a typed function for each call; the results are
        the JSON values that it returned, else bytes. timeout: seconds for each. The payloads are
        taken as the results are, never all at once. The first failure is raised in its place and
        cancels the rest, as leaving the loop does. chunksize: payloads per message; 0 lets the
        library choose.

        When the process asked is lost on the way, what was under way fails, and the rest goes on
        when it is back. patience_s: how long it is waited for, 30 s (or the client's own patience,
        if that is longer) when it is not given; then raises NotReached, which tells how many were
        answered, after what was sent has been given.
        """
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        asked = map_of(handler, payloads, args, *options)
        return raising(self._map(*asked, has_values=args is not None, ordered=True))

    def map_as_completed(
        self,
        handler: str | None,
        payloads: Iterable[bytes | str] | None = None,
        *,
        args: Iterable[Args] | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        ordered: bool = False,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `map`, but (index, result) as they come, and a failure is given, not raised.

        Only that nobody serves at the address, or not again within the patience, is raised: each
        payload that was taken has its result then.
        """
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        asked = map_of(handler, payloads, args, *options)
        return self._map(*asked, has_values=args is not None, ordered=ordered)

    def parts(
        self,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        first: int | None = None,
        priority: int = 0,
    ) -> Iterator[Part]:
        """Asks every worker in scope, and gives each one's part as soon as it has come.

        Nothing is merged, and all parts together may be larger than a message. Those without a
        result (`not part.ok`) come last; raises CallFailed when no worker has answered. After
        `first` good parts, or when the loop is left, the others' work is ended. args: as in `call`;
        each part's `value` is what the function returned there, and each item that it yields is a
        part of its own, given when it is there.
        """
        kind = kind_of("all", team, handler, False, priority, True)
        parts, body = Parts(as_first(first), in_items=args is not None), as_body(payload, args)
        return _parts(self._connection, kind, body, as_timeout(timeout), parts)

    def metrics(
        self,
        *,
        timeout: float | None = None,
        events: int = 0,
        requests: int = 0,
        functions: bool = False,
    ) -> codec.pb2.MetricsResponse:
        """What the process says of itself, as overlay.proto describes it.

        events, requests: how many of the last ones are wanted. functions: whether what the
        handlers' functions are like is.
        """
        request = codec.pb2.MetricsRequest(
            events=as_whole("events", events),
            requests=as_whole("requests", requests),
            functions=as_flag("functions", functions),
        )
        return self._connection.metrics(request, as_timeout(timeout))

    def logs(
        self,
        process_id: str = "",
        *,
        lines: int = 0,
        request_id: int = 0,
        error_id: str = "",
        timeout: float | None = None,
    ) -> codec.pb2.LogsResponse:
        """The last lines that this process logged, or one below it; as overlay.proto says.

        lines: how many, 0 for a hundred. request_id: only those about this request. error_id: only
        those that name this error.
        """
        wanted = codec.pb2.LogsRequest(
            process_id=as_id(process_id),
            lines=as_whole("lines", lines),
            request_id=as_whole("request_id", request_id, most=HIGHEST_ID),
            error_id=as_id(error_id),
        )
        return self._connection.logs(wanted, as_timeout(timeout))

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """What the standard health service says: False while the process stops."""
        return self._connection.is_serving(as_timeout(timeout))

    def drain(
        self, *, grace_s: float | None = None, wait: bool = True, timeout: float | None = None
    ) -> codec.pb2.DrainResponse:
        """Stops the process as SIGTERM does, and says what came of it; from its own machine only.

        grace_s: what runs may take so long, None for the configured time. Without wait it returns
        when the stopping has begun. The process itself ends a moment after the answer.
        """
        no_wait = not as_flag("wait", wait)
        request = codec.pb2.DrainRequest(grace_s=as_grace(grace_s), no_wait=no_wait)
        return self._connection.drain(request, as_timeout(timeout))

    def close(self) -> None:
        """Ends the connection at once; what has no answer yet fails with CallCancelled."""
        connection = self._asked()
        if connection is not None:
            connection.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Executor's: takes nothing new, and ends the connection when all that was asked has an
        answer.

        That goes for what a map, made before, still has to send, as long as the map is held. wait:
        until what is under way is answered, and the callbacks have run. cancel_futures: each Future
        that is not done is cancelled, also one whose handler runs.
        """
        connection, closed = self._asked(), Connection(self.address, 0.0)
        closed.close()
        # Those who still have an answer to come hold it, and with the last of them it goes.
        self._connection = closed
        if connection is None:
            return
        for reply in list(connection.replies) if cancel_futures and not connection.is_left else ():
            reply.cancel()
        if wait:
            connection.wait_until_idle()
            if not connection.maps:
                connection.close()

    def __reduce__(self) -> tuple[type[Client], tuple[str, float]]:
        return type(self), (self.address, self._patience_s)  # which connects where it arrives

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown(wait=error is None, cancel_futures=error is not None)
        if error is not None:
            self.close()

    def _map(
        self, asked: MapAsked, bodies: Any, *, has_values: bool, ordered: bool
    ) -> Iterator[tuple[int, Any]]:
        bodies, ordered = as_payloads(bodies), as_flag("ordered", ordered)
        self._connection.check_open()
        pairs = MapRun(self._connection, *asked).run(bodies, ordered)
        return with_values(pairs) if has_values else pairs


def _parts(
    connection: Connection, kind: CallKind, body: bytes, timeout_s: float, parts: Parts
) -> Iterator[Part]:
    box: queue.SimpleQueue[tuple[bool, Any, int, int]] = queue.SimpleQueue()
    order = Submission(
        kind,
        (body,),
        time.monotonic() + timeout_s,
        lambda rows, came, at, request_id: box.put((True, came, at, request_id)),
        on_partial=lambda rows, came, at, request_id: box.put((False, came, at, request_id)),
    )
    connection.send(order, timeout_s)
    is_last = False
    try:
        while not (is_last or parts.is_over):
            connection.check_here()
            with suppress(queue.Empty):  # in slices, so that Ctrl-C works on Windows too
                is_last, came, at, request_id = box.get(timeout=0.5)
                yield from parts.last(came, at) if is_last else parts.early(came, at)
        if is_last and isinstance(came, Failure):
            raise connection.failed(came, timeout_s, request_id)
    finally:
        if not is_last:
            connection.cancel(order)


class _Waiter:
    """Where a calling thread waits; a bare lock is the cheapest thing that can wake it."""

    __slots__ = ("_came", "_ready")

    def __init__(self) -> None:
        self._ready = threading.Lock()
        self._ready.acquire()
        self._came: tuple[Any, int, int] = (None, 0, 0)

    def deliver(self, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
        self._came = came, at, request_id
        self._ready.release()

    def wait(self) -> tuple[Any, int, int]:
        # In slices, so that Ctrl-C works on Windows too. Every order is delivered in the end.
        while not self._ready.acquire(timeout=0.5):
            pass
        return self._came


class _Reply(Future):  # type: ignore[type-arg]
    """The Future of one request. What is called when it is done runs where it can hold up nothing:
    not on the thread that all answers come on."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        super().__init__()
        self.order: Submission | None = None
        self.later: Callbacks | None = None  # where callbacks run while it is being delivered
        self._connection: Connection | None = connection  # until it is done, and no longer
        self._timeout_s = timeout_s

    def result(self, timeout: float | None = None) -> Any:
        self._check_here()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_here()
        return super().exception(timeout)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def deliver(self, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
        connection = self._connection
        assert connection is not None
        self.later = connection.callbacks
        try:
            if isinstance(came, Failure):
                self.set_exception(connection.failed(came, self._timeout_s, request_id))
            else:
                self.set_result(result_of(came, at))
        except InvalidStateError:
            self.set_running_or_notify_cancel()  # tells those who wait that it was cancelled
        self.order = self.later = self._connection = None  # an order holds this method
        connection.replies.discard(self)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        super().add_done_callback(partial(_call, fn))

    def cancel(self) -> bool:
        order, connection = self.order, self._connection
        cancelled = super().cancel()
        if cancelled and order is not None and connection is not None:
            connection.cancel(order)
        return cancelled

    def _check_here(self) -> None:
        if (connection := self._connection) is not None:  # it is not done
            connection.check_here()


class _ValueReply(_Reply):
    """As _Reply, of a JSON value. It is read by who asks for it: a large one takes a while."""

    _value: Any = None
    _is_read = False

    def result(self, timeout: float | None = None) -> Any:
        if not self._is_read:
            value = value_of(super().result(timeout))
            if isinstance(value, CallFailed):
                raise value
            self._value, self._is_read = value, True
        return self._value


def _call(fn: Callable[[Future[Any]], object], reply: Future[Any]) -> None:
    later = reply.later if isinstance(reply, _Reply) else None
    fn(reply) if later is None else later.put(fn, reply)
