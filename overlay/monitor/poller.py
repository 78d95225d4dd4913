"""Watches a whole overlay from outside: asks every process for its metrics, round after round.

Knows neither pages nor terminals. The address given leads to the topology, the topology to the
others; each process has a kept connection of its own. Nobody is waited for: a round is over when
all have answered or 0.7 s have passed, and one that is still asked is not asked again.

One thread, `watch`, runs the rounds and makes the pictures; a daemon that ends after close().
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from overlay.model import clocks as time
from overlay.model.errors import Misspoken
from overlay.model.segments import Code
from overlay.monitor.snapshot import ALL, Known, Look, Wanted, picture
from overlay.monitor.timeseries import Timeseries
from overlay.transport import codec
from overlay.transport.channels import Channel, split

INTERVAL_S = 1.0
ROUND_S = 0.7  # a picture is not kept back longer by one that is silent
EVENTS, REQUESTS = 40, 200  # of the last, wanted of a process
ANSWER_S = 2.0  # as long as neighbours give each other; then it counts as gone
KEPT_EVENTS = 100  # of what this watch itself has seen


class Poller:
    """The rounds, and the latest picture. Safe from any thread; close() may be called twice."""

    def __init__(self, address: str, interval_s: float = INTERVAL_S, wanted: Wanted = ALL) -> None:
        """Raises ValueError for an address that is not host:port."""
        split(address)
        self.on_picture: Callable[[dict[str, Any]], None] = lambda picture: None
        self._interval_s = interval_s
        self._wanted = wanted
        self._asked = _Target("", address, self._tell)
        self._asked.tells_requests = True
        self._eyes: dict[str, _Target] = {"": self._asked}
        self._histories = {"": Timeseries()}
        self._processes: list[Any] = []
        self._healths: dict[str, tuple[str, float]] = {}  # and since when
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._round = 0
        self._answered = threading.Condition()
        self._newest: dict[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> Poller:
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        self._tell()
        for eye in list(self._eyes.values()):
            eye.close()

    def newer(self, than: int = 0, within_s: float = 10.0) -> dict[str, Any]:
        """The newest picture, waiting for one whose `round` is above `than`; the old one, when
        none came in time."""
        with self._answered:
            self._answered.wait_for(lambda: self._newest.get("round", 0) > than, within_s)
            return self._newest

    def _tell(self) -> None:
        with self._answered:
            self._answered.notify_all()

    def _run(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            self._look(began + ROUND_S)
            if self._learn_topology():
                self._look(began + ROUND_S)
            self._publish()
            self._closed.wait(max(0.0, began + self._interval_s - time.monotonic()))

    def _look(self, until: float) -> None:
        """Asks everybody who is not being asked, and waits for all of them until then."""
        eyes = list(self._eyes.values())
        for eye in eyes:
            eye.ask()
        with self._answered:
            self._answered.wait_for(
                lambda: self._closed.is_set() or not any(eye.is_asking for eye in eyes),
                max(0.0, until - time.monotonic()),
            )

    def _learn_topology(self) -> bool:
        """Whether there are processes that have not been asked yet."""
        metrics = self._asked.look.metrics
        if metrics is None:
            return False
        if self._asked.id == "":  # its first answer says who it is
            self._asked.id = metrics.process_id
            self._eyes = {metrics.process_id: self._asked}
            self._histories = {metrics.process_id: self._histories[""]}
        if not self._asked.look.answers or metrics.process_id != self._asked.id:
            return False
        self._processes = list(metrics.topology)
        addresses = {p.id: p.address for p in metrics.topology}
        for gone in [e for e in self._eyes.values() if e is not self._asked]:
            if addresses.get(gone.id) != gone.address:
                gone.close()
                del self._eyes[gone.id]
        new = [p for p in metrics.topology if p.id not in self._eyes]
        for process in new:
            self._eyes[process.id] = _Target(process.id, process.address, self._tell)
            self._histories[process.id] = Timeseries()
        return bool(new)

    def _publish(self) -> None:
        looks = {eye.id: eye.look for eye in self._eyes.values()}
        for who, look in looks.items():
            history = self._histories[who]
            if look.answers:
                history.saw(look.metrics, look.since)
            elif look.reason:
                history.missed()
            history.point()
        known = Known(
            self._asked.shown,
            self._asked.id,
            self._processes,
            looks,
            self._histories,
            self._events,
            self._asked.functions,
        )
        made = picture(known, time.monotonic(), time.time(), self._wanted)
        self._note_changes(made)
        self._round += 1
        made |= {"round": self._round, "interval_s": self._interval_s}
        with self._answered:
            self._newest = made
            self._answered.notify_all()
        self.on_picture(made)

    def _note_changes(self, made: dict[str, Any]) -> None:
        """What this watch itself has seen happen: who went, who came back."""
        now = time.time()
        for process in made["processes"]:
            who, health = process["id"], process["health"]
            before, since = self._healths.get(who, ("asking", now))
            if health == before:
                continue
            self._healths[who] = health, now
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
                    "process": who,
                    "kind": health,
                    "text": text,
                    "level": level,
                    "is_change": True,
                }
            )


class _Target:
    """Looks at one process whenever it is told to, over a kept connection."""

    def __init__(self, process_id: str, address: str, answered: Callable[[], None]) -> None:
        self.id = process_id
        self.address = address
        self.look = Look(time.monotonic())
        self.tells_requests = False  # and of its functions
        self.functions: Sequence[Any] = ()
        self.is_asking = False
        self._answered = answered
        self._digest = 0
        self._channel = Channel(address)
        self._channel.doubt()  # all names are looked up at once
        self._node = codec.pb2_grpc.OverlayNodeStub(self._channel)

    @property
    def shown(self) -> str:
        """The address, with what its name stands for here."""
        return self._channel.shown

    def ask(self) -> None:
        """Without waiting for a connection: where nobody listens, the answer is no, at once."""
        if self.is_asking or not self._channel.has_looked():
            return
        self.is_asking = True
        wanted = codec.pb2.MetricsRequest(events=EVENTS)
        if self.tells_requests:
            wanted.requests = REQUESTS
            metrics = self.look.metrics
            wanted.functions = metrics is not None and self._digest != metrics.functions_digest
        asked = self._node.GetMetrics.future(wanted, timeout=ANSWER_S)
        asked.add_done_callback(self._looked)

    def close(self) -> None:
        self._channel.close()

    def _looked(self, asked: grpc.Future) -> None:
        if asked.cancelled():  # the channel leads elsewhere now, or is closed
            self.is_asking = False
            return
        error = asked.exception()
        if error is not None:
            reason = self._channel.problem or self._named(_reason(error))
            self.look = Look(self.look.since, self.look.metrics, reason)
        else:
            try:
                self.look = Look(time.monotonic(), codec.read_metrics(asked.result()))
                self._learn_functions(self.look.metrics)
            except Misspoken as e:
                wrong = f"it speaks wrongly: {e}"
                self.look = Look(self.look.since, self.look.metrics, wrong)
        self.is_asking = False
        self._answered()

    def _named(self, reason: str) -> str:
        return reason if self.shown == self.address else f"{reason}, at {self.shown}"

    def _learn_functions(self, metrics: codec.pb2.MetricsResponse) -> None:
        """They are told when they were asked for, as they are after their digest has changed."""
        if metrics.functions or not metrics.functions_digest:
            self.functions, self._digest = metrics.functions, metrics.functions_digest


def _reason(error: grpc.RpcError) -> str:
    said = codec.read_error(error)
    if said.code is Code.DEADLINE_EXCEEDED:
        return f"no answer within {ANSWER_S:g} s"
    if said.code is Code.UNIMPLEMENTED:
        return "what serves there is not a process of an overlay"
    return said.reason
