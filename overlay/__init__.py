"""A request queue for the computers you already own.

The floor plan. A module imports only from floors below its own, or on its own floor where an
arrow says so; tests/test_floors.py compares this picture with the code.

    4 edges      admin -> service -> streams   admin -> journal   service -> journal
                 reception   connections
                 console -> client -> connection -> calls -> orders
                 client -> mapping -> connection -> outcomes -> calls   client -> arguments
                 client -> parts -> calls   client, mapping, connection, arguments -> orders
                 client -> outcomes   mapping -> arguments, outcomes
                 aio -> arguments, calls, connection, orders, outcomes, parts   exporter -> door
                 asking, bulk, checking, draining, reading, doctor -> client, console
                 addressing -> console
                 web -> watch, console, door   watch -> connection
                 top -> watch, console, screenful   screenful -> console
    3 relay      relay   record
    2 mechanism  intake   deadlines   keys   ids   logs -> recent   repeats   stories
                 machine   hosts   memory   pool   callbacks
                 links -> books, wire   books -> pipes, pieces, wire   pipes -> wire
                 wire -> judge, meter, recent   judge -> recent
                 executor -> threads, processes -> batch -> handlers, ids, meter, pieces
                 executor -> batch, handlers, ids   threads -> handlers, logs, pieces
                 processes -> child -> batch, handlers, logs, pieces   processes -> pieces
    1 decisions  routing -> health   assembly   lanes -> admission   rows   story   allowance
                 picture -> history   diagnosis   crowd   density
    0 values     errors -> values   limits   topology -> limits, errors
                 configuration -> topology, limits, errors

Entries on top: node.py serves one process, client.py asks, scripts/ start and stop.

Decisions are pure: no grpc, no threads, no clock of their own. `grpc` is known to wire, pipes,
books, links and the edges, and to node.py; `threading` to the mechanism floor and above.

A request's way, on every process it passes:

    node.Forward -> service -> wire.read -> intake.admit -> ticket.wait
                        => relay.claim -> routing.plan
                        => relay.start -> links.send(neighbour, segment, sink)    team leaders
                                       -> executor.run(segment, sink)             workers
                    <- assembly.combine <- wire.write
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazily, so that `import overlay` needs neither grpc nor the generated stubs.
    if name in {"connect", "Client", "Answer", "CallFailed"}:
        from overlay import client

        return getattr(client, name)
    if name in {"connect_async", "AsyncClient"}:
        from overlay import aio

        return getattr(aio, name)
    if name == "BadRequest":
        from overlay import errors

        return errors.BadRequest
    raise AttributeError(f"module 'overlay' has no attribute '{name}'")
