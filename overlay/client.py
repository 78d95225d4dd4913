"""The client library: `connect("host:port")` gives a Client that any number of threads may share.

    with overlay.connect("192.168.1.1:50051") as client:
        answer = client.call(b"hello")
        print(answer.result, answer.coverage, answer.missing)
        for thumbnail in client.map("pictures", photos):
            ...

A call has an answer or raises a CallFailed that says what happened and whether a handler saw the
request; every call has a deadline. A request is sent again only on proof that it did not run.

All requests of a client share one stream, whose threads overlay.calls owns; metrics and health are
calls of their own.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import queue
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay import wire
from overlay.admission import HIGHEST_PRIORITY
from overlay.calls import RETRY_PAUSE_S, Calls, Came
from overlay.errors import OverlayError
from overlay.limits import Limits
from overlay.orders import Kind, Order
from overlay.parts import Parts
from overlay.values import Code, Executed, Failure, Hop, Mode, Part, Route

DEFAULT_TIMEOUT_S = Limits().default_deadline_s
# A process that is being restarted is back within this. Windows takes 2 s to report a refused port.
PATIENCE_S = 2.5
PROMPT_S = 0.25  # a connection that takes longer is looked into meanwhile
PAUSE_S = 0.02  # how long a map waits for results before it asks again for payloads
NOTHING_YET: Any = object()
"""What a map's payloads may give when there is none at this moment: results are given meanwhile."""
FRESH_S = 1.0  # so long after an answer the connection counts as up; later a call greets first


@dataclass(frozen=True)
class Answer:
    """What came back. parts: every worker asked, in the order of the configuration.

    result: ALL: merged, or joined by newlines; ANY: the worker's own bytes. A part's own `result`
    is filled only with want_parts. hops: the processes that took part, the one asked first. trace:
    with want_trace, what the way took at each of them.
    """

    result: bytes
    parts: tuple[Part, ...]
    hops: tuple[str, ...]
    request_id: int
    trace: tuple[Hop, ...] = ()

    @property
    def coverage(self) -> tuple[int, int]:
        """(answered, asked), counted in workers."""
        return sum(part.ok for part in self.parts), len(self.parts)

    @property
    def missing(self) -> tuple[Part, ...]:
        """The workers that did not answer, each with its code and reason."""
        return tuple(part for part in self.parts if not part.ok)


class Incomplete(bytes):
    """The result, in a map or a Future, of a request to all that some workers did not answer."""

    missing: tuple[Part, ...] = ()


class CallFailed(OverlayError):
    """A call without an answer; itself for every code without a class of its own below.

    executed: NO is proof that no handler saw the request.
    """

    executed = Executed.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: Code = Code.UNKNOWN,
        executed: Executed = Executed.UNKNOWN,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code
        self.executed = executed


class InvalidCall(CallFailed):
    """The request itself is not right."""


class NameNotFound(CallFailed):
    """No such team, handler or worker."""


class Refused(CallFailed):
    """The queue is full or its time too short; no handler saw it, and later is worth a try."""


class Unavailable(CallFailed):
    """The process asked is stopping, or the connection or all workers were lost."""


class NotReached(Unavailable):
    """Nothing serves at the address: the request never left this machine."""


class HandlerFailed(CallFailed):
    """The handler raised; the message has the id under which the process's log says more."""


class DeadlinePassed(CallFailed):
    """No answer in time; work may have begun."""


class CallCancelled(CallFailed):
    """The client was closed before the answer came."""


def connect(address: str, *, patience_s: float = PATIENCE_S) -> Client:
    """A client for the process at `host:port`. Does not wait: the first call does.

    patience_s: how long a call waits for a connection that is not up before it raises NotReached.
    Raises ValueError for an address that is not host:port.
    """
    split(address)
    return Client(address, patience_s)


def new_request_id() -> int:
    """One that nobody else has, for `forward`."""
    return wire.new_ids()


def read_trace(hops: Sequence[wire.pb2.Hop]) -> tuple[Hop, ...]:
    """The hops of a story that GetMetrics told."""
    return wire.read_trace(hops)


