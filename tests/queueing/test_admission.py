"""Who may enter, who may overtake, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model.errors import NoTimeLeft, QueueFull
from overlay.model.segments import (
    Caller,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    Part,
    PartSlice,
    Route,
    Slice,
)
from overlay.queueing import admission
from overlay.queueing.callers import MAX_ADDRESSES, MAX_NAMES, OTHERS, Callers, RecentlySeen
from overlay.queueing.service_time import ServiceTimeEstimator
from overlay.queueing.shares import (
    PlaceShares,
    check_bytes,
    check_share,
    check_share_of_handler,
    most_of_slots,
)


def test_waiting_bytes_are_bounded():
    check_bytes(3, 900, 100, 1000)
    with pytest.raises(QueueFull, match=r"3 waiting requests hold 900 of 1,000 bytes; 101 more"):
        check_bytes(3, 900, 101, 1000)


def test_a_request_larger_than_the_bound_enters_an_empty_queue():
    check_bytes(0, 0, 5000, 1000)


OVERTAKING = [
    (Route(), Route(), False),
    (Route(team="pink"), Route(team="green"), True),
    (Route(team="pink"), Route(team="pink"), False),
    (Route(team="pink"), Route(), False),
    (Route(), Route(team="pink"), False),
    (Route(handler="x"), Route(handler="y"), True),
    (Route(handler="x"), Route(handler="x"), False),
    (Route(handler="x"), Route(), False),  # the default may be x
    (Route(), Route(handler="x"), False),
    (Route(mode=Mode.ANY), Route(mode=Mode.ALL), False),
    (Route(team="pink", handler="x"), Route(team="green", handler="x"), True),
    (Route(team="pink", handler="x"), Route(team="pink", handler="y"), True),
]


@pytest.mark.parametrize(("behind", "ahead", "may"), OVERTAKING)
def test_only_who_cannot_want_the_same_slots_may_overtake(behind, ahead, may):
    assert admission.may_overtake(behind, ahead) is may


NAMES = st.sampled_from(["", "x", "y"])
ROUTES = st.builds(Route, mode=st.sampled_from(Mode), team=NAMES, handler=NAMES)


@given(ROUTES, ROUTES)
def test_overtaking_is_allowed_to_both_or_to_neither(one, other):
    assert admission.may_overtake(one, other) == admission.may_overtake(other, one)


@given(ROUTES, ROUTES)
def test_who_wants_the_same_places_never_overtakes(one, other):
    if admission.wants(one, "") == admission.wants(other, ""):
        assert not admission.may_overtake(one, other)


@given(st.integers(0, 200), st.integers(0, 100), st.floats(0, 1e6))
def test_a_refused_caller_is_asked_to_wait_between_50_ms_and_30_s(waiting, active, mean_s):
    assert 0.05 <= admission.retry_after_s(waiting, active, mean_s) <= 30


def test_the_wait_is_the_time_in_which_a_tenth_of_the_queue_goes():
    assert admission.retry_after_s(200, 10, 1.0) == pytest.approx(2.0)


TIMES = [
    # left, ahead, at work, mean, refused
    (1.0, 0, 10, 5.0, False),  # who need not wait is let in
    (1.0, 5, 0, 5.0, False),  # nothing is known
    (1.0, 5, 10, 0.0, False),
    (1.0, 89, 10, 0.1, False),  # 90 ends, 10 ms apart, and its own 100 ms
    (1.0, 90, 10, 0.1, True),
    (0.05, 1, 10, 0.1, True),
]


@pytest.mark.parametrize(("left_s", "ahead", "at_work", "mean_s", "refused"), TIMES)
def test_who_cannot_be_answered_in_time_is_refused(left_s, ahead, at_work, mean_s, refused):
    needs_s = admission.answer_s(ahead, at_work, mean_s, mean_s)
    if not refused:
        admission.check_time(left_s, ahead, needs_s)
        return
    with pytest.raises(NoTimeLeft) as caught:
        admission.check_time(left_s, ahead, needs_s)
    assert 0.05 <= caught.value.retry_after_s <= 30
    later = left_s + caught.value.retry_after_s + 1e-9  # the queue is shorter by so much then
    admission.check_time(later, ahead, needs_s)


def test_a_refusal_says_how_long_it_would_take():
    with pytest.raises(NoTimeLeft, match=r"^99 requests are ahead and an answer takes about 1.1 s"):
        admission.check_time(0.5, 99, admission.answer_s(99, 10, 0.1, 0.1))


def test_while_others_are_refused_who_is_let_in_has_time_to_spare():
    assert [admission.share_of_time(since_s) for since_s in (0, 0.9, 1.0, 1e9)] == [2 / 3] * 2 + [
        1
    ] * 2
    admission.check_time(1.0, 9, 0.7, 0.75)
    admission.check_time(1.0, 9, 0.8)
    with pytest.raises(NoTimeLeft, match="more come than can be answered") as caught:
        admission.check_time(1.0, 9, 0.95, 0.75)
    assert caught.value.retry_after_s == pytest.approx(0.2)


def test_its_own_time_is_ample_where_times_are_alike_and_that_of_the_quick_in_a_mix():
    even, uneven = ServiceTimeEstimator(), ServiceTimeEstimator()
    for n in range(32):
        even.completed(n / 100, 0.1)
        uneven.completed(n / 100, 0.05 if n % 2 else 0.15)
    assert even.likely_s(0.4) == pytest.approx(0.1)
    assert uneven.mean_s(0.4) == pytest.approx(0.1, rel=0.05)
    assert 0.15 <= uneven.likely_s(0.4) <= 0.4
    mix = ServiceTimeEstimator()
    for n in range(32):
        mix.completed(n / 100, 600.0 if n % 2 else 0.05)
    assert mix.likely_s(0.4) == pytest.approx(8 * 0.05)
    for n in range(32):
        even.completed(n / 100, 0.09 if n % 2 else 0.11)
    assert 0.11 <= even.likely_s(0.4) <= 0.15


@given(st.integers(1, 300), st.lists(st.integers(0, 9), min_size=1, max_size=600))
def test_a_caller_never_has_more_slots_than_half_and_a_newcomer_finds_one(slots, who):
    has: dict[int, int] = {}
    for caller in who:
        waiting = sum(has.values())
        try:
            check_share(has.get(caller, 0), waiting, slots)
        except QueueFull:
            continue
        has[caller] = has.get(caller, 0) + 1
        assert has[caller] <= (slots + 1) // 2
    if len(has) < slots.bit_length():  # with few callers there is always room for one more
        check_share(0, sum(has.values()), slots)


def test_what_came_is_remembered_for_a_while():
    recent: RecentlySeen[str] = RecentlySeen(3)
    assert not recent.seen("mac", 0)
    assert not recent.seen("mac", 5)
    assert recent.seen("pc", 9)
    assert recent.seen("mac", 18)
    assert not recent.seen("mac", 19.5)
    for n in range(100):
        recent.seen(str(n), 20)
    assert len(recent) == 3


def test_names_have_turns_of_their_own_until_there_are_too_many():
    callers = Callers()
    flows = [callers.seen(Caller("pc", f"n{n}"), n / 100).caller.name for n in range(100)]
    assert flows[:16] == [f"n{n}" for n in range(16)]
    assert set(flows[16:]) == {OTHERS}
    again = [callers.seen(Caller("pc", f"n{n}"), 1 + n / 100).caller.name for n in range(100)]
    assert len({*again} - {OTHERS}) in (MAX_NAMES, MAX_NAMES - 1)
    assert again[:16] == flows[:16]
    assert callers.seen(Caller("mac", "n99"), 2).caller == Caller("mac", "n99")


@pytest.mark.parametrize("each_s", [0.1, 1.0, 4.0])
def test_a_name_that_comes_again_has_a_turn_of_its_own_however_many_others_come(each_s):
    """The others never come again, 500 a second."""
    callers, flows, number = Callers(), [], 0
    for n in range(10):
        now = n * each_s
        flows.append(callers.seen(Caller("pc", "steady"), now + 0.001).caller.name)
        for i in range(int(500 * each_s)):
            number += 1
            callers.seen(Caller("pc", f"new {number}"), now + 0.002 + i / 500)
    assert flows == ["steady"] * 10


def test_a_steady_name_that_comes_into_a_flood_gets_a_turn_of_its_own():
    callers = Callers()
    for n in range(5000):
        flow = callers.seen(Caller("pc", f"new {n}"), n / 500).caller
        if n % 50 == 49:  # ten times a second
            flow = callers.seen(Caller("pc", "steady"), n / 500).caller
    assert flow.name == "steady"


@pytest.mark.parametrize("of", ["names", "addresses"])
def test_callers_that_are_never_seen_again_do_not_pile_up(of):
    callers = Callers()
    for n in range(50_000):
        callers.seen(Caller("pc", f"{n}") if of == "names" else Caller(f"{n}", "x"), n / 1e5)
    assert len(callers) <= 2 * MAX_ADDRESSES


def filled(shares: PlaceShares, *who: tuple[str, str, str], most: int = 200) -> list[int]:
    """What each gets when each takes what it may, one after another."""
    got = [0] * len(who)
    for _ in range(most):
        for i, one in enumerate(who):
            if shares.allow(*one):
                shares.take(*one)
                got[i] += 1
    return got


def test_one_handler_of_one_machine_leaves_places_to_the_next():
    shares = PlaceShares(100, 100)
    assert filled(shares, ("pc", "slow", "")) == [80]
    assert filled(shares, ("mac", "slow", "")) == [10]  # 90 of this handler
    assert filled(shares, ("mac", "echo", "")) == [8]
    assert shares.allow("lab", "other", "")
    for _ in range(80):
        shares.give_back("pc", "slow", "")
    assert filled(shares, ("mac", "echo", "")) == [64]


@pytest.mark.parametrize("places", [1, 2, 4, 10, 19])
def test_a_few_places_are_anyones(places):
    shares = PlaceShares(places, places)
    assert filled(shares, ("pc", "slow", "")) == [places]
    assert shares.is_full


def test_a_team_has_no_more_than_its_part():
    shares = PlaceShares(100, 50)
    assert filled(shares, ("pc", "slow", "pink")) == [50]
    assert filled(shares, ("pc", "slow", "")) == [30]


HOLDERS = st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from(["", "t"]))


@given(st.integers(20, 300), st.lists(HOLDERS, max_size=600), st.randoms())
def test_there_is_always_a_place_for_a_newcomer_and_nothing_is_kept(places, who, chance):
    shares, held = PlaceShares(places, places), []
    for one in who:
        if shares.allow(*one):
            shares.take(*one)
            held.append(one)
        elif held and chance.random() < 0.3:
            shares.give_back(*held.pop(chance.randrange(len(held))))
        assert shares.taken == len(held) <= places
        if len({(address, handler) for address, handler, _ in held}) < 3 and places > 60:
            assert shares.allow("new", "new", "")
    for one in held:
        shares.give_back(*one)
    kept = shares._held, shares._addresses, shares._handlers, shares._teams
    assert kept == ({}, {}, {}, {})


SLOTS = [
    # cap, held by other handlers, the most that one may have
    (100, 0, 90),
    (100, 90, 9),
    (100, 99, 1),
    (100, 100, 0),
    (20, 0, 18),
    (19, 0, 19),
    (8, 0, 8),
    (8, 7, 1),
    (1, 0, 1),
]


@pytest.mark.parametrize(("cap", "elsewhere", "most"), SLOTS)
def test_one_handler_leaves_slots_of_its_worker_to_the_others(cap, elsewhere, most):
    assert most_of_slots(cap, elsewhere) == most


def test_one_handlers_crowd_leaves_slots_of_the_queue_to_the_others():
    check_share_of_handler(159, 159, 200)
    with pytest.raises(QueueFull, match="this handler has 160 of 200"):
        check_share_of_handler(160, 160, 200)


@pytest.mark.parametrize(
    ("size", "other", "alike"), [(0, 1, False), (16, 255, True), (50, 5 * 10**4, False)]
)
def test_payloads_of_very_different_sizes_are_not_one_class(size, other, alike):
    assert (admission.size_class(size) == admission.size_class(other)) is alike


def test_a_pace_is_what_was_seen_recent():
    pace = ServiceTimeEstimator()
    assert (pace.mean_s(0), pace.least_s(0)) == (0, 0)
    for now in range(8):
        pace.completed(now, 1.0 + now)
    assert pace.mean_s(8) == pytest.approx(4.5)
    assert pace.least_s(8) == 1
    assert pace.mean_s(17) > 0
    assert (pace.mean_s(24), pace.least_s(24)) == (0, 0)
    pace.completed(30, 100)
    assert pace.mean_s(300) == 100  # what takes long is remembered for longer
    assert pace.mean_s(331) == 0


@given(st.lists(st.floats(0.01, 10), min_size=8, max_size=80))
def test_the_quickest_of_late_is_known_without_looking_at_all(took):
    pace = ServiceTimeEstimator()
    for n, took_s in enumerate(took):
        pace.completed(n / 100, took_s)
        if n >= 7:
            assert pace.least_s(n / 100) == min(took[max(0, n - 31) : n + 1])


def test_a_pace_is_proven_by_more_than_an_odd_end_or_two():
    pace = ServiceTimeEstimator()
    for n in range(8):
        assert not pace.is_proven(n)
        pace.completed(n, 0.1, concurrency=6)
    assert pace.is_proven(8)
    assert pace.concurrency == 6
    assert not pace.is_proven(20)
    assert pace.concurrency == 0


def test_where_nothing_came_in_time_twice_as_much_is_wanted_until_one_does():
    pace = ServiceTimeEstimator()
    for n in range(8):
        assert pace.least_s(n / 10) == 0
        pace.lost(n / 10, 0.1 + n / 100)
    assert pace.least_s(1) == pytest.approx(0.2)
    pace.completed(1, 0.15)
    assert pace.least_s(1) == 0


def test_an_odd_one_of_those_that_seem_hopeless_is_tried():
    pace = ServiceTimeEstimator()
    for n in range(8):
        pace.completed(n, 600.0)
    assert [pace.is_too_little(9, 2.0) for _ in range(32)].count(False) == 2
    assert not pace.is_too_little(9, 600.0)


def test_what_ends_early_or_badly_is_no_pace():
    def answers(*codes: Code, executed: Executed = Executed.YES) -> Slice:
        parts = tuple(
            PartSlice(f"W{n}", Column((b"",)))
            if code is Code.OK
            else PartSlice.missing(f"W{n}", 1, Detail(code, "", executed))
            for n, code in enumerate(codes)
        )
        return Slice(1, parts)

    assert answers(Code.OK, Code.OK).is_worked_for
    assert answers(Code.OK, Code.INTERNAL).is_worked_for
    assert answers(Code.INVALID_ARGUMENT).is_worked_for
    for code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED):
        assert not answers(Code.OK, code).is_worked_for
    assert not answers(Code.INTERNAL, executed=Executed.UNKNOWN).is_worked_for
    assert not answers(Code.RESOURCE_EXHAUSTED, executed=Executed.NO).is_worked_for
    assert not Slice(1, (), refused=Part("A", Code.OK)).is_worked_for
    assert answers(Code.DEADLINE_EXCEEDED, Code.DEADLINE_EXCEEDED).is_too_late
    assert not answers(Code.DEADLINE_EXCEEDED, Code.OK).is_too_late
    some = PartSlice("W", Column((b"",) * 2), failures={0: Detail(Code.CANCELLED, "")})
    assert Slice(2, (some,)).is_worked_for
