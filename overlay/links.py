"""The connections to the processes that this one asks.

A link is one kept channel with two streams, for small bodies and for large ones, so that the large
do not hold up the small. It is looked at every second through GetMetrics, which tells whether the
neighbour answers, drains, reads the same configuration, and how many slots lie behind it; a stream
that ends says at once that it is gone, and answers what it still owed. What becomes of the requests
themselves tells whether one that answers is well (overlay.health).

Owns one thread, "links", from `start` to `close`, and its pipes'.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import grpc

import overlay
from overlay import wire
from overlay.errors import NotTold
from overlay.health import Case, Change, Heard, State, Verdict, Ward, heard
from overlay.limits import Limits
from overlay.pipes import Pipe
from overlay.routing import QUICK_S
from overlay.rows import OpenRows
from overlay.topology import Process
from overlay.values import Answers, Code, End, Executed, Mode, Part, Route, Segment, Sink
from overlay.wire import pb2, pb2_grpc

log = logging.getLogger("overlay.links")

SAME_DEADLINE_S = 0.01  # segments whose deadlines are no further apart may travel as one
_HEALTHY = State.HEALTHY  # looked up once: `load` is on every request's way


@dataclass(frozen=True)
class LinkState:
    """What is known of a neighbour. since: monotonic seconds. slots: worker -> handler -> count.

    state is that of the link, health what its requests tell; ejections: how often so far.
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

    @property
    def total_slots(self) -> int:
        return sum(max(handlers.values(), default=0) for handlers in self.slots.values())


