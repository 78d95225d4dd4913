"""The segments of one stream: each row is answered once, by its own answer."""

from __future__ import annotations

import pytest

from overlay.model.errors import BadResponse
from overlay.model.segments import Chunk, Column, PartSlice, Slice
from overlay.transport import multiplexer
from overlay.transport.codec import pb2
from overlay.transport.multiplexer import Multiplexer, OpenSegment


@pytest.fixture
def live() -> Multiplexer:
    multiplexer = Multiplexer()
    multiplexer.is_live = True
    return multiplexer


def segment(*counts: int, size: int = 10, chunks: int = 0) -> OpenSegment[str]:
    return OpenSegment("abcdef"[: len(counts)], counts, size, partial=chunks > 0, chunks=chunks)


def written(live: Multiplexer, limit: int = 100) -> pb2.Frame:
    frame = pb2.Frame()
    size = live.write_control(frame, limit)
    assert bool(size) == bool(frame.cancels or frame.grants)
    return frame


def chunk(at: int, data: bytes, more: bool = True, worker: str = "C") -> Slice:
    return Slice(1, (PartSlice(worker, Column((data,)), chunk=Chunk(at, more)),))


@pytest.mark.parametrize(
    ("first", "rows", "found"),
    [
        (0, 6, [("a", 0, 2, 0), ("b", 0, 1, 2), ("c", 0, 3, 3)]),
        (1, 3, [("a", 1, 1, 1), ("b", 0, 1, 2), ("c", 0, 1, 3)]),
        (4, 2, [("c", 1, 2, 4)]),
        (2, 1, [("b", 0, 1, 2)]),
    ],
)
def test_rows_of_a_joined_segment_belong_to_its_members(first, rows, found):
    assert list(segment(2, 1, 3).members_of(first, rows)) == found


def test_all_rows_of_a_lone_member_are_its_own():
    assert list(segment(4).members_of(1, 3)) == [("a", 1, 3, 1)]
    assert list(segment(4).members_of(0, 4)) == [("a", 0, 4, 0)]


def test_each_row_is_taken_once_and_the_last_one_closes_its_segment(live):
    one, other = segment(4), segment(3, size=5)
    assert live.open(one)
    assert live.open(other)
    assert (live.rows, live.bytes) == (7, 15)

    assert live.take(one, 1, 2) == [(1, 2)]
    assert live.take(one, 0, 4) == [(0, 1), (3, 1)]
    assert live.take(one, 0, 4) == []

    assert (live.rows, live.bytes) == (3, 5)
    assert live.segments() == [other]


def test_answers_find_their_segment_by_its_number(live):
    one, over = segment(1), segment(1)
    live.open(one)
    live.open(over)
    live.take(over, 0, 1)
    frame = pb2.Frame()
    for number in (over.number, one.number, 77):
        frame.slices.add(number=number, count=1)

    found = [(sent, slice_.number) for sent, slice_ in live.answers_in(frame)]

    assert found == [(one, one.number)]


def test_cancels_are_for_open_rows_only_and_bounded_per_frame(live):
    one = segment(5)
    live.open(one)
    live.take(one, 0, 2)

    assert live.cancel(one, 0, 2) == 0
    assert live.cancel(one, 1, 2) == 1
    assert live.cancel(one, 3, 2) == 2
    assert live.has_control

    frames = [written(live, limit=1), written(live, limit=1)]
    found = [(c.number, c.start, c.count) for frame in frames for c in frame.cancels]
    assert found == [(one.number, 1, 2), (one.number, 3, 2)]
    assert not live.has_control
    assert live.rows == 3, "they stay open until they are answered"


def test_chunks_may_arrive_as_far_as_they_are_granted(live):
    one = segment(2, chunks=2)
    live.open(one)
    assert live.arrive(one, 1, chunk(0, b"ab")) == [(1, 1)]
    live.arrive(one, 1, chunk(2, b"c"))
    live.grant(one, 1, "C", 1)
    live.arrive(one, 1, chunk(3, b"d"))
    with pytest.raises(BadResponse, match="more chunks of a part than were granted"):
        live.arrive(one, 1, chunk(4, b"e"))

    (grant,) = written(live).grants
    assert (grant.number, grant.row, grant.process_id, grant.count) == (one.number, 1, "C", 1)


def test_an_answered_row_gets_no_more_grants(live):
    one = segment(1, chunks=2)
    live.open(one)
    live.arrive(one, 0, chunk(0, b"ab"))
    live.take(one, 0, 1)
    live.grant(one, 0, "C", 1)

    assert live.arrive(one, 0, chunk(2, b"c")) == []
    assert not live.has_control


def test_parts_from_more_workers_than_possible_are_an_error(live, monkeypatch):
    monkeypatch.setattr(multiplexer, "MAX_TARGETS", 3)
    one = segment(2, chunks=2)
    live.open(one)
    for worker in "CDEFGH":
        live.arrive(one, 0, chunk(0, b"", worker=worker))
    with pytest.raises(BadResponse, match="parts of more than 3 workers"):
        live.arrive(one, 0, chunk(0, b"", worker="I"))


def test_after_a_loss_nothing_is_opened_and_nothing_is_written(live):
    one, other = segment(2), segment(1)
    live.open(one)
    live.open(other)
    live.take(one, 0, 1)
    live.cancel(one, 1, 1)

    assert live.lose() == [one, other]

    assert not live.open(segment(1))
    assert written(live) == pb2.Frame()
    assert live.take(one, 0, 2) == [(1, 1)], "for their owner to answer"
    assert live.rows == 1
