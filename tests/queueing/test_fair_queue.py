"""Which waiting request starts next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.model.segments import Caller, Route
from overlay.queueing import admission
from overlay.queueing.fair_queue import AWAITED, FairQueue
from overlay.queueing.flow import Flow
from overlay.queueing.service_time import ServiceClass

ONE = ServiceClass()


@dataclass(eq=False)
class Item:
    """Rows of a flow, to be started in portions of `most`."""

    name: str
    flow: Flow[Item]
    number: int
    rows: int = 1
    priority: int = 0
    urgency: float = 0.0
    service_class: ServiceClass = field(default_factory=lambda: ONE)
    wants: Route = Route()  # noqa: RUF009 - a value
    blocked: bool = False


def flow_of(name: str, is_stream: bool = False) -> Flow[Item]:
    """A flow of the only caller at an address of that name."""
    return Flow(Caller(name), is_stream)


@dataclass
class Place:
    count: int


class Queue:
    """A fair queue, and the names of the items that have started."""

    def __init__(self) -> None:
        self.order: FairQueue[Item] = FairQueue()
        self.number = 0
        self.started: list[str] = []

    def put(self, flow: Flow[Item], name: str, rows: int = 1, now: float = 0.0, **more) -> Item:
        self.number += 1
        priority = more.get("priority", 0)
        urgency = admission.urgency(now, priority)
        item = Item(name, flow, self.number, rows, urgency=urgency, **more)
        self.order.put(item, rows)
        return item

    def serve(self, most: int = 1, claim=None) -> bool:
        found = self.order.next(claim or (lambda item: Place(min(item.rows, most))))
        if found is None:
            return False
        item, place = found
        self.order.start(item, place.count)
        item.rows -= place.count
        self.started += [item.name] * place.count
        return True

    def serve_all(self, most: int = 1, claim=None) -> str:
        while self.serve(most, claim):
            pass
        return "".join(self.started)


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_callers_take_turns(queue):
    flows = {name: flow_of(name) for name in "abc"}
    for n, caller in enumerate("aaaaabc"):
        queue.put(flows[caller], f"{caller}{n}")

    assert queue.serve_all() == "a0b5c6a1a2a3a4"


def test_a_caller_with_many_streams_gets_no_more_turns_than_one_with_a_single_stream(queue):
    many = [flow_of("many", is_stream=True) for _ in range(9)]
    for flow in many:
        queue.put(flow, "m", rows=50)
    queue.put(flow_of("many"), "m")  # a single call of its own
    queue.put(flow_of("one", is_stream=True), "o", rows=50)

    for _ in range(40):
        queue.serve()

    assert Counter(queue.started) == {"m": 20, "o": 20}


def test_streams_and_single_calls_of_a_caller_take_turns(queue):
    queue.put(flow_of("a", is_stream=True), "b", rows=99)
    queue.put(flow_of("a"), "s")

    for _ in range(3):
        queue.serve()

    assert "s" in queue.started


def test_a_turn_is_a_row_even_if_many_start_at_once(queue):
    queue.put(flow_of("a", is_stream=True), "a", rows=400)
    small = flow_of("b")
    for _ in range(100):
        queue.put(small, "b")

    while queue.started.count("b") < 100:
        queue.serve(most=20)

    assert queue.started.count("a") <= 120


def test_an_idle_caller_saves_up_no_turns(queue):
    a, b = flow_of("a"), flow_of("b")
    for n in range(4):
        queue.put(a, f"a{n}")
    queue.serve()
    queue.serve()
    for n in range(4, 8):
        queue.put(b, f"b{n}")

    assert queue.serve_all()[4:] in ("a2b4a3b5b6b7", "b4a2b5a3b6b7")


def test_a_blocked_caller_saves_up_no_turns(queue):
    a, b, busy = flow_of("a"), flow_of("b"), ServiceClass()
    for _ in range(50):
        queue.put(a, "a", service_class=busy, wants=Route(team="pink"))
        queue.put(b, "b")
    for _ in range(20):
        queue.serve(claim=lambda item: None if item.service_class is busy else Place(1))
    queue.started.clear()

    for _ in range(20):
        queue.serve()

    assert abs(queue.started.count("a") - 10) <= 1


def test_high_priority_starts_first_until_others_have_waited_long_enough(queue):
    flow = flow_of("a", is_stream=True)
    queue.put(flow, "old", now=0)
    queue.put(flow, "urgent", now=5, priority=3)
    queue.put(flow, "late", now=7, priority=3)

    assert queue.serve_all() == "urgentoldlate"


def test_a_paused_flow_keeps_its_items_and_does_not_hold_up_others(queue):
    paused, other = flow_of("a", is_stream=True), flow_of("a", is_stream=True)
    queue.put(paused, "p")
    queue.put(other, "o")
    paused.paused = True
    assert queue.serve_all() == "o"

    paused.paused = False
    assert queue.serve_all() == "op"


def test_items_that_want_what_another_did_not_get_are_not_tried(queue):
    for name in "abcdefgh":
        queue.put(flow_of(name), name)
    tried = []

    assert queue.order.next(lambda item: tried.append(item.name)) is None

    assert tried == ["a"]
    assert all(queue.order.is_blocked(item) for item in queue.order)


def test_an_item_that_waits_for_a_link_does_not_hold_up_others(queue):
    flow = flow_of("a")
    queue.put(flow, "w", service_class=ServiceClass())
    queue.put(flow, "n", service_class=ServiceClass())

    queue.serve_all(claim=lambda item: AWAITED if item.name == "w" else Place(1))

    assert queue.started == ["n"]


AHEAD = [
    # what waits, as (caller, rows); a caller; how many rows start before its next one
    ([], "a", 0),
    ([("a", 30)], "a", 30),
    ([("b", 30)], "a", 1),
    ([("a", 3), ("b", 30)], "a", 7),
    ([("a", 3), ("b", 2), ("c", 2)], "a", 7),
    ([("b", 10), ("b", 10)], "a", 1),  # two streams of one caller
]


@pytest.mark.parametrize(("waiting", "caller", "ahead"), AHEAD)
def test_rows_ahead_are_counted_by_turns(queue, waiting, caller, ahead):
    flows = [(flow_of(name, is_stream=True), rows) for name, rows in waiting]
    for flow, rows in flows:
        queue.put(flow, "x", rows=rows)
    own = next((flow for flow, _ in flows if flow.caller.address == caller), flow_of(caller))

    assert queue.order.ahead_of(own, ONE, 0) == ahead


def test_rows_of_lower_priority_are_not_ahead(queue):
    flow = flow_of("a", is_stream=True)
    queue.put(flow, "low", rows=30)
    queue.put(flow, "high", rows=4, priority=5)

    assert [queue.order.ahead_of(flow, ONE, p) for p in (0, 3, 5, 9)] == [34, 4, 4, 0]


class AgainstAModel(RuleBasedStateMachine):
    """Nothing is lost, each flow keeps its order, and no caller is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.flows = [flow_of(caller, is_stream=True) for caller in "aabc"]
        self.waiting: dict[Item, int] = {}
        self.since: dict[str, int] = {}  # turns of others since a waiting caller's last
        self.now = 0.0

    @rule(
        flow=st.integers(0, 3),
        rows=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1, 9]),
        later_s=st.sampled_from([0.0, 1.5]),
    )
    def put(self, flow, rows, priority, later_s):
        self.now += later_s
        found = self.flows[flow]
        ahead = self.queue.order.ahead_of(found, ONE, priority)
        assert 0 <= ahead <= sum(self.waiting.values())
        item = self.queue.put(found, "x", rows, self.now, priority=priority)
        self.waiting[item] = rows
        self.since.setdefault(found.caller, 0)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self):
        item, _ = self.queue.order.next(lambda item: Place(1))
        own = [(i.urgency, i.number) for i in self.waiting if i.flow is item.flow]
        assert (item.urgency, item.number) == min(own)
        self.queue.order.start(item)
        self.take_away(item, 1)
        for other in self.since:
            self.since[other] = 0 if other == item.flow.caller else self.since[other] + 1
            assert self.since[other] <= 4, "at most two turns of each of the others"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data):
        item = data.draw(st.sampled_from(list(self.waiting)))
        rows = data.draw(st.integers(1, self.waiting[item]))
        self.queue.order.remove(item, rows)
        self.take_away(item, rows)

    def take_away(self, item, rows):
        self.waiting[item] -= rows
        if not self.waiting[item]:
            del self.waiting[item]
        if item.flow.caller not in {i.flow.caller for i in self.waiting}:
            self.since.pop(item.flow.caller, None)

    @invariant()
    def nothing_is_lost(self):
        order = self.queue.order
        assert set(order) == set(self.waiting)
        assert len(order) == len({item.flow for item in self.waiting})
        for flow in self.flows:
            assert flow.rows == sum(n for i, n in self.waiting.items() if i.flow is flow)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
