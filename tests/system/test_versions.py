"""Processes with different Pythons, releases, configurations and wire formats."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.model.segments import Code, Part
from overlay.peers.peers import PeerState
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness import pythons
from tests.harness.cluster import IDS, ROOT, Overlay, six_processes, until
from tests.harness.ways import Streamed, Unary, Way
from tests.peers.test_peers import Bench, Limits

MODULE = """
import platform

def here(payload, context):
    return context.process_id.encode() + b" " + platform.python_version().encode()
"""
HANDLERS = {
    "threaded": "mine:here",
    "spawned": {"call": "mine:here", "run": "process", "slots": 1, "limit_s": 20},
}


class Mixed(Overlay):
    """Six processes. python_of: the interpreter of each."""

    def __init__(self, folder: Path, config: dict[str, Any], python_of: dict[str, Path]) -> None:
        super().__init__(folder, config)
        self.python_of = python_of

    def version(self, process_id: str) -> str:
        ask = [self.python_of[process_id], "-c", pythons.ASK]
        return subprocess.check_output(ask, text=True).strip()

    def _node(self, process_id: str) -> list[str]:
        return [str(self.python_of[process_id]), *super()._node(process_id)[1:]]


@pytest.fixture(scope="module")
def interpreters() -> list[Path]:
    """With the packages, one of each version, the oldest first."""
    try:
        return [pythons.ready(python) for python in pythons.found().values()]
    except subprocess.CalledProcessError as e:
        reason = f"no packages for {e.cmd[-1]}: {e.stderr[-300:]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture
def several(interpreters: list[Path]) -> None:
    """Skips the test if there is only one Python, also in CI: Debian has no other to install."""
    if len(interpreters) < 2:
        pytest.skip("this machine has no other Python of 3.10 or later")


on_several = pytest.mark.usefixtures("several")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, interpreters: list[Path]) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "mine.py").write_text(MODULE)
    config = six_processes(handlers=HANDLERS)
    python_of = dict(zip(IDS, itertools.cycle(interpreters), strict=False))
    with Mixed(folder, config, python_of) as made:
        yield made.start()


@pytest.fixture(scope="module", params=[Unary, Streamed], ids=["unary", "streamed"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = request.param()
    yield made
    made.close()


@on_several
def test_processes_on_different_pythons_link_up_and_agree_on_the_configuration(
    mixed: Mixed,
) -> None:
    metrics = {process_id: mixed.metrics(process_id) for process_id in IDS}

    assert {i: m.python for i, m in metrics.items()} == {i: mixed.version(i) for i in IDS}
    assert len({m.python for m in metrics.values()}) > 1
    for neighbour in (n for m in metrics.values() for n in m.neighbours):
        assert (neighbour.state, neighbour.same_config) == ("up", True)


@on_several
@pytest.mark.parametrize("handler", HANDLERS)
def test_every_python_answers_a_request_to_all(mixed: Mixed, way: Way, handler: str) -> None:
    response = way.ask(mixed, "A", mode=pb2.ALL, handler=handler, timeout=30)

    versions = dict(line.split() for line in response.result.decode().splitlines())
    assert versions == {worker: mixed.version(worker) for worker in "CDF"}


@on_several
@pytest.mark.parametrize("handler", HANDLERS)
def test_every_python_answers_requests_to_any_one(mixed: Mixed, way: Way, handler: str) -> None:
    calls = [
        call
        for team in ("green", "pink")
        for call in way.at_once(mixed, 20, "A", mode=pb2.ANY, handler=handler, team=team)
    ]

    answers = {tuple(call.result().result.decode().split()) for call in calls}
    assert answers <= {(worker, mixed.version(worker)) for worker in "CDF"}
    assert {"C"} < {worker for worker, _ in answers}


# Frames of a newer release

NEWER = b"\xfa\x3e\x05newer"  # field 1007


def newer(message: Any) -> Any:
    """Adds an unknown field to the message and to all messages in it."""
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                newer(one)
    message.MergeFromString(NEWER)
    return message


def streamed(at: Overlay, process_id: str, *frames: pb2.Frame) -> list[pb2.Slice]:
    answers = at.stub(process_id).ForwardStream(iter(frames), timeout=20)
    return [made for frame in answers for made in frame.slices]


def segment(number: int, *payloads: bytes, **fields: Any) -> pb2.Segment:
    items = pb2.Column(items=payloads)
    return pb2.Segment(
        number=number, count=len(payloads), payloads=items, handler="threaded", **fields
    )


def test_a_newer_clients_fields_are_ignored_on_a_stream(mixed: Mixed) -> None:
    cancel = pb2.Cancel(number=9, count=1)
    frame = pb2.Frame(segments=[segment(1, b"a", b"b", want_parts=True)], cancels=[cancel])

    made = streamed(mixed, "A", newer(frame))

    assert sum(one.count for one in made) == 2
    assert all(len(r.splitlines()) == 3 for one in made for r in one.results.items)


def test_a_newer_leaders_fields_are_ignored(mixed: Mixed) -> None:
    frame = pb2.Frame(segments=[segment(1, b"a", hops=["A"], targets=["C", "D"])])

    (made,) = streamed(mixed, "B", newer(frame))

    results = {part.process_id: part.results.items[0].decode().split()[0] for part in made.parts}
    assert results == {"C": "C", "D": "D"}


def test_an_unknown_mode_of_a_newer_release_is_rejected_and_the_stream_continues(
    mixed: Mixed,
) -> None:
    frame = pb2.Frame(segments=[segment(1, b"a", mode=7), segment(2, b"b")])

    made = {one.number: one for one in streamed(mixed, "A", frame)}

    (failure,) = made[1].failures
    assert (failure.code, failure.executed) == (Code.INVALID_ARGUMENT, pb2.NO)
    assert failure.reason == "mode 7 is not 0 (all) or 1 (any)"
    assert made[2].results.items


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(Limits())
    yield made
    made.link.channel.close()


def state_after(bench: Bench, **fields: Any) -> PeerState:
    """The neighbour's state after it has sent metrics with these fields."""
    metrics = {"process_id": "C", "is_healthy": True, "config_digest": "digest"}
    metrics |= {"version": overlay.__version__, **fields}
    bench.link._learn(newer(pb2.MetricsResponse(**metrics)), 0.001)
    return bench.links.states()[0]


