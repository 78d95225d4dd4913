"""How often something may be done: so many at once, then so many a second."""

from __future__ import annotations


class Allowance:
    """`at_once` may be taken together; they come back at `per_s` a second.

    Of two threads that take the last one both may have it: it bounds what is told, not what is
    done.
    """

    def __init__(self, at_once: float, per_s: float, now: float) -> None:
        self.room = at_once
        self._at_once = at_once
        self._per_s = per_s
        self._since = now

    def take(self, now: float) -> bool:
        self.room = min(self.room + (now - self._since) * self._per_s, self._at_once)
        self._since = now
        if self.room < 1:
            return False
        self.room -= 1
        return True
