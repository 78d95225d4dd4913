"""A request to all whose parts are given as they come: the same for threads and for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from overlay.calls import Came
from overlay.values import Code, Failure, Part, PartColumn


class Parts:
    """Which parts to give next, of what has been delivered. For one thread.

    A good part is given once, at once; one that comes in pieces when it is whole, and more pieces
    are granted as these are taken here. The others come at the end, each worker's last word: what
    was refused may have been tried again. With `first` nothing more is given after so many good.
    """

    def __init__(self, first: int | None) -> None:
        self.is_over = False
        self._first = first
        self._good: set[str] = set()
        self._bad: dict[str, Part] = {}
        self._unfinished: dict[str, _Pieces] = {}

    def early(self, came: Came, at: int) -> Iterator[Part]:
        """What came before the answer."""
        for column in came.answers.parts:
            part = self._whole(column, at)
            if part is None:
                came.grant(at, column.process_id)
            else:
                yield from self._take(part)

    def last(self, came: Any, at: int) -> Iterator[Part]:
        """What came with the answer, or with the failure in its place, and what is left to say."""
        if isinstance(came, Came):
            yield from self.early(came, at)
        for who, pieces in self._unfinished.items():
            self._bad[who] = _broken(who, pieces.size)
        nothing_came = isinstance(came, Failure) and not self._good  # which says it all
        if not (self.is_over or nothing_came):
            yield from (part for who, part in self._bad.items() if who not in self._good)
        self.is_over = True

    def _whole(self, column: PartColumn, at: int) -> Part | None:
        """The worker's part, with what came of it before; None while more is to come."""
        part, piece, who = column.at(at), column.piece, column.process_id
        pieces = self._unfinished.pop(who, None) or _Pieces()
        if piece is None or not part.ok or self.is_over or who in self._good:
            return part
        if piece.at == 0:
            pieces = _Pieces()
        if piece.at != pieces.size:
            return _broken(who, pieces.size)
        pieces.add(part.result)
        if piece.more:
            self._unfinished[who] = pieces
            return None
        return replace(part, result=b"".join(pieces.items))

    def _take(self, part: Part) -> Iterable[Part]:
        if self.is_over or part.process_id in self._good:
            return
        if part.code is not Code.OK:
            self._bad[part.process_id] = part
            return
        self._good.add(part.process_id)
        self.is_over = len(self._good) == self._first
        yield part


@dataclass
class _Pieces:
    """The beginning of a result."""

    items: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, piece: bytes) -> None:
        self.items.append(piece)
        self.size += len(piece)


def _broken(who: str, size: int) -> Part:
    return Part(who, Code.DATA_LOSS, f"its answer broke off after {size:,} bytes")
