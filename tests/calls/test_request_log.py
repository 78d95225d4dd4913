"""What a process records about its requests: exact counts, some summaries, few log lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from overlay.calls.request_log import Ended, RequestLog, served
from overlay.model.errors import (
    BadRequest,
    CallCancelled,
    HandlerFailed,
    NotAllowed,
    OverlayError,
    PartsFailed,
    QueueFull,
)
from overlay.model.segments import (
    Code,
    Column,
    Detail,
    Executed,
    Hop,
    Mode,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.observability.counters import BOUNDS_S, RECENT, Meter, Spread, Times
from overlay.observability.request_summaries import KEPT, RequestSummaries, RequestSummary
from overlay.observability.throttle import LogThrottle, TokenBucket
from tests.harness.cluster import until


@pytest.fixture
def request_log() -> Iterator[RequestLog]:
    log = RequestLog("W", works=True)
    yield log
    log.close()


@pytest.fixture(autouse=True)
def _lines_of_all_levels(caplog):
    caplog.set_level(logging.INFO, "overlay.calls.request_log")


def segment(rows: int = 1, *, traced: bool = False, log_lines: bool = False, hops=()) -> Segment:
    route = Route(Mode.ANY, "pink", "h", hops)
    return Segment(route, Column([b"x"] * rows), 1e9, 0xAB, traced=traced, log_lines=log_lines)


def ended(asked: Segment, *failures: tuple[int, OverlayError], start: int = 0) -> Ended:
    rows = len(asked) - start
    answers = Slice(rows, (PartSlice("W", Column([b""] * rows), worked_us=7),), ("W",))
    return Ended(asked, "10.0.0.9", start, answers, failures)


def lines(caplog) -> list[str]:
    return [line.getMessage() for line in caplog.records]


def test_every_row_is_counted_and_some_get_a_summary(request_log):
    request_log.record_end(ended(segment(1000)))
    request_log.record_end(ended(segment(10, traced=True), (3, QueueFull("full"))))

    counts = request_log.meter.counts()
    assert (counts.completed, counts.refused) == (1009, 1)
    assert [(s.count, s.code) for s in request_log.summaries.last(9)] == [
        (9, Code.OK),
        (1, Code.RESOURCE_EXHAUSTED),
    ]


def test_a_caller_that_leaves_after_its_rows_are_counted_is_not_counted_again(request_log):
    none_left = ended(segment(500), start=500)

    request_log.record_end(none_left)

    assert (none_left.count, request_log.meter.counts().completed) == (0, 0)


def test_a_summary_has_the_caller_the_request_and_how_it_ended(request_log):
    request_log.record_end(ended(segment(5, traced=True), start=2))

    (summary,) = request_log.summaries.last(9)
    assert (summary.request_id, summary.count, summary.caller) == (0xAD, 3, "10.0.0.9")
    assert (summary.mode, summary.team, summary.handler) == (Mode.ANY, "pink", "h")
    assert summary.hops == (Hop("W", 0, 7),)


def test_the_caller_of_a_request_from_another_process_is_its_last_hop(request_log):
    request_log.record_end(ended(segment(traced=True, hops=("A", "B"))))

    assert request_log.summaries.last(1)[0].caller == "B at 10.0.0.9"


def test_rows_that_failed_for_one_reason_share_a_summary(request_log):
    full = [(row, QueueFull("full")) for row in range(4)]
    request_log.record_end(ended(segment(6), *full, (4, BadRequest("no picture"))))

    found = [(s.count, s.reason) for s in request_log.summaries.last(9)]
    assert sorted(found) == [(1, ""), (1, "no picture"), (4, "full")]


def test_a_thousand_different_reasons_make_few_summaries(request_log):
    failures = [(n, BadRequest(f"row {n}")) for n in range(1000)]
    request_log.record_end(ended(segment(1000), *failures))

    summaries = request_log.summaries.last(9)
    assert len(summaries) == 3
    assert sum(summary.count for summary in summaries) == 1000


def test_the_first_failures_are_logged_and_one_line_counts_the_rest(request_log, caplog):
    for _ in range(50):
        request_log.record_end(ended(segment(20), *[(n, QueueFull("full")) for n in range(20)]))
    request_log.close()

    *first, last = lines(caplog)
    assert first == ["refused, queue full: full; asked by 10.0.0.9"] * 5
    assert last == "995 more refused, queue full"
    assert len({(line.kind, line.same) for line in caplog.records}) == 1, "one event"
    assert caplog.records[-1].count == 995


def test_failures_without_a_line_are_counted_in_the_log_within_a_second_or_so(request_log, caplog):
    for _ in range(7):
        request_log.record_end(ended(segment(), (0, QueueFull("full"))))

    until(lambda: lines(caplog)[-1] == "2 more refused, queue full")


def test_a_line_names_its_request_and_its_kind(request_log, caplog):
    request_log.record_end(ended(segment(3), (1, QueueFull("full"))))

    (line,) = caplog.records
    assert (line.request_id, line.kind, line.levelname) == (0xAC, "refusal", "WARNING")


BROKEN = HandlerFailed("C: it broke")
LOST = PartsFailed("C was lost", Code.UNAVAILABLE, Executed.UNKNOWN, "lost", None)
TOO_LARGE = PartsFailed("it is large", Code.RESOURCE_EXHAUSTED, Executed.YES, "too large", None)
WELL, NOT = None, Detail(Code.INTERNAL, "it broke", Executed.YES)


@pytest.mark.parametrize(
    ("works", "asked_by", "error", "part", "event"),
    [
        (True, (), BROKEN, NOT, "failure"),
        (True, ("A", "E"), BROKEN, NOT, "failure"),
        (False, ("A",), BROKEN, NOT, ""),
        (False, (), BROKEN, NOT, ""),
        (False, (), TOO_LARGE, WELL, "failure"),
        (False, (), LOST, NOT, "failure"),
        (False, ("A",), LOST, NOT, ""),
        (True, ("A", "E"), QueueFull("full"), WELL, ""),
        (True, (), QueueFull("full"), WELL, "refusal"),
    ],
)
def test_a_failure_is_an_event_at_exactly_one_process(caplog, works, asked_by, error, part, event):
    column = PartSlice("C", Column([b""]), failed=part)
    log = RequestLog("X", works)

    log.record_end(
        Ended(segment(hops=asked_by), "10.0.0.9", 0, Slice(1, (column,), ("C",)), [(0, error)])
    )

    (line,) = caplog.records
    assert line.kind == event


def test_bad_requests_are_logged_as_info_and_cancelled_ones_not_at_all(request_log, caplog):
    request_log.record_end(ended(segment(), (0, BadRequest("no picture"))))
    request_log.record_end(ended(segment(), (0, CallCancelled("the caller left"))))

    (line,) = caplog.records
    assert (line.levelname, line.kind) == ("INFO", "refusal")


def test_a_call_that_is_refused_before_it_is_read_keeps_the_counts_in_balance(request_log, caplog):
    for _ in range(9):
        request_log.not_allowed(NotAllowed("anna may not read logs here"), "10.0.0.9")

    counts = request_log.meter.counts()
    assert (counts.received, counts.refused) == (9, 9)
    assert request_log.meter.causes() == {"not allowed": 9}
    said = "refused, not allowed: anna may not read logs here; asked by 10.0.0.9"
    assert [line.getMessage() for line in caplog.records].count(said) == 5


def test_a_request_that_asks_for_a_log_line_gets_one_however_it_ends(request_log, caplog):
    request_log.record_end(ended(segment(traced=True, log_lines=True)))
    request_log.record_end(ended(segment(traced=True, log_lines=True), (0, QueueFull("full"))))

    good, bad = lines(caplog)
    assert good.startswith("answered; waited 0.0 ms, in service 0.0 ms, asked by 10.0.0.9")
    assert bad.startswith("refused, queue full: full; waited")


def test_a_handlers_words_for_its_caller_reach_no_one_else(request_log, caplog):
    """BadRequest's sentence may quote the payload."""
    why = Detail(Code.INVALID_ARGUMENT, "no such word: my password", Executed.YES)
    column = PartSlice("C", Column([b""]), failed=why)
    error = PartsFailed(f"C: {why.reason}", why.code, why.executed, "invalid argument", None)
    for log_lines in (False, True):
        asked = segment(traced=log_lines, log_lines=log_lines)
        answers = Slice(1, (column,), ("C",))
        request_log.record_end(Ended(asked, "10.0.0.9", 0, answers, [(0, error)]))

    for summary in request_log.summaries.last(9):
        assert summary.reason == "C: refused by its handler, in words for its caller"
    for line in caplog.records:
        assert "password" not in line.getMessage()
        assert "password" in line.private


