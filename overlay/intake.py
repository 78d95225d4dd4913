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

import bisect
import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

from overlay import admission
from overlay.admission import HIGHEST_PRIORITY, Callers
from overlay.errors import Draining, NoTimeLeft, OverlayError
from overlay.lanes import Kind, Lane, NoPlace, Place, Turns
from overlay.rows import OpenRows, Run
from overlay.values import (
    NOBODY,
    Answers,
    Caller,
    Code,
    End,
    Executed,
    Part,
    Route,
    Segment,
    Sink,
    end_overlap,
)

log = logging.getLogger("overlay.intake")

SAMPLE_S = 0.001  # between two streamed rows whose time is noted: enough to know a pace
MOST_KINDS = 1000  # routes are few, but a caller may name any targets


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
        lane: Lane[Ticket],
        kind: Kind,
        priority: int = 0,
    ):
        self.segment = segment
        self.route = segment.route
        self.lane = lane
        self.kind = kind
        self.priority = priority
        self.urgency = admission.urgency(now, priority)
        self.admitted = now
        self.started: float | None = None
        self.number = number
        self.unstarted = OpenRows(segment.count)  # guarded by the intake's lock
        self.patient_until = (now + segment.deadline) / 2
        self.is_read = False  # in pieces: so its time is its reader's, and no pace to go by
        self._sink = sink
        self._intake = intake
        self._lock = threading.Lock()
        self._open = OpenRows(segment.count)
        self._ends: list[tuple[int, int, End]] = []
        self._ended: list[tuple[Code, int, int]] = []

    @property
    def is_handed_down(self) -> bool:
        """By another process, which has judged of its time."""
        return self.route.targets is not None

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

    def refuse(self, error: OverlayError, start: int = 0) -> None:
        """Answers every row from `start` that has not started with this refusal."""
        part = refusal(self._intake.me, error)
        for first, rows in self._intake._withdraw(self, start, self.segment.count - start):
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
            intake._release(self, left, now)
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


def refusal(me: str, error: OverlayError) -> Part:
    """What the callers of rows get that `me` turned down with this."""
    return Part(
        me,
        error.code,
        str(error),
        executed=error.executed,
        retry_after_s=error.retry_after_s,
    )


def _unstarted(me: str, code: Code, rows: int) -> Answers:
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        part = Part(me, NoTimeLeft.code, reason, executed=Executed.NO)
    else:
        part = Part(me, code, "the caller left while the request waited", executed=Executed.NO)
    return Answers(rows, (), refused=part)


