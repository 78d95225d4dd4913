"""What people read about jobs, and how they write times: by table."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from overlay.cli import job_text, result, submit, usage
from overlay.cli.terminal import Exit
from overlay.client import sync as library
from overlay.client.job_status import JobChange, JobStatus
from overlay.client.results import Answer
from overlay.model.segments import Code, Executed, Part

NOON = datetime(2026, 11, 28, 12, 0, 0).timestamp()
H, DAY = 3600, 86_400
ID = "00000000010a492a"
JOB = JobStatus(
    id=ID,
    state="waiting",
    handler="shout",
    team="",
    mode="any",
    priority=0,
    caller="anna",
    key="",
    accepted=NOON - 60,
    started=0.0,
    ended=0.0,
    due=0.0,
    expires=0.0,
    attempts=0,
    max_attempts=1,
    code=Code.OK,
    reason="",
    position=0,
    position_is_more=False,
    wait_s=0.0,
    story=(),
    schedule="",
    every_s=0.0,
    missed=0,
    size=0,
)


def job(**changes: Any) -> JobStatus:
    return replace(JOB, **changes)


# How a job stands


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "waiting"),
        ({"position": 12, "wait_s": 40.2}, "waiting, position 12, about 40 s"),
        ({"position": 1}, "waiting, position 1"),
        ({"position": 10_000, "position_is_more": True}, "waiting, position above 10,000"),
        ({"due": NOON + 10 * H}, "waiting, starts 22:00:00"),
        ({"due": NOON + DAY}, "waiting, starts 2026-11-29 12:00:00"),
        ({"due": NOON + 2, "reason": "lost"}, "waiting, next attempt 12:00:02"),
        ({"due": NOON - 2, "position": 3}, "waiting, position 3"),
        ({"position": 3, "expires": NOON + H}, "waiting, position 3, expires 13:00:00"),
        ({"state": "running", "started": NOON - 12, "attempts": 1}, "running for 12 s"),
        ({"state": "running", "started": NOON + 5, "attempts": 1}, "running for 0 s"),
        (
            {"state": "running", "started": NOON - 200, "attempts": 2, "max_attempts": 3},
            "running, attempt 2 of 3, for 3 min",
        ),
        (
            {"state": "running", "started": NOON - 9, "progress": (1200.0, 4000.0, "page 7")},
            "running for 9 s, 1,200 of 4,000 (30%): page 7",
        ),
        (
            {"state": "running", "started": NOON - 9, "progress": (2.5, 0.0, "")},
            "running for 9 s, 2.5",
        ),
        (
            {"state": "done", "started": NOON - 3, "ended": NOON - 1.5},
            "done 11:59:58, took 1.5 s",
        ),
        (
            {"state": "failed", "started": NOON - 1, "ended": NOON - 0.75},
            "failed 11:59:59, took 250 ms",
        ),
        ({"state": "cancelled", "ended": NOON}, "cancelled 12:00:00"),
        ({"state": "quarantined", "started": NOON - 9}, "quarantined"),
        ({"every_s": H, "due": NOON + 10 * H}, "every 1 h, next 22:00:00"),
        ({"every_s": 90, "due": NOON, "missed": 1234}, "every 90 s, next 12:00:00, 1,234 missed"),
    ],
)
def test_how_a_job_stands_is_one_line(changes: dict[str, Any], text: str) -> None:
    assert job_text.standing(job(**changes), NOON) == text


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, {"handler": "shout, any worker", "job": ID}),
        ({"handler": "", "mode": "all"}, {"handler": "(default), all workers", "job": ID}),
        (
            {"team": "pink", "key": "k", "attempts": 2, "max_attempts": 3},
            {
                "handler": "shout, any worker of team pink",
                "attempts": "2 of 3",
                "key": "k",
                "job": ID,
            },
        ),
        (
            {"story": ((NOON, "accepted"), (NOON + 1, "done"))},
            {
                "handler": "shout, any worker",
                "story": "12:00:00  accepted\n12:00:01  done",
                "job": ID,
            },
        ),
    ],
)
def test_the_facts_of_a_job(changes: dict[str, Any], facts: dict[str, str]) -> None:
    found = job_text.facts(job(**changes), NOON)

    assert {label: value for label, value in found if value} == facts


@pytest.mark.parametrize(
    ("reason", "error_id"),
    [
        ("C: handler 'boom' failed; error id 43cc1533 in this worker's log", "43cc1533"),
        ("the leader ended while it ran", ""),
        ("error id 43cc15330", ""),
        ("", ""),
    ],
)
def test_the_error_id_in_a_reason_is_found(reason: str, error_id: str) -> None:
    assert job_text.error_id_of(reason) == error_id


def test_json_has_null_for_times_that_there_are_not() -> None:
    found = job_text.as_json(job(started=NOON))

    assert (found["accepted_s"], found["started_s"], found["ended_s"]) == (NOON - 60, NOON, None)
    assert (found["state"], found["code"], found["every_s"]) == ("waiting", "OK", None)


ANSWER = Answer(b"x", (Part("C", Code.OK),), ("C",), 1)
HALF = Answer(b"x", (Part("C", Code.OK), Part("D", Code.UNAVAILABLE)), ("C",), 1)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"state": "waiting"}, Exit.LATE),
        ({"state": "running"}, Exit.LATE),
        ({"every_s": H}, Exit.LATE),
        ({"state": "done", "answer": ANSWER}, Exit.OK),
        ({"state": "done", "answer": HALF}, Exit.INCOMPLETE),
        ({"state": "failed"}, Exit.FAILED),
        ({"state": "quarantined"}, Exit.FAILED),
        ({"state": "cancelled"}, Exit.FAILED),
        ({"state": "expired"}, Exit.FAILED),
    ],
)
def test_each_state_has_its_exit_code(changes: dict[str, Any], code: Exit) -> None:
    assert result.exit_of(job(**changes)) is code


# Several


COUNTS = dict.fromkeys((*job_text.STATES, "schedules", "bytes", "max_jobs"), 0) | {
    "max_bytes": 1 << 30
}


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({}, "no jobs"),
        ({"done": 1200, "bytes": 1 << 19}, "1,200 done; 0.5 of 1,024 MiB used"),
        (
            {"waiting": 3, "failed": 1, "schedules": 1},
            "3 waiting, 1 failed, 1 schedule; 0.0 of 1,024 MiB used",
        ),
        ({"schedules": 2}, "2 schedules; 0.0 of 1,024 MiB used"),
    ],
)
def test_the_counts_are_one_line(counts: dict[str, int], line: str) -> None:
    assert job_text.counts_line({**COUNTS, **counts}) == line


DONE = job(state="done", started=NOON - 60, ended=NOON - 59, attempts=1, accepted=NOON - 60)
FAILED = job(
    id="00000000020a492a",
    state="failed",
    accepted=NOON - DAY,
    started=NOON - 2,
    ended=NOON - 1.9,
    attempts=1,
    max_attempts=3,
    reason="C: handler 'boom' failed;\nerror id 43cc1533 in this worker's log",
)
SCHEDULE = job(id="80000000017406dd", every_s=H, due=NOON + H, missed=2)


@pytest.mark.parametrize(
    ("jobs", "width", "lines"),
    [
        ([], None, []),
        ([SCHEDULE], 80, []),
        (
            [DONE],
            None,
            [
                "id                state  handler  accepted  took   attempts  caller  reason",
                "00000000010a492a  done   shout    11:59:00  1.0 s  1/1       anna",
            ],
        ),
        (
            [DONE],
            80,
            [
                "id                state  handler  accepted  took   attempts",
                "00000000010a492a  done   shout    11:59:00  1.0 s  1/1",
            ],
        ),
        (
            [DONE, replace(FAILED, caller="bert")],
            110,
            [
                "id                state   handler  accepted      took    attempts  caller  reason",
                "00000000010a492a  done    shout    11:59:00      1.0 s   1/1       anna",
                "00000000020a492a  failed  shout    Nov 27 12:00  100 ms  1/3       bert    "
                "C: handler 'boom' failed; error...",
            ],
        ),
        (
            [DONE, FAILED],
            80,
            [
                "id                state   handler  accepted      took    attempts",
                "00000000010a492a  done    shout    11:59:00      1.0 s   1/1",
                "00000000020a492a  failed  shout    Nov 27 12:00  100 ms  1/3",
                "  C: handler 'boom' failed; error id 43cc1533 in this worker's log",
            ],
        ),
        (
            [job(due=NOON + 10 * H)],
            120,
            [
                "id                state    handler  accepted  attempts  reason",
                "00000000010a492a  waiting  shout    11:59:00  0/1       starts 22:00:00",
            ],
        ),
    ],
)
def test_a_table_says_no_more_than_a_terminal_has_room_for(
    jobs: list[JobStatus], width: int | None, lines: list[str]
) -> None:
    assert job_text.table(jobs, NOON, width) == lines


def test_in_a_pipe_no_reason_is_cut() -> None:
    _, line = job_text.table([replace(FAILED, reason="why " * 200)], NOON)

    assert line.endswith(("why " * 200).rstrip())


def test_schedules_have_a_table_of_their_own() -> None:
    assert job_text.schedule_rows([DONE, SCHEDULE], NOON) == [
        ("80000000017406dd", "1 h", "13:00:00", "2", "shout", "anna")
    ]


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (JobChange(2, (), ()), []),
        (JobChange(0, ("a", "b"), ()), ["not cancelled, as it is over: a, b"]),
        (
            JobChange(0, (), ("c",)),
            [
                "no such job: c; a job is forgotten some time after its end, and only its caller "
                "and operators find it"
            ],
        ),
    ],
)
def test_what_a_change_could_not_do_is_said(change: JobChange, sentences: list[str]) -> None:
    assert job_text.complaints(change, "cancelled", "as it is over") == sentences


UNKNOWN = library.Unavailable("lost", executed=Executed.UNKNOWN)
REFUSED = library.Refused("full", executed=Executed.NO)
AGAIN = "; the same command again submits nothing twice"
MAYBE = "; it may have been accepted: the verb jobs shows the newest"


@pytest.mark.parametrize(
    ("error", "accepted", "has_key", "remark"),
    [
        (REFUSED, 0, False, ""),
        (REFUSED, 0, True, ""),
        (REFUSED, 1000, False, "; 1000 jobs before it accepted"),
        (REFUSED, 1000, True, f"; 1000 jobs before it accepted{AGAIN}"),
        (UNKNOWN, 0, False, MAYBE),
        (UNKNOWN, 0, True, f"{MAYBE}{AGAIN}"),
        (library.NotReached("nobody"), 0, False, ""),
    ],
)
def test_a_failed_submit_says_what_was_accepted(
    error: library.CallFailed, accepted: int, has_key: bool, remark: str
) -> None:
    assert submit._doubt(error, accepted, has_key) == remark


PAUSE = library.NOTHING_YET


@pytest.mark.parametrize(
    ("lines", "sizes"),
    [
        ([], []),
        ([b"a", b"b"], [2]),
        ([PAUSE, b"a", PAUSE, PAUSE, b"b", b"c"], [1, 2]),
        ([b"x"] * 2500, [1000, 1000, 500]),
        ([b"x", b"y" * (1 << 20), b"z"], [1, 1, 1]),
    ],
)
def test_lines_go_together_as_they_come(lines: list[Any], sizes: list[int]) -> None:
    found = list(submit._batches(iter(lines)))

    assert [len(some) for some in found] == sizes
    assert [line for some in found for line in some] == [x for x in lines if x is not PAUSE]


# Times


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (NOON, "12:00:00"),
        (NOON - DAY, "2026-11-27 12:00:00"),
        (0.0, ""),
        (1e300, "at an unknown time"),
    ],
)
def test_a_time_has_its_date_unless_that_is_todays(at: float, text: str) -> None:
    assert job_text.clock(at, NOON) == text


@pytest.mark.parametrize(
    ("every_s", "text"),
    [(1, "1 s"), (90, "90 s"), (900, "15 min"), (H, "1 h"), (36 * H, "36 h"), (2 * DAY, "2 d")],
)
def test_an_interval_is_in_its_largest_unit(every_s: float, text: str) -> None:
    assert job_text.interval(every_s) == text


@pytest.mark.parametrize(
    ("text", "span_s"),
    [("90", 90), ("90s", 90), ("0.5", 0.5), ("15m", 900), ("1.5h", 5400), ("2d", 2 * DAY)],
)
def test_a_duration_is_a_number_with_a_unit(text: str, span_s: float) -> None:
    assert usage.duration(text) == span_s


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-1", "5x", "1 h", "h", "367d", "1e9", "٣s", "1.h"]
)
def test_what_is_no_duration_is_rejected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a duration such as 90s, 15m"):
        usage.duration(text)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("22:00", NOON + 10 * H),
        ("22:00:30", NOON + 10 * H + 30),
        ("12:00", NOON + DAY),
        ("11:59", NOON + DAY - 60),
        ("2026-11-29T12:00", NOON + DAY),
        ("2026-11-29 12:00:05", NOON + DAY + 5),
    ],
)
def test_a_time_is_a_date_and_time_or_the_next_oclock(text: str, at: float) -> None:
    assert usage.moment(text, NOON) == at


def test_a_time_may_name_its_zone() -> None:
    assert usage.moment("2026-11-30T00:00Z", NOON) == 1795996800
    assert usage.moment("2026-11-30T00:00+01:00", NOON) == 1795996800 - H


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("25:00", "is not a time such as 22:00 or 2026-11-28T22:00"),
        ("22", "is not a time such as"),
        ("2:00", "is not a time such as"),
        ("2026-11-31T12:00", "is not a time such as"),
        ("2026-11-29", "is not a time such as"),
        ("tomorrow", "is not a time such as"),
        ("", "is not a time such as"),
        ("2026-11-28T12:00", "is in the past"),
        ("2020-01-01T00:00", "is in the past"),
    ],
)
def test_what_is_no_time_to_come_is_rejected(text: str, reason: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        usage.moment(text, NOON)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone cannot be changed here")
def test_the_next_oclock_is_right_across_a_change_to_summer_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        evening = datetime(2026, 3, 28, 23, 0).timestamp()
        assert usage.moment("22:00", evening) == evening + 22 * H
    finally:
        monkeypatch.undo()
        time.tzset()
