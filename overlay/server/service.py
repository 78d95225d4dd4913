"""One process of the overlay, behind gRPC's three methods.

    forward:         count -> read -> check -> admit -> wait -> combine -> write
    forward_stream:  the same for segments of requests, in overlay.server.stream_session
    metrics:         answers from values only, never waits

Puts the parts together and owns their start and stop order. Errors become statuses here, once.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import grpc

import overlay
from overlay.model import clocks as time
from overlay.model.errors import (
    BadRequest,
    Draining,
    HandlerFailed,
    OverlayError,
    PartsFailed,
)
from overlay.model.segments import Answers, Caller, Code, Executed, Mode, Route, Segment
from overlay.model.signatures import Function, gathered
from overlay.model.signatures import digest as functions_digest
from overlay.model.topology import Process, Topology
from overlay.observability.log_buffer import LogBuffer
from overlay.observability.map_progress import Maps
from overlay.observability.resources import resources_of
from overlay.peers.peers import Peers, PeerState
from overlay.queueing import admission
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import aggregate, planner
from overlay.routing.aggregate import Merge
from overlay.routing.dispatcher import Dispatcher
from overlay.server.background import BackgroundThreads
from overlay.server.idempotency import First, IdempotencyKeys, Outcome, Waiter
from overlay.server.log_reader import LogReader
from overlay.server.request_log import Ended, RequestLog, log_failure, unexpected
from overlay.server.stream_session import Desk as StreamDesk
from overlay.server.stream_session import Places
from overlay.server.stream_session import StreamCall as StreamCall
from overlay.server.stream_session import serve as streams_serve
from overlay.server.upstream import UpstreamHosts
from overlay.transport import codec
from overlay.transport.chunks import Budget
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines
from overlay.workers import api
from overlay.workers.executor import Executor
from overlay.workers.request_ids import ChosenIds

log = logging.getLogger("overlay.service")

NOTICE_S = 0.1  # for neighbours to route around this process; what is on its way is still taken
QUIET_S = 0.2  # without a single call, before the server closes: gRPC drops those that come then
MAX_QUIET_S = 1.0  # how long to wait for that; who was refused comes back later
LONGEST_NAME = 64  # characters of what a caller calls itself that are kept
LAST_WORDS_S = 0.5  # for answers on their way out, when the grace is over


@dataclass(frozen=True)
class Drained:
    """What came of a drain: requests refused while it lasted, and those it had to leave."""

    refused: int = 0
    left: int = 0
    took_s: float = 0.0


class Service:
    """The process `me` of the topology: made, then `start`, at the end `drain` and `close`."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        recent: LogBuffer | None = None,
        log_lines_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        """Imports the handlers and makes the links. Raises ConfigError.

        recent: what this process logged of late; its events are told to those who ask.
        """
        self._recent = recent or LogBuffer()
        self._log_lines_dropped = log_lines_dropped
        self.calls_without_message: Callable[[], int] = lambda: 0
        self.topology = topology
        self.me = topology.process(me)
        self.limits = topology.limits
        self.record = RequestLog(me, self.me.works)
        self.meter = self.record.meter
        sources = api.add_folder(topology.folder)
        # Process pools start before any channel is there.
        self.executor = Executor(topology, self.me) if self.me.works else None
        self._merges = _load_merges(topology)
        sources.keep_imported()
        lone = planner.lone(topology, me)
        self.links = Peers(topology.below(me), self.limits, topology.digest, lone, me)
        relay = Dispatcher(topology, me, self.links, self.executor)
        self.intake = RequestQueue(
            me,
            slots=topology.queue_slots(me),
            in_service=self.me.in_service,
            of_a_team=_half_if_several(topology, self.me.in_service),
            return_margin_s=topology.hops_below(me) * self.limits.return_margin_s,
            default_handler=_default_of_all(topology, self.me),
            max_bytes=self.limits.max_waiting_bytes,
            claim=relay.claim,
            start=relay.start,
            on_started=self.links.flush,
            on_ended=self.record.took,
        )
        self._keys = IdempotencyKeys(self.limits)
        self._chosen_ids = ChosenIds(self.limits)
        self._deadlines = Deadlines(_expire)
        limits = self.limits
        self._maps = Maps()
        self._stream_desk = StreamDesk(
            me=me,
            topology=topology,
            intake=self.intake,
            deadlines=self._deadlines,
            combine=self._combine_slice,
            received=self.meter.received,
            ended=self.record.ended_and_counted,
            crowded_out=self.record.crowded_out,
            wants_trace=self.record.wants_trace,
            threads=BackgroundThreads(limits.stream_threads, "stream"),
            streams=Places(limits.streams),
            held=Budget(limits.max_waiting_bytes),
            unread=Budget(limits.unread_bytes),
            ahead=Budget(limits.ahead_bytes),
            maps=self._maps,
            take_ids=self._chosen_ids.take,
        )
        self._hosts = UpstreamHosts(topology.above(me))
        self.journal = LogReader(topology, me, self._recent, self.links, log_lines_dropped)
        self.links.on_change = self.intake.kick
        if self.executor:
            self.executor.on_free = self.intake.kick
        self._draining = False
        self._last_single = 0.0  # when one came; monotonic seconds
        self._started = time.monotonic()

    @property
    def pool_threads(self) -> int:
        return self.limits.pool_threads(self.intake.slots)

    @property
    def is_busy(self) -> bool:
        """Whether anything is in service."""
        return self._unfinished > 0

    def start(self) -> None:
        self._deadlines.start()
        self._hosts.start()
        self.links.start()

    def forward(
        self, request: pb2.Request, context: grpc.ServicerContext
    ) -> pb2.Response | Future[pb2.Response]:
        """Answers one request, or ends it with the status of what went wrong.

        Later, and without a thread until then, where the first of its key has no answer yet.
        """
        self.meter.received(1)
        self._last_single = time.monotonic()
        request_id = request.request_id
        try:
            segment = self._read(request, context)
            request_id = segment.first_id
            if not segment.keyed:
                return self._completed(context, *self._answer(request, segment, context))
            found = self._enter_key(request, segment, context)
            if isinstance(found, First):
                return self._completed(
                    context, *self._answer_first(found, request, segment, context)
                )
            if isinstance(found, Waiter):
                return self._answer_later(found, segment, context)
            return self._repeated(context, found)
        except OverlayError as e:
            failed = e
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            failed = unexpected(e, request_id)
        self.record.count(failed)
        # Of a key that is asked again it is the first one's, which has the log lines.
        failed.request_id = failed.request_id or request_id
        return self._abort(context, failed)

    def forward_stream(self, call: StreamCall, context: grpc.ServicerContext) -> None:
        """Answers the requests of one stream until the client's half-close. Never waits."""
        caller = _caller(context)
        try:
            if self._draining:
                raise Draining(f"{self.me.id} is stopping and takes no new requests")
            neighbour = self._neighbour_of(context, caller)
            streams_serve(self._stream_desk, call, context, caller, neighbour)
        except OverlayError as e:
            call.fail(self._with_retry(e))

    def drain(self, grace_s: float, for_good: bool = False) -> Drained:
        """Refuses what waits and what comes, and lets the running end within `grace_s`.

        Those who send on streams hear of it first, a moment before anything is refused. At last the
        streams end, so that each of them knows what of its requests was not read.

        for_good: they hear that too, and do not wait for the process to be back.
        """
        began, refused_before = time.monotonic(), self.meter.counts().refused
        self._draining = True
        self._stream_desk.announce_stop(for_good)
        if self._stream_desk.streams:
            time.sleep(min(grace_s, NOTICE_S))
        waiting = self.intake.close()
        if waiting:
            log.info("%d waiting requests refused", waiting)
        until = began + grace_s
        _wait_while(lambda: self._unfinished > 0, until)
        left = self._unfinished
        if grace_s:
            quiet_by = min(until, time.monotonic() + MAX_QUIET_S)
            _wait_while(lambda: time.monotonic() - self._last_single < QUIET_S, quiet_by)
        self._stream_desk.end_streams()
        until = max(until, time.monotonic() + LAST_WORDS_S)
        _wait_while(lambda: bool(self._stream_desk.streams), until)
        refused = self.meter.counts().refused - refused_before
        return Drained(refused, left, time.monotonic() - began)

    def close(self) -> None:
        self._deadlines.stop()
        self._hosts.stop()
        self._stream_desk.threads.close()
        self.links.close()
        if self.executor:
            self.executor.close()
        self.record.close()

    def metrics(
        self, events: int = 0, requests: int = 0, functions: bool = False
    ) -> pb2.MetricsResponse:
        """The truth about this process now, with its last events and requests; never waits.

        functions: with what the handlers' functions are like, here and below.
        """
        counts = self.meter.counts()
        service, waiting = self.meter.service.spread, self.meter.waiting.spread
        all_waiting, all_service = self.meter.histograms()
        states = self.links.states()
        slots = self._known_slots(states)
        streams, streamed_waiting, streamed_active = self.intake.streamed
        now = time.monotonic()
        used = resources_of(self.executor.pids if self.executor else ())
        known_functions = self._known_functions(states, slots)
        return pb2.MetricsResponse(
            process_id=self.me.id,
            role=self.me.role,
            team=self.me.team,
            active_requests=self._active,
            max_capacity=self.me.in_service,
            is_healthy=not self._draining,
            queue_size=self.intake.waiting,
            avg_processing_time_ms=service.mean * 1e3,
            received=counts.received,
            completed=counts.completed,
            failed=counts.failed,
            refused=counts.refused,
            cancelled=counts.cancelled,
            refused_by_reason=self.meter.causes(),
            queue_slots=self.intake.slots,
            service_ms=codec.write_spread(service),
            waiting_ms=codec.write_spread(waiting),
            uptime_s=now - self._started,
            version=overlay.__version__,
            python=platform.python_version(),
            platform=f"{platform.system()}-{platform.machine()}",
            pid=os.getpid(),
            config_digest=self.topology.digest,
            slots=sum(max(known.values(), default=0) for known in slots.values()),
            neighbours=self._neighbours(states),
            handlers=self._handlers(),
            topology=self._processes(slots),
            log_lines_dropped=self._log_lines_dropped(),
            streams=streams,
            streamed_waiting=streamed_waiting,
            streamed_active=streamed_active,
            streamed_slots=streams * self.limits.window_rows,
            events=map(codec.write_event, self._recent.events(events)),
            requests=map(codec.write_story, self.record.stories.last(requests)),
            service=codec.write_histogram(all_service),
            waiting=codec.write_histogram(all_waiting),
            wall_time_s=time.time(),
            wire_format=codec.FORMAT,
            crowded_out=self.meter.crowds(),
            keys=self._keys.kept,
            key_bytes=self._keys.kept_bytes,
            key_waiters=self._keys.waiting,
            calls_without_message=self.calls_without_message(),
            maps=[codec.write_map(one, now) for one in self._maps.all()],
            cpu_s=used.cpu_s,
            memory_bytes=used.memory_bytes,
            functions=map(codec.write_function, known_functions if functions else ()),
            functions_digest=functions_digest(known_functions),
        )

    @property
    def _active(self) -> int:
        # A worker's handler may run on after its caller has gone; it still takes its slot.
        return self.executor.active if self.executor else self.intake.active

    @property
    def _unfinished(self) -> int:
        in_service = self.intake.active + self.intake.streamed[2]
        return max(self._active, in_service)

    def _answer(
        self, request: pb2.Request, segment: Segment, context: grpc.ServicerContext
    ) -> tuple[pb2.Response, str]:
        """The answer and its coverage. Raises OverlayError."""
        ended = Ended(segment, _caller(context))
        try:
            planner.check(self.topology, self.me.id, segment.route)
            self._chosen_ids.take(ended.caller, segment)
            answers = self._wait(ended, context, request.priority)
            results, failures = self._combine(segment, answers)
            if failures:
                raise failures[0][1]
            answer = answers.at(0)
            # A process that asks by a single call joins the parts itself.
            wanted = request.want_parts or segment.route.targets is not None
            response = codec.write_response(
                answer, segment.first_id, results[0], with_results=wanted
            )
            self._check_size(response.ByteSize())
        except OverlayError as e:
            ended.failures = ((0, e),)
            self.record.ended(ended)
            raise
        self.record.ended(ended)
        if request.want_trace:
            codec.write_trace(response, ended.trace)
        return response, aggregate.coverage(answer)

    def _completed(
        self, context: grpc.ServicerContext, response: pb2.Response, coverage: str
    ) -> pb2.Response:
        self.meter.completed(1)
        context.set_trailing_metadata(((codec.COVERAGE_KEY, coverage),))
        return response

    def _enter_key(
        self, request: pb2.Request, segment: Segment, context: grpc.ServicerContext
    ) -> First | Waiter | Outcome:
        route, parts = segment.route, request.want_parts
        asked = f"{route.mode}\n{route.team}\n{route.handler}\n{parts}\n".encode()
        question = (asked, request.payload)
        return self._keys.enter(_caller(context), request.idempotency_key, question)

    def _repeated(self, context: grpc.ServicerContext, outcome: Outcome) -> pb2.Response:
        """What the first of a key was answered. Raises what it was refused with."""
        if isinstance(outcome, OverlayError):
            raise outcome
        response = pb2.Response.FromString(outcome)
        return self._completed(context, response, aggregate.coverage(codec.read_response(response)))

    def _answer_later(
        self, waiter: Waiter, segment: Segment, context: grpc.ServicerContext
    ) -> Future[pb2.Response]:
        """Ends with the first of its key, at its own deadline, or when its caller leaves."""
        later: Future[pb2.Response] = Future()
        due = time.monotonic() + _until(segment.deadline)

        def done(outcome: Outcome) -> None:
            self._deadlines.forget(waiter, due)
            try:
                later.set_result(self._repeated(context, outcome))
            except OverlayError as e:
                self.record.count(e)
                later.set_exception(self._with_retry(e))

        self._deadlines.watch(waiter, due)
        waiter.on_done(done)
        if not context.add_callback(waiter.cancel):
            waiter.cancel()
        return later

    def _answer_first(
        self, first: First, request: pb2.Request, segment: Segment, context: grpc.ServicerContext
    ) -> tuple[pb2.Response, str]:
        try:
            response, coverage = self._answer(request, segment, context)
            answer = response.SerializeToString()
        except BaseException as e:  # noqa: BLE001 - whatever it is, it is what came of the key
            failed = e if isinstance(e, OverlayError) else unexpected(e)
            first.failed(failed)
            raise failed from None
        first.answered(answer)
        return response, coverage

    def _read(self, request: pb2.Request, context: grpc.ServicerContext) -> Segment:
        traced = self.record.wants_trace()
        try:
            return codec.read_request(request, self._deadline(context), self.limits, traced)
        except OverlayError as e:
            self.record.turned_away(e)
            raise

    def _wait(self, ended: Ended, context: grpc.ServicerContext, priority: int) -> Answers:
        segment, waiter = ended.segment, _Waiter()
        ticket = self.intake.admit(segment, waiter.sink, ended.caller, priority)
        ended.ticket = ticket
        # With a key the work goes on when its caller has left, who may come again for the answer.
        if not segment.keyed and not context.add_callback(partial(_left, weakref.ref(ticket))):
            ticket.end(Code.CANCELLED)  # the call was over before it began
        if not waiter.wait(_until(segment.deadline)):
            ticket.end(Code.DEADLINE_EXCEEDED)
            waiter.wait(1)  # it is made on this thread, or just now by another
        ended.answers = waiter.answers
        return waiter.answers

    def _combine(
        self, segment: Segment, answers: Answers, start: int = 0
    ) -> tuple[list[bytes], list[tuple[int, OverlayError]]]:
        """What a client gets: a result per row, empty where it failed; and why, by row.

        start: the first of the rows in the segment.
        """
        route = segment.route
        merge = self._merge_of(route, answers)
        if answers.flawless and (merge is None or route.mode is Mode.ANY):
            return aggregate.plain_results(answers), []
        results, failures = [], []
        for row in range(answers.count):
            answer = answers.at(row)
            failed = aggregate.failure(answer, self._retry_after_s())
            result = b""
            if failed is None:
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

    def _combine_slice(
        self, segment: Segment, answers: Answers, start: int
    ) -> tuple[list[bytes], list[tuple[int, OverlayError]]]:
        if segment.route.targets is None and segment.early is None:
            return self._combine(segment, answers, start)
        results = [b""] * answers.count if segment.early else []
        if answers.flawless:
            return results, []
        again_s = self._retry_after_s() if segment.early else 0.0
        failures = ((i, aggregate.failure(answers.at(i), again_s)) for i in range(answers.count))
        return results, [(i, failed) for i, failed in failures if failed is not None]

    def _check_size(self, size: int) -> None:
        most = self.limits.max_message_bytes
        if size > most:
            raise PartsFailed(
                f"the answer has {size:,} bytes, more than max_message_mib allows ({most:,})",
                Code.RESOURCE_EXHAUSTED,
                Executed.YES,
                "answer too large",
                None,
            )

    def _merge_of(self, route: Route, answers: Answers) -> Merge | None:
        if not self._merges:
            return None
        return self._merges.get(route.handler or self._common_default(answers))

    def _common_default(self, answers: Answers) -> str:
        processes = self.topology.processes
        workers = (processes.get(column.process_id) for column in answers.parts)
        defaults = {worker.handler for worker in workers if worker is not None}
        return defaults.pop() if len(defaults) == 1 else ""

    def _deadline(self, context: grpc.ServicerContext) -> float:
        # Without a client's deadline gRPC says 292 years. Read once: it follows the wall clock.
        remaining: float | None = context.time_remaining()
        if remaining is None or remaining > 1e9:
            remaining = self.limits.default_deadline_s
        return time.monotonic() + min(remaining, self.limits.max_deadline_s)

    def _neighbour_of(self, context: grpc.ServicerContext, caller: Caller) -> str:
        """The process above this one whose link it is: it says so, and comes from its host."""
        for key, value in context.invocation_metadata():
            if key == codec.PROCESS_KEY and self._hosts.has(value, caller.address):
                return str(value)
        return ""

    def _retry_after_s(self) -> float:
        if self._draining:
            return MAX_QUIET_S
        held_s = self.intake.held_s
        return admission.retry_after_s(self.intake.waiting, self.me.in_service, held_s)

    def _abort(self, context: grpc.ServicerContext, error: OverlayError) -> NoReturn:
        context.set_trailing_metadata(codec.trailers(self._with_retry(error)))
        context.abort(codec.grpc_code(error.code), str(error)[: codec.LONGEST_REASON])
        raise AssertionError("context.abort always raises")

    def _with_retry(self, error: OverlayError) -> OverlayError:
        """The same, of a refusal with the time after which it may be tried again."""
        refused = error.executed is Executed.NO
        if refused and error.retry_after_s is None and error.code in _RETRYABLE:
            error.retry_after_s = self._retry_after_s()
        return error

    def _known_slots(self, states: Sequence[PeerState]) -> dict[str, dict[str, int]]:
        if self.executor:
            return {self.me.id: self.executor.slots}
        known: dict[str, dict[str, int]] = {}
        for state in states:
            known.update({worker: dict(slots) for worker, slots in state.slots.items()})
        return known

    def _known_functions(
        self, states: Sequence[PeerState], slots: dict[str, dict[str, int]]
    ) -> tuple[Function, ...]:
        """Of the handlers of the configuration, at the workers that are there now."""
        if self.executor:
            mine = (self.me.id,)
            return gathered(f._replace(workers=mine) for f in self.executor.functions())
        told = (f for state in states for f in state.functions)
        here = (f._replace(workers=tuple(w for w in f.workers if w in slots)) for f in told)
        known = self.topology.handlers
        return gathered(f for f in here if f.workers and f.name in known)

    def _neighbours(self, states: Sequence[PeerState]) -> list[pb2.Neighbour]:
        now = time.monotonic()
        return [
            pb2.Neighbour(
                process_id=state.process_id,
                address=state.address,
                state=state.state,
                since_s=now - state.since,
                reason=state.reason,
                outstanding=state.outstanding,
                slots=state.total_slots,
                asked=state.asked,
                failed=state.failed,
                version=state.version,
                same_config=state.same_config,
                health=state.health,
                health_reason=state.health_reason,
                ejections=state.ejections,
                rtt_ms=state.rtt_s * 1e3,
            )
            for state in states
        ]

    def _handlers(self) -> list[pb2.HandlerMetrics]:
        if self.executor is None:
            return []
        return [
            pb2.HandlerMetrics(
                name=counts.name,
                run=counts.run,
                slots=counts.slots,
                active=counts.active,
                completed=counts.completed,
                failed=counts.failed,
                worked_ms=codec.write_spread(counts.worked),
            )
            for counts in self.executor.counts()
        ]

    def _processes(self, slots: dict[str, dict[str, int]]) -> list[pb2.Process]:
        return [
            pb2.Process(
                id=process.id,
                role=process.role,
                team=process.team,
                address=process.address,
                neighbors=process.neighbors,
                handler=process.handler if process.works else "",
                slots=slots.get(process.id, {}),
            )
            for process in self.topology.processes.values()
        ]


