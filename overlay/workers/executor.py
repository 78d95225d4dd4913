"""Runs the user's handlers: on threads, or in processes that can be killed.

A handler runs only in a slot, so a worker never runs more handlers than it has slots. A slot is
free again when the handler has ended, not when its caller has left. A request id runs at most once
(overlay.workers.request_ids).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from overlay.model.segments import Cancel, OnResult, Segment
from overlay.model.signatures import Function
from overlay.model.topology import Process, Topology
from overlay.queueing import shares
from overlay.transport import put_off
from overlay.workers import api
from overlay.workers.job import HandlerCounts, HandlerJob, HandlerSlots
from overlay.workers.process_pool import ProcessRunner
from overlay.workers.request_ids import SeenIds
from overlay.workers.thread_pool import ThreadRunner
from overlay.workers.user_modules import Sources

MAX_HERE = 8  # handlers at once on the threads that read streams, of which there are 64


class Runner(Protocol):
    """Runs the rows of jobs, no more at once than it has slots."""

    @property
    def active(self) -> int: ...

    @property
    def pids(self) -> Sequence[int]: ...

    @property
    def function(self) -> Function: ...

    def submit(self, job: HandlerJob) -> None: ...

    def may_run_here(self, job: HandlerJob) -> bool: ...

    def run_here(self, job: HandlerJob) -> None: ...

    def end(self, job: HandlerJob, start: int, count: int) -> None: ...

    def close(self) -> None: ...


class Executor:
    """The handlers of one worker. Safe from any thread.

    on_free: called on any thread when slots have become free.
    """

    def __init__(self, topology: Topology, process: Process) -> None:
        """Imports every handler. Raises ConfigError if one cannot be imported."""
        self.on_free: Callable[[], None] = lambda: None
        self._process = process
        self._cap = min(process.slots or process.in_service, process.in_service)
        self._is_shared = len(topology.handlers) > 1
        self._lock = threading.Lock()
        self._seen = SeenIds(topology.limits)
        self._running_here = 0  # rows on threads of others
        self._here = threading.local()  # the jobs held back for this thread, while it starts some
        self._handlers: dict[str, tuple[HandlerSlots, Runner]] = {}
        sources = api.add_folder(topology.folder)
        try:
            for spec in topology.handlers.values():
                options = {**spec.options, **process.options}
                count = min(topology.handler_slots(process, spec), self._max_slots(0))
                slots = HandlerSlots(spec, count, options)
                self._handlers[spec.name] = slots, _runner(slots, topology, sources)
            sources.keep_imported()
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> int:
        """The number of running handlers, including those whose caller has left."""
        return sum(runner.active for _, runner in self._handlers.values())

    @property
    def pids(self) -> list[int]:
        return [pid for _, runner in self._handlers.values() for pid in runner.pids]

    @property
    def slots(self) -> dict[str, int]:
        return {name: slots.total for name, (slots, _) in self._handlers.items()}

    def functions(self) -> list[Function]:
        return [runner.function for _, runner in self._handlers.values()]

    def counts(self) -> list[HandlerCounts]:
        return [slots.counts(runner.active) for slots, runner in self._handlers.values()]

    def claim(self, handler: str, count: int) -> int:
        """Claims slots for at most `count` rows of the handler ("" is the process's default).

        Returns how many: the free slots, and those that quick rows will free within 2 ms. Each
        handler leaves some of the worker's slots to the others.
        """
        slots, _ = self._handlers[handler or self._process.handler]
        with self._lock:
            elsewhere = sum(
                min(other.taken, other.total)
                for other, _ in self._handlers.values()
                if other is not slots
            )
            # More than its slots only while no other handler runs: each has threads of its own.
            ahead = 0 if elsewhere else slots.ahead
            free = slots.total + ahead - slots.taken
            capped = self._max_slots(elsewhere) + ahead - slots.taken
            count = max(0, min(count, free, capped))
            slots.taken += count
        return count

    def run(self, segment: Segment, waited_s: float, on_result: OnResult) -> Cancel:
        """Runs the rows in claimed slots; on_result gets the answer of each row once."""
        slots, runner = self._handlers[segment.route.handler or self._process.handler]
        give_back = partial(self._give_back, slots)
        forget = partial(self._seen.forget, segment)
        job = HandlerJob(
            slots, self._process, segment, waited_s, on_result, give_back, runner.end, forget
        )
        begun = self._seen.begin(segment)
        if begun.again or begun.full:
            job.refuse(begun)
        held: list[tuple[Runner, HandlerJob]] | None = getattr(self._here, "held", None)
        if held is not None and runner.may_run_here(job):
            held.append((runner, job))
        else:
            runner.submit(job)
        return job.end

    def start_here(self, start: Callable[[], None]) -> None:
        """Calls `start`. If that starts a quick row, this thread runs it: waking another thread
        would take longer. The handler may block after all, so this thread must owe nothing else."""
        held: list[tuple[Runner, HandlerJob]] = []
        self._here.held = held
        try:
            start()
        finally:
            self._here.held = None
            for runner, job in held[:-1]:
                runner.submit(job)
            if held:
                put_off.run_now()
                self._run_here(*held[-1])

    def _run_here(self, runner: Runner, job: HandlerJob) -> None:
        with self._lock:
            may = self._running_here < MAX_HERE
            self._running_here += may
        if not may:
            runner.submit(job)
            return
        try:
            runner.run_here(job)
        finally:
            with self._lock:
                self._running_here -= 1

    def close(self) -> None:
        """Closes the pools: kills processes; threads end by themselves."""
        for _, runner in self._handlers.values():
            runner.close()

    def _max_slots(self, elsewhere: int) -> int:
        """How many slots one handler may take while others hold `elsewhere`."""
        return shares.max_handler_slots(self._cap, elsewhere) if self._is_shared else self._cap

    def _give_back(self, slots: HandlerSlots, count: int) -> None:
        with self._lock:
            slots.taken -= count
        self.on_free()


def _runner(slots: HandlerSlots, topology: Topology, sources: Sources) -> Runner:
    max_bytes = topology.limits.max_message_bytes
    if slots.spec.run == "process":
        return ProcessRunner(slots.spec, slots.total, sources, max_bytes)
    return ThreadRunner(slots.spec, slots.total, max_bytes)
