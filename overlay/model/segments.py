"""What travels: a segment of requests going down, slices of answers coming back.

Both are kept in columns, so that a process in the middle handles a thousand requests like one.
No value changes once it is made, so they cross threads without a lock. Times are seconds of
time.monotonic().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from overlay.model import json_values

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

    Made = TypeVar("Made")

    @dataclass_transform(frozen_default=True)
    def value(cls: type[Made]) -> type[Made]: ...
else:
    # Frozen for the type checker only: at run time that would triple the cost of making one, and
    # each request makes some at every hop.
    value = dataclass(slots=True)


class Mode(IntEnum):
    """ALL: every worker in scope answers. ANY: exactly one does."""

    ALL = 0
    ANY = 1

    __hash__ = int.__hash__  # Enum's own is written in Python


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


class Caller(NamedTuple):
    """Who asks: the address of its machine, and what it calls itself there, if anything.

    Only the address is more than a claim: what is shared out is shared out by address, and among
    the names of one address only what that address has.
    """

    address: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.address} ('{self.name}')" if self.name else self.address


NOBODY = Caller()


class Progress(NamedTuple):
    """How a map goes, as its client says. total: 0 when it does not know. took_s: so far."""

    number: int
    handler: str
    answered: int
    failed: int
    total: int
    took_s: float
    is_over: bool = False


class Route(NamedTuple):
    """What the requests of one segment share.

    hops: ids already passed, oldest first. targets: the workers to cover, in the order of the
    configuration; None from a client, who leaves the choice to the process asked.
    """

    mode: Mode = Mode.ALL
    team: str = ""
    handler: str = ""
    hops: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None


class Column:
    """Byte strings, one per row, opened only by those who need to look.

    A column that came over the wire stays in that form, so that a process in the middle copies it
    on unread: `wired` is that form and `open_wired` gives its strings.
    """

    __slots__ = ("_items", "_open_wired", "_size", "count", "wired")

    def __init__(
        self,
        items: Sequence[bytes] | None = None,
        *,
        wired: object = None,
        count: int = 0,
        size: int | None = None,
        open_wired: Callable[[object, int], Sequence[bytes]] | None = None,
    ) -> None:
        self._items = items
        self.wired = wired
        self._open_wired = open_wired
        self._size = size
        self.count = count if items is None else len(items)

    def __len__(self) -> int:
        return self.count

    @property
    def items(self) -> Sequence[bytes]:
        if self._items is None:
            assert self._open_wired is not None
            self._items = self._open_wired(self.wired, self.count)
        return self._items

    @property
    def size(self) -> int:
        """Bytes, about."""
        if self._size is None:
            self._size = sum(map(len, self.items))
        return self._size

    def slice(self, start: int, count: int) -> Column:
        if start == 0 and count == self.count:
            return self
        return Column(self.items[start : start + count])


@value
class Chunk:
    """A part of a result that comes in chunks: `at` bytes came before this one.

    more: others follow it. grant: tells the worker that so many more may come; None where nothing
    follows, and before it is known whom to tell.
    """

    at: int
    more: bool
    grant: Callable[[int], None] | None = None


@value
class Segment:
    """The unit that travels: requests of one route and one deadline, their payloads in a column.

    The request in row i has the id first_id + i, or ids[i] when they do not follow each other. A
    unary Forward is a segment of one. keyed: it has an idempotency key, so that what was lost on
    its way may run once more elsewhere. traced: each process tells what its way took there. told:
    and writes what became of it to its log. early: wants each part of a request to all as it comes;
    the answer then has the others only. chunks: and takes a part in chunks, so many before it has
    granted more; 0 for whole ones only. own_ids: the sender's library or the first process asked
    made the ids, at random and never again; else the caller chose them.
    """

    route: Route
    payloads: Column
    deadline: float
    first_id: int
    attempt: int = 0
    ids: tuple[int, ...] | None = None
    keyed: bool = False
    traced: bool = False
    told: bool = False
    early: Early | None = None
    chunks: int = 0
    own_ids: bool = False

    def __len__(self) -> int:
        return self.payloads.count

    @property
    def count(self) -> int:
        return self.payloads.count

    @property
    def all_ids(self) -> Sequence[int]:
        return self.ids or range(self.first_id, self.first_id + self.payloads.count)

    def slice(self, start: int, count: int) -> Segment:
        if start == 0 and count == self.payloads.count:
            return self
        rows = self.payloads.slice(start, count)
        ids = self.ids[start : start + count] if self.ids else None
        first_id = ids[0] if ids else self.first_id + start
        early = self.early and shifted(self.early, start)
        rest = self.attempt, ids, self.keyed, self.traced, self.told, early, self.chunks
        return Segment(self.route, rows, self.deadline, first_id, *rest, self.own_ids)

    def again(self) -> Segment:
        """The same requests, to be tried once more."""
        return replace(self, attempt=self.attempt + 1)

    def onward(self, me: str, targets: tuple[str, ...]) -> Segment:
        """The same requests as `me` hands them down, to cover `targets`."""
        route = self.route
        down = Route(route.mode, route.team, route.handler, (*route.hops, me), targets)
        rest = self.attempt, self.ids, False, self.traced, self.told, self.early, self.chunks
        return Segment(down, self.payloads, self.deadline, self.first_id, *rest, self.own_ids)

    @staticmethod
    def joined(segments: Sequence[Segment]) -> Segment:
        """Segments of one route, attempt and kind of ids as one.

        Its deadline is the earliest of theirs.
        """
        first = segments[0]
        if len(segments) == 1:
            return first
        payloads = [payload for segment in segments for payload in segment.payloads.items]
        ids = tuple(id_ for segment in segments for id_ in segment.all_ids)
        deadline = min(segment.deadline for segment in segments)
        traced = any(segment.traced for segment in segments)
        told = any(segment.told for segment in segments)
        rest = first.attempt, ids, False, traced, told
        own = first.own_ids
        return Segment(first.route, Column(payloads), deadline, ids[0], *rest, own_ids=own)


class Hop(NamedTuple):
    """What the way of requests took at one process, in microseconds.

    waited: in its queue. worked: in service there. depth: 0 at the process that tells. away: from
    being asked to its answer, by the clock of the process above it; 0 when not known.
    """

    process_id: str
    waited_us: int = 0
    worked_us: int = 0
    depth: int = 0
    code: Code = Code.OK
    away_us: int = 0


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
    retry_after_s: float | None = None  # of a refusal by the process asked, when it says so

    @property
    def ok(self) -> bool:
        return self.code is Code.OK

    @property
    def value(self) -> Any:
        """The result as the JSON value that it is, of a typed function. Raises ValueError."""
        return json_values.read(self.result)


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One request's answer: a part per worker asked, and the processes that took part.

    hops: this process first, then depth first in the order of the configuration.
    refused: set when the process asked turned the request down as a whole; then there are no parts.
    """

    parts: tuple[Part, ...]
    hops: tuple[str, ...] = ()
    refused: Part | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row has no result."""

    code: Code
    reason: str
    executed: Executed = Executed.UNKNOWN
    retry_after_s: float | None = None  # of a refusal, when it says so

    @property
    def is_handlers(self) -> bool:
        """Whether the handler came to an end with it."""
        return self.executed is Executed.YES and self.code in _HANDLERS_OWN


_HANDLERS_OWN = Code.INTERNAL, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED


@value
class PartColumn:
    """One worker's parts of consecutive requests.

    failures: by row, only the rows that failed. failed: the failure of every row. The times are
    means over the rows, in microseconds. chunk: of a column of one row, whose result is not whole.
    """

    process_id: str
    results: Column
    hops: tuple[str, ...] = ()
    failures: Mapping[int, Failure] = field(default_factory=dict)
    failed: Failure | None = None
    waited_us: int = 0
    worked_us: int = 0
    chunk: Chunk | None = None

    def at(self, row: int) -> Part:
        failure = self.failed or self.failures.get(row)
        times = self.waited_us, self.worked_us
        if failure is None:
            result = self.results.items[row]
            return Part(self.process_id, Code.OK, "", result, self.hops, *times, Executed.YES)
        code, reason = failure.code, failure.reason
        return Part(self.process_id, code, reason, b"", self.hops, *times, failure.executed)

    def slice(self, start: int, count: int) -> PartColumn:
        if start == 0 and count == self.results.count:
            return self
        if count < len(self.failures):  # or to slice row by row would look at each for each
            rows = (row for row in range(start, start + count) if row in self.failures)
        else:
            rows = (row for row in self.failures if start <= row < start + count)
        failures = {row - start: self.failures[row] for row in rows}
        results = self.results.slice(start, count)
        times = self.waited_us, self.worked_us
        return PartColumn(self.process_id, results, self.hops, failures, self.failed, *times)

    @property
    def is_over(self) -> bool:
        """No more of it follows."""
        return self.chunk is None or not self.chunk.more

    def granted_by(self, grant: Callable[[str, int], None]) -> PartColumn:
        """As Answers.granted_by."""
        if self.chunk is None or not self.chunk.more:
            return self
        tell = partial(grant, self.process_id)
        return replace(self, chunk=Chunk(self.chunk.at, True, tell))

    @staticmethod
    def missing(process_id: str, count: int, failure: Failure) -> PartColumn:
        return PartColumn(process_id, Column((b"",) * count), failed=failure)


@value
class Answers:
    """The answers of consecutive requests: a column of parts per worker asked.

    hops, refused: as in AnswerRow, the same for all rows. trace: what the
    way took below this process, where that was told. early_us: how long the slowest of the parts
    that went before the answer had waited and worked, where any did.
    """

    count: int
    parts: tuple[PartColumn, ...]
    hops: tuple[str, ...] = ()
    refused: Part | None = None
    trace: tuple[Hop, ...] = ()
    early_us: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def flawless(self) -> bool:
        if self.refused is not None:
            return False
        for column in self.parts:  # noqa: SIM110 - all() of a generator takes three times as long
            if column.failed is not None or column.failures:
                return False
        return True

    @property
    def failed_rows(self) -> int:
        """How many rows lack a part or more."""
        if self.refused is not None or any(column.failed for column in self.parts):
            return self.count
        return len({row for column in self.parts for row in column.failures})

    @property
    def is_worked_for(self) -> bool:
        """Whether of at least one row all its handlers came to an end, however that was.

        Where one was late, lost or refused, how long the answer took says nothing of the work.
        """
        if self.flawless:
            return True
        if self.refused is not None:
            return False
        unworked: set[int] = set()
        for column in self.parts:
            if column.failed is not None and not column.failed.is_handlers:
                return False
            unworked.update(row for row, why in column.failures.items() if not why.is_handlers)
        return len(unworked) < self.count

    @property
    def is_too_late(self) -> bool:
        """Whether no part of any row came before its deadline."""
        late = Code.DEADLINE_EXCEEDED
        return bool(self.parts) and all(c.failed and c.failed.code is late for c in self.parts)

    def at(self, row: int) -> AnswerRow:
        return AnswerRow(tuple(column.at(row) for column in self.parts), self.hops, self.refused)

    def granted_by(self, grant: Callable[[str, int], None]) -> Answers:
        """With chunks that tell this (worker, how many more may come) who is to have more."""
        parts = tuple(column.granted_by(grant) for column in self.parts)
        return replace(self, parts=parts)

    def slice(self, start: int, count: int) -> Answers:
        if start == 0 and count == self.count:
            return self
        parts = tuple(column.slice(start, count) for column in self.parts)
        return Answers(count, parts, self.hops, self.refused, self.trace)


Sink = Callable[[int, Answers], None]
"""Takes answers as slices: (first row, answers). Each row comes exactly once, from any thread; a
sink never blocks and never raises."""


Early = Callable[[int, Answers], None]
"""Takes parts that have come before their rows' answers: (first row, answers with some parts). Any
thread; as quick as a sink. What comes after its row's answer is dropped, and what comes twice."""


def shifted(early: Early, start: int) -> Early:
    """For the rows from `start` on, numbered from 0."""
    return lambda row, answers: early(start + row, answers)


def end_overlap(end: End, first: int, rows: int, code: Code, start: int, count: int) -> None:
    """Ends those of the `count` rows from `start` that are among the `rows` of `end`."""
    begin, stop = max(first, start), min(first + rows, start + count)
    if begin < stop:
        end(code, begin - first, stop - begin)


End = Callable[[Code, int, int], None]
"""Ends the work behind rows: (code, first row, rows). What is still open of them is answered with
this code, at once. May be called twice, and after the end."""
