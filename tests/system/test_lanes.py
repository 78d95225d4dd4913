"""Lanes: short requests go straight to a lent worker, and every promise holds there too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import overlay
from overlay.model.errors import DeadlinePassed, HandlerFailed, Unavailable
from overlay.model.segments import Code, Executed
from overlay.security.tls_folder import TlsFolder
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness import same_process
from tests.harness.certificates import user_of
from tests.harness.cluster import ROOT, Overlay, running, six_processes, until

MINE = """
import time

def quick(payload, context):
    if payload == b"bad":
        raise ValueError("bad")
    if payload.startswith(b"nap "):
        end = time.monotonic() + float(payload[4:])
        while time.monotonic() < end and not context.cancelled:
            time.sleep(0.01)
        if context.cancelled:
            open("cancelled", "a").write("x")
    return context.process_id.encode()

def slow(payload, context):
    time.sleep(0.05)
    return b"slow"

def note(payload, context):
    open("notes", "a").write(payload.decode() + "\\n")
    return payload
"""
HANDLERS = {name: f"mine:{name}" for name in ("quick", "slow", "note")}


@contextlib.contextmanager
def six(folder: Path, **top: Any) -> Iterator[Overlay]:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    with running(folder, six_processes(handlers=HANDLERS, **top)) as found:
        yield found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with six(tmp_path_factory.mktemp("lanes") / "six") as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Overlay]:
    with six(tmp_path / "six") as found:
        yield found


@pytest.fixture
def client(shared: Overlay) -> Iterator[overlay.Client]:
    until(lambda: not shared.metrics("A").lanes, 10, "the last test's leases have ended")
    with overlay.connect(shared.address("A")) as found:
        yield found


def path_of(client: overlay.Client, payload: str = "x", handler: str = "quick") -> str:
    return " ".join(client.call(payload, handler=handler, mode="any", timeout=20).hops)


def until_on_a_lane(client: overlay.Client, handler: str = "quick") -> str:
    """Calls until they go straight to a worker; returns which."""
    end = time.monotonic() + 20
    while len(path := path_of(client, handler=handler)) > 1:
        assert time.monotonic() < end, "no lane within 20 s"
    return path


@contextlib.contextmanager
def asking(client: overlay.Client) -> Iterator[None]:
    """Calls go on meanwhile."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            path_of(client)
            time.sleep(0.002)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(ask)
        try:
            yield
        finally:
            stop.set()
            done.result()


def goes_on_lanes(client: overlay.Client, calls: int = 200) -> bool:
    return any(len(path_of(client)) == 1 for _ in range(calls))


def test_many_short_requests_go_straight_to_a_worker(client: overlay.Client) -> None:
    worker = until_on_a_lane(client)

    assert {path_of(client) for _ in range(50)} == {worker}


def test_an_asyncio_client_has_lanes_too(shared: Overlay) -> None:
    async def main() -> set[int]:
        found = set()
        async with overlay.connect_async(shared.address("A")) as client:
            for _ in range(300):
                answer = await client.call("x", handler="quick", mode="any")
                found.add(len(answer.hops))
        return found

    assert 1 in asyncio.run(main())


def test_a_client_without_lanes_stays_on_the_ordinary_way(shared: Overlay) -> None:
    with overlay.connect(shared.address("A"), lanes=False) as client:
        assert not goes_on_lanes(client)


def test_long_requests_and_those_to_all_stay_on_the_ordinary_way(client: overlay.Client) -> None:
    long = {len(path_of(client, handler="slow")) for _ in range(40)}
    to_all = {client.call("x", handler="quick").result for _ in range(100)}

    assert long == {len("A B C")}
    assert to_all == {b"C\nD\nF"}


