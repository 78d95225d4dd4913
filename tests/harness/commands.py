"""client.py in the tests: a real process each time, forked where that makes no difference.

A test of terminals, signals, closed streams or imports starts Python itself.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from tests.harness.cluster import ROOT, environment
from tests.harness.forks import LINUX, ForkApart, ForkServer

CLIENT = ROOT / "client.py"
VERBS = ("ask", "cancel", "check", "doctor", "drain", "handlers", "init", "jobs", "logs", "map")
VERBS += ("quarantine", "result", "submit", "top", "web")
CLIENT_MODULES = ("overlay.cli.terminal", *(f"overlay.cli.{verb}" for verb in VERBS))


def start_client(*words: object, **env: str) -> subprocess.Popen[bytes] | ForkApart:
    """Starts client.py with a pipe for each standard stream. env: on top of the tests' own."""
    arguments, wanted = list(map(str, words)), {**environment(), **env}
    if LINUX and (server := _fork_server()).environment == wanted:
        return server.start_apart(arguments, Path.cwd())
    return subprocess.Popen(
        [sys.executable, str(CLIENT), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=wanted,
    )


def run_client_on_bytes(
    *words: object, stdin: bytes = b"", timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs client.py to its end. It must not end with a traceback."""
    with start_client(*words, **env) as process:
        output, errors = process.communicate(stdin, timeout)
    assert b"Traceback" not in errors, errors.decode(errors="replace")
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(words), process.returncode, output, errors)


def run_client(
    *words: object, stdin: bytes = b"", timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """The same with its output as text."""
    done = run_client_on_bytes(*words, stdin=stdin, timeout=timeout, **env)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    output, errors = (said.decode(encoding) for said in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, output, errors)


@functools.cache
def _fork_server() -> ForkServer:
    return ForkServer(CLIENT, environment(), modules=CLIENT_MODULES)
