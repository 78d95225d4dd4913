"""Who may enter, who may overtake, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import admission
from overlay.errors import QueueFull
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
def test_requests_of_one_lane_never_overtake_each_other(one, other):
    if admission.lane(one) == admission.lane(other):
        assert not admission.may_overtake(one, other)


@given(st.integers(0, 200), st.integers(0, 100), st.floats(0, 1e6))
def test_a_refused_caller_is_asked_to_wait_between_50_ms_and_30_s(waiting, active, mean_s):
    assert 0.05 <= admission.retry_after_s(waiting, active, mean_s) <= 30


def test_the_wait_is_the_time_in_which_a_tenth_of_the_queue_goes():
    assert admission.retry_after_s(200, 10, 1.0) == pytest.approx(2.0)
