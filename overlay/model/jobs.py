"""A job as values: its states, what it is made from, and how it stands.

A job is a request that is accepted once it is on the leader's disk, and whose answer is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from overlay.model.errors import BadRequest
from overlay.model.segments import Caller, Code


class JobState(IntEnum):
    """By their numbers on the wire. RUNNING: handed to the overlay. QUARANTINED: it may have run,
    and is not started again unless it is released."""

    WAITING = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3
    QUARANTINED = 4
    CANCELLED = 5
    EXPIRED = 6

    @property
    def is_over(self) -> bool:
        """Whether nothing happens to it any more by itself."""
        return self not in (JobState.WAITING, JobState.RUNNING)


MARK_BITS = 24  # of an id, made by chance
SCHEDULE_BIT = 1 << 39  # of a number that is a schedule's
ENDED = (JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)
"""What is forgotten after the time that the configuration gives; a quarantined job is kept."""


@dataclass(frozen=True)
class JobSpec:
    """What is submitted. Times are seconds since 1970, durations seconds.

    request: a serialized Request without its payload; equal for jobs that ask the same. key: says
    that running it twice does no harm. limit_s: of one attempt. due: not started before. expires:
    not started after; None: never. every_s: of a schedule, which makes such a job again and again.
    """

    request: bytes
    payload: bytes
    handler: str = ""
    key: str = ""
    priority: int = 0
    limit_s: float = 3600.0
    max_attempts: int = 1
    due: float = 0.0
    expires: float | None = None
    every_s: float = 0.0


class TakenJob(NamedTuple):
    """A job that has been marked as running, to be started."""

    number: int
    kind: int  # equal for jobs of one caller that ask the same
    caller: Caller
    request: bytes
    payload: bytes
    limit_s: float
    attempts: int  # with this one
    max_attempts: int
    priority: int


class WorkProgress(NamedTuple):
    """How far a handler has got with a request, by its own count. total: 0 if it is not known."""

    request_id: int
    done: float
    total: float = 0.0
    text: str = ""


MAX_PROGRESS_TEXT = 200  # characters
MAX_PROGRESS = 500  # requests whose progress is kept until it is passed on, or read of one frame
MAX_ATTEMPTS = 100  # of a job


class JobEnd(NamedTuple):
    """What an attempt made of a job.

    state: WAITING to start it again, at `due`. counts: whether the attempt counts, as it may have
    run. answer: a serialized Response; of a job in parts without the results.
    """

    state: JobState
    code: Code = Code.OK
    reason: str = ""
    answer: bytes | None = None
    due: float = 0.0
    counts: bool = True


@dataclass(frozen=True)
class JobRecord:
    """How a job stands. Times are seconds since 1970; 0: not yet, or never.

    code, reason: of the last attempt that failed. size: bytes of its payload and answer. answer: a
    serialized Response. story: (when, what).
    """

    id: str
    state: JobState
    caller: Caller
    request: bytes
    key: str = ""
    priority: int = 0
    accepted: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    due: float = 0.0
    expires: float = 0.0
    attempts: int = 0
    max_attempts: int = 1
    code: Code = Code.OK
    reason: str = ""
    size: int = 0
    answer: bytes | None = None
    story: tuple[tuple[float, str], ...] = ()
    schedule: str = ""
    every_s: float = 0.0
    missed: int = 0


@dataclass(frozen=True)
class JobCounts:
    """Of the jobs in a journal now, by state. size: bytes of their payloads and answers."""

    states: tuple[int, ...] = (0,) * len(JobState)
    size: int = 0
    schedules: int = 0


def job_id(number: int, mark: int) -> str:
    """16 hexadecimal digits: which job of the journal it is, and six digits made by chance, so that
    an id of another journal is not taken for one of this."""
    return f"{number:010x}{mark:06x}"


def is_job_id(text: str) -> bool:
    """Whether it has the form of one."""
    return len(text) == 16 and set(text) <= set("0123456789abcdef")


def numbers_of(id_: str) -> tuple[int, int]:
    """Raises BadRequest for what is not the id of a job."""
    if is_job_id(id_):
        return int(id_[:10], 16), int(id_[10:], 16)
    raise BadRequest(f"'{ascii(id_[:20])[1:-1]}' is not the id of a job, 16 digits from 0 to f")
