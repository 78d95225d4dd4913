"""What becomes of this process's requests: counts, times, summaries, and log lines of failures.

    took  -> times                of every row, at the cost of one
    ended -> counts               the same
          -> a trace, a summary   of some requests a second, and of failures
          -> lines in the log     of failures: some, then how many more; of each request on demand

Safe from any thread; owns none but that of its throttles.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overlay.calls import metrics_codec
from overlay.model import clocks as time
from overlay.model.errors import HandlerFailed, OverlayError
from overlay.model.segments import Caller, Code, Executed, Hop, Mode, Segment, Slice
from overlay.observability import trace as story
from overlay.observability.counters import Meter
from overlay.observability.request_summaries import RequestSummaries, RequestSummary
from overlay.observability.throttle import LogThrottle
from overlay.queueing.queued_segment import QueuedSegment
from overlay.transport.codec import pb2

log = logging.getLogger(__name__)

TOLD_AT_ONCE, TOLD_PER_S = 200, 20  # lines of requests that ask for one
MIN_REASONS = 3  # of rows that failed together, each with a summary; further ones join the last


@dataclass(slots=True)
class Ended:
    """Rows of a segment that have ended together.

    answers: None where there are none. start: the first of the rows. ticket: None for rows that
    were not admitted. failures: by row, counted from the first.
    """

    segment: Segment
    caller: Caller
    start: int = 0
    answers: Slice | None = None
    failures: Sequence[tuple[int, OverlayError]] = ()
    ticket: QueuedSegment | None = None
    trace: tuple[Hop, ...] = ()

    @property
    def count(self) -> int:
        return self.segment.count if self.answers is None else self.answers.count


class RequestLog:
    """The process `me`. works: it runs handlers itself."""

    def __init__(self, me: str, works: bool) -> None:
        self.meter = Meter()
        self.stories = RequestSummaries()
        self.wants_trace = self.stories.wants_trace
        self._me = me
        self._works = works
        self._failures = LogThrottle(_tell_more_failures)
        self._told = LogThrottle(_tell_more, TOLD_AT_ONCE, TOLD_PER_S)
        self._crowds = LogThrottle(_tell_more_crowded_out)

    def fill(self, made: pb2.MetricsResponse, requests: int) -> None:
        """Its figures, with so many of the last requests."""
        service, waiting = self.meter.service.spread, self.meter.waiting.spread
        all_waiting, all_service = self.meter.histograms()
        metrics_codec.fill(
            made,
            self.meter.counts(),
            refused_by_reason=self.meter.causes(),
            crowded_out=self.meter.crowds(),
            avg_processing_time_ms=service.mean * 1e3,
            service_ms=metrics_codec.write_spread(service),
            waiting_ms=metrics_codec.write_spread(waiting),
            service=metrics_codec.write_histogram(all_service),
            waiting=metrics_codec.write_histogram(all_waiting),
            requests=map(metrics_codec.write_story, self.stories.last(requests)),
        )

    def close(self) -> None:
        self._failures.flush()
        self._told.flush()
        self._crowds.flush()

    def count(self, error: OverlayError) -> None:
        if error.code is Code.CANCELLED:
            self.meter.cancelled()
        elif error.executed is Executed.NO:
            self.meter.refused(error.cause)
        else:
            self.meter.failed()

    def ended(self, ended: Ended) -> None:
        """Counts how each row ended; traces, summarises and logs it where that is wanted."""
        failures = ended.failures
        if ended.count > len(failures):
            self.meter.completed(ended.count - len(failures))
        for _, failed in failures:
            self.count(failed)
        if not (ended.segment.traced or ended.failures):
            return
        if ended.segment.traced or self.stories.wants_failure():
            waited_s, away_s = _times_here(ended)
            ended.trace = self._trace(ended, waited_s, away_s)
            self._add_stories(ended, waited_s + away_s)
        if ended.segment.log_lines:
            self._tell_each(ended)
        else:
            self._tell_failures(ended)

    def took(
        self,
        ticket: QueuedSegment,
        rows: int,
        answers: Slice,
        started: float | None,
        ended: float,
    ) -> None:
        """Notes the times of rows that have ended: as in overlay.queueing.request_queue.OnEnded.

        Service is the time that the worker reports for its handler; waiting is all other time until
        the answer was here: in queues, here and below, and on the way. Where parts went ahead of
        the answer, whose reader may have held it up, waiting is only what was reported of queues.
        """
        stay_s = ended - ticket.admitted
        if started is None:
            self.meter.took(rows, stay_s, None)
            return
        served_s = served(answers, ended - started, self._works)
        waited_s = stay_s - (served_s or 0.0)
        if ticket.segment.on_partial is not None:
            waited_s = min(waited_s, started - ticket.admitted + self._waited_below_s(answers))
        self.meter.took(rows, waited_s, served_s)

    def _waited_below_s(self, answers: Slice) -> float:
        return 0.0 if self._works or answers.early_us is None else answers.early_us[0] / 1e6

    def crowded_out(self, what: str, count: int, address: str) -> None:
        """Calls, streams or connections of an address were ended, or not let in, for others."""
        if not count:
            return
        self.meter.crowded_out(what, count)
        if self._crowds.allow(what):
            about = {"kind": "refusal", "count": count, "same": what}
            log.warning("too many %s: %d of %s ended", what, count, address, extra=about)
        else:
            self._crowds.add(what, count - 1)

    def _trace(self, ended: Ended, waited_s: float, away_s: float) -> tuple[Hop, ...]:
        times = int(waited_s * 1e6), int(away_s * 1e6)
        if ended.answers is None:
            code = ended.failures[0][1].code if ended.failures else Code.OK
            return (Hop(self._me, *times, 0, code),)
        if self._works and ended.answers.parts:
            return story.trace_of_worker(self._me, ended.answers)
        return story.trace_of(self._me, *times, ended.answers)

    def _add_stories(self, ended: Ended, total_s: float) -> None:
        ended_s, total_us = time.time(), int(total_s * 1e6)
        ids, first = ended.segment.all_ids, ended.start
        caller = _asked_by(ended)
        route = ended.segment.route
        asked = Mode(route.mode), route.team, route.handler

        def add(row: int, code: Code, reason: str, count: int) -> None:
            id_ = ids[first + row]
            told = RequestSummary(
                id_, *asked, ended_s, code, reason, count, ended.trace, total_us, caller
            )
            self.stories.add(told)

        groups = _alike(ended.failures)
        for row, error, count in groups:
            add(row, error.code, _public(ended, row, error), count)
        good = ended.count - len(ended.failures)
        if good:
            failed = {row for row, _ in ended.failures}
            row = next(row for row in range(ended.count) if row not in failed)
            reason = story.reason_of(ended.answers.at(row)) if ended.answers else ""
            add(row, Code.OK, reason, good)

    def _tell_each(self, ended: Ended) -> None:
        waited_s, away_s = _times_here(ended)
        failed = dict(ended.failures)
        ids = ended.segment.all_ids
        for row in range(ended.count):
            if not self._told.allow("told"):
                self._told.add("told", ended.count - row - 1)
                return
            error = failed.get(row)
            what, private = "answered", ""
            if error is not None:
                what, private = _words(ended, row, error)
            log.info(
                "%s; waited %.1f ms, in service %.1f ms, asked by %s",
                what, waited_s * 1e3, away_s * 1e3, _asked_by(ended),
                extra={"request_id": ids[ended.start + row], "private": private},
            )  # fmt: skip

    def _tell_failures(self, ended: Ended) -> None:
        ids = ended.segment.all_ids
        for row, error, count in _alike(ended.failures):
            if error.code is Code.CANCELLED:  # its caller knows, and it concerns no one else
                continue
            kind = _kind(error, ended.segment.route.handler, self._knows(ended, row, error))
            if self._failures.allow(kind):
                words, private = _words(ended, row, error)
                _tell_failure(
                    kind, f"{words}; asked by {_asked_by(ended)}", ids[ended.start + row], private
                )
            self._failures.add(kind, count - 1)

    def _knows(self, ended: Ended, row: int, error: OverlayError) -> bool:
        """Whether this process makes an event of it, so that each failure makes one.

        The process that ran a request reports it; of the others, the one that the client asked.
        """
        if error.executed is not Executed.YES:
            return not ended.segment.route.hops
        answer = None if self._works or ended.answers is None else ended.answers.at(row)
        return answer is None or all(part.ok for part in answer.parts)


def served(answers: Slice, away_s: float, works: bool = False) -> float | None:
    """How long the handler of these rows ran, of the time that they were away; None if none began.

    Of several workers it is the one that took longest in all. A row that is late or lost counts as
    running for all the time that its worker did not report as waiting.
    """
    if answers.refused is not None:
        return None if answers.refused.executed is Executed.NO else away_s
    early = answers.early_us
    longest_us, worked_us = (-1, None) if early is None else (sum(early), early[1])
    for column in answers.parts:
        waited, worked = column.waited_us, column.worked_us
        why = column.failed or next(iter(column.failures.values()), None)
        if why is not None and not worked:
            if why.executed is Executed.NO:
                continue
            worked = max(0, int(away_s * 1e6) - (0 if works else waited))
        if waited + worked > longest_us:
            longest_us, worked_us = waited + worked, worked
    return None if worked_us is None else min(worked_us / 1e6, away_s)


def log_failure(what: str, e: BaseException, request_id: int = 0) -> str:
    """Logs the error under an id. The sentence for its caller, which names only that id."""
    error_id = uuid.uuid4().hex[:8]
    log.error("error id %s: %s", error_id, what, exc_info=e, extra={"request_id": request_id})
    return f"{what}; error id {error_id} in this process's log"


def unexpected(e: BaseException, request_id: int = 0) -> OverlayError:
    what = "something went wrong in the overlay itself"
    return HandlerFailed(log_failure(what, e, request_id))


def _times_here(ended: Ended) -> tuple[float, float]:
    """How long its first row waited here, and how long it was in service here or below."""
    if ended.ticket is None:
        return 0.0, 0.0
    now, started = time.monotonic(), ended.ticket.started(ended.start)
    started = now if started is None else started
    return started - ended.ticket.admitted, now - started


def _alike(failures: Sequence[tuple[int, OverlayError]]) -> list[tuple[int, OverlayError, int]]:
    """The failures by their reason: the first row that has it, its error, how many have it."""
    groups: dict[str, tuple[int, OverlayError, int]] = {}
    last = ""
    for row, error in failures:
        reason = str(error)
        if reason not in groups and len(groups) == MIN_REASONS:
            reason = last
        first, kept, count = groups.get(reason, (row, error, 0))
        groups[reason] = first, kept, count + 1
        last = reason
    return list(groups.values())


def _asked_by(ended: Ended) -> str:
    """Its address first, whatever it says of itself: a hop list is only a claim too."""
    hops = ended.segment.route.hops
    return f"{hops[-1]} at {ended.caller}" if hops else str(ended.caller)


class _Kind(NamedTuple):
    """Failures that are logged together: of one word, cause and handler.

    handler: "" for a refusal, whose handler a stranger may have made up. event: "" where another
    process makes one of it.
    """

    word: str
    cause: str
    level: int
    handler: str
    event: str

    def __str__(self) -> str:
        return f"{self.word}, {self.cause}" + (f", in handler {self.handler}" * bool(self.handler))

    @property
    def about(self) -> dict[str, object]:
        return {"kind": self.event, "same": str(self)}


def _kind(error: OverlayError, handler: str = "", makes_event: bool = True) -> _Kind:
    level = logging.INFO if error.code in _THE_CALLERS else logging.WARNING
    if error.executed is Executed.NO:
        return _Kind("refused", error.cause, level, "", "refusal" if makes_event else "")
    cause = error.code.name.lower().replace("_", " ")
    return _Kind("failed", cause, level, handler, "failure" if makes_event else "")


def _tell_failure(kind: _Kind, words: str, request_id: int, private: str = "") -> None:
    about = {"request_id": request_id, "private": private}
    log.log(kind.level, "%s", words, extra=kind.about | about)


def _words(ended: Ended, row: int, error: OverlayError) -> tuple[str, str]:
    """What everyone may read of a failure, and what is only in this process's log."""
    kind, public = _kind(error), _public(ended, row, error)
    return f"{kind.word}, {kind.cause}: {public}", str(error) if public != str(error) else ""


def _public(ended: Ended, row: int, error: OverlayError) -> str:
    answer = ended.answers.at(row) if ended.answers else None
    return story.reason_of(answer) if answer and story.is_for_the_caller(answer) else str(error)


def _tell_more_failures(kind: Hashable, count: int) -> None:
    assert isinstance(kind, _Kind)
    about = {"count": count, "more": True}
    log.log(kind.level, "%s more %s", f"{count:,}", kind, extra=kind.about | about)


def _tell_more(kind: Hashable, count: int) -> None:
    log.info("%s more asked for a line and have none", f"{count:,}")


def _tell_more_crowded_out(what: Hashable, count: int) -> None:
    about = {"kind": "refusal", "count": count, "same": what, "more": True}
    log.warning("too many %s: %s more ended", what, f"{count:,}", extra=about)


_THE_CALLERS = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION)
