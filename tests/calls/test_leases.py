"""Leases on their way, and who is lent what: with links and time in the test's hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from overlay.calls.leases import Leases
from overlay.calls.lender import QUIET_S, Lender
from overlay.calls.request_log import RequestLog
from overlay.model import clocks
from overlay.model.errors import NotLent
from overlay.model.leases import LaneOutcome, LaneReport, Lease, LeaseRequest, Lent
from overlay.model.segments import Caller, Code, Executed, Mode, Route
from overlay.queueing.flow import Flow
from overlay.routing.outlier import State
from tests.harness.network import the_six

SIX = the_six()


class Links:
    """The links of A or B. health, service_s: of every neighbour."""

    def __init__(self, *up: str) -> None:
        self.links_up = frozenset(up)
        self.health = State.HEALTHY
        self.service_s = 0.001
        self.lent: list[tuple[str, Lent]] = []
        self.noted: list[tuple[str, str, int, Any]] = []

    def up(self) -> frozenset[str]:
        return self.links_up

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        return 0, self.service_s, self.health, True

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        return 8

    def lend(self, neighbour: str, lent: Lent) -> None:
        self.lent.append((neighbour, lent))

    def note_lane(self, *noted: Any) -> None:
        self.noted.append(noted)


class Looks:
    """In place of the deadline thread: what is due runs when the test says."""

    def __init__(self) -> None:
        self.due: list[Any] = []

    def watch(self, thing: Any, at: float) -> None:
        self.due.append(thing)

    def run(self) -> None:
        due, self.due = self.due, []
        for look in due:
            look()


class Queue:
    def __init__(self) -> None:
        self.waiting: set[Any] = set()  # flows
        self.turns: dict[Caller, int] = {}

    def waits_for(self, route: Route, apart_from: Any = ()) -> bool:
        return bool(self.waiting - set(apart_from))

    def served(self) -> dict[Caller, int]:
        return dict(self.turns)


class Client:
    certificate_name = ""

    def __init__(self, address: str = "10.0.0.1") -> None:
        self.caller = Caller(address)
        self.flow = Flow(self.caller, is_stream=True)
        self.lanes: list[Lease] = []

    def offer(self, lease: Lease) -> None:
        self.lanes.append(lease)


class AtLeader:
    """The lender of A, whose team leaders are B and E."""

    def __init__(self) -> None:
        self.links, self.looks, self.queue = Links("B", "E"), Looks(), Queue()
        self.log = RequestLog("A", False)
        self.leases = Leases(SIX, "A", self.links, self.looks)
        at = self.queue, self.links, self.leases, self.log, self.looks
        self.lender = Lender(SIX, "A", *at)

    def asked(self, client: Client, rows: int = 1, **more: Any) -> list[Lent]:
        before = len(self.links.lent)
        self.lender.ask(client, LeaseRequest("echo", more.pop("team", ""), rows, **more))
        return [lent for _, lent in self.links.lent[before:]]

    def lent(self, client: Client, rows: int = 1) -> list[Lent]:
        """The same, and the workers have accepted."""
        made = self.asked(client, rows)
        for lent in made:
            self.report(LaneReport(lent.id))
        return made

    def report(self, report: LaneReport) -> None:
        neighbour = next(n for n, lent in self.links.lent if lent.id == report.id)
        self.leases.reported(neighbour, report)


@pytest.fixture
def leader() -> AtLeader:
    return AtLeader()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time of the modules under test."""
    at = [1000.0]
    monkeypatch.setattr(clocks, "monotonic", lambda: at[0])
    return at


# Who is lent what


def test_a_client_is_told_of_a_lease_when_its_worker_has_accepted(leader: AtLeader) -> None:
    client = Client()
    (lent,) = leader.asked(client)
    assert client.lanes == []

    leader.report(LaneReport(lent.id))
    (lease,) = client.lanes
    assert (lease.id, lease.worker, lease.rows) == (lent.id, lent.worker, lent.rows)
    assert lease.address == SIX.process(lent.worker).address
    leader.report(LaneReport(lent.id))
    assert len(client.lanes) == 1


