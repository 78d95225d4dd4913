"""Processes of node.py that start at once: forks of one process that has imported it already.

Most of a start is imports (0.3 s of CPU), and the tests start more than a thousand. A `Nursery` has
run node.py, as a main program, up to its last statement; each fork of it runs that statement, with
its own arguments, folder and output. Linux only: elsewhere, and with another environment or command
than the tests' own, the harness starts Python as usual (as the launcher's tests and others do).

Run as a program, this file is that process. It ends with the tests, and with it all that it has
forked. No threads: they do not survive a fork.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform == "linux"


class Nursery:
    """The forks of one script. Used by one thread at a time."""

    def __init__(
        self, script: Path, environment: dict[str, str], inside: Sequence[str] = ()
    ) -> None:
        """inside: the start of a command that runs the rest of it somewhere, as in a namespace."""
        self.environment = environment
        self._here, there = socket.socketpair()
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__, str(there.fileno()), str(script)],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        there.close()
        atexit.register(self.close)

    def close(self) -> None:
        """Ends it and all that it has forked. May be called twice."""
        atexit.unregister(self.close)
        self._here.close()
        self._process.wait()

    def start(self, words: list[str], cwd: Path) -> Fork:
        output, its_output = os.pipe()
        ending, its_ending = os.pipe()
        message = json.dumps({"words": words, "cwd": str(cwd)}).encode()
        socket.send_fds(self._here, [len(message).to_bytes(4, "big")], [its_output, its_ending])
        self._here.sendall(message)
        os.close(its_output)
        os.close(its_ending)
        pid = int.from_bytes(self._here.recv(4, socket.MSG_WAITALL), "big")
        assert pid, "the process to fork from has ended"
        return Fork(pid, output, ending)


class Fork:
    """One forked process: as much of a subprocess.Popen with stdout=PIPE as the tests use."""

    stdin = stderr = None

    def __init__(self, pid: int, output: int, ending: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = os.fdopen(output, encoding="utf-8")
        self._ending = os.fdopen(ending, "rb", buffering=0)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ending], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            told = self._ending.read(4)
            self.returncode = int.from_bytes(told, "big", signed=True) if told else -signal.SIGKILL
            self._ending.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# The process that is forked


def main(number: str, script: str) -> None:
    tests = socket.socket(fileno=int(number))
    sys.path[0], sys.argv = str(ROOT), [script]
    program = ast.parse(Path(script).read_text(encoding="utf-8"), script)
    last = program.body.pop()
    assert isinstance(last, ast.If), f"{script} does not end with `if __name__ == ...`"
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = script
    exec(compile(program, script, "exec"), module.__dict__)
    run = compile(ast.Module([last], []), script, "exec")
    gc.collect()
    gc.freeze()
    if fork_on(tests):
        exec(run, module.__dict__)  # its SystemExit is the fork's
    os._exit(0)


def fork_on(tests: socket.socket) -> bool:
    """True in a fork; False at the end of the tests."""
    children: dict[int, tuple[int, int]] = {}  # pidfd: pid, where its end is told
    while True:
        for ready in select.select([tests.fileno(), *children], [], [])[0]:
            if ready != tests.fileno():
                tell_end(ready, *children.pop(ready))
                continue
            length, fds, _, _ = socket.recv_fds(tests, 4, 2)
            if not length:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return False
            told: dict[str, Any] = json.loads(
                tests.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            )
            output, ending = fds
            pid = os.fork()
            if not pid:
                for fd in (ending, *children, *(fd for _, fd in children.values())):
                    os.close(fd)
                tests.close()
                become(output, told["words"], told["cwd"])
                return True
            os.close(output)
            children[os.pidfd_open(pid)] = pid, ending
            tests.sendall(pid.to_bytes(4, "big"))


def become(output: int, words: list[str], cwd: str) -> None:
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.chdir(cwd)
    sys.argv[1:] = words


def tell_end(pidfd: int, pid: int, ending: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with contextlib.suppress(BrokenPipeError):  # the tests do not want to know any more
        os.write(ending, code.to_bytes(4, "big", signed=True))
    os.close(ending)


if __name__ == "__main__":
    main(*sys.argv[1:])
