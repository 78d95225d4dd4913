"""Remembers which request ids have run, so that none runs twice on a worker.

An id that a caller chose is remembered for a minute, or until its request's deadline if that is
later; if there is no room, new ids are rejected. Random ids, made by a library or by the first
process asked, repeat only because of a bug: the latest of them are remembered, as a cheap guard.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from overlay.model import clocks as time
from overlay.model.errors import IdsFull
from overlay.model.limits import Limits
from overlay.model.segments import Caller, Segment

BLOCK_BITS = 8  # ids that differ only in these bits share an entry: 256 consecutive ids take one
SLICE_S = 15.0  # ids expire in groups, this far apart: a quarter of the window

T = TypeVar("T")


@dataclass(frozen=True)
class Begun:
    """again: rows whose ids were seen before. full: set if none of the other rows may start."""

    again: Sequence[int] = ()
    full: IdsFull | None = None


class SeenIds:
    """The request ids that have started on this worker. Safe from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = _Latest(limits.own_ids)
        self._chosen = _Chosen(limits, clock)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of random ids and of entries for chosen ids."""
        return len(self._own) + len(self._chosen)

    def begin(self, segment: Segment) -> Begun:
        """Returns the rows that must not start. All others are remembered until `forget`."""
        ids: Sequence[int] = segment.all_ids
        with self._lock:
            self._chosen.expire()
            again: list[int] = []
            if self._may_repeat(ids):
                again = self._repeated(ids)
                skipped = set(again)
                ids = [id_ for row, id_ in enumerate(ids) if row not in skipped]
            if segment.own_ids:
                self._own.add(ids)
                return Begun(again)
            return Begun(again, self._chosen.add(ids, segment.deadline))

    def forget(self, segment: Segment, rows: Iterable[int]) -> None:
        """Forgets rows that provably did not run: their ids may be used again."""
        ids = segment.all_ids
        with self._lock:
            for row in rows:
                self._own.discard(ids[row])
                self._chosen.discard(ids[row])

    def _may_repeat(self, ids: Sequence[int]) -> bool:
        is_twice = len(ids) > 1 and not isinstance(ids, range) and len(set(ids)) < len(ids)
        return is_twice or self._own.has_any(ids) or self._chosen.has_any(ids)

    def _repeated(self, ids: Sequence[int]) -> list[int]:
        rows, earlier = [], set()
        for row, id_ in enumerate(ids):
            if id_ in earlier or self._own.has_any((id_,)) or self._chosen.has_any((id_,)):
                rows.append(row)
            earlier.add(id_)
        return rows


class ChosenIds:
    """Counts the ids chosen by callers of this process. Safe from any thread.

    It keeps one address from filling the memory of the workers: an address may take at most half of
    what the others leave.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = limits.chosen_ids
        self._clock = clock
        self._lock = threading.Lock()
        self._slices: _Slices[Counter[str]] = _Slices(Counter, limits.id_window_s)
        self._by_address: Counter[str] = Counter()
        self._taken = 0

    def __len__(self) -> int:
        return self._taken

    def take(self, caller: Caller, segment: Segment) -> None:
        """Counts a client's segment. Raises IdsFull, which proves that none of its rows ran."""
        if segment.own_ids or segment.route.targets is not None:
            return
        address, count = caller.address, _entries(segment)
        with self._lock:
            now = self._clock()
            self._expire_locked(now)
            free = self._max_entries - self._taken
            if self._by_address[address] + count > free:
                raise _full(
                    f"{address} has {self._by_address[address]:,} of {self._max_entries:,} "
                    f"and asks for {count:,} more; the {free:,} that are left are kept for others",
                    self._slices.first_end - now,
                )
            self._slices.at(self._slices.end_of(now, segment.deadline))[address] += count
            self._by_address[address] += count
            self._taken += count

    def _expire_locked(self, now: float) -> None:
        for ended in self._slices.ended(now):
            for address, count in ended.items():
                self._taken -= count
                self._by_address[address] -= count
                if not self._by_address[address]:
                    del self._by_address[address]