class Links:
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
    ) -> None:
        """lone: the neighbours that stand for one worker each; by default, those that work."""
        self.on_change: Callable[[], None] = lambda: None
        self._limits = limits
        self._to_flush: set[_Book] = set()
        if lone is None:
            lone = {n.id for n in neighbours if n.works}
        self._minder = _Minder(Ward((n.id for n in neighbours), lone), self.up)
        self._links = {
            n.id: _Link(n, limits, digest, self._changed, self._to_flush, self.flush, self._minder)
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

        One whose neighbour is being stopped too: it may be restarted, and then is back soon.
        """
        now = time.monotonic()
        return {
            link.id
            for link in self._links.values()
            if link.state != "up" and now - link.since < link.patience_s
        }

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        """What the neighbour last said; 0 when it did not."""
        return self._links[neighbour].slots.get(worker, {}).get(handler, 0)

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State]:
        """Rows outstanding there for the handler, the seconds that one takes (0: not known), and
        whether it is well."""
        link = self._links[neighbour]
        case = link.cases.get(handler) if link.cases else None
        state = case.standing(time.monotonic()) if case else _HEALTHY
        return link.outstanding.get(handler, 0), link.service_s.get(handler, 0.0), state

    def states(self) -> list[LinkState]:
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
            return ask(asked, timeout=timeout_s)  # type: ignore[no-any-return]
        except grpc.RpcError as e:
            said = wire.read_error(e)
            raise NotTold(f"{neighbour}: {said.reason}", said.code) from None

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

    def __init__(self, ward: Ward, up: Callable[[], Collection[str]]) -> None:
        self._ward = ward
        self._up = up
        self._lock = threading.Lock()

    def cases(self, neighbour: str) -> Mapping[str, Case]:
        return self._ward.cases[neighbour]

    def begin(self, neighbour: str, handler: str) -> None:
        with self._lock:
            self._ward.begin(neighbour, handler, time.monotonic())

    def hear(self, neighbour: str, handler: str, heard: Heard) -> None:
        with self._lock:
            change = self._ward.hear(neighbour, handler, heard, self._up(), time.monotonic())
        self._tell(change)

    def look(self, paces: Mapping[str, Mapping[str, float]]) -> bool:
        """Compares the neighbours that are up; whether that changed something."""
        with self._lock:
            changes = self._ward.look(paces, time.monotonic())
        self._tell(*changes)
        return bool(changes)

    def came(self, neighbour: str) -> None:
        with self._lock:
            self._ward.came(neighbour, time.monotonic())

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


class _Link:
    """One neighbour: its channel, its state, what it owes us."""

    def __init__(
        self,
        neighbour: Process,
        limits: Limits,
        digest: str,
        changed: Callable[[], None],
        to_flush: set[_Book],
        flush: Callable[[], None],
        minder: _Minder,
    ) -> None:
        self.to_flush = to_flush
        self.flush = flush
        self.cases = minder.cases(neighbour.id)  # what is the matter with it, by handler
        self._minder = minder
        self.id = neighbour.id
        self.address = neighbour.address
        self.channel = grpc.insecure_channel(neighbour.address, wire.channel_options(limits))
        self.state = "down"
        self.since = time.monotonic()
        self.patience_s = limits.patience_s
        self.reason = "not reached yet"
        self.outstanding: defaultdict[str, int] = defaultdict(int)  # by handler
        self.asked = 0
        self.failed = 0
        self.slots: dict[str, dict[str, int]] = {}
        self.service_s: dict[str, float] = {}
        self._books = (
            _Book(self, f"{self.id}-small", limits),
            _Book(self, f"{self.id}-large", limits),
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

    def look(self) -> None:
        """Starts a look at the neighbour when it is time and none is under way."""
        now = time.monotonic()
        if self._probe is not None or now < self._next_look:
            return
        # While down, the call waits for the connection, so that it succeeds the moment it is there.
        self._probe = self._stub.GetMetrics.future(
            pb2.MetricsRequest(),
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
        large = large or segment.pieces > 0  # whose answers may be
        return self._books[large].send(segment, sink)

    def answered(self, route: Route, answers: Answers, is_read: bool = False) -> None:
        """Rows that were asked have ended. is_read: in pieces, when it says nothing of its health
        that they failed."""
        handler = route.handler
        count, flawless = answers.count, answers.flawless
        with self._lock:
            self.outstanding[handler] -= count
            if not flawless:
                self.failed += count
            self._note_service_time(handler, answers)
        if flawless and not self.cases:
            return
        service_s, to_all = self.service_s.get(handler, 0.0), route.mode is Mode.ALL
        said = heard(answers, service_s, to_all)
        if is_read and not flawless:
            said = Heard(Verdict.NEITHER, count, "")
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
        silent = Heard(Verdict.BAD, rows, f"no answer from {self.id} within the deadline")
        self._minder.hear(self.id, handler, silent)

    def lost(self, why: Part) -> None:
        if why.executed is Executed.NO and why.code is Code.UNAVAILABLE:
            self.stops()
            if self.state == "draining" and not any(book.is_live for book in self._books):
                self._set_state("down", "it has stopped", self._limits.restart_s)
        elif self.state != "draining":  # then it has said that it goes
            self._set_state("down", why.reason, is_amiss=why.code is Code.UNIMPLEMENTED)

    def stops(self) -> None:
        """The neighbour has said that it is being stopped."""
        if self.state == "up":
            self._set_state("draining", "it is stopping")

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
                found, known = column.worked_us / 1e6, self.service_s.get(handler)
                # One odd slice must not turn the picture: it counts at most four times the known.
                self.service_s[handler] = (
                    0.8 * known + 0.2 * min(found, 4 * known) if known else found
                )

    def snapshot(self) -> LinkState:
        health, health_reason, ejections = self._minder.shown(self.id)
        with self._lock:
            return LinkState(
                process_id=self.id,
                address=self.address,
                state=self.state,
                since=self.since,
                reason=self.reason,
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
            )

    def _looked(self, began: float, probe: grpc.Future) -> None:
        now = time.monotonic()
        self._next_look = now + self._limits.probe_interval_s
        self._probe = None
        if probe.cancelled():
            return
        error = probe.exception()
        if error is not None:
            self._next_look = now + 0.1 if now - began < 1 else now
            self._set_state("down", wire.read_error(error).reason)
        else:
            self._learn(probe.result(), now - began)

    def _learn(self, metrics: pb2.MetricsResponse, rtt_s: float) -> None:
        amiss = self._amiss(metrics)
        if amiss:
            self._set_state("down", amiss, is_amiss=True)
            return
        with self._lock:
            slots = {p.id: dict(p.slots) for p in metrics.topology if p.slots}
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
            self._set_state("down" if self.state == "down" else "draining", "it is stopping")
        elif all(book.is_live for book in self._books):
            self._set_state("up", "")

    def _amiss(self, metrics: pb2.MetricsResponse) -> str:
        """Why what answers there cannot be asked; empty when it can."""
        if metrics.process_id != self.id:
            return f"process {metrics.process_id} answers at {self.address}"
        found = wire.read_format(metrics)
        if found != wire.FORMAT:
            ours = f"this process {wire.FORMAT}, of version {overlay.__version__}"
            return f"version {metrics.version} speaks wire format {found}, {ours}"
        return ""

    def _set_state(
        self, state: str, reason: str, patience_s: float | None = None, is_amiss: bool = False
    ) -> None:
        """patience_s: how long it may be waited for in this state, when not as long as ever.

        is_amiss: something answers that cannot be asked, which nobody has to wait to be told.
        """
        with self._lock:
            before, changed = self.state, state != self.state
            is_news = changed or (is_amiss and reason != self.reason)
            self.reason = reason
            if changed:
                self.state, self.since = state, time.monotonic()
                self.patience_s = patience_s or self._limits.patience_s
                self._next_look = 0.0  # look again at once: it may be back already
            if state != "up":
                self.slots = {}
        if changed:
            self._minder.forget(self.id)
        if is_news and not self._closed:  # it is this process that goes
            is_bad = is_amiss or (state == "down" and before != "draining")
            level = logging.WARNING if is_bad else logging.INFO
            log.log(
                level,
                "link to %s (%s) is %s%s",
                self.id,
                self.address,
                state,
                f": {reason}" if reason else "",
                extra={"kind": "link"},
            )
        if changed or state == "up":
            self._changed()


class _Sent:
    """A segment given to a link: each row is answered once, by the neighbour or for it."""

    __slots__ = ("is_read", "message", "open", "row", "segment", "sink")

    def __init__(self, segment: Segment, sink: Sink) -> None:
        self.is_read = False  # in pieces: so it is the reader's matter when it ends, and how
        self.segment = segment
        self.sink = sink
        self.open = OpenRows(segment.count)
        self.message: _Message | None = None  # in which it was handed to gRPC; it may run then
        self.row = 0  # where it begins in that message


class _Message:
    """A segment as it was written: one of those given, or several that could be joined."""

    __slots__ = ("left", "number", "parts", "starts")

    def __init__(self, number: int, parts: list[_Sent]) -> None:
        self.number = number
        self.parts = parts
        self.starts: list[int] = []
        self.left = 0
        for part in parts:
            part.message, part.row = self, self.left
            self.starts.append(self.left)
            self.left += part.segment.count


class _Book:
    """What goes through one pipe: segments to send, segments not yet answered, cancels."""

    def __init__(self, link: _Link, name: str, limits: Limits) -> None:
        self.pipe = Pipe(
            link.channel,
            name,
            self._fill,
            self._receive,
            self._lost,
            self._begin,
            self._patience_s,
        )
        self.is_live = False
        self._link = link
        self._limits = limits
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._outbox: deque[_Sent] = deque()
        self._cancels: deque[tuple[_Sent, int, int]] = deque()
        self._grants: deque[tuple[int, int, str, int]] = deque()  # message, row, worker, pieces
        self._messages: dict[int, _Message] = {}
        self._last_quick: _Message | None = None

    def send(self, segment: Segment, sink: Sink) -> End:
        sent = _Sent(segment, sink)
        with self._lock:
            live = self.is_live
            if live:
                self._outbox.append(sent)
        if live:
            self._link.to_flush.add(self)
        else:
            self._answer_all(sent, Code.UNAVAILABLE, "the link is down", Executed.NO)

        def end(code: Code, start: int, count: int) -> None:
            with self._lock:
                if not sent.open.left:
                    return
                late = 0
                if code is Code.DEADLINE_EXCEEDED and sent.message is not None and not sent.is_read:
                    late = sum(rows for _, rows in sent.open.runs(start, count))
                self._cancels.append((sent, start, count))
            if late:
                self._link.overdue(segment.route.handler, late)
            self.pipe.kick()

        return end

    # on gRPC's sending thread

    def _patience_s(self) -> float:
        """Few requests that come while the neighbour is at quick work leave when that is answered.

        Many single requests make each of their trips longer than their work; those that gather
        share one. Source of the rule: Nagle's algorithm (RFC 896), here with a bound, or a request
        that hangs would keep back the others.
        """
        if self._cancels or not self._is_at_quick_work:
            return 0.0
        try:
            first = self._outbox[0].segment
        except IndexError:
            return 0.0
        limits = self._limits
        is_few = first.count <= limits.few_rows and len(self._outbox) < limits.gather_rows
        return limits.gather_s if is_few and self._link.is_quick(first.route.handler) else 0.0

    @property
    def _is_at_quick_work(self) -> bool:
        last = self._last_quick
        return last is not None and last.left > 0

    def _fill(self, frame: pb2.Frame) -> bool:
        size = 0
        while self._outbox and size < self._limits.frame_bytes:
            parts = self._joinable()
            segment = parts[0].segment
            if len(parts) > 1:
                segment = Segment.joined([part.segment for part in parts])
            left_s = self._link.time_left_s(segment.deadline)
            if left_s <= 0:
                for part in parts:
                    self._answer_all(part, Code.DEADLINE_EXCEEDED, "no time left", Executed.NO)
                continue
            number = next(self._numbers) & 0xFFFFFFFF
            with self._lock:
                live = self.is_live
                if live:
                    message = self._messages[number] = _Message(number, parts)
                    if self._link.is_quick(segment.route.handler):
                        self._last_quick = message
            if not live:  # lost since: this frame goes nowhere
                for part in parts:
                    self._answer_all(part, Code.UNAVAILABLE, "the link is down", Executed.NO)
                self._link.flush()
                continue
            early = segment.early is not None
            wire.write_segment(frame, number, segment, left_s, as_they_come=early)
            size += segment.payloads.size + 100
        # After the segments: what was ended before it left is ended where it arrives.
        for _ in range(len(self._cancels)):
            sent, start, count = self._cancels.popleft()
            if sent.message is None and sent.open.left:  # it leaves with a later frame
                self._cancels.append((sent, start, count))
            elif sent.message is not None:
                row = sent.row + start
                frame.cancels.add(number=sent.message.number, start=row, count=count)
                size += 20
        for _ in range(len(self._grants)):
            number, row, worker, count = self._grants.popleft()
            frame.grants.add(number=number, row=row, process_id=worker, count=count)
            size += 20
        return size > 0

    def _joinable(self) -> list[_Sent]:
        """The head of the outbox, with those after it that may travel in one segment with it."""
        parts = [self._outbox.popleft()]
        first, rows, size = parts[0].segment, parts[0].segment.count, parts[0].segment.payloads.size
        few = self._limits.few_rows  # larger ones are copied on unopened, which is cheaper
        if first.early is not None:  # whose parts are to be told apart before the answers
            return parts
        while self._outbox and rows < self._limits.join_rows and first.count <= few:
            other = self._outbox[0].segment
            rows, size = rows + other.count, size + other.payloads.size
            if (
                other.route != first.route
                or other.attempt != first.attempt
                or other.told != first.told
                or abs(other.deadline - first.deadline) > SAME_DEADLINE_S
                or other.count > few
                or other.early is not None
                or size > self._limits.frame_bytes
            ):
                break
            parts.append(self._outbox.popleft())
        return parts

    # on the pipe's thread

    def _receive(self, frame: pb2.Frame) -> None:
        if frame.stopping:
            self._link.stops()
        for made in frame.slices:
            message = self._messages.get(made.number)
            if message is not None and made.more:
                self._pass_on(message.parts[0], made.start, wire.read_slice(made))
            elif message is not None:
                self._spread(message, made.start, wire.read_slice(made))
        if self._outbox and not self._is_at_quick_work:
            self.pipe.hurry()
        self._link.flush()  # what was tried elsewhere

    def _pass_on(self, sent: _Sent, start: int, answers: Answers) -> None:
        """Parts of rows that are not answered yet."""
        early = sent.segment.early
        if early is not None and start + answers.count <= sent.segment.count:
            self._link.note_times(sent.segment.route.handler, answers)
            sent.is_read = sent.is_read or not all(column.is_over for column in answers.parts)
            early(start, answers.granted_by(partial(self._grant, sent, start)))

    def _grant(self, sent: _Sent, row: int, worker: str, pieces: int) -> None:
        with self._lock:
            message = sent.message
            if message is None or not sent.open.runs(row, 1):
                return
            self._grants.append((message.number, sent.row + row, worker, pieces))
        self.pipe.kick()

    def _spread(self, message: _Message, start: int, answers: Answers) -> None:
        """Gives a slice to the segments that its rows belong to."""
        if len(message.parts) == 1:
            self._answer(message.parts[0], start, answers)
            return
        stop = start + answers.count
        index = bisect.bisect_right(message.starts, start) - 1
        while start < stop and index < len(message.parts):
            part = message.parts[index]
            rows = min(stop, part.row + part.segment.count) - start
            if rows > 0:
                offset = answers.count - (stop - start)
                self._answer(part, start - part.row, answers.slice(offset, rows))
                start += rows
            index += 1

    def _begin(self, metadata: Mapping[str, str]) -> None:
        self.is_live = True
        self._link.look_again()

    def _lost(self, why: Part) -> None:
        with self._lock:
            self.is_live = False
            handed = [part for message in self._messages.values() for part in message.parts]
            unsent = list(self._outbox)
            self._outbox.clear()
            self._cancels.clear()
            self._grants.clear()
        self._link.lost(why)
        # A neighbour that stops in order proves that it has read none of this.
        ran = Executed.NO if why.executed is Executed.NO else Executed.UNKNOWN
        for part in handed:
            self._answer_all(part, Code.UNAVAILABLE, why.reason, ran)
        for part in unsent:
            self._answer_all(part, Code.UNAVAILABLE, why.reason, Executed.NO)
        self._link.flush()

    # on any thread

    def _answer_all(self, sent: _Sent, code: Code, reason: str, executed: Executed) -> None:
        reason = f"no answer from {self._link.id}: {reason}"
        part = Part(self._link.id, code, reason, executed=executed)
        self._answer(sent, 0, Answers(sent.segment.count, (), refused=part))

    def _answer(self, sent: _Sent, start: int, answers: Answers) -> None:
        message = sent.message
        with self._lock:
            before = sent.open.left
            runs = sent.open.take(start, answers.count)
            if message is not None:
                message.left -= before - sent.open.left
                if not message.left:
                    self._messages.pop(message.number, None)
                    for part in message.parts:
                        part.message = None
        for first, rows in runs:
            slice_ = answers.slice(first - start, rows)
            self._link.answered(sent.segment.route, slice_, sent.is_read)
            sent.sink(first, slice_)
