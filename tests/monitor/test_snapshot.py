"""Rates, series, health and what fits a screen, from made-up answers."""

from __future__ import annotations

import pytest

from overlay.cli.top_view import LETTERS, SHAPES, lines
from overlay.monitor.snapshot import ALL, Polled, PollResult, RequestFilter, health, snapshot
from overlay.monitor.timeseries import Timeseries, quantile
from overlay.transport.codec import pb2

ROLES = {"A": "leader", "B": "team_leader", "C": "worker"}


def said(process_id: str, **fields) -> pb2.MetricsResponse:
    fields = {"is_healthy": True, "pid": 1, "role": ROLES.get(process_id, "worker"), **fields}
    return pb2.MetricsResponse(process_id=process_id, **fields)


def sees(process_id: str, state: str = "up", **fields) -> pb2.Neighbour:
    return pb2.Neighbour(process_id=process_id, state=state, **{"health": "healthy", **fields})


def results_of(*answers: pb2.MetricsResponse, **silent: PollResult) -> dict[str, PollResult]:
    return {m.process_id: PollResult(10.0, m) for m in answers} | silent


def many(workers: int, wanted: RequestFilter = ALL, **leader) -> dict:
    """The snapshot of a leader, a team leader and `workers` workers, all well."""
    ids = ["A", "B", *(f"W{n}" for n in range(workers))]
    roles = {i: ROLES.get(i, "worker") for i in ids}
    topology = [
        pb2.Process(id=i, role=roles[i], team="green", address=f"10.0.0.{n % 5}:50051")
        for n, i in enumerate(ids)
    ]
    links = {"A": [sees("B")], "B": [sees(i) for i in ids[2:]]}
    results = {
        i: PollResult(0.0, said(i, role=roles[i], neighbours=links.get(i, ()), **leader))
        for i in ids
    }
    timeseries = {i: Timeseries() for i in ids}
    for series in timeseries.values():
        series.add_point()
    polled = Polled("10.0.0.0:50051", "A", topology, results, timeseries, [])
    return snapshot(polled, 1.0, 1e9, wanted) | {"round": 1, "interval_s": 1.0}


# Rates


def test_rates_are_the_differences_between_two_answers():
    timeseries = Timeseries()

    timeseries.answered(said("A", received=10, completed=4, neighbours=[sees("B", asked=7)]), 1.0)
    timeseries.answered(said("A", received=30, completed=14, neighbours=[sees("B", asked=17)]), 3.0)

    assert (timeseries.rates["received"], timeseries.rates["completed"]) == (10, 5)
    assert timeseries.asked == {"B": 5}


def test_a_restarted_process_has_no_rates_until_its_second_answer():
    timeseries = Timeseries()
    timeseries.answered(said("A", completed=400), 1.0)

    timeseries.answered(said("A", completed=2, pid=2), 2.0)
    assert timeseries.rates == {}

    timeseries.answered(said("A", completed=4, pid=2), 3.0)
    assert timeseries.rates["completed"] == 2


def test_the_cpu_use_of_a_process_is_known_from_its_second_answer():
    timeseries = Timeseries()
    timeseries.answered(said("A", cpu_s=3.0, memory_bytes=1), 1.0)
    assert timeseries.cores is None

    timeseries.answered(said("A", cpu_s=4.0, memory_bytes=1), 3.0)
    assert timeseries.cores == 0.5

    timeseries.failed()
    timeseries.answered(said("A"), 4.0)
    timeseries.answered(said("A"), 5.0)
    assert timeseries.cores is None, "an older release tells neither"


def test_a_series_has_a_gap_where_the_process_did_not_answer():
    timeseries = Timeseries()

    for count in (0, 3, None, 9, 12):
        if count is None:
            timeseries.failed()
        else:
            timeseries.answered(said("A", completed=count), float(count))
        timeseries.add_point()

    assert timeseries.series("completed") == [None, 1.0, None, None, 1.0]
    assert timeseries.series("completed", 2) == [None, 1.0]


@pytest.mark.parametrize(
    ("counts", "part", "value"),
    [
        ([10, 0, 0], 0.5, 0.5),  # the middle of the bucket from 0 to 1
        ([0, 10, 0], 0.5, 1.5),
        ([5, 5, 0], 0.9, 1.8),
        ([0, 0, 3], 0.5, 2.0),  # above all bounds: the last one
        ([0, 0, 0], 0.5, 2.0),
    ],
)
def test_a_quantile_is_interpolated_linearly_within_its_bucket(counts, part, value):
    assert quantile([1.0, 2.0], counts, part) == pytest.approx(value)


