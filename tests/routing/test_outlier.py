"""Which neighbours are healthy, slow or ejected: tables of outcomes, and invariants."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.model.segments import Code, Column, Detail, Executed, Part, PartSlice, Slice
from overlay.routing.outlier import (
    COMPARE_S,
    FAILURES,
    PAUSES,
    Outcome,
    OutlierDetector,
    State,
    Verdict,
    classify,
)

HEALTHY, SLOW, EJECTED, HALF_OPEN = State.HEALTHY, State.SLOW, State.EJECTED, State.HALF_OPEN
NO, YES, UNKNOWN = Executed.NO, Executed.YES, Executed.UNKNOWN

VERDICTS = [
    (Code.UNAVAILABLE, UNKNOWN, Verdict.BAD),  # the connection was lost
    (Code.DEADLINE_EXCEEDED, UNKNOWN, Verdict.BAD),  # no answer at all
    (Code.DEADLINE_EXCEEDED, YES, Verdict.LATE),
    (Code.DEADLINE_EXCEEDED, NO, Verdict.NEITHER),  # never sent
    (Code.INTERNAL, YES, Verdict.GOOD),  # the handler raised
    (Code.INVALID_ARGUMENT, YES, Verdict.GOOD),
    (Code.ALREADY_EXISTS, YES, Verdict.GOOD),
    (Code.INTERNAL, UNKNOWN, Verdict.NEITHER),
    (Code.RESOURCE_EXHAUSTED, NO, Verdict.NEITHER),
    (Code.CANCELLED, YES, Verdict.NEITHER),
    (Code.CANCELLED, UNKNOWN, Verdict.NEITHER),
]


@pytest.mark.parametrize(("code", "executed", "verdict"), VERDICTS)
def test_a_refusal_and_a_failed_part_get_the_same_verdict(code, executed, verdict):
    refused = Slice(2, (), refused=Part("C", code, "why", executed=executed))
    failure = Detail(code, "why", executed)
    all_rows = Slice(2, (PartSlice.missing("C", 2, failure),))
    by_row = Slice(2, (PartSlice("C", Column([b"", b""]), failures={0: failure, 1: failure}),))

    for answers in (refused, all_rows, by_row):
        found = classify(answers, 0.0)
        assert (found.verdict, found.rows) == (verdict, 2)
        assert verdict is not Verdict.BAD or found.reason == "why"


def test_a_team_leader_that_reaches_no_worker_is_bad_and_one_that_stops_is_not():
    stops = Part("E", Code.UNAVAILABLE, "E is stopping", executed=NO)
    assert classify(Slice(1, (), refused=stops), 0.0).verdict is Verdict.NEITHER

    missing = PartSlice.missing("F", 1, Detail(Code.UNAVAILABLE, "F cannot be reached", NO))
    assert classify(Slice(1, (missing,)), 0.0).verdict is Verdict.BAD


def test_in_mode_all_an_unreachable_worker_says_nothing_about_its_team_leader():
    missing = PartSlice.missing("C", 1, Detail(Code.UNAVAILABLE, "C cannot be reached", NO))
    assert classify(Slice(1, (missing,)), 0.0, to_all=True).verdict is Verdict.NEITHER

    lost = PartSlice.missing("C", 1, Detail(Code.UNAVAILABLE, "no answer from B"))
    assert classify(Slice(1, (lost,)), 0.0, to_all=True).verdict is Verdict.BAD


GONE = Detail(Code.UNAVAILABLE, "gone")


def test_one_result_among_failures_is_an_answer():
    some = PartSlice("C", Column([b"", b"x"]), failures={0: GONE}, worked_us=5000)
    assert classify(Slice(2, (some,)), 0.004) == Outcome(Verdict.GOOD, 2, "", 0.005, 0.004)

    other = PartSlice.missing("F", 2, GONE)
    assert classify(Slice(2, (other, some)), 0.004).verdict is Verdict.GOOD


def test_the_worst_of_several_failures_counts():
    late = Detail(Code.DEADLINE_EXCEEDED, "late", YES)
    columns = PartSlice.missing("D", 1, late), PartSlice.missing("F", 1, GONE)
    assert classify(Slice(1, columns), 0.0)[:3] == (Verdict.BAD, 1, "gone")


def test_an_answer_without_parts_says_nothing():
    assert classify(Slice(3, ()), 0.0).verdict is Verdict.NEITHER


class Peers:
    """A detector on a clock of the test's; every neighbour but T leads to one worker."""

    def __init__(self, neighbours: str) -> None:
        self.detector = OutlierDetector(neighbours, set(neighbours) - {"T"})
        self.up = neighbours
        self.now = 100.0
        self.changes: list[str] = []

    def record(self, neighbour: str, verdict: Verdict, rows: int = 1, **times: float) -> None:
        outcome = Outcome(verdict, rows, "why", **times)
        change = self.detector.record(neighbour, "h", outcome, self.up, self.now)
        if change:
            self.changes.append(f"{change.neighbour} {change.reason}")

    def fail(self, neighbour: str, rows: int = FAILURES) -> None:
        self.record(neighbour, Verdict.BAD, rows)

    def good(self, neighbour: str, took_s: float = 0.0, service_s: float = 0.0) -> None:
        self.record(neighbour, Verdict.GOOD, took_s=took_s, service_s=service_s)

    def look(self, **times: float) -> None:
        known = {n: {"h": times[n]} if n in times else {} for n in self.up}
        for change in self.detector.look(known, self.now):
            self.changes.append(f"{change.neighbour} {change.reason}")
        self.now += COMPARE_S

    def begin(self, neighbour: str) -> None:
        self.detector.begin(neighbour, "h", self.now)

    def state(self, neighbour: str) -> State:
        health = self.detector.unhealthy[neighbour].get("h")
        return health.state_at(self.now) if health else HEALTHY

    def describe(self, neighbour: str) -> tuple[str, str]:
        return self.detector.describe(neighbour, self.now)

    @property
    def ejected(self) -> list[str]:
        found = {n: self.detector.unhealthy[n].get("h") for n in self.detector.unhealthy}
        return [n for n, health in found.items() if health and health.state is EJECTED]

    def make_slow(self, neighbour: str, service_s: float = 0.05) -> None:
        others = {n: 0.005 for n in self.up if n != neighbour}
        self.look(**others, **{neighbour: service_s})
        self.look(**others, **{neighbour: service_s + 0.001})


