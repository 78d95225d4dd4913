"""Calls a function for each thing whose deadline has passed, on one thread for all.

Owns that thread, "deadlines", from `start` to `stop`. It sleeps until the first deadline, so
requests that are answered in time wake nothing.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from overlay.model import clocks as time

log = logging.getLogger(__name__)

# `expire` is called up to two ticks late. A link reserves 50 ms of a deadline for the way back, so
# 20 ms are acceptable; a finer tick costs wake-ups.
TICK_S = 0.01
MAX_SLEEP_S = 600.0  # of one sleep


class Deadlines:
    """Calls `expire` with each watched thing whose deadline has passed. Thread-safe."""

    def __init__(self, expire: Callable[[Any], None]) -> None:
        self._expire = expire
        self._ticks: dict[int, set[Hashable]] = defaultdict(set)
        self._first: float = math.inf  # the thread sleeps until this tick
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
                    # Bounded, since Condition.wait raises OverflowError for a timeout of centuries.
                    self._changed.wait(min(max(0.0, left_s), MAX_SLEEP_S))
                    due = self._due_locked()
                if self._stopped:
                    return
            for things in due:
                for thing in things:
                    self._expire_one(thing)
            time.sleep(TICK_S)

    def _due_locked(self) -> list[set[Hashable]]:
        """Removes what is due, by tick; thousands of deadlines may share one."""
        now = int(time.monotonic() / TICK_S)
        if now <= self._first:
            return []
        due = [self._ticks.pop(tick) for tick in list(self._ticks) if tick < now]
        self._first = min(self._ticks, default=math.inf)
        return due

    def _expire_one(self, thing: Hashable) -> None:
        try:
            self._expire(thing)
        except Exception:  # the others must still expire
            log.exception("handling an expired deadline failed")


class Looks:
    """Calls `look` a while after `soon`: once, however often it was asked for meanwhile.

    Thread-safe. The call is on the thread of `deadlines`.
    """

    def __init__(self, deadlines: Deadlines, look: Callable[[], None], after_s: float) -> None:
        self._deadlines = deadlines
        self._look = look
        self._after_s = after_s
        self._lock = threading.Lock()
        self._is_due = False

    def soon(self) -> None:
        with self._lock:
            if self._is_due:
                return
            self._is_due = True
        self._deadlines.watch(self._run, time.monotonic() + self._after_s)

    def _run(self) -> None:
        with self._lock:
            self._is_due = False
        self._look()