def test_a_newer_neighbours_fields_are_ignored_in_its_answers(bench: Bench) -> None:
    sent = bench.send(b"a", b"b")
    (frame,) = bench.small.take()
    good, bad = pb2.Frame(), pb2.Frame()
    number = frame.segments[0].number
    part = pb2.PartSlice(process_id="C", results=pb2.Column(items=[b"done"]))
    good.slices.add(number=number, count=1, parts=[part], trace=[pb2.Hop(process_id="C")])
    detail = pb2.Detail(code=8, reason="full", executed=pb2.NO)
    bad.slices.add(number=number, start=1, count=1, failures=[detail])

    bench.small.receive(newer(good))
    bench.small.receive(newer(bad))

    assert sent.parts[0].result == b"done"
    assert (sent.parts[1].code, sent.parts[1].reason) == (Code.RESOURCE_EXHAUSTED, "full")


# Mismatches that matter


def test_a_newer_neighbour_with_the_same_wire_format_is_used_and_logged_once(bench, caplog) -> None:
    with caplog.at_level(logging.INFO, "overlay.peers.peers"):
        found = [state_after(bench, version="9.0") for _ in range(3)]

    assert {state.state for state in found} == {"up"}
    assert found[0].version == "9.0"
    assert caplog.text.count(f"C runs version 9.0, this process {overlay.__version__}") == 1


def test_a_different_configuration_is_logged_once_and_shown(bench, caplog) -> None:
    found = [state_after(bench, config_digest="other") for _ in range(3)]

    assert {(state.state, state.same_config) for state in found} == {("up", False)}
    assert caplog.text.count("C reads another configuration than this process") == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"wire_format": codec.FORMAT + 1, "version": "9.0"},
            f"version 9.0 speaks wire format {codec.FORMAT + 1}, this process {codec.FORMAT}, of "
            f"version {overlay.__version__}",
        ),
        ({"process_id": "D"}, "process D answers at 127.0.0.1:1"),
    ],
)
def test_an_incompatible_neighbour_is_not_used_and_logged_once(
    bench, caplog, fields: dict[str, Any], reason: str
) -> None:
    found = [state_after(bench, **fields) for _ in range(3)]

    assert {(state.state, state.reason) for state in found} == {("down", reason)}
    assert caplog.text.count(f"link to C (127.0.0.1:1) is down: {reason}") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_neighbour_without_streams_is_logged_once(bench, caplog) -> None:
    reason = "it does not know this call: an older release, or no overlay"

    for _ in range(3):
        bench.small.lose(Part("", Code.UNIMPLEMENTED, reason))

    assert caplog.text.count(f"link to C (127.0.0.1:1) is down: {reason}") == 1


def test_a_process_reports_its_wire_format_and_the_default_is_the_first(mixed: Mixed) -> None:
    assert mixed.metrics("A").wire_format == codec.FORMAT
    assert codec.read_format(pb2.MetricsResponse()) == 1


# Last, because it changes the overlay


@on_several
def test_a_drained_process_can_come_back_on_another_python(mixed: Mixed) -> None:
    before = mixed.version("C")
    pb2_grpc.OverlayAdminStub(mixed.channel("C")).Drain(pb2.DrainRequest(), timeout=20)
    with mixed.processes["C"] as drained:
        drained.wait(10)
    short = until(lambda: _without(mixed, "C"), 10)

    old = mixed.python_of["C"]
    mixed.python_of["C"] = next(path for path in mixed.python_of.values() if path != old)
    mixed.start("C")
    whole = mixed.ask("A", handler="spawned", timeout=30)

    assert [part.process_id for part in short.parts if part.code == 0] == ["D", "F"]
    assert mixed.version("C") != before
    assert f"C {mixed.version('C')}" in whole.result.decode().splitlines()


def _without(at: Overlay, worker: str) -> Any:
    response = at.ask("A", handler="threaded")
    return response if any(p.process_id == worker and p.code for p in response.parts) else None


@on_several
def test_the_client_can_run_on_another_python(mixed: Mixed, interpreters: list[Path]) -> None:
    ask = [str(ROOT / "client.py"), "127.0.0.1", str(mixed.port("A")), "--handler", "spawned"]

    done = [
        subprocess.run([python, *ask], capture_output=True, text=True, timeout=60)
        for python in (interpreters[0], interpreters[-1])
    ]

    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert all("3 of 3" in one.stdout for one in done)
