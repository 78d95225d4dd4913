"""How jobs stand, as a client has it: values, and how they are read from the leader's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from overlay.client.results import Answer, error_of
from overlay.model.errors import CallFailed, InvalidCall, JobExpired, JobQuarantined
from overlay.model.segments import Code, Detail, Executed, Part
from overlay.transport import codec
from overlay.transport.codec import pb2

COUNTED = ("schedules", "bytes", "max_jobs", "max_bytes")  # beside the states


@dataclass(frozen=True)
class JobStatus:
    """How a job stands. Times are seconds since 1970 by the leader's clock; 0: not yet, or never.

    state: waiting, running, done, failed, quarantined, cancelled or expired. code, reason: of the
    error that ended it or its last attempt. position: while it waits, how many of its caller and
    kind go first, and itself; position_is_more: it is more than that. wait_s: about how long until
    it starts; 0: not known. progress: (done, total, text) while it runs, if its handler reports it;
    a total of 0 is not known. story: (when, what). answer: when it is done, if it was asked for.
    every_s, missed: of a schedule, seconds between its jobs and how many were left out. in_parts:
    its answer has no results, but parts with a size; see Job.parts.
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
    in_parts: bool = False

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


def answer_of(status: JobStatus) -> Answer:
    """Raises what ended the job if it has none."""
    if status.answer is None:
        raise status.error()
    return status.answer


def result_of(status: JobStatus) -> bytes | Part:
    """The result, or whose part it is, of a job in parts. Raises what ended the job, and
    InvalidCall if there are several parts."""
    answer = answer_of(status)
    if not status.in_parts:
        return answer.result
    if status.mode == "all":
        raise InvalidCall(f"the answer of job {status.id} is in parts: read them with `parts`")
    return next(part for part in answer.parts if part.ok)


def parts_of(status: JobStatus) -> Sequence[Part]:
    """Raises what ended the job, and InvalidCall if it is not in parts."""
    answer = answer_of(status)
    if not status.in_parts:
        raise InvalidCall(f"job {status.id} was not submitted with in_parts: it has one result")
    return answer.parts


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
        job.in_parts,
    )


def read_jobs(response: pb2.JobsResponse) -> JobList:
    found = response.counts
    names = (*(name.lower() for name in pb2.JobState.keys()), *COUNTED)  # noqa: SIM118 - no dict
    counts = {name: int(getattr(found, name)) for name in names}
    return JobList(map(read_job, response.jobs), counts)


def read_change(response: pb2.ChangeResponse) -> JobChange:
    return JobChange(response.changed, tuple(response.unchanged), tuple(response.unknown))