def test_the_leader_counts_what_went_straight_to_its_workers(
    shared: Overlay, client: overlay.Client
) -> None:
    before, at_workers = shared.metrics("A"), _ended_at_workers(shared)
    until_on_a_lane(client)
    with pytest.raises(HandlerFailed):
        client.call("bad", handler="quick", mode="any")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: path_of(client), range(500)))
    until(
        lambda: (
            shared.metrics("A").received - before.received == _ended_at_workers(shared) - at_workers
        )
    )
    m, workers = shared.metrics("A"), [shared.metrics(w) for w in "CDF"]
    shown = m.lanes[0]

    ended = m.completed + m.failed + m.refused + m.cancelled
    assert m.received == ended
    assert m.failed - before.failed == 1
    assert m.lane_requests - before.lane_requests >= 500
    assert m.service.count == m.waiting.count == ended
    assert (shown.handler, shown.caller, shown.unanswered) == ("quick", "127.0.0.1", 0)
    assert shown.answered >= 500 / 3
    held = [lane for w in workers for lane in w.lanes]
    assert {lane.process_id for lane in held} == {lane.process_id for lane in m.lanes}


def _ended_at_workers(overlay: Overlay) -> int:
    return sum(m.completed + m.failed for m in map(overlay.metrics, "CDF"))


def test_failures_on_a_lane_are_told_as_stories(shared: Overlay, client: overlay.Client) -> None:
    worker = until_on_a_lane(client)
    with pytest.raises(HandlerFailed) as failed:
        client.call("bad", handler="quick", mode="any")

    def stories() -> list[Any]:
        found = client.metrics(requests=100).requests
        return [story for story in found if story.request_id == failed.value.request_id]

    (story,) = until(stories)
    assert (story.code, story.hops[0].process_id) == (Code.INTERNAL, worker)
    assert f"{failed.value.request_id:016x}" in shared.log(worker)


def test_check_says_what_is_lent(shared: Overlay, client: overlay.Client) -> None:
    until_on_a_lane(client)
    with asking(client):  # or the lease may end
        shown = same_process.client(*shared.address("A").split(":"), "check").stdout

    (line,) = [line for line in shown.splitlines() if line.startswith("lanes ")]
    assert re.fullmatch(r"lanes +\d workers? lent to clients now, [\d,]+ requests so far", line)


def test_an_idle_lease_ends_and_the_next_requests_are_answered(
    shared: Overlay, client: overlay.Client
) -> None:
    until_on_a_lane(client)
    until(lambda: not shared.metrics("A").lanes, 10, "its lease ends")
    assert all(not shared.metrics(w).lanes for w in "CDF")

    assert path_of(client)
    until_on_a_lane(client)


def test_a_client_that_leaves_leaves_no_lease(shared: Overlay) -> None:
    client = overlay.connect(shared.address("A"))
    until_on_a_lane(client)
    assert shared.metrics("A").lanes
    client.close()

    until(lambda: not any(shared.metrics(p).lanes for p in "ACDF"), 5)


DYING = """
import sys, time, overlay

client = overlay.connect(sys.argv[1])
while len(client.call("x", handler="quick", mode="any").hops) > 1:
    pass
asked = [client.submit("quick", "nap 30") for _ in range(8)]
time.sleep(0.5)
print("asked", flush=True)
time.sleep(60)
"""


def test_a_client_that_is_killed_leaves_nothing_outstanding_anywhere(shared: Overlay) -> None:
    program = [sys.executable, "-c", DYING, shared.address("A")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, stdout=subprocess.PIPE, env=env) as dying:
        assert dying.stdout.readline() == b"asked\n"
        assert any(lane.unanswered for id_ in "CDF" for lane in shared.metrics(id_).lanes)
        dying.kill()

    until(lambda: not any(shared.metrics(id_).lanes for id_ in "ACDF"), 20, "the leases have ended")

    def outstanding() -> dict[str, int]:
        links = {id_: shared.metrics(id_).neighbours for id_ in "ABE"}
        return {f"{a}-{b.process_id}": b.outstanding for a, found in links.items() for b in found}

    until(lambda: not any(outstanding().values()), 20, "nothing is outstanding")


