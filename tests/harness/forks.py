"""Fast starts of node.py, client.py and others: forks of a process that has already imported them.

Most of a start is imports (0.3 s of CPU), and the tests start more than a thousand processes. A
`ForkServer` has run a script, as a main program, up to its last statement; each fork runs that
statement with its own arguments, folder and standard streams. Linux only: elsewhere, and for other
environments or commands than the tests' own, the harness starts Python as usual.

Run as a program, this file is that process. It exits with the tests and kills its forks then. It
has no threads, because they do not survive a fork.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LINUX = sys.platform == "linux"


class ForkServer:
    """Forks processes of one script."""

    def __init__(
        self,
        script: Path,
        environment: dict[str, str],
        inside: Sequence[str] = (),
        modules: Sequence[str] = (),
    ) -> None:
        """inside: a command prefix that runs the server elsewhere, for example in a namespace.

        modules: what the script imports only when it needs it.
        """
        self.environment = environment
        self._lock = threading.Lock()
        self._socket, its_socket = socket.socketpair()
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__, str(its_socket.fileno()), str(script), *modules],
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
        """stdout has both outputs, as text, and there is no input."""
        output, its_output = os.pipe()
        pid, exit_code = self._fork(arguments, cwd, {1: its_output, 2: its_output})
        return Fork(pid, exit_code, os.fdopen(output, encoding="utf-8"))

    def start_into(
        self, arguments: list[str], cwd: Path, file: IO[Any], environment: dict[str, str]
    ) -> Fork:
        """Both outputs go to the file. environment: on top of the server's own."""
        output = os.dup(file.fileno())
        pid, exit_code = self._fork(arguments, cwd, {1: output, 2: output}, environment)
        return Fork(pid, exit_code, None)

    def start_apart(self, arguments: list[str], cwd: Path) -> ForkApart:
        """Each standard stream is a pipe, with bytes."""
        its_input, to_input = os.pipe()
        (output, its_output), (errors, its_errors) = os.pipe(), os.pipe()
        streams = {0: its_input, 1: its_output, 2: its_errors}
        pid, exit_code = self._fork(arguments, cwd, streams)
        return ForkApart(pid, exit_code, to_input, output, errors)

    def _fork(
        self,
        arguments: list[str],
        cwd: Path,
        streams: dict[int, int],
        environment: dict[str, str] | None = None,
    ) -> tuple[int, int]:
        """Returns the pid, and a pipe that gets the exit code. Closes the ends of the fork."""
        exit_code, its_exit_code = os.pipe()
        start: dict[str, Any] = {"standard": list(streams), "arguments": arguments}
        start |= {"cwd": str(cwd), "environment": environment or {}}
        message = json.dumps(start).encode()
        size = len(message).to_bytes(4, "big")
        with self._lock:
            socket.send_fds(self._socket, [size], [its_exit_code, *streams.values()])
            self._socket.sendall(message)
            pid = int.from_bytes(self._socket.recv(4, socket.MSG_WAITALL), "big")
        for fd in {its_exit_code, *streams.values()}:
            os.close(fd)
        assert pid, "the fork server has ended"
        return pid, exit_code


class Fork:
    """One forked process: the part of subprocess.Popen with stdout=PIPE that the tests use."""

    stdin: IO[Any] | None = None
    stderr: IO[Any] | None = None

    def __init__(self, pid: int, exit_code: int, stdout: IO[Any] | None) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = stdout
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


class ForkApart(Fork):
    """Like subprocess.Popen with a pipe for each standard stream."""

    def __init__(self, pid: int, exit_code: int, stdin: int, stdout: int, stderr: int) -> None:
        super().__init__(pid, exit_code, os.fdopen(stdout, "rb"))
        self.stdin, self.stderr = os.fdopen(stdin, "wb"), os.fdopen(stderr, "rb")

    def communicate(self, input_: bytes = b"", timeout: float | None = None) -> tuple[bytes, bytes]:
        from concurrent.futures import ThreadPoolExecutor  # not in the fork server's process

        with self, ThreadPoolExecutor(3) as pool:
            pool.submit(self._send, input_)
            output, errors = (pool.submit(pipe.read) for pipe in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return output.result(), errors.result()

    def __enter__(self) -> ForkApart:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pipes, and waits for the end of the process."""
        self._send(b"")
        self.stdout.close()
        self.stderr.close()
        self.wait()

    def _send(self, text: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # it, or this side, has closed it
            try:
                self.stdin.write(text)
            finally:
                self.stdin.close()


# The fork server's process


def main(fd: str, script: str, *modules: str) -> None:
    tests = socket.socket(fileno=int(fd))
    sys.path[0], sys.argv = str(Path(script).parent), [script]
    program = ast.parse(Path(script).read_text(encoding="utf-8"), script)
    last = program.body.pop()
    assert isinstance(last, ast.If), f"{script} does not end with `if __name__ == ...`"
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = script
    exec(compile(program, script, "exec"), module.__dict__)
    run = compile(ast.Module([last], []), script, "exec")
    for name in modules:
        importlib.import_module(name)
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
            length, fds, _, _ = socket.recv_fds(tests, 4, 4)
            if not length:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return False
            message = tests.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            start: dict[str, Any] = json.loads(message)
            exit_code, *streams = fds
            pid = os.fork()
            if not pid:
                for fd in (exit_code, *children, *(fd for _, fd in children.values())):
                    os.close(fd)
                tests.close()
                set_up(streams, **start)
                return True
            for fd in streams:
                os.close(fd)
            children[os.pidfd_open(pid)] = pid, exit_code
            tests.sendall(pid.to_bytes(4, "big"))


def set_up(
    streams: list[int],
    standard: list[int],
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.environ.update(environment)
    for fd, number in zip(streams, standard, strict=True):
        os.dup2(fd, number)
        os.close(fd)
        reopen(number)
    os.chdir(cwd)
    sys.argv[1:] = arguments


def reopen(number: int) -> None:
    """As at a start: the stream that Python opened first takes this pipe for what it was then."""
    name = ("stdin", "stdout", "stderr")[number]
    old, buffering = getattr(sys, name), 1 if number == 2 else -1  # of lines, as Python has it
    mode, encoding = "w" if number else "r", old.encoding
    new = open(number, mode, buffering, encoding, old.errors, "\n", closefd=False)  # noqa: SIM115
    setattr(sys, name, new)
    setattr(sys, f"__{name}__", new)


def report_exit(pidfd: int, pid: int, pipe: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with contextlib.suppress(BrokenPipeError):  # the tests have closed it
        os.write(pipe, code.to_bytes(4, "big", signed=True))
    os.close(pipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
