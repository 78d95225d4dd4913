"""The one way of requests through this process, whether they come singly or on a stream.

    admit   check -> ids -> queue        a refusal is an answer too, and goes to the same sink
    finish  combine -> fit -> note       what the caller gets, and how each row ended

A single request is a segment of one. How a segment is read, what waits for its answers and how they
are written is up to the edge that it came by: unary or stream_session.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from overlay.calls.request_log import Ended, RequestLog, log_failure
from overlay.model.errors import BadRequest, HandlerFailed, OverlayError, PartsFailed
from overlay.model.segments import (
    Caller,
    Code,
    Executed,
    Hop,
    Mode,
    OnResult,
    Part,
    Route,
    Segment,
    Slice,
)
from overlay.model.topology import Topology
from overlay.queueing import admission
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment, refusal
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import aggregate, planner
from overlay.routing.aggregate import Merge
from overlay.transport.codec import pb2
from overlay.workers.request_ids import ChosenIds

NO_MERGES: Mapping[str, Merge] = {}
STOPPING_RETRY_S = 1.0  # a process that stops has closed its port by then


class Accepted:
    """A segment of this process from its arrival to its last answer.

    want_parts: its caller wants each worker's own bytes. ticket: its place in the queue, None while
    it has none. counted: rows whose end has been noted.
    """

    __slots__ = ("caller", "counted", "segment", "ticket", "want_parts")

    def __init__(self, segment: Segment, caller: Caller, want_parts: bool) -> None:
        self.segment = segment
        self.caller = caller
        self.want_parts = want_parts
        self.ticket: QueuedSegment | None = None
        self.counted = 0

    @property
    def from_process(self) -> bool:
        """Whether another process asks, which combines the parts itself."""
        return self.segment.route.targets is not None


class Finished(NamedTuple):
    """What goes back to the caller: a result per row, or none where a process asks, and failures by
    row, counted from the first of these answers."""

    answers: Slice
    results: Sequence[bytes]
    failures: list[tuple[int, OverlayError]]
    trace: tuple[Hop, ...]


class RequestPath:
    """Safe from any thread; never waits. draining: the process stops and says when to come back."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        queue: RequestQueue,
        record: RequestLog,
        merges: Mapping[str, Merge] = NO_MERGES,
    ) -> None:
        """merges: the merge function of each handler that has one."""
        self.me = me
        self.queue = queue
        self.record = record
        self.limits = topology.limits
        self.draining = False
        self._topology = topology
        self._in_service = topology.process(me).in_service
        self._ids = ChosenIds(topology.limits)
        self._merges = merges

    def fill(self, made: pb2.MetricsResponse) -> None:
        made.is_healthy = not self.draining
        made.queue_size, made.queue_slots = self.queue.waiting, self.queue.slots
        made.streams, made.streamed_waiting, made.streamed_active = self.queue.streamed
        made.streamed_slots = made.streams * self.limits.window_rows

    def check(self, route: Route) -> None:
        """Raises what is wrong with asking this process for it: UnknownName, LoopDetected ..."""
        planner.check(self._topology, self.me, route)

    def admit(
        self,
        accepted: Accepted,
        sink: OnResult,
        priority: int,
        flow: Flow[QueuedSegment] | None = None,
        wrong: OverlayError | None = None,
    ) -> None:
        """Puts the segment into the queue, or answers all of its rows with why not.

        flow: of its stream; None for a single request. wrong: why it cannot be served at all.
        """
        segment = accepted.segment
        self.record.meter.received(segment.count)
        try:
            if wrong is not None:
                raise wrong
            self._ids.take(accepted.caller, segment)
            if flow is None:
                accepted.ticket = self.queue.admit(segment, sink, accepted.caller, priority)
            else:
                accepted.ticket = self.queue.admit_to(flow, segment, sink, priority)
        except OverlayError as e:
            sink(0, Slice(segment.count, (), refused=_refusal(self.me, e)))

    def finish(
        self,
        accepted: Accepted,
        start: int,
        answers: Slice,
        size: int,
        theirs: int | None = None,
        good: Container[int] = (),
    ) -> Finished:
        """Makes of answers, from row `start` on, what their caller gets, and notes their end.

        size: as `size_of` has it. theirs: the largest answer that the caller takes, where it says
        so. good: rows of which a good part has gone before.
        """
        segment, early = accepted.segment, accepted.segment.on_partial is not None
        most = min(self.limits.max_message_bytes, theirs or self.limits.max_message_bytes)
        if size * (2 if accepted.want_parts and not early else 1) > most:
            answers = self.too_large(answers, size, theirs)
        results, failures = self._combined(segment, answers, start)
        merged = sum(map(len, results))  # by the user's own function: of any size
        if merged > most - (size if accepted.want_parts else 0):
            answers = self.too_large(answers, merged, theirs)
            results, failures = self._combined(segment, answers, start)
        if early:  # what came before may have been better
            failures = [(row, why) for row, why in failures if start + row not in good]
        return Finished(answers, results, failures, self.note(accepted, start, answers, failures))

    def note(
        self,
        accepted: Accepted,
        start: int,
        answers: Slice,
        failures: list[tuple[int, OverlayError]],
    ) -> tuple[Hop, ...]:
        """Counts and logs how these rows ended. Their trace, where one was wanted."""
        accepted.counted += answers.count
        ended = Ended(accepted.segment, accepted.caller, start, answers, failures, accepted.ticket)
        self.record.ended(ended)
        return ended.trace

    def too_large(self, answers: Slice, size: int, theirs: int | None = None) -> Slice:
        """Instead of answers that the other side would not receive."""
        most = self.limits.max_message_bytes
        reason = f"the answer has {size:,} bytes, more than max_message_mib allows ({most:,})"
        if theirs is not None and theirs < most:
            reason += f" at the process that asked ({theirs:,})"
        part = Part(self.me, Code.RESOURCE_EXHAUSTED, reason, executed=Executed.YES)
        return Slice(answers.count, (), answers.hops, part)

    def with_retry(self, error: OverlayError) -> OverlayError:
        """The same; a refusal that may be tried again says after how long."""
        refused = error.executed is Executed.NO
        if refused and error.retry_after_s is None and error.code in _RETRYABLE:
            error.retry_after_s = self._retry_after_s()
        return error

    def _combined(
        self, segment: Segment, answers: Slice, start: int
    ) -> tuple[list[bytes], list[tuple[int, OverlayError]]]:
        """A result per row, empty where it failed, and why it failed, by row.

        Only the process that a client asked joins or merges. Of parts that went before there is
        nothing to join.
        """
        route = segment.route
        joins = route.targets is None and segment.on_partial is None
        merge = self._merge_of(route, answers) if joins and route.mode is Mode.ALL else None
        if answers.flawless and merge is None:
            if joins:
                return aggregate.plain_results(answers), []
            return [] if route.targets is not None else [b""] * answers.count, []
        results, failures = [], []
        again_s = self._retry_after_s()
        for row in range(answers.count):
            answer, result = answers.at(row), b""
            failed = aggregate.failure(answer, again_s)
            if failed is None and joins:
                try:
                    result = aggregate.result(route.mode, answer, merge)
                except BadRequest as e:
                    failed = PartsFailed(str(e), e.code, Executed.YES, e.cause, None)
                except BaseException as e:  # noqa: BLE001 - user code, which may raise anything
                    id_ = segment.all_ids[start + row]
                    failed = HandlerFailed(log_failure("the handler's merge failed", e, id_))
            if failed is not None:
                failures.append((row, failed))
            results.append(result)
        return results, failures

    def _merge_of(self, route: Route, answers: Slice) -> Merge | None:
        if not self._merges:
            return None
        return self._merges.get(route.handler or self._common_default(answers))

    def _common_default(self, answers: Slice) -> str:
        processes = self._topology.processes
        workers = (processes.get(column.process_id) for column in answers.parts)
        defaults = {worker.handler for worker in workers if worker is not None}
        return defaults.pop() if len(defaults) == 1 else ""

    def _retry_after_s(self) -> float:
        if self.draining:
            return STOPPING_RETRY_S
        queue = self.queue
        return admission.retry_after_s(queue.waiting, self._in_service, queue.held_s)


def size_of(answers: Slice) -> int:
    """About how many bytes a slice takes; a reason is given with its part and with its row."""
    size, rows = 50 * len(answers.parts), answers.count
    if answers.refused is not None:
        size += rows * (50 + 2 * len(answers.refused.reason))
    for column in answers.parts:
        size += column.results.size
        if column.failed is not None:
            size += rows * (50 + 2 * len(column.failed.reason))
        for failure in column.failures.values():
            size += 50 + 2 * len(failure.reason)
    return size


def _refusal(me: str, error: OverlayError) -> Part:
    return replace(refusal(me, error), cause=error.cause)


_RETRYABLE = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