def test_a_cancelled_request_is_cancelled_on_its_lane(
    shared: Overlay, client: overlay.Client
) -> None:
    until_on_a_lane(client)
    future = client.submit("quick", "nap 20")
    time.sleep(0.2)
    assert future.cancel()

    until(lambda: (shared.folder / "cancelled").exists(), 5)


def test_a_deadline_passes_on_a_lane_as_everywhere(client: overlay.Client) -> None:
    until_on_a_lane(client)
    began = time.monotonic()
    with pytest.raises(DeadlinePassed):
        client.call("nap 20", handler="quick", mode="any", timeout=0.5)

    assert 0.4 < time.monotonic() - began < 10


def test_long_work_of_a_lane_does_not_hold_up_the_others_callers(
    shared: Overlay, client: overlay.Client
) -> None:
    """All threads of the lent workers are busy with what turned out to be long."""
    until_on_a_lane(client)
    naps = [client.submit("quick", "nap 3") for _ in range(20)]
    with overlay.connect(shared.address("A")) as other:
        answers = [other.call("x", handler="slow", mode="any", timeout=20) for _ in range(5)]

    assert [answer.result for answer in answers] == [b"slow"] * 5
    assert all(nap.result(30) for nap in naps)


def test_leases_end_while_requests_wait(shared: Overlay, client: overlay.Client) -> None:
    until_on_a_lane(client)
    time.sleep(0.3)  # or the naps are sent ahead, as if they were as short
    with overlay.connect(shared.address("A"), lanes=False) as other:
        waiting = [other.submit("quick", "nap 2", timeout=60) for _ in range(400)]
        until(lambda: shared.metrics("A").streamed_waiting > 0)
        until(lambda: not any(lane.rows for lane in shared.metrics("A").lanes), 5)
        for future in waiting:
            future.cancel()


def test_nothing_fails_when_a_lent_worker_stops_in_order(own: Overlay) -> None:
    with overlay.connect(own.address("A")) as client:
        worker = until_on_a_lane(client)
        stop = threading.Event()
        failures: list[Exception] = []
        paths: Counter[str] = Counter()

        def ask() -> None:
            while not stop.is_set():
                try:
                    paths[path_of(client)[-1]] += 1
                except overlay.CallFailed as e:
                    failures.append(e)
                time.sleep(0.005)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        own.connect(worker).drain(grace_s=5)
        time.sleep(1)
        paths.clear()
        until(lambda: sum(paths.values()) > 200, 20)
        stop.set()
        for thread in threads:
            thread.join()

    assert failures == []
    assert worker not in paths


def test_a_lent_worker_that_is_killed_costs_only_what_it_was_running(own: Overlay) -> None:
    with overlay.connect(own.address("A")) as client:
        worker = until_on_a_lane(client)
        for _ in range(100):
            path_of(client)
        futures = [client.submit("quick", "nap 0.3") for _ in range(40)]
        time.sleep(0.1)
        own.kill(worker)
        outcomes = Counter[str]()
        for future in futures:
            error = future.exception(20)
            if error is not None:
                assert isinstance(error, Unavailable)
                assert error.executed is Executed.UNKNOWN
            outcomes["failed" if error else "answered"] += 1
        for _ in range(100):
            assert path_of(client)[-1] != worker

    assert outcomes["answered"] + outcomes["failed"] == 40


def test_a_frozen_worker_that_was_lent_costs_its_requests_their_time_and_no_more(
    own: Overlay,
) -> None:
    with overlay.connect(own.address("A")) as client:
        worker = until_on_a_lane(client)
        own.freeze(worker)
        try:
            began, paths = time.monotonic(), Counter[str]()
            failures: list[overlay.CallFailed] = []
            while sum(paths.values()) < 100:
                try:
                    paths[path_of(client)[-1]] += 1
                except overlay.CallFailed as e:
                    failures.append(e)
        finally:
            own.thaw(worker)
    assert worker not in paths
    assert len(failures) <= 2
    assert {e.executed for e in failures} <= {Executed.UNKNOWN}
    assert time.monotonic() - began < 20


