"""A client's kept connection to one process: a stream for requests, and single calls beside it."""

from __future__ import annotations

import _thread
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay.client.callbacks import Callbacks
from overlay.client.doubt import Doubt
from overlay.client.outbox import Submission
from overlay.client.results import Answer, error_of, failure_of, result_of, sentence_of
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
from overlay.transport import codec, environment, validation
from overlay.transport.channels import SILENT, Channel
from overlay.transport.endpoints import channel_options

# A process that is being restarted is back within this. Windows takes 2 s to report a refused port.
PATIENCE_S = 2.5
# A map has more to lose than a call: one under way waits longer for a process that was lost.
MAP_PATIENCE_S = 30.0
PROMPT_S = 0.25  # a connection that takes longer is looked into meanwhile
FRESH_S = 1.0  # so long after an answer the connection counts as up; later a call greets first
CALLBACKS_S = 2.0  # for which `close` waits until they have run
# gRPC heeds the first of two options of one name.
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # an office's web proxy does not lead to its own machines
    # The process asked knows the configured size and refuses what is beyond it.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    *channel_options(),
]


class Connection:
    """Made when it is first needed, and looked into when it does not come up. Safe from any thread.

    gRPC is used from the first request on, not before: until then the process may be forked, and
    each child has a connection of its own. In the child of a process that was using it every verb
    raises, and `close` leaves it to the parent.

    A connection that is dropped without `close` is closed all the same: its stream has a place at
    the process asked, of which there are few.
    """

    def __init__(self, address: str, patience_s: float) -> None:
        """Raises RuntimeError where gevent or eventlet left no threads to gRPC."""
        environment.check_threads()
        self.address = self._address = address
        self.callbacks = Callbacks()
        self.replies: set[concurrent.futures.Future[bytes]] = set()  # those that are not done
        self.maps: weakref.WeakSet[Any] = weakref.WeakSet()  # those that may have more to send
        self._asking = 0  # single calls that are under way
        self._patience_s = patience_s
        self._closed = False
        self._is_left = False  # to the parent, of which this process is a child
        self._lock = threading.Lock()
        self._made: _Stubs | None = None
        self._single_stubs: _Stubs | None = None
        self._calls: Submitter | None = None
        # What holds a stream and threads, without this connection: so that it can be let go.
        self._held: list[Submitter | Channel] = []
        self._freeing = weakref.finalize(self, _free_soon, self._held)
        self._freeing.atexit = False
        environment.remember(self)

    @property
    def shown(self) -> str:
        """The address, with what its name stands for here."""
        return self._made.channel.shown if self._made else self._address

    def send(self, submission: Submission, timeout_s: float) -> None:
        """Raises NotReached when nothing serves at the address."""
        self.wait_ready(timeout_s).send(submission)

    def wait_ready(self, timeout_s: float) -> Submitter:
        """Waits for the connection, no longer than the client's patience. Raises NotReached."""
        calls = self.begin() if self._calls is None or self._closed else self._calls
        if not calls.connected.is_set():
            self.wait_connected(calls, min(self._patience_s, timeout_s))
        return calls

    def cancel(self, submission: Submission, rows: Sequence[int] = ()) -> None:
        if self._calls is not None:
            self._calls.cancel(submission, rows or submission.rows)

    def read(self, came: Any, at: int, request_id: int, timeout_s: float) -> Answer:
        """What was delivered, as an Answer. Raises CallFailed."""
        if isinstance(came, Detail):
            raise self.failed(came, timeout_s, request_id)
        answer = came.answers.at(at)
        return Answer(came.results[at], answer.parts, answer.hops, request_id)

    def read_result(self, came: Any, at: int, request_id: int, timeout_s: float) -> bytes:
        """As `read`, but the result only; an Incomplete where a worker is missing."""
        if isinstance(came, Detail):
            raise self.failed(came, timeout_s, request_id)
        return result_of(came, at)

    def failed(self, failure: Detail, timeout_s: float, request_id: int = 0) -> CallFailed:
        reason = failure.reason
        if failure.code is Code.DEADLINE_EXCEEDED and not reason:
            reason = f"no answer from {self.shown} within {timeout_s:g} s"
        return error_of(failure, reason, request_id)

    def map_patience(self, patience_s: float | None) -> float:
        """How long a map waits for a process that is lost, where it was given `patience_s`."""
        return max(MAP_PATIENCE_S, self._patience_s) if patience_s is None else patience_s

    def seek(self, is_wrong: bool = False) -> None:
        """The process is away, or another one answers: the name of its machine may lead elsewhere
        by now."""
        if self._made is not None:
            self._made.channel.doubt(is_wrong)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be asked here any more."""
        return self._closed or environment.is_orphan

    @property
    def is_left(self) -> bool:
        """Whether the connection belongs to the process of which this one is a child."""
        return self._is_left

    def check_open(self) -> None:
        """Raises CallFailed when nothing can be asked here any more."""
        if self.is_closed:
            raise _closed(self._is_left or environment.is_orphan)

    def wait_until_idle(self) -> None:
        """Until what was asked is answered, and the callbacks have run."""
        while not self._closed and (
            self.replies or self._asking or (self._calls and self._calls.open_rows)
        ):
            time.sleep(0.01)
        self.callbacks.wait()

    def check_here(self) -> None:
        """Raises CallFailed in a child of the process that used this: no answer comes there."""
        if self._is_left:
            raise _closed(is_left=True)

    def leave_behind(self) -> None:
        """As environment.Forkable has it."""
        self._lock = threading.Lock()  # the parent may just have held it
        self.callbacks = Callbacks()
        if self._made is not None:
            self._freeing.detach()
            self._is_left, self._closed = not self._closed, True
            self._calls = None

    def begin(self) -> Submitter:
        with self._lock:
            channel = self._stubs_locked().channel
            if self._calls is None:
                shown = partial(getattr, channel, "shown")
                calls = Submitter(channel, self._address, self._patience_s, shown)
                calls.start()
                self._calls = calls
                self._held.insert(0, calls)
            return self._calls

    def wait_connected(self, calls: Submitter, patience_s: float) -> None:
        """Raises NotReached with the reason, when the connection does not come up in time."""
        until = time.monotonic() + patience_s
        calls.wake()
        if calls.connected.wait(min(PROMPT_S, patience_s)):
            return
        doubt = None if calls.is_full else Doubt(self._address, until)
        while (left_s := until - time.monotonic()) > 0 and not self._closed:
            self.seek(_is_wrong(calls))
            if calls.connected.wait(min(0.25, left_s)):
                return
            refused = calls.refused
            if refused is not None and _is_wrong(calls):
                raise error_of(refused, sentence_of(refused.code, refused.reason, self.shown))
        if self._closed:
            raise error_of(Detail(Code.CANCELLED, "", Executed.NO), "this client was closed")
        refused = calls.refused
        if refused is not None and calls.is_full:
            raise error_of(refused, refused.reason)
        doubt = doubt or Doubt(self._address, until)
        error = doubt.error()
        if refused is not None and refused.executed is Executed.NO and not doubt.is_settled:
            raise error_of(refused, refused.reason)  # the process's own words: it is stopping
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
                    self._ask(
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
        found = self._ask(stubs, stubs.admin.Drain, request, timeout_s, validation.tidy)
        return cast(codec.pb2.DrainResponse, found)

    def logs(self, request: codec.pb2.LogsRequest, timeout_s: float) -> codec.pb2.LogsResponse:
        most = min(request.lines or codec.MIN_LINES, LINES)

        def check(said: codec.pb2.LogsResponse) -> None:
            validation.check_logs(said, request.process_id or said.process_id, most)

        stubs = self._stubs
        found = self._ask(stubs, stubs.admin.Logs, request, timeout_s, check)
        return cast(codec.pb2.LogsResponse, found)

    def metrics(
        self, request: codec.pb2.MetricsRequest, timeout_s: float
    ) -> codec.pb2.MetricsResponse:
        stubs = self._stubs
        found = self._ask(
            stubs, stubs.node.GetMetrics, request, timeout_s, validation.check_metrics
        )
        return cast(codec.pb2.MetricsResponse, found)

    def is_serving(self, timeout_s: float) -> bool:
        request = health_pb2.HealthCheckRequest()
        stubs = self._stubs
        found = self._ask(stubs, stubs.health.Check, request, timeout_s)
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _free(self._held)
        self.callbacks.wait(CALLBACKS_S)

    @property
    def _stubs(self) -> _Stubs:
        with self._lock:
            return self._stubs_locked()

    def _stubs_locked(self) -> _Stubs:
        self.check_open()
        if self._made is None:
            environment.begin_use(self._held)
            self._made = _Stubs(self._address, _OPTIONS)
            self._held.append(self._made.channel)
        return self._made

    @property
    def _single(self) -> _Stubs:
        """For single requests: a channel on which gRPC itself sends a request again that a closing
        connection has not taken. There is no other way to know that it did not run."""
        with self._lock:
            self._stubs_locked()
            if self._single_stubs is None:
                self._single_stubs = _Stubs(self._address, [("grpc.enable_retries", 1), *_OPTIONS])
                self._held.append(self._single_stubs.channel)
            return self._single_stubs

    def _check_size(self, size: int, patience_s: float) -> None:
        """Raises InvalidCall for a payload that the process would not even read: gRPC itself ends
        such a call, and does not say whether it ran. Only the stream tells the limit."""
        if size <= Limits.min_message_limit:
            return
        calls = self.begin()
        with contextlib.suppress(CallFailed):  # then the call itself will tell
            self.wait_connected(calls, patience_s)
        if size > calls.most_bytes:
            reason = codec.too_large(size, calls.most_bytes)
            raise error_of(Detail(Code.INVALID_ARGUMENT, reason, Executed.NO), reason)

    def _ask(
        self,
        stubs: _Stubs,
        method: Any,
        request: Any,
        timeout_s: float,
        check: Callable[[Any], None] = lambda answer: None,
    ) -> Any:
        """The answer, judged by `check`. Raises CallFailed."""
        until = time.monotonic() + timeout_s
        with self._lock:
            self._asking += 1
        try:
            self._make_sure(stubs, min(self._patience_s, timeout_s))
            # wait_for_ready: a connection lost just now is waited for, and the call sent once.
            left_s = max(0.001, until - time.monotonic())
            answer = method(request, timeout=time.Timeout(left_s), wait_for_ready=True)
            check(answer)
        except BadResponse as e:
            reason = f"what serves at {self.shown} violates the protocol: {e}"
            raise error_of(Detail(e.code, reason), reason) from None
        except grpc.RpcError as error:
            if error.code() in SILENT:
                stubs.answered = -FRESH_S
            raise failure_of(error, self.shown, timeout_s) from None
        except ValueError:
            if not self._closed:
                raise
            # what gRPC raises for a channel that was closed meanwhile
            raise CallCancelled("this client was closed") from None
        finally:
            with self._lock:
                self._asking -= 1
        stubs.answered = time.monotonic()
        return answer

    def _make_sure(self, stubs: _Stubs, patience_s: float) -> None:
        """Raises NotReached unless the process answered a moment ago or does so now.

        A call itself waits for its whole deadline where nothing serves, and then cannot tell
        whether it was ever sent.
        """
        if time.monotonic() - stubs.answered < FRESH_S:
            return
        until = time.monotonic() + patience_s
        if stubs.is_greeted(min(PROMPT_S, patience_s)):
            return
        doubt = Doubt(self._address, until)
        while (left_s := until - time.monotonic()) > 0:
            if stubs.is_greeted(left_s):
                return
            time.sleep(min(0.05, left_s))
        raise doubt.error()


class _Stubs:
    """The stubs of a kept channel for single calls. answered: when a call last was; monotonic
    seconds."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]]) -> None:
        self.channel = Channel(address, options)
        self.node = codec.pb2_grpc.OverlayNodeStub(self.channel)
        self.admin = codec.pb2_grpc.OverlayAdminStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.answered = -FRESH_S

    def is_greeted(self, within_s: float) -> bool:
        """Whether a gRPC server answers, whatever it answers."""
        try:
            self.health.Check(
                health_pb2.HealthCheckRequest(), timeout=time.Timeout(within_s), wait_for_ready=True
            )
        except grpc.RpcError as error:
            return error.code() not in SILENT
        return True


def _is_wrong(calls: Submitter) -> bool:
    """Whether something answers at the address that will not take our stream later either."""
    refused = calls.refused
    return refused is not None and refused.code not in _MAY_PASS and not calls.is_full


_MAY_PASS = (Code.UNAVAILABLE, Code.CANCELLED)  # why a stream may be refused, and taken soon


def _closed(is_left: bool) -> CallFailed:
    if is_left:
        return CallFailed(environment.FORKED, code=Code.FAILED_PRECONDITION, executed=Executed.NO)
    return CallCancelled("this client is closed", executed=Executed.NO)


def _free(held: list[Submitter | Channel]) -> None:
    """Closes them in their order. May be called twice."""
    for one in list(held):
        one.close()
    environment.end_use(held)


def _free_soon(held: list[Submitter | Channel]) -> None:
    # On a thread of its own: closing waits, and a finalizer runs wherever the last reference goes,
    # on the pipe's thread too. By the bare function, which takes no lock of `threading`: that very
    # thread may just hold it.
    _thread.start_new_thread(_free, (held,))
