"""The overlay with certificates: the same six processes, mutual TLS on every connection."""

from __future__ import annotations

from benchmarks import rows
from benchmarks.children import Group
from benchmarks.peers import ours
from benchmarks.peers.ours import BULK, Caller, missing
from benchmarks.rows import Setup

__all__ = ["BULK", "Caller", "missing"]

TITLE = "ours, mutual TLS"
PACKAGES = ("grpcio", "cryptography")
SUPPORTS = {"window", "threads", "unary", "bulk", "all", "clients"}
SETUPS = ("three", "16 workers", "48 workers")
ROWS = (
    "threads-1",
    "threads-64",
    "unary-64",
    "window-64",
    "bulk",
    "all-threads-1",
    "all-window-64",
    "64k",
    "1m",
    *(row.name for row in rows.ROWS if row.clients > 1),
)
NOTES = "The same, with the certificates that `client.py secure` makes. Not a peer but a price."


def start(group: Group, setup: Setup) -> dict:
    from tests.harness import certificates  # here, because it imports cryptography

    config = {**ours.configuration(setup), "tls": "tls"}
    folder = certificates.secured(group.folder, config)
    return {**ours.serve(group, setup, config), "tls": str(folder.path)}
