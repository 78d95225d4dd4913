"""Runs the user's handlers: on threads, or in processes that can be ended.

A handler runs only in a slot, so that a worker never runs more than it has. A slot is free again
when the handler has really ended, not when its caller has gone. One request id runs at most once
(overlay.workers.request_ids).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from overlay.model.segments import End, Segment, Sink
from overlay.model.signatures import Function
from overlay.model.topology import Process, Topology
from overlay.queueing import shares
from overlay.workers import api
from overlay.workers.job import HandlerCounts, HandlerJob, HandlerSlots
from overlay.workers.process_pool import ProcessRunner
from overlay.workers.request_ids import SeenIds
from overlay.workers.thread_pool import ThreadRunner
from overlay.workers.user_modules import Sources


class Runner(Protocol):
    """Runs the rows of batches, no more at once than it has slots."""

    @property
    def active(self) -> int: ...

    @property
    def pids(self) -> Sequence[int]: ...

    @property
    def function(self) -> Function: ...

    def submit(self, batch: HandlerJob) -> None: ...

    def end(self, batch: HandlerJob, start: int, count: int) -> None: ...

    def close(self) -> None: ...


class Executor:
    """The handlers of one worker. Safe from any thread.

    on_free is called, on any thread, when places have become free without an answer.
    """

    def __init__(self, topology: Topology, process: Process) -> None:
        """Imports every handler. Raises ConfigError when one cannot be had."""
        self.on_free: Callable[[], None] = lambda: None
        self._process = process
        self._cap = min(process.slots or process.in_service, process.in_service)
        self._is_shared = len(topology.handlers) > 1
        self._lock = threading.Lock()
        self._seen = SeenIds(topology.limits)
        self._desks: dict[str, tuple[HandlerSlots, Runner]] = {}
        sources = api.add_folder(topology.folder)
        try:
            for spec in topology.handlers.values():
                options = {**spec.options, **process.options}
                slots = min(topology.handler_slots(process, spec), self._most(0))
                desk = HandlerSlots(spec, slots, options)
                self._desks[spec.name] = desk, _runner(desk, topology, sources)
            sources.keep_imported()
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> int:
        """Handlers running now, those whose caller has left included."""
        return sum(runner.active for _, runner in self._desks.values())

    @property
    def pids(self) -> list[int]:
        """Of the processes that run handlers."""
        return [pid for _, runner in self._desks.values() for pid in runner.pids]

    @property
    def slots(self) -> dict[str, int]:
        return {name: desk.slots for name, (desk, _) in self._desks.items()}

    def functions(self) -> list[Function]:
        return [runner.function for _, runner in self._desks.values()]

    def counts(self) -> list[HandlerCounts]:
        return [desk.counts(runner.active) for desk, runner in self._desks.values()]

    def claim(self, handler: str, count: int) -> int:
        """Places for at most `count` rows of the handler ("" is the process's default).

        As many as there are free slots, and those that quick rows will free in 2 ms. Of a worker's
        slots a handler leaves some to the others.
        """
        desk, _ = self._desks[handler or self._process.handler]
        with self._lock:
            elsewhere = sum(
                min(other.taken, other.slots)
                for other, _ in self._desks.values()
                if other is not desk
            )
            # Beyond the slots only while no other handler is at work: each has threads of its own.
            ahead = 0 if elsewhere else desk.ahead
            free = desk.slots + ahead - desk.taken
            capped = self._most(elsewhere) + ahead - desk.taken
            count = max(0, min(count, free, capped))
            desk.taken += count
        return count

    def run(self, segment: Segment, waited_s: float, sink: Sink) -> End:
        """Runs the rows in claimed places; the sink gets each one's answer, once."""
        desk, runner = self._desks[segment.route.handler or self._process.handler]
        give_back = partial(self._give_back, desk)
        forget = partial(self._seen.forget, segment)
        batch = HandlerJob(
            desk, self._process, segment, waited_s, sink, give_back, runner.end, forget
        )
        begun = self._seen.begin(segment)
        if begun.again or begun.full:
            batch.refuse(begun)
        runner.submit(batch)
        return batch.end

    def close(self) -> None:
        """Ends the pools; processes are terminated, threads are left to end by themselves."""
        for _, runner in self._desks.values():
            runner.close()

    def _most(self, elsewhere: int) -> int:
        """Slots that one handler may take while others hold so many."""
        return shares.most_of_slots(self._cap, elsewhere) if self._is_shared else self._cap

    def _give_back(self, desk: HandlerSlots, count: int) -> None:
        with self._lock:
            desk.taken -= count
        self.on_free()


def _runner(desk: HandlerSlots, topology: Topology, sources: Sources) -> Runner:
    most_bytes = topology.limits.max_message_bytes
    if desk.spec.run == "process":
        return ProcessRunner(desk.spec, desk.slots, sources, most_bytes)
    return ThreadRunner(desk.spec, desk.slots, most_bytes)
