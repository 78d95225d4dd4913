"""A request to all whose parts are given as they come: the same for threads and for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from overlay.calls import Came
from overlay.values import Code, Failure, Part


class Parts:
    """Which parts to give next, of what has been delivered. For one thread.

    A good part is given once, at once. The others come at the end, each worker's last word: what
    was refused may have been tried again. With `first` nothing more is given after so many good.
    """

    def __init__(self, first: int | None) -> None:
        if first is not None and first < 1:
            raise ValueError(f"first {first} is not above 0")
        self.is_over = False
        self._first = first
        self._good: set[str] = set()
        self._bad: dict[str, Part] = {}

    def early(self, came: Came, at: int) -> Iterator[Part]:
        """What came before the answer."""
        for part in came.answers.at(at).parts:
            yield from self._take(part)

    def last(self, came: Any, at: int) -> Iterator[Part]:
        """What came with the answer, or with the failure in its place, and what is left to say."""
        if isinstance(came, Came):
            yield from self.early(came, at)
        nothing_came = isinstance(came, Failure) and not self._good  # which says it all
        if not (self.is_over or nothing_came):
            yield from (part for who, part in self._bad.items() if who not in self._good)
        self.is_over = True

    def _take(self, part: Part) -> Iterable[Part]:
        if self.is_over or part.process_id in self._good:
            return
        if part.code is not Code.OK:
            self._bad[part.process_id] = part
            return
        self._good.add(part.process_id)
        self.is_over = len(self._good) == self._first
        yield part
