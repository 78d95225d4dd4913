"""A pool of threads for jobs without a result."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from overlay.transport.put_off import scope

log = logging.getLogger(__name__)


class BackgroundThreads:
    """Starts a thread when a job arrives and none is idle, up to `max_threads`. Thread-safe.

    concurrent.futures makes a Future and takes seven locks per job. That is measurable here, where
    each request takes two jobs in each process.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._lock = threading.Lock()
        self._started = 0
        self._closed = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each idle thread

    def run(self, job: Callable[[], None]) -> None:
        """Does nothing after `close`. An exception that the job raises is logged."""
        self._jobs.put(job)
        try:
            self._idle.get_nowait()
        except queue.Empty:
            if self._started < self._max_threads:
                self._start_one()

    def close(self) -> None:
        """Drops jobs that have not started; each thread ends after its current job."""
        self._closed = True
        self._jobs.put(None)

    def _start_one(self) -> None:
        with self._lock:
            if self._started == self._max_threads or self._closed:
                return
            self._started += 1
            name = f"{self._name}_{self._started}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            try:
                with scope():
                    job()
            except Exception:
                log.exception("a job failed")
            del job  # or it would be kept alive until the next one arrives
            if self._idle.qsize() < self._max_threads:  # may overcount while jobs wait
                self._idle.put(None)
        self._jobs.put(None)  # for the next thread
