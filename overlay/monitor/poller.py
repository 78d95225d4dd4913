"""Polls the metrics of every process of an overlay, round after round.

Knows nothing of pages or terminals. The process at the given address has the topology, which names
the others; each has its own persistent connection. A round ends when all have answered, or after
0.7 s; a process that has not answered yet is not polled again until it has.

One daemon thread, `poller`, runs the rounds and makes the snapshots until close().
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from overlay.model import clocks as time
from overlay.model.errors import BadResponse
from overlay.model.segments import Code
from overlay.monitor.snapshot import ALL, Polled, PollResult, RequestFilter, Snapshot, snapshot
from overlay.monitor.timeseries import Timeseries
from overlay.security.lookup import credentials_for
from overlay.transport import codec
from overlay.transport.channels import Channel, split

INTERVAL_S = 1.0
ROUND_S = 0.7  # a silent process does not delay a snapshot any longer
EVENTS, REQUESTS = 40, 200  # how many of the last ones to request
ANSWER_S = 2.0  # as for links; after that a process counts as gone
MAX_EVENTS = 100  # observed by this poller itself


class Poller:
    """Polls, and keeps the newest snapshot. Thread-safe; close() may be called twice."""

    def __init__(
        self, address: str, interval_s: float = INTERVAL_S, wanted: RequestFilter = ALL
    ) -> None:
        """Raises ValueError for an address that is not host:port."""
        split(address)
        self.on_snapshot: Callable[[Snapshot], None] = lambda made: None
        self._interval_s = interval_s
        self._wanted = wanted
        self._asked = _Target("", address, self._notify)
        self._asked.wants_requests = True
        self._targets: dict[str, _Target] = {"": self._asked}
        self._timeseries = {"": Timeseries()}
        self._processes: list[codec.pb2.Process] = []
        self._healths: dict[str, tuple[str, float]] = {}  # health, and since when
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._round = 0
        self._answered = threading.Condition()
        self._newest: Snapshot = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def start(self) -> Poller:
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        self._notify()
        for target in list(self._targets.values()):
            target.close()

    def newer(self, than: int = 0, within_s: float = 10.0) -> Snapshot:
        """The newest snapshot. Waits up to `within_s` for one whose `round` is above `than`."""
        with self._answered:
            self._answered.wait_for(lambda: self._newest.get("round", 0) > than, within_s)
            return self._newest

    def _notify(self) -> None:
        with self._answered:
            self._answered.notify_all()

    def _run(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            self._poll(began + ROUND_S)
            if self._learn_topology():
                self._poll(began + ROUND_S)
            self._publish()
            self._closed.wait(max(0.0, began + self._interval_s - time.monotonic()))

    def _poll(self, until: float) -> None:
        """Polls all targets not being polled already, and waits for their answers until `until`."""
        targets = list(self._targets.values())
        for target in targets:
            target.ask()
        with self._answered:
            self._answered.wait_for(
                lambda: self._closed.is_set() or not any(target.is_asking for target in targets),
                max(0.0, until - time.monotonic()),
            )

    def _learn_topology(self) -> bool:
        """Adds and removes targets. Returns whether any are new."""
        metrics = self._asked.result.metrics
        if metrics is None:
            return False
        if self._asked.id == "":  # its first answer has its id
            self._asked.id = metrics.process_id
            self._targets = {metrics.process_id: self._asked}
            self._timeseries = {metrics.process_id: self._timeseries[""]}
        if not self._asked.result.answers or metrics.process_id != self._asked.id:
            return False
        self._processes = list(metrics.topology)
        addresses = {p.id: p.address for p in metrics.topology}
        for gone in [e for e in self._targets.values() if e is not self._asked]:
            if addresses.get(gone.id) != gone.address:
                gone.close()
                del self._targets[gone.id]
        new = [p for p in metrics.topology if p.id not in self._targets]
        for process in new:
            self._targets[process.id] = _Target(process.id, process.address, self._notify)
            self._timeseries[process.id] = Timeseries()
        return bool(new)

    def _publish(self) -> None:
        results = {target.id: target.result for target in self._targets.values()}
        for process_id, result in results.items():
            timeseries = self._timeseries[process_id]
            if result.reason:
                timeseries.failed()
            elif result.metrics is not None:
                timeseries.answered(result.metrics, result.since)
            timeseries.add_point()
        polled = Polled(
            self._asked.shown,
            self._asked.id,
            self._processes,
            results,
            self._timeseries,
            self._events,
            self._asked.functions,
        )
        made = snapshot(polled, time.monotonic(), time.time(), self._wanted)
        self._note_changes(made)
        self._round += 1
        made |= {"round": self._round, "interval_s": self._interval_s}
        with self._answered:
            self._newest = made
            self._answered.notify_all()
        self.on_snapshot(made)

    def _note_changes(self, made: Snapshot) -> None:
        """Makes events of what this poller observes: processes that go and come back."""
        now = time.time()
        for process in made["processes"]:
            process_id, health = process["id"], process["health"]
            before, since = self._healths.get(process_id, ("asking", now))
            if health == before:
                continue
            self._healths[process_id] = health, now
            if before == "asking" and health == "well":
                continue
            level = "info" if health == "well" else "warning"
            text = (
                f"{health}: {process['why']}"
                if process["why"]
                else f"well, after {now - since:.0f} s {before}"
            )
            self._events.append(
                {
                    "at": round(now, 3),
                    "process": process_id,
                    "kind": health,
                    "text": text,
                    "level": level,
                    "is_change": True,
                }
            )


class _Target:
    """One process that is polled, over a persistent connection."""

    def __init__(self, process_id: str, address: str, notify: Callable[[], None]) -> None:
        self.id = process_id
        self.address = address
        self.result = PollResult(time.monotonic())
        self.wants_requests = False  # and its functions
        self.functions: Sequence[codec.pb2.Function] = ()
        self.is_asking = False
        self._notify = notify
        self._digest = 0
        self._channel = Channel(address, credentials=credentials_for(*split(address)))
        self._channel.doubt()  # starts looking up its name
        self._node = codec.pb2_grpc.OverlayNodeStub(self._channel)

    @property
    def shown(self) -> str:
        """The address, with what its name resolves to here."""
        return self._channel.shown

    def ask(self) -> None:
        """Does not wait for a connection: if nothing listens, the poll fails at once."""
        if self.is_asking or not self._channel.has_looked():
            return
        self.is_asking = True
        wanted = codec.pb2.MetricsRequest(events=EVENTS)
        if self.wants_requests:
            wanted.requests = REQUESTS
            metrics = self.result.metrics
            wanted.functions = metrics is not None and self._digest != metrics.functions_digest
        asked = self._node.GetMetrics.future(wanted, timeout=ANSWER_S)
        asked.add_done_callback(self._polled)

    def close(self) -> None:
        self._channel.close()

    def _polled(self, asked: grpc.Future) -> None:
        if asked.cancelled():  # the channel has moved to another address, or is closed
            self.is_asking = False
            return
        error = asked.exception()
        if error is not None:
            reason = self._channel.problem or self._named(_reason(error))
            self.result = PollResult(self.result.since, self.result.metrics, reason)
        else:
            try:
                metrics = codec.read_metrics(asked.result())
                self.result = PollResult(time.monotonic(), metrics)
                self._learn_functions(metrics)
            except BadResponse as e:
                reason = f"it violates the protocol: {e}"
                self.result = PollResult(self.result.since, self.result.metrics, reason)
        self.is_asking = False
        self._notify()

    def _named(self, reason: str) -> str:
        return reason if self.shown == self.address else f"{reason}, at {self.shown}"

    def _learn_functions(self, metrics: codec.pb2.MetricsResponse) -> None:
        """They are requested only after their digest has changed."""
        if metrics.functions or not metrics.functions_digest:
            self.functions, self._digest = metrics.functions, metrics.functions_digest


def _reason(error: grpc.RpcError) -> str:
    failure = codec.read_error(error)
    if failure.code is Code.DEADLINE_EXCEEDED:
        return f"no answer within {ANSWER_S:g} s"
    if failure.code is Code.UNIMPLEMENTED:
        return "what serves there is not a process of an overlay"
    return failure.reason
