"""Threads that run jobs without results."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class BackgroundThreads:
    """Starts a thread when a job comes and none is idle, at most `most`; safe from any thread.

    concurrent.futures makes a Future of each job and takes seven locks for it, which shows where
    each request has two jobs at each process.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._started = 0
        self._closed = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each idle thread

    def run(self, job: Callable[[], None]) -> None:
        """Nothing happens after `close`. What the job raises goes to the log."""
        self._jobs.put(job)
        try:
            self._idle.get_nowait()
        except queue.Empty:
            if self._started < self._most:
                self._start_one()

    def close(self) -> None:
        """Drops the jobs that have not begun; the threads end after those that have."""
        self._closed = True
        self._jobs.put(None)

    def _start_one(self) -> None:
        with self._lock:
            if self._started == self._most or self._closed:
                return
            self._started += 1
            name = f"{self._name}_{self._started}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            try:
                job()
            except Exception:
                log.exception("a job failed")
            del job  # it would be kept until the next one comes
            if self._idle.qsize() < self._most:  # more than are idle, when jobs wait
                self._idle.put(None)
        self._jobs.put(None)  # for the next thread
