"""Pending rows against a set; slices by row; and columns, which keep their wire format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model.pending import CancelIndex, PendingRows, SliceIndex, consecutive
from overlay.model.segments import (
    Code,
    Column,
    Detail,
    PartSlice,
    Route,
    Segment,
    Slice,
    end_overlap,
)

RANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 45), st.integers(0, 45)), max_size=30)


def runs_of(rows: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for row in sorted(rows):
        if runs and row == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs


@given(st.integers(0, 40), RANGES)
def test_pending_rows_behave_like_a_set(count, calls):
    rows, model = PendingRows(count), set(range(count))
    for take, start, size in calls:
        among = runs_of(model & set(range(start, start + size)))
        assert rows.runs(start, size) == among
        if take:
            assert rows.take(start, size) == among
            model -= set(range(start, start + size))
        assert rows.left == len(model)
        assert rows.first_run() == next(iter(runs_of(model)), None)
        assert len(rows) == count


@given(st.integers(0, 40), RANGES, st.integers(1, 45))
def test_the_last_pending_rows_begin_at_the_tail(count, calls, size):
    rows, model = PendingRows(count), set(range(count))
    for _, start, taken in calls:
        rows.take(start, taken)
        model -= set(range(start, start + taken))

    last = {row for row in model if row >= rows.tail(size)}

    assert last == set(sorted(model)[-size:])


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20))
def test_each_row_is_taken_once(count, calls):
    rows = PendingRows(count)
    taken = [
        row
        for start, size in [*calls, (0, count)]
        for first, found in rows.take(start, size)
        for row in range(first, first + found)
    ]
    assert sorted(taken) == list(range(count))
    assert rows.left == 0


@given(*[st.integers(0, 20)] * 4)
def test_a_cancel_reaches_exactly_the_rows_in_both_ranges(first, rows, start, count):
    cancelled: set[int] = set()

    def cancel(code: Code, begin: int, size: int) -> None:
        assert begin >= 0
        assert size > 0
        assert begin + size <= rows
        cancelled.update(range(first + begin, first + begin + size))

    end_overlap(cancel, first, rows, Code.CANCELLED, start, count)

    assert cancelled == set(range(first, first + rows)) & set(range(start, start + count))


def test_a_column_is_decoded_only_when_its_items_are_read():
    def open_wired(wired, count):
        opened.append(count)
        return [b"a", b"b", b"c"]

    opened: list[int] = []
    column = Column(wired="as received", count=3, size=9, open_wired=open_wired)
    assert (len(column), column.size, column.slice(0, 3)) == (3, 9, column)
    assert opened == []

    assert list(column.slice(1, 2).items) == [b"b", b"c"]
    assert list(column.items) == [b"a", b"b", b"c"]
    assert opened == [3]


def test_a_slice_of_a_column_has_no_wire_format():
    column = Column(wired="as received", count=2, open_wired=lambda wired, count: [b"a", b"bc"])
    assert column.slice(1, 1).wired is None
    assert column.slice(1, 1).size == 2


ITEMS = st.lists(st.binary(max_size=3), min_size=1, max_size=12)


@given(ITEMS, st.data())
def test_a_slice_of_a_segment_keeps_the_ids_of_its_rows(items, data):
    segment = Segment(Route(), Column(items), 5.0, 100, 2)
    start = data.draw(st.integers(0, len(items) - 1))
    count = data.draw(st.integers(1, len(items) - start))

    part = segment.slice(start, count)

    assert list(part.payloads.items) == items[start : start + count]
    assert (part.first_id, part.attempt, part.deadline) == (100 + start, 2, 5.0)
    assert len(part) == count


@given(ITEMS, st.sets(st.integers(0, 11)), st.booleans(), st.data())
def test_a_slice_of_answers_has_the_same_rows_as_the_whole(items, failing, failed, data):
    failures = {row: Detail(Code.INTERNAL, str(row)) for row in failing if row < len(items)}
    whole = Detail(Code.UNAVAILABLE, "all") if failed else None
    column = PartSlice("C", Column(items), ("A", "C"), failures, whole, 3, 4)
    answers = Slice(len(items), (column, PartSlice("D", Column(items))), ("A", "C", "D"))
    start = data.draw(st.integers(0, len(items) - 1))
    count = data.draw(st.integers(1, len(items) - start))

    part = answers.slice(start, count)

    assert [part.at(row) for row in range(count)] == [
        answers.at(start + row) for row in range(count)
    ]
    assert answers.flawless == (not failed and not failures)


def test_all_rows_of_a_missing_worker_have_the_reason():
    column = PartSlice.missing("C", 3, Detail(Code.UNAVAILABLE, "down"))
    assert {column.at(row).reason for row in range(3)} == {"down"}
    assert len(column.slice(1, 2).results) == 2


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([], []),
        ([4], [(4, 1)]),
        (range(2, 6), [(2, 4)]),
        ([0, 1, 4, 5, 8], [(0, 2), (4, 2), (8, 1)]),
    ],
)
def test_ascending_rows_become_runs(rows, runs):
    assert consecutive(rows) == runs


@given(st.integers(1, 30), st.randoms())
def test_slices_of_any_size_and_order_are_found_by_row(count, chance):
    ranges, start = [], 0
    while start < count:
        stop = min(count, start + chance.randint(1, 6))
        ranges.append((start, stop))
        start = stop
    arrived = [each for each in ranges if chance.random() < 0.7]
    slices = SliceIndex()
    for start, stop in chance.sample(arrived, len(arrived)):
        items = [b"%d" % row for row in range(start, stop)]
        slices.add(start, Slice(stop - start, (PartSlice("F", Column(items)),)))
    answered = {row for start, stop in arrived for row in range(start, stop)}

    for row in range(count):
        found = slices.at(row)
        assert (found.at(0).parts[0].result if found else None) == (
            b"%d" % row if row in answered else None
        )
    begin = chance.randint(0, count)
    end = chance.randint(begin, count)
    rows = [row for a, b in slices.overlapping(begin, end) for row in range(a, b)]
    assert rows == sorted(answered & set(range(begin, end)))


@given(st.integers(1, 20), st.randoms())
def test_a_cancel_reaches_the_last_attempt_at_each_row(count, chance):
    """Pieces are sent, sent again elsewhere, and cancelled, in any order."""
    cancels, sent, cancelled = CancelIndex(count), {}, {}
    reached = set()
    for attempt in range(12):
        start = chance.randint(0, count - 1)
        rows = chance.randint(1, count - start)
        if chance.random() < 0.5:

            def cancel(code, first, size, attempt=attempt, start=start):
                reached.update((attempt, start + first + i, code) for i in range(size))

            calls = cancels.sent(start, rows, cancel, attempt)
            sent.update(dict.fromkeys(range(start, start + rows), attempt))
        else:
            code = chance.choice([Code.CANCELLED, Code.DEADLINE_EXCEEDED])
            calls = cancels.cancel(code, start, rows)
            for row in range(start, start + rows):
                cancelled.setdefault(row, code)
        for call in calls:
            call()
        expected = {(sent[row], row, cancelled[row]) for row in sent if row in cancelled}
        assert expected <= reached
        assert all(cancelled.get(row) is code for _, row, code in reached)


def test_an_earlier_attempt_that_is_reported_later_does_not_count():
    cancels, reached = CancelIndex(2), []
    cancels.sent(1, 1, lambda *what: reached.append(("second", *what)), 2)
    cancels.sent(0, 2, lambda *what: reached.append(("first", *what)), 1)

    for call in cancels.cancel(Code.CANCELLED, 0, 2):
        call()

    assert reached == [("first", Code.CANCELLED, 0, 1), ("second", Code.CANCELLED, 0, 1)]
    cancels.clear()
    assert cancels.cancel(Code.CANCELLED, 0, 2) == []
