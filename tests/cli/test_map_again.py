"""Retries of a map's payloads that a process rejects, and that provably did not run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

import overlay
from overlay.model.segments import Code, Executed
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import free_port

ROWS = 60  # more than the retry budget of calls


class Reluctant(pb2_grpc.OverlayNodeServicer):
    """Rejects each payload a number of times before it answers."""

    def __init__(self) -> None:
        self.times = 0
        self.executed = pb2.NO
        self.seen: Counter[bytes] = Counter()

    def ForwardStream(self, frames: Any, context: Any) -> Any:
        context.send_initial_metadata(((codec.MAX_BYTES_KEY, str(2**24)),))
        for frame in frames:
            answer = pb2.Frame()
            for made in frame.segments:
                slice_ = answer.slices.add(number=made.number, count=made.count)
                for row, payload in enumerate(made.payloads.items):
                    self._answer(slice_, row, payload)
            yield answer

    def _answer(self, slice_: Any, row: int, payload: bytes) -> None:
        self.seen[payload] += 1
        refuses = self.seen[payload] <= self.times
        slice_.results.items.append(b"" if refuses else payload)
        if refuses:
            slice_.failures.add(
                start=row, count=1, code=Code.UNAVAILABLE, executed=self.executed,
                reason="no worker can be reached", retry_after_ms=1,
            )  # fmt: skip


@pytest.fixture
def played() -> Iterator[tuple[Reluctant, str]]:
    servicer, server = Reluctant(), grpc.server(futures.ThreadPoolExecutor(4))
    pb2_grpc.add_OverlayNodeServicer_to_server(servicer, server)
    address = f"127.0.0.1:{free_port()}"
    server.add_insecure_port(address)
    server.start()
    yield servicer, address
    server.stop(0)


PAYLOADS = [b"%d" % n for n in range(ROWS)]


def mapped(address: str, is_async: bool, **options: Any) -> list[bytes | overlay.CallFailed]:
    if not is_async:
        with overlay.connect(address) as client:
            return [r for _, r in client.map_as_completed(None, PAYLOADS, ordered=True, **options)]

    async def run() -> list[bytes | overlay.CallFailed]:
        async with overlay.connect_async(address) as client:
            found = client.map_as_completed(None, PAYLOADS, ordered=True, **options)
            return [result async for _, result in found]

    return asyncio.run(run())


@pytest.mark.parametrize("is_async", [False, True])
def test_payloads_that_did_not_run_are_retried_until_they_do(
    played: tuple[Reluctant, str], is_async: bool
) -> None:
    servicer, address = played
    servicer.times = 3

    assert mapped(address, is_async) == PAYLOADS
    assert set(servicer.seen.values()) == {4}


@pytest.mark.parametrize("is_async", [False, True])
def test_payloads_that_may_have_run_are_not_retried(
    played: tuple[Reluctant, str], is_async: bool
) -> None:
    servicer, address = played
    servicer.times, servicer.executed = 1, pb2.UNKNOWN

    results = mapped(address, is_async)

    assert {type(result) for result in results} == {overlay.client.Unavailable}
    assert set(servicer.seen.values()) == {1}


@pytest.mark.parametrize("is_async", [False, True])
def test_retries_end_at_last(played: tuple[Reluctant, str], is_async: bool) -> None:
    """They end after the map's patience without an answer, or at the payloads' deadline."""
    servicer, address = played
    servicer.times = 1_000_000

    for options in ({"patience_s": 0.5}, {"timeout": 0.6}):
        results = mapped(address, is_async, **options)
        failed = [r for r in results if isinstance(r, overlay.CallFailed)]

        assert len(failed) == ROWS
        assert {(e.code, e.executed) for e in failed} == {(Code.UNAVAILABLE, Executed.NO)}
        assert len({e.request_id for e in failed}) == ROWS
    assert max(servicer.seen.values()) < 100
