"""Other Pythons of this machine, each with the packages that the project needs, for the tests.

`found` looks for them, `ready` gives one a virtual environment of what requirements.lock pins. It
takes 0.4 s to make, or 2 s where the packages must be fetched, lies outside of the project, and
serves until the lock file changes.
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

OLDEST, NEWEST = 10, 19  # of Python 3: what the project runs on, and what may be there one day
LOCK = ROOT / "requirements.lock"
ASK = "import sys; print(*sys.version_info[:3], sep='.')"


def found() -> dict[str, Path]:
    """By version as in "3.12", the oldest first: this Python, those on the path, and pyenv's."""
    pythons: dict[str, Path] = {_minor(_version(Path(sys.executable))): Path(sys.executable)}
    for path in _candidates():
        version = _version(path)
        if version:
            pythons.setdefault(_minor(version), path)
    return dict(sorted(pythons.items(), key=lambda item: int(item[0].partition(".")[2])))


def ready(python: Path) -> Path:
    """The Python of its virtual environment. Raises CalledProcessError when that cannot be made."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overlay-tests"
    venv = home / digest / _version(python)
    if not venv.exists():
        for old in home.glob("*"):
            if old.name != digest:
                shutil.rmtree(old, ignore_errors=True)
        venv.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all; one that another run has made meanwhile is as good.
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
    """As in "3.12.1"; empty when it does not run."""
    try:
        said = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()


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
