"""Which workers a client is lent: a table, and what holds for any load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model.leases import LONGEST_S, MAX_LANES
from overlay.routing.lending import Lendable, lend
from overlay.routing.planner import Load

MS = 0.001

# workers (id, slots, milliseconds of a request, rows lent to others, and to how many), rows, other
# callers -> lent
TABLE = [
    ([("C", 8, 1)], 1, 0, {"C": 88}),
    ([("C", 8, 1)], 1, 1, {"C": 44}),
    ([("C", 8, 1, 88, 1)], 1, 0, {"C": 44}),
    ([("C", 8, 1, 88, 1)], 1, 2, {"C": 22}),
    ([("C", 1, 0.01)], 1, 0, {"C": 1000}),
    # Short ones stay together; others are given a slot each.
    ([("C", 1, 0.01), ("D", 1, 0.01)], 64, 0, {"C": 1000}),
    ([("C", 8, 5), ("D", 8, 5), ("F", 8, 5)], 16, 0, {"C": 24, "D": 24}),
    ([("C", 8, 5), ("D", 8, 5), ("F", 8, 5)], 64, 0, {"C": 24, "D": 24, "F": 24}),
    # The one that is lent least comes first.
    ([("C", 8, 1, 50, 1), ("D", 8, 1, 10, 1)], 1, 0, {"D": 44}),
    ([("C", 8, 1, 10, 1), ("D", 1, 1, 5, 1)], 1, 0, {"C": 44}),
    # Long or unknown requests, and workers without slots, are left to the queue.
    ([("C", 8, 21)], 1, 0, {}),
    ([("C", 8, 0)], 1, 0, {}),
    ([("C", 0, 1)], 1, 0, {}),
    ([], 1, 0, {}),
    # Nobody is lent nothing.
    ([("C", 1, 20)], 1, 1000, {"C": 1}),
]


@pytest.mark.parametrize(("workers", "rows", "others", "expected"), TABLE)
def test_table(workers, rows, others, expected):
    made = [Lendable(w, slots, ms * MS, *lent) for w, slots, ms, *lent in workers]
    found = lend(made, rows, others)

    assert {one.worker: share for one, share in found} == expected


lendable = st.builds(
    Lendable,
    worker=st.text("abcdef", min_size=1),
    slots=st.integers(0, 100),
    service_s=st.just(0.0) | st.floats(1e-6, 1),
    lent=st.integers(0, 5000),
    borrowers=st.integers(0, 50),
)


@given(st.lists(lendable, unique_by=lambda w: w.worker), st.integers(1, 5000), st.integers(0, 50))
def test_only_short_work_is_lent_and_several_callers_share_a_worker(workers, rows, others):
    found = lend(workers, rows, others)

    assert len(found) <= MAX_LANES
    for one, share in found:
        assert 0 < one.service_s <= LONGEST_S
        assert one.slots > 0
        alone = Load(slots=one.slots, service_s=one.service_s).credit
        assert share == max(1, alone // (1 + one.borrowers + others))
