"""The bounded queue itself, and that the request queue really uses it."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.model.errors import QueueFull
from overlay.model.segments import Caller, Code, Column, Route, Segment
from overlay.queueing.flow import Flow
from overlay.queueing.request_queue import RequestQueue
from overlay.queueing.service_time import ServiceClass
from overlay.queueing.waiting_room import WaitingRoom


@dataclass
class Place:
    count: int


@dataclass(eq=False)
class Item:
    name: str
    flow: Flow[Item]
    number: int
    service_class: ServiceClass
    wants: Route = field(default_factory=Route)
    rows: int = 1
    priority: int = 0
    urgency: float = 0.0
    blocked: bool = False


class Room:
    """A waiting room of items for teams; those of a free team find a place, one row at a time."""

    def __init__(self, slots: int) -> None:
        self.free_teams: set[str] = set()
        self.classes = {team: ServiceClass() for team in ("green", "pink")}
        self.flows = {caller: Flow[Item](Caller(caller)) for caller in "abc"}
        self.streams = {caller: Flow[Item](Caller(caller), is_stream=True) for caller in "xy"}
        self.number = 0
        self.queue: WaitingRoom[Item] = WaitingRoom(slots, self._claim)

    def item(self, flow: Flow[Item], team: str = "green", rows: int = 1) -> Item:
        self.number += 1
        wants = Route(team=team)
        return Item(f"{self.number}", flow, self.number, self.classes[team], wants, rows)

    def put(self, caller: str = "a", team: str = "green") -> Item:
        item = self.item(self.flows[caller], team)
        self.queue.put_nowait(item)
        return item

    def put_rows(self, rows: int, caller: str = "x") -> Item:
        item = self.item(self.streams[caller], rows=rows)
        self.queue.put_rows(item, rows)
        return item

    def _claim(self, item: Item) -> Place | None:
        return Place(1) if item.wants.team in self.free_teams else None


@pytest.fixture
def room() -> Room:
    return Room(slots=3)


def test_it_is_a_standard_library_queue_with_the_configured_slots():
    found = RequestQueue(
        "A", slots=200, in_service=1, max_bytes=1, claim=lambda *what: None, start=lambda *what: 1
    )._room
    assert isinstance(found, queue.Queue)
    assert (found.maxsize, found.qsize(), found.full(), found.empty()) == (200, 0, False, True)


@pytest.mark.parametrize(
    ("waiting", "rows", "qsize", "full", "empty"),
    [
        (0, 0, 0, False, True),
        (1, 0, 1, False, False),
        (2, 5, 2, False, False),
        (0, 5, 0, False, False),  # rows of a stream wait outside the slots
        (3, 0, 3, True, False),
        (3, 9, 3, True, False),
    ],
)
def test_it_reports_its_size_and_state(room, waiting, rows, qsize, full, empty):
    for _ in range(waiting):
        room.put()
    if rows:
        room.put_rows(rows)

    found = room.queue
    assert (found.qsize(), found.full(), found.empty()) == (qsize, full, empty)
    if full:
        with pytest.raises(queue.Full):
            room.put()
        assert found.qsize() == qsize
    else:
        room.put()
        assert found.qsize() == qsize + 1


def test_a_full_queue_takes_rows_of_a_stream(room):
    for _ in range(3):
        room.put()
    room.put_rows(4)
    assert sum(flow.rows for flow in room.streams.values()) == 4


def test_the_next_in_fair_order_that_finds_a_place_starts(room):
    pink, green, other = room.put("a", "pink"), room.put("a", "green"), room.put("b", "green")
    with pytest.raises(queue.Empty):
        room.queue.get_nowait()

    room.free_teams = {"green"}
    assert [room.queue.get_nowait()[0] for _ in range(2)] == [green, other]
    with pytest.raises(queue.Empty):
        room.queue.get_nowait()
    room.free_teams = {"pink"}
    assert room.queue.get_nowait()[0] is pink
    assert room.queue.empty()


def test_rows_and_single_requests_take_turns(room):
    rows = room.put_rows(2)
    one, other = room.put("a"), room.put("b")
    room.free_teams = {"green"}

    taken = [room.queue.get_nowait()[0] for _ in range(4)]

    assert sorted(map(id, taken[:3])) == sorted(map(id, (rows, one, other)))
    assert taken[3] is rows
    assert room.queue.empty()


def test_an_arriving_request_starts_without_a_slot_or_leaves_no_trace(room):
    for _ in range(3):
        room.put("a", "pink")
    green = room.item(room.flows["b"], "green")

    with pytest.raises(queue.Empty):
        room.queue.get_nowait(green)
    assert (room.queue.qsize(), list(green.flow)) == (3, [])
    room.free_teams = {"green"}
    assert room.queue.get_nowait(green)[0] is green
    assert (room.queue.qsize(), list(green.flow)) == (3, [])


def test_an_arriving_request_does_not_overtake_those_that_wait_for_the_same_places(room):
    first = room.put("a")
    later = room.item(room.flows["a"])
    room.free_teams = {"green"}

    assert room.queue.get_nowait(later)[0] is first
    assert room.queue.empty()


def test_a_discarded_request_never_starts_and_frees_its_slot(room):
    gone, kept = room.put(), room.put()
    rows = room.put_rows(5)
    room.queue.discard(gone)
    room.queue.discard(rows, 4)
    room.free_teams = {"green"}

    assert room.queue.qsize() == 1
    taken = {room.queue.get_nowait()[0] for _ in range(2)}
    assert taken == {kept, rows}
    assert room.queue.empty()


def test_its_lock_is_reentrant_and_excludes_other_threads(room):
    added: list[object] = []
    with room.queue.mutex:
        other = threading.Thread(target=lambda: added.append(room.put()))
        other.start()
        room.put()
        other.join(0.1)
        assert (added, room.queue.qsize()) == ([], 1)
    other.join(10)
    assert room.queue.qsize() == 2


# The request queue uses put_nowait, get_nowait and discard.


@pytest.fixture
def requests() -> RequestQueue:
    return RequestQueue(
        "A",
        slots=2,
        in_service=1,
        max_bytes=10**9,
        claim=lambda *what: Place(1),
        start=lambda *what: lambda code, start, count: None,
    )


def admit(requests: RequestQueue) -> None:
    requests.admit(Segment(Route(), Column((b"",)), 1e12, 1), lambda start, answers: None)


def test_queue_full_is_raised_to_the_caller_as_a_refusal(requests, monkeypatch):
    admit(requests)

    def full(item: object) -> None:
        raise queue.Full

    monkeypatch.setattr(requests._room, "put_nowait", full)
    with pytest.raises(QueueFull, match=r"^all 2 queue slots are taken$"):
        admit(requests)
    assert (requests.waiting, requests.active) == (0, 1)


def test_only_what_the_queue_returns_starts(requests, monkeypatch):
    def empty(arriving: object = None) -> None:
        raise queue.Empty

    monkeypatch.setattr(requests._room, "get_nowait", empty)
    admit(requests)
    admit(requests)
    requests.kick()
    assert (requests.waiting, requests.active) == (2, 0)

    monkeypatch.undo()
    requests.kick()
    assert (requests.waiting, requests.active) == (1, 1)


def test_a_cancelled_request_is_discarded(requests, monkeypatch):
    discarded: list[object] = []
    monkeypatch.setattr(requests._room, "discard", lambda *what: discarded.append(what))
    admit(requests)
    queued = requests.admit(Segment(Route(), Column((b"",)), 1e12, 1), lambda start, answers: None)
    queued.end(Code.CANCELLED)
    assert discarded == [(queued, 1)]


class AgainstAModel(RuleBasedStateMachine):
    """The model: a list of what waits, and how many turns each address has had."""

    SLOTS = 4

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(self.SLOTS)
        self.waiting: list[Item] = []  # in order of arrival
        self.served = dict.fromkeys("abcxy", 0)
        self.virtual_time = 0

    def add(self, item: Item) -> None:
        address = item.flow.caller.address
        if not any(other.flow is item.flow for other in self.waiting):
            self.served[address] = max(self.served[address], self.virtual_time)
        self.waiting.append(item)

    @property
    def in_slots(self) -> list[Item]:
        return [item for item in self.waiting if not item.flow.is_stream]

    @rule(caller=st.sampled_from("abc"), team=st.sampled_from(["green", "pink"]))
    def put(self, caller, team):
        try:
            item = self.room.put(caller, team)
        except queue.Full:
            assert len(self.in_slots) == self.SLOTS
        else:
            assert len(self.in_slots) < self.SLOTS
            self.add(item)

    @rule(caller=st.sampled_from("xy"), rows=st.integers(1, 3))
    def put_rows(self, caller, rows):
        self.add(self.room.put_rows(rows, caller))

    @rule(teams=st.sets(st.sampled_from(["green", "pink"])))
    def open(self, teams):
        self.room.free_teams = teams

    @rule(arrives=st.booleans(), caller=st.sampled_from("abc"))
    def get(self, arrives, caller):
        arriving = self.room.item(self.room.flows[caller]) if arrives else None
        if arriving is not None:
            self.add(arriving)
        can_start = [i for i in self.waiting if i.wants.team in self.room.free_teams]
        try:
            item, place = self.room.queue.get_nowait(arriving)
        except queue.Empty:
            assert not can_start
        else:
            assert place.count == 1
            self.check_is_next(item, can_start)
            item.rows -= 1
            if not item.rows:
                self.waiting.remove(item)
        if arriving in self.waiting:
            self.waiting.remove(arriving)

    def check_is_next(self, item: Item, can_start: list[Item]) -> None:
        address = item.flow.caller.address
        assert self.served[address] == min(self.served[i.flow.caller.address] for i in can_start)
        assert item is next(i for i in can_start if i.flow is item.flow)
        self.virtual_time = max(self.virtual_time, self.served[address])
        self.served[address] = self.virtual_time + 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data):
        item = data.draw(st.sampled_from(self.waiting))
        rows = data.draw(st.integers(1, item.rows))
        self.room.queue.discard(item, rows)
        item.rows -= rows
        if not item.rows:
            self.waiting.remove(item)

    @invariant()
    def it_matches_the_model(self):
        room = self.room.queue
        assert room.qsize() == len(self.in_slots) <= room.maxsize == self.SLOTS
        assert room.full() == (len(self.in_slots) == self.SLOTS)
        assert room.empty() == (not self.waiting)
        assert set(room) == set(self.waiting)
        rows = sum(item.rows for item in self.waiting if item.flow.is_stream)
        assert sum(flow.rows for flow in self.room.streams.values()) == rows


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
