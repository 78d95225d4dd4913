"""What programs expect of any Executor and its Futures, and of what is called when one is done.

The first part is what the standard library's own tests of its executors ask for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    ThreadPoolExecutor,
)
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.client import connection
from overlay.client import sync as library
from tests.client.conftest import numbers
from tests.harness.cluster import ROOT, Overlay, running_one, until

HANDLERS = '''
import pathlib, time

NOTES = pathlib.Path(__file__).with_name("notes")

def upper(payload, context):
    return payload.upper()

def picky(payload, context):
    if payload.startswith(b"bad"):
        raise ValueError(payload)
    return payload

def patient(payload, context):
    """Runs for that many seconds or until cancelled, and records which."""
    _note("began")
    until = time.monotonic() + float(payload)
    while (left := until - time.monotonic()) > 0 and not context.cancelled:
        time.sleep(min(left, 0.05))
    _note("cancelled" if context.cancelled else "done")
    return payload

def _note(what):
    with NOTES.open("a") as file:
        file.write(what + "\\n")
'''


class One:
    """Worker C, asked directly, and what its handlers recorded."""

    def __init__(self, found: Overlay) -> None:
        self.overlay = found
        self.address = found.address("C")
        self.notes = found.folder / "notes"

    def count(self, what: str) -> int:
        return self.notes.read_text().split().count(what) if self.notes.exists() else 0

    @property
    def streams(self) -> int:
        return self.overlay.metrics("C").streams


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[One]:
    folder: Path = tmp_path_factory.mktemp("futures")
    with running_one(folder, HANDLERS, ["upper", "picky", "patient"]) as found:
        yield One(found)


@pytest.fixture
def one(shared: One) -> Iterator[One]:
    shared.notes.unlink(missing_ok=True)
    yield shared
    until(lambda: not shared.overlay.metrics("C").active_requests, 10, "nothing is at work")
    until(lambda: not shared.streams, 10, "the clients of each test are closed")


@pytest.fixture
def executor(one: One) -> Iterator[overlay.Client]:
    with overlay.connect(one.address) as found:
        yield found


# with, and shutdown


def test_leaving_the_with_block_waits_for_submitted_requests(one: One) -> None:
    seen: list[bytes] = []
    with overlay.connect(one.address) as executor:
        futures = [executor.submit("patient", "0.3") for _ in range(20)]
        futures[0].add_done_callback(lambda future: (time.sleep(0.5), seen.append(future.result())))

    assert [future.result(0) for future in futures] == [b"0.3"] * 20
    assert seen == [b"0.3"], "the callbacks have run too"
    assert one.count("done") == 20


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_leaving_the_with_block_with_an_error_cancels_requests(
    one: One, error: type[BaseException]
) -> None:
    def work() -> None:
        with overlay.connect(one.address) as executor:
            futures.append(executor.submit("upper", "x"))
            futures[0].result(10)
            futures.extend(executor.submit("patient", "20") for _ in range(10))
            until(lambda: one.count("began") == 10)
            raise error("mine")

    futures: list[Future[bytes]] = []
    began = time.monotonic()
    with pytest.raises(error, match="mine"):
        work()

    assert time.monotonic() - began < 10
    assert futures[0].result(0) == b"X"
    assert all(future.cancelled() for future in futures[1:])
    until(lambda: one.count("cancelled") == 10)


def test_no_request_is_accepted_after_a_shutdown(one: One) -> None:
    for end in (lambda e: e.shutdown(), lambda e: e.shutdown(wait=False), lambda e: e.close()):
        executor = overlay.connect(one.address)
        executor.submit("upper", "x").result(10)
        end(executor)

        for ask in (
            lambda e: e.submit("upper", "x"),
            lambda e: e.map("upper", ["x"]),
            lambda e: e.call("x"),
            lambda e: e.call("x", mode="any", idempotency_key="x"),
            lambda e: list(e.parts("x")),
            lambda e: e.metrics(),
        ):
            with pytest.raises(RuntimeError, match="this client is closed") as caught:
                ask(executor)
            assert type(caught.value) is library.CallCancelled


def test_a_shutdown_without_waiting_lets_running_requests_finish(one: One) -> None:
    executor = overlay.connect(one.address)
    futures = [executor.submit("patient", "0.5") for _ in range(5)]

    executor.shutdown(wait=False)

    assert not any(future.done() for future in futures)
    assert [future.result(10) for future in futures] == [b"0.5"] * 5
    until(lambda: not one.streams, 5, "the stream is closed although the futures exist")


def test_a_second_shutdown_can_wait_for_requests_left_by_the_first(one: One) -> None:
    executor = overlay.connect(one.address)
    future = executor.submit("patient", "0.3")

    executor.shutdown(wait=False)
    executor.shutdown()

    assert future.result(0) == b"0.3"
    executor.shutdown()
    executor.close()


def test_close_cancels_requests_left_by_a_shutdown(one: One) -> None:
    executor = overlay.connect(one.address)
    future = executor.submit("patient", "20")
    executor.shutdown(wait=False)

    executor.close()

    with pytest.raises(library.CallCancelled):
        future.result(0)


@pytest.mark.parametrize("wait", [True, False])
def test_a_shutdown_can_cancel_the_futures(one: One, wait: bool) -> None:
    executor = overlay.connect(one.address)
    done = executor.submit("upper", "x")
    assert done.result(10) == b"X"
    futures = [executor.submit("patient", "20") for _ in range(200)]
    began = time.monotonic()

    executor.shutdown(wait=wait, cancel_futures=True)

    assert time.monotonic() - began < 10
    assert done.result(0) == b"X"
    assert all(future.cancelled() for future in futures)
    assert concurrent.futures.wait(futures, 10).not_done == set()
    until(lambda: one.count("began") == one.count("cancelled"))


def test_all_submitted_requests_are_done_after_a_shutdown(one: One) -> None:
    executor = overlay.connect(one.address)
    futures = [executor.submit("patient", "0.05") for _ in range(50)]

    executor.shutdown()

    assert [future.result(0) for future in futures] == [b"0.05"] * 50


def test_a_dropped_executor_finishes_its_requests(one: One) -> None:
    executor = overlay.connect(one.address)
    futures = [executor.submit("patient", "0.2") for _ in range(5)]
    results = executor.map("upper", numbers(5))

    del executor

    assert list(results) == [b"N%d" % n for n in range(5)]
    assert [future.result(10) for future in futures] == [b"0.2"] * 5


@pytest.mark.parametrize("taken", [0, 7])
def test_a_map_created_in_the_with_block_continues_after_it(one: One, taken: int) -> None:
    with overlay.connect(one.address) as executor:
        results = executor.map("upper", numbers(50), window=10)
        found = [next(results) for _ in range(taken)]

    assert one.streams == (1 if taken else 0)
    assert found + list(results) == [b"N%d" % n for n in range(50)]
    until(lambda: not one.streams, 5, "the stream is closed when the map has ended")


def test_an_abandoned_map_does_not_keep_the_stream_open(one: One) -> None:
    gc.disable()  # only reference counting may free the maps
    try:
        with overlay.connect(one.address) as executor:
            for _ in executor.map("upper", numbers(5000), window=100):
                break
            next(executor.map("upper", numbers(5000), window=100))
        until(lambda: not one.streams, 5)
    finally:
        gc.enable()


def test_a_stored_exception_does_not_keep_the_stream_open(one: One) -> None:
    with overlay.connect(one.address) as executor:
        with pytest.raises(library.HandlerFailed) as called:
            executor.call("bad", handler="picky")
        with pytest.raises(library.HandlerFailed) as mapped:
            list(executor.map("picky", ["bad"]))

    until(lambda: not one.streams, 5)
    assert called.tb is not None
    assert mapped.tb is not None


def test_a_with_block_can_end_while_other_threads_wait_for_answers(one: One) -> None:
    with overlay.connect(one.address) as executor, ThreadPoolExecutor(3) as pool:
        called = pool.submit(executor.call, "0.5", handler="patient", mode="any")
        keyed = pool.submit(
            executor.call, "0.5", handler="patient", mode="any", idempotency_key="k"
        )
        mapped = pool.submit(list, executor.map("patient", ["0.2"] * 5, window=2))
        until(lambda: one.count("began") >= 3)
        executor.shutdown()

    assert called.result(10).result == keyed.result(10).result == b"0.5"
    assert mapped.result(10) == [b"0.2"] * 5


def test_a_shutdown_without_a_server_returns_at_once() -> None:
    with overlay.connect("127.0.0.1:1", patience_s=0) as client, pytest.raises(library.NotReached):
        client.submit("upper", "x")


# map


def test_map_keeps_the_order_of_its_payloads(executor: overlay.Client) -> None:
    payloads = ["0.2", "0", "0.1", "0"]

    assert list(executor.map("patient", payloads)) == [b"0.2", b"0", b"0.1", b"0"]
    assert list(executor.map("patient", payloads, chunksize=3)) == [b"0.2", b"0", b"0.1", b"0"]
    assert list(executor.map("upper", [])) == []


def test_map_raises_a_failure_in_its_place(executor: overlay.Client) -> None:
    results = executor.map("picky", ["0", "1", "bad", "3"])

    assert [next(results), next(results)] == [b"0", b"1"]
    with pytest.raises(library.HandlerFailed):
        next(results)
    assert list(results) == []


def test_a_passed_deadline_is_a_timeout_error(executor: overlay.Client) -> None:
    found: list[bytes] = []
    with pytest.raises(concurrent.futures.TimeoutError) as caught:
        found.extend(executor.map("patient", ["0", "0", "20"], timeout=0.5, chunksize=1))
    assert type(caught.value) is library.DeadlinePassed
    assert found == [b"0", b"0"]

    with pytest.raises(concurrent.futures.TimeoutError):
        executor.submit("patient", "20", timeout=0.2).result()
    with pytest.raises(concurrent.futures.TimeoutError):
        executor.call("20", handler="patient", timeout=0.2)


# wait and as_completed


def test_concurrent_futures_wait_works(executor: overlay.Client) -> None:
    slow, quick = executor.submit("patient", "5"), executor.submit("upper", "x")
    found = concurrent.futures.wait([slow, quick], return_when=FIRST_COMPLETED)
    assert found == ({quick}, {slow})

    bad = executor.submit("picky", "bad")
    found = concurrent.futures.wait([slow, bad], return_when=FIRST_EXCEPTION)
    assert found == ({bad}, {slow})
    found = concurrent.futures.wait([bad, quick, slow], return_when=FIRST_EXCEPTION)
    assert found == ({bad, quick}, {slow})

    found = concurrent.futures.wait([slow, quick, quick], timeout=0.1)
    assert found == ({quick}, {slow})

    slow.cancel()
    found = concurrent.futures.wait([slow, quick, bad], 10, ALL_COMPLETED)
    assert found == ({slow, quick, bad}, set())


def test_as_completed_gives_each_future_once_and_honours_its_timeout(
    executor: overlay.Client,
) -> None:
    slow, quick = executor.submit("patient", "5"), executor.submit("upper", "x")
    bad, cancelled = executor.submit("picky", "bad"), executor.submit("patient", "5")
    cancelled.cancel()
    concurrent.futures.wait([quick, bad, cancelled], 10)
    given = []

    results = concurrent.futures.as_completed([slow, quick, quick, bad, cancelled], timeout=0)
    with pytest.raises(concurrent.futures.TimeoutError):
        given.extend(results)
    assert sorted(map(id, given)) == sorted(map(id, [quick, bad, cancelled]))

    few = [executor.submit("patient", s) for s in ("0.4", "0.2", "0")]
    assert list(concurrent.futures.as_completed(few, timeout=10)) == few[::-1]
    slow.cancel()


def test_a_future_behaves_like_one_of_the_standard_library(executor: overlay.Client) -> None:
    slow, bad = executor.submit("patient", "5"), executor.submit("picky", "bad")
    with pytest.raises(concurrent.futures.TimeoutError):
        slow.result(timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        slow.exception(timeout=0)
    assert not slow.done()
    assert slow.cancel()
    assert slow.cancel()
    assert (slow.cancelled(), slow.done(), slow.running()) == (True, True, False)
    with pytest.raises(CancelledError):
        slow.result(0)
    with pytest.raises(CancelledError):
        slow.exception(0)

    assert isinstance(bad.exception(10), library.HandlerFailed)
    assert not bad.cancel()
    assert (bad.cancelled(), bad.done()) == (False, True)


def test_an_unreferenced_future_is_freed(executor: overlay.Client) -> None:
    gc.disable()
    try:
        future = executor.submit("upper", "x")
        future.add_done_callback(lambda future: None)
        future.result(10)
        held = weakref.ref(future)
        del future
        until(lambda: held() is None, 5, "without the garbage collector")
    finally:
        gc.enable()


# Callbacks


def test_callbacks_run_once_each_in_order(executor: overlay.Client) -> None:
    seen: list[tuple[int, Any]] = []
    future = executor.submit("patient", "0.1")
    for n in range(5):
        future.add_done_callback(lambda future, n=n: seen.append((n, future.result(0))))

    until(lambda: len(seen) == 5)
    assert seen == [(n, b"0.1") for n in range(5)]
    future.add_done_callback(lambda future: seen.append((9, threading.current_thread())))
    assert seen[5:] == [(9, threading.current_thread())], "run at once, on this thread"


def test_a_callback_of_a_cancelled_future_has_run_when_cancel_returns(
    executor: overlay.Client,
) -> None:
    seen: list[bool] = []
    future = executor.submit("patient", "20")
    future.add_done_callback(lambda future: seen.append(future.cancelled()))

    assert future.cancel()

    assert seen == [True]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_failing_callback_affects_nothing_else(
    executor: overlay.Client, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []

    def fail(future: Future[bytes]) -> None:
        raise error("mine")

    first, second = executor.submit("patient", "0.1"), executor.submit("patient", "0.1")
    for future in (first, second):
        future.add_done_callback(fail)
        future.add_done_callback(lambda future: seen.append(future.result(0)))

    until(lambda: len(seen) == 2)
    assert executor.call("x", handler="upper", mode="any").result == b"X"
    assert "the callback of a Future failed" in caplog.text


def test_a_slow_callback_delays_only_other_callbacks(executor: overlay.Client) -> None:
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def slow(future: Future[bytes]) -> None:
        begun.set()
        seen.append(f"slow {go_on.wait(30)}")

    executor.submit("patient", "0.1").add_done_callback(slow)
    assert begun.wait(10)
    next_ = executor.submit("patient", "0.1")
    next_.add_done_callback(lambda future: seen.append("next"))

    assert next_.result(10) == b"0.1"
    assert executor.call("x", handler="upper", mode="any", timeout=10).result == b"X"
    assert list(executor.map("upper", numbers(50), timeout=10)) == [b"N%d" % n for n in range(50)]
    with pytest.raises(library.DeadlinePassed):
        executor.call("20", handler="patient", timeout=0.2)
    assert seen == []
    go_on.set()

    until(lambda: seen == ["slow True", "next"])


def test_close_does_not_wait_for_a_callback_that_never_returns(
    one: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CALLBACKS_WAIT_S", 0.1)
    begun, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []
    executor = overlay.connect(one.address)
    future = executor.submit("patient", "0.1")
    future.add_done_callback(lambda future: (begun.set(), seen.append(go_on.wait(30))))
    assert begun.wait(10)

    executor.close()

    assert seen == []
    go_on.set()
    until(lambda: seen == [True])


VERBS = {
    "call": lambda e: e.call("x", handler="upper", mode="any", timeout=10).result,
    "submit": lambda e: e.submit("upper", "x").result(10),
    "map": lambda e: b"".join(e.map("upper", ["x"], timeout=10)),
    "parts": lambda e: next(e.parts("x", handler="upper", timeout=10)).result,
    "forward": lambda e: e.forward("x", handler="upper", mode="any", timeout=10).result,
    "metrics": lambda e: e.metrics(timeout=10).process_id.encode(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_blocking_verb_works_in_a_callback(executor: overlay.Client, verb: str) -> None:
    result: Future[Any] = Future()
    future = executor.submit("patient", "0.1")
    future.add_done_callback(lambda _: result.set_result(VERBS[verb](executor)))

    assert result.result(10) == (b"C" if verb == "metrics" else b"X")


@pytest.mark.parametrize("verb", ["close", "shutdown"])
def test_a_callback_can_close_the_client(one: One, verb: str) -> None:
    executor = overlay.connect(one.address)
    result: Future[Any] = Future()
    future, other = executor.submit("patient", "0.1"), executor.submit("patient", "0.5")
    future.add_done_callback(lambda _: result.set_result(getattr(executor, verb)()))

    assert result.result(10) is None
    assert other.done()


def test_closing_a_client_runs_its_callbacks(one: One) -> None:
    seen: list[Any] = []
    executor = overlay.connect(one.address)
    futures = [executor.submit("patient", "20") for _ in range(100)]
    for future in futures:
        future.add_done_callback(lambda future: seen.append(future.exception(0)))

    executor.close()

    assert {type(error) for error in seen} == {library.CallCancelled}
    assert len(seen) == 100


# With asyncio


def test_a_callback_on_the_loop_may_block_or_gets_an_error(one: One) -> None:
    async def main() -> dict[str, Any]:
        found: dict[str, Any] = {}
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def blocking(name: str, ask: Any) -> Any:
            def call(_: Any) -> None:
                try:
                    found[name] = ask()
                except RuntimeError as e:
                    found[name] = str(e)
                if len(found) == len(asks):
                    loop.call_soon_threadsafe(done.set)

            return call

        with overlay.connect(one.address) as executor:
            async with overlay.connect_async(one.address) as client:
                asks = {name: (lambda ask=ask: ask(executor)) for name, ask in VERBS.items()}
                asks["submit here"] = lambda: client.submit("upper", "x").add_done_callback(print)
                asks["another loop"] = lambda: _run_and_close(client)
                for name, ask in asks.items():
                    client.submit("upper", "x").add_done_callback(blocking(name, ask))
                await asyncio.wait_for(done.wait(), 20)
                elsewhere = executor.submit("patient", "0.1")
                asks["a thread's"] = lambda: client.submit("upper", "x")
                done.clear()
                elsewhere.add_done_callback(blocking("a thread's", asks["a thread's"]))
                await asyncio.wait_for(done.wait(), 20)
        return found

    found = asyncio.run(main())

    assert {name: found.pop(name) for name in VERBS} == {
        name: b"C" if name == "metrics" else b"X" for name in VERBS
    }
    assert found.pop("submit here") is None
    assert "cannot be called from a running event loop" in found.pop("another loop")
    assert found == {"a thread's": "no running event loop"}


def _run_and_close(client: Any) -> None:
    coroutine = client.close()
    try:
        asyncio.run(coroutine)
    finally:
        coroutine.close()


def test_a_client_connects_while_all_threads_of_the_loop_are_waiting(one: One) -> None:
    """The loop's only thread waits for an answer: another one must wait for the connection."""

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        async with overlay.connect_async(one.address) as client:

            def ask() -> bytes:
                call = client.call("x", handler="upper", mode="any", timeout=5)
                answer = asyncio.run_coroutine_threadsafe(call, loop).result(10)
                return answer.result

            return await asyncio.to_thread(ask)

    assert asyncio.run(main()) == b"X"


# A user's program


PROGRAM = """
import sys
import overlay

done = []
with overlay.connect(sys.argv[1]) as executor:
    executor_too = overlay.connect(sys.argv[1])
    for n in range(20):
        future = executor.submit("upper", f"n{n}")
        future.add_done_callback(lambda f: done.append(executor_too.call(f.result(), mode="any")))
print(len(done), {answer.result[:4] for answer in done})
"""


def test_a_program_that_ends_with_its_with_block_has_all_results(one: One, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, one.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert (done.stdout, done.stderr) == ("20 {b'C: N'}\n", "")
