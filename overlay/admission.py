"""Who may enter and who may overtake: pure decisions of the intake.

A queue bounded by slots alone is full of requests that nobody waits for any more as soon as it is
overloaded. So time bounds it too: who cannot have an answer before its deadline, at the pace of
late, is refused at once, and who no longer can is dropped when its turn comes.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from overlay.errors import NoTimeLeft, QueueFull
from overlay.values import Caller, Mode, Route

AGE_S = 2.0  # of waiting are worth one step of priority, so that the low ones come in the end
HIGHEST_PRIORITY = 9
RECENT_S = 10.0  # a caller or a pace (or thrice its time) seen longer ago is not there any more
RECENT = 32  # ends that are remembered
CROWDED_S = 1.0  # after a refusal for its time more come than can be answered
# Less would leave places empty when the pace picks up; more, dead work. With three quarters the
# slowest accepted (p99) took 0.83 s of their second, with two thirds 0.64 s, at the same goodput.
CROWDED_SHARE = 2 / 3
PROOF = 8  # ends that a stream's rows are refused upon; the first ones may be slower than the rest


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


def check_share(of_caller: int, waiting: int, slots: int) -> None:
    """Raises QueueFull when a caller would have more slots than are left free for others.

    So none has more than half, two have a third each, and there is always room for one more. Source
    of the rule: dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998).
    """
    if of_caller >= slots - waiting:
        raise QueueFull(
            f"this caller has {of_caller} of {slots} queue slots, and others came lately too"
        )


def takes_s(ahead: int, at_work: int, mean_s: float, ample_s: float) -> float:
    """How long an answer takes, with so many to start before it; 0 when not known.

    at_work: how many of its kind are at work when none of their places is free, each for about
    `mean_s`, and its own time is hardly longer than `ample_s`.
    """
    return (ahead + 1) * mean_s / at_work + ample_s if at_work else 0.0


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


class Pace:
    """How long the requests of one kind were in service of late, and how many at a time.

    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self.last = -math.inf  # when one ended
        self._took: deque[float] = deque(maxlen=RECENT)
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
        self._least_s = min(took) if is_least_gone else min(self._least_s, took_s)
        share = 1 / min(len(took), 16)
        self._mean_s += (took_s - self._mean_s) * share
        self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) * share
        self._at_work += (at_work - self._at_work) * share
        self.last = now

    def mean_s(self, now: float) -> float:
        """0 when it is not known."""
        self._forget(now)
        return self._mean_s

    def ample_s(self, now: float) -> float:
        """What few take longer than; 0 when it is not known."""
        # As TCP reckons its retransmission timeout. With the mean alone, under overload 7 % of the
        # work came too late, where times differ by a tenth.
        self._forget(now)
        return self._mean_s + 4 * self._deviation_s

    def least_s(self, now: float) -> float:
        """What even the quickest took; 0 when it is not known."""
        self._forget(now)
        return self._least_s if self._took else 0.0

    def is_proven(self, now: float) -> bool:
        """Whether more than an odd one or two have ended of late."""
        self._forget(now)
        return len(self._took) >= PROOF

    @property
    def at_work(self) -> int:
        """How many there were at a time, rounded up."""
        return math.ceil(self._at_work)

    def _forget(self, now: float) -> None:
        if self._took and now - self.last > max(RECENT_S, 3 * self._mean_s):
            self._took.clear()
            self._least_s = math.inf
            self._mean_s = self._deviation_s = self._at_work = 0.0


class Callers:
    """Who has come lately, whether let in or not. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Caller, float] = OrderedDict()

    def seen(self, caller: Caller, now: float) -> bool:
        """Notes that it came; whether others have come of late too."""
        self._seen[caller] = now
        self._seen.move_to_end(caller)
        while now - next(iter(self._seen.values())) > RECENT_S:
            self._seen.popitem(last=False)
        return len(self._seen) > 1


def urgency(now: float, priority: int) -> float:
    """When a request of priority 0 would have had to come to be as urgent as this one."""
    return now - AGE_S * max(0, min(priority, HIGHEST_PRIORITY))


def retry_after_s(waiting: int, in_service: int, mean_service_s: float) -> float:
    """When a refused caller may find room: once a tenth of the queue has gone; 0.05 to 30 s."""
    pace = max(1, in_service) / max(mean_service_s, 0.001)
    return min(30.0, max(0.05, max(1, waiting) * 0.1 / pace))


def places(route: Route) -> tuple[Mode, str, str, tuple[str, ...] | None]:
    """What it wants places of: where these are equal, who cannot start keeps the next from it."""
    return route.mode, route.team, route.handler, route.targets
