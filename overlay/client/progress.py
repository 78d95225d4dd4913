"""Reports the progress of a map to the process asked once a second, for those who watch it.

A map that takes less than a second reports nothing, and so costs nothing.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

from overlay.client.connection import Connection
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.segments import Progress

TELL_S = 1.0

_numbers = itertools.count(1)


class Telling:
    """The progress of one map. total: of its payloads, 0 where that is not known."""

    def __init__(self, connection: Connection, handler: str, total: int) -> None:
        self._connection = connection
        self._handler = handler
        self._total = total
        self._number = next(_numbers) % 2**32
        self._began = self._told_at = time.monotonic()
        self._has_told = False

    def tell(self, answered: int, failed: int) -> None:
        """Unless it is too early."""
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at, self._has_told = now, True
            self._send(answered, failed, False)

    def end(self) -> None:
        if self._has_told:
            self._send(0, 0, True)

    def _send(self, answered: int, failed: int, is_over: bool) -> None:
        took_s = time.monotonic() - self._began
        counts = answered, failed, self._total
        with suppress(CallFailed):  # the client was closed
            calls = self._connection.begin()
            calls.tell(Progress(self._number, self._handler, *counts, took_s, is_over))
