"""Idempotency keys: one answer for one key."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import overlay as library
from overlay.errors import BadRequest, DeadlinePassed, HandlerFailed, PartsFailed, QueueFull
from overlay.keys import Keys
from overlay.values import Code, Executed
from overlay.wire import pb2
from tests.cluster import Overlay, until
from tests.network import Clock
from tests.test_rules import make, notes

NAME = ("mac", "order 7")


class Bench:
    """Keys, and how often something was really asked."""

    def __init__(self, most: int = 100, most_bytes: int = 1000) -> None:
        self.clock = Clock()
        self.keys = Keys(600, most, most_bytes, self.clock)
        self.asked: list[bytes] = []

    def answer(self, name=NAME, question: bytes = b"q", fails: Exception | None = None, size=10):
        def ask():
            self.asked.append(question)
            if fails is not None:
                raise fails
            return f"answer {len(self.asked)}", size

        return self.keys.answer(name, question, self.clock.now + 5, ask)


def test_the_same_key_has_the_same_answer_and_is_asked_once():
    bench = Bench()
    assert [bench.answer(), bench.answer()] == ["answer 1", "answer 1"]
    assert len(bench.asked) == 1


def test_another_question_under_the_same_key_is_refused():
    bench = Bench()
    bench.answer()
    with pytest.raises(BadRequest, match=r"^idempotency_key: 'order 7' was used for another req"):
        bench.answer(question=b"other")


def test_a_key_belongs_to_its_caller():
    bench = Bench()
    assert bench.answer() != bench.answer(("pc", "order 7"), b"other")


def test_what_may_have_run_is_not_asked_again():
    bench = Bench()
    for _ in range(2):
        with pytest.raises(HandlerFailed, match=r"^it broke$"):
            bench.answer(fails=HandlerFailed("it broke"))
    assert len(bench.asked) == 1


def test_a_failure_that_is_kept_holds_nothing_of_those_who_asked():
    bench = Bench()

    class Payload:
        pass

    def asks() -> weakref.ref[Payload]:
        payload = Payload()
        with contextlib.suppress(PartsFailed):
            caller(payload)
        return weakref.ref(payload)

    def caller(payload: Payload) -> None:
        bench.answer(fails=PartsFailed("broke", Code.INTERNAL, Executed.YES, "it broke", 1.5))

    first, second = asks(), asks()
    gc.collect()

    assert (first(), second()) == (None, None)
    with pytest.raises(PartsFailed, match=r"^broke$") as raised:
        bench.answer()
    assert (raised.value.code, raised.value.retry_after_s) == (Code.INTERNAL, 1.5)


def test_what_provably_did_not_run_may_be_asked_again():
    bench = Bench()
    with pytest.raises(QueueFull):
        bench.answer(fails=QueueFull("full"))
    assert bench.answer() == "answer 2"


def test_an_answer_is_forgotten_after_its_time_and_not_before():
    bench = Bench()
    bench.answer()
    bench.clock.advance(599)
    assert bench.answer() == "answer 1"
    bench.clock.advance(2)
    assert bench.answer() == "answer 2"
    assert len(bench.keys) == 1


@pytest.mark.parametrize(("most", "size"), [(3, 1), (100, 400)])
def test_the_oldest_are_forgotten_when_there_is_too_much(most, size):
    bench = Bench(most)
    for n in range(10):
        bench.answer(("mac", str(n)), size=size)
    assert len(bench.keys) <= 4
    assert bench.answer(("mac", "9"), size=size) == "answer 10"


def test_those_who_come_meanwhile_wait_for_the_first():
    bench, go = Bench(), threading.Event()

    def ask():
        bench.asked.append(b"q")
        go.wait(5)
        return "the answer", 10

    def answer():
        return bench.keys.answer(NAME, b"q", bench.clock.now + 5, ask)

    with ThreadPoolExecutor(5) as pool:
        found = [pool.submit(answer) for _ in range(5)]
        until(lambda: bench.asked)
        go.set()
        assert {future.result(5) for future in found} == {"the answer"}
    assert len(bench.asked) == 1


def test_who_waits_for_the_first_waits_no_longer_than_its_deadline():
    bench, go = Bench(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(bench.keys.answer, NAME, b"q", 1e9, lambda: (go.wait(5), 1))
        until(lambda: len(bench.keys))
        with pytest.raises(DeadlinePassed):
            bench.keys.answer(NAME, b"q", bench.clock.now + 0.05, lambda: (None, 0))
        go.set()
        assert first.result(5)


# On six real processes.


def test_a_caller_that_left_gets_its_answer_when_it_comes_again(overlays, tmp_path: Path) -> None:
    overlay = make(overlays, tmp_path)
    asked = {"mode": "any", "handler": "work", "idempotency_key": "k"}
    with library.connect(overlay.address("A")) as client:
        stub = overlay.stub("A")
        request = pb2.Request(payload=b"500", mode=pb2.ANY, handler="work", idempotency_key="k")
        call = stub.Forward.future(request, timeout=10)
        until(lambda: notes(tmp_path))
        call.cancel()
        again = client.call(b"500", **asked)
        third = client.call(b"500", **asked)
        with pytest.raises(library.client.InvalidCall, match="was used for another request"):
            client.call(b"501", **asked)
    assert again.result == third.result == notes(tmp_path)[0][0].encode()
    assert len(notes(tmp_path)) == 1


@pytest.mark.parametrize("key", ["", "k"])
def test_a_worker_that_dies_costs_a_keyed_request_a_second_try(
    overlays, tmp_path: Path, key: str
) -> None:
    overlay: Overlay = make(overlays, tmp_path)
    request = pb2.Request(payload=b"x", mode=pb2.ANY, handler="gate", idempotency_key=key)
    call = overlay.stub("A").Forward.future(request, timeout=20)
    until(lambda: notes(tmp_path))
    first = notes(tmp_path)[0][0]
    overlay.kill(first)
    if not key:
        assert call.exception(10).code() is grpc.StatusCode.UNAVAILABLE
        assert dict(call.trailing_metadata())["overlay-executed"] == "unknown"
        assert len(notes(tmp_path)) == 1
        return
    until(lambda: len(notes(tmp_path)) == 2)
    second = notes(tmp_path)[1][0]
    assert second != first
    overlay.kill(second)  # as if the payload killed its workers: no third one is risked
    error = call.exception(10)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(call.trailing_metadata())["overlay-executed"] == "unknown"
    assert len(notes(tmp_path)) == 2
    with library.connect(overlay.address("A")) as client:
        with pytest.raises(library.CallFailed) as caught:
            client.call(b"x", mode="any", handler="gate", idempotency_key="k")
        assert caught.value.executed is Executed.UNKNOWN
    assert len(notes(tmp_path)) == 2
