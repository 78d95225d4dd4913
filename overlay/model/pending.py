"""Which rows of a segment are still pending, so that each is answered once: by the first answer.

And their answers, and how their work is ended, where both come piece by piece: what one piece costs
does not grow with how many there were before. Sans-IO; none has a lock, their owners hold one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from overlay.model.segments import Cancel, Code, Slice

Run = tuple[int, int]
"""Consecutive rows: (first, how many)."""


def consecutive(rows: Sequence[int]) -> list[Run]:
    """Ascending rows as runs."""
    found: list[Run] = []
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            found.append((rows[begin], i - begin))
            begin = i
    return found


class PendingRows:
    """All rows open at first. No lock of its own: its owner holds one."""

    __slots__ = ("_count", "_flags", "left")

    def __init__(self, count: int) -> None:
        self._count = count
        self._flags: bytearray | None = None  # none while all rows are open, or all closed
        self.left = count

    def __len__(self) -> int:
        return self._count

    def take(self, start: int, count: int) -> list[Run]:
        """The open runs among these rows, which are closed by this."""
        left = self.left
        if not left:
            return []
        if start == 0 and count >= left == self._count:  # the ordinary case, in one go
            self.left = 0
            return [(0, left)]
        flags, stop = self._open_flags(), min(start + count, self._count)
        if flags.count(1, start, stop) == stop - start:
            runs = [(start, stop - start)] if stop > start else []
        else:
            runs = self.runs(start, count)
        for first, rows in runs:
            flags[first : first + rows] = bytes(rows)
            self.left -= rows
        return runs

    def first_run(self) -> Run | None:
        if not self.left:
            return None
        if self._flags is None:
            return 0, self._count
        begin = self._flags.find(1)
        end = self._flags.find(0, begin)
        return begin, (self._count if end < 0 else end) - begin

    def runs(self, start: int, count: int) -> list[Run]:
        """The open runs among these rows."""
        if not self.left:
            return []
        flags, stop = self._open_flags(), min(start + count, self._count)
        found: list[Run] = []
        begin = flags.find(1, start, stop)
        while begin >= 0:
            end = flags.find(0, begin, stop)
            end = stop if end < 0 else end
            found.append((begin, end - begin))
            begin = flags.find(1, end, stop)
        return found

    def _open_flags(self) -> bytearray:
        if self._flags is None:
            self._flags = bytearray(b"\1") * self._count
        return self._flags


class Slices:
    """The answers to a segment's rows by one branch, which answers each once, in any pieces."""

    __slots__ = ("_answers", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []  # ascending
        self._answers: list[Slice] = []

    def add(self, start: int, answers: Slice) -> None:
        index = bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._answers.insert(index, answers)

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs that are there of the rows from `start` to before `stop`, as such pairs."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self._starts) and (begin := self._starts[index]) < stop:
            end = begin + self._answers[index].count
            if end > start:
                yield max(begin, start), min(end, stop)
            index += 1

    def at(self, row: int, count: int = 1) -> Slice | None:
        """The answers to these rows, which came in one piece; None when the first did not come."""
        index = bisect_right(self._starts, row) - 1
        if index < 0 or row >= self._starts[index] + self._answers[index].count:
            return None
        return self._answers[index].slice(row - self._starts[index], count)


Ending = Callable[[], None]
"""Ends some rows' work."""


class Ends:
    """How the work behind a segment's rows is ended, which begins and is ended piece by piece.

    What begins when its rows were ended already is ended at once. A row that begins anew elsewhere
    has ended where it was. It calls nothing: its owner does, holding no lock.
    """

    __slots__ = ("_codes", "_count", "_pieces")

    def __init__(self, count: int) -> None:
        self._count = count
        # By row: the piece in which it began, as (try, first row, end); or none.
        self._pieces: list[tuple[int, int, Cancel] | None] = []
        self._codes: list[Code | None] = []  # by row: with which it was ended; or none

    def begin(self, first: int, count: int, end: Cancel, turn: int = 0) -> list[Ending]:
        """These rows have begun. What is to be called, as they were ended before.

        turn: the number of the try; tries may be noted in another order, and the last one counts.
        """
        pieces = self._pieces = self._pieces or [None] * self._count
        if any(pieces[first : first + count]):
            for row in range(first, first + count):
                before = pieces[row]
                if before is None or before[0] <= turn:
                    pieces[row] = turn, first, end
        else:
            pieces[first : first + count] = [(turn, first, end)] * count
        return self._endings(first, count) if self._codes else []

    def end(self, code: Code, start: int, count: int) -> list[Ending]:
        """These rows are ended, those that have not begun too. What is to be called."""
        if not self._codes:
            self._codes = [None] * self._count
        stop = min(start + count, self._count)
        for row in range(start, stop):
            if self._codes[row] is None:
                self._codes[row] = code
        return self._endings(start, stop - start) if self._pieces else []

    def forget(self) -> None:
        """All is over: the ends lead back to the owner of this, and would keep it."""
        self._pieces = []

    def _endings(self, start: int, count: int) -> list[Ending]:
        """Of rows that have begun and are ended: once for those of one piece and code."""
        runs: list[tuple[tuple[int, int, Cancel], Code, int]] = []
        counts: list[int] = []
        for row in range(start, start + count):
            piece, code = self._pieces[row], self._codes[row]
            if piece is None or code is None:
                continue
            if runs and (piece, code, row - counts[-1]) == runs[-1]:
                counts[-1] += 1
            else:
                runs.append((piece, code, row))
                counts.append(1)
        return [
            partial(end, code, row - first, rows)
            for ((_, first, end), code, row), rows in zip(runs, counts, strict=True)
        ]
