"""Finds and kills the descendants of a process: everything that it has started, to any depth.

Including those in sessions and process groups of their own, but not those whose parent has exited,
such as daemons. On Windows a job object, once set up, ends them with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

ROUNDS = 5  # descendants may start more while they are being killed
KILL_ON_JOB_CLOSE, BREAKAWAY_OK, EXTENDED_LIMITS, THIS_PROCESS = 0x2000, 0x800, 9, -1  # Windows


if sys.platform == "win32":
    import ctypes
    import struct
    from ctypes import wintypes

    def hold_together() -> None:
        """Puts this process, and all that it starts from now on, into a job that ends with it."""
        # A JOBOBJECT_EXTENDED_LIMIT_INFORMATION with only the flags set.
        limits = ctypes.create_string_buffer(144 if sys.maxsize > 1 << 32 else 112)
        struct.pack_into("<I", limits, 16, KILL_ON_JOB_CLOSE | BREAKAWAY_OK)
        kernel = ctypes.WinDLL("kernel32")
        kernel.CreateJobObjectW.restype = wintypes.HANDLE
        job = wintypes.HANDLE(kernel.CreateJobObjectW(None, None))  # closed when the process ends
        kernel.SetInformationJobObject(job, EXTENDED_LIMITS, limits, len(limits))
        kernel.AssignProcessToJobObject(job, wintypes.HANDLE(THIS_PROCESS))
else:

    def hold_together() -> None:
        """Does nothing: only Windows has job objects."""


def end() -> None:
    """Kills all descendants of this process, which is about to exit. Never raises."""
    seen: set[psutil.Process] = set()
    with contextlib.suppress(Exception):  # also while Python is shutting down
        # Otherwise a pool would replace each process that is killed.
        BaseProcess.start = _never  # type: ignore[assignment, method-assign]
        for _ in range(ROUNDS):
            found = set(started_by()) - seen
            kill(found)
            seen |= found
            if not found:
                return


def _never(process: BaseProcess) -> None:
    """Replaces multiprocessing's start: blocks until this process exits."""
    threading.Event().wait()


def started_by(pid: int | None = None) -> list[psutil.Process]:
    """The descendants of the process with this pid, by default of this process."""
    import psutil  # here, because few handler processes need it

    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children(recursive=True)
        return [process for process in children if not _cleans_up(process)]
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills them, but never a process that has reused the pid of one."""
    for process in processes:
        with contextlib.suppress(Exception):
            process.kill()


def _cleans_up(process: psutil.Process) -> bool:
    # It exits by itself after the processes that use it, and frees their shared memory.
    with contextlib.suppress(Exception):
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    return False
