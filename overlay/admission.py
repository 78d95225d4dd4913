"""Who may enter and who may overtake: pure decisions of the intake.

A queue bounded by slots alone is full of requests that nobody waits for any more as soon as it is
overloaded. So time bounds it too: who cannot have an answer before its deadline, at the pace of
late, is refused at once, and who no longer can is dropped when its turn comes.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from overlay.errors import NoTimeLeft, QueueFull
from overlay.values import Mode, Route

AGE_S = 2.0  # of waiting are worth one step of priority, so that the low ones come in the end
HIGHEST_PRIORITY = 9
RECENT_S = 10.0  # a caller or a pace (or thrice its time) seen longer ago is not there any more
RECENT = 32  # ends that are remembered


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


def check_time(left_s: float, ahead: int, in_service: int, mean_s: float) -> None:
    """Raises NoTimeLeft when a request that comes now cannot be answered within `left_s`.

    ahead: how many start before it. in_service: how many of its kind are at work, each for about
    `mean_s`; 0 when not known. Who need not wait is never refused: the mean may not be its own.
    """
    if not ahead or not mean_s or not in_service:
        return
    takes_s = (ahead + 1) * mean_s / in_service + mean_s
    if takes_s > left_s:
        raise NoTimeLeft(
            f"{ahead} requests are ahead and an answer takes about {takes_s:.1f} s; the deadline "
            f"is in {left_s:.1f} s",
            retry_after_s=min(30.0, max(0.05, takes_s - left_s)),
        )


class Pace:
    """How long the requests of one kind were in service of late. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._mean_s = 0.0

    def ended(self, now: float, took_s: float) -> None:
        self._forget(now)
        self._ends.append((now, took_s))
        self._mean_s += (took_s - self._mean_s) / min(len(self._ends), 16)

    def mean_s(self, now: float) -> float:
        """0 when it is not known."""
        self._forget(now)
        return self._mean_s

    def least_s(self, now: float) -> float:
        """What even the quickest took; 0 when it is not known."""
        self._forget(now)
        return min((took_s for _, took_s in self._ends), default=0.0)

    def _forget(self, now: float) -> None:
        if self._ends and now - self._ends[-1][0] > max(RECENT_S, 3 * self._mean_s):
            self._ends.clear()
            self._mean_s = 0.0


class Callers:
    """Who has come lately, whether let in or not. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def seen(self, caller: str, now: float) -> bool:
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
