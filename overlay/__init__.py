"""A request queue for the computers you already own.

Twelve packages; imports go down only, and `lint-imports` checks it (pyproject.toml).

    server                     one running process: its start and stop, its figures
    calls                      requests as they come, one or a stream of them
    cli                        one file per verb of client.py, named as the verb
    peers                      the kept links to the processes below
    monitor                    a view of a whole overlay
    routing  workers  client   which processes are asked | the user's function runs | the library
    queueing  transport        what waits, whose turn it is | gRPC and protobuf
    observability              counters, traces, logs
    model                      values and configuration

Which package a line belongs to: name the noun that it is about; if it needs two, it goes to the
higher one. On top are the entries: node.py serves one process, client.py asks, scripts/ start and
stop. docs/architecture.md has the picture, a request's way, the threads, and which file to touch.

The way of a request, in every process that it passes:

    node.Forward -> calls.unary -> calls.request_path -> queueing.request_queue
        => routing.dispatcher -> routing.planner
        => routing.dispatcher -> peers              to the processes below
                              -> workers.executor   in a worker
        <- routing.aggregate <- transport.codec
"""

import os

# As gRPC documents it, and looked at when it is imported. By default its threads begin anew in the
# child of a fork, where it is not ready for them: with clients in use 94 of 600 children were
# aborted, and none without (gRPC 1.85, Linux, 2026-11).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazily, so that `import overlay` needs neither grpc nor the generated stubs.
    if name in {"connect", "Client", "connect_async", "AsyncClient", "Answer", "CallFailed"}:
        from overlay import client

        return getattr(client, name)
    if name == "client":  # as overlay.client.NotReached, without an import of its own
        import importlib

        return importlib.import_module("overlay.client")
    if name == "Context":
        from overlay.workers import api

        return api.Context
    if name == "BadRequest":
        from overlay.model import errors

        return errors.BadRequest
    raise AttributeError(f"module 'overlay' has no attribute '{name}'")