class WaitingRoom(queue.Queue["Ticket"]):
    """The bounded queue of single requests, a lane for each caller that has some.

    They take turns with what waits on streams: `turns` has both. Its `mutex` is the intake's one
    lock.
    """

    def __init__(self, slots: int, most_bytes: int) -> None:
        super().__init__(slots)
        self.most_bytes = most_bytes

    def _init(self, maxsize: int) -> None:
        self.turns: Turns[Ticket] = Turns()
        self._lanes: dict[Caller, Lane[Ticket]] = {}
        self._lately = Callers()
        self._count = 0
        self._bytes = 0

    def _qsize(self) -> int:
        return self._count

    def _put(self, item: Ticket) -> None:
        self._lanes[item.lane.caller] = item.lane
        self.turns.put(item.lane, item)
        self._count += 1
        self._bytes += item.segment.payloads.size

    def _get(self) -> Ticket:
        ticket = min((t for lane in self._lanes.values() for t in lane), key=_number)
        self.start_locked(ticket)
        return ticket

    def lane_locked(self, caller: Caller) -> Lane[Ticket]:
        return self._lanes.get(caller) or Lane(caller)

    def has_rivals_locked(self, ticket: Ticket) -> bool:
        """Notes its caller; whether others have come lately too."""
        return self._lately.seen(ticket.lane.caller, ticket.admitted)

    def admit_locked(self, ticket: Ticket, has_rivals: bool) -> None:
        """Puts the ticket in or raises QueueFull."""
        size = ticket.segment.payloads.size
        admission.check_room(self._count, self.maxsize, self._bytes, size, self.most_bytes)
        if has_rivals:
            admission.check_share(ticket.lane.rows, self._count, self.maxsize)
        self._put(ticket)

    def start_locked(self, ticket: Ticket) -> None:
        """Takes it out: it is its caller's turn."""
        self.turns.took(ticket.lane, ticket)
        self._forget(ticket)

    def discard_locked(self, ticket: Ticket) -> None:
        """Takes it out: nobody waits for it any more."""
        self.turns.less(ticket.lane, ticket)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        if not ticket.lane.rows:
            del self._lanes[ticket.lane.caller]
        self._count -= 1
        self._bytes -= ticket.segment.payloads.size


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
        of_a_team: int | None = None,
        way_home_s: float = 0.0,
        on_started: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """of_a_team: how many of the places in service those who name one team may have.

        way_home_s: what the processes below keep back of a request's time; nobody works in it.
        on_started: called after starts, so that what they sent leaves together.
        """
        self.me = me
        self.on_started = on_started
        self.slots = slots
        self.in_service = in_service
        self._of_a_team = of_a_team or in_service
        self._way_home_s = way_home_s
        self._room = WaitingRoom(slots, most_bytes)
        self._lock = self._room.mutex
        self._turns = self._room.turns
        self._lanes: list[Lane[Ticket]] = []  # of the streams
        self._claim = claim
        self._start = start
        self._clock = clock
        self._numbers = itertools.count()
        self._active = 0
        self._kinds: dict[Hashable, Kind] = {}
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
            waiting = sum(lane.rows for lane in self._lanes)
            return len(self._lanes), waiting, sum(lane.active for lane in self._lanes)

    def admit(
        self, segment: Segment, sink: Sink, caller: Caller = NOBODY, priority: int = 0
    ) -> Ticket:
        """Takes one request in or refuses it now; never blocks.

        The sink gets its answer, whatever becomes of it. Raises QueueFull when there is no room,
        NoTimeLeft when its deadline has passed or comes too soon, Draining after `close`.
        """
        now = self._clock()
        _check_left(segment, now)
        with self._lock:
            self._check_open()
            ticket = self._ticket(segment, sink, now, self._room.lane_locked(caller), priority)
            has_rivals = self._room.has_rivals_locked(ticket)
            self._check_time_locked(ticket)
            self._room.admit_locked(ticket, has_rivals)
        self.kick()
        return ticket

    def open_lane(self, caller: Caller = NOBODY) -> Lane[Ticket]:
        """A lane for one stream of this caller's, until `close_lane`."""
        lane: Lane[Ticket] = Lane(caller, is_stream=True)
        with self._lock:
            self._lanes.append(lane)
        return lane

    def close_lane(self, lane: Lane[Ticket]) -> None:
        with self._lock:
            self._lanes.remove(lane)

    def admit_to(
        self, lane: Lane[Ticket], segment: Segment, sink: Sink, priority: int = 0
    ) -> Ticket:
        """Takes a streamed segment in; its stream bounds how many. Raises NoTimeLeft, Draining.

        Rows of it that cannot be answered in time are refused, the last ones first. It starts with
        the next `kick`, so that the segments of a frame start together.
        """
        now = self._clock()
        _check_left(segment, now)
        ticket = self._ticket(segment, sink, now, lane, priority)
        with self._lock:
            self._check_open()
            in_time, hopeless = self._in_time_locked(ticket)
            if hopeless is not None and not in_time:
                raise hopeless
            self._turns.put(lane, ticket, segment.count)
        if hopeless is not None:
            ticket.refuse(hopeless, in_time)
        return ticket

    def kick(self) -> None:
        """Starts whatever can start now. Called when a place may have become free."""
        if not self._turns:
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
            waiting = list(self._turns)
            refused = sum(ticket.unstarted.left for ticket in waiting)
        for ticket in waiting:
            ticket.refuse(Draining(f"{self.me} is stopping; the request had not started"))
        return refused

    def _ticket(
        self, segment: Segment, sink: Sink, now: float, lane: Lane[Ticket], priority: int
    ) -> Ticket:
        kind, priority = self._kind_of(segment.route), min(priority, HIGHEST_PRIORITY)
        return Ticket(segment, sink, now, next(self._numbers), self, lane, kind, priority)

    def _check_time_locked(self, ticket: Ticket, row: int = 0) -> None:
        if not self._turns:
            return
        kind, now = ticket.kind, ticket.admitted
        share = admission.share_of_time(now - kind.refused)
        try:
            admission.check_time(self._left_s(ticket, now), *self._way_locked(ticket, row), share)
        except NoTimeLeft:
            kind.refused = now
            raise

    def _way_locked(self, ticket: Ticket, row: int = 0) -> tuple[int, float]:
        """How many start before this row of it, and how long its answer takes."""
        kind, now = ticket.kind, ticket.admitted
        ahead = self._turns.ahead_of(ticket.lane, kind, ticket.priority, row)
        at_work, mean_s = max(kind.active, kind.pace.at_work), kind.pace.mean_s(now)
        return ahead, admission.takes_s(ahead, at_work, mean_s, kind.pace.ample_s(now))

    def _in_time_locked(self, ticket: Ticket) -> tuple[int, NoTimeLeft | None]:
        """How many rows of the segment can be answered in time, and what to tell the others.

        That takes proof, since thousands may come at once: some of its kind have ended lately, and
        some still wait because no place was free.
        """
        rows, kind, lane = ticket.segment.count, ticket.kind, ticket.lane
        is_proven = kind.is_full and kind.pace.is_proven(ticket.admitted) and not lane.paused
        if not is_proven or ticket.is_handed_down or not self._way_locked(ticket)[0]:
            return rows, None
        share = admission.share_of_time(ticket.admitted - kind.refused)
        most_s = share * self._left_s(ticket, ticket.admitted)

        def is_late(row: int) -> bool:
            return self._way_locked(ticket, row)[1] > most_s

        try:
            self._check_time_locked(ticket, rows - 1)
        except NoTimeLeft as e:
            return bisect.bisect_left(range(rows - 1), True, key=is_late), e
        return rows, None

    def _kind_of(self, route: Route) -> Kind:
        key = admission.places(route)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) > MOST_KINDS:
                self._kinds.clear()  # those in use live on with their tickets
            kind = self._kinds[key] = Kind()
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
        if not self._turns:
            return None
        with self._lock:
            now = self._clock()
            taken = self._turns.next(lambda ticket: self._claim_locked(ticket, now))
            if taken is None:
                return None
            ticket, place = taken
            first, _ = ticket.unstarted.first_run() or (0, 0)
            if place.count:
                self._begin_locked(ticket, first, place.count, now)
            return ticket, first, place, now

    def _claim_locked(self, ticket: Ticket, now: float) -> Place | None:
        if ticket.segment.deadline <= now:
            return _EXPIRED  # dropped at dequeue: no handler shall work for nobody
        if not ticket.lane.is_stream and not self._has_place_locked(ticket.route):
            return None
        # Only of those that had to wait: the others' time is their own to judge.
        if now > ticket.admitted and self._is_hopeless(ticket, now):
            return _HOPELESS
        _, rows = ticket.unstarted.first_run() or (0, 0)
        return self._claim(ticket.route, rows, ticket.patient_until, ticket.lane.is_stream)

    def _has_place_locked(self, route: Route) -> bool:
        """For a single request."""
        if self._active >= self.in_service:
            return False
        return not route.team or self._teams[route.team] < self._of_a_team

    def _is_hopeless(self, ticket: Ticket, now: float) -> bool:
        if ticket.is_handed_down:
            return False
        return self._left_s(ticket, now) < ticket.kind.pace.least_s(now)

    def _left_s(self, ticket: Ticket, now: float) -> float:
        """What a worker gets of its time, about."""
        left_s = ticket.segment.deadline - now
        return left_s - min(self._way_home_s, left_s / 2)

    def _begin_locked(self, ticket: Ticket, first: int, count: int, now: float) -> None:
        ticket.unstarted.take(first, count)
        ticket.started = ticket.started or now
        ticket.kind.active += count
        if ticket.lane.is_stream:
            ticket.lane.active += count
            self._turns.took(ticket.lane, ticket, count)
        else:
            self._active += 1
            self._teams[ticket.route.team] += 1
            self._room.start_locked(ticket)

    def _withdraw(self, ticket: Ticket, start: int, count: int) -> list[Run]:
        """Takes out what has not started of these rows, so that it never will."""
        with self._lock:
            runs = ticket.unstarted.take(start, count)
            if not runs:
                return runs
            if ticket.lane.is_stream:
                self._turns.less(ticket.lane, ticket, sum(rows for _, rows in runs))
            else:
                self._room.discard_locked(ticket)
            return runs

    def _release(self, ticket: Ticket, count: int, started: float) -> None:
        if not count:  # they had ended before
            return
        with self._lock:
            kind, now = ticket.kind, self._clock()
            if ticket.lane.is_stream:
                ticket.lane.active -= count
                is_odd = now - kind.pace.last < SAMPLE_S  # tiny ones end in great numbers
            else:
                self._active -= 1
                self._teams[ticket.route.team] -= 1
                is_odd = False
            if not (is_odd or ticket.is_read):
                kind.pace.ended(now, now - started, kind.active)
            kind.active -= count


def _check_left(segment: Segment, now: float) -> None:
    if segment.deadline <= now:
        raise NoTimeLeft("the deadline had passed when the request came")


_EXPIRED, _HOPELESS = NoPlace(), NoPlace()
"""Instead of places: its deadline has passed; what is left of its time is not enough."""
