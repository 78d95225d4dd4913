"""Jobs on real processes: what was accepted is answered, whatever is killed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import overlay
from overlay.client.job_status import JobStatus
from overlay.client.jobs import Job
from overlay.model.errors import (
    CallCancelled,
    CallFailed,
    DeadlinePassed,
    HandlerFailed,
    InvalidCall,
    JobExpired,
    JobQuarantined,
    NameNotFound,
    NotReached,
    Refused,
)
from overlay.model.identity import OPERATOR
from overlay.model.jobs import JobState
from overlay.model.segments import Code
from overlay.security.tls_folder import TlsFolder
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.certificates import user_of
from tests.harness.cluster import Overlay, running, six_processes, until

MINE = """
import os
import pathlib
import time

def upper(payload, context):
    with open("ran", "ab") as file:
        file.write(payload + b"\\n")
    return payload.upper()

def brief(payload, context):
    time.sleep(0.02)
    return upper(payload, context)

def held(payload, context):
    with open("began", "ab") as file:
        file.write(payload + b"\\n")
    while not pathlib.Path("open").exists() and not context.cancelled:
        time.sleep(0.01)
    return payload.upper()

def poison(payload, context):
    with open("ran", "ab") as file:
        file.write(b"%s at %s\\n" % (payload, context.process_id.encode()))
    if pathlib.Path("armed").exists():
        os._exit(9)
    return b"survived"

def bad(payload, context):
    raise ValueError("no")

def add(a: int, b: int = 2) -> dict:
    return {"sum": a + b}

def steps(payload, context):
    for step in range(3):
        context.progress(step, 3, f"step {step}")
        end = time.monotonic() + 60
        while not pathlib.Path(f"go {step}").exists() and time.monotonic() < end:
            time.sleep(0.01)
    return b"all steps"

def wrong(payload, context):
    context.progress(-1)

def large(payload, context):
    return b"x" * int(payload)

