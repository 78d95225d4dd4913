"""The queue in front of the service: what a process has accepted and not yet started.

    put_nowait --> [ `maxsize` slots: single requests   ] --+
                     queue.Full when all are taken           +--> get_nowait, in fair order
    put_rows   --> [ a window for each stream: its rows ] --+     queue.Empty when none can start

Everything that waits is here, each request within one of two limits that GetMetrics shows:

- A single (unary) request takes a slot: `queue_size` of `queue_slots`, 200 on the leader. One that
  finds a place on arrival starts at once and takes no slot, so a queue that is full of requests for
  a busy team refuses none that an idle team could answer.
- A streamed request takes no slot and is never refused by a full queue. It counts in its stream's
  window, and a stream whose window is full is not read: `streamed_waiting` of `streamed_slots`.

Both share one order (overlay.queueing.fair_queue), so neither can starve the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic

from overlay.queueing.fair_queue import FairQueue, Place
from overlay.queueing.flow import W


class WaitingRoom(queue.Queue[Any], Generic[W]):
    """A bounded `queue.Queue` whose next item is the next that can start. Thread-safe.

    It never blocks: `put` and `get` are `put_nowait` and `get_nowait`. Its `mutex` is reentrant:
    the request queue holds it over decisions of several steps.
    """

    def __init__(self, slots: int, claim: Callable[[W], Place | None]) -> None:
        """claim: the places that an item gets now; None if it must wait. Called under `mutex`."""
        super().__init__(slots)
        self.mutex = threading.RLock()  # type: ignore[assignment]  # the base class has a plain one
        self.order: FairQueue[W] = FairQueue()
        self._claim = claim
        self._taken = 0  # slots

    def __iter__(self) -> Iterator[W]:
        """Everything that waits, in slots or in windows. Under `mutex`."""
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
        """Puts a single request into a slot. Raises queue.Full when all are taken."""
        with self.mutex:
            if self._taken >= self.maxsize:
                raise queue.Full
            self.order.put(item)
            self._taken += 1

    def put_rows(self, item: W, rows: int) -> None:
        """Puts rows of a stream; the stream's window bounds them."""
        with self.mutex:
            self.order.put(item, rows)

    def get_nowait(self, arriving: W | None = None) -> tuple[W, Place]:
        """The next to start, in fair order, with its places; that many of its rows leave the queue.

        arriving: a single request that may start without a slot. It competes as if it had one, and
        is not in the queue afterwards. An item whose place has no rows can never start; it stays in
        the queue, to be discarded. Raises queue.Empty when nothing can start now.
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
        """Removes rows that will never start: cancelled, refused or too late."""
        with self.mutex:
            self.order.remove(item, rows)
            self._taken -= not item.flow.is_stream

    def put(self, item: W, block: bool = False, timeout: float | None = None) -> None:
        self.put_nowait(item)

    def get(self, block: bool = False, timeout: float | None = None) -> tuple[W, Place]:
        return self.get_nowait()
