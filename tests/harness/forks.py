"""Fast starts of node.py: forks of one process that has already imported it.

Most of a start is imports (0.3 s of CPU), and the tests start more than a thousand processes. A
`ForkServer` has run node.py, as a main program, up to its last statement; each fork runs that
statement with its own arguments, folder and output. Linux only: elsewhere, and for other
environments or commands than the tests' own, the harness starts Python as usual.

Run as a program, this file is that process. It exits with the tests and kills its forks then. It
has no threads, because they do not survive a fork.
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


class ForkServer:
    """Forks processes of one script. Used by one thread at a time."""

    def __init__(
        self, script: Path, environment: dict[str, str], inside: Sequence[str] = ()
    ) -> None:
        """inside: a command prefix that runs the server elsewhere, for example in a namespace."""
        self.environment = environment
        self._socket, its_socket = socket.socketpair()
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__, str(its_socket.fileno()), str(script)],
            stdin=subprocess.DEVNULL,
            pass_fds=[its_socket.fileno()],
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        its_socket.close()
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the server and all its forks. May be called twice."""
        atexit.unregister(self.close)
        self._socket.close()
        self._process.wait()

    def start(self, arguments: list[str], cwd: Path) -> Fork:
        output, its_output = os.pipe()
        exit_code, its_exit_code = os.pipe()
        message = json.dumps({"arguments": arguments, "cwd": str(cwd)}).encode()
        size = len(message).to_bytes(4, "big")
        socket.send_fds(self._socket, [size], [its_output, its_exit_code])
        self._socket.sendall(message)
        os.close(its_output)
        os.close(its_exit_code)
        pid = int.from_bytes(self._socket.recv(4, socket.MSG_WAITALL), "big")
        assert pid, "the fork server has ended"
        return Fork(pid, output, exit_code)


class Fork:
    """One forked process: the part of subprocess.Popen with stdout=PIPE that the tests use."""

    stdin = stderr = None

    def __init__(self, pid: int, output: int, exit_code: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = os.fdopen(output, encoding="utf-8")
        self._exit_code = os.fdopen(exit_code, "rb", buffering=0)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._exit_code], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            code = self._exit_code.read(4)
            self.returncode = int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL
            self._exit_code.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# The fork server's process


def main(fd: str, script: str) -> None:
    tests = socket.socket(fileno=int(fd))
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
    if serve_forks(tests):
        exec(run, module.__dict__)  # it ends the fork with SystemExit
    os._exit(0)


def serve_forks(tests: socket.socket) -> bool:
    """Returns True in each fork, and False at the end of the tests."""
    children: dict[int, tuple[int, int]] = {}  # pidfd: pid, pipe for its exit code
    while True:
        for ready in select.select([tests.fileno(), *children], [], [])[0]:
            if ready != tests.fileno():
                report_exit(ready, *children.pop(ready))
                continue
            length, fds, _, _ = socket.recv_fds(tests, 4, 2)
            if not length:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return False
            message = tests.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            start: dict[str, Any] = json.loads(message)
            output, exit_code = fds
            pid = os.fork()
            if not pid:
                for fd in (exit_code, *children, *(fd for _, fd in children.values())):
                    os.close(fd)
                tests.close()
                set_up(output, **start)
                return True
            os.close(output)
            children[os.pidfd_open(pid)] = pid, exit_code
            tests.sendall(pid.to_bytes(4, "big"))


def set_up(output: int, arguments: list[str], cwd: str) -> None:
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.chdir(cwd)
    sys.argv[1:] = arguments


def report_exit(pidfd: int, pid: int, pipe: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with contextlib.suppress(BrokenPipeError):  # the tests have closed it
        os.write(pipe, code.to_bytes(4, "big", signed=True))
    os.close(pipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
