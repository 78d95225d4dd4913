"""The client library: `connect("host:port")` returns a Client that any number of threads may share.

    with overlay.connect("192.168.1.1:50051") as client:
        answer = client.call(b"hello")
        print(answer.result, answer.coverage, answer.missing)
        for thumbnail in client.map("pictures", photos):
            ...

A call returns an answer, or raises a CallFailed that says what happened and whether a handler
started on the request; every call has a deadline. A request is retried only if it provably did not
run.

All requests of a client share one stream, whose threads client.submitter owns; metrics, health and
administration are unary calls.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any

from overlay.client import arguments
from overlay.client.arguments import DEFAULT_TIMEOUT_S, CallOptions, MapOptions, Resume
from overlay.client.connection import PATIENCE_S, Connection
from overlay.client.futures import CallFuture, ValueFuture
from overlay.client.job_status import JobChange, JobList, read_change, read_jobs
from overlay.client.jobs import Job, submit_many
from overlay.client.map_run import MapRun
from overlay.client.map_window import NOTHING_YET, PAUSE_S, Run
from overlay.client.outbox import Submission
from overlay.client.partials import Parts
from overlay.client.results import Answer, Incomplete
from overlay.model import clocks as time
from overlay.model.errors import (
    CallCancelled,
    CallFailed,
    DeadlinePassed,
    HandlerFailed,
    InvalidCall,
    NameNotFound,
    NoSuchHost,
    NotReached,
    Refused,
    ResumeError,
    Unavailable,
)
from overlay.model.segments import Detail, Hop, Part
from overlay.security.lookup import Tls
from overlay.transport import codec
from overlay.transport.channels import split_all

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
    "ResumeError",
    "Unavailable",
    "connect",
]

CHECK_S = 0.5  # how often a map checks that the process is there; also lets Ctrl-C in on Windows
Args = Mapping[str, Any]
"""The arguments of a typed function by name, of any type that pydantic can write as JSON."""


def connect(
    address: str, *, patience_s: float = PATIENCE_S, tls: Tls = None, lanes: bool = True
) -> Client:
    """A client for the process at `host:port`. Does not wait for the connection; calls do.

    address: of several leaders all, with commas: "a:50051,b:50051". A request goes to the first
    that answers; a job to the one that has the jobs.
    patience_s: how long a call waits for a connection that is not up before it raises NotReached.
    tls: the folder of this user's certificates. None: the folder `tls` in the current folder or
    the project's, if its configuration has that port. False: plaintext. lanes: whether short
    requests to any one worker may go straight to workers that the process lends.
    Raises ValueError for an address that is not host:port, ConfigError for unusable certificates,
    RuntimeError if gevent or eventlet has replaced the threads that gRPC needs.
    """
    address, patience_s = arguments.as_address(address), arguments.as_patience(patience_s)
    split_all(address)
    return Client(address, patience_s, arguments.as_tls(tls), arguments.as_flag("lanes", lanes))


def new_request_id() -> int:
    """A unique id, for `forward`."""
    return codec.new_ids()


def read_trace(hops: Sequence[codec.pb2.Hop]) -> tuple[Hop, ...]:
    """The hops of a request, as GetMetrics reports them."""
    return codec.read_trace(hops)


class Client(concurrent.futures.Executor):
    """One persistent connection. Safe from any thread; close() may be called twice.

    An Executor that takes the name of a handler instead of a function (None: each worker's
    default), and payloads instead of arguments.
    """

    def __init__(
        self,
        address: str,
        patience_s: float = PATIENCE_S,
        tls: Tls = None,
        lanes: bool = True,
    ) -> None:
        self.address = address
        self._patience_s = patience_s
        self._tls = tls
        self._lanes = lanes
        self._connection = Connection(address, patience_s, tls, lanes)
        self._asked = weakref.ref(self._connection)  # even after a shutdown

    @property
    def shown(self) -> str:
        """The address, with what its host name resolves to here, if that is known."""
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
        """Asks every worker in scope (mode "all"), or the least loaded one ("any").

        payload: bytes, or a str, which is sent as UTF-8. args: instead of a payload, the arguments
        of a typed function by name; the answer's `value` or `values` are what it returned.
        team, handler: names from the configuration; empty for every team, and for each worker's
        default handler. timeout: seconds, including the wait for the connection; None for 30.
        want_parts: the answer has each worker's own result. idempotency_key: a request that is sent
        again with the same key within ten minutes, even after a failure, does not run again and
        gets the same answer. priority: 0 to 9, among this client's own requests; each step is worth
        two seconds of waiting.

        Raises CallFailed, whose subclasses mirror the statuses, and TypeError or ValueError for an
        invalid argument.
        """
        options = arguments.call_options(
            payload, args, mode, team, handler, timeout, want_parts, priority
        )
        if key := arguments.as_key(idempotency_key):
            return self._forward(options, key)
        deadline = time.monotonic() + options.timeout_s
        wait = _ThreadWait()
        submission = Submission(options.kind, (options.body,), deadline, wait.deliver)
        try:
            self._connection.send(submission, options.timeout_s)
            delivered = wait.wait()
        except CallFailed:  # it was not sent
            raise
        except BaseException:  # Ctrl-C
            self._connection.cancel(submission)
            raise
        return self._connection.read(*delivered, options.timeout_s)

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
        """Like `call`, but as a unary Forward, the RPC that any gRPC client uses.

        The request waits in the leader's queue, and is Refused if all slots are taken; a `call`
        waits in the stream's window. A request that is Unavailable and provably did not run is
        retried for the client's patience. want_trace: fills the answer's trace, and writes a line
        to each process's log. request_id: a unique id (`new_request_id`), for a caller that needs
        it before the answer.
        """
        options = arguments.call_options(
            payload, args, mode, team, handler, timeout, want_parts, priority
        )
        key = arguments.as_key(idempotency_key)
        want_trace = arguments.as_flag("want_trace", want_trace)
        request_id = arguments.as_int("request_id", request_id, maximum=arguments.HIGHEST_ID)
        return self._forward(options, key, want_trace, request_id)

    def _forward(
        self, options: CallOptions, key: str, want_trace: bool = False, request_id: int = 0
    ) -> Answer:
        kind = options.kind
        request = codec.pb2.Request(
            payload=options.body,
            mode=kind.route.mode.name,
            team=kind.route.team,
            handler=kind.route.handler,
            want_parts=kind.want_parts,
            idempotency_key=key,
            priority=kind.priority,
            want_trace=want_trace,
            request_id=request_id,
        )
        try:
            response = self._connection.forward(request, options.timeout_s)
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
        """A Future of the result of one worker (mode "any") or of all.

        The result is bytes; with `args`, the JSON value that a typed function returned. Its
        exception is a CallFailed; its cancel() cancels the request. Raises NotReached if no server
        is listening at the address. The other arguments are those of `call`.
        """
        options = arguments.submit_options(handler, payload, args, mode, team, timeout, priority)
        future = (ValueFuture if options.has_values else CallFuture)(self._connection, options)
        future.send()
        return future

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
        resume: Resume = None,
    ) -> Iterator[Any]:
        """The results of many payloads, in order; at most `window` are in flight at once.

        args: instead of payloads, the arguments of a typed function for each call; the results are
        the JSON values that it returned, else bytes. timeout: seconds for each payload. Payloads
        are taken as results are consumed, never all at once. The first failure is raised in its
        place and cancels the rest, as does leaving the loop. chunksize: payloads per message; 0
        lets the library choose.

        If the process asked is lost, payloads in flight fail, and the rest goes on when the process
        is back. patience_s: how many seconds the map waits for that; None for 30, or the client's
        own patience if that is longer. If the process is not back by then, the map gives the
        results of all payloads sent and raises NotReached, which says how many were answered.

        resume: a file for the results, made if there is none. After an interruption the same map
        with the same file goes on: a payload with a result there is not sent again, the result is
        given from there; the others are sent, and more payloads may follow at the end. Failures and
        incomplete results are not written. Results are written as they arrive and are taken, and at
        the end however the map ends; after a kill the payloads in flight, and those of the last
        moment, may run twice. Raises ResumeError: the file is another map's (handler, mode,
        team, payloads or args), in use, damaged, no such file, or cannot be written; for payloads
        that changed, before anything is sent if they are a sequence (a list, not an iterator), else
        in their place. It names what differs.
        """
        how = mode, team, timeout, window, chunksize, True, priority, patience_s, resume
        return _raising(self._map(arguments.map_options(handler, payloads, args, *how)))

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
        resume: Resume = None,
    ) -> Iterator[tuple[int, Any]]:
        """Like `map`, but gives (index, result) pairs as they arrive; a failure is a result too.

        Raises NotReached only if no server is listening at the address, or it is not back within
        the patience; by then every payload sent has its result. ordered: gives the pairs in the
        order of the payloads. resume: as in `map`, recorded results come as soon as their payloads
        are taken.
        """
        how = mode, team, timeout, window, chunksize, ordered, priority, patience_s, resume
        return _numbered(self._map(arguments.map_options(handler, payloads, args, *how)))

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
        """Asks every worker in scope, and gives each worker's part as soon as it arrives.

        Nothing is merged, and all parts together may be larger than a message. Parts without a
        result (`not part.ok`) come last. Raises CallFailed if no worker answers. After `first` good
        parts, or when the loop is left, the other workers are cancelled. args: as in `call`; each
        part's `value` is what the function returned there, and each item that the function yields
        is a part of its own.
        """
        options = arguments.parts_options(payload, args, team, handler, timeout, priority)
        parts = Parts(arguments.as_first(first), in_items=options.has_values)
        return _parts(self._connection, options, parts)

    def later(
        self,
        handler: str | None,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "any",
        team: str = "",
        key: str = "",
        priority: int = 0,
        limit_s: float | None = None,
        expires_s: float | None = None,
        start_at: float | datetime | None = None,
        every_s: float | None = None,
        attempts: int = 0,
        in_parts: bool = False,
        timeout: float | None = None,
    ) -> Job:
        """Submits a job: a request that the leader keeps on its disk until it is answered, and
        whose answer it keeps for a day. Returns when it is on the disk.

        key: says that running it twice does no harm; a job with a key that the leader has already
        is that one. limit_s: seconds that one attempt may take; None: the configured
        max_deadline_s. expires_s: seconds after which it is not started any more. start_at: when it
        is started, in seconds since 1970 or as a datetime. every_s: again and again, until it is
        cancelled. attempts: how often it is started when it is not known how an attempt ended; 0: 3
        with a key, 1 without; more than one needs a key. in_parts: the result may be larger than a
        message; in mode "all" nothing is merged, and each worker's part is kept by itself: see
        Job.parts. timeout: seconds until it is accepted. The other arguments are those of `submit`.

        Raises CallFailed: Refused if the journal is full, Unavailable if the connection is lost and
        it is not known whether the job was accepted (with a key it is submitted again).
        """
        options = arguments.job_options(
            handler,
            args is not None,
            mode,
            team,
            priority,
            limit_s,
            expires_s,
            start_at,
            every_s,
            attempts,
            in_parts,
            timeout,
        )
        body, key = arguments.job_payload(payload, args), arguments.job_key(key)
        connection = self._connection
        id_ = connection.jobs.submit(connection, options.request, body, key, options.timeout_s)
        return Job(connection, id_, options.has_values)

    def later_many(
        self,
        handler: str | None,
        payloads: Iterable[bytes | str] | None = None,
        *,
        args: Iterable[Args] | None = None,
        mode: str = "any",
        team: str = "",
        keys: Iterable[str] | None = None,
        priority: int = 0,
        limit_s: float | None = None,
        expires_s: float | None = None,
        start_at: float | datetime | None = None,
        attempts: int = 0,
        in_parts: bool = False,
        timeout: float | None = None,
    ) -> list[Job]:
        """Submits a job for each payload, a thousand at a time; see `later`.

        keys: one for each. If it raises, the jobs before may have been accepted; with keys it can
        be called again.
        """
        options = arguments.job_options(
            handler,
            args is not None,
            mode,
            team,
            priority,
            limit_s,
            expires_s,
            start_at,
            None,
            attempts,
            in_parts,
            timeout,
        )
        bodies, found = arguments.job_payloads(payloads, args, keys)
        ids = submit_many(self._connection, options, bodies, found)
        return [Job(self._connection, id_, options.has_values) for id_ in ids]

    def job(self, id: str) -> Job:
        """The job with this id, of this or another client. Asks nobody."""
        return Job(self._connection, arguments.as_job_id(id))

    def jobs(
        self,
        states: Iterable[str] = (),
        *,
        handler: str = "",
        limit: int = 100,
        before: str = "",
        timeout: float | None = None,
    ) -> JobList:
        """The newest jobs of this caller; of everybody's, if it is an operator or without TLS.

        A list, whose `counts` say how many there are in all. states: for example ("failed",
        "quarantined"); empty: all. limit: at most 1,000. before: only jobs older than this id.
        Raises CallFailed.
        """
        request = arguments.jobs_request(states, handler, limit, before)
        return read_jobs(self._connection.list_jobs(request, arguments.as_timeout(timeout)))

    def change_jobs(
        self,
        action: str,
        ids: Iterable[str] = (),
        *,
        states: Iterable[str] = (),
        timeout: float | None = None,
    ) -> JobChange:
        """Changes several jobs: those with these ids, or all of the caller's in these states.

        action: "cancel"; "release": those that are quarantined or failed wait again; "drop": those
        that are over are forgotten. Raises CallFailed.
        """
        request = arguments.change_request(action, ids, states)
        return read_change(self._connection.change_jobs(request, arguments.as_timeout(timeout)))

    def metrics(
        self,
        *,
        timeout: float | None = None,
        events: int = 0,
        requests: int = 0,
        functions: bool = False,
    ) -> codec.pb2.MetricsResponse:
        """The metrics of the process, as overlay.proto describes them.

        events, requests: how many of the latest to include. functions: whether to include the
        signatures of the handlers' functions. Raises CallFailed.
        """
        request = arguments.metrics_request(events, requests, functions)
        return self._connection.metrics(request, arguments.as_timeout(timeout))

    def logs(
        self,
        process_id: str = "",
        *,
        lines: int = 0,
        request_id: int = 0,
        error_id: str = "",
        timeout: float | None = None,
    ) -> codec.pb2.LogsResponse:
        """The last log lines of the process asked, or of one below it (`process_id`).

        lines: how many, 0 for a hundred. request_id: only lines about this request. error_id: only
        lines that mention this error. Raises CallFailed.
        """
        wanted = codec.pb2.LogsRequest(
            process_id=arguments.as_id(process_id),
            lines=arguments.as_int("lines", lines),
            request_id=arguments.as_int("request_id", request_id, maximum=arguments.HIGHEST_ID),
            error_id=arguments.as_id(error_id),
        )
        return self._connection.logs(wanted, arguments.as_timeout(timeout))

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Asks the standard health service; False while the process stops. Raises CallFailed."""
        return self._connection.is_serving(arguments.as_timeout(timeout))

    def drain(
        self, *, grace_s: float | None = None, wait: bool = True, timeout: float | None = None
    ) -> codec.pb2.DrainResponse:
        """Stops the process as SIGTERM does; only possible from its own machine.

        grace_s: seconds that running requests may take, None for the configured time. wait: waits
        until the process has stopped serving, and the response has the outcomes of its requests;
        else only until the stop has begun. The process exits a moment later. Raises CallFailed.
        """
        no_wait = not arguments.as_flag("wait", wait)
        request = codec.pb2.DrainRequest(grace_s=arguments.as_grace(grace_s), no_wait=no_wait)
        return self._connection.drain(request, arguments.as_timeout(timeout))

    def close(self) -> None:
        """Closes the connection at once; open requests fail with CallCancelled."""
        connection = self._asked()
        if connection is not None:
            connection.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shuts down like any Executor: takes no new requests, and closes once all are answered.

        A map that was started before goes on as long as it is referenced. wait: waits until all
        requests are answered and the callbacks have run. cancel_futures: cancels every Future that
        is not done, even if its handler is running.
        """
        connection, closed = self._asked(), Connection(self.address, 0.0, self._tls)
        closed.close()
        # Open requests refer to the old connection, which is closed with the last of them.
        self._connection = closed
        if connection is None:
            return
        for future in (
            list(connection.open_futures)
            if cancel_futures and not connection.belongs_to_parent
            else ()
        ):
            future.cancel()
        if wait:
            connection.wait_until_idle()
            if not connection.maps:
                connection.close()

    def __reduce__(self) -> tuple[type[Client], tuple[Any, ...]]:
        # It connects anew where it is unpickled.
        return type(self), (self.address, self._patience_s, self._tls, self._lanes)

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

    def _map(self, options: MapOptions) -> Iterator[Run]:
        payloads = arguments.as_iterator(options.bodies)
        self._connection.check_open()
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run = MapRun(self._connection, options, lambda *delivered: inbox.put(delivered))
        return _results(self._connection, run, inbox, payloads)


def _results(
    connection: Connection, run: MapRun, inbox: queue.SimpleQueue[Any], payloads: Iterator[Any]
) -> Iterator[Run]:
    """Keeps a map's window full while its results are taken."""
    window, record = run.window, run.record

    def read_all() -> None:
        for _ in range(inbox.qsize()):
            run.read(*inbox.get())

    def keeping(results: Iterable[Any]) -> Iterator[Any]:
        """The same results; what arrives meanwhile is recorded, however slow their reader is."""
        for result in results:
            yield result
            read_all()
            if record is not None and record.is_due:
                record.commit()

    try:
        run.check_ahead()
        while not run.is_done:
            run.check_connection()
            if run.needs_last_check:
                run.last_check()
            pauses = False
            while not pauses and run.may_send(window.chunk):
                chunk = run.recall(*window.gather(payloads))
                if not (chunk.is_recorded or run.has_begun):
                    try:
                        connection.wait_ready(run.timeout_s)
                    except CallFailed as e:  # once the recorded results are given
                        run.fail(e)
                        break
                    run.begin()
                run.send(chunk)
                pauses = window.pauses
            waits = not window.has_ready and (window.unanswered or run.is_away)
            hurries = run.is_away or pauses or (record is not None and record.is_pending)
            within_s = PAUSE_S if hurries else CHECK_S
            with suppress(queue.Empty):
                run.read(*inbox.get(timeout=within_s if waits else 0))
            read_all()
            if record is not None and record.is_due:
                record.commit()
            while (ready := run.take()) is not None:
                yield ready if record is None else (ready[0], keeping(ready[1]))
                window.release()
        if record is not None:
            record.finish()
        run.raise_if_ended_early()
    finally:
        try:
            if record is not None and not connection.belongs_to_parent:
                read_all()
        finally:
            run.close()


