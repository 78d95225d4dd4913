"""The open streams of a process: how many, whose, and which idle one ends for a new one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from overlay.calls.eviction import EvictionQueue
from overlay.model.errors import QueueFull

SHARE_OF_ADDRESS = 3  # times the places that are free: at most 768 of 1,024
STREAMS_PER_NEIGHBOUR = 4  # a link has two, and perhaps two from before a restart


class OpenStream(Protocol):
    """is_listed, was_active: guarded by the lock of OpenStreams."""

    is_listed: bool  # among the idle streams
    was_active: bool  # since it was listed

    @property
    def is_active(self) -> bool: ...

    def __hash__(self) -> int: ...


S = TypeVar("S", bound=OpenStream)


class OpenStreams(Generic[S]):
    """The open streams, at most `limit`. Thread-safe.

    One address may have three times as many as are free. Beyond that, a new stream ends an idle one
    of its address. Neighbours' streams are counted separately.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[S, str] = {}  # oldest first, each with its address
        self._of_neighbours: dict[str, dict[S, None]] = {}
        self._counts: dict[str, int] = {}
        # Streams that were idle when they were listed. Whether one has been active since is checked
        # when its turn comes, so that streams need not report each request.
        self._idle: EvictionQueue[S] = EvictionQueue(limit)

    def __iter__(self) -> Iterator[S]:
        with self._lock:
            found = list(self._open)
            found += [stream for held in self._of_neighbours.values() for stream in held]
        return iter(found)

    def __len__(self) -> int:
        return len(self._open) + sum(map(len, self._of_neighbours.values()))

    def enter(self, stream: S, address: str, neighbour: str = "") -> list[S]:
        """Returns the streams to end for it. Raises QueueFull. neighbour: the process it links."""
        with self._lock:
            if neighbour:
                held = self._of_neighbours.setdefault(neighbour, {})
                evicted = list(held)[: max(0, len(held) + 1 - STREAMS_PER_NEIGHBOUR)]
                held[stream] = None
            else:
                evicted = self._make_room_locked(address)
                self._open[stream] = address
                self._counts[address] = self._counts.get(address, 0) + 1
                self._list_locked(stream, address)
            # A neighbour's stream is never ended for others, and need not list itself.
            stream.is_listed = True
        return evicted

    def became_idle(self, stream: S) -> None:
        """Lists the stream, which is idle now, among those that may be ended."""
        with self._lock:
            address = self._open.get(stream)
            if address is not None:
                self._list_locked(stream, address)

    def leave(self, stream: S) -> None:
        with self._lock:
            self._idle.discard(stream)
            for held in self._of_neighbours.values():
                held.pop(stream, None)
            address = self._open.pop(stream, None)
            if address is None:
                return
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def _list_locked(self, stream: S, address: str) -> None:
        self._idle.add(stream, address)
        stream.is_listed = True

    def _make_room_locked(self, address: str) -> list[S]:
        count, free = self._counts.get(address, 0), self._limit - len(self._open)
        if free > 0 and count < SHARE_OF_ADDRESS * free:
            return []
        while self._idle.size_of(address):
            stream = self._idle.pop_oldest(address)
            stream.is_listed = False  # first of all: from now on it lists itself
            was_active, stream.was_active = stream.was_active, False
            if stream.is_active:
                continue
            if not was_active:
                return [stream]
            self._list_locked(stream, address)  # others have been idle longer
        raise QueueFull(
            f"all {self._limit} streams are open"
            if free <= 0
            else f"{count} of {self._limit} streams are open from {address} alone, all of them "
            f"active; let programs there share one client, or close clients that are done"
        )
