"""The CPU time and memory of this process and of its handlers' processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import NamedTuple

import psutil


class Resources(NamedTuple):
    """cpu_s: seconds of one core so far. memory_bytes: resident at the moment."""

    cpu_s: float
    memory_bytes: int


def resources_of(pids: Iterable[int] = ()) -> Resources:
    """Those of this process, its terminated children (not on Windows) and the processes `pids`."""
    cpu_s, memory_bytes = 0.0, 0
    for pid in (os.getpid(), *pids):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            process = psutil.Process(pid)
            with process.oneshot():
                times = process.cpu_times()
                memory_bytes += process.memory_info().rss
            cpu_s += times.user + times.system + times.children_user + times.children_system
    return Resources(cpu_s, memory_bytes)
