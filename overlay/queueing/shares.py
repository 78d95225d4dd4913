"""How slots of the queue and places in service are shared out by address, handler and team.

Whoever asks for many gets many, and some are always left for the next to come. Source of the rule:
dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998). Sans-IO; the request
queue's lock guards them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from overlay.model.errors import QueueFull
from overlay.model.segments import Caller, Route
from overlay.queueing.callers import RecentlySeen, Seen

# Places in service: one that holds as many as this times the free ones gets no more, so that one
# handler of one machine has 80 of 100 at most, one of many or many of one 90.
OF_ONE, OF_MANY = 4, 9
FEWEST_SHARED = 20  # fewer places are not shared out
OF_A_HANDLER = 4  # the same for slots of the queue: 160 of 200
MAX_HANDLERS = 1000  # that are remembered as asked for recently

K = TypeVar("K", bound=Hashable)


def check_share(of_caller: int, waiting: int, slots: int, holder: str = "this caller") -> None:
    """Raises QueueFull when a caller would have more slots than are left free for others.

    So none has more than half, two have a third each, and there is always room for one more.
    """
    if of_caller >= slots - waiting:
        raise QueueFull(
            f"{holder} has {of_caller} of {slots} queue slots, and others came recently too"
        )


def check_share_of_handler(of_handler: int, waiting: int, slots: int) -> None:
    """The same for what waits for one handler, where others are asked for too."""
    if of_handler >= OF_A_HANDLER * (slots - waiting):
        raise QueueFull(
            f"this handler has {of_handler} of {slots} queue slots, and others are asked for too"
        )


class SlotShares:
    """Who holds the slots of the queue, and how many bytes wait in them."""

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
        """Of how many callers, addresses and handlers something is remembered."""
        holders = len(self._callers) + len(self._addresses) + len(self._handlers)
        return holders + len(self._recent_handlers)

    def check(self, seen: Seen, wants: Route, size: int, now: float) -> None:
        """Raises QueueFull when one more of `size` bytes does not fit or is more than its share.

        That no slot is left is for the queue itself to say.
        """
        has_others = self._recent_handlers.seen(wants.handler, now)
        waiting, slots = self._count, self._slots
        if waiting >= slots:
            return
        check_bytes(waiting, self._bytes, size, self._max_bytes)
        if seen.has_neighbours:
            of_address = self._addresses.get(seen.caller.address, 0)
            check_share(of_address, waiting, slots, "this machine")
        if seen.has_rivals:
            check_share(self._callers.get(seen.caller, 0), waiting, slots)
        if has_others:
            check_share_of_handler(self._handlers.get(wants.handler, 0), waiting, slots)

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
    """Raises QueueFull when `size` more bytes do not fit. One request always does."""
    if waiting and waiting_bytes + size > max_bytes:
        raise QueueFull(
            f"{waiting} waiting requests hold {waiting_bytes:,} of {max_bytes:,} bytes; "
            f"{size:,} more do not fit"
        )


class PlaceShares:
    """Who holds the places in service, and who may have one more.

    They are shared out by address and by handler, so that neither one machine nor one slow handler
    has all of them.
    """

    def __init__(self, places: int, of_a_team: int) -> None:
        """of_a_team: how many the requests that name one team may have."""
        self.places = places
        self.taken = 0
        self._of_a_team = of_a_team
        self._held: dict[tuple[str, str], int] = {}
        self._addresses: dict[str, int] = {}
        self._handlers: dict[str, int] = {}
        self._teams: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        return self.taken >= self.places

    def of_team(self, team: str) -> int:
        return self._teams.get(team, 0)

    def allow(self, address: str, handler: str, team: str) -> bool:
        """Whether there is a place for one more of these."""
        free = self.places - self.taken
        if free <= 0 or (team and self._teams.get(team, 0) >= self._of_a_team):
            return False
        if self.taken < OF_ONE * free or self.places < FEWEST_SHARED:
            return True  # none can have too many yet
        return (
            self._held.get((address, handler), 0) < OF_ONE * free
            and self._addresses.get(address, 0) < OF_MANY * free
            and self._handlers.get(handler, 0) < OF_MANY * free
        )

    def take(self, address: str, handler: str, team: str) -> None:
        self._add(1, address, handler, team)

    def give_back(self, address: str, handler: str, team: str) -> None:
        self._add(-1, address, handler, team)

    def _add(self, count: int, address: str, handler: str, team: str) -> None:
        self.taken += count
        _count(self._held, (address, handler), count)
        _count(self._addresses, address, count)
        _count(self._handlers, handler, count)
        _count(self._teams, team, count)


def most_of_slots(cap: int, elsewhere: int) -> int:
    """How many of a worker's slots one handler may take, when others hold so many of its `cap`."""
    free = cap - elsewhere
    if cap < FEWEST_SHARED:
        return free
    return free - free // (OF_MANY + 1)


def _count(counts: dict[K, int], key: K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]  # nothing is kept of those that hold none
