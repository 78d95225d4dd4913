"""Which waiting request starts next. Sans-IO.

    addresses take turns        one row each, however much they send and under however many names
      their callers take turns      a caller is a name at an address
        its flows take turns            a flow is one of its streams, or all its single requests
          the most urgent item of a flow starts first, if there is a place for it

Items that wait for busy places do not hold up items that cannot want the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from overlay.queueing.admission import may_overtake
from overlay.queueing.flow import CallerNode, Flow, W
from overlay.queueing.service_time import ServiceClass

MAX_BLOCKED = 16  # of a flow: no more routes are tried in one turn
MAX_KEPT = 64  # callers and addresses that are remembered although they have nothing waiting


class Place(Protocol):
    """What a claim returns: places in service for `count` rows."""

    @property
    def count(self) -> int: ...


class NoPlace:
    """Why an item gets no place, where that is not for want of free ones."""

    count = 0


AWAITED = NoPlace()
"""The item waits for a link to come back: it does not hold up those behind it."""


NO_SHARE = NoPlace()
"""Places are free, but its caller or handler has its share: it does not hold up those behind it."""


class AddressNode(Generic[W]):
    """Like CallerNode. callers: by name. flow_count: its flows that have something waiting."""

    __slots__ = ("callers", "flow_count", "served", "virtual_time")

    def __init__(self, served: int) -> None:
        self.served = served
        self.virtual_time = self.flow_count = 0
        self.callers: dict[str, CallerNode[W]] = {}


class FairQueue(Generic[W]):
    """The flows with something waiting. A turn is one row; the least served node is next.

    Hierarchical start-time fair queueing (Goyal, Vin and Cheng, 1996).
    """

    def __init__(self) -> None:
        self._flows: dict[Flow[W], AddressNode[W]] = {}
        self._addresses: dict[str, AddressNode[W]] = {}
        # By class and whether streamed: rows that wait, and what got no place in the last round.
        self._wanted: dict[tuple[ServiceClass, bool], int] = {}
        self._blocked: set[tuple[ServiceClass, bool]] = set()
        self.kept = 0  # addresses and callers that are remembered
        self._virtual_time = 0

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[W]:
        return (item for flow in self._flows for item in flow)

    @property
    def flows(self) -> Iterable[Flow[W]]:
        """Those with something waiting."""
        return self._flows

    def put(self, item: W, rows: int = 1) -> None:
        flow: Flow[W] = item.flow
        if flow not in self._flows:
            self._join(flow)
        flow.put(item, rows)
        key = item.service_class, flow.is_stream
        self._wanted[key] = self._wanted.get(key, 0) + rows
        item.service_class.waiting += rows

    def remove(self, item: W, rows: int = 1) -> None:
        """These rows of it no longer wait."""
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
            assert flow.caller_node is not None
            del flow.caller_node.flows[flow]
            if self.kept > MAX_KEPT + 4 * len(self._flows):
                self._forget()

    def start(self, item: W, rows: int = 1) -> None:
        """These rows of it start, which uses up turns of its flow, caller and address."""
        flow: Flow[W] = item.flow
        address, caller = self._flows[flow], flow.caller_node
        assert caller is not None
        # Counted from the virtual time: a node that was blocked has not saved up turns.
        self._virtual_time = max(self._virtual_time, address.served)
        address.served = self._virtual_time + rows
        address.virtual_time = max(address.virtual_time, caller.served)
        caller.served = address.virtual_time + rows
        caller.virtual_time = max(caller.virtual_time, flow.served)
        flow.served = caller.virtual_time + rows
        self.remove(item, rows)

    def next(self, claim: Callable[[W], Place | None]) -> tuple[W, Place] | None:
        """The next item for which `claim` gives a place, with that place; None if there is none.

        The item stays in the queue until `start`.
        """
        blocked = self._blocked = set()
        for flow in self._in_turn():
            if not flow.paused and (found := _first(flow, claim, blocked)):
                return found
            if len(blocked) == len(self._wanted):
                return None  # everything that waits wants places that another item did not get
        return None

    def is_blocked(self, item: W) -> bool:
        """Whether there was no place for it in the last round, if that found no next item."""
        flow = item.flow
        if (item.service_class, flow.is_stream) in self._blocked:
            return True
        return bool(flow.first_of(item.service_class, item.priority).blocked)

    def ahead_of(
        self, flow: Flow[W], service_class: ServiceClass, priority: int, more: int = 0
    ) -> int:
        """How many rows of the class start before one that is put now, behind `more` others."""
        if not service_class.waiting:
            return more
        before = flow.rows_before(service_class, priority) + more
        address = self._addresses.get(flow.caller.address)
        caller = address.callers.get(flow.caller.name) if address else None
        own = before
        for other in caller.flows if caller else ():
            if other is not flow:
                before += min(other.rows_before(service_class, 0), own + 1)
        if address is not None:
            served = max(address.virtual_time, caller.served if caller else 0) + before
            for other_caller in address.callers.values():
                if other_caller is not caller and other_caller.flows:
                    before += _turns_before(other_caller.flows, service_class, served, other_caller)
        served = max(self._virtual_time, address.served if address else 0) + before
        for other_address in self._addresses.values():
            if other_address is not address and other_address.flow_count:
                flows = (f for one in other_address.callers.values() for f in one.flows)
                before += _turns_before(flows, service_class, served, other_address)
        return before

    def _join(self, flow: Flow[W]) -> None:
        address = self._addresses.get(flow.caller.address)
        if address is None:
            address = self._addresses[flow.caller.address] = AddressNode(self._virtual_time)
            self.kept += 1
        # A node that was idle has saved up no turns; one that was just served must wait its turn.
        elif not address.flow_count:
            address.served = max(address.served, self._virtual_time)
        caller = address.callers.get(flow.caller.name)
        if caller is None:
            caller = address.callers[flow.caller.name] = CallerNode(address.virtual_time)
            self.kept += 1
        elif not caller.flows:
            caller.served = max(caller.served, address.virtual_time)
        if flow.caller_node is not caller:  # its old node was forgotten, and `served` with it
            flow.caller_node, flow.served = caller, caller.virtual_time
        flow.served = max(flow.served, caller.virtual_time)
        caller.flows[flow] = None
        address.flow_count += 1
        self._flows[flow] = address

    def _in_turn(self) -> Iterator[Flow[W]]:
        if len(self._flows) == 1:
            yield from self._flows
            return
        for address in _least_served_first(a for a in self._addresses.values() if a.flow_count):
            for caller in _least_served_first(c for c in address.callers.values() if c.flows):
                yield from _least_served_first(caller.flows)

    def _forget(self) -> None:
        """Forgets idle nodes, and with them the turns that they had beyond the others'."""
        self._addresses = {name: a for name, a in self._addresses.items() if a.flow_count}
        for address in self._addresses.values():
            address.callers = {name: c for name, c in address.callers.items() if c.flows}
        self.kept = sum(1 + len(address.callers) for address in self._addresses.values())


