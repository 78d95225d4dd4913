"""The wheel as a user has it: built from a clean clone, installed, and run from another folder.

It is installed twice: with the oldest packages that requirements.txt allows, and with the newest.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.cluster import ROOT, six_processes, tool, until

# A user's program, in a folder without anything from the clone.
PROGRAM = """
import sys, warnings
warnings.simplefilter("error")  # such as those of generated code that does not fit the protobuf
import overlay
with overlay.connect(sys.argv[1], patience_s=20) as leader:
    print(leader.call(b"hello", handler="shout", timeout=20).result.decode())
    print(*leader.map("shout", [b"one", b"two"]))
"""
MINE = 'def shout(payload, context):\n    return payload.upper() + b"!"\n'


def uv(*words: str | Path) -> str:
    """The output of uv. Without a network the test is skipped; in CI it fails."""
    program = tool("uv", "python3 scripts/run.py test")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=100)
    if done.returncode and ("error sending request" in done.stderr or "dns error" in done.stderr):
        reason = f"uv cannot reach a package index: {done.stderr.strip().splitlines()[-1]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def tracked_files() -> bytes:
    """The repository's files as they are now, without ignored ones, as a tar archive."""
    if not (ROOT / ".git").exists():
        pytest.skip("this folder is not a git repository")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in sorted(filter(None, names.split("\0"))):
            path = ROOT / name
            if path.is_file() and not path.is_symlink():
                archive.add(path, name)
    return packed.getvalue()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = tmp_path_factory.mktemp("packaging") / "a clean clone"
    clone.mkdir()
    with tarfile.open(fileobj=io.BytesIO(tracked_files())) as archive:
        archive.extractall(clone)
    assert not list(clone.glob("overlay_pb2*"))
    uv("build", "--quiet", "--wheel", "--out-dir", clone.parent, clone)
    (built,) = clone.parent.glob("*.whl")
    return built


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and a user's folder with a configuration."""

    programs: Path
    folder: Path
    config: dict

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        return subprocess.run(
            [self.programs / program, *rest],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def port(self, process_id: str) -> str:
        return str(self.config["processes"][process_id]["port"])


def serves(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", params=["lowest-direct", "highest"])
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """With a leader, a team leader and a worker running."""
    folder = tmp_path_factory.mktemp("user") / "my folder"
    folder.mkdir()
    venv = folder.parent / "venv"
    uv("venv", "--quiet", venv)
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    needed = folder.parent / "needed.txt"  # listed again, or `lowest-direct` would not cover them
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("overlay-0.1.0.dist-info/METADATA").decode()
    wanted = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    needed.write_text("\n".join(line.removeprefix("Requires-Dist: ") for line in wanted))
    uv(
        *("pip", "install", "--quiet", "--python", programs / "python"),
        *("--resolution", request.param, wheel, "-r", needed),
    )
    config = six_processes(handlers={"shout": "mine:shout"})
    config["processes"] = {i: config["processes"][i] for i in "ABC"}
    config["processes"]["A"]["neighbors"] = ["B"]
    config["processes"]["B"]["neighbors"] = ["A", "C"]
    (folder / "mine.py").write_text(MINE)
    (folder / "mine.json").write_text(json.dumps(config))
    here = Installed(programs, folder, config)
    nodes = [
        subprocess.Popen([programs / "overlay-node", "mine.json", i], cwd=folder) for i in "ABC"
    ]
    try:
        until(lambda: all(serves(int(here.port(i))) for i in "ABC"), 30, "all three serve")
        yield here
    finally:
        for node in nodes:
            node.terminate()
        codes = [node.wait(30) for node in nodes]
    assert codes == [0, 0, 0]


def test_the_wheel_contains_the_stubs_and_types_and_no_common_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    at_top = {name.partition("/")[0] for name in names}

    assert at_top == {
        "overlay",
        "overlay-0.1.0.dist-info",
        "overlay_pb2.py",
        "overlay_pb2.pyi",
        "overlay_pb2_grpc.py",
    }
    wanted = {"py.typed", "configuration.schema.json", "cli/page/index.html", "server/node.py"}
    assert {f"overlay/{name}" for name in wanted} <= names


def test_an_installed_overlay_answers_a_program_in_any_folder(installed: Installed) -> None:
    done = installed.run("python", "-c", PROGRAM, f"127.0.0.1:{installed.port('A')}")

    assert (done.stderr, done.stdout) == ("", "HELLO!\nb'ONE!' b'TWO!'\n")


def test_a_type_checker_sees_the_types_of_an_installed_overlay(installed: Installed) -> None:
    code = "from importlib.util import find_spec; print(find_spec('overlay').origin)"
    marker = Path(installed.run("python", "-c", code).stdout.strip()).with_name("py.typed")

    assert marker.is_file()
    assert installed.programs.parent in marker.parents


def test_a_handler_with_the_name_of_an_installed_package_is_rejected(installed: Installed) -> None:
    """The user's folder comes last on the path, also when everything is installed together."""
    other = six_processes(handlers={"h": "prometheus_client:h"}, log_dir="other logs")
    (installed.folder / "prometheus_client.py").write_text("def h(payload, context): ...\n")
    (installed.folder / "other.json").write_text(json.dumps(other))

    done = installed.run("overlay-node", "other.json", "C")

    assert done.returncode == 2
    assert "which comes before" in done.stderr, done.stderr


def test_the_installed_command_reaches_the_leader(installed: Installed) -> None:
    done = installed.run("overlay", "127.0.0.1", installed.port("A"), "check")

    assert done.returncode == 0, done.stderr
    assert "leader" in done.stdout
