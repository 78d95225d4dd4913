"""The overlay's main rules, on six real processes.

Most tests send requests both ways, by unary Forward and by ForwardStream.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness.cluster import Overlay, running, six_processes, until
from tests.harness.ways import Outcome, Streamed, Unary, Way

# Handlers write a line for each execution, so that tests can count what really ran.
MINE = '''
import os, time
from pathlib import Path

def _note(payload, context):
    with open(context.options["notes"], "ab") as file:
        file.write(b"%s %016x %s\\n" % (context.process_id.encode(), context.request_id, payload))

def gate(payload, context):
    """Waits until the test opens the gate."""
    _note(payload, context)
    while not os.path.exists(context.options["notes"] + ".open") and not context.cancelled:
        time.sleep(0.03)
    return context.process_id.encode()

def work(payload, context):
    """payload: milliseconds."""
    _note(payload, context)
    time.sleep(float(payload or b"0") / 1000)
    return context.process_id.encode()

def patient(payload, context):
    """Runs until it is cancelled, and notes it."""
    _note(b"begin", context)
    while not context.cancelled:
        time.sleep(0.03)
    _note(b"cancelled", context)
    return b"too late"

def broken(payload, context):
    if payload == b"exit":
        raise SystemExit(3)
    raise ValueError("the secret is " + payload.decode())

def empty(payload, context):
    return b""
'''


Lend = Callable[..., Overlay]


@pytest.fixture(scope="module")
def lend(tmp_path_factory: pytest.TempPathFactory, security: dict[str, Any]) -> Iterator[Lend]:
    """lend(slots=2, **top): an overlay shared by tests with the same arguments. Processes that the
    test before has killed are restarted, and the notes are empty.

    learned: a key for tests that depend on how long `work` has taken so far.
    """
    made: dict[str, Overlay] = {}

    def overlay_of(slots: int = 100, learned: str = "", **top: Any) -> Overlay:
        key = f"{slots} {learned} {top}"
        if key not in made:
            folder = tmp_path_factory.mktemp("rules")
            made[key] = stack.enter_context(own(folder, slots, **top, **security))
        overlay = made[key]
        dead = [i for i, process in overlay.processes.items() if process.poll() is not None]
        if dead:
            overlay.start(*dead)
        forget_notes(overlay)
        return overlay

    with ExitStack() as stack:
        yield overlay_of


@pytest.fixture
def fresh(tmp_path: Path, security: dict[str, Any]) -> Iterator[Overlay]:
    """For tests that depend on the health of neighbours: nothing was killed before."""
    with own(tmp_path, **security) as overlay:
        yield overlay


def own(folder: Path, slots: int = 100, **top: Any) -> AbstractContextManager[Overlay]:
    (folder / "mine.py").write_text(MINE)
    (folder / "notes").write_bytes(b"")
    return running(folder, six_processes(**handlers(slots), **top))


def handlers(slots: int) -> dict[str, Any]:
    options = {"notes": "notes"}
    names = ("work", "gate", "patient", "broken", "empty")
    return {
        "handlers": {
            name: {"call": f"mine:{name}", "slots": slots, "options": options} for name in names
        }
    }


def notes(overlay: Overlay) -> list[list[str]]:
    return [line.split(" ") for line in (overlay.folder / "notes").read_text().splitlines()]


def open_gate(overlay: Overlay) -> None:
    (overlay.folder / "notes.open").touch()


def forget_notes(overlay: Overlay) -> None:
    (overlay.folder / "notes.open").unlink(missing_ok=True)
    (overlay.folder / "notes").write_bytes(b"")


request_ids = itertools.count(4711)


@pytest.fixture(params=[Unary, Streamed])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def ways() -> Iterator[list[Way]]:
    """Both ways, for tests that first have to break something."""
    made = [Unary(), Streamed()]
    yield made
    for way in made:
        way.close()


def waiting_at(overlay: Overlay, process_id: str) -> int:
    """Requests that have not started: in the queue or in the windows of streams."""
    metrics = overlay.metrics(process_id)
    return metrics.queue_size + metrics.streamed_waiting


def health_of(overlay: Overlay, process_id: str) -> int:
    stub = health_pb2_grpc.HealthStub(overlay.channel(process_id))
    return stub.Check(health_pb2.HealthCheckRequest(), timeout=2).status


# 1, 2 and the answer itself


def test_mode_all_asks_every_worker_and_reports_each(six: Overlay, way: Way) -> None:
    (call,) = way.at_once(six, 1, payload=b"hi")
    answer = call.result()
    assert answer.result == b"C: hi\nD: hi\nF: hi"
    assert list(answer.hops) == list("ABCEDF")
    assert [(p.process_id, p.code) for p in answer.parts] == [("C", 0), ("D", 0), ("F", 0)]
    assert [list(p.hops) for p in answer.parts] == [list("ABC"), list("AED"), list("AEF")]
    assert dict(call.trailing_metadata())[codec.COVERAGE_KEY] == "3/3"


def test_mode_any_asks_exactly_one_worker_and_balances(six: Overlay, way: Way) -> None:
    answers = [way.ask(six, "A", mode=pb2.ANY) for _ in range(30)]
    shares = Counter(answer.parts[0].process_id for answer in answers)
    assert all(len(answer.parts) == 1 for answer in answers)
    assert set(shares) == {"C", "D", "F"}
    assert min(shares.values()) >= 5


@pytest.mark.parametrize(
    ("asked", "fields", "workers"),
    [
        ("A", {"team": "green"}, "C"),
        ("A", {"team": "pink"}, "DF"),
        ("B", {}, "CD"),
        ("B", {"team": "pink"}, "D"),
        ("E", {}, "DF"),
        ("C", {}, "C"),
        ("D", {"mode": pb2.ANY}, "D"),
        ("E", {"mode": pb2.ANY, "team": "pink"}, "DF"),
    ],
)
def test_every_process_answers_for_its_own_scope(six, asked, fields, workers, way: Way) -> None:
    answer = way.ask(six, asked, **fields)
    answered = "".join(part.process_id for part in answer.parts)
    assert answered in workers if fields.get("mode") else answered == workers
    assert answer.hops[0] == asked


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"hops": ["A"]}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"team": "blue"}, grpc.StatusCode.NOT_FOUND),
        ({"handler": "os:system"}, grpc.StatusCode.NOT_FOUND),
        ({"mode": 7}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"hops": ["x"] * 100}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"hops": ["X"], "targets": ["A"]}, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_an_invalid_request_is_rejected_with_proof_that_it_did_not_run(
    six: Overlay, fields, code, way: Way
) -> None:
    (call,) = way.at_once(six, 1, **fields)
    outcome = Outcome(call)
    assert (outcome.code, outcome.refused) == (code, True), outcome.details


def test_an_empty_answer_is_an_answer(lend: Lend, way: Way) -> None:
    overlay = lend()
    answer = way.ask(overlay, "A", handler="empty", team="green")
    assert (answer.result, answer.parts[0].code) == (b"", 0)
    assert way.ask(overlay, "A", b"").result == b"C: \nD: \nF: "


# 3: every wait has a deadline


def test_the_deadline_ends_the_work_at_every_hop(lend: Lend, way: Way) -> None:
    overlay = lend()
    (call,) = way.at_once(overlay, 1, handler="patient", timeout=0.5)
    assert Outcome(call).code is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: sum("cancelled" in line for line in notes(overlay)) == 3)
    until(lambda: all(overlay.metrics(i).active_requests == 0 for i in "ABCDEF"))


def test_a_cancel_at_the_client_ends_the_work_at_every_hop(lend: Lend, way: Way) -> None:
    overlay = lend()
    before = overlay.metrics("A").cancelled
    (call,) = way.at_once(overlay, 1, handler="patient", timeout=30)
    until(lambda: len(notes(overlay)) == 3)
    call.cancel()
    until(lambda: sum("cancelled" in line for line in notes(overlay)) == 3)
    until(lambda: all(overlay.metrics(i).active_requests == 0 for i in "ABCDEF"))
    assert overlay.metrics("A").cancelled == before + 1


def test_a_request_without_a_deadline_gets_the_default_deadline(lend: Lend, way: Way) -> None:
    overlay = lend(default_deadline_s=0.5)
    outcome = Outcome(way.at_once(overlay, 1, handler="patient", timeout=None)[0])
    assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_frozen_worker_costs_only_its_own_part(lend: Lend, ways: list[Way]) -> None:
    overlay = lend()
    late, gone = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE
    answers = _answers_beside_a_frozen_worker(overlay, ways)
    for way, found in zip(ways, answers, strict=True):
        responses = [outcome.response for outcome in found]
        assert b"C\nD" in {response.result for response in responses}
        codes = {part.code for one in responses for part in one.parts if part.process_id == "F"}
        assert late.value[0] in codes
        assert codes <= {late.value[0], gone.value[0]}
        until(lambda w=way: w.ask(overlay, "A", b"0", handler="work").result == b"C\nD\nF")


def _answers_beside_a_frozen_worker(overlay: Overlay, ways: list[Way]) -> list[list[Outcome]]:
    """Three of each way. They have 50 ms for each process on the way back; on a busy machine that
    may be too little, for the answer or for D's part, as E waits for F until then. So it is tried
    again."""
    for _ in range(10):
        overlay.freeze("F")
        try:
            calls = [
                way.at_once(overlay, 3, payload=b"0", handler="work", timeout=1.5) for way in ways
            ]
            answers = [[Outcome(call) for call in asked] for asked in calls]
            until(lambda: _state(overlay, "E", "F") == "down")
        finally:
            overlay.thaw("F")
        are_answered = all(outcome.ok for found in answers for outcome in found)
        if are_answered and all(b"C\nD" in {o.response.result for o in found} for found in answers):
            break
        until(lambda: _state(overlay, "E", "F") == "up")
    return answers


def _state(overlay: Overlay, process_id: str, neighbour: str) -> str:
    found = {n.process_id: n.state for n in overlay.metrics(process_id).neighbours}
    return found[neighbour]


# 4, 5 and 9: bounds


def test_the_201st_waiting_request_is_rejected_immediately(lend: Lend) -> None:
    overlay = lend(slots=2)
    # In mode ALL 80 are in service at the leader, although each worker has two slots. The rest of
    # the leader's slots are for other callers and handlers.
    calls = Unary().at_once(overlay, 280, payload=b"x", handler="gate", timeout=60)
    until(lambda: overlay.metrics("A").queue_size == 200)
    began = time.monotonic()
    outcome = Outcome(Unary().at_once(overlay, 1, payload=b"0", handler="gate")[0])
    took_s = time.monotonic() - began
    metrics = overlay.metrics("A")
    assert (outcome.code, outcome.refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert "200 queue slots" in outcome.details
    assert 0 < codec.retry_after_s(outcome.trailers.items()) <= 30
    assert took_s < 10
    assert (metrics.queue_size, metrics.active_requests) == (200, 80)
    assert Outcome(Unary().at_once(overlay, 1, payload=b"0", handler="work")[0]).ok
    assert health_of(overlay, "A") == health_pb2.HealthCheckResponse.SERVING
    open_gate(overlay)
    assert all(Outcome(call).ok for call in calls)
    assert sum(line[2] == "x" for line in notes(overlay)) == 840


@pytest.mark.parametrize("count", [10, 300])
def test_every_concurrent_request_gets_an_answer(six: Overlay, count: int, way: Way) -> None:
    outcomes = [Outcome(call) for call in way.at_once(six, count, payload=b"x")]
    for outcome in outcomes:
        assert outcome.ok or outcome.refused
        assert not outcome.ok or outcome.response.result == b"C: x\nD: x\nF: x"
    assert way.ask(six, "A").result == b"C: hi\nD: hi\nF: hi"
    for process_id in "ABCDEF":
        until(lambda p=process_id: six.metrics(p).active_requests == 0)
        assert health_of(six, process_id) == health_pb2.HealthCheckResponse.SERVING


def test_a_worker_never_runs_more_than_its_slots(lend: Lend, way: Way) -> None:
    overlay = lend(slots=2)
    ways = [way.at_once(overlay, 10, to, payload=b"50", handler="work") for to in "ABECDF"]
    seen = 0
    while not all(call.done() for calls in ways for call in calls):
        now = [h.active for i in "CDF" for h in overlay.metrics(i).handlers if h.name == "work"]
        assert max(now) <= 2
        seen = max(seen, *now)
    assert seen == 2
    assert all(Outcome(call).ok for calls in ways for call in calls)


def test_requests_to_any_worker_wait_at_the_leader_for_a_free_slot(lend: Lend, way: Way) -> None:
    overlay = lend(slots=1, learned="it is slow")
    calls = way.at_once(overlay, 30, payload=b"100", handler="work", mode=pb2.ANY)
    until(lambda: waiting_at(overlay, "A") >= 20)
    below = [waiting_at(overlay, i) for i in "BECDF"]
    assert sum(below) <= 3
    shares = Counter(Outcome(call).response.parts[0].process_id for call in calls)
    assert all(8 <= count <= 12 for count in shares.values()), shares


def test_a_request_whose_deadline_passes_in_the_queue_never_runs(lend: Lend, way: Way) -> None:
    overlay = lend(slots=1, learned="it is slow")
    long_ones = way.at_once(overlay, 3, handler="gate", mode=pb2.ANY)
    until(lambda: len(notes(overlay)) == 3)
    short = way.at_once(overlay, 20, payload=b"0", handler="gate", mode=pb2.ANY, timeout=0.5)
    assert {Outcome(call).code for call in short} <= {
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    open_gate(overlay)
    assert all(Outcome(call).ok for call in long_ones)
    assert way.ask(overlay, "A", b"0", handler="gate", mode=pb2.ANY).parts
    assert len(notes(overlay)) == 4
    assert waiting_at(overlay, "A") == 0


# 6: executed once


def test_a_request_id_runs_once_per_worker(lend: Lend, way: Way) -> None:
    overlay = lend()
    request = {
        "payload": b"50",
        "handler": "work",
        "request_id": next(request_ids),
        "want_parts": True,
    }
    outcomes = [Outcome(call) for call in way.at_once(overlay, 20, **request)]
    assert Counter(line[0] for line in notes(overlay)) == {"C": 1, "D": 1, "F": 1}
    assert sum(o.response.result == b"C\nD\nF" for o in outcomes if o.ok) <= 1
    assert all(o.ok or o.code is grpc.StatusCode.ALREADY_EXISTS for o in outcomes)
    assert not any(o.refused for o in outcomes)


def test_a_request_id_runs_once_even_after_many_other_requests(lend: Lend, ways: list[Way]) -> None:
    overlay = lend()
    requests = [{"payload": b"0", "handler": "work", "request_id": next(request_ids)} for _ in ways]
    for way, request in zip(ways, requests, strict=True):
        assert Outcome(way.at_once(overlay, 1, "C", **request)[0]).ok
    with overlay.connect("C") as client:
        for _ in client.map(None, itertools.repeat(b"x", 110_000), timeout=60):
            pass
    for way, request in zip(ways, requests, strict=True):
        again = Outcome(way.at_once(overlay, 1, "C", **request)[0])
        assert (again.code, again.refused) == (grpc.StatusCode.ALREADY_EXISTS, False)
    assert len(notes(overlay)) == len(ways)


LATER = """
import os
from pathlib import Path

