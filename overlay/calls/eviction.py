"""When a limit is reached, the oldest item of the address that holds the most is evicted.

So a greedy address evicts only its own items, and a new caller always gets in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class EvictionQueue(Generic[T]):
    """Items whose sizes add up to at most `limit`. Has no lock: its owner must hold one."""

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._entries: OrderedDict[T, tuple[str, int, float]] = OrderedDict()  # oldest first
        self._addresses: dict[str, _Address[T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def size_of(self, address: str) -> int:
        share = self._addresses.get(address)
        return share.size if share else 0

    def add(self, item: T, address: str, size: int = 1, now: float = 0.0) -> list[T]:
        """Adds the item. Returns those evicted for it, never itself. now: seconds of any clock."""
        evicted: list[T] = []
        while self._entries and self.size + size > self._limit:
            evicted.append(self.pop_oldest(self._largest(address, size)))
        self._entries[item] = address, size, now
        share = self._addresses.get(address)
        if share is None:
            share = self._addresses[address] = _Address()
        share.items[item] = None
        share.size += size
        self.size += size
        return evicted

    def discard(self, item: T) -> bool:
        """Whether the item was there."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        address, size, _ = entry
        share = self._addresses[address]
        del share.items[item]
        share.size -= size
        self.size -= size
        if not share.items:
            del self._addresses[address]
        return True

    def pop_oldest(self, address: str) -> T:
        """Removes the oldest item of the address, which must have one."""
        item = next(iter(self._addresses[address].items))
        self.discard(item)
        return item

    def pop_older(self, than: float) -> list[T]:
        """Removes all items added before `than`."""
        old = []
        for item, (_, _, since) in self._entries.items():
            if since >= than:
                break
            old.append(item)
        for item in old:
            self.discard(item)
        return old

    def _largest(self, incoming: str, size: int) -> str:
        def share(address: str) -> int:
            return self._addresses[address].size + (size if address == incoming else 0)

        return max(self._addresses, key=share)


class _Address(Generic[T]):
    """The items of one address, oldest first."""

    __slots__ = ("items", "size")

    def __init__(self) -> None:
        self.items: OrderedDict[T, None] = OrderedDict()
        self.size = 0