def test_workers_that_the_client_cannot_reach_are_left_out(leader: AtLeader) -> None:
    assert [lent.worker for lent in leader.asked(Client(), 10**6, without=("C", "F"))] == ["D"]


@pytest.mark.parametrize(("team", "expected"), [("green", "C"), ("pink", "DF"), ("", "CDF")])
def test_only_workers_in_scope_are_lent(leader: AtLeader, team: str, expected: str) -> None:
    found = leader.asked(Client(), 10**6, team=team)

    assert sorted(lent.worker for lent in found) == list(expected)


def test_who_asks_again_gets_only_what_is_still_missing(leader: AtLeader) -> None:
    client = Client()
    (first,) = leader.lent(client, rows=1)

    assert leader.asked(client, rows=1) == []
    more = leader.asked(client, rows=first.rows + 1)
    assert [lent.worker for lent in more] != [first.worker]
    assert len(more) == 1


def test_two_clients_of_one_worker_share_it(leader: AtLeader) -> None:
    first, second = Client(), Client()
    (alone,) = [lent for lent in leader.lent(first, 10**6) if lent.worker == "C"]
    (shared,) = [lent for lent in leader.lent(second, 10**6) if lent.worker == "C"]

    assert shared.rows == alone.rows // 2


def test_nothing_is_lent_while_requests_of_others_wait(leader: AtLeader) -> None:
    client = Client()
    leader.queue.waiting = {client.flow, Client().flow}
    assert leader.asked(client) == []

    leader.queue.waiting = {client.flow}
    assert leader.asked(client) != []


def test_what_waits_of_a_borrower_does_not_end_its_lease(leader: AtLeader) -> None:
    first, second = Client(), Client()
    for client in (first, second):
        assert leader.lent(client)
    before = len(leader.links.lent)

    leader.queue.waiting = {first.flow, second.flow}
    leader.looks.run()
    assert leader.links.lent[before:] == []
    assert leader.asked(Client()) != [], "it does not keep others from borrowing either"


@pytest.mark.parametrize("service_s", [0.0, 0.5])
def test_unknown_and_long_work_is_not_lent(leader: AtLeader, service_s: float) -> None:
    leader.links.service_s = service_s

    assert leader.asked(Client()) == []


def test_leases_end_when_requests_wait_and_pause_longer_each_time(
    leader: AtLeader, now: list[float]
) -> None:
    pauses = []
    for _ in range(4):
        (lent,) = leader.lent(Client())
        leader.queue.waiting = {Client().flow}
        leader.looks.run()
        assert leader.links.lent[-1][1] == lent._replace(rows=0)
        leader.report(LaneReport(lent.id, is_over=True))
        leader.queue.waiting = set()
        began = now[0]
        while not (made := leader.asked(Client())):
            now[0] += QUIET_S / 4
        pauses.append((now[0] - began) / QUIET_S)
        for one in made:
            leader.report(LaneReport(one.id, is_over=True))

    assert pauses == [1, 2, 4, 8]


def test_a_lease_is_renewed_while_it_is_used_and_no_longer(
    leader: AtLeader, now: list[float]
) -> None:
    (lent,) = leader.lent(Client())
    for _ in range(20):  # two seconds
        now[0] += 0.1
        leader.report(LaneReport(lent.id, False, 0, (LaneOutcome(1),)))
        leader.looks.run()
    used = len(leader.links.lent)
    assert 5 <= used <= 8
    for _ in range(40):
        now[0] += 0.1
        leader.looks.run()

    assert len(leader.links.lent) - used <= 4
    assert leader.looks.due == [], "and forgotten, although its worker said nothing"
    assert not leader.lender._leases
    books = leader.lender._lent, leader.lender._times, leader.lender._borrowers
    assert not any(books)


def test_another_caller_without_a_lease_counts_as_one_that_shares(
    leader: AtLeader, now: list[float]
) -> None:
    client, other = Client(), Caller("10.0.0.9")
    (lent,) = leader.lent(client)
    for turn in range(4):
        now[0] += 0.1
        leader.queue.turns = {other: turn, client.caller: turn}
        leader.report(LaneReport(lent.id, False, 1))
        leader.looks.run()

    assert leader.links.lent[-1][1].rows == lent.rows // 2


