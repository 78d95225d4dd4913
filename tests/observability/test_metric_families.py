"""The table of metric families: what check and Prometheus get from some metrics."""

from __future__ import annotations

import io

import pytest

from overlay.cli.check import show_metrics
from overlay.cli.terminal import Screen
from overlay.observability import metric_families
from overlay.observability.metric_families import FAMILIES, Family
from overlay.transport.codec import pb2

BUSY = pb2.MetricsResponse(
    process_id="A",
    refused_by_reason={"queue full": 2, "draining": 1},
    crowded_out={"streams": 3},
    log_lines_dropped=12,
    neighbours=[pb2.Neighbour(process_id="B", state="up")],
    handlers=[pb2.HandlerMetrics(name="echo", completed=4)],
)


def test_check_has_a_line_for_what_is_not_0():
    assert dict(metric_families.facts(BUSY)) == {
        "refused": "1 draining, 2 queue full",
        "ended": "3 streams",
        "log": "12 lines dropped",
    }


def test_what_is_0_has_no_text():
    assert not any(text for _, text in metric_families.facts(pb2.MetricsResponse()))


def test_check_prints_these_lines():
    page = io.StringIO()

    show_metrics(Screen(page), BUSY, "127.0.0.1:50051")

    lines = [line.split(maxsplit=1) for line in page.getvalue().splitlines() if line]
    assert ["log", "12 lines dropped"] in lines
    assert ["refused", "1 draining, 2 queue full"] in lines


@pytest.mark.parametrize(
    ("security", "lines"),
    [
        (
            pb2.Security(mode="open"),
            [
                "security OPEN: anyone who can reach it can run its handlers; client.py secure "
                "CONFIG closes it"
            ],
        ),
        (pb2.Security(mode="local"), []),
        (pb2.Security(), []),
        (
            pb2.Security(mode="tls", expires_s=1.8e9, problem="it expires in 9 days"),
            [
                "security closed: mutual TLS, certificates until 2027-01-15",
                "warning it expires in 9 days",
            ],
        ),
    ],
    ids=["open", "local", "an older release", "tls"],
)
def test_check_says_in_a_line_whether_the_process_is_open(security: pb2.Security, lines: list[str]):
    page = io.StringIO()

    show_metrics(Screen(page), pb2.MetricsResponse(process_id="A", security=security), "x:1")

    found = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert [line for line in found if line.startswith(("security", "warning"))] == lines


@pytest.mark.parametrize(
    ("jobs", "lines"),
    [
        (pb2.JobCounts(), []),
        (pb2.JobCounts(max_jobs=9), ["jobs none"]),
        (
            pb2.JobCounts(max_jobs=9, waiting=1200, running=3, quarantined=1, schedules=1),
            ["jobs 1,200 waiting, 3 running, 1 quarantined, 1 schedule"],
        ),
        (
            pb2.JobCounts(max_jobs=9, done=9, refused=4, problem="the disk is full"),
            ["jobs 9 done; 4 refused", "warning no jobs are accepted: the disk is full"],
        ),
    ],
    ids=["no journal", "none", "some", "a problem"],
)
def test_check_says_how_many_jobs_there_are(jobs: pb2.JobCounts, lines: list[str]):
    page = io.StringIO()

    show_metrics(Screen(page), pb2.MetricsResponse(process_id="A", jobs=jobs), "x:1")

    found = [" ".join(line.split()) for line in page.getvalue().splitlines()]
    assert [line for line in found if line.startswith(("jobs", "warning"))] == lines


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_a_value_for_each_of_its_labels(family: Family):
    for *values, value in family.samples(BUSY):
        assert len(values) == len(family.labels)
        assert float(value) >= 0


def test_no_two_families_have_one_name():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
