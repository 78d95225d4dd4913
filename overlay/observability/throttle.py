"""How often something may happen, and how that which is beyond it is reported.

    TokenBucket   so many at once, then so many a second
    LogThrottle   some lines at once, then one line that says how many more

A LogThrottle owns a thread, "repeats", for a second at a time, while something is left to report.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable

from overlay.model import clocks as time

AT_ONCE = 5  # lines of a kind; then
PER_S = 0.5
PAUSE_S = 1.0  # between two lines that say how many more
MAX_KINDS = 100  # there are few reasons; one that quotes what a caller sent may always differ


class TokenBucket:
    """`at_once` may be taken together; they come back at `per_s` a second.

    Costs next to nothing and takes no lock: two threads that take the last one may both get it.
    """

    def __init__(self, at_once: float, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._most_s = (at_once - 1) * self._interval_s
        self._full_at = 0.0  # when all of them will be back; monotonic seconds

    def take(self, now: float) -> bool:
        full_at = self._full_at
        if full_at < now:
            full_at = now
        if full_at - now > self._most_s:
            return False
        self._full_at = full_at + self._interval_s
        return True

    def is_half_back(self, now: float) -> bool:
        return self._full_at - now <= self._most_s / 2


class LogThrottle:
    """tell_more: logs that so many more of a kind came. Safe from any thread."""

    def __init__(
        self,
        tell_more: Callable[[Hashable, int], None],
        at_once: float = AT_ONCE,
        per_s: float = PER_S,
    ) -> None:
        self._tell_more = tell_more
        self._most = at_once, per_s
        self._lock = threading.Lock()
        self._kinds: dict[Hashable, TokenBucket] = {}
        self._more: Counter[Hashable] = Counter()
        self._timer: threading.Timer | None = None

    def may_tell(self, kind: Hashable) -> bool:
        """Whether to log this one now. If not, it is counted and reported about a second later."""
        now = time.monotonic()
        with self._lock:
            bucket = self._kinds.get(kind)
            if bucket is None:
                if len(self._kinds) >= MAX_KINDS:
                    self._kinds.clear()
                bucket = self._kinds[kind] = TokenBucket(*self._most)
            if bucket.take(now):
                return True
            self._add_locked(kind, 1)
            return False

    def add(self, kind: Hashable, count: int) -> None:
        """So many more that are not logged one by one."""
        if count:
            with self._lock:
                self._add_locked(kind, count)

    def flush(self) -> None:
        """Reports what is left, now."""
        with self._lock:
            more, self._more = self._more, Counter()
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        for kind, count in more.items():
            self._tell_more(kind, count)

    def _add_locked(self, kind: Hashable, count: int) -> None:
        self._more[kind] += count
        if self._timer is None:
            self._timer = threading.Timer(PAUSE_S, self.flush)
            self._timer.name, self._timer.daemon = "repeats", True
            self._timer.start()
