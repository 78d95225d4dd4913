"""A client's persistent connection to one process: a stream of requests, and unary calls."""

from __future__ import annotations

import _thread
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay.client.callbacks import Callbacks
from overlay.client.jobs import JobSender
from overlay.client.lanes import Lanes
from overlay.client.outbox import Submission
from overlay.client.probe import ConnectionProbe
from overlay.client.results import Answer, error_from_rpc, error_of, message_of, result_of
from overlay.client.submitter import RETRY_PAUSE_S, Submitter
from overlay.model import clocks as time
from overlay.model.errors import (
    BadResponse,
    CallCancelled,
    CallFailed,
    NotReached,
    Unavailable,
)
from overlay.model.limits import Limits
from overlay.model.segments import Code, Detail, Executed
from overlay.observability.log_buffer import LINES
from overlay.security.lookup import Tls, credentials_for
from overlay.transport import codec, environment, validation
from overlay.transport.channels import SILENT, Channel, split
from overlay.transport.endpoints import channel_options

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

# Long enough for a process to restart. Windows takes 2 s to report a refused port.
PATIENCE_S = 2.5
# A map has more to lose than a call, so a running map waits longer for a lost process.
MAP_PATIENCE_S = 30.0
PROMPT_S = 0.25  # a connection that takes longer is probed to find out why
FRESH_S = 1.0  # after an answer the connection counts as up this long; later a health check is sent
FAILOVER_S = 20.0  # in which one of several leaders takes the jobs over from one that is lost
CALLBACKS_WAIT_S = 2.0  # how long `close` waits for callbacks to run
# Of two options with the same name gRPC uses the first.
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a corporate web proxy does not reach machines on its own LAN
    # The process asked knows the configured size and rejects larger messages.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    *channel_options(),
]


