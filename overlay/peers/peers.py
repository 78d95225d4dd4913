"""The connections to the processes that this one asks.

A link is one kept channel with two streams, for small bodies and for large ones, so that the large
do not hold up the small. It is looked at every second through GetMetrics, which tells whether the
neighbour answers, drains, reads the same configuration, and how many slots lie behind it; a stream
that ends says at once that it is gone, and answers what it still owed. What becomes of the requests
themselves tells whether one that answers is well (overlay.routing.outlier).

Owns one thread, "links", from `start` to `close`, and its pipes'.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc

import overlay
from overlay.model import clocks as time
from overlay.model.errors import Misspoken, NotTold
from overlay.model.limits import Limits
from overlay.model.segments import Answers, Code, End, Executed, Mode, Part, Route, Segment, Sink
from overlay.model.signatures import Function
from overlay.model.topology import Process
from overlay.observability.token_bucket import TokenBucket
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

log = logging.getLogger("overlay.links")

BYTES_S = 100e6  # of answers, that a way is taken to carry
OF_LATE_S = 0.1  # a pace that was not seen for longer may be that of other requests
WRONGLY = "it speaks wrongly"
WRONG_LINE_S = 600.0  # a warning that a neighbour speaks wrongly is enough for so long
_HEALTHY = State.HEALTHY  # looked up once: `load` is on every request's way


@dataclass(frozen=True)
class PeerState:
    """What is known of a neighbour. since: monotonic seconds. slots: worker -> handler -> count.

    address: with what its name stands for here. state is that of the link, health what its requests
    tell; ejections: how often so far.
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
    rtt_s: float = 0.0  # there and back; 0 when not known
    functions: Sequence[Function] = ()  # of the workers that it leads to

    @property
    def total_slots(self) -> int:
        return sum(max(handlers.values(), default=0) for handlers in self.slots.values())


