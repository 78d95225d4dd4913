"""Ends what nobody waits for on a thread of its own: one clock for all streamed requests.

Owns one thread, "deadlines", from `start` to `stop`. It sleeps until the first of them is due, so
that requests which are answered in time wake nobody.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from overlay.model import clocks as time

log = logging.getLogger("overlay.deadlines")

# An end comes up to two of these late. The links keep back 50 ms for the way home, of which the
# process asked needs 20; finer costs wake-ups and gains nobody anything.
TICK_S = 0.01
LONGEST_S = 600.0  # of one sleep


class Deadlines:
    """Calls `expire` with each watched thing whose deadline has passed. Safe from any thread."""

    def __init__(self, expire: Callable[[Any], None]) -> None:
        self._expire = expire
        self._ticks: dict[int, set[Hashable]] = defaultdict(set)
        self._first: float = math.inf  # the tick until which the thread sleeps
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def watch(self, thing: Hashable, deadline: float) -> None:
        tick = int(deadline / TICK_S)
        with self._lock:
            self._ticks[tick].add(thing)
            if tick < self._first:
                self._first = tick
                self._changed.notify()

    def forget(self, thing: Hashable, deadline: float) -> None:
        tick = int(deadline / TICK_S)
        with self._lock:
            things = self._ticks.get(tick)
            if things is not None:
                things.discard(thing)
                if not things:
                    del self._ticks[tick]

    def _run(self) -> None:
        while True:
            with self._changed:
                due = self._due_locked()
                while not due and not self._stopped:
                    left_s = (self._first + 1) * TICK_S - time.monotonic()
                    # No longer than that, or a timeout of a century would be an error.
                    self._changed.wait(min(max(0.0, left_s), LONGEST_S))
                    due = self._due_locked()
                if self._stopped:
                    return
            for things in due:
                for thing in things:
                    self._expire_one(thing)
            time.sleep(TICK_S)

    def _due_locked(self) -> list[set[Hashable]]:
        """What is due, taken out. A tick may hold thousands: their deadlines share it."""
        now = int(time.monotonic() / TICK_S)
        if now <= self._first:
            return []
        due = [self._ticks.pop(tick) for tick in list(self._ticks) if tick < now]
        self._first = min(self._ticks, default=math.inf)
        return due

    def _expire_one(self, thing: Hashable) -> None:
        try:
            self._expire(thing)
        except Exception:  # the others' deadlines come all the same
            log.exception("what has expired could not be ended")