class Client(concurrent.futures.Executor):
    """The verbs of one kept connection. Safe from any thread; close() may be called twice.

    As an Executor it takes the name of a handler where others take a function (None: each worker's
    default), and payloads where others take arguments.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self._connection = Connection(address, patience_s)

    def call(
        self,
        payload: bytes | str,
        *,
        mode: str = "all",
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        want_parts: bool = False,
        idempotency_key: str = "",
        priority: int = 0,
    ) -> Answer:
        """Asks every worker in scope (mode "all") or the least loaded one ("any").

        payload: text is sent as UTF-8. team, handler: names of the configuration; empty for every
        team and each worker's default. timeout: seconds, the wait for the connection included.
        idempotency_key: asked again with it, also after a failure, the same request runs no second
        time within ten minutes and has the same answer. priority: 0 to 9, among this client's own
        requests; each step is worth two seconds of waiting. Raises CallFailed, whose subclasses
        mirror the statuses.
        """
        if idempotency_key:
            return self.forward(
                payload,
                mode=mode,
                team=team,
                handler=handler,
                timeout=timeout,
                want_parts=want_parts,
                idempotency_key=idempotency_key,
                priority=priority,
            )
        body, timeout_s = as_bytes(payload), as_timeout(timeout)
        deadline = time.monotonic() + timeout_s
        waiter = _Waiter()
        kind = kind_of(mode, team, handler, want_parts, priority)
        order = Order(kind, (body,), deadline, waiter.deliver, wakes_a_thread=True)
        self._connection.send(order, timeout_s)
        try:
            came = waiter.wait()
        except BaseException:  # Ctrl-C: nobody waits any more
            self._connection.cancel(order)
            raise
        return self._connection.read(*came, timeout_s)

    def forward(
        self,
        payload: bytes | str,
        *,
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
        route = kind_of(mode, team, handler, want_parts, priority).route
        request = wire.pb2.Request(
            payload=as_bytes(payload),
            mode=route.mode.name,
            team=team,
            handler=handler,
            want_parts=want_parts,
            idempotency_key=idempotency_key,
            priority=priority,
            want_trace=want_trace,
            request_id=request_id,
        )
        response = self._connection.forward(request, as_timeout(timeout))
        read = wire.read_response(response)
        trace = wire.read_trace(response.trace)
        return Answer(response.result, read.parts, read.hops, response.request_id, trace)

    def submit(  # type: ignore[override]
        self,
        handler: str | None,
        payload: bytes | str,
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> Future[bytes]:
        """A Future of the result, of one worker (mode "any") or of all.

        Its exception is a CallFailed; its cancel() ends the work. Raises NotReached when nobody
        serves at the address.
        """
        body, timeout_s = as_bytes(payload), as_timeout(timeout)
        kind = kind_of(mode, team, handler or "", False, priority)
        reply = _Reply(self._connection, timeout_s)
        deadline = time.monotonic() + timeout_s
        reply.order = Order(kind, (body,), deadline, reply.deliver)
        self._connection.send(reply.order, timeout_s)
        return reply

    def map(  # type: ignore[override]
        self,
        handler: str | None,
        payloads: Iterable[bytes | str],
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        priority: int = 0,
    ) -> Iterator[bytes]:
        """The results of many payloads, in their order; at most `window` are in flight at once.

        timeout: seconds for each. The payloads are taken as the results are, never all at once.
        The first failure is raised in its place and cancels the rest, as leaving the loop does.
        Raises NotReached when nobody serves at the address, after what was sent has been given.
        chunksize: payloads per message; 0 lets the library choose.
        """
        options = (mode, team, timeout, window, chunksize, priority)
        return _raising(self._map(handler, payloads, *options, ordered=True))

    def map_as_completed(
        self,
        handler: str | None,
        payloads: Iterable[bytes | str],
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        ordered: bool = False,
        priority: int = 0,
    ) -> Iterator[tuple[int, bytes | CallFailed]]:
        """As `map`, but (index, result) as they come, and a failure is given, not raised."""
        options = (mode, team, timeout, window, chunksize, priority)
        return self._map(handler, payloads, *options, ordered=ordered)

    def parts(
        self,
        payload: bytes | str,
        *,
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        first: int | None = None,
        priority: int = 0,
    ) -> Iterator[Part]:
        """Asks every worker in scope, and gives each one's part as soon as it has come.

        Nothing is merged, and all parts together may be larger than a message. Those without a
        result (`not part.ok`) come last; raises CallFailed when no worker has answered. After
        `first` good parts, or when the loop is left, the others' work is ended.
        """
        kind, parts = kind_of("all", team, handler, False, priority, True), Parts(first)
        return self._parts(kind, as_bytes(payload), as_timeout(timeout), parts)

    def metrics(
        self, *, timeout: float | None = None, events: int = 0, requests: int = 0
    ) -> wire.pb2.MetricsResponse:
        """What the process says of itself, as overlay.proto describes it.

        events, requests: how many of the last ones are wanted.
        """
        request = wire.pb2.MetricsRequest(events=events, requests=requests)
        return self._connection.metrics(request, as_timeout(timeout))

    def logs(
        self,
        process_id: str = "",
        *,
        lines: int = 0,
        request_id: int = 0,
        timeout: float | None = None,
    ) -> wire.pb2.LogsResponse:
        """The last lines that this process logged, or one below it; as overlay.proto says.

        lines: how many, 0 for a hundred. request_id: only those about this request.
        """
        wanted = wire.pb2.LogsRequest(process_id=process_id, lines=lines, request_id=request_id)
        return self._connection.logs(wanted, as_timeout(timeout))

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """What the standard health service says: False while the process stops."""
        return self._connection.is_serving(as_timeout(timeout))

    def drain(
        self, *, grace_s: float | None = None, wait: bool = True, timeout: float | None = None
    ) -> wire.pb2.DrainResponse:
        """Stops the process as SIGTERM does, and says what came of it; from its own machine only.

        grace_s: what runs may take so long, None for the configured time. Without wait it returns
        when the stopping has begun. The process itself ends a moment after the answer.
        """
        request = wire.pb2.DrainRequest(grace_s=grace_s, no_wait=not wait)
        return self._connection.drain(request, as_timeout(timeout))

    def close(self) -> None:
        """Ends the connection; what has no answer yet fails with CallCancelled."""
        self._connection.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Executor's close: waits for what was submitted, unless it is told not to."""
        if wait and not cancel_futures:
            self._connection.wait_until_idle()
        self.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _parts(self, kind: Kind, body: bytes, timeout_s: float, parts: Parts) -> Iterator[Part]:
        box: queue.SimpleQueue[tuple[bool, Any, int]] = queue.SimpleQueue()
        order = Order(
            kind,
            (body,),
            time.monotonic() + timeout_s,
            lambda rows, came, at, request_id: box.put((True, came, at)),
            early=lambda rows, came, at, request_id: box.put((False, came, at)),
        )
        self._connection.send(order, timeout_s)
        is_last = False
        try:
            while not (is_last or parts.is_over):
                with suppress(queue.Empty):  # in slices, so that Ctrl-C works on Windows too
                    is_last, came, at = box.get(timeout=0.5)
                    yield from parts.last(came, at) if is_last else parts.early(came, at)
            if is_last and isinstance(came, Failure):
                raise self._connection.failed(came, timeout_s)
        finally:
            if not is_last:
                self._connection.cancel(order)

    def _map(
        self,
        handler: str | None,
        payloads: Iterable[bytes | str],
        mode: str,
        team: str,
        timeout: float | None,
        window: int,
        chunksize: int,
        priority: int,
        ordered: bool,
    ) -> Iterator[tuple[int, bytes | CallFailed]]:
        kind = kind_of(mode, team, handler or "", False, priority)
        timeout_s = as_timeout(timeout)
        mapping = _Mapping(self._connection, kind, timeout_s, chunk_of(window, chunksize), window)
        return mapping.run(iter(payloads), ordered)


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
    """The Future of one request."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        super().__init__()
        self.order: Order | None = None
        self._connection = connection
        self._timeout_s = timeout_s

    def deliver(self, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
        self.order = None  # it holds this method, and so this
        try:
            if isinstance(came, Failure):
                self.set_exception(self._connection.failed(came, self._timeout_s))
            else:
                self.set_result(_result_of(came, at))
        except InvalidStateError:
            self.set_running_or_notify_cancel()  # tells those who wait that it was cancelled

    def cancel(self) -> bool:
        order = self.order
        cancelled = super().cancel()
        if cancelled and order is not None:
            self._connection.cancel(order)
        return cancelled


class _Mapping:
    """One map: keeps its window full while its results are taken. For one thread."""

    def __init__(
        self, connection: Connection, kind: Kind, timeout_s: float, chunk: int, window: int
    ) -> None:
        self._connection = connection
        self._kind = kind
        self._timeout_s = timeout_s
        self._chunk = chunk
        self._window = window
        self._came: queue.SimpleQueue[tuple[int, Sequence[int], Any, int]] = queue.SimpleQueue()
        self._orders: dict[int, list[Any]] = {}  # first index -> the order, rows still open
        self._sent = 0
        self._open = 0
        self._early: dict[int, bytes | CallFailed] = {}
        self._bytes = 0  # of payloads that are open and results that are early
        self._mean_result = 0.0

    def run(
        self, payloads: Iterator[bytes | str], ordered: bool
    ) -> Iterator[tuple[int, bytes | CallFailed]]:
        given, more = 0, True
        not_reached: NotReached | None = None
        try:
            while more or self._open:
                pauses = False
                while more and not pauses and self._has_room():
                    try:
                        more, pauses = self._send(payloads)
                    except NotReached as e:  # what was sent is given first
                        more, not_reached = False, e
                for first, rows, results in self._some(PAUSE_S if pauses else None):
                    for index, result in zip(rows, results, strict=True):
                        index += first
                        if not ordered:
                            yield index, result
                        elif index != given:
                            self._early[index] = result
                            self._bytes += _size_of(result)
                        else:
                            yield index, result
                            given += 1
                            while self._early and given in self._early:
                                result = self._early.pop(given)
                                self._bytes -= _size_of(result)
                                yield given, result
                                given += 1
            if not_reached is not None:
                raise not_reached
        finally:
            for order, _ in self._orders.values():
                self._connection.cancel(order)

    def _has_room(self) -> bool:
        if not self._open:
            return True
        rows = self._open + len(self._early) + self._chunk
        bytes_ = self._bytes + self._open * self._mean_result
        return rows <= self._window and bytes_ < Limits.window_bytes

    def _send(self, payloads: Iterator[bytes | str]) -> tuple[bool, bool]:
        """Sends the next chunk. Whether there may be more, and whether not at once."""
        rows: list[bytes] = []
        size, pauses = 0, False
        for payload in itertools.islice(payloads, self._chunk):
            if payload is NOTHING_YET:
                pauses = True
                break
            rows.append(payload if type(payload) is bytes else as_bytes(payload))
            size += len(rows[-1])
            if size >= Limits.frame_bytes:
                break
        else:
            if len(rows) < self._chunk:
                self._send_rows(rows)
                return False, False
        self._send_rows(rows)
        return True, pauses

    def _send_rows(self, rows: list[bytes]) -> None:
        if not rows:
            return
        deadline = time.monotonic() + self._timeout_s
        first = self._sent
        order = Order(self._kind, rows, deadline, partial(self._deliver, first))
        self._connection.send(order, self._timeout_s)
        self._orders[first] = [order, len(rows)]
        self._sent += len(rows)
        self._open += len(rows)
        self._bytes += order.size

    def _deliver(
        self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> None:
        self._came.put((first, rows, came, at))

    def _some(
        self, within_s: float | None
    ) -> Iterator[tuple[int, Sequence[int], Sequence[bytes | CallFailed]]]:
        """What has come: at least one, unless nothing is open or within_s is given and over."""
        while self._open:
            try:
                # In slices, so that Ctrl-C works on Windows too.
                yield self._read(*self._came.get(timeout=within_s or 0.5))
                break
            except queue.Empty:
                if within_s is not None:
                    return
        for _ in range(self._came.qsize()):
            yield self._read(*self._came.get())

    def _read(
        self, first: int, rows: Sequence[int], came: Any, at: int
    ) -> tuple[int, Sequence[int], Sequence[bytes | CallFailed]]:
        entry, count = self._orders[first], len(rows)
        entry[1] -= count
        self._open -= count
        if not entry[1]:
            self._bytes -= entry[0].size
            del self._orders[first]
        if isinstance(came, Failure):
            return first, rows, [self._connection.failed(came, self._timeout_s) for _ in rows]
        results = _results_of(came, at, count)
        mean = sum(map(len, results)) / count
        self._mean_result += (mean - self._mean_result) * min(1.0, count / 16)
        return first, rows, results


def _results_of(came: Came, at: int, count: int) -> list[bytes]:
    if came.is_whole:
        return came.results[at : at + count]
    return [_result_of(came, row) for row in range(at, at + count)]


def _result_of(came: Came, at: int) -> bytes:
    result = came.results[at]
    if came.is_whole:
        return result
    missing = tuple(part for part in came.answers.at(at).parts if not part.ok)
    if not missing:
        return result
    incomplete = Incomplete(result)
    incomplete.missing = missing
    return incomplete


def _size_of(result: bytes | CallFailed) -> int:
    return len(result) if isinstance(result, bytes) else 0


def _raising(pairs: Iterator[tuple[int, bytes | CallFailed]]) -> Iterator[bytes]:
    try:
        for _, result in pairs:
            if isinstance(result, CallFailed):
                raise result
            yield result
    finally:
        pairs.close()  # type: ignore[attr-defined]


# gRPC heeds the first of two options of one name.
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # an office's web proxy does not lead to its own machines
    # The process asked knows the configured size and refuses what is beyond it.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    *wire.CHANNEL_OPTIONS,
]


class Connection:
    """A client's kept channel: a stream for requests, and calls for metrics and health."""

    def __init__(self, address: str, patience_s: float) -> None:
        self._address = address
        self._patience_s = patience_s
        self._answered = -FRESH_S  # when it last did; monotonic seconds
        self._closed = False
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(f"dns:///{address}", options=_OPTIONS)
        self._node = wire.pb2_grpc.OverlayNodeStub(self._channel)
        self._single_channel: grpc.Channel | None = None
        self._admin = wire.pb2_grpc.OverlayAdminStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._calls: Calls | None = None

    def send(self, order: Order, timeout_s: float) -> None:
        """Raises NotReached when nobody serves at the address."""
        calls = self.begin() if self._calls is None or self._closed else self._calls
        if not calls.connected.is_set():
            self.wait_connected(calls, min(self._patience_s, timeout_s))
        calls.send(order)

    def cancel(self, order: Order, rows: Sequence[int] = ()) -> None:
        if self._calls is not None:
            self._calls.cancel(order, rows or order.rows)

    def read(self, came: Any, at: int, request_id: int, timeout_s: float) -> Answer:
        """What was delivered, as an Answer. Raises CallFailed."""
        if isinstance(came, Failure):
            raise self.failed(came, timeout_s)
        answer = came.answers.at(at)
        return Answer(came.results[at], answer.parts, answer.hops, request_id)

    def read_result(self, came: Any, at: int, request_id: int, timeout_s: float) -> bytes:
        """As `read`, but the result only; an Incomplete where a worker is missing."""
        if isinstance(came, Failure):
            raise self.failed(came, timeout_s)
        return _result_of(came, at)

    def failed(self, failure: Failure, timeout_s: float) -> CallFailed:
        reason = failure.reason
        if failure.code is Code.DEADLINE_EXCEEDED and not reason:
            reason = f"no answer from {self._address} within {timeout_s:g} s"
        return _error(failure, reason)

    def wait_until_idle(self) -> None:
        while not self._closed and self._calls is not None and self._calls.open_rows:
            time.sleep(0.01)

    def begin(self) -> Calls:
        with self._lock:
            if self._closed:
                raise _error(Failure(Code.CANCELLED, "", Executed.NO), "this client is closed")
            if self._calls is None:
                calls = Calls(self._channel, self._address)
                calls.start()
                self._calls = calls
            return self._calls

    def wait_connected(self, calls: Calls, patience_s: float) -> None:
        """Raises NotReached with the reason, when the connection does not come up in time."""
        until = time.monotonic() + patience_s
        if calls.connected.wait(min(PROMPT_S, patience_s)):
            return
        doubt = _Doubt(self._address, until)
        while (left_s := until - time.monotonic()) > 0 and not self._closed:
            if calls.connected.wait(min(0.25, left_s)):
                return
            refused = calls.refused
            if refused is not None and refused.code not in (Code.UNAVAILABLE, Code.CANCELLED):
                raise _error(refused, _no_overlay(refused, self._address))
        if self._closed:
            raise _error(Failure(Code.CANCELLED, "", Executed.NO), "this client was closed")
        reason, refused = doubt.reason(), calls.refused
        if refused is not None and refused.executed is Executed.NO and not doubt.is_settled:
            raise _error(refused, refused.reason)  # the process's own words: it is stopping
        raise NotReached(reason, code=Code.UNAVAILABLE, executed=Executed.NO)

    def forward(self, request: wire.pb2.Request, timeout_s: float) -> wire.pb2.Response:
        until = time.monotonic() + timeout_s
        patient_until = time.monotonic() + min(self._patience_s, timeout_s)
        while True:
            try:
                left_s = max(0.001, until - time.monotonic())
                return cast(wire.pb2.Response, self._ask(self._single.Forward, request, left_s))
            except NotReached:
                raise
            except Unavailable as e:
                pause_s = e.retry_after_s or RETRY_PAUSE_S
                if e.executed is not Executed.NO or time.monotonic() + pause_s > patient_until:
                    raise
                time.sleep(pause_s)

    def drain(self, request: wire.pb2.DrainRequest, timeout_s: float) -> wire.pb2.DrainResponse:
        return cast(wire.pb2.DrainResponse, self._ask(self._admin.Drain, request, timeout_s))

    def logs(self, request: wire.pb2.LogsRequest, timeout_s: float) -> wire.pb2.LogsResponse:
        return cast(wire.pb2.LogsResponse, self._ask(self._admin.Logs, request, timeout_s))

    def metrics(
        self, request: wire.pb2.MetricsRequest, timeout_s: float
    ) -> wire.pb2.MetricsResponse:
        found = self._ask(self._node.GetMetrics, request, timeout_s)
        return cast(wire.pb2.MetricsResponse, found)

    def is_serving(self, timeout_s: float) -> bool:
        found = self._ask(self._health.Check, health_pb2.HealthCheckRequest(), timeout_s)
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._calls is not None:
            self._calls.close()
        if self._single_channel is not None:
            self._single_channel.close()
        self._channel.close()

    @property
    def _single(self) -> wire.pb2_grpc.OverlayNodeStub:
        """For single requests: a channel on which gRPC itself sends one again that a closing
        connection has not taken. There is no other way to know that it did not run."""
        with self._lock:
            if self._single_channel is None and not self._closed:
                options = [("grpc.enable_retries", 1), *_OPTIONS]
                self._single_channel = grpc.insecure_channel(f"dns:///{self._address}", options)
            return wire.pb2_grpc.OverlayNodeStub(self._single_channel or self._channel)

    def _ask(self, method: Any, request: Any, timeout_s: float) -> Any:
        if self._closed:
            raise CallCancelled("this client is closed", code=Code.CANCELLED, executed=Executed.NO)
        until = time.monotonic() + timeout_s
        try:
            self._make_sure(min(self._patience_s, timeout_s))
            # wait_for_ready: a connection lost just now is waited for, and the call sent once.
            left_s = max(0.001, until - time.monotonic())
            answer = method(request, timeout=left_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in _SILENT:
                self._answered = -FRESH_S
            raise _failure(error, self._address, timeout_s) from None
        except ValueError:
            if not self._closed:
                raise
            # gRPC's word for a channel that was closed meanwhile
            raise CallCancelled("this client was closed", code=Code.CANCELLED) from None
        self._answered = time.monotonic()
        return answer

    def _make_sure(self, patience_s: float) -> None:
        """Raises NotReached unless the process answered lately or does so now.

        A call itself waits for its whole deadline where nothing serves, and then cannot tell
        whether it was ever sent.
        """
        if time.monotonic() - self._answered < FRESH_S:
            return
        until = time.monotonic() + patience_s
        if self._is_greeted(min(PROMPT_S, patience_s)):
            return
        doubt = _Doubt(self._address, until)
        while (left_s := until - time.monotonic()) > 0:
            if self._is_greeted(left_s):
                return
            time.sleep(min(0.05, left_s))
        raise NotReached(doubt.reason(), code=Code.UNAVAILABLE, executed=Executed.NO)

    def _is_greeted(self, within_s: float) -> bool:
        """Whether a gRPC server answers, whatever it answers."""
        try:
            self._health.Check(
                health_pb2.HealthCheckRequest(), timeout=within_s, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return error.code() not in _SILENT
        return True


# After these, whether anybody is there is open; every other status is an answer.
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class _Doubt:
    """Why gRPC gets no connection: tries a plain one on a thread that ends by `until`.

    is_settled: nobody listens there.
    """

    is_settled = False

    def __init__(self, address: str, until: float) -> None:
        self._until = max(until, time.monotonic() + 0.05)  # a refusal nearby takes no longer
        self._reason = f"{address} does not answer: wrong address, machine off, or a firewall"
        self._thread = threading.Thread(
            target=self._look, args=(address,), name="overlay-doubt", daemon=True
        )
        self._thread.start()

    def reason(self) -> str:
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._reason

    def _look(self, address: str) -> None:
        try:
            left_s = max(0.01, self._until - time.monotonic())
            socket.create_connection(split(address), left_s).close()
        except ConnectionRefusedError:
            self._reason = f"nothing serves at {address}: the connection was refused"
            self.is_settled = True
        except (socket.gaierror, UnicodeError):
            self._reason = f"the host of {address} is not known by name on this machine"
        except TimeoutError:
            pass
        except OSError as error:
            self._reason = f"{address} cannot be reached: {error.strerror or error}"
        else:
            self._reason = f"what listens at {address} does not speak gRPC, or is stuck"


def _failure(error: Any, address: str, timeout_s: float) -> CallFailed:
    """gRPC's error as ours. Only the trailer proves that no handler ran; no code does."""
    said = wire.read_error(error)
    after_s = wire.retry_after_s(error.trailing_metadata())
    failure = Failure(said.code, said.reason, said.executed, after_s)
    return _error(failure, _sentence(error, said, address, timeout_s))


def _error(failure: Failure, sentence: str) -> CallFailed:
    kind = _KINDS.get(failure.code, CallFailed)
    if kind is Refused and failure.executed is not Executed.NO:
        kind = CallFailed  # such as an answer too large for a process on its way
    return kind(
        sentence,
        code=failure.code,
        executed=failure.executed,
        retry_after_s=failure.retry_after_s,
    )


def _no_overlay(failure: Failure, address: str) -> str:
    if failure.code is Code.UNIMPLEMENTED:
        return f"what serves at {address} is not a process of an overlay, or an older one"
    return failure.reason


_KINDS: dict[Code, type[CallFailed]] = {
    Code.INVALID_ARGUMENT: InvalidCall,
    Code.NOT_FOUND: NameNotFound,
    Code.RESOURCE_EXHAUSTED: Refused,
    Code.UNAVAILABLE: Unavailable,
    Code.INTERNAL: HandlerFailed,
    Code.DEADLINE_EXCEEDED: DeadlinePassed,
    Code.CANCELLED: CallCancelled,
}


def _sentence(error: Any, said: Part, address: str, timeout_s: float) -> str:
    """The process's own words where it had some; else ours in place of gRPC's."""
    if said.code is Code.UNIMPLEMENTED:
        return f"what serves at {address} is not a process of an overlay, or an older one"
    if said.code is Code.CANCELLED:
        return "this client was closed before the answer came"
    if said.code is Code.DEADLINE_EXCEEDED and said.reason == "Deadline Exceeded":
        return f"no answer from {address} within {timeout_s:g} s"
    if said.code is Code.UNAVAILABLE and not error.trailing_metadata():
        return f"no answer from {address}: {said.reason}"
    return said.reason


def as_bytes(payload: object) -> bytes:
    if isinstance(payload, str):
        return payload.encode()
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    raise TypeError(f"a payload is bytes or str, not {type(payload).__name__}")


@functools.lru_cache(256)
def kind_of(
    mode: str,
    team: str,
    handler: str,
    want_parts: bool,
    priority: int = 0,
    as_they_come: bool = False,
) -> Kind:
    if mode not in ("all", "any"):
        raise ValueError(f"mode {mode!r} is not 'all' or 'any'")
    route = Route(Mode[mode.upper()], _as_name("team", team), _as_name("handler", handler))
    if not 0 <= priority <= HIGHEST_PRIORITY:
        raise ValueError(f"priority {priority} is not 0 to {HIGHEST_PRIORITY}")
    return Kind(route, want_parts, priority, as_they_come)


def _as_name(what: str, name: object) -> str:
    if callable(name):
        raise TypeError(f"code does not travel: name a {what} of the configuration")
    if not isinstance(name, str):
        raise TypeError(f"a {what} is named by a str, not {type(name).__name__}")
    name.encode()  # raises UnicodeEncodeError, a ValueError, for what is not text
    return name


def chunk_of(window: int, chunksize: int) -> int:
    """How many of a map's payloads travel together."""
    if window < 1 or chunksize < 0:
        raise ValueError(f"window {window} is not above 0, or chunksize {chunksize} is below")
    return min(chunksize or max(1, min(512, window // 4)), window)


def as_timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"a timeout of {timeout:g} s is not above 0")
    return float(timeout)


def split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"'{address}' is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"'{address}' is not host:port; write an IPv6 host in brackets")
    return host.strip("[]"), int(port)
