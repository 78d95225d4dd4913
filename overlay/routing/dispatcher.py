"""Takes a segment of requests from its claim to its answers: asks neighbours, works, gathers.

    claim   decides: whom to ask, for how many rows, in which places   (quick, under a lock)
    start   acts: sends everything immediately, no thread waits
    sinks   collect the answers, on whichever thread they arrive

Does not know gRPC: the links and the executor are passed in, so that tests can use a network in
memory instead.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from overlay.model import clocks as time
from overlay.model.pending import CancelIndex, PendingRows, SliceIndex
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

MAX_PICKED = 100  # then the counts are halved, so a returning neighbour need not catch up on all


class PeerLinks(Protocol):
    """What the dispatcher needs of its neighbours; documented in overlay.peers.peers.Peers."""

    def up(self) -> frozenset[str]: ...
    def awaited(self) -> set[str]: ...
    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]: ...
    def slots(self, neighbour: str, worker: str, handler: str) -> int: ...
    def reserve(self, neighbour: str, handler: str, count: int) -> None: ...
    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel: ...


class LocalExecutor(Protocol):
    """What the dispatcher needs of a worker; documented in overlay.workers.executor.Executor."""

    def claim(self, handler: str, count: int) -> int: ...
    def run(self, segment: Segment, waited_s: float, sink: OnResult) -> Cancel: ...


@value
class Claimed:
    """Places for `count` rows: a plan with its branches reserved for them, or local slots.

    branch: the one that is asked, in mode ANY.
    """

    count: int
    plan: Plan
    branch: Branch | None = None


class Dispatcher:
    """Claims places for requests and starts them, in one process. Thread-safe."""

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
        self._picked: defaultdict[str, float] = defaultdict(float)  # recent rows in mode ANY

    def claim(
        self, route: Route, count: int, patient_until: float, streamed: bool
    ) -> Claimed | NoPlace | None:
        """Places for some or all of `count` rows; None if all must wait.

        They wait for a slot or for a branch with credit, and until `patient_until` for a link that
        has just gone down (AWAITED). In mode ALL only streamed rows need credit.
        """
        if self._executor is not None and (route.targets is None or self._me.id in route.targets):
            count = self._executor.claim(route.handler, count)
            return Claimed(count, _LOCAL) if count else None
        plan = self._plan(route, self._peers.up())
        is_incomplete = not plan.branches if route.mode is Mode.ANY else bool(plan.missing)
        if is_incomplete and self._clock() < patient_until and self._may_come_back(plan):
            return AWAITED
        if not plan.branches:
            return Claimed(count, plan)
        if route.mode is Mode.ANY:
            return self._claim_one(plan, route.handler, count)
        return self._claim_all(plan, route.handler, count, streamed)

    def start(self, segment: Segment, claimed: Claimed, waited_s: float, sink: OnResult) -> Cancel:
        """Sends or runs the rows. The sink gets an answer to each; a cancel answers those without.

        A cancelled row may be answered again: its queued segment passes on only the first answer.
        """
        if claimed.plan.local and self._executor is not None:
            return self._executor.run(segment, waited_s, sink)
        if segment.route.mode is Mode.ANY:
            return DispatchAny(self, segment, claimed, sink).begin()
        if segment.on_partial is not None and claimed.plan.branches:
            return StreamingGather(self, segment, claimed.plan, segment.on_partial, sink).begin()
        return Gather(self, segment, claimed.plan, sink).begin()

    def load(self, branch: Branch, handler: str) -> Load:
        """The load of a branch for a handler, by what was sent there and what it reported."""
        outstanding, service_s, state, is_recent = self._peers.load(branch.neighbour, handler)
        slots = 0
        for worker in branch.targets:
            slots += self._slots(branch.neighbour, worker, handler)
        return Load(outstanding, slots, self._picked[branch.neighbour], service_s, state, is_recent)

    def _plan(self, route: Route, up: frozenset[str]) -> Plan:
        # The same few routes recur; the key has everything that the plan depends on.
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
        branch, limit = picked
        count = min(count, limit)
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
            # The credit of the freest branch: what is too much for a busy one waits there, and may
            # cost its parts but not those of the others.
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
        # Until it has reported, what the configuration says; otherwise it would look full.
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
        self._answers = {branch.neighbour: SliceIndex() for branch in plan.branches}
        self._cancels: list[Cancel] = []

    def begin(self) -> Cancel:
        if not self._plan.branches:
            self._answer(0, self._segment.count, {})
            return _no_op
        for branch in self._plan.branches:
            cancel = self._dispatcher._send(branch, self._segment, self._sink_of(branch))
            self._cancels.append(cancel)
        return self.cancel

    def cancel(self, code: Code, start: int, count: int) -> None:
        """Answers rows with the parts that have arrived, and cancels the branches' work on them."""
        for row in range(start, start + count):
            with self._lock:
                found = {n: part for n, index in self._answers.items() if (part := index.at(row))}
            if len(found) == len(self._answers):
                continue  # answered already
            late = {
                branch.neighbour: _late(branch, code)
                for branch in self._plan.branches
                if branch.neighbour not in found
            }
            self._answer(row, 1, {**found, **late})
        for cancel in list(self._cancels):
            cancel(code, start, count)

    def _sink_of(self, branch: Branch) -> OnResult:
        began, clock = self._dispatcher._clock(), self._dispatcher._clock

        def sink(start: int, answers: Slice) -> None:
            if answers.trace:
                answers = trace.below(answers, clock() - began)
            whole = aggregate.from_branch(answers, branch.targets)
            with self._lock:
                self._answers[branch.neighbour].add(start, whole)
                ready = self._ready(start, start + answers.count)
            for first, count, found in ready:
                self._answer(first, count, found)

        return sink

    def _ready(self, start: int, stop: int) -> list[tuple[int, int, dict[str, Slice]]]:
        """Those of the rows start..stop that every branch has answered, with the answers."""
        ranges = [(start, stop)]
        for answers in self._answers.values():
            ranges = [both for one in ranges for both in answers.overlapping(*one)]
        ready = []
        for first, last in ranges:
            found = {n: answers.at(first, last - first) for n, answers in self._answers.items()}
            ready.append((first, last - first, {n: p for n, p in found.items() if p is not None}))
        return ready

    def _answer(self, start: int, count: int, found: dict[str, Slice]) -> None:
        dispatcher = self._dispatcher
        missing = _missing_columns(self._plan, count)
        self._sink(start, aggregate.gathered(dispatcher._me.id, dispatcher._order, found, missing))


