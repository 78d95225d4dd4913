"""NATS with uvloop, which nats-py's own benchmarks use where it is installed (not on Windows)."""

from __future__ import annotations

from benchmarks.children import Group
from benchmarks.peers import lacking, nats_queue
from benchmarks.rows import Setup

TITLE = "NATS, uvloop"
PACKAGES = ("nats-py", "uvloop")
SUPPORTS = nats_queue.SUPPORTS
BULK = nats_queue.BULK
NOTES = "As NATS, with the event loop that nats-py's own benchmarks use when it is there."
Caller = nats_queue.Caller
worker = nats_queue.worker
versions = nats_queue.versions


def missing() -> str:
    return nats_queue.missing() or lacking("uvloop")


def start(group: Group, setup: Setup) -> dict:
    return nats_queue.start(group, setup, loop="uvloop")