def _expire(due: QueuedSegment | Waiter) -> None:
    due.end(Code.DEADLINE_EXCEEDED)


def _half_if_several(topology: Topology, in_service: int) -> int:
    """A team that is stuck must not hold all places, where there are others."""
    teams = {worker.team for worker in topology.workers}
    return in_service if len(teams) < 2 else max(1, in_service // 2)


def _default_of_all(topology: Topology, me: Process) -> str:
    """What a request without a handler's name runs, where that is one and the same; else ""."""
    names = {worker.handler for worker in ((me,) if me.works else topology.workers)}
    return names.pop() if len(names) == 1 else ""


def _caller(context: grpc.ServicerContext) -> Caller:
    """Who asks, for fairness and not for safety."""
    names = (str(value) for key, value in context.invocation_metadata() if key == codec.CALLER_KEY)
    return Caller(codec.address_in(context.peer()), next(names, "")[:LONGEST_NAME])


class _Waiter:
    """Where a unary call's thread waits for its one answer; a bare lock wakes it cheapest."""

    def __init__(self) -> None:
        self._came = threading.Lock()
        self._came.acquire()
        self.answers = Answers(0, ())

    def sink(self, start: int, answers: Answers) -> None:
        self.answers = answers
        self._came.release()

    def wait(self, timeout_s: float) -> bool:
        return self._came.acquire(timeout=timeout_s)


def _left(ticket: weakref.ref[QueuedSegment]) -> None:
    """Its caller has left. gRPC keeps this for as long as the answer is not read, and so must not
    keep the ticket, which leads to the request and to its answer."""
    found = ticket()
    if found is not None:
        found.end(Code.CANCELLED)


def _wait_while(busy: Callable[[], bool], until: float) -> None:
    while busy() and time.monotonic() < until:
        time.sleep(0.02)


_RETRYABLE = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


def _load_merges(topology: Topology) -> dict[str, Merge]:
    specs = topology.handlers.values()
    return {spec.name: api.find(spec, spec.merge) for spec in specs if spec.merge}


def _until(deadline: float) -> float:
    # A moment before the client's own clock, so that it hears what came rather than nothing, on a
    # busy machine too. Nothing is lost by it: the links keep back more for the way home.
    left = deadline - time.monotonic()
    return max(0.0, left - min(0.02, left * 0.05))
