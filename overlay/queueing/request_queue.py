"""Admits requests, queues them and starts them: a bounded queue in front of a bounded service.

    admit     --> [ waiting room, at most `slots`   ] --+--claim--> [ in service: `in_service` ]
                   refused immediately when full        |            until answer, deadline, cancel
    admit_to  --> [ a flow per stream, its window   ] --+--claim--> [ in service, against credit ]

A request that finds a place on arrival starts, whatever else waits. Only one that finds none is
checked: whether there is room to wait, and whether it can be answered in time. What waits is in
overlay.queueing.waiting_room; overlay.queueing.admission and .deadline_check decide.

Owns no thread. The thread on which something changes (a request arrives, one ends, a link comes up:
`kick`) starts the next requests. `claim` decides under the lock and must be quick; `start` acts
outside it.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from typing import NamedTuple

from overlay.model import clocks as time
from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.errors import Draining, NoTimeLeft, OverlayError, QueueFull
from overlay.model.pending import Run
from overlay.model.segments import ANONYMOUS, Caller, Code, OnResult, Part, Route, Segment, Slice
from overlay.queueing import admission
from overlay.queueing.admission import HIGHEST_PRIORITY
from overlay.queueing.callers import Callers, Seen
from overlay.queueing.deadline_check import DeadlineCheck
from overlay.queueing.fair_queue import NO_SHARE, NoPlace, Place
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment, Start, refusal, unstarted
from overlay.queueing.service_time import ServiceClass
from overlay.queueing.shares import PlaceShares, SlotShares
from overlay.queueing.waiting_room import WaitingRoom

SAMPLE_S = 0.001  # between two recorded completions; more samples would not improve the estimate
MAX_CLASSES = 1000  # there are few routes, but a caller may name any targets
HELD = 16  # completions over which the time that a place is held is averaged

Claim = Callable[[Route, int, float, bool], "Place | None"]
"""(route, rows, patient until, streamed) -> places for some of the rows; None if there are none, or
AWAITED."""

OnEnded = Callable[[QueuedSegment, int, Slice, "float | None", float], None]
"""(segment, how many of its rows, their answers, when they started, when they ended). The start is
None for rows that never started."""


class RequestQueue:
    """The queue of one process. Thread-safe."""

    def __init__(
        self,
        me: str,
        *,
        slots: int,
        in_service: int,
        max_bytes: int,
        claim: Claim,
        start: Start,
        team_limit: int | None = None,
        return_margin_s: float = 0.0,
        default_handler: str = "",
        on_started: Callable[[], None] = lambda: None,
        on_ended: OnEnded = lambda queued, rows, answers, started, ended: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """team_limit: how many places in service the requests that name one team may hold.

        return_margin_s: how much of a request's time is reserved for its return path.
        default_handler: the handler of requests that name none, if it is the same on all workers.
        on_started: called after starts, so that what they sent leaves together.
        on_ended: called once for every row, when it has ended.
        """
        self.me = me
        self.on_started = on_started
        self.on_ended = on_ended
        self.held_s = 0.0  # how long places were held recently, on average
        self.slots = slots
        self.in_service = in_service
        self._default_handler = default_handler
        self._room: WaitingRoom[QueuedSegment] = WaitingRoom(slots, self._claim_locked)
        self._lock = self._room.mutex
        self._check = DeadlineCheck(self._room.order, return_margin_s)
        self._now = 0.0  # passed to _claim_locked
        self._streams: list[Flow[QueuedSegment]] = []
        self._flows: dict[Caller, Flow[QueuedSegment]] = {}  # of single requests in slots
        self._claim = claim
        self._start = start
        self._clock = clock
        self._numbers = itertools.count()
        self._callers = Callers()
        self._slot_shares = SlotShares(slots, max_bytes)
        self._place_shares = PlaceShares(in_service, team_limit or in_service)  # of single requests
        self._classes: OrderedDict[Route, ServiceClass] = OrderedDict()
        self._fresh: dict[QueuedSegment, None] = {}  # streamed, not seen by a kick yet
        self._singles = 0  # admitted so far
        self._draining = False
        self._here = threading.local()  # what this thread has to start

    @property
    def waiting(self) -> int:
        """Single requests in queue slots; streamed ones are in `streamed`."""
        return self._room.qsize()

    @property
    def active(self) -> int:
        """Single requests in service."""
        return self._place_shares.taken

    @property
    def streamed(self) -> tuple[int, int, int]:
        """Open streams, and their requests that wait and that are in service."""
        with self._lock:
            waiting = sum(flow.rows for flow in self._streams)
            return len(self._streams), waiting, sum(flow.active for flow in self._streams)

    def waits_for(
        self, wants: Route, apart_from: Container[Flow[QueuedSegment]] = frozenset()
    ) -> bool:
        """Whether requests wait here because the places that these would want were taken.

        apart_from: flows whose requests do not count.
        """
        with self._lock:
            full = {
                route
                for route, found in self._classes.items()
                if found.parked and not admission.may_overtake(wants, route)
            }
            return bool(full) and any(
                head.is_parked and head.wants in full
                for flow in self._room.order.flows
                if flow not in apart_from
                for head in flow.heads()
            )

    def served(self) -> dict[Caller, int]:
        """How many turns the callers with streams have had; a number that grows. All single
        requests together count as ANONYMOUS."""
        with self._lock:
            turns = {flow.caller: flow.served for flow in self._streams}
        return {**turns, ANONYMOUS: self._singles}

    def admit(
        self,
        segment: Segment,
        sink: OnResult,
        caller: Caller = ANONYMOUS,
        priority: int = 0,
        rights: Rights = UNRESTRICTED,
    ) -> QueuedSegment:
        """Admits one request or refuses it; never blocks.

        Once admitted, the sink gets its answer in any case. It starts if it finds a place. Raises
        QueueFull when there is no place and no room to wait, or as many of its caller's requests
        wait as its rights allow; NoTimeLeft when it cannot be answered before its deadline,
        Draining after `close`.
        """
        now = self._clock()
        _check_left(segment, now)
        refused: OverlayError | None = None
        with self._lock:
            self._check_open()
            self._singles += 1
            seen = self._callers.seen(caller, now)
            flow = self._flows.get(seen.caller) or Flow(seen.caller, rights=rights)
            queued = self._queued_locked(segment, sink, now, flow, priority)
            taken = self._take_all_locked(now, queued)
            if queued.unstarted.left:
                try:
                    self._wait_locked(queued, seen)
                except OverlayError as e:
                    refused = e
        if taken:
            self._run(taken)
        if refused is not None:
            raise refused
        return queued

    def open_flow(
        self, caller: Caller = ANONYMOUS, rights: Rights = UNRESTRICTED
    ) -> Flow[QueuedSegment]:
        """A flow for one stream of this caller, until `close_flow`."""
        with self._lock:
            seen = self._callers.seen(caller, self._clock())
            flow: Flow[QueuedSegment] = Flow(seen.caller, is_stream=True, rights=rights)
            self._streams.append(flow)
        return flow

    def close_flow(self, flow: Flow[QueuedSegment]) -> None:
        with self._lock:
            self._streams.remove(flow)

    def admit_to(
        self, flow: Flow[QueuedSegment], segment: Segment, sink: OnResult, priority: int = 0
    ) -> QueuedSegment:
        """Admits a streamed segment; the stream's window bounds them. Raises NoTimeLeft, Draining.

        It starts with the next `kick`, so that the segments of a frame start together. If rows find
        no place then, those at its end are refused that cannot be answered in time, or that exceed
        what may wait of its caller.
        """
        now = self._clock()
        _check_left(segment, now)
        with self._lock:
            self._check_open()
            queued = self._queued_locked(segment, sink, now, flow, priority)
            self._room.put_rows(queued, segment.count)
            self._fresh[queued] = None
        return queued

    def kick(self) -> None:
        """Starts whatever can start now. Called when a place may have become free."""
        if self._room.empty():
            return
        # A start may answer immediately and kick again: the outer loop goes on, without recursion.
        if getattr(self._here, "runs", False):
            self._here.again = True
            return
        self._run([])

    def close(self) -> int:
        """Refuses what waits, and new requests from now on. Returns how many rows it refused."""
        with self._lock:
            self._draining = True
            waiting = list(self._room)
            refused = sum(queued.unstarted.left for queued in waiting)
        for queued in waiting:
            queued.refuse(Draining(f"{self.me} is stopping; the request had not started"))
        return refused

    # for the queued segments

    def withdraw(self, queued: QueuedSegment, start: int, count: int) -> list[Run]:
        """Removes those of these rows that have not started."""
        with self._lock:
            return self._withdraw_locked(queued, start, count)

    def answered(
        self, queued: QueuedSegment, rows: int, answers: Slice, started: float | None
    ) -> None:
        """`rows` of its rows have ended. started: when they started; None if they never did."""
        ended = self._clock() if started is None else self._release(queued, rows, started, answers)
        self.on_ended(queued, rows, answers, started, ended)

    # admission

    def _queued_locked(
        self,
        segment: Segment,
        sink: OnResult,
        now: float,
        flow: Flow[QueuedSegment],
        priority: int,
    ) -> QueuedSegment:
        wants = admission.wants(segment.route, self._default_handler)
        service_class, number = self._class_of(wants), next(self._numbers)
        priority = min(priority, HIGHEST_PRIORITY)
        return QueuedSegment(self, segment, sink, flow, service_class, wants, number, now, priority)

    def _wait_locked(self, queued: QueuedSegment, seen: Seen) -> None:
        """Puts a single request that did not start into a slot. Raises QueueFull, NoTimeLeft."""
        wants, size = queued.wants, queued.segment.payloads.size
        if self._excess_locked(queued.flow, 1):
            raise queued.flow.rights.too_many()
        self._slot_shares.check(seen, wants, size, queued.admitted)
        try:
            self._room.put_nowait(queued)
        except queue.Full:
            raise QueueFull(f"all {self.slots} queue slots are taken") from None
        queued.has_slot = True
        self._slot_shares.take(seen.caller, wants, size)
        self._flows[seen.caller] = queued.flow
        if self._park_locked(queued):
            try:
                self._check.check(queued)
            except NoTimeLeft:
                self._withdraw_locked(queued, 0, 1)
                raise

    def _excess_locked(self, flow: Flow[QueuedSegment], more: int = 0) -> int:
        """How many of its caller's requests, with `more`, wait beyond what its rights allow.

        A caller's flows are those of its address, whatever names it uses.
        """
        if flow.rights.waiting is None:
            return 0
        address = flow.caller.address
        waiting = self._slot_shares.held_by(address) + sum(
            stream.rows for stream in self._streams if stream.caller.address == address
        )
        return max(0, waiting + more - flow.rights.waiting)

    def _park_locked(self, queued: QueuedSegment) -> bool:
        """Parks it if it waits for a place, not for a link to come back; returns whether it did."""
        if queued.flow.paused or not self._room.order.is_blocked(queued):
            return False
        queued.is_parked = True
        queued.service_class.park(queued.admitted)
        return True

    def _unpark_locked(self, queued: QueuedSegment, now: float) -> None:
        if queued.is_parked and not queued.unstarted.left:
            queued.is_parked = False
            queued.service_class.unpark(now)

    def _class_of(self, wants: Route) -> ServiceClass:
        classes = self._classes
        service_class = classes.get(wants)
        if service_class is None:
            service_class = classes[wants] = ServiceClass()
            # Idle ones can go; those in use are bounded by what waits and runs.
            for _ in range(min(2, len(classes) - MAX_CLASSES)):
                oldest, found = next(iter(classes.items()))
                if found.is_idle and found is not service_class:
                    del classes[oldest]
                else:
                    classes.move_to_end(oldest)
        elif len(classes) > 1:
            classes.move_to_end(wants)
        return service_class

    def _check_open(self) -> None:
        if self._draining:
            raise Draining(f"{self.me} is stopping and takes no new requests")

    # starting

    def _run(self, taken: list[_Started | _Refused]) -> None:
        """Starts these, and whatever else can start."""
        here = self._here
        if getattr(here, "runs", False):
            here.taken.extend(taken)
            here.again = True
            return
        here.runs, here.again, here.taken = True, True, deque(taken)
        try:
            while here.taken or here.again:
                here.again = False
                while here.taken:
                    here.taken.popleft().carry_out(self._start)
                while found := self._take():
                    for one in found:
                        one.carry_out(self._start)
        finally:
            here.runs = False
            self.on_started()

    def _take(self) -> list[_Started | _Refused]:
        """The next rows to start; when there are none, the fresh rows that are too late."""
        if self._room.empty():
            return []
        with self._lock:
            try:
                return [self._take_locked(self._clock())]
            except queue.Empty:
                return self._refuse_fresh_locked()

    def _take_all_locked(self, now: float, arriving: QueuedSegment) -> list[_Started | _Refused]:
        found = []
        try:
            while arriving.unstarted.left or not self._room.empty():
                found.append(self._take_locked(now, arriving if arriving.unstarted.left else None))
        except queue.Empty:
            pass
        return found

    def _take_locked(
        self, now: float, arriving: QueuedSegment | None = None
    ) -> _Started | _Refused:
        """Raises queue.Empty."""
        self._now = now
        queued, place = self._room.get_nowait(arriving)
        if place.count:
            first, _ = queued.unstarted.first_run() or (0, 0)
            self._begin_locked(queued, first, place.count, now)
            return _Started(queued, first, place, now)
        part = unstarted(self.me, Code.DEADLINE_EXCEEDED)
        if place is _HOPELESS:
            part = refusal(self.me, NoTimeLeft(_TOO_LATE))
        return _Refused(queued, self._withdraw_locked(queued, 0, queued.segment.count), part)

    def _refuse_fresh_locked(self) -> list[_Started | _Refused]:
        """Removes the streamed rows that found no place and cannot be answered in time, or are more
        than may wait of their caller."""
        refused: list[_Started | _Refused] = []
        if not self._fresh:
            return refused
        fresh, self._fresh = self._fresh, {}
        for queued in fresh:
            self._park_locked(queued)
        for queued in reversed(fresh):
            if excess := self._excess_locked(queued.flow):
                first = queued.unstarted.tail(excess)
                runs = self._withdraw_locked(queued, first, queued.segment.count - first)
                part = refusal(self.me, queued.flow.rights.too_many())
                refused.append(_Refused(queued, runs, part))
        for queued, first, why in self._check.late_rows(fresh):
            runs = self._withdraw_locked(queued, first, queued.segment.count - first)
            refused.append(_Refused(queued, runs, refusal(self.me, why)))
        return refused

    def _claim_locked(self, queued: QueuedSegment) -> Place | None:
        now = self._now
        if queued.segment.deadline <= now:
            return _EXPIRED  # dropped when its turn comes: its caller has given up
        if not queued.flow.is_stream and not self._place_shares.allow(*_holder(queued)):
            return None if self._place_shares.is_full else NO_SHARE
        if queued.is_parked and self._check.is_hopeless(queued, now):
            return _HOPELESS
        _, rows = queued.unstarted.first_run() or (0, 0)
        return self._claim(queued.route, rows, queued.patient_until, queued.flow.is_stream)

    def _begin_locked(self, queued: QueuedSegment, first: int, count: int, now: float) -> None:
        queued.unstarted.take(first, count)
        queued.service_class.active += count
        self._unpark_locked(queued, now)
        if queued.flow.is_stream:
            queued.flow.active += count
            self._forget_fresh_locked(queued)
        else:
            self._place_shares.take(*_holder(queued))
            self._give_slot_back_locked(queued)

    def _withdraw_locked(self, queued: QueuedSegment, start: int, count: int) -> list[Run]:
        runs = queued.unstarted.take(start, count)
        if not runs:
            return runs
        self._room.discard(queued, sum(rows for _, rows in runs))
        self._unpark_locked(queued, self._clock())
        self._forget_fresh_locked(queued)
        self._give_slot_back_locked(queued)
        return runs

    def _forget_fresh_locked(self, queued: QueuedSegment) -> None:
        if not queued.unstarted.left:
            self._fresh.pop(queued, None)

    def _give_slot_back_locked(self, queued: QueuedSegment) -> None:
        if queued.has_slot:
            queued.has_slot = False
            caller = queued.flow.caller
            self._slot_shares.give_back(caller, queued.wants, queued.segment.payloads.size)
            if not queued.flow.rows:
                del self._flows[caller]

    def _release(self, queued: QueuedSegment, count: int, started: float, answers: Slice) -> float:
        """Gives the places of these rows back; returns the time."""
        is_measured = not queued.is_read and answers.has_service_time
        is_expired = not is_measured and answers.is_too_late
        with self._lock:
            service_class, now = queued.service_class, self._clock()
            if queued.flow.is_stream:
                queued.flow.active -= count
            else:
                self._place_shares.give_back(*_holder(queued))
            held_s = now - started
            if is_measured and now - service_class.estimator.last >= SAMPLE_S:
                service_class.estimator.completed(now, held_s, service_class.active)
                queued.estimator.completed(now, held_s)
            elif is_expired:
                queued.estimator.expired(now, held_s)
            service_class.active -= count
            self.held_s += (held_s - self.held_s) / HELD if self.held_s else held_s
        return now


class _Started(NamedTuple):
    """Rows to start, with their places."""

    queued: QueuedSegment
    first: int
    place: Place
    now: float

    def carry_out(self, start: Start) -> None:
        self.queued.run(start, self.first, self.place, self.now)


class _Refused(NamedTuple):
    """Rows that were removed and never start, with their answer."""

    queued: QueuedSegment
    runs: list[Run]
    part: Part

    def carry_out(self, start: Start) -> None:
        self.queued.refuse_runs(self.runs, self.part)


def _holder(queued: QueuedSegment) -> tuple[str, str, str]:
    """The holder of its place: address, handler and team."""
    return queued.flow.caller.address, queued.wants.handler, queued.wants.team


def _check_left(segment: Segment, now: float) -> None:
    if segment.deadline <= now:
        raise NoTimeLeft("the deadline had passed when the request arrived")


_TOO_LATE = "no time left: even the quickest recent request took longer"
_EXPIRED, _HOPELESS = NoPlace(), NoPlace()
"""Its deadline has passed; too little of its time is left."""
