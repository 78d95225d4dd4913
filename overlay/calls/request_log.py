"""Records how requests end at this process: counts, times, summaries and log lines.

    record_times -> times                for every row, at the cost of one
    record_end   -> counts               for every row, at the cost of one
                 -> a trace, a summary   for a few requests per second, and for failures
                 -> log lines            for the first failures of a kind, then how many more;
                                         for every request that asks for one

Thread-safe; owns no thread except its throttles'.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overlay.calls import metrics_codec
from overlay.model import clocks as time
from overlay.model.errors import HandlerFailed, NotAllowed, OverlayError, of_status
from overlay.model.leases import LaneOutcome
from overlay.model.segments import Caller, Code, Executed, Hop, Mode, Route, Segment, Slice
from overlay.observability import trace as tracing
from overlay.observability.counters import Meter
from overlay.observability.request_summaries import RequestSummaries, RequestSummary
from overlay.observability.throttle import LogThrottle
from overlay.queueing.queued_segment import QueuedSegment
from overlay.transport.codec import pb2

log = logging.getLogger(__name__)

LINES_AT_ONCE, LINES_PER_S = 200, 20  # log lines for requests that ask for one
MIN_REASONS = 3  # reasons of rows that ended together; later ones join the last


@dataclass(slots=True)
class Ended:
    """Rows of a segment that ended together.

    start: the first of them. answers: None if there are none. failures: (row, error), rows counted
    from `start`. queued: None for rows that were not admitted.
    """

    segment: Segment
    caller: Caller
    start: int = 0
    answers: Slice | None = None
    failures: Sequence[tuple[int, OverlayError]] = ()
    queued: QueuedSegment | None = None
    trace: tuple[Hop, ...] = ()

    @property
    def count(self) -> int:
        return self.segment.count if self.answers is None else self.answers.count


class RequestLog:
    """works: the process `me` runs handlers itself."""

    def __init__(self, me: str, works: bool) -> None:
        self.meter = Meter()
        self.summaries = RequestSummaries()
        self.wants_trace = self.summaries.wants_trace
        self._me = me
        self._works = works
        self._failures = LogThrottle(_log_more_failures)
        self._lines = LogThrottle(_log_more_lines, LINES_AT_ONCE, LINES_PER_S)
        self._evictions = LogThrottle(_log_more_crowded_out)

    def fill(self, response: pb2.MetricsResponse, requests: int) -> None:
        """Fills in the counts and times, and the summaries of the last `requests` requests."""
        service, waiting = self.meter.service.spread, self.meter.waiting.spread
        all_waiting, all_service = self.meter.histograms()
        metrics_codec.fill(
            response,
            self.meter.counts(),
            refused_by_reason=self.meter.causes(),
            crowded_out=self.meter.crowds(),
            avg_processing_time_ms=service.mean * 1e3,
            service_ms=metrics_codec.write_spread(service),
            waiting_ms=metrics_codec.write_spread(waiting),
            service=metrics_codec.write_histogram(all_service),
            waiting=metrics_codec.write_histogram(all_waiting),
            requests=map(metrics_codec.write_summary, self.summaries.last(requests)),
        )

    def close(self) -> None:
        self._failures.flush()
        self._lines.flush()
        self._evictions.flush()

    def count(self, error: OverlayError) -> None:
        if error.code is Code.CANCELLED:
            self.meter.cancelled()
        elif error.executed is Executed.NO:
            self.meter.refused(error.cause)
        else:
            self.meter.failed()

    def record_end(self, ended: Ended) -> None:
        """Counts how each row ended. Traces, summarises and logs it where that is wanted."""
        failures = ended.failures
        if ended.count > len(failures):
            self.meter.completed(ended.count - len(failures))
        for _, failed in failures:
            self.count(failed)
        if not (ended.segment.traced or ended.failures):
            return
        if ended.segment.traced or self.summaries.wants_failure():
            waited_s, away_s = _times_here(ended)
            ended.trace = self._trace(ended, waited_s, away_s)
            self._add_summaries(ended, waited_s + away_s)
        if ended.segment.log_lines:
            self._log_each(ended)
        else:
            self._log_failures(ended)

    def record_times(
        self,
        queued: QueuedSegment,
        rows: int,
        answers: Slice,
        started: float | None,
        ended: float,
    ) -> None:
        """Records the times of rows that have ended. Arguments as for request_queue.OnEnded.

        Service is the time that the worker reports for its handler. Waiting is all other time until
        the answer arrived here: in queues, here and below, and on the network. If parts were sent
        ahead of the answer, their reader may have held it up, so only reported queueing counts.
        """
        stay_s = ended - queued.admitted
        if started is None:
            self.meter.took(rows, stay_s, None)
            return
        served_s = served(answers, ended - started, self._works)
        waited_s = stay_s - (served_s or 0.0)
        if queued.segment.on_partial is not None:
            waited_s = min(waited_s, started - queued.admitted + self._waited_below_s(answers))
        self.meter.took(rows, waited_s, served_s)

    def _waited_below_s(self, answers: Slice) -> float:
        return 0.0 if self._works or answers.early_us is None else answers.early_us[0] / 1e6

    def record_lane(self, worker: str, route: Route, caller: Caller, outcome: LaneOutcome) -> None:
        """Counts requests that this process's client sent straight to a worker, as if they had
        come by here. The worker has logged them."""
        code, count, reason = outcome.code, outcome.rows, outcome.reason
        self.meter.received(count)
        if code is Code.OK:
            self.meter.completed(count)
        else:
            kind = of_status(code, outcome.executed)
            for _ in range(count):
                self.count(kind(reason, code=code, executed=outcome.executed))
        has_run = outcome.executed is not Executed.NO
        self.meter.took(count, outcome.waited_s, outcome.worked_s if has_run else None)
        wants = self.wants_trace if code is Code.OK else self.summaries.wants_failure
        if wants():
            times = int(outcome.waited_s * 1e6), int(outcome.worked_s * 1e6)
            self.summaries.add(
                RequestSummary(
                    outcome.request_id, route.mode, route.team, route.handler, time.time(), code,
                    reason, count, (Hop(worker, *times, 0, code),), sum(times), str(caller),
                )
            )  # fmt: skip

    def not_allowed(self, error: NotAllowed, address: str) -> None:
        """A call was refused before it was read: for metrics, for logs, or of an invitation.

        It counts as received too, so that the counts add up; it has no summary.
        """
        self.meter.received(1)
        self.count(error)
        kind = _kind(error)
        if self._failures.allow(kind):
            text = f"{kind.word}, {kind.cause}: {error}; asked by {address}"
            _write_failure(kind, text, request_id=0)

    def crowded_out(self, what: str, count: int, address: str) -> None:
        """Calls, streams or connections of the address were ended or refused to make room."""
        if not count:
            return
        self.meter.crowded_out(what, count)
        if self._evictions.allow(what):
            about = {"kind": "refusal", "count": count, "same": what}
            log.warning("too many %s: %d of %s ended", what, count, address, extra=about)
        else:
            self._evictions.add(what, count - 1)

    def _trace(self, ended: Ended, waited_s: float, away_s: float) -> tuple[Hop, ...]:
        times = int(waited_s * 1e6), int(away_s * 1e6)
        if ended.answers is None:
            code = ended.failures[0][1].code if ended.failures else Code.OK
            return (Hop(self._me, *times, 0, code),)
        if self._works and ended.answers.parts:
            return tracing.trace_of_worker(self._me, ended.answers)
        return tracing.trace_of(self._me, *times, ended.answers)

    def _add_summaries(self, ended: Ended, total_s: float) -> None:
        ended_s, total_us = time.time(), int(total_s * 1e6)
        ids, first = ended.segment.all_ids, ended.start
        caller = _caller_of(ended)
        route = ended.segment.route
        asked = Mode(route.mode), route.team, route.handler

        def add(row: int, code: Code, reason: str, count: int) -> None:
            id_ = ids[first + row]
            summary = RequestSummary(
                id_, *asked, ended_s, code, reason, count, ended.trace, total_us, caller
            )
            self.summaries.add(summary)

        groups = _grouped(ended.failures)
        for row, error, count in groups:
            add(row, error.code, _public_reason(ended, row, error), count)
        good = ended.count - len(ended.failures)
        if good:
            failed = {row for row, _ in ended.failures}
            row = next(row for row in range(ended.count) if row not in failed)
            reason = tracing.reason_of(ended.answers.at(row)) if ended.answers else ""
            add(row, Code.OK, reason, good)

    def _log_each(self, ended: Ended) -> None:
        waited_s, away_s = _times_here(ended)
        failed = dict(ended.failures)
        ids = ended.segment.all_ids
        for row in range(ended.count):
            if not self._lines.allow("answered"):
                self._lines.add("answered", ended.count - row - 1)
                return
            error = failed.get(row)
            what, private = "answered", ""
            if error is not None:
                what, private = _texts(ended, row, error)
            log.info(
                "%s; waited %.1f ms, in service %.1f ms, asked by %s",
                what, waited_s * 1e3, away_s * 1e3, _caller_of(ended),
                extra={"request_id": ids[ended.start + row], "private": private},
            )  # fmt: skip

    def _log_failures(self, ended: Ended) -> None:
        ids = ended.segment.all_ids
        for row, error, count in _grouped(ended.failures):
            if error.code is Code.CANCELLED:  # its caller did this, and it concerns no one else
                continue
            kind = _kind(error, ended.segment.route.handler, self._reports(ended, row, error))
            if self._failures.allow(kind):
                text, private = _texts(ended, row, error)
                _write_failure(
                    kind, f"{text}; asked by {_caller_of(ended)}", ids[ended.start + row], private
                )
            self._failures.add(kind, count - 1)

    def _reports(self, ended: Ended, row: int, error: OverlayError) -> bool:
        """Whether this process makes an event of the failure, so that each failure makes one.

        The process that ran the request does; if none did, the one that the client asked.
        """
        if error.executed is not Executed.YES:
            return not ended.segment.route.hops
        answer = None if self._works or ended.answers is None else ended.answers.at(row)
        return answer is None or all(part.ok for part in answer.parts)


def served(answers: Slice, away_s: float, works: bool = False) -> float | None:
    """How long the rows' handler ran, at most `away_s`; None if no handler started.

    With several workers, the one that took longest in total counts. A late or lost row counts as
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
    """Logs the error under an id. Returns the sentence for the caller, which names only the id."""
    error_id = uuid.uuid4().hex[:8]
    log.error("error id %s: %s", error_id, what, exc_info=e, extra={"request_id": request_id})
    return f"{what}; error id {error_id} in this process's log"


