"""The figures of overload and recovery: their arithmetic by tables, and a short real trial."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from faults import figures, run, trials
from faults.figures import BY_KEY, FIGURES, Sample
from faults.ground import USUAL, WORKERS
from faults.history import Answer, Call, Execution
from faults.load import TRY_AGAIN_S, Load, Notes
from tests.harness.cluster import Overlay, six_processes, until


def call(id_: int, due: float, mode: str = "any") -> Call:
    return Call(id_, id_, due, due, due + 1.0, mode, "unary")


def ok(id_: int, at: float) -> Answer:
    return Answer(id_, at, "OK", executed="yes")


def refusal(id_: int, at: float) -> Answer:
    return Answer(id_, at, "RESOURCE_EXHAUSTED", executed="no", reason="needs 0.9 s")


def ran(key: int, begin: float, end: float | None, worker: str = "C") -> Execution:
    return Execution(key, worker, begin, end, 0, 0.0)


def test_goodput_counts_answers_within_the_period_and_before_their_deadlines() -> None:
    calls = [call(id_, 10.0) for id_ in range(5)]
    answers = [ok(0, 10.5), ok(1, 9.9), ok(2, 11.1), refusal(3, 10.2), ok(4, 12.5)]

    assert figures.goodput(calls, answers, 10.0, 12.0) == 0.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], 3.0), (range(1, 101), 99), (range(1, 201), 198), (range(1, 1001), 990)],
)
def test_one_value_of_a_hundred_is_above_the_p99(values, expected) -> None:
    assert figures.p99(values) == expected


def test_no_values_have_no_p99() -> None:
    assert math.isnan(figures.p99([]))


def test_a_call_that_was_admitted_and_answered_late_counts_as_accepted() -> None:
    calls = [call(1, 0.0), call(2, 0.0), call(3, 0.0)]
    answers = [ok(1, 0.5), refusal(2, 0.01), Answer(3, 1.1, "DEADLINE_EXCEEDED")]

    assert figures.times(calls, answers, refused=False) == [0.5, 1.1]
    assert figures.times(calls, answers, refused=True) == [0.01]


def test_only_answers_of_the_overlay_that_come_in_time_count_as_answers() -> None:
    calls = [call(id_, 0.0) for id_ in range(4)]
    late, own = ok(2, 1.3), Answer(3, 1.0, "DEADLINE_EXCEEDED", "client")

    assert figures.answered_share(calls, [ok(0, 0.5), refusal(1, 0.01), late, own]) == 0.5


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0.5, 0.6, (0, 0)),
        (0.95, 1.05, (0, 1)),
        (1.01, 1.1, (1, 1)),
        (0.95, None, (0, 0)),
        (1.01, None, (1, 1)),
    ],
)
def test_work_after_its_callers_deadline_is_dead_work(begin, end, expected) -> None:
    of_others = ran(99, 50.0, 51.0)
    assert figures.dead([call(1, 0.0)], [ran(1, begin, end), of_others]) == expected


@pytest.mark.parametrize(
    ("mode", "workers", "expected"),
    [("any", "C", 0), ("any", "CD", 1), ("all", "CD", 0), ("all", "CC", 1)],
)
def test_a_request_runs_once_or_to_all_once_at_each_worker(mode, workers, expected) -> None:
    runs = [ran(1, 0.0, 0.1, worker) for worker in workers]
    assert figures.executed_twice([call(1, 0.0, mode)], runs) == expected


# Ten calls a second from second 0 on; which of them fail, and when traffic flows again.
@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ([], 0.0),
        ([0], 0.0),
        ([12], 0.2),
        ([12, 17, 25], 1.5),
        ([12, 27], 0.2),
        (range(10, 50), math.inf),
        ([12, 20, 28, 36, 44], math.inf),
    ],
)
def test_traffic_flows_again_from_the_first_second_without_failures(failed, expected) -> None:
    calls = [call(id_, id_ / 10) for id_ in range(50)]
    answers = [(refusal if c.id in failed else ok)(c.id, c.due + 0.1) for c in calls]

    assert figures.whole_again_s(calls, answers, 1.0) == pytest.approx(expected, abs=1e-6)


def test_traffic_with_slow_answers_does_not_flow_yet() -> None:
    calls = [call(id_, id_ / 10) for id_ in range(50)]
    answers = [ok(c.id, c.due + (0.4 if c.id < 20 else 0.1)) for c in calls]

    assert figures.whole_again_s(calls, answers, 1.0, 0.2) == pytest.approx(0.9, abs=1e-6)
    assert figures.whole_again_s(calls, answers, 1.0) == 0.0


def test_each_figure_has_its_own_key() -> None:
    assert len(BY_KEY) == len(FIGURES)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([Sample("memory", 12.0), Sample("memory", 128.0), Sample("memory", 500.0)], "reached"),
        ([Sample("memory", 12.0), Sample("memory", 129.0), Sample("memory", 500.0)], "**missed**"),
        ([Sample("memory", 500.0, "late"), Sample("memory", 12.0)], "reached"),
        ([Sample("memory", 12.0, "late")], "invalid: late"),
        ([Sample("memory", math.nan)], "**missed**"),
        ([Sample("greedy", 99.8)], "**missed**"),
        ([Sample("greedy", 99.9)], "reached"),
        ([], "not measured"),
    ],
)
def test_a_figure_is_judged_by_the_median_of_its_valid_runs(samples, expected) -> None:
    figure = BY_KEY[samples[0].figure if samples else "memory"]
    assert figures.verdict(figure, samples) == expected
    assert figures.all_reached(samples) == (expected == "reached")


def test_the_page_shows_what_was_measured_and_what_failed() -> None:
    values = [Sample("memory", value, run=n) for n, value in enumerate([30.0, 10.0, 20.0])]
    note = figures.why_not([refusal(1, 0.0), refusal(2, 0.0), ok(3, 0.0)])
    failed = Sample("restart-failed", 2, note=note, run=1)

    page = figures.page([*values, failed], ["kill, run 1: E serves"], "today")

    assert "of 64 KiB | ≤ 128 MiB | 20.00 (10.00 to 30.00, 3x) MiB | reached |" in page
    assert "| ≤ 0 | 2.00 (2.00 to 2.00, 1x) | **missed** |" in page
    assert "failed, run 1: 2 RESOURCE_EXHAUSTED, executed: no, needs N s" in page
    assert "- kill, run 1: E serves" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "typo"], "no trial 'typo'; there are overload, recovery"),
        (["--runs", "0"], "--runs 0 is not a number above 0"),
        (["--seconds", "nan"], "--seconds nan is not a number above 0"),
        (["--overload-seconds", "-1"], "--overload-seconds -1 is not a number above 0"),
    ],
)
def test_wrong_arguments_are_rejected(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["--figures", *arguments])
    assert message in capsys.readouterr().err


def test_a_client_that_retries_sends_a_failed_call_again(tmp_path: Path) -> None:
    notes = Notes()
    load = Load(Overlay(tmp_path, six_processes()), notes, 1, WORKERS)  # nothing serves there
    try:
        load.run([replace(USUAL, tries=2), replace(USUAL, after_s=1.0)])
        until(lambda: not notes.open, 10, "an answer to every call")
    finally:
        load.close()

    dues = [call.due for call in notes.calls]
    assert len(dues) == 4
    assert all(b - a >= TRY_AGAIN_S for a, b in itertools.pairwise(dues[:3]))


def test_a_trial_returns_each_of_its_figures(tmp_path: Path) -> None:
    """Their values are not checked: on a busy machine they mean nothing."""
    asked = trials.Asked(seconds=0.5, overload_s=0.5)
    samples = list(trials.measure("memory", 2, tmp_path / "run", asked))

    assert [(s.figure, s.run) for s in samples] == [("memory", 2)]
    assert samples[0].value > 0
    assert set(dataclasses.asdict(samples[0])) == {"figure", "value", "invalid", "note", "run"}
