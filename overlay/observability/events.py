"""Which events are shown where there is no room for all.

A change of state (a process stopped, a link came back) happens once, and is what people look for;
failures recur. So failures never take more than half of the room from changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

RECURRING = ("refusal", "failure", "log")  # recurring kinds; all others are changes of state

T = TypeVar("T")


def latest(events: Sequence[T], limit: int, is_change: Callable[[T], bool]) -> list[T]:
    """At most `limit` of the last ones, in their order."""
    changes = [i for i, event in enumerate(events) if is_change(event)]
    failures = [i for i, event in enumerate(events) if not is_change(event)]
    failures = _last(failures, max(limit - len(changes), limit // 2))
    return [events[i] for i in sorted([*failures, *_last(changes, limit - len(failures))])]


def _last(items: list[int], limit: int) -> list[int]:
    return items[max(0, len(items) - limit) :]
