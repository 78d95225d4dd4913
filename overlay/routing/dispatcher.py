"""One segment of requests, from its claim to its answers: asks neighbours, works, gathers.

    claim   decides: who is asked, for how many rows, against which places   (quick, under a lock)
    start   acts: everything is sent at once, no thread waits
    sinks   collect what comes back, on whatever thread it comes

Knows no gRPC: the links and the executor are passed in, so that tests can use a network in memory
instead.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from overlay.model import clocks as time
from overlay.model.pending import Ends, PendingRows, Slices
from overlay.model.segments import (
    Cancel,
    Code,
    Detail,
    Executed,
    Mode,
    OnPartial,
    OnResult,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
    value,
)
from overlay.model.topology import Topology
from overlay.observability import trace
from overlay.queueing.fair_queue import AWAITED, NoPlace
from overlay.routing import aggregate, planner
from overlay.routing.outlier import State
from overlay.routing.planner import Branch, Load, Plan

MAX_PICKED = 100  # counted of a neighbour: one that comes back is not given all that it missed


class PeerLinks(Protocol):
    """What the dispatcher needs of its neighbours; overlay.peers.peers.Peers has the promises."""

    def up(self) -> frozenset[str]: ...
    def awaited(self) -> set[str]: ...
    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]: ...
    def slots(self, neighbour: str, worker: str, handler: str) -> int: ...
    def reserve(self, neighbour: str, handler: str, count: int) -> None: ...
    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel: ...


class LocalExecutor(Protocol):
    """What the dispatcher needs of a worker; overlay.workers.executor.Executor has the promises."""

    def claim(self, handler: str, count: int) -> int: ...
    def run(self, segment: Segment, waited_s: float, sink: OnResult) -> Cancel: ...


@value
class Claimed:
    """Places for `count` rows: a plan whose branches are reserved for them, or slots to work in.

    branch: the one of the plan that is asked, where any one is.
    """

    count: int
    plan: Plan
    branch: Branch | None = None


class Dispatcher:
    """Claims places for requests and starts them, at one process. Safe from any thread."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        peers: PeerLinks,
        executor: LocalExecutor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topology = topology
        self._order = tuple(topology.processes)
        self._me = topology.processes[me]
        self._peers = peers
        self._executor = executor
        self._clock = clock
        self._plans: dict[object, Plan] = {}
        self._picked: defaultdict[str, float] = defaultdict(float)  # recent rows to any one

    def claim(
        self, route: Route, count: int, patient_until: float, streamed: bool
    ) -> Claimed | NoPlace | None:
        """Places for some or all of `count` rows, or None when all must wait.

        They wait for a slot or for a branch with credit, and until `patient_until` for a link that
        went down this moment (AWAITED). Streamed rows to all go down against credit too; single
        ones at once.
        """
        if self._executor is not None and (route.targets is None or self._me.id in route.targets):
            count = self._executor.claim(route.handler, count)
            return Claimed(count, _HERE) if count else None
        plan = self._plan(route, self._peers.up())
        short = not plan.branches if route.mode is Mode.ANY else bool(plan.missing)
        if short and self._clock() < patient_until and self._may_come_back(plan):
            return AWAITED
        if not plan.branches:
            return Claimed(count, plan)
        if route.mode is Mode.ANY:
            return self._claim_one(plan, route.handler, count)
        return self._claim_all(plan, route.handler, count, streamed)

    def start(self, segment: Segment, claimed: Claimed, waited_s: float, sink: OnResult) -> Cancel:
        """Sends or runs them. The sink gets each row; the End answers what is open.

        A row that was ended may be answered again: its queued segment passes on the first answer.
        """
        if claimed.plan.local and self._executor is not None:
            return self._executor.run(segment, waited_s, sink)
        if segment.route.mode is Mode.ANY:
            return DispatchAny(self, segment, claimed, sink).begin()
        if segment.on_partial is not None:
            return StreamingGather(self, segment, claimed.plan, segment.on_partial, sink).begin()
        return Gather(self, segment, claimed.plan, sink).begin()

    def load(self, branch: Branch, handler: str) -> Load:
        """How full a branch is for a handler, by what was sent there and what it reported."""
        outstanding, service_s, state, is_recent = self._peers.load(branch.neighbour, handler)
        slots = 0
        for worker in branch.targets:
            slots += self._slots(branch.neighbour, worker, handler)
        return Load(outstanding, slots, self._picked[branch.neighbour], service_s, state, is_recent)

    def _plan(self, route: Route, up: frozenset[str]) -> Plan:
        # The same few routes come again and again; what decides is in the key.
        key = (up, route.team, route.targets, route.hops)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 1000:
                self._plans.clear()
            plan = self._plans[key] = planner.plan(self._topology, self._me.id, up, route)
        return plan

    def _claim_one(self, plan: Plan, handler: str, count: int) -> Claimed | None:
        picked = planner.pick(plan.branches, lambda branch: self.load(branch, handler))
        if picked is None:
            return None
        branch, most = picked
        count = min(count, most)
        self._note_picked(branch.neighbour, count)
        self._peers.reserve(branch.neighbour, handler, count)
        return Claimed(count, plan, branch)

    def _note_picked(self, neighbour: str, count: int) -> None:
        self._picked[neighbour] += count
        if self._picked[neighbour] > MAX_PICKED:
            for known in self._picked:
                self._picked[known] /= 2

    def _claim_all(self, plan: Plan, handler: str, count: int, streamed: bool) -> Claimed | None:
        if streamed:
            # The most of them: what is too much for a busy one waits there, and it may be missing
            # in the end, but not the others.
            count = min(count, max(self.load(branch, handler).credit for branch in plan.branches))
            if not count:
                return None
        for branch in plan.branches:
            self._peers.reserve(branch.neighbour, handler, count)
        return Claimed(count, plan)

    def _slots(self, neighbour: str, worker: str, handler: str) -> int:
        process = self._topology.processes[worker]
        name = handler or process.handler
        reported = self._peers.slots(neighbour, worker, name)
        # Not known yet: what the configuration lets expect, or it would look full.
        return reported or self._topology.handler_slots(process, self._topology.handlers[name])

    def _may_come_back(self, plan: Plan) -> bool:
        awaited = self._peers.awaited()
        below = self._topology.below(self._me.id) if awaited else ()
        return any(
            n.id in awaited and not self._topology.reach(n.id).isdisjoint(plan.missing)
            for n in below
        )

    def _send(self, branch: Branch, segment: Segment, sink: OnResult) -> Cancel:
        onward = segment.onward(self._me.id, branch.targets)
        return self._peers.send(branch.neighbour, onward, sink)


