"""Jobs at a client: how they stand, and what becomes of them.

submit   calls that come while one is under way go together in the next: many callers share one
         commit of the leader's journal
result   asks again and again until the job is over, across a restart of the leader
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from overlay.client.arguments import JobOptions, as_timeout
from overlay.client.results import Answer, error_of, read_value
from overlay.model import clocks as time
from overlay.model.errors import (
    CallCancelled,
    CallFailed,
    DeadlinePassed,
    InvalidCall,
    JobExpired,
    JobQuarantined,
    NotReached,
    Unavailable,
)
from overlay.model.segments import Code, Detail, Executed
from overlay.transport import codec
from overlay.transport.codec import pb2

WAIT_S = 20.0  # of one call that waits for a job's end
PAUSE_S = 0.2  # until a lost leader is asked again
COUNTED = ("schedules", "bytes", "max_jobs", "max_bytes")  # beside the states
ROWS, BYTES = 1024, 1024 * 1024  # of one Submit, at most, but for a single larger payload


@dataclass(frozen=True)
class JobStatus:
    """How a job stands. Times are seconds since 1970 by the leader's clock; 0: not yet, or never.

    state: waiting, running, done, failed, quarantined, cancelled or expired. code, reason: of the
    error that ended it or its last attempt. position: while it waits, how many of its caller and
    kind go first, and itself; position_is_more: it is more than that. wait_s: about how long until
    it starts; 0: not known. progress: (done, total, text) while it runs, if its handler reports it;
    a total of 0 is not known. story: (when, what). answer: when it is done, if it was asked for.
    every_s, missed: of a schedule, seconds between its jobs and how many were left out.
    """

    id: str
    state: str
    handler: str
    team: str
    mode: str
    priority: int
    caller: str
    key: str
    accepted: float
    started: float
    ended: float
    due: float
    expires: float
    attempts: int
    max_attempts: int
    code: Code
    reason: str
    position: int
    position_is_more: bool
    wait_s: float
    story: tuple[tuple[float, str], ...]
    schedule: str
    every_s: float
    missed: int
    size: int
    progress: tuple[float, float, str] | None = None
    answer: Answer | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing happens to it any more by itself."""
        return self.state not in ("waiting", "running")

    def error(self) -> CallFailed:
        """Why it has no answer, as the library raises it."""
        kind = _ERRORS.get(self.state)
        if kind is not None:
            # It may have expired while it waited for another attempt.
            is_proof = kind is JobExpired and not self.attempts
            executed = Executed.NO if is_proof else Executed.UNKNOWN
            what = f"job {self.id} is {self.state}"
            return kind(f"{what}: {self.reason}" if self.reason else what, executed=executed)
        code = self.code if self.code is not Code.OK else Code.UNKNOWN
        executed = Executed.NO if self.state == "cancelled" and not self.attempts else Executed.YES
        return error_of(Detail(code, self.reason, executed), f"job {self.id}: {self.reason}")


_ERRORS: dict[str, type[CallFailed]] = {"quarantined": JobQuarantined, "expired": JobExpired}


class JobList(list[JobStatus]):
    """Jobs that were asked for. counts: how many the caller may see in all, by state; also
    `schedules`, their `bytes`, and the journal's bounds `max_jobs` and `max_bytes`."""

    def __init__(self, jobs: Iterable[JobStatus], counts: dict[str, int]) -> None:
        super().__init__(jobs)
        self.counts = counts


@dataclass(frozen=True)
class JobChange:
    """What became of a change: how many jobs it changed, the ids of those whose state did not allow
    it, and of those that the leader does not have."""

    changed: int
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]


class JobCalls(Protocol):
    """The RPCs, as Connection has them. Each raises CallFailed."""

    def submit_jobs(self, request: pb2.SubmitRequest, timeout_s: float) -> pb2.SubmitResponse: ...
    def job_result(self, request: pb2.ResultRequest, timeout_s: float) -> pb2.Job: ...
    def list_jobs(self, request: pb2.JobsRequest, timeout_s: float) -> pb2.JobsResponse: ...
    def change_jobs(self, request: pb2.ChangeRequest, timeout_s: float) -> pb2.ChangeResponse: ...
    def map_patience(self, patience_s: float | None) -> float: ...


