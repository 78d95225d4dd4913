"""The programs of people, run in the tests' own process: what they print, and their exit code.

Starting Python and importing gRPC takes longer than what most verbs do. A test of standard streams,
of signals or of the start itself needs a process: tests.harness.commands. Used by one thread at a
time, because the folder, the standard streams and the signals are the whole process's.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from overlay.cli import main
from tests.harness.cluster import ROOT


def client(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """client.py with these words, in this folder."""
    return ran(main.main, "client.py", *words, folder=folder)


def ran(
    program: Callable[[], int], *words: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """words: the program's name and its arguments. It must not end with a traceback."""
    output, errors = io.BytesIO(), io.BytesIO()
    stdout, stderr = (io.TextIOWrapper(kept, "utf-8", newline="") for kept in (output, errors))
    argv = list(map(str, words))
    with (
        _as_program(argv, folder),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            code = program()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        finally:
            stdout.flush()
            stderr.flush()
    said = [kept.getvalue().decode() for kept in (output, errors)]
    return subprocess.CompletedProcess(argv, code, *said)


@contextlib.contextmanager
def _as_program(argv: list[str], folder: Path) -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()  # others cannot set signals
    signals = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if is_main else ()
    names = [name for name in signals if hasattr(signal, name)]
    actions = {name: signal.getsignal(getattr(signal, name)) for name in names}
    before, where = sys.argv, Path.cwd()
    sys.argv = argv
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(where)
        sys.argv = before
        for name, action in actions.items():
            signal.signal(getattr(signal, name), action)