class Gather:
    """ALL: every branch is asked at once; a row is answered when its last branch has answered."""

    def __init__(
        self, dispatcher: Dispatcher, segment: Segment, plan: Plan, sink: OnResult
    ) -> None:
        self._dispatcher = dispatcher
        self._segment = segment
        self._plan = plan
        self._sink = sink
        self._lock = threading.Lock()
        self._came = {branch.neighbour: Slices() for branch in plan.branches}
        self._ends: list[Cancel] = []

    def begin(self) -> Cancel:
        if not self._plan.branches:
            self._answer(0, self._segment.count, {})
            return _nothing
        for branch in self._plan.branches:
            self._ends.append(self._dispatcher._send(branch, self._segment, self._sink_of(branch)))
        return self.end

    def end(self, code: Code, start: int, count: int) -> None:
        """Answers open rows with the parts that came, and ends the branches' work on them."""
        for row in range(start, start + count):
            with self._lock:
                found = {n: chunk for n, came in self._came.items() if (chunk := came.at(row))}
            if len(found) == len(self._came):
                continue  # answered
            late = {
                branch.neighbour: _late(branch, code)
                for branch in self._plan.branches
                if branch.neighbour not in found
            }
            self._answer(row, 1, {**found, **late})
        for end in list(self._ends):
            end(code, start, count)

    def _sink_of(self, branch: Branch) -> OnResult:
        began, clock = self._dispatcher._clock(), self._dispatcher._clock

        def sink(start: int, answers: Slice) -> None:
            if answers.trace:
                answers = trace.below(answers, clock() - began)
            whole = aggregate.from_branch(answers, branch.targets)
            with self._lock:
                self._came[branch.neighbour].add(start, whole)
                ready = self._ready(start, start + answers.count)
            for first, count, found in ready:
                self._answer(first, count, found)

        return sink

    def _ready(self, start: int, stop: int) -> list[tuple[int, int, dict[str, Slice]]]:
        """What of the rows start..stop every branch has answered, the last one just now."""
        ranges = [(start, stop)]
        for came in self._came.values():
            ranges = [both for one in ranges for both in came.overlapping(*one)]
        ready = []
        for first, last in ranges:
            found = {n: came.at(first, last - first) for n, came in self._came.items()}
            ready.append((first, last - first, {n: p for n, p in found.items() if p is not None}))
        return ready

    def _answer(self, start: int, count: int, found: dict[str, Slice]) -> None:
        dispatcher = self._dispatcher
        missing = _missing_columns(self._plan, count)
        self._sink(start, aggregate.gathered(dispatcher._me.id, dispatcher._order, found, missing))


