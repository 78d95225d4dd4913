"""Where requests wait: bounded rooms in front of a bounded service.

    admit  --> [ waiting room, at most `slots` ] --+--claim--> [ in service, at most `in_service` ]
                 refused at once when full         |            ends by answer, deadline, cancel
    stream --> [ a lane per stream, its window ] --+--claim--> [ in service, against credit ]

The room and the lanes take turns, so that neither a bulk of streamed requests nor a crowd of single
ones starves the other. In the room callers take turns, and who comes too late to be answered in
time is refused; overlay.admission decides both.

Owns no thread. Whoever changes something (a request comes, one ends, a link comes up: `kick`) lets
the next ones start, on its own thread. `claim` decides under the lock and must be quick; `start`
acts outside it.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from overlay import admission
from overlay.admission import Callers, Pace, Turns
from overlay.errors import Draining, NoTimeLeft, OverlayError
from overlay.rows import OpenRows, Run
from overlay.values import Answers, Code, End, Executed, Part, Route, Segment, Sink, end_overlap

log = logging.getLogger("overlay.intake")


class Place(Protocol):
    """What a claim gives: places for `count` rows."""

    @property
    def count(self) -> int: ...


class NoPlace:
    """Instead of places."""

    count = 0


AWAITED = NoPlace()
"""It waits for a neighbour and not for a place: it holds up nobody behind it."""

Claim = Callable[[Route, int, float, bool], "Place | None"]
"""(route, rows, patient until, streamed) -> places for some of the rows; None when there is none,
or AWAITED."""

Start = Callable[[Segment, Any, float, Sink], End]
"""(rows, their places, seconds waited, sink) -> how to end them."""


class Ticket:
    """One segment's stay, from admission to its last answer. Times are monotonic seconds."""

    def __init__(
        self,
        segment: Segment,
        sink: Sink,
        now: float,
        number: int,
        intake: Intake,
        caller: str = "",
        urgency: float = 0.0,
    ):
        self.segment = segment
        self.caller = caller
        self.urgency = urgency
        self.admitted = now
        self.started: float | None = None
        self.number = number
        self.unstarted = OpenRows(segment.count)  # guarded by the intake's lock
        self.patient_until = (now + segment.deadline) / 2
        self.lane: Lane | None = None  # of a streamed segment
        self._sink = sink
        self._intake = intake
        self._lock = threading.Lock()
        self._open = OpenRows(segment.count)
        self._ends: list[tuple[int, int, End]] = []
        self._ended: list[tuple[Code, int, int]] = []

    @property
    def is_open(self) -> bool:
        return self._open.left > 0

    def end(self, code: Code, start: int = 0, count: int | None = None) -> None:
        """Ends the rows: those that wait never start, those that run are cut short.

        What is open of them is answered with `code` at once. Nothing happens after the end.
        """
        count = self.segment.count - start if count is None else count
        if not self._open.left:
            return
        for first, rows in self._intake._withdraw(self, start, count):
            self._settle(first, _unstarted(self._intake.me, code, rows))
        with self._lock:
            self._ended.append((code, start, count))
            ends = list(self._ends)
        for first, rows, end in ends:
            end_overlap(end, first, rows, code, start, count)

    def refuse(self, error: OverlayError) -> None:
        """Answers every row that has not started with this refusal."""
        part = Part(self._intake.me, error.code, str(error), executed=error.executed)
        for first, rows in self._intake._withdraw(self, 0, self.segment.count):
            self._settle(first, Answers(rows, (), refused=part))

    def waited_s(self, now: float) -> float:
        return (self.started or now) - self.admitted

    def _settle(self, start: int, answers: Answers) -> None:
        """Passes on the rows that are still open."""
        with self._lock:
            runs = self._open.take(start, answers.count)
            if not self._open.left:
                self._ends.clear()  # they lead back here, and would wait for the garbage collector
        for first, rows in runs:
            self._sink(first, answers.slice(first - start, rows))

    def _run(self, start: Start, first: int, place: Place, now: float) -> None:
        count = place.count
        intake = self._intake
        still_in_service = OpenRows(count)

        def sink(row: int, answers: Answers) -> None:
            with self._lock:
                before = still_in_service.left
                still_in_service.take(row, answers.count)
                left = before - still_in_service.left
            intake._release(self, left)
            self._settle(first + row, answers)
            intake.kick()

        rows = self.segment.slice(first, count)
        try:
            end = start(rows, place, now - self.admitted, sink)
        except Exception as e:
            # A fault of ours costs these rows and no place; whether some ran is not known.
            log.exception("requests could not be started")
            reason = f"could not be started: {type(e).__name__}"
            sink(0, Answers(count, (), refused=Part(intake.me, Code.INTERNAL, reason)))
            return
        with self._lock:
            if self._open.left:
                self._ends.append((first, count, end))
            ended = list(self._ended)
        for code, begin, size in ended:  # ended between its claim and now
            end_overlap(end, first, count, code, begin, size)


