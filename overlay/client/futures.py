"""The Futures of Client.submit: one request each.

Callbacks run on the connection's callback thread, never on the one that receives answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, NoReturn

from overlay.client.arguments import CallOptions
from overlay.client.callbacks import Callbacks
from overlay.client.connection import Connection
from overlay.client.outbox import Submission
from overlay.client.results import NOT_PICKLED, read_value, result_of
from overlay.model import clocks as time
from overlay.model.segments import Detail


class CallFuture(Future):  # type: ignore[type-arg]
    """Its result is bytes, its exception a CallFailed; cancel() cancels the request."""

    def __init__(self, connection: Connection, options: CallOptions) -> None:
        super().__init__()
        self.callbacks: Callbacks | None = None  # where callbacks run during a delivery
        self._connection: Connection | None = connection  # None once it is done
        self._timeout_s = options.timeout_s
        deadline = time.monotonic() + options.timeout_s
        self._submission: Submission | None = Submission(
            options.kind, (options.body,), deadline, self._deliver
        )

    def send(self) -> None:
        """Raises NotReached if no server is listening at the address."""
        connection, submission = self._connection, self._submission
        assert connection is not None
        assert submission is not None
        try:
            connection.open_futures.add(self)
            connection.send(submission, self._timeout_s)
        except BaseException:  # it was not sent; or Ctrl-C, and nobody has it
            connection.open_futures.discard(self)
            raise

    def result(self, timeout: float | None = None) -> Any:
        self._check_same_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_same_process()
        return super().exception(timeout)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def _deliver(self, rows: Sequence[int], delivered: Any, at: int, request_id: int) -> None:
        connection = self._connection
        assert connection is not None
        self.callbacks = connection.callbacks
        try:
            if isinstance(delivered, Detail):
                self.set_exception(connection.error_for(delivered, self._timeout_s, request_id))
            else:
                self.set_result(result_of(delivered, at))
        except InvalidStateError:
            self.set_running_or_notify_cancel()  # it was cancelled: wakes the waiting threads
        self._submission = self.callbacks = self._connection = (
            None  # the submission refers to this method
        )
        connection.open_futures.discard(self)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        super().add_done_callback(partial(_call, fn))

    def cancel(self) -> bool:
        submission, connection = self._submission, self._connection
        cancelled = super().cancel()
        if cancelled and submission is not None and connection is not None:
            connection.cancel(submission)
        return cancelled

    def _check_same_process(self) -> None:
        if (connection := self._connection) is not None:
            connection.check_same_process()


class ValueFuture(CallFuture):
    """Its result is a JSON value, parsed by the caller's thread: a large one takes a while."""

    _value: Any = None
    _is_read = False

    def result(self, timeout: float | None = None) -> Any:
        if not self._is_read:
            self._value, self._is_read = read_value(super().result(timeout)), True
        return self._value


def _call(fn: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    callbacks = future.callbacks if isinstance(future, CallFuture) else None
    fn(future) if callbacks is None else callbacks.put(fn, future)
