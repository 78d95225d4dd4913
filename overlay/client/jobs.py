"""Jobs at a client: submitting them, and the handle of each.

submit   calls that come while one is under way go together in the next: many callers share one
         commit of the leader's journal
result   asks again and again until the job is over, across a restart of the leader
parts    reads what is too large for one answer, from where it has got to
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from overlay.client.arguments import JobOptions, as_timeout
from overlay.client.job_status import JobStatus, answer_of, parts_of, read_job, result_of
from overlay.client.job_wait import PART_TIMEOUT_S, WAIT_S, JobWait, PartReader
from overlay.client.results import Answer, read_value
from overlay.model import clocks as time
from overlay.model.errors import CallCancelled, CallFailed, DeadlinePassed, Unavailable
from overlay.model.segments import Executed, Part
from overlay.transport.codec import pb2

ROWS, BYTES = 1024, 1024 * 1024  # of one Submit, at most, but for a single larger payload


class JobCalls(Protocol):
    """The RPCs, as Connection has them. Each raises CallFailed."""

    def submit_jobs(self, request: pb2.SubmitRequest, timeout_s: float) -> pb2.SubmitResponse: ...
    def job_result(self, request: pb2.ResultRequest, timeout_s: float) -> pb2.Job: ...
    def job_part(self, request: pb2.PartRequest, timeout_s: float) -> pb2.PartResponse: ...
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
        return answer_of(self.wait(timeout))

    def result(self, timeout: float | None = None) -> Any:
        """The result in its answer: bytes, or the JSON value that a typed function returned if it
        was submitted with `args`. Waits and raises like `answer`; InvalidCall if all workers were
        asked and it is in parts."""
        found = result_of(self.wait(timeout))
        result = found if isinstance(found, bytes) else b"".join(self.chunks(found))
        return read_value(result) if self._has_value else result

    def parts(self, timeout: float | None = None) -> Iterator[Part]:
        """Each worker's part of a job in parts, in the order of the configuration, also those
        without a result. A part is fetched when it is reached, and may be of any size; for one that
        does not fit into memory, see `chunks`. Waits and raises like `answer`; InvalidCall if the
        job is not in parts."""
        for part in parts_of(self.wait(timeout)):
            yield replace(part, result=b"".join(self.chunks(part)))

    def chunks(self, part: Part) -> Iterator[bytes]:
        """The result of a part of `answer().parts`, of a job in parts, a MiB at a time. While the
        leader is away, it is asked again, as by `wait`. Raises CallFailed."""
        reader = PartReader(self.id, part, self._calls.map_patience(None))
        while not reader.is_over:
            try:
                chunk = self._calls.job_part(reader.next(), PART_TIMEOUT_S)
            except Unavailable as e:
                time.sleep(reader.pause_s(e))
                continue
            yield reader.take(chunk)

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
