"""Who may enter and who may overtake: pure decisions of the intake.

A queue bounded by slots alone is full of requests that nobody waits for any more as soon as it is
overloaded. So time bounds it too: who cannot have an answer before its deadline, at the pace of
late, is refused at once, and who no longer can is dropped when its turn comes.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from overlay.model.errors import NoTimeLeft, QueueFull
from overlay.model.segments import Caller, Route

AGE_S = 2.0  # of waiting are worth one step of priority, so that the low ones come in the end
HIGHEST_PRIORITY = 9
RECENT_S = 10.0  # a caller or a pace (or thrice its time) seen longer ago is not there any more
RECENT = 32  # ends that are remembered
ERA_S = 1.0  # with nobody waiting, and what was learnt of a kind is no longer how it is
CROWDED_S = 1.0  # after a refusal for its time more come than can be answered
# Less would leave places empty when the pace picks up; more, dead work. With three quarters the
# slowest accepted (p99) took 0.83 s of their second, with two thirds 0.64 s, at the same goodput.
CROWDED_SHARE = 2 / 3
PROOF = 8  # ends without which no request's own time is judged; the first may be slower
# What few take longer than is no more than so many times what the quick ones took, or they are a
# mix of quick and long work, of which nobody knows which comes next. Chance alone (exponential
# times) stays about there: at ten times the load, with least times instead, a quarter of the work
# came too late.
OF_QUICK = 8.0
ODD = 16  # of so many that seem to have too little time, one is tried all the same

# Places in service that are shared out: whoever holds as many as this times the free ones gets no
# more, so that one handler of one machine has 80 of 100 at most, one of many or many of one 90.
OF_ONE, OF_MANY = 4, 9
FEWEST_SHARED = 20  # of fewer places nobody is kept from any
OF_A_HANDLER = 4  # the same for slots of the queue: 160 of 200

MAX_ADDRESSES = 1000  # that are remembered as callers of late
MAX_NAMES = 32  # of one address that take turns of their own; the others have one together
FREE_NAMES = 16  # of them go to whoever comes; for the others one must have come before
REMEMBERED_NAMES = 4096  # that came once, of all addresses
NAME_KEPT_S = 2.0  # for which no other name takes its place among them
OTHERS = "\n"  # the names that share a turn; no metadata has it


def check_room(waiting: int, slots: int, waiting_bytes: int, size: int, most_bytes: int) -> None:
    """Raises QueueFull when `size` more bytes, or one more request, do not fit."""
    if waiting >= slots:
        raise QueueFull(f"all {slots} queue slots are taken")
    if waiting and waiting_bytes + size > most_bytes:
        raise QueueFull(
            f"{waiting} waiting requests hold {waiting_bytes:,} of {most_bytes:,} bytes; "
            f"{size:,} more do not fit"
        )


def may_overtake(behind: Route, ahead: Route) -> bool:
    """Whether a request may start while an older one still waits for a place.

    Only if they cannot want the same slots; else a stream of the one kind would starve the other.
    """
    if behind.handler != ahead.handler and behind.handler and ahead.handler:
        return True
    return bool(behind.team and ahead.team and behind.team != ahead.team)


def check_share(of_caller: int, waiting: int, slots: int, who: str = "this caller") -> None:
    """Raises QueueFull when a caller would have more slots than are left free for others.

    So none has more than half, two have a third each, and there is always room for one more. Source
    of the rule: dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998).
    """
    if of_caller >= slots - waiting:
        raise QueueFull(f"{who} has {of_caller} of {slots} queue slots, and others came lately too")


def check_share_of_handler(of_handler: int, waiting: int, slots: int) -> None:
    """The same for what waits for one handler, where others are asked for too."""
    if of_handler >= OF_A_HANDLER * (slots - waiting):
        raise QueueFull(
            f"this handler has {of_handler} of {slots} queue slots, and others are asked for too"
        )


class Shares:
    """Who holds the places in service, and who may have one more.

    Places are shared out by address and by handler, so that neither one machine nor one slow
    handler has all of them: as in `check_share`, some are left for whoever comes next.
    """

    def __init__(self, places: int, of_a_team: int) -> None:
        """of_a_team: how many those who name one team may have."""
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
            return True  # so nobody can have too many
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


K = TypeVar("K", bound=Hashable)


def _count(counts: dict[K, int], key: K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]  # nothing is kept of those who hold none


def most_of_slots(cap: int, elsewhere: int) -> int:
    """How many of a worker's slots one handler may take, when others hold so many of its `cap`."""
    free = cap - elsewhere
    if cap < FEWEST_SHARED:
        return free
    return free - free // (OF_MANY + 1)


