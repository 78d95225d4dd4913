"""The connections to the processes that this one asks.

A link is one kept channel. It is looked at every second through GetMetrics, which tells whether the
neighbour answers, drains, reads the same configuration, and how many slots lie behind it; a call
that finds it gone says so at once. Requests go down as unary calls without a thread each; answers
come on the channel's own thread.

Owns one thread, "links", from `start` to `close`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import grpc

from overlay import wire
from overlay.limits import Limits
from overlay.topology import Process
from overlay.values import Answer, Code, End, Executed, Item, Part, Route, Segment, Sink
from overlay.wire import pb2, pb2_grpc

log = logging.getLogger("overlay.links")


@dataclass(frozen=True)
class LinkState:
    """What is known of a neighbour. since: monotonic seconds. slots: worker -> handler -> count."""

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

    @property
    def total_slots(self) -> int:
        return sum(max(handlers.values(), default=0) for handlers in self.slots.values())


class Links:
    """All links of one process. Safe from any thread.

    on_change is called, on any thread, when a link has come up or gone down, or has been down for
    longer than anyone waits for it.
    """

    def __init__(self, neighbours: Iterable[Process], limits: Limits, digest: str) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._limits = limits
        self._links = {n.id: _Link(n, limits, digest, self._changed) for n in neighbours}
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="links", daemon=True)

    def start(self) -> None:
        if self._links:
            self._thread.start()

    def close(self) -> None:
        """Ends the looking and the channels; calls in flight are answered as cancelled."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(1)
        for link in self._links.values():
            link.channel.close()

    def up(self) -> set[str]:
        return {link.id for link in self._links.values() if link.state == "up"}

    def awaited(self) -> set[str]:
        """The links that are down for so short a time that a request may wait for them."""
        now = time.monotonic()
        patience = self._limits.patience_s
        return {
            link.id
            for link in self._links.values()
            if link.state == "down" and now - link.since < patience
        }

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        """What the neighbour last said; 0 when it did not."""
        return self._links[neighbour].slots.get(worker, {}).get(handler, 0)

    def outstanding(self, neighbour: str, handler: str) -> int:
        return self._links[neighbour].outstanding[handler]

    def asked(self, neighbour: str) -> int:
        return self._links[neighbour].asked

    def states(self) -> list[LinkState]:
        return [link.snapshot() for link in self._links.values()]

    def reserve(self, neighbour: str, segment: Segment) -> None:
        """Counts the segment as outstanding. Each reservation must be followed by a `send`."""
        self._links[neighbour].reserve(segment.route.handler, len(segment))

    def send(self, neighbour: str, segment: Segment, sink: Sink) -> End:
        """Asks the neighbour, which must have been reserved for it. Never blocks, never raises.

        The sink gets each index once, on any thread; a failed call is a refusal that says whether
        it proves that nothing ran.
        """
        return self._links[neighbour].send(segment, sink)

    def _changed(self) -> None:
        self._wake.set()
        self.on_change()

    def _watch(self) -> None:
        while not self._closed:
            self._wake.clear()
            for link in self._links.values():
                link.look()
            waiting_for = self.awaited()
            # A short wait while somebody may be waiting for a link, so that they learn it in time.
            self._wake.wait(0.1 if waiting_for else self._limits.probe_interval_s)
            if waiting_for - self.awaited():
                self.on_change()


