"""How queue slots and places in service are shared among addresses, handlers and teams.

A single caller may take many, but some always stay free for the next one: the dynamic thresholds of
shared-memory switches (Choudhury and Hahne, 1998). Sans-IO; guarded by the request queue's lock.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from overlay.model.errors import QueueFull
from overlay.model.segments import Caller, Route
from overlay.queueing.callers import RecentlySeen, Seen

# Thresholds as multiples of what is free. Of 100 places in service one handler of one machine gets
# at most 80, and one machine or one handler at most 90.
PAIR_ALPHA, TOTAL_ALPHA = 4, 9
MIN_SHARED = 20  # fewer places are not shared
HANDLER_ALPHA = 4  # for queue slots: one handler gets at most 160 of 200
MAX_HANDLERS = 1000  # remembered as recently requested

K = TypeVar("K", bound=Hashable)


def check_share(held: int, waiting: int, slots: int, holder: str = "this caller") -> None:
    """Raises QueueFull when a caller already holds as many slots as are free.

    So one caller gets at most half, two get a third each, and there is room for another one.
    """
    if held >= slots - waiting:
        raise QueueFull(
            f"{holder} has {held} of {slots} queue slots, and others have sent requests recently"
        )


def check_handler_share(held: int, waiting: int, slots: int) -> None:
    """Raises QueueFull when one handler's requests hold more than their share of the slots."""
    if held >= HANDLER_ALPHA * (slots - waiting):
        raise QueueFull(
            f"this handler has {held} of {slots} queue slots, and other handlers are in use"
        )


class SlotShares:
    """Counts the queue slots that callers and handlers hold, and the bytes that wait in them."""

    def __init__(self, slots: int, max_bytes: int) -> None:
        self._slots = slots
        self._max_bytes = max_bytes
        self._bytes = 0
        self._count = 0
        self._callers: dict[Caller, int] = {}
        self._addresses: dict[str, int] = {}
        self._handlers: dict[str, int] = {}
        self._recent_handlers: RecentlySeen[str] = RecentlySeen(MAX_HANDLERS)

    @property
    def kept(self) -> int:
        """How many callers, addresses and handlers are remembered."""
        holders = len(self._callers) + len(self._addresses) + len(self._handlers)
        return holders + len(self._recent_handlers)

    def held_by(self, address: str) -> int:
        """How many slots the address holds."""
        return self._addresses.get(address, 0)

    def check(self, seen: Seen, wants: Route, size: int, now: float) -> None:
        """Raises QueueFull when one more of `size` bytes does not fit or exceeds a share.

        If no slot is free, it is the queue itself that raises.
        """
        has_other_handlers = self._recent_handlers.seen(wants.handler, now)
        waiting, slots = self._count, self._slots
        if waiting >= slots:
            return
        check_bytes(waiting, self._bytes, size, self._max_bytes)
        if seen.has_other_addresses:
            held = self.held_by(seen.caller.address)
            check_share(held, waiting, slots, seen.caller.address or "this machine")
        if seen.has_other_callers:
            check_share(self._callers.get(seen.caller, 0), waiting, slots)
        if has_other_handlers:
            check_handler_share(self._handlers.get(wants.handler, 0), waiting, slots)

    def take(self, caller: Caller, wants: Route, size: int) -> None:
        self._add(1, caller, wants, size)

    def give_back(self, caller: Caller, wants: Route, size: int) -> None:
        self._add(-1, caller, wants, -size)

    def _add(self, count: int, caller: Caller, wants: Route, size: int) -> None:
        self._count += count
        self._bytes += size
        _count(self._callers, caller, count)
        _count(self._addresses, caller.address, count)
        _count(self._handlers, wants.handler, count)


def check_bytes(waiting: int, waiting_bytes: int, size: int, max_bytes: int) -> None:
    """Raises QueueFull when `size` more bytes do not fit. An empty queue takes any request."""
    if waiting and waiting_bytes + size > max_bytes:
        raise QueueFull(
            f"{waiting} waiting requests hold {waiting_bytes:,} of {max_bytes:,} bytes; "
            f"{size:,} more do not fit"
        )


class PlaceShares:
    """Counts the places in service that addresses, handlers and teams hold, and limits them.

    Neither one machine nor one slow handler gets all of them.
    """

    def __init__(self, places: int, team_limit: int) -> None:
        """team_limit: how many places the requests that name one team may hold."""
        self.places = places
        self.taken = 0
        self._team_limit = team_limit
        self._pairs: dict[tuple[str, str], int] = {}
        self._addresses: dict[str, int] = {}
        self._handlers: dict[str, int] = {}
        self._teams: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        return self.taken >= self.places

    def allow(self, address: str, handler: str, team: str) -> bool:
        """Whether a request of these may take a place."""
        free = self.places - self.taken
        if free <= 0 or (team and self._teams.get(team, 0) >= self._team_limit):
            return False
        if self.taken < PAIR_ALPHA * free or self.places < MIN_SHARED:
            return True  # nothing can be over its threshold yet
        return (
            self._pairs.get((address, handler), 0) < PAIR_ALPHA * free
            and self._addresses.get(address, 0) < TOTAL_ALPHA * free
            and self._handlers.get(handler, 0) < TOTAL_ALPHA * free
        )

    def take(self, address: str, handler: str, team: str) -> None:
        self._add(1, address, handler, team)

    def give_back(self, address: str, handler: str, team: str) -> None:
        self._add(-1, address, handler, team)

    def _add(self, count: int, address: str, handler: str, team: str) -> None:
        self.taken += count
        _count(self._pairs, (address, handler), count)
        _count(self._addresses, address, count)
        _count(self._handlers, handler, count)
        _count(self._teams, team, count)


def max_handler_slots(cap: int, elsewhere: int) -> int:
    """How many of a worker's `cap` slots one handler may take while others hold `elsewhere`."""
    free = cap - elsewhere
    if cap < MIN_SHARED:
        return free
    return free - free // (TOTAL_ALPHA + 1)


def _count(counts: dict[K, int], key: K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]  # so that the dict does not grow with everyone ever seen
