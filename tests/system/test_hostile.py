"""A process that violates the protocol loses only the requests that were sent to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import overlay
from overlay.cli import check
from overlay.cli.terminal import Screen
from overlay.client.submitter import Delivery
from overlay.client.sync import CallFailed
from overlay.model.errors import BadRequest, BadResponse
from overlay.model.limits import Limits
from overlay.model.segments import Code, Executed
from overlay.monitor.poller import Poller
from overlay.monitor.snapshot import Polled, PollResult, snapshot
from overlay.monitor.timeseries import Timeseries
from overlay.transport import codec, validation
from overlay.transport.codec import Asked, pb2, pb2_grpc
from tests.conftest import Fuzz
from tests.harness import same_process
from tests.harness.cluster import Overlay, six_processes, until
from tests.harness.hostile import Hostile, any_message, echo_of
from tests.harness.memory import Rss

MAX_MIB = 150  # growth of a process; believing a count of 2^32 would take 30,000
HUGE = 2**32 - 1
MIB = 2**20
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def a_slice(segment: pb2.Segment, **fields: Any) -> pb2.Slice:
    return pb2.Slice(**{"number": segment.number, "count": segment.count, **fields})


def d_part(results: int = 1, **fields: Any) -> pb2.PartSlice:
    items = [b"d"] * results
    return pb2.PartSlice(
        **{"process_id": "D", "results": pb2.Column(items=items) if items else None, **fields}
    )


def failing(**fields: Any) -> pb2.Detail:
    return pb2.Detail(**{"code": 13, "reason": "why", **fields})


WRONG: dict[str, tuple[Callable[[pb2.Segment], list[pb2.Slice]], str]] = {
    "more rows than were asked": (
        lambda s: [a_slice(s, count=HUGE, parts=[d_part(0)])], "rows 0 to +4294967295"),
    "rows out of range": (lambda s: [a_slice(s, start=7, parts=[d_part()])], "rows 7 to +1"),
    "a huge start": (lambda s: [a_slice(s, start=HUGE, parts=[d_part()])], "rows 4294967295"),
    "no rows": (lambda s: [a_slice(s, count=0)], "rows 0 to +0"),
    "missing results": (lambda s: [a_slice(s, parts=[d_part(0)])], "D: 0 results for 1 rows"),
    "too many results": (lambda s: [a_slice(s, parts=[d_part(9)])], "D: 9 results for 1 rows"),
    "a worker not asked": (
        lambda s: [a_slice(s, parts=[d_part(process_id="C")])], "a part of 'C', which was not"),
    "a huge name": (
        lambda s: [a_slice(s, parts=[d_part(process_id="x" * 10**6)])], "a part of 'xxxx"),
    "a part twice": (lambda s: [a_slice(s, parts=[d_part(), d_part()])], "two parts of one"),
    "partial results that were not requested": (
        lambda s: [a_slice(s, parts=[d_part()], more=True)], "parts before the answer"),
    "a chunk that was not requested": (
        lambda s: [a_slice(s, parts=[d_part(at=9)])], "D: a chunk where"),
    "a failure of rows out of range": (
        lambda s: [a_slice(s, parts=[d_part(failures=[failing(start=0, count=HUGE)])])],
        "failures of rows 0 to +4294967295"),
    "overlapping failures": (
        lambda s: [a_slice(s, parts=[d_part(failures=[failing(count=1)] * 2)])], "failures of"),
    "a failure with status OK": (
        lambda s: [a_slice(s, parts=[d_part(0, failures=[failing(code=0)])])], "a failure with"),
    "a refusal with status OK": (
        lambda s: [a_slice(s, failures=[failing(code=0)])], "a failure with"),
    "too many hops": (
        lambda s: [a_slice(s, parts=[d_part()], hops=["D"] * 20_000)], "hops: 20,000 entries"),
    "a hop that is not a name": (
        lambda s: [a_slice(s, parts=[d_part(hops=["\x1b[31m" * 99])])], "hops: '\\x1b[31m"),
    "a trace that is too long": (
        lambda s: [a_slice(s, parts=[d_part()], trace=[pb2.Hop(process_id="D")] * 20_000)],
        "trace: 20,000 entries"),
}  # fmt: skip


@pytest.fixture(scope="module")
def five_and_d(tmp_path_factory: Any) -> Iterator[tuple[Overlay, Hostile]]:
    """Five of the six, and a hostile D."""
    config = six_processes()
    made = Overlay(tmp_path_factory.mktemp("hostile"), config)
    with Hostile("D", config["processes"]["D"]["port"]) as d, made:
        yield made.start("A", "B", "C", "E", "F"), d


@pytest.fixture
def d(five_and_d: tuple[Overlay, Hostile]) -> Iterator[Hostile]:
    made, hostile = five_and_d
    hostile.turn_good()
    until(lambda: len(hostile.seen_by) > 1, 20, "B and E see it")
    until(lambda: link(made, "E", "D").state == "up", 20, "E's link to a correct D")
    yield hostile
    hostile.turn_good()


@pytest.fixture
def d_alone() -> Iterator[Hostile]:
    with Hostile("D") as made:
        yield made


@pytest.fixture
def five(five_and_d: tuple[Overlay, Hostile]) -> Overlay:
    return five_and_d[0]


def link(made: Overlay, near: str, far: str) -> pb2.Neighbour:
    (found,) = [n for n in made.metrics(near).neighbours if n.process_id == far]
    return found


def memory_of(made: Overlay) -> Rss:
    return Rss({process_id: process.pid for process_id, process in made.processes.items()})


@pytest.mark.parametrize(("reply", "reason"), WRONG.values(), ids=WRONG)
def test_an_invalid_slice_raises_bad_response_with_the_reason(reply: Any, reason: str) -> None:
    with pytest.raises(BadResponse, match=re.escape(reason)):
        codec.read_slice(reply(pb2.Segment(number=1, count=1))[0], Asked(1, frozenset("D")))


@pytest.mark.parametrize("how", ["more rows than were asked", "a refusal with status OK"])
def test_an_invalid_answer_costs_only_its_senders_part(five: Overlay, d: Hostile, how: str) -> None:
    reply, reason = WRONG[how]
    with memory_of(five) as rss, overlay.connect(five.address("A")) as client:
        client.call(b"hi")
        d.reply = reply
        began = time.monotonic()
        answer = client.call(b"hi", timeout=20)
        took_s = time.monotonic() - began
        gone = until(lambda: found if (found := link(five, "E", "D")).state == "down" else None)

    assert [part.process_id for part in answer.parts if part.ok] == ["C", "F"]
    (missing,) = answer.missing
    assert missing.executed is Executed.UNKNOWN
    assert f"it violates the protocol: {reason}" in missing.reason
    assert f"it violates the protocol: {reason}" in gone.reason
    assert took_s < 10
    assert rss.grown < MAX_MIB
    assert {n.state for n in five.metrics("A").neighbours} == {"up"}
    assert link(five, "E", "F").state == link(five, "B", "C").state == "up"


def test_an_invalid_answer_is_logged_once_and_shown_by_check_and_the_web_page(
    five: Overlay, d: Hostile
) -> None:
    d.reply = WRONG["more rows than were asked"][0]
    with overlay.connect(five.address("A")) as client:
        client.call(b"hi")
    until(lambda: link(five, "E", "D").state == "down")

    lines = [line for line in five.log("E").splitlines() if "violates the protocol" in line]
    assert sum("WARNING" in line for line in lines) == 1
    assert "link to D" in lines[0]
    shown = same_process.client("127.0.0.1", five.port("E"), "check")
    assert re.search(
        r"(it violates the protocol|violated the protocol \d+ s ago): rows 0 to \+4294967295",
        shown.stdout,
    )
    watch = Poller(five.address("E")).start()
    try:
        seen = until(lambda: watch.newer(0).get("links"), 10)
        (to_d,) = [one for one in seen if (one["from"], one["to"]) == ("E", "D")]
        assert "the protocol" in to_d["why"]
        assert "rows 0 to +4294967295" in to_d["why"]
    finally:
        watch.close()


def test_a_process_that_keeps_violating_the_protocol_is_retried_with_backoff_and_can_recover(
    five: Overlay, d: Hostile
) -> None:
    d.reply = WRONG["no rows"][0]
    before = d.calls
    with overlay.connect(five.address("A")) as client:
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            assert client.call(b"hi", timeout=10).coverage[0] == 2
            time.sleep(0.05)
        # E has two streams, and each reconnects after 1 s, then 2 s. Without a pause: 50 and more.
        assert d.calls - before <= 8
        d.turn_good()
        until(lambda: client.call(b"hi", timeout=10).coverage[0] == 3, 20)


def test_a_repeated_answer_counts_once(five: Overlay, d: Hostile) -> None:
    good = echo_of("D")
    d.reply = lambda segment: [*good(segment)] * 50
    with overlay.connect(five.address("A")) as client:
        for n in range(20):
            assert client.call(b"%d" % n).result.count(b"%d" % n) == 3
    assert link(five, "E", "D").outstanding == 0


def test_more_chunks_than_were_granted_end_the_link(five: Overlay, d: Hostile) -> None:
    def reply(segment: pb2.Segment) -> list[pb2.Slice]:
        body = bytes(100_000)
        return [
            a_slice(segment, more=True, parts=[pb2.PartSlice(
                process_id="D", results=pb2.Column(items=[body]), at=n * len(body), more=True)])
            for n in range(150)
        ]  # fmt: skip

    d.reply = reply
    with memory_of(five) as rss, overlay.connect(five.address("A")) as client:
        parts = {part.process_id: part for part in client.parts(b"hi", timeout=10)}
    assert parts["C"].ok
    assert parts["F"].ok
    assert "more chunks of a part than were granted" in parts["D"].reason
    assert rss.grown < MAX_MIB


# Invalid metrics


def with_slots(count: int) -> Callable[[pb2.MetricsResponse], None]:
    return lambda m: m.topology[0].slots.__setitem__("echo", count)


def setting(**fields: Any) -> Callable[[pb2.MetricsResponse], None]:
    return lambda m: m.MergeFrom(pb2.MetricsResponse(**fields))


WRONG_METRICS: dict[str, Callable[[pb2.MetricsResponse], None]] = {
    "slots below 0": with_slots(-5),
    "too many slots": with_slots(2**31 - 1),
    "nan": setting(avg_processing_time_ms=float("nan")),
    "infinity": setting(uptime_s=float("inf")),
    "a process twice": setting(topology=[pb2.Process(id="D", role="worker", address="h:1")]),
    "an unknown role": setting(topology=[pb2.Process(id="Z", role="king", address="h:1")]),
    "an unknown neighbor": setting(
        topology=[pb2.Process(id="Z", role="worker", address="h:1", neighbors=["Q"])]
    ),
    "an invalid address": setting(
        topology=[pb2.Process(id="Z", role="worker", address="unix:/etc")]
    ),
    "too many events": setting(events=[pb2.Event()] * 20_000),
    "a request with an unknown mode": setting(requests=[pb2.RequestSummary(mode=99)]),
    "counts below 0": setting(queue_size=-1),
    "a histogram that does not fit": setting(service=pb2.Histogram(bounds_s=[1.0], counts=[1])),
}


@pytest.mark.parametrize("spoil", WRONG_METRICS.values(), ids=WRONG_METRICS)
def test_invalid_metrics_raise_misspoken(
    d_alone: Hostile, spoil: Callable[[pb2.MetricsResponse], None]
) -> None:
    made = d_alone.good_metrics()
    codec.read_metrics(made)
    spoil(made)
    with pytest.raises(BadResponse):
        codec.read_metrics(made)


def test_invalid_metrics_end_the_link_and_are_reported(five: Overlay, d: Hostile) -> None:
    def metrics() -> pb2.MetricsResponse:
        made = d.good_metrics()
        WRONG_METRICS["slots below 0"](made)
        return made

    d.metrics = metrics
    gone = until(lambda: found if (found := link(five, "E", "D")).state == "down" else None)
    assert "it violates the protocol" in gone.reason
    with (
        overlay.connect(d.address) as client,
        pytest.raises(CallFailed, match="violates the protocol"),
    ):
        client.metrics()
    with overlay.connect(five.address("A")) as client:
        assert client.call(b"hi").coverage[0] == 2


def test_what_a_process_says_about_others_is_ignored_and_its_texts_are_escaped(
    five: Overlay, d: Hostile
) -> None:
    def metrics() -> pb2.MetricsResponse:
        made = d.good_metrics()
        made.topology.add(id="F", role="worker", address="h:1").slots["echo"] = 999_999
        made.version = "\x1b[31m\n" * 9_000
        return made

    d.metrics = metrics
    found = until(lambda: found if (found := link(five, "E", "D")).version else None)
    assert (found.state, found.slots) == ("up", 100)
    assert found.version.isprintable()
    assert len(found.version) < 200_000
    assert "\x1b" not in five.log("E")


def test_a_log_that_is_too_long_is_not_passed_on(five: Overlay, d: Hostile) -> None:
    with overlay.connect(five.address("E")) as client:
        with pytest.raises(CallFailed, match="D violates the protocol"):
            client.logs("D")
        assert client.logs().process_id == "E"


# A hostile team leader


def test_a_hostile_team_leader_breaks_only_its_own_link(tmp_path: Any) -> None:
    config = six_processes()
    with (
        Hostile("E", config["processes"]["E"]["port"]) as e,
        Overlay(tmp_path / "led", config) as made,
    ):
        made.start("A", "B", "C", "D", "F")
        until(lambda: link(made, "A", "E").state == "up", 20)
        e.reply = lambda s: [a_slice(s, parts=[d_part(process_id="C")])]
        with overlay.connect(made.address("A")) as client:
            calls = [client.submit(None, b"%d" % n, team="green") for n in range(50)]
            answer = client.call(b"hi")
            good = {part.process_id for part in answer.parts if part.ok}
            assert "C" in good
            assert "a part of 'C', which was not asked" in str(answer.missing)
            assert [call.result() for call in calls] == [b"C: %d" % n for n in range(50)]
        assert link(made, "A", "B").state == "up"


# A hostile leader, and the library


CLIENT_WRONG: dict[str, Callable[[pb2.Segment], list[pb2.Slice]]] = {
    "more rows than were asked": lambda s: [a_slice(s, count=HUGE)],
    "rows out of range": lambda s: [a_slice(s, start=3, results=pb2.Column(items=[b"x"]))],
    "no results": lambda s: [a_slice(s)],
    "too many results": lambda s: [a_slice(s, results=pb2.Column(items=[b"x"] * 99))],
    "a failure of rows out of range": lambda s: [
        a_slice(s, failures=[failing(start=1, count=HUGE)])
    ],
    "a failure with status OK": lambda s: [a_slice(s, failures=[failing(code=0)])],
    "a part's failure of rows out of range": lambda s: [
        a_slice(
            s,
            results=pb2.Column(items=[b"x"]),
            parts=[d_part(0, failures=[failing(count=HUGE)])],
        )
    ],
    "partial results that were not requested": lambda s: [a_slice(s, parts=[d_part()], more=True)],
    "a part twice": lambda s: [
        a_slice(s, results=pb2.Column(items=[b"x"]), parts=[d_part(0), d_part(0)])
    ],
    "too many hops": lambda s: [a_slice(s, results=pb2.Column(items=[b"x"]), hops=["D"] * 20_000)],
}


@pytest.mark.parametrize("reply", CLIENT_WRONG.values(), ids=CLIENT_WRONG)
def test_an_invalid_slice_to_a_client_raises_bad_response(reply: Any) -> None:
    with pytest.raises(BadResponse):
        codec.check_client_slice(reply(pb2.Segment(number=1, count=1))[0], Asked(1))


def test_the_librarys_calls_fail_immediately_with_the_reason() -> None:
    reply = CLIENT_WRONG["more rows than were asked"]
    with (
        Hostile("A") as leader,
        overlay.connect(leader.address) as client,
        Rss({"test": os.getpid()}) as rss,
    ):
        leader.reply = reply
        began = time.monotonic()
        with pytest.raises(CallFailed, match="it violates the protocol") as raised:
            client.call(b"hi", timeout=30)
        assert raised.value.executed is Executed.UNKNOWN
        with pytest.raises(CallFailed, match="it violates the protocol") as raised:
            client.call(b"hi", timeout=30)  # not even sent
        assert time.monotonic() - began < 15

        async def ask() -> None:
            async with overlay.connect_async(leader.address) as other:
                with pytest.raises(CallFailed, match="it violates the protocol"):
                    await other.call(b"hi", timeout=30)

        asyncio.run(ask())
        leader.turn_good()
        answered = until(lambda: attempt(lambda: client.call(b"hi").result), 20)
        assert answered == b"A: hi"
    assert rss.grown < MAX_MIB


def attempt(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except CallFailed:
        return None


def test_a_flood_of_partial_results_ends_the_librarys_call() -> None:
    def reply(segment: pb2.Segment) -> list[pb2.Slice]:
        return [a_slice(segment, more=True, parts=[d_part()])] * 200

    with Hostile("A") as leader, overlay.connect(leader.address) as client:
        leader.reply = reply
        with pytest.raises(CallFailed, match="violates the protocol"):
            list(client.parts(b"hi", timeout=20))


@pytest.mark.parametrize("garbage", ["", "-1", "x" * 500, "9" * 500, "0", "1e9"])
def test_an_invalid_limit_in_the_metadata_is_ignored(garbage: str) -> None:
    with Hostile("A") as leader, overlay.connect(leader.address) as client:
        leader.initial = ((codec.MAX_BYTES_KEY, garbage),)
        assert client.call(bytes(2**20)).result == b"A: " + bytes(2**20)


# Invalid frames from above


def column(*items: bytes) -> pb2.Column:
    return pb2.Column(items=items)


DOWN = {"hops": ["A"], "targets": ["C"]}
WRONG_DOWN: dict[str, pb2.Frame] = {
    "a count without payloads": pb2.Frame(segments=[pb2.Segment(number=1, count=HUGE, **DOWN)]),
    "more ids than rows": pb2.Frame(
        segments=[pb2.Segment(number=1, count=1, payloads=column(b"x"), ids=[1] * 9000, **DOWN)]
    ),
    "too many targets": pb2.Frame(
        segments=[
            pb2.Segment(number=1, count=1, payloads=column(b"x"), hops=["A"], targets=["C"] * 10**6)
        ]
    ),
    "too many hops": pb2.Frame(
        segments=[pb2.Segment(number=1, count=1, payloads=column(b"x"), hops=["A"] * 10**6)]
    ),
    "a huge handler name": pb2.Frame(
        segments=[
            pb2.Segment(number=1, count=1, payloads=column(b"x"), handler="x" * 10**7, **DOWN)
        ]
    ),
    "cancels and grants of unknown segments": pb2.Frame(
        cancels=[pb2.Cancel(number=HUGE, start=HUGE, count=HUGE)] * 1000,
        grants=[pb2.Grant(number=HUGE, row=HUGE, process_id="x" * 900, count=HUGE)] * 1000,
    ),
}


@pytest.mark.parametrize("frame", WRONG_DOWN.values(), ids=WRONG_DOWN)
def test_an_invalid_frame_from_above_harms_no_other_request(
    five: Overlay, frame: pb2.Frame
) -> None:
    channel = grpc.insecure_channel(
        five.address("B"), options=[("grpc.max_send_message_length", -1)]
    )
    with memory_of(five) as rss, channel:
        call = pb2_grpc.OverlayNodeStub(channel).ForwardStream(iter([frame] * 3), timeout=10)
        slices: list[pb2.Slice] = []
        with contextlib.suppress(grpc.RpcError):
            slices += [made for answer in call for made in answer.slices]
    ended = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, RESOURCE_EXHAUSTED}
    assert call.code() in ended
    assert all(made.failures[0].code == Code.INVALID_ARGUMENT for made in slices)
    assert rss.grown < MAX_MIB
    assert five.ask("A").parts[0].code == 0


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_a_compressed_message_is_rejected_with_unimplemented(five: Overlay, kind: str) -> None:
    """test_strangers.py has those that inflate to more than fits in memory."""
    body, options = bytes(10_000), {"compression": grpc.Compression.Gzip, "timeout": 10}
    segment = pb2.Segment(number=1, count=1, payloads=column(body))
    stub = five.stub("A")
    ask = {
        "unary": lambda: stub.Forward(pb2.Request(payload=body), **options),
        "stream": lambda: [*stub.ForwardStream(iter([pb2.Frame(segments=[segment])]), **options)],
    }
    with pytest.raises(grpc.RpcError) as raised:
        ask[kind]()
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Random messages

LIMITS = Limits()
SEEDS = st.integers(0, 2**48)
QUESTIONS = [
    Asked(rows, targets, partials, chunks)
    for rows in (1, 3, 4096)
    for targets in (None, frozenset("CD"))
    for partials, chunks in ((False, False), (True, True))
]


def read_slices(made: pb2.Slice) -> None:
    for asked in QUESTIONS:
        try:
            answers = codec.read_slice(made, asked)
        except BadResponse:
            continue
        assert 0 < answers.count <= asked.rows
        assert all(column.results.count == answers.count for column in answers.parts)
        for row in (0, answers.count - 1):
            answers.at(row)
        answers.slice(0, 1)


def read_client_slices(made: pb2.Slice) -> None:
    for asked in QUESTIONS:
        try:
            codec.check_client_slice(made, asked)
        except BadResponse:
            continue
        delivery = Delivery(made)
        assert len(delivery.results) in (0, made.count)
        assert len(delivery.answers.parts) == len(made.parts)
        delivery.answers.at(made.count - 1)


def read_metrics(made: pb2.MetricsResponse) -> None:
    codec.read_metrics(made)
    json.dumps(check.as_plain(made), allow_nan=False)
    check.show_metrics(Screen(NullOutput()), made, "h:1")
    if made.process_id in {process.id for process in made.topology}:
        known = Polled(
            "h:1", made.process_id, made.topology,
            {p.id: PollResult(0.0, made) for p in made.topology},
            {p.id: Timeseries() for p in made.topology}, [],
        )  # fmt: skip
        json.dumps(snapshot(known, 1.0, 2.0), allow_nan=False)


class NullOutput:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def read_segments(made: pb2.Segment) -> None:
    segment = codec.read_segment(made, 0.0, LIMITS)
    assert segment.count == len(made.payloads.items)
    codec.unread_segment(made, 0.0, LIMITS)
    codec.route_key(made, LIMITS)


READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "slice": (pb2.Slice, read_slices),
    "client's slice": (pb2.Slice, read_client_slices),
    "response": (pb2.Response, codec.read_response),
    "metrics": (pb2.MetricsResponse, read_metrics),
    "logs": (
        pb2.LogsResponse,
        lambda made: codec.read_logs(made, pb2.LogsRequest(process_id=made.process_id[:9])),
    ),
    "drained": (pb2.DrainResponse, validation.tidy),
    "segment": (pb2.Segment, read_segments),
    "request": (pb2.Request, lambda made: codec.read_request(made, 1.0, LIMITS)),
}


@pytest.mark.parametrize("name", READERS)
@given(seed=SEEDS, fill=st.sampled_from((0.15, 0.4, 0.8)))
@settings(max_examples=100)
def test_any_message_is_read_within_bounds_or_rejected(name: str, seed: int, fill: float) -> None:
    kind, read = READERS[name]
    made = any_message(random.Random(seed), kind, fill)
    size, error = made.ByteSize(), ""
    tracemalloc.start()
    try:
        read(made)
    except (BadResponse, BadRequest) as e:
        error = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert error.isprintable()
    assert len(error) < 1000
    assert peak < 20 * size + 4 * MIB


def test_many_random_answers_harm_no_process(five: Overlay, d: Hostile, fuzz: Fuzz) -> None:
    rng = fuzz.rng("answers to processes", 0)

    def reply(segment: pb2.Segment) -> list[pb2.Slice]:
        made = any_message(rng, pb2.Slice, rng.choice((0.2, 0.5)))
        made.number = segment.number
        return [made]

    d.reply = reply
    with memory_of(five) as rss, overlay.connect(five.address("A")) as client:
        for _ in range(fuzz.count(16, 800)):
            d.turn_good()
            d.reply = reply  # a new pid each time, so that it is asked without backoff
            answers = [client.submit(None, b"x", mode="all", timeout=0.4) for _ in range(3)]
            for answer in answers:
                answer.result()
    assert rss.grown < MAX_MIB
    assert {n.state for n in five.metrics("A").neighbours} == {"up"}


def test_after_random_answers_the_library_still_works(fuzz: Fuzz) -> None:
    with Hostile("A") as leader, Rss({"test": os.getpid()}) as rss:
        for number in range(fuzz.count(16, 800)):
            rng = fuzz.rng("answers to the library", number)

            def reply(segment: pb2.Segment, rng: random.Random = rng) -> list[pb2.Slice]:
                made = any_message(rng, pb2.Slice, 0.3)
                made.number = segment.number
                return [made]

            leader.reply = reply
            with overlay.connect(leader.address) as client:
                attempt(lambda client=client: client.call(b"hi", timeout=0.1))
                attempt(lambda client=client: list(client.map(None, [b"a", b"b"], timeout=0.1)))
        leader.turn_good()
        with overlay.connect(leader.address) as client:
            assert client.call(b"hi").result == b"A: hi"
    assert rss.grown < MAX_MIB
