"""A peer that runs in one set-up: its processes, and its caller, which measures on request."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from benchmarks.children import READY_S, Group, NotStarted
from benchmarks.loads import TIMEOUT_S, Work
from benchmarks.rows import Setup

CALLER = "caller"
STUCK_S = 5 * TIMEOUT_S  # no load overruns its own seconds by more: every call has a timeout


class Entrant:
    """Owns a thread, which reads the caller's lines and ends with the caller."""

    def __init__(self, name: str, module: ModuleType, setup: Setup, folder: Path) -> None:
        self.name = name
        self.module = module
        self._setup = setup
        self._group = Group(name, folder)
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._caller: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises NotStarted; stop() must be called in that case too."""
        arguments = self.module.start(self._group, self._setup)
        argv = [sys.executable, "-m", "benchmarks.child", self.name, CALLER, json.dumps(arguments)]
        errors = open(self._group.folder / f"{CALLER}.out", "wb")  # noqa: SIM115 - the child's
        with errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._caller = self._group.command(CALLER, argv, **pipes)
        reader = threading.Thread(target=self._read, name=f"{self.name}-lines", daemon=True)
        reader.start()
        reply = self._reply(2 * READY_S)
        if "error" in reply:
            raise NotStarted(f"its caller: {reply['error']}")

    def measure(self, work: Work) -> dict[str, Any]:
        """The caller's report with the CPU seconds of this peer and of everything else."""
        if self._caller is None or self._caller.poll() is not None:
            return {"error": f"the caller has ended: {self._group.last_line(CALLER)}"}
        ours, all_, began = self._group.cpu_s(), busy_s(), time.monotonic()
        line = json.dumps(asdict(work)) + "\n"
        try:
            self._caller.stdin.write(line.encode())
            self._caller.stdin.flush()
        except OSError as error:
            return {"error": f"the caller no longer takes work: {error}"}
        found = self._reply(work.seconds + STUCK_S)
        found["cpu_s"] = self._group.cpu_s() - ours
        others_s = busy_s() - all_ - found["cpu_s"]
        found["other_cores"] = max(0.0, others_s / (time.monotonic() - began))
        return found

    def stop(self) -> None:
        self._group.stop()

    def _reply(self, within_s: float) -> dict[str, Any]:
        try:
            return self._lines.get(timeout=within_s)
        except queue.Empty:
            if self._caller:
                self._caller.kill()  # or its late report would be taken for that of the next work
            return {"error": f"no result within {within_s:g} s"}

    def _read(self) -> None:
        for line in self._caller.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({"error": f"the caller ended: {self._group.last_line(CALLER)}"})


def busy_s() -> float:
    """CPU seconds that the whole machine has spent on anything."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))
