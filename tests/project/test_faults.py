"""The fault bench: its checker by tables and properties, and short runs on real processes."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import (
    bench,
    breaking,
    fitting,
    history,
    job_checker,
    plot,
    report,
    run,
    scenarios,
    seeded,
)
from faults.checker import LATE_S, RULES, SILENT_S, TIMED, check, coverage_of
from faults.history import (
    ENDED_LANE,
    About,
    Answer,
    Call,
    Cancel,
    Ending,
    Execution,
    Fault,
    History,
    Lending,
    Look,
    Recovery,
    Rest,
    Stall,
    Submit,
)
from faults.load import Mixture
from faults.overlays import Overlay
from tests.harness import hosts
from tests.harness.cluster import ROOT, six_processes

WORKERS = {"C": "green", "D": "pink", "F": "pink"}
ABOUT = About("some", 1, WORKERS, list(scenarios.USUAL), ["raises"], slots=2)


def answered(id_: int, mode: str, way: str, team: str) -> tuple[Call, list[Execution], Answer]:
    """A call at second `id_`, answered by every worker in its scope, or by the first for any."""
    call = Call(id_, id_, float(id_), float(id_), id_ + 2.0, mode, way, team)
    scope = [worker for worker in WORKERS if team in ("", WORKERS[worker])]
    workers = scope if mode == "all" else scope[:1]
    runs = [Execution(id_, w, id_ + 0.1, id_ + 0.2, 0, id_ + 2.0) for w in workers]
    parts = tuple((worker, "OK", "yes") for worker in workers)
    result = "\n".join(f"{worker} {id_}" for worker in workers)
    answer = Answer(id_, id_ + 0.3, "OK", "overlay", "yes", "", parts, result)
    if way == "unary":
        answer = replace(answer, coverage=coverage_of(answer))
    return call, runs, answer


def refused(id_: int, mode: str, way: str, team: str) -> tuple[Call, list[Execution], Answer]:
    """A call with a short deadline, refused because it could not be met."""
    call = Call(id_, id_, float(id_), float(id_), id_ + 0.4, mode, way, team)
    return call, [], Answer(id_, id_ + 0.1, "RESOURCE_EXHAUSTED", "overlay", "no")


def expired(id_: int, mode: str, way: str, team: str) -> tuple[Call, list[Execution], Answer]:
    """A call that runs on after its deadline, which breaks no promise."""
    call = Call(id_, id_, float(id_), float(id_), id_ + 2.0, mode, way, team)
    worker = next(w for w in WORKERS if team in ("", WORKERS[w]))
    runs = [Execution(id_, worker, id_ + 1.9, None, 0, id_ + 2.0)]
    return call, runs, Answer(id_, id_ + 2.05, "DEADLINE_EXCEEDED", "overlay", "unknown")


def true_history(*kinds: tuple[Callable[..., object], str, str, str]) -> History:
    """A history that keeps every promise: an answered call to all, then a call of each kind."""
    found = History(ABOUT)
    for id_, (make, *how) in enumerate([(answered, "all", "unary", ""), *kinds], 1):
        call, runs, answer = make(id_, *how)
        found.calls.append(call)
        found.executions += runs
        found.answers.append(answer)
    found.rests = [Rest(process, {"active": 0, "waiting": 0}) for process in "ABCDEF"]
    found.endings = [Ending(process, 0, [0]) for process in "ABCDEF"]
    found.recoveries = [Recovery(True, 0.4)]
    return found


def edited(found: History, place: str, index: int = 0, **fields: object) -> History:
    """The history with one record changed."""
    records = list(getattr(found, place))
    records[index] = replace(records[index], **fields)
    return replace(found, **{place: records})


def more(found: History, place: str, *records: object) -> History:
    return replace(found, **{place: [*getattr(found, place), *records]})


def less(found: History, place: str, index: int = 0) -> History:
    records = list(getattr(found, place))
    del records[index]
    return replace(found, **{place: records})


def asked_again(found: History, key: int = 1, **fields: object) -> History:
    """The first call has an idempotency key, and is repeated. fields: of the second answer."""
    found = edited(found, "calls", idempotency="k")
    answer = replace(found.answers[0], id=10**6, **fields)
    found = more(found, "calls", replace(found.calls[0], id=10**6, key=key))
    return more(found, "answers", answer)


def alone_and_refused(found: History) -> History:
    """The first call was refused because there was no place, and ran nowhere."""
    runs = [run for run in found.executions if run.key != 1]
    fields = {"executed": "no", "parts": (), "result": "", "coverage": ""}
    found = edited(found, "answers", code="RESOURCE_EXHAUSTED", **fields)
    return replace(found, executions=runs)


def lent(found: History, *looks: tuple[float, int]) -> History:
    """C was lent for so many requests at these times, and 10 are the most."""
    found = replace(found, about=replace(ABOUT, most_lent=10))
    return more(found, "lendings", *(Lending(at, {"C": rows}, 5) for at, rows in looks))


# Changes to the first call of a true history, each with the rule that must find it.
LIES: dict[str, tuple[str, Callable[[History], History]]] = {
    "no answer": ("unanswered", lambda h: less(h, "answers")),
    "two answers": ("answered_twice", lambda h: more(h, "answers", h.answers[0])),
    "an answer to no call": (
        "answered_twice",
        lambda h: more(h, "answers", replace(h.answers[0], id=10**6)),
    ),
    "a late answer": ("late", lambda h: edited(h, "answers", at=3.0 + LATE_S + 0.01)),
    "silence": (
        "silent",
        lambda h: edited(
            edited(h, "calls", way="stream"),
            "answers", code="DEADLINE_EXCEEDED", by="client", at=3.0 + SILENT_S, parts=(),
        ),
    ),
    "refused, and it ran": (
        "false_refusal",
        lambda h: edited(h, "answers", code="UNAVAILABLE", executed="no", parts=()),
    ),
    "a part refused, and it ran": (
        "false_refusal",
        lambda h: edited(h, "answers", parts=(("C", "UNAVAILABLE", "no"), *h.answers[0].parts[1:])),
    ),
    "twice on a worker": ("ran_twice", lambda h: more(h, "executions", h.executions[0])),
    "any on two workers": ("ran_twice", lambda h: edited(h, "calls", mode="any")),
    "with a key on three workers": (
        "ran_twice", lambda h: edited(h, "calls", mode="any", idempotency="k"),
    ),
    "with a key on two workers, though none was lost": (
        "ran_twice", lambda h: less(edited(h, "calls", mode="any", idempotency="k"), "executions"),
    ),
    "one key for two payloads": ("key_misused", lambda h: asked_again(h, key=10**6)),
    "two answers under one key": ("key_misused", lambda h: asked_again(h, parts=())),
    "an answer and a failure under one key": (
        "key_misused", lambda h: asked_again(h, code="INTERNAL", executed="yes", parts=()),
    ),
    "an execution without a call": (
        "ran_unrequested",
        lambda h: more(h, "executions", replace(h.executions[0], key=10**6)),
    ),
    "outside of its team": ("ran_unrequested", lambda h: edited(h, "calls", team="green")),
    "begun too late": ("ran_after_deadline", lambda h: edited(h, "executions", begin=4.1)),
    "given too much time": ("ran_after_deadline", lambda h: edited(h, "executions", deadline=30.0)),
    "counted, but not executed": ("silently_incomplete", lambda h: less(h, "executions")),
    "counted, but not finished": (
        "silently_incomplete", lambda h: edited(h, "executions", end=None),
    ),
    "a worker left out": (
        "silently_incomplete",
        lambda h: edited(h, "answers", parts=h.answers[0].parts[:2], coverage="2/2"),
    ),
    "a wrong coverage": ("silently_incomplete", lambda h: edited(h, "answers", coverage="4/4")),
    "a result too short": ("wrong_result", lambda h: edited(h, "answers", result="C 1\nD 1")),
    "another call's result": (
        "wrong_result", lambda h: edited(h, "answers", result="C 2\nD 2\nF 2"),
    ),
    "an unexpected status": (
        "unexpected_status",
        lambda h: edited(h, "answers", code="UNIMPLEMENTED", executed="yes", parts=()),
    ),
    "INTERNAL of a handler that does not fail": (
        "unexpected_status",
        lambda h: edited(h, "answers", code="INTERNAL", executed="yes", parts=()),
    ),
    "INTERNAL in a part": (
        "unexpected_status",
        lambda h: edited(h, "answers", parts=(*h.answers[0].parts[:2], ("F", "INTERNAL", "yes"))),
    ),
    "sent to a worker that is cut off": (
        "blocked_by_fault",
        lambda h: more(
            edited(edited(h, "calls", mode="any"), "answers", code="UNAVAILABLE", parts=()),
            "faults", Fault("cut", "D", -2.5, 2.0),
        ),
    ),
    "refused although no other call was open": (
        "refused_with_free_slots", lambda h: alone_and_refused(h),
    ),
    "a part refused although no other call was open": (
        "refused_with_free_slots",
        lambda h: less(
            edited(
                h, "answers", result="C 1\nD 1", coverage="2/3; missing=F",
                parts=(*h.answers[0].parts[:2], ("F", "RESOURCE_EXHAUSTED", "no")),
            ),
            "executions", 2,
        ),
    ),
    "run without a lease": ("ran_without_lease", lambda h: edited(h, "calls", way=ENDED_LANE)),
    "refused without a lease, and it ran": (
        "ran_without_lease",
        lambda h: edited(
            edited(h, "calls", way=ENDED_LANE),
            "answers", code="FAILED_PRECONDITION", executed="no", parts=(),
        ),
    ),
    "lent twice": ("lent_twice", lambda h: lent(h, (1.0, 20), (1.5, 30), (2.0, 20))),
    "an answer counted twice": ("miscounted", lambda h: edited(h, "rests", completed=10**6)),
    "an answer not counted": ("miscounted", lambda h: edited(h, "rests", completed=0)),
    "something active": ("leak", lambda h: edited(h, "rests", counts={"active": 1})),
    "miscounted": ("leak", lambda h: edited(h, "rests", counts={"not counted": -2})),
    "no complete answer": ("no_recovery", lambda h: edited(h, "recoveries", ok=False)),
    "no recovery recorded": ("no_recovery", lambda h: less(h, "recoveries")),
    "an unexpected exit code": ("bad_exit", lambda h: edited(h, "endings", code=3)),
    "an expected exit code without a message": (
        "bad_exit", lambda h: edited(h, "endings", code=2, wanted=[2]),
    ),
    "a traceback": ("bad_exit", lambda h: edited(h, "endings", output="Traceback (most recent")),
}  # fmt: skip
OTHERS = st.lists(
    st.tuples(
        st.sampled_from([answered, refused, expired]),
        st.sampled_from(["all", "any"]),
        st.sampled_from(["unary", "stream"]),
        st.sampled_from(["", "green", "pink"]),
    ),
    max_size=20,
)


@given(OTHERS)
def test_a_true_history_breaks_nothing(others: list[tuple[Callable[..., object], str, str, str]]):
    assert check(true_history(*others)) == []


@given(OTHERS, st.sampled_from(sorted(LIES)))
def test_a_lie_is_found_whatever_other_calls_there_are(
    others: list[tuple[Callable[..., object], str, str, str]], lie: str
) -> None:
    rule, change = LIES[lie]
    found = {(violation.rule, violation.call) for violation in check(change(true_history(*others)))}
    assert rule in {name for name, _ in found}
    assert {call for _, call in found} <= {0, 1, 10**6}  # no other call is blamed


def test_each_rule_has_a_lie_that_breaks_it() -> None:
    assert {rule for rule, _ in LIES.values()} == {rule.__name__ for rule in RULES}


def true_jobs() -> History:
    """Job 90 (any, with a key) is done, job 91 (without) fails, and job 92 is cancelled in time."""
    found = true_history()
    found.submits = [
        Submit(90, 1.0, 1.1, "any", "", "work", "k", 3, job="a"),
        Submit(91, 1.0, 1.1, "all", "green", "raises", "", 1, job="b"),
        Submit(92, 1.0, 1.1, "any", "", "work", "", 1, job="c"),
    ]
    found.executions += [
        Execution(90, "D", 1.2, 1.3, 0, 9.0),
        Execution(91, "C", 1.2, 1.3, 0, 9.0),
    ]
    found.cancels = [Cancel("c", 1.2, 1.3, "OK", True)]
    done = Look("a", 5.0, 5.1, "done", 1, "OK", "OK", "", True, "D 90", (("D", "OK", "yes"),), True)
    found.looks = [
        done,
        Look("b", 5.0, 5.1, "failed", 1, "OK", "INTERNAL", "no", True, is_last=True),
        Look("c", 5.0, 5.1, "cancelled", 0, "OK", "CANCELLED", "by you", True, is_last=True),
        replace(done, at=6.0, until=6.1),
    ]
    return found


def told(index: int, **fields: object) -> Callable[[History], History]:
    """Something else was told of a job."""
    return lambda found: edited(found, "looks", index, **fields)


# Changes to a true history with jobs, each with the rule that must find it.
JOB_LIES: dict[str, tuple[str, Callable[[History], History]]] = {
    "not known": ("job_lost", told(1, state="", code="NOT_FOUND")),
    "not known any more": ("job_answer_lost", told(3, code="NOT_FOUND")),
    "an answer that is gone": ("job_answer_lost", told(3, result=None)),
    "done without an answer": ("job_wrong_state", told(0, result=None)),
    "two answers": ("job_answer_changed", told(3, result="D 91")),
    "another job's answer": ("job_wrong_answer", told(0, result="D 91")),
    "an answer without a run": ("job_wrong_answer", lambda h: less(h, "executions", 3)),
    "a worker left out": ("job_wrong_answer", lambda h: edited(h, "submits", mode="all")),
    "twice without a key": ("job_ran_twice", lambda h: more(h, "executions", h.executions[-1])),
    "four times": ("job_ran_too_often", lambda h: more(h, "executions", *[h.executions[3]] * 3)),
    "more runs than are told": (
        "job_ran_too_often", lambda h: more(h, "executions", h.executions[3]),
    ),
    "more attempts than it may": ("job_ran_too_often", told(0, attempts=4)),
    "outside of its team": ("job_ran_unrequested", lambda h: edited(h, "submits", team="green")),
    "waiting after it was done": ("job_wrong_state", told(3, state="waiting")),
    "failed without a reason": ("job_wrong_state", told(1, reason="")),
    "failed though it is good": (
        "job_wrong_state", lambda h: edited(h, "submits", 1, handler="work"),
    ),
    "quarantined though nothing was lost": (
        "job_wrong_state", told(1, state="quarantined"),
    ),
    "expired though it may not": ("job_wrong_state", told(2, state="expired")),
    "cancelled by nobody": ("job_wrong_state", lambda h: less(h, "cancels")),
    "open though it could not be cancelled": (
        "job_wrong_state",
        lambda h: edited(told(2, state="running")(h), "cancels", changed=False),
    ),
    "begun after its cancel": (
        "job_cancel_forgotten",
        lambda h: more(h, "executions", Execution(92, "D", 4.0, 4.1, 0, 9.0)),
    ),
    "done after its cancel": ("job_cancel_forgotten", told(2, state="done")),
    "refused, and it ran": (
        "job_refused_and_ran",
        lambda h: edited(h, "submits", 1, job="", code="UNAVAILABLE", executed="no"),
    ),
    "two jobs with one key": (
        "job_key_ignored", lambda h: more(h, "submits", replace(h.submits[0], job="b")),
    ),
    "two jobs with one id": ("job_key_ignored", lambda h: edited(h, "submits", 2, job="a")),
    "running for ever": ("job_not_over", told(1, state="running")),
    "never asked for": ("job_not_over", lambda h: less(h, "looks", 2)),
    "an unexpected refusal": (
        "job_unexpected_status", lambda h: edited(h, "submits", 2, job="", code="INTERNAL"),
    ),
    "an unexpected answer": (
        "job_unexpected_status", lambda h: edited(h, "cancels", code="INTERNAL"),
    ),
}  # fmt: skip


def test_true_jobs_break_nothing(tmp_path: Path) -> None:
    assert check(true_jobs()) == []
    history.write(true_jobs(), tmp_path / "history.jsonl")
    assert history.read(tmp_path / "history.jsonl") == true_jobs()


@pytest.mark.parametrize("lie", JOB_LIES)
def test_a_lie_about_a_job_is_found(lie: str) -> None:
    rule, change = JOB_LIES[lie]
    assert rule in {violation.rule for violation in check(change(true_jobs()))}


def test_each_rule_of_jobs_has_a_lie_that_breaks_it() -> None:
    assert {rule for rule, _ in JOB_LIES.values()} == {r.__name__ for r in job_checker.RULES}


def test_a_job_that_a_killed_worker_may_have_run_is_quarantined() -> None:
    found = edited(true_jobs(), "looks", 1, state="quarantined", failure="UNAVAILABLE")
    assert check(more(found, "faults", Fault("kill", "C", 1.2, 1.5))) == []


@pytest.mark.parametrize(
    ("place", "fields", "excuse"),
    [
        ("answers", {"at": 5.0}, Fault("freeze", "A", 1.5, 5.0)),
        ("answers", {"at": 5.0}, Stall(2.0, 5.0)),
        ("executions", {"begin": 5.0, "end": 5.1}, Fault("freeze", "C", 1.5, 4.9)),
        ("executions", {"begin": 5.0, "end": 5.1}, Stall(2.0, 5.0)),
    ],
)
def test_a_process_that_stood_still_is_not_blamed_for_lateness(place, fields, excuse) -> None:
    late = edited(true_history(), place, **fields)
    excused = more(late, "faults" if isinstance(excuse, Fault) else "stalls", excuse)
    assert check(late) != []
    assert check(excused) == []


def test_a_frozen_worker_does_not_excuse_a_late_leader() -> None:
    late = edited(true_history(), "answers", at=5.0)
    assert check(more(late, "faults", Fault("freeze", "D", 1.5, 5.0))) == check(late) != []


def test_a_repeated_request_may_be_refused_after_it_ran() -> None:
    call, runs, answer = answered(2, "any", "unary", "green")
    found = more(true_history(), "calls", call, replace(call, id=3))
    found = more(found, "answers", answer, Answer(3, 2.2, "UNAVAILABLE", executed="no"))
    assert check(more(found, "executions", *runs)) == []


def test_with_a_key_the_answer_may_be_repeated_and_another_payload_must_be_refused() -> None:
    refusal = {"code": "INVALID_ARGUMENT", "executed": "no", "parts": (), "result": ""}
    assert check(asked_again(true_history())) == []
    assert check(asked_again(true_history(), key=2, **refusal)) == []
    assert check(asked_again(true_history(), **refusal)) != []  # it was the same payload


@pytest.mark.parametrize(("process", "excuses"), [("C", True), ("A", True), ("D", False)])
def test_with_a_key_a_fault_that_lost_the_first_worker_excuses_a_second(process, excuses):
    call, runs, answer = answered(2, "any", "unary", "")
    call, second = replace(call, idempotency="k"), replace(runs[0], worker="F", begin=2.15)
    part = (("F", "OK", "yes"),)
    answer = replace(answer, parts=part, result="F 2", coverage="1/1")
    found = more(true_history(), "calls", call)
    found = more(more(found, "answers", answer), "executions", *runs, second)
    found = more(found, "faults", Fault("freeze", process, 2.12, 2.14))
    assert (check(found) == []) is excuses


def test_a_leader_that_was_killed_may_forget_its_keys() -> None:
    parts = (*true_history().answers[0].parts[:2], ("F", "UNAVAILABLE", "unknown"))
    short = {"parts": parts, "result": "C 1\nD 1", "coverage": "2/3; missing=F"}
    found = asked_again(true_history(), **short)
    assert check(more(found, "faults", Fault("kill", "A", 1.4, 1.6))) == []
    assert check(more(found, "faults", Fault("kill", "E", 1.4, 1.6))) != []


@pytest.mark.parametrize("kind", ["busy", "hung", "hurried", "disturbed", "stalled"])
def test_a_refusal_is_right_while_there_may_be_no_place(kind: str) -> None:
    """busy: two other calls are open, and a worker takes two. hung: they were answered, but their
    handlers go on."""
    found = alone_and_refused(true_history())
    first = found.calls[0]
    others = [replace(first, id=id_, key=id_, at=0.8, due=0.8, deadline=2.8) for id_ in (8, 9)]
    gone = [Answer(c.id, 0.95 if kind == "hung" else 1.5, "UNAVAILABLE") for c in others]
    runs = [Execution(c.id, "C", 0.85, 1.5, 0, 2.8) for c in others]
    if kind in ("busy", "hung"):
        found = more(more(found, "calls", *others), "answers", *gone)
        found = more(found, "executions", *runs)
    if kind == "hurried":
        found = edited(found, "calls", deadline=first.at + 0.4)
    if kind == "disturbed":
        found = more(found, "faults", Fault("kill", "E", 0.0, 0.5))
    if kind == "stalled":
        found = more(found, "stalls", Stall(0.5, 1.1))
    assert check(found) == []


def test_a_refusal_is_wrong_while_fewer_calls_are_open_than_there_are_places() -> None:
    found = alone_and_refused(true_history())
    other = replace(found.calls[0], id=8, key=8, at=0.8, due=0.8, deadline=2.8)
    found = more(more(found, "calls", other), "answers", Answer(8, 1.5, "UNAVAILABLE"))
    (violation,) = check(found)
    assert violation.rule == "refused_with_free_slots"
    assert "1 other requests were open, and a worker has 2 slots" in violation.sentence


@pytest.mark.parametrize(
    "looks", [((1.0, 10), (3.0, 10)), ((1.0, 20), (1.9, 20)), ((1.0, 20), (1.8, 9), (2.5, 20))]
)
def test_more_may_be_lent_until_those_who_have_a_lease_are_told(looks) -> None:
    assert check(lent(true_history(), *looks)) == []


def test_an_answer_that_its_client_did_not_wait_for_may_be_counted() -> None:
    found = edited(true_history(), "rests", completed=1)
    assert check(found) == []
    left = edited(found, "answers", code="DEADLINE_EXCEEDED", by="client", parts=(), coverage="")
    assert check(left) == []


def test_a_worker_refuses_what_is_sent_without_a_lease() -> None:
    call = replace(true_history().calls[0], id=9, key=9, mode="any", way=ENDED_LANE)
    refusal = Answer(9, 1.1, "FAILED_PRECONDITION", executed="no")
    assert check(more(more(true_history(), "calls", call), "answers", refusal)) == []


def test_a_client_that_vanished_needs_no_answer() -> None:
    gone = replace(true_history().calls[0], id=9, key=9, vanishes=True)
    assert check(more(true_history(), "calls", gone)) == []


@given(OTHERS)
def test_a_history_can_be_written_and_read(
    tmp_path_factory: pytest.TempPathFactory,
    others: list[tuple[Callable[..., object], str, str, str]],
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    found = more(true_history(*others), "faults", Fault("kill", "E", 1.0, 2.0))
    history.write(found, path)
    assert history.read(path) == found


def test_a_line_that_is_not_a_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.write(true_history(), path)
    path.write_text(path.read_text() + '{"kind": "wish"}\n')
    number = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=f"history.jsonl:{number}: not a record"):
        history.read(path)


def test_an_execution_that_a_kill_interrupted_has_no_end() -> None:
    begun = '"key": 7, "worker": "C", "begin": 1.0, "attempt": 0, "deadline": 2.0}'
    lines = [
        '{"run": "a", ' + begun,
        '{"run": "b", ' + begun,
        '{"run": "a", "end": 1.5}',
        '{"run": "b", "e',
    ]
    assert [each.end for each in history.executions_of(lines)] == [1.5, None]


def test_a_seed_always_gives_the_same_calls() -> None:
    mixture = Mixture(repeats=0.3)
    first, again = (mixture.plan(3, random.Random(5)) for _ in range(2))
    assert first == again != mixture.plan(3, random.Random(6))


def test_long_calls_end_before_the_others_begin() -> None:
    *long, first = Mixture(long_first=True).plan(1, random.Random(5))[:4]
    assert [call.team for call in long] == ["", "green", "pink"]
    assert all(call.after_s + call.nap_ms / 1000 < first.after_s for call in long)


def test_a_repeated_call_follows_the_first_and_goes_to_a_team_of_one_worker() -> None:
    planned = Mixture(repeats=0.5, keyed=0).plan(3, random.Random(5))
    pairs = [pair for pair in itertools.pairwise(planned) if pair[1].again]
    assert len(pairs) > 20
    assert all(a.named and b.named and a.team == b.team == "green" for a, b in pairs)


def test_the_page_and_the_picture_show_what_was_broken() -> None:
    rule, change = LIES["a late answer"]
    found = more(change(true_history()), "faults", Fault("kill", "E", 1.0, 2.0))
    outcome = bench.Outcome(scenarios.BY_NAME["kill-team-leader"], found, check(found))
    page = report.page([outcome], {"files-leader": "needs Linux"}, 6, 1)
    picture = xml.etree.ElementTree.fromstring(plot.drawn([outcome]))
    texts = [text for text in picture.itertext() if text.strip()]
    assert "| kill-team-leader | 1 | 1 | 0 |  | 0.4 s | 0 ms | **1** |" in page
    assert f"- {rule}: call 1 (unary) was answered" in page
    assert "- not run: files-leader: needs Linux" in page
    assert {"answers a second", "kill-team-leader", "1 broken"} <= set(texts)


@pytest.mark.parametrize(("in_a_bin", "top"), [(1, 10), (2, 20), (3, 50), (7, 100), (37, 500)])
def test_a_strip_of_the_picture_has_a_scale_of_answers_per_second(in_a_bin: int, top: int) -> None:
    one = true_history().answers[0]
    found = replace(true_history(), answers=[one] * in_a_bin)
    outcome = bench.Outcome(scenarios.BY_NAME["calm"], found, [])
    picture = xml.etree.ElementTree.fromstring(plot.drawn([outcome]))
    texts = [text for text in picture.itertext() if text.strip()]
    blue = [r for r in picture.findall(".//{*}rect") if r.get("fill") == plot.KINDS["OK"]]
    _, bar = blue  # the first is the legend's

    assert {f"{top}", f"{top // 2}", "0", "0 s"} <= set(texts)
    share = float(bar.get("height", 0)) / plot.STRIP
    assert share * top == pytest.approx(in_a_bin / plot.BIN_S, abs=0.05 * top)


def test_a_run_whose_load_was_late_is_invalid() -> None:
    outcome = bench.Outcome(scenarios.BY_NAME["calm"], true_history(), [])
    late = replace(outcome, history=edited(true_history(), "calls", at=1.03))
    assert (outcome.invalid, bool(late.invalid)) == ("", True)


def test_a_run_whose_load_was_not_on_lanes_is_invalid_where_it_should_be() -> None:
    scenario = scenarios.BY_NAME["lanes-calm"]
    outcome = bench.Outcome(scenario, lent(true_history(), (1.0, 5)), [])
    without = bench.Outcome(scenario, true_history(), [])
    assert (outcome.invalid, without.invalid) == ("", "no call went over a lane")


def test_the_names_in_the_tables_are_unique_and_each_bug_has_a_scenario() -> None:
    assert len(scenarios.BY_NAME) == len(scenarios.SCENARIOS)
    assert len(seeded.BY_NAME) == len(seeded.BUGS) >= 12
    rules = {rule.__name__ for rule in (*RULES, *job_checker.RULES)}
    for bug in seeded.BUGS:
        assert bug.scenario in scenarios.BY_NAME
        assert rules.issuperset(bug.rules)


@pytest.mark.parametrize("name", seeded.BY_NAME)
def test_a_seeded_bug_fits_the_code_that_it_replaces_a_piece_of(name: str) -> None:
    assert fitting.misfits(seeded.BY_NAME[name].apply) == []


# Bugs that once fitted, or might have.


def replaces_nothing() -> None:
    from overlay.routing import aggregate

    assert aggregate.coverage


def replaces_what_is_gone() -> None:
    from overlay.routing import aggregate

    aggregate.coverage_of = lambda answer: ""


def replaces_in_a_class_that_is_gone() -> None:
    from overlay.peers import peers

    peers._Link.time_left_s = lambda self, deadline: 30.0


def is_given_more_than_it_takes() -> None:
    from overlay.queueing import request_queue

    request_queue.RequestQueue._claim_locked = lambda self: None


def is_given_less_than_it_takes() -> None:
    from overlay.queueing import request_queue

    request_queue.RequestQueue._claim_locked = lambda self, queued, now: None


def takes_no_name_that_it_is_given() -> None:
    from overlay.transport import codec

    codec.write_slice = lambda frame, number, start, answers, trace=(): None


def calls_what_it_replaces_with_too_much() -> None:
    from overlay.queueing import request_queue

    claim = request_queue.RequestQueue._claim_locked
    request_queue.RequestQueue._claim_locked = lambda self, queued: claim(self, queued, 0.0)


def uses_a_private_name_that_is_gone() -> None:
    from overlay.queueing import request_queue

    right = request_queue.RequestQueue._claim_locked
    request_queue.RequestQueue._claim_locked = lambda self, queued: (
        right(self, queued) if queued._is_over else None
    )


def has_sql_of_other_tables() -> None:
    from overlay.jobs import store

    store.JobStore._recover = lambda self, db: db.execute("update jobs set state = 0")


@pytest.mark.parametrize(
    ("apply", "misfit"),
    [
        (replaces_nothing, "it replaces nothing"),
        (replaces_what_is_gone, "it replaces overlay.routing.aggregate.coverage_of, which is not"),
        (replaces_in_a_class_that_is_gone, "it cannot be applied: .* no attribute '_Link'"),
        (is_given_more_than_it_takes, "_claim_locked is called with 2 arguments"),
        (is_given_less_than_it_takes, "_claim_locked is called with 2 arguments"),
        (takes_no_name_that_it_is_given, "write_slice is called with 4 arguments by .* and more"),
        (calls_what_it_replaces_with_too_much, "it calls .*_claim_locked with 3 arguments"),
        (uses_a_private_name_that_is_gone, "it uses _is_over, which neither"),
        (has_sql_of_other_tables, "its SQL does not fit: no such table: jobs"),
    ],
)
def test_a_bug_that_no_longer_fits_is_found(apply: Callable[[], None], misfit: str) -> None:
    (found,) = fitting.misfits(apply)
    assert re.search(misfit, found), found


def test_a_bug_is_undone_after_its_trial() -> None:
    from overlay.routing import aggregate

    before = aggregate.coverage
    with fitting.applied(seeded.coverage_always_complete) as replaced:
        assert [one.name for one in replaced] == ["coverage"]
        assert aggregate.coverage is not before
    assert aggregate.coverage is before


@pytest.mark.parametrize("arguments", [["--only", "typo"], ["--seeded", "--only", "calm"]])
def test_an_unknown_name_is_rejected_with_a_list_of_the_known_ones(arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert f"'{arguments[-1]}'; there are" in capsys.readouterr().err


def test_a_scenario_that_this_machine_cannot_run_is_listed_with_the_reason(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda program: None)
    assert run.main(["--only", "clock-worker,cut-worker", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "table.md").read_text()
    assert "- not run: clock-worker: needs " in page
    assert re.search(r"- not run: cut-worker: (two hosts need|network namespaces need)", page)


def test_the_command_checks_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.write(LIES["refused, and it ran"][1](true_history()), path)
    command = [sys.executable, str(ROOT / "faults" / "run.py"), "--check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert "false_refusal: call 1 was refused (UNAVAILABLE, executed: no) and ran on" in done.stdout


def test_moving_a_process_s_wall_clock_leaves_its_monotonic_clock_alone(tmp_path: Path) -> None:
    if why_not := scenarios.BY_NAME["clock-worker"].why_not:
        pytest.skip(why_not)
    overlay = Overlay(tmp_path / "run", six_processes(), [])
    breaking.own_clock("D")(overlay)
    breaking.set_clock(breaking.clock_file(overlay, "D"), 3600)
    look = "import time; print(time.time(), time.monotonic())"
    command = [*overlay.inside["D"], sys.executable, "-c", look]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    wall, steady = map(float, seen.stdout.split())
    assert 3500 < wall - time.time() < 3700
    assert abs(steady - time.monotonic()) < 60


# Short runs. On a busy machine one may be invalid; its times then mean nothing.


def test_a_killed_worker_breaks_no_promise(tmp_path: Path) -> None:
    outcome = bench.run(scenarios.BY_NAME["kill-worker"], tmp_path / "run", 2, seed=1)
    excused = TIMED if outcome.invalid else frozenset()
    assert [v for v in outcome.violations if v.rule not in excused] == []
    assert outcome.history.troubles == []
    assert [fault.what for fault in outcome.history.faults] == ["kill", "kill"]
    assert sum(answer.code == "OK" for answer in outcome.history.answers) > 50


@pytest.mark.parametrize(
    "name", ["long-then-short", "hostile-worker", "tls-freeze", "lanes-drain", "lanes-ended"]
)
def test_neither_long_requests_nor_broken_neighbours_nor_lost_lanes_break_a_promise(
    tmp_path: Path, name: str
) -> None:
    outcome = bench.run(scenarios.BY_NAME[name], tmp_path / "run", 2, seed=1)
    excused = TIMED if outcome.invalid else frozenset()
    assert [v for v in outcome.violations if v.rule not in excused] == []
    assert outcome.history.troubles == []


def test_a_worker_that_is_cut_off_breaks_no_promise(tmp_path: Path) -> None:
    scenario = scenarios.BY_NAME["cut-worker"]
    if scenario.why_not:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(scenario.why_not)
    outcome = bench.run(scenario, tmp_path / "run", 1, seed=1)
    excused = TIMED if outcome.invalid else frozenset()
    assert [v for v in outcome.violations if v.rule not in excused] == []
    assert outcome.history.troubles == []
    assert [fault.what for fault in outcome.history.faults] == ["cut"]


def test_jobs_outlive_a_leader_that_is_killed_again_and_again(tmp_path: Path) -> None:
    outcome = bench.run(scenarios.BY_NAME["jobs-kill-leader"], tmp_path / "run", 2, seed=1)
    excused = TIMED if outcome.invalid else frozenset()
    assert [v for v in outcome.violations if v.rule not in excused] == []
    assert outcome.history.troubles == []
    assert report.jobs(outcome)["done"] > 20


@pytest.mark.parametrize(
    "name",
    [
        "refusal-always-says-no",
        "seen-ids-off",
        "merge-drops-a-part",
        "needless-refusals",
        "job-key-unused",
        "lane-counted-twice",
        "lane-loses-the-rest",
    ],
)
def test_the_bench_finds_a_seeded_bug(tmp_path: Path, name: str) -> None:
    trial = seeded.try_out(seeded.BY_NAME[name], tmp_path / "run", 1, seed=1)
    assert trial.found, trial.sentence
