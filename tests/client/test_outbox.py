"""What a client has still to send: the urgent before the patient."""

from __future__ import annotations

import pytest

from overlay.client import outbox as orders
from overlay.client.outbox import CallKind, Outbox, Submission
from overlay.model.segments import Route
from tests.harness.network import Clock


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(orders.time, "monotonic", clock)
    return clock


def order(name: str, priority: int = 0) -> Submission:
    return Submission(
        CallKind(Route(), priority=priority), (name.encode(),), 1e9, lambda *what: None
    )


def taken(outbox: Outbox) -> str:
    found = []
    while outbox:
        first = outbox.first()
        found.append(outbox.take())
        assert found[-1] is first
    return b"".join(o.payloads[0] for o in found).decode()


def test_orders_leave_in_their_order(clock):
    outbox = Outbox()
    for name in "abc":
        outbox.put(order(name))
    assert len(outbox) == 3
    assert taken(outbox) == "abc"


def test_the_urgent_leave_first_until_the_others_have_waited(clock):
    outbox = Outbox()
    outbox.put(order("a"))
    clock.advance(3)
    outbox.put(order("b", 1))  # as urgent as what came a second after a
    outbox.put(order("c", 2))
    outbox.put(order("d", 9))
    assert taken(outbox) == "dcab"


def test_what_is_put_back_is_the_next_one(clock):
    outbox = Outbox()
    for name in "ab":
        outbox.put(order(name, 4))
    first = outbox.take()
    outbox.put(order("z"))
    outbox.put_back(first.part((0,), 0))
    assert taken(outbox) == "abz"


def test_an_order_that_has_left_cannot_be_removed(clock):
    outbox, one, other = Outbox(), order("a", 1), order("b")
    outbox.put(one)
    outbox.put(other)
    outbox.remove(one)
    assert outbox.all() == [other]
    with pytest.raises(ValueError, match="not in deque"):
        outbox.remove(one)
    outbox.take()
    with pytest.raises(IndexError):
        outbox.take()
