"""The overlay without direct lanes: every request over the leader."""

from __future__ import annotations

from benchmarks.children import Group
from benchmarks.peers import ours
from benchmarks.peers.ours import BULK, Caller, missing
from benchmarks.rows import Setup

__all__ = ["BULK", "Caller", "missing"]

TITLE = "ours, without lanes"
PACKAGES = ours.PACKAGES
SUPPORTS = {"window", "threads", "bulk"}
NOTES = "The same, connected with `lanes=False`. Not a peer but what lanes gain."


def start(group: Group, setup: Setup) -> dict:
    return {**ours.start(group, setup), "lanes": False}
