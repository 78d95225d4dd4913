"""test_system.py against real processes, and what it thinks of wrong answers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import overlay
import test_system as script
from overlay.client.sync import Answer
from overlay.model.segments import Code, Part
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """test_system.py as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "test_system.py"), *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def wounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F, of which F is dead."""
    with running(tmp_path_factory.mktemp("wounded"), six_processes()) as found:
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


def test_it_may_be_run_again_and_again_and_beside_itself(six: Overlay) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: run("127.0.0.1", six.port("A")), range(4)))

    assert [done.returncode for done in runs] == [0] * 4, [done.stdout for done in runs]


def test_a_dead_worker_fails_it_and_it_says_where_to_look(wounded: Overlay) -> None:
    done = run("127.0.0.1", wounded.port("A"))

    assert done.returncode == 1
    assert "FAIL  single request: 2 of 3 workers answered" in done.stdout
    assert "missing worker F: " in done.stdout
    assert "(10 times)" in done.stdout
    assert f"see whether F runs at {wounded.address('F')}" in done.stdout
    assert "logs/process_f.log" in done.stdout
    assert "python client.py check CONFIG" in done.stdout


def test_a_dead_neighbour_fails_it(wounded: Overlay) -> None:
    done = run("127.0.0.1", wounded.port("E"))

    assert done.returncode == 1
    assert "FAIL  neighbours: 1 of 2 up" in done.stdout


def test_where_nothing_serves_it_says_so_within_seconds() -> None:
    began = time.monotonic()

    done = run("127.0.0.1", free_port())

    assert done.returncode == 4
    assert time.monotonic() - began < 10
    assert "nothing serves at 127.0.0.1:" in done.stderr
    assert "python node.py CONFIG ID" in done.stderr
    assert "firewall" in done.stderr
    assert done.stdout == ""


def test_another_grpc_server_is_not_taken_for_an_overlay() -> None:
    from grpc import server
    from grpc_health.v1 import health, health_pb2_grpc

    with ThreadPoolExecutor(2) as pool:
        stranger = server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), stranger)
        number = stranger.add_insecure_port("127.0.0.1:0")
        stranger.start()
        done = run("127.0.0.1", number)
        stranger.stop(0).wait(5)

    assert done.returncode == 1
    assert "is not a process of an overlay" in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["127.0.0.1"], ["127.0.0.1", "x"], ["127.0.0.1", "1", "2"], ["a b", "1"]]
)
def test_wrong_arguments_get_one_sentence(words: list[str]) -> None:
    done = run(*words)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_users_own_default_handler_is_not_run_unasked(
    overlays: Callable[..., Overlay], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    config = six_processes(handlers={"count": "mine:count"})
    for entry in config["processes"].values():
        entry.update(handler="count")
    module = f"""
def count(payload, context):
    with open({str(ran)!r}, "ab") as file:
        file.write(b"x")
    return b"1"
"""
    found = overlays(module, config=config)

    untouched = run("127.0.0.1", found.port("A"))
    before = ran.exists()
    asked_for = run("127.0.0.1", found.port("A"), "--handler", "count", "--payload", "some words")

    assert untouched.returncode == 0, untouched.stdout
    assert "handler echo" in untouched.stdout
    assert not before
    assert asked_for.returncode == 0, asked_for.stdout
    assert ran.stat().st_size == 3 + 10 * 3 + script.IN_A_ROW


def test_a_failing_handler_sends_one_to_its_log(overlays: Callable[..., Overlay]) -> None:
    module = "def boom(payload, context): raise ValueError('no')"
    found = overlays(module, handlers={"boom": "mine:boom"})

    done = run("127.0.0.1", found.port("C"), "--handler", "boom")

    assert done.returncode == 1
    assert "error id" in done.stdout
    assert "see that error id in the log of the worker" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_its_output_survives_every_code_page(six: Overlay, encoding: str) -> None:
    words = ("127.0.0.1", six.port("C"), "--payload", "Grüße 中文")

    assert run(*words, PYTHONIOENCODING=encoding).returncode == 0


def test_a_reader_that_leaves_does_not_change_the_exit_code(six: Overlay, wounded: Overlay) -> None:
    for found, code in ((six, 0), (wounded, 1)):
        left = subprocess.Popen(
            [sys.executable, str(ROOT / "test_system.py"), "127.0.0.1", str(found.port("A"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        left.stdout.close()

        complaint = left.stderr.read()
        left.stderr.close()
        assert (left.wait(20), complaint) == (code, b"")


# What it thinks of answers


@pytest.fixture
def asked(six: Overlay) -> Iterator[script.Asked]:
    """What test_system.py has learnt of A before its first test."""
    arguments = argparse.Namespace(
        host="127.0.0.1", port=six.port("A"), handler="", payload="hi", deadline=5
    )
    found = script.learn(arguments)
    yield found
    found.client.close()


def good_answer() -> Answer:
    parts = tuple(Part(w, result=f"{w}: hi".encode()) for w in "CDF")
    return Answer(b"C: hi\nD: hi\nF: hi", parts, tuple("ABCEDF"), 1)


def test_a_good_answer_has_no_problem(asked: script.Asked) -> None:
    assert script.problems_of(good_answer(), asked, "hi") == []


@pytest.mark.parametrize(
    ("wrong", "says"),
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
def test_every_flaw_of_an_answer_is_a_problem(
    asked: script.Asked, wrong: dict[str, object], says: str
) -> None:
    found = script.problems_of(replace(good_answer(), **wrong), asked, "hi")

    assert says in [problem.what for problem in found]
    assert all(problem.advice for problem in found)


def test_what_to_expect_depends_on_the_role(six: Overlay) -> None:
    expected = {}
    for process_id in "ABCDEF":
        with overlay.connect(six.address(process_id)) as client:
            expected[process_id] = "".join(script.expected_workers(client.metrics()))

    assert expected == {"A": "CDF", "B": "CD", "C": "C", "D": "D", "E": "DF", "F": "F"}