def test_summaries_of_successes_never_displace_failures():
    summaries = RequestSummaries()

    def summary(code: Code) -> RequestSummary:
        return RequestSummary(1, Mode.ALL, "", "", 1.0, code, "", 1, (), 1, "")

    summaries.add(summary(Code.INTERNAL))
    for _ in range(3 * KEPT):
        summaries.add(summary(Code.OK))

    assert [s.code for s in summaries.last(1000)].count(Code.INTERNAL) == 1
    assert len(summaries.last(1000)) == KEPT + 1
    assert len(summaries.last(7)) == 7
    assert summaries.last(0) == []


def test_a_histogram_counts_each_time_below_its_bound():
    meter = Meter()
    for seconds, rows in [(0.0, 1), (0.0001, 2), (0.0015, 3), (1e9, 4)]:
        meter.took(rows, seconds, None)
    meter.took(5, 0.0, 0.3)

    waited, served = meter.histograms()

    assert len(waited.counts) == len(BOUNDS_S) + 1
    assert (waited.counts[0], waited.counts[BOUNDS_S.index(0.002)], waited.counts[-1]) == (8, 3, 4)
    assert (waited.count, served.count) == (15, 5)
    assert (served.counts[BOUNDS_S.index(0.5)], served.sum_s) == (5, 1.5)
    assert waited.sum_s == pytest.approx(4e9, rel=1e-6)


