"""Where requests wait: a bounded queue in front of a bounded service.

    admit --> [ waiting room, at most `slots` ] --claim--> [ in service, at most `in_service` ]
                 refused at once when full                 ends by answer, deadline or cancel

Owns no thread. Whoever changes something (a request comes, one ends, a link comes up: `kick`) lets
the next ones start, on its own thread. `claim` decides under the lock and must be quick; `start`
acts outside it.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from overlay import admission
from overlay.errors import Draining, NoTimeLeft, OverlayError, QueueFull
from overlay.values import Answer, Code, End, Executed, Part, Segment, Sink

Claim = Callable[["Ticket"], "object | None"]
Start = Callable[[Segment, Any, Sink], End]


class Ticket:
    """One segment's stay, from admission to its last answer. Times are monotonic seconds."""

    def __init__(self, segment: Segment, sink: Sink, admitted: float, number: int, intake: Intake):
        self.segment = segment
        self.admitted = admitted
        self.started: float | None = None
        self.number = number
        self._sink = sink
        self._intake = intake
        self._lock = threading.Lock()
        self._unanswered = set(range(len(segment)))
        self._end: End | None = None
        self._end_code: Code | None = None

    def end(self, code: Code) -> None:
        """Ends the stay: a waiting ticket leaves the queue, a started one is cut short.

        Whatever is still unanswered is answered with `code` at once. Nothing happens after the end.
        """
        if not self._unanswered:
            return
        if self._intake._withdraw(self):
            self._settle_all(_unstarted(self._intake.me, code))
            return
        with self._lock:
            self._end_code = self._end_code or code
            end = self._end
        if end:
            end(code)

    def refuse(self, error: OverlayError) -> None:
        part = Part(self._intake.me, error.code, str(error), executed=error.executed)
        self._settle_all(Answer((), refused=part))

    def waited_s(self, now: float) -> float:
        return (self.started or now) - self.admitted

    def _take_answers(self, start: int, answers: Sequence[Answer]) -> None:
        indices = set(range(start, start + len(answers)))
        with self._lock:
            if not indices <= self._unanswered:
                return
            self._unanswered -= indices
            left = len(self._unanswered)
        self._intake._release(len(answers))
        self._sink(start, answers)
        if not left:
            self._end = None
        self._intake.kick()

    def _settle_all(self, answer: Answer) -> None:
        with self._lock:
            open_ones, self._unanswered = sorted(self._unanswered), set()
        for index in open_ones:
            self._sink(index, (answer,))

    def _run(self, start: Start, claim: object) -> None:
        end = start(self.segment, claim, self._take_answers)
        with self._lock:
            self._end = end
            code = self._end_code
        if code is not None:  # it was ended between its claim and now
            end(code)


def _unstarted(me: str, code: Code) -> Answer:
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        return Answer((), refused=Part(me, NoTimeLeft.code, reason, executed=Executed.NO))
    reason = "the caller left while the request waited"
    return Answer((), refused=Part(me, code, reason, executed=Executed.NO))