class StreamingGather:
    """ALL, as they come: each part goes on at once and is not kept.

    A row is answered when its last branch has answered and no part of it is just being passed on.
    The answer has the workers that never came; where none came OK, all of them with their reasons.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        segment: Segment,
        plan: Plan,
        on_partial: OnPartial,
        sink: OnResult,
    ) -> None:
        self._dispatcher = dispatcher
        self._segment = segment
        self._plan = plan
        self._on_partial = on_partial
        self._sink = sink
        self._lock = threading.Lock()
        self._rows = [_Row(plan) for _ in range(segment.count)]
        self._ends: list[Cancel] = []

    def begin(self) -> Cancel:
        if not self._plan.branches:
            answers = aggregate.gathered(
                self._dispatcher._me.id,
                self._dispatcher._order,
                {},
                _missing_columns(self._plan, self._segment.count),
            )
            self._sink(0, answers)
            return _nothing
        for branch in self._plan.branches:
            segment = self._segment.with_(on_partial=partial(self._pass_on_rows, branch))
            sink = partial(self._branch_answered, branch)
            self._ends.append(self._dispatcher._send(branch, segment, sink))
        return self.end

    def end(self, code: Code, start: int, count: int) -> None:
        """Answers open rows with what did not come, and ends the branches' work on them."""
        for row in range(start, start + count):
            with self._lock:
                late = [
                    column
                    for branch in self._plan.branches
                    for column in _late(branch, code).parts
                    if column.process_id in self._rows[row].owed
                ]
                self._rows[row].owed.clear()  # no part of it is passed on after its answer
            self._answer(row, late)
        for end in list(self._ends):
            end(code, start, count)

    def _pass_on_rows(self, branch: Branch, start: int, answers: Slice) -> None:
        for i in range(answers.count):
            self._pass_on(start + i, answers.slice(i, 1))

    def _branch_answered(self, branch: Branch, start: int, answers: Slice) -> None:
        for i in range(answers.count):
            row = start + i
            with self._lock:
                owed = [target for target in branch.targets if target in self._rows[row].owed]
            self._pass_on(row, aggregate.from_branch(answers.slice(i, 1), owed))
            self._let_go(row)

    def _pass_on(self, row: int, answers: Slice) -> None:
        state = self._rows[row]
        with self._lock:
            columns = tuple(c for c in answers.parts if c.process_id in state.owed)
            if not columns:
                return
            state.holds += 1
        self._on_partial(row, Slice(1, columns, (self._dispatcher._me.id, *answers.hops)))
        with self._lock:
            state.came(columns)
        self._let_go(row)

    def _let_go(self, row: int) -> None:
        with self._lock:
            self._rows[row].holds -= 1
            is_last = not self._rows[row].holds
        if is_last:
            self._answer(row, [])

    def _answer(self, row: int, late: list[PartSlice]) -> None:
        state = self._rows[row]
        columns = {c.process_id: c for c in (*_missing_columns(self._plan, 1), *late)}
        if not state.is_good:
            columns = {**{c.process_id: c for c in state.bad}, **columns}
        found = aggregate.in_order(columns, self._dispatcher._order)
        hops, early_us = (self._dispatcher._me.id,), state.slowest_us
        self._sink(row, Slice(1, found, hops, early_us=early_us))