class Job:
    """A job that the leader has accepted. Safe from any thread.

    has_value: it is a typed function's, so `result` gives the JSON value that it returned.
    """

    def __init__(self, calls: JobCalls, id_: str, has_value: bool = False) -> None:
        self.id = id_
        self._calls = calls
        self._has_value = has_value

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self, *, timeout: float | None = None) -> JobStatus:
        """How it stands now, without its answer. Raises CallFailed; NameNotFound if the leader does
        not know it, for example because it ended more than a day ago."""
        request = pb2.ResultRequest(id=self.id, without_answer=True)
        return read_job(self._calls.job_result(request, as_timeout(timeout)))

    @property
    def state(self) -> str:
        """waiting, running, done, failed, quarantined, cancelled or expired."""
        return self.status().state

    def wait(
        self,
        timeout: float | None = None,
        *,
        on_status: Callable[[JobStatus], None] | None = None,
    ) -> JobStatus:
        """Waits for its end and returns how it ended, with its answer.

        timeout: seconds; None: as long as it takes. on_status: told about once a second how it
        stands. While the leader is away, it is asked again for half a minute, or for the client's
        own patience if that is longer. Raises DeadlinePassed if the job is not over in time (it
        goes on), and CallFailed.
        """
        timeout_s = None if timeout is None else as_timeout(timeout)
        return wait_for(self._calls, self.id, timeout_s, on_status)

    def answer(self, timeout: float | None = None) -> Answer:
        """Its answer, as `call` would return it. Waits like `wait`.

        Raises the error that ended it, JobQuarantined, JobExpired, CallCancelled, and those of
        `wait`.
        """
        status = self.wait(timeout)
        if status.answer is None:
            raise status.error()
        return status.answer

    def result(self, timeout: float | None = None) -> Any:
        """The result in its answer: bytes, or the JSON value that a typed function returned if it
        was submitted with `args`. Waits and raises like `answer`."""
        result = self.answer(timeout).result
        return read_value(result) if self._has_value else result

    def cancel(self, *, timeout: float | None = None) -> bool:
        """Ends it where it waits or runs. Returns whether it was not over yet."""
        request = pb2.ChangeRequest(action=pb2.CANCEL, ids=[self.id])
        return bool(self._calls.change_jobs(request, as_timeout(timeout)).changed)


class JobSender:
    """Submits jobs. Of calls that come at the same time one sends for all. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Sent] = deque()
        self._is_sending = False

    def submit(
        self, calls: JobCalls, options: bytes, payload: bytes, key: str, timeout_s: float
    ) -> str:
        """The id of one job. options: a serialized SubmitRequest without payloads and keys; jobs
        with the same go together. Raises CallFailed."""
        mine = _Sent(options, payload, key, time.monotonic() + timeout_s)
        with self._lock:
            self._waiting.append(mine)
            mine.is_next = not self._is_sending
            self._is_sending = True
        if not mine.is_next:
            self._wait(mine, timeout_s)
        if not mine.is_over:
            self._send(calls, mine)
        if mine.error is not None:
            raise mine.error
        return mine.id

    def _wait(self, mine: _Sent, timeout_s: float) -> None:
        """Until it is sent, or it is this thread's turn to send."""
        try:
            in_time = mine.turn.acquire(timeout=timeout_s)
        except BaseException:  # Ctrl-C
            self._leave(mine)
            raise
        if not in_time and self._leave(mine):
            raise DeadlinePassed(f"not submitted within {timeout_s:g} s", executed=Executed.NO)
        if not in_time and not mine.is_next:
            mine.turn.acquire()  # it is being sent, with a deadline that is over now

    def _leave(self, mine: _Sent) -> bool:
        """Whether it was not sent, and never will be."""
        with self._lock:
            if mine not in self._waiting:
                return False
            self._waiting.remove(mine)
            following = self._following_locked() if mine.is_next else None
        if following is not None:
            following.turn.release()
        return True

    def _send(self, calls: JobCalls, mine: _Sent) -> None:
        """Sends this one, and those that go with it. Then somebody else has the turn."""
        with self._lock:
            batch, self._waiting = _batch(mine, self._waiting)
        try:
            request = pb2.SubmitRequest.FromString(mine.options)
            request.payloads.extend(one.payload for one in batch)
            request.keys.extend(one.key for one in batch if one.key)
            timeout_s = max(0.001, min(one.until for one in batch) - time.monotonic())
            ids = calls.submit_jobs(request, timeout_s).ids
            for one, id_ in zip(batch, ids, strict=True):
                one.id = id_
        except BaseException as e:  # noqa: BLE001 - Ctrl-C too: the others must not wait for ever
            for one in batch:
                one.error = e if one is mine else _for_another(e)
        finally:
            with self._lock:
                following = self._following_locked()
            for one in batch:
                one.is_over = True
                if one is not mine:
                    one.turn.release()
            if following is not None:
                following.turn.release()

    def _following_locked(self) -> _Sent | None:
        following = self._waiting[0] if self._waiting else None
        self._is_sending = following is not None
        if following is not None:
            following.is_next = True
        return following


