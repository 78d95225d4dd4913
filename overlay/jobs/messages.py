"""Jobs as messages: what the RPCs of OverlayJobs say about them."""

from __future__ import annotations

from overlay.jobs.store import StoreLimits
from overlay.model.jobs import JobCounts, JobRecord, JobState
from overlay.transport.codec import pb2


def write_job(record: JobRecord, with_story: bool = False) -> pb2.Job:
    """Without its answer and its position."""
    asked = pb2.Request.FromString(record.request)
    job = pb2.Job(
        id=record.id,
        state=pb2.JobState.Name(record.state),
        handler=asked.handler,
        team=asked.team,
        mode=asked.mode,
        priority=record.priority,
        caller=record.caller.name or record.caller.address,
        key=record.key,
        accepted_s=record.accepted,
        started_s=record.started,
        ended_s=record.ended,
        due_s=record.due,
        expires_s=record.expires,
        attempts=record.attempts,
        max_attempts=record.max_attempts,
        code=int(record.code),
        reason=record.reason,
        schedule=record.schedule,
        every_s=record.every_s,
        missed=record.missed,
        bytes=record.size,
        in_parts=asked.in_parts,
    )
    if with_story:
        job.story.extend(pb2.JobEvent(at_s=at, text=text) for at, text in story(record))
    return job


def story(record: JobRecord) -> list[tuple[float, str]]:
    """What became of it, in order."""
    told = [(record.accepted, "accepted"), *record.story]
    if record.started and record.state in (JobState.RUNNING, JobState.DONE):
        told.append((record.started, f"attempt {record.attempts} started"))
    if record.state.is_over:
        at = record.ended or max(when for when, _ in told)  # a quarantined one may go on
        told.append((at, record.state.name.lower()))
    return sorted(told, key=lambda event: event[0])


def write_counts(message: pb2.JobCounts, counts: JobCounts, limits: StoreLimits) -> None:
    for state, count in zip(JobState, counts.states, strict=True):
        setattr(message, state.name.lower(), count)
    message.bytes, message.schedules = counts.size, counts.schedules
    message.max_jobs, message.max_bytes = limits.max_jobs, limits.max_bytes
