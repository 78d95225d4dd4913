"""Raw grpcio as its documentation advises: kept channels, a thread pool, deadlines; plain bytes,
without protobuf. Shared by the hop and the chain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.handlers import answer
from tests.harness.machine import free_port

POOL = 96  # threads of a server: with fewer than callers, calls that wait for each other would hang
SERVICE = "benchmark.Work"
OPTIONS = [("grpc.so_reuseport", 0)]


def serve(
    ready,
    address: str,
    methods: dict[str, Callable],
    pool: int,
    streams: dict[str, Callable] | None = None,
) -> None:
    """Serves these methods (bytes -> bytes) and streams until the process is ended."""
    import grpc

    handlers = {name: grpc.unary_unary_rpc_method_handler(f) for name, f in methods.items()}
    for name, f in (streams or {}).items():
        handlers[name] = grpc.stream_stream_rpc_method_handler(f)
    server = grpc.server(ThreadPoolExecutor(pool), options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    if not server.add_insecure_port(address):
        raise OSError(f"{address} is taken")
    server.start()
    ready()
    threading.Event().wait()


def serve_worker(ready, address: str, name: str, slots: int | None, nap_s: float) -> None:
    def work(request, context):
        return answer(name, request, nap_s)

    serve(ready, address, {"Any": work, "All": work}, slots or POOL)


def method(address: str, name: str):
    """A new channel, once it is connected, and the method over it as a callable."""
    import grpc

    channel = grpc.insecure_channel(address)
    grpc.channel_ready_future(channel).result(30)
    return channel, channel.unary_unary(f"/{SERVICE}/{name}")


def address() -> str:
    return f"127.0.0.1:{free_port()}"
