"""Who may enter, who may overtake, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import admission
from overlay.admission import Callers, Pace
from overlay.errors import NoTimeLeft, QueueFull
from overlay.values import Mode, Route


def test_the_last_free_slot_is_given_and_no_more():
    admission.check_room(199, 200, 0, 1, 1000)
    with pytest.raises(QueueFull, match=r"^all 200 queue slots are taken$"):
        admission.check_room(200, 200, 0, 1, 1000)


def test_waiting_bytes_are_bounded():
    admission.check_room(3, 200, 900, 100, 1000)
    with pytest.raises(QueueFull, match=r"3 waiting requests hold 900 of 1,000 bytes; 101 more"):
        admission.check_room(3, 200, 900, 101, 1000)


def test_a_request_larger_than_the_bound_enters_an_empty_queue():
    admission.check_room(0, 200, 0, 5000, 1000)


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
    if admission.places(one) == admission.places(other):
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
    needs_s = admission.takes_s(ahead, at_work, mean_s, mean_s)
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
        admission.check_time(0.5, 99, admission.takes_s(99, 10, 0.1, 0.1))


def test_while_others_are_refused_who_is_let_in_has_time_to_spare():
    assert [admission.share_of_time(since_s) for since_s in (0, 0.9, 1.0, 1e9)] == [2 / 3] * 2 + [
        1
    ] * 2
    admission.check_time(1.0, 9, 0.7, 0.75)
    admission.check_time(1.0, 9, 0.8)
    with pytest.raises(NoTimeLeft, match="more come than can be answered") as caught:
        admission.check_time(1.0, 9, 0.95, 0.75)
    assert caught.value.retry_after_s == pytest.approx(0.2)


def test_who_may_take_longer_than_the_mean_needs_more_time():
    even, uneven = Pace(), Pace()
    for n in range(32):
        even.ended(n / 100, 0.1)
        uneven.ended(n / 100, 0.05 if n % 2 else 0.15)
    assert even.ample_s(0.4) == pytest.approx(0.1)
    assert uneven.mean_s(0.4) == pytest.approx(0.1, rel=0.05)
    assert 0.15 <= uneven.ample_s(0.4) <= 0.4


@given(st.integers(1, 300), st.lists(st.integers(0, 9), min_size=1, max_size=600))
def test_a_caller_never_has_more_slots_than_half_and_a_newcomer_finds_one(slots, who):
    has: dict[int, int] = {}
    for caller in who:
        waiting = sum(has.values())
        try:
            admission.check_share(has.get(caller, 0), waiting, slots)
        except QueueFull:
            continue
        has[caller] = has.get(caller, 0) + 1
        assert has[caller] <= (slots + 1) // 2
    if len(has) < slots.bit_length():  # with few callers there is always room for one more
        admission.check_share(0, sum(has.values()), slots)


def test_callers_are_remembered_for_a_while():
    callers = Callers()
    assert not callers.seen("mac", 0)
    assert not callers.seen("mac", 5)
    assert callers.seen("pc", 9)
    assert callers.seen("mac", 18)
    assert not callers.seen("mac", 19.5)


def test_a_pace_is_what_was_seen_lately():
    pace = Pace()
    assert (pace.mean_s(0), pace.least_s(0)) == (0, 0)
    for now in range(5):
        pace.ended(now, 1.0 + now)
    assert pace.mean_s(5) == pytest.approx(3)
    assert pace.least_s(5) == 1
    assert pace.mean_s(14) > 0
    assert (pace.mean_s(15), pace.least_s(15)) == (0, 0)
    pace.ended(20, 100)
    assert pace.mean_s(300) == 100  # what takes long is remembered for longer
    assert pace.mean_s(321) == 0


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=80))
def test_the_quickest_of_late_is_known_without_looking_at_all(took):
    pace = Pace()
    for n, took_s in enumerate(took):
        pace.ended(n / 100, took_s)
        assert pace.least_s(n / 100) == min(took[max(0, n - 31) : n + 1])


def test_a_pace_is_proven_by_more_than_an_odd_end_or_two():
    pace = Pace()
    for n in range(8):
        assert not pace.is_proven(n)
        pace.ended(n, 0.1, at_work=6)
    assert pace.is_proven(8)
    assert pace.at_work == 6
    assert not pace.is_proven(20)
    assert pace.at_work == 0
