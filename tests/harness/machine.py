"""Free ports, programs, and waiting for a condition: for the tests, fault bench and benchmarks.

Standard library only, because every process of a benchmark imports it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class NotReached(AssertionError):
    """A condition did not become true in time. The message has it and its last value."""


def until(condition: Callable[[], Any], within_s: float = 10.0, what: str = "") -> Any:
    """Waits for a true value and returns it. Raises NotReached."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            raise NotReached(f"not within {within_s:g} s: {what or condition} (last: {value!r})")
        time.sleep(min(0.02 + waited_s / 20, 0.05))  # each look takes some CPU


def freeze(pid: int) -> None:
    """Stops a process with SIGSTOP. Returns when all of its threads stand still: until its main
    thread has seen the signal, which may take a while on a busy machine, the others go on."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    if tasks.exists():
        until(lambda: all(_is_stopped(task) for task in tasks.iterdir()), what="it is stopped")


def _is_stopped(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # the thread has ended
        return True


def own_ports() -> range:
    """Those of this test process: between two that look for a free port at the same time, nothing
    else keeps both from taking the same one. Below the range of ephemeral ports."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = max(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), number + 1)
    size = len(PORTS) // count
    return PORTS[number * size : (number + 1) * size]


def free_ports(count: int) -> list[int]:
    """Ports without a listener, that were not given lately."""
    found: list[int] = []
    for port in random.sample(own_ports(), len(own_ports())):
        if port in _given or port in DEMO:
            continue
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            _given.extend(found)
            return sorted(found)
    raise AssertionError(f"not {count} free ports on 127.0.0.1")


PORTS = range(10_000, 32_000)
DEMO = range(20_051, 20_057)  # the demo's own, which tests start as it is
_given: deque[int] = deque(maxlen=500)  # they may not be listened on yet


def free_port() -> int:
    return free_ports(1)[0]


def program(name: str) -> str | None:
    """The path of a program; one beside this Python comes first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)
