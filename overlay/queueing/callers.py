"""Which callers came recently, and which of their names take turns of their own. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from overlay.model.segments import Caller

RECENT_S = 10.0  # a caller that was seen longer ago no longer counts
MAX_ADDRESSES = 1000  # that are remembered as recent callers
MAX_NAMES = 32  # of one address that take turns of their own; the others share one
FREE_NAMES = 16  # of them go to any name; the others only to one that came before
REMEMBERED_NAMES = 4096  # that came once, of all addresses
NAME_KEPT_S = 2.0  # for which no other name takes its place among them
OTHERS = "\n"  # the names that share a turn; no metadata has it

K = TypeVar("K", bound=Hashable)


class RecentlySeen(Generic[K]):
    """What has come recently, at most `most` of it. Times are monotonic seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: OrderedDict[K, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: K) -> bool:
        return key in self._seen

    def seen(self, key: K, now: float) -> bool:
        """Notes that it came; whether others have come recently too."""
        self._seen[key] = now
        if len(self._seen) == 1:
            return False
        self._seen.move_to_end(key)
        self.forget_old(now)
        return len(self._seen) > 1

    def forget_old(self, now: float) -> None:
        seen = self._seen
        while seen and (len(seen) > self._most or now - next(iter(seen.values())) > RECENT_S):
            seen.popitem(last=False)


class Seen(NamedTuple):
    """caller: it, or the names of its address that have no turns of their own.

    has_rivals, has_neighbours: whether other callers, other addresses came recently too.
    """

    caller: Caller
    has_rivals: bool
    has_neighbours: bool


class Callers:
    """The callers that came recently, whether admitted or not, by address and name.

    A name costs nothing, so a new one for each request must not buy a turn for each. The first
    names of an address have turns of their own as long as they keep coming; beyond them only a
    name that came before. All others of the address share one turn.
    """

    def __init__(self) -> None:
        self._addresses: RecentlySeen[str] = RecentlySeen(MAX_ADDRESSES)
        self._names: OrderedDict[str, RecentlySeen[str]] = OrderedDict()
        self._once: list[tuple[int, float] | None] = [None] * REMEMBERED_NAMES

    def __len__(self) -> int:
        """What is kept, about."""
        return len(self._addresses) + sum(map(len, self._names.values()))

    def seen(self, caller: Caller, now: float) -> Seen:
        has_neighbours = self._addresses.seen(caller.address, now)
        names = self._names.get(caller.address)
        if names is None:
            names = self._names[caller.address] = RecentlySeen(MAX_NAMES + 1)
            while len(self._names) > MAX_ADDRESSES:
                self._names.popitem(last=False)
        elif has_neighbours:
            self._names.move_to_end(caller.address)
        if caller.name not in names:
            names.forget_old(now)
            free = MAX_NAMES - len(names)
            if free <= 0 or (free <= MAX_NAMES - FREE_NAMES and not self._came_before(caller, now)):
                caller = Caller(caller.address, OTHERS)
        has_rivals = names.seen(caller.name, now) or has_neighbours
        return Seen(caller, has_rivals, has_neighbours)

    def _came_before(self, caller: Caller, now: float) -> bool:
        """Notes that the name came; whether it is known to have come before."""
        mark = hash(caller)
        found = self._once[mark % REMEMBERED_NAMES]
        if found is not None and found[0] == mark:
            return True
        # The first keeps its place for a while, or a flood of names would leave none known.
        if found is None or now - found[1] > NAME_KEPT_S:
            self._once[mark % REMEMBERED_NAMES] = mark, now
        return False
