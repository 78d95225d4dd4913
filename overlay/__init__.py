"""A request queue for the computers you already own.

Fourteen packages. Imports only go down in this list; `lint-imports` checks it (pyproject.toml).

    server                     one running process: startup, shutdown, metrics
    jobs                       requests that are kept on disk until they are answered
    calls                      incoming requests, unary or streamed
    cli                        one file per verb of client.py
    peers                      connections to the processes below
    monitor                    a view of a whole overlay
    routing  workers  client   choosing processes | running the user's functions | the library
    queueing  transport        waiting requests and their order | gRPC and protobuf
    observability  security    counters, traces, logs | certificates
    model                      values and configuration

A line belongs in the package of the noun that it is about; if it needs two nouns, in the higher
one. The entry points are on top: node.py serves one process, client.py asks, scripts/ start and
stop. docs/architecture.md has a diagram, a request's path, the threads, and which file to change.

The path of a request, in every process that it passes:

    node.Forward -> calls.unary -> calls.request_path -> queueing.request_queue
        => routing.dispatcher -> routing.planner
        => routing.dispatcher -> peers              to the processes below
                              -> workers.executor   in a worker
        <- routing.aggregate <- transport.codec
"""

import os

# gRPC documents this setting and reads it when it is imported. By default gRPC restarts its threads
# in a forked child, where it is not ready for them: with clients in use, 94 of 600 children
# aborted, and none with this setting (gRPC 1.85, Linux, 2026-11).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazily, so that `import overlay` needs neither grpc nor the generated stubs.
    if name in {"connect", "Client", "connect_async", "AsyncClient", "Answer", "CallFailed"}:
        from overlay import client

        return getattr(client, name)
    if name == "client":  # so that overlay.client.NotReached needs no other import
        import importlib

        return importlib.import_module("overlay.client")
    if name == "Context":
        from overlay.workers import api

        return api.Context
    if name == "BadRequest":
        from overlay.model import errors

        return errors.BadRequest
    raise AttributeError(f"module 'overlay' has no attribute '{name}'")
