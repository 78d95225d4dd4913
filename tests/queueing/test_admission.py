"""Which requests are admitted, which may overtake, and when to retry; shares; service times."""

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
    check_handler_share,
    check_share,
    max_handler_slots,
)


def test_waiting_bytes_are_bounded():
    check_bytes(3, 900, 100, 1000)
    with pytest.raises(QueueFull, match=r"3 waiting requests hold 900 of 1,000 bytes; 101 more"):
        check_bytes(3, 900, 101, 1000)


def test_an_empty_queue_admits_a_request_larger_than_the_bound():
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
def test_only_requests_that_cannot_want_the_same_slots_may_overtake(behind, ahead, may):
    assert admission.may_overtake(behind, ahead) is may


NAMES = st.sampled_from(["", "x", "y"])
ROUTES = st.builds(Route, mode=st.sampled_from(Mode), team=NAMES, handler=NAMES)


@given(ROUTES, ROUTES)
def test_overtaking_is_symmetric(one, other):
    assert admission.may_overtake(one, other) == admission.may_overtake(other, one)


@given(ROUTES, ROUTES)
def test_requests_that_want_the_same_places_never_overtake(one, other):
    if admission.wants(one, "") == admission.wants(other, ""):
        assert not admission.may_overtake(one, other)


@given(st.integers(0, 200), st.integers(0, 100), st.floats(0, 1e6))
def test_a_refused_caller_is_asked_to_wait_between_50_ms_and_30_s(waiting, active, mean_s):
    assert 0.05 <= admission.retry_after_s(waiting, active, mean_s) <= 30


def test_the_suggested_wait_is_the_time_for_a_tenth_of_the_queue():
    assert admission.retry_after_s(200, 10, 1.0) == pytest.approx(2.0)


TIMES = [
    # left, ahead, in service, mean, refused
    (1.0, 0, 10, 5.0, False),  # nothing ahead
    (1.0, 5, 0, 5.0, False),  # nothing known
    (1.0, 5, 10, 0.0, False),
    (1.0, 89, 10, 0.1, False),  # 90 completions, 10 ms apart, and its own 100 ms
    (1.0, 90, 10, 0.1, True),
    (0.05, 1, 10, 0.1, True),
]


@pytest.mark.parametrize(("left_s", "ahead", "active", "mean_s", "refused"), TIMES)
def test_a_request_that_cannot_be_answered_in_time_is_refused(
    left_s, ahead, active, mean_s, refused
):
    needs_s = admission.answer_s(ahead, active, mean_s, mean_s)
    if not refused:
        admission.check_time(left_s, ahead, needs_s)
        return
    with pytest.raises(NoTimeLeft) as caught:
        admission.check_time(left_s, ahead, needs_s)
    assert 0.05 <= caught.value.retry_after_s <= 30
    later = left_s + caught.value.retry_after_s + 1e-9  # by then the queue is this much shorter
    admission.check_time(later, ahead, needs_s)


def test_a_refusal_says_how_long_an_answer_would_take():
    with pytest.raises(NoTimeLeft, match=r"^99 requests are ahead and an answer takes about 1.1 s"):
        admission.check_time(0.5, 99, admission.answer_s(99, 10, 0.1, 0.1))


def test_under_overload_admitted_requests_have_time_to_spare():
    assert [admission.share_of_time(since_s) for since_s in (0, 0.9, 1.0, 1e9)] == [2 / 3] * 2 + [
        1
    ] * 2
    admission.check_time(1.0, 9, 0.7, 0.75)
    admission.check_time(1.0, 9, 0.8)
    with pytest.raises(NoTimeLeft, match="more arrive than can be answered") as caught:
        admission.check_time(1.0, 9, 0.95, 0.75)
    assert caught.value.retry_after_s == pytest.approx(0.2)


def test_the_likely_time_is_ample_if_times_are_similar_and_that_of_quick_work_in_a_mix():
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
def test_a_caller_gets_at_most_half_of_the_slots_and_a_newcomer_finds_one(slots, callers):
    held: dict[int, int] = {}
    for caller in callers:
        waiting = sum(held.values())
        try:
            check_share(held.get(caller, 0), waiting, slots)
        except QueueFull:
            continue
        held[caller] = held.get(caller, 0) + 1
        assert held[caller] <= (slots + 1) // 2
    if len(held) < slots.bit_length():  # with few callers there is always room for another
        check_share(0, sum(held.values()), slots)


