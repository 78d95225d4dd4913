"""Rows of one segment at work on one handler, and the places that the handler has.

A row is begun at most once and answered once, by its handler or for it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from overlay.model import clocks as time
from overlay.model.errors import AlreadyExecuted, BadRequest, HandlerFailed, OverlayError
from overlay.model.json_values import NotJson
from overlay.model.pending import PendingRows, consecutive
from overlay.model.segments import (
    Answers,
    Chunk,
    Code,
    Column,
    Executed,
    Failure,
    PartColumn,
    Segment,
    Sink,
)
from overlay.model.topology import HandlerSpec, Process
from overlay.observability.counters import Spread, Times
from overlay.transport.chunks import (
    CHUNK_BYTES,
    ITEM_END,
    ChunkWriter,
    Items,
    Leaving,
    NotBytes,
    Send,
    cut,
)
from overlay.workers.api import Context, NobodyWaits
from overlay.workers.request_ids import Begun

log = logging.getLogger(__name__)

LONGEST_TEXT = 4000  # characters of an error that are kept; a log line takes a few more
AHEAD_S = 0.002  # work taken beyond the slots, so that a thread never waits for the next row


@dataclass(frozen=True)
class HandlerCounts:
    name: str
    run: str
    slots: int
    active: int
    completed: int
    failed: int
    worked: Spread


class HandlerSlots:
    """One handler's places and counts; `taken` is guarded by the executor's lock."""

    def __init__(self, spec: HandlerSpec, slots: int, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.slots = slots
        self.options = options
        self.taken = 0
        self.worked = Times()
        self.service_s = 0.0  # smoothed, of one row
        self._completed = 0
        self._failed = 0
        self._lock = threading.Lock()

    @property
    def ahead(self) -> int:
        if self.spec.run == "process" or not self.service_s:
            return 0
        return min(4096, int(AHEAD_S / self.service_s))

    def ended(self, rows: int, worked_s: float, failed: int) -> None:
        """Counts rows that ran, `worked_s` together."""
        each = worked_s / rows
        self.worked.add(each, rows)
        with self._lock:
            self.service_s = each if not self.service_s else 0.8 * self.service_s + 0.2 * each
            self._completed += rows - failed
            self._failed += failed

    def counts(self, active: int) -> HandlerCounts:
        spec = self.spec
        counted = self._completed, self._failed
        return HandlerCounts(spec.name, spec.run, self.slots, active, *counted, self.worked.spread)


class HandlerJob:
    """Claimed rows of one segment at work: each begun at most once and answered once."""

    def __init__(
        self,
        desk: HandlerSlots,
        process: Process,
        segment: Segment,
        waited_s: float,
        sink: Sink,
        give_back: Callable[[int], None],
        stop: Callable[[HandlerJob, int, int], None],
        forget: Callable[[Iterable[int]], None] = lambda rows: None,
    ) -> None:
        """give_back: takes the number of places that are free again. stop: ends running rows.

        forget: takes the rows that provably did not run, before that is told.
        """
        self.segment = segment
        self.desk = desk
        self._give_back = give_back
        self._stop = stop
        self._forget = forget
        self._process = process
        self._sink = sink
        self._waited_us = int(waited_s * 1e6)
        self._made = time.monotonic()
        self._is_ahead = desk.taken > desk.slots  # some of it has to wait here
        self._hops = (*segment.route.hops, process.id)
        self._lock = threading.Lock()
        # Ascending; those that are gone are passed over.
        self._waiting = deque(range(segment.count))
        self._gone = bytearray()  # by row: it is not to begin any more
        self._left = segment.count  # that wait and are not gone
        self._unanswered = PendingRows(segment.count)
        self._ended = bytearray(segment.count)
        self._outlets: dict[
            int, ChunkWriter
        ] = {}  # of rows that have begun, where chunks are wanted

    def begin_next(self) -> int | None:
        """The next row to run, for the caller alone; None when there is none."""
        with self._lock:
            while self._left:
                row = self._waiting.popleft()
                if not (self._gone and self._gone[row]):
                    self._left -= 1
                    return row
            return None

    @property
    def waiting(self) -> int:
        """Rows not begun."""
        return self._left

    def context(self, row: int) -> Context:
        process, segment = self._process, self.segment
        return Context(
            process.id,
            process.team,
            segment.all_ids[row],
            segment.attempt,
            segment.deadline,
            self.desk.options,
            self._ended,
            row,
        )

    @property
    def in_chunks(self) -> bool:
        """Whether a large result may leave before it is whole."""
        return self.segment.chunks > 0 and self.segment.early is not None

    def outlet(self, row: int) -> ChunkWriter:
        """The way out of the row's result, where it may leave in chunks."""

        def pass_on(result: bytes, chunk: Chunk) -> None:
            assert self.segment.early is not None
            self._tell(self.segment.early, row, self._part([result], 0, self._waited_us, chunk))

        outlet = ChunkWriter(self.segment.chunks, self.segment.deadline, pass_on)
        with self._lock:
            self._outlets[row] = outlet
            if self._ended[row]:
                outlet.close()
        return outlet

    def too_late(self) -> Failure:
        """What becomes of a result that came after the deadline: the handler may have given up."""
        reason = f"the deadline passed while the handler '{self.desk.spec.name}' ran"
        return Failure(Code.DEADLINE_EXCEEDED, reason, Executed.YES)

    def done(
        self, outcomes: list[tuple[int, bytes | Failure]], worked_s: float, began: float
    ) -> None:
        """Takes what came of begun rows, in the order of their rows, `worked_s` together.

        began: when the first of them did, in monotonic seconds.
        """
        failed = sum(not isinstance(outcome, bytes) for _, outcome in outcomes)
        if failed:
            self._forget([row for row, outcome in outcomes if _proves_not_run(outcome)])
        self.desk.ended(len(outcomes), worked_s, failed)
        self._give_back(len(outcomes))
        each_us = int(worked_s / len(outcomes) * 1e6)
        here_s = max(0.0, began - self._made) if self._is_ahead else 0.0
        waited_us = self._waited_us + int(here_s * 1e6)
        left = iter([outcome for _, outcome in outcomes])
        for first, rows in consecutive([row for row, _ in outcomes]):
            self._answer(first, list(itertools.islice(left, rows)), each_us, waited_us)

    def refuse(self, begun: Begun) -> None:
        """Answers the rows that must not begin; before it is submitted."""
        failures, ids = {}, self.segment.all_ids
        if begun.full is not None:
            failures = dict.fromkeys(range(self.segment.count), _failure(begun.full))
        for row in begun.again:
            failures[row] = _failure(
                AlreadyExecuted(f"request {ids[row]:016x} was run here before")
            )
        with self._lock:
            for row in failures:
                self._drop_locked(row, row + 1)
        self._give_back(len(failures))
        for first, rows in consecutive(sorted(failures)):
            self._answer(first, [failures[row] for row in range(first, first + rows)], 0)

    def end(self, code: Code, start: int, count: int) -> None:
        """Answers rows for their handlers, and tells these that nobody waits any more."""
        what = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller left"
        name = self.desk.spec.name
        rows = range(start, start + count)
        with self._lock:
            never = self._drop_locked(start, start + count)
            self._ended[start : start + count] = b"\1" * count
            outlets = [self._outlets[row] for row in rows if row in self._outlets]
        if never:
            self._forget(never)
            self._give_back(len(never))
        unbegun = Failure(code, f"{what} before the handler '{name}' began", Executed.NO)
        begun = Failure(code, f"{what} while the handler '{name}' ran", Executed.YES)
        for row in rows:
            self._answer(row, [unbegun if row in never else begun], 0)
        # Only now: what is ended reports back at once, and the answer should be this one.
        for outlet in outlets:
            outlet.close()
        self._stop(self, start, count)

    def _drop_locked(self, start: int, stop: int) -> set[int]:
        """The rows among these that wait; they never begin."""
        if not self._left:
            return set()
        gone = self._gone = self._gone or bytearray(self.segment.count)
        dropped = {row for row in range(max(start, self._waiting[0]), stop) if not gone[row]}
        for row in dropped:
            gone[row] = 1
        self._left -= len(dropped)
        return dropped

    def _answer(
        self,
        start: int,
        outcomes: list[bytes | Failure],
        worked_us: int,
        waited_us: int | None = None,
    ) -> None:
        times = worked_us, self._waited_us if waited_us is None else waited_us
        with self._lock:
            runs = self._unanswered.take(start, len(outcomes))
        for first, rows in runs:
            found = outcomes[first - start : first - start + rows]
            if not self._outlets:
                self._tell(self._sink, first, self._part(found, *times))
                continue
            for row, outcome in enumerate(found, first):
                self._tell(self._sink, row, self._part([outcome], *times, self._rest(row)))

    def _tell(self, sink: Sink, row: int, part: PartColumn) -> None:
        sink(row, Answers(part.results.count, (part,), (self._process.id,)))

    def _rest(self, row: int) -> Chunk | None:
        """What the last chunk of the row's result is of it, where others have left."""
        outlet = self._outlets.get(row)
        return Chunk(outlet.at, False) if outlet is not None and outlet.at else None

    def _part(
        self,
        outcomes: list[bytes | Failure],
        worked_us: int,
        waited_us: int,
        chunk: Chunk | None = None,
    ) -> PartColumn:
        failures = {i: o for i, o in enumerate(outcomes) if isinstance(o, Failure)}
        results = [o if isinstance(o, bytes) else b"" for o in outcomes] if failures else outcomes
        return PartColumn(
            self._process.id,
            Column(results),  # type: ignore[arg-type]
            self._hops,
            failures,
            None,
            waited_us,
            worked_us,
            chunk,
        )


