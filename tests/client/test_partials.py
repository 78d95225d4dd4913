"""Parts of a request as they arrive: in the dispatcher, in the client, and on real processes."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import overlay
from overlay.client.partials import Parts
from overlay.client.submitter import Delivery
from overlay.client.sync import CallFailed, HandlerFailed, NameNotFound
from overlay.model.limits import MIB
from overlay.model.segments import Code, Detail, Executed, Part
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, running, six_processes, until
from tests.harness.commands import run_client
from tests.harness.network import (
    ANSWER_LOST,
    REFUSED,
    Asked,
    MemoryNetwork,
    random_topology,
    the_six,
)

SIX = the_six()


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(SIX)


def workers(parts: list[Part]) -> list[str]:
    return [part.process_id for part in parts]


def outcomes(asked: Asked) -> dict[str, tuple[Code, bytes]]:
    """The outcome of each worker, from its early part or else from the answer."""
    found: dict[str, tuple[Code, bytes]] = {}
    for part in (*asked.partials[0], *asked.answer.parts):
        found.setdefault(part.process_id, (part.code, part.result))
    return found


# The dispatcher, on an in-memory network.


def test_a_slow_worker_does_not_delay_the_part_of_a_quick_one(network):
    network.nodes["F"].executor.hold()

    asked = network.ask("A", partials=True)

    assert workers(asked.partials[0]) == ["C", "D"]
    assert not asked.is_answered
    network.nodes["F"].executor.finish()
    assert workers(asked.partials[0]) == ["C", "D", "F"]
    assert asked.answer.parts == ()
    assert network.left_over == {}


def test_each_part_has_the_path_it_took(network):
    asked = network.ask("A", partials=True)
    assert {p.process_id: "".join(p.hops) for p in asked.partials[0]} == {
        "C": "ABC",
        "D": "AED",
        "F": "AEF",
    }


EDGES = [("A", "B"), ("A", "E"), ("B", "C"), ("B", "D"), ("E", "D"), ("E", "F")]
CUTS = [cut for n in range(7) for cut in itertools.combinations(EDGES, n)]


@pytest.mark.parametrize("fate", [None, REFUSED, ANSWER_LOST])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_early_parts_are_those_of_the_complete_answer_whatever_links_are_cut(cuts, fate):
    found = []
    for early in (False, True):
        network = MemoryNetwork(SIX)
        for edge in cuts:
            network.cut(*edge)
        if fate:
            network.next("B", "C", fate)
            network.next("A", "E", fate)
        asked = network.ask("A", partials=early)
        found.append((outcomes(asked), asked.error is None or bool(asked.partials[0])))
        assert network.left_over == {}
        if early and not any(part.ok for part in asked.partials[0]):
            assert [p.process_id for p in asked.answer.parts] == list("CDF")  # with reasons
    assert found[0][0] == found[1][0]


@given(seed=st.integers(0, 2**32), leaves=st.booleans())
def test_each_worker_has_one_part_and_the_answer_arrives_last(seed, leaves):
    network = MemoryNetwork(random_topology(seed))
    (leader,) = [p.id for p in network.topology.processes.values() if p.role == "leader"]
    held = [p.id for p in network.topology.processes.values() if p.works][::2]
    for worker in held:
        network.nodes[worker].executor.hold()

    asked = network.ask(leader, partials=True)
    if leaves:
        asked.leave()
        assert asked.is_answered
    for worker in held:
        network.nodes[worker].executor.finish()

    counts = Counter(workers(asked.partials[0]))
    in_scope = {p.process_id for p in MemoryNetwork(network.topology).ask(leader).answer.parts}
    assert set(counts.values()) <= {1}
    assert {*counts, *workers(list(asked.answer.parts))} == in_scope
    assert network.left_over == {}


def test_workers_that_miss_the_deadline_are_reported_as_late(network):
    network.nodes["F"].executor.hold()
    asked = network.ask("A", partials=True, deadline_s=1)

    network.advance(2)

    assert workers(asked.partials[0])[:2] == ["C", "D"]
    network.nodes["F"].executor.finish()  # too late
    assert outcomes(asked)["F"][0] is Code.DEADLINE_EXCEEDED
    assert network.left_over == {}


def test_if_no_worker_answers_the_answer_has_the_reason_of_each(network):
    for edge in EDGES[2:]:
        network.next(*edge, REFUSED)
    asked = network.ask("A", partials=True)

    assert [(p.process_id, p.code) for p in asked.answer.parts] == [
        (worker, Code.UNAVAILABLE) for worker in "CDF"
    ]
    assert asked.error.executed is Executed.NO


# The order in which parts are given.


def delivery(*parts: Part) -> Delivery:
    made = pb2.Slice(count=1, more=True)
    for part in parts:
        slice_ = made.parts.add(process_id=part.process_id, results=pb2.Column(items=[part.result]))
        if not part.ok:
            slice_.failures.add(code=part.code, reason=part.reason)
    return Delivery(made)


GOOD = {worker: Part(worker, result=worker.encode()) for worker in "CDF"}
BAD = {worker: Part(worker, Code.UNAVAILABLE, "no") for worker in "CDF"}


def test_good_parts_are_given_at_once_and_failures_at_the_end():
    parts = Parts(None)
    assert workers(list(parts.early(delivery(BAD["C"]), 0))) == []
    assert workers(list(parts.early(delivery(GOOD["D"]), 0))) == ["D"]
    assert workers(list(parts.last(delivery(BAD["F"]), 0))) == ["C", "F"]


def test_a_duplicate_part_is_ignored_and_a_successful_retry_replaces_a_failure():
    parts = Parts(None)
    given = [*parts.early(delivery(BAD["C"], GOOD["D"]), 0), *parts.early(delivery(GOOD["D"]), 0)]
    given += [*parts.early(delivery(GOOD["C"]), 0), *parts.last(Detail(Code.INTERNAL, ""), 0)]
    assert workers(given) == ["D", "C"]


def test_nothing_is_given_after_the_requested_number_of_good_parts():
    parts = Parts(2)
    given = list(parts.early(delivery(BAD["C"], GOOD["D"], GOOD["F"], GOOD["C"]), 0))
    assert workers(given) == ["D", "F"]
    assert parts.is_over


# On real processes.

HANDLERS = '''
import time

def timed(payload, context):
    """Runs as long as the payload says for this worker, and records how it ended."""
    seconds = dict(zip("CDF", map(float, payload.split())))[context.process_id]
    until = time.monotonic() + seconds
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    with open(f"{context.options['notes']}.{context.process_id}", "a") as file:
        file.write("cancelled\\n" if context.cancelled else "done\\n")
    return context.process_id.encode()

def large(payload, context):
    return context.process_id.encode() * int(payload)

def yields(payload, context):
    """As large, but generated; small on workers that the payload does not name."""
    size, _, who = payload.partition(b" ")
    if who and context.process_id not in who.decode():
        size = b"0"
    yield context.process_id.encode()
    for _ in range(int(size) // 1000):
        yield context.process_id.encode() * 1000

def picky(payload, context):
    if context.process_id in payload.decode():
        raise ValueError
    return payload
'''


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "mine.py").write_text(HANDLERS)
    options = {"notes": str(folder / "notes")}
    threads = ("timed", "large", "picky", "yields")
    names = {n: {"call": f"mine:{n}", "options": options} for n in threads}
    names["apart"] = {"call": "mine:yields", "run": "process", "slots": 1}
    with running(folder, six_processes(handlers=names, max_message_mib=1)) as found:
        yield found


@pytest.fixture
def leader(six) -> Iterator[overlay.Client]:
    with overlay.connect(six.address("A")) as found:
        yield found


def notes(six: Overlay, worker: str) -> list[str]:
    path = six.folder / f"notes.{worker}"
    return path.read_text().split() if path.exists() else []


def at_work(six: Overlay) -> int:
    return sum(h.active for w in "CDF" for h in six.metrics(w).handlers)


def test_parts_arrive_in_the_order_in_which_workers_answer(leader):
    parts = list(leader.parts(b"0.5 0 1", handler="timed"))
    assert [(p.process_id, p.result, p.hops) for p in parts] == [
        ("D", b"D", ("A", "E", "D")),
        ("C", b"C", ("A", "B", "C")),
        ("F", b"F", ("A", "E", "F")),
    ]


def test_enough_parts_cancel_the_other_workers(six, leader):
    began = time.monotonic()
    before = len(notes(six, "C")), len(notes(six, "F"))

    parts = list(leader.parts(b"25 0 25", handler="timed", first=1))

    assert workers(parts) == ["D"]
    until(lambda: not at_work(six), what="the others have ended")
    assert time.monotonic() - began < 20
    assert "done" not in notes(six, "C")[before[0] :] + notes(six, "F")[before[1] :]


def test_leaving_the_loop_cancels_the_workers(six, leader):
    for _ in leader.parts(b"25 0 25", handler="timed"):
        break
    until(lambda: not at_work(six), what="the others have ended")


def test_a_late_worker_is_reported_at_the_end(leader):
    parts = list(leader.parts(b"0 0 25", handler="timed", timeout=1))
    assert [p.ok for p in parts] == [True, True, False]
    assert (parts[2].process_id, parts[2].code) == ("F", Code.DEADLINE_EXCEEDED)


def test_all_parts_together_may_be_larger_than_a_message(leader):
    size = b"900000"
    whole = leader.call(size, handler="large")
    found = {p.process_id: len(p.result) for p in leader.parts(size, handler="large")}

    assert [p.process_id for p in whole.missing] == ["D", "F"]
    assert "max_message_mib" in whole.missing[0].reason
    assert found == dict.fromkeys("CDF", 900_000)


@pytest.mark.parametrize("handler", ["large", "yields", "apart"])
def test_a_part_may_be_larger_than_a_message(leader, handler):
    parts = list(leader.parts(b"5000000", handler=handler))
    size = 5_000_000 + (handler != "large")
    assert sorted((p.process_id, p.result == p.process_id.encode() * size) for p in parts) == [
        ("C", True),
        ("D", True),
        ("F", True),
    ]


def test_a_complete_answer_that_is_too_large_fails_with_a_remedy(leader):
    with pytest.raises(CallFailed, match=r"'large' returned 1,100,000 bytes.*--as-completed"):
        leader.call(b"1100000", handler="large")


def rss(six: Overlay, process_id: str) -> int:
    return psutil.Process(six.metrics(process_id).pid).memory_info().rss


def test_no_process_on_the_path_buffers_more_than_a_few_chunks(six, leader):
    before = {process_id: rss(six, process_id) for process_id in "ABEF"}
    most = dict(before)
    taken = 0
    for part in leader.parts(b"60000000", handler="yields"):
        time.sleep(0.3)  # a slow reader
        taken += len(part.result)
        most = {process_id: max(most[process_id], rss(six, process_id)) for process_id in most}
    assert taken == 3 * 60_000_001
    assert {p: most[p] - before[p] < 40 * MIB for p in before} == dict.fromkeys("ABEF", True), most


def test_the_first_complete_part_cancels_unfinished_ones(six, leader):
    parts = list(leader.parts(b"900000000 CF", handler="yields", first=1))
    assert [(p.process_id, p.result) for p in parts] == [("D", b"D")]
    until(lambda: not at_work(six), what="the others have ended")


def test_a_part_that_is_not_read_by_the_deadline_is_late_and_frees_its_slot(six, leader):
    began = time.monotonic()
    parts = list(leader.parts(b"900000000 F", handler="yields", timeout=1))
    assert [(p.process_id, p.code) for p in parts[2:]] == [("F", Code.DEADLINE_EXCEEDED)]
    until(lambda: not at_work(six), what="it has ended")
    assert time.monotonic() - began < 10


def test_a_client_that_does_not_grant_chunks_gets_a_size_error(six):
    segment = pb2.Segment(
        number=7, count=1, payloads=pb2.Column(items=[b"1100000"]), handler="large"
    )
    segment.as_they_come = True
    call = six.stub("A").ForwardStream(iter([pb2.Frame(segments=[segment])]), timeout=20)
    slices = [made for frame in call for made in frame.slices]
    assert [part.failures[0].code for m in slices for part in m.parts] == [8] * 6


def test_a_failed_worker_is_a_part_and_an_error_is_raised_if_all_fail(leader):
    parts = list(leader.parts(b"C", handler="picky"))
    assert sorted(workers(parts[:2])) == ["D", "F"]
    assert (parts[2].process_id, parts[2].code) == ("C", Code.INTERNAL)

    given = []
    with pytest.raises(HandlerFailed, match="C: handler 'picky' failed"):
        given += leader.parts(b"CDF", handler="picky")
    with pytest.raises(NameNotFound, match="no handler 'nope'"):
        given += leader.parts(b"", handler="nope")
    assert given == []


def test_a_worker_that_is_asked_directly_gives_its_part(six):
    with overlay.connect(six.address("D")) as worker:
        (part,) = worker.parts(b"900000", handler="large")
    assert (part.process_id, len(part.result), part.hops) == ("D", 900_000, ("D",))


def test_many_requests_for_parts_can_run_at_once(leader):
    asked = [leader.parts(f"{n % 3 / 20} 0 0", handler="timed") for n in range(30)]
    firsts = [next(parts) for parts in asked]
    rest = [list(parts) for parts in asked]
    for first, more in zip(firsts, rest, strict=True):
        assert sorted(workers([first, *more])) == list("CDF")


def test_parts_work_with_asyncio(six):
    async def ask() -> tuple[list[str], list[str], list[int], str]:
        async with overlay.connect_async(six.address("A")) as client:
            found = [part.process_id async for part in client.parts(b"0.4 0 0.8", handler="timed")]
            first = [p.process_id async for p in client.parts(b"25 0 25", handler="timed", first=1)]
            large = [len(p.result) async for p in client.parts(b"2000000", handler="yields")]
            try:
                async for _ in client.parts(b"CDF", handler="picky"):
                    pass
            except HandlerFailed as e:
                return found, first, large, str(e)
        raise AssertionError("it did not fail")

    found, first, large, error = asyncio.run(ask())

    assert (found, first, large) == (["D", "C", "F"], ["D"], [2_000_001] * 3)
    assert "handler 'picky' failed" in error
    until(lambda: not at_work(six), what="the others have ended")


@pytest.mark.parametrize("first", [0, -1])
def test_an_invalid_number_of_parts_is_rejected_at_once(leader, first):
    with pytest.raises(ValueError, match="first must be at least 1"):
        leader.parts(b"", first=first)


def test_on_the_wire_parts_are_slices_with_more_set_followed_by_the_answer(six):
    segment = pb2.Segment(
        number=7,
        count=1,
        payloads=pb2.Column(items=[b"0 0.3 0.6"]),
        handler="timed",
        as_they_come=True,
    )
    call = six.stub("A").ForwardStream(iter([pb2.Frame(segments=[segment])]), timeout=20)

    slices = [made for frame in call for made in frame.slices]

    assert [(made.more, [p.process_id for p in made.parts]) for made in slices] == [
        (True, ["C"]),
        (True, ["D"]),
        (True, ["F"]),
        (False, []),
    ]
    assert [made.parts[0].results.items[0] for made in slices[:3]] == [b"C", b"D", b"F"]
    assert list(slices[3].results.items) == [b""]
    assert {made.number for made in slices} == {7}


# client.py


def run(six: Overlay, *words: str) -> subprocess.CompletedProcess[str]:
    return run_client("127.0.0.1", six.port("A"), *words)


def test_client_py_shows_each_answer_as_it_arrives(six):
    done = run(six, "--handler", "timed", "--payload", "0.4 0 0.8", "--as-completed")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:3] == [["D", "D"], ["C", "C"], ["F", "F"]]
    assert " ".join(lines[3]) == "answers 3 of 3 workers answered"


def test_client_py_stops_after_the_first_answer(six):
    done = run(six, "--handler", "timed", "--payload", "25 0 25", "--first", "1", "--json")
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert (json.loads(line)["process_id"], json.loads(line)["result"]) == ("D", "D")
    until(lambda: not at_work(six), what="the others have ended")


def test_client_py_writes_parts_to_a_file(six, tmp_path):
    out = tmp_path / "parts"
    words = "--handler", "yields", "--payload", "3000000 CF", "--as-completed", "--out", str(out)
    done = run(six, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"C  3,000,001 bytes -> {out}" in done.stdout
    parts = sorted(out.read_bytes().split(b"\n"))
    assert [(part[:1], len(part)) for part in parts] == [
        (b"C", 3_000_001),
        (b"D", 1),
        (b"F", 3_000_001),
    ]


def test_client_py_has_an_exit_code_for_missing_workers(six):
    done = run(six, "--handler", "picky", "--payload", "F", "--as-completed")
    assert done.returncode == 6
    assert "2 of 3 workers answered" in done.stdout
    assert "missing  F: handler 'picky' failed" in done.stdout
    assert run(six, "--first", "1", "--mode", "any").returncode == 2
    assert run(six, "--handler", "nope", "--as-completed").returncode == 1


def test_a_worker_lost_during_its_part_is_a_failure_with_unknown_outcome(six, leader):
    coming = leader.parts(b"900000000 F", handler="yields")
    found = [next(coming), next(coming)]
    six.kill("F")
    found += coming
    assert sorted((p.process_id, p.result) for p in found[:2]) == [("C", b"C"), ("D", b"D")]
    assert [(p.process_id, p.result, p.executed) for p in found[2:]] == [
        ("F", b"", Executed.UNKNOWN)
    ]


def test_a_missing_worker_is_reported_last(six, leader):
    until(lambda: any(n.state == "down" for n in six.metrics("E").neighbours), what="E sees it")
    parts = list(leader.parts(b"0 0 0", handler="timed"))
    assert sorted(workers(parts[:2])) == ["C", "D"]
    assert (parts[2].process_id, parts[2].executed) == ("F", Executed.NO)
