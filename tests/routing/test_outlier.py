"""Who is well, slow or ejected: tables of outcomes, and what holds whatever comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.model.segments import Code, Column, Detail, Executed, Part, PartSlice, Slice
from overlay.routing.outlier import (
    FAILURES,
    LOOK_S,
    PAUSES,
    Outcome,
    OutlierDetector,
    State,
    Verdict,
    classify,
)

HEALTHY, SLOW, EJECTED, HALF_OPEN = State.HEALTHY, State.SLOW, State.EJECTED, State.HALF_OPEN
NO, YES, UNKNOWN = Executed.NO, Executed.YES, Executed.UNKNOWN

SAID = [
    (Code.UNAVAILABLE, UNKNOWN, Verdict.BAD),  # the connection was lost
    (Code.DEADLINE_EXCEEDED, UNKNOWN, Verdict.BAD),  # nobody said anything
    (Code.DEADLINE_EXCEEDED, YES, Verdict.LATE),
    (Code.DEADLINE_EXCEEDED, NO, Verdict.NEITHER),  # not even sent
    (Code.INTERNAL, YES, Verdict.GOOD),  # the handler raised
    (Code.INVALID_ARGUMENT, YES, Verdict.GOOD),
    (Code.ALREADY_EXISTS, YES, Verdict.GOOD),
    (Code.INTERNAL, UNKNOWN, Verdict.NEITHER),
    (Code.RESOURCE_EXHAUSTED, NO, Verdict.NEITHER),
    (Code.CANCELLED, YES, Verdict.NEITHER),
    (Code.CANCELLED, UNKNOWN, Verdict.NEITHER),
]


@pytest.mark.parametrize(("code", "executed", "verdict"), SAID)
def test_a_refusal_and_a_part_that_failed_say_the_same_of_a_neighbour(code, executed, verdict):
    refused = Slice(2, (), refused=Part("C", code, "why", executed=executed))
    failure = Detail(code, "why", executed)
    all_rows = Slice(2, (PartSlice.missing("C", 2, failure),))
    by_row = Slice(2, (PartSlice("C", Column([b"", b""]), failures={0: failure, 1: failure}),))

    for answers in (refused, all_rows, by_row):
        found = classify(answers, 0.0)
        assert (found.verdict, found.rows) == (verdict, 2)
        assert verdict is not Verdict.BAD or found.reason == "why"


def test_a_team_leader_that_reaches_no_worker_is_not_taken_for_one_that_stops():
    stops = Part("E", Code.UNAVAILABLE, "E is stopping", executed=NO)
    assert classify(Slice(1, (), refused=stops), 0.0).verdict is Verdict.NEITHER

    missing = PartSlice.missing("F", 1, Detail(Code.UNAVAILABLE, "F cannot be reached", NO))
    assert classify(Slice(1, (missing,)), 0.0).verdict is Verdict.BAD


def test_a_worker_that_cannot_be_reached_for_all_says_nothing_of_its_team_leader():
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


class Room:
    """A detector whose time the test moves; every neighbour stands for one worker, but for T."""

    def __init__(self, neighbours: str) -> None:
        self.detector = OutlierDetector(neighbours, set(neighbours) - {"T"})
        self.up = neighbours
        self.now = 100.0
        self.decided: list[str] = []

    def hear(self, neighbour: str, verdict: Verdict, rows: int = 1, **times: float) -> None:
        said = Outcome(verdict, rows, "why", **times)
        change = self.detector.record(neighbour, "h", said, self.up, self.now)
        if change:
            self.decided.append(f"{change.neighbour} {change.reason}")

    def fail(self, neighbour: str, rows: int = FAILURES) -> None:
        self.hear(neighbour, Verdict.BAD, rows)

    def good(self, neighbour: str, took_s: float = 0.0, service_s: float = 0.0) -> None:
        self.hear(neighbour, Verdict.GOOD, took_s=took_s, service_s=service_s)

    def look(self, **paces: float) -> None:
        known = {n: {"h": paces[n]} if n in paces else {} for n in self.up}
        for change in self.detector.look(known, self.now):
            self.decided.append(f"{change.neighbour} {change.reason}")
        self.now += LOOK_S

    def begin(self, neighbour: str) -> None:
        self.detector.begin(neighbour, "h", self.now)

    def state(self, neighbour: str) -> State:
        case = self.detector.unhealthy[neighbour].get("h")
        return case.standing(self.now) if case else HEALTHY

    def shown(self, neighbour: str) -> tuple[str, str]:
        return self.detector.shown(neighbour, self.now)

    @property
    def ejected(self) -> list[str]:
        cases = {n: self.detector.unhealthy[n].get("h") for n in self.detector.unhealthy}
        return [n for n, case in cases.items() if case and case.state is EJECTED]

    def make_slow(self, neighbour: str, service_s: float = 0.05) -> None:
        others = {n: 0.005 for n in self.up if n != neighbour}
        self.look(**others, **{neighbour: service_s})
        self.look(**others, **{neighbour: service_s + 0.001})


# Ejected.


def test_some_failures_in_a_row_eject_and_fewer_do_not():
    room = Room("CD")
    room.fail("C", FAILURES - 1)
    assert room.state("C") is HEALTHY

    room.fail("C", 1)

    assert room.state("C") is EJECTED
    assert room.shown("C") == (
        "ejected",
        "handler h: ejected for 1 s: 5 requests in a row without an answer; the last: why",
    )
    assert room.detector.ejections == {"C": 1, "D": 0}


def test_an_answer_between_failures_begins_the_count_again():
    room = Room("CD")
    for _ in range(5):
        room.fail("C", FAILURES - 1)
        room.good("C")
    assert room.state("C") is HEALTHY
    assert not room.detector.unhealthy["C"], "nothing is kept of one who is well"


def test_what_says_nothing_neither_counts_nor_begins_the_count_again():
    room = Room("CD")
    room.fail("C", FAILURES - 1)
    room.hear("C", Verdict.NEITHER, 100)
    assert room.state("C") is HEALTHY

    room.fail("C", 1)
    assert room.state("C") is EJECTED


@pytest.mark.parametrize(("neighbour", "state"), [("C", EJECTED), ("T", HEALTHY)])
def test_late_workers_eject_themselves_and_not_their_team_leader(neighbour, state):
    room = Room("CDT")
    room.hear(neighbour, Verdict.LATE, FAILURES)
    assert room.state(neighbour) is state


def test_a_team_leader_whom_nobody_can_reach_is_ejected():
    room = Room("CT")
    room.fail("T")
    assert room.state("T") is EJECTED


def test_after_its_time_one_request_is_tried_and_an_answer_brings_it_back():
    room = Room("CD")
    room.fail("C")
    room.now += 0.99
    assert room.state("C") is EJECTED
    room.now += 0.02
    assert (room.state("C"), room.shown("C")[0]) == (HALF_OPEN, "half-open")

    room.begin("C")
    assert (room.state("C"), room.shown("C")[0]) == (EJECTED, "half-open")

    room.good("C")
    assert room.state("C") is HEALTHY
    assert room.decided[-1] == "C answers again"
    assert room.shown("C") == ("healthy", "")


def test_each_failed_trial_ejects_for_twice_as_long_up_to_a_bound():
    room, pauses = Room("CD"), []
    room.fail("C")
    for _ in range(8):
        began = room.now
        while room.state("C") is EJECTED:
            room.now += 0.125
        pauses.append(room.now - began)
        room.begin("C")
        room.fail("C", 1)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert room.detector.ejections["C"] == 9
    assert room.decided[1].startswith("C is ejected for 2 s: 6 requests in a row")


def test_a_trial_that_says_nothing_is_made_again_after_the_same_time():
    room = Room("CD")
    room.fail("C")
    for _ in range(3):
        room.now += 1.0
        room.begin("C")
        room.hear("C", Verdict.NEITHER)
        assert room.state("C") is EJECTED
    room.now += 1.0
    assert room.state("C") is HALF_OPEN


def test_failures_of_requests_sent_before_do_not_prolong_an_ejection():
    room = Room("CD")
    room.fail("C")
    room.now += 0.9
    room.fail("C", 50)
    room.now += 0.2
    assert room.state("C") is HALF_OPEN


def test_an_answer_to_a_request_sent_before_brings_it_back():
    room = Room("CD")
    room.fail("C")
    room.good("C")
    assert room.state("C") is HEALTHY


def test_workers_that_have_come_make_the_trial_due():
    room = Room("CT")
    room.fail("T")
    room.detector.capacity_added("T", room.now)
    assert room.state("T") is HALF_OPEN


def test_a_link_that_changes_says_more_than_what_was_before():
    room = Room("CD")
    room.fail("C")
    room.detector.forget("C")
    assert room.state("C") is HEALTHY


# up, who fails one after the other -> who is ejected
BOUNDS = [
    ("C", "C", ""),  # nobody else is left
    ("CD", "CD", "C"),
    ("CDF", "CDF", "C"),
    ("CDFG", "CDFG", "CD"),
    ("CDFGH", "CDFGH", "CD"),
    ("DF", "C", ""),  # its link is down, which says more
]


@pytest.mark.parametrize(("up", "failing", "ejected"), BOUNDS)
def test_at_most_half_of_those_that_are_up_are_ejected(up, failing, ejected):
    room = Room("CDFGH")
    room.up = up
    for neighbour in failing:
        room.fail(neighbour)
    assert "".join(room.ejected) == ejected


def test_nobody_is_ejected_while_no_other_one_answers():
    room = Room("CDF")
    for neighbour in "CDFCDF":
        room.fail(neighbour, FAILURES - 1)
    assert room.ejected == []

    room.good("D")
    room.fail("C", 1)
    assert room.ejected == ["C"]


def test_those_ejected_come_back_when_too_few_others_are_left():
    room = Room("CDFG")
    room.fail("C")
    room.now += 0.5
    room.fail("D")
    room.up = "CDF"

    room.look()

    assert room.ejected == ["D"]
    assert room.decided[-1] == "C is asked again: too few others are left"


def test_one_handler_that_fails_costs_the_others_nothing():
    room = Room("CD")
    room.fail("C")
    assert room.detector.unhealthy["C"].keys() == {"h"}


# Slow.

# the paces of C, D, F in ms -> who is slow
PACES = [
    ((5, 5, 5), ""),
    ((5, 5, 14), ""),
    ((5, 5, 16), "F"),
    ((5, 5, 50), "F"),
    ((5, 50, 50), "DF"),
    ((50, 50, 50), ""),
    ((0.01, 0.01, 0.9), ""),  # ninety times, and yet too little to matter
    ((0.01, 0.01, 1.2), "F"),
]


@pytest.mark.parametrize(("paces_ms", "slow"), PACES)
def test_slow_is_one_who_takes_much_longer_than_its_peers(paces_ms, slow):
    room = Room("CDF")
    for look in range(2):
        room.look(**{n: ms / 1e3 * (1 + look / 100) for n, ms in zip("CDF", paces_ms, strict=True)})
    found = [n for n in "CDF" if room.shown(n)[0] == "slow"]
    assert "".join(found) == slow


def test_the_reason_tells_both_paces():
    room = Room("CD")
    room.make_slow("C", 0.049)
    assert room.shown("C") == ("slow", "handler h: slow: 50 ms where its peers take 5 ms")
    assert room.decided == ["C is slow: 50 ms where its peers take 5 ms"]


def test_one_look_is_not_enough_and_neither_are_two_at_the_same_answers():
    room = Room("CD")
    for _ in range(5):
        room.look(C=0.05, D=0.005)
    assert room.state("C") is HEALTHY

    room.look(C=0.005, D=0.005)
    room.look(C=0.051, D=0.005)
    assert room.state("C") is HEALTHY


def test_a_team_leader_with_several_workers_is_never_slow():
    room = Room("CDT")
    room.make_slow("T")
    assert room.shown("T") == ("healthy", "")


def test_the_only_one_whose_pace_is_known_is_not_slow():
    room = Room("CD")
    room.look(C=0.05)
    room.look(C=0.06)
    assert room.state("C") is HEALTHY


def test_an_ejected_peer_is_no_measure():
    room = Room("CD")
    room.fail("D")
    room.make_slow("C")
    assert room.state("C") is HEALTHY


def test_a_slow_one_is_tried_less_and_less_often_while_it_is_slow():
    room, pauses = Room("CD"), []
    room.make_slow("C")
    room.good("C", took_s=0.05, service_s=0.05)
    for _ in range(6):
        began = room.now
        while room.state("C") is SLOW:
            room.now += 0.125
        pauses.append(room.now - began)
        room.begin("C")
        assert room.state("C") is SLOW, "one at a time"
        room.good("C", took_s=0.05, service_s=0.05)
    assert pauses == [1, 2, 4, 5, 5, 5]


def test_a_slow_one_that_is_quick_is_tried_again_at_once_until_its_pace_is_near_its_peers():
    room, service_s, trials = Room("CD"), 0.05, 0
    room.make_slow("C", service_s)
    room.now += 1
    while room.state("C") is HALF_OPEN:
        room.begin("C")
        trials, service_s = trials + 1, 0.8 * service_s + 0.2 * 0.005
        room.good("C", took_s=0.005, service_s=service_s)
    assert room.state("C") is HEALTHY
    assert 5 < trials < 20
    assert room.decided[-1].startswith("C is quick again: ")


def test_a_slow_one_is_well_when_its_peers_have_become_as_slow():
    room = Room("CD")
    room.make_slow("C")
    room.look(C=0.05, D=0.05)
    assert room.state("C") is HEALTHY
    assert room.decided[-1] == "C is not slow: 50 ms where its peers take 50 ms"


def test_a_slow_one_that_does_not_answer_is_ejected():
    room = Room("CD")
    room.make_slow("C")
    room.now += 1
    room.begin("C")
    room.fail("C", 1)
    assert room.state("C") is SLOW
    room.fail("C", FAILURES - 1)
    assert room.state("C") is EJECTED


# Whatever happens.

NEIGHBOURS = "CDFGT"
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["bad", "bad", "late", "good", "neither", "begin", "wait", "look", "up"]),
        st.sampled_from(NEIGHBOURS),
        st.integers(1, 6),
    ),
    max_size=60,
)


def happen(room: Room, event: str, neighbour: str, number: int) -> None:
    verdicts = {"bad": Verdict.BAD, "late": Verdict.LATE, "neither": Verdict.NEITHER}
    if event in verdicts:
        room.hear(neighbour, verdicts[event], number)
    elif event == "good":
        room.good(neighbour, took_s=number / 100, service_s=number / 100)
    elif event == "begin":
        room.begin(neighbour)
    elif event == "wait":
        room.now += number
    elif event == "up":
        room.up = NEIGHBOURS[-number:]
        room.look()
    else:
        room.look(**{n: 0.001 * (number + i) ** 3 for i, n in enumerate(NEIGHBOURS)})


@given(EVENTS)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_half_stay_and_each_ejected_one_is_tried_within_the_bound(events):
    room = Room(NEIGHBOURS)
    for event in events:
        happen(room, *event)
        assert 2 * len(set(room.ejected) & set(room.up)) <= len(room.up)
        assert room.shown("T")[0] != "slow"

    room.now += max(pause.most_s for pause in PAUSES.values())
    for neighbour in NEIGHBOURS:
        case = room.detector.unhealthy[neighbour].get("h")
        assert case is None or case.on_trial or case.standing(room.now) <= HEALTHY


@given(EVENTS)
@settings(max_examples=300, deadline=None)
def test_whatever_has_happened_good_answers_bring_everybody_back(events):
    room = Room(NEIGHBOURS)
    for event in events:
        happen(room, *event)

    for neighbour in NEIGHBOURS:
        room.good(neighbour, took_s=0.0001, service_s=0.0001)

    assert not any(room.detector.unhealthy.values())
