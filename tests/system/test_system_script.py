"""test_system.py on real processes, and its judgement of wrong answers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import overlay
import test_system as script
from overlay.cli.terminal import guarded
from overlay.client.sync import Answer
from overlay.model.segments import Code, Part
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes
from tests.harness.same_process import ran


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """test_system.py with these arguments, in this process."""
    return ran(lambda: guarded(script.main), "test_system.py", *arguments)


def as_started(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs test_system.py as a user does."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "test_system.py"), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def without_f(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F; F was killed."""
    with running(tmp_path_factory.mktemp("without_f"), six_processes()) as found:
        found.kill("F")
        yield found


@pytest.mark.parametrize(
    ("process_id", "workers", "path"),
    [("A", "C D F", "A B C E D F"), ("B", "C D", "B C D"), ("D", "D", "D")],
)
def test_the_users_three_tests_pass_on_every_role(
    six: Overlay, process_id: str, workers: str, path: str
) -> None:
    done = run("127.0.0.1", six.port(process_id))

    assert done.returncode == 0, done.stdout
    passed = [line for line in done.stdout.splitlines() if line.startswith("pass  ")]
    assert [line[6:].split(":")[0] for line in passed] == list(script.TESTS)
    assert list(script.TESTS)[:3] == ["single request", "queue status", "10 concurrent requests"]
    assert f"workers that should answer: {workers}" in done.stdout
    assert f"path {path}" in done.stdout
    assert "10 of 10 answered in full; latency min/median/max" in done.stdout


def test_it_can_run_concurrently(six: Overlay) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: as_started("127.0.0.1", six.port("A")), range(2)))

    assert [done.returncode for done in runs] == [0] * 2, [done.stdout for done in runs]


def test_it_fails_for_a_dead_worker_and_says_where_to_look(without_f: Overlay) -> None:
    done = run("127.0.0.1", without_f.port("A"))

    assert done.returncode == 1
    assert "FAIL  single request: 2 of 3 workers answered" in done.stdout
    assert "missing worker F: " in done.stdout
    assert "(10 times)" in done.stdout
    assert f"see whether F runs at {without_f.address('F')}" in done.stdout
    assert "logs/process_f.log" in done.stdout
    assert "python client.py check CONFIG" in done.stdout


def test_it_fails_for_a_dead_neighbour(without_f: Overlay) -> None:
    done = run("127.0.0.1", without_f.port("E"))

    assert done.returncode == 1
    assert "FAIL  neighbours: 1 of 2 up" in done.stdout


def test_it_reports_within_seconds_that_nothing_serves() -> None:
    began = time.monotonic()

    done = run("127.0.0.1", free_port())

    assert done.returncode == 4
    assert time.monotonic() - began < 10
    assert "nothing serves at 127.0.0.1:" in done.stderr
    assert "python node.py CONFIG ID" in done.stderr
    assert "firewall" in done.stderr
    assert done.stdout == ""


def test_another_grpc_server_is_not_mistaken_for_an_overlay() -> None:
    from grpc import server
    from grpc_health.v1 import health, health_pb2_grpc

    with ThreadPoolExecutor(2) as pool:
        other = server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), other)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        done = run("127.0.0.1", port)
        other.stop(0).wait(5)

    assert done.returncode == 1
    assert "is not a process of an overlay" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["127.0.0.1"], ["127.0.0.1", "x"], ["127.0.0.1", "1", "2"], ["a b", "1"]]
)
def test_invalid_arguments_get_an_error_of_one_line(arguments: list[str]) -> None:
    done = run(*arguments)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


MINE = """
def count(payload, context):
    with open(context.options["ran"], "ab") as file:
        file.write(b"x")
    return b"1"

def boom(payload, context):
    raise ValueError("no")
"""


@pytest.fixture(scope="module")
def ran_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user's handler notes that it ran."""
    return tmp_path_factory.mktemp("notes") / "ran"


@pytest.fixture(scope="module")
def users_own(tmp_path_factory: pytest.TempPathFactory, ran_at: Path) -> Iterator[Overlay]:
    """With a user's own handlers, one of which is the default."""
    folder = tmp_path_factory.mktemp("users_own")
    (folder / "mine.py").write_text(MINE)
    count = {"call": "mine:count", "options": {"ran": str(ran_at)}}
    config = six_processes(handlers={"count": count, "boom": "mine:boom"})
    for entry in config["processes"].values():
        entry.update(handler="count")
    with running(folder, config) as found:
        yield found


