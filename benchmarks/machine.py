"""What the figures depend on: the machine, its system, the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from benchmarks import peers
from tests.harness.machine import ROOT


def facts() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in psutil.getloadavg()],
        "commit": commit(),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def commit() -> str:
    """The project's commit, with a + when files differ from it; empty outside a clone."""
    head = _output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    is_changed = head and _output_of("git", "-C", str(ROOT), "status", "--porcelain")
    return head + ("+" if is_changed else "")


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of every package and server of these peers that is installed."""
    found: dict[str, str] = {}
    for module in map(peers.load, names):
        for package in module.PACKAGES:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        if not module.missing() and hasattr(module, "versions"):
            found.update(module.versions())
    return dict(sorted(found.items()))


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
