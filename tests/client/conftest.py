"""The overlay that the tests of both clients use, and the handlers that record their runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import Overlay, running, six_processes, until

# Each handler records its runs in a file of its own process, so that a test can count them.
HANDLERS = '''
import os, time

def _note(context, payload):
    with open(f"{context.options['notes']}.{context.process_id}", "ab") as file:
        file.write(payload + b"\\n")

def upper(payload, context):
    _note(context, payload)
    return payload.upper()

def picky(payload, context):
    if payload.startswith(b"bad"):
        raise ValueError(payload)
    return payload

def patient(payload, context):
    """Runs for that many seconds or until cancelled, and records which."""
    _note(context, b"began")
    until = time.monotonic() + float(payload)
    while (left := until - time.monotonic()) > 0 and not context.cancelled:
        time.sleep(min(left, 0.05))  # hundreds of them run at a time
    _note(context, b"cancelled" if context.cancelled else b"done")
    return b"done"

def timed(payload, context):
    """Runs for that many seconds and records its start and end, by the clock of the machine."""
    began = time.monotonic_ns()
    time.sleep(float(payload))
    _note(context, b"%d %d" % (began, time.monotonic_ns()))
    return payload
'''


def handlers(notes: Path, **more: Any) -> dict[str, Any]:
    names = ("upper", "picky", "patient", "timed")
    return {n: {"call": f"mine:{n}", "options": {"notes": str(notes)}, **more} for n in names}


class Noted:
    """An overlay, and what its handlers recorded."""

    def __init__(self, found: Overlay, notes: Path) -> None:
        self.overlay = found
        self._notes = notes

    def address(self, process_id: str) -> str:
        return self.overlay.address(process_id)

    def lines(self) -> Counter[str]:
        paths = self._notes.parent.glob(f"{self._notes.name}.*")
        return Counter(line for path in paths for line in path.read_text().splitlines())

    def forget(self) -> None:
        for path in self._notes.parent.glob(f"{self._notes.name}.*"):
            path.unlink()

    def at_work(self) -> int:
        return sum(h.active for w in "CDF" for h in self.overlay.metrics(w).handlers)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noted]:
    folder = tmp_path_factory.mktemp("overlay")
    notes = tmp_path_factory.mktemp("notes") / "notes"
    (folder / "mine.py").write_text(HANDLERS)
    with running(folder, six_processes(handlers=handlers(notes))) as found:
        yield Noted(found, notes)


@pytest.fixture
def six(shared: Noted) -> Iterator[Noted]:
    shared.forget()
    yield shared
    until(lambda: not shared.at_work(), 10, "the handlers end")


@pytest.fixture
def own(shared: Noted) -> Iterator[Noted]:
    """The same six for a test that ends some: what it ended is started again afterwards."""
    shared.forget()
    yield shared
    found = shared.overlay
    if ended := [i for i, process in found.processes.items() if process.poll() is not None]:
        found.start(*ended)
    until(lambda: not shared.at_work(), 20, "the handlers end")


def numbers(count: int) -> list[bytes]:
    return [b"n%d" % n for n in range(count)]


def uppers(count: int) -> list[bytes]:
    return [b"N%d" % n for n in range(count)]
