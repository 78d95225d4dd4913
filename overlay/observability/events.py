"""Which events are shown where there is not room for all.

A change of state (a process stopped, a link came back) happens once, and is what people look for; a
failure comes again and again. So failures never take more than half of the room from changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

COME_AGAIN = ("refusal", "failure", "log")  # kinds; all others are changes of state

T = TypeVar("T")


def latest(events: Sequence[T], most: int, is_change: Callable[[T], bool]) -> list[T]:
    """At most `most` of the last ones, in their order."""
    changes = [i for i, event in enumerate(events) if is_change(event)]
    others = [i for i, event in enumerate(events) if not is_change(event)]
    others = _last(others, max(most - len(changes), most // 2))
    return [events[i] for i in sorted([*others, *_last(changes, most - len(others))])]


def _last(items: list[int], most: int) -> list[int]:
    return items[max(0, len(items) - most) :]