def unexpected(e: BaseException, request_id: int = 0) -> OverlayError:
    what = "the overlay itself failed"
    return HandlerFailed(log_failure(what, e, request_id))


def _times_here(ended: Ended) -> tuple[float, float]:
    """How long its first row waited here, and how long it was in service, here or below."""
    if ended.queued is None:
        return 0.0, 0.0
    now, started = time.monotonic(), ended.queued.started(ended.start)
    started = now if started is None else started
    return started - ended.queued.admitted, now - started


def _grouped(failures: Sequence[tuple[int, OverlayError]]) -> list[tuple[int, OverlayError, int]]:
    """The failures by reason, each as its first row, that row's error, and the number of rows."""
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


def _caller_of(ended: Ended) -> str:
    """The hop list is only a claim, so the address is always named too."""
    hops = ended.segment.route.hops
    return f"{hops[-1]} at {ended.caller}" if hops else str(ended.caller)


class _Kind(NamedTuple):
    """Failures that are logged together.

    word: "refused" or "failed". handler: "" for a refusal, as a client may have made its name up.
    event: the kind of event, "" if another process makes one of it.
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
    level = logging.INFO if error.code in _CALLER_ERRORS else logging.WARNING
    if error.executed is Executed.NO:
        return _Kind("refused", error.cause, level, "", "refusal" if makes_event else "")
    cause = error.code.name.lower().replace("_", " ")
    return _Kind("failed", cause, level, handler, "failure" if makes_event else "")


def _write_failure(kind: _Kind, text: str, request_id: int, private: str = "") -> None:
    about = {"request_id": request_id, "private": private}
    log.log(kind.level, "%s", text, extra=kind.about | about)


def _texts(ended: Ended, row: int, error: OverlayError) -> tuple[str, str]:
    """A failure's public text, and the text for this process's log alone."""
    kind, public = _kind(error), _public_reason(ended, row, error)
    return f"{kind.word}, {kind.cause}: {public}", str(error) if public != str(error) else ""


def _public_reason(ended: Ended, row: int, error: OverlayError) -> str:
    answer = ended.answers.at(row) if ended.answers else None
    return tracing.reason_of(answer) if answer and tracing.is_for_the_caller(answer) else str(error)


def _log_more_failures(kind: Hashable, count: int) -> None:
    assert isinstance(kind, _Kind)
    about = {"count": count, "more": True}
    log.log(kind.level, "%s more %s", f"{count:,}", kind, extra=kind.about | about)


def _log_more_lines(kind: Hashable, count: int) -> None:
    log.info("%s more requests asked for a line and got none", f"{count:,}")


def _log_more_crowded_out(what: Hashable, count: int) -> None:
    about = {"kind": "refusal", "count": count, "same": what, "more": True}
    log.warning("too many %s: %s more ended", what, f"{count:,}", extra=about)


_CALLER_ERRORS = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION)
