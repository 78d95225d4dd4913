"""Jobs that a thread puts off until the end of what it is doing, instead of waking another thread.

with scope():          a thread that handles one message
    ...
    put_off(job)       runs when the scope ends, or at `run_now`
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

Job = Callable[[], None]
_here = threading.local()


@contextmanager
def scope() -> Iterator[None]:
    """What is put off within it runs at its end, on this thread. Scopes may be nested: the
    outermost counts."""
    if getattr(_here, "jobs", None) is not None:
        yield
        return
    _here.jobs = deque()
    try:
        yield
    finally:
        try:
            run_now()
        finally:
            _here.jobs = None


def put_off(job: Job, otherwise: Callable[[Job], None]) -> None:
    """Puts the job off, or gives it to `otherwise` if this thread is in no scope.

    The scope must be about to end: whoever may take longer calls `run_now` before.
    """
    jobs: deque[Job] | None = getattr(_here, "jobs", None)
    if jobs is None:
        otherwise(job)
    else:
        jobs.append(job)


def run_now() -> None:
    """Runs what this thread has put off. An exception of a job is logged."""
    jobs: deque[Job] | None = getattr(_here, "jobs", None)
    while jobs:
        try:
            jobs.popleft()()
        except Exception:
            log.exception("a job failed")
