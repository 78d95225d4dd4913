"""A client's submissions, and the outbox where they wait to be sent.

    put(submission) --> a queue for each priority --> take()     the most urgent first

Owns no thread and needs no lock: a queue is a deque, whose ends are safe from any thread.
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
"""Called with (rows, delivered, at, request_id): the rows of the submission; a Delivery that has
their results from its row `at` on, or a Detail that says why there are none; the request id of the
first row, 0 if it was not sent (the ids of the other rows follow). Called once for each row, on
the stream's or the deadline thread; must be quick and must not raise."""


@dataclass(frozen=True)
class CallKind:
    """The properties, apart from the deadline, that all requests of a segment share."""

    route: Route
    want_parts: bool = False
    priority: int = 0
    as_they_come: bool = False  # parts are delivered before the answer


class Submission:
    """Requests that were submitted together. deadline, submitted_at: monotonic seconds."""

    __slots__ = (
        "attempt",
        "cancelled",
        "deadline",
        "deliver",
        "is_patient",
        "keeps_trying",
        "kind",
        "on_partial",
        "payloads",
        "rows",
        "size",
        "submitted_at",
    )

    def __init__(
        self,
        kind: CallKind,
        payloads: Sequence[bytes],
        deadline: float,
        deliver: Deliver,
        on_partial: Deliver | None = None,
    ) -> None:
        """on_partial: like `deliver`, for parts before their row's answer; any number of times."""
        self.kind = kind
        self.on_partial = on_partial
        self.payloads = payloads
        self.deadline = deadline
        self.deliver = deliver
        self.rows: Sequence[int] = _ONE if len(payloads) == 1 else range(len(payloads))
        self.size = sum(map(len, payloads))
        self.attempt = 0
        self.cancelled: set[int] = set()
        self.submitted_at = time.monotonic()
        self.is_patient = False  # waits for a place at the process until its owner takes it back
        # Whether rows that provably did not run are retried beyond the retry budget.
        self.keeps_trying: Callable[[], bool] = _never

    def part(self, rows: Sequence[int], attempt: int) -> Submission:
        """A submission of some of its rows."""
        made = Submission(self.kind, self.payloads, self.deadline, self.deliver, self.on_partial)
        made.rows, made.attempt, made.cancelled = rows, attempt, self.cancelled
        made.submitted_at, made.is_patient = self.submitted_at, self.is_patient
        made.keeps_trying = self.keeps_trying
        made.size = sum(len(self.payloads[row]) for row in rows)
        return made


_ONE = (0,)


def _never() -> bool:
    return False


class Outbox:
    """Unsent submissions, the most urgent first, as overlay.queueing.admission ranks them."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[Submission]] = {0: deque()}  # by priority

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return any(self._queues.values())

    def put(self, submission: Submission) -> None:
        self._queue_of(submission).append(submission)

    def put_back(self, submission: Submission) -> None:
        """Puts back the submission taken last, or the rest of it."""
        self._queue_of(submission).appendleft(submission)

    def first(self) -> Submission:
        """The submission that `take` would return. Raises IndexError if there is none."""
        return self._first_queue()[0]

    def take(self) -> Submission:
        """Raises IndexError if there is none."""
        return self._first_queue().popleft()

    def remove(self, submission: Submission) -> None:
        """Raises ValueError if it is no longer here."""
        self._queue_of(submission).remove(submission)

    def all(self) -> list[Submission]:
        return [submission for queue in list(self._queues.values()) for submission in queue.copy()]

    def _queue_of(self, submission: Submission) -> deque[Submission]:
        queue = self._queues.get(submission.kind.priority)
        return (
            self._queues.setdefault(submission.kind.priority, deque()) if queue is None else queue
        )

    def _first_queue(self) -> deque[Submission]:
        if len(self._queues) == 1:
            return self._queues[0]
        heads = []
        for priority, queue in list(self._queues.items()):
            try:
                heads.append((admission.urgency(queue[0].submitted_at, priority), -priority, queue))
            except IndexError:  # it is empty
                continue
        return min(heads)[2] if heads else self._queues[0]
