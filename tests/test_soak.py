"""The short lane of tests/soak.py, and its checker's own test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.soak import History, soak


def test_a_soak_with_kills_cancels_and_deadlines_keeps_every_rule(tmp_path: Path) -> None:
    history, broken = soak(tmp_path, 10_000, seed=1, kill_every_s=1)
    assert broken == []
    assert Counter(history.outcomes.values())["ok"] > 5_000


@pytest.mark.parametrize(
    ("ends", "ran", "outcome"),
    [(0, 0, None), (2, 1, "ok"), (1, 2, "ok"), (1, 0, "ok"), (1, 1, "refused UNAVAILABLE")],
)
def test_the_checker_finds_each_broken_rule(ends: int, ran: int, outcome: str | None) -> None:
    history = History()
    history.ends[0] = ends
    if outcome:
        history.outcomes[0] = outcome
    assert history.check(1, Counter({0: ran}))
