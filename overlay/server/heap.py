"""Gives back what a burst has left: glibc keeps freed memory for the next, hundreds of MiB of it.

Elsewhere than on Linux with glibc, it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

from overlay.model import clocks as time
from overlay.model.limits import MIB

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
WORTH = 64 * MIB  # more than the least that was seen since the start
PAUSE_S = 2.0  # between two tries; each takes some ms


def keep_little() -> None:
    """Lets glibc keep less of what is freed. To be called before there are threads.

    Each of its arenas keeps what it was once given, and there is one for every few threads; what is
    larger than a few MiB goes back to the system at once when it is mapped by itself. Measured with
    200 answers of 4 MiB of which 16 were kept: 340 MiB in place of 730.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        for name, value in (
            (M_ARENA_MAX, 2),
            (M_MMAP_THRESHOLD, 4 * MIB),
            (M_TRIM_THRESHOLD, 32 * MIB),
        ):
            mallopt(name, value)


class HeapTrimmer:
    """is_busy: then it waits, since what is freed would be wanted again at once."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._trim = _of_glibc("malloc_trim")
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


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
    return found
