"""What processes exchange: segments of requests on the way down, slices of answers on the way back.

Both are stored in columns, so that a process in the middle handles a thousand requests like one.
Values never change once made, so threads share them without a lock. Times are seconds of
time.monotonic().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from overlay.model import json_values

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform

    T = TypeVar("T")

    @dataclass_transform(frozen_default=True)
    def value(cls: type[T]) -> type[T]: ...
else:
    # Frozen for the type checker only: at run time that would triple the cost of making one, and
    # each request makes several at every hop.
    value = dataclass(slots=True)


class Copied:
    """A value that can be copied with changes."""

    __slots__: tuple[str, ...] = ()

    def with_(self, **changes: object) -> Self:
        """A copy with these fields changed.

        Takes 1.5 us for a Segment; naming each field again takes 0.8 us, dataclasses.replace 3 us
        (CPython 3.11, 2026-11).
        """
        copy = object.__new__(type(self))
        for name in self.__slots__:
            setattr(copy, name, getattr(self, name))
        for name, changed in changes.items():
            setattr(copy, name, changed)
        return copy


class Mode(IntEnum):
    """ALL: every worker in scope answers. ANY: exactly one of them does."""

    ALL = 0
    ANY = 1

    __hash__ = int.__hash__  # Enum's own is written in Python


class Executed(IntEnum):
    """Whether a handler saw the request. Only NO is proof that a retry is safe."""

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
    """A client: the address of its machine, or whose certificate it has; and the name that it gives
    itself, if any.

    The name is only a claim. Resources are therefore shared among addresses first, and the share of
    an address among its names.
    """

    address: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.address} ('{self.name}')" if self.name else self.address


ANONYMOUS = Caller()


class Progress(NamedTuple):
    """The state of a map as its client reports it. total: 0 if unknown. took_s: so far."""

    number: int
    handler: str
    answered: int
    failed: int
    total: int
    took_s: float
    is_over: bool = False


class Route(NamedTuple):
    """What the requests of one segment share.

    hops: the ids of the processes passed, oldest first. targets: the workers to cover, in the order
    of the configuration; None from a client, which leaves the choice to the process asked.
    """

    mode: Mode = Mode.ALL
    team: str = ""
    handler: str = ""
    hops: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None


class Column:
    """Byte strings, one per row, decoded only where they are needed.

    A column that was received keeps its wire format, so that a process in the middle passes it on
    undecoded: `wired` is that form, and `open_wired` decodes it.
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
        """In bytes, approximately."""
        if self._size is None:
            self._size = sum(map(len, self.items))
        return self._size

    def slice(self, start: int, count: int) -> Column:
        if start == 0 and count == self.count:
            return self
        return Column(self.items[start : start + count])


@value
class Chunk:
    """A piece of a result that is sent in chunks, `at` bytes after its start.

    more: another chunk follows. grant: lets the worker send that many more; None when none follows,
    and until it is known which worker to grant them to.
    """

    at: int
    more: bool
    grant: Callable[[int], None] | None = None