class StreamingGather:
    """ALL with partial results: each part is passed on as it arrives and is not kept.

    A row is answered when its last branch has answered and no part of it is being passed on. The
    answer has the parts of the workers that did not answer; if none answered OK, it has all parts.
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
        self._cancels: list[Cancel] = []

    def begin(self) -> Cancel:
        segment = self._segment.with_(on_partial=self._pass_on_rows)
        for branch in self._plan.branches:
            sink = partial(self._branch_answered, branch)
            self._cancels.append(self._dispatcher._send(branch, segment, sink))
        return self.cancel

    def cancel(self, code: Code, start: int, count: int) -> None:
        """Answers rows with the missing parts, and cancels the branches' work on them."""
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
        for cancel in list(self._cancels):
            cancel(code, start, count)

    def _pass_on_rows(self, start: int, answers: Slice) -> None:
        for i in range(answers.count):
            self._pass_on(start + i, answers.slice(i, 1))

    def _branch_answered(self, branch: Branch, start: int, answers: Slice) -> None:
        for i in range(answers.count):
            row = start + i
            with self._lock:
                owed = [target for target in branch.targets if target in self._rows[row].owed]
            self._pass_on(row, aggregate.from_branch(answers.slice(i, 1), owed))
            self._release(row)

    def _pass_on(self, row: int, answers: Slice) -> None:
        state = self._rows[row]
        with self._lock:
            columns = tuple(c for c in answers.parts if c.process_id in state.owed)
            if not columns:
                return
            state.holds += 1
        self._on_partial(row, Slice(1, columns, (self._dispatcher._me.id, *answers.hops)))
        with self._lock:
            state.add(columns)
        self._release(row)

    def _release(self, row: int) -> None:
        with self._lock:
            self._rows[row].holds -= 1
            is_last = not self._rows[row].holds
        if is_last:
            self._answer(row, [])

    def _answer(self, row: int, late: list[PartSlice]) -> None:
        state = self._rows[row]
        columns = {c.process_id: c for c in (*_missing_columns(self._plan, 1), *late)}
        if not state.is_ok:
            columns = {**{c.process_id: c for c in state.failed}, **columns}
        found = aggregate.in_order(columns, self._dispatcher._order)
        hops, early_us = (self._dispatcher._me.id,), state.slowest_us
        self._sink(row, Slice(1, found, hops, early_us=early_us))


class _Row:
    """One row: the workers that still owe their parts, and the parts that failed."""

    __slots__ = ("failed", "holds", "is_ok", "owed", "slowest_us")

    def __init__(self, plan: Plan) -> None:
        self.owed = {worker for branch in plan.branches for worker in branch.targets}
        self.holds = len(plan.branches)  # branches without an answer, and parts being passed on
        self.is_ok = False  # a worker has answered OK
        self.failed: list[PartSlice] = []
        self.slowest_us: tuple[int, int] | None = None  # waited and worked, of the OK parts

    def add(self, columns: Iterable[PartSlice]) -> None:
        for column in columns:
            if not column.is_over:  # more chunks of it follow
                continue
            self.owed.discard(column.process_id)
            if column.at(0).ok:
                self.is_ok = True
                times = column.waited_us, column.worked_us
                self.slowest_us = max(self.slowest_us or times, times, key=sum)
            else:
                self.failed.append(column)


