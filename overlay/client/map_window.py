"""One map of a client: payloads go out as results come back, never all at once.

It outlives the process asked: what was not sent, or provably did not run, goes on when that is
back; what was under way is a failure in its own place. What is refused with proof, as by a process
that has too much to do or reaches no worker, is tried again while others are answered, and for as
long after the last answer as the map is patient; within its own time.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from overlay.client.arguments import as_bytes
from overlay.client.connection import Connection, ended_early
from overlay.client.outbox import CallKind, Submission
from overlay.client.progress import Telling
from overlay.client.results import CallFailed, results_of, value_of
from overlay.model import clocks as time
from overlay.model.limits import Limits
from overlay.model.segments import Failure

PAUSE_S = 0.02  # how long a map waits for results before it asks again for payloads
LOOK_S = 0.5  # and before it looks whether the process is there; Ctrl-C works on Windows too
NOTHING_YET: Any = object()
"""What a map's payloads may give when there is none at this moment: results are given meanwhile."""


class MapRun:
    """One map: keeps its window full while its results are taken. For one thread."""

    def __init__(
        self,
        connection: Connection,
        kind: CallKind,
        timeout_s: float,
        chunk: int,
        window: int,
        patience_s: float | None = None,
        payloads: object = (),
    ) -> None:
        """payloads: as the map was given them, for how many they are."""
        self._connection = connection
        self._telling = Telling(connection, kind.route.handler, payloads)
        connection.maps.add(self)
        self._presence = connection.presence(patience_s)
        self._kind = kind
        self._timeout_s = timeout_s
        self._chunk = chunk
        self._window = window
        self._came: queue.SimpleQueue[tuple[int, Sequence[int], Any, int, int]] = (
            queue.SimpleQueue()
        )
        self._orders: dict[int, list[Any]] = {}  # first index -> the order, rows still open
        self._sent = 0
        self._open = 0
        self._early: dict[int, bytes | CallFailed] = {}
        self._bytes = 0  # of payloads that are open and results that are early
        self._mean_result = 0.0
        self._answered = 0
        self._failed = 0
        self._unsent = 0
        self._over: CallFailed | None = None  # why nothing more is sent
        self._answered_at = time.monotonic()  # when a payload last was

    def run(
        self, payloads: Iterator[bytes | str], ordered: bool
    ) -> Iterator[tuple[int, bytes | CallFailed]]:
        given, more = 0, True
        try:
            while (more and self._over is None) or self._open:
                is_away, pauses = self._is_away(), False
                self._telling.tell(self._answered, self._failed)
                while more and not is_away and not pauses and self._has_room():
                    more, pauses = self._send(payloads)
                within_s = PAUSE_S if is_away or pauses else LOOK_S
                for first, rows, results in self._some(within_s if self._open or is_away else 0):
                    for index, result in zip(rows, results, strict=True):
                        index += first
                        if not ordered:
                            yield index, result
                        elif index != given:
                            self._early[index] = result
                            self._bytes += _size_of(result)
                        else:
                            yield index, result
                            given += 1
                            while self._early and given in self._early:
                                result = self._early.pop(given)
                                self._bytes -= _size_of(result)
                                yield given, result
                                given += 1
            if self._over is not None:
                failed = self._failed - self._unsent
                raise ended_early(self._over, self._answered, failed, self._unsent)
        finally:
            for order, _ in self._orders.values():
                self._connection.cancel(order)
            self._telling.end()
            self._orders.clear()  # they hold this, and so the connection
            self._connection.maps.discard(self)

    def _is_away(self) -> bool:
        """Whether nothing can be sent now. When it never can, what was not sent is ended."""
        self._connection.check_here()
        if not self._presence.look_away():
            return self._over is not None
        if self._over is None and self._presence.is_over:
            self._over = self._presence.last_look()
        if self._over is not None:
            orders = [order for order, _ in self._orders.values()]
            self._unsent += self._presence.take_back(orders, self._over)
        return True

    def _has_room(self) -> bool:
        if not self._open:
            return True
        rows = self._open + len(self._early) + self._chunk
        bytes_ = self._bytes + self._open * self._mean_result
        return rows <= self._window and bytes_ < Limits.window_bytes

    def _send(self, payloads: Iterator[bytes | str]) -> tuple[bool, bool]:
        """Sends the next chunk. Whether there may be more, and whether not at once."""
        rows: list[bytes] = []
        size, pauses = 0, False
        for payload in itertools.islice(payloads, self._chunk):
            if payload is NOTHING_YET:
                pauses = True
                break
            rows.append(payload if type(payload) is bytes else as_bytes(payload))
            size += len(rows[-1])
            if size >= Limits.frame_bytes:
                break
        else:
            if len(rows) < self._chunk:
                self._send_rows(rows)
                return False, False
        self._send_rows(rows)
        return True, pauses

    def _send_rows(self, rows: list[bytes]) -> None:
        if not rows:
            return
        deadline = time.monotonic() + self._timeout_s
        first = self._sent
        order = Submission(self._kind, rows, deadline, partial(self._deliver, first))
        order.keeps_trying = self._is_patient
        if self._presence.was_up:
            self._presence.send(order)
        else:
            self._connection.send(order, self._timeout_s)
            self._presence.was_up = order.is_patient = True
        self._orders[first] = [order, len(rows)]
        self._sent += len(rows)
        self._open += len(rows)
        self._bytes += order.size

    def _deliver(
        self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> None:
        if not isinstance(came, Failure):
            self._answered_at = time.monotonic()
        self._came.put((first, rows, came, at, request_id))

    def _is_patient(self) -> bool:
        return time.monotonic() - self._answered_at < self._presence.patience_s

    def _some(
        self, within_s: float
    ) -> Iterator[tuple[int, Sequence[int], Sequence[bytes | CallFailed]]]:
        """What has come, waited for no longer than that."""
        with suppress(queue.Empty):
            yield self._read(*self._came.get(timeout=within_s))
        for _ in range(self._came.qsize()):
            yield self._read(*self._came.get())

    def _read(
        self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> tuple[int, Sequence[int], Sequence[bytes | CallFailed]]:
        entry, count = self._orders[first], len(rows)
        entry[1] -= count
        self._open -= count
        if not entry[1]:
            self._bytes -= entry[0].size
            del self._orders[first]
        if isinstance(came, Failure):
            self._failed += count
            failed, timeout_s = self._connection.failed, self._timeout_s
            ids = range(request_id, request_id + count) if request_id else (0,) * count
            return first, rows, [failed(came, timeout_s, id_) for id_ in ids]
        self._answered += count
        results = results_of(came, at, count)
        mean = sum(map(len, results)) / count
        self._mean_result += (mean - self._mean_result) * min(1.0, count / 16)
        return first, rows, results


def _size_of(result: bytes | CallFailed) -> int:
    return len(result) if isinstance(result, bytes) else 0


def with_values(
    pairs: Iterator[tuple[int, bytes | CallFailed]],
) -> Iterator[tuple[int, Any]]:
    """The results as the JSON values that they are."""
    try:
        for index, result in pairs:
            yield index, value_of(result)
    finally:
        pairs.close()  # type: ignore[attr-defined]


def raising(pairs: Iterator[tuple[int, bytes | CallFailed]]) -> Iterator[bytes]:
    try:
        for _, result in pairs:
            if isinstance(result, CallFailed):
                raise result
            yield result
    finally:
        pairs.close()  # type: ignore[attr-defined]
