"""The running maps of clients, for people who watch the overlay.

A map is many requests of one client. Only that client knows how many there will be, and how those
ended that it sent before it connected to this process. So it reports its progress once a second, in
its frames.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from overlay.model import clocks as time
from overlay.model.segments import Caller, Progress

MAX_OF_STREAM = 16  # beyond this, the map with the oldest last report is forgotten
MAX_SHOWN = 256


@dataclass(frozen=True)
class RunningMap:
    """reported_s: when the client last reported it; monotonic seconds."""

    caller: Caller
    progress: Progress
    reported_s: float


class Maps:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._by_stream: dict[Hashable, dict[int, RunningMap]] = {}  # by the client's number

    def add(self, stream: Hashable, caller: Caller, progress: Progress) -> None:
        with self._lock:
            known = self._by_stream.setdefault(stream, {})
            known.pop(progress.number, None)
            if not progress.is_over:
                known[progress.number] = RunningMap(caller, progress, self._clock())
            if len(known) > MAX_OF_STREAM:
                del known[next(iter(known))]
            if not known:
                del self._by_stream[stream]

    def forget(self, stream: Hashable) -> None:
        """Forgets the maps of a stream that has ended."""
        if self._by_stream:
            with self._lock:
                self._by_stream.pop(stream, None)

    def all(self) -> list[RunningMap]:
        """At most MAX_SHOWN, the last reported ones at the end."""
        with self._lock:
            found = [one for known in self._by_stream.values() for one in known.values()]
        return sorted(found, key=lambda one: one.reported_s)[-MAX_SHOWN:]