# Ejected.


def test_five_failures_in_a_row_eject_and_four_do_not():
    peers = Peers("CD")
    peers.fail("C", FAILURES - 1)
    assert peers.state("C") is HEALTHY

    peers.fail("C", 1)

    assert peers.state("C") is EJECTED
    assert peers.describe("C") == (
        "ejected",
        "handler h: ejected for 1 s: 5 requests in a row without an answer; the last: why",
    )
    assert peers.detector.ejections == {"C": 1, "D": 0}


def test_an_answer_between_failures_restarts_the_count():
    peers = Peers("CD")
    for _ in range(5):
        peers.fail("C", FAILURES - 1)
        peers.good("C")
    assert peers.state("C") is HEALTHY
    assert not peers.detector.unhealthy["C"], "nothing is kept about a healthy neighbour"


def test_an_outcome_that_says_nothing_neither_counts_nor_restarts_the_count():
    peers = Peers("CD")
    peers.fail("C", FAILURES - 1)
    peers.record("C", Verdict.NEITHER, 100)
    assert peers.state("C") is HEALTHY

    peers.fail("C", 1)
    assert peers.state("C") is EJECTED


@pytest.mark.parametrize(("neighbour", "state"), [("C", EJECTED), ("T", HEALTHY)])
def test_a_late_worker_is_ejected_and_a_team_leader_of_late_workers_is_not(neighbour, state):
    peers = Peers("CDT")
    peers.record(neighbour, Verdict.LATE, FAILURES)
    assert peers.state(neighbour) is state


def test_a_team_leader_that_does_not_answer_is_ejected():
    peers = Peers("CT")
    peers.fail("T")
    assert peers.state("T") is EJECTED


def test_after_the_pause_one_trial_request_is_sent_and_its_answer_ends_the_ejection():
    peers = Peers("CD")
    peers.fail("C")
    peers.now += 0.99
    assert peers.state("C") is EJECTED
    peers.now += 0.02
    assert (peers.state("C"), peers.describe("C")[0]) == (HALF_OPEN, "half-open")

    peers.begin("C")
    assert (peers.state("C"), peers.describe("C")[0]) == (EJECTED, "half-open")

    peers.good("C")
    assert peers.state("C") is HEALTHY
    assert peers.changes[-1] == "C answers again"
    assert peers.describe("C") == ("healthy", "")


def test_each_failed_trial_doubles_the_pause_up_to_30_s():
    peers, pauses = Peers("CD"), []
    peers.fail("C")
    for _ in range(8):
        began = peers.now
        while peers.state("C") is EJECTED:
            peers.now += 0.125
        pauses.append(peers.now - began)
        peers.begin("C")
        peers.fail("C", 1)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert peers.detector.ejections["C"] == 9
    assert peers.changes[1].startswith("C is ejected for 2 s: 6 requests in a row")


