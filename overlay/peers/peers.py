"""The links to the neighbours below, to which this process sends requests.

A link is a persistent channel with two streams, for small and for large bodies, so that large ones
do not delay small ones. A GetMetrics probe every second shows whether the neighbour answers, is
stopping, has the same configuration, and how many slots it has. A stream that ends shows at once
that the neighbour is gone, and its unanswered requests are refused. The outcomes of requests show
whether a neighbour that answers is healthy (overlay.routing.outlier).

Owns one thread, "links", from `start` to `close`, and the threads of its streams.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import grpc

import overlay
from overlay.model import clocks as time
from overlay.model.errors import BadResponse, ProxyError
from overlay.model.jobs import WorkProgress
from overlay.model.leases import LaneOutcome, LaneReport, Lent
from overlay.model.limits import Limits
from overlay.model.segments import (
    Cancel,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    OnResult,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.model.signatures import Function
from overlay.model.topology import Process
from overlay.observability.throttle import TokenBucket
from overlay.peers.outgoing import SegmentSender
from overlay.routing.outlier import (
    Change,
    Outcome,
    OutlierDetector,
    PeerHealth,
    State,
    Verdict,
    classify,
)
from overlay.routing.planner import QUICK_S
from overlay.transport import codec
from overlay.transport.channels import Channel
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.endpoints import channel_options

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

log = logging.getLogger(__name__)

BYTES_S = 100e6  # the assumed network throughput for answers
RECENT_S = 0.1  # an older service time may be from different requests
VIOLATION = "it violates the protocol"
QUIET_S = 600.0  # between two warnings that a neighbour violates the protocol
SOON_S = 0.1  # between two probes while something is about to change
SETTLING_S = 3.0  # how long a neighbour that has come up may take to know the slots behind it
_HEALTHY = State.HEALTHY  # looked up once, as every request calls `load`


@dataclass(frozen=True)
class PeerState:
    """What is known about a neighbour. since: monotonic seconds. slots: worker -> handler -> count.

    address: with what its name resolves to. state: of the link. health, health_reason: judged by
    the outcomes of its requests. ejections: how many so far.
    """

    process_id: str
    address: str
    state: str
    since: float
    reason: str
    outstanding: int
    asked: int
    failed: int
    version: str = ""
    same_config: bool = True
    slots: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    health: str = "healthy"
    health_reason: str = ""
    ejections: int = 0
    rtt_s: float = 0.0  # round trip; 0 if unknown
    functions: Sequence[Function] = ()  # of the workers behind it

    @property
    def total_slots(self) -> int:
        return sum(max(handlers.values(), default=0) for handlers in self.slots.values())


class Peers:
    """All links of one process. Thread-safe.

    on_change is called, on any thread, when a link has come up or gone down, or has been down so
    long that no request waits for it any more. on_report: with a neighbour and its report about a
    lease. on_progress: with what handlers below say about how far they have got.
    """

    def __init__(
        self,
        neighbours: Collection[Process],
        limits: Limits,
        digest: str,
        lone: Collection[str] | None = None,
        me: str = "",
        credentials: Credentials | None = None,
        workers: Collection[str] = (),
    ) -> None:
        """lone: the neighbours that lead to a single worker; by default those that are workers.

        workers: all of the overlay; those behind a neighbour have slots, which it reports.
        me: this process's id, sent to its neighbours so that its links do not count as clients.
        credentials: for links over mutual TLS.
        """
        self.on_change: Callable[[], None] = lambda: None
        self.on_report: Callable[[str, LaneReport], None] = lambda neighbour, report: None
        self.on_progress: Callable[[Sequence[WorkProgress]], None] = lambda made: None
        self._limits = limits
        self._to_flush: set[SegmentSender] = set()
        if lone is None:
            lone = {n.id for n in neighbours if n.works}
        self._health = _Health(OutlierDetector((n.id for n in neighbours), lone), self.up)
        self._links = {
            n.id: _Peer(
                n,
                limits,
                digest,
                self._changed,
                self._to_flush,
                self.flush,
                self._reported,
                self._progressed,
                self._health,
                me,
                credentials,
                frozenset(workers),
            )
            for n in neighbours
        }
        self._up: frozenset[str] = frozenset()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._probe_all, name="links", daemon=True)

    def start(self) -> None:
        for link in self._links.values():
            link.start()
        if self._links:
            self._thread.start()

    def close(self) -> None:
        """Ends the probes and closes the channels; calls in flight are answered as cancelled."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(1)
        for link in self._links.values():
            link.close()

    def up(self) -> frozenset[str]:
        return self._up

    def awaited(self) -> set[str]:
        """The links that went down so recently that a request may wait for them.

        This includes a neighbour that is stopping and may be back soon, unless it said that it is
        stopping for good.
        """
        now = time.monotonic()
        return {
            link.id
            for link in self._links.values()
            if link.state != "up" and not link.for_good and now - link.since < link.patience_s
        }

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        """As the neighbour last reported; 0 if it did not."""
        return self._links[neighbour].slots.get(worker, {}).get(handler, 0)

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        """(rows outstanding there for the handler, seconds that one takes or 0 if unknown, the
        neighbour's health, whether that service time is recent)."""
        link = self._links[neighbour]
        health = link.health.get(handler) if link.health else None
        now = time.monotonic()
        state = health.state_at(now) if health else _HEALTHY
        is_recent = now - link.service_seen.get(handler, 0.0) < RECENT_S
        outstanding = link.outstanding.get(handler, 0)
        return outstanding, link.service_s.get(handler, 0.0), state, is_recent

    def states(self) -> list[PeerState]:
        return [link.snapshot() for link in self._links.values()]

    def reserve(self, neighbour: str, handler: str, count: int) -> None:
        """Counts the rows as outstanding. A `send` of the same number must follow."""
        link = self._links[neighbour]
        link.reserve(handler, count)
        if link.health:
            self._health.begin(neighbour, handler)

    def flush(self) -> None:
        """Starts sending everything given to `send` since the last flush."""
        while self._to_flush:
            try:
                self._to_flush.pop().stream.kick()
            except KeyError:  # another thread was faster
                return

    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel:
        """Sends a segment whose rows are reserved. Never blocks, never raises.

        It leaves with the next `flush`, so that segments which start together leave together. The
        sink gets each row once, on any thread; lost rows are refused, with `executed` NO if they
        provably did not run.
        """
        return self._links[neighbour].send(segment, sink)

    def lend(self, neighbour: str, lent: Lent) -> None:
        """Passes a lease on to the worker that it leads to. Never blocks."""
        self._links[neighbour].lend(lent)

    def note_lane(
        self, neighbour: str, handler: str, change: int, outcomes: tuple[LaneOutcome, ...]
    ) -> None:
        """A client uses a worker there directly. change: in the number of its unanswered requests,
        which count as outstanding there. outcomes: how its requests ended."""
        self._links[neighbour].note_lane(handler, change, outcomes)

    def logs(self, neighbour: str, asked: pb2.LogsRequest, timeout_s: float) -> pb2.LogsResponse:
        """Asks the neighbour for log lines and waits. Raises ProxyError with its reason."""
        ask = pb2_grpc.OverlayAdminStub(self._links[neighbour].channel).Logs
        try:
            return codec.read_logs(ask(asked, timeout=timeout_s), asked)
        except grpc.RpcError as e:
            said = codec.read_error(e)
            raise ProxyError(f"{neighbour}: {said.reason}", said.code) from None
        except BadResponse as e:
            raise ProxyError(f"{neighbour} violates the protocol: {e}", e.code) from None

    def _progressed(self, made: Sequence[WorkProgress]) -> None:
        self.on_progress(made)

    def _reported(self, neighbour: str, report: LaneReport) -> None:
        self.on_report(neighbour, report)

    def _changed(self) -> None:
        self._up = frozenset(link.id for link in self._links.values() if link.state == "up")
        self._wake.set()
        self.on_change()

    def _compare_service_times(self) -> None:
        if self._health.compare({n: dict(self._links[n].service_s) for n in self._up}):
            self.on_change()

    def _probe_all(self) -> None:
        while not self._closed:
            self._wake.clear()
            for link in self._links.values():
                link.probe()
            self._compare_service_times()
            waiting_for = self.awaited()
            # Wait briefly while a request may be waiting for a link, so that it proceeds in time,
            # and after a start, so that all slots are known soon.
            is_brief = waiting_for or any(link.is_settling for link in self._links.values())
            self._wake.wait(SOON_S if is_brief else self._limits.probe_interval_s)
            if waiting_for:  # a request waits for at most half of its remaining time
                self.on_change()


