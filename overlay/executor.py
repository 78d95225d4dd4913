"""Runs the user's handlers: on threads, or in processes that can be ended.

A handler runs only against a claimed slot, so that a worker never runs more than it has. A slot is
free again when the handler has really ended, not when its caller has gone. One request id runs at
most once; ids are remembered until their deadline.

Owns a thread pool or a process pool per handler, from construction to `close`.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import signal
import threading
import time
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pebble

from overlay import handlers
from overlay.errors import AlreadyExecuted, ConfigError, HandlerFailed
from overlay.handlers import Context
from overlay.meter import Spread, Times
from overlay.topology import HandlerSpec, Process, Topology
from overlay.values import Answer, Code, End, Executed, Item, Part, Segment, Sink

log = logging.getLogger("overlay.executor")

Done = Callable[["bytes | HandlerFailed"], None]
Stop = Callable[[], None]


@dataclass(frozen=True)
class Slot:
    """A claimed place to run one handler, and how long its request waited for it."""

    handler: str
    waited_us: int = 0


@dataclass(frozen=True)
class HandlerCounts:
    name: str
    run: str
    slots: int
    active: int
    completed: int
    failed: int
    worked: Spread


class Runner(Protocol):
    """Runs one handler. `done` is called once, when it has really ended; `stop` asks it to."""

    def start(self, payload: bytes, context: Context, done: Done) -> Stop: ...

    def close(self) -> None: ...


class Executor:
    """The handlers of one worker. Safe from any thread.

    on_free is called, on any thread, each time a slot has become free.
    """

    def __init__(self, topology: Topology, process: Process) -> None:
        """Imports every handler. Raises ConfigError when one cannot be had."""
        self.on_free: Callable[[], None] = lambda: None
        self._process = process
        self._lock = threading.Lock()
        self._seen = SeenIds(topology.limits.remembered_ids)
        self._desks: dict[str, _Desk] = {}
        try:
            for spec in topology.handlers.values():
                slots = topology.handler_slots(process, spec)
                self._desks[spec.name] = _Desk(spec, slots, _runner(spec, slots, topology.folder))
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> int:
        """Handlers running now, those whose caller has left included."""
        return sum(desk.active for desk in self._desks.values())

    @property
    def slots(self) -> dict[str, int]:
        return {name: desk.slots for name, desk in self._desks.items()}

    def counts(self) -> list[HandlerCounts]:
        return [desk.counts() for desk in self._desks.values()]

    def claim(self, handler: str, waited_s: float = 0.0) -> Slot | None:
        """A slot of the named handler ("" is the process's default), or None when all are busy."""
        name = handler or self._process.handler
        desk = self._desks[name]
        with self._lock:
            if desk.active >= desk.slots or self.active >= self._cap:
                return None
            desk.active += 1
        return Slot(name, int(waited_s * 1e6))

    def run(self, segment: Segment, slot: Slot, sink: Sink) -> End:
        """Runs the one item of the segment in the slot; the sink gets its answer, once."""
        (item,) = segment.items
        run = _Run(self, self._desks[slot.handler], segment, item, slot, sink)
        if self._seen.first_time(item.request_id, item.deadline, time.monotonic()):
            run.begin()
        else:
            run.refuse_second(item)
        return run.end

    def close(self) -> None:
        """Ends the pools; processes are terminated, threads are left to end by themselves."""
        for desk in self._desks.values():
            desk.runner.close()

    @property
    def _cap(self) -> int:
        return min(self._process.slots or self._process.in_service, self._process.in_service)

    def _free(self, desk: _Desk) -> None:
        with self._lock:
            desk.active -= 1
        self.on_free()


class SeenIds:
    """The request ids run here, each remembered until its deadline and at most `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._until: OrderedDict[int, float] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._until)

    def first_time(self, request_id: int, deadline: float, now: float) -> bool:
        with self._lock:
            if self._until.get(request_id, 0.0) > now:
                return False
            self._until[request_id] = deadline
            self._until.move_to_end(request_id)
            self._forget(now)
            return True

    def _forget(self, now: float) -> None:
        # Two a call keep up with one that comes; a long deadline in front holds back `most`.
        for _ in range(2):
            oldest, until = next(iter(self._until.items()))
            if until > now and len(self._until) <= self._most:
                return
            del self._until[oldest]
            if not self._until:
                return


@dataclass
class _Desk:
    """One handler's slots and counts; `active` is guarded by the executor's lock."""

    spec: HandlerSpec
    slots: int
    runner: Runner
    active: int = 0

    def __post_init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.worked = Times()
        self.lock = threading.Lock()

    def ended(self, worked_s: float, ok: bool) -> None:
        self.worked.add(worked_s)
        with self.lock:
            self.completed += ok
            self.failed += not ok

    def counts(self) -> HandlerCounts:
        spec = self.spec
        return HandlerCounts(
            spec.name,
            spec.run,
            self.slots,
            self.active,
            self.completed,
            self.failed,
            self.worked.spread,
        )


class _Run:
    """One request at work: answered once, its slot given back when the handler has ended."""

    def __init__(
        self,
        executor: Executor,
        desk: _Desk,
        segment: Segment,
        item: Item,
        slot: Slot,
        sink: Sink,
    ) -> None:
        self._executor = executor
        self._desk = desk
        self._slot = slot
        self._sink = sink
        self._item = item
        self._me = executor._process
        self._hops = (*segment.route.hops, self._me.id)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._answered = False
        self._stop: Stop | None = None

    def begin(self) -> None:
        me, spec, item = self._me, self._desk.spec, self._item
        options = {**spec.options, **me.options}
        context = Context(
            me.id, me.team, item.request_id, item.attempt, item.deadline, options, self._ended
        )
        self._began = time.monotonic()
        stop = self._desk.runner.start(item.payload, context, self._done)
        with self._lock:
            self._stop = stop
        if self._ended.is_set():
            stop()

    def refuse_second(self, item: Item) -> None:
        error = AlreadyExecuted(f"request {item.request_id:016x} was run here before")
        self._executor._free(self._desk)
        self._answer(Part(self._me.id, error.code, str(error), executed=error.executed))

    def end(self, code: Code) -> None:
        """Tells the handler that nobody waits any more, and answers for it."""
        self._ended.set()
        with self._lock:
            stop = self._stop
        if stop:
            stop()
        what = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller left"
        reason = f"{what} while the handler '{self._slot.handler}' ran"
        self._answer(self._part(code, reason, b"", Executed.YES))

    def _done(self, result: bytes | HandlerFailed) -> None:
        self._desk.ended(time.monotonic() - self._began, isinstance(result, bytes))
        if isinstance(result, bytes):
            part = self._part(Code.OK, "", result, Executed.YES)
        else:
            part = self._part(result.code, str(result), b"", Executed.YES)
        self._executor._free(self._desk)
        self._answer(part)

    def _part(self, code: Code, reason: str, result: bytes, executed: Executed) -> Part:
        worked_us = int((time.monotonic() - self._began) * 1e6)
        waited_us = self._slot.waited_us
        return Part(self._me.id, code, reason, result, self._hops, waited_us, worked_us, executed)

    def _answer(self, part: Part) -> None:
        with self._lock:
            if self._answered:
                return
            self._answered = True
        self._sink(0, (Answer((part,), (self._me.id,)),))


def _runner(spec: HandlerSpec, slots: int, folder: Path) -> Runner:
    handlers.add_folder(folder)
    if spec.run == "process":
        return ProcessRunner(spec, slots, folder)
    return ThreadRunner(spec, slots)


class ThreadRunner:
    """For handlers that wait: files, networks, other programs. A thread ends only by itself."""

    def __init__(self, spec: HandlerSpec, slots: int) -> None:
        self._name = spec.name
        self._call = handlers.find(spec, spec.call)
        self._pool = concurrent.futures.ThreadPoolExecutor(slots, f"handler-{spec.name}")

    def start(self, payload: bytes, context: Context, done: Done) -> Stop:
        self._pool.submit(self._work, payload, context, done)
        return _nothing

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, payload: bytes, context: Context, done: Done) -> None:
        try:
            kind, value = _outcome_of(self._call(payload, context))
        except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
            kind, value = "failed", "".join(traceback.format_exception(e))
        done(_read_outcome(self._name, kind, value))


class ProcessRunner:
    """For handlers that compute: each in a process of its own, ended with its request.

    The processes start by spawn, on every system the same, and import the handler themselves.
    """

    def __init__(self, spec: HandlerSpec, slots: int, folder: Path) -> None:
        self._spec = spec
        self._slots = slots
        self._folder = folder
        self._lock = threading.Lock()
        self._pool = self._new_pool()
        self._check_import()

    def start(self, payload: bytes, context: Context, done: Done) -> Stop:
        facts = (context.process_id, context.team, context.request_id, context.attempt)
        args = (self._spec, payload, facts, context.remaining_s(), dict(context.options))
        future = self._schedule(_work_in_child, args, self._spec.limit_s)
        future.add_done_callback(partial(self._ended, done))
        return future.cancel  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pool.stop()
        self._pool.join(5)

    def _new_pool(self) -> Any:
        return pebble.ProcessPool(
            max_workers=self._slots,
            max_tasks=self._spec.max_requests or 0,
            initializer=_begin_child,
            initargs=(str(self._folder),),
            context=multiprocessing.get_context("spawn"),
        )

    def _schedule(self, function: Any, args: tuple[Any, ...], limit_s: float | None) -> Any:
        with self._lock:
            # An idle child that somebody else killed breaks pebble's pool; nothing ran in it.
            if not self._pool.active:
                log.warning("handler %s: its process pool broke; a new one starts", self._spec.name)
                self._pool = self._new_pool()
            return self._pool.schedule(function, args=args, timeout=limit_s)

    def _check_import(self) -> None:
        problem = self._schedule(_import_in_child, (self._spec,), None).result()
        if problem:
            self.close()
            raise ConfigError(problem)

    def _ended(self, done: Done, future: Any) -> None:
        done(self._outcome(future))

    def _outcome(self, future: Any) -> bytes | HandlerFailed:
        name = self._spec.name
        try:
            kind, value = future.result()
        except (concurrent.futures.CancelledError, concurrent.futures.TimeoutError) as e:
            if isinstance(e, concurrent.futures.CancelledError):
                return HandlerFailed(f"the process of handler '{name}' was ended")
            return HandlerFailed(
                f"handler '{name}' ran longer than its limit_s {self._spec.limit_s}"
            )
        except pebble.ProcessExpired as e:
            return _failed(name, f"its process ended with exit code {e.exitcode}")
        except Exception as e:  # noqa: BLE001 - whatever the pool itself reports
            return _failed(name, repr(e))
        return _read_outcome(name, kind, value)


def _outcome_of(result: object) -> tuple[str, Any]:
    if isinstance(result, (bytes, bytearray, memoryview)):
        return "ok", bytes(result)
    return "type", type(result).__name__


def _read_outcome(name: str, kind: str, value: Any) -> bytes | HandlerFailed:
    if kind == "ok":
        return value  # type: ignore[no-any-return]
    if kind == "type":
        return HandlerFailed(f"handler '{name}' returned {value}, not bytes")
    return _failed(name, value)


def _failed(name: str, text: str) -> HandlerFailed:
    # The text may hold secrets: it goes to the log, and the caller gets a number to ask for.
    error_id = uuid.uuid4().hex[:8]
    log.error("error id %s: handler %s failed: %s", error_id, name, text)
    return HandlerFailed(f"handler '{name}' failed; error id {error_id} in this worker's log")


def _nothing() -> None:
    pass


# What follows runs in the child processes.


def _begin_child(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    handlers.add_folder(Path(folder))


def _import_in_child(spec: HandlerSpec) -> str:
    try:
        handlers.find(spec, spec.call)
    except ConfigError as e:
        return str(e)
    return ""


def _work_in_child(
    spec: HandlerSpec,
    payload: bytes,
    facts: tuple[str, str, int, int],
    remaining_s: float,
    options: dict[str, Any],
) -> tuple[str, Any]:
    try:
        context = Context(*facts, time.monotonic() + remaining_s, options)
        return _outcome_of(handlers.find(spec, spec.call)(payload, context))
    except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
        return "failed", "".join(traceback.format_exception(e))