# Health


@pytest.mark.parametrize(
    ("results", "name", "why"),
    [
        (results_of(said("A"), C=PollResult(4.0)), "asking", ""),
        (results_of(said("A"), said("C")), "well", ""),
        (results_of(said("A"), C=PollResult(4.0, said("C"), "refused")), "gone", "refused"),
        (
            results_of(said("A", neighbours=[sees("C")]), C=PollResult(4.0, None, "no answer")),
            "unseen",
            "no answer; but A can reach it",
        ),
        (
            results_of(
                said("A", neighbours=[sees("C", "down")]), C=PollResult(4.0, None, "no answer")
            ),
            "gone",
            "no answer",
        ),
        (
            results_of(said("A"), C=PollResult(10.0, said("X"))),
            "gone",
            "process X answers at its address",
        ),
        (
            results_of(said("A"), said("C", config_digest="other")),
            "impaired",
            "reads another configuration than A",
        ),
        (
            results_of(
                said("A", neighbours=[sees("C", health="slow", health_reason="3x")]), said("C")
            ),
            "impaired",
            "A finds it slow: 3x",
        ),
    ],
)
def test_the_health_of_a_process_is_what_it_and_the_processes_above_it_report(results, name, why):
    found = health("C", results, "A", now=12.0)

    assert (found.name, found.why) == (name, why)


def test_a_stopping_process_is_told_from_one_that_is_gone():
    results = results_of(said("A"), said("C", is_healthy=False))

    assert health("C", results, "A", now=12.0).name == "stopping"


def test_a_process_counts_as_gone_since_its_last_answer():
    results = results_of(said("A"), C=PollResult(4.0, said("C"), "refused"))

    assert health("C", results, "A", now=12.0).for_s == 8.0


def test_a_process_that_never_answered_here_is_gone_for_as_long_as_others_miss_it():
    down = sees("C", "down", since_s=300.0)
    results = results_of(said("A", neighbours=[down]), C=PollResult(11.0, None, "refused"))

    assert health("C", results, "A", now=12.0).for_s == 300.0


def test_what_a_process_that_is_gone_reported_about_its_links_does_not_count():
    old = PollResult(4.0, said("B", neighbours=[sees("C")]), "refused")
    results = results_of(said("A"), B=old, C=PollResult(4.0, None, "no answer"))

    assert health("C", results, "A", now=12.0).name == "gone"


def test_a_wrong_clock_does_not_shift_events():
    event = pb2.Event(at_s=5_000.0, text="it happened")
    found = many(1, events=[event], wall_time_s=5_001.0)

    assert found["events"][0]["at"] == 1e9 - 1 - 1  # seen a second ago, a second after it happened


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (RequestFilter(), [1, 2, 3]),
        (RequestFilter(failed=True), [2]),
        (RequestFilter(handler="thumb"), [2, 3]),
        (RequestFilter(handler="thumb", failed=True), [2]),
        (RequestFilter(caller="10.0.0.9"), [1, 2]),
        (RequestFilter(request_id="3"), [3]),
        (RequestFilter(request_id="A0"), []),
    ],
)
def test_only_requests_that_match_the_filter_are_shown(wanted, ids):
    requests = [
        pb2.RequestSummary(request_id=1, handler="echo", caller="10.0.0.9"),
        pb2.RequestSummary(request_id=2, handler="thumb", caller="ann at 10.0.0.9", code=13),
        pb2.RequestSummary(request_id=3, handler="thumb", caller="10.0.0.7"),
    ]

    found = many(1, wanted, requests=requests)

    assert [int(r["request_id"], 16) for r in found["requests"]] == ids


# Whether the overlay is open


def test_a_snapshot_says_in_a_line_that_the_overlay_is_open():
    found = many(1, security=pb2.Security(mode="open"))
    shown = [line.plain for line in lines(found, 120, 24, SHAPES)]

    text = "OPEN: anyone who can reach it can run its handlers; client.py secure CONFIG closes it"
    assert found["security"] == {"mode": "open", "text": text, "problems": []}
    assert shown[1] == text


def test_a_snapshot_of_processes_that_only_this_machine_reaches_says_nothing():
    found = many(1, security=pb2.Security(mode="local"))

    assert found["security"] == {"mode": "local", "text": "", "problems": []}
    assert lines(found, 120, 24, SHAPES)[1].plain.startswith("queue")