@value
class Segment(Copied):
    """The unit that is sent: requests with one route and one deadline, their payloads in a column.

    The request in row i has the id first_id + i, or ids[i] when the ids are not consecutive. A
    unary Forward is a segment of one.
    idempotent: has an idempotency key, so a request that was lost may run again elsewhere.
    traced: each process reports how long the requests took there.
    log_lines: each process also logs how they ended.
    on_partial: receives each part of an ALL request as it arrives, and the answer has only the
    others; of an ANY request each chunk but the last, which is in the answer.
    chunks: how many chunks of a part may be sent before more are granted; 0: parts are sent whole.
    own_ids: the ids were made at random, by the sender's library or the first process asked, and
    are never reused; otherwise the caller chose them.
    """

    route: Route
    payloads: Column
    deadline: float
    first_id: int
    attempt: int = 0
    ids: tuple[int, ...] | None = None
    idempotent: bool = False
    traced: bool = False
    log_lines: bool = False
    on_partial: OnPartial | None = None
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
        ids = self.ids[start : start + count] if self.ids else None
        return self.with_(
            payloads=self.payloads.slice(start, count),
            first_id=ids[0] if ids else self.first_id + start,
            ids=ids,
            on_partial=self.on_partial and shifted(self.on_partial, start),
        )

    def again(self) -> Segment:
        """The same requests as the next attempt."""
        return self.with_(attempt=self.attempt + 1)

    def onward(self, me: str, targets: tuple[str, ...]) -> Segment:
        """The same requests as `me` sends them down, to cover `targets`."""
        down = self.route._replace(hops=(*self.route.hops, me), targets=targets)
        return self.with_(route=down, idempotent=False)

    @staticmethod
    def joined(segments: Sequence[Segment]) -> Segment:
        """Segments with the same route, attempt and kind of ids as one, with the earliest deadline.

        None of them has `on_partial`.
        """
        first = segments[0]
        if len(segments) == 1:
            return first
        ids = tuple(id_ for segment in segments for id_ in segment.all_ids)
        return first.with_(
            payloads=Column(
                [payload for segment in segments for payload in segment.payloads.items]
            ),
            deadline=min(segment.deadline for segment in segments),
            first_id=ids[0],
            ids=ids,
            idempotent=False,
            traced=any(segment.traced for segment in segments),
            log_lines=any(segment.log_lines for segment in segments),
            on_partial=None,
            chunks=0,
        )


class Hop(NamedTuple):
    """How long requests took at one process, in microseconds.

    waited: in its queue. worked: in service there. depth: 0 at the process that reports. away: from
    the request to its answer, by the clock of the process above; 0 if unknown.
    """

    process_id: str
    waited_us: int = 0
    worked_us: int = 0
    depth: int = 0
    code: Code = Code.OK
    away_us: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """How a request ended at one worker, or why it never got there."""

    process_id: str
    code: Code = Code.OK
    reason: str = ""
    result: bytes = b""
    hops: tuple[str, ...] = ()
    waited_us: int = 0
    worked_us: int = 0
    executed: Executed = Executed.UNKNOWN
    retry_after_s: float | None = None  # of a refusal by the process asked, if it gave one
    cause: str = ""  # under which metrics count a refusal by this process
    size: int = 0  # of a job in parts: bytes of its result, which is fetched by itself

    @property
    def ok(self) -> bool:
        return self.code is Code.OK

    @property
    def value(self) -> Any:
        """The result of a typed function, read from JSON. Raises ValueError for anything else."""
        return json_values.read(self.result)


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """The answer to one request: a part per worker asked, and the processes that took part.

    hops: this process first, then depth first in the order of the configuration.
    refused: why the process asked refused the request as a whole; then there are no parts.
    """

    parts: tuple[Part, ...]
    hops: tuple[str, ...] = ()
    refused: Part | None = None


@dataclass(frozen=True, slots=True)
class Detail:
    """Why a row has no result."""

    code: Code
    reason: str
    executed: Executed = Executed.UNKNOWN
    retry_after_s: float | None = None  # of a refusal, if it gave one

    @property
    def is_handlers(self) -> bool:
        """Whether the failure came from the handler itself."""
        return self.executed is Executed.YES and self.code in _HANDLER_CODES


_HANDLER_CODES = Code.INTERNAL, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED


