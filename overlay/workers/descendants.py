"""Finds and ends the programs and processes that a process has started, to any depth.

Those in sessions and groups of their own too, but not those that their parent has disowned, as
daemons are. Windows, once asked to, ends all of them with the process that started them, however
that ends.
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

ROUNDS = 5  # what is being ended may start more meanwhile
KILL_ON_JOB_CLOSE, BREAKAWAY_OK, EXTENDED_LIMITS, THIS_PROCESS = 0x2000, 0x800, 9, -1  # Windows'


if sys.platform == "win32":
    import ctypes
    import struct
    from ctypes import wintypes

    def hold_together() -> None:
        """Puts this process and everything it starts from now on into a job that ends with it."""
        # A JOBOBJECT_EXTENDED_LIMIT_INFORMATION, of which only the flags are set.
        limits = ctypes.create_string_buffer(144 if sys.maxsize > 1 << 32 else 112)
        struct.pack_into("<I", limits, 16, KILL_ON_JOB_CLOSE | BREAKAWAY_OK)
        kernel = ctypes.WinDLL("kernel32")
        kernel.CreateJobObjectW.restype = wintypes.HANDLE
        job = wintypes.HANDLE(kernel.CreateJobObjectW(None, None))  # closed with the process
        kernel.SetInformationJobObject(job, EXTENDED_LIMITS, limits, len(limits))
        kernel.AssignProcessToJobObject(job, wintypes.HANDLE(THIS_PROCESS))
else:

    def hold_together() -> None:
        """Does nothing: only Windows can do this."""


def end() -> None:
    """Ends everything that this process has started; it ends itself next. Raises nothing."""
    seen: set[psutil.Process] = set()
    with contextlib.suppress(Exception):  # also while Python is shutting down
        # A pool would replace each process that ends.
        BaseProcess.start = _never  # type: ignore[assignment, method-assign]
        for _ in range(ROUNDS):
            found = set(by()) - seen
            kill(found)
            seen |= found
            if not found:
                return


def _never(process: BaseProcess) -> None:
    """Replaces multiprocessing's start: waits for the end of this process."""
    threading.Event().wait()


def by(pid: int | None = None) -> list[psutil.Process]:
    """What the process with this pid has started; without one, what this process has."""
    import psutil  # here, as few handlers' processes need it

    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children(recursive=True)
        return [process for process in children if not _cleans_up(process)]
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills them, but never another process that has got the pid of one."""
    for process in processes:
        with contextlib.suppress(Exception):
            process.kill()


def _cleans_up(process: psutil.Process) -> bool:
    # It ends by itself after the processes that use it, and removes the memory that they shared.
    with contextlib.suppress(Exception):
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    return False
