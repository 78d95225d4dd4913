"""The rows of one segment that a handler runs, and the handler's slots.

A row is started at most once, and answered once: by its handler, or on its behalf.
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
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    OnResult,
    PartSlice,
    Segment,
    Slice,
)
from overlay.model.topology import HandlerSpec, Process
from overlay.observability.counters import Spread, Times
from overlay.transport.chunks import (
    CHUNK_BYTES,
    ITEM_END,
    ChunkWriter,
    Items,
    ItemSender,
    NotBytes,
    Send,
    cut,
)
from overlay.workers.api import Context, NotWanted, context_of
from overlay.workers.request_ids import Begun

log = logging.getLogger(__name__)

MAX_TEXT = 4000  # characters kept of a traceback; a log line holds a few more
AHEAD_S = 0.002  # this much work is taken beyond the slots, so that no thread waits for a row


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
    """One handler's slots and counts. The executor's lock guards `taken`."""

    def __init__(self, spec: HandlerSpec, slots: int, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.total = slots
        self.options = options
        self.taken = 0
        self.worked = Times()
        self.service_s = 0.0  # per row, smoothed
        self._completed = 0
        self._failed = 0
        self._lock = threading.Lock()

    @property
    def ahead(self) -> int:
        if self.spec.run == "process" or not self.service_s:
            return 0
        return min(4096, int(AHEAD_S / self.service_s))

    def ended(self, rows: int, worked_s: float, failed: int) -> None:
        """Counts rows that ran, in `worked_s` in total."""
        each = worked_s / rows
        self.worked.add(each, rows)
        with self._lock:
            self.service_s = each if not self.service_s else 0.8 * self.service_s + 0.2 * each
            self._completed += rows - failed
            self._failed += failed

    def counts(self, active: int) -> HandlerCounts:
        spec = self.spec
        counted = self._completed, self._failed
        return HandlerCounts(spec.name, spec.run, self.total, active, *counted, self.worked.spread)


class HandlerJob:
    """The claimed rows of one segment. Safe from any thread."""

    def __init__(
        self,
        slots: HandlerSlots,
        process: Process,
        segment: Segment,
        waited_s: float,
        on_result: OnResult,
        give_back: Callable[[int], None],
        stop: Callable[[HandlerJob, int, int], None],
        forget: Callable[[Iterable[int]], None] = lambda rows: None,
    ) -> None:
        """give_back: called with the number of slots that are free again. stop: ends running rows.

        forget: called with rows that provably did not run, before they are answered.
        """
        self.segment = segment
        self.slots = slots
        self._give_back = give_back
        self._stop = stop
        self._forget = forget
        self._process = process
        self._on_result = on_result
        self._waited_us = int(waited_s * 1e6)
        self._made = time.monotonic()
        self._is_ahead = slots.taken > slots.total  # some rows have to wait here
        self._hops = (*segment.route.hops, process.id)
        self._lock = threading.Lock()
        self._waiting = deque(range(segment.count))  # ascending; dropped rows are skipped
        self._dropped = bytearray()  # by row: it must not start any more
        self._left = segment.count  # rows that wait and are not dropped
        self._unanswered = PendingRows(segment.count)
        self._ended = bytearray(segment.count)
        self._writers: dict[int, ChunkWriter] = {}  # of started rows, if chunks are wanted

    def begin_next(self) -> int | None:
        """The next row, which only this caller may run; None if there is none."""
        with self._lock:
            while self._left:
                row = self._waiting.popleft()
                if not (self._dropped and self._dropped[row]):
                    self._left -= 1
                    return row
            return None

    @property
    def waiting(self) -> int:
        """The number of rows that have not started."""
        return self._left

    def context(self, row: int) -> Context:
        return context_of(self._process, self.segment, row, self.slots.options, self._ended)

    @property
    def in_chunks(self) -> bool:
        """Whether a large result may be sent in chunks."""
        return self.segment.chunks > 0 and self.segment.on_partial is not None

    def writer_of(self, row: int) -> ChunkWriter:
        """The writer that takes the row's result, if it may be sent in chunks."""

        def pass_on(result: bytes, chunk: Chunk) -> None:
            assert self.segment.on_partial is not None
            self._send(
                self.segment.on_partial, row, self._part([result], 0, self._waited_us, chunk)
            )

        writer = ChunkWriter(self.segment.chunks, self.segment.deadline, pass_on)
        with self._lock:
            self._writers[row] = writer
            if self._ended[row]:
                writer.close()
        return writer

    def too_late(self) -> Detail:
        """Replaces a result after the deadline, when the handler may have stopped early."""
        reason = f"the deadline passed while the handler '{self.slots.spec.name}' ran"
        return Detail(Code.DEADLINE_EXCEEDED, reason, Executed.YES)

    def done(
        self, outcomes: list[tuple[int, bytes | Detail]], worked_s: float, began: float
    ) -> None:
        """Takes the outcomes of started rows, in ascending order of the rows.

        worked_s: in total. began: when the first row started, in monotonic seconds.
        """
        failed = sum(not isinstance(outcome, bytes) for _, outcome in outcomes)
        if failed:
            self._forget([row for row, outcome in outcomes if _proves_not_run(outcome)])
        self.slots.ended(len(outcomes), worked_s, failed)
        self._give_back(len(outcomes))
        each_us = int(worked_s / len(outcomes) * 1e6)
        here_s = max(0.0, began - self._made) if self._is_ahead else 0.0
        waited_us = self._waited_us + int(here_s * 1e6)
        left = iter([outcome for _, outcome in outcomes])
        for first, rows in consecutive([row for row, _ in outcomes]):
            self._answer(first, list(itertools.islice(left, rows)), each_us, waited_us)

    def refuse(self, begun: Begun) -> None:
        """Answers the rows that must not start. Called before the job is submitted."""
        failures, ids = {}, self.segment.all_ids
        if begun.full is not None:
            failures = dict.fromkeys(range(self.segment.count), _failure(begun.full))
        for row in begun.again:
            failures[row] = _failure(
                AlreadyExecuted(f"request {ids[row]:016x} has already run here")
            )
        with self._lock:
            for row in failures:
                self._drop_locked(row, row + 1)
        self._give_back(len(failures))
        for first, rows in consecutive(sorted(failures)):
            self._answer(first, [failures[row] for row in range(first, first + rows)], 0)

    def end(self, code: Code, start: int, count: int) -> None:
        """Answers rows on behalf of their handlers, and cancels the handlers."""
        what = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller left"
        name = self.slots.spec.name
        rows = range(start, start + count)
        with self._lock:
            never = self._drop_locked(start, start + count)
            self._ended[start : start + count] = b"\1" * count
            writers = [self._writers[row] for row in rows if row in self._writers]
        if never:
            self._forget(never)
            self._give_back(len(never))
        unbegun = Detail(code, f"{what} before the handler '{name}' began", Executed.NO)
        begun = Detail(code, f"{what} while the handler '{name}' ran", Executed.YES)
        for row in rows:
            self._answer(row, [unbegun if row in never else begun], 0)
        # After the answers: an ended handler reports at once, and its report must not come first.
        for writer in writers:
            writer.close()
        self._stop(self, start, count)

    def _drop_locked(self, start: int, stop: int) -> set[int]:
        """Drops those of these rows that have not started, and returns them."""
        if not self._left:
            return set()
        dropped = self._dropped = self._dropped or bytearray(self.segment.count)
        rows = {row for row in range(max(start, self._waiting[0]), stop) if not dropped[row]}
        for row in rows:
            dropped[row] = 1
        self._left -= len(rows)
        return rows

    def _answer(
        self,
        start: int,
        outcomes: list[bytes | Detail],
        worked_us: int,
        waited_us: int | None = None,
    ) -> None:
        times = worked_us, self._waited_us if waited_us is None else waited_us
        with self._lock:
            runs = self._unanswered.take(start, len(outcomes))
        for first, rows in runs:
            found = outcomes[first - start : first - start + rows]
            if not self._writers:
                self._send(self._on_result, first, self._part(found, *times))
                continue
            for row, outcome in enumerate(found, first):
                self._send(self._on_result, row, self._part([outcome], *times, self._rest(row)))

    def _send(self, on_result: OnResult, row: int, part: PartSlice) -> None:
        on_result(row, Slice(part.results.count, (part,), (self._process.id,)))

    def _rest(self, row: int) -> Chunk | None:
        """The last chunk's offset in the row's result, if chunks were sent before."""
        writer = self._writers.get(row)
        return Chunk(writer.at, False) if writer is not None and writer.at else None

    def _part(
        self,
        outcomes: list[bytes | Detail],
        worked_us: int,
        waited_us: int,
        chunk: Chunk | None = None,
    ) -> PartSlice:
        failures = {i: o for i, o in enumerate(outcomes) if isinstance(o, Detail)}
        results = [o if isinstance(o, bytes) else b"" for o in outcomes] if failures else outcomes
        return PartSlice(
            self._process.id,
            Column(results),  # type: ignore[arg-type]
            self._hops,
            failures,
            None,
            waited_us,
            worked_us,
            chunk,
        )


