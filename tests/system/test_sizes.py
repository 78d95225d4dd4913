"""A request or an answer that is too large is refused alone, whichever process notices, also when
max_message_mib differs between processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.client.sync import CallFailed, Client, InvalidCall
from overlay.model.segments import Code, Executed
from overlay.transport import codec
from tests.harness import same_process
from tests.harness.cluster import Overlay, six_processes, until

MIB = 1024 * 1024
MODULE = """
import time
def slow(payload, context):
    time.sleep(float(context.options.get("takes_s", 0.3)))
    return context.process_id.encode() + b": " + payload[:40]
def made(payload, context):
    return bytes(int(payload))
def sized(payload, context):
    return str(len(payload)).encode()
"""
HANDLERS = {
    "slow": {"call": "mine:slow"},
    "made": {"call": "mine:made"},
    "sized": {"call": "mine:sized"},
}


class Mixed(Overlay):
    """Six processes whose files differ in max_message_mib."""

    def __init__(self, folder: Path, limits: dict[str, int]) -> None:
        super().__init__(folder, six_processes(handlers=HANDLERS))
        (folder / "mine.py").write_text(MODULE)
        for process_id, limit in limits.items():
            mine = {**self.config, "max_message_mib": limit}
            self.files[process_id] = f"{process_id}.json"
            (folder / self.files[process_id]).write_text(json.dumps(mine))


@pytest.fixture(scope="module", params=[1, 20])  # less and more than the default
def equal(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[Overlay, int]]:
    limits = dict.fromkeys("ABCDEF", request.param)
    with Mixed(tmp_path_factory.mktemp("equal"), limits) as made:
        yield made.start(), request.param


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: Any) -> Iterator[Overlay]:
    """A takes 64 MiB, the team leaders 16, D 1 and the other workers 64."""
    limits = {"A": 64, "B": 16, "E": 16, "D": 1, "C": 64, "F": 64}
    with Mixed(tmp_path_factory.mktemp("mixed"), limits) as made:
        yield made.start()


def first_call(client: Client, payload: bytes) -> bytes:
    return client.call(payload, mode="any", handler="sized").result


def by_future(client: Client, payload: bytes) -> bytes:
    return client.submit("sized", payload).result(30)


def by_map(client: Client, payload: bytes) -> bytes:
    small, large = client.map("sized", [b"abc", payload])
    assert small == b"3"
    return large


def by_parts(client: Client, payload: bytes) -> bytes:
    return next(client.parts(payload, handler="sized", first=1)).result


def by_forward(client: Client, payload: bytes) -> bytes:
    return client.forward(payload, mode="any", handler="sized").result


def by_asyncio(client: Client, payload: bytes) -> bytes:
    async def ask() -> bytes:
        async with overlay.connect_async(client.address) as other:
            called = await other.call(payload, mode="any", handler="sized")
            if len(payload) < 2 * MIB:  # the same channel, and a large payload takes long
                mapped = [r async for r in other.map("sized", [payload])]
                assert mapped == [called.result] == [await other.submit("sized", payload)]
            return called.result

    return asyncio.run(ask())


# All of them, and one for each kind of channel: where the limit is large, the ways of one channel
# differ in nothing but time.
WAYS = {
    1: [first_call, by_future, by_map, by_parts, by_forward, by_asyncio],
    20: [first_call, by_forward, by_asyncio],
}


def test_a_payload_of_the_maximum_size_is_answered_and_a_larger_one_refused_with_proof(
    equal: tuple[Overlay, int],
) -> None:
    made, limit = equal
    for way in WAYS[limit]:
        with overlay.connect(made.address("A")) as client:
            assert way(client, bytes(limit * MIB)) == str(limit * MIB).encode()
            with pytest.raises(InvalidCall, match="max_message_mib") as raised:
                way(client, bytes(limit * MIB + 1))
        assert raised.value.executed is Executed.NO


def test_only_the_call_that_is_too_large_fails(equal: tuple[Overlay, int]) -> None:
    made, limit = equal
    with overlay.connect(made.address("A")) as client:
        others = [client.submit("slow", b"%d" % n, timeout=60) for n in range(20)]
        with pytest.raises(InvalidCall, match="max_message_mib"):
            client.call(bytes((limit + 4) * MIB), timeout=60)
        with pytest.raises(InvalidCall, match="max_message_mib"):
            client.forward(bytes((limit + 4) * MIB), timeout=60)
        assert [other.result().split()[1] for other in others] == [b"%d" % n for n in range(20)]


def test_a_clients_first_call_already_knows_the_limit(equal: tuple[Overlay, int]) -> None:
    made, limit = equal

    async def ask() -> None:
        async with overlay.connect_async(made.address("A")) as client:
            small = client.submit("sized", b"abc")
            with pytest.raises(InvalidCall, match="max_message_mib"):
                await client.call(bytes((limit + 4) * MIB))
            assert await small == b"3"

    asyncio.run(ask())


def test_rows_that_together_exceed_a_message_are_all_answered(
    equal: tuple[Overlay, int],
) -> None:
    made, limit = equal
    row = bytes(limit * MIB // 4 + 1000)
    with overlay.connect(made.address("A")) as client:
        found = list(client.map("sized", [row] * 10, chunksize=10))
    assert found == [str(len(row)).encode()] * 10


def test_the_command_line_reports_the_limit(equal: tuple[Overlay, int], tmp_path: Path) -> None:
    made, limit = equal
    body = tmp_path / "body"
    body.write_bytes(bytes((limit + 4) * MIB))
    done = same_process.client("127.0.0.1", made.port("A"), "--payload", f"@{body}")
    assert done.returncode == 1, done.stderr
    assert f"more than max_message_mib allows ({limit * MIB:,})" in done.stderr


# Different limits


def test_a_request_too_large_for_the_next_process_fails_alone_and_names_both_limits(
    mixed: Overlay,
) -> None:
    with overlay.connect(mixed.address("A")) as client:
        others = [client.submit("slow", b"%d" % n, timeout=60) for n in range(20)]
        many = client.submit("slow", b"all", mode="all", timeout=60)
        with pytest.raises(CallFailed, match="max_message_mib") as raised:
            client.call(bytes(20 * MIB), timeout=60)
        assert (raised.value.code, raised.value.executed) == (
            Code.FAILED_PRECONDITION,
            Executed.NO,
        )
        assert "16,777,216" in str(raised.value)
        assert "67,108,864" in str(raised.value)
        assert [other.result().split()[1] for other in others] == [b"%d" % n for n in range(20)]
        assert not getattr(many.result(), "missing", ())
    for process_id in "AB":
        assert {n.state for n in mixed.metrics(process_id).neighbours} == {"up"}
        assert {n.failed for n in mixed.metrics("B").neighbours} <= {0}


def test_a_worker_with_a_lower_limit_costs_only_its_own_part(mixed: Overlay) -> None:
    with overlay.connect(mixed.address("A")) as client:
        answer = client.call(bytes(5 * MIB), handler="sized", timeout=60)
        unary = client.forward(bytes(5 * MIB), handler="sized", timeout=60)
        parts = {p.process_id: p for p in client.parts(bytes(5 * MIB), handler="sized", timeout=60)}
    for found in (answer, unary):
        (missing,) = found.missing
        assert (missing.process_id, missing.executed) == ("D", Executed.NO)
        assert "D takes" in missing.reason
        assert "1,048,576" in missing.reason
    assert {worker: part.ok for worker, part in parts.items()} == {"C": True, "F": True, "D": False}


def test_mode_any_finds_a_worker_whose_limit_is_high_enough(mixed: Overlay) -> None:
    with overlay.connect(mixed.address("A")) as client:
        for _ in range(10):
            found = client.call(bytes(5 * MIB), mode="any", handler="sized", timeout=60)
            assert found.result == str(5 * MIB).encode()
            assert found.parts[0].process_id in "CF"


def test_only_the_call_with_an_answer_too_large_for_the_process_above_fails(mixed: Overlay) -> None:
    with overlay.connect(mixed.address("A")) as client:
        others = [client.submit("slow", b"%d" % n, timeout=60) for n in range(20)]
        with pytest.raises(CallFailed, match="max_message_mib") as raised:
            client.call(b"%d" % (20 * MIB), team="green", handler="made", timeout=60)
        assert (raised.value.code, raised.value.executed) == (
            Code.RESOURCE_EXHAUSTED,
            Executed.YES,
        )
        assert [other.result().split()[1] for other in others] == [b"%d" % n for n in range(20)]
        good = client.call(b"%d" % (12 * MIB), mode="any", team="green", handler="made", timeout=60)
        assert len(good.result) == 12 * MIB


def test_a_client_notices_a_restart_with_another_limit(mixed: Overlay) -> None:
    folder = mixed.folder
    with overlay.connect(mixed.address("D")) as client:
        assert client.call(b"12", handler="sized").result == b"2"
        with pytest.raises(InvalidCall):
            client.call(bytes(2 * MIB), handler="sized")
        before = (folder / "D.json").read_text()
        (folder / "D.json").write_text(
            before.replace('"max_message_mib": 1', '"max_message_mib": 4')
        )
        try:
            mixed.kill("D")
            mixed.start("D")
            until(lambda: client.call(b"12", handler="sized", timeout=10).result == b"2", 20)
            found = client.call(bytes(2 * MIB), handler="sized")
            assert found.result == str(2 * MIB).encode()
        finally:
            (folder / "D.json").write_text(before)


# The limit in the metadata


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ("1048576", MIB),
        ("1073741824", 1024 * MIB),
        *((s, None) for s in ("", "0", "-1", "1048575", "1073741825", "9" * 400, "x", "1e7", "²")),
        (b"1048576", None),
        (None, None),
    ],
)
def test_a_limit_outside_the_configurable_range_is_ignored(value, limit) -> None:
    metadata = [] if value is None else [(codec.MAX_BYTES_KEY, value)]
    assert codec.read_max_bytes(metadata) == limit
