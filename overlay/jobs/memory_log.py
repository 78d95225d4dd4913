"""A log within a process: several journals in it share one, and each loses it when it is told."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from overlay.jobs.log import LogAway, LogFull, Outrun

ENTRIES = 64  # read at a time


class Shared:
    """What is kept. capacity: bytes of all entries."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.lock = threading.Lock()
        self.origin = secrets.token_hex(8)
        self.entries: list[bytes] = []
        self.first = 1  # the number of the first that is kept
        self.size = 0
        self.capacity = capacity
        self.saved: tuple[int, bytes] | None = None


class MemoryLog:
    """One journal's access to it. is_away: it reaches no majority. acks: after so many more appends
    it does not learn that they were kept."""

    def __init__(self, shared: Shared | None = None, max_bytes: int = 1 << 20) -> None:
        self.shared = shared or Shared()
        self.max_bytes = max_bytes
        self.is_away = False
        self.acks = math.inf

    def origin(self) -> str:
        self._check()
        return self.shared.origin

    def size(self) -> int:
        self._check()
        return self.shared.size

    def append(self, expected: int, entry: bytes) -> int:
        self._check()
        shared = self.shared
        with shared.lock:
            if expected != shared.first + len(shared.entries) - 1:
                raise Outrun(f"entry {expected + 1} is another's")
            if shared.size + len(entry) > shared.capacity:
                raise LogFull(f"it has {shared.size:,} bytes, as many as it may")
            shared.entries.append(entry)
            shared.size += len(entry)
        self.acks -= 1
        if self.acks < 0:
            raise LogAway("no answer came")
        return expected + 1

    def entries(self, after: int) -> Sequence[tuple[int, bytes]]:
        self._check()
        shared = self.shared
        with shared.lock:
            at = max(after + 1 - shared.first, 0)
            found = shared.entries[at : at + ENTRIES]
            return list(enumerate(found, shared.first + at))

    def save(self, sequence: int, path: Path) -> None:
        self._check()
        shared, body = self.shared, path.read_bytes()
        with shared.lock:
            shared.saved = sequence, body
            purged = max(0, sequence - shared.first)
            shared.size -= sum(map(len, shared.entries[:purged]))
            del shared.entries[:purged]
            shared.first += purged

    def load(self, path: Path) -> int:
        self._check()
        if self.shared.saved is None:
            return 0
        sequence, body = self.shared.saved
        path.write_bytes(body)
        return sequence

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.is_away:
            raise LogAway("it is away")
