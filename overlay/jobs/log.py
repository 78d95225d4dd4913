"""The log that several leaders write and read: what they agree on, one entry after the other.

Whoever appends says which entry it believes to be the last. So of two who append at the same time
one succeeds, and the other learns that it was outrun. What was appended is kept by a majority of
machines. `jetstream` is such a log; `memory_log` is one within a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class LogError(Exception):
    """The entry was not appended, or that is not known."""


class Outrun(LogError):
    """Another entry is there instead, for good."""


class LogFull(LogError):
    """There is no room for it; it was not appended."""


class LogAway(LogError):
    """No majority can be reached. The entry may be appended, or be so later."""


class Log(Protocol):
    """Used by one thread, but for `save`, which may run on another. Sequences count from 1 and
    have no gaps. Every call ends within a bounded time."""

    max_bytes: int  # of one entry

    def origin(self) -> str:
        """Tells this log from one that was made anew under the same name. Raises LogAway."""

    def size(self) -> int:
        """Its bytes. Raises LogAway unless something could be appended now."""

    def append(self, expected: int, entry: bytes) -> int:
        """Appends it as number `expected` + 1 and returns that. Raises LogError."""

    def entries(self, after: int) -> Sequence[tuple[int, bytes]]:
        """The next ones, with their numbers, as far as is known here; not necessarily all. The
        first has a higher number than `after` + 1 if those before were purged. Raises LogAway."""

    def save(self, sequence: int, path: Path) -> None:
        """Keeps the file, which holds everything up to this entry, in place of an older one; then
        purges the entries before it. Raises LogError."""

    def load(self, path: Path) -> int:
        """Writes the file that was saved last, and returns up to which entry it goes; 0 if there is
        none. Raises LogError."""

    def close(self) -> None: ...