class _Health:
    """The outlier detector under a lock; logs each of its decisions."""

    def __init__(self, detector: OutlierDetector, up: Callable[[], Collection[str]]) -> None:
        self._detector = detector
        self._up = up
        self._lock = threading.Lock()

    def of(self, neighbour: str) -> Mapping[str, PeerHealth]:
        """Its unhealthy handlers; may be read at any time."""
        return self._detector.unhealthy[neighbour]

    def begin(self, neighbour: str, handler: str) -> None:
        with self._lock:
            self._detector.begin(neighbour, handler, time.monotonic())

    def record(self, neighbour: str, handler: str, outcome: Outcome) -> None:
        with self._lock:
            up, now = self._up(), time.monotonic()
            change = self._detector.record(neighbour, handler, outcome, up, now)
        if change is not None:
            self._log(change)

    def compare(self, service_s: Mapping[str, Mapping[str, float]]) -> bool:
        """Compares the neighbours that are up. Returns whether that changed anything."""
        with self._lock:
            changes = self._detector.look(service_s, time.monotonic())
        for change in changes:
            self._log(change)
        return bool(changes)

    def capacity_added(self, neighbour: str) -> None:
        with self._lock:
            self._detector.capacity_added(neighbour, time.monotonic())

    def forget(self, neighbour: str) -> None:
        with self._lock:
            self._detector.forget(neighbour)

    def shown(self, neighbour: str) -> tuple[str, str, int]:
        """(state, reason, number of ejections)."""
        with self._lock:
            state, reason = self._detector.describe(neighbour, time.monotonic())
            return state, reason, self._detector.ejections[neighbour]

    def _log(self, change: Change) -> None:
        level = logging.INFO if change.state is State.HEALTHY else logging.WARNING
        work = f" for handler {change.handler}" if change.handler else ""
        text = f"requests to any one{work}: {change.neighbour} {change.reason}"
        log.log(level, "%s", text, extra={"kind": "health"})