class _Link:
    """One neighbour: its channel, its state, what it owes us."""

    def __init__(
        self, neighbour: Process, limits: Limits, digest: str, changed: Callable[[], None]
    ) -> None:
        self.id = neighbour.id
        self.address = neighbour.address
        self.channel = grpc.insecure_channel(neighbour.address, wire.channel_options(limits))
        self.state = "down"
        self.since = time.monotonic()
        self.reason = "not reached yet"
        self.outstanding: Counter[str] = Counter()
        self.asked = 0
        self.failed = 0
        self.slots: dict[str, dict[str, int]] = {}
        self._stub = pb2_grpc.OverlayNodeStub(self.channel)
        self._limits = limits
        self._digest = digest
        self._changed = changed
        self._lock = threading.Lock()
        self._probe: grpc.Future | None = None
        self._next_look = 0.0
        self._rtt_s = 0.0
        self._version = ""
        self._same_config = True

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

    def send(self, segment: Segment, sink: Sink) -> End:
        calls = [
            _Call(self, segment.route, index, item, sink)
            for index, item in enumerate(segment.items)
        ]
        for call in calls:
            call.begin(self._stub, self._time_left_s(call.item))

        def end(code: Code) -> None:
            for call in calls:
                call.end(code)

        return end

    def answered(self, handler: str, part: Part | None) -> None:
        """One asked item has ended; `part` is the refusal or failure, if it was one."""
        with self._lock:
            self.outstanding[handler] -= 1
            if not self.outstanding[handler]:
                del self.outstanding[handler]
            self.failed += part is not None
        if part is None or part.code is not Code.UNAVAILABLE:
            return
        if part.executed is Executed.NO:
            self._next_look = 0.0  # it answers, and refuses: draining, as the next look will tell
            self._changed()
        else:
            self._set_state("down", part.reason)

    def snapshot(self) -> LinkState:
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
            )

    def _time_left_s(self, item: Item) -> float:
        # Kept back for the way home, so that a late worker costs its own part and not the others'.
        left = item.deadline - time.monotonic()
        margin = min(self._limits.return_margin_s + 2 * self._rtt_s, left / 2)
        return left - margin

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
        if metrics.process_id != self.id:
            self._set_state("down", f"process {metrics.process_id} answers at {self.address}")
            return
        with self._lock:
            self.slots = {p.id: dict(p.slots) for p in metrics.topology if p.slots}
            self._rtt_s = rtt_s if self._rtt_s == 0 else 0.8 * self._rtt_s + 0.2 * rtt_s
            self._version = metrics.version
            same = metrics.config_digest == self._digest
            differs = self._same_config and not same
            self._same_config = same
        if differs:
            log.warning("%s reads another configuration than this process", self.id)
        if metrics.is_healthy:
            self._set_state("up", "")
        else:
            self._set_state("draining", "it is stopping")

    def _set_state(self, state: str, reason: str) -> None:
        with self._lock:
            changed = state != self.state
            self.reason = reason
            if changed:
                self.state, self.since = state, time.monotonic()
                self._next_look = 0.0  # look again at once: it may be back already
            if state != "up":
                self.slots = {}
        if changed:
            level = logging.WARNING if state == "down" else logging.INFO
            log.log(
                level,
                "link to %s (%s) is %s%s",
                self.id,
                self.address,
                state,
                f": {reason}" if reason else "",
            )
        if changed or state == "up":
            self._changed()


class _Call:
    """One item on its way: answered once, by the neighbour, by a failure or by `end`."""

    def __init__(self, link: _Link, route: Route, index: int, item: Item, sink: Sink) -> None:
        self.item = item
        self._link = link
        self._route = route
        self._index = index
        self._sink = sink
        self._future: grpc.Future | None = None

    def begin(self, stub: pb2_grpc.OverlayNodeStub, timeout_s: float) -> None:
        if timeout_s <= 0:
            self._refused(
                Part(self._link.id, Code.DEADLINE_EXCEEDED, "no time left", executed=Executed.NO)
            )
            return
        request = wire.write_request(self._route, self.item)
        try:
            self._future = stub.Forward.future(request, timeout=timeout_s)
        except ValueError as e:  # the channel was closed: nothing left this process
            self._refused(Part(self._link.id, Code.UNAVAILABLE, str(e), executed=Executed.NO))
            return
        self._future.add_done_callback(self._done)

    def end(self, code: Code) -> None:
        if self._future is not None:
            self._future.cancel()

    def _done(self, future: grpc.Future) -> None:
        if future.cancelled():
            self._refused(Part(self._link.id, Code.CANCELLED, "the call was cancelled"))
            return
        error = future.exception()
        if error is not None:
            self._refused(_named(wire.read_error(error), self._link.id))
            return
        self._link.answered(self._route.handler, None)
        self._sink(self._index, (wire.read_response(future.result()),))

    def _refused(self, part: Part) -> None:
        self._link.answered(self._route.handler, part)
        self._sink(self._index, (Answer((), refused=part),))


def _named(part: Part, neighbour: str) -> Part:
    if part.executed is Executed.NO:
        return Part(neighbour, part.code, part.reason, executed=part.executed)
    return Part(neighbour, part.code, f"no answer from {neighbour}: {part.reason}")
