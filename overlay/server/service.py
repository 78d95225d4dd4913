"""One process of the overlay, behind the three RPCs of OverlayNode.

    forward         a single request, in calls.unary
    forward_stream  segments of requests, in calls.stream_session
    metrics         never blocks

Assembles the parts, and owns the order in which they start and stop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import grpc

from overlay.calls.gate import Gate
from overlay.calls.idempotency import IdempotencyKeys, Waiter
from overlay.calls.leases import Leases
from overlay.calls.lender import Lender
from overlay.calls.reception import Call
from overlay.calls.request_log import RequestLog
from overlay.calls.request_path import STOPPING_RETRY_S, RequestPath
from overlay.calls.stream_session import StreamSessions, just_kick
from overlay.calls.unary import UnaryRequests
from overlay.jobs.requests import Jobs
from overlay.model import clocks as time
from overlay.model.errors import NoJournal, NotAllowed, OverlayError
from overlay.model.jobs import WorkProgress
from overlay.model.segments import Caller, Code
from overlay.model.topology import ROLES, Process, Topology
from overlay.observability.log_buffer import LogBuffer
from overlay.peers.peers import Peers
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import planner
from overlay.routing.aggregate import Merge
from overlay.routing.dispatcher import Dispatcher
from overlay.server.log_reader import LogReader
from overlay.server.metrics import ProcessMetrics
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines, Looks
from overlay.transport.upstream import UpstreamHosts
from overlay.workers import api
from overlay.workers.executor import Executor
from overlay.workers.progress import ProgressBook
from overlay.workers.progress import send_to as send_progress_to

log = logging.getLogger(__name__)

NOTICE_S = 0.1  # for neighbours to route around this process; requests in transit are accepted
QUIET_S = 0.2  # without a unary call before the server closes, as it drops calls that arrive then
MAX_QUIET_S = STOPPING_RETRY_S  # how long to wait for that; refused clients come back later
LONGEST_NAME = 64  # characters that are kept of a caller's own name
PROGRESS_S = 0.2  # how often the progress of handlers is passed on
FLUSH_S = 0.5  # for answers still being written when the grace is over


@dataclass(frozen=True)
class Drained:
    """The result of a drain. left: requests that did not end."""

    refused: int = 0
    left: int = 0
    took_s: float = 0.0


class Service:
    """The process `me`. Call `start` once, and `drain` and `close` at the end."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        log_buffer: LogBuffer | None = None,
        dropped: Callable[[], int] = lambda: 0,
        gate: Gate | None = None,
    ) -> None:
        """Imports the handlers and makes the links. Raises ConfigError.

        log_buffer: the last lines of the log, and events. dropped: counts lines not written.
        gate: knows who is calling.
        """
        self._gate = gate or Gate()
        self.calls_without_message: Callable[[], int] = lambda: 0
        self.topology = topology
        self.me = topology.process(me)
        self.limits = topology.limits
        self.request_log = RequestLog(me, self.me.works)
        self.meter = self.request_log.meter
        sources = api.add_folder(topology.folder)
        # Process pools start before any gRPC channel exists.
        self.executor = Executor(topology, self.me) if self.me.works else None
        merges = _load_merges(topology)
        sources.keep_imported()
        lone = planner.lone(topology, me)
        credentials = self._gate.credentials
        workers = [worker.id for worker in topology.workers]
        self.links = Peers(
            topology.below(me), self.limits, topology.digest, lone, me, credentials, workers
        )
        dispatcher = Dispatcher(topology, me, self.links, self.executor)
        self.queue = RequestQueue(
            me,
            slots=topology.queue_slots(me),
            in_service=self.me.in_service,
            team_limit=_half_if_several(topology, self.me.in_service),
            return_margin_s=topology.hops_below(me) * self.limits.return_margin_s,
            default_handler=_common_default(topology, self.me),
            max_bytes=self.limits.max_waiting_bytes,
            claim=dispatcher.claim,
            start=dispatcher.start,
            on_started=self.links.flush,
            on_ended=self.request_log.record_times,
        )
        self._keys = IdempotencyKeys(self.limits)
        self._deadlines = Deadlines(_expire)
        self._path = RequestPath(topology, me, self.queue, self.request_log, merges)
        self._unary = UnaryRequests(self._path, self._keys, self._deadlines)
        start = self.executor.start_here if self.executor else just_kick
        self._leases = Leases(topology, me, self.links, self._deadlines)
        # Of several leaders one lends: each would count only its own leases of a worker.
        is_spare = ROLES[self.me.role].queued and topology.leader.id != me
        self._lender = None if self.executor or is_spare else self._make_lender()
        streams = self._path, self._deadlines, start, self._leases, self._lender
        self._sessions = StreamSessions(*streams)
        self._jobs: Jobs | None = None
        if topology.journal and ROLES[self.me.role].queued:
            below = self._path, self.queue, self._deadlines, self._gate
            self._jobs = Jobs(topology, me, *below)
        self._hosts = UpstreamHosts(topology.above(me))
        self.log_reader = LogReader(topology, me, log_buffer or LogBuffer(), self.links, dropped)
        self._process_metrics = ProcessMetrics(topology, self.me, self.links, self.executor)
        self.links.on_change = self._links_changed
        self.links.on_report = self._leases.reported
        self.links.on_progress = self._progressed
        if self.executor:
            self.executor.on_free = self.queue.kick
            looks = Looks(self._deadlines, self._pass_progress_on, PROGRESS_S)
            self._progress = ProgressBook(looks.soon)
            send_progress_to(self._progress.note)

    @property
    def pool_threads(self) -> int:
        return self.limits.pool_threads(self.queue.slots)

    @property
    def is_busy(self) -> bool:
        """Whether anything is in service."""
        return self._unfinished > 0

    def start(self) -> None:
        self._deadlines.start()
        self._hosts.start()
        self.links.start()
        if self._jobs is not None:
            self._jobs.start()

    def forward(
        self, request: pb2.Request, context: grpc.ServicerContext
    ) -> pb2.Response | Future[pb2.Response]:
        """Answers one request, or later if another one with its key is running.

        Raises OverlayError, which becomes the call's status.
        """
        rights = self._gate.rights(context)
        return self._unary.forward(request, context, self._caller(context), rights)

    def forward_stream(self, call: Call, context: grpc.ServicerContext) -> None:
        """Serves one stream until the client's half-close. Never blocks."""
        caller = self._caller(context)
        try:
            neighbour = self._neighbour_of(context, caller)
            rights = self._gate.rights(context)
            identity = self._gate.identity(context)
            name = identity.name if identity else ""
            self._sessions.serve(call, context, caller, neighbour, rights, name)
        except OverlayError as e:
            call.fail(self._path.with_retry(e))

    def submit(
        self, request: pb2.SubmitRequest, context: grpc.ServicerContext
    ) -> Future[pb2.SubmitResponse]:
        """Answers when the jobs are on the disk. Raises OverlayError, as do the others here."""
        rights = self._gate.rights(context)
        return self.jobs.submit(request, self._caller(context), rights)

    def job_result(
        self, request: pb2.ResultRequest, context: grpc.ServicerContext
    ) -> Future[pb2.Job]:
        return self.jobs.result(request, context, self._caller(context))

    def job_part(
        self, request: pb2.PartRequest, context: grpc.ServicerContext
    ) -> Future[pb2.PartResponse]:
        return self.jobs.part(request, context, self._caller(context))

    def list_jobs(
        self, request: pb2.JobsRequest, context: grpc.ServicerContext
    ) -> Future[pb2.JobsResponse]:
        return self.jobs.listed(request, context, self._caller(context))

    def change_jobs(
        self, request: pb2.ChangeRequest, context: grpc.ServicerContext
    ) -> Future[pb2.ChangeResponse]:
        return self.jobs.change(request, context, self._caller(context))

    @property
    def jobs(self) -> Jobs:
        """Raises NoJournal if this process keeps none."""
        if self._jobs is not None:
            return self._jobs
        leader = self.topology.leader
        if ROLES[self.me.role].queued:
            raise NoJournal(
                f"{self.me.id} keeps no jobs: its configuration ({self.topology.name}) has no "
                '"journal"; add "journal": "journal.db" and restart it'
            )
        raise NoJournal(
            f"{self.me.id} keeps no jobs: ask the leader, {leader.id} at {leader.address}"
        )

    def drain(self, grace_s: float, for_good: bool = False) -> Drained:
        """Refuses waiting and new requests, and lets running ones end within `grace_s`.

        Clients with streams learn of it first, a moment before anything is refused. The streams end
        last, which proves to each client which of its requests were not read.

        for_good: their clients need not wait for the process to be back.
        """
        began, refused_before = time.monotonic(), self.meter.counts().refused
        self._path.draining = True
        if self._jobs is not None:
            self._jobs.stop()
        self._sessions.announce_stop(for_good)
        if self._sessions.open:
            time.sleep(min(grace_s, NOTICE_S))
        waiting = self.queue.close()
        if waiting:
            log.info("%d waiting requests refused", waiting)
        until = began + grace_s
        _wait_while(lambda: self._unfinished > 0, until)
        left = self._unfinished
        if grace_s:
            quiet_by = min(until, time.monotonic() + MAX_QUIET_S)
            _wait_while(lambda: time.monotonic() - self._unary.last_arrival < QUIET_S, quiet_by)
        self._sessions.end()
        until = max(until, time.monotonic() + FLUSH_S)
        _wait_while(lambda: bool(self._sessions.open), until)
        refused = self.meter.counts().refused - refused_before
        return Drained(refused, left, time.monotonic() - began)

    def close(self) -> None:
        self._deadlines.stop()
        self._hosts.stop()
        self._sessions.threads.close()
        self.links.close()
        if self._jobs is not None:
            self._jobs.close()
        if self.executor:
            self.executor.close()
        self.request_log.close()

    def metrics(
        self, events: int = 0, requests: int = 0, functions: bool = False
    ) -> pb2.MetricsResponse:
        """This process's metrics, with its last events and requests. Never blocks.

        functions: describe the handlers' functions, here and below.
        """
        response = pb2.MetricsResponse(
            calls_without_message=self.calls_without_message(), active_requests=self._active
        )
        self.request_log.fill(response, requests)
        self._path.fill(response)
        self._sessions.fill(response)
        self._keys.fill(response)
        self.log_reader.fill(response, events)
        self._process_metrics.fill(response, functions)
        self._gate.fill(response)
        if self._jobs is not None:
            self._jobs.fill(response)
        if self._lender is not None:
            self._lender.fill(response)
        else:
            response.lanes.extend(map(codec.write_lane, self._leases.shown()))
        return response

    def _pass_progress_on(self) -> None:
        self._sessions.report_progress(self._progress.take())

    def _progressed(self, made: Sequence[WorkProgress]) -> None:
        if self._jobs is not None:
            self._jobs.progressed(made)
        self._sessions.report_progress(made)

    def _links_changed(self) -> None:
        self.queue.kick()
        if self._jobs is not None:
            self._jobs.hurry()

    def _make_lender(self) -> Lender:
        below = self.queue, self.links, self._leases
        return Lender(self.topology, self.me.id, *below, self.request_log, self._deadlines)

    @property
    def _active(self) -> int:
        # A handler may keep running, and keep its slot, after its caller has left.
        return self.executor.active if self.executor else self.queue.active

    @property
    def _unfinished(self) -> int:
        in_service = self.queue.active + self.queue.streamed[2]
        return max(self._active, in_service)

    def _neighbour_of(self, context: grpc.ServicerContext, caller: Caller) -> str:
        """The process above this one whose link it is: it says so, and its certificate does too, or
        without TLS it calls from its host.

        Raises NotAllowed for a process that claims to be another.
        """
        for key, value in context.invocation_metadata():
            if key != codec.PROCESS_KEY:
                continue
            if self._gate.is_open:
                return str(value) if self._hosts.has(value, caller.address) else ""
            if not self._gate.is_process(context, str(value)):
                who = self._gate.identity(context) or "no process"
                raise NotAllowed(f"the caller says it is process {value}, and is {who}")
            return str(value)
        return ""

    def _caller(self, context: grpc.ServicerContext) -> Caller:
        """The caller by its certificate; without TLS by its address, for fairness rather than
        security."""
        metadata = context.invocation_metadata()
        names = (str(value) for key, value in metadata if key == codec.CALLER_KEY)
        who = self._gate.identity(context) or codec.address_in(context.peer())
        return Caller(str(who), next(names, "")[:LONGEST_NAME])


def _expire(due: QueuedSegment | Waiter | Callable[[], None]) -> None:
    if isinstance(due, (QueuedSegment, Waiter)):
        due.end(Code.DEADLINE_EXCEEDED)
    else:
        due()


def _half_if_several(topology: Topology, in_service: int) -> int:
    """How many places one team may take: a stuck team must not take those of the others."""
    teams = {worker.team for worker in topology.workers}
    return in_service if len(teams) < 2 else max(1, in_service // 2)


def _common_default(topology: Topology, me: Process) -> str:
    """The handler of a request that names none, if all workers have the same; else ""."""
    names = {worker.handler for worker in ((me,) if me.works else topology.workers)}
    return names.pop() if len(names) == 1 else ""


def _wait_while(busy: Callable[[], bool], until: float) -> None:
    while busy() and time.monotonic() < until:
        time.sleep(0.02)


def _load_merges(topology: Topology) -> dict[str, Merge]:
    specs = topology.handlers.values()
    return {spec.name: api.find(spec, spec.merge) for spec in specs if spec.merge}
