"""Many segments over one stream: which of them an answer, a cancel or a grant belongs to.

    open(segment) --> its number; its owner writes it into a frame
    write_control(frame) --> the cancels and grants that wait
    answers_in(frame) --> slices, each with the segment that it answers
    take(segment, rows) --> those of the rows that nobody has answered yet, which are answered now
    lose() --> the segments that were open when the stream ended

Both ends that ask use it: the client's library and the links to the processes below. What they do
not share is theirs: what waits to be sent, what may travel together, and what becomes of an answer.
Sans-IO: it has no stream, no thread and no clock.
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
from overlay.transport.chunks import Arriving
from overlay.transport.codec import Asked, pb2

SAME_DEADLINE_S = 0.01  # requests whose deadlines are no further apart may share a segment
CONTROL_BYTES = 20  # about, of a cancel or a grant in a frame
MAX_TARGETS = Limits.max_targets

_FIRST = (0,)  # the start of one that is alone

Member = TypeVar("Member")


class OpenSegment(Generic[Member]):
    """A segment on the stream, and which of its rows are not answered yet.

    members: what was given to be sent, of which it is made: one, or several that were joined.
    counts, starts: how many rows each of them has, and in which row here it begins.
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
        """size: bytes. targets: the workers that may answer; None
        where the other side chooses them. partial: parts may come before their row's answer.
        chunks: and in chunks, so many of each before more are granted."""
        self.number = 0
        self.members = members
        self.counts = counts
        self.starts = _FIRST if len(counts) == 1 else list(accumulate(counts[:-1], initial=0))
        self.count = rows = self.starts[-1] + counts[-1]
        self.size = size
        self.pending = PendingRows(rows)
        self.chunks = chunks
        self.asked = Asked(rows, targets, partial, chunks > 0)
        # Of parts that have come before their row's answer: (row, worker) -> how far it is.
        self.arriving: dict[tuple[int, str], Arriving] = {}

    def members_of(self, first: int, rows: int) -> Iterable[tuple[Member, int, int, int]]:
        """Whose these rows are: (member, its own first row, how many, the first one's row here)."""
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
    """The segments that are open on one stream. Safe from any thread.

    is_live: segments may be opened; its owner sets it, `lose` clears it. rows, bytes: of what is
    open. lock: held for every change; its owner may hold it for what must change with `is_live`.
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
        """Whether a cancel or a grant waits to be written."""
        return bool(self._cancels or self._grants)

    def segments(self) -> list[Any]:
        """Those that are open."""
        with self.lock:
            return list(self._open.values())

    def open(self, segment: OpenSegment[Any]) -> bool:
        """Gives the segment its number. False where the stream is over: it would get lost."""
        with self.lock:
            if self.is_live:
                segment.number = number = next(self._numbers) & 0xFFFFFFFF
                self._open[number] = segment
                self.rows += segment.count
                self.bytes += segment.size
            return self.is_live

    def answers_in(self, frame: pb2.Frame) -> Iterator[tuple[Any, pb2.Slice]]:
        """The slices of the frame, each with its segment; without those of segments that are over.

        They are as they came, to be checked against `asked` of that segment.
        """
        for made in frame.slices:
            segment = self._open.get(made.number)
            if segment is not None:
                yield segment, made

    def take(self, segment: OpenSegment[Any], start: int, rows: int) -> list[Run]:
        """The rows among these that are open, which are answered by this: each is given once."""
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
        """Parts have come before their rows' answers; those of the rows that are open.

        Raises BadResponse for more than was granted, which would fill the memory of its reader.
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
                        part = arriving[key] = Arriving(segment.chunks)
                    chunk = column.chunk
                    if chunk is None or column.failed is not None:
                        part.whole()
                    else:
                        part.chunk(chunk.at, len(column.results.items[0]), chunk.more)
            return segment.pending.runs(start, answers.count)

    def grant(self, segment: OpenSegment[Any], row: int, worker: str, chunks: int) -> None:
        """The reader of a part has room for so many chunks more, unless the row is answered."""
        with self.lock:
            if not segment.pending.runs(row, 1):
                return
            if part := segment.arriving.get((row, worker)):
                part.left += chunks
            self._grants.append((segment.number, row, worker, chunks))

    def cancel(self, segment: OpenSegment[Any], start: int, rows: int) -> int:
        """Nobody waits for these rows any more; how many of them are open. They stay open: the
        other side answers them, or their owner does."""
        with self.lock:
            still_open = sum(rows for _, rows in segment.pending.runs(start, rows))
            if still_open:
                self._cancels.append((segment.number, start, rows))
        return still_open

    def write_control(self, frame: pb2.Frame, most: int) -> int:
        """Adds what waits, at most so many cancels and as many grants; about how many bytes."""
        if not self._cancels and not self._grants:
            return 0
        count = min(len(self._cancels), most)
        for _ in range(count):
            number, start, rows = self._cancels.popleft()
            frame.cancels.add(number=number, start=start, count=rows)
        for _ in range(min(len(self._grants), most)):
            number, row, worker, chunks = self._grants.popleft()
            frame.grants.add(number=number, row=row, process_id=worker, count=chunks)
            count += 1
        return CONTROL_BYTES * count

    def lose(self) -> list[Any]:
        """The stream is over; the segments that are open, whose rows their owner is to take."""
        with self.lock:
            self.is_live = False
            self._cancels.clear()
            self._grants.clear()
            return list(self._open.values())
