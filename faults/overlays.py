"""The processes of an overlay under test: starts, kills and restarts them.

Each process writes its output to a file, so that it never waits for the bench to read.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from faults.history import FOLDER, Ending
from tests.harness import cluster
from tests.harness.forks import LINUX, Fork
from tests.harness.machine import NotReached, until

STOP_S = 20.0  # the grace of a drain, and the watchdog after it
if sys.platform == "win32":
    ASK_TO_STOP, FLAGS = signal.CTRL_BREAK_EVENT, subprocess.CREATE_NEW_PROCESS_GROUP
else:
    ASK_TO_STOP, FLAGS = signal.SIGTERM, 0
STOPPED = [0]
SHOWN_BYTES = 64 * 1024  # of a process's output


class Overlay(cluster.Overlay):
    """The processes of one configuration; records how each ends. Only `metrics` and `address` are
    thread-safe."""

    metrics_s = 2.0

    def __init__(self, folder: Path, config: dict[str, Any], command: Sequence[str]) -> None:
        """command: starts a process; the configuration and the id are appended."""
        super().__init__(folder, config)
        self.endings: list[Ending] = []
        self.unread: set[str] = set()  # processes whose output goes to pipes that are not read
        self.inside: dict[str, list[str]] = {}  # command prefixes, by process
        self._command = command
        self._old_output: dict[str, int] = {}  # bytes of output of earlier starts
        (folder / "executions").mkdir()

    def _node(self, process_id: str) -> list[str]:
        before = self.inside.get(process_id, ())
        return [*before, *self._command, str(self.path), process_id]

    def _spawn(self, process_id: str) -> subprocess.Popen[Any] | Fork:
        command, own = self._node(process_id), {FOLDER: str(self.folder)}
        with (self.folder / f"{process_id}.out").open("ab") as out:
            self._old_output[process_id] = out.tell()
            quiet = process_id not in self.unread
            if LINUX and quiet and command[0] == sys.executable:
                server = cluster.fork_server(Path(command[1]))
                if server.environment == self.environment:
                    return server.start_into(command[2:], self.folder, out, own)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out if quiet else subprocess.PIPE,
                stderr=subprocess.STDOUT if quiet else subprocess.PIPE,
                cwd=self.folder,
                env={**self.environment, **own},
                start_new_session=os.name == "posix",
                creationflags=FLAGS,
            )

    def _wait_ready(self, process_id: str) -> None:
        """Raises NotReached, also if it has ended."""
        until(lambda: self._serves(process_id), cluster.START_S, f"{process_id} serves")

    def _serves(self, process_id: str) -> bool:
        process = self.processes[process_id]
        if process.poll() is not None:
            output = self.output(process_id)[-300:]
            raise NotReached(f"{process_id} ended with {process.returncode}: {output}")
        try:
            return bool(self.metrics(process_id).pid == process.pid)
        except grpc.RpcError:
            return False

    def signal(self, process_id: str, number: int) -> None:
        self.processes[process_id].send_signal(number)

    def kill(self, process_id: str) -> None:
        process = self.processes[process_id]
        process.kill()
        self._ended(process_id, [process.wait(10)])  # any exit code

    def stop_one(self, process_id: str) -> None:
        """Stops it gracefully."""
        self.signal(process_id, ASK_TO_STOP)
        self.wait(process_id, STOPPED)

    def stop_all(self) -> None:
        """Stops all that still run gracefully, at the same time."""
        self.note_dead()
        for process_id in self.processes:
            self.signal(process_id, ASK_TO_STOP)
        for process_id in list(self.processes):
            self.wait(process_id, STOPPED)

    def wait(self, process_id: str, wanted: list[int]) -> None:
        """Waits for its end and records it. Raises NotReached."""
        process = self.processes[process_id]
        until(lambda: process.poll() is not None, STOP_S, f"{process_id} ends")
        self._ended(process_id, wanted)

    def note_dead(self) -> None:
        """Records processes that have ended unexpectedly."""
        for process_id, process in list(self.processes.items()):
            if process.poll() is not None:
                self._ended(process_id, [])

    def close(self) -> None:
        """Kills what still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait(10)
            self._close_pipes(process)
        self.stop()
        self._cut_output()

    def output(self, process_id: str) -> str:
        """The end of its output since it was started."""
        path = self.folder / f"{process_id}.out"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            before = self._old_output.get(process_id, 0)
            file.seek(max(before, path.stat().st_size - SHOWN_BYTES))
            return file.read().decode(errors="replace")

    def _cut_output(self) -> None:
        """Truncates very long outputs, so that results do not fill the disk."""
        for process_id in self.ids:
            path = self.folder / f"{process_id}.out"
            if path.exists() and path.stat().st_size > SHOWN_BYTES:
                path.write_text(self.output(process_id), encoding="utf-8")

    def _ended(self, process_id: str, wanted: list[int]) -> None:
        process = self.processes.pop(process_id)
        assert process.returncode is not None
        output = "\n".join(self.output(process_id).splitlines()[-8:])[-2000:]
        self.endings.append(Ending(process_id, process.returncode, wanted, output))
        self._close_pipes(process)

    @staticmethod
    def _close_pipes(process: subprocess.Popen[Any] | Fork) -> None:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
