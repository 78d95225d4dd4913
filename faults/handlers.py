"""The bench's handlers: each records its start and its end.

A payload is "KEY MILLISECONDS"; the answer is "WORKER KEY". The file is opened at import, so that a
process without a free file descriptor or disk space can still write.
"""

# mypy: disable-error-code="no-untyped-def"
# With annotations they would be typed handlers.

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

from faults.history import FOLDER

_numbers = itertools.count()
_folder = Path(os.environ.get(FOLDER, "."))
_notes = -1
if FOLDER in os.environ:
    _path = _folder / "executions" / f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
    _notes = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def work(payload, context):
    with recorded(payload, context) as (key, nap_s):
        _nap(nap_s, _degradation(context.process_id))
        return f"{context.process_id} {key}".encode()


def raises(payload, context):
    with recorded(payload, context):
        raise RuntimeError("on purpose")


def exits(payload, context):
    with recorded(payload, context):
        sys.exit(3)


def wrong_type(payload, context):
    with recorded(payload, context):
        return 3.5


def prints(payload, context):
    """Prints 200 kB to stdout and to stderr."""
    with recorded(payload, context) as (key, _):
        for stream in (sys.stdout, sys.stderr):
            print("x" * 200_000, file=stream, flush=True)
        return f"{context.process_id} {key}".encode()


def large(payload, context):
    """The same answer, with blanks behind it that make several chunks."""
    with recorded(payload, context) as (key, nap_s):
        yield f"{context.process_id} {key}".encode()
        for _ in range(3):
            _nap(nap_s / 3, _degradation(context.process_id))
            yield b" " * 200_000


@contextmanager
def recorded(payload, context) -> Iterator[tuple[int, float]]:
    """Records the start before anything else, and the end whatever happens."""
    key, nap_ms = payload.split()
    run = f"{os.getpid()}-{next(_numbers)}"
    _note(
        run=run,
        key=int(key),
        worker=context.process_id,
        begin=time.monotonic(),
        attempt=context.attempt,
        deadline=context.deadline,
    )
    try:
        yield int(key), int(nap_ms) / 1000
    finally:
        _note(run=run, end=time.monotonic())


def _note(**fields) -> None:
    os.write(_notes, (json.dumps(fields) + "\n").encode())  # one write, so that lines stay whole


def _degradation(worker: str) -> dict[str, Any]:
    try:
        how: dict[str, Any] = json.loads((_folder / f"degraded-{worker}.json").read_text())
    except (OSError, ValueError):  # none, or it is just being removed
        return {}
    return how


def _nap(nap_s: float, how: dict[str, Any]) -> None:
    until = time.monotonic() + nap_s * how.get("slower", 1)
    if random.random() < how.get("hangs", 0):
        until = time.monotonic() + how["hang_s"]
    while (left := until - time.monotonic()) > 0:  # cancelled or not
        time.sleep(min(left, 0.05))
