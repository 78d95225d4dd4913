"""Which request ids have run, so that none runs twice on a worker.

An id that a caller chose is remembered for a minute, or until its request's deadline if that is
later, and never for less; when there is no room, new ones are refused. Ids that a library or the
first process asked made at random can only come twice by a fault of ours: the latest of those are
remembered, as a guard that costs next to nothing.
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

BLOCK_BITS = 8  # ids that differ only in these share an entry: a run of 256 takes one
SLICE_S = 15.0  # what expires within so long expires together: a quarter of the window

T = TypeVar("T")


@dataclass(frozen=True)
class Begun:
    """again: rows whose ids were seen before. full: why none of the other rows may begin."""

    again: Sequence[int] = ()
    full: IdsFull | None = None


class SeenIds:
    """The request ids that have begun on this worker. Safe from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = _Latest(limits.own_ids)
        self._chosen = _Chosen(limits, clock)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How much is remembered: random ids, and entries of chosen ones."""
        return len(self._own) + len(self._chosen)

    def begin(self, segment: Segment) -> Begun:
        """The rows that must not begin. All others count as begun, until they are forgotten."""
        ids: Sequence[int] = segment.all_ids
        with self._lock:
            self._chosen.expire()
            again: list[int] = []
            if self._may_be_again(ids):
                again = self._again(ids)
                skipped = set(again)
                ids = [id_ for row, id_ in enumerate(ids) if row not in skipped]
            if segment.own_ids:
                self._own.add(ids)
                return Begun(again)
            return Begun(again, self._chosen.add(ids, segment.deadline))

    def forget(self, segment: Segment, rows: Iterable[int]) -> None:
        """These rows provably did not run: their ids may come again."""
        ids = segment.all_ids
        with self._lock:
            for row in rows:
                self._own.discard(ids[row])
                self._chosen.discard(ids[row])

    def _may_be_again(self, ids: Sequence[int]) -> bool:
        is_twice = len(ids) > 1 and not isinstance(ids, range) and len(set(ids)) < len(ids)
        return is_twice or self._own.has_any(ids) or self._chosen.has_any(ids)

    def _again(self, ids: Sequence[int]) -> list[int]:
        rows, here = [], set()
        for row, id_ in enumerate(ids):
            if id_ in here or self._own.has_any((id_,)) or self._chosen.has_any((id_,)):
                rows.append(row)
            here.add(id_)
        return rows


class ChosenIds:
    """How many ids that callers of this process chose the workers remember. Safe from any thread.

    It keeps one address from taking all the room that the workers have: an address gets no more
    than is left free for others.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = limits.chosen_ids
        self._clock = clock
        self._lock = threading.Lock()
        self._slices: _Slices[Counter[str]] = _Slices(Counter, limits.id_window_s)
        self._of: Counter[str] = Counter()
        self._taken = 0

    def __len__(self) -> int:
        return self._taken

    def take(self, caller: Caller, segment: Segment) -> None:
        """Counts a client's segment. Raises IdsFull, which proves that none of it ran."""
        if segment.own_ids or segment.route.targets is not None:
            return
        address, count = caller.address, _entries(segment)
        with self._lock:
            now = self._clock()
            self._expire_locked(now)
            free = self._most - self._taken
            if self._of[address] + count > free:
                raise _full(
                    f"{address} has {self._of[address]:,} of {self._most:,} and asks for {count:,} "
                    f"more; the {free:,} that are left are kept for others",
                    self._slices.first_end - now,
                )
            self._slices.at(self._slices.end_of(now, segment.deadline))[address] += count
            self._of[address] += count
            self._taken += count

    def _expire_locked(self, now: float) -> None:
        for ended in self._slices.ended(now):
            for address, count in ended.items():
                self._taken -= count
                self._of[address] -= count
                if not self._of[address]:
                    del self._of[address]


class _Latest:
    """The latest ids, at most `most` and at least half as many."""

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
    """Ids until they expire, as bits: by slice of time, then by their upper bits."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._most = limits.chosen_ids
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
        """Adds all of them, or none and returns the reason. None of them is there yet."""
        blocks, now = _blocks(ids), self._clock()
        end = self._slices.end_of(now, deadline)
        there = self._slices.get(end) or {}
        more = sum(block not in there for block in blocks)
        if self._entries + more > self._most:
            text = f"this worker remembers {self._entries:,} of {self._most:,}"
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
    """What expires at about the same time is kept together and removed together."""

    def __init__(self, make: Callable[[], T], least_s: float) -> None:
        self._make = make
        self._least_s = least_s
        self._by_end: dict[float, T] = {}
        self.first_end = math.inf

    def all(self) -> Sequence[T]:
        return list(self._by_end.values())

    def end_of(self, now: float, deadline: float) -> float:
        """When an id that comes now expires: not before its deadline, and not much later."""
        stay_s, width_s = max(self._least_s, deadline - now), SLICE_S
        while (
            stay_s > 4 * width_s
        ):  # or deadlines of a day would make thousands of slices to search
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
    """How many entries a worker needs for it, at most."""
    if segment.ids:
        return len(segment.ids)
    last = segment.first_id + segment.count - 1
    return (last >> BLOCK_BITS) - (segment.first_id >> BLOCK_BITS) + 1


def _blocks(ids: Sequence[int]) -> dict[int, int]:
    """By their upper bits, one bit for each id."""
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
