"""The decisions of a map, for both clients; sans-IO, without threads or a clock of its own.

    gather(payloads) --> open_chunk(rows) --> add_results(rows, results) --> take() --> release()

`MapWindow` decides how much may be sent, and which results are given next. `Patience` decides
whether a map waits for a process that is away, and for how long. Times are monotonic seconds.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from overlay.client.arguments import as_bytes
from overlay.model.errors import CallFailed
from overlay.model.limits import Limits

NOTHING_YET: Any = object()
"""An iterator of payloads may yield it when it has none yet; results are given meanwhile."""

PAUSE_S = 0.02  # how long a driver waits for results before it asks again for payloads
WARN_AFTER_S = 1.0  # an absence this long is logged, to explain why no results arrive

Result = bytes | CallFailed
Run = tuple[int, Iterable[Any]]
"""The index of a result, and consecutive results from there on: bytes, or a CallFailed."""


class Results(Protocol):
    """Consecutive results, each bytes or a CallFailed."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class MapWindow:
    """Which payloads of one map are sent next, and which results are given. Not thread-safe.

    A payload is open from when it is sent until its result is given. At most `rows` payloads are
    open, and no more are sent while the unanswered payloads, their expected results and the
    buffered results fill `max_bytes`. When nothing is open, one chunk of any size is sent.

    chunk: payloads per message, at most `rows`. ordered: results are given in the order of the
    payloads, else as they arrive.
    """

    def __init__(
        self, rows: int, chunk: int, ordered: bool, max_bytes: int = Limits.window_bytes
    ) -> None:
        self.chunk = chunk
        self.is_fed = False  # the payloads are exhausted
        self.pauses = False  # the payloads gave NOTHING_YET
        self.sent = self.given = 0  # payloads, results
        self.answered = self.failed = 0
        self.taking = 0  # results taken last
        self._taking_bytes = 0
        self._rows = rows
        self._ordered = ordered
        self._max_bytes = max_bytes
        self._chunks: dict[int, list[int]] = {}  # first index -> unanswered rows, bytes
        self._bytes = 0  # of unanswered payloads and of buffered results
        self._mean_result = 0.0
        self._ready: deque[tuple[int, Results, int]] = deque()  # with their bytes
        self._out_of_order: dict[int, tuple[int, Results, int]] = {}  # the same, by first index
        self._next = 0  # the index that follows those in `_ready`, when ordered

    @property
    def open(self) -> int:
        return self.sent - self.given

    @property
    def unanswered(self) -> int:
        return self.sent - self.answered - self.failed

    @property
    def has_ready(self) -> bool:
        """Whether there are results to take."""
        return bool(self._ready)

    def has_room(self, rows: int) -> bool:
        if not self.open:
            return True
        bytes_ = self._bytes + self.unanswered * self._mean_result
        return self.open + rows <= self._rows and bytes_ < self._max_bytes

    def gather(self, payloads: Iterator[bytes | str]) -> tuple[list[bytes], int]:
        """The next chunk and its size in bytes. Sets `is_fed` and `pauses`.

        Raises TypeError or ValueError for an item that is not a payload.
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
        """Whether a chunk that is gathered elsewhere cannot take another row."""
        return rows >= self.chunk or size >= Limits.frame_bytes

    def open_chunk(self, rows: int, size: int) -> int:
        """Registers a chunk that is about to be sent; returns the index of its first payload."""
        first = self.sent
        self._chunks[first] = [rows, size]
        self.sent += rows
        self._bytes += size
        return first

    def add_results(
        self, first: int, rows: Sequence[int], results: Sequence[Result], failed: bool
    ) -> bool:
        """Adds results of the chunk that begins at `first`; returns whether it is complete.

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
        return self._completes(first, count)

    def add_recorded(self, first: int, row: int, results: Results) -> bool:
        """Adds results that are in a file, from this row of the chunk on. They take no bytes."""
        self.answered += len(results)
        self._put(first + row, results, 0)
        return self._completes(first, len(results))

    def take(self) -> Run | None:
        """The results to give next, `taking` of them; None if there are none yet.

        They keep their room until `release` is called, before the next take.
        """
        if not self._ready:
            return None
        first, results, self._taking_bytes = self._ready.popleft()
        self.taking = len(results)
        return first, results

    def release(self) -> None:
        """Frees the room of the results taken last."""
        self.given += self.taking
        self._bytes -= self._taking_bytes

    def _completes(self, first: int, count: int) -> bool:
        chunk = self._chunks[first]
        chunk[0] -= count
        if chunk[0]:
            return False
        self._bytes -= chunk[1]
        del self._chunks[first]
        return True

    def _put(self, first: int, results: Results, size: int) -> None:
        if self._ordered and first != self._next:
            self._out_of_order[first] = first, results, size
            return
        self._ready.append((first, results, size))
        if not self._ordered:
            return
        self._next += len(results)
        while (
            self._out_of_order
            and (following := self._out_of_order.pop(self._next, None)) is not None
        ):
            self._ready.append(following)
            self._next += len(following[1])


class Patience:
    """How long a map waits for a process that is away, and retries rejected requests.

    Payloads that were not sent, or provably did not run, wait until the process is back, for at
    most `seconds`. The time starts when the process is gone, not while it shuts down gracefully and
    still answers.
    """

    def __init__(self, seconds: float, now: float) -> None:
        self.seconds = seconds
        self.was_up = False  # the map has begun; until then the patience is that of a call
        self._away_since = self._away_until = math.inf
        self._has_warned = False
        self._answered_at = now

    def is_away(self, now: float, is_up: bool, rests: bool, is_served: bool) -> bool:
        """Whether the map has to wait for the process. Call it periodically.

        is_up: the process takes requests. rests: the idle stream was closed, and reopens when it is
        used. is_served: the process still answers.
        """
        if is_up or rests:
            self.was_up = self.was_up or is_up
            self._away_since = self._away_until = math.inf
            self._has_warned = False
            return False
        if not self.was_up:
            return False
        self._away_since = min(self._away_since, now)
        if self._away_until == math.inf or is_served:
            self._away_until = now + self.seconds
        return True

    def is_over(self, now: float) -> bool:
        """Whether the process was away for longer than the map waits."""
        return now > self._away_until

    def should_warn(self, now: float) -> bool:
        """Whether to warn that the process is away: once for each absence."""
        if self._has_warned or now - self._away_since <= WARN_AFTER_S:
            return False
        self._has_warned = True
        return True

    def answered(self, now: float) -> None:
        """A payload was answered. Safe from any thread, as `keeps_trying` is."""
        self._answered_at = now

    def keeps_trying(self, now: float) -> bool:
        """Whether rejected requests are retried: until `seconds` after the last answer."""
        return now - self._answered_at < self.seconds
