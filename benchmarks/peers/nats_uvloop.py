"""NATS with uvloop, which nats-py's own benchmarks use if it is installed (not on Windows)."""

from __future__ import annotations

from benchmarks.children import Group
from benchmarks.peers import nats_queue, not_installed
from benchmarks.rows import Setup

TITLE = "NATS, uvloop"
PACKAGES = ("nats-py", "uvloop")
SUPPORTS = nats_queue.SUPPORTS
BULK = nats_queue.BULK
NOTES = "As NATS, with the event loop that nats-py's own benchmarks use if it is installed."
Caller = nats_queue.Caller
worker = nats_queue.worker
versions = nats_queue.versions


def missing() -> str:
    return nats_queue.missing() or not_installed("uvloop")


def start(group: Group, setup: Setup) -> dict:
    return nats_queue.start(group, setup, loop="uvloop")
