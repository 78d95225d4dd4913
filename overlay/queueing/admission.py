"""Which requests are admitted, and which may overtake. Sans-IO.

A queue bounded by slots alone is soon full, when overloaded, of requests whose callers have given
up. So time bounds it too: a request that recent service times say cannot meet its deadline is
rejected immediately, and one that no longer can is dropped when its turn comes.
"""

from __future__ import annotations

from overlay.model.errors import NoTimeLeft
from overlay.model.segments import Route

AGE_S = 2.0  # of waiting are worth one step of priority, so that low ones start in the end
HIGHEST_PRIORITY = 9
CROWDED_S = 1.0  # after a refusal for its time more come than can be answered
# Less would leave places empty when service gets quicker; more, dead work. With three quarters the
# slowest admitted (p99) took 0.83 s of their second, with two thirds 0.64 s, at the same goodput.
CROWDED_SHARE = 2 / 3


def may_overtake(behind: Route, ahead: Route) -> bool:
    """Whether a request may start while an older one still waits for a place.

    Only if they cannot want the same slots; otherwise a stream of the one kind would starve the
    other.
    """
    if behind.handler != ahead.handler and behind.handler and ahead.handler:
        return True
    return bool(behind.team and ahead.team and behind.team != ahead.team)


def answer_s(ahead: int, concurrency: int, mean_s: float, likely_s: float) -> float:
    """How long an answer takes, with so many to start before it; 0 when not known.

    concurrency: how many of its class are in service while none of their places is free, each for
    about `mean_s`: so often one gets free, which holds on average for a mix of long and short ones
    too. likely_s: what it takes itself.
    """
    return (ahead + 1) * mean_s / concurrency + likely_s if concurrency else 0.0


def share_of_time(since_refusal_s: float) -> float:
    """How much of its time a request may need, when one was refused so long ago.

    While more come than can be answered, all places stay taken anyway; what is admitted then is
    answered in good time although service times waver.
    """
    return CROWDED_SHARE if since_refusal_s < CROWDED_S else 1.0


def check_time(left_s: float, ahead: int, needs_s: float, share: float = 1.0) -> None:
    """Raises NoTimeLeft when a request cannot be answered in this share of `left_s`.

    needs_s: what an answer takes. One that need not wait is never refused: that time may not be its
    own.
    """
    if ahead and needs_s > share * left_s:
        crowd = ", and more come than can be answered" if share < 1 else ""
        raise NoTimeLeft(
            f"{ahead} requests are ahead and an answer takes about {needs_s:.1f} s; the deadline "
            f"is in {left_s:.1f} s{crowd}",
            retry_after_s=min(30.0, max(0.05, needs_s - share * left_s)),
        )


def urgency(now: float, priority: int) -> float:
    """When a request of priority 0 would have had to come to be as urgent as this one."""
    return now - AGE_S * max(0, min(priority, HIGHEST_PRIORITY))


def retry_after_s(waiting: int, in_service: int, mean_service_s: float) -> float:
    """When a refused caller may find room: once a tenth of the queue has gone; 0.05 to 30 s."""
    per_second = max(1, in_service) / max(mean_service_s, 0.001)
    return min(30.0, max(0.05, max(1, waiting) * 0.1 / per_second))


def size_class(size: int) -> int:
    """Of a payload: those of one class differ in size by less than 16 times."""
    return (size.bit_length() + 3) // 4


def wants(route: Route, default_handler: str) -> Route:
    """What a request wants places of: of equal ones, one that cannot start keeps the next from it.

    default_handler: what "" means, where it means the same everywhere below; else "".
    """
    return Route(route.mode, route.team, route.handler or default_handler, (), route.targets)
