"""Sends results that are too large for one message in chunks, as fast as they are read.

    handler -> cut -> ChunkWriter.send(chunk) --> each process forwards it --> the client
                          ^--- grant(n) <--- grants are passed back <--- has read n of them

Over all hops together, only as many chunks of a part are in transit as the client accepts and the
process asked has room for (ChunkWindow). Beyond that the handler blocks in `send`. No process in
between stores a chunk or waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from overlay.model import clocks as time
from overlay.model.errors import BadRequest, BadResponse
from overlay.model.limits import Limits
from overlay.model.segments import Chunk
from overlay.observability.throttle import TokenBucket

CHUNK_BYTES = Limits.chunk_bytes
MAX_REPEATS = 8  # how often one part may arrive before the answer
ITEM_END = b"\t"  # whitespace between JSON values, and never within those that we write
ITEMS_AT_ONCE, ITEMS_PER_S = 64, 500  # sent one by one; a chunk costs every hop about 50 us
ITEM_S = 0.02  # how long the others are delayed

Send = Callable[[bytes], bool]
"""Takes the next chunk. Returns False if the rest is no longer wanted."""


def cut(items: Iterable[Any], size: int) -> Iterator[tuple[bytes, bool]]:
    """The same bytes as (chunk, more) with chunks of `size`; the last one has what is left.

    items: bytes, bytearrays or memoryviews of any size. Raises NotBytes for other types.
    """
    held = bytearray()
    for item in items:
        if not isinstance(item, (bytes, bytearray, memoryview)):
            raise NotBytes(type(item).__name__)
        whole, start = memoryview(item).cast("B"), 0
        while len(held) + len(whole) - start > size:  # so that the last one is not empty
            end = start + size - len(held)
            chunk = held + whole[start:end]
            held.clear()
            start = end
            yield bytes(chunk), True
        held += whole[start:]
    yield bytes(held), False


class Items:
    """An iterator of byte strings, each of which ends an item, with ITEM_END, except the last.

    If the client takes chunks, each is sent at once; otherwise it is like any iterator of bytes.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        if hasattr(self._chunks, "close"):
            self._chunks.close()


class ItemSender:
    """Sends each item at once, or a moment later together with others when there are many.

    `add` and `rest` are for one thread. Delayed items are sent on a timer's thread, "items".
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held = bytearray()
        self._is_wanted = True
        self._at_once = TokenBucket(ITEMS_AT_ONCE, ITEMS_PER_S)
        self._sending_s = 0.0  # earns no tokens, or a slow way would make each item go alone
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def add(self, item: bytes) -> bool:
        """Returns False if the rest is no longer wanted."""
        with self._lock:
            self._held += item
            now = time.monotonic() - self._sending_s
            if self._at_once.take(now) or len(self._held) >= CHUNK_BYTES:
                self._pass_on_locked()
            elif self._timer is None:
                self._timer = threading.Timer(ITEM_S, self._pass_on)
                self._timer.name, self._timer.daemon = "items", True
                self._timer.start()
            return self._is_wanted

    def rest(self) -> bytes:
        """Stops sending. Returns what was not sent. May be called twice."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            held, self._held = bytes(self._held), bytearray()
            return held

    def _pass_on(self) -> None:
        with self._lock:
            self._timer = None
            self._pass_on_locked()

    def _pass_on_locked(self) -> None:
        began = time.monotonic()
        held, self._held = bytes(self._held), bytearray()
        for start in range(0, len(held), CHUNK_BYTES):
            self._is_wanted = self._is_wanted and self._send(held[start : start + CHUNK_BYTES])
        self._sending_s += time.monotonic() - began


class NotBytes(TypeError):
    """Its message is the name of the type found instead."""


class ChunkWriter:
    """Sends one row's result. One thread sends; `grant` and `close` are safe from any."""

    def __init__(
        self, ahead: int, deadline: float, pass_on: Callable[[bytes, Chunk], None]
    ) -> None:
        """ahead: how many chunks may be sent before the first grant."""
        self.at = 0  # bytes sent
        self.waited_s = 0.0  # for grants; not part of the handler's time
        self._room = ahead
        self._deadline = deadline
        self._pass_on = pass_on
        self._closed = False
        self._changed = threading.Condition()

    def send(self, chunk: bytes) -> bool:
        """Sends the chunk once there is room. Returns False if it is no longer wanted."""
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._room or self._closed, self._deadline - began)
            self.waited_s += time.monotonic() - began
            if self._closed or not self._room:
                return False
            self._room -= 1
        at, self.at = self.at, self.at + len(chunk)
        self._pass_on(chunk, Chunk(at, True, self.grant))
        return True

    def grant(self, chunks: int) -> None:
        with self._changed:
            self._room += chunks
            self._changed.notify_all()

    def close(self) -> None:
        """The rest is no longer wanted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class PartProgress:
    """What may still arrive of a worker's part of a row, before the answer. Has no lock.

    A process that sends more than was granted would fill the memory of those above it. A part may
    be repeated, but not endlessly.
    """

    __slots__ = ("at", "left", "times")

    def __init__(self, chunks: int) -> None:
        self.at = 0  # bytes received in chunks
        self.left = chunks  # chunks that may arrive before more are granted
        self.times = 0  # how often the whole part has arrived

    def whole(self) -> None:
        """The whole part has arrived. Raises BadResponse."""
        self.times += 1
        if self.times > MAX_REPEATS:
            raise BadResponse(f"a part more than {MAX_REPEATS} times")

    def chunk(self, at: int, size: int, more: bool) -> None:
        """A chunk of it has arrived. Raises BadResponse."""
        if at != self.at:
            raise BadResponse(f"a chunk at byte {at:,}, after {self.at:,}")
        self.at += size
        self.left -= more
        if self.left < 0:
            raise BadResponse("more chunks of a part than were granted")


class Budget:
    """A number of bytes that all streams share. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        return self._left

    def take(self, size: int) -> None:
        """Takes more than is left too, as the bytes exist already. A negative size returns them."""
        with self._lock:
            self._left -= size