@value
class PartSlice(Copied):
    """One worker's parts of consecutive requests.

    failures: by row, for rows that failed. failed: set if all rows failed for this reason. Times
    are means over the rows, in microseconds. chunk: set if the result of the only row is a chunk.
    """

    process_id: str
    results: Column
    hops: tuple[str, ...] = ()
    failures: Mapping[int, Detail] = field(default_factory=dict)
    failed: Detail | None = None
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

    def slice(self, start: int, count: int) -> PartSlice:
        if start == 0 and count == self.results.count:
            return self
        if count < len(self.failures):  # otherwise slicing row by row would take quadratic time
            rows = (row for row in range(start, start + count) if row in self.failures)
        else:
            rows = (row for row in self.failures if start <= row < start + count)
        failures = {row - start: self.failures[row] for row in rows}
        return self.with_(results=self.results.slice(start, count), failures=failures)

    @property
    def is_over(self) -> bool:
        """Whether no further chunk follows."""
        return self.chunk is None or not self.chunk.more

    def granted_by(self, grant: Callable[[str, int], None]) -> PartSlice:
        """The same, with a chunk whose grants go to `grant` as (worker, how many more)."""
        if self.chunk is None or not self.chunk.more:
            return self
        return self.with_(chunk=Chunk(self.chunk.at, True, partial(grant, self.process_id)))

    @staticmethod
    def missing(process_id: str, count: int, failure: Detail) -> PartSlice:
        return PartSlice(process_id, Column((b"",) * count), failed=failure)


@value
class Slice(Copied):
    """The answers to consecutive requests: a column of parts per worker asked.

    hops, refused: as in AnswerRow, for all rows. trace: the times at the processes below this one,
    where reported. early_us: how long the slowest part that was sent before the answer had waited
    and worked; None if there was none.
    """

    count: int
    parts: tuple[PartSlice, ...]
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
        """How many rows have at least one failed part."""
        if self.refused is not None or any(column.failed for column in self.parts):
            return self.count
        return len({row for column in self.parts for row in column.failures})

    @property
    def has_service_time(self) -> bool:
        """Whether all handlers finished with at least one row, with a result or their own error.

        If one was late, lost or refused, the time until the answer says nothing about the work.
        """
        if self.flawless:
            return True
        if self.refused is not None:
            return False
        unfinished: set[int] = set()
        for column in self.parts:
            if column.failed is not None and not column.failed.is_handlers:
                return False
            unfinished.update(row for row, why in column.failures.items() if not why.is_handlers)
        return len(unfinished) < self.count

    @property
    def is_too_late(self) -> bool:
        """Whether every part of every row missed the deadline."""
        late = Code.DEADLINE_EXCEEDED
        return bool(self.parts) and all(c.failed and c.failed.code is late for c in self.parts)

    def at(self, row: int) -> AnswerRow:
        return AnswerRow(tuple(column.at(row) for column in self.parts), self.hops, self.refused)

    def granted_by(self, grant: Callable[[str, int], None]) -> Slice:
        """The same, with chunks whose grants go to `grant` as (worker, how many more)."""
        return self.with_(parts=tuple(column.granted_by(grant) for column in self.parts))

    def slice(self, start: int, count: int) -> Slice:
        if start == 0 and count == self.count:
            return self
        return self.with_(
            count=count, parts=tuple(column.slice(start, count) for column in self.parts)
        )


OnResult = Callable[[int, Slice], None]
"""Receives answers in slices, as (first row, answers): each row exactly once, on any thread. It
must not block or raise."""


OnPartial = Callable[[int, Slice], None]
"""Receives parts before the answers of their rows, as (first row, answers with these parts): on any
thread. It must not block or raise. Duplicates, and parts after their row's answer, are dropped."""


def shifted(on_partial: OnPartial, start: int) -> OnPartial:
    """The same for a slice that begins at row `start`."""
    return lambda row, answers: on_partial(start + row, answers)


def end_overlap(end: Cancel, first: int, rows: int, code: Code, start: int, count: int) -> None:
    """Cancels those of the `count` rows from `start` that are among the `rows` from `first`."""
    begin, stop = max(first, start), min(first + rows, start + count)
    if begin < stop:
        end(code, begin - first, stop - begin)


Cancel = Callable[[Code, int, int], None]
"""Cancels the work on rows: (code, first row, rows). Those without an answer are answered with this
code immediately. May be called twice, and after the last answer."""
