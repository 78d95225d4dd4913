"""The part of a client's map that the threaded and the asyncio drivers share.

map_window decides; here payloads become submissions, and deliveries become results. The drivers
only wait, each in its own way.

A map survives a restart of the process asked. Payloads that were not sent, or provably did not run,
are sent when the process is back; those in flight fail. A payload that is rejected without having
run, by a process that is overloaded or reaches no worker, is retried until its deadline, as long as
the last answer of the map is no older than the map's patience.
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
from overlay.client.progress import ProgressReporter
from overlay.client.results import results_of, value_of
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.segments import Detail, Executed

log = logging.getLogger("overlay.client")

LAST_CHECK_S = 0.5  # at the end of the patience: a final attempt, which finds the reason

DeliverChunk = Callable[[int, Sequence[int], Any, int, int], None]
"""Like outbox.Deliver, preceded by the index of the chunk's first payload."""


class MapRun:
    """Sends chunks and reads their answers. For one thread, or one event loop.

    hand_over: called on the library's threads, with arguments for `read` on the map's own thread.
    """

    def __init__(
        self, connection: Connection, options: MapOptions, hand_over: DeliverChunk
    ) -> None:
        self.window = MapWindow(options.window, options.chunk, options.ordered)
        self.is_away = False  # the process cannot be reached now
        self.timeout_s = options.timeout_s
        self._connection = connection
        self._kind = options.kind
        self._has_values = options.has_values
        self._hand_over = hand_over
        self._progress = ProgressReporter(connection, options.kind.route.handler, options.total)
        self._patience = Patience(connection.map_patience(options.patience_s), time.monotonic())
        self._submissions: dict[int, Submission] = {}  # by the index of their first payload
        self._lost: CallFailed | None = None  # the process did not come back
        self._error: Exception | None = None  # something could not be sent
        self._unsent = 0
        connection.maps.add(self)

    @property
    def is_over(self) -> bool:
        """Whether no more payloads will be sent."""
        return self.window.is_fed or self._lost is not None or self._error is not None

    @property
    def is_done(self) -> bool:
        return self.is_over and not self.window.unanswered

    @property
    def has_begun(self) -> bool:
        """Whether the process was reached; before that, a driver waits for the connection."""
        return self._patience.was_up

    def begin(self) -> None:
        self._patience.was_up = True

    def take(self) -> Run | None:
        """Like MapWindow.take; for a typed function the JSON values, parsed as they are taken."""
        ready = self.window.take()
        if ready is None or not self._has_values:
            return ready
        first, results = ready
        return first, map(value_of, results)

    def may_send(self, rows: int) -> bool:
        return not (self.is_away or self.is_over) and self.window.has_room(rows)

    def send(self, rows: list[bytes], size: int) -> None:
        """Sends a chunk, now or when the process is back."""
        if not rows:
            return
        try:
            submitter = self._connection.begin()
        except (CallFailed, RuntimeError) as e:  # RuntimeError: no thread can be started
            self.fail(e)
            return
        first = self.window.open_chunk(len(rows), size)
        deadline = time.monotonic() + self.timeout_s
        submission = Submission(self._kind, rows, deadline, partial(self._deliver, first))
        submission.is_patient = True
        submission.keeps_trying = self._keeps_trying
        self._submissions[first] = submission
        submitter.send(submission)

    def fail(self, error: Exception) -> None:
        """Ends the map; the error is raised once the payloads sent have their results."""
        self._error = self._error or error

    def read(
        self, first: int, rows: Sequence[int], delivered: Any, at: int, request_id: int
    ) -> None:
        """Adds the results of a delivery to the window."""
        failed, count = isinstance(delivered, Detail), len(rows)
        if failed:
            error_for, timeout_s = self._connection.error_for, self.timeout_s
            ids = range(request_id, request_id + count) if request_id else (0,) * count
            results: Sequence[Any] = [error_for(delivered, timeout_s, id_) for id_ in ids]
        else:
            results = results_of(delivered, at, count)
        if self.window.add_results(first, rows, results, failed):
            self._submissions.pop(first, None)  # a closed map has none left

    def check_connection(self) -> None:
        """Checks that the process is there, and reports progress to it. Call it periodically.

        Raises CallFailed in a child of the process that made the map.
        """
        self._connection.check_same_process()
        self._progress.report(self.window.answered, self.window.failed)
        self.is_away = self._check_away()
        if self._lost is not None:
            why = self._lost
            failure = Detail(why.code, f"not sent: {why}", Executed.NO, why.retry_after_s)
            submitter = self._connection.begin()
            taken = [submitter.take_back(one, failure) for one in list(self._submissions.values())]
            self._unsent += sum(taken)

    @property
    def needs_last_check(self) -> bool:
        return self.is_away and self._lost is None and self._patience.is_over(time.monotonic())

    def last_check(self) -> None:
        """Ends the map, unless the process is back. Blocks for up to LAST_CHECK_S."""
        try:
            self._connection.wait_connected(self._connection.begin(), LAST_CHECK_S)
        except CallFailed as e:
            self._lost = e

    def raise_if_ended_early(self) -> None:
        """Raises the reason if the map, which is done, ended early."""
        if self._error is not None:
            raise self._error
        if self._lost is not None:
            window, unsent = self.window, self._unsent
            raise _ended_early(self._lost, window.answered, window.failed - unsent, unsent)

    def close(self) -> None:
        """Cancels the open payloads. Called for a map that is dropped, too."""
        for submission in self._submissions.values():
            self._connection.cancel(submission)
        self._progress.end()
        self._submissions.clear()  # they refer to this object, and so to the connection
        self._connection.maps.discard(self)

    def _check_away(self) -> bool:
        if self._connection.is_closed:
            return False  # open payloads are cancelled, and `send` fails
        submitter, now = self._connection.begin(), time.monotonic()
        is_up = submitter.connected.is_set()
        if not self._patience.is_away(now, is_up, submitter.rests, submitter.is_served):
            return False
        self._connection.resolve_again()
        if self._patience.should_warn(now):
            log.warning(
                "%s is gone; the map goes on when it is back, and waits up to %g s for that",
                self._connection.shown,
                self._patience.seconds,
            )
        return True

    # on the library's threads

    def _deliver(
        self, first: int, rows: Sequence[int], delivered: Any, at: int, request_id: int
    ) -> None:
        if not isinstance(delivered, Detail):
            self._patience.answered(time.monotonic())
        self._hand_over(first, rows, delivered, at, request_id)

    def _keeps_trying(self) -> bool:
        return self._patience.keeps_trying(time.monotonic())


def _ended_early(why: CallFailed, answered: int, failed: int, unsent: int) -> CallFailed:
    """The same failure, with the counts of the map's payloads."""
    counts = f"{answered:,} payloads were answered, {failed:,} failed, {unsent:,} were not sent"
    about = {"code": why.code, "executed": why.executed, "retry_after_s": why.retry_after_s}
    return type(why)(f"{why}; {counts}, nor were any after them", **about)  # type: ignore[arg-type]
