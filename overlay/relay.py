"""One segment of requests, from its claim to its answers: asks neighbours, works, gathers.

    claim   decides: who is asked, against which places          (under the intake's lock, quick)
    start   acts: everything is sent at once, no thread waits
    sinks   collect what comes back, on whatever thread it comes

Knows no grpc: the links and the executor are handed in, so that tests can put a network in memory
in their place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from overlay import assembly, routing
from overlay.executor import Slot
from overlay.intake import Ticket
from overlay.routing import Branch, Load, Plan
from overlay.topology import Topology
from overlay.values import Answer, Code, End, Executed, Mode, Part, Segment, Sink

log = logging.getLogger("overlay.relay")


class Network(Protocol):
    """What the relay needs of the links; see overlay.links.Links for the promises."""

    def up(self) -> set[str]: ...
    def awaited(self) -> set[str]: ...
    def slots(self, neighbour: str, worker: str, handler: str) -> int: ...
    def outstanding(self, neighbour: str, handler: str) -> int: ...
    def asked(self, neighbour: str) -> int: ...
    def reserve(self, neighbour: str, segment: Segment) -> None: ...
    def send(self, neighbour: str, segment: Segment, sink: Sink) -> End: ...


class Works(Protocol):
    """What the relay needs of the executor; see overlay.executor.Executor for the promises."""

    def claim(self, handler: str, waited_s: float = 0.0) -> Slot | None: ...
    def run(self, segment: Segment, slot: Slot, sink: Sink) -> End: ...


@dataclass(frozen=True)
class Claimed:
    """What a request got: a plan with its branches reserved, or a slot to work in."""

    plan: Plan
    slot: Slot | None = None


class Relay:
    """The decisions and deeds of one process. Safe from any thread."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        network: Network,
        works: Works | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topology = topology
        self._me = topology.processes[me]
        self._network = network
        self._works = works
        self._clock = clock

    def claim(self, ticket: Ticket) -> Claimed | None:
        """Places for the ticket's segment, or None when it must wait for one.

        It waits for a slot, for a branch with credit, and for a link that went down this moment
        (at most half of the time it has).
        """
        segment, now = ticket.segment, self._clock()
        if self._works is not None:
            slot = self._works.claim(segment.route.handler, ticket.waited_s(now))
            return Claimed(Plan(local=True), slot) if slot else None
        plan = routing.plan(self._topology, self._me.id, self._network.up(), segment.route)
        if plan.missing and self._may_come_back(plan) and now < _half_time(ticket):
            return None
        if segment.route.mode is Mode.ANY and plan.branches:
            return self._claim_one(plan.branches, plan, segment)
        for branch in plan.branches:
            self._network.reserve(branch.neighbour, segment)
        return Claimed(plan)

    def start(self, segment: Segment, claimed: Claimed, sink: Sink) -> End:
        """Sends or works. The sink gets each index once; the End answers what is open."""
        if claimed.slot is not None and self._works is not None:
            return self._works.run(segment, claimed.slot, sink)
        if segment.route.mode is Mode.ANY:
            return _Hand(self, segment, claimed.plan, sink).begin()
        return _Gather(self, segment, claimed.plan, sink).begin()

    def load(self, branch: Branch, handler: str) -> Load:
        """How full a branch is for a handler, by what this process sent and its neighbour said."""
        slots = sum(self._slots(branch.neighbour, worker, handler) for worker in branch.targets)
        outstanding = self._network.outstanding(branch.neighbour, handler)
        return Load(outstanding, slots, self._network.asked(branch.neighbour))

    def _slots(self, neighbour: str, worker: str, handler: str) -> int:
        process = self._topology.processes[worker]
        name = handler or process.handler
        said = self._network.slots(neighbour, worker, name)
        # Not told yet: what the configuration lets expect, or it would look full.
        return said or self._topology.handler_slots(process, self._topology.handlers[name])

    def _claim_one(
        self, branches: Iterable[Branch], plan: Plan, segment: Segment
    ) -> Claimed | None:
        handler = segment.route.handler
        branch = routing.pick(branches, lambda branch: self.load(branch, handler))
        if branch is None:
            return None
        self._network.reserve(branch.neighbour, segment)
        return Claimed(Plan((branch,), missing=plan.missing))

    def _may_come_back(self, plan: Plan) -> bool:
        below = self._topology.below(self._me.id)
        awaited = self._network.awaited()
        return any(
            n.id in awaited and (worker == n.id or worker in n.neighbors)
            for worker in plan.missing
            for n in below
        )

    def _send(self, branch: Branch, segment: Segment, sink: Sink) -> End:
        onward = segment.onward(self._me.id, branch.targets)
        return self._network.send(branch.neighbour, onward, sink)


