"""Parts of a request to all workers, given as they arrive; for threads and for asyncio. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from overlay.client.submitter import Delivery
from overlay.model.segments import Code, Detail, Part, PartSlice
from overlay.transport.chunks import ITEM_END


class Parts:
    """Which parts of a delivery to give next. For one thread.

    A good part is given once, as soon as it arrives; a chunked part is given when it is complete,
    and further chunks are granted as chunks are taken here. Parts without a result are given at the
    end, the last one of each worker, because a rejected request may have been retried.

    first: the number of good parts after which nothing more is given. in_items: each item that a
    function yields is a part of its own.
    """

    def __init__(self, first: int | None, in_items: bool = False) -> None:
        self.is_over = False
        self._first = first
        self._in_items = in_items
        self._given = 0
        self._good: set[str] = set()
        self._bad: dict[str, Part] = {}
        self._unfinished: dict[str, _Chunks] = {}
        self._yielding: set[str] = set()  # workers that have had items given

    def early(self, delivered: Delivery, at: int) -> Iterator[Part]:
        """Parts that arrive before the answer."""
        for column in delivered.answers.parts:
            part = self._whole(column, at)
            if part is None:
                if self._in_items:
                    yield from self._items_so_far(column.at(at))
                delivered.grant(at, column.process_id)
            else:
                yield from self._take(part)

    def last(self, delivered: Any, at: int) -> Iterator[Part]:
        """Parts that arrive with the answer or with a failure, then those without a result."""
        if isinstance(delivered, Delivery):
            yield from self.early(delivered, at)
        for worker, chunks in self._unfinished.items():
            self._bad[worker] = _broken(worker, chunks.size)
        is_failure = isinstance(delivered, Detail) and not self._good  # raised instead of the parts
        if not (self.is_over or is_failure):
            yield from (part for worker, part in self._bad.items() if worker not in self._good)
        self.is_over = True

    def _whole(self, column: PartSlice, at: int) -> Part | None:
        """The worker's part, with its earlier chunks; None while more are to come."""
        part, chunk, worker = column.at(at), column.chunk, column.process_id
        chunks = self._unfinished.pop(worker, None) or _Chunks()
        if not part.ok or self.is_over or worker in self._good:
            return part
        is_restart = chunk is None or chunk.at == 0
        if is_restart and worker in self._yielding:
            return _broken(worker, chunks.size)
        if chunk is None:
            return part
        if is_restart:
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
        """The complete items so far of an unfinished array; part: its latest chunk."""
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
    """The beginning of a result. items: chunks not given yet. size: bytes received in total."""

    items: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, chunk: bytes) -> None:
        self.items.append(chunk)
        self.size += len(chunk)


def _is_yielded(array: bytes) -> bool:
    """Whether it is an array, or the start of one, that a typed function yielded."""
    return array.startswith(b"[") and ITEM_END in array


def _split(array: bytes) -> tuple[list[bytes], bytes]:
    """The complete items of an array, or of a later piece of it, and the rest."""
    *ended, rest = array.split(ITEM_END)
    return [item[1:] for item in ended if len(item) > 1], rest


def _broken(worker: str, size: int) -> Part:
    return Part(worker, Code.DATA_LOSS, f"its answer broke off after {size:,} bytes")
