"""Where requests wait: bounded rooms in front of a bounded service.

    admit  --> [ waiting room, at most `slots` ] --+--claim--> [ in service, at most `in_service` ]
                 refused at once when full         |            ends by answer, deadline, cancel
    stream --> [ a lane per stream, its window ] --+--claim--> [ in service, against credit ]

The room and the lanes take turns, so that neither a bulk of streamed requests nor a crowd of single
ones starves the other. Who finds a place when it comes starts, whatever else waits. Only who found
none is judged: whether there is room to wait, and whether it can be answered in time;
overlay.queueing.admission decides both.

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
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from overlay.model import clocks as time
from overlay.model.errors import Draining, NoTimeLeft, OverlayError
from overlay.model.pending import PendingRows, Run
from overlay.model.segments import (
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
from overlay.queueing import admission
from overlay.queueing.admission import HIGHEST_PRIORITY, Callers, Lately, Seen, Shares
from overlay.queueing.fair_queue import NO_SHARE, FairQueue, Flow, NoPlace, Place, ServiceClass

log = logging.getLogger("overlay.intake")

SAMPLE_S = 0.001  # between two ends that are noted: enough to know a pace, where they are many
MAX_KINDS = 1000  # routes are few, but a caller may name any targets
OF_LATE = 16  # ends that make up the mean of how long a place is held
MAX_HANDLERS = 1000  # as many are known to have been asked for of late


Claim = Callable[[Route, int, float, bool], "Place | None"]
"""(route, rows, patient until, streamed) -> places for some of the rows; None when there is none,
or AWAITED."""

Start = Callable[[Segment, Any, float, Sink], End]
"""(rows, their places, seconds waited, sink) -> how to end them."""

Took = Callable[["QueuedSegment", int, Answers, "float | None", float], None]
"""(ticket, so many of its rows, what came of them, when they started, when that came). None: they
never started."""


class QueuedSegment:
    """One segment's stay, from admission to its last answer. Times are monotonic seconds."""

    def __init__(
        self,
        segment: Segment,
        sink: Sink,
        now: float,
        number: int,
        intake: RequestQueue,
        lane: Flow[QueuedSegment],
        kind: ServiceClass,
        wants: Route,
        priority: int = 0,
    ):
        self.segment = segment
        self.route = segment.route
        self.wants = wants
        self.lane = lane
        self.kind = kind
        self.own = kind.pace_of(admission.size_class(segment.payloads.size // segment.count))
        self.found_none = False  # as of its lane; guarded by the intake's lock, as is the next
        self.is_parked = False  # it had to wait for a place: so its time is the intake's to judge
        self.priority = priority
        self.urgency = admission.urgency(now, priority)
        self.admitted = now
        self.number = number
        self.unstarted = PendingRows(segment.count)  # guarded by the intake's lock
        self.patient_until = (now + segment.deadline) / 2
        self.is_read = False  # in chunks: so its time is its reader's, and no pace to go by
        self._sink = sink
        self._intake = intake
        self._lock = threading.Lock()
        self._open = PendingRows(segment.count)
        self._ends: list[tuple[int, int, End]] = []
        self._ended: list[tuple[Code, int, int]] = []
        self._starts: list[tuple[int, int, float]] = []  # (first row, rows, when they started)

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
        self._settle_runs(
            self._intake._withdraw(self, start, count), _unstarted(self._intake.me, code)
        )
        with self._lock:
            self._ended.append((code, start, count))
            ends = list(self._ends)
        for first, rows, end in ends:
            end_overlap(end, first, rows, code, start, count)

    def refuse(self, error: OverlayError, start: int = 0) -> None:
        """Answers every row from `start` that has not started with this refusal."""
        runs = self._intake._withdraw(self, start, self.segment.count - start)
        self._settle_runs(runs, refusal(self._intake.me, error))

    def started(self, row: int) -> float | None:
        """When the row did, which has ended; None when it never did."""
        for first, rows, started in list(self._starts):
            if first <= row < first + rows:
                return started
        return None

    def _settle_runs(self, runs: list[Run], refused: Part) -> None:
        for first, rows in runs:
            answers = Answers(rows, (), refused=refused)
            self._intake.took(self, rows, answers, None, self._intake._clock())
            self._settle(first, answers)

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
        still_in_service = PendingRows(count)

        def sink(row: int, answers: Answers) -> None:
            with self._lock:
                before = still_in_service.left
                still_in_service.take(row, answers.count)
                left = before - still_in_service.left
            if left:  # else they had ended before
                came = intake._release(self, left, now, answers)
                intake.took(self, left, answers, now, came)
            self._settle(first + row, answers)
            intake.kick()

        rows = self.segment.slice(first, count)
        self._starts.append((first, count, now))
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


def _unstarted(me: str, code: Code) -> Part:
    """What the callers of rows get that were ended before they started."""
    if code is Code.DEADLINE_EXCEEDED:
        reason = "no time left: the deadline passed in the queue, before any handler started"
        return Part(me, NoTimeLeft.code, reason, executed=Executed.NO)
    return Part(me, code, "the caller left while the request waited", executed=Executed.NO)


class WaitingRoom(queue.Queue["QueuedSegment"]):
    """The bounded queue of single requests, a lane for each caller that has some.

    They take turns with what waits on streams: `turns` has both. Its `mutex` is the intake's one
    lock.
    """

    def __init__(self, slots: int, most_bytes: int) -> None:
        super().__init__(slots)
        self.most_bytes = most_bytes

    def _init(self, maxsize: int) -> None:
        self.turns: FairQueue[QueuedSegment] = FairQueue()
        self._lanes: dict[Caller, Flow[QueuedSegment]] = {}
        self._handlers_lately: Lately[str] = Lately(MAX_HANDLERS)
        self._addresses: Counter[str] = Counter()
        self._handlers: Counter[str] = Counter()
        self._count = 0
        self._bytes = 0

    def _qsize(self) -> int:
        return self._count

    def _put(self, item: QueuedSegment) -> None:
        caller = item.lane.caller
        self._lanes[caller] = item.lane
        self._addresses[caller.address] += 1
        self._handlers[item.wants.handler] += 1
        self.turns.put(item.lane, item)
        self._count += 1
        self._bytes += item.segment.payloads.size

    def _get(self) -> QueuedSegment:
        ticket = min((t for lane in self._lanes.values() for t in lane), key=_number)
        self.start_locked(ticket)
        return ticket

    def lane_locked(self, caller: Caller) -> Flow[QueuedSegment]:
        return self._lanes.get(caller) or Flow(caller)

    def put_locked(self, ticket: QueuedSegment) -> None:
        """For as long as it takes to see whether it starts at once."""
        self._put(ticket)

    def check_locked(self, ticket: QueuedSegment, seen: Seen) -> None:
        """Raises QueueFull when the ticket, which is in already, has no room to wait."""
        size, waiting = ticket.segment.payloads.size, self._count - 1
        handler, address = ticket.wants.handler, seen.flow.address
        others = self._handlers_lately.seen(handler, ticket.admitted)
        held = self._bytes - size
        admission.check_room(waiting, self.maxsize, held, size, self.most_bytes)
        if seen.has_neighbours:
            of_address = self._addresses[address] - 1
            admission.check_share(of_address, waiting, self.maxsize, "this machine")
        if seen.has_rivals:
            admission.check_share(ticket.lane.rows - 1, waiting, self.maxsize)
        if others:
            of_handler = self._handlers[handler] - 1
            admission.check_share_of_handler(of_handler, waiting, self.maxsize)

    def start_locked(self, ticket: QueuedSegment) -> None:
        """Takes it out: it is its caller's turn."""
        self.turns.took(ticket.lane, ticket)
        self._forget(ticket)

    def discard_locked(self, ticket: QueuedSegment) -> None:
        """Takes it out: nobody waits for it any more."""
        self.turns.less(ticket.lane, ticket)
        self._forget(ticket)

    def _forget(self, ticket: QueuedSegment) -> None:
        caller = ticket.lane.caller
        if not ticket.lane.rows:
            del self._lanes[caller]
        _one_less(self._addresses, caller.address)
        _one_less(self._handlers, ticket.wants.handler)
        self._count -= 1
        self._bytes -= ticket.segment.payloads.size


def _number(ticket: QueuedSegment) -> int:
    return ticket.number


def _one_less(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]  # nothing is kept of those who have nothing waiting


class _Taken(NamedTuple):
    """Rows whose turn it is, with their places."""

    ticket: QueuedSegment
    first: int
    place: Place
    now: float

    def settle(self, start: Start) -> None:
        self.ticket._run(start, self.first, self.place, self.now)


class _Refused(NamedTuple):
    """Rows that were taken out and never start, and what their callers are told."""

    ticket: QueuedSegment
    runs: list[Run]
    part: Part

    def settle(self, start: Start) -> None:
        self.ticket._settle_runs(self.runs, self.part)


class RequestQueue:
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
        default_handler: str = "",
        on_started: Callable[[], None] = lambda: None,
        took: Took = lambda ticket, rows, answers, started, ended: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """of_a_team: how many of the places in service those who name one team may have.

        way_home_s: what the processes below keep back of a request's time; nobody works in it.
        default_handler: what a request without a handler's name runs, where that is the same on all
        workers.
        on_started: called after starts, so that what they sent leaves together.
        took: is told of every row once, when it has ended.
        """
        self.me = me
        self.on_started = on_started
        self.took = took
        self.held_s = 0.0  # how long a place was held of late, about
        self.slots = slots
        self.in_service = in_service
        self._way_home_s = way_home_s
        self._default_handler = default_handler
        self._room = WaitingRoom(slots, most_bytes)
        self._lock = self._room.mutex
        self._turns = self._room.turns
        self._lanes: list[Flow[QueuedSegment]] = []  # of the streams
        self._claim = claim
        self._start = start
        self._clock = clock
        self._numbers = itertools.count()
        self._callers = Callers()
        self._shares = Shares(in_service, of_a_team or in_service)  # single requests in service
        self._kinds: OrderedDict[Route, ServiceClass] = OrderedDict()
        self._fresh: dict[QueuedSegment, None] = {}  # streamed ones that no kick has looked at
        self._draining = False
        self._pumping = threading.local()

    @property
    def waiting(self) -> int:
        """Single requests in the queue; streamed ones wait in their windows."""
        return self._room.qsize()

    @property
    def active(self) -> int:
        """Single requests in service."""
        return self._shares.taken

    @property
    def streamed(self) -> tuple[int, int, int]:
        """Streams open, their requests waiting, their requests in service."""
        with self._lock:
            waiting = sum(lane.rows for lane in self._lanes)
            return len(self._lanes), waiting, sum(lane.active for lane in self._lanes)

    def admit(
        self, segment: Segment, sink: Sink, caller: Caller = NOBODY, priority: int = 0
    ) -> QueuedSegment:
        """Takes one request in or refuses it now; never blocks.

        The sink gets its answer, whatever becomes of it. Who finds a place starts. Raises QueueFull
        when there is none and no room to wait, NoTimeLeft when its deadline has passed or it cannot
        be answered before it, Draining after `close`.
        """
        now = self._clock()
        _check_left(segment, now)
        refused: OverlayError | None = None
        with self._lock:
            self._check_open()
            seen = self._callers.seen(caller, now)
            lane = self._room.lane_locked(seen.flow)
            ticket = self._ticket_locked(segment, sink, now, lane, priority)
            self._room.put_locked(ticket)
            taken = self._take_all_locked(now)
            if ticket.unstarted.left:
                try:
                    self._judge_locked(ticket, seen)
                except OverlayError as e:
                    refused = e
                    self._withdraw_locked(ticket, 0, 1)
        if taken:
            self._run(taken)
        if refused is not None:
            raise refused
        return ticket

    def open_lane(self, caller: Caller = NOBODY) -> Flow[QueuedSegment]:
        """A lane for one stream of this caller's, until `close_lane`."""
        with self._lock:
            flow = self._callers.seen(caller, self._clock()).flow
            lane: Flow[QueuedSegment] = Flow(flow, is_stream=True)
            self._lanes.append(lane)
        return lane

    def close_lane(self, lane: Flow[QueuedSegment]) -> None:
        with self._lock:
            self._lanes.remove(lane)

    def admit_to(
        self, lane: Flow[QueuedSegment], segment: Segment, sink: Sink, priority: int = 0
    ) -> QueuedSegment:
        """Takes a streamed segment in; its stream bounds how many. Raises NoTimeLeft, Draining.

        It starts with the next `kick`, so that the segments of a frame start together. Those of its
        rows that find no place then, and cannot be answered in time, are refused, the last first.
        """
        now = self._clock()
        _check_left(segment, now)
        with self._lock:
            self._check_open()
            ticket = self._ticket_locked(segment, sink, now, lane, priority)
            self._turns.put(lane, ticket, segment.count)
            self._fresh[ticket] = None
        return ticket

    def kick(self) -> None:
        """Starts whatever can start now. Called when a place may have become free."""
        if not self._turns:
            return
        # A start may answer at once and so kick again: that goes on in this loop, not deeper.
        if getattr(self._pumping, "on", False):
            self._pumping.again = True
            return
        self._run([])

    def close(self) -> int:
        """Refuses what waits and all that comes; what has started goes on. The number refused."""
        with self._lock:
            self._draining = True
            waiting = list(self._turns)
            refused = sum(ticket.unstarted.left for ticket in waiting)
        for ticket in waiting:
            ticket.refuse(Draining(f"{self.me} is stopping; the request had not started"))
        return refused

    def _ticket_locked(
        self, segment: Segment, sink: Sink, now: float, lane: Flow[QueuedSegment], priority: int
    ) -> QueuedSegment:
        wants = admission.wants(segment.route, self._default_handler)
        kind, priority = self._kind_of(wants), min(priority, HIGHEST_PRIORITY)
        return QueuedSegment(
            segment, sink, now, next(self._numbers), self, lane, kind, wants, priority
        )

    def _judge_locked(self, ticket: QueuedSegment, seen: Seen) -> None:
        """Raises why a single request that did not start at once may not wait either."""
        self._room.check_locked(ticket, seen)
        if self._park_locked(ticket):
            self._check_time_locked(ticket, -1)

    def _park_locked(self, ticket: QueuedSegment) -> bool:
        """Whether it waits for a place, and not for a neighbour to come back."""
        if ticket.lane.paused or not self._turns.found_none(ticket.lane, ticket):
            return False
        ticket.is_parked = True
        ticket.kind.park(ticket.admitted)
        return True

    def _unpark_locked(self, ticket: QueuedSegment, now: float) -> None:
        if ticket.is_parked and not ticket.unstarted.left:
            ticket.is_parked = False
            ticket.kind.unpark(now)

    def _check_time_locked(self, ticket: QueuedSegment, before: int) -> None:
        """before: see `_way_locked`."""
        kind, now = ticket.kind, ticket.admitted
        share = admission.share_of_time(now - kind.refused)
        try:
            ahead, needs_s = self._way_locked(ticket, before)
            admission.check_time(self._left_s(ticket, now), ahead, needs_s, share)
        except NoTimeLeft:
            kind.refused = now
            raise

    def _way_locked(self, ticket: QueuedSegment, before: int) -> tuple[int, float]:
        """How many start before it, and how long its answer takes.

        before: how many of its line's rows are before it, beyond those in the line.
        """
        kind, now = ticket.kind, ticket.admitted
        ahead = self._turns.ahead_of(ticket.lane, kind, ticket.priority, before)
        at_work, mean_s = max(kind.active, kind.pace.at_work), kind.pace.mean_s(now)
        return ahead, admission.takes_s(ahead, at_work, mean_s, ticket.own.own_s(now))

    def _judge_fresh_locked(self) -> list[_Refused]:
        """Takes out the streamed rows that found no place and cannot be answered in time."""
        refused = []
        after = Counter[
            tuple[Flow[QueuedSegment], ServiceClass, int]
        ]()  # rows of a line from the one judged on
        for ticket in self._fresh:
            after[ticket.lane, ticket.kind, ticket.priority] += ticket.unstarted.left
        for ticket in list(self._fresh):
            line = ticket.lane, ticket.kind, ticket.priority
            in_time, hopeless = self._in_time_locked(ticket, after[line])
            after[line] -= ticket.unstarted.left
            if hopeless is not None:
                runs = self._withdraw_locked(ticket, in_time, ticket.segment.count - in_time)
                refused.append(_Refused(ticket, runs, refusal(self.me, hopeless)))
        self._fresh.clear()
        return refused

    def _in_time_locked(self, ticket: QueuedSegment, after: int) -> tuple[int, NoTimeLeft | None]:
        """How many rows of the segment can be answered in time, and what to tell the others.

        after: how many rows its line has from its first one on. It takes proof to refuse any, since
        thousands may come at once: some of its kind have ended lately.
        """
        rows, kind = ticket.segment.count, ticket.kind
        if not self._park_locked(ticket) or not kind.pace.is_proven(ticket.admitted):
            return rows, None
        first, _ = ticket.unstarted.first_run() or (0, 0)
        if self._way_locked(ticket, -after)[0] <= 0:
            return rows, None
        share = admission.share_of_time(ticket.admitted - kind.refused)
        most_s = share * self._left_s(ticket, ticket.admitted)

        def is_late(row: int) -> bool:
            return self._way_locked(ticket, row - first - after)[1] > most_s

        try:
            self._check_time_locked(ticket, rows - 1 - first - after)
        except NoTimeLeft as e:
            return first + bisect.bisect_left(range(first, rows - 1), True, key=is_late), e
        return rows, None

    def _kind_of(self, wants: Route) -> ServiceClass:
        kinds = self._kinds
        kind = kinds.get(wants)
        if kind is None:
            kind = kinds[wants] = ServiceClass()
            # Those that are idle judge nobody; those in use are as many as what waits and runs.
            for _ in range(min(2, len(kinds) - MAX_KINDS)):
                oldest, found = next(iter(kinds.items()))
                if found.is_idle and found is not kind:
                    del kinds[oldest]
                else:
                    kinds.move_to_end(oldest)
        elif len(kinds) > 1:
            kinds.move_to_end(wants)
        return kind

    def _check_open(self) -> None:
        if self._draining:
            raise Draining(f"{self.me} is stopping and takes no new requests")

    def _run(self, taken: list[_Taken | _Refused]) -> None:
        """Starts these, and whatever else can start."""
        here = self._pumping
        if getattr(here, "on", False):
            here.taken.extend(taken)
            here.again = True
            return
        here.on, here.again, here.taken = True, True, deque(taken)
        try:
            self._pump(here)
        finally:
            here.on = False
            self.on_started()

    def _pump(self, here: Any) -> None:
        while here.taken or here.again:
            here.again = False
            while here.taken:
                here.taken.popleft().settle(self._start)
            while taken := self._take():
                for found in taken:
                    found.settle(self._start)

    def _take(self) -> list[_Taken | _Refused]:
        """The next rows to start, from the room and the lanes in turn; and those that never can."""
        if not self._turns:
            return []
        with self._lock:
            taken = self._take_locked(self._clock())
            if taken is not None:
                return [taken]
            return [*self._judge_fresh_locked()] if self._fresh else []

    def _take_all_locked(self, now: float) -> list[_Taken | _Refused]:
        found = []
        while (taken := self._take_locked(now)) is not None:
            found.append(taken)
        return found

    def _take_locked(self, now: float) -> _Taken | _Refused | None:
        if not self._turns:
            return None
        taken = self._turns.next(lambda ticket: self._claim_locked(ticket, now))
        if taken is None:
            return None
        ticket, place = taken
        if place is _EXPIRED or place is _HOPELESS:
            part = _unstarted(self.me, Code.DEADLINE_EXCEEDED)
            if place is _HOPELESS:
                part = refusal(self.me, NoTimeLeft(_TOO_LATE))
            return _Refused(ticket, self._withdraw_locked(ticket, 0, ticket.segment.count), part)
        first, _ = ticket.unstarted.first_run() or (0, 0)
        self._begin_locked(ticket, first, place.count, now)
        return _Taken(ticket, first, place, now)

    def _claim_locked(self, ticket: QueuedSegment, now: float) -> Place | None:
        if ticket.segment.deadline <= now:
            return _EXPIRED  # dropped at dequeue: no handler shall work for nobody
        if not ticket.lane.is_stream and not self._shares.allow(*_holder(ticket)):
            return None if self._shares.is_full else NO_SHARE
        if ticket.is_parked and self._is_hopeless_locked(ticket, now):
            return _HOPELESS
        _, rows = ticket.unstarted.first_run() or (0, 0)
        return self._claim(ticket.route, rows, ticket.patient_until, ticket.lane.is_stream)

    def _is_hopeless_locked(self, ticket: QueuedSegment, now: float) -> bool:
        """Whether its place is of more use to another one, that waits for it too."""
        if ticket.kind.waiting <= ticket.unstarted.left:
            return False  # nobody else would have the place
        return ticket.own.is_too_little(now, self._left_s(ticket, now))

    def _left_s(self, ticket: QueuedSegment, now: float) -> float:
        """What a worker gets of its time, about."""
        left_s = ticket.segment.deadline - now
        return left_s - min(self._way_home_s, left_s / 2)

    def _begin_locked(self, ticket: QueuedSegment, first: int, count: int, now: float) -> None:
        ticket.unstarted.take(first, count)
        ticket.kind.active += count
        self._unpark_locked(ticket, now)
        if ticket.lane.is_stream:
            ticket.lane.active += count
            self._turns.took(ticket.lane, ticket, count)
            self._not_fresh_locked(ticket)
        else:
            self._shares.take(*_holder(ticket))
            self._room.start_locked(ticket)

    def _withdraw(self, ticket: QueuedSegment, start: int, count: int) -> list[Run]:
        """Takes out what has not started of these rows, so that it never will."""
        with self._lock:
            return self._withdraw_locked(ticket, start, count)

    def _withdraw_locked(self, ticket: QueuedSegment, start: int, count: int) -> list[Run]:
        runs = ticket.unstarted.take(start, count)
        if not runs:
            return runs
        self._unpark_locked(ticket, self._clock())
        if ticket.lane.is_stream:
            self._turns.less(ticket.lane, ticket, sum(rows for _, rows in runs))
            self._not_fresh_locked(ticket)
        else:
            self._room.discard_locked(ticket)
        return runs

    def _not_fresh_locked(self, ticket: QueuedSegment) -> None:
        if not ticket.unstarted.left:
            self._fresh.pop(ticket, None)

    def _release(
        self, ticket: QueuedSegment, count: int, started: float, answers: Answers
    ) -> float:
        """Gives the places of so many rows back. When that was."""
        is_pace = not ticket.is_read and answers.is_worked_for
        is_lost = not is_pace and answers.is_too_late
        with self._lock:
            kind, now = ticket.kind, self._clock()
            if ticket.lane.is_stream:
                ticket.lane.active -= count
            else:
                self._shares.give_back(*_holder(ticket))
            if is_pace and now - kind.pace.last >= SAMPLE_S:
                kind.pace.ended(now, now - started, kind.active)
                ticket.own.ended(now, now - started)
            elif is_lost:
                ticket.own.lost(now, now - started)
            kind.active -= count
            held_s = now - started
            self.held_s += (held_s - self.held_s) / OF_LATE if self.held_s else held_s
        return now


def _holder(ticket: QueuedSegment) -> tuple[str, str, str]:
    """Who holds its place: address, handler and team."""
    return ticket.lane.caller.address, ticket.wants.handler, ticket.wants.team


def _check_left(segment: Segment, now: float) -> None:
    if segment.deadline <= now:
        raise NoTimeLeft("the deadline had passed when the request came")


_TOO_LATE = "no time left: even the quickest of late took longer"
_EXPIRED, _HOPELESS = NoPlace(), NoPlace()
"""Instead of places: its deadline has passed; what is left of its time is not enough."""
