"""Which requests are admitted, and which may overtake others. Sans-IO.

Under overload a queue that is bounded only by its slots fills up with requests whose callers have
given up. So it is bounded by time as well: a request that recent service times say cannot meet its
deadline is rejected immediately, and one that no longer can is dropped when its turn comes.
"""

from __future__ import annotations

from overlay.model.errors import NoTimeLeft
from overlay.model.segments import Route

AGE_S = 2.0  # of waiting raise a request by one priority, so that low priorities do not starve
HIGHEST_PRIORITY = 9
OVERLOAD_S = 1.0  # how long after a refusal for lack of time overload is assumed
# Less would leave places empty when service gets quicker; more would admit requests that expire.
# With three quarters the p99 of those admitted took 0.83 s of their second, with two thirds 0.64 s,
# at the same goodput.
OVERLOAD_SHARE = 2 / 3


def may_overtake(behind: Route, ahead: Route) -> bool:
    """Whether a request may start while an older one still waits for a place.

    Only if they cannot want the same slots; otherwise a stream of one kind would starve the other.
    """
    if behind.handler != ahead.handler and behind.handler and ahead.handler:
        return True
    return bool(behind.team and ahead.team and behind.team != ahead.team)


def answer_s(ahead: int, concurrency: int, mean_s: float, likely_s: float) -> float:
    """How long until an answer, with `ahead` requests before it; 0 if unknown.

    concurrency: how many of its class are in service while they have no place free, each for about
    `mean_s`. So a place becomes free every mean_s / concurrency; on average that also holds for a
    mix of long and short ones. likely_s: how long the request itself takes.
    """
    return (ahead + 1) * mean_s / concurrency + likely_s if concurrency else 0.0


def share_of_time(since_refusal_s: float) -> float:
    """How much of its time left a request may need, by how long ago the last refusal was.

    Under overload all places stay taken anyway, and the margin lets admitted requests meet their
    deadlines although service times vary.
    """
    return OVERLOAD_SHARE if since_refusal_s < OVERLOAD_S else 1.0


def check_time(left_s: float, ahead: int, needs_s: float, share: float = 1.0) -> None:
    """Raises NoTimeLeft when a request cannot be answered within this share of `left_s`.

    needs_s: how long an answer takes. A request with none ahead is never refused: the estimate may
    come from other work than its own.
    """
    if ahead and needs_s > share * left_s:
        overload = ", and more arrive than can be answered" if share < 1 else ""
        raise NoTimeLeft(
            f"{ahead} requests are ahead and an answer takes about {needs_s:.1f} s; the deadline "
            f"is in {left_s:.1f} s{overload}",
            retry_after_s=min(30.0, max(0.05, needs_s - share * left_s)),
        )


def urgency(now: float, priority: int) -> float:
    """When a request of priority 0 would have had to arrive to be as urgent as this one."""
    return now - AGE_S * max(0, min(priority, HIGHEST_PRIORITY))


def retry_after_s(waiting: int, in_service: int, mean_service_s: float) -> float:
    """How long a refused caller should wait: until a tenth of the queue has gone; 0.05 to 30 s."""
    per_second = max(1, in_service) / max(mean_service_s, 0.001)
    return min(30.0, max(0.05, max(1, waiting) * 0.1 / per_second))


def size_class(size: int) -> int:
    """A payload's size class; sizes within one differ by less than 16 times."""
    return (size.bit_length() + 3) // 4


def wants(route: Route, default_handler: str) -> Route:
    """The places that a request wants: while one request waits for them, so do all equal ones.

    default_handler: what handler "" means, if it means the same everywhere below; else "".
    """
    return Route(route.mode, route.team, route.handler or default_handler, (), route.targets)