def test_requests_run_once_whatever_happens_to_their_lane(own: Overlay) -> None:
    """A worker is stopped and started again and again under load."""
    answered: list[str] = []
    with overlay.connect(own.address("A")) as client:
        until_on_a_lane(client, "note")
        (own.folder / "notes").unlink()
        stop = threading.Event()

        def ask(n: int) -> None:
            count = 0
            while not stop.is_set():
                name = f"{n}-{count}"
                with contextlib.suppress(overlay.CallFailed):
                    client.call(name, handler="note", mode="any", timeout=20)
                    answered.append(name)
                count += 1
                time.sleep(0.005)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for worker in "CDF":
            time.sleep(0.3)
            own.connect(worker).drain(grace_s=5)
            own.processes[worker].wait(20)
            own.start(worker)
        stop.set()
        for thread in threads:
            thread.join()

    ran = Counter((own.folder / "notes").read_text().split())
    assert max(ran.values()) == 1
    assert set(answered) <= set(ran)
    assert len(answered) > 100


def test_the_leaders_death_ends_lanes_as_it_ends_all_else(own: Overlay) -> None:
    with overlay.connect(own.address("A"), patience_s=0.5) as client:
        worker = until_on_a_lane(client)
        own.kill("A")
        with pytest.raises(overlay.CallFailed):
            until(lambda: path_of(client) and False, 10)

        until(lambda: not own.metrics(worker).lanes, 5, "the worker's lease ends by itself")


# What a stranger may try at a worker


class Raw:
    """A stream to a worker, with this metadata."""

    def __init__(self, overlay: Overlay, process_id: str, **metadata: str) -> None:
        self._stub = overlay.stub(process_id)
        self._metadata = tuple((key.replace("_", "-"), v) for key, v in metadata.items())

    def ask(self, *segments: pb2.Segment) -> tuple[list[pb2.Slice], Any]:
        frames = iter([pb2.Frame(segments=segments)])
        call = self._stub.ForwardStream(frames, metadata=self._metadata, timeout=20)
        slices = [slice_ for frame in call for slice_ in frame.slices]
        return slices, call


def segment(number: int, count: int = 1, **fields: Any) -> pb2.Segment:
    column = pb2.Column(items=[b"x"] * count)
    fields = {"mode": pb2.ANY, "handler": "quick", **fields}
    return pb2.Segment(number=number, count=count, payloads=column, **fields)


