"""The parts of a job in parts are kept as they arrive, each by itself, whole or in chunks.

    any thread:           a chunk --> does it follow on? --> the journal
    the journal's thread: [ commit ] --> its worker may send one more

A worker may send more only when what it has sent is on the disk. So a slow disk slows the workers
and fills nobody's memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from overlay.jobs.store import JobStore
from overlay.model.errors import JournalFull
from overlay.model.segments import Code, Executed, Part, PartSlice, Slice
from overlay.transport.chunks import ChunkWindow, GrantCall

CHUNKS_AHEAD, MOST_CHUNKS = 8, 256  # of one part, and of all, that arrive before they are written

Record = Callable[[Callable[[JobStore, float], None]], Future[Any]]
"""Journal.record."""


class ChunkRoom:
    """How many chunks may be under way to the journal, of all jobs together. Thread-safe."""

    def __init__(self) -> None:
        self._window = ChunkWindow(MOST_CHUNKS)
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def number(self) -> int:
        """For an attempt: what its chunks are known by here."""
        return next(self._numbers)

    def arrived(self, attempt: int, column: PartSlice) -> None:
        """Lets its worker send more, if there is room."""
        key = attempt, 0, column.process_id
        with self._lock:
            if column.chunk is None:
                self._window.end(key)
                return
            call = self._window.passes(key, column.chunk, CHUNKS_AHEAD)
        _grant(call)

    def written(self, attempt: int, worker: str) -> None:
        """Lets it send one more."""
        with self._lock:
            call = self._window.granted((attempt, 0, worker), 1, by_a_client=True)
        _grant(call)

    def end(self, attempt: int) -> None:
        with self._lock:
            self._window.end_rows(attempt, 0, 1)


def _grant(call: GrantCall | None) -> None:
    if call is not None:
        grant, chunks = call
        grant(chunks)


class PartWriter:
    """Keeps the parts of one attempt at a job. refusal: why one could not be kept."""

    def __init__(
        self,
        number: int,
        record: Record,
        problem: Callable[[], str],
        room: ChunkRoom,
        give_up: Callable[[], None],
    ) -> None:
        """number: the job's. problem: why the journal accepts nothing now; empty if it does.
        give_up: ends the attempt; called on the journal's thread, once."""
        self.refusal: JournalFull | None = None
        self._number = number
        self._record = record
        self._problem = problem
        self._room = room
        self._attempt = room.number()
        self._give_up = give_up
        self._received = ReceivedParts()
        self._lock = threading.Lock()
        self._is_closed = self._is_void = False

    def take(self, row: int, answers: Slice) -> None:
        """As OnPartial; the only row is 0."""
        for column in answers.parts:
            self._room.arrived(self._attempt, column)  # before it can be written
            written: Future[Any] | None = None
            with self._lock:
                is_closed = self._is_closed
                if not is_closed and (step := self._received.take(column)) is not None:
                    written = self._record(partial(self._write, step))
            if is_closed:
                self._room.end(self._attempt)
            elif not column.is_over:
                self._grant_after(written, column.process_id)

    def _grant_after(self, written: Future[Any] | None, worker: str) -> None:
        """written: None if nothing is to be written, as the part is complete already."""
        if written is None:
            self._room.written(self._attempt, worker)
        else:
            written.add_done_callback(lambda _: self._room.written(self._attempt, worker))

    def finish(self, answers: Slice) -> dict[str, Part]:
        """Takes the parts that come with the answer. Returns every part by its worker, good ones
        with a size and without a result."""
        self.take(0, answers)
        with self._lock:
            for step in self._received.drop_unfinished():
                self._record(partial(self._write, step))
            return self._received.parts

    def close(self) -> None:
        """The attempt has ended; nothing more of it is kept."""
        with self._lock:
            self._is_closed = True
        self._room.end(self._attempt)

    def drop(self) -> None:
        """The attempt has come to nothing: not even what has arrived is kept."""
        self._is_void = True
        self.close()

    def _write(self, step: Step, store: JobStore, now: float) -> None:
        """On the journal's thread, perhaps more than once: after a failed commit again."""
        if self._is_void or self.refusal is not None:
            return
        if step.chunk is None:
            store.drop_part(self._number, step.worker)
            return
        try:
            if problem := self._problem():
                raise JournalFull(problem)
            store.keep_chunk(self._number, step.worker, step.at, step.chunk)
        except JournalFull as e:
            why = f"the part of {step.worker} could not be kept: {e}"
            self.refusal = JournalFull(why, executed=Executed.UNKNOWN)
            self._give_up()


class Step(NamedTuple):
    """What to keep: a chunk of a worker's part, `at` bytes after its start, where the first one
    replaces what was kept before. chunk: None to forget what was kept."""

    worker: str
    at: int
    chunk: bytes | None


class ReceivedParts:
    """What has arrived. A part may come again from its start, when a process on the way was lost;
    the first one that is complete counts. Has no lock."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # of what is kept, complete or not
        self._good: dict[str, Part] = {}  # complete; without their results
        self._failed: dict[str, Part] = {}

    def take(self, column: PartSlice) -> Step | None:
        """column: one row of one worker. Returns what is to be done with it, if anything."""
        worker, part, chunk = column.process_id, column.at(0), column.chunk
        if worker in self._good:
            return None
        if not part.ok:
            return self._fail(part)
        at = chunk.at if chunk is not None else 0
        kept = self._sizes.get(worker, 0)
        if at and at != kept:
            why = f"its answer broke off after {kept:,} bytes"
            return self._fail(Part(worker, Code.DATA_LOSS, why, hops=part.hops))
        self._failed.pop(worker, None)
        self._sizes[worker] = size = at + len(part.result)
        if column.is_over:
            self._good[worker] = replace(part, result=b"", size=size)
        return Step(worker, at, part.result)

    def drop_unfinished(self) -> list[Step]:
        """Of workers whose part has neither come to its end nor failed."""
        return [Step(worker, 0, None) for worker in self._sizes.keys() - self._good.keys()]

    @property
    def parts(self) -> dict[str, Part]:
        return self._failed | self._good

    def _fail(self, part: Part) -> Step:
        self._failed[part.process_id] = part
        self._sizes.pop(part.process_id, None)
        return Step(part.process_id, 0, None)
