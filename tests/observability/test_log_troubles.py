"""A real worker whose log cannot be written: only a counter changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.harness.cluster import Overlay, until
from tests.system.test_misbehaving_handlers import three_processes

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's disks and limits")

MINE = """
import sys
def misbehave(payload, context):
    print("x" * 1000, file=sys.stderr)
    context.log.warning("%s", "y" * 1000)
    raise ValueError("z" * 1000)
patient = misbehave
"""


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[[Path], Overlay]]:
    """Starts worker C alone, which logs to the test's folder; its output is not read."""
    with contextlib.ExitStack() as stack:

        def make(log_dir: Path) -> Overlay:
            config = three_processes(tmp_path / "notes")
            config["processes"]["C"]["log_dir"] = str(log_dir)
            overlay = Overlay(tmp_path / "worker", config)
            (overlay.folder / "mine.py").write_text(MINE)
            stack.callback(overlay.stop)
            return overlay.start("C")

        yield make


def still_works(worker: Overlay, times: int = 30) -> None:
    for n in range(times):
        run = "process" if n % 10 == 0 else "thread"
        with pytest.raises(grpc.RpcError) as caught:
            worker.ask("C", b"", handler=run)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "error id" in caught.value.details()
    assert worker.ask("C", b"hi").result == b"C: hi"


def dropped(worker: Overlay) -> int:
    return worker.metrics("C").log_lines_dropped


def test_a_worker_works_with_a_full_disk(workers, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "process_c.log").symlink_to("/dev/full")
    worker = workers(tmp_path / "logs")

    still_works(worker)

    until(lambda: dropped(worker) >= 60)
    assert worker.processes["C"].poll() is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_the_log_goes_on_when_a_full_disk_has_room_again(workers, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        worker = workers(disk)
        still_works(worker)
        until(lambda: dropped(worker) > 0)

        subprocess.run([*mount[:4], "remount,size=10m", *mount[5:]], check=True)
        log = disk / "process_c.log"
        until(lambda: still_works(worker, 1) or "serves on" in log.read_text())
        before = log.stat().st_size
        until(lambda: still_works(worker, 1) or log.stat().st_size > before)
        worker.stop()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_worker_works_with_a_limit_on_the_size_of_files(workers, tmp_path):
    worker = workers(tmp_path / "logs")
    resource.prlimit(worker.processes["C"].pid, resource.RLIMIT_FSIZE, (8192, 8192))

    still_works(worker)

    until(lambda: dropped(worker) > 0)
    assert (tmp_path / "logs" / "process_c.log").stat().st_size <= 8192


def test_a_worker_works_if_its_log_folder_cannot_be_created(workers):
    worker = workers(Path("/proc/logs"))

    still_works(worker)

    until(lambda: dropped(worker) >= 60)


def test_a_deleted_log_folder_is_created_again(workers, tmp_path):
    worker = workers(tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs")

    still_works(worker)

    until(lambda: "error id" in (tmp_path / "logs" / "process_c.log").read_text())


def test_a_worker_works_if_its_log_folder_is_replaced_by_a_file(workers, tmp_path):
    worker = workers(tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("")

    still_works(worker)

    until(lambda: dropped(worker) >= 60)
    assert (tmp_path / "logs").read_text() == ""