def test_recent_keys_are_remembered_for_a_while():
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
    first = [callers.seen(Caller("pc", f"n{n}"), n / 100).caller.name for n in range(100)]
    assert first[:16] == [f"n{n}" for n in range(16)]
    assert set(first[16:]) == {OTHERS}
    again = [callers.seen(Caller("pc", f"n{n}"), 1 + n / 100).caller.name for n in range(100)]
    assert len({*again} - {OTHERS}) in (MAX_NAMES, MAX_NAMES - 1)
    assert again[:16] == first[:16]
    assert callers.seen(Caller("mac", "n99"), 2).caller == Caller("mac", "n99")


@pytest.mark.parametrize("interval_s", [0.1, 1.0, 4.0])
def test_a_returning_name_keeps_its_own_turn_despite_any_number_of_new_names(interval_s):
    """500 new names a second, none of which returns."""
    callers, names, number = Callers(), [], 0
    for n in range(10):
        now = n * interval_s
        names.append(callers.seen(Caller("pc", "steady"), now + 0.001).caller.name)
        for i in range(int(500 * interval_s)):
            number += 1
            callers.seen(Caller("pc", f"new {number}"), now + 0.002 + i / 500)
    assert names == ["steady"] * 10


def test_a_steady_name_gets_its_own_turn_during_a_flood_of_names():
    callers = Callers()
    for n in range(5000):
        caller = callers.seen(Caller("pc", f"new {n}"), n / 500).caller
        if n % 50 == 49:  # ten times a second
            caller = callers.seen(Caller("pc", "steady"), n / 500).caller
    assert caller.name == "steady"


@pytest.mark.parametrize("of", ["names", "addresses"])
def test_callers_that_never_return_do_not_accumulate(of):
    callers = Callers()
    for n in range(50_000):
        callers.seen(Caller("pc", f"{n}") if of == "names" else Caller(f"{n}", "x"), n / 1e5)
    assert len(callers) <= 2 * MAX_ADDRESSES


def take_all(shares: PlaceShares, *holder: str) -> int:
    """How many places this holder gets if it takes all that it may."""
    taken = 0
    while shares.allow(*holder):
        shares.take(*holder)
        taken += 1
    return taken


def test_one_handler_of_one_machine_leaves_places_for_others():
    shares = PlaceShares(100, 100)
    assert take_all(shares, "pc", "slow", "") == 80
    assert take_all(shares, "mac", "slow", "") == 10  # 90 of this handler
    assert take_all(shares, "mac", "echo", "") == 8
    assert shares.allow("lab", "other", "")
    for _ in range(80):
        shares.give_back("pc", "slow", "")
    assert take_all(shares, "mac", "echo", "") == 64


@pytest.mark.parametrize("places", [1, 2, 4, 10, 19])
def test_fewer_than_20_places_are_not_shared(places):
    shares = PlaceShares(places, places)
    assert take_all(shares, "pc", "slow", "") == places
    assert shares.is_full


def test_a_team_gets_no_more_than_its_limit():
    shares = PlaceShares(100, 50)
    assert take_all(shares, "pc", "slow", "pink") == 50
    assert take_all(shares, "pc", "slow", "") == 30


HOLDERS = st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from(["", "t"]))


@given(st.integers(20, 300), st.lists(HOLDERS, max_size=600), st.randoms())
def test_there_is_always_a_place_for_a_newcomer_and_nothing_accumulates(places, holders, chance):
    shares, held = PlaceShares(places, places), []
    for holder in holders:
        if shares.allow(*holder):
            shares.take(*holder)
            held.append(holder)
        elif held and chance.random() < 0.3:
            shares.give_back(*held.pop(chance.randrange(len(held))))
        assert shares.taken == len(held) <= places
        if len({(address, handler) for address, handler, _ in held}) < 3 and places > 60:
            assert shares.allow("new", "new", "")
    for holder in held:
        shares.give_back(*holder)
    kept = shares._pairs, shares._addresses, shares._handlers, shares._teams
    assert kept == ({}, {}, {}, {})


