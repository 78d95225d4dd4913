"""Whose turn it is among all that waits. Sans-IO.

    addresses take turns        a row each, however much they ask and under however many names
      their callers take turns      a caller is a name there
        its flows take turns            a flow is one stream of its, or its single requests
          the most urgent of a flow goes first, if there is a place for it

What waits for places that are busy does not hold up what cannot want the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from overlay.queueing.admission import may_overtake
from overlay.queueing.flow import CallerTurns, Flow, W
from overlay.queueing.service_time import ServiceClass

MAX_BLOCKED = 16  # of a flow: so many routes are looked at for one turn
MAX_KEPT = 64  # callers and addresses that are remembered although nothing of theirs waits


class Place(Protocol):
    """What a claim gives: places for `count` rows."""

    @property
    def count(self) -> int: ...


class NoPlace:
    """Instead of places."""

    count = 0


AWAITED = NoPlace()
"""It waits for a neighbour and not for a place: it does not hold up what is behind it."""


NO_SHARE = NoPlace()
"""There are places, and none for it: its own kind or caller has too many. It holds up nothing."""


class AddressTurns(Generic[W]):
    """As CallerTurns. callers: by name; flow_count: of its flows that have something waiting."""

    __slots__ = ("callers", "flow_count", "had", "now")

    def __init__(self, had: int) -> None:
        self.had = had
        self.now = self.flow_count = 0
        self.callers: dict[str, CallerTurns[W]] = {}


class FairQueue(Generic[W]):
    """The flows in which something waits. A turn is a row; the next has had the fewest.

    Source of the rule: start-time fair queueing (Goyal, Vin and Cheng, 1996), in a hierarchy.
    """

    def __init__(self) -> None:
        self._flows: dict[Flow[W], AddressTurns[W]] = {}
        self._addresses: dict[str, AddressTurns[W]] = {}
        # Rows that wait, streamed ones apart; and what of that got no place in the last round.
        self._wanted: dict[tuple[ServiceClass, bool], int] = {}
        self._blocked: set[tuple[ServiceClass, bool]] = set()
        self._kept = 0  # addresses and callers
        self._now = 0  # the turns of the address whose turn it was last

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[W]:
        return (item for flow in self._flows for item in flow)

    @property
    def kept(self) -> int:
        """How many addresses and callers are remembered."""
        return self._kept

    def put(self, item: W, rows: int = 1) -> None:
        flow: Flow[W] = item.flow
        if flow not in self._flows:
            self._join(flow)
        flow.put(item, rows)
        key = item.service_class, flow.is_stream
        self._wanted[key] = self._wanted.get(key, 0) + rows
        item.service_class.waiting += rows

    def remove(self, item: W, rows: int = 1) -> None:
        """So many of its rows no longer wait."""
        flow: Flow[W] = item.flow
        flow.remove(item, rows)
        item.service_class.waiting -= rows
        key = item.service_class, flow.is_stream
        left = self._wanted[key] - rows
        if left:
            self._wanted[key] = left
        else:
            del self._wanted[key]
        if not flow.rows:
            self._flows.pop(flow).flow_count -= 1
            assert flow.caller_turns is not None
            del flow.caller_turns.flows[flow]
            if self._kept > MAX_KEPT + 4 * len(self._flows):
                self._forget()

    def start(self, item: W, rows: int = 1) -> None:
        """So many of its rows start: that was its caller's turn."""
        flow: Flow[W] = item.flow
        address, caller = self._flows[flow], flow.caller_turns
        assert caller is not None
        # From now on and not from its own last turn: one that found no place has saved up no turns.
        self._now = max(self._now, address.had)
        address.had = self._now + rows
        address.now = max(address.now, caller.had)
        caller.had = address.now + rows
        caller.now = max(caller.now, flow.had)
        flow.had = caller.now + rows
        self.remove(item, rows)

    def next(self, claim: Callable[[W], Place | None]) -> tuple[W, Place] | None:
        """The next one for which `claim` gives a place, with that place; else None.

        It stays in until `start`. See `found_none` for those that got none.
        """
        blocked = self._blocked = set()
        for flow in self._in_turn():
            if not flow.paused and (found := _first(flow, claim, blocked)):
                return found
            if len(blocked) == len(self._wanted):
                return None  # all that waits wants what another did not get
        return None

    def found_none(self, item: W) -> bool:
        """Whether there was no place for it in the last round, in which nothing got one."""
        flow = item.flow
        if (item.service_class, flow.is_stream) in self._blocked:
            return True
        return bool(flow.first_of(item.service_class, item.priority).found_none)

    def ahead_of(
        self, flow: Flow[W], service_class: ServiceClass, priority: int, more: int = 0
    ) -> int:
        """How many rows of the class start before one that would be put in now, behind `more`."""
        if not service_class.waiting:
            return more
        before = flow.rows_before(service_class, priority) + more
        address = self._addresses.get(flow.caller.address)
        caller = address.callers.get(flow.caller.name) if address else None
        mine = before
        for other in caller.flows if caller else ():
            if other is not flow:
                before += min(other.rows_before(service_class, 0), mine + 1)
        if address is not None:
            had = max(address.now, caller.had if caller else 0) + before
            for other_caller in address.callers.values():
                if other_caller is not caller and other_caller.flows:
                    before += _turns_before(other_caller.flows, service_class, had, other_caller)
        had = max(self._now, address.had if address else 0) + before
        for other_address in self._addresses.values():
            if other_address is not address and other_address.flow_count:
                flows = (f for one in other_address.callers.values() for f in one.flows)
                before += _turns_before(flows, service_class, had, other_address)
        return before

    def _join(self, flow: Flow[W]) -> None:
        address = self._addresses.get(flow.caller.address)
        if address is None:
            address = self._addresses[flow.caller.address] = AddressTurns(self._now)
            self._kept += 1
        # One that was away has saved up no turns, one that was just served has not lost its own.
        elif not address.flow_count:
            address.had = max(address.had, self._now)
        caller = address.callers.get(flow.caller.name)
        if caller is None:
            caller = address.callers[flow.caller.name] = CallerTurns(address.now)
            self._kept += 1
        elif not caller.flows:
            caller.had = max(caller.had, address.now)
        if flow.caller_turns is not caller:  # a forgotten caller knows nothing of its flows' turns
            flow.caller_turns, flow.had = caller, caller.now
        flow.had = max(flow.had, caller.now)
        caller.flows[flow] = None
        address.flow_count += 1
        self._flows[flow] = address

    def _in_turn(self) -> Iterator[Flow[W]]:
        if len(self._flows) == 1:
            yield from self._flows
            return
        for address in _by_turns(a for a in self._addresses.values() if a.flow_count):
            for caller in _by_turns(c for c in address.callers.values() if c.flows):
                yield from _by_turns(caller.flows)

    def _forget(self) -> None:
        """Those of which nothing waits; what they had beyond the others' turns is forgotten too."""
        self._addresses = {name: a for name, a in self._addresses.items() if a.flow_count}
        for address in self._addresses.values():
            address.callers = {name: c for name, c in address.callers.items() if c.flows}
        self._kept = sum(1 + len(address.callers) for address in self._addresses.values())