class Connection:
    """Connects on first use; if that fails, finds out why. Safe from any thread.

    gRPC is not used before the first request. Until then the process may be forked, and each child
    gets a connection of its own. After a fork of a connection in use, every method raises in the
    child, and `close` leaves the connection to the parent.

    A connection that is garbage-collected without `close` is closed too: the process asked accepts
    few streams.
    """

    def __init__(
        self, address: str, patience_s: float, tls: Tls = None, lanes: bool = True
    ) -> None:
        """tls, lanes: as for `connect`. Raises ConfigError for unusable certificates, RuntimeError
        if gevent or eventlet has replaced the threads that gRPC needs."""
        environment.check_threads()
        self._address = address
        self._first, *others = address.split(",")
        self._credentials = credentials_for(*split(self._first), tls)
        self._leaders = Leaders([self._first, *others]) if others else None
        self.callbacks = Callbacks()
        self.open_futures: set[concurrent.futures.Future[bytes]] = set()
        self.maps: weakref.WeakSet[Any] = weakref.WeakSet()  # those that may have more to send
        self.jobs = JobSender()
        self._open_calls = 0  # unary calls
        self._patience_s = patience_s
        self._has_lanes = lanes
        self._closed = False
        self._belongs_to_parent = False
        self._lock = threading.Lock()
        self._main_stubs: _Stubs | None = None
        self._single_stubs: _Stubs | None = None
        self._leader_stubs: dict[str, _Stubs] = {}  # by address; only of several leaders
        self._submitter: Submitter | None = None
        # Separate from this object, so that the finalizer does not keep it alive.
        self._held: list[Submitter | Channel] = []
        self._finalizer = weakref.finalize(self, _close_all_soon, self._held)
        self._finalizer.atexit = False
        environment.remember(self)

    @property
    def shown(self) -> str:
        """The address, with what its host name resolves to here."""
        return self._main_stubs.channel.shown if self._main_stubs else self._address

    def send(self, submission: Submission, timeout_s: float) -> None:
        """Raises NotReached if no server is listening at the address."""
        self.wait_ready(timeout_s).send(submission)

    def wait_ready(self, timeout_s: float) -> Submitter:
        """Waits for the connection, at most for the client's patience. Raises NotReached."""
        submitter = self.begin() if self._submitter is None or self._closed else self._submitter
        if not submitter.connected.is_set():
            self.wait_connected(submitter, min(self._patience_s, timeout_s))
        return submitter

    def cancel(self, submission: Submission, rows: Sequence[int] = ()) -> None:
        if self._submitter is not None:
            self._submitter.cancel(submission, rows or submission.rows)

    def read(self, delivered: Any, at: int, request_id: int, timeout_s: float) -> Answer:
        """Raises CallFailed for a Detail."""
        if isinstance(delivered, Detail):
            raise self.error_for(delivered, timeout_s, request_id)
        return Answer.of(delivered, at, request_id)

    def read_result(self, delivered: Any, at: int, request_id: int, timeout_s: float) -> bytes:
        """Like `read`, but only the result; an Incomplete if a worker is missing."""
        if isinstance(delivered, Detail):
            raise self.error_for(delivered, timeout_s, request_id)
        return result_of(delivered, at)

    def error_for(self, failure: Detail, timeout_s: float, request_id: int = 0) -> CallFailed:
        reason = failure.reason
        if failure.code is Code.DEADLINE_EXCEEDED and not reason:
            reason = f"no answer from {self.shown} within {timeout_s:g} s"
        return error_of(failure, reason, request_id)

    def map_patience(self, patience_s: float | None) -> float:
        return max(MAP_PATIENCE_S, self._patience_s) if patience_s is None else patience_s

    def resolve_again(self, is_wrong: bool = False) -> None:
        """The process is not answering, or a wrong one is: its host name may have a new address."""
        if self._main_stubs is not None:
            self._main_stubs.channel.doubt(is_wrong)

    @property
    def is_closed(self) -> bool:
        return self._closed or environment.is_orphan

    @property
    def belongs_to_parent(self) -> bool:
        """Whether this process was forked while its parent was using the connection."""
        return self._belongs_to_parent

    def check_open(self) -> None:
        if self.is_closed:
            raise _closed(self._belongs_to_parent or environment.is_orphan)

    def wait_until_idle(self) -> None:
        """Waits until every request is answered and the callbacks have run."""
        while not self._closed and (
            self.open_futures or self._open_calls or (self._submitter and self._submitter.open_rows)
        ):
            time.sleep(0.01)
        self.callbacks.wait()

    def check_same_process(self) -> None:
        """Raises CallFailed in a forked child, which would never receive an answer."""
        if self._belongs_to_parent:
            raise _closed(belongs_to_parent=True)

    def leave_behind(self) -> None:
        """See environment.Forkable."""
        self._lock = threading.Lock()  # the parent may have held it during the fork
        self.jobs = JobSender()
        self.callbacks = Callbacks()
        if self._main_stubs is not None:
            self._finalizer.detach()
            self._belongs_to_parent, self._closed = not self._closed, True
            self._submitter = None

    def begin(self) -> Submitter:
        with self._lock:
            channel = self._stubs_locked().channel
            if self._submitter is None:
                shown = partial(getattr, channel, "shown")
                submitter = Submitter(channel, self._address, self._patience_s, shown)
                if self._has_lanes:
                    lanes = Lanes(submitter, partial(_open_channel, self._credentials))
                    submitter.lanes, submitter.on_lease = lanes, lanes.on_lease
                submitter.start()
                self._submitter = submitter
                self._held.insert(0, submitter)
            return self._submitter

    def wait_connected(self, submitter: Submitter, patience_s: float) -> None:
        """Raises NotReached, with the reason, if the connection is not up in time."""
        until = time.monotonic() + patience_s
        submitter.wake()
        if submitter.connected.wait(min(PROMPT_S, patience_s)):
            return
        probe = (
            None if submitter.is_full else ConnectionProbe(self._first, until, self._credentials)
        )
        while (left_s := until - time.monotonic()) > 0 and not self._closed:
            self.resolve_again(_is_wrong_server(submitter))
            if submitter.connected.wait(min(0.25, left_s)):
                return
            refused = submitter.refused
            if refused is not None and _is_wrong_server(submitter):
                raise error_of(refused, message_of(refused.code, refused.reason, self.shown))
        if self._closed:
            raise error_of(Detail(Code.CANCELLED, "", Executed.NO), "this client was closed")
        refused = submitter.refused
        if refused is not None and submitter.is_full:
            raise error_of(refused, refused.reason)
        probe = probe or ConnectionProbe(self._first, until, self._credentials)
        error = probe.error()
        if refused is not None and refused.executed is Executed.NO and not probe.is_refused:
            raise error_of(refused, refused.reason)  # for example, the process says it is stopping
        raise error

    def forward(self, request: codec.pb2.Request, timeout_s: float) -> codec.pb2.Response:
        until = time.monotonic() + timeout_s
        patient_until = time.monotonic() + min(self._patience_s, timeout_s)
        self._check_size(len(request.payload), min(self._patience_s, timeout_s))
        stubs = self._single
        while True:
            try:
                left_s = max(0.001, until - time.monotonic())
                return cast(
                    codec.pb2.Response,
                    self._call(
                        stubs, stubs.node.Forward, request, left_s, validation.check_response
                    ),
                )
            except NotReached:
                raise
            except Unavailable as e:
                pause_s = e.retry_after_s or RETRY_PAUSE_S
                if e.executed is not Executed.NO or time.monotonic() + pause_s > patient_until:
                    raise
                time.sleep(pause_s)

    def drain(self, request: codec.pb2.DrainRequest, timeout_s: float) -> codec.pb2.DrainResponse:
        stubs = self._stubs
        response = self._call(stubs, stubs.admin.Drain, request, timeout_s, validation.tidy)
        return cast(codec.pb2.DrainResponse, response)

    def logs(self, request: codec.pb2.LogsRequest, timeout_s: float) -> codec.pb2.LogsResponse:
        most = min(request.lines or codec.MIN_LINES, LINES)

        def check(response: codec.pb2.LogsResponse) -> None:
            validation.check_logs(response, request.process_id or response.process_id, most)

        stubs = self._stubs
        response = self._call(stubs, stubs.admin.Logs, request, timeout_s, check)
        return cast(codec.pb2.LogsResponse, response)

    def submit_jobs(
        self, request: codec.pb2.SubmitRequest, timeout_s: float
    ) -> codec.pb2.SubmitResponse:
        """Jobs with keys are submitted again when it is not known whether they were accepted."""
        until = time.monotonic() + timeout_s
        patient_until = time.monotonic() + min(self._patience_s, timeout_s)
        count = len(request.payloads) or 1

        def check(response: codec.pb2.SubmitResponse) -> None:
            validation.check_job_ids(response.ids, count)

        has_keys, is_in_doubt = len(request.keys) == count, False
        while True:
            left_s = max(0.001, until - time.monotonic())
            try:
                response = self._ask_for_jobs("Submit", request, left_s, check, has_keys)
                return cast(codec.pb2.SubmitResponse, response)
            except CallFailed as e:
                is_in_doubt = _in_doubt(e, is_in_doubt)
                is_passing = isinstance(e, Unavailable) and not isinstance(e, NotReached)
                may_repeat = is_passing and (has_keys or not is_in_doubt)
                pause_s = e.retry_after_s or RETRY_PAUSE_S
                if not may_repeat or time.monotonic() + pause_s > patient_until:
                    raise
                time.sleep(pause_s)

    def job_result(self, request: codec.pb2.ResultRequest, timeout_s: float) -> codec.pb2.Job:
        check = partial(validation.check_job, request.id)
        return cast(codec.pb2.Job, self._ask_for_jobs("Result", request, timeout_s, check))

    def job_part(self, request: codec.pb2.PartRequest, timeout_s: float) -> codec.pb2.PartResponse:
        response = self._ask_for_jobs("Part", request, timeout_s, validation.tidy)
        return cast(codec.pb2.PartResponse, response)

    def _ask_for_jobs(
        self,
        method: str,
        request: Any,
        timeout_s: float,
        check: Callable[[Any], None],
        may_repeat: bool = True,
    ) -> Any:
        """Of several leaders, the one that has the jobs is found by asking one after the other."""
        if self._leaders is None:
            stubs = self._stubs
            return self._call(stubs, getattr(stubs.jobs, method), request, timeout_s, check)
        until = time.monotonic() + min(timeout_s, max(self._patience_s, FAILOVER_S))
        end = time.monotonic() + timeout_s
        is_in_doubt = False
        while True:
            stubs, asked = self._stubs_of_leader(), self._leaders.at
            left_s = max(0.001, end - time.monotonic())
            call = getattr(stubs.jobs, method)
            try:
                return self._call(stubs, call, request, left_s, check, PROMPT_S)
            except CallFailed as e:
                is_in_doubt = _in_doubt(e, is_in_doubt)
                may_go_on = isinstance(e, Unavailable) and (may_repeat or not is_in_doubt)
                if not may_go_on or time.monotonic() > until:
                    raise
                if self._leaders.is_last(asked):
                    time.sleep(RETRY_PAUSE_S)
                self._leaders.leave(asked)

    def _stubs_of_leader(self) -> _Stubs:
        leaders = self._leaders
        assert leaders is not None
        with self._lock:
            self._stubs_locked()
            address = leaders.address
            found = self._leader_stubs.get(address)
            if found is None:
                found = _Stubs(address, _OPTIONS, self._credentials)
                self._leader_stubs[address] = found
                self._held.append(found.channel)
            return found

    def job_result_soon(
        self,
        request: codec.pb2.ResultRequest,
        timeout_s: float,
        done: Callable[[codec.pb2.Job | CallFailed], None],
    ) -> Callable[[], object]:
        """Like `job_result`, without a thread that waits: `done` gets the job or the error, on
        gRPC's thread. Returns what gives up the call."""
        leaders = self._leaders
        stubs = self._stubs if leaders is None else self._stubs_of_leader()
        asked = leaders.at if leaders is not None else 0
        call = stubs.jobs.Result.future(
            request, timeout=time.Timeout(timeout_s), wait_for_ready=leaders is None
        )

        def ended(call: Any) -> None:
            try:
                job = call.result()
                validation.check_job(request.id, job)
            except BadResponse as e:
                done(error_of(Detail(e.code, str(e)), f"the server at {self.shown}: {e}"))
            except grpc.RpcError as e:
                if leaders is not None and e.code() in SILENT:
                    leaders.leave(asked)
                done(error_from_rpc(e, self.shown, timeout_s))
            except grpc.FutureCancelledError:
                done(CallCancelled("this client was closed before the answer came"))
            else:
                done(job)

        call.add_done_callback(ended)
        return cast(Callable[[], object], call.cancel)

    def list_jobs(self, request: codec.pb2.JobsRequest, timeout_s: float) -> codec.pb2.JobsResponse:
        response = self._ask_for_jobs("Jobs", request, timeout_s, validation.check_jobs)
        return cast(codec.pb2.JobsResponse, response)

    def change_jobs(
        self, request: codec.pb2.ChangeRequest, timeout_s: float
    ) -> codec.pb2.ChangeResponse:
        # Not again in doubt: what was changed before would be told as unchanged.
        response = self._ask_for_jobs("Change", request, timeout_s, validation.tidy, False)
        return cast(codec.pb2.ChangeResponse, response)

    def metrics(
        self, request: codec.pb2.MetricsRequest, timeout_s: float
    ) -> codec.pb2.MetricsResponse:
        stubs = self._stubs
        response = self._call(
            stubs, stubs.node.GetMetrics, request, timeout_s, validation.check_metrics
        )
        return cast(codec.pb2.MetricsResponse, response)

    def is_serving(self, timeout_s: float) -> bool:
        request = health_pb2.HealthCheckRequest()
        stubs = self._stubs
        response = self._call(stubs, stubs.health.Check, request, timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # Here, as it would end when this object does, perhaps on another thread while Python exits.
        self._finalizer.detach()
        _close_all(self._held)
        self.callbacks.wait(CALLBACKS_WAIT_S)

    @property
    def _stubs(self) -> _Stubs:
        with self._lock:
            return self._stubs_locked()

    def _stubs_locked(self) -> _Stubs:
        self.check_open()
        if self._main_stubs is None:
            environment.begin_use(self._held)
            self._main_stubs = _Stubs(self._address, _OPTIONS, self._credentials)
            self._held.append(self._main_stubs.channel)
        return self._main_stubs

    @property
    def _single(self) -> _Stubs:
        """For unary requests: a channel on which gRPC itself retries a request that a closing
        connection never accepted. Only gRPC can know that it did not run."""
        with self._lock:
            self._stubs_locked()
            if self._single_stubs is None:
                options = [("grpc.enable_retries", 1), *_OPTIONS]
                self._single_stubs = _Stubs(self._address, options, self._credentials)
                self._held.append(self._single_stubs.channel)
            return self._single_stubs

    def _check_size(self, size: int, patience_s: float) -> None:
        """Raises InvalidCall for a payload that is too large for the process to read.

        gRPC would end such a call without saying whether it ran. Only the stream reports the limit.
        """
        if size <= Limits.min_message_limit:
            return
        submitter = self.begin()
        with contextlib.suppress(CallFailed):  # then the call itself will report it
            self.wait_connected(submitter, patience_s)
        if size > submitter.max_bytes:
            reason = codec.too_large(size, submitter.max_bytes)
            raise error_of(Detail(Code.INVALID_ARGUMENT, reason, Executed.NO), reason)

    def _call(
        self,
        stubs: _Stubs,
        method: Any,
        request: Any,
        timeout_s: float,
        check: Callable[[Any], None] = lambda answer: None,
        patience_s: float | None = None,
    ) -> Any:
        """The answer, validated by `check`. patience_s: with a connection that is not up, where
        another process can be asked instead. Raises CallFailed."""
        waits = patience_s is None
        patience_s = self._patience_s if patience_s is None else patience_s
        until = time.monotonic() + timeout_s
        with self._lock:
            self._open_calls += 1
        try:
            self._check_reachable(stubs, min(patience_s, timeout_s))
            # wait_for_ready: if the connection was just lost, wait for it and send the call once.
            left_s = max(0.001, until - time.monotonic())
            answer = method(request, timeout=time.Timeout(left_s), wait_for_ready=waits)
            check(answer)
        except BadResponse as e:
            reason = f"the server at {self.shown} violates the protocol: {e}"
            raise error_of(Detail(e.code, reason), reason) from None
        except grpc.RpcError as error:
            if error.code() in SILENT:
                stubs.answered = -FRESH_S
            raise error_from_rpc(error, self.shown, timeout_s) from None
        except ValueError:
            if not self._closed:
                raise
            # gRPC raises it for a channel that has been closed.
            raise CallCancelled("this client was closed") from None
        finally:
            with self._lock:
                self._open_calls -= 1
        stubs.answered = time.monotonic()
        return answer

    def _check_reachable(self, stubs: _Stubs, patience_s: float) -> None:
        """Raises NotReached unless the process answered recently or answers now.

        Without a server a call would wait for its whole deadline, and then not know whether it was
        ever sent.
        """
        if time.monotonic() - stubs.answered < FRESH_S:
            return
        until = time.monotonic() + patience_s
        if stubs.responds(min(PROMPT_S, patience_s)):
            return
        probe = ConnectionProbe(self._first, until, self._credentials)
        while (left_s := until - time.monotonic()) > 0:
            if stubs.responds(left_s):
                return
            time.sleep(min(0.05, left_s))
        raise probe.error()


def _in_doubt(error: CallFailed, was_in_doubt: bool) -> bool:
    """Whether something was done by this attempt or one before: to be refused now, or by another
    leader, proves nothing of those before. The error says so too."""
    if was_in_doubt:
        error.executed = Executed.UNKNOWN
    return error.executed is not Executed.NO


class Leaders:
    """Which of several leaders is asked about jobs: the last one that was not left. Thread-safe."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = [address.strip() for address in addresses]
        self.at = 0

    @property
    def address(self) -> str:
        return self._addresses[self.at % len(self._addresses)]

    def is_last(self, asked: int) -> bool:
        """Whether after this one the first has its turn again."""
        return asked % len(self._addresses) == len(self._addresses) - 1

    def leave(self, asked: int) -> None:
        """It does not have the jobs. Of several threads that asked it, one moves on."""
        if self.at == asked:
            self.at = asked + 1


class _Stubs:
    """The stubs of one channel for unary calls. answered: time of the last answer (monotonic)."""

    def __init__(
        self,
        address: str,
        options: Sequence[tuple[str, Any]],
        credentials: Credentials | None,
    ) -> None:
        self.channel = Channel(address, options, credentials)
        self.node = codec.pb2_grpc.OverlayNodeStub(self.channel)
        self.jobs = codec.pb2_grpc.OverlayJobsStub(self.channel)
        self.admin = codec.pb2_grpc.OverlayAdminStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.answered = -FRESH_S

    def responds(self, within_s: float) -> bool:
        """Whether a gRPC server answers a health check, even with an error."""
        try:
            self.health.Check(
                health_pb2.HealthCheckRequest(), timeout=time.Timeout(within_s), wait_for_ready=True
            )
        except grpc.RpcError as error:
            return error.code() not in SILENT
        return True


def _open_channel(credentials: Credentials | None, address: str, process_id: str) -> Channel:
    """To a worker that was lent. Refers to no connection, which would otherwise live on."""
    return Channel(address, _OPTIONS, credentials, process_id)


def _is_wrong_server(submitter: Submitter) -> bool:
    """Whether the server at the address will never accept the stream."""
    refused = submitter.refused
    return refused is not None and refused.code not in _TRANSIENT and not submitter.is_full


_TRANSIENT = (Code.UNAVAILABLE, Code.CANCELLED)  # a rejected stream may be accepted soon


def _closed(belongs_to_parent: bool) -> CallFailed:
    if belongs_to_parent:
        return CallFailed(environment.FORKED, code=Code.FAILED_PRECONDITION, executed=Executed.NO)
    return CallCancelled("this client is closed", executed=Executed.NO)


def _close_all(held: list[Submitter | Channel]) -> None:
    """Closes them in order. May be called twice."""
    for one in list(held):
        one.close()
    environment.end_use(held)


def _close_all_soon(held: list[Submitter | Channel]) -> None:
    # On a thread of its own, because closing blocks, and a finalizer runs on whichever thread drops
    # the last reference, even the stream's. Not with `threading`, whose lock that thread may hold.
    _thread.start_new_thread(_close_all, (held,))