def _failure(error: OverlayError) -> Failure:
    return Failure(error.code, str(error), error.executed, error.retry_after_s)


def _proves_not_run(outcome: bytes | Failure) -> bool:
    return isinstance(outcome, Failure) and outcome.executed is Executed.NO


def outcome_of(result: object, most_bytes: int, send: Send | None = None) -> tuple[str, Any]:
    """What a handler gave back, in a form that survives the way between processes.

    send: takes what is too large in chunks; then the outcome is the last one of them. May raise
    what the result's own code raises.
    """
    if isinstance(result, (bytes, bytearray, memoryview)):
        size = memoryview(result).nbytes
        if send is None or size <= CHUNK_BYTES:
            return ("large", (size, most_bytes)) if size > most_bytes else ("ok", bytes(result))
        return _sent((result,), send)
    if not isinstance(result, Iterator):
        return "type", f"{type(result).__name__}, not bytes"
    try:
        if send is None:
            return _gathered(result, most_bytes)
        return _sent_singly(result, send) if isinstance(result, Items) else _sent(result, send)
    except NotBytes as e:
        return "type", f"an iterator of {e}, not bytes"
    finally:
        if hasattr(result, "close"):  # a generator may have files open
            result.close()


def _sent(items: Iterable[Any], send: Send) -> tuple[str, Any]:
    for chunk, more in cut(items, CHUNK_BYTES):
        if not more:
            return "ok", chunk
        if not send(chunk):
            break
    return "left", None


