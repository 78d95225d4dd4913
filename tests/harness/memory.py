"""The resident memory of processes, sampled by a thread that runs while `with` lasts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

import psutil

MIB = 1024 * 1024


class Rss:
    """before, peaks: MiB, by the name of the process."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.before = {name: _mib(process) for name, process in self._processes.items()}
        self.peaks = dict(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Rss:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    @property
    def grown(self) -> float:
        """The most that one process has grown, in MiB."""
        return max(peak - self.before[name] for name, peak in self.peaks.items())

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            for name, process in self._processes.items():
                with contextlib.suppress(psutil.Error):  # it has ended
                    self.peaks[name] = max(self.peaks[name], _mib(process))


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / MIB
