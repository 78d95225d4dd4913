"""Lends workers to the clients of this process, for as long as nobody waits for those workers.

    a client asks --ask--> which workers (overlay.routing.lending) --> told to the worker
    the worker has it --> offered to the client, which sends there --> reports --> counted here

Leases in use are renewed; those of a handler for which requests of others wait here are ended, and
no more are made for a while. So a lane never gets more than its share: whenever there is
contention, the queue decides. Thread-safe; its looks at the time run on the process's deadline
thread.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Hashable
from functools import partial
from typing import Protocol

from overlay.calls.leases import REPORT_S, Leases
from overlay.calls.request_log import RequestLog
from overlay.model import clocks as time
from overlay.model.leases import (
    MAX_LANES,
    LaneReport,
    Lease,
    LeaseRequest,
    Lent,
    LentNow,
    shown,
)
from overlay.model.segments import Caller, Mode, Route
from overlay.model.topology import Topology
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import lending, planner
from overlay.routing.lending import Lendable
from overlay.routing.outlier import State
from overlay.routing.planner import Plan
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines, Looks

RENEW_S = 0.3  # between two renewals
USED_S = 1.0  # a lease that has not been used for this long is not renewed
QUIET_S, MAX_QUIET_S = 1.0, 30.0  # without leases after requests had to wait; doubles each time
MAX_PLANS = 1000
LOOKED_AT = 64  # workers, at random where there are more: the least lent of them will do
CALM_S = 10.0  # after this long without waiting requests it is short again


class Borrower(Hashable, Protocol):
    """A client's stream. certificate_name: whose certificate it shows; empty without TLS. flow: its
    requests that wait here."""

    @property
    def caller(self) -> Caller: ...
    @property
    def certificate_name(self) -> str: ...
    @property
    def flow(self) -> Flow[QueuedSegment]: ...
    def offer(self, lease: Lease) -> None: ...


class Loads(Protocol):
    """What lending needs of overlay.peers.peers.Peers."""

    def up(self) -> frozenset[str]: ...
    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]: ...
    def slots(self, neighbour: str, worker: str, handler: str) -> int: ...


class _Lease:
    """A lease at the process that lent it. is_open: its worker has it, and its client knows."""

    __slots__ = (
        "answered", "borrower", "heard_at", "id", "is_open", "neighbour", "renewed_at", "route",
        "rows", "since", "slots", "unanswered", "used_at", "worker",
    )  # fmt: skip

    def __init__(
        self,
        borrower: Borrower,
        route: Route,
        neighbour: str,
        worker: str,
        rows: int,
        slots: int,
    ) -> None:
        self.id = codec.new_ids()
        self.borrower = borrower
        self.route = route
        self.neighbour = neighbour  # which leads to the worker
        self.worker = worker
        self.rows = rows
        self.slots = slots
        self.is_open = False
        self.unanswered = self.answered = 0
        self.since = self.used_at = self.renewed_at = self.heard_at = time.monotonic()


class Lender:
    """What the process `me` lends."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        queue: RequestQueue,
        links: Loads,
        leases: Leases,
        request_log: RequestLog,
        deadlines: Deadlines,
    ) -> None:
        self._topology = topology
        self._me = me
        self._queue = queue
        self._links = links
        self._below = leases
        self._request_log = request_log
        self._limits = topology.limits
        self._lock = threading.Lock()
        self._leases: dict[int, _Lease] = {}
        self._lent: Counter[str] = Counter()  # rows, by worker
        self._times: Counter[str] = Counter()  # how often each worker is lent
        self._borrowers: Counter[Borrower] = Counter()  # leases of each
        self._plans: dict[object, Plan] = {}  # the same few recur
        self._answered = 0
        self._others = 0  # callers without a lease that were served lately
        self._served: dict[Caller, int] = {}
        self._quiet_until = 0.0  # nothing is lent before
        self._quiet_s = QUIET_S
        self._contended_at = 0.0
        self._looks = Looks(deadlines, self._look, REPORT_S)

    def ask(self, borrower: Borrower, request: LeaseRequest) -> None:
        """Lends the client workers for such requests, which it may send; or does nothing.

        Never blocks, never raises.
        """
        route = Route(Mode.ANY, request.team, request.handler)
        now = time.monotonic()
        if now < self._quiet_until:
            return
        if self._queue.waits_for(route):
            # What waits of those who borrow is no reason: a lane is where that could go.
            apart_from = self._borrowed().get(route, set()) | {borrower.flow}
            if self._queue.waits_for(route, apart_from):
                return
        with self._lock:
            made = self._choose_locked(borrower, route, request)
        for lease in made:
            self._pass_down(lease)
        self._look_soon()

    def left(self, borrower: Borrower) -> None:
        """The client's stream is over."""
        with self._lock:
            ended = [lease for lease in self._leases.values() if lease.borrower is borrower]
        for lease in ended:
            self._end(lease)

    def fill(self, response: pb2.MetricsResponse) -> None:
        now = time.monotonic()
        with self._lock:
            leases, response.lane_requests = list(self._leases.values()), self._answered
        for one in leases[: self._limits.max_targets]:
            now_lent = LentNow(
                one.worker,
                one.route.handler,
                shown(one.borrower.caller),
                one.rows,
                one.unanswered,
                one.answered,
                now - one.since,
            )
            response.lanes.append(codec.write_lane(now_lent))

    def _choose_locked(
        self, borrower: Borrower, route: Route, request: LeaseRequest
    ) -> list[_Lease]:
        have: dict[str, int] = {}
        if self._borrowers[borrower]:
            mine = (lease for lease in self._leases.values() if lease.borrower is borrower)
            have = {lease.worker: lease.rows for lease in mine if lease.route == route}
        through = self._through_locked(route)
        usable = [w for w in through if w not in request.without and w not in have]
        if len(usable) > LOOKED_AT:
            usable = random.sample(usable, LOOKED_AT)
        workers = [
            self._lendable_locked(through[w], w, route, self._lent[w], self._times[w])
            for w in usable
        ]
        rows = request.rows - sum(have.values())
        made: list[_Lease] = []
        if rows <= 0:
            return made
        for one, share in lending.lend(workers, rows, self._others):
            if len(have) + len(made) >= MAX_LANES:
                break
            if len(self._leases) >= self._limits.leases:
                break
            neighbour = through[one.worker]
            lease = _Lease(borrower, route, neighbour, one.worker, share, one.slots)
            self._leases[lease.id] = lease
            self._lent[lease.worker] += lease.rows
            self._times[lease.worker] += 1
            self._borrowers[borrower] += 1
            made.append(lease)
        return made

    def _through_locked(self, route: Route) -> dict[str, str]:
        """The workers that can be reached now, each with the neighbour that leads to it."""
        key = up, _ = self._links.up(), route
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = planner.plan(self._topology, self._me, up, route)
        return {worker: branch.neighbour for branch in plan.branches for worker in branch.targets}

    def _lendable_locked(
        self, neighbour: str, worker: str, route: Route, lent: int, borrowers: int
    ) -> Lendable:
        """lent, borrowers: of others."""
        _, service_s, state, _ = self._links.load(neighbour, route.handler)
        handler = route.handler or self._topology.processes[worker].handler
        slots = self._links.slots(neighbour, worker, handler) if state is State.HEALTHY else 0
        return Lendable(worker, slots, service_s, lent, borrowers)

    def _forget(self, lease: _Lease) -> None:
        with self._lock:
            if self._leases.pop(lease.id, None) is None:
                return
            self._lent[lease.worker] -= lease.rows
            self._borrowers[lease.borrower] -= 1
            if not self._borrowers[lease.borrower]:
                del self._borrowers[lease.borrower]
            self._times[lease.worker] -= 1
            if not self._times[lease.worker]:
                del self._times[lease.worker], self._lent[lease.worker]

    def _change(self, lease: _Lease, rows: int) -> None:
        with self._lock:
            if lease.id in self._leases:
                self._lent[lease.worker] += rows - lease.rows
            lease.rows = rows
        self._pass_down(lease)

    def _pass_down(self, lease: _Lease) -> None:
        lease.renewed_at = time.monotonic()
        caller = lease.borrower.certificate_name
        lent = Lent(
            lease.id, lease.worker, lease.route.handler, lease.rows, self._limits.lease_s, caller
        )
        self._below.take(lent, partial(self._reported, lease))

    def _end(self, lease: _Lease) -> None:
        if lease.rows:
            self._change(lease, 0)

    def _reported(self, lease: _Lease, report: LaneReport) -> None:
        lease.heard_at = time.monotonic()
        if report.outcomes or report.unanswered > lease.unanswered:
            lease.used_at = lease.heard_at
        lease.unanswered = report.unanswered
        for one in report.outcomes:
            lease.answered += one.rows
            with self._lock:
                self._answered += one.rows
            self._request_log.record_lane(lease.worker, lease.route, lease.borrower.caller, one)
        if report.is_over:
            self._forget(lease)
        elif not lease.is_open and lease.rows:
            lease.is_open = True
            address = self._topology.processes[lease.worker].address
            names = lease.worker, address, lease.route.handler, lease.route.team
            lease.borrower.offer(Lease(lease.id, *names, lease.rows, lease.slots))

    def _look_soon(self) -> None:
        if self._leases:
            self._looks.soon()

    def _look(self) -> None:
        now = time.monotonic()
        with self._lock:
            leases = list(self._leases.values())
        self._note_others(leases)
        borrowed = self._borrowed()
        contended = {
            route for route, flows in borrowed.items() if self._queue.waits_for(route, flows)
        }
        if contended:
            self._be_quiet(now)
        for lease in leases:
            if lease.route in contended:
                self._end(lease)
            elif not lease.rows or now - lease.used_at > USED_S:
                if now - max(lease.renewed_at, lease.heard_at) > 2 * self._limits.lease_s:
                    self._forget(lease)  # nothing comes back
            elif now - lease.renewed_at >= RENEW_S:
                self._renew(lease)
        self._look_soon()

    def _borrowed(self) -> dict[Route, set[Flow[QueuedSegment]]]:
        """The flows of those who are lent workers for a route."""
        found: dict[Route, set[Flow[QueuedSegment]]] = {}
        with self._lock:
            for lease in self._leases.values():
                if lease.rows:
                    found.setdefault(lease.route, set()).add(lease.borrower.flow)
        return found

    def _renew(self, lease: _Lease) -> None:
        chosen: list[tuple[Lendable, int]] = []
        if lease.neighbour in self._links.up():
            with self._lock:
                others = self._times[lease.worker] - 1
                at = lease.neighbour, lease.worker, lease.route
                found = self._lendable_locked(*at, 0, max(0, others))
            chosen = lending.lend([found], 1, self._others)
        self._change(lease, chosen[0][1] if chosen else 0)

    def _be_quiet(self, now: float) -> None:
        if now - self._contended_at > CALM_S:
            self._quiet_s = QUIET_S
        self._contended_at = now
        self._quiet_until = now + self._quiet_s
        self._quiet_s = min(2 * self._quiet_s, MAX_QUIET_S)

    def _note_others(self, leases: list[_Lease]) -> None:
        """Counts the callers without a lease that were served since the last look."""
        borrowers = {lease.borrower.caller for lease in leases}
        before, self._served = self._served, self._queue.served()
        new = {caller for caller, turns in self._served.items() if turns != before.get(caller)}
        self._others = len(new - borrowers)
