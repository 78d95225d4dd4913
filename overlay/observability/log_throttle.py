"""What may happen thousands of times a second, told in a few lines: some at once, then how many.

Owns a thread for a second at a time, "repeats", while there is something left to tell.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable

from overlay.model import clocks as time
from overlay.observability.token_bucket import TokenBucket

AT_ONCE = 5  # of a kind; then
PER_S = 0.5
PAUSE_S = 1.0  # between two lines that say how many more
MAX_KINDS = 100  # reasons are few; one that names what a caller sent could be different each time


class LogThrottle:
    """tell_more: says that so many more of a kind came. Safe from any thread."""

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
        """Whether to say this one now. If not it is counted, and told within a second or so."""
        now = time.monotonic()
        with self._lock:
            allowance = self._kinds.get(kind)
            if allowance is None:
                if len(self._kinds) >= MAX_KINDS:
                    self._kinds.clear()
                allowance = self._kinds[kind] = TokenBucket(*self._most)
            if allowance.take(now):
                return True
            self._add_locked(kind, 1)
            return False

    def add(self, kind: Hashable, count: int) -> None:
        """So many more, not to be said one by one."""
        if count:
            with self._lock:
                self._add_locked(kind, count)

    def flush(self) -> None:
        """Tells what is left to tell."""
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
