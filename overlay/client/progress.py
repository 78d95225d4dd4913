"""Reports the progress of a map to the process asked, for `top` and `web`.

Once a second, so a map that takes less than a second reports nothing.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

from overlay.client.connection import Connection
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.segments import Progress

INTERVAL_S = 1.0

_numbers = itertools.count(1)


class ProgressReporter:
    """Reports on one map. total: the number of its payloads, 0 if unknown."""

    def __init__(self, connection: Connection, handler: str, total: int) -> None:
        self._connection = connection
        self._handler = handler
        self._total = total
        self._number = next(_numbers) % 2**32
        self._began = self._reported_at = time.monotonic()
        self._has_reported = False

    def report(self, answered: int, failed: int) -> None:
        now = time.monotonic()
        if now - self._reported_at >= INTERVAL_S:
            self._reported_at, self._has_reported = now, True
            self._send(answered, failed, False)

    def end(self) -> None:
        if self._has_reported:
            self._send(0, 0, True)

    def _send(self, answered: int, failed: int, is_over: bool) -> None:
        took_s = time.monotonic() - self._began
        counts = answered, failed, self._total
        with suppress(CallFailed):  # the client was closed
            submitter = self._connection.begin()
            submitter.send_progress(Progress(self._number, self._handler, *counts, took_s, is_over))