@pytest.mark.parametrize("lease", ["", "1", "0" * 16, "f" * 16, "f" * 5000])
def test_a_lease_that_is_not_held_is_refused(shared: Overlay, lease: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        Raw(shared, "C", overlay_lease=lease).ask(segment(1))

    trailers = dict(refused.value.trailing_metadata())
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "no such lease" in refused.value.details()
    assert trailers[codec.EXECUTED_KEY] == "no"


def test_a_client_cannot_lend_itself_a_worker(shared: Overlay) -> None:
    """Only a process above it can; what a client sends in its place is ignored."""
    until(lambda: not shared.metrics("C").lanes, 10, "the last test's leases have ended")
    lent = pb2.Lent(id=77, process_id="C", handler="quick", rows=10, milliseconds=60_000)
    call = shared.stub("C").ForwardStream(iter([pb2.Frame(lent=[lent])]), timeout=20)
    assert list(call) == []

    assert not shared.metrics("C").lanes
    with pytest.raises(grpc.RpcError):
        Raw(shared, "C", overlay_lease=f"{77:016x}").ask(segment(1))


@pytest.mark.parametrize(
    "request_",
    [
        pb2.LeaseRequest(handler="no such", rows=1),
        pb2.LeaseRequest(handler="quick", team="no such", rows=1),
        pb2.LeaseRequest(),
        pb2.LeaseRequest(handler="quick", rows=2**32 - 1),
    ],
)
def test_odd_requests_for_a_lease_do_no_harm(shared: Overlay, request_: pb2.LeaseRequest) -> None:
    frame = pb2.Frame(lease_requests=[request_] * 1000, segments=[segment(1)])
    slices = []
    for answered in shared.stub("A").ForwardStream(iter([frame]), timeout=20):
        slices += answered.slices

    assert len(slices) == 1
    assert not slices[0].failures
    until(lambda: not shared.metrics("A").lanes)


def test_an_invalid_request_for_a_lease_ends_the_call(shared: Overlay) -> None:
    frame = pb2.Frame(lease_requests=[pb2.LeaseRequest(handler="x" * 100)])
    with pytest.raises(grpc.RpcError) as ended:
        list(shared.stub("A").ForwardStream(iter([frame]), timeout=20))

    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def lent(shared: Overlay, client: overlay.Client) -> Iterator[pb2.Lease]:
    """A lease of `quick`, as a client gets it over the wire."""
    until_on_a_lane(client)  # so that the leader knows that it is short
    done = threading.Event()

    def frames() -> Iterator[pb2.Frame]:
        yield pb2.Frame(lease_requests=[pb2.LeaseRequest(handler="quick", rows=1)])
        done.wait(30)

    call = shared.stub("A").ForwardStream(frames(), timeout=40)
    try:
        for frame in call:
            if frame.leases:
                yield frame.leases[0]
                break
    finally:
        done.set()
        call.cancel()


def test_a_lane_refuses_what_was_not_lent(shared: Overlay, lent: pb2.Lease) -> None:
    lane = Raw(shared, lent.process_id, overlay_lease=f"{lent.id:016x}")
    slices, call = lane.ask(
        segment(1),
        segment(2, handler="slow"),
        segment(3, mode=pb2.ALL),
        segment(4, count=min(4096, lent.rows + 1)),
    )
    metadata = dict(call.initial_metadata())
    found = {s.number: s.failures[0] if s.failures else None for s in slices}

    assert metadata[codec.LEASE_KEY] == f"{lent.id:016x}"
    assert found[1] is None
    for number in (2, 3, 4) if lent.rows < 4096 else (2, 3):
        assert found[number].code == Code.FAILED_PRECONDITION
        assert found[number].executed == pb2.NO


def test_a_lease_is_for_one_stream(shared: Overlay, lent: pb2.Lease) -> None:
    lane = Raw(shared, lent.process_id, overlay_lease=f"{lent.id:016x}")
    assert lane.ask(segment(1))[0]
    with pytest.raises(grpc.RpcError) as refused:
        lane.ask(segment(1))

    assert "another stream" in refused.value.details()


# With certificates


def test_a_lane_is_only_for_the_caller_that_it_was_lent_to(tmp_path: Path) -> None:
    with six(tmp_path / "closed", tls="tls") as closed:
        authority = TlsFolder(closed.folder / "tls")
        anna, ben = (user_of(authority, tmp_path / name, name).path for name in ("anna", "ben"))
        with overlay.connect(closed.address("A"), tls=anna) as client:
            worker = until_on_a_lane(client)
            (held,) = [lane for lane in closed.metrics(worker).lanes if lane.handler == "quick"]
            assert held.caller == "caller anna"
            lease_id = client._connection._submitter.lanes._lanes[0].lease.id  # type: ignore[union-attr]
            with overlay.connect(closed.address(worker), tls=ben) as other:
                other.call("x", handler="quick")
                channel = other._connection._main_stubs.channel  # type: ignore[union-attr]
                call = channel.stream_stream(
                    "/OverlayNode/ForwardStream",
                    request_serializer=pb2.Frame.SerializeToString,
                    response_deserializer=pb2.Frame.FromString,
                )(iter([pb2.Frame()]), metadata=codec.lease_metadata(lease_id), timeout=10)
                with pytest.raises(grpc.RpcError) as refused:
                    list(call)

    assert "no such lease of this caller" in refused.value.details()
