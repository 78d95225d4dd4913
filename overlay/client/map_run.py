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
from typing import Any, NamedTuple

from overlay.client.arguments import MapOptions
from overlay.client.connection import Connection
from overlay.client.map_window import MapWindow, Patience, Run
from overlay.client.outbox import Submission
from overlay.client.progress import ProgressReporter
from overlay.client.results import Incomplete, is_value, results_of, value_of
from overlay.model import clocks as time
from overlay.model.errors import CallFailed, ResumeError
from overlay.model.pending import consecutive
from overlay.model.segments import Detail, Executed

log = logging.getLogger("overlay.client")

LAST_CHECK_S = 0.5  # at the end of the patience: a final attempt, which finds the reason

DeliverChunk = Callable[[int, Sequence[int], Any, int, int], None]
"""Like outbox.Deliver, preceded by the index of the chunk's first payload."""


class Chunk(NamedTuple):
    """Payloads that were taken together. size: of all, in bytes. digests: of each, with a record.

    recorded: the rows that have a result in the record; the others are sent.
    """

    payloads: list[bytes]
    size: int
    digests: Sequence[bytes] = ()
    recorded: Sequence[int] = ()

    @property
    def is_recorded(self) -> bool:
        return len(self.recorded) == len(self.payloads)


class Sent(NamedTuple):
    """What was sent of a chunk. rows: of the chunk, for each row of the submission."""

    submission: Submission
    rows: Sequence[int]
    digests: Sequence[bytes]


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
        self.record = options.record
        self._ahead = options.ahead
        self._connection = connection
        self._kind = options.kind
        self._has_values = options.has_values
        self._hand_over = hand_over
        self._progress = ProgressReporter(connection, options.kind.route.handler, options.total)
        self._patience = Patience(connection.map_patience(options.patience_s), time.monotonic())
        self._sent: dict[int, Sent] = {}  # by the index of the chunk's first payload
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

    def check_ahead(self) -> None:
        """Compares the payloads with the record, where they can be taken twice.

        Reads the file. Raises ResumeError, or what taking the payloads raises.
        """
        if self.record is not None and self._ahead is not None:
            self.record.check(self._ahead)

    def recall(self, payloads: list[bytes], size: int) -> Chunk:
        """The payloads taken next, and which of them have a result already.

        If they are not those of the record, the map ends, and the chunk is empty.
        """
        if self.record is None or not payloads:
            return Chunk(payloads, size)
        try:
            return Chunk(payloads, size, *self.record.look_up(self.window.sent, payloads))
        except ResumeError as e:
            self.fail(e)
            return Chunk([], 0)

    def send(self, chunk: Chunk) -> None:
        """Gives the results that are recorded; sends the rest, now or when the process is back."""
        rows: Sequence[int] = range(len(chunk.payloads))
        payloads, size = chunk.payloads, chunk.size
        if chunk.recorded:
            recorded = set(chunk.recorded)
            rows = [row for row in rows if row not in recorded]
            payloads = [chunk.payloads[row] for row in rows]
            size = sum(map(len, payloads))
        if payloads:
            try:
                submitter = self._connection.begin()
            except (CallFailed, RuntimeError) as e:  # RuntimeError: no thread can be started
                self.fail(e)
                return
        elif not chunk.payloads:
            return
        first = self.window.open_chunk(len(chunk.payloads), size)
        for row, count in consecutive(chunk.recorded):
            assert self.record is not None
            self.window.add_recorded(first, row, self.record.results(first + row, count))
        if not payloads:
            return
        deadline = time.monotonic() + self.timeout_s
        submission = Submission(self._kind, payloads, deadline, partial(self._deliver, first))
        submission.is_patient = True
        submission.keeps_trying = self._keeps_trying
        self._sent[first] = Sent(submission, rows, chunk.digests)
        submitter.send(submission)

    def fail(self, error: Exception) -> None:
        """Ends the map; the error is raised once the payloads sent have their results."""
        self._error = self._error or error

    def read(
        self, first: int, rows: Sequence[int], delivered: Any, at: int, request_id: int
    ) -> None:
        """Adds the results of a delivery to the window, and to the record if there is one."""
        sent = self._sent.get(first)
        if sent is None:  # the map is closed
            return
        if sent.rows[-1] >= len(sent.rows):  # it was sent without the recorded ones
            rows = [sent.rows[row] for row in rows]
        failed, count = isinstance(delivered, Detail), len(rows)
        if failed:
            error_for, timeout_s = self._connection.error_for, self.timeout_s
            ids = range(request_id, request_id + count) if request_id else (0,) * count
            results: Sequence[Any] = [error_for(delivered, timeout_s, id_) for id_ in ids]
        else:
            results = results_of(delivered, at, count)
            if self.record is not None:
                for row, result in zip(rows, results, strict=True):
                    if self._is_final(result):
                        self.record.add(first + row, sent.digests[row], result)
        if self.window.add_results(first, rows, results, failed):
            del self._sent[first]

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
            sent = [one.submission for one in self._sent.values()]
            self._unsent += sum(submitter.take_back(one, failure) for one in sent)

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
        """Raises the reason if the map, which is done, ended early, or before its record."""
        if self._error is not None:
            raise self._error
        if self._lost is not None:
            window, unsent = self.window, self._unsent
            raise _ended_early(self._lost, window.answered, window.failed - unsent, unsent)
        if self.record is not None:
            self.record.check_end(self.window.sent)

    def close(self) -> None:
        """Cancels the open payloads, closes the record. Called for a map that is dropped, too."""
        # Their tracebacks refer back to this map: a dropped client would stay open until a garbage
        # collection.
        self._error = self._lost = None
        for sent in self._sent.values():
            self._connection.cancel(sent.submission)
        self._progress.end()
        self._sent.clear()  # they refer to this object, and so to the connection
        self._connection.maps.discard(self)
        if self.record is not None:
            self.record.close()

    def _is_final(self, result: bytes) -> bool:
        """Whether it is recorded: no worker is missing, and a function's value can be read."""
        return not isinstance(result, Incomplete) and (not self._has_values or is_value(result))

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
