"""The rules that keep the overlay alive: real dispatchers and queues, a network in memory."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.model.limits import Limits
from overlay.model.segments import (
    AnswerRow,
    Cancel,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    OnResult,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.model.topology import Topology
from overlay.peers.peers import Peers
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import aggregate, planner
from overlay.routing.dispatcher import Claimed, Dispatcher
from overlay.routing.outlier import State
from tests.harness.cluster import free_port, until
from tests.harness.network import (
    ANSWER_LOST,
    REFUSED,
    REQUEST_LOST,
    Asked,
    MemoryNetwork,
    random_topology,
    the_six,
)

SIX = the_six()
ALL, ANY = Mode.ALL, Mode.ANY


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(SIX)


def one(route: Route, deadline: float = 2000.0) -> Segment:
    """A segment of one request, with the id 1."""
    return Segment(route, Column((b"",)), deadline, 1)


def one_at_a_time(topology: Topology) -> Topology:
    """The same overlay, with room for a single request in service on each process."""
    processes = topology.processes.values()
    return replace(topology, processes={p.id: replace(p, in_service=1) for p in processes})


def test_a_plain_request_runs_once_on_every_worker(network):
    asked = network.ask("A", b"hi")

    assert asked.result == b"C: hi\nD: hi\nF: hi"
    assert asked.answer.hops == tuple("ABCEDF")
    assert network.runs(asked.request_id) == {"C": 1, "D": 1, "F": 1}
    assert network.left_over == {}


@pytest.mark.parametrize(
    ("me", "result", "hops"), [("B", b"C: hi\nD: hi", "BCD"), ("F", b"F: hi", "F")]
)
def test_every_process_can_be_asked(network, me, result, hops):
    asked = network.ask(me)
    assert (asked.result, asked.answer.hops) == (result, tuple(hops))


def test_each_part_has_the_hops_to_its_worker(network):
    parts = network.ask("A").answer.parts
    assert {part.process_id: "".join(part.hops) for part in parts} == {
        "C": "ABC",
        "D": "AED",
        "F": "AEF",
    }


def test_any_runs_on_exactly_one_worker(network):
    asked = network.ask("A", b"hi", mode=ANY)

    assert sum(network.runs(asked.request_id).values()) == 1
    assert asked.result in (b"C: hi", b"D: hi", b"F: hi")
    assert len(asked.answer.parts) == 1
    assert asked.answer.hops == asked.answer.parts[0].hops


# Rule 1: strictly downwards in rank.


@given(st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_requests_only_ever_go_down(seed):
    network = MemoryNetwork(random_topology(seed))
    for process_id in network.topology.processes:
        for mode in Mode:
            network.ask(process_id, mode=mode)

    rank = {p.id: p.rank for p in network.topology.processes.values()}
    assert all(rank[near] > rank[far] for near, far, _ in network.sent)


def test_two_requests_never_wait_for_each_other():
    network = MemoryNetwork(one_at_a_time(SIX), slots=1)
    for near, far in network.edges:
        network.hold(near, far)

    asked = [network.ask(me, mode=mode, deadline_s=60) for mode in Mode for me in "ABEABE"]
    for _ in range(2 * len(asked)):
        for near, far in network.edges:
            network.release(near, far)
            network.hold(near, far)

    # No time has passed: short queues may have refused requests, but none is stuck.
    assert [len(one.answers[0]) for one in asked] == [1] * len(asked)
    errors = [one.error for one in asked if one.error]
    assert {error.code for error in errors} <= {Code.RESOURCE_EXHAUSTED}
    assert len(errors) < len(asked) / 2
    assert network.left_over == {}


# Rule 2: never to an id already in the hop list.


def test_a_process_in_the_hop_list_is_skipped(network):
    asked = Asked(one(Route(hops=("E", "D"), targets=("C", "D", "F"))))

    network.nodes["A"].serve(asked.segment, asked.take)

    # D is asked for through B and skipped there; F can be reached only through E.
    assert network.sent_from("A") == ["B"]
    assert network.runs(1) == {"C": 1}
    assert {part.process_id: part.executed for part in asked.answer.parts if not part.ok} == {
        "D": Executed.NO,
        "F": Executed.NO,
    }


@pytest.mark.parametrize("me", "ABC")
def test_a_process_that_finds_itself_in_the_hop_list_refuses(network, me):
    asked = Asked(one(Route(hops=("X", me), targets=("C",))))

    network.nodes[me].serve(asked.segment, asked.take)

    refused = asked.answer.refused
    assert (refused.code, refused.executed) == (Code.FAILED_PRECONDITION, Executed.NO)
    assert network.executed == []


def test_a_worker_never_runs_a_request_for_another(network):
    asked = Asked(one(Route(hops=("A", "B"), targets=("D",))))

    network.nodes["C"].serve(asked.segment, asked.take)

    assert asked.is_answered
    assert network.executed == []


def test_a_worker_that_is_asked_for_others_too_claims_one_slot_for_its_own_part():
    network = MemoryNetwork(SIX, slots=1)
    works = network.nodes["C"].executor
    works.hold()
    asked = [
        Asked(Segment(Route(hops=("A", "B"), targets=("C", "D")), Column((b"",)), 2000.0, n))
        for n in range(1, 4)
    ]

    for each in asked:
        network.nodes["C"].serve(each.segment, each.take)

    assert [request_id for _, request_id in network.executed] == [1]
    assert works.active == 1
    works.finish()
    assert works.active == 0
    assert all(each.is_answered for each in asked)


# Rule 3: every wait has a deadline.


def test_a_late_branch_costs_only_its_own_parts(network):
    network.hold("A", "E")
    asked = network.ask("A", deadline_s=10)
    assert not asked.is_answered

    network.advance(10)

    assert asked.result == b"C: hi"
    assert asked.coverage == "1/3; missing=D,F"
    assert {part.code for part in asked.answer.parts if not part.ok} == {Code.DEADLINE_EXCEEDED}


def test_a_late_worker_costs_only_its_own_part(network):
    network.nodes["F"].executor.hold()
    asked = network.ask("A", deadline_s=10)

    network.advance(10)

    assert asked.result == b"C: hi\nD: hi"
    assert asked.coverage == "2/3; missing=F"


def test_a_late_answer_arrives_before_the_callers_own_deadline(network):
    network.nodes["F"].executor.hold()
    asked = network.ask("A", deadline_s=10)

    network.advance(9.999)

    assert asked.is_answered


@pytest.mark.parametrize("mode", Mode)
def test_nothing_is_left_over_when_every_worker_is_late(network, mode):
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.ask("A", mode=mode, deadline_s=1)

    network.advance(1)
    assert asked.error.code is Code.DEADLINE_EXCEEDED
    assert asked.error.executed is not Executed.NO

    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert asked.answer
    assert network.left_over == {}


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
def test_a_cancelled_request_is_answered_with_the_code_of_the_cancel(network, mode, code):
    network.hold("A", "B")
    network.hold("A", "E")
    asked = network.ask("A", mode=mode)

    asked.queued.end(code)

    assert asked.error.code is code


@pytest.mark.parametrize("mode", Mode)
def test_the_work_below_is_cancelled_when_the_caller_leaves(network, mode):
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.ask("A", mode=mode)

    asked.leave()

    # Only the handlers themselves still run; nothing waits for them.
    assert asked.answer
    assert {what.split()[1] for what in network.left_over} == {"working"}
    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert network.left_over == {}


@pytest.mark.parametrize("mode", Mode)
def test_a_cancelled_request_is_not_answered_again(network, mode):
    network.hold("A", "B")
    network.cut("A", "E")
    asked = network.ask("A", mode=mode, team="green")

    asked.leave()
    asked.leave()
    network.release("A", "B")

    assert asked.error.code is Code.CANCELLED


def test_a_request_whose_caller_left_is_not_tried_elsewhere(network):
    network.nodes["C"].executor.hold()
    network.cut("A", "E")
    asked = network.ask("A", mode=ANY)
    network.heal("A", "E")
    assert network.sent_from("A") == ["B"]

    # The first branch refuses while the caller leaves.
    (letter,) = network.edges["A", "B"].open
    letter.end = lambda code, start, count: letter.refuse()
    asked.queued._cancels = [(0, 1, asked.queued._cancels[0][2])]
    asked.leave()

    assert network.sent_from("A") == ["B"]


def test_a_request_tried_elsewhere_is_cancelled_there_too(network):
    for worker in "DF":
        network.nodes[worker].executor.hold()
    network.next("A", "B", REFUSED)
    asked = network.ask("A", mode=ANY)
    assert network.sent_from("A") == ["B", "E"]

    asked.leave()

    assert asked.error.code is Code.CANCELLED
    assert {what.split()[1] for what in network.left_over} == {"working"}


def test_a_request_cancelled_while_it_is_sent_elsewhere_is_cancelled_there_too(network):
    for worker in "DF":
        network.nodes[worker].executor.hold()
    network.hold("A", "B")
    asked, links = network.ask("A", mode=ANY), network.nodes["A"].peers
    send = links.send

    def leave_meanwhile(*what):
        asked.leave()
        return send(*what)

    links.send = leave_meanwhile
    (letter,) = network.edges["A", "B"].open
    letter.refuse()

    assert network.sent_from("A") == ["B", "E"]
    assert asked.error.code is Code.CANCELLED
    assert {what.split()[1] for what in network.left_over} == {"working"}


# Rule 6: executed once.


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("fate", [ANSWER_LOST, REQUEST_LOST])
def test_a_request_whose_answer_was_lost_is_never_sent_again(network, mode, fate):
    network.next("A", "B", fate)
    network.next("A", "E", fate)

    asked = network.ask("A", mode=mode)

    assert max(Counter(network.sent_from("A")).values()) == 1
    assert len(network.sent_from("A")) == (2 if mode is ALL else 1)
    assert asked.error.executed is Executed.UNKNOWN
    assert asked.error.retry_after_s is None


def test_a_lost_request_with_a_key_runs_once_more_on_another_worker(network):
    for node in network.nodes.values():
        node.executor.hold()
    asked = network.ask("A", mode=ANY, team="pink", idempotent=True)
    assert network.runs(asked.request_id) == {"D": 1}

    network.cut("E", "D")  # D can still be reached through B

    assert network.runs(asked.request_id) == {"D": 1, "F": 1}
    for node in network.nodes.values():
        node.executor.finish()
    assert asked.result == b"F: hi"
    assert network.left_over == {}


def test_a_request_with_a_key_is_not_retried_after_a_second_loss(network):
    for node in network.nodes.values():
        node.executor.hold()
    asked = network.ask("A", mode=ANY, idempotent=True)
    for _ in range(2):
        worker = next(w for w, _ in reversed(network.executed))
        for edge in network.edges_to(worker):
            edge.go_down()

    assert sorted(network.runs(asked.request_id).values()) == [1, 1]
    assert asked.error.executed is Executed.UNKNOWN


def test_a_request_lost_with_a_team_leader_is_retried_on_none_of_its_workers(network):
    for node in network.nodes.values():
        node.executor.hold()
    network.cut("A", "B")
    asked = network.ask("A", mode=ANY, idempotent=True)
    (first,) = network.runs(asked.request_id)
    network.heal("A", "B")

    network.cut("A", "E")

    assert network.runs(asked.request_id) == {first: 1, "C": 1}


def test_a_refused_request_goes_to_another_branch(network):
    network.next("A", "B", REFUSED)
    network.next("A", "E", REFUSED)
    network.heal("A", "B")

    first = network.ask("A", mode=ANY)

    assert sorted(network.sent_from("A")) == ["B", "E"]
    assert first.error.executed is Executed.NO

    network.next("A", "B", REFUSED)
    network.cut("A", "E")
    second = network.ask("A", mode=ANY)
    assert second.error.executed is Executed.NO

    network.heal("A", "E")
    network.next("A", "B", REFUSED)
    third = [network.ask("A", mode=ANY) for _ in range(4)]
    assert all(one.error is None for one in third)
    assert all(sum(network.runs(one.request_id).values()) == 1 for one in third)


def test_a_refusal_by_a_worker_goes_to_another_worker(network):
    network.cut("A", "B")
    network.next("E", "D", REFUSED)
    network.next("E", "F", REFUSED)
    asked = network.ask("A", mode=ANY)
    assert asked.error.executed is Executed.NO

    network.next("E", "D", REFUSED)
    asked = [network.ask("A", mode=ANY) for _ in range(2)]
    assert [one.error for one in asked] == [None, None]


def test_a_second_request_with_the_same_id_is_not_run(network):
    first = network.ask("A", request_id=77)
    second = network.ask("A", request_id=77)

    assert first.error is None
    assert second.error.code is Code.ALREADY_EXISTS
    assert second.error.executed is not Executed.NO
    assert network.runs(77) == {"C": 1, "D": 1, "F": 1}


def test_a_worker_reached_through_another_team_leader_runs_the_request_once(network):
    network.cut("A", "E")
    asked = network.ask("A")

    assert asked.result == b"C: hi\nD: hi"
    assert network.runs(asked.request_id) == {"C": 1, "D": 1}
    assert {part.process_id: "".join(part.hops) for part in asked.answer.parts if part.ok} == {
        "C": "ABC",
        "D": "ABD",
    }


def test_an_answer_without_parts_proves_nothing(network):
    network.cut("A", "E")
    network.nodes["B"].serve = lambda segment, reply, lane: reply(0, Slice(1, (), ("B",)))

    asked = network.ask("A", mode=ANY)

    assert asked.error.executed is not Executed.NO


# Rule 7: missing parts are reported.


def test_a_dead_worker_costs_only_its_own_part(network):
    network.kill("D")

    asked = network.ask("A")

    assert asked.result == b"C: hi\nF: hi"
    assert asked.coverage == "2/3; missing=D"
    (part,) = [part for part in asked.answer.parts if not part.ok]
    assert (part.code, part.executed) == (Code.UNAVAILABLE, Executed.NO)
    assert part.reason == "D cannot be reached from E"


def test_a_dead_team_leader_costs_only_workers_that_no_other_leads(network):
    network.kill("E")

    asked = network.ask("A")

    assert asked.coverage == "2/3; missing=F"
    assert asked.answer.parts[2].reason == "cannot be reached: A has no live link to E"


def test_without_reachable_workers_the_request_fails_with_proof_that_nothing_ran(network):
    network.kill("B")
    network.kill("E")

    for mode in Mode:
        error = network.ask("A", mode=mode).error
        assert (error.code, error.executed) == (Code.UNAVAILABLE, Executed.NO)
        assert error.retry_after_s is not None


def test_the_part_of_a_worker_that_dies_with_the_request_is_unknown(network):
    network.nodes["F"].executor.hold()
    asked = network.ask("A")
    network.kill("F")

    assert asked.coverage == "2/3; missing=F"
    assert asked.answer.parts[2].executed is Executed.UNKNOWN


def test_in_mode_all_a_refusal_of_a_branch_is_reported_for_each_of_its_workers(network):
    network.next("A", "E", REFUSED)

    asked = network.ask("A")

    assert asked.coverage == "1/3; missing=D,F"
    assert {part.executed for part in asked.answer.parts if not part.ok} == {Executed.NO}


# Links that are down for a moment.


def test_a_request_waits_for_a_link_that_has_just_gone_down(network):
    network.cut("A", "E", just_now=True)
    asked = network.ask("A")
    assert not asked.is_answered

    network.heal("A", "E")

    assert asked.coverage == "3/3"


def test_workers_behind_a_link_that_stays_down_are_missing(network):
    network.cut("A", "E", just_now=True)
    asked = network.ask("A")

    network.give_up("A", "E")

    assert asked.coverage == "2/3; missing=F"


def test_a_request_waits_for_a_link_at_most_half_of_its_time(network):
    network.cut("A", "E", just_now=True)
    asked = network.ask("A", deadline_s=1)

    network.advance(0.51)
    network.nodes["A"].queue.kick()

    assert asked.coverage == "2/3; missing=F"


def test_a_request_does_not_wait_for_a_link_that_it_does_not_need(network):
    network.cut("A", "E", just_now=True)
    assert network.ask("A", team="green").coverage == "1/1"


def test_any_does_not_wait_for_a_link_while_another_branch_is_up(network):
    network.cut("A", "E", just_now=True)
    assert network.ask("A", mode=ANY).is_answered


def test_a_short_deadline_leaves_time_to_report_the_missing_workers():
    processes = {
        p.id: replace(p, host="127.0.0.1", port=free_port()) for p in SIX.processes.values()
    }
    topology = replace(SIX, processes=processes)
    peers = Peers(topology.below("A"), Limits(), "")
    dispatcher = Dispatcher(topology, "A", peers)
    queue = RequestQueue(
        "A", slots=9, in_service=9, max_bytes=999, claim=dispatcher.claim, start=dispatcher.start
    )
    peers.on_change = queue.kick
    answers: list[AnswerRow] = []
    peers.start()
    try:
        # The links are new and down, so the request waits for them; nothing listens there.
        segment = one(Route(), dispatcher._clock() + 0.9)
        queue.admit(segment, lambda start, found: answers.append(found.at(0)))
        until(lambda: answers, 0.8, "the request waits beyond half of its 0.9 s")
    finally:
        peers.close()
    assert [part.executed for part in answers[0].parts] == [Executed.NO] * 3


# Any: by load, and only against credit.


def test_sequential_any_requests_spread_over_all_workers(network):
    asked = [network.ask("A", mode=ANY) for _ in range(30)]

    runs = sum((network.runs(one.request_id) for one in asked), Counter())
    assert runs == {"C": 10, "D": 10, "F": 10}


def test_any_avoids_an_ejected_team_leader_and_all_does_not(network):
    network.edges["A", "E"].state = State.EJECTED

    any_worker = [network.ask("A", mode=ANY) for _ in range(10)]
    all_workers = network.ask("A")

    assert {one.result for one in any_worker} == {b"C: hi"}
    assert all_workers.coverage == "3/3"


def test_an_ejected_worker_is_asked_if_it_is_the_only_one(network):
    network.edges["B", "C"].state = State.EJECTED
    assert network.ask("A", mode=ANY, team="green").result == b"C: hi"


def test_a_returning_neighbour_is_not_given_all_that_it_missed(network):
    network.edges["A", "E"].state = State.EJECTED
    for _ in range(1000):
        network.ask("A", mode=ANY)
    network.edges["A", "E"].state = State.HEALTHY
    before = len(network.executed)

    for _ in range(300):
        network.ask("A", mode=ANY)

    assert Counter(worker for worker, _ in network.executed[before:])["C"] >= 30


def test_any_is_sent_only_against_credit():
    network = MemoryNetwork(SIX, slots=1)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = [network.ask("A", mode=ANY) for _ in range(5)]
    assert network.nodes["A"].queue.waiting == 2
    assert Counter(worker for worker, _ in network.executed) == {"C": 1, "D": 1, "F": 1}

    network.nodes["D"].executor.finish()

    assert network.nodes["A"].queue.waiting == 0
    assert sum(one.is_answered for one in asked) == 3
    assert {one.result for one in asked if one.is_answered} == {b"D: hi"}


def test_in_mode_all_excess_requests_wait_for_a_busy_worker():
    network = MemoryNetwork(SIX, slots=1)
    network.nodes["C"].executor.hold()
    asked = [network.ask("A") for _ in range(3)]
    assert not any(one.is_answered for one in asked)

    network.nodes["C"].executor.finish()

    assert [one.coverage for one in asked] == ["3/3"] * 3


@pytest.mark.parametrize("busy", "CDF")
@pytest.mark.parametrize("way", ["single", "streamed"])
def test_a_busy_worker_costs_only_its_own_part(way, busy):
    network = MemoryNetwork(SIX, slots=1)
    network.nodes[busy].executor.hold()
    network.ask("A", deadline_s=60)  # takes its one slot

    asked = network.ask("A", deadline_s=5) if way == "single" else network.stream("A", 1)
    network.advance(10)

    assert asked.coverage == f"2/3; missing={busy}"


# Segments of many rows.


@pytest.mark.parametrize("mode", Mode)
def test_each_row_of_a_segment_is_answered_once_with_its_own_result(network, mode):
    asked = network.stream("A", 50, mode=mode)

    for row in range(50):
        runs = network.runs(asked.request_id + row)
        assert set(runs.values()) == {1}
        assert len(runs) == (3 if mode is ALL else 1)
        assert asked.result_at(row) == b"\n".join(
            b"%s: %d" % (w.encode(), row) for w in sorted(runs)
        )
    assert network.left_over == {}


@given(st.integers(0, 2**32), st.sampled_from(Mode))
@settings(max_examples=100, deadline=None)
def test_answers_may_arrive_in_slices_of_any_size_and_order(seed, mode):
    chance, network = random.Random(seed), MemoryNetwork(SIX)
    for edge in network.edges:
        network.hold_answers(*edge)
    asked = network.stream("A", chance.randint(1, 30), mode=mode)

    while any(edge.held_answers for edge in network.edges.values()):
        near, far = chance.choice(list(network.edges))
        network.release_answers(near, far, chance)
        network.hold_answers(near, far)

    for row in range(len(asked.segment)):
        assert all(line.endswith(b": %d" % row) for line in asked.result_at(row).split(b"\n"))
        assert len(asked.at(row).parts) == (3 if mode is ALL else 1)
    assert network.left_over == {}


class Branches:
    """Neighbours whose answers the test sends."""

    def __init__(self) -> None:
        self.sinks: dict[str, OnResult] = {}
        self.cancelled = 0

    def up(self) -> frozenset[str]:
        return frozenset("BE")

    def awaited(self) -> set[str]:
        return set()

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        return 0, 0.0, State.HEALTHY, True

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        return 100_000

    def reserve(self, neighbour: str, handler: str, count: int) -> None:
        pass

    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel:
        self.sinks[neighbour] = sink
        return self._cancel

    def _cancel(self, code: Code, start: int, count: int) -> None:
        self.cancelled += count


def row_by_row(count: int, mode: Mode, way: str, cancels: bool) -> float:
    """CPU seconds of a dispatcher for a segment whose rows are answered or cancelled singly."""
    branches, chance, answered = Branches(), random.Random(count), Counter[int]()
    dispatcher = Dispatcher(SIX, "A", branches)
    queue = RequestQueue(
        "A",
        slots=1,
        in_service=1,
        max_bytes=1,
        claim=lambda *what: Claimed(count, claimed.plan, claimed.branch),
        start=dispatcher.start,
    )
    segment = Segment(Route(mode), Column((b"",) * count), 1e9, 1)
    if way == "partial results":
        segment = replace(segment, on_partial=lambda row, answers: None)
    claimed = dispatcher.claim(segment.route, count, 0.0, True)
    assert isinstance(claimed, Claimed)
    began = time.process_time()
    flow = queue.open_flow()
    queued = queue.admit_to(flow, segment, lambda row, answers: answered.update([row]))
    queue.kick()
    if way == "tried elsewhere":
        refused = Part("B", Code.UNAVAILABLE, "no", executed=Executed.NO)
        (first,) = branches.sinks.values()
        for row in range(count):
            first(row, Slice(1, (), refused=refused))
    for neighbour, sink in branches.sinks.items():
        workers = "C" if neighbour == "B" else "DF"
        columns = tuple(PartSlice(w, Column((b"x",))) for w in workers)
        for row in chance.sample(range(count), count):
            if cancels:
                queued.end(Code.CANCELLED, row, 1)
            else:
                sink(row, Slice(1, columns, (neighbour,)))
    took_s = time.process_time() - began
    assert answered == dict.fromkeys(range(count), 1)
    return took_s


@pytest.mark.parametrize(
    ("mode", "way", "cancels"),
    [
        (ALL, "", False),
        (ALL, "", True),
        (ALL, "partial results", False),
        (ALL, "partial results", True),
        (ANY, "", False),
        (ANY, "", True),
        (ANY, "tried elsewhere", True),
    ],
)
def test_the_cost_of_a_row_does_not_grow_with_the_segment(mode, way, cancels):
    few, many = (
        min(row_by_row(count, mode, way, cancels) for _ in range(3)) for count in (512, 4096)
    )

    assert many < 3 * 8 * few, "eight times as many rows must not take 64 times the work"


def test_slicing_failed_rows_one_by_one_takes_linear_time():
    def cpu_s(count: int) -> float:
        failures = {row: Detail(Code.INTERNAL, "no") for row in range(count)}
        column = PartSlice("F", Column((b"",) * count), (), failures)
        began = time.process_time()
        for row in range(count):
            assert column.slice(row, 1).failures == {0: failures[row]}
        return time.process_time() - began

    few, many = (min(cpu_s(count) for _ in range(3)) for count in (1024, 8192))

    assert many < 3 * 8 * few


def test_a_row_of_all_is_answered_when_its_last_branch_has_answered_it(network):
    network.nodes["C"].executor.hold()
    asked = network.stream("A", 3)
    assert asked.rows_answered == []

    network.nodes["C"].executor.finish(1)
    assert asked.rows_answered == [0]

    network.nodes["C"].executor.finish()
    assert asked.rows_answered == [0, 1, 2]


def test_rows_of_any_spread_singly_while_their_service_time_is_unknown(network):
    asked = network.stream("A", 30, mode=ANY)

    runs = Counter(worker for worker, _ in network.executed)
    assert runs == {"C": 10, "D": 10, "F": 10}
    assert asked.is_answered


def test_quick_rows_of_any_are_sent_in_portions(network):
    for edge in network.edges.values():
        edge.service_s = planner.QUICK_S / 5
    asked = network.stream("A", 20, mode=ANY)

    # Five rows take QUICK_S; the branch of two workers gets two portions.
    portions = [(far, len(list(rows))) for far, rows in itertools.groupby(network.sent_from("A"))]
    assert portions == [("B", 5), ("E", 10), ("B", 5)]
    assert asked.is_answered


def test_streamed_rows_of_any_are_sent_only_against_credit():
    network = MemoryNetwork(SIX, slots=2)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.stream("A", 20, mode=ANY)
    assert Counter(network.sent_from("A")) == {"B": 2, "E": 4}
    assert network.nodes["A"].queue.streamed[1:] == (14, 6)

    network.nodes["D"].executor.finish(1)

    assert len(asked.rows_answered) == 1
    assert network.nodes["A"].queue.streamed[1:] == (13, 6)


def test_an_old_service_time_does_not_send_all_rows_to_one_worker():
    """With it C would get all of them, since D is slow."""
    network = MemoryNetwork(SIX, slots=2)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    network.edges["B", "C"].service_s, network.edges["B", "C"].is_recent = 0.00001, False
    network.edges["B", "D"].state = State.SLOW
    network.stream("B", 20, mode=ANY)

    assert Counter(network.sent_from("B")) == {"C": 2, "D": 2}


def test_streamed_rows_of_all_are_sent_only_against_credit():
    network = MemoryNetwork(SIX, slots=2)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.stream("A", 40)
    assert 2 <= max(Counter(network.sent_from("A")).values()) <= 4

    for worker in "CDF":
        network.nodes[worker].executor.finish(1)
    assert asked.rows_answered == [0]
    assert max(Counter(network.sent_from("A")).values()) <= 6

    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert asked.rows_answered == list(range(40))
    assert network.left_over == {}


def test_no_worker_ever_runs_more_than_its_slots():
    network = MemoryNetwork(SIX, slots=3)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = [network.stream(me, 10, mode=mode) for me in "ABEC" for mode in Mode]
    asked += [network.ask(me, mode=mode) for me in "ABEF" for mode in Mode]

    for _ in range(200):
        for worker in "CDF":
            network.nodes[worker].executor.finish(1)

    assert all(each.is_answered for each in asked)
    assert max(network.nodes[worker].executor.most for worker in "CDF") == 3
    assert network.left_over == {}


def test_in_mode_all_a_dead_worker_is_missing_in_every_row(network):
    network.kill("D")
    asked = network.stream("A", 4)
    for row in range(4):
        assert aggregate.coverage(asked.at(row)) == "2/3; missing=D"


def test_without_reachable_workers_each_row_fails_with_proof_that_nothing_ran(network):
    network.kill("B")
    network.kill("E")
    for mode in Mode:
        asked = network.stream("A", 3, mode=mode)
        for row in range(3):
            error = asked.error_at(row)
            assert (error.code, error.executed) == (Code.UNAVAILABLE, Executed.NO)


def test_only_rows_that_provably_did_not_run_go_to_another_branch():
    network = MemoryNetwork(SIX, slots=2)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    network.edges["A", "B"].service_s = 0.0001  # so that more is sent there than can start
    network.cut("A", "E")
    asked = network.stream("A", 6, mode=ANY)
    started = {request_id for _, request_id in network.executed}
    assert len(started) == 4
    network.heal("A", "E")

    network.drain("B")

    # B refuses what has not started, with proof; that is tried again through E.
    again = {request_id for near, far, request_id in network.sent if (near, far) == ("A", "E")}
    assert not again & started
    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert asked.is_answered
    assert all(asked.error_at(row) is None for row in range(6))
    assert all(sum(network.runs(asked.request_id + row).values()) == 1 for row in range(6))
    assert network.left_over == {}


def test_a_lost_segment_is_never_sent_again(network):
    network.edges["A", "B"].service_s = network.edges["A", "E"].service_s = 0.00001
    network.next("A", "B", ANSWER_LOST)
    network.next("A", "E", REQUEST_LOST)

    asked = network.stream("A", 10, mode=ANY)

    assert Counter(found for near, _, found in network.sent if near == "A") == dict.fromkeys(
        range(asked.request_id, asked.request_id + 10), 1
    )
    lost = [asked.error_at(row) for row in range(10) if asked.error_at(row)]
    assert lost
    assert {error.executed for error in lost} == {Executed.UNKNOWN}


@pytest.mark.parametrize("mode", Mode)
def test_cancelled_inner_rows_are_answered_immediately_and_the_others_go_on(network, mode):
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.stream("A", 6, mode=mode)

    asked.leave(2, 2)

    assert asked.rows_answered == [2, 3]
    assert {asked.error_at(row).code for row in (2, 3)} == {Code.CANCELLED}
    assert {asked.error_at(row).executed for row in (2, 3)} != {Executed.NO}
    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert all(asked.error_at(row) is None for row in (0, 1, 4, 5))
    assert network.left_over == {}


@pytest.mark.parametrize("mode", Mode)
def test_inner_rows_cancelled_while_they_wait_never_run(mode):
    network = MemoryNetwork(SIX, slots=1)
    for worker in "CDF":
        network.nodes[worker].executor.hold()
    asked = network.stream("A", 8, mode=mode)

    asked.leave(4, 2)

    assert asked.rows_answered == [4, 5]
    assert {asked.error_at(row).executed for row in (4, 5)} == {Executed.NO}
    for worker in "CDF":
        network.nodes[worker].executor.finish()
    assert asked.is_answered
    assert not network.runs(asked.request_id + 4)
    assert not network.runs(asked.request_id + 5)
    assert network.left_over == {}


def test_an_expired_segment_is_answered_with_the_parts_that_have_arrived(network):
    network.nodes["F"].executor.hold()
    asked = network.stream("A", 3, deadline_s=5)

    network.advance(5)

    assert [aggregate.coverage(asked.at(row)) for row in range(3)] == ["2/3; missing=F"] * 3
    network.nodes["F"].executor.finish()
    assert asked.is_answered
    assert network.left_over == {}


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_whatever_breaks_each_request_is_answered_once_and_runs_at_most_once(seed):
    chance = random.Random(seed)
    network, asked = _chaos(chance)

    for edge in network.edges:
        network.release(*edge)
        network.release_answers(*edge, chance)
    network.advance(100)
    for node in network.nodes.values():
        node.executor.finish()

    assert network.left_over == {}
    assert all(node.executor.most <= node.executor.slots for node in network.nodes.values())
    for each in asked:
        assert [len(found) for found in each.answers] == [1] * len(each.segment)
        for row in range(len(each.segment)):
            _check_row(network, each, row)


def _check_row(network: MemoryNetwork, asked: Asked, row: int) -> None:
    runs = network.runs(asked.request_id + row)
    error, parts = asked.error_at(row), asked.at(row).parts
    assert max(runs.values(), default=0) <= 1
    assert asked.mode is ALL or len(runs) <= 1
    assert error is None or error.executed is not Executed.NO or not runs
    assert not [p for p in parts if p.executed is Executed.NO and runs[p.process_id]]
    assert all(runs[p.process_id] for p in parts if p.ok)
    payload = asked.segment.payloads.items[row]
    assert all(p.result == p.process_id.encode() + b": " + payload for p in parts if p.ok)


def _chaos(chance: random.Random) -> tuple[MemoryNetwork, list[Asked]]:
    topology = chance.choice([SIX, one_at_a_time(SIX), random_topology(chance.randint(0, 2**32))])
    network = MemoryNetwork(topology, slots=chance.choice([1, 2, 100]))
    edges, asked = list(network.edges), []
    for edge in network.edges.values():
        edge.service_s = chance.choice([0, 0.00002, 0.0001, 0.01])
    acts = ["ask", "ask", "stream", "stream", "stream", "fate", "cut", "heal", "give up", "hold"]
    acts += ["let go", "keep", "answer", "work", "work some", "time", "leave", "drain"]
    for _ in range(40):
        act = chance.choice(acts)
        edge = chance.choice(edges) if edges else None
        if act in ("ask", "stream"):
            me = chance.choice(list(topology.processes))
            how = {"mode": chance.choice([ALL, ANY]), "deadline_s": chance.choice([0.1, 1, 10])}
            rows = chance.randint(1, 9)
            one = act == "ask"
            asked.append(network.ask(me, **how) if one else network.stream(me, rows, **how))
        elif act == "time":
            network.advance(chance.choice([0.05, 0.5, 3]))
        elif act == "work":
            works = chance.choice([node.executor for node in network.nodes.values()])
            chance.choice([works.hold, works.finish])()
        elif act == "work some":
            works = chance.choice([node.executor for node in network.nodes.values()])
            works.hold()
            works.finish(chance.randint(1, 3))
        elif act == "leave" and asked:
            each = chance.choice(asked)
            start = chance.randrange(len(each.segment))
            each.leave(start, chance.randint(0, len(each.segment) - start))
        elif act == "drain" and chance.random() < 0.3:
            network.drain(chance.choice(list(topology.processes)))
        elif act == "fate" and edge:
            network.next(*edge, chance.choice([REFUSED, ANSWER_LOST, REQUEST_LOST]))
        elif act == "cut" and edge:
            network.cut(*edge, just_now=chance.random() < 0.5)
        elif act == "answer" and edge:
            network.release_answers(*edge, chance)
        elif edge:
            others = {"hold": network.hold, "let go": network.release, "keep": network.hold_answers}
            others |= {"heal": network.heal, "give up": network.give_up}
            others.get(act, network.heal)(*edge)
    return network, asked


def test_a_request_that_waits_for_a_link_does_not_hold_up_others(network):
    network.cut("A", "E", just_now=True)
    all_workers = network.ask("A")
    assert not all_workers.is_answered  # E may be back in a moment

    green = network.ask("A", mode=ANY, team="green")

    assert green.is_answered
    assert not all_workers.is_answered