T = TypeVar("T", bound="CallerNode[Any] | AddressNode[Any] | Flow[Any]")


def _least_served_first(nodes: Iterable[T]) -> list[T]:
    ordered = list(nodes)
    if len(ordered) > 1:
        ordered.sort(key=_served)
    return ordered


def _served(node: CallerNode[Any] | AddressNode[Any] | Flow[Any]) -> int:
    return node.served


def _turns_before(
    flows: Iterable[Flow[Any]],
    service_class: ServiceClass,
    served: int,
    node: CallerNode[Any] | AddressNode[Any],
) -> int:
    """How many rows in these flows of `node` have their turn before a node with this `served`."""
    waiting = sum(flow.rows_before(service_class, 0) for flow in flows)
    return min(waiting, max(0, served - node.served) + 1)


def _first(
    flow: Flow[W], claim: Callable[[W], Place | None], blocked: set[tuple[ServiceClass, bool]]
) -> tuple[W, Place] | None:
    """The first item of the flow that gets a place and may overtake those that got none.

    blocked: what got none in this round, so that others that want the same are not tried.
    """
    passed: list[W] = []
    for item in flow.heads():
        if passed and not all(may_overtake(item.wants, before.wants) for before in passed):
            item.blocked = True
            continue
        key = item.service_class, flow.is_stream
        place = None if key in blocked else claim(item)
        if place is None:
            item.blocked = True
            blocked.add(key)
            passed.append(item)
            if len(passed) >= MAX_BLOCKED:
                return None
        elif place is NO_SHARE:
            item.blocked = True
        elif place is not AWAITED:
            return item, place
    return None
