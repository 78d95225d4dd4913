"""Processes that a handler starts: they work, and end with their request or their worker."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.harness.cluster import Overlay, until
from tests.workers.test_user_modules import RUNS, one_worker

STARTS = '''
import multiprocessing, os, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]
kept = []

def pid(_=None):
    time.sleep(0.2)  # otherwise one process of a pool would do all the work
    return os.getpid()

def talk(notes):
    time.sleep(0.2)  # until its request is over
    print("is there anybody?")
    with open(notes, "w") as file: file.write("said")
    time.sleep(120)

def nothing():
    time.sleep(120)

def start(payload, context):
    """Starts what the payload says, and leaves it running; returns the pids."""
    what = payload.decode()
    if what == "pool":
        kept.append(multiprocessing.Pool(2))
        return repr(kept[-1].map(pid, range(4), 1)).encode()
    if what == "other pool":
        other = "spawn" if multiprocessing.get_start_method() == "fork" else "fork"
        kept.append(multiprocessing.get_context(other if hasattr(os, "fork") else "spawn").Pool(1))
        return repr(kept[-1].map(pid, range(1))).encode()
    if what == "executor":
        kept.append(ProcessPoolExecutor(1))
        number = kept[-1].submit(pid).result()
        kept[-1].submit(nothing)
        return repr([number]).encode()
    if what == "program":
        kept.append(subprocess.Popen(SLEEP))
        return repr([kept[-1].pid]).encode()
    if what == "session":
        kept.append(subprocess.Popen(SLEEP, start_new_session=True))
        return repr([kept[-1].pid]).encode()
    if what in ("daemon", "process"):
        kept.append(multiprocessing.Process(target=nothing, daemon=what == "daemon"))
        kept[-1].start()
        return repr([kept[-1].pid]).encode()
    if what.endswith("talks"):
        fork = multiprocessing.get_context("fork")
        kept.append(fork.Process(target=talk, args=(what,)))
        kept[-1].start()
        return repr([os.getpid()]).encode()
    if what == "me":
        return repr([os.getpid()]).encode()
    if what == "within":
        with multiprocessing.Pool(2) as pool:
            pool.map(pid, range(2))
        return b"[]"
    numbers = [subprocess.Popen(SLEEP, start_new_session=session).pid for session in (1, 0)]
    with open(what, "w") as notes: notes.write(repr(numbers))
    if "waits" in what:
        with multiprocessing.Pool(2) as pool:
            pool.map(time.sleep, [120, 120])
    os._exit(1)
'''

WAYS = {
    "thread": ["pool", "other pool", "executor", "program", "session", "daemon", "process"],
    "process": ["other pool", "session", "process"],
}


class Worker(Overlay):
    """C alone, with a stop file, as no signal stops a process on Windows."""

    def __init__(self, folder: Path) -> None:
        config = one_worker({"start": "starts:start", "worn": "starts:start"})
        config["handlers"]["worn-process"]["max_requests"] = 1
        super().__init__(folder, config)
        (folder / "starts.py").write_text(STARTS)
        self.stop_file = folder / "stop"

    def _node(self, process_id: str) -> list[str]:
        return [*super()._node(process_id), "--stop-file", str(self.stop_file)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    overlay = Worker(tmp_path_factory.mktemp("started"))
    try:
        yield overlay.start("C")
    finally:
        overlay.stop()


def started(worker: Overlay, what: str, handler: str) -> list[psutil.Process]:
    result = worker.ask("C", what.encode(), handler=handler, timeout=30).result
    return found(set(eval(result)))


def found(pids: set[int]) -> list[psutil.Process]:
    """Those that still exist."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    return processes


def check_ended(processes: list[psutil.Process], within_s: float = 10) -> None:
    try:
        until(lambda: not any(map(is_alive, processes)), within_s, "their end")
    finally:
        for process in filter(is_alive, processes):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("run", RUNS)
def test_a_pool_ends_with_its_with_block(worker, run):
    assert started(worker, "within", f"start-{run}") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_output_of_a_fork_after_its_request_does_not_affect_other_requests(worker):
    notes = worker.folder / "talks"
    before = started(worker, str(notes), "start-process")
    until(notes.exists)

    assert started(worker, "me", "start-process") == before


def test_descendants_of_a_retired_process_end_with_it(worker):
    check_ended(
        [*started(worker, "program", "worn-process"), *started(worker, "session", "worn-process")]
    )


@pytest.mark.parametrize("how", ["waits", "exits"])
def test_descendants_of_a_request_end_with_its_process(worker, how):
    notes = worker.folder / how

    with pytest.raises(grpc.RpcError):
        worker.ask("C", str(notes).encode(), handler="start-process", timeout=1.5)

    in_session, in_group = eval(notes.read_text())
    if how == "exits" and os.name == "posix":  # its parent is no longer known
        found({in_session})[0].kill()
    check_ended(found({in_session, in_group}))


def test_a_worker_stops_at_once_whatever_its_handlers_have_left_running(tmp_path):
    worker = Worker(tmp_path)
    left: list[psutil.Process] = []
    try:
        worker.start("C")
        for run, ways in WAYS.items():
            for what in ways:
                left += started(worker, what, f"start-{run}")
        assert all(map(is_alive, left))

        node = worker.processes["C"]
        worker.stop_file.touch()
        node.wait(60)

        assert node.returncode == 0  # not killed by the watchdog, 5 s after its grace period
    finally:
        worker.stop()
        check_ended(left)


def test_descendants_of_handlers_end_when_the_worker_is_killed(tmp_path):
    worker = Worker(tmp_path)
    left: list[psutil.Process] = []
    try:
        worker.start("C")
        for what in ("pool", "program", "session"):
            left += started(worker, what, "start-process")
        worker.kill("C")
    finally:
        worker.stop()
        check_ended(left)
