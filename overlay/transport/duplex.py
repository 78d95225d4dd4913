"""A call with a stream in each direction, whose events come as callbacks.

    send(message)                  any thread: to gRPC directly --> on_sent
    begin_reading() --> on_message, on_message, ... one at a time, on the channel's thread in gRPC

gRPC for Python has a thread that takes requests from an iterator, and one that waits for answers.
Waking them costs more than all else that a small request needs: 32 switches between threads instead
of 7, for each call by the library. So this is built on grpcio's internals (`_channel`, 1.80 to
1.85), as overlay.calls.reception is; tests/transport/test_duplex.py states what is expected of it.

What is called back on the channel's thread must be quick and must not close the channel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc import _channel, _common
from grpc._cython import cygrpc

log = logging.getLogger(__name__)

_NO_FLAGS = 0
_CANCELLED = cygrpc.StatusCode.cancelled


class DuplexCall:
    """One call, begun by the constructor, which does not block. Thread-safe."""

    def __init__(
        self,
        channel: grpc.Channel,
        method: str,
        metadata: Sequence[tuple[str, str]],
        on_message: Callable[[bytes], None],
        on_sent: Callable[[], None],
        on_over: Callable[[], None],
    ) -> None:
        """Waits for a connection as long as it takes. Raises ValueError if the channel is closed.

        on_message: an exception that it raises ends the call. on_sent: gRPC has taken the message,
        or never will. on_over: nothing is called back any more.
        """
        self._on_message = on_message
        self._on_sent = on_sent
        self._on_over = on_over
        self._lock = threading.Lock()
        self._due = 2  # batches of operations that gRPC has not reported yet
        self._accepted = threading.Event()
        self._over = threading.Event()
        self._metadata: Any = None
        self._has_status = False
        self._error: grpc.RpcError | None = None
        self._failure: Exception | None = None
        makes = channel.stream_stream(method)
        flags = _channel._InitialMetadataFlags().with_wait_for_ready(True)
        metadata = tuple(metadata)
        begin = (
            cygrpc.SendInitialMetadataOperation(metadata, flags),
            cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        answer = (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),)
        self._call: Any = makes._managed_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            makes._method,
            None,
            None,
            metadata,
            None,
            (begin, answer),
            self._on_event,
            makes._context,
            makes._registered_call_handle,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and nothing is called back any more."""
        return self._over.is_set()

    @property
    def is_ending(self) -> bool:
        """Whether the server has ended it."""
        return self._has_status

    def wait_accepted(self) -> dict[str, Any]:
        """Waits until the server has accepted the call, or it is over. Returns its metadata."""
        self._accepted.wait()
        return dict(self._metadata or ())

    def begin_reading(self) -> None:
        """Call it once."""
        self._operate(cygrpc.ReceiveMessageOperation(_NO_FLAGS), self._on_received)

    def send(self, message: bytes) -> bool:
        """Sends a message; the next one may be sent after `on_sent`. False if the call is over:
        then the message was never handed to gRPC, and `on_sent` is not called."""
        return self._operate(cygrpc.SendMessageOperation(message, _NO_FLAGS), self._on_taken)

    def cancel(self) -> None:
        self._call.cancel(_CANCELLED, "Locally cancelled by application!")

    def wait_over(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is called back any more. Returns whether that is so."""
        return self._over.wait(timeout_s)

    def error(self) -> Exception | None:
        """Why it ended: what `on_message` raised, or a grpc.RpcError; None if the server ended it
        with OK. Once it is over."""
        return self._failure or self._error

    def _operate(self, operation: Any, tag: Callable[[Any], bool]) -> bool:
        with self._lock:
            # Afterwards gRPC does not know the call any more.
            if self._over.is_set() or not self._call.operate((operation,), tag):
                return False
            self._due += 1
        return True

    # on the channel's thread

    def _on_event(self, event: Any) -> bool:
        for operation in event.batch_operations:
            kind = operation.type()
            if kind == cygrpc.OperationType.receive_initial_metadata:
                self._metadata = operation.initial_metadata()
                self._accepted.set()
            elif kind == cygrpc.OperationType.receive_status_on_client:
                self._error, self._has_status = _error_of(operation), True
        return self._is_done()

    def _on_received(self, event: Any) -> bool:
        message = event.batch_operations[0].message()
        if message is not None:
            try:
                self._on_message(message)
            except Exception as e:  # noqa: BLE001 - it must not end the channel's thread
                self._failure = e
                self.cancel()
            else:
                self._operate(cygrpc.ReceiveMessageOperation(_NO_FLAGS), self._on_received)
        return self._is_done()

    def _on_taken(self, event: Any) -> bool:
        try:
            self._on_sent()
        except Exception as e:  # noqa: BLE001 - as above
            self._failure = e
            self.cancel()
        return self._is_done()

    def _is_done(self) -> bool:
        with self._lock:
            self._due -= 1
            is_done = not self._due
            if is_done:
                self._over.set()
        if is_done:
            self._accepted.set()
            self._on_over()
        return is_done


def _error_of(operation: Any) -> grpc.RpcError | None:
    """The status of a call; None if it is OK."""
    codes = _common.CYGRPC_STATUS_CODE_TO_STATUS_CODE
    code = codes.get(operation.code(), grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.OK:
        return None
    state = _channel._RPCState((), None, operation.trailing_metadata(), code, operation.details())
    state.debug_error_string = operation.error_string()
    return _channel._InactiveRpcError(state)
