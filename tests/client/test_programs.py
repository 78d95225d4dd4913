"""Programs that use a client: each behaves as docs/client.md says.

They are in tests/programs; each runs in its own process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import ROOT, Overlay, six_processes

PROGRAMS = ROOT / "tests" / "programs"
HANDLERS = """
import time

def slow(payload, context):
    until = time.monotonic() + float(payload)
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    return b"slept"
"""
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A single process, C, whose default handler returns "C: " and the payload."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "mine.py").write_text(HANDLERS)
    found = Overlay(folder, six_processes(handlers={"slow": {"call": "mine:slow"}}))
    try:
        yield found.start("C").address("C")
    finally:
        found.stop()


def run(words: list[str], **env: str) -> list[str]:
    """The lines that a program prints; it must exit with code 0."""
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def program(name: str, *words: str) -> list[str]:
    return run([sys.executable, str(PROGRAMS / name), *words])


@FORKS
def test_a_client_created_before_a_fork_works_in_each_child(worker: str) -> None:
    answers = [line.split(maxsplit=1) for line in program("prefork.py", worker)]

    assert [answer for _, answer in answers] == [f"C: n{n}" for n in range(6)]


@FORKS
def test_after_a_fork_a_used_client_raises_in_the_child_and_works_in_the_parent(
    worker: str,
) -> None:
    assert program("forked_late.py", worker) == [
        "child is over",
        "exit code 7",
        "child is over",
        "exit code 0",
        "b'slept' b'C: x'",
        "b'slept' b'slept' b'C: x'",
        "the child: b'C: x' b'C: y'",
        "exit code 0",
    ]


@FORKS
def test_each_process_of_a_pool_can_have_its_own_client(worker: str) -> None:
    answers, error = program("pool.py", worker)

    assert answers == "C: a C: b C: c"
    assert error.startswith("NameNotFound NOT_FOUND NO ")
    assert "nowhere" in error


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_a_client_survives_ctrl_c_at_any_moment(worker: str) -> None:
    assert program("interrupted.py", worker) == ["C: last", "closed True"]


def test_every_method_works_while_time_is_frozen(worker: str) -> None:
    words = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--timeout=40"]
    path = str(PROGRAMS / "frozen.py")
    lines = run([sys.executable, *words, path], OVERLAY_ADDRESS=worker)

    assert "10 passed" in lines[-1]


def test_a_client_works_in_notebook_cells_with_a_running_loop(worker: str) -> None:
    assert program("notebook.py", worker) == [
        "b'C: blocking'",
        "[b'C: m', b'C: n']",
        "b'C: awaited'",
        "b'C: begun in one cell'",
        "b'C: o'",
        "b'C: p'",
        "gathered",
        "b'C: both at once'",
        "b'C: again'",
    ]


@pytest.mark.skipif(os.name == "nt", reason="there a shell closes no descriptors")
def test_a_client_works_without_standard_input_and_output(worker: str, tmp_path: Path) -> None:
    path = tmp_path / "results"
    words = [sys.executable, str(PROGRAMS / "cron.py"), worker, str(path)]
    assert run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *words]) == []

    assert path.read_bytes().splitlines() == [b"C: row %d" % n for n in range(1000)]
    assert "nowhere" in (tmp_path / "results.log").read_text()


def test_a_client_can_be_pickled_and_a_future_cannot(worker: str) -> None:
    lines = program("pickled.py", worker)

    assert lines == [
        "b'C: from there' (1, 1) ('C',)",
        "NameNotFound NOT_FOUND NO None",
        "TypeError: a Future belongs to the process that waits for it; pickle its result()",
        "b'C: y'",
        "TypeError: a Future belongs to the process that waits for it; pickle its result()",
        "b'C: x'",
    ]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("gevent", "grpc.experimental.gevent.init_gevent()"), ("eventlet", "thread=False")],
)
def test_connect_rejects_replaced_threads(worker: str, kind: str, remedy: str) -> None:
    lines = program("gevented.py", worker, kind)

    assert len(lines) == 2
    assert all(kind in line and remedy in line for line in lines)


def test_greenlets_work_concurrently_with_grpcs_gevent_support(worker: str) -> None:
    assert program("gevented.py", worker, "gevent-grpc") == [
        "b'C: x'",
        "b'C: 0' b'C: 1' b'C: 2'",
        "[b'C: y', b'C: y', b'C: y']",
    ]
