"""The handlers of the bench: each writes down when it begins and when it ends.

A payload is "KEY MILLISECONDS"; the answer is "WORKER KEY". The file is opened when the module is
imported, so that a process without a free file descriptor or disk can still write.
"""

# mypy: disable-error-code="no-untyped-def"
# Annotations would make typed handlers of them.

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "FAULTS_FOLDER"  # the environment's name for where notes and moods lie

_numbers = itertools.count()
_folder = Path(os.environ.get(FOLDER, "."))
_notes = -1
if FOLDER in os.environ:
    _path = _folder / "executions" / f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
    _notes = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def work(payload, context):
    """Takes its time and answers."""
    with noted(payload, context) as (key, nap_s):
        _nap(nap_s, _mood(context.process_id), context)
        return f"{context.process_id} {key}".encode()


def raises(payload, context):
    with noted(payload, context):
        raise RuntimeError("on purpose")


def exits(payload, context):
    with noted(payload, context):
        sys.exit(3)


def wrong_type(payload, context):
    with noted(payload, context):
        return 3.5


def prints(payload, context):
    """Says 200 kB on stdout and on stderr, then answers."""
    with noted(payload, context) as (key, _):
        for stream in (sys.stdout, sys.stderr):
            print("x" * 200_000, file=stream, flush=True)
        return f"{context.process_id} {key}".encode()


@contextmanager
def noted(payload, context) -> Iterator[tuple[int, float]]:
    """Writes that it ran, before anything else, and that it has ended, whatever happens."""
    key, nap_ms = payload.split()
    run = f"{os.getpid()}-{next(_numbers)}"
    _note(
        run=run,
        key=int(key),
        worker=context.process_id,
        begin=time.monotonic(),
        attempt=context.attempt,
        told=context.deadline,
    )
    try:
        yield int(key), int(nap_ms) / 1000
    finally:
        _note(run=run, end=time.monotonic())


def _note(**fields) -> None:
    os.write(_notes, (json.dumps(fields) + "\n").encode())  # one write: a kill cuts at a line


def _mood(worker: str) -> dict[str, Any]:
    path = _folder / f"mood-{worker}.json"
    if not path.exists():
        return {}
    try:
        mood: dict[str, Any] = json.loads(path.read_text())
        return mood
    except (OSError, ValueError):  # it is being taken away
        return {}


def _nap(nap_s: float, mood: dict[str, Any], context) -> None:
    until = time.monotonic() + nap_s * mood.get("slower", 1)
    if random.random() < mood.get("hangs", 0):
        until = time.monotonic() + mood["hang_s"]
    while (left := until - time.monotonic()) > 0 and not (context.cancelled and mood.get("heeds")):
        time.sleep(min(left, 0.05))
