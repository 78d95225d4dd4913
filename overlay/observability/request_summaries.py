"""The last requests of a process, as stories: how each ended and where its time went.

Of very many some are left out, so that telling costs next to nothing. Failures are kept apart, or
the others would push them out.
"""

from __future__ import annotations

from collections import deque

from overlay.model import clocks as time
from overlay.model.segments import Code
from overlay.observability.token_bucket import TokenBucket
from overlay.observability.trace import RequestSummary

KEPT = 256  # of each: those that went well, those that did not
AT_ONCE, PER_S = 64, 50  # stories that are told of each


class RequestSummaries:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._good: deque[RequestSummary] = deque(maxlen=KEPT)
        self._bad: deque[RequestSummary] = deque(maxlen=KEPT)
        self._traces = TokenBucket(AT_ONCE, PER_S)
        self._failures = TokenBucket(AT_ONCE, PER_S)

    def wants_trace(self) -> bool:
        """Whether the next request is to be followed on its way."""
        return self._traces.take(time.monotonic())

    def wants_failure(self) -> bool:
        return self._failures.take(time.monotonic())

    def add(self, story: RequestSummary) -> None:
        (self._good if story.code is Code.OK and not story.reason else self._bad).append(story)

    def last(self, most: int) -> list[RequestSummary]:
        """The oldest first."""
        found = sorted([*self._good.copy(), *self._bad.copy()], key=_ended)
        return found[-most:] if most else []


def _ended(story: RequestSummary) -> float:
    return story.ended_s
