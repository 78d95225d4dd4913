"""The leases of workers at each process on their way: passed on, or held by the worker itself.

    from above --take--> the worker: holds it until it ends; its client's stream opens it
                         any other:  passes it on to the neighbour that leads to the worker
    from below --reported--> the neighbour's load, then passed on to where the lease came from

A neighbour that is not healthy is lent to nobody, however the process above judges it. A worker
believes only its link about who may send it how much. Each lease ends by itself unless it is
renewed. Thread-safe; its looks at the time run on the process's deadline thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from overlay.calls.request_log import Ended
from overlay.model import clocks as time
from overlay.model.errors import NotLent, OverlayError
from overlay.model.leases import ENDED_UNRUN, LaneOutcome, LaneReport, Lease, Lent, LentNow, shown
from overlay.model.limits import Limits
from overlay.model.segments import Caller, Code, Executed, Mode, Route
from overlay.model.topology import Topology
from overlay.routing import planner
from overlay.routing.outlier import State
from overlay.transport.timers import Deadlines, Looks

REPORT_S = 0.1  # between two reports of a lease that is in use
ALIVE_S = 0.5  # between two of one whose requests are long: it is kept until they have ended
KEPT_S = 1.0  # after its end, for the last report
KINDS = 16  # of outcomes in a report; further ones join the last

Above = Callable[[LaneReport], None]
"""Takes reports of a lease to where it came from. Must not block."""


class Links(Protocol):
    """What passing leases on needs of overlay.peers.peers.Peers."""

    def up(self) -> frozenset[str]: ...
    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]: ...
    def lend(self, neighbour: str, lent: Lent) -> None: ...
    def note_lane(
        self, neighbour: str, handler: str, change: int, outcomes: tuple[LaneOutcome, ...]
    ) -> None: ...


class Lane(Protocol):
    """The stream whose requests a lease allows. unanswered: its requests now."""

    @property
    def caller(self) -> Caller: ...
    @property
    def unanswered(self) -> int: ...
    def tell(self, lease: Lease) -> None: ...


class HeldLease:
    """A lease at its worker. Thread-safe."""

    def __init__(self, lent: Lent, above: Above) -> None:
        self.id = lent.id
        self.handler = lent.handler
        self.caller = lent.caller
        self.above = above
        self.lane: Lane | None = None
        self.rows = lent.rows
        self.answered = 0
        self.since = time.monotonic()
        self.ends_at = self.since + lent.for_s
        self._reported = 0  # unanswered requests, as last reported
        self._reported_at = self.since
        self._lock = threading.Lock()
        # By how they ended: how many, the sums of their times, and the id of one.
        self._ended: dict[tuple[Code, str, Executed], list[float]] = {}

    @property
    def unanswered(self) -> int:
        lane = self.lane
        return lane.unanswered if lane else 0

    @property
    def shown_caller(self) -> str:
        lane = self.lane
        return shown(lane.caller) if lane else self.caller

    def check(self, route: Route, rows: int) -> None:
        """Raises NotLent if the lane may not have `rows` more unanswered requests of this route."""
        if route.mode is not Mode.ANY or route.handler != self.handler or route.hops:
            raise NotLent("this stream is only for what its worker was lent for")
        if self.unanswered + rows > self.rows:
            raise NotLent(f"{self.rows} unanswered requests are lent here, and no more")

    def note(self, ended: Ended) -> None:
        """Requests of the lane have ended."""
        answers, ids = ended.answers, ended.segment.all_ids
        part = answers.parts[0] if answers and answers.parts else None
        times = (part.waited_us / 1e6, part.worked_us / 1e6) if part else (0.0, 0.0)
        good = ended.count - len(ended.failures)
        with self._lock:
            self.answered += ended.count
            if good:
                failed = {row for row, _ in ended.failures}
                row = next(row for row in range(ended.count) if row not in failed)
                key = Code.OK, "", Executed.YES
                self._add_locked(key, good, times, ids[ended.start + row])
            for row, error in ended.failures:
                # What its client will send elsewhere has not ended.
                if error.executed is not Executed.NO or error.code in ENDED_UNRUN:
                    key = error.code, str(error), error.executed
                    self._add_locked(key, 1, times, ids[ended.start + row])

    def report(self, now: float) -> LaneReport | None:
        """What is new since the last one; None if nothing is and no sign of life is due."""
        with self._lock:
            unanswered = self.unanswered
            is_due = unanswered > 0 and now - self._reported_at >= ALIVE_S
            if not self._ended and unanswered == self._reported and not is_due:
                return None
            self._reported, self._reported_at = unanswered, now
            ended, self._ended = self._ended, {}
        outcomes = (
            LaneOutcome(int(count), *key, waited_s / count, worked_s / count, int(request_id))
            for key, (count, waited_s, worked_s, request_id) in ended.items()
        )
        return LaneReport(self.id, False, unanswered, tuple(outcomes))

    def _add_locked(
        self,
        key: tuple[Code, str, Executed],
        count: int,
        times: tuple[float, float],
        request_id: int,
    ) -> None:
        if key not in self._ended and len(self._ended) >= KINDS:
            key = next(reversed(self._ended))
        sums = self._ended.setdefault(key, [0, 0.0, 0.0, request_id])
        sums[0] += count
        sums[1] += times[0] * count
        sums[2] += times[1] * count


class _Passed:
    """A lease at a process between its client's and its worker."""

    __slots__ = ("above", "ends_at", "handler", "neighbour", "unanswered")

    def __init__(self, neighbour: str, handler: str, above: Above) -> None:
        self.neighbour = neighbour
        self.handler = handler
        self.above = above
        self.unanswered = 0
        self.ends_at = 0.0


