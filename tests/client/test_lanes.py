"""Which lane of a client takes a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.client.lanes import LaneLoad, choose

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
