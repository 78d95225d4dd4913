"""The path of every request through this process, single or streamed.

    admit   check -> ids -> queue           a refusal is an answer too, and goes to the same sink
    finish  combine -> size check -> note   what the caller gets, and how each row ended

A single request is a segment of one. The edge that received it, unary or stream_session, reads the
segment, waits for its answers and writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

from overlay.calls.request_log import Ended, RequestLog, log_failure
from overlay.model import access
from overlay.model.access import UNRESTRICTED, Rights
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
STOPPING_RETRY_S = 1.0  # by then a stopping process has closed its port


class Accepted:
    """A segment at this process, from its arrival to its last answer.

    want_parts: its caller wants each worker's own bytes. rights: the caller's. queued: None until
    it is admitted. counted: rows whose end has been noted. on_ended: also told how rows ended.
    """

    __slots__ = ("caller", "counted", "on_ended", "queued", "rights", "segment", "want_parts")

    def __init__(
        self, segment: Segment, caller: Caller, want_parts: bool, rights: Rights = UNRESTRICTED
    ) -> None:
        self.segment = segment
        self.caller = caller
        self.rights = rights
        self.want_parts = want_parts
        self.queued: QueuedSegment | None = None
        self.counted = 0
        self.on_ended: Callable[[Ended], None] | None = None

    @property
    def from_process(self) -> bool:
        """Whether the caller is another process, which combines the parts itself."""
        return self.segment.route.targets is not None


class Finished(NamedTuple):
    """What goes back to the caller.

    results: one per row; none for a caller that is a process. failures: (row, error), rows counted
    from the first of `answers`.
    """

    answers: Slice
    results: Sequence[bytes]
    failures: list[tuple[int, OverlayError]]
    trace: tuple[Hop, ...]


class RequestPath:
    """Thread-safe; never blocks. draining: the process is stopping; refusals say when to retry."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        queue: RequestQueue,
        request_log: RequestLog,
        merges: Mapping[str, Merge] = NO_MERGES,
    ) -> None:
        """merges: by handler, for those with a merge function."""
        self.me = me
        self.queue = queue
        self.request_log = request_log
        self.limits = topology.limits
        self.draining = False
        self._topology = topology
        self._in_service = topology.process(me).in_service
        self._ids = ChosenIds(topology.limits)
        self._merges = merges

    @property
    def order(self) -> Sequence[str]:
        """The ids of all processes, in the order of the configuration."""
        return tuple(self._topology.processes)

    @property
    def has_merges(self) -> bool:
        """Whether `finish` may call functions of the user."""
        return bool(self._merges)

    def fill(self, response: pb2.MetricsResponse) -> None:
        response.is_healthy = not self.draining
        response.queue_size, response.queue_slots = self.queue.waiting, self.queue.slots
        response.streams, response.streamed_waiting, response.streamed_active = self.queue.streamed
        response.streamed_slots = response.streams * self.limits.window_rows

    def check(self, route: Route, rights: Rights = UNRESTRICTED) -> None:
        """Raises UnknownName, LoopDetected and the like if this process cannot serve the route, and
        NotAllowed if its caller has not the rights."""
        planner.check(self._topology, self.me, route)
        if rights is not UNRESTRICTED:
            processes = self._topology.processes
            scope = planner.scope(self._topology, self.me, route)
            access.check_request(rights, route, (processes[worker] for worker in scope))

    def admit(
        self,
        accepted: Accepted,
        sink: OnResult,
        priority: int,
        flow: Flow[QueuedSegment] | None = None,
        error: OverlayError | None = None,
    ) -> None:
        """Puts the segment into the queue, or answers all of its rows with the refusal.

        flow: of its stream; None for a single request. error: why it cannot be served at all.
        """
        segment = accepted.segment
        self.request_log.meter.received(segment.count)
        try:
            if error is not None:
                raise error
            self._ids.take(accepted.caller, segment)
            if flow is None:
                accepted.queued = self.queue.admit(
                    segment, sink, accepted.caller, priority, accepted.rights
                )
            else:
                accepted.queued = self.queue.admit_to(flow, segment, sink, priority)
        except OverlayError as e:
            sink(0, Slice(segment.count, (), refused=refusal(self.me, e)))

    def finish(
        self,
        accepted: Accepted,
        start: int,
        answers: Slice,
        size: int,
        client_limit: int | None = None,
        answered: Container[int] = (),
    ) -> Finished:
        """Turns answers, from row `start` on, into what their caller gets, and notes their end.

        size: as from `size_of`. client_limit: the largest answer that the caller takes, if it says
        so. answered: rows for which a successful part was sent before.
        """
        segment, is_partial = accepted.segment, accepted.segment.on_partial is not None
        limit = min(self.limits.max_message_bytes, client_limit or self.limits.max_message_bytes)
        if size * (2 if accepted.want_parts and not is_partial else 1) > limit:
            answers = self.too_large(answers, size, client_limit)
        results, failures = self._combined(segment, answers, start)
        merged = sum(map(len, results))  # the user's own function may return any size
        if merged > limit - (size if accepted.want_parts else 0):
            answers = self.too_large(answers, merged, client_limit)
            results, failures = self._combined(segment, answers, start)
        if is_partial:  # a part sent before may have succeeded
            failures = [(row, why) for row, why in failures if start + row not in answered]
        return Finished(answers, results, failures, self.note(accepted, start, answers, failures))

    def note(
        self,
        accepted: Accepted,
        start: int,
        answers: Slice,
        failures: list[tuple[int, OverlayError]],
    ) -> tuple[Hop, ...]:
        """Counts and logs how these rows ended. Returns their trace, if one was wanted."""
        accepted.counted += answers.count
        ended = Ended(accepted.segment, accepted.caller, start, answers, failures, accepted.queued)
        self.request_log.record_end(ended)
        if accepted.on_ended is not None:
            accepted.on_ended(ended)
        return ended.trace

    def too_large(self, answers: Slice, size: int, client_limit: int | None = None) -> Slice:
        """Replaces answers that the caller would not accept."""
        limit = self.limits.max_message_bytes
        reason = f"the answer has {size:,} bytes, more than max_message_mib allows ({limit:,})"
        if client_limit is not None and client_limit < limit:
            reason += f" at the process that asked ({client_limit:,})"
        part = Part(self.me, Code.RESOURCE_EXHAUSTED, reason, executed=Executed.YES)
        return Slice(answers.count, (), answers.hops, part)

    def with_retry(self, error: OverlayError) -> OverlayError:
        """The same error; a refusal that may be retried says after how long."""
        refused = error.executed is Executed.NO
        if refused and error.retry_after_s is None and error.code in _RETRYABLE:
            error.retry_after_s = self._retry_after_s()
        return error

    def _combined(
        self, segment: Segment, answers: Slice, start: int
    ) -> tuple[list[bytes], list[tuple[int, OverlayError]]]:
        """A result per row, empty where it failed, and the failures.

        Only the process that a client asked joins or merges, and not if parts were sent before.
        """
        route = segment.route
        joins = route.targets is None and segment.on_partial is None
        merge = self._merge_of(route, answers) if joins and route.mode is Mode.ALL else None
        if answers.flawless and merge is None:
            if joins:
                return aggregate.plain_results(answers), []
            return [] if route.targets is not None else [b""] * answers.count, []
        results, failures = [], []
        retry_after_s = self._retry_after_s()
        for row in range(answers.count):
            answer, result = answers.at(row), b""
            failed = aggregate.failure(answer, retry_after_s)
            if failed is None and joins:
                try:
                    result = aggregate.result(route.mode, answer, merge)
                except BadRequest as e:
                    failed = PartsFailed(str(e), e.code, Executed.YES, e.cause, None)
                except BaseException as e:  # noqa: BLE001 - user code may raise anything
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
    """About how many bytes a slice takes; a reason is sent with its part and with its row."""
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


_RETRYABLE = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
