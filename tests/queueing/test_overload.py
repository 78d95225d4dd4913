"""Overload costs only the excess: the real queue on a simulated clock, at load 0.5 to 10.

With single calls and with rows of a stream, here one segment per call.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from overlay.model.errors import NoTimeLeft, OverlayError
from overlay.model.segments import (
    Caller,
    Code,
    Column,
    Detail,
    OnResult,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from tests.harness.network import Clock

PLACES = 10
SERVICE_S = 0.1
CAPACITY = PLACES / SERVICE_S  # answers a second


@dataclass(frozen=True)
class Place:
    count: int


@dataclass
class Simulated:
    """Workers with PLACES places behind a queue; requests with a deadline arrive at random."""

    load: float
    deadline_s: float = 1.0
    service_s: float = SERVICE_S
    service: Callable[[random.Random, bytes], float] | None = None  # service time of a payload
    stuck_team: str = ""  # its requests are never answered
    way: str = "unary"
    clock: Clock = field(default_factory=Clock)
    busy: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    worked_too_late: int = 0
    refused_while_free: int = 0
    most_waiting: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.chance = random.Random(7)
        self.flows: dict[str, Flow] = {}
        self.took: list[float] = []  # of answers in time
        self.asked = 0
        self.queue = RequestQueue(
            "A",
            slots=200,
            in_service=100,
            team_limit=50,
            max_bytes=10**9,
            claim=self._claim,
            start=self._start,
            clock=self.clock,
        )

    def run(
        self,
        seconds: float,
        caller: str = "",
        load: float | None = None,
        team: str = "",
        payload: bytes = b"",
        mean_s: float = SERVICE_S,
    ):
        """Requests of one caller for this long; the load is that of requests that take `mean_s`."""
        self.seconds = max(self.seconds, seconds)
        at, end = self.clock.now, self.clock.now + seconds
        while at < end:
            at += self.chance.expovariate((load or self.load) * PLACES / mean_s)
            self.clock.at(at, lambda: self.ask(caller, team, payload))
        return self

    def until_the_end(self) -> Simulated:
        self.clock.advance(self.seconds + 60)
        assert (self.queue.waiting, self.busy) == (0, 0)
        assert self.refused_while_free == 0
        return self

    def ask(
        self, caller: str = "", team: str = "", payload: bytes = b"", left_s: float | None = None
    ) -> OverlayError | None:
        return self.ask_rows(1, caller, team, payload, left_s)

    def ask_rows(
        self,
        rows: int,
        caller: str = "",
        team: str = "",
        payload: bytes = b"",
        left_s: float | None = None,
    ) -> OverlayError | None:
        """Sends rows at once, with one deadline; returns the error if the first was refused."""
        sent, deadline = self.clock.now, self.clock.now + (left_s or self.deadline_s)
        segment = Segment(Route(team=team), Column((payload,) * rows), deadline, 1)
        self.asked += rows

        refusals: list[OverlayError] = []

        def sink(start: int, answers: Slice) -> None:
            in_time, refused = self.clock.now <= deadline, answers.refused
            if refused is not None:
                refusals.append(NoTimeLeft(refused.reason, retry_after_s=refused.retry_after_s))
                early = deadline - self.clock.now > 1e-6
                end = "refused" if early else "late"
                if early:  # checked once everything of this instant has started
                    self.clock.at(self.clock.now, self._check_taken)
            else:
                end = "ok" if in_time and answers.parts[0].failed is None else "late"
                if end == "ok":
                    self.took.append(self.clock.now - sent)
            self.ends[f"{caller} {end}"] += answers.count

        try:
            queued = self._admit(segment, sink, caller)
        except OverlayError as refusal:
            self.ends[f"{caller} refused"] += rows
            self._check_taken()
            return refusal
        if queued.is_open:
            self.clock.at(deadline, lambda: queued.end(Code.DEADLINE_EXCEEDED))
        self.most_waiting = max(self.most_waiting, self.queue.waiting)
        return refusals[0] if refusals else None

    def _admit(self, segment: Segment, sink: OnResult, caller: str) -> QueuedSegment:
        if self.way == "unary":
            return self.queue.admit(segment, sink, Caller(caller))
        if caller not in self.flows:
            self.flows[caller] = self.queue.open_flow(Caller(caller))
        queued = self.queue.admit_to(self.flows[caller], segment, sink)
        self.queue.kick()
        return queued

    @property
    def goodput(self) -> float:
        """Answers in time, as a share of the capacity."""
        answered = sum(count for end, count in self.ends.items() if end.endswith(" ok"))
        return answered / (CAPACITY * self.seconds)

    def _check_taken(self) -> None:
        self.refused_while_free += self.busy < PLACES

    def _claim(self, route, count, patient_until, streamed):
        if route.team != self.stuck_team or not self.stuck_team:
            count = min(count, PLACES - self.busy)
            if not count:
                return None
            self.busy += count
        return Place(count)

    def _start(self, segment, place, waited_s, sink):
        answered = [False] * place.count

        def answer(row: int, column: PartSlice) -> None:
            if not answered[row]:
                answered[row] = True
                sink(row, Slice(1, (column,)))

        def finish(row: int) -> None:
            self.busy -= 1  # only now: work continues after its deadline
            self.worked_too_late += self.clock.now > segment.deadline
            answer(row, PartSlice("W", Column((b"",))))
            self.queue.kick()

        if segment.route.team != self.stuck_team or not self.stuck_team:
            for row in range(place.count):
                takes_s = self.service_s * self.chance.uniform(0.9, 1.1)
                if self.service is not None:
                    takes_s = self.service(self.chance, segment.payloads.items[row])
                self.clock.at(self.clock.now + takes_s, lambda row=row: finish(row))

        def end(code: Code, start: int, count: int) -> None:
            for row in range(start, start + count):
                answer(row, PartSlice.missing("W", 1, Detail(code, "ended")))

        return end


ways = pytest.mark.parametrize("way", ["unary", "stream"])


@ways
@pytest.mark.parametrize("load", [1.5, 6])
def test_under_overload_nearly_all_capacity_serves_requests_in_time(load, way):
    simulated = Simulated(load, way=way).run(10).until_the_end()

    assert simulated.goodput > 0.95
    assert simulated.worked_too_late <= 0.01 * CAPACITY * 10


@ways
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_below_capacity_no_request_is_refused(load, way):
    simulated = Simulated(load, way=way).run(10).until_the_end()

    assert set(simulated.ends) == {" ok"}


@ways
def test_without_admission_by_time_most_work_is_too_late(monkeypatch, way):
    """Shows that the tests above depend on it."""
    monkeypatch.setattr("overlay.queueing.admission.answer_s", lambda *what: 0.0)
    monkeypatch.setattr(
        "overlay.queueing.service_time.ServiceTimeEstimator.least_s", lambda self, now: 0.0
    )

    simulated = Simulated(2, way=way).run(10).until_the_end()

    assert simulated.goodput < 0.5


@ways
def test_a_retry_after_the_suggested_time_is_admitted(way):
    simulated = Simulated(2, way=way)
    simulated.run(5)
    simulated.clock.advance(5)
    errors = [simulated.ask("late") for _ in range(300)]
    refusals = [error for error in errors if isinstance(error, NoTimeLeft)]
    assert refusals
    retries: list[OverlayError | None] = []
    retry_at = simulated.clock.now + refusals[0].retry_after_s
    simulated.clock.at(retry_at, lambda: retries.append(simulated.ask("late")))
    simulated.until_the_end()
    assert retries == [None]


@ways
def test_a_greedy_caller_does_not_lock_out_others(way):
    simulated = Simulated(1, deadline_s=5, way=way)
    simulated.run(12, "greedy", load=4)
    simulated.run(12, "modest", load=0.3)
    simulated.until_the_end()

    modest = {end: n for end, n in simulated.ends.items() if end.startswith("modest")}
    assert modest["modest ok"] >= 0.95 * sum(modest.values()), simulated.ends
    assert simulated.goodput > 0.95


def test_a_stuck_team_leaves_places_for_the_others():
    simulated = Simulated(1, deadline_s=20, stuck_team="pink")
    simulated.run(10, "pink", load=5, team="pink")
    simulated.run(10, "green", load=0.5, team="green")
    simulated.clock.advance(9)

    assert simulated.queue._place_shares._teams["pink"] <= simulated.queue.in_service // 2
    assert simulated.ends["green ok"] > 0.9 * 0.5 * CAPACITY * 8, simulated.ends


@ways
def test_service_times_of_long_ago_refuse_no_request(way):
    simulated = Simulated(2, service_s=0.9, way=way)
    simulated.run(5)
    simulated.clock.advance(40)
    simulated.service_s = 0.01

    assert simulated.ask("new") is None


def short_and_long(chance: random.Random, payload: bytes) -> float:
    return 0.05 if payload == b"short" else float(payload)


@ways
def test_a_request_that_finds_a_place_is_never_refused_for_earlier_long_work(way):
    simulated = Simulated(1, deadline_s=2, service=short_and_long, way=way)
    for _ in range(PLACES - 1):
        simulated.ask("long", payload=b"3", left_s=60)
    simulated.clock.advance(3)
    for n in range(100):
        simulated.clock.at(simulated.clock.now + n * 0.06, lambda: simulated.ask("", "", b"short"))
    simulated.until_the_end()

    assert dict(simulated.ends) == {"long ok": PLACES - 1, " ok": 100}


@ways
@pytest.mark.parametrize("later_s", [0.001, 0.5, 2.0])
def test_a_burst_is_not_judged_by_the_work_before_it(later_s, way):
    """Part of it finds no place, but what holds the places now is not what held them before."""
    simulated = Simulated(1, deadline_s=2, service=short_and_long, way=way)
    for _ in range(4 * PLACES):
        simulated.ask("long", payload=b"600", left_s=3600)
    simulated.clock.advance(2400 + later_s)
    for _ in range(3 * PLACES):
        simulated.ask("", "", b"short")
    simulated.until_the_end()

    assert simulated.ends[" ok"] == 3 * PLACES


@ways
def test_short_work_is_served_beside_long_work_of_the_same_class(way):
    """Long work holds eight of the places, for 20 s each; all payloads have the same size."""
    simulated = Simulated(
        1, deadline_s=2, service=lambda chance, p: 20 if p == b"L" else 0.05, way=way
    )
    for n in range(40):
        simulated.clock.at(
            simulated.clock.now + n * 2.5, lambda: simulated.ask("long", payload=b"L", left_s=3600)
        )
    simulated.run(100, "short", load=0.12, payload=b"S", mean_s=0.05)
    simulated.until_the_end()

    assert simulated.ends["long ok"] == 40
    assert simulated.ends["short ok"] >= 0.999 * sum(
        n for end, n in simulated.ends.items() if end.startswith("short")
    )


@ways
def test_small_payloads_are_not_judged_by_large_ones(way):
    """Large ones take a thousand times as long, and hold half of the places."""
    simulated = Simulated(1, deadline_s=1, service=lambda chance, p: len(p) / 1e4, way=way)
    for n in range(50):
        at = simulated.clock.now + 2 * n
        simulated.clock.at(at, lambda: simulated.ask("", "", b"x" * 100_000, left_s=60))
    simulated.run(100, "small", load=0.02, payload=b"x" * 100, mean_s=0.01)
    simulated.until_the_end()

    assert set(simulated.ends) == {" ok", "small ok"}


@ways
@pytest.mark.parametrize(("load", "seconds"), [(2, 8), (10, 4)])
@pytest.mark.parametrize(
    "service",
    [
        lambda chance, payload: chance.expovariate(1 / SERVICE_S),
        lambda chance, payload: SERVICE_S / 2 * chance.paretovariate(2),
    ],
    ids=["exponential", "heavy tails"],
)
def test_uneven_work_keeps_its_goodput_under_overload(load, seconds, service, way):
    simulated = Simulated(load, service=service, way=way).run(seconds).until_the_end()

    assert simulated.goodput > 0.95


@ways
@pytest.mark.parametrize(("load", "seconds"), [(2, 8), (10, 4)])
@pytest.mark.parametrize(("deadline_s", "goodput"), [(0.15, 0.95), (0.12, 0.85)])
def test_a_deadline_barely_above_the_service_time_is_enough(
    load, seconds, deadline_s, goodput, way
):
    simulated = Simulated(load, deadline_s=deadline_s, way=way).run(seconds).until_the_end()

    assert simulated.goodput > goodput


@ways
@pytest.mark.parametrize("load", [2, 5])
def test_it_recovers_after_a_period_in_which_everything_was_too_late(load, way):
    """No current service time is known, and the requests at the head have too little time left."""
    simulated = Simulated(load, way=way)
    slow_from, slow_to = simulated.clock.now + 3, simulated.clock.now + 9
    simulated.service = lambda chance, payload: (
        3.0 if slow_from < simulated.clock.now < slow_to else SERVICE_S
    )
    simulated.run(19)
    simulated.clock.advance(14)
    served = simulated.ends[" ok"]
    simulated.until_the_end()

    assert simulated.ends[" ok"] - served > 0.9 * CAPACITY * 5


@ways
def test_requests_admitted_under_overload_are_answered_well_before_their_deadline(way):
    simulated = Simulated(10, way=way).run(1)
    simulated.clock.advance(1)
    simulated.run(9)
    simulated.took.clear()
    simulated.until_the_end()

    assert sorted(simulated.took)[int(0.99 * len(simulated.took))] <= 0.75


def test_a_bulk_stream_and_single_calls_share_the_places():
    bulk = Simulated(1, deadline_s=60)
    bulk.way = "stream"
    bulk.ask_rows(4000, "bulk")
    bulk.queue.kick()
    bulk.way = "unary"
    bulk.run(30, "single", load=0.4)
    bulk.until_the_end()

    assert bulk.ends["bulk ok"] == 4000
    assert set(bulk.ends) == {"bulk ok", "single ok"}
    assert max(bulk.took) < 60