class Leases:
    """The leases that the process `me` passes on or holds."""

    def __init__(self, topology: Topology, me: str, links: Links, deadlines: Deadlines) -> None:
        self._topology = topology
        self._me = topology.process(me)
        self._links = links
        self._limits: Limits = topology.limits
        self._lock = threading.Lock()
        self._held: dict[int, HeldLease] = {}
        self._passed: dict[int, _Passed] = {}
        self._looks = Looks(deadlines, self._look, REPORT_S)

    def take(self, lent: Lent, above: Above) -> None:
        """A lease was made, changed, renewed or ended. Never blocks, never raises."""
        if self._me.works and lent.worker == self._me.id:
            self._hold(lent, above)
        else:
            self._pass_on(lent, above)

    def open(self, lease_id: int, caller: str, lane: Lane) -> HeldLease:
        """The lease whose requests this stream will carry. caller: the name of its certificate.

        Raises NotLent.
        """
        with self._lock:
            held = self._held.get(lease_id)
            if held is None or not held.rows or held.caller != caller:
                raise NotLent(f"{self._me.id} has no such lease of this caller")
            if held.lane is not None:
                raise NotLent("another stream has this lease")
            held.lane = lane
            return held

    def reported(self, neighbour: str, report: LaneReport) -> None:
        """A neighbour reports about a lease. Never blocks, never raises."""
        with self._lock:
            passed = self._passed.get(report.id)
            if passed is None or passed.neighbour != neighbour:
                return
            change = report.unanswered - passed.unanswered
            passed.unanswered = report.unanswered
            if report.unanswered:  # they may outlast the lease, and their ends count
                alive_until = time.monotonic() + self._limits.lease_s + KEPT_S
                passed.ends_at = max(passed.ends_at, alive_until)
            if report.is_over:
                change -= report.unanswered
                del self._passed[report.id]
        self._links.note_lane(neighbour, passed.handler, change, report.outcomes)
        passed.above(report)

    def shown(self) -> list[LentNow]:
        """Those that the process itself holds."""
        now = time.monotonic()
        with self._lock:
            held = list(self._held.values())
        return [
            LentNow(
                self._me.id,
                one.handler,
                one.shown_caller,
                one.rows,
                one.unanswered,
                one.answered,
                now - one.since,
            )
            for one in held
        ]

    def _hold(self, lent: Lent, above: Above) -> None:
        with self._lock:
            held = self._held.get(lent.id)
            is_new = held is None
            if held is None and lent.rows and not self._is_full_locked:
                held = self._held[lent.id] = HeldLease(lent, above)
            changed = held is not None and held.rows != lent.rows
            if held is not None:
                held.rows, held.above = lent.rows, above
                held.ends_at = time.monotonic() + lent.for_s
        if held is None:
            above(LaneReport(lent.id, is_over=True))
        elif is_new:
            above(LaneReport(lent.id))
        elif changed and held.lane is not None:
            held.lane.tell(Lease(lent.id, rows=lent.rows))
        self._look_soon()

    def _pass_on(self, lent: Lent, above: Above) -> None:
        with self._lock:
            passed = self._passed.get(lent.id)
            if passed is None and lent.rows and not self._is_full_locked:
                if neighbour := self._leads_to(lent.worker, lent.handler):
                    passed = self._passed[lent.id] = _Passed(neighbour, lent.handler, above)
            elif passed is not None and not self._is_healthy(passed.neighbour, lent.handler):
                lent = lent._replace(rows=0)
            if passed is not None:
                passed.ends_at = time.monotonic() + lent.for_s + KEPT_S
        if passed is None:
            above(LaneReport(lent.id, is_over=True))
        else:
            self._links.lend(passed.neighbour, lent)
        self._look_soon()

    def _leads_to(self, worker: str, handler: str) -> str:
        """The healthy neighbour through which the worker is reached now; empty without one."""
        try:
            neighbour = planner.next_hop(self._topology, self._me.id, self._links.up(), worker)
        except OverlayError:
            return ""
        return neighbour if self._is_healthy(neighbour, handler) else ""

    def _is_healthy(self, neighbour: str, handler: str) -> bool:
        return self._links.load(neighbour, handler)[2] is State.HEALTHY

    @property
    def _is_full_locked(self) -> bool:
        return len(self._held) + len(self._passed) >= self._limits.leases

    def _look_soon(self) -> None:
        if self._held or self._passed:
            self._looks.soon()

    def _look(self) -> None:
        """Reports what is new, and ends what was not renewed."""
        now = time.monotonic()
        with self._lock:
            held = list(self._held.values())
            lost = [(id_, p) for id_, p in self._passed.items() if p.ends_at <= now]
            for id_, _ in lost:
                del self._passed[id_]
        for one in held:
            self._look_at(one, now)
        for id_, passed in lost:
            self._links.note_lane(passed.neighbour, passed.handler, -passed.unanswered, ())
            passed.above(LaneReport(id_, is_over=True))
        self._look_soon()

    def _look_at(self, held: HeldLease, now: float) -> None:
        if held.ends_at <= now and held.rows:
            held.rows = 0
            if held.lane is not None:
                held.lane.tell(Lease(held.id))
        news = held.report(now)
        if not held.rows and not held.unanswered:
            with self._lock:
                self._held.pop(held.id, None)
            news = (news or LaneReport(held.id))._replace(is_over=True)
        if news is not None:
            held.above(news)
