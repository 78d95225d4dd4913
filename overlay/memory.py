"""Gives back what a burst has left: glibc keeps freed memory for the next, hundreds of MiB of it.

Elsewhere than on Linux with glibc, it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable

MIB = 1024 * 1024
WORTH = 64 * MIB  # more than the least that was seen since the start
PAUSE_S = 2.0  # between two tries; each takes some ms


class Memory:
    """is_busy: then it waits, since what is freed would be wanted again at once."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._trim = _malloc_trim()
        self._least = sys.maxsize
        self._next = 0.0

    def look(self) -> None:
        """Called now and then; takes no time when there is nothing to do."""
        now = time.monotonic()
        if self._trim is None or now < self._next or self._is_busy():
            return
        held = resident()
        if held > self._least + WORTH:
            self._trim(0)
            held = resident()
            self._next = now + PAUSE_S
        self._least = min(self._least, held)


def resident() -> int:
    """Bytes of this process in memory, on Linux."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
