"""Who may enter and who goes first: pure decisions of the intake."""

from __future__ import annotations

from overlay.errors import QueueFull
from overlay.values import Mode, Route


def check_room(waiting: int, slots: int, waiting_bytes: int, size: int, most_bytes: int) -> None:
    """Raises QueueFull when `size` more bytes, or one more request, do not fit."""
    if waiting >= slots:
        raise QueueFull(f"all {slots} queue slots are taken")
    if waiting and waiting_bytes + size > most_bytes:
        raise QueueFull(
            f"{waiting} waiting requests hold {waiting_bytes:,} of {most_bytes:,} bytes; "
            f"{size:,} more do not fit"
        )


def may_overtake(behind: Route, ahead: Route) -> bool:
    """Whether a request may start while an older one still waits for a place.

    Only if they cannot want the same slots; else a stream of the one kind would starve the other.
    """
    if behind.handler != ahead.handler and behind.handler and ahead.handler:
        return True
    return bool(behind.team and ahead.team and behind.team != ahead.team)


def retry_after_s(waiting: int, in_service: int, mean_service_s: float) -> float:
    """When a refused caller may find room: once a tenth of the queue has gone; 0.05 to 30 s."""
    pace = max(1, in_service) / max(mean_service_s, 0.001)
    return min(30.0, max(0.05, max(1, waiting) * 0.1 / pace))


def lane(route: Route) -> tuple[Mode, str, str, tuple[str, ...] | None]:
    """Requests of one lane want the same places, so only the oldest of a lane need be looked at."""
    return route.mode, route.team, route.handler, route.targets
