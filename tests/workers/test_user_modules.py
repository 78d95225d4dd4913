"""The user's modules beside the configuration file: their names, and edits while a worker runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from overlay.model.errors import ConfigError
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.workers import api, user_modules
from overlay.workers.executor import Executor
from tests.harness.cluster import ROOT, Overlay, free_port, until

RUNS = ("thread", "process")

# Names of the standard library's modules, those that a new process imports first included, of
# installed ones and of ours. None of them can be imported.
HIDDEN = ("random", "logging", "queue", "json", "psutil", "grpc", "overlay", "overlay_pb2")
AT_THE_START = ("signal", "socket", "pickle", "selectors", "struct", "subprocess")
if sys.version_info >= (3, 11):
    HIDDEN += AT_THE_START

MINE = """
import json, os, queue, random
import helper, package

def version(payload, context):
    import later
    from package import deep
    versions = 1, helper.VERSION, later.VERSION, package.VERSION, deep.VERSION
    if payload == b"exit": os._exit(1)
    return json.dumps(versions).encode()
"""

CLIENT = """
import multiprocessing, os

def half(n):
    return n / 2

def who(payload, context):
    return __file__.encode()

def pool(payload, context):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return repr(pool.map(half, [2, 4])).encode()
"""

LOUD = """
import logging, logging.config

CONFIG = {"version": 1, "root": {"level": "CRITICAL"}}

def silence():
    logging.config.dictConfig(CONFIG)
    logging.disable(logging.CRITICAL)
    logging.basicConfig(force=True, level=logging.CRITICAL)

silence()

def fails(payload, context):
    silence()
    context.log.info("%s", "said " + payload.decode())
    raise ValueError("why " + payload.decode())
"""


def one_worker(calls: dict[str, str]) -> dict[str, object]:
    """Worker C alone, with each of these functions on threads and in processes."""
    roles = {"A": ("leader", "B"), "B": ("team_leader", "AC"), "C": ("worker", "B")}
    processes = {
        name: {"id": name, "role": role, "team": "t", "neighbors": list(neighbors)}
        for name, (role, neighbors) in roles.items()
    }
    for process in processes.values():
        process.update(host="127.0.0.1", port=free_port())
    given = {
        f"{name}-{run}": {"call": call, "run": run, "slots": 1}
        for name, call in calls.items()
        for run in RUNS
    }
    return {"processes": processes, "handlers": given}


def fill(folder: Path) -> None:
    for name in HIDDEN:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('this is the {name}.py of mine')")
    (folder / "mine.py").write_text(MINE)
    (folder / "client.py").write_text(CLIENT)
    (folder / "loud.py").write_text(LOUD)
    for name in ("helper", "later", "package/__init__", "package/deep"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text("VERSION = 1")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A worker whose folder has all of these files."""
    calls = {"mine": "mine:version", "who": "client:who", "pool": "client:pool"}
    config = one_worker({**calls, "loud": "loud:fails"})
    overlay = Overlay(tmp_path_factory.mktemp("folder"), config)
    fill(overlay.folder)
    try:
        yield overlay.start("C")
    finally:
        overlay.stop()


@pytest.mark.parametrize("run", RUNS)
def test_modules_in_the_folder_do_not_replace_standard_or_installed_ones(worker, run):
    assert json.loads(worker.ask("C", handler=f"mine-{run}").result) == [1] * 5


@pytest.mark.parametrize("run", RUNS)
def test_a_module_of_the_folder_may_have_the_name_of_a_program_file(worker, run):
    found = worker.ask("C", handler=f"who-{run}").result.decode()

    assert os.path.realpath(found) == os.path.realpath(worker.folder / "client.py")


@pytest.mark.parametrize("run", RUNS)
def test_processes_spawned_by_a_handler_find_its_module(worker, run):
    assert worker.ask("C", handler=f"pool-{run}", timeout=30).result == b"[1.0, 2.0]"


@pytest.mark.parametrize("run", RUNS)
def test_whatever_a_module_does_to_logging_the_error_id_is_in_the_log(worker, run):
    with pytest.raises(grpc.RpcError) as raised:
        worker.ask("C", run.encode(), handler=f"loud-{run}")

    (error_id,) = re.findall(r"error id (\w+)", raised.value.details())
    line = re.compile(f"ERROR request [0-9a-f]+: error id {error_id}.*ValueError: why {run}")
    until(lambda: line.search(worker.log("C")), what="the error id in the log")
    assert re.search(f"INFO request [0-9a-f]+: .*said {run}$", worker.log("C"), re.MULTILINE)


def test_edited_modules_take_effect_at_the_next_start(worker):
    for name in ("helper", "later", "package/__init__", "package/deep"):
        (worker.folder / f"{name}.py").write_text("VERSION = 2")
    (worker.folder / "mine.py").write_text("def version(payload, cont")  # half-written
    with pytest.raises(grpc.RpcError):
        worker.ask("C", b"exit", handler="mine-process")

    for run in RUNS:
        assert json.loads(worker.ask("C", handler=f"mine-{run}").result) == [1] * 5