def _sent_singly(items: Items, send: Send) -> tuple[str, Any]:
    leaving = Leaving(send)
    try:
        for item in items:
            if not item.endswith(ITEM_END):
                return "ok", leaving.rest() + item
            if not leaving.add(item):
                break
        return "left", None
    finally:
        leaving.rest()


def _gathered(items: Iterable[Any], most_bytes: int) -> tuple[str, Any]:
    for whole, more in cut(items, most_bytes):
        if not more:
            return "ok", whole
        break
    return "large", (0, most_bytes)


def outcome_of_error(error: BaseException) -> tuple[str, Any]:
    try:
        if isinstance(error, BadRequest):
            return "bad request", str(error)[:LONGEST_TEXT]
        if isinstance(error, NotJson):
            return "type", str(error)[:LONGEST_TEXT]
        if isinstance(error, NobodyWaits):
            return "left", None
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - an error that cannot even tell its text
        text = f"{type(error).__name__}, which cannot be written as text"
    if len(text) > LONGEST_TEXT:  # where it came from, and what it was
        text = f"{text[: LONGEST_TEXT // 2]} ... {text[-LONGEST_TEXT // 2 :]}"
    return "failed", text


def read_outcome(name: str, kind: str, value: Any, request_id: int = 0) -> bytes | Failure:
    """The row's result, or the failure that its caller sees."""
    if kind == "ok":
        return value  # type: ignore[no-any-return]
    if kind == "bad request":  # the handler's own sentence, meant for the caller
        return Failure(BadRequest.code, value, Executed.YES)
    if kind == "type":
        reason = f"handler '{name}' returned {value}"
        return Failure(HandlerFailed.code, reason, Executed.YES)
    if kind == "large":
        size, most = value
        returned = f"{size:,} bytes, more" if size else "more"
        reason = (
            f"handler '{name}' returned {returned} than max_message_mib allows ({most:,}); "
            "a part that is taken as it comes (--as-completed) may be larger, unless an older "
            "process is on its way"
        )
        return Failure(Code.RESOURCE_EXHAUSTED, reason, Executed.YES)
    if kind == "left":  # its row has been answered, or is just being
        reason = f"the caller left before all that handler '{name}' returned had been read"
        return Failure(Code.CANCELLED, reason, Executed.YES)
    return read_failure(name, value, request_id)


def read_failure(name: str, text: str, request_id: int) -> Failure:
    # The text may hold secrets: it goes to the log, and the caller gets a number to ask for.
    error_id = uuid.uuid4().hex[:8]
    about = {"request_id": request_id, "private": text, "kind": ""}
    log.error("error id %s: handler %s failed", error_id, name, extra=about)
    reason = f"handler '{name}' failed; error id {error_id} in this worker's log"
    return Failure(HandlerFailed.code, reason, Executed.YES)
