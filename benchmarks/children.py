"""The processes of one peer: starts them, waits for them, reads their CPU time, ends them.

Every process is a child of the benchmark in a session of its own, so that Ctrl-C reaches only the
benchmark, which then stops them. None is ever looked for by name. Their output goes to files (a
pipe that is not read would freeze them).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.harness.machine import ROOT, NotReached, until

READY_S = 60.0  # a cluster of several interpreters starts slowly on two busy cores
GRACE_S = 8.0
READY = "BENCH_READY"  # names the file that a child makes when it serves


class NotStarted(Exception):
    """A process of a peer ended or did not serve; the message names it, with its last output."""


class Group:
    """The processes of one peer and its caller. For one thread; stop() may be called twice."""

    def __init__(self, peer: str, folder: Path) -> None:
        self.peer = peer
        self.folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def command(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        **pipes: Any,
    ) -> subprocess.Popen[bytes]:
        """Starts any program; its output goes to <folder>/<name>.out."""
        with open(self._out(name), "wb") as out:
            given = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **pipes}
            child = subprocess.Popen(
                list(argv), cwd=ROOT, env={**os.environ, **(env or {})}, **_own_session(), **given
            )
        self._children[name] = child
        return child

    def python(self, name: str, role: str, /, **arguments: Any) -> None:
        """Starts a role of the peer's own module (see child.py), which ends with this process."""
        argv = [sys.executable, "-m", "benchmarks.child", self.peer, role, json.dumps(arguments)]
        self.command(name, argv, {READY: str(self._ready(name))}, stdin=subprocess.PIPE)

    def wait_ready(self, *names: str) -> None:
        for name in names:
            self.wait_until(name, self._ready(name).exists)

    def wait_for_port(self, name: str, port: int) -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True
            return False

        self.wait_until(name, answers)

    def wait_for_text(self, name: str, text: str) -> None:
        self.wait_until(name, lambda: text in self.output(name))

    def wait_until(self, name: str, serves: Callable[[], bool]) -> None:
        """Raises NotStarted when the child ends or does not serve in time."""

        def has_ended_or_serves() -> bool:
            return serves() or self._children[name].poll() is not None

        try:
            until(has_ended_or_serves, READY_S)
        except NotReached:
            late = f"{name} did not serve in {READY_S:g} s: {self.last_line(name)}"
            raise NotStarted(late) from None
        code = self._children[name].poll()
        if code is not None:
            raise NotStarted(f"{name} ended with exit code {code}: {self.last_line(name)}")

    def output(self, name: str) -> str:
        return self._out(name).read_text(encoding="utf-8", errors="replace")

    def last_line(self, name: str) -> str:
        lines = [line.strip() for line in self.output(name).splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it printed nothing"

    def cpu_s(self) -> float:
        """CPU seconds of all processes and their descendants so far, the ended ones included."""
        return sum(_cpu_s(process) for process in self._tree())

    def stop(self) -> None:
        """Asks all to end, the last started first; kills what is left after the grace."""
        tree = self._tree()
        for child in reversed(self._children.values()):
            _ask_to_end(child)
        _, left = psutil.wait_procs(tree, GRACE_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for child in self._children.values():
            child.wait()
        self._children.clear()

    def _tree(self) -> list[psutil.Process]:
        tree = {}
        for child in self._children.values():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(child.pid)
                for each in [process, *process.children(recursive=True)]:
                    tree[each.pid] = each
        return list(tree.values())

    def _out(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def _ready(self, name: str) -> Path:
        return self.folder / f"{name}.ready"


def _ask_to_end(child: subprocess.Popen[bytes]) -> None:
    """Roles of a peer's module end when their stdin does; they may have a cluster to stop first."""
    if child.stdin:
        with contextlib.suppress(OSError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    if child.poll() is None:
        child.terminate()


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    # children_*: those that have ended and were waited for; the others are in the tree themselves.
    return float(times.user + times.system + times.children_user + times.children_system)


def _own_session() -> dict[str, Any]:
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}
