"""The maps that clients report to be running, for people who watch the overlay.

A map is many requests of one client. Only that client knows how many there will be, and what became
of those before it reached this process. So it reports that once a second, with its frames.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from overlay.model import clocks as time
from overlay.model.segments import Caller, Progress

OF_A_STREAM = 16  # beyond this, the map whose last report is the oldest is forgotten
MOST = 256


@dataclass(frozen=True)
class RunningMap:
    """told_s: when the client last reported it; monotonic seconds."""

    caller: Caller
    progress: Progress
    told_s: float


class Maps:
    """Safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._of: dict[Hashable, dict[int, RunningMap]] = {}  # by stream, by the client's number

    def told(self, stream: Hashable, caller: Caller, progress: Progress) -> None:
        with self._lock:
            known = self._of.setdefault(stream, {})
            known.pop(progress.number, None)
            if not progress.is_over:
                known[progress.number] = RunningMap(caller, progress, self._clock())
            if len(known) > OF_A_STREAM:
                del known[next(iter(known))]
            if not known:
                del self._of[stream]

    def left(self, stream: Hashable) -> None:
        """The stream has ended, and with it the maps that it reported."""
        if self._of:
            with self._lock:
                self._of.pop(stream, None)

    def all(self) -> list[RunningMap]:
        """At most 256, those that were reported last at the end."""
        with self._lock:
            found = [one for known in self._of.values() for one in known.values()]
        return sorted(found, key=lambda one: one.told_s)[-MOST:]
