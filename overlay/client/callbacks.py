"""Runs the callbacks of Futures on a thread of their own, where they cannot block anything else.

They run one after the other, in the order of `put`. The thread, "overlay-callbacks", starts with
the first callback and ends after a second without one.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from overlay.model import clocks as time

log = logging.getLogger("overlay.client")

IDLE_S = 1.0
SLICE_S = 0.5  # of a wait, so that Ctrl-C works on Windows too


class Callbacks:
    """The queue of callbacks. Safe from any thread; a callback may do anything, and may block."""

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_calling = False

    def put(self, call: Callable[[Any], object], value: Any) -> None:
        """Calls `call(value)` soon. Raises RuntimeError if no thread can be started."""
        with self._changed:
            self._due.append((call, value))
            self._changed.notify_all()
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="overlay-callbacks", daemon=True)
            self._thread = thread
        try:
            thread.start()
        except RuntimeError:
            self._thread = None
            raise

    def wait(self, within_s: float = math.inf) -> None:
        """Waits until all have run. Returns at once on the callback thread, to avoid a deadlock."""
        until = time.monotonic() + within_s
        with self._changed:
            if self._thread is threading.current_thread():
                return
            while self._due or self._is_calling:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(min(left_s, SLICE_S))

    def _run(self) -> None:
        while (due := self._next()) is not None:
            call, value = due
            try:
                call(value)
            except BaseException:  # SystemExit must not end the thread either
                log.exception("the callback of a Future failed")
            del due, call, value  # not kept alive while this waits

    def _next(self) -> tuple[Callable[[Any], object], Any] | None:
        """The next callback; None after IDLE_S without one."""
        with self._changed:
            self._is_calling = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._due, IDLE_S)
            if not self._due:
                self._thread = None
                return None
            self._is_calling = True
            return self._due.popleft()
