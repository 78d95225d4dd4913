"""The progress of maps, as their clients report it and as observers see it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import overlay
from overlay.model.limits import Limits
from overlay.model.segments import Caller, Progress
from overlay.observability.map_progress import MAX_OF_STREAM, MAX_SHOWN, Maps
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, running, six_processes, until

ANN = Caller("10.0.0.9", "ann")


def progress(number: int = 1, **fields: Any) -> Progress:
    usual: dict[str, Any] = {"handler": "h", "answered": 5, "failed": 1, "total": 9, "took_s": 2.0}
    return Progress(number=number, **(usual | fields))


def test_a_map_is_known_by_its_last_report_until_it_or_its_stream_ends() -> None:
    maps, now = Maps(lambda: now), 1.0
    maps.add("stream", ANN, progress(1))
    now = 2.0
    maps.add("stream", ANN, progress(2))
    now = 3.0
    maps.add("stream", ANN, progress(1, answered=7))

    found = [(one.progress.number, one.progress.answered, one.reported_s) for one in maps.all()]
    assert found == [(2, 5, 2.0), (1, 7, 3.0)]

    maps.add("stream", ANN, progress(1, is_over=True))
    assert [one.progress.number for one in maps.all()] == [2]
    maps.forget("stream")
    assert maps.all() == []


def test_the_number_of_maps_is_bounded_per_stream_and_in_all() -> None:
    maps = Maps()
    for stream in range(2 * MAX_SHOWN // MAX_OF_STREAM):
        for number in range(100):
            maps.add(stream, ANN, progress(number))

    assert len(maps.all()) == MAX_SHOWN
    maps.forget(0)
    maps.add(0, ANN, progress(1))
    assert maps.all()[-1].progress.number == 1


@pytest.mark.parametrize(
    ("sent", "wrong"),
    [
        (pb2.Progress(handler="x" * 65), "handler"),
        (pb2.Progress(handler="a\x1b[2J"), "handler"),
        (pb2.Progress(took_s=float("nan")), "took_s"),
        (pb2.Progress(took_s=-1.0), "took_s"),
    ],
)
def test_an_invalid_progress_is_refused_with_the_field(sent: pb2.Progress, wrong: str) -> None:
    with pytest.raises(overlay.BadRequest, match=f"progress: {wrong}"):
        codec.read_progress(sent, Limits())


def test_a_total_below_what_is_answered_counts_as_unknown() -> None:
    sent = pb2.Progress(number=3, answered=2**63, failed=2, total=9, took_s=1.0)

    assert codec.read_progress(sent, Limits()).total == 0


HANDLER = """
import time

def slow(payload, context):
    time.sleep(0.02)
    if payload == b"13":
        raise ValueError
    return payload
"""


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("maps")
    (folder / "mine.py").write_text(HANDLER)
    slow = {"slow": {"call": "mine:slow", "slots": 1}}
    with running(folder, six_processes(handlers=slow)) as found:
        yield found


def report(six: Overlay) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "client.py"), "127.0.0.1", str(six.port("A"))]
    done = subprocess.run(
        [*command, "top", "--once", "--json"], capture_output=True, text=True, timeout=60
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)["maps"]
    return found


def known(six: Overlay) -> list[pb2.RunningMap]:
    return list(six.metrics("A").maps)


def payloads(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def test_a_map_is_shown_while_it_runs_and_forgotten_when_it_is_done(six: Overlay) -> None:
    with overlay.connect(six.address("A")) as client:
        results = client.map_as_completed("slow", payloads(400), window=40)
        taken = [next(results) for _ in range(250)]
        until(lambda: known(six), what="the map's report")
        (seen,) = report(six)
        taken.extend(results)
        until(lambda: not known(six), what="the end of the map")

    assert (seen["handler"], seen["total"], seen["failed"]) == ("slow", 400, 1)
    assert 0 < seen["answered"] < 400
    assert seen["caller"].startswith("127.0.0.1")
    assert seen["rate"] > 0
    assert seen["left_s"] is not None
    assert len(taken) == 400


def test_a_map_without_a_length_has_no_total(six: Overlay) -> None:
    async def main() -> list[pb2.RunningMap]:
        async with overlay.connect_async(six.address("A")) as client:
            async for _ in client.map("slow", (b"x" for _ in range(10_000)), window=40):
                if found := await asyncio.to_thread(known, six):
                    return found
        return []

    (seen,) = asyncio.run(main())

    assert (seen.progress.total, seen.progress.handler) == (0, "slow")
    until(lambda: not known(six), what="the end of an abandoned map")


def test_a_client_that_reports_nonsense_ends_only_its_own_stream(six: Overlay) -> None:
    frame = pb2.Frame(progress=[pb2.Progress(took_s=float("inf"))])
    with pytest.raises(grpc.RpcError) as caught:
        list(six.stub("A").ForwardStream(iter([frame]), timeout=20))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "took_s" in caught.value.details()


def test_a_map_whose_client_is_gone_is_forgotten(six: Overlay) -> None:
    script = Path(six.path).parent / "maps.py"
    script.write_text(
        "import sys, overlay\n"
        "client = overlay.connect(sys.argv[1])\n"
        "for result in client.map('slow', [b'x'] * 100_000): pass\n"
    )
    command = [sys.executable, str(script), six.address("A")]
    with subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}) as client:
        try:
            until(lambda: known(six), 20, "the map's report")
        finally:
            client.kill()

    until(lambda: not known(six), what="the end of its stream")
