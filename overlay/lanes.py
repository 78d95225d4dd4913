"""What waits, and whose turn it is: pure decisions of the intake.

    callers take turns      a row each, however much they ask and on however many streams
      their lanes take turns      a lane is one stream of theirs, or their single calls
        the most urgent of a lane goes first, if there is a place for it

Who waits for places that are busy holds up nobody who cannot want the same ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from overlay.admission import Pace, may_overtake
from overlay.values import NOBODY, Caller, Route

MOST_BLOCKED = 16  # of a lane: so many routes are looked at for one turn


class Place(Protocol):
    """What a claim gives: places for `count` rows."""

    @property
    def count(self) -> int: ...


class NoPlace:
    """Instead of places."""

    count = 0


AWAITED = NoPlace()
"""It waits for a neighbour and not for a place: it holds up nobody behind it."""


class Kind:
    """What wants the same places.

    active: rows at work. is_full: the last to ask got no place. refused: when one last had no time.
    """

    __slots__ = ("active", "is_full", "pace", "refused")

    def __init__(self) -> None:
        self.active = 0
        self.is_full = False
        self.refused = -math.inf
        self.pace = Pace()


class Waiting(Hashable, Protocol):
    """What a lane needs of its items. urgency: a time, the least first."""

    @property
    def kind(self) -> Kind: ...
    @property
    def route(self) -> Route: ...
    @property
    def priority(self) -> int: ...
    @property
    def urgency(self) -> float: ...
    @property
    def number(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Lane(Generic[W]):
    """What one caller has waiting on one way in. rows, active: waiting and at work.

    is_stream: a stream's window bounds it, and several rows may start at once. paused: nothing of
    it starts, since its answers are not read.
    """

    def __init__(self, caller: Caller = NOBODY, is_stream: bool = False) -> None:
        self.caller = caller
        self.is_stream = is_stream
        self.paused = False
        self.rows = 0
        self.active = 0
        self.turns = 0  # that it has had, as far as it still matters
        # What wants the same places with the same priority starts in the order in which it came.
        self._lines: dict[tuple[Kind, int], _Line[W]] = {}

    def __iter__(self) -> Iterator[W]:
        return (item for line in self._lines.values() for item in line.items)

    def heads(self) -> list[W]:
        """The first of each line, the most urgent first."""
        # Thousands may wait behind the first of a line: they want the same places and wait too.
        heads = [next(iter(line.items)) for line in self._lines.values()]
        if len(heads) > 1:
            heads.sort(key=_urgency)
        return heads

    def rows_before(self, kind: Kind, priority: int) -> int:
        """Of this kind, how many start before one of this priority that comes now.

        Those that are less urgent only because they came later are not foreseen.
        """
        return sum(line.rows for (k, p), line in self._lines.items() if k is kind and p >= priority)

    def put(self, item: W, rows: int) -> None:
        key = item.kind, item.priority
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.items[item] = rows
        line.rows += rows
        self.rows += rows

    def less(self, item: W, rows: int) -> None:
        key = item.kind, item.priority
        line = self._lines[key]
        left = line.items[item] - rows
        self.rows -= rows
        line.rows -= rows
        if left:
            line.items[item] = left
            return
        del line.items[item]
        if not line.items:
            del self._lines[key]


class _Line(Generic[W]):
    __slots__ = ("items", "rows")

    def __init__(self) -> None:
        self.items: OrderedDict[W, int] = OrderedDict()  # with their rows that wait
        self.rows = 0


class _Caller:
    """had: the turns that it has had, as far as they still matter; now: those of the lane that had
    its last one. lanes: how many have something waiting."""

    __slots__ = ("had", "lanes", "now")

    def __init__(self) -> None:
        self.had = self.now = self.lanes = 0


class Turns(Generic[W]):
    """The lanes in which something waits. A turn is a row; the next has had the fewest.

    Source of the rule: start-time fair queueing (Goyal, Vin and Cheng, 1996).
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane[W], _Caller] = {}
        self._callers: dict[Caller, _Caller] = {}
        self._now = 0  # the turns of the one whose turn it was last

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[W]:
        return (item for lane in self._lanes for item in lane)

    def put(self, lane: Lane[W], item: W, rows: int = 1) -> None:
        if lane not in self._lanes:
            self._join(lane)
        lane.put(item, rows)

    def less(self, lane: Lane[W], item: W, rows: int = 1) -> None:
        """So many of its rows wait no more."""
        lane.less(item, rows)
        if not lane.rows:
            self._lanes.pop(lane).lanes -= 1
            if len(self._callers) > 2 * len(self._lanes) + 8:
                self._forget()

    def took(self, lane: Lane[W], item: W, rows: int = 1) -> None:
        """So many of its rows start: that was its caller's turn."""
        caller = self._lanes[lane]
        # From now on and not from its own last turn: who found no place has saved up no turns.
        self._now = max(self._now, caller.had)
        caller.had = self._now + rows
        caller.now = max(caller.now, lane.turns)
        lane.turns = caller.now + rows
        self.less(lane, item, rows)

    def next(self, claim: Callable[[W], Place | None]) -> tuple[W, Place] | None:
        """The next one for which `claim` gives a place, with that place; else None.

        It stays in until `took`.
        """
        blocked: set[tuple[Kind, bool]] = set()
        for lane in self._in_turn():
            if not lane.paused and (found := _first(lane, claim, blocked)):
                return found
        return None

    def ahead_of(self, lane: Lane[W], kind: Kind, priority: int, more: int = 0) -> int:
        """How many rows of the kind start before one that would be put in now, behind `more`."""
        before = lane.rows_before(kind, priority) + more
        known = self._callers.get(lane.caller)
        rows: dict[Caller, int] = {}
        for other in self._lanes:
            if other is not lane:
                waiting = other.rows_before(kind, 0)
                if other.caller == lane.caller:
                    before += min(waiting, before + 1)
                else:
                    rows[other.caller] = rows.get(other.caller, 0) + waiting
        mine = max(self._now, known.had if known else 0) + before
        for name, waiting in rows.items():
            before += min(waiting, max(0, mine - self._callers[name].had) + 1)
        return before

    def _join(self, lane: Lane[W]) -> None:
        caller = self._callers.get(lane.caller)
        if caller is None:
            caller = self._callers[lane.caller] = _Caller()
        # Who was away has saved up no turns, and who was just served has not lost its own.
        if not caller.lanes:
            caller.had = max(caller.had, self._now)
        lane.turns = max(lane.turns, caller.now)
        caller.lanes += 1
        self._lanes[lane] = caller

    def _in_turn(self) -> list[Lane[W]]:
        lanes = list(self._lanes)
        if len(lanes) > 1:
            lanes.sort(key=self._turns_of)
        return lanes

    def _turns_of(self, lane: Lane[W]) -> tuple[int, int]:
        caller = self._lanes[lane]
        return caller.had, lane.turns - caller.now

    def _forget(self) -> None:
        self._callers = {
            name: caller
            for name, caller in self._callers.items()
            if caller.lanes or caller.had > self._now
        }


def _first(
    lane: Lane[W], claim: Callable[[W], Place | None], blocked: set[tuple[Kind, bool]]
) -> tuple[W, Place] | None:
    """The first of the lane that gets a place, and that may overtake those that got none.

    blocked: what got none in this round; who wants the same gets none either.
    """
    passed: list[W] = []
    for item in lane.heads():
        if passed and not all(may_overtake(item.route, before.route) for before in passed):
            continue
        key = item.kind, lane.is_stream
        place = None if key in blocked else claim(item)
        item.kind.is_full = place is None
        if place is None:
            blocked.add(key)
            passed.append(item)
            if len(passed) >= MOST_BLOCKED:
                return None
        elif place is not AWAITED:
            return item, place
    return None


def _urgency(item: Waiting) -> tuple[float, int]:
    return item.urgency, item.number