FREE_BYTES = Limits.uncounted_bytes


class Share:
    """What one stream has taken of a Budget. Has no lock.

    Its first FREE_BYTES are not counted, so streams of small requests touch nothing shared.
    """

    __slots__ = ("_budget", "size")

    def __init__(self, budget: Budget) -> None:
        self.size = 0
        self._budget = budget

    def add(self, size: int) -> None:
        """A negative size returns bytes."""
        before = self.size
        self.size = after = before + size
        if before > FREE_BYTES or after > FREE_BYTES:
            self._budget.take(max(after, FREE_BYTES) - max(before, FREE_BYTES))

    def is_within(self, limit: int) -> bool:
        """Whether it has less than `limit`, and leaves enough for others."""
        if self.size <= FREE_BYTES:
            return True
        return self.size < limit and self.size < self._budget.left


Key = tuple[int, int, str]
"""A part of a stream: segment, row, worker."""

GrantCall = tuple[Callable[[int], None], int]
"""A worker's `grant`, and how many chunks to grant."""


class ChunkWindow:
    """The parts that pass through a stream in chunks, and how far ahead of the client each may be.

    A part's worker sends one chunk unasked, and then as many as are granted. While there is room,
    these are as many as the client takes before it grants any; a part that finds no room advances
    chunk by chunk until there is. So a client that reads nothing holds up one chunk of each part
    plus `room` others, and all clients of a process together what `shared` allows. Has no lock.
    """

    def __init__(self, room: int, shared: Budget | None = None) -> None:
        """room: chunks. shared: bytes."""
        self._room = room
        self._shared = shared or Budget(room * CHUNK_BYTES)
        self._parts: dict[Key, _Part] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def passes(self, key: Key, chunk: Chunk, ahead: int) -> GrantCall | None:
        """Notes a chunk for a client that takes `ahead` more of a part. Returns the grant due."""
        if chunk.grant is None:
            self.end(key)
            return None
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = _Part(chunk.grant, ahead)
        part.unread += 1
        return self._grant_for(part, 0)

    def granted(self, key: Key, chunks: int, by_a_client: bool) -> GrantCall | None:
        """Notes a grant. Returns the grant to pass on. Raises BadRequest if a client grants more
        than it was sent, or a process more than that plus what a client takes in advance."""
        part = self._parts.get(key)
        if part is None:  # it has ended in the meantime
            return None
        # A process passes on grants, including those that its own client gives in advance.
        limit = part.unread + (0 if by_a_client else Limits.chunks_ahead)
        if chunks > limit:
            raise BadRequest(f"grants: {key[2]} has sent {part.unread} chunks, not {chunks}")
        part.unread -= chunks
        return self._grant_for(part, chunks)

    def end(self, key: Key) -> None:
        part = self._parts.pop(key, None)
        if part is not None and part.has_room:
            self._room += part.ahead
            self._shared.take(-part.ahead * CHUNK_BYTES)

    def close(self) -> None:
        """Ends all parts."""
        for key in list(self._parts):
            self.end(key)

    def end_rows(self, number: int, start: int, count: int) -> None:
        rows = range(start, start + count)
        for key in [key for key in self._parts if key[0] == number and key[1] in rows]:
            self.end(key)

    def _grant_for(self, part: _Part, chunks: int) -> GrantCall | None:
        size = part.ahead * CHUNK_BYTES
        if not part.has_room and self._room >= part.ahead and self._shared.left >= size:
            part.has_room = True
            self._room -= part.ahead
            self._shared.take(size)
            chunks += part.ahead
        return (part.grant, chunks) if chunks else None


@dataclass
class _Part:
    grant: Callable[[int], None]
    ahead: int
    unread: int = 0  # chunks passed on and not yet granted
    has_room: bool = False