def numbers(payload, context):
    size, *absent = payload.decode().split()
    if context.process_id in absent:
        raise ValueError("not here")
    for n in range(int(size) // 12):
        yield b"%s %09d\\n" % (context.process_id.encode(), n)

def counting(n: int):
    for number in range(n):
        yield number

def half(payload, context):
    yield b"x" * int(payload)
    with open("began", "ab") as file:
        file.write(b"half\\n")
    while not pathlib.Path("open").exists() and not context.cancelled:
        time.sleep(0.01)
    yield b"y" * int(payload)
"""
HANDLERS: dict[str, Any] = {
    name: f"mine:{name}"
    for name in (
        *("upper", "brief", "poison", "bad", "add", "large", "steps", "wrong"),
        *("numbers", "counting", "half"),
    )
} | {
    "held": {"call": "mine:held", "slots": 1},
    "steps_in_process": {"call": "mine:steps", "run": "process", "slots": 1},
}


@contextlib.contextmanager
def six(folder: Path, **top: Any) -> Iterator[Overlay]:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    config = six_processes(handlers=HANDLERS, journal="journal.db", **top)
    with running(folder, config) as found:
        yield found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with six(tmp_path_factory.mktemp("jobs") / "six") as found:
        yield found


@pytest.fixture(scope="module")
def client(shared: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(shared.address("A")) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Overlay]:
    """For a test that ends workers, which are then asked less often for a while."""
    with six(tmp_path / "six") as found:
        yield found


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with six(tmp_path_factory.mktemp("jobs") / "second") as found:
        yield found


@pytest.fixture
def empty(second: Overlay) -> Iterator[Overlay]:
    """The second six, without jobs. What a test has ended is started again afterwards."""
    yield second
    if ended := [i for i, process in second.processes.items() if process.poll() is not None]:
        second.start(*ended)
    names = [state.name.lower() for state in JobState]

    def is_empty(client: overlay.Client) -> bool:
        client.change_jobs("cancel", states=names[:2])
        client.change_jobs("drop", states=names[2:])
        found = [client.metrics(), *(second.metrics(worker) for worker in "CDF")]
        return not client.jobs() and not any(h.active for one in found for h in one.handlers)

    with overlay.connect(second.address("A"), patience_s=20) as client:
        until(lambda: is_empty(client), 30, "its jobs are over")
    for name in ("ran", "began", "open", "go 0", "go 1", "go 2"):
        (second.folder / name).unlink(missing_ok=True)


def ran(cluster: Overlay) -> list[str]:
    return lines(cluster, "ran")


def lines(cluster: Overlay, name: str) -> list[str]:
    path = cluster.folder / name
    return path.read_text().splitlines() if path.exists() else []


def in_state(job: Job, state: str, within_s: float = 20.0) -> JobStatus:
    def reached() -> JobStatus | None:
        found = job.status()
        return found if found.state == state else None

    found: JobStatus = until(reached, within_s, f"{job} is {state}")
    return found


# What a caller gets


def test_a_job_is_answered_like_a_call(client: overlay.Client) -> None:
    answer = client.later("upper", b"hello").answer(20)
    assert (answer.result, answer.hops[0], answer.coverage) == (b"HELLO", "A", (1, 1))


def test_a_job_to_all_has_the_answer_of_every_worker(client: overlay.Client) -> None:
    answer = client.later("upper", "x", mode="all").answer(20)
    assert (answer.result, answer.coverage) == (b"X\nX\nX", (3, 3))


def test_a_typed_function_gets_arguments_and_gives_values(client: overlay.Client) -> None:
    assert client.later("add", args={"a": 3}).result(20) == {"sum": 5}
    jobs = client.later_many("add", args=[{"a": n} for n in range(5)])
    assert [job.result(20) for job in jobs] == [{"sum": n + 2} for n in range(5)]
    everywhere = client.later("add", args={"a": 1}, mode="all").answer(20)
    assert everywhere.values == {worker: {"sum": 3} for worker in "CDF"}


def test_any_client_finds_a_job_by_its_id(client: overlay.Client, shared: Overlay) -> None:
    job = client.later("upper", b"mine")
    with overlay.connect(shared.address("A")) as another:
        assert another.job(job.id).result(20) == b"MINE"


def test_a_handlers_error_ends_the_job_at_the_first_attempt(client: overlay.Client) -> None:
    job = client.later("bad", b"x", key="bad-1", attempts=5)
    with pytest.raises(HandlerFailed, match="error id"):
        job.result(20)
    status = job.status()
    assert (status.state, status.attempts, status.code) == ("failed", 1, Code.INTERNAL)
    assert [text.split(":")[0] for _, text in status.story] == ["accepted", "attempt 1", "failed"]


def test_a_request_that_can_never_be_served_is_not_accepted(client: overlay.Client) -> None:
    before = client.metrics().jobs.accepted
    with pytest.raises(NameNotFound, match="nosuch"):
        client.later("nosuch", b"x")
    with pytest.raises(NameNotFound, match="blue9"):
        client.later("upper", b"x", team="blue9")
    assert client.metrics().jobs.accepted == before


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"keys": ["a", "b"]}, "keys: 2 keys for 1 payloads"),
        ({"payloads": [b"1", b"2"], "keys": ["a", "a"]}, "two jobs have the same key"),
        ({"payloads": [b"1", b"2"], "keys": ["a", ""]}, "one of them is empty"),
        ({"attempts": 2}, "attempts: 2 need a key"),
        ({"attempts": 101, "keys": ["k"]}, "attempts: 101 are more than 100"),
        ({"limit_s": float("nan")}, "limit_s: nan"),
        ({"expires_s": -1.0}, "expires_s: -1"),
        ({"start_at_s": float("inf")}, "start_at_s: inf"),
        ({"every_s": 0.5}, "every_s: 0.5 is less than 1"),
        ({"payloads": [b""] * 4097}, "payloads: 4097 are more than 4096"),
        ({"keys": ["x" * 300]}, "key: not a text of at most 256"),
        ({"keys": ["a\\nb".replace("\\n", chr(10))]}, "key: not a text"),
        ({"request": {"hops": ["Z"]}}, "has no hops or targets"),
        ({"request": {"request_id": 7}}, "chooses its request ids"),
        ({"request": {"mode": 5}}, "mode"),
        ({"request": {"payload": b"x"}, "payloads": [b"y"]}, "has no payload"),
        ({"request": {"in_parts": True, "want_parts": True}}, "want_parts: in_parts excludes it"),
    ],
)
def test_a_wrong_submit_is_refused_by_name(
    shared: Overlay, request_: dict[str, Any], told: str
) -> None:
    fields = {**request_, "request": pb2.Request(**request_.get("request", {}))}
    with pytest.raises(grpc.RpcError) as caught:
        stub(shared).Submit(pb2.SubmitRequest(**fields), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told in (caught.value.details() or "")


def stub(cluster: Overlay, process_id: str = "A") -> pb2_grpc.OverlayJobsStub:
    return pb2_grpc.OverlayJobsStub(cluster.channel(process_id))


JUNK = [
    ("Submit", b"\xff" * 50, "not protobuf"),
    ("Submit", b"\x12\x00" * 2_000_000, "memory"),  # payloads, all empty
    ("Submit", b"\x12\x00" * 5000, "payloads: 5000 are more than 4096"),
    ("Result", b"\x0a\x03abc", "'abc' is not the id of a job"),
    ("Result", b"\x11\x00\x00\x00\x00\x00\x00\xf8\x7f", "wait_s: nan"),
    ("Jobs", b"\x08\x63", "states: 99"),
    ("Jobs", b"\x18\xff\xff\x03", "limit: 65535 is more than 1000"),
    ("Jobs", b"\x22\x02zz", "'zz' is not the id of a job"),
    ("Part", b"\x0a\x03abc", "'abc' is not the id of a job"),
    ("Part", b"\x18\x01", "'' is not the id of a job"),
    ("Change", b"", "either ids or states"),
    ("Change", b"\x08\x07\x12\x10" + b"0" * 16, "action: 7"),
    ("Change", (b"\x12\x10" + b"0" * 16) * 5000, "ids: 5000 are more than 4096"),
]


@pytest.mark.parametrize(("method", "message", "told"), JUNK)
def test_junk_is_refused_and_leaves_nothing_behind(
    shared: Overlay, client: overlay.Client, method: str, message: bytes, told: str
) -> None:
    call = shared.channel("A").unary_unary(f"/OverlayJobs/{method}")
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert told in (caught.value.details() or "")
    assert client.metrics().jobs.waiters == 0
    assert client.later("upper", b"still here").result(20) == b"STILL HERE"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", 1), ("key", None), ("priority", True), ("priority", 10), ("limit_s", 0),
        ("limit_s", "1"), ("expires_s", -1), ("start_at", "noon"), ("every_s", float("inf")),
        ("attempts", 1.5), ("mode", "some"), ("team", 3), ("timeout", -1), ("args", {"a": 1}),
        ("in_parts", 1), ("in_parts", "yes"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(client: overlay.Client, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        client.later("upper", b"x", **{name: value})


def test_a_process_without_a_journal_says_who_has_one(shared: Overlay) -> None:
    with (
        overlay.connect(shared.address("C")) as worker,
        pytest.raises(
            CallFailed, match=f"the leader, A at {re.escape(shared.address('A'))}"
        ) as caught,
    ):
        worker.later("upper", b"x")
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_leader_without_a_journal_says_how_to_get_one(tmp_path: Path) -> None:
    with Overlay(tmp_path / "six", six_processes()) as bare:
        bare.start("A")
        with (
            overlay.connect(bare.address("A")) as client,
            pytest.raises(CallFailed, match=r'add "journal": "journal\.db"'),
        ):
            client.later(None, b"x")


def test_an_unknown_id_is_not_found(client: overlay.Client) -> None:
    with pytest.raises(NameNotFound, match="there is no job 00000000ff000000"):
        client.job("00000000ff000000").status()
    with pytest.raises(ValueError, match="not the id of a job"):
        client.job("7")
    changed = client.change_jobs("cancel", ["00000000ff000000"])
    assert (changed.changed, changed.unknown) == (0, ("00000000ff000000",))


def test_a_key_submits_once(client: overlay.Client, shared: Overlay) -> None:
    jobs = [client.later("upper", b"once only", key="once") for _ in range(3)]
    assert len({job.id for job in jobs}) == 1
    assert jobs[0].result(20) == b"ONCE ONLY"
    assert client.later("upper", b"once only", key="once").id == jobs[0].id
    assert ran(shared).count("once only") == 1
    with pytest.raises(InvalidCall, match="'once' was used for another job"):
        client.later("upper", b"another", key="once")


def test_threads_that_submit_at_once_each_get_their_own_job(client: overlay.Client) -> None:
    with ThreadPoolExecutor(32) as pool:
        jobs = list(pool.map(lambda n: client.later("upper", b"job %d" % n), range(300)))
        results = list(pool.map(lambda job: job.result(30), jobs))
    assert len({job.id for job in jobs}) == 300
    assert results == [b"JOB %d" % n for n in range(300)]


def test_a_wrong_job_fails_alone_among_those_of_other_threads(client: overlay.Client) -> None:
    def submit(n: int) -> str:
        try:
            return client.later("upper" if n % 3 else "nosuch", b"x").id
        except NameNotFound:
            return ""

    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(submit, range(90)))
    assert [bool(id_) for id_ in ids] == [bool(n % 3) for n in range(90)]


def test_an_asyncio_client_waits_for_many_jobs(shared: Overlay) -> None:
    async def main() -> list[bytes]:
        async with overlay.connect_async(shared.address("A")) as client:
            jobs = [await client.later("brief", b"a%d" % n) for n in range(40)]
            assert (await jobs[0].status()).state in ("waiting", "running", "done")
            results = await asyncio.gather(*(job.result(30) for job in jobs))
            assert await client.job(jobs[0].id).cancel() is False
            (typed,) = await client.later_many("add", args=[{"a": 1}])
            assert await typed.result(20) == {"sum": 3}
            assert (await client.jobs(limit=1))[0].id == typed.id
            assert (await client.change_jobs("drop", [typed.id])).changed == 1
            late = await client.later("upper", b"x", start_at=time.time() + 60)
            with pytest.raises(DeadlinePassed):
                await late.wait(0.3)
            assert await late.cancel() is True
            return results

    assert asyncio.run(main()) == [b"A%d" % n for n in range(40)]


@pytest.mark.parametrize("handler", ["steps", "steps_in_process"])
def test_a_handler_reports_its_progress(empty: Overlay, handler: str) -> None:
    with overlay.connect(empty.address("A")) as client:
        job = client.later(handler, b"x")
        for step in range(3):
            expected = step, 3, f"step {step}"
            until(lambda wanted=expected: job.status().progress == wanted, 20)  # type: ignore[misc]
            assert [s.progress for s in client.jobs()] == [expected]
            (empty.folder / f"go {step}").write_text("")
        assert job.result(20) == b"all steps"
        assert job.status().progress is None
        with pytest.raises(HandlerFailed):
            client.later("wrong", b"x").result(20)


# In parts


def of_numbers(worker: str, size: int) -> bytes:
    """What the handler `numbers` gives there."""
    return b"".join(b"%s %09d\n" % (worker.encode(), n) for n in range(size // 12))


def test_of_a_job_in_parts_each_part_may_be_larger_than_a_message(tmp_path: Path) -> None:
    with (
        six(tmp_path / "six", max_message_mib=1) as cluster,
        overlay.connect(cluster.address("A")) as client,
    ):
        job = client.later("numbers", b"3000000", mode="all", in_parts=True)
        found = {part.process_id: part.result for part in job.parts(60)}
        assert found == {worker: of_numbers(worker, 3_000_000) for worker in "CDF"}

        answer = job.answer()
        assert (answer.coverage, answer.hops) == ((3, 3), tuple("ABCEDF"))
        assert [(part.process_id, part.size) for part in answer.parts] == [
            (worker, 3_000_000) for worker in "CDF"
        ]
        status = job.status()
        assert status.in_parts
        assert status.size > 9_000_000
        with pytest.raises(InvalidCall, match="read them with `parts`"):
            job.result()
        whole = client.later("numbers", b"3000000", mode="all")
        with pytest.raises(CallFailed, match="max_message_mib"):
            whole.result(60)

        one = client.later("numbers", b"3000000", in_parts=True)
        result = one.result(60)
        (part,) = one.answer().parts
        assert result == of_numbers(part.process_id, 3_000_000)
        assert one.answer().hops[0] == "A"
        assert next(one.parts()).result == result
        small = client.later("add", args={"a": 3}, in_parts=True)
        assert small.result(20) == {"sum": 5}
        refused = client.later("bad", b"x", in_parts=True)
        with pytest.raises(HandlerFailed, match="error id"):
            refused.result(20)

        some = client.later("numbers", b"1200000 D", mode="all", in_parts=True)
        by_worker = {part.process_id: part for part in some.parts(60)}
        assert [by_worker[worker].ok for worker in "CDF"] == [True, False, True]
        assert by_worker["F"].result == of_numbers("F", 1_200_000)
        assert "error id" in by_worker["D"].reason
        assert [part.process_id for part in some.answer().missing] == ["D"]

        asked = stub(cluster)
        for request, told in [
            ({"id": some.id, "process_id": "D"}, f"job {some.id} is done and has 0 bytes of 'D'"),
            ({"id": some.id, "process_id": "C", "at": 1_200_001}, "none from 1,200,001 on"),
            ({"id": whole.id, "process_id": "C"}, "is failed and has 0 bytes"),
            ({"id": "0" * 16, "process_id": "C"}, "there is no job"),
        ]:
            with pytest.raises(grpc.RpcError) as caught:
                asked.Part(pb2.PartRequest(**request), timeout=10)
            assert told in (caught.value.details() or "")

        client.change_jobs("drop", states=["done", "failed"])
        counts = client.jobs().counts
        assert (counts["done"], counts["bytes"]) == (0, 0)


def test_a_job_in_parts_whose_every_part_fails_has_failed(client: overlay.Client) -> None:
    job = client.later("numbers", b"1200 C D F", mode="all", in_parts=True)
    with pytest.raises(HandlerFailed, match="error id"):
        list(job.parts(20))
    assert job.status().size < 1000


def test_parts_can_be_empty_and_jobs_without_them_say_so(client: overlay.Client) -> None:
    empty = client.later("numbers", b"0", mode="all", in_parts=True)
    assert [part.result for part in empty.parts(20)] == [b"", b"", b""]
    with pytest.raises(InvalidCall, match="was not submitted with in_parts"):
        list(client.later("upper", b"x", mode="all").parts(20))


def test_many_jobs_in_parts_run_at_once_for_an_asyncio_client(shared: Overlay) -> None:
    async def main() -> list[list[bytes]]:
        async with overlay.connect_async(shared.address("A")) as client:
            payloads = [b"%d" % (12_000 * n) for n in range(20)]
            jobs = await client.later_many("numbers", payloads, mode="all", in_parts=True)
            found = []
            for job in jobs:
                found.append([part.result async for part in job.parts(60)])
            (job,) = await client.later_many("counting", args=[{"n": 3}], mode="all", in_parts=True)
            assert [part.value async for part in job.parts(20)] == [[0, 1, 2]] * 3
            return found

    expected = [[of_numbers(worker, 12_000 * n) for worker in "CDF"] for n in range(20)]
    assert asyncio.run(main()) == expected


def test_parts_of_a_killed_leaders_attempt_are_not_mixed_with_the_next(own: Overlay) -> None:
    size = 500_000
    with overlay.connect(own.address("A")) as client:
        job = client.later("half", b"%d" % size, mode="all", in_parts=True, key="k")
        once = client.later("half", b"%d" % size, mode="all", in_parts=True)
        until(lambda: job.status().size > size and once.status().size > size, 20)
        own.kill("A")
        (own.folder / "open").touch()
        own.start("A")
        found = [part.result for part in job.parts(60)]
        assert found == [b"x" * size + b"y" * size] * 3
        assert job.status().attempts == 2
        with pytest.raises(JobQuarantined):
            list(once.parts(20))
        assert once.status().size < 1000, "nothing is kept of what came to nothing"


def test_a_part_that_finds_no_room_puts_its_job_into_quarantine(tmp_path: Path) -> None:
    with (
        six(tmp_path / "six", max_journal_mib=2) as cluster,
        overlay.connect(cluster.address("A")) as client,
    ):
        job = client.later("large", b"5000000", mode="all", in_parts=True)
        with pytest.raises(JobQuarantined, match=r"could not be kept: .*max_journal_mib"):
            list(job.parts(60))
        assert client.later("upper", b"still here").result(20) == b"STILL HERE"
        fits = client.later("large", b"500000", mode="all", in_parts=True)
        assert [len(part.result) for part in fits.parts(20)] == [500_000] * 3


def test_a_job_in_parts_is_forgotten_for_room_only_when_its_last_part_was_read(
    tmp_path: Path,
) -> None:
    with (
        six(tmp_path / "six", max_jobs=1) as cluster,
        overlay.connect(cluster.address("A")) as client,
    ):
        job = client.later("large", b"1500000", mode="all", in_parts=True)
        parts = job.parts(20)
        assert len(next(parts).result) == 1_500_000
        with pytest.raises(Refused, match="max_jobs"):
            client.later("upper", b"x")
        assert [len(part.result) for part in parts] == [1_500_000] * 2
        assert client.later("upper", b"x").result(20) == b"X"


# Waiting, in order, and giving up


def test_a_waiting_job_knows_its_position_and_can_be_cancelled(empty: Overlay) -> None:
    with overlay.connect(empty.address("A")) as client:
        jobs = client.later_many("held", [b"%d" % n for n in range(12)])
        until(lambda: len(lines(empty, "began")) == 3, 10)
        states = Counter(job.state for job in jobs)
        # Three workers with a slot each; a few more may stand in the leader's empty queue.
        assert states["running"] <= 3 + 4, states
        last = jobs[-1].status()
        assert (last.state, last.position) == ("waiting", states["waiting"])

        assert jobs[-1].cancel() is True
        assert jobs[-1].cancel() is False
        with pytest.raises(CallCancelled, match="cancelled before it was started"):
            jobs[-1].result(5)

        first = next(job for job in jobs if job.state == "running")
        assert first.cancel() is True
        with pytest.raises(CallCancelled):
            first.result(10)

        waiting = pb2.ResultRequest(id=jobs[1].id, wait_s=0.5)
        began = time.monotonic()
        assert stub(empty).Result(waiting, timeout=10).state == pb2.RUNNING
        assert time.monotonic() - began >= 0.5
        with pytest.raises(DeadlinePassed, match="it goes on"):
            jobs[1].result(0.2)

        (empty.folder / "open").write_text("")
        results = [job.result(20) for job in jobs[1:-1] if job is not first]
        assert all(result.isdigit() for result in results)


def test_a_call_that_waits_is_answered_at_the_end_and_those_who_leave_are_forgotten(
    empty: Overlay,
) -> None:
    with overlay.connect(empty.address("A")) as client:
        job = client.later("held", b"x")
        in_state(job, "running")
        calls = [
            stub(empty).Result.future(pb2.ResultRequest(id=job.id, wait_s=60), timeout=60)
            for _ in range(50)
        ]
        until(lambda: empty.metrics("A").jobs.waiters == 50, 10)
        for call in calls[25:]:
            call.cancel()
        until(lambda: empty.metrics("A").jobs.waiters == 25, 10)
        (empty.folder / "open").write_text("")
        assert {call.result(10).state for call in calls[:25]} == {pb2.DONE}
        assert empty.metrics("A").jobs.waiters == 0


def test_a_job_starts_at_its_time_and_expires_without_a_worker(own: Overlay) -> None:
    with overlay.connect(own.address("A")) as client:
        at = time.time() + 1.5
        later = client.later("upper", b"x", start_at=at)
        assert later.status().due == pytest.approx(at, abs=0.001)
        assert later.wait(20).started >= at
        for worker in "CDF":
            own.kill(worker)
        job = client.later("upper", b"y", expires_s=1.0)
        with pytest.raises(JobExpired, match="not started in time"):
            job.result(30)


def test_jobs_wait_for_workers_that_are_away(own: Overlay) -> None:
    with overlay.connect(own.address("A")) as client:
        for worker in "CDF":
            own.kill(worker)
        jobs = client.later_many("upper", [b"%d" % n for n in range(100)])
        time.sleep(1.5)
        states = Counter(status.state for status in client.jobs(limit=200))
        assert states["waiting"] + states["running"] == 100, states
        own.serve("C", "D", "F")
        assert [job.result(60) for job in jobs] == [b"%d" % n for n in range(100)]
        assert Counter(ran(own)) == Counter({str(n): 1 for n in range(100)})


def test_a_schedule_runs_again_and_again_until_it_is_cancelled(client: overlay.Client) -> None:
    schedule = client.later("upper", b"tick", every_s=1.0)

    def made() -> list[JobStatus]:
        return [s for s in client.jobs(limit=1000) if s.schedule == schedule.id]

    until(lambda: len([s for s in made() if s.state == "done"]) >= 3, 20)
    assert schedule.status().every_s == 1.0
    with pytest.raises(InvalidCall, match="a schedule, which has no end"):
        schedule.wait(5)
    assert schedule.cancel()
    count = len(made())
    time.sleep(1.2)
    assert len(made()) == count
    with pytest.raises(NameNotFound):
        schedule.status()


# What is killed


def test_what_was_accepted_is_answered_though_the_leader_is_killed(empty: Overlay) -> None:
    payloads = [b"job %d" % n for n in range(400)]
    keys = [f"k{n}" for n in range(400)]
    with overlay.connect(empty.address("A")) as client:
        jobs = client.later_many("brief", payloads, keys=keys, attempts=5)
        for _ in range(3):
            time.sleep(random.uniform(0.1, 0.4))
            empty.kill("A")
            empty.serve("A")
        assert [job.result(60) for job in jobs] == [payload.upper() for payload in payloads]
        status = [job.status() for job in jobs]
    assert all(1 <= s.attempts <= 4 for s in status), "the last one ended, as did those before"
    times = Counter(ran(empty))
    assert set(times) == {payload.decode() for payload in payloads}
    assert max(times.values()) <= 4


def test_without_a_key_a_job_that_may_have_run_is_quarantined_and_runs_once(empty: Overlay) -> None:
    with overlay.connect(empty.address("A")) as client:
        jobs = client.later_many("held", [b"%d" % n for n in range(30)])
        until(lambda: len(lines(empty, "began")) == 3, 10)
        empty.kill("A")
        (empty.folder / "open").write_text("")
        empty.serve("A")
        ended = [job.wait(60) for job in jobs]
        states = Counter(status.state for status in ended)
        assert set(states) == {"done", "quarantined"}
        # Those that ran, and the few that had been handed to the leader's queue.
        assert 3 <= states["quarantined"] <= 3 + 4, states
        held = next(job for job in jobs if job.status().state == "quarantined")
        with pytest.raises(JobQuarantined, match="the leader ended while it ran"):
            held.result(1)
        began = Counter(lines(empty, "began"))
        assert max(began.values()) == 1

        assert (
            client.change_jobs("release", states=["quarantined"]).changed == states["quarantined"]
        )
        assert sorted(int(job.result(30)) for job in jobs) == list(range(30))


@pytest.mark.parametrize(("key", "attempts"), [("", 1), ("careful", 2)])
def test_a_payload_that_kills_its_worker_is_stopped_after_its_attempts(
    own: Overlay, key: str, attempts: int
) -> None:
    (own.folder / "armed").write_text("")
    with overlay.connect(own.address("A")) as client:
        job = client.later("poison", b"p", key=key, attempts=attempts if key else 0)
        killed = 0
        while killed < attempts:
            until(lambda: any(own.processes[w].poll() is not None for w in "CDF"), 30)
            for worker in "CDF":
                if own.processes[worker].poll() is not None:
                    killed += 1
                    own.serve(worker)
        assert in_state(job, "quarantined").attempts == attempts
        time.sleep(1.5)  # it is not started again
        assert len(ran(own)) == attempts
        assert all(own.processes[w].poll() is None for w in "CDF")
        assert client.later("upper", b"others go on").result(20) == b"OTHERS GO ON"

        (own.folder / "armed").unlink()
        client.change_jobs("release", [job.id])
        assert job.result(30) == b"survived"


def test_everything_is_killed_and_every_answer_is_right(empty: Overlay) -> None:
    payloads = [b"job %d" % n for n in range(1000)]
    with overlay.connect(empty.address("A")) as client:
        jobs = client.later_many("upper", payloads, keys=[f"all {n}" for n in range(1000)])
    time.sleep(0.2)
    for process_id in empty.ids:
        empty.kill(process_id)
    empty.start()
    with overlay.connect(empty.address("A")) as client:
        results = [client.job(job.id).result(60) for job in jobs]
    assert results == [payload.upper() for payload in payloads]


def test_an_orderly_stop_leaves_nothing_in_doubt(empty: Overlay) -> None:
    """What runs is answered, what waits is kept, and nothing runs twice, without any key."""
    with overlay.connect(empty.address("A"), patience_s=10) as client:
        jobs = client.later_many("brief", [b"%d" % n for n in range(600)])
        for _ in range(2):
            time.sleep(0.15)
            empty.processes["A"].terminate()
            empty.processes["A"].wait(20)
            empty.serve("A")
        assert [job.result(60) for job in jobs] == [b"%d" % n for n in range(600)]
    assert Counter(ran(empty)) == Counter({str(n): 1 for n in range(600)})


def test_a_wait_goes_on_while_the_leader_is_away(empty: Overlay) -> None:
    with overlay.connect(empty.address("A")) as client, ThreadPoolExecutor(4) as pool:
        job = client.later("held", b"patient", key="p")
        in_state(job, "running")
        waits = [pool.submit(job.result, 60) for _ in range(4)]
        time.sleep(0.5)
        empty.kill("A")
        time.sleep(1)
        (empty.folder / "open").write_text("")
        empty.serve("A")
        assert {wait.result(60) for wait in waits} == {b"PATIENT"}


def test_no_leader_is_said_in_time(tmp_path: Path) -> None:
    with overlay.connect("127.0.0.1:9", patience_s=0.3) as client:
        with pytest.raises(NotReached):
            client.later("upper", b"x")
        with pytest.raises(NotReached):
            client.job("0" * 16).status()


# Bounds


def test_a_full_journal_refuses_and_drops_nothing(tmp_path: Path) -> None:
    with six(tmp_path / "six", max_jobs=50) as small, overlay.connect(small.address("A")) as client:
        jobs = client.later_many("held", [b"%d" % n for n in range(50)])
        with pytest.raises(overlay.client.Refused, match="50 jobs, as many as it may"):
            client.later("upper", b"x")
        with pytest.raises(overlay.client.Refused):
            client.later_many("upper", [b"a", b"b"])
        assert small.metrics("A").jobs.refused == 3
        (small.folder / "open").write_text("")
        assert len([job.result(30) for job in jobs]) == 50
        assert client.later("upper", b"x").result(20) == b"X", "fetched answers make room"


def test_a_too_large_payload_or_answer_is_refused_by_size(tmp_path: Path) -> None:
    with (
        six(tmp_path / "six", max_message_mib=1) as small,
        overlay.connect(small.address("A")) as client,
    ):
        with pytest.raises(InvalidCall, match="max_message_mib"):
            client.later("upper", b"x" * (1024 * 1024 + 1))
        job = client.later("large", b"%d" % (2 * 1024 * 1024))
        with pytest.raises(CallFailed, match="max_message_mib"):
            job.result(20)
        assert job.status().state == "failed"
        assert len(client.later("large", b"1000000").result(20)) == 1_000_000


# Whose they are


def test_with_certificates_a_job_belongs_to_its_caller(tmp_path: Path) -> None:
    with six(tmp_path / "six", tls="tls") as closed:
        folder = TlsFolder(closed.folder / "tls")
        ann, bob = (user_of(folder, tmp_path / name, name).path for name in ("ann", "bob"))
        boss = user_of(folder, tmp_path / "boss", "boss", OPERATOR).path

        def connect(user: Path) -> overlay.Client:
            return overlay.connect(closed.address("A"), tls=user)

        with connect(ann) as of_ann, connect(bob) as of_bob, connect(boss) as of_boss:
            job = of_ann.later("upper", b"secret")
            assert job.result(20) == b"SECRET"
            with pytest.raises(NameNotFound):
                of_bob.job(job.id).answer(5)
            assert of_bob.change_jobs("drop", [job.id]).unknown == (job.id,)
            assert of_bob.jobs() == []
            assert [s.id for s in of_ann.jobs()] == [s.id for s in of_boss.jobs()] == [job.id]
            assert of_boss.job(job.id).result(5) == b"SECRET"
            assert of_bob.later("upper", b"secret", key="k").id != job.id
            assert of_boss.change_jobs("drop", states=["done"]).changed >= 1


def test_a_caller_without_the_right_submits_nothing(tmp_path: Path) -> None:
    access = {"ann": {"handlers": ["upper"]}, "bob": {"verbs": ["metrics"]}}
    with six(tmp_path / "six", tls="tls", access=access) as closed:
        folder = TlsFolder(closed.folder / "tls")
        with overlay.connect(
            closed.address("A"), tls=user_of(folder, tmp_path / "a", "ann").path
        ) as ann:
            assert ann.later("upper", b"x").result(20) == b"X"
            with pytest.raises(CallFailed, match="may not use handler 'brief'") as caught:
                ann.later("brief", b"x")
            assert caught.value.code is Code.PERMISSION_DENIED
        with overlay.connect(
            closed.address("A"), tls=user_of(folder, tmp_path / "b", "bob").path
        ) as bob:
            for ask in (lambda: bob.later("upper", b"x"), bob.jobs):
                with pytest.raises(CallFailed, match="bob may not send requests"):
                    ask()