def test_what_is_reported_counts_at_the_leader(leader: AtLeader) -> None:
    (lent,) = leader.lent(Client())
    late = LaneOutcome(2, Code.DEADLINE_EXCEEDED, "late", Executed.NO)
    failed = LaneOutcome(3, Code.INTERNAL, "bad", Executed.YES, 0.0, 0.5, 7)
    leader.report(LaneReport(lent.id, False, 4, (LaneOutcome(10, worked_s=0.001), late, failed)))

    counts = leader.log.meter.counts()
    assert (counts.received, counts.completed, counts.failed, counts.refused) == (15, 10, 3, 2)
    assert leader.log.summaries.last(10)[-1].code is Code.INTERNAL
    assert leader.links.noted[-1][2] == 4


def test_the_books_do_not_grow_beyond_their_bound(leader: AtLeader) -> None:
    leader.lender._limits = replace(SIX.limits, leases=5)
    for n in range(20):
        leader.lent(Client(f"10.0.0.{n}"))

    assert len(leader.lender._leases) == 5


# Passing on, at B


def lease(worker: str = "C", rows: int = 5, **more: Any) -> Lent:
    return Lent(7, worker, "echo", rows, more.pop("for_s", 1.0), **more)


class AtTeamLeader:
    def __init__(self, me: str = "B", *up: str) -> None:
        self.links, self.looks = Links(*(up or "CD")), Looks()
        self.leases = Leases(SIX, me, self.links, self.looks)
        self.reports: list[LaneReport] = []

    def take(self, lent: Lent) -> None:
        self.leases.take(lent, self.reports.append)


def test_a_lease_is_passed_to_the_neighbour_that_leads_to_its_worker() -> None:
    team_leader = AtTeamLeader()
    team_leader.take(lease("D"))
    team_leader.leases.reported("D", LaneReport(7))

    assert team_leader.links.lent == [("D", lease("D"))]
    assert team_leader.reports == [LaneReport(7)]


@pytest.mark.parametrize("worker", ["F", "nobody", "A", ""])
def test_a_worker_that_is_not_below_ends_the_lease(worker: str) -> None:
    team_leader = AtTeamLeader()
    team_leader.take(lease(worker))

    assert team_leader.links.lent == []
    assert team_leader.reports == [LaneReport(7, is_over=True)]


def test_a_link_that_is_down_ends_the_lease() -> None:
    team_leader = AtTeamLeader("B", "D")
    team_leader.take(lease("C"))

    assert team_leader.reports == [LaneReport(7, is_over=True)]


def test_an_unhealthy_worker_is_not_lent_nor_any_longer() -> None:
    team_leader = AtTeamLeader()
    team_leader.take(lease())
    team_leader.links.health = State.SLOW
    team_leader.take(lease())
    assert team_leader.links.lent[-1] == ("C", lease(rows=0))

    other = AtTeamLeader()
    other.links.health = State.EJECTED
    other.take(lease())
    assert other.reports == [LaneReport(7, is_over=True)]


def test_only_the_neighbour_of_a_lease_reports_about_it() -> None:
    team_leader = AtTeamLeader()
    team_leader.take(lease("C"))
    team_leader.leases.reported("D", LaneReport(7, False, 3))
    team_leader.leases.reported("C", LaneReport(8, False, 3))

    assert team_leader.reports == []
    assert team_leader.links.noted == []


def test_what_is_unanswered_counts_at_its_link_until_the_lease_is_lost(now: list[float]) -> None:
    team_leader = AtTeamLeader()
    team_leader.take(lease())
    for unanswered in (3, 5, 2):
        team_leader.leases.reported("C", LaneReport(7, False, unanswered))
    assert [change for _, _, change, _ in team_leader.links.noted] == [3, 2, -3]
    now[0] += 10
    team_leader.looks.run()

    assert team_leader.links.noted[-1][2] == -2
    assert team_leader.reports[-1] == LaneReport(7, is_over=True)
    assert team_leader.looks.due == []