T = TypeVar("T", bound="CallerTurns[Any] | AddressTurns[Any] | Flow[Any]")


def _by_turns(nodes: Iterable[T]) -> list[T]:
    found = list(nodes)
    if len(found) > 1:
        found.sort(key=_had)
    return found


def _had(node: CallerTurns[Any] | AddressTurns[Any] | Flow[Any]) -> int:
    return node.had


def _turns_before(
    flows: Iterable[Flow[Any]],
    service_class: ServiceClass,
    had: int,
    node: CallerTurns[Any] | AddressTurns[Any],
) -> int:
    """Of the rows in these flows of `node`, how many have their turn before one that has `had`."""
    waiting = sum(flow.rows_before(service_class, 0) for flow in flows)
    return min(waiting, max(0, had - node.had) + 1)


def _first(
    flow: Flow[W], claim: Callable[[W], Place | None], blocked: set[tuple[ServiceClass, bool]]
) -> tuple[W, Place] | None:
    """The first of the flow that gets a place, and that may overtake those that got none.

    blocked: what got none in this round; another that wants the same gets none either.
    """
    passed: list[W] = []
    for item in flow.heads():
        if passed and not all(may_overtake(item.wants, before.wants) for before in passed):
            item.found_none = True
            continue
        key = item.service_class, flow.is_stream
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
