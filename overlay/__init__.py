"""A request queue for the computers you already own.

The floor plan. A module imports only from floors below its own, or on its own floor where an
arrow says so; tests/test_floors.py compares this picture with the code.

    4 edges      admin -> service -> streams   admin -> journal   service -> journal
                 reflection -> reception   connections   listening
                 console -> client -> connection -> calls -> orders
                 client -> mapping -> connection -> outcomes -> calls   client -> arguments
                 client -> parts -> calls   client, mapping, connection, arguments -> orders
                 client -> outcomes   mapping -> arguments, outcomes, telling
                 telling -> connection, outcomes
                 aio -> arguments, calls, connection, orders, outcomes, parts, telling
                 exporter -> door
                 asking, bulk, checking, describing, draining, reading -> client, console
                 doctor -> client, console
                 addressing -> console
                 web -> watch, console, door
                 top -> watch, console, screenful   screenful -> console
    3 relay      relay   record
    2 mechanism  intake   deadlines   keys   ids   logs -> recent   repeats   stories
                 memory   pool   resources   stdio   ending   usage   spawned   surroundings
                 callbacks   machine, hosts, channels -> names
                 links -> books, channels, wire   books -> pipes, pieces, wire   pipes -> wire
                 wire -> judge, maps, meter, recent   judge -> recent
                 executor -> threads, processes -> batch -> handlers, ids, meter, pieces
                 executor -> batch, handlers, ids, sources   threads -> handlers, logs, pieces
                 processes -> child -> batch, handlers, logs, pieces, sources, started
                 processes -> pieces, sources, started   handlers -> sources
                 threads, child -> typed -> handlers, pieces
    1 decisions  routing -> health   assembly   lanes -> admission   rows   story   allowance
                 picture -> history, events   diagnosis   crowd   density   functions
    0 values     errors -> values -> jsons   limits   topology -> limits, errors   clocks
                 configuration -> topology, limits, errors

Entries on top: node.py serves one process, client.py asks, scripts/ start and stop.

Decisions are pure: no grpc, no threads, no clock of their own; all others have theirs from clocks.
`grpc` is known to wire, pipes, books, channels, links and the edges, and to node.py; `threading` to
the mechanism floor and above.

A request's way, on every process it passes:

    node.Forward -> service -> wire.read -> intake.admit -> ticket.wait
                        => relay.claim -> routing.plan
                        => relay.start -> links.send(neighbour, segment, sink)    team leaders
                                       -> executor.run(segment, sink)             workers
                    <- assembly.combine <- wire.write
"""

import os

# As gRPC documents it, and looked at when it is imported. By default its threads begin anew in the
# child of a fork, where it is not ready for them: with clients in use 94 of 600 children were
# aborted, and none without (gRPC 1.85, Linux, 2026-11).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazily, so that `import overlay` needs neither grpc nor the generated stubs.
    if name in {"connect", "Client", "Answer", "CallFailed"}:
        from overlay import client

        return getattr(client, name)
    if name in {"connect_async", "AsyncClient"}:
        from overlay import aio

        return getattr(aio, name)
    if name == "Context":
        from overlay import handlers

        return handlers.Context
    if name == "BadRequest":
        from overlay import errors

        return errors.BadRequest
    raise AttributeError(f"module 'overlay' has no attribute '{name}'")
