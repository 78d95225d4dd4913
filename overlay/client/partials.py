"""A request to all whose parts are given as they come: the same for threads and for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from overlay.client.submitter import Delivery
from overlay.model.segments import Code, Detail, Part, PartSlice
from overlay.transport.chunks import ITEM_END


class Parts:
    """Which parts to give next, of what has been delivered. For one thread.

    A good part is given once, as soon as it has come; a part in chunks is given when it is whole,
    and more chunks are granted as these are taken here. Parts without a result are given at the
    end, the last one of each worker: what was refused may have been tried again. With `first`,
    nothing more is given after so many good parts.

    in_items: each item that a function yields is a part, given as soon as it has come.
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
        """What came with the answer or with a failure, and then the parts without a result."""
        if isinstance(came, Delivery):
            yield from self.early(came, at)
        for worker, chunks in self._unfinished.items():
            self._bad[worker] = _broken(worker, chunks.size)
        nothing_came = isinstance(came, Detail) and not self._good  # which says it all
        if not (self.is_over or nothing_came):
            yield from (part for worker, part in self._bad.items() if worker not in self._good)
        self.is_over = True

    def _whole(self, column: PartSlice, at: int) -> Part | None:
        """The worker's part, with the chunks that came before; None while more are to come."""
        part, chunk, worker = column.at(at), column.chunk, column.process_id
        chunks = self._unfinished.pop(worker, None) or _Chunks()
        if not part.ok or self.is_over or worker in self._good:
            return part
        is_anew = chunk is None or chunk.at == 0
        if is_anew and worker in self._yielding:
            return _broken(worker, chunks.size)
        if chunk is None:
            return part
        if is_anew:
            chunks = _Chunks()
        if chunk.at != chunks.size:
            return _broken(worker, chunks.size)
        chunks.add(part.result)
        if chunk.more:
            self._unfinished[worker] = chunks
            return None
        return replace(part, result=b"".join(chunks.items))

    def _take(self, part: Part) -> Iterable[Part]:
        worker = part.process_id
        if self.is_over or worker in self._good:
            return
        if part.code is not Code.OK:
            self._bad[worker] = part
            return
        self._good.add(worker)
        if worker in self._yielding or (self._in_items and _is_yielded(part.result)):
            items, _ = _split(part.result)
            yield from self._give(part, items)
        else:
            yield from self._give(part, [part.result])

    def _items_so_far(self, part: Part) -> Iterator[Part]:
        """The items that have come of an array that is under way; part: its last chunk."""
        worker = part.process_id
        chunks = self._unfinished[worker]
        if ITEM_END not in part.result:
            return
        text = b"".join(chunks.items)
        if worker in self._yielding or _is_yielded(text):
            self._yielding.add(worker)
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


def _broken(worker: str, size: int) -> Part:
    return Part(worker, Code.DATA_LOSS, f"its answer broke off after {size:,} bytes")
