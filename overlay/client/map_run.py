"""One map of a client on its connection: what the drivers for threads and for asyncio share.

The decisions are those of map_window; here payloads become submissions, and what is delivered
becomes results. The drivers only wait, each in its own way.

A map outlives the process asked: what was not sent, or provably did not run, goes on when that is
back; what was under way is a failure in its own place. What is refused with proof, as by a process
that has too much to do or reaches no worker, is tried again while others are answered, and for as
long after the last answer as the map is patient; within its own time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from overlay.client.arguments import MapOptions
from overlay.client.connection import Connection
from overlay.client.map_window import MapWindow, Patience, Run
from overlay.client.outbox import Submission
from overlay.client.progress import Telling
from overlay.client.results import results_of, value_of
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.segments import Detail, Executed

log = logging.getLogger("overlay.client")

LAST_LOOK_S = 0.5  # at the end of the patience: why nothing is there

Delivered = Callable[[int, Sequence[int], Any, int, int], None]
"""As outbox.Deliver, with the index of the chunk's first payload before."""


class MapRun:
    """Sends chunks and reads what comes for them. For one thread, or one event loop.

    hand_over: called on the library's threads with what is to be given to `read` on the map's own.
    """

    def __init__(self, connection: Connection, options: MapOptions, hand_over: Delivered) -> None:
        self.window = MapWindow(options.window, options.chunk, options.ordered)
        self.is_away = False  # nothing can be sent now
        self.timeout_s = options.timeout_s
        self._connection = connection
        self._kind = options.kind
        self._has_values = options.has_values
        self._hand_over = hand_over
        self._telling = Telling(connection, options.kind.route.handler, options.total)
        self._patience = Patience(connection.map_patience(options.patience_s), time.monotonic())
        self._submissions: dict[int, Submission] = {}  # by the index of their first payload
        self._lost: CallFailed | None = None  # the process did not come back
        self._error: Exception | None = None  # something could not be sent
        self._unsent = 0
        connection.maps.add(self)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is sent."""
        return self.window.is_fed or self._lost is not None or self._error is not None

    @property
    def is_done(self) -> bool:
        return self.is_over and not self.window.unanswered

    @property
    def has_begun(self) -> bool:
        """Whether the process has been there since the map began; until then a driver waits for it
        before it sends."""
        return self._patience.was_up

    def begin(self) -> None:
        self._patience.was_up = True

    def take(self) -> Run | None:
        """As MapWindow.take; of a typed function the JSON values, each read when it is taken."""
        ready = self.window.take()
        if ready is None or not self._has_values:
            return ready
        first, results = ready
        return first, map(value_of, results)

    def may_send(self, rows: int) -> bool:
        return not (self.is_away or self.is_over) and self.window.has_room(rows)

    def send(self, rows: list[bytes], size: int) -> None:
        """Sends a chunk now, or when the process is back."""
        if not rows:
            return
        try:
            calls = self._connection.begin()
        except (CallFailed, RuntimeError) as e:  # the latter when no thread can be had
            self.fail(e)
            return
        first = self.window.sending(len(rows), size)
        deadline = time.monotonic() + self.timeout_s
        submission = Submission(self._kind, rows, deadline, partial(self._deliver, first))
        submission.is_patient = True
        submission.keeps_trying = self._keeps_trying
        self._submissions[first] = submission
        calls.send(submission)

    def fail(self, error: Exception) -> None:
        """Nothing more can be sent; raised when what was sent has its results."""
        self._error = self._error or error

    def read(self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
        """Gives the window what was handed over."""
        failed, count = isinstance(came, Detail), len(rows)
        if failed:
            made, timeout_s = self._connection.failed, self.timeout_s
            ids = range(request_id, request_id + count) if request_id else (0,) * count
            results: Sequence[Any] = [made(came, timeout_s, id_) for id_ in ids]
        else:
            results = results_of(came, at, count)
        if self.window.came(first, rows, results, failed):
            self._submissions.pop(first, None)  # none is left of a map that was closed

    def look(self) -> None:
        """Whether the process is there; to be called now and then. Tells it how the map goes.

        Raises CallFailed in a child of the process that made the map.
        """
        self._connection.check_here()
        self._telling.tell(self.window.answered, self.window.failed)
        self.is_away = self._look_away()
        if self._lost is not None:
            why = self._lost
            failure = Detail(why.code, f"not sent: {why}", Executed.NO, why.retry_after_s)
            calls = self._connection.begin()
            taken = [calls.take_back(one, failure) for one in list(self._submissions.values())]
            self._unsent += sum(taken)

    @property
    def needs_last_look(self) -> bool:
        return self.is_away and self._lost is None and self._patience.is_over(time.monotonic())

    def last_look(self) -> None:
        """Ends the map, unless the process is back just now. May take a moment."""
        try:
            self._connection.wait_connected(self._connection.begin(), LAST_LOOK_S)
        except CallFailed as e:
            self._lost = e

    def check(self) -> None:
        """Raises, of a map that is done, why it has ended early."""
        if self._error is not None:
            raise self._error
        if self._lost is not None:
            window, unsent = self.window, self._unsent
            raise _ended_early(self._lost, window.answered, window.failed - unsent, unsent)

    def close(self) -> None:
        """Ends what is open. A map that is not held any more calls it too."""
        for submission in self._submissions.values():
            self._connection.cancel(submission)
        self._telling.end()
        self._submissions.clear()  # they hold this, and so the connection
        self._connection.maps.discard(self)

    def _look_away(self) -> bool:
        if self._connection.is_closed:
            return False  # `send` finds out, and what is open is ended
        calls, now = self._connection.begin(), time.monotonic()
        is_up = calls.connected.is_set()
        if not self._patience.is_away(now, is_up, calls.rests, calls.is_served):
            return False
        self._connection.seek()
        if self._patience.is_to_be_told(now):
            log.warning(
                "%s is gone; the map goes on when it is back, and waits up to %g s for that",
                self._connection.shown,
                self._patience.seconds,
            )
        return True

    # on the library's threads

    def _deliver(
        self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> None:
        if not isinstance(came, Detail):
            self._patience.answered(time.monotonic())
        self._hand_over(first, rows, came, at, request_id)

    def _keeps_trying(self) -> bool:
        return self._patience.keeps_trying(time.monotonic())


def _ended_early(why: CallFailed, answered: int, failed: int, unsent: int) -> CallFailed:
    """The same failure, with what has become of the map's payloads."""
    counts = f"{answered:,} payloads were answered, {failed:,} failed, {unsent:,} were not sent"
    about = {"code": why.code, "executed": why.executed, "retry_after_s": why.retry_after_s}
    return type(why)(f"{why}; {counts}, nor were any after them", **about)  # type: ignore[arg-type]