class _Sent:
    """is_next: it is its thread's turn to send. turn: released then, or when it has been sent."""

    __slots__ = (
        "error", "id", "is_next", "is_over", "key", "options", "payload", "turn", "until",
    )  # fmt: skip

    def __init__(self, options: bytes, payload: bytes, key: str, until: float) -> None:
        self.options = options
        self.payload = payload
        self.key = key
        self.until = until
        self.id = ""
        self.error: BaseException | None = None
        self.is_next = self.is_over = False
        self.turn = threading.Lock()
        self.turn.acquire()


def _batch(mine: _Sent, waiting: deque[_Sent]) -> tuple[list[_Sent], deque[_Sent]]:
    """Those that go with `mine`, and the others in their order."""
    batch, left, size, keys = [mine], deque[_Sent](), len(mine.payload), {mine.key}
    for one in waiting:
        if one is mine:
            continue
        goes_along = one.options == mine.options and bool(one.key) == bool(mine.key)
        fits = len(batch) < ROWS and size + len(one.payload) <= BYTES
        if goes_along and fits and (not one.key or one.key not in keys):
            batch.append(one)
            keys.add(one.key)
            size += len(one.payload)
        else:
            left.append(one)
    return batch, left


def _for_another(error: BaseException) -> CallFailed:
    """The error for another thread, as each adds its own traceback."""
    if not isinstance(error, CallFailed):
        return CallCancelled("the call that submitted it was ended; it may have been accepted")
    copy = type(error)(
        str(error), code=error.code, executed=error.executed, retry_after_s=error.retry_after_s
    )
    copy.request_id = error.request_id
    return copy


def batches(
    payloads: Sequence[bytes], keys: Sequence[str]
) -> list[tuple[Sequence[bytes], Sequence[str]]]:
    """As many as one Submit takes."""
    found, begin, size = [], 0, 0
    for at, payload in enumerate(payloads):
        if at > begin and (at - begin >= ROWS or size + len(payload) > BYTES):
            found.append((payloads[begin:at], keys[begin:at]))
            begin, size = at, 0
        size += len(payload)
    if begin < len(payloads):
        found.append((payloads[begin:], keys[begin:]))
    return found


def submit_many(
    calls: JobCalls, options: JobOptions, bodies: Sequence[bytes], keys: Sequence[str]
) -> list[str]:
    """The ids of these jobs. Raises CallFailed; those before may have been accepted."""
    until = time.monotonic() + options.timeout_s
    ids: list[str] = []
    for some, their_keys in batches(bodies, keys):
        request = pb2.SubmitRequest.FromString(options.request)
        request.payloads.extend(some)
        request.keys.extend(key for key in their_keys if key)
        ids += calls.submit_jobs(request, max(0.001, until - time.monotonic())).ids
    return ids


