"""The last requests of a process, as summaries: how each ended and where its time went.

At high rates some are left out, so that they cost next to nothing. Failures are kept apart, or
the others would push them out.
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
    """How `count` requests ended together, and where their time went.

    request_id: the first one's. ended_s: seconds since 1970. hops: a trace of the whole way, means
    over all that were answered together. caller: its machine or name, or the process that asked.
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
    """Safe from any thread."""

    def __init__(self) -> None:
        self._good: deque[RequestSummary] = deque(maxlen=KEPT)
        self._bad: deque[RequestSummary] = deque(maxlen=KEPT)
        self._traces = TokenBucket(AT_ONCE, PER_S)
        self._failures = TokenBucket(AT_ONCE, PER_S)

    def wants_trace(self) -> bool:
        """Whether the next request is to be traced."""
        return self._traces.take(time.monotonic())

    def wants_failure(self) -> bool:
        return self._failures.take(time.monotonic())

    def add(self, summary: RequestSummary) -> None:
        is_good = summary.code is Code.OK and not summary.reason
        (self._good if is_good else self._bad).append(summary)

    def last(self, most: int) -> list[RequestSummary]:
        """Oldest first."""
        found = sorted([*self._good.copy(), *self._bad.copy()], key=lambda one: one.ended_s)
        return found[-most:] if most else []