def test_a_users_default_handler_does_not_run_unless_named(
    users_own: Overlay, ran_at: Path
) -> None:
    default = run("127.0.0.1", users_own.port("A"))
    ran_by_default = ran_at.exists()
    named = run("127.0.0.1", users_own.port("A"), "--handler", "count", "--payload", "two words")

    assert default.returncode == 0, default.stdout
    assert "handler echo" in default.stdout
    assert not ran_by_default
    assert named.returncode == 0, named.stdout
    assert ran_at.stat().st_size == 3 + 10 * 3 + script.IN_A_ROW


def test_for_a_failing_handler_it_points_to_the_workers_log(users_own: Overlay) -> None:
    done = run("127.0.0.1", users_own.port("C"), "--handler", "boom")

    assert done.returncode == 1
    assert "error id" in done.stdout
    assert "see that error id in the log of the worker" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_its_output_survives_every_code_page(six: Overlay, encoding: str) -> None:
    arguments = ("127.0.0.1", six.port("C"), "--payload", "Grüße 中文")

    assert as_started(*arguments, PYTHONIOENCODING=encoding).returncode == 0


def test_a_closed_pipe_does_not_change_the_exit_code(six: Overlay, without_f: Overlay) -> None:
    for found, code in ((six, 0), (without_f, 1)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "test_system.py"), "127.0.0.1", str(found.port("A"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()

        errors = process.stderr.read()
        process.stderr.close()
        assert (process.wait(20), errors) == (code, b"")


# How it judges answers


@pytest.fixture
def asked(six: Overlay) -> Iterator[script.Asked]:
    """What test_system.py knows about A before its first test."""
    arguments = argparse.Namespace(
        host="127.0.0.1", port=six.port("A"), handler="", payload="hi", deadline=5
    )
    found = script.learn(arguments)
    yield found
    found.client.close()


def good_answer(**wrong: Any) -> Answer:
    parts = tuple(Part(w, result=f"{w}: hi".encode()) for w in "CDF")
    right = {"result": b"C: hi\nD: hi\nF: hi", "parts": parts, "hops": tuple("ABCEDF")}
    return Answer(**{**right, **wrong}, request_id=1)


def test_a_good_answer_has_no_problem(asked: script.Asked) -> None:
    assert script.problems_of(good_answer(), asked, "hi") == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"parts": good_answer().parts[:2]}, "worker F is not in the answer"),
        ({"parts": (*good_answer().parts, good_answer().parts[0])}, "C is in the answer 2 times"),
        (
            {"parts": (*good_answer().parts[:2], Part("F", Code.UNAVAILABLE, "is away"))},
            "missing worker F: is away",
        ),
        (
            {"parts": (*good_answer().parts[:2], Part("F", Code.INTERNAL, "error id 1"))},
            "worker F failed: error id 1",
        ),
        (
            {"parts": (*good_answer().parts, Part("B", result=b"B: hi"))},
            "B answered, which is not expected",
        ),
        ({"hops": tuple("BCEDF")}, "the path 'B C E D F' does not begin at A"),
        ({"hops": tuple("ABCEBDF")}, "the path 'A B C E B D F' visits a process twice"),
        ({"hops": tuple("ABCED")}, "the path 'A B C E D' lacks F, which answered"),
        ({"result": b"C: hi\nD: hi"}, "the result lacks the answer of F"),
        (
            {"parts": (*good_answer().parts[:2], Part("F", result=b"F: other"))},
            "F did not echo 'hi'",
        ),
    ],
)
def test_every_flaw_of_an_answer_is_reported(
    asked: script.Asked, wrong: dict[str, object], problem: str
) -> None:
    found = script.problems_of(good_answer(**wrong), asked, "hi")

    assert problem in [each.what for each in found]
    assert all(each.advice for each in found)


def test_the_expected_workers_depend_on_the_role(six: Overlay) -> None:
    expected = {}
    for process_id in "ABCDEF":
        with overlay.connect(six.address(process_id)) as client:
            expected[process_id] = "".join(script.expected_workers(client.metrics()))

    assert expected == {"A": "CDF", "B": "CD", "C": "C", "D": "D", "E": "DF", "F": "F"}