class _Peer:
    """One neighbour: its channel, its state, and what is outstanding there."""

    def __init__(
        self,
        neighbour: Process,
        limits: Limits,
        digest: str,
        changed: Callable[[], None],
        to_flush: set[SegmentSender],
        flush: Callable[[], None],
        reported: Callable[[str, LaneReport], None],
        progressed: Callable[[Sequence[WorkProgress]], None],
        health: _Health,
        me: str,
        credentials: Credentials | None,
        workers: frozenset[str],
    ) -> None:
        self.metadata = (*codec.max_bytes_metadata(limits), (codec.PROCESS_KEY, me))
        self.to_flush = to_flush
        self.flush = flush
        self._reported = reported
        self._progressed = progressed
        self.health = health.of(neighbour.id)  # its unhealthy handlers
        self._health = health
        self.id = neighbour.id
        options = channel_options(limits)
        self.channel = Channel(neighbour.address, options, credentials, neighbour.id)
        self.state = "down"
        self.since = time.monotonic()
        self.patience_s = limits.patience_s
        self.for_good = False  # it said that it will not be back
        self.reason = "not reached yet"
        self.outstanding: defaultdict[str, int] = defaultdict(int)  # by handler
        self.asked = 0
        self.failed = 0
        self.slots: dict[str, dict[str, int]] = {}
        self.service_s: dict[str, float] = {}
        self.service_seen: dict[str, float] = {}  # when each entry of `service_s` was updated
        self._senders = (
            SegmentSender(self, f"{self.id}-small", limits),
            SegmentSender(self, f"{self.id}-large", limits),
        )
        self._stub = pb2_grpc.OverlayNodeStub(self.channel)
        self._limits = limits
        self._digest = digest
        self._changed = changed
        self._lock = threading.Lock()
        self._probe: grpc.Future | None = None
        self._next_probe = 0.0
        self._rtts: deque[float] = deque(maxlen=8)
        self._version = ""
        self._same_config = True
        self._closed = False
        # The workers whose slots it may report, by this process's configuration as in every plan.
        self._workers = frozenset((neighbour.id, *neighbour.neighbors))
        self._expected = self._workers & workers
        self.functions: tuple[Function, ...] = ()
        self._functions_digest = 0  # of `functions`
        self._wants_functions = False
        self._pid = 0
        self._problem = ""  # in resolving its name
        self._bad_probes = 0  # in a row
        self._violation_lines = TokenBucket(1, 1 / QUIET_S)
        self._violation = 0.0, ""  # when it last violated the protocol, and how

    def probe(self) -> None:
        """Probes the neighbour if that is due and no probe is in flight."""
        now = time.monotonic()
        if self._probe is not None or now < self._next_probe:
            return
        # While down, the call waits for the connection, so that it succeeds as soon as it exists.
        self._probe = self._stub.GetMetrics.future(
            pb2.MetricsRequest(functions=self._wants_functions),
            timeout=self._limits.probe_timeout_s,
            wait_for_ready=self.state == "down",
        )
        self._probe.add_done_callback(partial(self._probed, now))

    @property
    def is_settling(self) -> bool:
        """Whether it came up a moment ago and has not reported the slots of all its workers yet."""
        is_new = self.state == "up" and time.monotonic() - self.since < SETTLING_S
        return is_new and not self._expected <= self.slots.keys()

    def reserve(self, handler: str, count: int) -> None:
        with self._lock:
            self.outstanding[handler] += count
            self.asked += count

    def start(self) -> None:
        for sender in self._senders:
            sender.stream.start()

    def close(self) -> None:
        self._closed = True
        for sender in self._senders:
            sender.stream.end()
        self.channel.close()

    def send(self, segment: Segment, sink: OnResult) -> Cancel:
        large = segment.payloads.size > self._limits.small_bytes * segment.count
        large = large or segment.chunks > 0  # its answers may be large
        return self._senders[large].send(segment, sink)

    def answered(self, route: Route, answers: Slice, is_read: bool = False) -> None:
        """Rows have ended. is_read: they were read in chunks, so their failure says nothing about
        the neighbour's health."""
        handler = route.handler
        count, flawless = answers.count, answers.flawless
        with self._lock:
            self.outstanding[handler] -= count
            if not flawless:
                self.failed += answers.failed_rows
            self._note_service_time(handler, answers)
        if not flawless or self.health:
            self._judge(route, answers, is_read)

    def lend(self, lent: Lent) -> None:
        self._senders[0].lend(lent)

    def progressed(self, made: Sequence[WorkProgress]) -> None:
        self._progressed(made)

    def reported(self, report: LaneReport) -> None:
        self._reported(self.id, report)

    def note_lane(self, handler: str, change: int, outcomes: tuple[LaneOutcome, ...]) -> None:
        with self._lock:
            self.outstanding[handler] += change
        for one in outcomes:
            answers = _as_slice(self.id, one)
            with self._lock:
                self._note_service_time(handler, answers)
            if one.code is not Code.OK or self.health:
                self._judge(Route(Mode.ANY, "", handler), answers)

    def _judge(self, route: Route, answers: Slice, is_read: bool = False) -> None:
        """Whether it is healthy, by how requests ended."""
        handler, count, flawless = route.handler, answers.count, answers.flawless
        service_s, to_all = self.service_s.get(handler, 0.0), route.mode is Mode.ALL
        outcome = classify(answers, service_s, to_all)
        if is_read and not flawless:
            outcome = Outcome(Verdict.NEITHER, count, "")
        self._health.record(self.id, handler, outcome)
        refused = answers.refused
        if refused and refused.code is Code.UNAVAILABLE and refused.executed is Executed.NO:
            self.probe_now()  # it answers but refuses: a probe will show that it is stopping

    def is_quick(self, handler: str) -> bool:
        """Whether its requests are known to take no longer than a few thread switches."""
        service_s = self.service_s.get(handler)
        return service_s is not None and service_s < QUICK_S

    def note_times(self, handler: str, answers: Slice) -> None:
        with self._lock:
            self._note_service_time(handler, answers)

    def overdue(self, handler: str, rows: int) -> None:
        """Rows got no answer at all, not even that they are late."""
        silent = Outcome(Verdict.BAD, rows, f"no answer from {self.id} within the deadline")
        self._health.record(self.id, handler, silent)

    def lost(self, why: Part) -> None:
        if why.executed is Executed.NO and why.code is Code.UNAVAILABLE:
            self.on_stopping()
            if self.state == "draining" and not any(sender.is_live for sender in self._senders):
                self._set_state("down", f"it has stopped{self._for_good}", self._limits.restart_s)
        elif self.state != "draining" or why.code is Code.DATA_LOSS:  # it has announced its stop
            is_wrong = why.code in (Code.UNIMPLEMENTED, Code.DATA_LOSS)
            self._set_state("down", self.channel.problem or why.reason, is_wrong=is_wrong)

    def on_stopping(self, for_good: bool = False) -> None:
        """The neighbour has announced that it is stopping."""
        is_news = for_good and not self.for_good
        self.for_good = self.for_good or for_good
        if self.state == "up":
            self._set_state("draining", f"it is stopping{self._for_good}")
        elif is_news:
            self._changed()  # no request should wait for it any more

    @property
    def _for_good(self) -> str:
        return " for good" if self.for_good else ""

    def probe_now(self) -> None:
        """Probes at once: something may have changed."""
        self._next_probe = 0.0
        self._changed()

    def time_left_s(self, deadline: float) -> float:
        """How many seconds of the time to the deadline the neighbour gets."""
        # The rest is for the way back: a late worker then costs only its own part.
        left = deadline - time.monotonic()
        margin = self._limits.return_margin_s + 2 * min(self._rtts, default=0.0)
        return left - min(margin, left / 4)

    def _note_service_time(self, handler: str, answers: Slice) -> None:
        for column in answers.parts:
            if column.worked_us and column.failed is None:
                # Time on the network counts too for large answers, or thousands of them would be
                # requested in advance, more than there is room for.
                found = max(column.worked_us / 1e6, column.results.size / answers.count / BYTES_S)
                known = self.service_s.get(handler)
                # One outlier must not distort the estimate: it counts as at most four times it.
                self.service_s[handler] = (
                    0.8 * known + 0.2 * min(found, 4 * known) if known else found
                )
                self.service_seen[handler] = time.monotonic()

    def snapshot(self) -> PeerState:
        health, health_reason, ejections = self._health.shown(self.id)
        with self._lock:
            return PeerState(
                process_id=self.id,
                address=self.channel.shown,
                state=self.state,
                since=self.since,
                reason=self.reason or self._recent_violation(),
                outstanding=sum(self.outstanding.values()),
                asked=self.asked,
                failed=self.failed,
                version=self._version,
                same_config=self._same_config,
                slots=self.slots,
                health=health,
                health_reason=health_reason,
                ejections=ejections,
                rtt_s=min(self._rtts, default=0.0),
                functions=self.functions,
            )

    def _recent_violation(self) -> str:
        """Its last violation, if recent, although the link may be up again."""
        when, how = self._violation
        ago_s = time.monotonic() - when
        return f"violated the protocol {ago_s:.0f} s ago{how}" if how and ago_s < QUIET_S else ""

    def _probed(self, began: float, probe: grpc.Future) -> None:
        now = time.monotonic()
        self._next_probe = now + self._limits.probe_interval_s
        self._probe = None
        if probe.cancelled():  # the channel is closed, or has moved to another address
            self._next_probe = now + SOON_S
            return
        error = probe.exception()
        if error is not None:
            self._next_probe = now + SOON_S if now - began < 1 else now
            self._warn_of_name(self.channel.problem)
            self._set_state("down", self.channel.problem or codec.read_error(error).reason)
            return
        try:
            metrics = codec.read_metrics(probe.result())
        except BadResponse as e:
            self._set_state("down", f"{VIOLATION}: {e}", is_wrong=True)
            pause_s = min(self._limits.wrong_s * 2.0**self._bad_probes, self._limits.most_wrong_s)
            self._bad_probes = min(self._bad_probes + 1, 10)
            self._next_probe = now + pause_s
        else:
            self._bad_probes = 0
            self._learn(metrics, now - began)

    def _warn_of_name(self, problem: str) -> None:
        # A machine that is down comes back by itself; a misspelt name does not.
        before, self._problem = self._problem, problem
        if problem and problem != before:
            log.warning("link to %s: %s", self.id, problem, extra={"kind": "link"})

    def _learn(self, metrics: pb2.MetricsResponse, rtt_s: float) -> None:
        if metrics.pid != self._pid:  # another process, which may follow the protocol
            self._pid = metrics.pid
            for sender in self._senders:
                sender.stream.end_pause()
        problem = self._problem_of(metrics)
        if problem:
            self._set_state("down", problem, is_wrong=True)
            return
        with self._lock:
            reported = (p for p in metrics.topology if p.slots and p.id in self._workers)
            slots = {p.id: dict(p.slots) for p in reported}
            self._learn_functions_locked(metrics)
            more, self.slots = not slots.keys() <= self.slots.keys(), slots
            self._rtts.append(rtt_s)
            before, self._version = self._version, metrics.version
            same = metrics.config_digest == self._digest
            differs = self._same_config and not same
            self._same_config = same
        if differs:
            what = "reads another configuration than this process"
            log.warning("%s %s", self.id, what, extra={"kind": "config"})
        if metrics.version not in (before, overlay.__version__):
            what = f"runs version {metrics.version}, this process {overlay.__version__}"
            log.info("%s %s", self.id, what, extra={"kind": "config"})
        if more:
            self._health.capacity_added(self.id)
        if not metrics.is_healthy:
            # Down stays down: it has ended its streams, or never accepted them.
            state = "down" if self.state == "down" else "draining"
            self._set_state(state, f"it is stopping{self._for_good}")
        elif all(sender.is_live for sender in self._senders):
            self._set_state("up", "")
            if self.is_settling:
                self._next_probe = time.monotonic() + SOON_S

    def _learn_functions_locked(self, metrics: pb2.MetricsResponse) -> None:
        """They may be long and rarely change, so they are requested when their digest changes."""
        if metrics.functions_digest != self._functions_digest and self._wants_functions:
            self._functions_digest = metrics.functions_digest
            reported = (codec.read_function(made) for made in metrics.functions)
            self.functions = tuple(
                function._replace(workers=tuple(w for w in function.workers if w in self._workers))
                for function in reported
            )
        wanted = metrics.functions_digest != self._functions_digest
        if wanted and not self._wants_functions:
            self._next_probe = 0.0
        self._wants_functions = wanted

    def _problem_of(self, metrics: pb2.MetricsResponse) -> str:
        """Why the process that answers cannot be used; empty if it can."""
        if metrics.process_id != self.id:
            return f"process {metrics.process_id} answers at {self.channel.shown}"
        found = codec.read_format(metrics)
        if found != codec.FORMAT:
            ours = f"this process {codec.FORMAT}, of version {overlay.__version__}"
            return f"version {metrics.version} speaks wire format {found}, {ours}"
        return ""

    def _set_state(
        self, state: str, reason: str, patience_s: float | None = None, is_wrong: bool = False
    ) -> None:
        """patience_s: how long requests may wait for it in this state; by default the limits'.

        is_wrong: another program answers, or one that cannot be used.
        """
        if is_wrong:
            self.channel.doubt(is_wrong=True)
        with self._lock:
            before, changed = self.state, state != self.state
            is_news = changed or (is_wrong and reason != self.reason)
            self.reason = reason
            if reason.startswith(VIOLATION):
                self._violation = time.monotonic(), reason.removeprefix(VIOLATION)
            if changed:
                self.state, self.since = state, time.monotonic()
                self.patience_s = patience_s or self._limits.patience_s
                self._next_probe = 0.0  # at once, as it may be back already
            if state != "up":
                self.slots = {}
            elif before == "down":
                self.for_good = False
        if changed:
            self._health.forget(self.id)
        if is_news and not self._closed:  # else this process is stopping
            is_bad = is_wrong or (state == "down" and before != "draining")
            if reason.startswith(VIOLATION) and not self._violation_lines.take(time.monotonic()):
                is_bad = False  # it keeps coming back with violations, which the log has reported
            level = logging.WARNING if is_bad else logging.INFO
            log.log(
                level,
                "link to %s (%s) is %s%s",
                self.id,
                self.channel.shown,
                state,
                f": {reason}" if reason else "",
                extra={"kind": "link"},
            )
        if changed or state == "up":
            self._changed()


def _as_slice(process_id: str, outcome: LaneOutcome) -> Slice:
    """The outcome of requests that went to a worker directly, as if a link had brought it."""
    count, code = outcome.rows, outcome.code
    failed = None if code is Code.OK else Detail(code, outcome.reason, outcome.executed)
    times = int(outcome.waited_s * 1e6), int(outcome.worked_s * 1e6)
    part = PartSlice(process_id, Column((), size=0), (), {}, failed, *times)
    return Slice(count, (part,))