def wait_for(
    calls: JobCalls,
    id_: str,
    timeout_s: float | None,
    on_status: Callable[[JobStatus], None] | None = None,
) -> JobStatus:
    """See Job.wait. on_status: told how it stands, about once a second."""
    wait = JobWait(id_, timeout_s, calls.map_patience(None), WAIT_S if on_status is None else 1.0)
    while True:
        request, limit_s = wait.next()
        try:
            found = read_job(calls.job_result(request, limit_s))
        except Unavailable as e:
            time.sleep(wait.pause_s(e))
            continue
        if wait.is_over(found):
            return found
        if on_status is not None:
            on_status(found)


class JobWait:
    """What to ask, again and again, to learn the end of a job, and when to give up. It asks and
    sleeps nowhere itself."""

    def __init__(
        self, id_: str, timeout_s: float | None, patience_s: float, wait_s: float = WAIT_S
    ) -> None:
        """patience_s: for a leader that is lost. wait_s: the longest that the leader keeps a
        question, until the job is over."""
        self._id = id_
        self._timeout_s = timeout_s
        self._until = None if timeout_s is None else time.monotonic() + timeout_s
        self._patience_s = patience_s
        self._longest_s = wait_s
        self._wait_s = 0.0  # the first answer comes at once, and says whether there is such a job
        self._lost_at: float | None = None

    def next(self) -> tuple[pb2.ResultRequest, float]:
        """The question, and how many seconds its answer may take."""
        left_s = self._longest_s if self._until is None else self._until - time.monotonic()
        wait_s = max(0.0, min(self._wait_s, left_s))
        return pb2.ResultRequest(id=self._id, wait_s=wait_s), wait_s + 10.0

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

    def is_over(self, status: JobStatus) -> bool:
        """Raises InvalidCall for a schedule, DeadlinePassed once the time is over."""
        self._lost_at, self._wait_s = None, self._longest_s
        if status.is_over:
            return True
        if status.every_s:
            raise InvalidCall(f"{status.id} is a schedule, which has no end; its jobs have")
        if self._until is not None and time.monotonic() >= self._until:
            executed = Executed.UNKNOWN if status.attempts else Executed.NO
            why = f"job {status.id} is {status.state} after {self._timeout_s:g} s; it goes on"
            raise DeadlinePassed(why, executed=executed)
        return False


def read_job(job: pb2.Job) -> JobStatus:
    answer = None
    if job.HasField("answer"):
        read = codec.read_response(job.answer)
        answer = Answer(job.answer.result, read.parts, read.hops, job.answer.request_id)
    return JobStatus(
        job.id,
        pb2.JobState.Name(job.state).lower(),
        job.handler,
        job.team,
        pb2.Mode.Name(job.mode).lower(),
        job.priority,
        job.caller,
        job.key,
        job.accepted_s,
        job.started_s,
        job.ended_s,
        job.due_s,
        job.expires_s,
        job.attempts,
        job.max_attempts,
        Code(job.code),
        job.reason,
        job.position,
        job.position_is_more,
        job.wait_s,
        tuple((event.at_s, event.text) for event in job.story),
        job.schedule,
        job.every_s,
        job.missed,
        job.bytes,
        (job.progress.done, job.progress.total, job.progress.text)
        if job.HasField("progress")
        else None,
        answer,
    )


def read_jobs(response: pb2.JobsResponse) -> JobList:
    found = response.counts
    names = (*(name.lower() for name in pb2.JobState.keys()), *COUNTED)  # noqa: SIM118 - no dict
    counts = {name: int(getattr(found, name)) for name in names}
    return JobList(map(read_job, response.jobs), counts)


def read_change(response: pb2.ChangeResponse) -> JobChange:
    return JobChange(response.changed, tuple(response.unchanged), tuple(response.unknown))
