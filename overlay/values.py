"""What travels: a segment of requests going down, answers made of parts coming back.

All values are frozen, so they cross threads without a lock. Times are seconds of time.monotonic().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum


class Mode(IntEnum):
    """ALL: every worker in scope answers. ANY: exactly one does."""

    ALL = 0
    ANY = 1


class Executed(IntEnum):
    """Whether a handler saw the request. Only NO is proof; UNKNOWN is never sent again."""

    UNKNOWN = 0
    NO = 1
    YES = 2


class Code(IntEnum):
    """The gRPC status codes, by their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Route:
    """What the requests of one segment share.

    hops: ids already passed, oldest first. targets: the workers to cover, in the order of the
    configuration; None from a client, who leaves the choice to the process asked.
    """

    mode: Mode = Mode.ALL
    team: str = ""
    handler: str = ""
    hops: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One request's own columns."""

    request_id: int
    payload: bytes
    deadline: float
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """The unit that travels: requests of one route. A unary Forward is a segment of one."""

    route: Route
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def deadline(self) -> float:
        """The earliest of the items' deadlines."""
        return min(item.deadline for item in self.items)

    @property
    def size(self) -> int:
        """Bytes of payload."""
        return sum(len(item.payload) for item in self.items)

    def slice(self, start: int, count: int) -> Segment:
        return Segment(self.route, self.items[start : start + count])

    def again(self) -> Segment:
        """The same requests, to be tried once more."""
        return Segment(self.route, tuple(replace(i, attempt=i.attempt + 1) for i in self.items))

    def onward(self, me: str, targets: tuple[str, ...]) -> Segment:
        """The same requests as `me` hands them down, to cover `targets`."""
        return Segment(
            replace(self.route, hops=(*self.route.hops, me), targets=targets), self.items
        )


@dataclass(frozen=True, slots=True)
class Part:
    """What became of a request at one worker, or why it never got there."""

    process_id: str
    code: Code = Code.OK
    reason: str = ""
    result: bytes = b""
    hops: tuple[str, ...] = ()
    waited_us: int = 0
    worked_us: int = 0
    executed: Executed = Executed.UNKNOWN

    @property
    def ok(self) -> bool:
        return self.code is Code.OK


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer: a part per worker asked, and the processes that took part.

    hops: this process first, then depth first in the order of the configuration.
    refused: set when the process asked turned the request down as a whole; then there are no parts.
    """

    parts: tuple[Part, ...]
    hops: tuple[str, ...] = ()
    refused: Part | None = None


Sink = Callable[[int, Sequence[Answer]], None]
"""Takes answers as slices (start, answers). Each index comes exactly once, from any thread; a sink
never blocks and never raises."""

End = Callable[[Code], None]
"""Ends the work behind a call: what is still open is answered with this code, at once. May be
called twice, and after the end."""
