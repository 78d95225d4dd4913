"""Summaries of the last requests of a process: how each ended and where its time went.

At high rates many are left out, so that they cost next to nothing. Failures are kept separately, so
that successes do not displace them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from overlay.model import clocks as time
from overlay.model.segments import Code, Hop, Mode
from overlay.observability.throttle import TokenBucket

KEPT = 256  # successful ones, and as many failed ones
AT_ONCE, PER_S = 64, 50  # summaries made, of each


@dataclass(frozen=True)
class RequestSummary:
    """How `count` requests that were answered together ended, and where their time went.

    request_id: the first one's. ended_s: seconds since 1970. hops: the whole trace, with means over
    all of them. caller: its machine or name, or the process that asked.
    """

    request_id: int
    mode: Mode
    team: str
    handler: str
    ended_s: float
    code: Code
    reason: str
    count: int
    hops: tuple[Hop, ...]
    total_us: int
    caller: str


class RequestSummaries:
    """Thread-safe."""

    def __init__(self) -> None:
        self._successes: deque[RequestSummary] = deque(maxlen=KEPT)
        self._failures: deque[RequestSummary] = deque(maxlen=KEPT)
        self._trace_rate = TokenBucket(AT_ONCE, PER_S)
        self._failure_rate = TokenBucket(AT_ONCE, PER_S)

    def wants_trace(self) -> bool:
        """Whether the next request is to be traced."""
        return self._trace_rate.take(time.monotonic())

    def wants_failure(self) -> bool:
        return self._failure_rate.take(time.monotonic())

    def add(self, summary: RequestSummary) -> None:
        is_success = summary.code is Code.OK and not summary.reason
        (self._successes if is_success else self._failures).append(summary)

    def last(self, limit: int) -> list[RequestSummary]:
        """Oldest first."""
        found = [*self._successes.copy(), *self._failures.copy()]
        return sorted(found, key=lambda one: one.ended_s)[-limit:] if limit else []
