"""Which callers were seen recently, and which of their names get turns of their own. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from overlay.model.segments import Caller

RECENT_S = 10.0  # a caller that was last seen longer ago no longer counts
MAX_ADDRESSES = 1000  # remembered
MAX_NAMES = 32  # of one address with turns of their own; the others share one
FREE_NAMES = 16  # of these go to any name, the rest only to names that were seen before
REMEMBERED_NAMES = 4096  # seen once, of all addresses
NAME_KEPT_S = 2.0  # for which no other name displaces it
OTHERS = "\n"  # stands for the names that share a turn; metadata cannot contain it

K = TypeVar("K", bound=Hashable)


class RecentlySeen(Generic[K]):
    """The keys that were seen recently, at most `max_keys`. Times are monotonic seconds."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._seen: OrderedDict[K, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: K) -> bool:
        return key in self._seen

    def seen(self, key: K, now: float) -> bool:
        """Records the key; returns whether others were seen recently too."""
        self._seen[key] = now
        if len(self._seen) == 1:
            return False
        self._seen.move_to_end(key)
        self.forget_old(now)
        return len(self._seen) > 1

    def forget_old(self, now: float) -> None:
        seen = self._seen
        while seen and (len(seen) > self._max_keys or now - next(iter(seen.values())) > RECENT_S):
            seen.popitem(last=False)


class Seen(NamedTuple):
    """caller: the caller to queue under; its name is OTHERS if it has no turns of its own.

    has_other_callers, has_other_addresses: whether others were seen recently too.
    """

    caller: Caller
    has_other_callers: bool
    has_other_addresses: bool


class Callers:
    """The callers seen recently, admitted or not, by address and name.

    A name costs nothing, so a new name for each request must not buy more turns. The first names of
    an address have turns of their own as long as they keep coming; after them only names that were
    seen before get one. All other names of the address share one.
    """

    def __init__(self) -> None:
        self._addresses: RecentlySeen[str] = RecentlySeen(MAX_ADDRESSES)
        self._names: OrderedDict[str, RecentlySeen[str]] = OrderedDict()
        self._once: list[tuple[int, float] | None] = [None] * REMEMBERED_NAMES

    def __len__(self) -> int:
        """How many addresses and names are remembered."""
        return len(self._addresses) + sum(map(len, self._names.values()))

    def seen(self, caller: Caller, now: float) -> Seen:
        has_other_addresses = self._addresses.seen(caller.address, now)
        names = self._names.get(caller.address)
        if names is None:
            names = self._names[caller.address] = RecentlySeen(MAX_NAMES + 1)
            while len(self._names) > MAX_ADDRESSES:
                self._names.popitem(last=False)
        elif has_other_addresses:
            self._names.move_to_end(caller.address)
        if caller.name not in names:
            names.forget_old(now)
            free = MAX_NAMES - len(names)
            if free <= 0 or (free <= MAX_NAMES - FREE_NAMES and not self._seen_before(caller, now)):
                caller = Caller(caller.address, OTHERS)
        has_other_callers = names.seen(caller.name, now) or has_other_addresses
        return Seen(caller, has_other_callers, has_other_addresses)

    def _seen_before(self, caller: Caller, now: float) -> bool:
        """Records the name; returns whether it is known from before."""
        hashed = hash(caller)
        found = self._once[hashed % REMEMBERED_NAMES]
        if found is not None and found[0] == hashed:
            return True
        # A name stays for a while; otherwise a flood of new ones would displace them all.
        if found is None or now - found[1] > NAME_KEPT_S:
            self._once[hashed % REMEMBERED_NAMES] = hashed, now
        return False
