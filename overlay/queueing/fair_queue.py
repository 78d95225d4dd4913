"""What waits, and whose turn it is: pure decisions of the intake.

    addresses take turns        a row each, however much they ask and under however many names
      their callers take turns      a caller is a name there
        its lanes take turns            a lane is one stream of its, or its single calls
          the most urgent of a lane goes first, if there is a place for it

Who waits for places that are busy holds up nobody who cannot want the same ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from overlay.model.segments import NOBODY, Caller, Route
from overlay.queueing.admission import ERA_S, ServiceTimeEstimator, may_overtake

MAX_BLOCKED = 16  # of a lane: so many routes are looked at for one turn
MAX_KEPT = 64  # callers and addresses that are remembered although nothing of theirs waits


class Place(Protocol):
    """What a claim gives: places for `count` rows."""

    @property
    def count(self) -> int: ...


class NoPlace:
    """Instead of places."""

    count = 0


AWAITED = NoPlace()
"""It waits for a neighbour and not for a place: it holds up nobody behind it."""


NO_SHARE = NoPlace()
"""There are places, and none for it: its own kind or caller has too many. It holds up nobody."""


class ServiceClass:
    """What wants the same places.

    active: rows at work. waiting: rows that wait; parked: requests that do since they found no
    place. full_at: when one of these last left. refused: when one last had no time. pace: of all.
    own: the pace by the class of the payloads' sizes, which may tell how much work they are.
    """

    __slots__ = ("active", "full_at", "own", "pace", "parked", "refused", "waiting")

    def __init__(self) -> None:
        self.active = self.waiting = self.parked = 0
        self.full_at = self.refused = -math.inf
        self.pace = ServiceTimeEstimator()
        self.own: dict[int, ServiceTimeEstimator] = {}

    @property
    def is_idle(self) -> bool:
        return not (self.active or self.waiting)

    def pace_of(self, size_class: int) -> ServiceTimeEstimator:
        found = self.own.get(size_class)
        if found is None:
            found = self.own[size_class] = ServiceTimeEstimator()
        return found

    def park(self, now: float) -> None:
        """One found no place."""
        # What ended before places were free may have been other work than what holds them now.
        if not self.parked and now - self.full_at > ERA_S:
            self.pace.forget()
            for pace in self.own.values():
                pace.forget()
        self.parked += 1

    def unpark(self, now: float) -> None:
        """It waits no more."""
        self.parked -= 1
        self.full_at = now


class Waiting(Hashable, Protocol):
    """What a lane needs of its items.

    urgency: a time, the least first. wants: the places that it is for. found_none: none was free
    when it was its turn.
    """

    found_none: bool

    @property
    def kind(self) -> ServiceClass: ...
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
    """What one caller has waiting on one way in. rows, active: waiting and at work.

    is_stream: a stream's window bounds it, and several rows may start at once. paused: nothing of
    it starts, since its answers are not read.
    """

    def __init__(self, caller: Caller = NOBODY, is_stream: bool = False) -> None:
        self.caller = caller
        self.is_stream = is_stream
        self.paused = False
        self.rows = 0
        self.active = 0
        self.turns = 0  # that it has had, as far as it still matters to its flow
        self.flow: _CallerTurns[W] | None = None
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

    def rows_before(self, kind: ServiceClass, priority: int) -> int:
        """Of this kind, how many start before one of this priority that comes now.

        Those that are less urgent only because they came later are not foreseen.
        """
        return sum(line.rows for (k, p), line in self._lines.items() if k is kind and p >= priority)

    def first_of(self, kind: ServiceClass, priority: int) -> W:
        """The first to start of what waits there like that."""
        return next(iter(self._lines[kind, priority].items))

    def put(self, item: W, rows: int) -> None:
        key = item.kind, item.priority
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.items[item] = rows
        line.rows += rows
        self.rows += rows

    def less(self, item: W, rows: int) -> None:
        key = item.kind, item.priority
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


class _Line(Generic[W]):
    __slots__ = ("items", "rows")

    def __init__(self) -> None:
        self.items: OrderedDict[W, int] = OrderedDict()  # with their rows that wait
        self.rows = 0


class _CallerTurns(Generic[W]):
    """One caller's. had: the turns that it has had, as far as they still matter; now: those of the
    lane that had its last one. lanes: of it, in which something waits."""

    __slots__ = ("had", "lanes", "now")

    def __init__(self, had: int) -> None:
        self.had = had
        self.now = 0
        self.lanes: dict[Flow[W], None] = {}


class _AddressTurns(Generic[W]):
    """As _CallerTurns. flows: by name; lanes: how many of all have something waiting."""

    __slots__ = ("flows", "had", "lanes", "now")

    def __init__(self, had: int) -> None:
        self.had = had
        self.now = self.lanes = 0
        self.flows: dict[str, _CallerTurns[W]] = {}


class FairQueue(Generic[W]):
    """The lanes in which something waits. A turn is a row; the next has had the fewest.

    Source of the rule: start-time fair queueing (Goyal, Vin and Cheng, 1996), in a hierarchy.
    """

    def __init__(self) -> None:
        self._lanes: dict[Flow[W], _AddressTurns[W]] = {}
        self._addresses: dict[str, _AddressTurns[W]] = {}
        self._wanted: dict[
            tuple[ServiceClass, bool], int
        ] = {}  # rows that wait, streamed ones apart
        self._blocked: set[tuple[ServiceClass, bool]] = set()  # got no place in the last round
        self._kept = 0  # addresses and flows
        self._now = 0  # the turns of the one whose turn it was last

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[W]:
        return (item for lane in self._lanes for item in lane)

    @property
    def kept(self) -> int:
        """How many addresses and callers are remembered."""
        return self._kept

    def put(self, lane: Flow[W], item: W, rows: int = 1) -> None:
        if lane not in self._lanes:
            self._join(lane)
        lane.put(item, rows)
        key = item.kind, lane.is_stream
        self._wanted[key] = self._wanted.get(key, 0) + rows
        item.kind.waiting += rows

    def less(self, lane: Flow[W], item: W, rows: int = 1) -> None:
        """So many of its rows wait no more."""
        lane.less(item, rows)
        item.kind.waiting -= rows
        key = item.kind, lane.is_stream
        left = self._wanted[key] - rows
        if left:
            self._wanted[key] = left
        else:
            del self._wanted[key]
        if not lane.rows:
            self._lanes.pop(lane).lanes -= 1
            assert lane.flow is not None
            del lane.flow.lanes[lane]
            if self._kept > MAX_KEPT + 4 * len(self._lanes):
                self._forget()

    def took(self, lane: Flow[W], item: W, rows: int = 1) -> None:
        """So many of its rows start: that was its caller's turn."""
        address, flow = self._lanes[lane], lane.flow
        assert flow is not None
        # From now on and not from its own last turn: who found no place has saved up no turns.
        self._now = max(self._now, address.had)
        address.had = self._now + rows
        address.now = max(address.now, flow.had)
        flow.had = address.now + rows
        flow.now = max(flow.now, lane.turns)
        lane.turns = flow.now + rows
        self.less(lane, item, rows)

    def next(self, claim: Callable[[W], Place | None]) -> tuple[W, Place] | None:
        """The next one for which `claim` gives a place, with that place; else None.

        It stays in until `took`. See `found_none` for those that got none.
        """
        blocked = self._blocked = set()
        for lane in self._in_turn():
            if not lane.paused and (found := _first(lane, claim, blocked)):
                return found
            if len(blocked) == len(self._wanted):
                return None  # all that waits wants what another did not get
        return None

    def found_none(self, lane: Flow[W], item: W) -> bool:
        """Whether there was no place for it in the last round, in which nothing got one."""
        if (item.kind, lane.is_stream) in self._blocked:
            return True
        return lane.first_of(item.kind, item.priority).found_none

    def ahead_of(self, lane: Flow[W], kind: ServiceClass, priority: int, more: int = 0) -> int:
        """How many rows of the kind start before one that would be put in now, behind `more`."""
        if not kind.waiting:
            return more
        before = lane.rows_before(kind, priority) + more
        address = self._addresses.get(lane.caller.address)
        flow = address.flows.get(lane.caller.name) if address else None
        mine = before
        for other in flow.lanes if flow else ():
            if other is not lane:
                before += min(other.rows_before(kind, 0), mine + 1)
        if address is not None:
            had = max(address.now, flow.had if flow else 0) + before
            for other_flow in address.flows.values():
                if other_flow is not flow and other_flow.lanes:
                    waiting = sum(found.rows_before(kind, 0) for found in other_flow.lanes)
                    before += min(waiting, max(0, had - other_flow.had) + 1)
        had = max(self._now, address.had if address else 0) + before
        for other_address in self._addresses.values():
            if other_address is not address and other_address.lanes:
                waiting = sum(
                    found.rows_before(kind, 0)
                    for other_flow in other_address.flows.values()
                    for found in other_flow.lanes
                )
                before += min(waiting, max(0, had - other_address.had) + 1)
        return before

    def _join(self, lane: Flow[W]) -> None:
        address = self._addresses.get(lane.caller.address)
        if address is None:
            address = self._addresses[lane.caller.address] = _AddressTurns(self._now)
            self._kept += 1
        # Who was away has saved up no turns, and who was just served has not lost its own.
        elif not address.lanes:
            address.had = max(address.had, self._now)
        flow = address.flows.get(lane.caller.name)
        if flow is None:
            flow = address.flows[lane.caller.name] = _CallerTurns(address.now)
            self._kept += 1
        elif not flow.lanes:
            flow.had = max(flow.had, address.now)
        if lane.flow is not flow:  # a flow that was forgotten knows nothing of its lanes' turns
            lane.flow, lane.turns = flow, flow.now
        lane.turns = max(lane.turns, flow.now)
        flow.lanes[lane] = None
        address.lanes += 1
        self._lanes[lane] = address

    def _in_turn(self) -> Iterator[Flow[W]]:
        if len(self._lanes) == 1:
            yield from self._lanes
            return
        for address in _by_turns(a for a in self._addresses.values() if a.lanes):
            for flow in _by_turns(f for f in address.flows.values() if f.lanes):
                yield from sorted(flow.lanes, key=_turns) if len(flow.lanes) > 1 else flow.lanes

    def _forget(self) -> None:
        """Those of whom nothing waits; what they had beyond the others' turns is forgotten too."""
        self._addresses = {name: a for name, a in self._addresses.items() if a.lanes}
        for address in self._addresses.values():
            address.flows = {name: flow for name, flow in address.flows.items() if flow.lanes}
        self._kept = sum(1 + len(address.flows) for address in self._addresses.values())