class WaitingRoom(queue.Queue["Ticket"]):
    """The bounded queue, in lanes: first in, first out among requests that want the same places.

    `take` gives the oldest ticket that can start now; one that waits for a busy team does not hold
    up those of another.
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
        self._count += len(item.segment)
        self._bytes += item.segment.size

    def _get(self) -> Ticket:
        return self._remove(min((lane[0] for lane in self._lanes.values()), key=_number))

    def admit(self, ticket: Ticket) -> None:
        """Puts the ticket in or raises QueueFull; never waits."""
        with self.mutex:
            size = ticket.segment.size
            admission.check_room(self._count, self.maxsize, self._bytes, size, self.most_bytes)
            self._put(ticket)

    def take(self, claim: Claim) -> tuple[Ticket, object] | None:
        """The oldest ticket for which `claim` gives a place, with that place; else None."""
        with self.mutex:
            blocked: list[Ticket] = []
            for ticket in sorted((lane[0] for lane in self._lanes.values()), key=_number):
                route = ticket.segment.route
                if not all(admission.may_overtake(route, b.segment.route) for b in blocked):
                    continue
                place = claim(ticket)
                if place is not None:
                    return self._remove(ticket), place
                blocked.append(ticket)
            return None

    def discard(self, ticket: Ticket) -> bool:
        """Takes a ticket out; False when it is not here any more."""
        with self.mutex:
            lane = self._lanes.get(admission.lane(ticket.segment.route), ())
            if ticket not in lane:
                return False
            self._remove(ticket)
            return True

    def empty_out(self) -> list[Ticket]:
        with self.mutex:
            tickets = sorted((t for lane in self._lanes.values() for t in lane), key=_number)
            for ticket in tickets:
                self._remove(ticket)
            return tickets

    def _remove(self, ticket: Ticket) -> Ticket:
        key = admission.lane(ticket.segment.route)
        lane = self._lanes[key]
        lane.remove(ticket)
        if not lane:
            del self._lanes[key]
        self._count -= len(ticket.segment)
        self._bytes -= ticket.segment.size
        return ticket


def _number(ticket: Ticket) -> int:
    return ticket.number


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self.slots = slots
        self.in_service = in_service
        self._room = WaitingRoom(slots, most_bytes)
        self._claim = claim
        self._start = start
        self._clock = clock
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._active = 0
        self._draining = False
        self._pumping = threading.local()

    @property
    def waiting(self) -> int:
        return self._room.qsize()

    @property
    def active(self) -> int:
        return self._active

    def admit(self, segment: Segment, sink: Sink) -> Ticket:
        """Takes the segment in or refuses it now; never blocks.

        The sink gets an answer for each item, whatever becomes of it. Raises QueueFull when there
        is no room, NoTimeLeft when its deadline has passed, Draining after `close`.
        """
        now = self._clock()
        if self._draining:
            raise Draining(f"{self.me} is stopping and takes no new requests")
        if segment.deadline <= now:
            raise NoTimeLeft("the deadline had passed when the request came")
        ticket = Ticket(segment, sink, now, next(self._numbers), self)
        self._room.admit(ticket)
        if self._draining and self._room.discard(ticket):  # close() came in between
            raise Draining(f"{self.me} is stopping and takes no new requests")
        self.kick()
        return ticket

    def kick(self) -> None:
        """Starts whatever can start now. Called when a place may have become free."""
        # A start may answer at once and so kick again: that goes on in this loop, not deeper.
        if getattr(self._pumping, "on", False):
            self._pumping.again = True
            return
        self._pumping.on = True
        try:
            self._pump()
        finally:
            self._pumping.on = False

    def close(self) -> int:
        """Refuses what waits and all that comes; what has started goes on. The number refused."""
        self._draining = True
        refused = self._room.empty_out()
        for ticket in refused:
            ticket.refuse(Draining(f"{self.me} is stopping; the request had not started"))
        return len(refused)

    def _pump(self) -> None:
        self._pumping.again = True
        while self._pumping.again:
            self._pumping.again = False
            while (taken := self._room.take(self._claim_place)) is not None:
                ticket, place = taken
                if place is _EXPIRED:
                    ticket._settle_all(_unstarted(self.me, Code.DEADLINE_EXCEEDED))
                else:
                    ticket._run(self._start, place)

    def _claim_place(self, ticket: Ticket) -> object | None:
        now = self._clock()
        if ticket.segment.deadline <= now:
            return _EXPIRED  # dropped at dequeue: no handler shall work for nobody
        with self._lock:
            if self._active + len(ticket.segment) > self.in_service:
                return None
            place = self._claim(ticket)
            if place is not None:
                self._active += len(ticket.segment)
                ticket.started = now
            return place

    def _withdraw(self, ticket: Ticket) -> bool:
        return self._room.discard(ticket)

    def _release(self, count: int) -> None:
        with self._lock:
            self._active -= count


_EXPIRED = object()

__all__ = ["Intake", "QueueFull", "Ticket", "WaitingRoom"]