def takes_s(ahead: int, at_work: int, mean_s: float, own_s: float) -> float:
    """How long an answer takes, with so many to start before it; 0 when not known.

    at_work: how many of its kind are at work when none of their places is free, each for about
    `mean_s`: so often one gets free, which holds on average where long and short ones mix too.
    own_s: what it takes itself.
    """
    return (ahead + 1) * mean_s / at_work + own_s if at_work else 0.0


def share_of_time(since_refusal_s: float) -> float:
    """How much of its time who comes now may need, when one was refused so long ago.

    While more come than can be answered, all places stay taken anyway; who is let in then is
    answered in good time although paces waver.
    """
    return CROWDED_SHARE if since_refusal_s < CROWDED_S else 1.0


def check_time(left_s: float, ahead: int, needs_s: float, share: float = 1.0) -> None:
    """Raises NoTimeLeft when a request that comes now cannot be answered in this share of `left_s`.

    needs_s: what an answer takes. Who need not wait is never refused: that may not be its own time.
    """
    if ahead and needs_s > share * left_s:
        crowd = ", and more come than can be answered" if share < 1 else ""
        raise NoTimeLeft(
            f"{ahead} requests are ahead and an answer takes about {needs_s:.1f} s; the deadline "
            f"is in {left_s:.1f} s{crowd}",
            retry_after_s=min(30.0, max(0.05, needs_s - share * left_s)),
        )


class ServiceTimeEstimator:
    """How long requests were at work of late, and how many at a time. Times are monotonic seconds.

    Only what its handlers really answered is told to it.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when one ended
        self._took: deque[float] = deque(maxlen=RECENT)
        self._lost: deque[float] = deque(maxlen=PROOF)  # since the last that was answered
        self._tried = 0
        self._least_s = math.inf
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._at_work = 0.0

    def ended(self, now: float, took_s: float, at_work: int = 1) -> None:
        """at_work: how many there were, with this one."""
        self._forget(now)
        took = self._took
        is_least_gone = len(took) == RECENT and took[0] <= self._least_s
        took.append(took_s)
        self._lost.clear()
        self._least_s = min(took) if is_least_gone else min(self._least_s, took_s)
        # Over 16 of them it wavers so much that a queue as long as the least of its figures is left
        # with too little time: at ten times the load a fifth of the work came too late.
        share = 1 / len(took)
        self._mean_s += (took_s - self._mean_s) * share
        self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) * share
        self._at_work += (at_work - self._at_work) * share
        self.last = now

    def mean_s(self, now: float) -> float:
        """0 when it is not known."""
        self._forget(now)
        return self._mean_s

    def own_s(self, now: float) -> float:
        """What one more takes, when it has luck; 0 when it is not known.

        Where times are alike, what few take longer than; of a mix, a few times what the quick ones
        take, since it may be one of these.
        """
        # As TCP reckons its retransmission timeout. With the mean alone, under overload 7 % of the
        # work came too late, where times differ by a tenth.
        if not self.is_proven(now):
            return 0.0
        quick_s = sorted(self._took)[len(self._took) // 10]
        return min(self._mean_s + 4 * self._deviation_s, OF_QUICK * quick_s)

    def lost(self, now: float, took_s: float) -> None:
        """One had so much time to be at work, and no answer came in it."""
        self._forget(now)
        self._lost.append(took_s)

    def least_s(self, now: float) -> float:
        """What even the quickest took; 0 when it is not known.

        Where none was answered of late, twice the time that was too little for each: or a queue
        whose first have always waited too long would never learn how long its work takes.
        """
        least_s = self._least_s if self.is_proven(now) else 0.0
        return max(least_s, 2 * min(self._lost)) if len(self._lost) == PROOF else least_s

    def is_too_little(self, now: float, left_s: float) -> bool:
        """Whether this time is not enough; an odd one that seems so is tried all the same.

        Else nobody would ever see that what comes now takes less.
        """
        if left_s >= self.least_s(now):
            return False
        self._tried = (self._tried + 1) % ODD
        return self._tried > 0

    def is_proven(self, now: float) -> bool:
        """Whether more than an odd one or two have ended of late."""
        self._forget(now)
        return len(self._took) >= PROOF

    @property
    def at_work(self) -> int:
        """How many there were at a time, rounded up."""
        return math.ceil(self._at_work)

    def forget(self) -> None:
        self._took.clear()
        self._lost.clear()
        self._least_s = math.inf
        self._mean_s = self._deviation_s = self._at_work = 0.0

    def _forget(self, now: float) -> None:
        if self._took and now - self.last > max(RECENT_S, 3 * self._mean_s):
            self.forget()


class Lately(Generic[K]):
    """What has come lately, at most `most` of it. Times are monotonic seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: OrderedDict[K, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: K) -> bool:
        return key in self._seen

    def seen(self, key: K, now: float) -> bool:
        """Notes that it came; whether others have come of late too."""
        self._seen[key] = now
        if len(self._seen) == 1:
            return False
        self._seen.move_to_end(key)
        self.forget(now)
        return len(self._seen) > 1

    def forget(self, now: float) -> None:
        """What came too long ago to matter."""
        seen = self._seen
        while seen and (len(seen) > self._most or now - next(iter(seen.values())) > RECENT_S):
            seen.popitem(last=False)


