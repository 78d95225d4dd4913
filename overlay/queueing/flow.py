"""What waits of one caller's stream, or of its single requests, in the order it starts. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.segments import ANONYMOUS, Caller, Route
from overlay.queueing.service_time import ServiceClass


class Waiting(Hashable, Protocol):
    """What a flow needs of its items.

    wants: the places that it needs. urgency: a time; the earliest starts first. blocked: it got no
    place when its turn came.
    """

    blocked: bool

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

    is_stream: bounded by the stream's window, and several of its rows may start at once. paused:
    none of it starts, because its answers are not being read. served: turns so far, in its caller's
    virtual time. rights: the caller's.
    """

    def __init__(
        self,
        caller: Caller = ANONYMOUS,
        is_stream: bool = False,
        rights: Rights = UNRESTRICTED,
    ) -> None:
        self.caller = caller
        self.rights = rights
        self.is_stream = is_stream
        self.paused = False
        self.rows = 0
        self.active = 0
        self.served = 0
        self.caller_node: CallerNode[W] | None = None
        # Items that want the same places with the same priority start in order of arrival.
        self._fifos: dict[tuple[ServiceClass, int], _Fifo[W]] = {}

    def __iter__(self) -> Iterator[W]:
        return (item for fifo in self._fifos.values() for item in fifo.items)

    def heads(self) -> list[W]:
        """The first item of each FIFO, the most urgent first."""
        # Thousands may wait behind a head: they want the same places, so they have to wait with it.
        heads = [next(iter(fifo.items)) for fifo in self._fifos.values()]
        if len(heads) > 1:
            heads.sort(key=_urgency)
        return heads

    def rows_before(self, service_class: ServiceClass, priority: int) -> int:
        """How many rows of the class start before one of this priority that arrives now.

        Waiting rows of a lower priority that are more urgent by their age are not counted.
        """
        fifos = self._fifos.items()
        return sum(fifo.rows for (k, p), fifo in fifos if k is service_class and p >= priority)

    def first_of(self, service_class: ServiceClass, priority: int) -> W:
        """The first to start of those that wait with this class and priority."""
        return next(iter(self._fifos[service_class, priority].items))

    def put(self, item: W, rows: int) -> None:
        key = item.service_class, item.priority
        fifo = self._fifos.get(key)
        if fifo is None:
            fifo = self._fifos[key] = _Fifo()
        fifo.items[item] = rows
        fifo.rows += rows
        self.rows += rows

    def remove(self, item: W, rows: int) -> None:
        key = item.service_class, item.priority
        fifo = self._fifos[key]
        left = fifo.items[item] - rows
        self.rows -= rows
        fifo.rows -= rows
        if left:
            fifo.items[item] = left
            return
        del fifo.items[item]
        if not fifo.items:
            del self._fifos[key]


class CallerNode(Generic[W]):
    """A caller in the fair queue's hierarchy.

    served: its turns so far, in its address's virtual time. virtual_time: that of its flows, which
    is the `served` of the one that had the last turn. flows: those with something waiting.
    """

    __slots__ = ("flows", "served", "virtual_time")

    def __init__(self, served: int) -> None:
        self.served = served
        self.virtual_time = 0
        self.flows: dict[Flow[W], None] = {}


class _Fifo(Generic[W]):
    __slots__ = ("items", "rows")

    def __init__(self) -> None:
        self.items: OrderedDict[W, int] = OrderedDict()  # with the rows of each that wait
        self.rows = 0


def _urgency(item: Waiting) -> tuple[float, int]:
    return item.urgency, item.number