def test_a_trial_that_says_nothing_is_repeated_after_the_same_pause():
    peers = Peers("CD")
    peers.fail("C")
    for _ in range(3):
        peers.now += 1.0
        peers.begin("C")
        peers.record("C", Verdict.NEITHER)
        assert peers.state("C") is EJECTED
    peers.now += 1.0
    assert peers.state("C") is HALF_OPEN


def test_failures_of_requests_sent_before_an_ejection_do_not_prolong_it():
    peers = Peers("CD")
    peers.fail("C")
    peers.now += 0.9
    peers.fail("C", 50)
    peers.now += 0.2
    assert peers.state("C") is HALF_OPEN


def test_an_answer_to_a_request_sent_before_an_ejection_ends_it():
    peers = Peers("CD")
    peers.fail("C")
    peers.good("C")
    assert peers.state("C") is HEALTHY


def test_new_workers_make_a_trial_due():
    peers = Peers("CT")
    peers.fail("T")
    peers.detector.capacity_added("T", peers.now)
    assert peers.state("T") is HALF_OPEN


def test_a_link_that_changes_makes_its_neighbour_healthy():
    peers = Peers("CD")
    peers.fail("C")
    peers.detector.forget("C")
    assert peers.state("C") is HEALTHY


# up, failing one after the other -> ejected
BOUNDS = [
    ("C", "C", ""),  # no other is left
    ("CD", "CD", "C"),
    ("CDF", "CDF", "C"),
    ("CDFG", "CDFG", "CD"),
    ("CDFGH", "CDFGH", "CD"),
    ("DF", "C", ""),  # its link is down
]


@pytest.mark.parametrize(("up", "failing", "ejected"), BOUNDS)
def test_at_most_half_of_those_that_are_up_are_ejected(up, failing, ejected):
    peers = Peers("CDFGH")
    peers.up = up
    for neighbour in failing:
        peers.fail(neighbour)
    assert "".join(peers.ejected) == ejected


def test_no_neighbour_is_ejected_while_no_other_answers():
    peers = Peers("CDF")
    for neighbour in "CDFCDF":
        peers.fail(neighbour, FAILURES - 1)
    assert peers.ejected == []

    peers.good("D")
    peers.fail("C", 1)
    assert peers.ejected == ["C"]


def test_ejected_neighbours_are_reinstated_when_too_few_others_are_left():
    peers = Peers("CDFG")
    peers.fail("C")
    peers.now += 0.5
    peers.fail("D")
    peers.up = "CDF"

    peers.look()

    assert peers.ejected == ["D"]
    assert peers.changes[-1] == "C is asked again: too few others are left"


def test_a_failing_handler_does_not_affect_the_others():
    peers = Peers("CD")
    peers.fail("C")
    assert peers.detector.unhealthy["C"].keys() == {"h"}


# Slow.

# service times of C, D, F in ms -> which are slow
TIMES = [
    ((5, 5, 5), ""),
    ((5, 5, 14), ""),
    ((5, 5, 16), "F"),
    ((5, 5, 50), "F"),
    ((5, 50, 50), "DF"),
    ((50, 50, 50), ""),
    ((0.01, 0.01, 0.9), ""),  # ninety times, but too small a difference to matter
    ((0.01, 0.01, 1.2), "F"),
]


@pytest.mark.parametrize(("times_ms", "slow"), TIMES)
def test_a_neighbour_that_takes_much_longer_than_its_peers_is_slow(times_ms, slow):
    peers = Peers("CDF")
    for look in range(2):
        peers.look(
            **{n: ms / 1e3 * (1 + look / 100) for n, ms in zip("CDF", times_ms, strict=True)}
        )
    found = [n for n in "CDF" if peers.describe(n)[0] == "slow"]
    assert "".join(found) == slow


def test_the_reason_has_both_service_times():
    peers = Peers("CD")
    peers.make_slow("C", 0.049)
    assert peers.describe("C") == ("slow", "handler h: slow: 50 ms where its peers take 5 ms")
    assert peers.changes == ["C is slow: 50 ms where its peers take 5 ms"]


def test_neither_one_comparison_nor_several_of_the_same_service_time_are_enough():
    peers = Peers("CD")
    for _ in range(5):
        peers.look(C=0.05, D=0.005)
    assert peers.state("C") is HEALTHY

    peers.look(C=0.005, D=0.005)
    peers.look(C=0.051, D=0.005)
    assert peers.state("C") is HEALTHY


