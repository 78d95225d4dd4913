"""Where there are too many, the oldest one of the address that has the most is evicted.

So an address, however much it holds, evicts only its own, and a new caller is always let in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class EvictionQueue(Generic[T]):
    """At most `most` together, each of some size. No lock of its own: its owner holds one."""

    def __init__(self, most: int) -> None:
        self.size = 0
        self._most = most
        self._entries: OrderedDict[T, tuple[str, int, float]] = OrderedDict()  # the oldest first
        self._addresses: dict[str, _Address[T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def size_of(self, address: str) -> int:
        held = self._addresses.get(address)
        return held.size if held else 0

    def add(self, item: T, address: str, size: int = 1, now: float = 0.0) -> list[T]:
        """Adds the item; those evicted for it, never itself. now: seconds of any clock."""
        gone: list[T] = []
        while self._entries and self.size + size > self._most:
            gone.append(self.pop_oldest(self._fullest(address, size)))
        self._entries[item] = address, size, now
        held = self._addresses.get(address)
        if held is None:
            held = self._addresses[address] = _Address()
        held.items[item] = None
        held.size += size
        self.size += size
        return gone

    def discard(self, item: T) -> bool:
        """Whether it was in."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        address, size, _ = entry
        held = self._addresses[address]
        del held.items[item]
        held.size -= size
        self.size -= size
        if not held.items:
            del self._addresses[address]
        return True

    def pop_oldest(self, address: str) -> T:
        """Of one address, which must have some."""
        item = next(iter(self._addresses[address].items))
        self.discard(item)
        return item

    def pop_older(self, than: float) -> list[T]:
        """Takes out all that were added before then."""
        old = []
        for item, (_, _, since) in self._entries.items():
            if since >= than:
                break
            old.append(item)
        for item in old:
            self.discard(item)
        return old

    def _fullest(self, coming: str, size: int) -> str:
        def held(address: str) -> int:
            return self._addresses[address].size + (size if address == coming else 0)

        return max(self._addresses, key=held)


class _Address(Generic[T]):
    """What one address holds, the oldest first."""

    __slots__ = ("items", "size")

    def __init__(self) -> None:
        self.items: OrderedDict[T, None] = OrderedDict()
        self.size = 0
