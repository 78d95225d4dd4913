"""Which rows of a segment are still pending, so that each is answered once: by its first answer.

Also their answers, and how to cancel their work, where both come in pieces: the cost of a piece
does not grow with the number of earlier ones. Sans-IO and without locks: the owners hold one.
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
    runs: list[Run] = []
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            runs.append((rows[begin], i - begin))
            begin = i
    return runs


class PendingRows:
    """A set of rows that starts full."""

    __slots__ = ("_count", "_flags", "left")

    def __init__(self, count: int) -> None:
        self._count = count
        self._flags: bytearray | None = None  # None as long as all or no rows are pending
        self.left = count

    def __len__(self) -> int:
        return self._count

    def take(self, start: int, count: int) -> list[Run]:
        """Removes these rows; returns those that were pending, as runs."""
        left = self.left
        if not left:
            return []
        if start == 0 and count >= left == self._count:  # the ordinary case: all at once
            self.left = 0
            return [(0, left)]
        flags, stop = self._pending_flags(), min(start + count, self._count)
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
        """The pending ones of these rows, as runs."""
        if not self.left:
            return []
        flags, stop = self._pending_flags(), min(start + count, self._count)
        runs: list[Run] = []
        begin = flags.find(1, start, stop)
        while begin >= 0:
            end = flags.find(0, begin, stop)
            end = stop if end < 0 else end
            runs.append((begin, end - begin))
            begin = flags.find(1, end, stop)
        return runs

    def tail(self, count: int) -> int:
        """The row from which on `count` of the rows are pending; 0 if there are fewer."""
        for first, rows in reversed(self.runs(0, self._count)):
            if rows >= count:
                return first + rows - count
            count -= rows
        return 0

    def _pending_flags(self) -> bytearray:
        if self._flags is None:
            self._flags = bytearray(b"\1") * self._count
        return self._flags


class SliceIndex:
    """One branch's answers to the rows of a segment: each row once, in slices of any size."""

    __slots__ = ("_answers", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []  # ascending
        self._answers: list[Slice] = []

    def add(self, start: int, answers: Slice) -> None:
        index = bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._answers.insert(index, answers)

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The answered rows among start..stop, as (start, stop) pairs."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self._starts) and (begin := self._starts[index]) < stop:
            end = begin + self._answers[index].count
            if end > start:
                yield max(begin, start), min(end, stop)
            index += 1

    def at(self, row: int, count: int = 1) -> Slice | None:
        """The answers to these rows, which arrived in one slice; None if the first did not."""
        index = bisect_right(self._starts, row) - 1
        if index < 0 or row >= self._starts[index] + self._answers[index].count:
            return None
        return self._answers[index].slice(row - self._starts[index], count)


class CancelIndex:
    """How to cancel the work on a segment's rows, which is sent and cancelled in pieces.

    Rows that are sent after they were cancelled are cancelled at once. Of a row that is sent again,
    only the last attempt is cancelled. `sent` and `cancel` return the calls that their caller must
    make, without holding a lock.
    """

    __slots__ = ("_codes", "_count", "_pieces")

    def __init__(self, count: int) -> None:
        self._count = count
        # By row: the piece in which it was last sent, as (attempt, first row, cancel).
        self._pieces: list[tuple[int, int, Cancel] | None] = []
        self._codes: list[Code | None] = []  # by row: with which it was cancelled

    def sent(
        self, first: int, count: int, cancel: Cancel, attempt: int = 0
    ) -> list[Callable[[], None]]:
        """Attempts may be reported out of order; the highest one counts."""
        pieces = self._pieces = self._pieces or [None] * self._count
        if any(pieces[first : first + count]):
            for row in range(first, first + count):
                before = pieces[row]
                if before is None or before[0] <= attempt:
                    pieces[row] = attempt, first, cancel
        else:
            pieces[first : first + count] = [(attempt, first, cancel)] * count
        return self._calls(first, count) if self._codes else []

    def cancel(self, code: Code, start: int, count: int) -> list[Callable[[], None]]:
        """Cancels these rows, including those that have not been sent yet."""
        if not self._codes:
            self._codes = [None] * self._count
        stop = min(start + count, self._count)
        for row in range(start, stop):
            if self._codes[row] is None:
                self._codes[row] = code
        return self._calls(start, stop - start) if self._pieces else []

    def clear(self) -> None:
        """Breaks the reference cycle through the cancels, once no row is pending."""
        self._pieces = []

    def _calls(self, start: int, count: int) -> list[Callable[[], None]]:
        """One call for each run of sent and cancelled rows of one piece and code."""
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
            partial(cancel, code, row - first, rows)
            for ((_, first, cancel), code, row), rows in zip(runs, counts, strict=True)
        ]
