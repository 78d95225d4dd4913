"""What to ask a leader, again and again, about a job. Nothing here asks or sleeps itself, so that
threads and event loops share it.

JobWait     until the job is over
PartReader  until a part of its answer has been read
Patience    while the leader is away
"""

from __future__ import annotations

from overlay.client.job_status import JobStatus
from overlay.client.results import error_of
from overlay.model import clocks as time
from overlay.model.errors import DeadlinePassed, InvalidCall, NotReached, Unavailable
from overlay.model.segments import Code, Detail, Executed, Part
from overlay.transport.codec import pb2

WAIT_S = 20.0  # of one call that waits for a job's end
PART_TIMEOUT_S = 20.0  # of one call that reads a part
PAUSE_S = 0.2  # until a lost leader is asked again


class JobWait:
    """What to ask to learn the end of a job, and when to give up."""

    def __init__(
        self, id_: str, timeout_s: float | None, patience_s: float, wait_s: float = WAIT_S
    ) -> None:
        """patience_s: for a leader that is lost. wait_s: the longest that the leader keeps a
        question, until the job is over."""
        self._id = id_
        self._timeout_s = timeout_s
        self._until = None if timeout_s is None else time.monotonic() + timeout_s
        self._patience = Patience(patience_s, self._until)
        self._longest_s = wait_s
        self._wait_s = 0.0  # the first answer comes at once, and says whether there is such a job

    def next(self) -> tuple[pb2.ResultRequest, float]:
        """The question, and how many seconds its answer may take."""
        left_s = self._longest_s if self._until is None else self._until - time.monotonic()
        wait_s = max(0.0, min(self._wait_s, left_s))
        return pb2.ResultRequest(id=self._id, wait_s=wait_s), wait_s + 10.0

    def pause_s(self, error: Unavailable) -> float:
        """As of Patience."""
        return self._patience.pause_s(error)

    def is_over(self, status: JobStatus) -> bool:
        """Raises InvalidCall for a schedule, DeadlinePassed once the time is over."""
        self._wait_s = self._longest_s
        self._patience.answered()
        if status.is_over:
            return True
        if status.every_s:
            raise InvalidCall(f"{status.id} is a schedule, which has no end; its jobs have")
        if self._until is not None and time.monotonic() >= self._until:
            executed = Executed.UNKNOWN if status.attempts else Executed.NO
            why = f"job {status.id} is {status.state} after {self._timeout_s:g} s; it goes on"
            raise DeadlinePassed(why, executed=executed)
        return False


class PartReader:
    """What to ask to read the result of a part to its end."""

    def __init__(self, id_: str, part: Part, patience_s: float) -> None:
        self._id = id_
        self._part = part
        self._patience = Patience(patience_s)
        self._at = 0

    @property
    def is_over(self) -> bool:
        return self._at >= self._part.size

    def next(self) -> pb2.PartRequest:
        return pb2.PartRequest(id=self._id, process_id=self._part.process_id, at=self._at)

    def take(self, response: pb2.PartResponse) -> bytes:
        """Raises CallFailed if there is less than the job's answer says."""
        self._patience.answered()
        self._at += len(response.chunk)
        if not response.chunk or self._at > self._part.size:
            whose, size = self._part.process_id, self._part.size
            why = f"the part of {whose} has {self._at:,} bytes, and not {size:,}"
            raise error_of(Detail(Code.DATA_LOSS, why, Executed.YES), f"job {self._id}: {why}")
        return bytes(response.chunk)

    def pause_s(self, error: Unavailable) -> float:
        """As of Patience."""
        return self._patience.pause_s(error)


class Patience:
    """How long a leader that does not answer is asked again."""

    def __init__(self, patience_s: float, until: float | None = None) -> None:
        """until: monotonic seconds after which it is not, however short it has been away."""
        self._patience_s = patience_s
        self._until = until
        self._lost_at: float | None = None

    def answered(self) -> None:
        self._lost_at = None

    def pause_s(self, error: Unavailable) -> float:
        """The seconds until the next question, as this one was not answered. Raises the error if
        the leader has been lost for too long."""
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        is_late = self._until is not None and now > self._until
        if is_late or now - self._lost_at > self._patience_s:
            raise error
        return PAUSE_S * 2 if isinstance(error, NotReached) else PAUSE_S
