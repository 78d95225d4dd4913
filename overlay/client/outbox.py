"""What a client has been asked to send: orders, and the outbox where they wait for room.

    put(order) --> a line for each priority --> take()     the most urgent first

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
"""(rows of the order, what came for them or the Failure that says why nothing did, the first one's
row in what came, its request id, after which those of the others come; 0 for what was not sent).
Each row comes once, on the pipe's or the deadline thread; must
be quick and must not raise."""


@dataclass(frozen=True)
class CallKind:
    """What requests that travel together share, but for the deadline."""

    route: Route
    want_parts: bool = False
    priority: int = 0
    as_they_come: bool = False  # parts before the answer


class Submission:
    """Requests that were given together. deadline, given: monotonic seconds."""

    __slots__ = (
        "attempt",
        "cancelled",
        "deadline",
        "deliver",
        "early",
        "given",
        "is_patient",
        "keeps_trying",
        "kind",
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
        early: Deliver | None = None,
    ) -> None:
        """early: gets what comes before the answers, any number of times, as `deliver` those."""
        self.kind = kind
        self.early = early
        self.payloads = payloads
        self.deadline = deadline
        self.deliver = deliver
        self.wakes_a_thread = wakes_a_thread
        self.rows: Sequence[int] = _ONE if len(payloads) == 1 else range(len(payloads))
        self.size = sum(map(len, payloads))
        self.attempt = 0
        self.cancelled: set[int] = set()
        self.given = time.monotonic()
        self.is_patient = False  # whose owner takes it back when it has waited for too long
        # Whether what provably did not run is tried again, beyond what any call may have of that.
        self.keeps_trying: Callable[[], bool] = _never

    def part(self, rows: Sequence[int], attempt: int) -> Submission:
        """Some of its rows, as an order to be sent for themselves."""
        whose = self.deliver, self.wakes_a_thread, self.early
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
    """What is still to be sent: the most urgent first, as overlay.queueing.admission says."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Submission]] = {0: deque()}  # by priority

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def put(self, order: Submission) -> None:
        self._line_of(order).append(order)

    def put_back(self, order: Submission) -> None:
        """What was taken last, or the rest of it."""
        self._line_of(order).appendleft(order)

    def first(self) -> Submission:
        """The one that `take` would give now. Raises IndexError when there is none."""
        return self._first_line()[0]

    def take(self) -> Submission:
        """Raises IndexError when there is none."""
        return self._first_line().popleft()

    def remove(self, order: Submission) -> None:
        """Raises ValueError when it has left."""
        self._line_of(order).remove(order)

    def all(self) -> list[Submission]:
        return [order for line in list(self._lines.values()) for order in line.copy()]

    def _line_of(self, order: Submission) -> deque[Submission]:
        line = self._lines.get(order.kind.priority)
        return self._lines.setdefault(order.kind.priority, deque()) if line is None else line

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