class _Latest:
    """The latest ids: at most `most`, and at least half as many."""

    def __init__(self, most: int) -> None:
        self._half = max(1, most // 2)
        self._new: set[int] = set()
        self._old: set[int] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def has_any(self, ids: Iterable[int]) -> bool:
        return not (self._new.isdisjoint(ids) and self._old.isdisjoint(ids))

    def add(self, ids: Iterable[int]) -> None:
        self._new.update(ids)
        if len(self._new) >= self._half:
            self._old, self._new = self._new, set()

    def discard(self, id_: int) -> None:
        self._new.discard(id_)
        self._old.discard(id_)


class _Chosen:
    """Ids until they expire: a bit set per block of ids, in slices of time."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._max_entries = limits.chosen_ids
        self._clock = clock
        self._slices: _Slices[dict[int, int]] = _Slices(dict, limits.id_window_s)
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    def expire(self) -> None:
        if self._entries:
            for ended in self._slices.ended(self._clock()):
                self._entries -= len(ended)

    def has_any(self, ids: Sequence[int]) -> bool:
        if not self._entries:
            return False
        slices = self._slices.all()
        return any(
            seen.get(block, 0) & bits for block, bits in _blocks(ids).items() for seen in slices
        )

    def add(self, ids: Sequence[int], deadline: float) -> IdsFull | None:
        """Adds all of them, or none and returns the reason. Expects new ids only."""
        blocks, now = _blocks(ids), self._clock()
        end = self._slices.end_of(now, deadline)
        there = self._slices.get(end) or {}
        more = sum(block not in there for block in blocks)
        if self._entries + more > self._max_entries:
            text = f"this worker remembers {self._entries:,} of {self._max_entries:,}"
            return _full(text, self._slices.first_end - now)
        seen = self._slices.at(end)
        for block, bits in blocks.items():
            seen[block] = seen.get(block, 0) | bits
        self._entries += more
        return None

    def discard(self, id_: int) -> None:
        block, bit = id_ >> BLOCK_BITS, 1 << (id_ & ((1 << BLOCK_BITS) - 1))
        for seen in self._slices.all():
            bits = seen.get(block, 0)
            if bits == bit:
                del seen[block]
                self._entries -= 1
            elif bits & bit:
                seen[block] = bits & ~bit


class _Slices(Generic[T]):
    """Groups items that expire at about the same time, and removes them together."""

    def __init__(self, make: Callable[[], T], min_s: float) -> None:
        self._make = make
        self._min_s = min_s
        self._by_end: dict[float, T] = {}
        self.first_end = math.inf

    def all(self) -> Sequence[T]:
        return list(self._by_end.values())

    def end_of(self, now: float, deadline: float) -> float:
        """When an id that arrives now expires: at its deadline or a little later."""
        stay_s, width_s = max(self._min_s, deadline - now), SLICE_S
        while stay_s > 4 * width_s:  # a deadline of a day would make thousands of slices to search
            width_s *= 2
        return math.ceil((now + stay_s) / width_s) * width_s

    def get(self, end: float) -> T | None:
        return self._by_end.get(end)

    def at(self, end: float) -> T:
        found = self._by_end.get(end)
        if found is None:
            found = self._by_end[end] = self._make()
            self.first_end = min(self.first_end, end)
        return found

    def ended(self, now: float) -> Iterator[T]:
        """Removes and yields the expired ones."""
        if now < self.first_end:
            return
        for end in [end for end in self._by_end if end <= now]:
            yield self._by_end.pop(end)
        self.first_end = min(self._by_end, default=math.inf)


def _entries(segment: Segment) -> int:
    """The number of entries that a worker needs for it, at most."""
    if segment.ids:
        return len(segment.ids)
    last = segment.first_id + segment.count - 1
    return (last >> BLOCK_BITS) - (segment.first_id >> BLOCK_BITS) + 1


def _blocks(ids: Sequence[int]) -> dict[int, int]:
    """A bit set for each block: bits of ids by their upper bits."""
    size = 1 << BLOCK_BITS
    made: dict[int, int] = {}
    if isinstance(ids, range):
        first, stop = ids.start, ids.stop
        while first < stop:
            block = first >> BLOCK_BITS
            end = min(stop, (block + 1) * size)
            made[block] = ((1 << (end - first)) - 1) << (first & (size - 1))
            first = end
        return made
    for id_ in ids:
        block = id_ >> BLOCK_BITS
        made[block] = made.get(block, 0) | 1 << (id_ & (size - 1))
    return made


def _full(text: str, after_s: float) -> IdsFull:
    after_s = max(0.05, after_s) if math.isfinite(after_s) else 1.0
    return IdsFull(
        f"no room for more request ids chosen by callers: {text}; try again in {after_s:.0f} s, "
        "or leave the id to the overlay",
        retry_after_s=after_s,
    )
