"""What handlers report about how far they have got."""

from __future__ import annotations

import math
from typing import Any

import pytest

from overlay.model.jobs import MAX_PROGRESS, MAX_PROGRESS_TEXT, WorkProgress
from overlay.workers import progress
from overlay.workers.progress import ProgressBook


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[WorkProgress]:
    found: list[WorkProgress] = []
    monkeypatch.setattr(progress, "_sink", found.append)
    return found


def test_a_report_has_exact_types_and_a_short_text(noted: list[WorkProgress]) -> None:
    progress.note(7, True, 3, "x" * 1000)
    progress.note(7, 2, 0, "a \ud800 half")
    assert noted == [
        WorkProgress(7, 1.0, 3.0, "x" * MAX_PROGRESS_TEXT),
        WorkProgress(7, 2.0, 0.0, "a ? half"),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((-1, 0, ""), ValueError, "done must be a number from 0, not -1"),
        ((math.nan, 0, ""), ValueError, "done"),
        ((0, math.inf, ""), ValueError, "total"),
        ((10**400, 0, ""), ValueError, "done"),
        (("many", 0, ""), TypeError, "done must be a number, not str"),
        ((1, None, ""), TypeError, "total"),
        ((1, 2, b"text"), TypeError, "text must be a str, not bytes"),
    ],
)
def test_a_wrong_report_names_its_argument(
    noted: list[WorkProgress], arguments: tuple[Any, ...], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        progress.note(7, *arguments)
    assert noted == []


def test_only_the_latest_of_each_request_is_passed_on_and_of_the_latest_requests() -> None:
    calls: list[int] = []
    book = ProgressBook(lambda: calls.append(1))
    for n in range(MAX_PROGRESS + 10):
        book.note(WorkProgress(n, 1))
    book.note(WorkProgress(20, 2))
    taken = book.take()
    assert len(calls) == MAX_PROGRESS + 11
    assert len(taken) == MAX_PROGRESS
    assert taken[0].request_id == 10
    assert taken[-1] == WorkProgress(20, 2)
    assert book.take() == []