def test_rows_that_ended_together_weigh_as_much_as_single_ones():
    times = Times()
    times.add(1.0)
    assert times.spread == Spread(1.0, 1.0, 1.0, 1)
    times.add(0.1, 900)
    times.add(0.2, 99)

    spread = times.spread

    assert (spread.p50, spread.p99, spread.count) == (0.1, 0.2, 1000)
    assert spread.mean == pytest.approx((1.0 + 90 + 19.8) / 1000)


def test_the_oldest_times_are_dropped_row_by_row():
    times = Times()
    assert times.spread == Spread()
    times.add(9.0, 5000)
    times.add(1.0, RECENT - 1)
    assert times.spread == Spread(1.0, 1.0, pytest.approx(1 + 8 / RECENT), RECENT)
    times.add(2.0)
    assert times.spread == Spread(1.0, 1.0, pytest.approx(1 + 1 / RECENT), RECENT)


def part(waited_s=0.0, worked_s=0.0, why: Detail | None = None) -> PartSlice:
    failures = {} if why is None else {0: why}
    times = int(waited_s * 1e6), int(worked_s * 1e6)
    return PartSlice("C", Column([b""]), (), failures, None, *times)


NEVER = Detail(Code.UNAVAILABLE, "", Executed.NO)
LATE = Detail(Code.DEADLINE_EXCEEDED, "", Executed.YES)
LOST = Detail(Code.UNAVAILABLE, "")
RAISED = Detail(Code.INTERNAL, "", Executed.YES)


# Rows that were away for 2 s.
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part(0.5, 0.25)], 0.25),
        ([part()], 0.0),
        ([part(0.5, 0.25, RAISED)], 0.25),
        ([part(why=NEVER)], None),
        ([part(1.5, why=LATE)], 0.5),
        ([part(9.0, why=LATE)], 0.0),
        ([part(why=LOST)], 2.0),
        ([part(0, 4000)], 2.0),
        ([part(1.0, 0.5), part(0, 1.25), part(why=NEVER)], 0.5),
        ([part(0.5, 1.0), part(1.0, 0.25)], 1.0),
    ],
)
def test_service_time_is_the_workers_and_never_more_than_the_time_away(parts, expected):
    assert served(Slice(1, tuple(parts)), 2.0) == expected


def test_a_refused_row_has_no_service_time_unless_it_may_have_run():
    for executed, expected in ((Executed.NO, None), (Executed.UNKNOWN, 2.0)):
        refused = Part("B", Code.UNAVAILABLE, executed=executed)
        assert served(Slice(1, (), refused=refused), 2.0) == expected


def test_a_workers_own_waiting_is_not_part_of_the_time_away():
    assert served(Slice(1, (part(1.5, why=LATE),)), 2.0, works=True) == 2.0


def test_parts_sent_ahead_of_the_answer_count():
    assert served(Slice(1, (), early_us=(500_000, 250_000)), 2.0) == 0.25


def test_a_token_bucket_allows_a_burst_and_then_a_rate():
    bucket = TokenBucket(2, 10)
    assert [bucket.take(0.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(0.11) for _ in range(2)] == [True, False]
    assert [bucket.take(99.0) for _ in range(3)] == [True, True, False]


def test_endless_kinds_take_bounded_memory():
    throttle = LogThrottle(lambda kind, count: None)
    for n in range(1000):
        throttle.allow(n)

    assert len(throttle._kinds) <= 100