class Peers:
    """All links of one process. Safe from any thread.

    on_change is called, on any thread, when a link has come up or gone down, or has been down for
    longer than anyone waits for it.
    """

    def __init__(
        self,
        neighbours: Collection[Process],
        limits: Limits,
        digest: str,
        lone: Collection[str] | None = None,
        me: str = "",
    ) -> None:
        """lone: the neighbours that stand for one worker each; by default, those that work.

        me: this process, as its neighbours are told: its links are not counted among clients.
        """
        self.on_change: Callable[[], None] = lambda: None
        self._limits = limits
        self._to_flush: set[SegmentSender] = set()
        if lone is None:
            lone = {n.id for n in neighbours if n.works}
        self._minder = _Minder(OutlierDetector((n.id for n in neighbours), lone), self.up)
        self._links = {
            n.id: _Peer(
                n, limits, digest, self._changed, self._to_flush, self.flush, self._minder, me
            )
            for n in neighbours
        }
        self._up: frozenset[str] = frozenset()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="links", daemon=True)

    def start(self) -> None:
        for link in self._links.values():
            link.start()
        if self._links:
            self._thread.start()

    def close(self) -> None:
        """Ends the looking and the channels; calls in flight are answered as cancelled."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(1)
        for link in self._links.values():
            link.close()

    def up(self) -> frozenset[str]:
        return self._up

    def awaited(self) -> set[str]:
        """The links that are down for so short a time that a request may wait for them.

        One whose neighbour is being stopped too, unless that says that it is for good: it may be
        restarted, and then is back soon.
        """
        now = time.monotonic()
        return {
            link.id
            for link in self._links.values()
            if link.state != "up" and not link.for_good and now - link.since < link.patience_s
        }

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        """What the neighbour last said; 0 when it did not."""
        return self._links[neighbour].slots.get(worker, {}).get(handler, 0)

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        """Rows outstanding there for the handler, the seconds that one takes (0: not known),
        whether it is well, and whether its pace was seen of late."""
        link = self._links[neighbour]
        case = link.cases.get(handler) if link.cases else None
        now = time.monotonic()
        state = case.standing(now) if case else _HEALTHY
        of_late = now - link.pace_seen.get(handler, 0.0) < OF_LATE_S
        outstanding = link.outstanding.get(handler, 0)
        return outstanding, link.service_s.get(handler, 0.0), state, of_late

    def states(self) -> list[PeerState]:
        return [link.snapshot() for link in self._links.values()]

    def reserve(self, neighbour: str, handler: str, count: int) -> None:
        """Counts the rows as outstanding. Each reservation must be followed by a `send`."""
        link = self._links[neighbour]
        link.reserve(handler, count)
        if link.cases:
            self._minder.begin(neighbour, handler)

    def flush(self) -> None:
        """Lets what was sent since the last flush leave."""
        while self._to_flush:
            try:
                self._to_flush.pop().pipe.kick()
            except KeyError:  # another thread was faster
                return

    def send(self, neighbour: str, segment: Segment, sink: Sink) -> End:
        """Asks the neighbour, which must have been reserved for it. Never blocks, never raises.

        It leaves with the next `flush`, so that what starts together leaves together.

        The sink gets each row once, on any thread; a lost call is a refusal that says whether it
        proves that nothing ran.
        """
        return self._links[neighbour].send(segment, sink)

    def logs(self, neighbour: str, asked: pb2.LogsRequest, timeout_s: float) -> pb2.LogsResponse:
        """Asks the neighbour for lines, and waits for them. Raises NotTold with its reason."""
        ask = pb2_grpc.OverlayAdminStub(self._links[neighbour].channel).Logs
        try:
            return codec.read_logs(ask(asked, timeout=timeout_s), asked)
        except grpc.RpcError as e:
            said = codec.read_error(e)
            raise NotTold(f"{neighbour}: {said.reason}", said.code) from None
        except Misspoken as e:
            raise NotTold(f"{neighbour} speaks wrongly: {e}", e.code) from None

    def _changed(self) -> None:
        self._up = frozenset(link.id for link in self._links.values() if link.state == "up")
        self._wake.set()
        self.on_change()

    def _compare_paces(self) -> None:
        if self._minder.look({n: dict(self._links[n].service_s) for n in self._up}):
            self.on_change()

    def _watch(self) -> None:
        while not self._closed:
            self._wake.clear()
            for link in self._links.values():
                link.look()
            self._compare_paces()
            waiting_for = self.awaited()
            # A short wait while somebody may be waiting for a link, so that they learn it in time.
            self._wake.wait(0.1 if waiting_for else self._limits.probe_interval_s)
            if waiting_for:  # a request waits at most half of its time, which may be over now
                self.on_change()


class _Minder:
    """Lets the ward decide, under a lock, and puts each decision into the log."""

    def __init__(self, ward: OutlierDetector, up: Callable[[], Collection[str]]) -> None:
        self._ward = ward
        self._up = up
        self._lock = threading.Lock()

    def cases(self, neighbour: str) -> Mapping[str, PeerHealth]:
        return self._ward.unhealthy[neighbour]

    def begin(self, neighbour: str, handler: str) -> None:
        with self._lock:
            self._ward.begin(neighbour, handler, time.monotonic())

    def hear(self, neighbour: str, handler: str, heard: Outcome) -> None:
        with self._lock:
            change = self._ward.record(neighbour, handler, heard, self._up(), time.monotonic())
        self._tell(change)

    def look(self, paces: Mapping[str, Mapping[str, float]]) -> bool:
        """Compares the neighbours that are up; whether that changed something."""
        with self._lock:
            changes = self._ward.look(paces, time.monotonic())
        self._tell(*changes)
        return bool(changes)

    def came(self, neighbour: str) -> None:
        with self._lock:
            self._ward.capacity_added(neighbour, time.monotonic())

    def forget(self, neighbour: str) -> None:
        with self._lock:
            self._ward.forget(neighbour)

    def shown(self, neighbour: str) -> tuple[str, str, int]:
        """State and reason in words, and how often it was ejected."""
        with self._lock:
            state, reason = self._ward.shown(neighbour, time.monotonic())
            return state, reason, self._ward.ejections[neighbour]

    def _tell(self, *changes: Change | None) -> None:
        for change in filter(None, changes):
            level = logging.INFO if change.state is State.HEALTHY else logging.WARNING
            work = f" for handler {change.handler}" if change.handler else ""
            who, why = change.neighbour, change.reason
            about = {"kind": "health"}
            log.log(level, "requests to any one%s: %s %s", work, who, why, extra=about)


class _Peer:
    """One neighbour: its channel, its state, what it owes us."""

    def __init__(
        self,
        neighbour: Process,
        limits: Limits,
        digest: str,
        changed: Callable[[], None],
        to_flush: set[SegmentSender],
        flush: Callable[[], None],
        minder: _Minder,
        me: str,
    ) -> None:
        self.metadata = (*codec.most_bytes_metadata(limits), (codec.PROCESS_KEY, me))
        self.to_flush = to_flush
        self.flush = flush
        self.cases = minder.cases(neighbour.id)  # what is the matter with it, by handler
        self._minder = minder
        self.id = neighbour.id
        self.channel = Channel(neighbour.address, codec.channel_options(limits))
        self.state = "down"
        self.since = time.monotonic()
        self.patience_s = limits.patience_s
        self.for_good = False  # it has said that it will not be back
        self.reason = "not reached yet"
        self.outstanding: defaultdict[str, int] = defaultdict(int)  # by handler
        self.asked = 0
        self.failed = 0
        self.slots: dict[str, dict[str, int]] = {}
        self.service_s: dict[str, float] = {}
        self.pace_seen: dict[str, float] = {}  # when, of those in `service_s`
        self._books = (
            SegmentSender(self, f"{self.id}-small", limits),
            SegmentSender(self, f"{self.id}-large", limits),
        )
        self._stub = pb2_grpc.OverlayNodeStub(self.channel)
        self._limits = limits
        self._digest = digest
        self._changed = changed
        self._lock = threading.Lock()
        self._probe: grpc.Future | None = None
        self._next_look = 0.0
        self._rtts: deque[float] = deque(maxlen=8)
        self._version = ""
        self._same_config = True
        self._closed = False
        # Whose slots it may tell: those it leads to. The file here decides, as for every plan.
        self._workers = frozenset((neighbour.id, *neighbour.neighbors))
        self.functions: tuple[Function, ...] = ()
        self._functions_digest = 0  # of those that are known
        self._wants_functions = False
        self._pid = 0
        self._problem = ""  # with the name of its machine
        self._wrong_looks = 0  # one after another
        self._wrong_lines = TokenBucket(1, 1 / WRONG_LINE_S)
        self._wrong = 0.0, ""  # when it last did, and how

    def look(self) -> None:
        """Starts a look at the neighbour when it is time and none is under way."""
        now = time.monotonic()
        if self._probe is not None or now < self._next_look:
            return
        # While down, the call waits for the connection, so that it succeeds the moment it is there.
        self._probe = self._stub.GetMetrics.future(
            pb2.MetricsRequest(functions=self._wants_functions),
            timeout=self._limits.probe_timeout_s,
            wait_for_ready=self.state == "down",
        )
        self._probe.add_done_callback(partial(self._looked, now))

    def reserve(self, handler: str, count: int) -> None:
        with self._lock:
            self.outstanding[handler] += count
            self.asked += count

    def start(self) -> None:
        for book in self._books:
            book.pipe.start()

    def close(self) -> None:
        self._closed = True
        for book in self._books:
            book.pipe.end()
        self.channel.close()

    def send(self, segment: Segment, sink: Sink) -> End:
        large = segment.payloads.size > self._limits.small_bytes * segment.count
        large = large or segment.chunks > 0  # whose answers may be
        return self._books[large].send(segment, sink)

    def answered(self, route: Route, answers: Answers, is_read: bool = False) -> None:
        """Rows that were asked have ended. is_read: in chunks, when it says nothing of its health
        that they failed."""
        handler = route.handler
        count, flawless = answers.count, answers.flawless
        with self._lock:
            self.outstanding[handler] -= count
            if not flawless:
                self.failed += answers.failed_rows
            self._note_service_time(handler, answers)
        if flawless and not self.cases:
            return
        service_s, to_all = self.service_s.get(handler, 0.0), route.mode is Mode.ALL
        said = classify(answers, service_s, to_all)
        if is_read and not flawless:
            said = Outcome(Verdict.NEITHER, count, "")
        self._minder.hear(self.id, handler, said)
        refused = answers.refused
        if refused and refused.code is Code.UNAVAILABLE and refused.executed is Executed.NO:
            self.look_again()  # it answers, and refuses: draining, as the look will tell

    def is_quick(self, handler: str) -> bool:
        """Whether a row of it is known to take no longer than a few thread switches."""
        service_s = self.service_s.get(handler)
        return service_s is not None and service_s < QUICK_S

    def note_times(self, handler: str, answers: Answers) -> None:
        with self._lock:
            self._note_service_time(handler, answers)

    def overdue(self, handler: str, rows: int) -> None:
        """Rows that it has were not even answered as late."""
        silent = Outcome(Verdict.BAD, rows, f"no answer from {self.id} within the deadline")
        self._minder.hear(self.id, handler, silent)

    def lost(self, why: Part) -> None:
        if why.executed is Executed.NO and why.code is Code.UNAVAILABLE:
            self.stops()
            if self.state == "draining" and not any(book.is_live for book in self._books):
                self._set_state("down", f"it has stopped{self._for_good}", self._limits.restart_s)
        elif self.state != "draining" or why.code is Code.DATA_LOSS:  # it has said that it goes
            is_amiss = why.code in (Code.UNIMPLEMENTED, Code.DATA_LOSS)
            self._set_state("down", self.channel.problem or why.reason, is_amiss=is_amiss)

    def stops(self, for_good: bool = False) -> None:
        """The neighbour has said that it is being stopped."""
        is_news = for_good and not self.for_good
        self.for_good = self.for_good or for_good
        if self.state == "up":
            self._set_state("draining", f"it is stopping{self._for_good}")
        elif is_news:
            self._changed()  # nobody has to wait for it any more

    @property
    def _for_good(self) -> str:
        return " for good" if self.for_good else ""

    def look_again(self) -> None:
        """Something may have changed: does not wait for the next look."""
        self._next_look = 0.0
        self._changed()

    def time_left_s(self, deadline: float) -> float:
        """What the neighbour gets of the time to the deadline."""
        # Kept back for the way home, so that a late worker costs its own part and not the others'.
        left = deadline - time.monotonic()
        margin = self._limits.return_margin_s + 2 * min(self._rtts, default=0.0)
        return left - min(margin, left / 4)

    def _note_service_time(self, handler: str, answers: Answers) -> None:
        for column in answers.parts:
            if column.worked_us and column.failed is None:
                # Large answers take their way's time too, or work would go down against credit for
                # thousands of them that nobody has room for.
                found = max(column.worked_us / 1e6, column.results.size / answers.count / BYTES_S)
                known = self.service_s.get(handler)
                # One odd slice must not turn the picture: it counts at most four times the known.
                self.service_s[handler] = (
                    0.8 * known + 0.2 * min(found, 4 * known) if known else found
                )
                self.pace_seen[handler] = time.monotonic()

    def snapshot(self) -> PeerState:
        health, health_reason, ejections = self._minder.shown(self.id)
        with self._lock:
            return PeerState(
                process_id=self.id,
                address=self.channel.shown,
                state=self.state,
                since=self.since,
                reason=self.reason or self._spoke_wrongly(),
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

    def _spoke_wrongly(self) -> str:
        """Of one that is up again, which tells no more of it than that it was restarted."""
        when, how = self._wrong
        ago_s = time.monotonic() - when
        return f"spoke wrongly {ago_s:.0f} s ago{how}" if how and ago_s < WRONG_LINE_S else ""

    def _looked(self, began: float, probe: grpc.Future) -> None:
        now = time.monotonic()
        self._next_look = now + self._limits.probe_interval_s
        self._probe = None
        if probe.cancelled():  # the channel leads elsewhere now, or is closed
            self._next_look = now + 0.1
            return
        error = probe.exception()
        if error is not None:
            self._next_look = now + 0.1 if now - began < 1 else now
            self._tell_of_name(self.channel.problem)
            self._set_state("down", self.channel.problem or codec.read_error(error).reason)
            return
        try:
            metrics = codec.read_metrics(probe.result())
        except Misspoken as e:
            self._set_state("down", f"{WRONGLY}: {e}", is_amiss=True)
            pause_s = min(self._limits.wrong_s * 2.0**self._wrong_looks, self._limits.most_wrong_s)
            self._wrong_looks = min(self._wrong_looks + 1, 10)
            self._next_look = now + pause_s
        else:
            self._wrong_looks = 0
            self._learn(metrics, now - began)

    def _tell_of_name(self, problem: str) -> None:
        # A machine that is not up yet is waited for quietly; a name that is misspelt never comes.
        before, self._problem = self._problem, problem
        if problem and problem != before:
            log.warning("link to %s: %s", self.id, problem, extra={"kind": "link"})

    def _learn(self, metrics: pb2.MetricsResponse, rtt_s: float) -> None:
        if metrics.pid != self._pid:  # another process: it may speak better
            self._pid = metrics.pid
            for book in self._books:
                book.pipe.again()
        amiss = self._amiss(metrics)
        if amiss:
            self._set_state("down", amiss, is_amiss=True)
            return
        with self._lock:
            told = (p for p in metrics.topology if p.slots and p.id in self._workers)
            slots = {p.id: dict(p.slots) for p in told}
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
            self._minder.came(self.id)
        if not metrics.is_healthy:
            # Down stays down: it has ended our streams, or never served us.
            state = "down" if self.state == "down" else "draining"
            self._set_state(state, f"it is stopping{self._for_good}")
        elif all(book.is_live for book in self._books):
            self._set_state("up", "")

    def _learn_functions_locked(self, metrics: pb2.MetricsResponse) -> None:
        """They seldom change and may be long: they are asked for when their digest is a new one."""
        if metrics.functions_digest != self._functions_digest and self._wants_functions:
            self._functions_digest = metrics.functions_digest
            told = (codec.read_function(made) for made in metrics.functions)
            self.functions = tuple(
                function._replace(workers=tuple(w for w in function.workers if w in self._workers))
                for function in told
            )
        wanted = metrics.functions_digest != self._functions_digest
        if wanted and not self._wants_functions:
            self._next_look = 0.0
        self._wants_functions = wanted

    def _amiss(self, metrics: pb2.MetricsResponse) -> str:
        """Why what answers there cannot be asked; empty when it can."""
        if metrics.process_id != self.id:
            return f"process {metrics.process_id} answers at {self.channel.shown}"
        found = codec.read_format(metrics)
        if found != codec.FORMAT:
            ours = f"this process {codec.FORMAT}, of version {overlay.__version__}"
            return f"version {metrics.version} speaks wire format {found}, {ours}"
        return ""

    def _set_state(
        self, state: str, reason: str, patience_s: float | None = None, is_amiss: bool = False
    ) -> None:
        """patience_s: how long it may be waited for in this state, when not as long as ever.

        is_amiss: something answers that cannot be asked, which nobody has to wait to be told.
        """
        if is_amiss:
            self.channel.doubt(is_wrong=True)
        with self._lock:
            before, changed = self.state, state != self.state
            is_news = changed or (is_amiss and reason != self.reason)
            self.reason = reason
            if reason.startswith(WRONGLY):
                self._wrong = time.monotonic(), reason.removeprefix(WRONGLY)
            if changed:
                self.state, self.since = state, time.monotonic()
                self.patience_s = patience_s or self._limits.patience_s
                self._next_look = 0.0  # look again at once: it may be back already
            if state != "up":
                self.slots = {}
            elif before == "down":
                self.for_good = False
        if changed:
            self._minder.forget(self.id)
        if is_news and not self._closed:  # it is this process that goes
            is_bad = is_amiss or (state == "down" and before != "draining")
            if reason.startswith(WRONGLY) and not self._wrong_lines.take(time.monotonic()):
                is_bad = False  # it comes back and speaks wrongly again, and has been told
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
