"""Other Python versions on this machine, with the packages of requirements.lock.

`found` finds them, and `ready` makes a virtual environment for one, outside the project. That takes
0.4 s, or 2 s with downloads, and is repeated only when the lock file changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness.cluster import ROOT

OLDEST, NEWEST = 10, 19  # Python 3.x: the oldest supported version, and one far ahead
LOCK = ROOT / "requirements.lock"
ASK = "import sys; print(*sys.version_info[:3], sep='.')"


def found() -> dict[str, Path]:
    """This Python, those on the path and pyenv's, by version ("3.12"), oldest first."""
    pythons: dict[str, Path] = {_minor(_version(Path(sys.executable))): Path(sys.executable)}
    for path in _candidates():
        version = _version(path)
        if version:
            pythons.setdefault(_minor(version), path)
    return dict(sorted(pythons.items(), key=lambda item: int(item[0].partition(".")[2])))


def ready(python: Path) -> Path:
    """The interpreter of its virtual environment. Raises CalledProcessError."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overlay-tests"
    venv = home / digest / _version(python)
    if not venv.exists():
        for old in home.glob("*"):
            if old.name != digest:
                shutil.rmtree(old, ignore_errors=True)
        venv.parent.mkdir(parents=True, exist_ok=True)
        # All or nothing; another run may make the same one meanwhile.
        making = Path(tempfile.mkdtemp(prefix="making-", dir=venv.parent))
        _make(python, making)
        with contextlib.suppress(OSError):
            os.replace(making, venv)
        shutil.rmtree(making, ignore_errors=True)
    return venv / "bin" / "python"


def _candidates() -> list[Path]:
    names = [f"python3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    return [
        *(Path(path) for name in names if (path := shutil.which(name))),
        *(path for name in names for path in sorted(pyenv.glob(f"*/bin/{name}"))),
    ]


def _version(python: Path) -> str:
    """For example "3.12.1"; empty if it does not run."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _minor(version: str) -> str:
    return version.rpartition(".")[0]


def _make(python: Path, folder: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    quiet = ["--quiet", "--no-config"]
    pins = ["--require-hashes", "--no-deps", "-r", str(LOCK)]
    for command in (
        [*uv, "venv", *quiet, "--clear", "--python", str(python), str(folder)],
        [*uv, "pip", "install", *quiet, "--python", str(folder / "bin" / "python"), *pins],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
