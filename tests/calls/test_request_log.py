"""What a process notes of its requests: exact counts, some stories, few lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from overlay.calls.request_log import Ended, RequestLog, served
from overlay.model.errors import (
    BadRequest,
    CallCancelled,
    HandlerFailed,
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
def record() -> Iterator[RequestLog]:
    made = RequestLog("W", works=True)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _lines_of_all_levels(caplog):
    caplog.set_level(logging.INFO, "overlay.calls.request_log")


def segment(rows: int = 1, *, traced: bool = False, told: bool = False, hops=()) -> Segment:
    route = Route(Mode.ANY, "pink", "h", hops)
    return Segment(route, Column([b"x"] * rows), 1e9, 0xAB, traced=traced, log_lines=told)


def ended(asked: Segment, *failures: tuple[int, OverlayError], start: int = 0) -> Ended:
    rows = len(asked) - start
    answers = Slice(rows, (PartSlice("W", Column([b""] * rows), worked_us=7),), ("W",))
    return Ended(asked, "10.0.0.9", start, answers, failures)


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_every_row_is_counted_and_only_some_are_told(record):
    record.ended(ended(segment(1000)))
    record.ended(ended(segment(10, traced=True), (3, QueueFull("full"))))

    counts = record.meter.counts()
    assert (counts.completed, counts.refused) == (1009, 1)
    assert [(s.count, s.code) for s in record.stories.last(9)] == [
        (9, Code.OK),
        (1, Code.RESOURCE_EXHAUSTED),
    ]


def test_who_leaves_when_all_is_counted_is_not_counted_again(record):
    none_left = ended(segment(500), start=500)

    record.ended(none_left)

    assert (none_left.count, record.meter.counts().completed) == (0, 0)


def test_a_story_tells_who_asked_what_and_how_it_ended(record):
    record.ended(ended(segment(5, traced=True), start=2))

    (story,) = record.stories.last(9)
    assert (story.request_id, story.count, story.caller) == (0xAD, 3, "10.0.0.9")
    assert (story.mode, story.team, story.handler) == (Mode.ANY, "pink", "h")
    assert story.hops == (Hop("W", 0, 7),)


def test_of_another_process_the_story_names_the_last_hop_as_caller(record):
    record.ended(ended(segment(traced=True, hops=("A", "B"))))

    assert record.stories.last(1)[0].caller == "B at 10.0.0.9"


def test_rows_that_failed_for_one_reason_are_one_story(record):
    full = [(row, QueueFull("full")) for row in range(4)]
    record.ended(ended(segment(6), *full, (4, BadRequest("no picture"))))

    told = [(s.count, s.reason) for s in record.stories.last(9)]
    assert sorted(told) == [(1, ""), (1, "no picture"), (4, "full")]


def test_a_thousand_different_reasons_are_few_stories(record):
    record.ended(ended(segment(1000), *[(n, BadRequest(f"row {n}")) for n in range(1000)]))

    told = record.stories.last(9)
    assert len(told) == 3
    assert sum(story.count for story in told) == 1000


def test_the_first_failures_have_a_line_and_of_the_rest_one_says_how_many(record, caplog):
    for _ in range(50):
        record.ended(ended(segment(20), *[(n, QueueFull("full")) for n in range(20)]))
    record.close()

    *first, last = lines(caplog)
    assert first == ["refused, queue full: full; asked by 10.0.0.9"] * 5
    assert last == "995 more refused, queue full"
    assert len({(record.kind, record.same) for record in caplog.records}) == 1, "one event"
    assert caplog.records[-1].count == 995


def test_what_was_not_told_is_told_within_a_second_or_so(record, caplog):
    for _ in range(7):
        record.ended(ended(segment(), (0, QueueFull("full"))))

    until(lambda: lines(caplog)[-1] == "2 more refused, queue full")


def test_a_line_names_its_request_and_its_kind(record, caplog):
    record.ended(ended(segment(3), (1, QueueFull("full"))))

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
def test_a_failure_is_an_event_at_the_one_process_that_knows(
    caplog, works, asked_by, error, part, event
):
    column = PartSlice("C", Column([b""]), failed=part)
    made = RequestLog("X", works)

    made.ended(
        Ended(segment(hops=asked_by), "10.0.0.9", 0, Slice(1, (column,), ("C",)), [(0, error)])
    )

    (line,) = caplog.records
    assert line.kind == event


def test_what_its_caller_did_wrong_or_gave_up_worries_nobody(record, caplog):
    record.ended(ended(segment(), (0, BadRequest("no picture"))))
    record.ended(ended(segment(), (0, CallCancelled("the caller left"))))

    (line,) = caplog.records
    assert (line.levelname, line.kind) == ("INFO", "refusal")


def test_a_request_that_wants_to_be_told_has_a_line_whatever_came_of_it(record, caplog):
    record.ended(ended(segment(traced=True, told=True)))
    record.ended(ended(segment(traced=True, told=True), (0, QueueFull("full"))))

    good, bad = lines(caplog)
    assert good.startswith("answered; waited 0.0 ms, in service 0.0 ms, asked by 10.0.0.9")
    assert bad.startswith("refused, queue full: full; waited")


def test_what_a_handler_tells_its_caller_is_told_to_nobody_else(record, caplog):
    """BadRequest's sentence may quote the payload."""
    said = Detail(Code.INVALID_ARGUMENT, "no such word: my password", Executed.YES)
    column = PartSlice("C", Column([b""]), failed=said)
    error = PartsFailed(f"C: {said.reason}", said.code, said.executed, "invalid argument", None)
    for told in (False, True):
        asked = segment(traced=told, told=told)
        answers = Slice(1, (column,), ("C",))
        record.ended(Ended(asked, "10.0.0.9", 0, answers, [(0, error)]))

    for story in record.stories.last(9):
        assert story.reason == "C: refused by its handler, in words for its caller"
    for line in caplog.records:
        assert "password" not in line.getMessage()
        assert "password" in line.private


