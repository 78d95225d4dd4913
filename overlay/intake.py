"""Where requests wait: bounded rooms in front of a bounded service.

    admit  --> [ waiting room, at most `slots` ] --+--claim--> [ in service, at most `in_service` ]
                 refused at once when full         |            ends by answer, deadline, cancel
    stream --> [ a lane per stream, its window ] --+--claim--> [ in service, against credit ]

The room and the lanes take turns, so that neither a bulk of streamed requests nor a crowd of single
ones starves the other.

Owns no thread. Whoever changes something (a request comes, one ends, a link comes up: `kick`) lets
the next ones start, on its own thread. `claim` decides under the lock and must be quick; `start`
acts outside it.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from overlay import admission
from overlay.errors import Draining, NoTimeLeft, OverlayError
from overlay.rows import OpenRows, Run
from overlay.values import Answers, Code, End, Executed, Part, Route, Segment, Sink, end_overlap

log = logging.getLogger("overlay.intake")


class Place(Protocol):
    """What a claim gives: places for `count` rows."""

    @property
    def count(self) -> int: ...


Claim = Callable[[Route, int, float, bool], "Place | None"]
"""(route, rows, patient until, streamed) -> places for some of the rows, or None."""

Start = Callable[[Segment, Any, float, Sink], End]
"""(rows, their places, seconds waited, sink) -> how to end them."""


class Ticket:
    """One segment's stay, from admission to its last answer. Times are monotonic seconds."""

    def __init__(self, segment: Segment, sink: Sink, now: float, number: int, intake: Intake):
        self.segment = segment
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
    """The bounded queue, in lanes: first in, first out among requests that want the same places.

    `take_locked` gives the oldest ticket that can start now; one that waits for a busy team does
    not hold up those of another. Its `mutex` is the intake's one lock.
    """

    def __init__(self, slots: int, most_bytes: int) -> None:
        super().__init__(slots)
        self.most_bytes = most_bytes

    def _init(self, maxsize: int) -> None:
        self._lanes: dict[object, deque[Ticket]] = {}
        self._count = 0
        self._bytes = 0

    def _qsize(self) -> int:
        return self._count

    def _put(self, item: Ticket) -> None:
        self._lanes.setdefault(admission.lane(item.segment.route), deque()).append(item)
        self._count += 1
        self._bytes += item.segment.payloads.size

    def _get(self) -> Ticket:
        return self._remove(min((lane[0] for lane in self._lanes.values()), key=_number))

    def admit_locked(self, ticket: Ticket) -> None:
        """Puts the ticket in or raises QueueFull."""
        size = ticket.segment.payloads.size
        admission.check_room(self._count, self.maxsize, self._bytes, size, self.most_bytes)
        self._put(ticket)

    def take_locked(self, claim: Callable[[Ticket], Place | None]) -> tuple[Ticket, Place] | None:
        """The oldest ticket for which `claim` gives a place, with that place; else None.

        The ticket stays in: who takes it discards it.
        """
        blocked: list[Ticket] = []
        for ticket in sorted((lane[0] for lane in self._lanes.values()), key=_number):
            route = ticket.segment.route
            if not all(admission.may_overtake(route, b.segment.route) for b in blocked):
                continue
            place = claim(ticket)
            if place is not None:
                return ticket, place
            blocked.append(ticket)
        return None

    def discard_locked(self, ticket: Ticket) -> None:
        self._remove(ticket)

    def tickets_locked(self) -> list[Ticket]:
        return sorted((t for lane in self._lanes.values() for t in lane), key=_number)

    def _remove(self, ticket: Ticket) -> Ticket:
        key = admission.lane(ticket.segment.route)
        lane = self._lanes[key]
        lane.remove(ticket)
        if not lane:
            del self._lanes[key]
        self._count -= 1
        self._bytes -= ticket.segment.payloads.size
        return ticket


def _number(ticket: Ticket) -> int:
    return ticket.number


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
        blocked: list[Ticket] = []
        for ticket in heads:
            route = ticket.segment.route
            if blocked and not all(admission.may_overtake(route, b.segment.route) for b in blocked):
                continue
            place = claim(ticket)
            if place is not None:
                return ticket, place
            blocked.append(ticket)
            if len(blocked) > 3:  # enough different routes looked at for one turn
                return None
        return None


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
        on_started: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_started: called after starts, so that what they sent leaves together."""
        self.me = me
        self.on_started = on_started
        self.slots = slots
        self.in_service = in_service
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

    def admit(self, segment: Segment, sink: Sink) -> Ticket:
        """Takes one request in or refuses it now; never blocks.

        The sink gets its answer, whatever becomes of it. Raises QueueFull when there is no room,
        NoTimeLeft when its deadline has passed, Draining after `close`.
        """
        ticket = self._ticket(segment, sink)
        with self._lock:
            self._check_open()
            self._room.admit_locked(ticket)
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

    def _ticket(self, segment: Segment, sink: Sink) -> Ticket:
        now = self._clock()
        if segment.deadline <= now:
            raise NoTimeLeft("the deadline had passed when the request came")
        return Ticket(segment, sink, now, next(self._numbers), self)

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
            if place is not _EXPIRED:
                self._room.discard_locked(ticket)
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
        if place is not _EXPIRED:
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
        if self._active >= self.in_service:
            return None
        place = self._claim(ticket.segment.route, 1, ticket.patient_until, False)
        if place is not None:
            self._active += 1
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
                self._active -= count
            else:
                lane.active -= count


class _Expired:
    count = 0


_EXPIRED = _Expired()