class _Row:
    """What is still to come of one row, and what failed of what came."""

    __slots__ = ("bad", "holds", "is_good", "owed", "slowest_us")

    def __init__(self, plan: Plan) -> None:
        self.owed = {worker for branch in plan.branches for worker in branch.targets}
        self.holds = len(plan.branches)  # that have not answered, and parts being passed on
        self.is_good = False  # a worker has answered OK
        self.bad: list[PartSlice] = []
        self.slowest_us: tuple[int, int] | None = None  # waited and worked, of those that came

    def came(self, columns: Iterable[PartSlice]) -> None:
        for column in columns:
            if not column.is_over:  # a chunk; it is still owed
                continue
            self.owed.discard(column.process_id)
            if column.at(0).ok:
                self.is_good = True
                times = column.waited_us, column.worked_us
                self.slowest_us = max(self.slowest_us or times, times, key=sum)
            else:
                self.bad.append(column)


class DispatchAny:
    """ANY: one branch is asked; another only on proof that nothing ran in the first."""

    def __init__(
        self, dispatcher: Dispatcher, segment: Segment, claimed: Claimed, sink: OnResult
    ) -> None:
        self._dispatcher = dispatcher
        self._segment = segment
        self._claimed = claimed
        self._sink = sink
        self._lost: Slice | None = None  # what came of a first try that may have run
        self._spared: frozenset[str] = frozenset()  # the workers on which it may have,
        self._before = 0  # and how many neighbours had been tried by then
        self._lock = threading.Lock()
        # A row that has ended is not sent elsewhere; and when none is open, all is forgotten.
        self._open = PendingRows(segment.count)
        self._ends = Ends(segment.count)

    def begin(self) -> Cancel:
        branch = self._claimed.branch
        if branch is None:
            count = self._segment.count
            self._answer(0, Slice(count, tuple(_missing_columns(self._claimed.plan, count))))
            return _nothing
        self._send(branch, 0, self._segment, ())
        return self.end

    def end(self, code: Code, start: int, count: int) -> None:
        with self._lock:
            endings = self._ends.end(code, start, count)
        # First the answer, so that this code wins and nothing is sent on to others in vain.
        neighbour = self._claimed.branch.neighbour if self._claimed.branch else ""
        late = Part(neighbour, code, _late_reason(neighbour, code))
        self._answer(start, Slice(count, (), refused=late))
        for ending in endings:
            ending()

    def _send(self, branch: Branch, at: int, segment: Segment, tried: tuple[str, ...]) -> None:
        tried = (*tried, branch.neighbour)
        began, clock = self._dispatcher._clock(), self._dispatcher._clock

        def sink(start: int, answers: Slice) -> None:
            if answers.trace:
                answers = trace.below(answers, clock() - began)
            if answers.refused is None and not answers.parts:
                silent = Part(branch.neighbour, Code.INTERNAL, "answered without parts")
                answers = Slice(answers.count, (), answers.hops, silent, answers.trace)
            if branch.neighbour in branch.targets and aggregate.was_lost(answers.at(0)):
                # As the worker's own, so that processes above know on which one it may have run.
                answers = aggregate.from_branch(answers, branch.targets)
            if answers.flawless or not self._try_others(at + start, answers, branch, tried):
                self._answer(at + start, answers)

        end, rows = self._dispatcher._send(branch, segment, sink), segment.count
        with self._lock:
            endings = self._ends.begin(at, rows, end, len(tried))
            if not self._open.left:
                self._ends.forget()
        for ending in endings:  # while this was sent
            ending()

    def _try_others(
        self, start: int, answers: Slice, branch: Branch, tried: tuple[str, ...]
    ) -> bool:
        """Sends on the rows that provably did not run; answers the others, row by row."""
        rows = range(answers.count)
        again = [self._may_try_elsewhere(answers, row, branch, len(tried)) for row in rows]
        if not any(again):
            return False
        for row, may in enumerate(again):
            if not (may and self._try_another(start + row, tried)):
                self._answer(start + row, answers.slice(row, 1))
        return True

    def _may_try_elsewhere(self, answers: Slice, row: int, branch: Branch, tried: int) -> bool:
        answer = answers.at(row)
        if aggregate.may_try_elsewhere(answer):
            return True
        # Lost, with an idempotency key: once more only, so a body that kills workers kills two.
        if self._segment.idempotent and self._lost is None and aggregate.was_lost(answer):
            self._lost = answers.slice(row, 1)
            worker = answer.parts[0].process_id if answer.parts else ""
            self._spared = frozenset([worker] if worker in branch.targets else branch.targets)
            self._before = tried
            return True
        return False

    def _try_another(self, row: int, tried: tuple[str, ...]) -> bool:
        dispatcher, segment = self._dispatcher, self._segment.slice(row, 1)
        with self._lock:
            if not self._open.runs(row, 1) or segment.deadline <= dispatcher._clock():
                return False
        plan = self._plan_of_others(segment.route, tried)
        if not plan.branches:
            return False
        handler = segment.route.handler
        claimed = dispatcher._claim_one(plan, handler, 1)
        branch = claimed.branch if claimed else None
        if branch is None:
            # None has credit: better to wait in a queue there than to fail here.
            branch = plan.branches[0]
            dispatcher._peers.reserve(branch.neighbour, handler, 1)
        self._send(branch, row, segment.again(), tried)
        return True

    def _plan_of_others(self, route: Route, tried: tuple[str, ...]) -> Plan:
        """After a loss: how to get to the other workers, also through the same neighbour."""
        dispatcher = self._dispatcher
        if self._spared:
            scope = planner.scope(dispatcher._topology, dispatcher._me.id, route)
            targets = tuple(worker for worker in scope if worker not in self._spared)
            route = route._replace(targets=targets)
        return dispatcher._plan(route, dispatcher._peers.up().difference(tried[self._before :]))

    def _answer(self, start: int, answers: Slice) -> None:
        with self._lock:
            runs = self._open.take(start, answers.count)
            if not self._open.left:
                self._ends.forget()  # they lead back here
        if self._lost is not None and aggregate.may_try_elsewhere(answers.at(0)):
            answers = self._lost  # that the second one did not run is no proof for the first
        hops = (self._dispatcher._me.id, *answers.hops)
        for begin, count in runs:
            rows = answers.slice(begin - start, count)
            self._sink(begin, Slice(rows.count, rows.parts, hops, rows.refused, rows.trace))


_HERE = Plan(local=True)


def _missing_columns(plan: Plan, count: int) -> list[PartSlice]:
    return [
        PartSlice.missing(worker, count, Detail(Code.UNAVAILABLE, reason, Executed.NO))
        for worker, reason in plan.missing.items()
    ] + [
        PartSlice.missing(worker, count, Detail(Code.FAILED_PRECONDITION, reason, Executed.NO))
        for worker, reason in plan.unknown.items()
    ]


def _late(branch: Branch, code: Code) -> Slice:
    failure = Detail(code, _late_reason(branch.neighbour, code))
    return Slice(1, tuple(PartSlice.missing(t, 1, failure) for t in branch.targets))


def _late_reason(neighbour: str, code: Code) -> str:
    what = "within the deadline" if code is Code.DEADLINE_EXCEEDED else "before the caller left"
    return f"no answer from {neighbour} {what}"


def _nothing(code: Code, start: int, count: int) -> None:
    pass