SLOTS = [
    # cap, held by other handlers, the maximum for one handler
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
def test_one_handler_leaves_slots_of_its_worker_for_the_others(cap, elsewhere, most):
    assert max_handler_slots(cap, elsewhere) == most


def test_one_handlers_requests_leave_queue_slots_for_the_others():
    check_handler_share(159, 159, 200)
    with pytest.raises(QueueFull, match="this handler has 160 of 200"):
        check_handler_share(160, 160, 200)


@pytest.mark.parametrize(
    ("size", "other", "same"), [(0, 1, False), (16, 255, True), (50, 5 * 10**4, False)]
)
def test_payloads_of_very_different_sizes_are_in_different_classes(size, other, same):
    assert (admission.size_class(size) == admission.size_class(other)) is same


def test_estimates_come_from_recent_requests():
    estimator = ServiceTimeEstimator()
    assert (estimator.mean_s(0), estimator.least_s(0)) == (0, 0)
    for now in range(8):
        estimator.completed(now, 1.0 + now)
    assert estimator.mean_s(8) == pytest.approx(4.5)
    assert estimator.least_s(8) == 1
    assert estimator.mean_s(17) > 0
    assert (estimator.mean_s(24), estimator.least_s(24)) == (0, 0)
    estimator.completed(30, 100)
    assert estimator.mean_s(300) == 100  # long times are remembered for longer
    assert estimator.mean_s(331) == 0


@given(st.lists(st.floats(0.01, 10), min_size=8, max_size=80))
def test_the_least_time_is_that_of_the_last_32(took):
    estimator = ServiceTimeEstimator()
    for n, took_s in enumerate(took):
        estimator.completed(n / 100, took_s)
        if n >= 7:
            assert estimator.least_s(n / 100) == min(took[max(0, n - 31) : n + 1])


def test_an_estimate_is_reliable_after_eight_completions():
    estimator = ServiceTimeEstimator()
    for n in range(8):
        assert not estimator.is_reliable(n)
        estimator.completed(n, 0.1, concurrency=6)
    assert estimator.is_reliable(8)
    assert estimator.concurrency == 6
    assert not estimator.is_reliable(20)
    assert estimator.concurrency == 0


def test_while_all_requests_expire_the_least_time_is_twice_what_they_had():
    estimator = ServiceTimeEstimator()
    for n in range(8):
        assert estimator.least_s(n / 10) == 0
        estimator.expired(n / 10, 0.1 + n / 100)
    assert estimator.least_s(1) == pytest.approx(0.2)
    estimator.completed(1, 0.15)
    assert estimator.least_s(1) == 0


def test_one_in_16_requests_with_too_little_time_is_started():
    estimator = ServiceTimeEstimator()
    for n in range(8):
        estimator.completed(n, 600.0)
    assert [estimator.is_too_short(9, 2.0) for _ in range(32)].count(False) == 2
    assert not estimator.is_too_short(9, 600.0)


def test_only_answers_of_handlers_have_a_service_time():
    def answers(*codes: Code, executed: Executed = Executed.YES) -> Slice:
        parts = tuple(
            PartSlice(f"W{n}", Column((b"",)))
            if code is Code.OK
            else PartSlice.missing(f"W{n}", 1, Detail(code, "", executed))
            for n, code in enumerate(codes)
        )
        return Slice(1, parts)

    assert answers(Code.OK, Code.OK).has_service_time
    assert answers(Code.OK, Code.INTERNAL).has_service_time
    assert answers(Code.INVALID_ARGUMENT).has_service_time
    for code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED):
        assert not answers(Code.OK, code).has_service_time
    assert not answers(Code.INTERNAL, executed=Executed.UNKNOWN).has_service_time
    assert not answers(Code.RESOURCE_EXHAUSTED, executed=Executed.NO).has_service_time
    assert not Slice(1, (), refused=Part("A", Code.OK)).has_service_time
    assert answers(Code.DEADLINE_EXCEEDED, Code.DEADLINE_EXCEEDED).is_too_late
    assert not answers(Code.DEADLINE_EXCEEDED, Code.OK).is_too_late
    some = PartSlice("W", Column((b"",) * 2), failures={0: Detail(Code.CANCELLED, "")})
    assert Slice(2, (some,)).has_service_time