def _numbered(runs: Iterator[Run]) -> Iterator[tuple[int, Any]]:
    try:
        for first, results in runs:
            yield from enumerate(results, first)
    finally:
        runs.close()  # type: ignore[attr-defined]  # a generator


def _raising(runs: Iterator[Run]) -> Iterator[Any]:
    try:
        for _, results in runs:
            for result in results:
                if isinstance(result, CallFailed):
                    raise result
                yield result
    finally:
        runs.close()  # type: ignore[attr-defined]  # a generator


def _parts(connection: Connection, options: CallOptions, parts: Parts) -> Iterator[Part]:
    inbox: queue.SimpleQueue[tuple[bool, Any, int, int]] = queue.SimpleQueue()
    timeout_s = options.timeout_s
    submission = Submission(
        options.kind,
        (options.body,),
        time.monotonic() + timeout_s,
        lambda rows, delivered, at, request_id: inbox.put((True, delivered, at, request_id)),
        on_partial=lambda rows, delivered, at, request_id: inbox.put(
            (False, delivered, at, request_id)
        ),
    )
    connection.send(submission, timeout_s)
    is_last = False
    try:
        while not (is_last or parts.is_over):
            connection.check_same_process()
            with suppress(queue.Empty):  # short waits, so that Ctrl-C works on Windows too
                is_last, delivered, at, request_id = inbox.get(timeout=0.5)
                yield from parts.last(delivered, at) if is_last else parts.early(delivered, at)
        if is_last and isinstance(delivered, Detail):
            raise connection.error_for(delivered, timeout_s, request_id)
    finally:
        if not is_last:
            connection.cancel(submission)


class _ThreadWait:
    """Where a calling thread waits; a lock is the cheapest way to wake it."""

    __slots__ = ("_delivered", "_ready")

    def __init__(self) -> None:
        self._ready = threading.Lock()
        self._ready.acquire()
        self._delivered: tuple[Any, int, int] = (None, 0, 0)

    def deliver(self, rows: Sequence[int], delivered: Any, at: int, request_id: int) -> None:
        self._delivered = delivered, at, request_id
        self._ready.release()

    def wait(self) -> tuple[Any, int, int]:
        # Short waits, so that Ctrl-C works on Windows too. Every submission is delivered at last.
        while not self._ready.acquire(timeout=0.5):
            pass
        return self._delivered