class Copied(Overlay):
    """The whole program in the same folder as the configuration, as beginners have it."""

    def _node(self, process_id: str) -> list[str]:
        return [sys.executable, str(self.folder / "node.py"), self.path.name, process_id]


def test_modules_beside_the_program_do_not_replace_standard_or_installed_ones(tmp_path):
    copied = Copied(tmp_path / "all of it", one_worker({"mine": "mine:version"}))
    fill(copied.folder)
    ours = ("node.py", "client.py", "test_system.py", "overlay_pb2.py", "overlay_pb2_grpc.py")
    for name in ours:
        shutil.copy(ROOT / name, copied.folder)
    (copied.folder / "overlay.py").unlink()
    shutil.copytree(ROOT / "overlay", copied.folder / "overlay")
    shutil.copytree(ROOT / "scripts", copied.folder / "scripts")
    try:
        copied.start("C")
        for run in RUNS:
            assert json.loads(copied.ask("C", handler=f"mine-{run}").result) == [1] * 5
        for command in (
            ["client.py", "127.0.0.1", str(copied.port("C"))],
            ["scripts/launcher.py", "status", "overlay.json"],
        ):
            asked = subprocess.run(
                [sys.executable, *command],
                cwd=copied.folder,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert "Traceback" not in asked.stderr, asked.stderr
            assert "C" in asked.stdout
    finally:
        copied.stop()


# A shadowed module is an error that names both files, on threads and in processes.


@pytest.fixture
def path() -> Iterator[None]:
    before, finders = list(sys.path), list(sys.meta_path)
    yield
    sys.path[:], sys.meta_path[:] = before, finders


NAMED = {
    "random:choice": random.__file__,
    "json:loads": json.__file__,
    "psutil:wait_procs": psutil.__file__,
    "time:sleep": "built into Python",
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("call", NAMED)
def test_a_shadowed_handler_module_is_reported_with_both_files(tmp_path, path, call, run):
    name, _, function = call.partition(":")
    own = tmp_path / f"{name}.py"
    own.write_text(f"def {function}(payload, context): return payload")

    with pytest.raises(ConfigError) as raised:
        executor_of(tmp_path, call, run)

    where = f"is {NAMED[call]}, which comes before {own}: give that another name"
    assert str(raised.value) == f"handler 'h': module '{name}' {where}"


@pytest.mark.parametrize("run", RUNS)
def test_a_file_shadowed_by_a_standard_module_is_named(tmp_path, path, run):
    (tmp_path / "queue.py").write_text("def shout(): pass")
    (tmp_path / "wants.py").write_text("import queue\nqueue.shout()")

    with pytest.raises(ConfigError) as raised:
        executor_of(tmp_path, "wants:h", run)

    assert f"{tmp_path / 'queue.py'} has the name of another module" in str(raised.value)


def executor_of(folder: Path, call: str, run: str) -> Executor:
    worker = Process("W", "worker", "green", "h", 1)
    specs = {"h": HandlerSpec("h", call, run=run, slots=1)}
    return Executor(Topology({"W": worker}, specs, folder=folder), worker)


def test_the_folder_is_on_the_path_once_and_before_only_the_program_folder(
    tmp_path, path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(ROOT), "library", str(tmp_path), "installed"])

    api.add_folder(tmp_path)
    api.add_folder(tmp_path)

    assert sys.path == ["library", "installed", str(tmp_path), str(ROOT)]
    assert sum(isinstance(finder, user_modules.Sources) for finder in sys.meta_path) == 1


@pytest.mark.parametrize(
    ("importer", "text", "kept"),
    [
        ("one", "def f():\n import two, os", {"two"}),
        ("one", "import far.away", {"far", "far.away"}),
        ("one", "from far import away, nothing", {"far", "far.away"}),
        ("far", "from . import away\nfrom .. import beyond", {"far.away"}),
        ("far.away", "from .near import x", {"far", "far.near"}),
        ("one", "import plain.inner", {"plain.inner"}),
        ("one", "import broken, nowhere, random", set()),
        ("one", "import two, three", {"two", "three", "four"}),
    ],
)
def test_modules_imported_inside_functions_are_kept(tmp_path, importer, text, kept):
    for name in ("far", "plain"):
        (tmp_path / name).mkdir()
    for name in ("two", "four", "far/__init__", "far/away", "far/near", "plain/inner", "random"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "three.py").write_text("def f():\n import four")
    (tmp_path / "broken.py").write_text("def f(:")
    is_package = importer == "far"
    here = tmp_path.joinpath(*importer.split("."), *["__init__"] * is_package).with_suffix(".py")
    here.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        found = user_modules.Sources(tmp_path, {})
        found.add({importer: user_modules.Source(str(here), text.encode(), is_package)})
        found._followed.clear()

        found.keep_imported()

    assert found.kept.keys() - {importer} == kept - {importer}