class _Gather:
    """ALL: every branch is asked at once; an item is answered when its last branch has answered."""

    def __init__(self, relay: Relay, segment: Segment, plan: Plan, sink: Sink) -> None:
        self._relay = relay
        self._segment = segment
        self._plan = plan
        self._sink = sink
        self._order = tuple(relay._topology.processes)
        self._lock = threading.Lock()
        self._found: list[dict[str, Answer] | None] = [{} for _ in segment.items]
        self._ends: list[End] = []

    def begin(self) -> End:
        if not self._plan.branches:
            self._answer_all({})
            return _nothing
        for branch in self._plan.branches:
            self._ends.append(self._relay._send(branch, self._segment, self._sink_of(branch)))
        return self.end

    def end(self, code: Code) -> None:
        """Answers what is open with the parts that came, and ends the branches."""
        for index in range(len(self._segment)):
            with self._lock:
                found, self._found[index] = self._found[index], None
            if found is not None:
                late = {
                    branch.neighbour: _late(branch, code)
                    for branch in self._plan.branches
                    if branch.neighbour not in found
                }
                self._answer(index, {**found, **late})
        for end in self._ends:
            end(code)

    def _sink_of(self, branch: Branch) -> Sink:
        def sink(start: int, answers: Sequence[Answer]) -> None:
            for index, answer in enumerate(answers, start):
                self._take(index, branch, answer)

        return sink

    def _take(self, index: int, branch: Branch, answer: Answer) -> None:
        with self._lock:
            found = self._found[index]
            if found is None:
                return
            found[branch.neighbour] = assembly.from_branch(answer, branch.targets)
            if len(found) < len(self._plan.branches):
                return
            self._found[index] = None
        self._answer(index, found)

    def _answer_all(self, found: dict[str, Answer]) -> None:
        for index in range(len(self._segment)):
            self._answer(index, found)

    def _answer(self, index: int, found: dict[str, Answer]) -> None:
        missing = _missing_parts(self._plan)
        self._sink(
            index,
            (assembly.gathered(self._relay._me.id, self._order, found, missing),),
        )


class _Hand:
    """ANY: one branch is asked; another only on proof that nothing ran in the first."""

    def __init__(self, relay: Relay, segment: Segment, plan: Plan, sink: Sink) -> None:
        self._relay = relay
        self._segment = segment
        self._plan = plan
        self._sink = sink
        self._lock = threading.Lock()
        self._open = set(range(len(segment)))
        self._tried: set[str] = set()
        self._ends: list[End] = []

    def begin(self) -> End:
        if not self._plan.branches:
            for index in range(len(self._segment)):
                self._answer(index, Answer(tuple(_missing_parts(self._plan))))
            return _nothing
        (branch,) = self._plan.branches
        self._send(branch, 0, self._segment)
        return self.end

    def end(self, code: Code) -> None:
        for end in list(self._ends):
            end(code)
        (branch,) = self._plan.branches
        late = Answer((), refused=Part(branch.neighbour, code, _late_reason(branch, code)))
        for index in range(len(self._segment)):
            self._answer(index, late)

    def _send(self, branch: Branch, start: int, segment: Segment) -> None:
        def sink(begin: int, answers: Sequence[Answer]) -> None:
            for index, answer in enumerate(answers, start + begin):
                self._take(index, branch, answer)

        self._tried.add(branch.neighbour)
        self._ends.append(self._relay._send(branch, segment, sink))

    def _take(self, index: int, branch: Branch, answer: Answer) -> None:
        if assembly.may_try_elsewhere(answer) and self._try_another(index):
            return
        self._answer(index, answer)

    def _try_another(self, index: int) -> bool:
        relay, segment = self._relay, self._segment.slice(index, 1)
        with self._lock:
            if index not in self._open or segment.deadline <= relay._clock():
                return False
        up = relay._network.up() - self._tried
        plan = routing.plan(relay._topology, relay._me.id, up, segment.route)
        claimed = relay._claim_one(plan.branches, plan, segment) or _first(relay, plan, segment)
        if claimed is None:
            return False
        self._send(claimed.plan.branches[0], index, segment.again())
        return True

    def _answer(self, index: int, answer: Answer) -> None:
        with self._lock:
            if index not in self._open:
                return
            self._open.remove(index)
        hops = (self._relay._me.id, *answer.hops)
        self._sink(index, (Answer(answer.parts, hops, answer.refused),))


def _first(relay: Relay, plan: Plan, segment: Segment) -> Claimed | None:
    """A branch without credit: better to wait there than to fail, once a first one has refused."""
    if not plan.branches:
        return None
    relay._network.reserve(plan.branches[0].neighbour, segment)
    return Claimed(Plan(plan.branches[:1]))


def _half_time(ticket: Ticket) -> float:
    return (ticket.admitted + ticket.segment.deadline) / 2


def _missing_parts(plan: Plan) -> list[Part]:
    return [
        Part(worker, Code.UNAVAILABLE, reason, executed=Executed.NO)
        for worker, reason in plan.missing.items()
    ]


def _late(branch: Branch, code: Code) -> Answer:
    reason = _late_reason(branch, code)
    return Answer(tuple(Part(target, code, reason) for target in branch.targets))


def _late_reason(branch: Branch, code: Code) -> str:
    what = "within the deadline" if code is Code.DEADLINE_EXCEEDED else "before the caller left"
    return f"no answer from {branch.neighbour} {what}"


def _nothing(code: Code) -> None:
    pass
