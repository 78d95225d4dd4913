"""Real overlays for the tests, the fault bench and the benchmarks: processes on free ports."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc

from overlay.client.sync import Client, connect
from overlay.security.credentials import Credentials
from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.forks import LINUX, Fork, ForkServer
from tests.harness.machine import ROOT, NotReached, free_port, free_ports, freeze, program, until

# Re-exported from machine.
__all__ = ["ROOT", "NotReached", "free_port", "free_ports", "freeze", "until"]

NODE = ROOT / "node.py"
IDS = "ABCDEF"
START_S = 30.0  # for processes to serve and link up, even on a busy machine


def six_processes(**top: Any) -> dict[str, Any]:
    """The shipped six on loopback, each with a free port; `top` adds top-level keys."""
    config = json.loads((ROOT / "two_hosts_config.json").read_text())
    entries = list(config["processes"].values())
    for entry, port in zip(entries, free_ports(len(entries)), strict=True):
        entry.update(host="127.0.0.1", port=port)
    return {**config, **top}


def tool(name: str, remedy: str) -> str:
    """The program beside this Python, or on the path. If missing: skips the test, fails in CI."""
    import pytest  # not at the top: the fault bench runs without it

    found = program(name)
    if found is None:
        reason = f"the program '{name}' is missing; run: {remedy}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Overlay:
    """The processes of one configuration, started in a folder of their own."""

    metrics_s = 20.0  # timeout of GetMetrics: a process may have just started on a busy machine

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.path = folder / "overlay.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(config))
        self.credentials: Credentials | None = None  # of an operator
        if config.get("tls"):
            from tests.harness.certificates import secured

            secured(folder, config)
            self.credentials = Credentials.of_user(folder / config["tls"])
        self.files: dict[str, str] = {}  # other configurations, by process
        self.processes: dict[str, subprocess.Popen[Any] | Fork] = {}
        self.environment = environment()
        self._channels: dict[str, grpc.Channel] = {}

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills what still runs: how processes stop in order is tested where it is looked at."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        self.stop()

    @property
    def ids(self) -> list[str]:
        return list(self.config["processes"])

    def start(self, *ids: str) -> Overlay:
        """Starts these processes (default: all) and waits until all links are up."""
        self.serve(*ids)
        self.settle()
        return self

    def serve(self, *ids: str) -> None:
        """Starts these processes (default: all) and waits until they serve."""
        for process_id in ids or self.ids:
            self.spawn(process_id)
        for process_id in ids or self.ids:
            self._wait_ready(process_id)

    def spawn(self, process_id: str) -> None:
        self.processes[process_id] = self._spawn(process_id)

    def settle(self, within_s: float = START_S) -> None:
        """Waits until each running process has links to its running neighbours and their slots."""
        alive = {i for i, process in self.processes.items() if process.poll() is None}
        for process_id in sorted(alive, reverse=True):
            sees = functools.partial(self._sees, process_id, alive)
            until(sees, within_s, f"links of {process_id}")

    def address(self, process_id: str) -> str:
        entry = self.config["processes"][process_id]
        return f"{entry['host']}:{entry['port']}"

    def port(self, process_id: str) -> int:
        return int(self.config["processes"][process_id]["port"])

    def stub(self, process_id: str) -> pb2_grpc.OverlayNodeStub:
        return pb2_grpc.OverlayNodeStub(self.channel(process_id))

    def channel(self, process_id: str) -> grpc.Channel:
        if process_id not in self._channels:
            self._channels[process_id] = self.new_channel(process_id)
        return self._channels[process_id]

    def new_channel(self, process_id: str) -> grpc.Channel:
        """For who closes it; `channel` is kept."""
        host, port = self.address(process_id).rsplit(":", 1)
        return endpoints.open_channel(
            (host,), int(port), endpoints.channel_options(), self.credentials, process_id
        )

    def connect(self, *process_ids: str) -> Client:
        """The library's client, for who closes it."""
        tls = self.folder / self.config["tls"] if self.credentials else False
        return connect(",".join(map(self.address, process_ids)), tls=tls)

    def metrics(self, process_id: str) -> pb2.MetricsResponse:
        """Raises grpc.RpcError."""
        ask = self.stub(process_id).GetMetrics
        found: pb2.MetricsResponse = ask(
            pb2.MetricsRequest(), timeout=self.metrics_s, wait_for_ready=True
        )
        return found

    def ask(
        self, process_id: str, payload: bytes = b"hi", *, timeout: float = 10, **fields: Any
    ) -> pb2.Response:
        """Calls Forward. Raises grpc.RpcError."""
        request = pb2.Request(payload=payload, **fields)
        ask = self.stub(process_id).Forward
        response: pb2.Response = ask(request, timeout=timeout, wait_for_ready=True)
        return response

    def kill(self, process_id: str) -> None:
        process = self.processes[process_id]
        process.kill()
        process.wait(10)

    def freeze(self, process_id: str) -> None:
        freeze(self.processes[process_id].pid)

    def thaw(self, process_id: str) -> None:
        self.processes[process_id].send_signal(signal.SIGCONT)

    def log(self, process_id: str) -> str:
        path = self.folder / "logs" / f"process_{process_id.lower()}.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for process in self.processes.values():
            if process.poll() is None:
                if os.name != "nt":  # Windows has no SIGCONT, and tests freeze nothing there
                    with contextlib.suppress(OSError):
                        process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait(5)
            if process.stdout:
                process.stdout.close()

    def _node(self, process_id: str) -> list[str]:
        """The command that runs the process."""
        return [sys.executable, str(NODE), self.files.get(process_id, self.path.name), process_id]

    def _spawn(self, process_id: str) -> subprocess.Popen[Any] | Fork:
        command = self._node(process_id)
        if LINUX and command[:2] == [sys.executable, str(NODE)]:
            server = fork_server(NODE)
            if server.environment == self.environment:
                return server.start(command[2:], self.folder)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )

    def _wait_ready(self, process_id: str) -> None:
        process = self.processes[process_id]
        line = process.stdout.readline() if process.stdout else ""
        if "serves on" not in line:
            rest = process.stdout.read() if process.stdout and process.poll() is not None else ""
            raise AssertionError(f"{process_id} did not start: {line}{rest}")

    def _sees(self, process_id: str, alive: set[str]) -> bool:
        try:
            metrics = self.metrics(process_id)
        except grpc.RpcError:
            return False
        return all(
            n.state == "up" and n.slots > 0 for n in metrics.neighbours if n.process_id in alive
        )


def environment() -> dict[str, str]:
    """The processes' environment, without the variable that pytest changes for each test."""
    ours = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ours.pop("PYTEST_CURRENT_TEST", None)
    return ours


@functools.cache
def fork_server(script: Path) -> ForkServer:
    return ForkServer(script, environment())


@contextlib.contextmanager
def running(folder: Path, config: dict[str, Any]) -> Iterator[Overlay]:
    with Overlay(folder, config) as overlay:
        yield overlay.start()


@contextlib.contextmanager
def running_one(folder: Path, module: str, names: Iterable[str]) -> Iterator[Overlay]:
    """Worker C alone, for tests that call it directly. names: its handlers, functions in module."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(module)
    config = six_processes(handlers={name: f"mine:{name}" for name in names})
    with Overlay(folder, config) as overlay:
        yield overlay.start("C")


def run_without(module: str, config: Path) -> subprocess.CompletedProcess[str]:
    """Runs process C as if the module were not installed."""
    shadow = config.parent / "shadow"
    shadow.mkdir()
    (shadow / f"{module}.py").write_text("raise ImportError('as if it were not installed')")
    return subprocess.run(
        [sys.executable, str(NODE), str(config), "C"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(shadow)},
        timeout=30,
    )