# Holding, at C


class Lane:
    caller = Caller("10.0.0.1", "anna")

    def __init__(self) -> None:
        self.unanswered = 0
        self.told: list[Lease] = []

    def tell(self, lease: Lease) -> None:
        self.told.append(lease)


def held(**more: Any) -> tuple[AtTeamLeader, Lane, Any]:
    worker, lane = AtTeamLeader("C"), Lane()
    worker.take(lease(**more))
    return worker, lane, worker.leases.open(7, more.get("caller", ""), lane)


def test_a_worker_accepts_a_lease_at_once() -> None:
    worker, _, _ = held()

    assert worker.reports == [LaneReport(7)]


@pytest.mark.parametrize(("id_", "caller"), [(8, "anna"), (7, "ben"), (7, "")])
def test_a_lease_opens_once_for_its_caller(id_: int, caller: str) -> None:
    worker = AtTeamLeader("C")
    worker.take(lease(caller="anna"))
    with pytest.raises(NotLent, match="no such lease"):
        worker.leases.open(id_, caller, Lane())
    worker.leases.open(7, "anna", Lane())
    with pytest.raises(NotLent, match="another stream"):
        worker.leases.open(7, "anna", Lane())


ANY = Route(Mode.ANY, "", "echo")


@pytest.mark.parametrize(
    ("route", "unanswered", "rows", "fits"),
    [
        (ANY, 0, 5, True),
        (ANY, 4, 1, True),
        (ANY, 0, 6, False),
        (ANY, 5, 1, False),
        (ANY._replace(mode=Mode.ALL), 0, 1, False),
        (ANY._replace(handler="other"), 0, 1, False),
        (ANY._replace(hops=("A",)), 0, 1, False),
        (ANY._replace(team="green"), 0, 1, True),
    ],
)
def test_a_lane_is_for_what_was_lent(route: Route, unanswered: int, rows: int, fits: bool) -> None:
    _, lane, found = held()
    lane.unanswered = unanswered
    if fits:
        found.check(route, rows)
    else:
        with pytest.raises(NotLent):
            found.check(route, rows)


def test_the_lane_is_told_when_its_lease_changes_or_ends(now: list[float]) -> None:
    worker, lane, _ = held()
    worker.take(lease(rows=9))
    worker.take(lease(rows=9))
    assert lane.told == [Lease(7, rows=9)]
    now[0] += 1.5
    lane.unanswered = 1
    worker.looks.run()
    assert lane.told[-1] == Lease(7)
    assert not worker.reports[-1].is_over, "a request is unanswered"
    lane.unanswered = 0
    worker.looks.run()

    assert worker.reports[-1].is_over
    assert worker.looks.due == []
    with pytest.raises(NotLent):
        worker.leases.open(7, "", Lane())


def test_requests_that_outlast_their_lease_count_when_they_end(
    leader: AtLeader, now: list[float]
) -> None:
    """At every process on their way, whose leases are renewed no more."""
    client = Client()
    (lent,) = [one for one in leader.asked(client, 10**6) if one.worker == "C"]
    worker, lane, team_leader = AtTeamLeader("C"), Lane(), AtTeamLeader("B")
    to_leader = partial(leader.leases.reported, "B")
    team_leader.leases.take(lent, to_leader)
    worker.leases.take(lent, partial(team_leader.leases.reported, "C"))
    worker.leases.open(lent.id, "", lane)
    lane.unanswered = 1
    for _ in range(100):
        now[0] += 0.1
        for each in (worker, team_leader, leader):
            each.looks.run()
    assert not lane.told[-1].rows
    assert list(leader.lender._leases) == [lent.id]

    lane.unanswered = 0
    for _ in range(10):
        now[0] += 0.1
        for each in (worker, team_leader, leader):
            each.looks.run()

    assert [change for *_, change, _ in team_leader.links.noted if change] == [1, -1]
    assert not leader.lender._leases
    assert leader.looks.due == team_leader.looks.due == worker.looks.due == []