class Seen(NamedTuple):
    """A caller as it takes turns: `flow` is it, or those of its address without turns of their own.

    has_rivals, has_neighbours: whether other callers, other addresses came lately too.
    """

    flow: Caller
    has_rivals: bool
    has_neighbours: bool


class Callers:
    """Who has come lately, whether let in or not, and which names take turns of their own.

    A name costs nothing, so a new one for each request must not buy a turn for each. The first
    names of an address have turns of their own as long as they keep coming; beyond them only a
    name that came before. All others of the address share one turn.
    """

    def __init__(self) -> None:
        self._addresses: Lately[str] = Lately(MAX_ADDRESSES)
        self._names: OrderedDict[str, Lately[str]] = OrderedDict()
        self._once: list[tuple[int, float] | None] = [None] * REMEMBERED_NAMES

    def __len__(self) -> int:
        """What is kept, about."""
        return len(self._addresses) + sum(map(len, self._names.values()))

    def seen(self, caller: Caller, now: float) -> Seen:
        has_neighbours = self._addresses.seen(caller.address, now)
        names = self._names.get(caller.address)
        if names is None:
            names = self._names[caller.address] = Lately(MAX_NAMES + 1)
            while len(self._names) > MAX_ADDRESSES:
                self._names.popitem(last=False)
        elif has_neighbours:
            self._names.move_to_end(caller.address)
        if caller.name not in names:
            names.forget(now)
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


def urgency(now: float, priority: int) -> float:
    """When a request of priority 0 would have had to come to be as urgent as this one."""
    return now - AGE_S * max(0, min(priority, HIGHEST_PRIORITY))


def retry_after_s(waiting: int, in_service: int, mean_service_s: float) -> float:
    """When a refused caller may find room: once a tenth of the queue has gone; 0.05 to 30 s."""
    pace = max(1, in_service) / max(mean_service_s, 0.001)
    return min(30.0, max(0.05, max(1, waiting) * 0.1 / pace))


def size_class(size: int) -> int:
    """Of a payload: those of one class differ in size by less than 16 times."""
    return (size.bit_length() + 3) // 4


def wants(route: Route, default_handler: str) -> Route:
    """What it wants places of: where these are equal, who cannot start keeps the next from it.

    default_handler: what "" means, where it means the same everywhere below; else "".
    """
    return Route(route.mode, route.team, route.handler or default_handler, (), route.targets)
