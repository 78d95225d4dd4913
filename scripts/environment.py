"""The project's environment: .venv beside it, the packages of its lock files, the generated code.

Works with a Python that has no packages; needs the network only for what is missing. run.py uses
it, and so do the benchmarks and the fault bench.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "overlay-setup.json"  # what is installed: the hash of each lock file
INSTALLING = VENV / "overlay-installing"  # there while pip works; left behind when it was killed
LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
NATS_LOCK = "requirements-nats.lock"  # only where several leaders keep jobs
STUBS = ("overlay_pb2.py", "overlay_pb2.pyi", "overlay_pb2_grpc.py")
NEEDED = ["grpc", "grpc_health", "grpc_reflection", "grpc_status", "google.protobuf"]
NEEDED += ["cryptography", "pydantic", "psutil", "rich", "starlette", "uvicorn"]
FOR_LAUNCHER = ["grpc", "google.protobuf", "google.rpc", "pydantic", "psutil", "rich"]

PROBE = """
import importlib.util, json, sys
def has(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
def protobuf():
    try:
        import google.protobuf
        return google.protobuf.__version__
    except ImportError:
        return ""
print(json.dumps({"python": list(sys.version_info[:2]), "protobuf": protobuf(),
                  "tools": has("grpc_tools"), "missing": [n for n in sys.argv[1:] if not has(n)]}))
"""
Facts = dict[str, Any]


class Problem(Exception):
    """Ends the command with this sentence and exit code 2."""


def prepare(locks: Sequence[str] = (LOCK,)) -> str:
    """The Python to run the project with, after its packages and the generated code are made."""
    with one_at_a_time():
        if not can_make_venv() and not VENV.exists():
            return own_python(locks)
        make_stubs(venv_python(), installed(made_venv(), locks))
    return venv_python()


def python_as_it_is() -> str | None:
    """A Python that can run the launcher, or None; installs nothing.

    So processes can be stopped offline too, whatever the lock file says by now.
    """
    for python in (venv_python(), sys.executable):
        facts = probe(python, *FOR_LAUNCHER)
        if facts and not facts["missing"]:
            make_stubs(python, facts)
            return python
    return None


def venv_python() -> str:
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def can_make_venv() -> bool:
    """Embedded Pythons have no venv; Debian keeps ensurepip in the package python3-venv."""
    return find_spec("venv") is not None and find_spec("ensurepip") is not None


def own_python(locks: Sequence[str]) -> str:
    """The Python that runs this, for systems where it cannot make a virtual environment."""
    needed = NEEDED + ["pytest", "xdist", "ruff", "mypy"] * (DEV_LOCK in locks)
    facts = probe(sys.executable, *needed) or {"missing": needed}
    if facts["missing"]:
        raise Problem(
            f"{sys.executable} cannot make a virtual environment and lacks "
            f"{', '.join(facts['missing'])}; install the package python3-venv (Debian, Ubuntu: "
            "sudo apt install python3-venv) or a full Python from python.org, or install "
            f"{' and '.join(locks)} into it"
        )
    make_stubs(sys.executable, facts)
    return sys.executable


def made_venv() -> Facts:
    """Facts of a .venv that works; one that is half made, or too old, is made again."""
    facts = probe(venv_python()) if VENV.exists() else None
    if facts and facts["python"] >= [3, 10] and is_whole():
        return facts
    if not can_make_venv():
        raise Problem(f"{VENV} does not work and this Python cannot make another")
    print(f"making .venv ({'again' if VENV.exists() else 'once'})", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(VENV)], f"could not make {VENV}")
    facts = probe(venv_python())
    if not facts:
        raise Problem(f"{venv_python()} was made but does not run")
    return facts


def is_whole() -> bool:
    """Whether the last set-up was completed. A .venv made by hand counts when its pip runs."""
    if INSTALLING.exists():
        return False
    call = [venv_python(), "-m", "pip", "--version"]
    quiet = subprocess.DEVNULL
    return STAMP.exists() or subprocess.call(call, stdout=quiet, stderr=quiet) == 0


def installed(facts: Facts, locks: Sequence[str]) -> Facts:
    """Brings the packages up to the lock files. Returns the facts as they are then."""
    done: Facts = {}
    with contextlib.suppress(OSError, ValueError):
        done = dict(json.loads(STAMP.read_text(encoding="utf-8")))
    if done.get("python") != facts["python"]:
        done = {"python": facts["python"]}
    changed = [name for name in locks if done.get(name) != digest(ROOT / name)]
    for name in changed:
        print(f"installing {name} (once; needs the network)", flush=True)
        pip_install(venv_python(), ROOT / name)
        done[name] = digest(ROOT / name)
    if changed:
        STAMP.write_text(json.dumps(done), encoding="utf-8")
        facts = probe(venv_python()) or facts
    return facts


def pip_install(python: str, lock_file: Path) -> None:
    """Installs exactly what a lock file pins. After a kill the next run makes .venv again."""
    command = [python, "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "-r", str(lock_file)]
    INSTALLING.touch()
    try:
        run(command, f"could not install {lock_file.name}; {install_advice()}")
    except Problem:
        INSTALLING.unlink()  # pip has put back what it had replaced
        raise
    INSTALLING.unlink()


def install_advice() -> str:
    machine = platform.machine()
    if os.name == "nt" and machine.upper() == "ARM64":
        return "gRPC has no package for Windows on ARM; install the 64-bit x86 Python, which works"
    return (
        "it needs the network (or a mirror set in pip's configuration) and a Python that gRPC "
        f"has packages for; this is {platform.python_version()} on {machine}"
    )


def add_pillow(python: str) -> None:
    """Installs Pillow for the demo's thumbnails; without the network there are none.

    Only Pillow's own lines of the long lock file are installed.
    """
    facts = probe(python, "PIL")
    if (facts and not facts["missing"]) or python != venv_python():
        return
    pins = re.findall(r"(?m)^pillow==.*(?:\n .*)*", (ROOT / DEV_LOCK).read_text(encoding="utf-8"))
    print("installing Pillow for the demo (once; needs the network)", flush=True)
    with one_at_a_time(), tempfile.TemporaryDirectory() as folder:
        only_pillow = Path(folder) / "pillow.lock"
        only_pillow.write_text("\n".join(pins) + "\n", encoding="utf-8")
        try:
            pip_install(python, only_pillow)
        except Problem as problem:
            print(f"{problem}\ngoing on without thumbnails", flush=True)


def make_stubs(python: str, facts: Facts) -> None:
    """Makes overlay_pb2*.py again unless they are of this overlay.proto and this protobuf."""
    proto = ROOT / "overlay.proto"
    mark = f"# from overlay.proto {digest(proto)} with protobuf {facts['protobuf']}\n"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if [(ROOT / name).read_text(encoding="utf-8") for name in STUBS][-1].endswith(mark):
            return
    if not facts["tools"]:
        if all((ROOT / name).exists() for name in STUBS):
            return  # copied here by hand; the codec says so if they do not fit
        raise Problem(
            f"the stubs of overlay.proto are missing and {python} has no grpcio-tools to make "
            f"them; copy {', '.join(STUBS)} from another machine with the same protobuf version"
        )
    # Beside the project, then moved: another program reads the old or the new, never a part.
    with tempfile.TemporaryDirectory(prefix=".stubs-", dir=ROOT) as folder:
        command = [python, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={folder}"]
        command += [f"--pyi_out={folder}", f"--grpc_python_out={folder}", "overlay.proto"]
        run(command, "could not make the stubs of overlay.proto")
        with Path(folder, STUBS[-1]).open("a", encoding="utf-8") as last:
            last.write(mark)
        for name in STUBS:
            os.replace(Path(folder, name), ROOT / name)
    print("made the stubs of overlay.proto")


def probe(python: str, *modules: str) -> Facts | None:
    """What a Python has, and which of the modules are missing; None when it does not run."""
    call = [python, "-c", PROBE, *modules]
    try:
        done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def run(command: Sequence[str], what: str) -> None:
    """Runs a step quietly. Raises Problem(what) after the end of its output when it fails."""
    pipe, null, out = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
    done = subprocess.run(command, cwd=ROOT, stdin=null, stdout=pipe, stderr=out)
    if done.returncode:
        last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
        raise Problem("\n".join([*(f"  {line}" for line in last), what]))


def hand_over(python: str, script: Path, arguments: Sequence[str]) -> int:
    """Runs the script in place of this process; on Windows, which cannot do that, waits for it."""
    command = [python, str(script), *arguments]
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(python, command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the child too, and this ends as the child does


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Set-ups wait for each other, or they would damage .venv. A killed one holds no lock."""
    (ROOT / "logs").mkdir(exist_ok=True)
    with (ROOT / "logs" / ".setup-lock").open("a") as handle:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.2)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str:
    # Line endings do not count: git may change them on Windows.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
