"""What is asked to learn the end of a job, and when that is given up."""

from __future__ import annotations

import pytest

from overlay.client.job_status import read_job
from overlay.client.job_wait import PAUSE_S, WAIT_S, JobWait, PartReader
from overlay.model import clocks
from overlay.model.errors import (
    CallFailed,
    DeadlinePassed,
    InvalidCall,
    NotReached,
    Unavailable,
)
from overlay.model.segments import Code, Executed, Part
from overlay.transport.codec import pb2

LOST = Unavailable("the leader is lost")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(clocks, "monotonic", lambda: now[0])
    return now


def status(**fields: object) -> object:
    return read_job(pb2.Job(id="j1", **fields))  # type: ignore[arg-type]


def test_the_first_question_is_answered_at_once_and_later_ones_wait(clock: list[float]) -> None:
    wait = JobWait("j1", None, patience_s=60)

    assert wait.next()[0].wait_s == 0
    assert not wait.is_over(status(state=pb2.WAITING))
    request, limit_s = wait.next()
    assert (request.id, request.wait_s) == ("j1", WAIT_S)
    assert limit_s > WAIT_S
    assert wait.is_over(status(state=pb2.DONE))


def test_no_question_waits_beyond_the_callers_time_which_then_ends_the_wait(
    clock: list[float],
) -> None:
    wait = JobWait("j1", 5.0, patience_s=60)
    assert not wait.is_over(status(state=pb2.RUNNING, attempts=1))

    clock[0] += 3
    assert wait.next()[0].wait_s == 2
    clock[0] += 3
    assert wait.next()[0].wait_s == 0
    with pytest.raises(DeadlinePassed, match=r"running after 5 s") as raised:
        wait.is_over(status(state=pb2.RUNNING, attempts=1))
    assert raised.value.executed is Executed.UNKNOWN
    with pytest.raises(DeadlinePassed) as raised:
        wait.is_over(status(state=pb2.WAITING))
    assert raised.value.executed is Executed.NO


def test_a_lost_leader_is_asked_again_for_as_long_as_patience_lasts(clock: list[float]) -> None:
    wait = JobWait("j1", None, patience_s=10)

    assert wait.pause_s(LOST) == PAUSE_S
    clock[0] += 9
    assert wait.pause_s(NotReached("nobody serves there")) == 2 * PAUSE_S
    assert not wait.is_over(status(state=pb2.WAITING))  # it is back, and patience is new
    clock[0] += 9
    assert wait.pause_s(LOST) == PAUSE_S
    clock[0] += 11
    with pytest.raises(Unavailable, match="lost"):
        wait.pause_s(LOST)


def test_a_lost_leader_is_given_up_when_the_callers_time_is_over(clock: list[float]) -> None:
    wait = JobWait("j1", 5.0, patience_s=600)
    assert wait.pause_s(LOST) == PAUSE_S
    clock[0] += 6
    with pytest.raises(Unavailable):
        wait.pause_s(LOST)


def test_a_schedule_has_no_end_to_wait_for(clock: list[float]) -> None:
    with pytest.raises(InvalidCall, match="j1 is a schedule"):
        JobWait("j1", None, patience_s=60).is_over(status(state=pb2.WAITING, every_s=60))


def test_a_part_is_read_from_where_one_has_got_to(clock: list[float]) -> None:
    reader = PartReader("j1", Part("C", size=5), patience_s=10)
    found = b""
    for chunk in (b"ab", b"cde"):
        assert not reader.is_over
        request = reader.next()
        assert (request.id, request.process_id, request.at) == ("j1", "C", len(found))
        assert reader.pause_s(LOST) == PAUSE_S
        assert reader.next() == request
        found += reader.take(pb2.PartResponse(chunk=chunk))
        clock[0] += 9  # patience begins anew with each answer
    assert (reader.is_over, found) == (True, b"abcde")
    assert PartReader("j1", Part("C"), patience_s=10).is_over


@pytest.mark.parametrize("chunk", [b"", b"abcdef"])
def test_a_part_of_another_size_than_was_said_is_an_error(chunk: bytes) -> None:
    reader = PartReader("j1", Part("C", size=5), patience_s=10)
    with pytest.raises(CallFailed, match=f"has {len(chunk)} bytes, and not 5") as raised:
        reader.take(pb2.PartResponse(chunk=chunk))
    assert raised.value.code is Code.DATA_LOSS


def test_a_part_is_not_read_for_ever_from_a_leader_that_is_lost(clock: list[float]) -> None:
    reader = PartReader("j1", Part("C", size=5), patience_s=10)
    reader.pause_s(LOST)
    clock[0] += 11
    with pytest.raises(Unavailable):
        reader.pause_s(LOST)
