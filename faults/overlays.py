"""The processes of an overlay under test: started, broken, brought back, looked at.

Each process's output goes to a file of its own, so that nothing waits for the bench to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from faults.handlers import FOLDER
from faults.history import Ending
from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
START_S = 30.0  # within which a process serves, on a busy machine too
STOP_S = 20.0  # the drain's grace and the watchdog behind it
ASK_TO_STOP = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGTERM
STOPPED = [0]
SHOWN_BYTES = 64 * 1024  # of a process's output


class NotReached(Exception):
    """A condition did not come true in time; says which, and the last value seen."""


def until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Waits for a true value and gives it back. Raises NotReached."""
    end = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise NotReached(f"not within {within_s:g} s: {what} (last seen: {value!r})")
        time.sleep(0.03)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that outgoing connections use."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randint(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return sorted(found)


def six_processes(**top: Any) -> dict[str, Any]:
    """The shipped six on loopback, each with a free port; `top` adds top-level keys."""
    config = json.loads((ROOT / "two_hosts_config.json").read_text(encoding="utf-8"))
    entries = list(config["processes"].values())
    for entry, port in zip(entries, free_ports(len(entries)), strict=True):
        entry.update(host="127.0.0.1", port=port)
    return {**config, **top}


class Overlay:
    """The processes of one configuration, in a folder of their own. Not for several threads at
    once, but for `metrics` and `address`."""

    def __init__(self, folder: Path, config: dict[str, Any], command: Sequence[str]) -> None:
        """command: what serves a process, the configuration and the id come after it."""
        self.folder = folder
        self.config = config
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.endings: list[Ending] = []
        self.unread: set[str] = set()  # those whose output goes to pipes that nobody reads
        self.inside: dict[str, list[str]] = {}  # commands that run another: where a process is
        self.path = folder / "overlay.json"
        self._command = command
        self._said_before: dict[str, int] = {}  # bytes of output that are an earlier start's
        self._channels: dict[str, grpc.Channel] = {}
        (folder / "executions").mkdir(parents=True)
        self.path.write_text(json.dumps(config, indent=1), encoding="utf-8")

    @property
    def ids(self) -> list[str]:
        return list(self.config["processes"])

    def start(self, *ids: str) -> None:
        """Starts the named processes (all, when none is named) and waits until they serve.

        Raises NotReached, also for one that has ended instead.
        """
        for process_id in ids or self.ids:
            self.spawn(process_id)
        for process_id in ids or self.ids:
            until(lambda p=process_id: self.serves(p), START_S, f"{process_id} serves")

    def spawn(self, process_id: str) -> None:
        flags = subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" else 0
        with (self.folder / f"{process_id}.out").open("ab") as out:
            self._said_before[process_id] = out.tell()
            quiet = process_id not in self.unread
            self.processes[process_id] = subprocess.Popen(
                [*self.inside.get(process_id, ()), *self._command, str(self.path), process_id],
                stdin=subprocess.DEVNULL,
                stdout=out if quiet else subprocess.PIPE,
                stderr=subprocess.STDOUT if quiet else subprocess.PIPE,
                cwd=self.folder,
                env={**os.environ, FOLDER: str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=os.name == "posix",
                creationflags=flags,
            )

    def serves(self, process_id: str) -> bool:
        process = self.processes[process_id]
        if process.poll() is not None:
            said = self.output(process_id)[-300:]
            raise NotReached(f"{process_id} ended with {process.returncode}: {said}")
        try:
            return self.metrics(process_id).pid == process.pid
        except grpc.RpcError:
            return False

    def settle(self, within_s: float = START_S) -> None:
        """Waits until each process sees all its neighbours, and their slots."""
        for process_id in reversed(self.ids):
            until(lambda p=process_id: self._sees(p), within_s, f"{process_id} sees its neighbours")

    def address(self, process_id: str) -> str:
        entry = self.config["processes"][process_id]
        return f"{entry['host']}:{entry['port']}"

    def port(self, process_id: str) -> int:
        return int(self.config["processes"][process_id]["port"])

    def stub(self, process_id: str) -> pb2_grpc.OverlayNodeStub:
        if process_id not in self._channels:
            address, options = self.address(process_id), endpoints.channel_options()
            self._channels[process_id] = grpc.insecure_channel(address, options)
        return pb2_grpc.OverlayNodeStub(self._channels[process_id])

    def metrics(self, process_id: str) -> pb2.MetricsResponse:
        """Raises grpc.RpcError."""
        return self.stub(process_id).GetMetrics(
            pb2.MetricsRequest(), timeout=2, wait_for_ready=True
        )

    def signal(self, process_id: str, number: int) -> None:
        self.processes[process_id].send_signal(number)

    def kill(self, process_id: str) -> None:
        process = self.processes[process_id]
        process.kill()
        self._ended(process_id, [process.wait(10)])  # whatever the system calls it

    def stop(self, process_id: str) -> None:
        """Asks it to stop, and waits for it."""
        self.signal(process_id, ASK_TO_STOP)
        self.wait(process_id, STOPPED)

    def stop_all(self) -> None:
        """The same for those that still run, at once."""
        self.note_dead()
        for process_id in self.processes:
            self.signal(process_id, ASK_TO_STOP)
        for process_id in list(self.processes):
            self.wait(process_id, STOPPED)

    def wait(self, process_id: str, wanted: list[int]) -> None:
        """Waits for its end, which is noted. Raises NotReached."""
        process = self.processes[process_id]
        until(lambda: process.poll() is not None, STOP_S, f"{process_id} ends")
        self._ended(process_id, wanted)

    def note_dead(self) -> None:
        """Notes those that have ended and were not asked to."""
        for process_id, process in list(self.processes.items()):
            if process.poll() is not None:
                self._ended(process_id, [])

    def close(self) -> None:
        """Ends what still runs, whatever its state."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(10)
            self._close_pipes(process)
        self._cut_output()

    def output(self, process_id: str) -> str:
        """The last of what it said on stdout and stderr since it was started."""
        path = self.folder / f"{process_id}.out"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            before = self._said_before.get(process_id, 0)
            file.seek(max(before, path.stat().st_size - SHOWN_BYTES))
            return file.read().decode(errors="replace")

    def _cut_output(self) -> None:
        """Keeps the end of what was very long, so that results do not fill the disk."""
        for process_id in self.ids:
            path = self.folder / f"{process_id}.out"
            if path.exists() and path.stat().st_size > SHOWN_BYTES:
                path.write_text(self.output(process_id), encoding="utf-8")

    def _ended(self, process_id: str, wanted: list[int]) -> None:
        process = self.processes.pop(process_id)
        said = "\n".join(self.output(process_id).splitlines()[-8:])[-2000:]
        self.endings.append(Ending(process_id, process.returncode, wanted, said))
        self._close_pipes(process)

    @staticmethod
    def _close_pipes(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _sees(self, process_id: str) -> bool:
        try:
            metrics = self.metrics(process_id)
        except grpc.RpcError:
            return False
        return all(n.state == "up" and n.slots > 0 for n in metrics.neighbours)
