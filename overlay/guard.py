"""Two faults of gRPC for Python (1.85), put right, or a stranger could stop a process with them.

Guarded: a message that is no protobuf. After it gRPC keeps about 15 KB of a unary call for ever,
and ends a stream twice, which then never leaves the server. Here messages reach the methods as
bytes and are read there, on the method's own thread; what is no protobuf ends its call once, as
INVALID_ARGUMENT.

Health: Watch sends its news while it holds a lock. Only gRPC's serving thread completes a sending,
and it wants that lock when another watcher leaves: the whole process then stands still for ever.
Here the news is sent by a thread of its own, "health", from `Health` to `close`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health

from overlay import wire
from overlay.errors import BadRequest


class Guarded:
    """Takes the place of a server where generated code adds the methods of a service to it."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: the same methods come by name too, and are added both ways then."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        guarded = {name: _guarded(handler) for name, handler in handlers.items()}
        generic = grpc.method_handlers_generic_handler(service, guarded)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, guarded)


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


def _guarded(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    parse, serialize = handler.request_deserializer, handler.response_serializer
    if handler.stream_stream is not None:
        served = _reading_streams(handler.stream_stream, parse)
        return grpc.stream_stream_rpc_method_handler(served, None, serialize)
    if handler.unary_stream is not None:
        served = _reading(handler.unary_stream, parse)
        return grpc.unary_stream_rpc_method_handler(served, None, serialize)
    return grpc.unary_unary_rpc_method_handler(
        _reading(handler.unary_unary, parse), None, serialize
    )


def _reading(method: Callable[..., Any], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
    def served(message: bytes, context: grpc.ServicerContext, *more: Any, **named: Any) -> Any:
        try:
            request = _read(message, parse)
        except BadRequest as e:
            _refuse(context, e)
        return method(request, context, *more, **named)

    return _as(method, served)


def _reading_streams(
    method: Callable[..., Any], parse: Callable[[bytes], Any]
) -> Callable[..., Any]:
    def served(messages: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method((_read(message, parse) for message in messages), context)
        except BadRequest as e:
            _refuse(context, e)

    return _as(method, served)


def _as(method: Callable[..., Any], served: Callable[..., Any]) -> Callable[..., Any]:
    """With what gRPC looks for on a method: its threads, and how it answers."""
    for name in ("experimental_thread_pool", "experimental_non_blocking"):
        if hasattr(method, name):
            setattr(served, name, getattr(method, name))
    return served


def _refuse(context: grpc.ServicerContext, error: BadRequest) -> NoReturn:
    context.set_trailing_metadata(wire.trailers(error))
    context.abort(wire.grpc_code(error.code), str(error))
    raise AssertionError("context.abort always raises")


def _read(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(message)
    except Exception as e:  # noqa: BLE001 - protobuf's implementations each have errors of their own
        raise BadRequest(f"a message of {len(message):,} bytes is not protobuf: {e}") from None
