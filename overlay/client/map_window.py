"""What a map decides, without I/O, threads or a clock of its own; one for both clients.

    gather(payloads) --> sent(rows) --> came(rows, results) --> take()

`MapWindow` says how much may be sent, and which results are given next. `Patience` says whether a
map waits for a process that is away, and when it stops waiting. Times are monotonic seconds.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from overlay.client.arguments import as_bytes
from overlay.model.errors import CallFailed
from overlay.model.limits import Limits

NOTHING_YET: Any = object()
"""What a map's payloads may give when there is none at this moment: results are given meanwhile."""

PAUSE_S = 0.02  # how long a driver waits for results before it asks again for payloads
TELL_AFTER_S = 1.0  # of an absence: then the caller is told why no results come

Result = bytes | CallFailed
Run = tuple[int, Iterable[Any]]
"""The index of a result, and this one and those that follow it: bytes, or a CallFailed."""


class MapWindow:
    """Which payloads of one map are sent next, and which results are given. Not thread-safe.

    A payload is open from when it is sent until its result is given. At most `rows` are open, and
    no more are sent while the payloads without an answer, their expected results and the results in
    hand fill `max_bytes`. However large, one chunk is sent when nothing is open.

    rows: payloads. chunk: payloads that travel together, at most `rows`. ordered: results are given
    in the order of the payloads, else as they come.
    """

    def __init__(
        self, rows: int, chunk: int, ordered: bool, max_bytes: int = Limits.window_bytes
    ) -> None:
        self.chunk = chunk
        self.is_fed = False  # the payloads have come to their end
        self.pauses = False  # the payloads had nothing at that moment
        self.sent = self.given = 0  # payloads and results
        self.answered = self.failed = 0
        self._rows = rows
        self._ordered = ordered
        self._max_bytes = max_bytes
        self._chunks: dict[int, list[int]] = {}  # first index -> rows without an answer, bytes
        self._bytes = 0  # of payloads without an answer and of results in hand
        self._mean_result = 0.0
        self._ready: deque[tuple[int, Sequence[Result], int]] = deque()  # with their bytes
        self._early: dict[int, tuple[int, Sequence[Result], int]] = {}  # the same, by first index
        self._next = 0  # the index that follows those in `_ready`, when ordered

    @property
    def open(self) -> int:
        return self.sent - self.given

    @property
    def unanswered(self) -> int:
        return self.sent - self.answered - self.failed

    def has_room(self, rows: int) -> bool:
        """Whether so many more may be sent now."""
        if not self.open:
            return True
        bytes_ = self._bytes + self.unanswered * self._mean_result
        return self.open + rows <= self._rows and bytes_ < self._max_bytes

    def gather(self, payloads: Iterator[bytes | str]) -> tuple[list[bytes], int]:
        """The next chunk and its bytes. Sets `is_fed` and `pauses`.

        Raises TypeError or ValueError for what is no payload.
        """
        rows: list[bytes] = []
        size, self.pauses = 0, False
        for payload in itertools.islice(payloads, self.chunk):
            if payload is NOTHING_YET:
                self.pauses = True
                break
            rows.append(payload if type(payload) is bytes else as_bytes(payload))
            size += len(rows[-1])
            if size >= Limits.frame_bytes:
                break
        else:
            self.is_fed = len(rows) < self.chunk
        return rows, size

    def is_full(self, rows: int, size: int) -> bool:
        """Whether a chunk that is gathered elsewhere is to be sent as it is."""
        return rows >= self.chunk or size >= Limits.frame_bytes

    def sending(self, rows: int, size: int) -> int:
        """A chunk of so many payloads and bytes is being sent: the index of its first."""
        first = self.sent
        self._chunks[first] = [rows, size]
        self.sent += rows
        self._bytes += size
        return first

    def came(
        self, first: int, rows: Sequence[int], results: Sequence[Result], failed: bool
    ) -> bool:
        """Takes results of the chunk that begins at `first`; whether they are its last.

        rows: ascending, counted from `first`. failed: every result is a CallFailed, else none is.
        """
        count, size = len(rows), 0
        if failed:
            self.failed += count
        else:
            self.answered += count
            size = sum(map(len, results))  # type: ignore[arg-type]
            share = min(1.0, count / 16)
            self._mean_result += (size / count - self._mean_result) * share
            self._bytes += size
        if rows[-1] - rows[0] + 1 == count:
            self._put(first + rows[0], results, size)
        else:
            for row, result in zip(rows, results, strict=True):
                self._put(first + row, (result,), 0 if failed else len(result))  # type: ignore[arg-type]
        chunk = self._chunks[first]
        chunk[0] -= count
        if chunk[0]:
            return False
        self._bytes -= chunk[1]
        del self._chunks[first]
        return True

    def take(self) -> Run | None:
        """The results to be given now, which count as given; None when more have to come first."""
        if not self._ready:
            return None
        first, results, size = self._ready.popleft()
        self.given += len(results)
        self._bytes -= size
        return first, results

    def _put(self, first: int, results: Sequence[Result], size: int) -> None:
        if self._ordered and first != self._next:
            self._early[first] = first, results, size
            return
        self._ready.append((first, results, size))
        if not self._ordered:
            return
        self._next += len(results)
        while self._early and (early := self._early.pop(self._next, None)) is not None:
            self._ready.append(early)
            self._next += len(early[1])


class Patience:
    """How long a map waits: for a process that is away, and with requests that were refused.

    A map outlives the process: what was not sent, or provably did not run, waits until the process
    is back, for `seconds` from when it is gone. While it is being stopped in order it still
    answers, and the patience has not begun.
    """

    def __init__(self, seconds: float, now: float) -> None:
        self.seconds = seconds
        self.was_up = False  # the map is under way; until then a call's patience holds
        self._away_since = self._away_until = math.inf
        self._is_told = False
        self._answered_at = now

    def is_away(self, now: float, is_up: bool, rests: bool, is_served: bool) -> bool:
        """Whether the map has to wait for the process; to be asked now and then.

        is_up: the process takes requests. rests: the stream was let go because nothing was open,
        and comes back when it is used. is_served: the process still answers.
        """
        if is_up or rests:
            self.was_up = self.was_up or is_up
            self._away_since = self._away_until = math.inf
            self._is_told = False
            return False
        if not self.was_up:
            return False
        self._away_since = min(self._away_since, now)
        if self._away_until == math.inf or is_served:
            self._away_until = now + self.seconds
        return True

    def is_over(self, now: float) -> bool:
        """Whether the process was waited for in vain."""
        return now > self._away_until

    def is_to_be_told(self, now: float) -> bool:
        """Whether the caller is to be told that the process is away: once for each absence."""
        if self._is_told or now - self._away_since <= TELL_AFTER_S:
            return False
        self._is_told = True
        return True

    def answered(self, now: float) -> None:
        """A payload was answered. Safe from any thread, as `keeps_trying` is."""
        self._answered_at = now

    def keeps_trying(self, now: float) -> bool:
        """Whether what was refused, and provably did not run, is tried again: for as long after
        the last answer as the map is patient."""
        return now - self._answered_at < self.seconds
