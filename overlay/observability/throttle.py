"""Limits on how often something may happen, and reports of what exceeded them.

    TokenBucket   a burst, then a rate
    LogThrottle   a burst of lines, then a line that says how many more there were

A LogThrottle owns a thread, "repeats", for a second at a time while it has something to report.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable

from overlay.model import clocks as time

AT_ONCE = 5  # lines of a kind; then
PER_S = 0.5
PAUSE_S = 1.0  # between two reports of how many more
MAX_KINDS = 100  # there are few reasons, but one that quotes a caller may differ every time


class TokenBucket:
    """Holds `at_once` tokens, which are refilled at `per_s` a second.

    Costs next to nothing and has no lock: two threads that take the last token may both get it.
    """

    def __init__(self, at_once: float, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._burst_s = (at_once - 1) * self._interval_s
        self._full_at = 0.0  # when it will be full again; monotonic seconds

    def take(self, now: float) -> bool:
        full_at = self._full_at
        if full_at < now:
            full_at = now
        if full_at - now > self._burst_s:
            return False
        self._full_at = full_at + self._interval_s
        return True

    def is_half_full(self, now: float) -> bool:
        return self._full_at - now <= self._burst_s / 2


class LogThrottle:
    """report: logs how many more lines of a kind there were. Thread-safe."""

    def __init__(
        self,
        report: Callable[[Hashable, int], None],
        at_once: float = AT_ONCE,
        per_s: float = PER_S,
    ) -> None:
        self._report = report
        self._limits = at_once, per_s
        self._lock = threading.Lock()
        self._kinds: dict[Hashable, TokenBucket] = {}
        self._more: Counter[Hashable] = Counter()
        self._timer: threading.Timer | None = None

    def allow(self, kind: Hashable) -> bool:
        """Whether to log this one now. If not, it is counted, and reported within a second."""
        now = time.monotonic()
        with self._lock:
            bucket = self._kinds.get(kind)
            if bucket is None:
                if len(self._kinds) >= MAX_KINDS:
                    self._kinds.clear()
                bucket = self._kinds[kind] = TokenBucket(*self._limits)
            if bucket.take(now):
                return True
            self._add_locked(kind, 1)
            return False

    def add(self, kind: Hashable, count: int) -> None:
        """Counts more of a kind that are not logged one by one."""
        if count:
            with self._lock:
                self._add_locked(kind, count)

    def flush(self) -> None:
        """Reports immediately what has been counted."""
        with self._lock:
            more, self._more = self._more, Counter()
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        for kind, count in more.items():
            self._report(kind, count)

    def _add_locked(self, kind: Hashable, count: int) -> None:
        self._more[kind] += count
        if self._timer is None:
            self._timer = threading.Timer(PAUSE_S, self.flush)
            self._timer.name, self._timer.daemon = "repeats", True
            self._timer.start()
