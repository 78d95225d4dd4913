"""Handlers that compute, each call in a process that can be ended.

The processes start by spawn, on every system the same, and import the handler themselves.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pebble

from overlay import handlers
from overlay.batch import Batch, outcome_of, outcome_of_error, read_failure, read_outcome
from overlay.errors import ConfigError, HandlerFailed
from overlay.handlers import Context
from overlay.topology import HandlerSpec
from overlay.values import Executed, Failure

log = logging.getLogger("overlay.executor")

IMPORT_S = 60.0  # for the modules that a handler imports


class ProcessRunner:
    """Owns a pool of `slots` processes, from construction to `close`."""

    def __init__(self, spec: HandlerSpec, slots: int, folder: Path) -> None:
        """Raises ConfigError when the handler cannot be imported in a child."""
        self._spec = spec
        self._slots = slots
        self._folder = folder
        self._lock = threading.Lock()
        self._running: dict[tuple[Batch, int], Any] = {}
        self._pool = self._new_pool()
        self._check_import()

    @property
    def active(self) -> int:
        return len(self._running)

    def submit(self, batch: Batch) -> None:
        while (row := batch.begin_next()) is not None:
            self._start(batch, row)

    def end(self, batch: Batch, start: int, count: int) -> None:
        """Terminates the processes that work on these rows."""
        with self._lock:
            rows = range(start, start + count)
            futures = [f for (b, row), f in self._running.items() if b is batch and row in rows]
        for future in futures:
            future.cancel()

    def close(self) -> None:
        self._pool.stop()
        self._pool.join(5)

    def _start(self, batch: Batch, row: int) -> None:
        context = batch.context(row)
        facts = (context.process_id, context.team, context.request_id, context.attempt)
        payload = batch.segment.payloads.items[row]
        args = (self._spec, payload, facts, context.remaining_s(), dict(context.options))
        with self._lock:
            future = self._schedule_locked(_work_in_child, args, self._spec.limit_s)
            self._running[batch, row] = future
        future.add_done_callback(partial(self._ended, batch, row, time.monotonic()))
        if context.cancelled:
            future.cancel()

    def _ended(self, batch: Batch, row: int, began: float, future: Any) -> None:
        outcome, now = self._outcome(future), time.monotonic()
        with self._lock:
            del self._running[batch, row]
        if now >= batch.segment.deadline:
            outcome = batch.too_late()
        batch.done([(row, outcome)], now - began)

    def _outcome(self, future: Any) -> bytes | Failure:
        name = self._spec.name
        try:
            return read_outcome(name, *future.result())
        except concurrent.futures.CancelledError:
            return _failure(f"the process of handler '{name}' was ended")
        except concurrent.futures.TimeoutError:
            return _failure(f"handler '{name}' ran longer than its limit_s {self._spec.limit_s:g}")
        except pebble.ProcessExpired as e:
            text = f"its process ended with exit code {e.exitcode}"
            return read_outcome(name, "failed", text)
        except BrokenProcessPool as e:  # its processes ended before they told what they began
            return replace(read_failure(name, repr(e)), executed=Executed.UNKNOWN)
        except Exception as e:  # noqa: BLE001 - whatever the pool itself reports
            return read_outcome(name, "failed", repr(e))

    def _new_pool(self) -> Any:
        return pebble.ProcessPool(
            max_workers=self._slots,
            max_tasks=self._spec.max_requests or 0,
            initializer=_begin_child,
            initargs=(str(self._folder),),
            context=multiprocessing.get_context("spawn"),
        )

    def _schedule_locked(self, function: Any, args: tuple[Any, ...], limit_s: float | None) -> Any:
        # An idle child that somebody else killed breaks pebble's pool; nothing ran in it.
        if not self._pool.active:
            log.warning("handler %s: its process pool broke; a new one starts", self._spec.name)
            self._pool = self._new_pool()
        return self._pool.schedule(function, args=args, timeout=limit_s)

    def _check_import(self) -> None:
        spec = self._spec
        try:
            problem = self._schedule_locked(_import_in_child, (spec,), IMPORT_S).result()
        except Exception as e:  # noqa: BLE001 - the module may end the process, or never end itself
            problem = f"handler '{spec.name}': the process that imports '{spec.call}' ended: {e!r}"
        if problem:
            self.close()
            raise ConfigError(problem)


def _failure(reason: str) -> Failure:
    return Failure(HandlerFailed.code, reason, Executed.YES)


# What follows runs in the child processes.


def _begin_child(folder: str) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    handlers.add_folder(Path(folder))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
        return outcome_of(handlers.find(spec, spec.call)(payload, context))
    except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
        return outcome_of_error(e)
