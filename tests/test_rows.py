"""Which rows are open, against a set; and columns, which keep the form they came in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.rows import OpenRows, consecutive
from overlay.values import (
    Answers,
    Code,
    Column,
    Failure,
    PartColumn,
    Route,
    Segment,
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
def test_open_rows_are_a_set_of_rows(count, calls):
    rows, model = OpenRows(count), set(range(count))
    for take, start, size in calls:
        among = runs_of(model & set(range(start, start + size)))
        assert rows.runs(start, size) == among
        if take:
            assert rows.take(start, size) == among
            model -= set(range(start, start + size))
        assert rows.left == len(model)
        assert rows.first_run() == next(iter(runs_of(model)), None)
        assert len(rows) == count


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20))
def test_each_row_is_taken_once_whoever_asks(count, calls):
    rows = OpenRows(count)
    taken = [
        row
        for start, size in [*calls, (0, count)]
        for first, found in rows.take(start, size)
        for row in range(first, first + found)
    ]
    assert sorted(taken) == list(range(count))
    assert rows.left == 0


@given(*[st.integers(0, 20)] * 4)
def test_an_end_reaches_exactly_the_rows_that_are_meant_and_there(first, rows, start, count):
    ended: set[int] = set()

    def end(code: Code, begin: int, size: int) -> None:
        assert begin >= 0
        assert size > 0
        assert begin + size <= rows
        ended.update(range(first + begin, first + begin + size))

    end_overlap(end, first, rows, Code.CANCELLED, start, count)

    assert ended == set(range(first, first + rows)) & set(range(start, start + count))


def test_a_column_is_opened_only_by_who_looks():
    def open_wired(wired, count):
        opened.append(count)
        return [b"a", b"b", b"c"]

    opened: list[int] = []
    column = Column(wired="as it came", count=3, size=9, open_wired=open_wired)
    assert (len(column), column.size, column.slice(0, 3)) == (3, 9, column)
    assert opened == []

    assert list(column.slice(1, 2).items) == [b"b", b"c"]
    assert list(column.items) == [b"a", b"b", b"c"]
    assert opened == [3]


def test_a_part_of_a_column_is_not_in_the_form_it_came_in():
    column = Column(wired="as it came", count=2, open_wired=lambda wired, count: [b"a", b"bc"])
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
def test_a_slice_of_answers_says_of_each_row_what_the_whole_says(items, failing, failed, data):
    failures = {row: Failure(Code.INTERNAL, str(row)) for row in failing if row < len(items)}
    whole = Failure(Code.UNAVAILABLE, "all") if failed else None
    column = PartColumn("C", Column(items), ("A", "C"), failures, whole, 3, 4)
    answers = Answers(len(items), (column, PartColumn("D", Column(items))), ("A", "C", "D"))
    start = data.draw(st.integers(0, len(items) - 1))
    count = data.draw(st.integers(1, len(items) - start))

    part = answers.slice(start, count)

    assert [part.at(row) for row in range(count)] == [
        answers.at(start + row) for row in range(count)
    ]
    assert answers.flawless == (not failed and not failures)


@pytest.mark.parametrize("failed", [None, Failure(Code.INTERNAL, "all of them")])
def test_a_missing_workers_rows_all_say_why(failed):
    why = failed or Failure(Code.UNAVAILABLE, "down")
    column = PartColumn.missing("C", 3, why)
    assert {column.at(row).reason for row in range(3)} == {why.reason}
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
def test_ascending_rows_are_found_as_runs(rows, runs):
    assert consecutive(rows) == runs