def _failure(error: OverlayError) -> Detail:
    return Detail(error.code, str(error), error.executed, error.retry_after_s)


def _proves_not_run(outcome: bytes | Detail) -> bool:
    return isinstance(outcome, Detail) and outcome.executed is Executed.NO


def outcome_of(result: object, max_bytes: int, send: Send | None = None) -> tuple[str, Any]:
    """A handler's return value, as a (kind, value) that can be sent between processes.

    send: takes all chunks of a large result but the last, which is the outcome. A generator's own
    exceptions are raised.
    """
    if isinstance(result, (bytes, bytearray, memoryview)):
        size = memoryview(result).nbytes
        if send is None or size <= CHUNK_BYTES:
            return ("large", (size, max_bytes)) if size > max_bytes else ("ok", bytes(result))
        return _sent((result,), send)
    if not isinstance(result, Iterator):
        return "type", f"{type(result).__name__}, not bytes"
    try:
        if send is None:
            return _gathered(result, max_bytes)
        return _sent_singly(result, send) if isinstance(result, Items) else _sent(result, send)
    except NotBytes as e:
        return "type", f"an iterator of {e}, not bytes"
    finally:
        if hasattr(result, "close"):  # a generator may hold open files
            result.close()


def _sent(items: Iterable[Any], send: Send) -> tuple[str, Any]:
    for chunk, more in cut(items, CHUNK_BYTES):
        if not more:
            return "ok", chunk
        if not send(chunk):
            break
    return "left", None


