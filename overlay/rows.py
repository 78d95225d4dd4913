"""Which rows of a segment are still open: so that each is answered once, by whoever is first."""

from __future__ import annotations

Run = tuple[int, int]
"""Consecutive rows: (first, how many)."""


class OpenRows:
    """All rows open at first. No lock of its own: its owner holds one."""

    __slots__ = ("_flags", "left")

    def __init__(self, count: int) -> None:
        self._flags = bytearray(b"\1") * count
        self.left = count

    def __len__(self) -> int:
        return len(self._flags)

    def take(self, start: int, count: int) -> list[Run]:
        """The open runs among these rows, which are closed by this."""
        flags, stop = self._flags, min(start + count, len(self._flags))
        if flags.count(1, start, stop) == stop - start:  # the ordinary case, in one go
            runs = [(start, stop - start)] if stop > start else []
        else:
            runs = self.runs(start, count)
        for first, rows in runs:
            flags[first : first + rows] = bytes(rows)
            self.left -= rows
        return runs

    def first_run(self) -> Run | None:
        begin = self._flags.find(1)
        if begin < 0:
            return None
        end = self._flags.find(0, begin)
        return begin, (len(self._flags) if end < 0 else end) - begin

    def runs(self, start: int, count: int) -> list[Run]:
        """The open runs among these rows."""
        flags, stop = self._flags, min(start + count, len(self._flags))
        found: list[Run] = []
        begin = flags.find(1, start, stop)
        while begin >= 0:
            end = flags.find(0, begin, stop)
            end = stop if end < 0 else end
            found.append((begin, end - begin))
            begin = flags.find(1, end, stop)
        return found