def _unstarted(me: str, code: Code, rows: int) -> Answers:
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        part = Part(me, NoTimeLeft.code, reason, executed=Executed.NO)
    else:
        part = Part(me, code, "the caller left while the request waited", executed=Executed.NO)
    return Answers(rows, (), refused=part)


class WaitingRoom(queue.Queue["Ticket"]):
    """The bounded queue, in lanes of requests that want the same places, where callers take turns.

    `take_locked` gives the next ticket that can start now; one that waits for a busy team does
    not hold up those of another. Its `mutex` is the intake's one lock.
    """

    def __init__(self, slots: int, most_bytes: int) -> None:
        super().__init__(slots)
        self.most_bytes = most_bytes

    def _init(self, maxsize: int) -> None:
        self._lanes: dict[Hashable, Turns[Ticket]] = {}
        self._callers: Counter[str] = Counter()  # how many each has waiting
        self._lately = Callers()
        self._count = 0
        self._bytes = 0

    def _qsize(self) -> int:
        return self._count

    def _put(self, item: Ticket) -> None:
        lane = self._lanes.setdefault(admission.lane(item.segment.route), Turns())
        lane.put(item, item.caller, item.urgency)
        self._callers[item.caller] += 1
        self._count += 1
        self._bytes += item.segment.payloads.size

    def _get(self) -> Ticket:
        ticket = self._heads()[0]
        self.start_locked(ticket)
        return ticket

    def has_rivals_locked(self, ticket: Ticket) -> bool:
        """Notes its caller; whether others have come lately too."""
        return self._lately.seen(ticket.caller, ticket.admitted)

    def admit_locked(self, ticket: Ticket, has_rivals: bool) -> None:
        """Puts the ticket in or raises QueueFull."""
        size, caller = ticket.segment.payloads.size, ticket.caller
        admission.check_room(self._count, self.maxsize, self._bytes, size, self.most_bytes)
        if has_rivals:
            admission.check_share(self._callers[caller], self._count, self.maxsize)
        self._put(ticket)

    def ahead_of_locked(self, ticket: Ticket) -> int:
        """How many that want the same places would start before it."""
        lane = self._lanes.get(admission.lane(ticket.segment.route))
        return lane.ahead_of(ticket.caller, ticket.urgency) if lane else 0

    def take_locked(self, claim: Callable[[Ticket], Place | None]) -> tuple[Ticket, Place] | None:
        """The next ticket for which `claim` gives a place, with that place; else None.

        The ticket stays in until `start_locked`.
        """
        return _take_first(self._heads(), claim)

    def start_locked(self, ticket: Ticket) -> None:
        """Takes it out: it is its caller's turn."""
        self._lanes[admission.lane(ticket.segment.route)].take(ticket)
        self._forget(ticket)

    def discard_locked(self, ticket: Ticket) -> None:
        """Takes it out: nobody waits for it any more."""
        self._lanes[admission.lane(ticket.segment.route)].remove(ticket)
        self._forget(ticket)

    def tickets_locked(self) -> list[Ticket]:
        return sorted((t for lane in self._lanes.values() for t in lane), key=_number)

    def _heads(self) -> list[Ticket]:
        heads = [lane.head() for lane in self._lanes.values()]
        if len(heads) > 1:
            heads.sort(key=_urgency)
        return heads

    def _forget(self, ticket: Ticket) -> None:
        key = admission.lane(ticket.segment.route)
        if not self._lanes[key]:
            del self._lanes[key]
        self._callers[ticket.caller] -= 1
        if not self._callers[ticket.caller]:
            del self._callers[ticket.caller]
        self._count -= 1
        self._bytes -= ticket.segment.payloads.size


