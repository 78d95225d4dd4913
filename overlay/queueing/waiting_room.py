"""The queue in front of the service: what a process has taken and not yet handed down.

    put_nowait --> [ `maxsize` slots: single requests   ] --+
                     queue.Full when all are taken           +--> get_nowait, in fair order
    put_rows   --> [ a window for each stream: its rows ] --+     queue.Empty when none can start

All that waits stands here, each request against one bound that GetMetrics shows:

- A single (unary) request takes a slot: `queue_size` of `queue_slots`, 200 on the leader. One that
  finds a place as it arrives starts at once and takes none, so that a queue full of requests for
  one busy team refuses none that an idle team could answer.
- A streamed request takes no slot, and a full queue never refuses it. It counts in its stream's
  window, and a stream whose window is full is not read: `streamed_waiting` of `streamed_slots`.

One order for both (overlay.queueing.fair_queue), so neither way in can starve the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic

from overlay.queueing.fair_queue import FairQueue, Place
from overlay.queueing.flow import W


class WaitingRoom(queue.Queue[Any], Generic[W]):
    """A bounded `queue.Queue` whose next item is the next that can start. Safe from any thread.

    No call ever waits in it: `put` and `get` are `put_nowait` and `get_nowait`. Its `mutex` is
    reentrant, and the request queue holds it over decisions that take several steps.
    """

    def __init__(self, slots: int, claim: Callable[[W], Place | None]) -> None:
        """claim: the places that an item gets now; None when it must wait. Called under `mutex`."""
        super().__init__(slots)
        self.mutex = threading.RLock()  # type: ignore[assignment]  # the base class has a plain one
        self.order: FairQueue[W] = FairQueue()
        self._claim = claim
        self._taken = 0  # slots

    def __iter__(self) -> Iterator[W]:
        """All that waits, whichever way it came. Under `mutex`."""
        return iter(self.order)

    def qsize(self) -> int:
        """How many of the `maxsize` slots are taken."""
        return self._taken

    def full(self) -> bool:
        return self._taken >= self.maxsize

    def empty(self) -> bool:
        """Whether nothing waits, neither in slots nor in windows."""
        return not self.order

    def put_nowait(self, item: W) -> None:
        """Gives a single request a slot, to wait in. Raises queue.Full when all are taken."""
        with self.mutex:
            if self._taken >= self.maxsize:
                raise queue.Full
            self.order.put(item)
            self._taken += 1

    def put_rows(self, item: W, rows: int) -> None:
        """Adds rows of a stream, which keeps them within its window."""
        with self.mutex:
            self.order.put(item, rows)

    def get_nowait(self, arriving: W | None = None) -> tuple[W, Place]:
        """Takes the next to start, in fair order, with its places: so many of its rows leave.

        arriving: a single request that may start before it takes a slot; it competes as if it had
        one, and is not in the queue afterwards. An item whose place has no rows can never start: it
        stays in, to be discarded. Raises queue.Empty when nothing can start now.
        """
        with self.mutex:
            if arriving is not None:
                self.order.put(arriving)
            elif not self.order:
                raise queue.Empty
            found = self.order.next(self._claim)
            if arriving is not None and (found is None or found[0] is not arriving):
                self.order.remove(arriving)
            if found is None:
                raise queue.Empty
            item, place = found
            if place.count:
                self.order.start(item, place.count)
                self._taken -= item is not arriving and not item.flow.is_stream
            return item, place

    def discard(self, item: W, rows: int = 1) -> None:
        """Removes so many rows of it that will never start: cancelled, refused or too late."""
        with self.mutex:
            self.order.remove(item, rows)
            self._taken -= not item.flow.is_stream

    def put(self, item: W, block: bool = False, timeout: float | None = None) -> None:
        self.put_nowait(item)

    def get(self, block: bool = False, timeout: float | None = None) -> tuple[W, Place]:
        return self.get_nowait()
