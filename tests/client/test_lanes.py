"""Which lane of a client takes a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.client.lanes import Demanded, LaneLoad, choose, wants_lease

# lanes (rows, slots, unanswered, milliseconds of a request), rows -> which
TABLE = [
    ([], 1, None),
    ([(10, 1, 0, 0)], 1, 0),
    ([(10, 1, 10, 0)], 1, None),
    ([(10, 1, 0, 0)], 11, None),
    ([(0, 1, 0, 0)], 1, None),
    # The fewest per slot,
    ([(10, 4, 4, 1), (10, 4, 2, 1)], 1, 1),
    ([(10, 8, 4, 1), (10, 1, 1, 1)], 1, 0),
    # but one that is busy with quick work keeps getting it, while it has room.
    ([(10, 1, 2, 0.1), (10, 1, 0, 0.1)], 1, 0),
    ([(10, 1, 9, 0.1), (10, 1, 0, 0.1)], 1, 1),
    ([(2, 1, 2, 0.1), (10, 1, 0, 0.1)], 1, 1),
]


@pytest.mark.parametrize(("lanes", "rows", "expected"), TABLE)
def test_table(lanes, rows, expected):
    loads = [LaneLoad(most, slots, found, ms / 1e3) for most, slots, found, ms in lanes]

    assert choose(loads, rows) == expected


loads = st.builds(
    LaneLoad, st.integers(0, 100), st.integers(0, 8), st.integers(0, 100), st.floats(0, 1)
)


@given(st.lists(loads), st.integers(1, 50))
def test_a_lane_never_gets_more_than_it_has_rows_and_room_is_found_where_it_is(lanes, rows):
    chosen = choose(lanes, rows)
    has_room = [index for index, lane in enumerate(lanes) if lane.unanswered + rows <= lane.rows]

    assert (chosen in has_room) if has_room else chosen is None


MANY = Demanded(sent=10, missed=10, took_s=0.01, unanswered=10, service_s=0.001)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (MANY, True),
        (MANY._replace(took_s=1.0), False),  # they are few: 10 a second
        (MANY._replace(took_s=0.2), True),
        (MANY._replace(missed=0), False),  # the lanes take all of them
        (MANY._replace(missed=1), False),
        (MANY._replace(missed=2), True),
        (MANY._replace(service_s=0.0), False),  # nothing is known of them yet
        (MANY._replace(service_s=0.5), False),
        (MANY._replace(unanswered=1000), False),  # large segments do well on the ordinary way
        (MANY._replace(asked=10), False),
        (MANY._replace(asked=5), True),  # it asked for less than it needs now
        (MANY._replace(lanes=16), False),
    ],
)
def test_a_lease_is_asked_for_when_requests_are_many_and_short(
    seen: Demanded, expected: bool
) -> None:
    assert wants_lease(seen) is expected
