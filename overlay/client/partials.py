"""A request to all whose parts are given as they come: the same for threads and for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from overlay.client.submitter import Delivery
from overlay.model.segments import Code, Failure, Part, PartColumn
from overlay.transport.chunks import ITEM_END


class Parts:
    """Which parts to give next, of what has been delivered. For one thread.

    A good part is given once, at once; one that comes in chunks when it is whole, and more chunks
    are granted as these are taken here. The others come at the end, each worker's last word: what
    was refused may have been tried again. With `first` nothing more is given after so many good.

    in_items: of an array that a function yields each item is a part, given as soon as it is there.
    """

    def __init__(self, first: int | None, in_items: bool = False) -> None:
        self.is_over = False
        self._first = first
        self._in_items = in_items
        self._given = 0
        self._good: set[str] = set()
        self._bad: dict[str, Part] = {}
        self._unfinished: dict[str, _Chunks] = {}
        self._yielding: set[str] = set()  # workers of whom items were given

    def early(self, came: Delivery, at: int) -> Iterator[Part]:
        """What came before the answer."""
        for column in came.answers.parts:
            part = self._whole(column, at)
            if part is None:
                if self._in_items:
                    yield from self._items_so_far(column.at(at))
                came.grant(at, column.process_id)
            else:
                yield from self._take(part)

    def last(self, came: Any, at: int) -> Iterator[Part]:
        """What came with the answer, or with the failure in its place, and what is left to say."""
        if isinstance(came, Delivery):
            yield from self.early(came, at)
        for who, chunks in self._unfinished.items():
            self._bad[who] = _broken(who, chunks.size)
        nothing_came = isinstance(came, Failure) and not self._good  # which says it all
        if not (self.is_over or nothing_came):
            yield from (part for who, part in self._bad.items() if who not in self._good)
        self.is_over = True

    def _whole(self, column: PartColumn, at: int) -> Part | None:
        """The worker's part, with what came of it before; None while more is to come."""
        part, chunk, who = column.at(at), column.chunk, column.process_id
        chunks = self._unfinished.pop(who, None) or _Chunks()
        if not part.ok or self.is_over or who in self._good:
            return part
        is_anew = chunk is None or chunk.at == 0
        if is_anew and who in self._yielding:
            return _broken(who, chunks.size)
        if chunk is None:
            return part
        if is_anew:
            chunks = _Chunks()
        if chunk.at != chunks.size:
            return _broken(who, chunks.size)
        chunks.add(part.result)
        if chunk.more:
            self._unfinished[who] = chunks
            return None
        return replace(part, result=b"".join(chunks.items))

    def _take(self, part: Part) -> Iterable[Part]:
        who = part.process_id
        if self.is_over or who in self._good:
            return
        if part.code is not Code.OK:
            self._bad[who] = part
            return
        self._good.add(who)
        if who in self._yielding or (self._in_items and _is_yielded(part.result)):
            items, _ = _split(part.result)
            yield from self._give(part, items)
        else:
            yield from self._give(part, [part.result])

    def _items_so_far(self, part: Part) -> Iterator[Part]:
        """Of a worker whose array is under way, the items that have come; part: the last chunk."""
        who = part.process_id
        chunks = self._unfinished[who]
        if ITEM_END not in part.result:
            return
        text = b"".join(chunks.items)
        if who in self._yielding or _is_yielded(text):
            self._yielding.add(who)
            items, rest = _split(text)
            chunks.items = [rest]
            yield from self._give(part, items)

    def _give(self, part: Part, results: Iterable[bytes]) -> Iterator[Part]:
        for result in results:
            if self.is_over:
                return
            self._given += 1
            self.is_over = self._given == self._first
            yield replace(part, result=result)


@dataclass
class _Chunks:
    """The beginning of a result; items: what is not given of it yet. size: of all of it."""

    items: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, chunk: bytes) -> None:
        self.items.append(chunk)
        self.size += len(chunk)


def _is_yielded(array: bytes) -> bool:
    """Whether it is what a typed function yielded, or begins so."""
    return array.startswith(b"[") and ITEM_END in array


def _split(array: bytes) -> tuple[list[bytes], bytes]:
    """The items of an array, or of what follows some of them, and what is left of it."""
    *ended, rest = array.split(ITEM_END)
    return [item[1:] for item in ended if len(item) > 1], rest


def _broken(who: str, size: int) -> Part:
    return Part(who, Code.DATA_LOSS, f"its answer broke off after {size:,} bytes")
