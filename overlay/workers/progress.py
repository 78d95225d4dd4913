"""What handlers say about how far they have got: the latest of each request, until it is passed on.

    context.progress(done, total, text) --> note --> the book --> every 0.2 s to the processes above

In a handler's own process `note` sends it to the worker's process, over the pipe.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from overlay.model.jobs import MAX_PROGRESS, MAX_PROGRESS_TEXT, WorkProgress

Sink = Callable[[WorkProgress], None]


def note(request_id: int, done: float, total: float, text: str) -> None:
    """Raises TypeError or ValueError that names the argument."""
    made = WorkProgress(request_id, _number("done", done), _number("total", total), _text(text))
    if (sink := _sink) is not None:
        sink(made)


def send_to(sink: Sink) -> None:
    """Where this process's handlers' progress goes from now on."""
    global _sink
    _sink = sink


class ProgressBook:
    """Thread-safe. on_note: called after each note; must be quick."""

    def __init__(self, on_note: Callable[[], None]) -> None:
        self._on_note = on_note
        self._lock = threading.Lock()
        self._latest: dict[int, WorkProgress] = {}

    def note(self, progress: WorkProgress) -> None:
        with self._lock:
            self._latest.pop(progress.request_id, None)
            self._latest[progress.request_id] = progress
            if len(self._latest) > MAX_PROGRESS:
                del self._latest[next(iter(self._latest))]
        self._on_note()

    def take(self) -> list[WorkProgress]:
        """What is new since the last time."""
        with self._lock:
            latest, self._latest = self._latest, {}
        return list(latest.values())


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a number from 0, not {number:g}")
    return number


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    return text[:MAX_PROGRESS_TEXT].encode("utf-8", "replace").decode()


_sink: Sink | None = None
