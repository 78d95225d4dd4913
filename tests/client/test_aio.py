"""The asyncio client, against real processes."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import overlay
from overlay.client import sync as library
from overlay.model.segments import Code, Executed
from tests.client.conftest import Noted, numbers, uppers
from tests.client.test_sync import check_map_over_a_loss, killed_and_started
from tests.harness.cluster import free_port, until


async def until_true(condition: Any, within_s: float = 10) -> None:
    """`until` without blocking the loop."""
    await asyncio.to_thread(until, condition, within_s)


class Heart:
    """Runs on the loop every 5 ms; the longest pause shows whether the loop was blocked."""

    async def __aenter__(self) -> Heart:
        self.longest_s = 0.0
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()

    async def _beat(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            self.longest_s = max(self.longest_s, time.monotonic() - began)


# call and submit


def test_call_and_submit_give_the_same_answers_as_the_blocking_client(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            answer = await client.call("hi", want_parts=True)
            future = client.submit("upper", "hello")
            assert isinstance(future, asyncio.Future)
            assert await future == b"HELLO"
            assert answer.result == b"C: hi\nD: hi\nF: hi"
            assert answer.coverage == (3, 3)
            assert [part.result for part in answer.parts] == [b"C: hi", b"D: hi", b"F: hi"]
            assert (await client.metrics()).process_id == "A"
            assert await client.is_serving()

    asyncio.run(main())


def test_each_status_has_its_own_error_type(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            with pytest.raises(library.HandlerFailed):
                await client.submit("picky", "bad")
            with pytest.raises(library.NameNotFound):
                await client.call("x", handler="nope")
            with pytest.raises(library.DeadlinePassed):
                await client.call("5", handler="patient", timeout=0.3)
            with pytest.raises(TypeError, match="code cannot be sent"):
                client.submit(print, "x")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="window must be at least 1, not 0"):
                client.map_as_completed("upper", [], window=0)

    asyncio.run(main())


def test_each_of_thousands_of_concurrent_calls_gets_its_own_answer(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            await client.call("x")
            before = threading.active_count()
            found = await asyncio.gather(*(client.submit("upper", p) for p in numbers(3000)))
            assert found == uppers(3000)
            assert threading.active_count() < before + 50, "not one per call"

    asyncio.run(main())
    assert set(six.lines().values()) == {1}


def test_large_payloads_submitted_together_are_sent_in_separate_frames(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            found = await asyncio.gather(
                *(client.submit(None, b"%d" % n * 2_000_000) for n in range(10))
            )
            assert [result[3:4] for result in found] == [b"%d" % n for n in range(10)]

    asyncio.run(main())


@pytest.mark.parametrize("verb", ["call", "submit"])
def test_cancelling_a_task_cancels_the_remote_work(six: Noted, verb: str) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:

            async def ask() -> None:
                if verb == "call":
                    await client.call("20", mode="any", handler="patient")
                else:
                    await client.submit("patient", "20")

            task = asyncio.create_task(ask())
            await until_true(lambda: six.lines()["began"] == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_true(lambda: six.lines()["cancelled"] == 1, 2)

    asyncio.run(main())


def test_a_request_cancelled_before_the_loop_sends_it_never_runs(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            await client.call("x")
            futures = [client.submit("upper", payload) for payload in numbers(100)]
            for future in futures[::2]:
                future.cancel()
            assert await asyncio.gather(*futures[1::2]) == uppers(100)[1::2]

    asyncio.run(main())
    assert sum(six.lines().values()) == 50


def test_a_missing_server_is_reported_without_blocking_the_loop() -> None:
    async def main() -> None:
        async with (
            overlay.connect_async(f"127.0.0.1:{free_port()}", patience_s=0.6) as client,
            Heart() as heart,
        ):
            began = time.monotonic()
            ends = await asyncio.gather(
                *(client.call("x") for _ in range(200)), return_exceptions=True
            )
            assert {type(end) for end in ends} == {library.NotReached}
            assert all(end.executed is Executed.NO for end in ends)
            took_s = time.monotonic() - began
        assert took_s < 20, "the calls fail together"
        assert heart.longest_s < 0.5

    asyncio.run(main())


def test_a_client_belongs_to_one_loop(six: Noted) -> None:
    client = overlay.connect_async(six.address("A"))
    asyncio.run(_call(client))

    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        asyncio.run(_call(client))
    asyncio.run(client.close())


async def _call(client: Any) -> None:
    assert (await client.call("x", mode="any", handler="upper")).result == b"X"


# map


def test_map_keeps_the_order_of_any_kind_of_iterable(six: Noted) -> None:
    async def later() -> AsyncIterator[bytes]:
        for payload in numbers(3000):
            yield payload
            if payload.endswith(b"7"):
                await asyncio.sleep(0)

    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            for payloads in (numbers(3000), iter(numbers(3000)), later()):
                found = [result async for result in client.map("upper", payloads)]
                assert found == uppers(3000)
            few = client.map("upper", numbers(100), window=1)
            assert [result async for result in few] == uppers(100)

    asyncio.run(main())


def test_map_as_completed_gives_each_index_once_and_failures_as_results(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            slow = ["0.3" if n % 10 == 0 else "0" for n in range(40)]
            pairs = client.map_as_completed("patient", slow, chunksize=1)
            order = [index async for index, _ in pairs]
            assert sorted(order) == list(range(40))
            assert set(order[-4:]) == {0, 10, 20, 30}

            mixed = ["bad" if n % 3 == 0 else str(n) for n in range(30)]
            pairs = client.map_as_completed("picky", mixed)
            found = {index: result async for index, result in pairs}
            assert {n for n in found if isinstance(found[n], library.HandlerFailed)} == set(
                range(0, 30, 3)
            )

    asyncio.run(main())


def test_map_raises_a_failure_in_its_place_and_cancels_the_rest(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            results = client.map("picky", [*numbers(5), b"bad", *numbers(5000)])
            given = []
            with pytest.raises(library.HandlerFailed):
                await _into(given, results)
            assert given == numbers(5)

    asyncio.run(main())


async def _into(given: list[bytes], results: AsyncIterator[bytes]) -> None:
    async for result in results:
        given.append(result)


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_a_map_cancels_the_remaining_requests(six: Noted, how: str) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:

            async def ask() -> None:
                payloads = itertools.chain(["0"], itertools.repeat("20", 39))
                async for _ in client.map("patient", payloads):
                    await until_true(lambda: six.lines()["began"] == 40)
                    if how == "break":
                        break

            task = asyncio.create_task(ask())
            await until_true(lambda: six.lines()["began"] == 40)
            if how == "cancel":
                task.cancel()
            await asyncio.wait([task])
            await until_true(lambda: six.lines()["cancelled"] == 39, 3)
            assert len(asyncio.all_tasks()) == 1, "no feeder task remains"

    asyncio.run(main())


def test_payloads_are_taken_only_as_results_are_consumed(six: Noted) -> None:
    taken = 0

    async def payloads() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x"

    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            results = client.map("upper", payloads(), window=100)
            for _ in range(500):
                await results.__anext__()
            await asyncio.sleep(0.2)
            assert 500 <= taken <= 601
            await results.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_source_without_a_payload_yet_is_polled_again(six: Noted) -> None:
    found: list[bytes] = []

    def payloads() -> Iterator[Any]:
        yield b"a"
        while not found:
            yield library.NOTHING_YET
        yield b"b"

    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            async for result in client.map("upper", payloads()):
                found.append(result)

    asyncio.run(main())

    assert found == [b"A", b"B"]


def test_a_slow_source_does_not_delay_results(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            given = asyncio.Event()

            async def payloads() -> AsyncIterator[bytes]:
                for payload in numbers(3):
                    given.clear()
                    yield payload
                    await asyncio.wait_for(given.wait(), 10)

            found = []
            async for result in client.map("upper", payloads()):
                found.append(result)
                given.set()
            assert found == uppers(3)

    asyncio.run(main())


def test_an_error_in_the_payload_iterator_is_raised_and_cancels_the_rest(six: Noted) -> None:
    async def payloads() -> AsyncIterator[str]:
        for _ in range(10):
            yield "20"
        await until_true(lambda: six.lines()["began"] == 10)
        raise KeyError("mine")

    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client:
            with pytest.raises(KeyError, match="mine"):
                await _into([], client.map("patient", payloads()))
            await until_true(lambda: six.lines()["cancelled"] == 10, 3)

    asyncio.run(main())


def test_a_map_without_a_server_raises_not_reached() -> None:
    async def main() -> None:
        address = f"127.0.0.1:{free_port()}"
        async with overlay.connect_async(address, patience_s=0.3) as client:
            with pytest.raises(library.NotReached):
                await _into([], client.map(None, itertools.repeat("x")))

    asyncio.run(main())


def test_a_map_that_has_not_started_fails_if_the_process_is_stopping(own: Noted) -> None:
    async def main() -> None:
        async with (
            overlay.connect_async(own.address("A")) as held,
            overlay.connect_async(own.address("A"), patience_s=0.5) as client,
        ):
            held.submit("patient", "20")
            await until_true(lambda: own.lines()["began"] == 1)
            own.overlay.processes["A"].terminate()
            await until_true(lambda: not own.overlay.metrics("A").is_healthy)
            with pytest.raises(library.Unavailable):
                await asyncio.wait_for(_into([], client.map(None, itertools.repeat("x"))), 20)
            own.overlay.kill("A")

    asyncio.run(main())


def test_a_large_map_does_not_block_the_loop(six: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(six.address("A")) as client, Heart() as heart:
            count, began = 0, time.monotonic()
            async for _ in client.map(None, (b"%d" % n for n in range(50_000))):
                count += 1
            assert count == 50_000
            assert heart.longest_s < (time.monotonic() - began) / 2

    asyncio.run(main())


# Closing and restarts


def test_closing_fails_open_requests_and_leaves_no_thread(six: Noted) -> None:
    before = set(threading.enumerate())

    async def main() -> None:
        client = overlay.connect_async(six.address("A"))
        futures = [client.submit("patient", "20") for _ in range(500)]
        mapped = asyncio.ensure_future(_into([], client.map("patient", ["20"] * 10)))
        await until_true(lambda: six.lines()["began"] >= 100)
        async with Heart() as heart:
            await client.close()
            await client.close()
        assert all(isinstance(f.exception(), library.CallCancelled) for f in futures)
        with pytest.raises(library.CallCancelled):
            await mapped
        with pytest.raises(library.CallCancelled) as caught:
            await client.call("x")
        assert (caught.value.code, caught.value.executed) == (Code.CANCELLED, Executed.NO)
        assert heart.longest_s < 0.5
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    until(lambda: not set(threading.enumerate()) - before, 5, "its threads end")


def test_a_client_survives_a_restart_of_the_leader(own: Noted) -> None:
    async def main() -> None:
        async with overlay.connect_async(own.address("A"), patience_s=20) as client:
            held = [client.submit("patient", "20") for _ in range(20)]
            await until_true(lambda: own.lines()["began"] == 20)
            own.overlay.kill("A")
            ends = await asyncio.gather(*held, return_exceptions=True)
            assert {type(end) for end in ends} == {library.Unavailable}
            during = client.submit("upper", "during")
            await asyncio.to_thread(own.overlay.start, "A")
            assert await during == b"DURING"
            found = [result async for result in client.map("upper", numbers(500))]
            assert found == uppers(500)

    asyncio.run(main())
    lines = own.lines()
    assert lines["began"] == 20
    assert all(lines[payload.decode()] == 1 for payload in [*numbers(500), b"during"])


def test_a_map_continues_when_a_lost_leader_is_back(own: Noted) -> None:
    payloads = numbers(10_000)
    found: dict[int, bytes | library.CallFailed] = {}

    async def main() -> None:
        async with overlay.connect_async(own.address("A"), patience_s=1, lanes=False) as client:
            async for index, result in client.map_as_completed("upper", payloads, window=500):
                assert index not in found
                found[index] = result
                if len(found) == 2000:
                    back = asyncio.create_task(asyncio.to_thread(killed_and_started, own, 1.5))
            await back

    asyncio.run(main())
    check_map_over_a_loss(own, payloads, found)


def test_a_map_ends_if_the_leader_does_not_come_back(own: Noted) -> None:
    found: list[Any] = []

    async def main() -> None:
        payloads = itertools.repeat("x")
        async with overlay.connect_async(own.address("A")) as client:
            results = client.map_as_completed(
                None, payloads, window=100, patience_s=1, timeout=3600
            )
            async for pair in results:
                found.append(pair)
                if len(found) == 500:
                    own.overlay.kill("A")

    with pytest.raises(library.NotReached) as caught:
        asyncio.run(asyncio.wait_for(main(), 30))
    good = sum(isinstance(result, bytes) for _, result in found)
    assert sorted(index for index, _ in found) == list(range(len(found)))
    assert f"; {good:,} payloads were answered, " in str(caught.value)