class DispatchAny:
    """ANY: one branch is asked; another only with proof that nothing ran in the first.

    A lost request with an idempotency key is sent once more without proof. With partial results,
    chunks are passed on as they arrive; the answer has the last one.
    """

    def __init__(
        self, dispatcher: Dispatcher, segment: Segment, claimed: Claimed, sink: OnResult
    ) -> None:
        self._dispatcher = dispatcher
        self._segment = segment
        self._claimed = claimed
        self._sink = sink
        self._lost: Slice | None = None  # the outcome of a first attempt that may have run,
        self._excluded: frozenset[str] = frozenset()  # the workers on which it may have,
        self._tried_before = 0  # and how many neighbours had been tried by then
        self._lock = threading.Lock()
        self._open = PendingRows(segment.count)  # an answered row is not sent elsewhere
        self._cancels = CancelIndex(segment.count)

    def begin(self) -> Cancel:
        branch = self._claimed.branch
        if branch is None:
            count = self._segment.count
            self._answer(0, Slice(count, tuple(_missing_columns(self._claimed.plan, count))))
            return _no_op
        self._send(branch, 0, self._segment, ())
        return self.cancel

    def cancel(self, code: Code, start: int, count: int) -> None:
        with self._lock:
            calls = self._cancels.cancel(code, start, count)
        # The answer first, so that this code wins and nothing is sent to other branches in vain.
        neighbour = self._claimed.branch.neighbour if self._claimed.branch else ""
        late = Part(neighbour, code, _late_reason(neighbour, code))
        self._answer(start, Slice(count, (), refused=late))
        for call in calls:
            call()

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
                # As a failure of the worker, so that processes above know where it may have run.
                answers = aggregate.from_branch(answers, branch.targets)
            if answers.flawless or not self._try_others(at + start, answers, branch, tried):
                self._answer(at + start, answers)

        if segment.on_partial is not None:
            chunks = partial(self._pass_on, at, segment.on_partial)
            cancel = self._dispatcher._send(branch, segment.with_(on_partial=chunks), sink)
        else:
            cancel = self._dispatcher._send(branch, segment, sink)
        with self._lock:
            calls = self._cancels.sent(at, segment.count, cancel, len(tried))
            if not self._open.left:
                self._cancels.clear()
        for call in calls:  # rows that were cancelled while this was sent
            call()

    def _pass_on(self, at: int, on_partial: OnPartial, row: int, answers: Slice) -> None:
        with self._lock:
            is_open = bool(self._open.runs(at + row, answers.count))
        if is_open:
            hops = (self._dispatcher._me.id, *answers.hops)
            on_partial(row, Slice(answers.count, answers.parts, hops))

    def _try_others(
        self, start: int, answers: Slice, branch: Branch, tried: tuple[str, ...]
    ) -> bool:
        """Sends the rows that may be tried elsewhere, and answers the others, row by row.

        Returns False, having done nothing, if there are none.
        """
        rows = range(answers.count)
        retryable = [self._may_try_elsewhere(answers, row, branch, len(tried)) for row in rows]
        if not any(retryable):
            return False
        for row, may in enumerate(retryable):
            if not (may and self._try_another(start + row, tried)):
                self._answer(start + row, answers.slice(row, 1))
        return True

    def _may_try_elsewhere(self, answers: Slice, row: int, branch: Branch, tried: int) -> bool:
        answer = answers.at(row)
        if aggregate.may_try_elsewhere(answer):
            return True
        # A lost request with a key is sent only once more: a payload that kills workers kills two.
        if self._segment.idempotent and self._lost is None and aggregate.was_lost(answer):
            self._lost = answers.slice(row, 1)
            worker = answer.parts[0].process_id if answer.parts else ""
            self._excluded = frozenset([worker] if worker in branch.targets else branch.targets)
            self._tried_before = tried
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
            # No branch has credit: better to wait in a queue there than to fail here.
            branch = plan.branches[0]
            dispatcher._peers.reserve(branch.neighbour, handler, 1)
        self._send(branch, row, segment.again(), tried)
        return True

    def _plan_of_others(self, route: Route, tried: tuple[str, ...]) -> Plan:
        """A plan for other neighbours; after a loss for other workers, through any neighbour that
        has not been tried since."""
        dispatcher = self._dispatcher
        if self._excluded:
            scope = planner.scope(dispatcher._topology, dispatcher._me.id, route)
            targets = tuple(worker for worker in scope if worker not in self._excluded)
            route = route._replace(targets=targets)
        up = dispatcher._peers.up()
        return dispatcher._plan(route, up.difference(tried[self._tried_before :]))

    def _answer(self, start: int, answers: Slice) -> None:
        with self._lock:
            runs = self._open.take(start, answers.count)
            if not self._open.left:
                self._cancels.clear()
        if self._lost is not None and aggregate.may_try_elsewhere(answers.at(0)):
            answers = self._lost  # that the second attempt did not run proves nothing for the first
        hops = (self._dispatcher._me.id, *answers.hops)
        for begin, count in runs:
            rows = answers.slice(begin - start, count)
            self._sink(begin, Slice(rows.count, rows.parts, hops, rows.refused, rows.trace))


_LOCAL = Plan(local=True)


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


def _no_op(code: Code, start: int, count: int) -> None:
    pass