def test_a_process_that_no_longer_answers_does_not_say_that_the_overlay_is_open():
    results = results_of(said("A", security=pb2.Security(mode="tls", expires_s=1.8e9)))
    results["B"] = PollResult(1.0, said("B", security=pb2.Security(mode="open")), "refused")
    topology = [pb2.Process(id=i, role=ROLES[i]) for i in "AB"]
    series = {i: Timeseries() for i in "AB"}

    found = snapshot(Polled("x:1", "A", topology, results, series, []), 1.0, 1e9)

    assert found["security"]["text"] == "closed: mutual TLS, certificates until 2027-01-15"
    assert found["processes"][0]["security"]["expires_at"] == 1.8e9


def test_many_problems_of_certificates_take_two_lines_of_a_screen():
    found = many(60)
    found["security"] = {"mode": "tls", "text": "closed", "problems": [f"W{n}: old" for n in "123"]}

    shown = [line.plain for line in lines(found, 80, 24, SHAPES)]

    assert shown[1:4] == ["closed", "W1: old", "and 1 more: W2: old"]


# Jobs


def test_a_snapshot_has_the_counts_of_jobs_where_the_leader_keeps_some():
    found = many(1, jobs=pb2.JobCounts(max_jobs=9, waiting=2, quarantined=1))["jobs"]

    assert many(1)["jobs"] is None
    assert (found["states"]["waiting"], found["states"]["done"]) == (2, 0)
    assert (found["max_jobs"], found["problem"]) == (9, "")


@pytest.mark.parametrize(
    ("jobs", "shown"),
    [
        (pb2.JobCounts(), []),
        (pb2.JobCounts(max_jobs=9), ["jobs     none"]),
        (
            pb2.JobCounts(max_jobs=9, waiting=1200, quarantined=1, schedules=2),
            ["jobs     1,200 waiting, 1 quarantined, 2 schedules"],
        ),
        (
            pb2.JobCounts(max_jobs=9, done=3, problem="the disk is full\x1b[2J"),
            ["jobs     3 done", "no jobs are accepted: the disk is full\\x1b[2J"],
        ),
    ],
)
def test_the_screen_has_a_line_of_jobs(jobs: pb2.JobCounts, shown: list[str]):
    found = [line.plain for line in lines(many(1, jobs=jobs), 80, 24, SHAPES)]

    assert [line for line in found if line.startswith(("jobs", "no jobs"))] == shown


# On a screen


@pytest.mark.parametrize("workers", [1, 4, 60, 300])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60)])
def test_any_snapshot_fits_the_screen(workers, width, height):
    drawn = lines(many(workers), width, height, SHAPES)

    assert len(drawn) <= height
    assert all(line.cell_len <= width for line in drawn)


def test_a_process_that_is_gone_is_on_the_screen_among_sixty():
    found = many(60)
    found["processes"][40] |= {"health": "gone", "why": "refused", "for_s": 75.0}

    shown = "\n".join(line.plain for line in lines(found, 80, 24, SHAPES))

    assert "✕ W38  gone 1 min" in shown
    assert "more" in shown


@pytest.mark.parametrize("height", [24, 30, 60])
def test_a_process_that_is_gone_stands_out_among_failures(height):
    events = [
        pb2.Event(at_s=n, first_at_s=n, number=n, kind="failure", text=f"reason {n}", count=99)
        for n in range(2, 80)
    ]
    events = [pb2.Event(at_s=1.0, number=1, kind="link", text="link to F is down"), *events]

    drawn = lines(many(1, events=events), 120, height, SHAPES)

    (down,) = [line for line in drawn if "link to F is down" in line.plain][:1]
    assert "bold" in str(down.style)
    assert any("reason 79 (99 times since" in line.plain for line in drawn)


def test_letters_replace_shapes_that_the_code_page_lacks():
    shown = "\n".join(line.plain for line in lines(many(60), 80, 24, LETTERS))

    shown.encode("cp437")
    assert shown.isascii()


def test_control_characters_are_shown_as_text():
    event = pb2.Event(at_s=1.0, text="a\x1b[2Jb\nc")

    shown = [line.plain for line in lines(many(1, events=[event]), 80, 24, SHAPES)]

    assert any("a\\x1b[2Jb c" in line for line in shown)
