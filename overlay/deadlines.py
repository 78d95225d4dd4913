"""Ends what nobody waits for on a thread of its own: one clock for all streamed requests.

Owns one thread, "deadlines", from `start` to `stop`. It wakes only while something can expire.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

log = logging.getLogger("overlay.deadlines")

# An end comes up to two of these late. The links keep back 50 ms for the way home, of which the
# process asked needs 20; finer costs wake-ups and gains nobody anything.
TICK_S = 0.01


class Deadlines:
    """Calls `expire` with each watched thing whose deadline has passed. Safe from any thread."""

    def __init__(self, expire: Callable[[Any], None]) -> None:
        self._expire = expire
        self._ticks: dict[int, set[Hashable]] = defaultdict(set)
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
            if not self._ticks:
                self._changed.notify()
            self._ticks[tick].add(thing)

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
                while not self._ticks and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                now = int(time.monotonic() / TICK_S)
                # A tick may hold thousands: they share it because their deadlines do.
                due = [self._ticks.pop(tick) for tick in list(self._ticks) if tick < now]
            for things in due:
                for thing in things:
                    self._expire_one(thing)
            time.sleep(TICK_S)

    def _expire_one(self, thing: Hashable) -> None:
        try:
            self._expire(thing)
        except Exception:  # the others' deadlines come all the same
            log.exception("what has expired could not be ended")
