"""What a client has been asked to send, and the outbox where it waits for room.

    put(submission) --> a line for each priority --> take()     the most urgent first

Owns no thread and needs no lock of its own: a line is a deque, whose ends are safe from any thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from overlay.model import clocks as time
from overlay.model.segments import Route
from overlay.queueing import admission

Deliver = Callable[[Sequence[int], Any, int, int], None]
"""Takes (rows, what came, at, request_id): rows of the submission; the Delivery that has them, from
its row `at` on, or the Detail that says why there is none; the first row's request id, which those
of the other rows follow, or 0 for rows that were not sent. Each row comes once, on the stream's or
the deadline thread; must be quick and must not raise."""


@dataclass(frozen=True)
class CallKind:
    """What requests of one segment share, apart from the deadline."""

    route: Route
    want_parts: bool = False
    priority: int = 0
    as_they_come: bool = False  # parts come before the answer


class Submission:
    """Requests that were given together. deadline, given: monotonic seconds."""

    __slots__ = (
        "attempt",
        "cancelled",
        "deadline",
        "deliver",
        "given",
        "is_patient",
        "keeps_trying",
        "kind",
        "on_partial",
        "payloads",
        "rows",
        "size",
        "wakes_a_thread",
    )

    def __init__(
        self,
        kind: CallKind,
        payloads: Sequence[bytes],
        deadline: float,
        deliver: Deliver,
        wakes_a_thread: bool = False,
        on_partial: Deliver | None = None,
    ) -> None:
        """on_partial: as `deliver`, for parts that come before their row's answer; any number of
        times for a row."""
        self.kind = kind
        self.on_partial = on_partial
        self.payloads = payloads
        self.deadline = deadline
        self.deliver = deliver
        self.wakes_a_thread = wakes_a_thread
        self.rows: Sequence[int] = _ONE if len(payloads) == 1 else range(len(payloads))
        self.size = sum(map(len, payloads))
        self.attempt = 0
        self.cancelled: set[int] = set()
        self.given = time.monotonic()
        self.is_patient = False  # waits for a place there until its owner takes it back
        # Whether rows that provably did not run are tried again beyond the budget of retries.
        self.keeps_trying: Callable[[], bool] = _never

    def part(self, rows: Sequence[int], attempt: int) -> Submission:
        """A submission of some of its rows."""
        whose = self.deliver, self.wakes_a_thread, self.on_partial
        made = Submission(self.kind, self.payloads, self.deadline, *whose)
        made.rows, made.attempt, made.cancelled = rows, attempt, self.cancelled
        made.given, made.is_patient = self.given, self.is_patient
        made.keeps_trying = self.keeps_trying
        made.size = sum(len(self.payloads[row]) for row in rows)
        return made


_ONE = (0,)


def _never() -> bool:
    return False


class Outbox:
    """What is still to be sent: the most urgent first, as overlay.queueing.admission ranks it."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Submission]] = {0: deque()}  # by priority

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def put(self, submission: Submission) -> None:
        self._line_of(submission).append(submission)

    def put_back(self, submission: Submission) -> None:
        """Puts back what was taken last, or the rest of it."""
        self._line_of(submission).appendleft(submission)

    def first(self) -> Submission:
        """The one that `take` would return now. Raises IndexError when there is none."""
        return self._first_line()[0]

    def take(self) -> Submission:
        """Raises IndexError when there is none."""
        return self._first_line().popleft()

    def remove(self, submission: Submission) -> None:
        """Raises ValueError when it has left."""
        self._line_of(submission).remove(submission)

    def all(self) -> list[Submission]:
        return [submission for line in list(self._lines.values()) for submission in line.copy()]

    def _line_of(self, submission: Submission) -> deque[Submission]:
        line = self._lines.get(submission.kind.priority)
        return self._lines.setdefault(submission.kind.priority, deque()) if line is None else line

    def _first_line(self) -> deque[Submission]:
        if len(self._lines) == 1:
            return self._lines[0]
        heads = []
        for priority, line in list(self._lines.items()):
            try:
                heads.append((admission.urgency(line[0].given, priority), -priority, line))
            except IndexError:  # it is empty
                continue
        return min(heads)[2] if heads else self._lines[0]
