"""Jobs as a person reads them. Values in, text out; `now` is in seconds since 1970.

Times are the leader's, shown as local times. Where its clock is ahead of ours, no time is negative.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from overlay.cli.terminal import aligned
from overlay.cli.text import clean, counted, span
from overlay.client.job_status import JobChange, JobStatus
from overlay.model import clocks as time
from overlay.model.jobs import ENDED, JobState
from overlay.model.limits import MIB

STATES = tuple(state.name.lower() for state in JobState)
PRUNED = tuple(state.name.lower() for state in ENDED)
COLUMNS = ("id", "state", "handler", "accepted", "took", "attempts", "caller", "reason")
SCHEDULE_COLUMNS = ("schedule", "every", "next", "missed", "handler", "caller")
SHORTEST_REASON = 24  # columns; with less room it stands on a line of its own


# One job


def standing(job: JobStatus, now: float) -> str:
    """How it stands, on one line."""
    if job.every_s:
        missed = f", {job.missed:,} missed" if job.missed else ""
        return f"every {interval(job.every_s)}, next {clock(job.due, now)}{missed}"
    if job.state == "waiting":
        return ", ".join(["waiting", *_waiting(job, now)])
    which = f", attempt {job.attempts} of {job.max_attempts}," if job.max_attempts > 1 else ""
    if job.state == "running":
        far = f", {progress_of(job)}" if job.progress else ""
        return f"running{which} for {span(max(0.0, now - job.started))}{far}"
    took = _took(job, now)
    return f"{job.state} {clock(job.ended, now)}{f', took {took}' if took else ''}".strip()


def progress_of(job: JobStatus) -> str:
    """How far it has got, as its handler says it; empty if that says nothing."""
    if job.progress is None:
        return ""
    done, total, text = job.progress
    share = f" ({min(done / total, 1):.0%})" if total else ""
    counted_ = f"{done:,.6g} of {total:,.6g}{share}" if total else f"{done:,.6g}"
    return f"{counted_}: {text}" if text else counted_


def _waiting(job: JobStatus, now: float) -> Iterable[str]:
    if job.due > now:
        yield _due(job, now)
    elif job.position:
        yield f"position {'above ' if job.position_is_more else ''}{job.position:,}"
        if job.wait_s:
            yield f"about {span(job.wait_s)}"
    if job.expires:
        yield f"expires {clock(job.expires, now)}"


def _due(job: JobStatus, now: float) -> str:
    return f"{'next attempt' if job.reason else 'starts'} {clock(job.due, now)}"


def facts(job: JobStatus, now: float) -> list[tuple[str, str]]:
    """What there is to say besides its state and its answer."""
    attempts = f"{job.attempts} of {job.max_attempts}" if job.max_attempts > 1 else ""
    whom = "all workers" if job.mode == "all" else "any worker"
    team = f" of team {job.team}" if job.team else ""
    return [
        ("handler", f"{job.handler or '(default)'}, {whom}{team}"),
        ("attempts", attempts),
        ("story", "\n".join(f"{clock(at, now)}  {what}" for at, what in job.story)),
        ("key", job.key),
        ("job", job.id),
    ]


def error_id_of(reason: str) -> str:
    """By which its log lines are found; empty if there is none."""
    found = re.search(r"\berror id ([0-9a-f]{8})\b", reason)
    return found[1] if found else ""


def as_json(job: JobStatus) -> dict[str, Any]:
    """By the names of overlay.proto, without the answer; a time that there is not is null."""
    return {
        "id": job.id,
        "state": job.state,
        "handler": job.handler,
        "team": job.team,
        "mode": job.mode,
        "priority": job.priority,
        "caller": job.caller,
        "key": job.key,
        "accepted_s": job.accepted or None,
        "started_s": job.started or None,
        "ended_s": job.ended or None,
        "due_s": job.due or None,
        "expires_s": job.expires or None,
        "attempts": job.attempts,
        "max_attempts": job.max_attempts,
        "code": job.code.name,
        "reason": job.reason,
        "position": job.position,
        "position_is_more": job.position_is_more,
        "wait_s": job.wait_s or None,
        "progress": None
        if job.progress is None
        else dict(zip(("done", "total", "text"), job.progress, strict=True)),
        "story": [{"at_s": at, "text": what} for at, what in job.story],
        "schedule": job.schedule,
        "every_s": job.every_s or None,
        "missed": job.missed,
        "bytes": job.size,
        "in_parts": job.in_parts,
    }


# Several


def counts_line(counts: Mapping[str, int]) -> str:
    """How many there are, by state; those of which there are none are left out."""
    found = [f"{counts[state]:,} {state}" for state in STATES if counts[state]]
    if schedules := counts["schedules"]:
        found.append(counted(schedules, "schedule"))
    room = f"{counts['bytes'] / MIB:,.1f} of {counts['max_bytes'] / MIB:,.0f} MiB used"
    return f"{', '.join(found)}; {room}" if found else "no jobs"


def table(jobs: Iterable[JobStatus], now: float, width: int | None = None) -> list[str]:
    """A line for the head and one for each job; none for schedules. Empty without jobs.

    width: of a terminal. There, columns that say nothing are left out (the empty ones, and a caller
    that all have in common), and a reason is cut to the room that is left, or stands below.
    """
    rows = [_row(job, now) for job in jobs if not job.every_s]
    if width is None or not rows:
        return aligned(COLUMNS, rows) if rows else []
    columns = list(zip(COLUMNS[:-1], zip(*(row[:-1] for row in rows), strict=True), strict=True))
    columns = [
        (name, cells)
        for name, cells in columns
        if any(cells) and not (name == "caller" and len(set(cells)) == 1)
    ]
    heads = [name for name, _ in columns]
    cells = list(zip(*(cells for _, cells in columns), strict=True))
    lines, reasons = aligned(heads, cells), [row[-1] for row in rows]
    room = width - max(map(cell_len, lines)) - 2
    if not any(reasons):
        return lines
    if room >= SHORTEST_REASON:
        with_reasons = [
            (*row, cut(reason, room)) for row, reason in zip(cells, reasons, strict=True)
        ]
        return aligned([*heads, COLUMNS[-1]], with_reasons)
    found = [lines[0]]
    for line, reason in zip(lines[1:], reasons, strict=True):
        found += [line, f"  {cut(reason, width - 2)}"] if reason else [line]
    return found


def schedule_rows(jobs: Iterable[JobStatus], now: float) -> list[Sequence[str]]:
    return [
        (
            job.id,
            interval(job.every_s),
            clock(job.due, now),
            f"{job.missed:,}",
            job.handler or "(default)",
            job.caller,
        )
        for job in jobs
        if job.every_s
    ]


def complaints(change: JobChange, verb: str, unless: str) -> list[str]:
    """verb: what was to be done, for example "cancelled". unless: why some could not be."""
    found = []
    if change.unchanged:
        found.append(f"not {verb}, {unless}: {', '.join(change.unchanged)}")
    if change.unknown:
        found.append(
            f"no such job: {', '.join(change.unknown)}; a job is forgotten some time after its "
            "end, and only its caller and operators find it"
        )
    return found


def _row(job: JobStatus, now: float) -> tuple[str, ...]:
    due = _due(job, now) if job.state == "waiting" and job.due > now else ""
    why = "; ".join(filter(None, (due, clean(job.reason).replace("\n", " "))))
    return (
        job.id,
        job.state,
        job.handler or "(default)",
        clock(job.accepted, now, "%b %d %H:%M"),
        _took(job, now),
        f"{job.attempts}/{job.max_attempts}",
        job.caller,
        why,
    )


# Values


def clock(at: float, now: float, other_day: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A local time; other_day: the form of one that is not today's. Empty for 0."""
    if not at:
        return ""
    try:
        when = time.localtime(at)
        is_today = when[:3] == time.localtime(now)[:3]
        return time.strftime("%H:%M:%S" if is_today else other_day, when)
    except (ValueError, OverflowError, OSError):  # no date: others write what they like
        return "at an unknown time"


def interval(every_s: float) -> str:
    """In the largest unit of which it is a whole number."""
    for unit, size_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if every_s % size_s == 0:
            return f"{every_s / size_s:g} {unit}"
    return f"{every_s:g} s"


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def _took(job: JobStatus, now: float) -> str:
    """Of its last attempt."""
    if not job.started:
        return ""
    until = job.ended or (now if job.state == "running" else 0.0)
    took_s = max(0.0, until - job.started)
    if not until:
        return ""
    return f"{took_s * 1000:.0f} ms" if took_s < 1 else span(took_s, 1)
