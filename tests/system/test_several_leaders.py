"""Several leaders that keep the same jobs, on real processes and real NATS servers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import overlay
from overlay.cli.doctor import examine
from overlay.model.config import load
from overlay.model.errors import CallFailed
from overlay.monitor.diagnosis import Grade
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import Overlay, running, until
from tests.harness.leaders import LEADERS, everybody, holder, three_leaders
from tests.harness.nats_servers import NatsServers, nats_servers

CALLERS, PAUSE_S = 64, 0.25
MINE = """
import pathlib
import time

def upper(payload, context):
    with open("ran", "ab") as file:
        file.write(payload + b"\\n")
    return payload.upper()

def held(payload, context):
    end = time.monotonic() + 120
    while not pathlib.Path("open").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return upper(payload, context)
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    with nats_servers(tmp_path_factory.mktemp("nats")) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(servers: NatsServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("leaders") / "three"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    handlers = {"upper": "mine:upper", "held": "mine:held"}
    with running(folder, three_leaders(servers.journal, handlers=handlers)) as found:
        until(lambda: holder(found), 30, "a leader has the jobs")
        yield found


def test_a_leader_without_the_jobs_says_where_they_are_and_a_client_finds_them(
    cluster: Overlay,
) -> None:
    at = holder(cluster)
    other = next(id_ for id_ in LEADERS if id_ != at)
    with grpc.insecure_channel(cluster.address(other)) as channel:
        stub = pb2_grpc.OverlayJobsStub(channel)
        asked = pb2.SubmitRequest(request=pb2.Request(mode=pb2.ANY, handler="upper"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Submit(asked, timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert f"the jobs are with {at} at {cluster.address(at)}" in error.details()
    assert ("overlay-executed", "no") in error.trailing_metadata()

    with overlay.connect(everybody(cluster)) as leaders:
        job = leaders.later("upper", b"hello")
        assert job.result(20) == b"HELLO"
        assert leaders.jobs(limit=1)[0].id == job.id
        assert leaders.call(b"live", mode="any", handler="upper").result == b"LIVE"

    async def asked() -> bytes:
        async with overlay.connect_async(everybody(cluster)) as leaders:
            job = await leaders.later("upper", b"soon")
            result: bytes = await job.result(20)
            return result

    assert asyncio.run(asked()) == b"SOON"


def test_when_the_leader_that_has_the_jobs_is_frozen_another_has_them(cluster: Overlay) -> None:
    at = holder(cluster)
    with overlay.connect(everybody(cluster)) as leaders:
        before = leaders.later("upper", b"before", key="before")
        cluster.freeze(at)
        try:
            after = leaders.later("upper", b"after", key="after", timeout=60)
            assert [job.result(60) for job in (before, after)] == [b"BEFORE", b"AFTER"]
        finally:
            cluster.thaw(at)
        until(lambda: holder(cluster) not in ("", at), 30, "it follows again")
        assert leaders.job(after.id).result(20) == b"AFTER"


def test_when_two_of_three_servers_are_lost_and_come_back_no_accepted_job_is(
    cluster: Overlay, servers: NatsServers
) -> None:
    at = holder(cluster)
    jobs = pb2_grpc.OverlayJobsStub(cluster.channel(at))
    asked = pb2.SubmitRequest(
        request=pb2.Request(mode=pb2.ANY, handler="upper"), payloads=[b"between"], keys=["between"]
    )

    def refusal(call: Any, request: Any) -> tuple[str, bool]:
        """What it says, and whether that proves that nothing was done."""
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
        return error.details(), ("overlay-executed", "no") in error.trailing_metadata()

    with overlay.connect(everybody(cluster)) as leaders:
        before = {leaders.later("upper", b"before %d" % n): n for n in range(50)}
        runs = leaders.later("held", b"held")  # without a key: it is attempted once
        until(lambda: runs.status().state == "running", 20)
        for number in (0, 1):
            servers.kill(number)
        said, is_proof = refusal(jobs.Submit, asked)
        assert is_proof or "the jobs were not changed" in said, said
        until(lambda: refusal(jobs.Submit, asked)[1], 30, "it knows that it can accept nothing")
        said, is_proof = refusal(jobs.Result, pb2.ResultRequest(id=runs.id))
        assert is_proof
        assert "no majority of the jobs' servers" in said
        (cluster.folder / "open").touch()
        until(lambda: ran(cluster, b"held"), 20, "what ran has ended")
        with pytest.raises(grpc.RpcError):
            jobs.Result(pb2.ResultRequest(id=runs.id), timeout=10)
        for number in (0, 1):
            servers.start(number)
        servers.wait()
        until(lambda: holder(cluster), 60, "a leader has the jobs")
        assert runs.result(60) == b"HELD"
        assert runs.status().attempts == 1
        assert {job.result(60): n for job, n in before.items()} == {
            b"BEFORE %d" % n: n for n in range(50)
        }
        assert leaders.later("upper", b"between", key="between").result(60) == b"BETWEEN"
        assert [ran(cluster, payload) for payload in (b"held", b"between")] == [1, 1]


def ran(cluster: Overlay, payload: bytes) -> int:
    """How often a handler has had this payload."""
    return (cluster.folder / "ran").read_bytes().split(b"\n").count(payload)


def test_when_a_leader_dies_with_its_server_no_accepted_job_is_lost(
    cluster: Overlay, servers: NatsServers
) -> None:
    accepted: dict[str, tuple[bytes, float]] = {}
    stopped = threading.Event()
    with overlay.connect(everybody(cluster)) as leaders:

        def call(caller: int) -> None:
            number = 0
            while not stopped.wait(PAUSE_S):
                payload, number = b"%d of %d" % (number, caller), number + 1
                try:
                    job = leaders.later("upper", payload, key=f"{caller}-{number}", timeout=60)
                except CallFailed:
                    continue
                accepted[job.id] = payload, time.monotonic()

        with ThreadPoolExecutor(CALLERS) as callers:
            running_ = [callers.submit(call, caller) for caller in range(CALLERS)]
            try:
                until(lambda: len(accepted) > 200, 30)
                at = holder(cluster)
                killed = time.monotonic()
                os.kill(cluster.processes[at].pid, signal.SIGKILL)
                servers.kill(LEADERS.index(at))
                until(
                    lambda: sum(when > killed for _, when in accepted.values()) > 200,
                    60,
                    "jobs are accepted again",
                )
            finally:
                stopped.set()
            for one in running_:
                one.result(60)

        def answer(id_: str) -> bytes:
            result: bytes = leaders.job(id_).result(60)
            return result

        with ThreadPoolExecutor(32) as callers:
            answers = dict(zip(accepted, callers.map(answer, accepted), strict=True))
        assert answers == {id_: payload.upper() for id_, (payload, _) in accepted.items()}
        assert leaders.call(b"live", mode="any", handler="upper").result == b"LIVE", (
            "and live requests go on"
        )
    assert holder(cluster) not in ("", at)


def test_a_server_that_confirms_before_its_disk_has_written_is_found(
    cluster: Overlay, servers: NatsServers
) -> None:
    for number in range(3):
        servers.kill(number)
        servers.start(number, sync="2m" if number == 1 else "always")
    servers.wait()

    def bad() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for process, one in examine(load(cluster.path), "overlay.json").journal:
            if one.grade is Grade.BAD:
                found.setdefault(process.id, []).append(one.state)
        return found

    unsafe = f"server {servers.addresses[1]}"
    until(lambda: bad() == {unsafe: ["unsafe"]}, 30, "only the unsafe one is left")