def _sent_singly(items: Items, send: Send) -> tuple[str, Any]:
    leaving = ItemSender(send)
    try:
        for item in items:
            if not item.endswith(ITEM_END):
                return "ok", leaving.rest() + item
            if not leaving.add(item):
                break
        return "left", None
    finally:
        leaving.rest()


def _gathered(items: Iterable[Any], max_bytes: int) -> tuple[str, Any]:
    for whole, more in cut(items, max_bytes):
        if not more:
            return "ok", whole
        break
    return "large", (0, max_bytes)


def outcome_of_error(error: BaseException) -> tuple[str, Any]:
    try:
        if isinstance(error, BadRequest):
            return "bad request", str(error)[:MAX_TEXT]
        if isinstance(error, NotJson):
            return "type", str(error)[:MAX_TEXT]
        if isinstance(error, NotWanted):
            return "left", None
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - the exception's __str__ may raise anything
        text = f"{type(error).__name__}, which cannot be written as text"
    if len(text) > MAX_TEXT:  # keeps the origin and the error itself
        text = f"{text[: MAX_TEXT // 2]} ... {text[-MAX_TEXT // 2 :]}"
    return "failed", text


def read_outcome(name: str, kind: str, value: Any, request_id: int = 0) -> bytes | Detail:
    """The row's result, or the failure that its caller sees."""
    if kind == "ok":
        return value  # type: ignore[no-any-return]
    if kind == "bad request":  # the handler's own message, for the caller
        return Detail(BadRequest.code, value, Executed.YES)
    if kind == "type":
        reason = f"handler '{name}' returned {value}"
        return Detail(HandlerFailed.code, reason, Executed.YES)
    if kind == "large":
        size, most = value
        returned = f"{size:,} bytes, more" if size else "more"
        reason = (
            f"handler '{name}' returned {returned} than max_message_mib allows ({most:,}); "
            "a part that is taken as it comes (--as-completed), or a job's (--in-parts), may be "
            "larger, unless an older process is on its way"
        )
        return Detail(Code.RESOURCE_EXHAUSTED, reason, Executed.YES)
    if kind == "left":  # its row has been answered, or is about to be
        reason = f"the caller left before all that handler '{name}' returned had been read"
        return Detail(Code.CANCELLED, reason, Executed.YES)
    return read_failure(name, value, request_id)


def read_failure(name: str, text: str, request_id: int) -> Detail:
    # The text may contain secrets: it goes to the log, and the caller gets an id to search for.
    error_id = uuid.uuid4().hex[:8]
    about = {"request_id": request_id, "private": text, "kind": ""}
    log.error("error id %s: handler %s failed", error_id, name, extra=about)
    reason = f"handler '{name}' failed; error id {error_id} in this worker's log"
    return Detail(HandlerFailed.code, reason, Executed.YES)