def test_good_stories_never_push_out_failures():
    stories = RequestSummaries()

    def story(code: Code) -> RequestSummary:
        return RequestSummary(1, Mode.ALL, "", "", 1.0, code, "", 1, (), 1, "")

    stories.add(story(Code.INTERNAL))
    for _ in range(3 * KEPT):
        stories.add(story(Code.OK))

    assert [s.code for s in stories.last(1000)].count(Code.INTERNAL) == 1
    assert len(stories.last(1000)) == KEPT + 1
    assert len(stories.last(7)) == 7
    assert stories.last(0) == []


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


def test_many_that_ended_together_weigh_as_many():
    times = Times()
    times.add(1.0)
    assert times.spread == Spread(1.0, 1.0, 1.0, 1)
    times.add(0.1, 900)
    times.add(0.2, 99)

    spread = times.spread

    assert (spread.p50, spread.p99, spread.count) == (0.1, 0.2, 1000)
    assert spread.mean == pytest.approx((1.0 + 90 + 19.8) / 1000)


def test_the_oldest_of_more_than_can_be_kept_are_forgotten_row_by_row():
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


# Of rows that were away for 2 s.
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
def test_service_is_what_the_worker_says_and_never_more_than_can_be(parts, expected):
    assert served(Slice(1, tuple(parts)), 2.0) == expected


def test_what_was_refused_has_not_begun_unless_nobody_knows():
    for executed, expected in ((Executed.NO, None), (Executed.UNKNOWN, 2.0)):
        refused = Part("B", Code.UNAVAILABLE, executed=executed)
        assert served(Slice(1, (), refused=refused), 2.0) == expected


def test_of_a_worker_itself_what_it_waited_was_before_that():
    assert served(Slice(1, (part(1.5, why=LATE),)), 2.0, works=True) == 2.0


def test_parts_that_went_before_the_answer_count():
    assert served(Slice(1, (), early_us=(500_000, 250_000)), 2.0) == 0.25


def test_an_allowance_is_so_many_at_once_and_so_many_a_second():
    allowance = TokenBucket(2, 10)
    assert [allowance.take(0.0) for _ in range(3)] == [True, True, False]
    assert [allowance.take(0.11) for _ in range(2)] == [True, False]
    assert [allowance.take(99.0) for _ in range(3)] == [True, True, False]


def test_kinds_without_end_take_no_memory_without_end():
    repeats = LogThrottle(lambda kind, count: None)
    for n in range(1000):
        repeats.allow(n)

    assert len(repeats._kinds) <= 100
