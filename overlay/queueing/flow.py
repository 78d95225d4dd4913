"""What one caller has waiting on one way in, in the order in which it starts. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from overlay.model.segments import NOBODY, Caller, Route
from overlay.queueing.service_time import ServiceClass


class Waiting(Hashable, Protocol):
    """What a flow needs of its items.

    urgency: a time, the least first. wants: the places that it is for. found_none: none was free
    when it was its turn.
    """

    found_none: bool

    @property
    def flow(self) -> Flow: ...  # type: ignore[type-arg]
    @property
    def service_class(self) -> ServiceClass: ...
    @property
    def wants(self) -> Route: ...
    @property
    def priority(self) -> int: ...
    @property
    def urgency(self) -> float: ...
    @property
    def number(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Flow(Generic[W]):
    """One stream of a caller, or its single requests. rows, active: waiting and in service.

    is_stream: a stream's window bounds it, and several rows may start at once. paused: nothing of
    it starts, since its answers are not read.
    """

    def __init__(self, caller: Caller = NOBODY, is_stream: bool = False) -> None:
        self.caller = caller
        self.is_stream = is_stream
        self.paused = False
        self.rows = 0
        self.active = 0
        self.had = 0  # turns, as far as they still matter among its caller's flows
        self.caller_turns: CallerTurns[W] | None = None
        # What wants the same places with the same priority starts in the order in which it came.
        self._lines: dict[tuple[ServiceClass, int], _Line[W]] = {}

    def __iter__(self) -> Iterator[W]:
        return (item for line in self._lines.values() for item in line.items)

    def heads(self) -> list[W]:
        """The first of each line, the most urgent first."""
        # Thousands may wait behind the first of a line: they want the same places and wait too.
        heads = [next(iter(line.items)) for line in self._lines.values()]
        if len(heads) > 1:
            heads.sort(key=_urgency)
        return heads

    def rows_before(self, service_class: ServiceClass, priority: int) -> int:
        """How many rows of the class start before one of this priority that comes now.

        Those that are less urgent only because they came later are not foreseen.
        """
        lines = self._lines.items()
        return sum(ln.rows for (k, p), ln in lines if k is service_class and p >= priority)

    def first_of(self, service_class: ServiceClass, priority: int) -> W:
        """The first to start of those that wait with this class and priority."""
        return next(iter(self._lines[service_class, priority].items))

    def put(self, item: W, rows: int) -> None:
        key = item.service_class, item.priority
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.items[item] = rows
        line.rows += rows
        self.rows += rows

    def remove(self, item: W, rows: int) -> None:
        key = item.service_class, item.priority
        line = self._lines[key]
        left = line.items[item] - rows
        self.rows -= rows
        line.rows -= rows
        if left:
            line.items[item] = left
            return
        del line.items[item]
        if not line.items:
            del self._lines[key]


class CallerTurns(Generic[W]):
    """One caller's. had: the turns that it has had, as far as they still matter among its address's
    callers; now: those of its flow that had the last one. flows: of it, that have something
    waiting."""

    __slots__ = ("flows", "had", "now")

    def __init__(self, had: int) -> None:
        self.had = had
        self.now = 0
        self.flows: dict[Flow[W], None] = {}


class _Line(Generic[W]):
    __slots__ = ("items", "rows")

    def __init__(self) -> None:
        self.items: OrderedDict[W, int] = OrderedDict()  # with their rows that wait
        self.rows = 0


def _urgency(item: Waiting) -> tuple[float, int]:
    return item.urgency, item.number
