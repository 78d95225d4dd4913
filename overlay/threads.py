"""Handlers that wait: for files, networks, other programs. A thread ends only by itself.

While rows are quick one thread takes them all, one after the other, and their results leave in one
slice; a second one joins when they are not, or when the first seems stuck.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from overlay import handlers
from overlay.batch import Batch, outcome_of, outcome_of_error, read_outcome
from overlay.handlers import Context
from overlay.topology import HandlerSpec
from overlay.values import Failure

log = logging.getLogger("overlay.executor")

QUICK_S = 0.0001  # a handler below this is not worth a second thread
STUCK_S = 0.001  # a quick handler that has not ended for so long gets company
FLUSH_S = 0.0005  # results do not wait longer than this for those after them


class ThreadRunner:
    """Owns up to `slots` threads, "handler-NAME-n", made when needed; they end after `close`."""

    def __init__(self, spec: HandlerSpec, slots: int) -> None:
        self._name = spec.name
        self._slots = slots
        self._call = handlers.find(spec, spec.call)
        self._batches: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._working = 0
        self._minded = False
        self._closed = False
        self._progress = 0.0

    @property
    def active(self) -> int:
        return self._working

    def submit(self, batch: Batch) -> None:
        with self._changed:
            self._batches.append(batch)
            self._call_up_locked()

    def end(self, batch: Batch, start: int, count: int) -> None:
        """Nothing can be done from here: the handler sees context.cancelled."""

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()

    def _call_up_locked(self) -> None:
        """Gets a thread to look at the batches: to work, or to mind that those who do go on."""
        idle = self._threads - self._working - self._minded
        if idle > 0:
            self._changed.notify()
        elif self._threads < self._slots and not self._minded:
            self._threads += 1
            name = f"handler-{self._name}-{self._threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._work_on(batch)
            except Exception:
                log.exception("handler %s: a batch was left", self._name)
            with self._changed:
                self._working -= 1

    def _next_batch(self) -> Batch | None:
        with self._changed:
            while not self._closed:
                while self._batches and not self._batches[0].has_waiting:
                    self._batches.popleft()
                if self._batches and self._wants_one_more_locked():
                    self._working += 1
                    if self._working < self._slots:
                        self._call_up_locked()
                    return self._batches[0]
                if self._batches and not self._minded:
                    self._minded = True
                    self._changed.wait(STUCK_S)
                    self._minded = False
                else:
                    self._changed.wait()
            return None

    def _wants_one_more_locked(self) -> bool:
        if self._working == 0:
            return True
        service_s = self._batches[0].desk.service_s
        quick = 0 < service_s < QUICK_S
        return not quick or time.monotonic() - self._progress > STUCK_S

    def _work_on(self, batch: Batch) -> None:
        outcomes: list[tuple[int, bytes | Failure]] = []
        call, now, deadline = self._call, time.monotonic, batch.segment.deadline
        began = flushed = self._progress = now()
        while (row := batch.begin_next()) is not None:
            payload = batch.segment.payloads.items[row]
            outcome = _called(self._name, call, payload, batch.context(row))
            ended = self._progress = now()
            outcomes.append((row, outcome if ended < deadline else batch.too_late()))
            if ended - flushed > FLUSH_S:
                batch.done(outcomes, ended - began)
                outcomes = []
                began = flushed = now()
        if outcomes:
            batch.done(outcomes, now() - began)


def _called(
    name: str, call: Callable[[bytes, Context], bytes], payload: bytes, context: Context
) -> bytes | Failure:
    try:
        result = call(payload, context)
    except BaseException as e:  # noqa: BLE001 - SystemExit too is one request's failure
        return read_outcome(name, *outcome_of_error(e))
    return result if type(result) is bytes else read_outcome(name, *outcome_of(result))