N = TypeVar("N", bound="_CallerTurns[Any] | _AddressTurns[Any]")


def _by_turns(nodes: Iterable[N]) -> list[N]:
    found = list(nodes)
    if len(found) > 1:
        found.sort(key=_had)
    return found


def _had(node: _CallerTurns[Any] | _AddressTurns[Any]) -> int:
    return node.had


def _turns(lane: Flow[Any]) -> int:
    return lane.turns


def _first(
    lane: Flow[W], claim: Callable[[W], Place | None], blocked: set[tuple[ServiceClass, bool]]
) -> tuple[W, Place] | None:
    """The first of the lane that gets a place, and that may overtake those that got none.

    blocked: what got none in this round; who wants the same gets none either.
    """
    passed: list[W] = []
    for item in lane.heads():
        if passed and not all(may_overtake(item.wants, before.wants) for before in passed):
            item.found_none = True
            continue
        key = item.kind, lane.is_stream
        place = None if key in blocked else claim(item)
        if place is None:
            item.found_none = True
            blocked.add(key)
            passed.append(item)
            if len(passed) >= MAX_BLOCKED:
                return None
        elif place is NO_SHARE:
            item.found_none = True
        elif place is not AWAITED:
            return item, place
    return None


def _urgency(item: Waiting) -> tuple[float, int]:
    return item.urgency, item.number