def _take_first(
    heads: Sequence[Ticket],
    claim: Callable[[Ticket], Place | None],
    most_blocked: float = math.inf,
) -> tuple[Ticket, Place] | None:
    """The first for which `claim` gives a place, and that may overtake those that got none."""
    blocked: list[Ticket] = []
    for ticket in heads:
        route = ticket.segment.route
        if blocked and not all(admission.may_overtake(route, b.segment.route) for b in blocked):
            continue
        place = claim(ticket)
        if place is None:
            blocked.append(ticket)
            if len(blocked) > most_blocked:
                return None
        elif place is not AWAITED:
            return ticket, place
    return None


def _number(ticket: Ticket) -> int:
    return ticket.number


def _urgency(ticket: Ticket) -> tuple[float, int]:
    return ticket.urgency, ticket.number


class _Kind:
    """Single requests of one mode, team and handler: how many are in service, and their pace."""

    def __init__(self) -> None:
        self.active = 0
        self.pace = Pace()


class Lane:
    """One stream's segments that have rows to start; guarded by the intake's lock.

    The stream's window bounds it. Rows of one lane start in order, but for those whose slots are
    busy while others' are free.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.active = 0
        self.paused = False  # its answers are not read: nothing more starts
        self._kinds: dict[object, dict[Ticket, None]] = {}

    @property
    def tickets(self) -> list[Ticket]:
        return [ticket for tickets in self._kinds.values() for ticket in tickets]

    def put_locked(self, ticket: Ticket) -> None:
        self._kinds.setdefault(admission.lane(ticket.segment.route), {})[ticket] = None

    def discard_locked(self, ticket: Ticket) -> None:
        kind = admission.lane(ticket.segment.route)
        del self._kinds[kind][ticket]
        if not self._kinds[kind]:
            del self._kinds[kind]

    def take_locked(self, claim: Callable[[Ticket], Place | None]) -> tuple[Ticket, Place] | None:
        # Thousands may wait behind the first of a kind: they want the same places and wait too.
        heads = [next(iter(tickets)) for tickets in self._kinds.values()]
        if len(heads) > 1:
            heads.sort(key=_number)
        return _take_first(heads, claim, most_blocked=3)  # enough routes looked at for one turn


class Intake:
    """Admits, keeps waiting, starts, and counts. Safe from any thread."""

    def __init__(
        self,
        me: str,
        *,
        slots: int,
        in_service: int,
        most_bytes: int,
        claim: Claim,
        start: Start,
        of_a_team: int | None = None,
        on_started: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """of_a_team: how many of the places in service those who name one team may have.

        on_started: called after starts, so that what they sent leaves together.
        """
        self.me = me
        self.on_started = on_started
        self.slots = slots
        self.in_service = in_service
        self._of_a_team = of_a_team or in_service
        self._room = WaitingRoom(slots, most_bytes)
        self._lock = self._room.mutex
        self._lanes: list[Lane] = []
        self._lanes_waiting = 0  # tickets in lanes
        self._turn = 0
        self._claim = claim
        self._start = start
        self._clock = clock
        self._numbers = itertools.count()
        self._active = 0
        self._kinds: dict[Hashable, _Kind] = {}
        self._teams: Counter[str] = Counter()  # single requests in service
        self._draining = False
        self._pumping = threading.local()

    @property
    def waiting(self) -> int:
        """Single requests in the queue; streamed ones wait in their windows."""
        return self._room.qsize()

    @property
    def active(self) -> int:
        """Single requests in service."""
        return self._active

    @property
    def streamed(self) -> tuple[int, int, int]:
        """Streams open, their requests waiting, their requests in service."""
        with self._lock:
            waiting = sum(lane.waiting for lane in self._lanes)
            return len(self._lanes), waiting, sum(lane.active for lane in self._lanes)

    def admit(self, segment: Segment, sink: Sink, caller: str = "", priority: int = 0) -> Ticket:
        """Takes one request in or refuses it now; never blocks.

        The sink gets its answer, whatever becomes of it. Raises QueueFull when there is no room,
        NoTimeLeft when its deadline has passed or comes too soon, Draining after `close`.
        """
        ticket = self._ticket(segment, sink, caller, priority)
        with self._lock:
            self._check_open()
            has_rivals = self._room.has_rivals_locked(ticket)
            self._check_time_locked(ticket)
            self._room.admit_locked(ticket, has_rivals)
        self.kick()
        return ticket

    def open_lane(self) -> Lane:
        """A lane for one stream, until `close_lane`."""
        lane = Lane()
        with self._lock:
            self._lanes.append(lane)
        return lane

    def close_lane(self, lane: Lane) -> None:
        with self._lock:
            self._lanes.remove(lane)

    def admit_to(self, lane: Lane, segment: Segment, sink: Sink) -> Ticket:
        """Takes a streamed segment in; its stream bounds how many. Raises NoTimeLeft, Draining.

        It starts with the next `kick`, so that the segments of a frame start together.
        """
        ticket = self._ticket(segment, sink)
        ticket.lane = lane
        with self._lock:
            self._check_open()
            lane.put_locked(ticket)
            lane.waiting += segment.count
            self._lanes_waiting += 1
        return ticket

    def kick(self) -> None:
        """Starts whatever can start now. Called when a place may have become free."""
        if not (self._room._count or self._lanes_waiting):
            return
        # A start may answer at once and so kick again: that goes on in this loop, not deeper.
        if getattr(self._pumping, "on", False):
            self._pumping.again = True
            return
        self._pumping.on = True
        try:
            self._pump()
        finally:
            self._pumping.on = False
            self.on_started()

    def close(self) -> int:
        """Refuses what waits and all that comes; what has started goes on. The number refused."""
        with self._lock:
            self._draining = True
            waiting = self._room.tickets_locked()
            waiting += [ticket for lane in self._lanes for ticket in lane.tickets]
            refused = sum(ticket.unstarted.left for ticket in waiting)
        for ticket in waiting:
            ticket.refuse(Draining(f"{self.me} is stopping; the request had not started"))
        return refused

    def _ticket(self, segment: Segment, sink: Sink, caller: str = "", priority: int = 0) -> Ticket:
        now = self._clock()
        if segment.deadline <= now:
            raise NoTimeLeft("the deadline had passed when the request came")
        urgency = admission.urgency(now, priority)
        return Ticket(segment, sink, now, next(self._numbers), self, caller, urgency)

    def _check_time_locked(self, ticket: Ticket) -> None:
        if not self._room._count:
            return
        kind = self._kind_of(ticket.segment.route)
        now, ahead = ticket.admitted, self._room.ahead_of_locked(ticket)
        left_s = ticket.segment.deadline - now
        admission.check_time(left_s, ahead, kind.active, kind.pace.mean_s(now))

    def _kind_of(self, route: Route) -> _Kind:
        key = route.mode, route.team, route.handler
        kind = self._kinds.get(key)
        if kind is None:  # few: team and handler are names of the configuration
            kind = self._kinds[key] = _Kind()
        return kind

    def _check_open(self) -> None:
        if self._draining:
            raise Draining(f"{self.me} is stopping and takes no new requests")

    def _pump(self) -> None:
        self._pumping.again = True
        while self._pumping.again:
            self._pumping.again = False
            while (taken := self._take()) is not None:
                ticket, first, place, now = taken
                if place is _EXPIRED:
                    ticket.end(Code.DEADLINE_EXCEEDED)
                elif place is _HOPELESS:
                    ticket.refuse(NoTimeLeft("no time left: even the quickest of late took longer"))
                else:
                    ticket._run(self._start, first, place, now)

    def _take(self) -> tuple[Ticket, int, Place, float] | None:
        """The next rows to start, from the room and the lanes in turn."""
        if not (self._room._count or self._lanes_waiting):
            return None
        with self._lock:
            now = self._clock()
            sources = 1 + len(self._lanes)
            for i in range(sources):
                turn = (self._turn + i) % sources
                taken = self._take_from_locked(turn, now)
                if taken is not None:
                    self._turn = turn + 1
                    return (*taken, now)
            return None

    def _take_from_locked(self, turn: int, now: float) -> tuple[Ticket, int, Place] | None:
        if turn == 0:
            if not self._room._count:
                return None
            taken = self._room.take_locked(lambda ticket: self._claim_one_locked(ticket, now))
            if taken is None:
                return None
            ticket, place = taken
            if place.count:
                self._room.start_locked(ticket)
                ticket.unstarted.take(0, 1)
            return ticket, 0, place
        lane = self._lanes[turn - 1]
        if lane.paused or not lane.waiting:
            return None
        found = lane.take_locked(lambda ticket: self._claim_rows(ticket, now))
        if found is None:
            return None
        ticket, place = found
        first, _ = ticket.unstarted.first_run() or (0, 0)
        if place.count:
            self._begin_locked(lane, ticket, first, place.count, now)
        return ticket, first, place

    def _begin_locked(self, lane: Lane, ticket: Ticket, first: int, count: int, now: float) -> None:
        ticket.unstarted.take(first, count)
        lane.waiting -= count
        lane.active += count
        ticket.started = ticket.started or now
        if not ticket.unstarted.left:
            lane.discard_locked(ticket)
            self._lanes_waiting -= 1

    def _claim_one_locked(self, ticket: Ticket, now: float) -> Place | None:
        if ticket.segment.deadline <= now:
            return _EXPIRED  # dropped at dequeue: no handler shall work for nobody
        route = ticket.segment.route
        if self._active >= self.in_service:
            return None
        if route.team and self._teams[route.team] >= self._of_a_team:
            return None
        kind = self._kind_of(route)
        # Only of those that had to wait: the others' time is their own to judge.
        if now > ticket.admitted and ticket.segment.deadline - now < kind.pace.least_s(now):
            return _HOPELESS
        place = self._claim(route, 1, ticket.patient_until, False)
        if place is not None and place.count:
            self._active += 1
            self._teams[route.team] += 1
            kind.active += 1
            ticket.started = now
        return place

    def _claim_rows(self, ticket: Ticket, now: float) -> Place | None:
        if ticket.segment.deadline <= now:
            return _EXPIRED
        _, rows = ticket.unstarted.first_run() or (0, 0)
        return self._claim(ticket.segment.route, rows, ticket.patient_until, True)

    def _withdraw(self, ticket: Ticket, start: int, count: int) -> list[Run]:
        """Takes out what has not started of these rows, so that it never will."""
        with self._lock:
            runs = ticket.unstarted.take(start, count)
            lane = ticket.lane
            if lane is not None:
                lane.waiting -= sum(rows for _, rows in runs)
            if runs and not ticket.unstarted.left:
                if lane is None:
                    self._room.discard_locked(ticket)
                else:
                    lane.discard_locked(ticket)
                    self._lanes_waiting -= 1
            return runs

    def _release(self, ticket: Ticket, count: int) -> None:
        with self._lock:
            lane = ticket.lane
            if lane is None:
                self._end_one_locked(ticket, count)
            else:
                lane.active -= count

    def _end_one_locked(self, ticket: Ticket, count: int) -> None:
        if not count:  # it had ended before
            return
        route, now = ticket.segment.route, self._clock()
        kind = self._kind_of(route)
        self._active -= 1
        self._teams[route.team] -= 1
        kind.active -= 1
        kind.pace.ended(now, now - (ticket.started or now))


_EXPIRED, _HOPELESS = NoPlace(), NoPlace()
"""Instead of places: its deadline has passed; what is left of its time is not enough."""
