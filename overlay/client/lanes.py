"""The lanes of a client: streams straight to workers that the process asked has lent to it.

    take(submission) --> a lane with room --> the worker         one hop
                     or False: it goes the ordinary way, over the process asked

A client whose requests to any one worker are many and short asks for a lease. With a Lease, the
lane connects in the background; until then, and whenever it has no room, requests go the ordinary
way. What a worker provably did not run, or was not sent, goes that way too, so a lane never fails a
request that would not have failed otherwise. A worker that cannot be reached, as behind a firewall,
is not tried again for a while.

Thread-safe. Owns the lanes' channels and submitters, until `close`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from overlay.client.outbox import CallKind, Submission
from overlay.client.submitter import WINDOW_ROWS, Submitter
from overlay.model import clocks as time
from overlay.model.leases import LONGEST_S, MAX_LANES, Lease, LeaseRequest
from overlay.model.segments import Detail, Mode
from overlay.transport.channels import Channel, split
from overlay.transport.codec import MAX_WITHOUT

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at how many requests there are of a kind
MIN_PER_S = 50  # requests, of a kind that is worth a lane
FEW = 5  # after so many it looks at once
MOST_ROWS = 256  # unanswered at a time; more travel well in the large segments of the ordinary way
ASK_S = 0.5  # between two requests for a lease, unless it has twice as many unanswered meanwhile
CONNECT_S = 5.0  # within which a lane must be up
RETRY_S, MAX_RETRY_S = 10.0, 600.0  # until an unreachable worker is tried again; doubles
MAX_CHANNELS = 2 * MAX_LANES  # a channel may be between two lanes
MAX_KINDS = 100  # that are observed at a time
QUICK_S = 0.0005  # of outstanding work with which a lane is still as good as idle

Open = Callable[[str, str], Channel]
"""(address, process id) -> a channel to that process."""


class LaneLoad(NamedTuple):
    """rows, slots: as in Lease. unanswered: requests there. service_s: of one; 0 if unknown."""

    rows: int
    slots: int
    unanswered: int
    service_s: float


def choose(lanes: Sequence[LaneLoad], rows: int) -> int | None:
    """Which lane takes `rows` more; None if there is no room.

    One that is busy but quick keeps getting them, as they share frames; otherwise the one with the
    fewest per slot.
    """
    best: tuple[tuple[bool, float], int] | None = None
    for index, lane in enumerate(lanes):
        if lane.unanswered + rows <= lane.rows:
            is_quick = 0 < lane.unanswered * lane.service_s < QUICK_S
            rank = not is_quick, lane.unanswered / max(1, lane.slots)
            if best is None or rank < best[0]:
                best = rank, index
    return None if best is None else best[1]


class Demanded(NamedTuple):
    """What a client sees of its requests of one kind.

    sent, missed: requests of the last `took_s`, and those of them that found no room on a lane.
    unanswered: now. service_s: of one; 0 if unknown. lanes: the client's, of all kinds. asked: for
    how many unanswered requests it asked for a lease a moment ago; 0: it did not.
    """

    sent: int
    missed: int
    took_s: float
    unanswered: int
    service_s: float
    lanes: int = 0
    asked: int = 0


def wants_lease(seen: Demanded) -> bool:
    """Whether they are many and short, and a lease would take some that have no room now."""
    is_worth_it = seen.missed * 8 > seen.sent >= MIN_PER_S * seen.took_s
    is_short = 0 < seen.service_s <= LONGEST_S and seen.unanswered <= MOST_ROWS
    is_news = not seen.asked or seen.unanswered >= 2 * seen.asked
    return is_worth_it and is_short and is_news and seen.lanes < MAX_LANES


class _Lane:
    """A stream to a lent worker."""

    __slots__ = ("channel", "lease", "rows", "submitter")

    def __init__(self, lease: Lease, channel: Channel, submitter: Submitter) -> None:
        self.lease = lease
        self.rows = lease.rows
        self.channel = channel
        self.submitter = submitter

    def load(self) -> LaneLoad:
        submitter, lease = self.submitter, self.lease
        rows = self.rows if submitter.connected.is_set() else 0
        service_s = submitter.service_s(lease.handler)
        return LaneLoad(rows, lease.slots, submitter.unanswered, service_s)


class _Demand:
    """What is known of the requests of one kind. lanes: those that take them. asked: for how many
    it asked, until ask_at."""

    __slots__ = (
        "ask_at",
        "asked",
        "handler",
        "is_eligible",
        "lanes",
        "missed",
        "sent",
        "since",
        "team",
    )

    def __init__(self, kind: CallKind) -> None:
        route = kind.route
        self.handler, self.team = route.handler, route.team
        self.is_eligible = route.mode is Mode.ANY and not kind.as_they_come
        self.lanes: list[_Lane] = []
        self.sent = self.missed = 0  # since `since`; missed: with no room on a lane
        self.since = time.monotonic()
        self.ask_at, self.asked = 0.0, 0


class Lanes:
    """The lanes of one client, beside its stream `main` to the process asked."""

    def __init__(self, main: Submitter, open_channel: Open) -> None:
        self._main = main
        self._open = open_channel
        self._lock = threading.Lock()
        self._demands: dict[CallKind, _Demand] = {}
        self._last: tuple[CallKind | None, _Demand | None] = None, None
        self._lanes: list[_Lane] = []
        self._channels: dict[tuple[str, str], Channel] = {}
        self._retries: dict[str, tuple[float, float]] = {}  # worker -> not before, then after
        self._closed = False

    @property
    def is_delivering(self) -> bool:
        return any(lane.submitter.is_delivering for lane in self._lanes)

    @property
    def open_rows(self) -> int:
        return sum(lane.submitter.open_rows for lane in self._lanes)

    def take(self, submission: Submission) -> bool:
        """Sends it over a lane; returns False if none has room, or it may not go there."""
        demand = self._demand_of(submission.kind)
        if not demand.is_eligible:
            return False
        rows = len(submission.rows)
        demand.sent += rows
        if demand.sent >= FEW or submission.submitted_at - demand.since > LOOK_S:
            self._look(demand, submission.submitted_at)
        lanes = demand.lanes
        if lanes:
            chosen = choose([lane.load() for lane in lanes], rows)
            if chosen is not None:
                lanes[chosen].submitter.send(submission)
                return True
        demand.missed += rows
        return False

    def cancel(self, submission: Submission, rows: Sequence[int]) -> None:
        for lane in self._lanes:
            lane.submitter.cancel(submission, rows)

    def take_back(self, submission: Submission, failure: Detail) -> int:
        return sum(lane.submitter.take_back(submission, failure) for lane in self._lanes)

    def on_lease(self, lease: Lease) -> None:
        """The process asked, or a worker, says what is lent. Must not block."""
        with self._lock:
            lane = next((one for one in self._lanes if one.lease.id == lease.id), None)
        if lane is not None:
            lane.rows = lease.rows
            lane.submitter.window_rows = _window(lease)
            if not lease.rows:
                self._retire(lane)
        elif lease.rows and lease.worker:
            self._begin(lease)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes, channels = list(self._lanes), list(self._channels.values())
        for lane in lanes:
            lane.submitter.close()
        for channel in channels:
            channel.close()

    def _demand_of(self, kind: CallKind) -> _Demand:
        last_kind, last = self._last
        if last_kind is kind and last is not None:
            return last
        demand = self._demands.get(kind)
        if demand is None:
            with self._lock:
                if len(self._demands) >= MAX_KINDS:
                    self._demands = {k: d for k, d in self._demands.items() if d.lanes}
                demand = self._demands.setdefault(kind, _Demand(kind))
                demand.lanes = [lane for lane in self._lanes if _is_for(lane, demand)]
        self._last = kind, demand
        return demand

    def _look(self, demand: _Demand, now: float) -> None:
        """Asks for a lease if there are enough short requests that have no lane."""
        took_s, sent, missed = now - demand.since, demand.sent, demand.missed
        demand.since, demand.sent, demand.missed = now, 0, 0
        if not missed:
            return
        rows = self._main.unanswered + sum(lane.submitter.unanswered for lane in demand.lanes)
        service_s = self._main.service_s(demand.handler)
        asked = demand.asked if now < demand.ask_at else 0
        if wants_lease(Demanded(sent, missed, took_s, rows, service_s, len(self._lanes), asked)):
            demand.ask_at, demand.asked = now + ASK_S, rows
            without = tuple(worker for worker, (at, _) in self._retries.copy().items() if now < at)
            names = demand.handler, demand.team
            self._main.ask_lease(LeaseRequest(*names, max(1, rows), without[:MAX_WITHOUT]))

    def _begin(self, lease: Lease) -> None:
        now = time.monotonic()
        not_before, _ = self._retries.get(lease.worker, (0.0, 0.0))
        try:
            split(lease.address)
        except ValueError:
            return
        with self._lock:
            if self._closed or now < not_before or len(self._lanes) >= MAX_LANES:
                return
            channel = self._channel_to_locked(lease)
            submitter = Submitter(channel, lease.worker, lease=lease.id)
            lane = _Lane(lease, channel, submitter)
            submitter.window_rows = _window(lease)
            submitter.after_frame = self._after_frame
            submitter.on_lease = self.on_lease
            submitter.hand_back = self._main.send_here
            submitter.on_lost = partial(self._lost, lane)
            submitter.learn(lease.handler, self._main.service_s(lease.handler))
            self._lanes = [*self._lanes, lane]
            for demand in self._demands.values():
                if _is_for(lane, demand):
                    demand.lanes = [*demand.lanes, lane]
        submitter.start()
        self._main.remind(partial(self._check, lane), now + CONNECT_S)

    def _channel_to_locked(self, lease: Lease) -> Channel:
        """Kept when its lane ends, as the next lease may be for the same worker."""
        key = lease.worker, lease.address
        channel = self._channels.get(key)
        if channel is None:
            if len(self._channels) >= MAX_CHANNELS:
                used = [lane.channel for lane in self._lanes]
                idle = next(k for k, found in self._channels.items() if found not in used)
                _soon(self._channels.pop(idle).close)
            channel = self._channels[key] = self._open(lease.address, lease.worker)
        return channel

    def _after_frame(self) -> None:
        if self._main.after_frame is not None:
            self._main.after_frame()

    def _check(self, lane: _Lane) -> None:
        """The time to connect is over."""
        if lane in self._lanes and not lane.submitter.connected.is_set():
            self._lost(lane)

    def _lost(self, lane: _Lane) -> None:
        """The lane's stream has ended, or did not begin."""
        worker, now = lane.lease.worker, time.monotonic()
        if lane.submitter.was_served:
            self._retries.pop(worker, None)
        else:
            _, pause_s = self._retries.get(worker, (0.0, RETRY_S / 2))
            pause_s = min(2 * pause_s, MAX_RETRY_S)
            if len(self._retries) > MAX_KINDS:
                self._retries.clear()
            self._retries[worker] = now + pause_s, pause_s
            log.debug("%s at %s cannot be reached directly", worker, lane.lease.address)
        self._drop(lane)
        _soon(lane.submitter.close)

    def _retire(self, lane: _Lane) -> None:
        """Nothing more is sent on the lane; it is closed when all is answered."""
        self._drop(lane, keeps=True)
        lane.submitter.hand_unsent_back()
        if lane.submitter.open_rows:
            self._main.remind(partial(self._retire, lane), time.monotonic() + LOOK_S)
        else:
            self._drop(lane)
            _soon(lane.submitter.close)

    def _drop(self, lane: _Lane, keeps: bool = False) -> None:
        with self._lock:
            for demand in self._demands.values():
                demand.lanes = [one for one in demand.lanes if one is not lane]
            if not keeps:
                self._lanes = [one for one in self._lanes if one is not lane]


def _soon(close: Callable[[], None]) -> None:
    # On a thread of its own: closing waits for others, and this may be one that they need.
    threading.Thread(target=close, name="overlay-lane", daemon=True).start()


def _window(lease: Lease) -> int:
    return max(1, min(lease.rows, WINDOW_ROWS))


def _is_for(lane: _Lane, demand: _Demand) -> bool:
    lease = lane.lease
    is_same = (lease.handler, lease.team) == (demand.handler, demand.team)
    return demand.is_eligible and is_same
