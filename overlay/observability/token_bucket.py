"""How often something may be done: so many at once, then so many a second."""

from __future__ import annotations


class TokenBucket:
    """`at_once` may be taken together; they come back at `per_s` a second.

    It costs next to nothing, without a lock: two threads that take the last one may both have it.
    """

    def __init__(self, at_once: float, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._most_s = (at_once - 1) * self._interval_s
        self._whole_at = 0.0  # when all of them will be back

    def take(self, now: float) -> bool:
        whole_at = self._whole_at
        if whole_at < now:
            whole_at = now
        if whole_at - now > self._most_s:
            return False
        self._whole_at = whole_at + self._interval_s
        return True

    def is_half_back(self, now: float) -> bool:
        return self._whole_at - now <= self._most_s / 2
