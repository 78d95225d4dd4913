"""Two faults of gRPC for Python (1.85), put right, or a stranger could stop a process with them.

Guard: a stream's message that is no protobuf. gRPC ends such a call while its method still reads,
and again when the method returns; after that the call never leaves the server, which keeps its
memory and never says that it has stopped. Here the method's own iterator raises BadRequest instead,
and the call has one end, INVALID_ARGUMENT. Messages are read on the thread that asks for them.

Health: Watch sends its news while it holds a lock. Only gRPC's serving thread completes a sending,
and it wants that lock when another watcher leaves: the whole process then stands still for ever.
Here the news is sent by a thread of its own, "health", from `Health` to `close`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health

from overlay.errors import BadRequest


class Guard(grpc.ServerInterceptor):  # type: ignore[misc]
    """For `grpc.server(…, interceptors=)`. Unary requests pass as they are."""

    def intercept_service(
        self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        if handler is None or handler.stream_stream is None:
            return handler
        return grpc.stream_stream_rpc_method_handler(
            _guarded(handler.stream_stream, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class Health(health.HealthServicer):  # type: ignore[misc]
    """pool: the threads that let watchers in; none holds one for long."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=pool)
        self._teller = ThreadPoolExecutor(1, "health")

    def Watch(
        self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None
    ) -> Any:
        def tell(response: Any) -> None:
            with contextlib.suppress(RuntimeError):  # closed: the server has stopped
                self._teller.submit(send_response_callback, response)

        return super().Watch(request, context, tell)

    def close(self) -> None:
        self._teller.shutdown(wait=False, cancel_futures=True)


def _guarded(method: Callable[..., Any], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
    def served(messages: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method((_read(message, parse) for message in messages), context)
        except BadRequest as e:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))

    served.experimental_thread_pool = getattr(method, "experimental_thread_pool", None)  # type: ignore[attr-defined]
    return served


def _read(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(message)
    except Exception as e:  # noqa: BLE001 - protobuf's implementations each have errors of their own
        raise BadRequest(f"a message of {len(message):,} bytes is not protobuf: {e}") from None
