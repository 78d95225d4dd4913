"""The outbox of a client: urgent submissions leave first."""

from __future__ import annotations

import pytest

from overlay.client import outbox as module
from overlay.client.outbox import CallKind, Outbox, Submission
from overlay.model.segments import Route
from tests.harness.network import Clock


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def submission(name: str, priority: int = 0) -> Submission:
    return Submission(
        CallKind(Route(), priority=priority), (name.encode(),), 1e9, lambda *what: None
    )


def taken(outbox: Outbox) -> str:
    found = []
    while outbox:
        first = outbox.first()
        found.append(outbox.take())
        assert found[-1] is first
    return b"".join(one.payloads[0] for one in found).decode()


def test_submissions_leave_in_the_order_of_arrival(clock):
    outbox = Outbox()
    for name in "abc":
        outbox.put(submission(name))
    assert len(outbox) == 3
    assert taken(outbox) == "abc"


def test_urgent_submissions_leave_first_unless_others_have_waited_longer(clock):
    outbox = Outbox()
    outbox.put(submission("a"))
    clock.advance(3)
    outbox.put(submission("b", 1))  # as urgent as one submitted a second after a
    outbox.put(submission("c", 2))
    outbox.put(submission("d", 9))
    assert taken(outbox) == "dcab"


def test_a_submission_put_back_is_the_next_to_leave(clock):
    outbox = Outbox()
    for name in "ab":
        outbox.put(submission(name, 4))
    first = outbox.take()
    outbox.put(submission("z"))
    outbox.put_back(first.part((0,), 0))
    assert taken(outbox) == "abz"


def test_a_submission_that_has_left_cannot_be_removed(clock):
    outbox, one, other = Outbox(), submission("a", 1), submission("b")
    outbox.put(one)
    outbox.put(other)
    outbox.remove(one)
    assert outbox.all() == [other]
    with pytest.raises(ValueError, match="not in deque"):
        outbox.remove(one)
    outbox.take()
    with pytest.raises(IndexError):
        outbox.take()