Path(__file__).with_name("needed").read_bytes()

def later(payload, context):
    return b"%d" % os.getpid()
"""


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory, security: dict[str, Any]) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("later")
    (folder / "mine.py").write_text(LATER)
    (folder / "needed").touch()
    handlers = {"later": {"call": "mine:later", "run": "process", "slots": 1}}
    with running(folder, six_processes(handlers=handlers, **security)) as overlay:
        yield overlay


def test_a_request_refused_with_proof_can_be_retried_with_the_same_id(
    later: Overlay, way: Way
) -> None:
    """D is asked twice: once through each team leader."""
    overlay, needed = later, later.folder / "needed"
    children = [psutil.Process(int(way.ask(overlay, i, handler="later").result)) for i in "CDF"]
    needed.unlink()
    for child in children:
        child.kill()
    request = {
        "payload": b"0",
        "handler": "later",
        "request_id": next(request_ids),
        "mode": pb2.ANY,
    }

    refused = Outcome(way.at_once(overlay, 1, **request)[0])

    assert (refused.code, refused.refused) == (grpc.StatusCode.UNAVAILABLE, True), refused.details
    needed.touch()
    again = Outcome(way.at_once(overlay, 1, **request)[0])
    assert again.ok, again.details


# 6 and 7: an incomplete answer says so


def test_when_a_team_leader_is_killed_nothing_runs_twice_and_d_is_reached_through_b(
    fresh: Overlay, ways: list[Way]
) -> None:
    asked = {"payload": b"100", "handler": "work", "mode": pb2.ANY}
    calls = [call for way in ways for call in way.at_once(fresh, 60, **asked)]
    until(lambda: len(notes(fresh)) > 10)
    fresh.kill("E")
    outcomes = [Outcome(call) for call in calls]
    ran = Counter(line[1] for line in notes(fresh))
    assert max(ran.values()) == 1
    assert all(o.ok or not o.refused for o in outcomes)
    until(lambda: _state(fresh, "A", "E") == "down")
    for way in ways:
        (call,) = way.at_once(fresh, 1, payload=b"0", handler="work")
        answer = call.result()
        assert answer.result == b"C\nD"
        assert list(answer.hops) == list("ABCD")
        assert dict(call.trailing_metadata())[codec.COVERAGE_KEY] == "2/3; missing=F"
        missing = answer.parts[2]
        assert (missing.process_id, missing.code, missing.executed) == ("F", 14, pb2.NO)
        assert "E" in missing.reason
    fresh.start("E")
    for way in ways:
        until(lambda w=way: w.ask(fresh, "A", b"0", handler="work").result == b"C\nD\nF")


def test_mode_any_uses_the_workers_that_are_alive_and_without_any_the_answer_is_unavailable(
    fresh: Overlay, ways: list[Way]
) -> None:
    fresh.kill("F")
    until(lambda: _state(fresh, "E", "F") == "down")
    for way in ways:
        answers = [way.ask(fresh, "A", b"0", handler="work", mode=pb2.ANY) for _ in range(20)]
        assert {answer.parts[0].process_id for answer in answers} == {"C", "D"}
    for process_id in "CD":
        fresh.kill(process_id)
    until(lambda: _state(fresh, "E", "D") == "down")
    until(lambda: _state(fresh, "B", "D") == _state(fresh, "B", "C") == "down")
    for way, mode in itertools.product(ways, (pb2.ALL, pb2.ANY)):
        outcome = Outcome(way.at_once(fresh, 1, payload=b"0", handler="work", mode=mode)[0])
        assert (outcome.code, outcome.refused) == (grpc.StatusCode.UNAVAILABLE, True)


# 8: a handler's failure costs one request


@pytest.mark.parametrize("payload", [b"42", b"exit"])
def test_a_failing_handler_costs_one_request(lend: Lend, payload: bytes, way: Way) -> None:
    overlay = lend()
    outcome = Outcome(way.at_once(overlay, 1, payload=payload, handler="broken", team="green")[0])
    assert (outcome.code, outcome.refused) == (grpc.StatusCode.INTERNAL, False)
    assert "error id" in outcome.details
    assert "secret" not in outcome.details
    error_id = outcome.details.split("error id ")[1].split()[0]
    until(lambda: error_id in overlay.log("C"))
    assert way.ask(overlay, "A").result == b"C: hi\nD: hi\nF: hi"


# 9 and the metrics


def test_the_counters_match_what_clients_saw(lend: Lend) -> None:
    overlay = lend(slots=4, queue_slots=30, in_service=20)
    calls = [
        call
        for handler, payload in (("work", b"20"), ("broken", b"1"), ("empty", b""))
        for mode in (pb2.ALL, pb2.ANY)
        for call in Unary().at_once(overlay, 60, payload=payload, handler=handler, mode=mode)
    ]
    outcomes = [Outcome(call) for call in calls]
    until(lambda: overlay.metrics("A").active_requests == 0)
    metrics = overlay.metrics("A")
    seen = Counter("ok" if o.ok else "refused" if o.refused else "failed" for o in outcomes)
    assert min(seen.values()) > 0
    assert metrics.received == len(calls)
    counted = (metrics.completed, metrics.refused, metrics.failed, metrics.cancelled)
    assert counted == (seen["ok"], seen["refused"], seen["failed"], 0)
    assert sum(metrics.refused_by_reason.values()) == metrics.refused
    ran = Counter(line[0] for line in notes(overlay))
    for process_id in "CDF":
        by_name = {h.name: h for h in overlay.metrics(process_id).handlers}
        assert by_name["work"].completed == ran[process_id]


def test_metrics_show_the_waiting_requests_and_their_limit(lend: Lend, way: Way) -> None:
    overlay = lend(slots=1, learned="it is slow")
    calls = way.at_once(overlay, 3, handler="gate", mode=pb2.ANY)
    until(lambda: len(notes(overlay)) == 3)
    calls += way.at_once(overlay, 5, payload=b"0", handler="gate", mode=pb2.ANY)
    until(lambda: waiting_at(overlay, "A") == 5)

    found = overlay.metrics("A")
    ended = found.completed + found.failed + found.refused + found.cancelled
    if isinstance(way, Unary):
        waiting, bound, active = found.queue_size, found.queue_slots, found.active_requests
        assert bound == 200
    else:
        waiting, bound, active = found.streamed_waiting, found.streamed_slots, found.streamed_active
        assert bound == found.streams * 4096 > 0
    assert waiting == 5 <= bound
    assert waiting + active == found.received - ended
    open_gate(overlay)
    assert all(Outcome(call).ok for call in calls)


def test_metrics_describe_the_whole_overlay(six: Overlay) -> None:
    metrics = six.metrics("A")
    assert (metrics.role, metrics.team, metrics.max_capacity) == ("leader", "green", 100)
    assert (metrics.queue_slots, metrics.is_healthy) == (200, True)
    assert [p.id for p in metrics.topology] == list("ABCDEF")
    assert {n.process_id: n.state for n in metrics.neighbours} == {"B": "up", "E": "up"}
    assert all(n.same_config for n in metrics.neighbours)
    assert all(0 < n.rtt_ms < 5_000 for n in metrics.neighbours)
    assert six.metrics("C").handlers[0].name == "echo"
    assert metrics.uptime_s > 0
    assert metrics.pid == six.processes["A"].pid


# 10: stopping


def test_a_stopping_process_finishes_running_requests_and_refuses_the_rest(
    lend: Lend, way: Way
) -> None:
    overlay = lend(slots=1, learned="it is slow")
    running = way.at_once(overlay, 3, handler="gate", mode=pb2.ANY)
    until(lambda: len(notes(overlay)) == 3)
    waiting = way.at_once(overlay, 5, payload=b"0", handler="gate", mode=pb2.ANY)
    until(lambda: waiting_at(overlay, "A") == 5)
    overlay.processes["A"].terminate()
    until(lambda: health_of(overlay, "A") == health_pb2.HealthCheckResponse.NOT_SERVING)
    late = Outcome(way.at_once(overlay, 1, payload=b"0", handler="gate")[0])
    refused = [Outcome(call) for call in waiting]
    open_gate(overlay)
    assert all(Outcome(call).ok for call in running)
    assert {(o.code, o.refused) for o in [*refused, late]} == {(grpc.StatusCode.UNAVAILABLE, True)}
    assert overlay.processes["A"].wait(20) == 0


def test_neighbours_route_around_a_stopping_team_leader(lend: Lend) -> None:
    overlay = lend()
    stop = threading.Event()
    outcomes = []

    def load() -> None:
        with overlay.new_channel("A") as channel:
            stub = pb2_grpc.OverlayNodeStub(channel)
            while not stop.is_set():
                request = pb2.Request(payload=b"10", handler="work", mode=pb2.ANY)
                outcomes.append(Outcome(stub.Forward.future(request, timeout=10)))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(load)
        time.sleep(0.5)
        overlay.processes["E"].terminate()
        overlay.processes["E"].wait(10)
        time.sleep(0.5)
        stop.set()
    assert len(outcomes) > 50
    assert {o.code for o in outcomes} == {grpc.StatusCode.OK}


def test_a_second_signal_ends_the_process_immediately(lend: Lend, way: Way) -> None:
    overlay = lend()
    call = way.at_once(overlay, 1, payload=b"20000", handler="work", team="green")
    until(lambda: len(notes(overlay)) == 1)
    worker = overlay.processes["C"]
    worker.terminate()
    until(lambda: health_of(overlay, "C") == health_pb2.HealthCheckResponse.NOT_SERVING)
    worker.terminate()
    assert worker.wait(15) != 0
    assert not Outcome(call[0]).ok
