"""Many segments over one stream: tracks which of them an answer, a cancel or a grant belongs to.

    open(segment)         --> gives it a number; its owner writes it into a frame
    write_control(frame)  --> adds pending cancels and grants
    answers_in(frame)     --> slices, each with the segment that it answers
    take(segment, rows)   --> the rows that were still unanswered, and now are answered
    lose()                --> the segments that were open when the stream ended

Used by both kinds of senders: the client library and the links to the processes below. Those decide
what waits to be sent, what may be joined, and what becomes of an answer. Sans-IO: it has no stream,
no thread and no clock.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count, repeat
from typing import Any, Generic, TypeVar

from overlay.model.errors import BadResponse
from overlay.model.limits import Limits
from overlay.model.pending import PendingRows, Run
from overlay.model.segments import Slice
from overlay.transport.chunks import PartProgress
from overlay.transport.codec import Asked, pb2

SAME_DEADLINE_S = 0.01  # requests whose deadlines are no further apart may share a segment
CONTROL_BYTES = 20  # of a cancel or a grant in a frame, roughly
MAX_TARGETS = Limits.max_targets

_FIRST = (0,)  # the start of a lone member

Member = TypeVar("Member")


class OpenSegment(Generic[Member]):
    """A segment on the stream, and which of its rows are still unanswered.

    members: what it was made from: one, or several that were joined. counts, starts: how many rows
    each member has, and its first row here.
    """

    __slots__ = (
        "arriving", "asked", "chunks", "count", "counts", "members", "number", "pending", "size",
        "starts",
    )  # fmt: skip

    def __init__(
        self,
        members: Sequence[Member],
        counts: Sequence[int],
        size: int,
        targets: frozenset[str] | None = None,
        partial: bool = False,
        chunks: int = 0,
    ) -> None:
        """size: bytes. targets: the workers that may answer, None if the other side chooses them.
        partial: parts may arrive before their row's answer. chunks: if not 0, in chunks, as many of
        each part before more are granted."""
        self.number = 0
        self.members = members
        self.counts = counts
        self.starts = _FIRST if len(counts) == 1 else list(accumulate(counts[:-1], initial=0))
        self.count = rows = self.starts[-1] + counts[-1]
        self.size = size
        self.pending = PendingRows(rows)
        self.chunks = chunks
        self.asked = Asked(rows, targets, partial, chunks > 0)
        # Parts that arrived before their row's answer, by (row, worker).
        self.arriving: dict[tuple[int, str], PartProgress] = {}

    def members_of(self, first: int, rows: int) -> Iterable[tuple[Member, int, int, int]]:
        """The owners of these rows: (member, its own first row, number of rows, first row here)."""
        if rows == self.count:  # the ordinary case
            return zip(self.members, repeat(0), self.counts, self.starts)
        found, stop = [], first + rows
        index = bisect_right(self.starts, first) - 1
        while first < stop:
            start = self.starts[index]
            part = min(start + self.counts[index], stop) - first
            found.append((self.members[index], first - start, part, first))
            first, index = first + part, index + 1
        return found


class Multiplexer:
    """The open segments of one stream. Thread-safe.

    is_live: segments may be opened; its owner sets it, `lose` clears it. rows, bytes: of the open
    segments. lock: held for every change; its owner may hold it to change more along with is_live.
    """

    def __init__(self) -> None:
        self.is_live = False
        self.rows = 0
        self.bytes = 0
        self.lock = threading.Lock()
        self._numbers = count(1)
        self._open: dict[int, Any] = {}
        self._cancels: deque[tuple[int, int, int]] = deque()  # segment, first row, rows
        self._grants: deque[tuple[int, int, str, int]] = deque()  # segment, row, worker, chunks

    @property
    def has_control(self) -> bool:
        """Whether a cancel or a grant is waiting to be written."""
        return bool(self._cancels or self._grants)

    def segments(self) -> list[Any]:
        """The open segments."""
        with self.lock:
            return list(self._open.values())

    def open(self, segment: OpenSegment[Any]) -> bool:
        """Gives the segment its number. Returns False if the stream is over."""
        with self.lock:
            if self.is_live:
                segment.number = number = next(self._numbers) & 0xFFFFFFFF
                self._open[number] = segment
                self.rows += segment.count
                self.bytes += segment.size
            return self.is_live

    def answers_in(self, frame: pb2.Frame) -> Iterator[tuple[Any, pb2.Slice]]:
        """The slices of the frame, each with its segment, except for segments that are over.

        They are unchecked; check them against the segment's `asked`.
        """
        for slice_ in frame.slices:
            segment = self._open.get(slice_.number)
            if segment is not None:
                yield segment, slice_

    def take(self, segment: OpenSegment[Any], start: int, rows: int) -> list[Run]:
        """The open ones of these rows, which are now answered: each row is returned once."""
        pending = segment.pending
        with self.lock:
            before = pending.left
            runs = pending.take(start, rows)
            self.rows -= before - pending.left
            if runs and not pending.left:
                del self._open[segment.number]
                self.bytes -= segment.size
        return runs

    def arrive(self, segment: OpenSegment[Any], start: int, answers: Slice) -> list[Run]:
        """Notes parts that arrived before their rows' answers. Returns the rows that are open.

        Raises BadResponse for more than was granted, as that would fill the reader's memory.
        """
        arriving = segment.arriving
        with self.lock:
            for column in answers.parts:
                for row in range(start, start + answers.count):
                    key = row, column.process_id
                    part = arriving.get(key)
                    if part is None:
                        if len(arriving) >= MAX_TARGETS * segment.count:
                            raise BadResponse(f"parts of more than {MAX_TARGETS:,} workers")
                        part = arriving[key] = PartProgress(segment.chunks)
                    chunk = column.chunk
                    if chunk is None or column.failed is not None:
                        part.whole()
                    else:
                        part.chunk(chunk.at, len(column.results.items[0]), chunk.more)
            return segment.pending.runs(start, answers.count)

    def grant(self, segment: OpenSegment[Any], row: int, worker: str, chunks: int) -> None:
        """Lets a part's worker send `chunks` more, unless the row is answered."""
        with self.lock:
            if not segment.pending.runs(row, 1):
                return
            if part := segment.arriving.get((row, worker)):
                part.left += chunks
            self._grants.append((segment.number, row, worker, chunks))

    def cancel(self, segment: OpenSegment[Any], start: int, rows: int) -> int:
        """Cancels these rows. Returns how many of them are open; they stay open until the other
        side answers them, or their owner does."""
        with self.lock:
            still_open = sum(rows for _, rows in segment.pending.runs(start, rows))
            if still_open:
                self._cancels.append((segment.number, start, rows))
        return still_open

    def write_control(self, frame: pb2.Frame, limit: int) -> int:
        """Adds at most `limit` cancels and as many grants. Returns about how many bytes."""
        if not self._cancels and not self._grants:
            return 0
        count = min(len(self._cancels), limit)
        for _ in range(count):
            number, start, rows = self._cancels.popleft()
            frame.cancels.add(number=number, start=start, count=rows)
        for _ in range(min(len(self._grants), limit)):
            number, row, worker, chunks = self._grants.popleft()
            frame.grants.add(number=number, row=row, process_id=worker, count=chunks)
            count += 1
        return CONTROL_BYTES * count

    def lose(self) -> list[Any]:
        """The stream is over. Returns the open segments, whose rows the owner must take."""
        with self.lock:
            self.is_live = False
            self._cancels.clear()
            self._grants.clear()
            return list(self._open.values())
