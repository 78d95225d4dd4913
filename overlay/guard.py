"""Streams survive a message that is no protobuf.

gRPC for Python ends such a call while its method still reads, and again when the method returns.
After the second end the call never leaves the server: it keeps its memory, and the server never
says that it has stopped (grpcio 1.85). Here the method's own iterator raises BadRequest instead,
and the call has one end, INVALID_ARGUMENT. Messages are read on the thread that asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

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