def test_a_team_leader_with_several_workers_is_never_slow():
    peers = Peers("CDT")
    peers.make_slow("T")
    assert peers.describe("T") == ("healthy", "")


def test_a_neighbour_without_peers_to_compare_with_is_not_slow():
    peers = Peers("CD")
    peers.look(C=0.05)
    peers.look(C=0.06)
    assert peers.state("C") is HEALTHY


def test_ejected_peers_are_not_compared_with():
    peers = Peers("CD")
    peers.fail("D")
    peers.make_slow("C")
    assert peers.state("C") is HEALTHY


def test_a_slow_neighbour_is_tried_less_and_less_often():
    peers, pauses = Peers("CD"), []
    peers.make_slow("C")
    peers.good("C", took_s=0.05, service_s=0.05)
    for _ in range(6):
        began = peers.now
        while peers.state("C") is SLOW:
            peers.now += 0.125
        pauses.append(peers.now - began)
        peers.begin("C")
        assert peers.state("C") is SLOW, "one at a time"
        peers.good("C", took_s=0.05, service_s=0.05)
    assert pauses == [1, 2, 4, 5, 5, 5]


def test_after_a_quick_trial_further_trials_follow_immediately_until_it_has_recovered():
    peers, service_s, trials = Peers("CD"), 0.05, 0
    peers.make_slow("C", service_s)
    peers.now += 1
    while peers.state("C") is HALF_OPEN:
        peers.begin("C")
        trials, service_s = trials + 1, 0.8 * service_s + 0.2 * 0.005
        peers.good("C", took_s=0.005, service_s=service_s)
    assert peers.state("C") is HEALTHY
    assert 5 < trials < 20
    assert peers.changes[-1].startswith("C is quick again: ")


def test_a_slow_neighbour_is_healthy_when_its_peers_have_become_as_slow():
    peers = Peers("CD")
    peers.make_slow("C")
    peers.look(C=0.05, D=0.05)
    assert peers.state("C") is HEALTHY
    assert peers.changes[-1] == "C is not slow: 50 ms where its peers take 50 ms"


def test_a_slow_neighbour_that_does_not_answer_is_ejected():
    peers = Peers("CD")
    peers.make_slow("C")
    peers.now += 1
    peers.begin("C")
    peers.fail("C", 1)
    assert peers.state("C") is SLOW
    peers.fail("C", FAILURES - 1)
    assert peers.state("C") is EJECTED


# Any sequence of events.

NEIGHBOURS = "CDFGT"
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["bad", "bad", "late", "good", "neither", "begin", "wait", "look", "up"]),
        st.sampled_from(NEIGHBOURS),
        st.integers(1, 6),
    ),
    max_size=60,
)


def happen(peers: Peers, event: str, neighbour: str, number: int) -> None:
    verdicts = {"bad": Verdict.BAD, "late": Verdict.LATE, "neither": Verdict.NEITHER}
    if event in verdicts:
        peers.record(neighbour, verdicts[event], number)
    elif event == "good":
        peers.good(neighbour, took_s=number / 100, service_s=number / 100)
    elif event == "begin":
        peers.begin(neighbour)
    elif event == "wait":
        peers.now += number
    elif event == "up":
        peers.up = NEIGHBOURS[-number:]
        peers.look()
    else:
        peers.look(**{n: 0.001 * (number + i) ** 3 for i, n in enumerate(NEIGHBOURS)})


@given(EVENTS)
@settings(max_examples=150, deadline=None)
def test_at_most_half_are_ever_ejected_and_each_is_tried_within_the_maximum_pause(events):
    peers = Peers(NEIGHBOURS)
    for event in events:
        happen(peers, *event)
        assert 2 * len(set(peers.ejected) & set(peers.up)) <= len(peers.up)
        assert peers.describe("T")[0] != "slow"

    peers.now += max(pause.max_s for pause in PAUSES.values())
    for neighbour in NEIGHBOURS:
        health = peers.detector.unhealthy[neighbour].get("h")
        assert health is None or health.on_trial or health.state_at(peers.now) <= HEALTHY


@given(EVENTS)
@settings(max_examples=150, deadline=None)
def test_good_answers_always_make_every_neighbour_healthy(events):
    peers = Peers(NEIGHBOURS)
    for event in events:
        happen(peers, *event)

    for neighbour in NEIGHBOURS:
        peers.good(neighbour, took_s=0.0001, service_s=0.0001)

    assert not any(peers.detector.unhealthy.values())
