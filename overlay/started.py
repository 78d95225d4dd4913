"""Programs and processes that a process has started, to any depth: found, and ended.

In sessions and groups of their own too; not what its starter has disowned, as a daemon is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

ROUNDS = 5  # of ending what may start more meanwhile


def end() -> None:
    """All that this process has started. Raises nothing."""
    seen: set[Any] = set()
    with contextlib.suppress(Exception):  # also when Python is coming to its end
        for _ in range(ROUNDS):
            found = set(by()) - seen
            kill(found)
            seen |= found
            if not found:
                return


def by(pid: int | None = None) -> list[Any]:
    """What the process of this number, or this one, has started."""
    import psutil  # here: few of a handler's processes need it

    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children(recursive=True)
        return [process for process in children if not _cleans_up(process)]
    return []


def kill(processes: Iterable[Any]) -> None:
    """Never another one that has its number by now."""
    for process in processes:
        with contextlib.suppress(Exception):
            process.kill()


def _cleans_up(process: Any) -> bool:
    # It ends by itself after those that use it, and takes away the memory that they shared.
    with contextlib.suppress(Exception):
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    return False
