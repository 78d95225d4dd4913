"""Programs as users write them, around a client: what docs/client.md says of each is what it does.

They are in tests/programs, and each runs as a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster import ROOT, Overlay, six_processes

PROGRAMS = ROOT / "tests" / "programs"
HANDLERS = """
import time

def slow(payload, context):
    until = time.monotonic() + float(payload)
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    return b"slept"
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One process is enough: C, whose default handler answers "C: " and the payload."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "mine.py").write_text(HANDLERS)
    found = Overlay(folder, six_processes(handlers={"slow": {"call": "mine:slow"}}))
    try:
        yield found.start("C").address("C")
    finally:
        found.stop()


def run(words: list[str], **env: str) -> list[str]:
    """The lines that a program prints; it ends by itself, and well."""
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_frozen_time_stops_no_verb(worker: str) -> None:
    words = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--timeout=40"]
    path = str(PROGRAMS / "frozen.py")
    said = run([sys.executable, *words, path], OVERLAY_ADDRESS=worker)

    assert "10 passed" in said[-1]
