"""What a process lends: the right of one client to send short requests straight to one worker.

    client --LeaseRequest--> the process asked --Lent--> ... --Lent--> the worker
    client <-----Lease------ the process asked <--LaneReport-- ... <-- the worker

Times are seconds.
"""

from __future__ import annotations

from typing import NamedTuple

from overlay.model.segments import Caller, Code, Executed

LONGEST_S = 0.02  # of a request on a lane; a longer one gains nothing
MAX_LANES = 16  # of one client; each is a connection, with threads at both ends
ENDED_UNRUN = (Code.CANCELLED, Code.DEADLINE_EXCEEDED)
"""With these a request has ended even if it did not run; it is not sent elsewhere."""


class LeaseRequest(NamedTuple):
    """rows: how many requests the client has unanswered at a time. without: the workers that it
    cannot reach."""

    handler: str
    team: str
    rows: int
    without: tuple[str, ...] = ()


class Lease(NamedTuple):
    """What a client may send straight to a worker. From the worker itself only id and rows count.

    rows: how many requests may be unanswered there; 0: it has ended. slots: how many run at once.
    """

    id: int
    worker: str = ""
    address: str = ""
    handler: str = ""
    team: str = ""
    rows: int = 0
    slots: int = 0


class Lent(NamedTuple):
    """What the worker is told of a lease. for_s: until it ends unless it is renewed. caller: the
    name of its client's certificate; empty without TLS."""

    id: int
    worker: str
    handler: str
    rows: int
    for_s: float
    caller: str = ""


class LaneOutcome(NamedTuple):
    """How `rows` requests ended. waited_s, worked_s: in the worker's queue and in its handler,
    each; means. request_id: of one of them."""

    rows: int
    code: Code = Code.OK
    reason: str = ""
    executed: Executed = Executed.YES
    waited_s: float = 0.0
    worked_s: float = 0.0
    request_id: int = 0


class LaneReport(NamedTuple):
    """How the requests of a lease ended since the last report. unanswered: now."""

    id: int
    is_over: bool = False
    unanswered: int = 0
    outcomes: tuple[LaneOutcome, ...] = ()


def shown(caller: Caller) -> str:
    """The name that it gave, or its machine."""
    return caller.name or caller.address


class LentNow(NamedTuple):
    """A lease as people see it. since_s: seconds since it was made."""

    process_id: str
    handler: str
    caller: str
    rows: int
    unanswered: int
    answered: int
    since_s: float
