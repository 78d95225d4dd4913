"""Which rows of a segment are still open: so that each is answered once, by whoever is first."""

from __future__ import annotations

from collections.abc import Sequence

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


class OpenRows:
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
