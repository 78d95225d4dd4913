"""Which streams a process keeps open, and which idle one ends for a new one."""

from __future__ import annotations

import pytest

from overlay.calls.open_streams import OpenStreams
from overlay.model.errors import QueueFull


class FakeStream:
    """What OpenStreams sees of a stream."""

    def __init__(self, active: bool = False) -> None:
        self.is_listed = False
        self.is_active = self.was_active = active

    def become_idle(self, streams: OpenStreams) -> None:
        self.is_active = False
        if not self.is_listed:
            streams.became_idle(self)


def opened(
    streams: OpenStreams, address: str, count: int, active: bool = False
) -> list[FakeStream]:
    made = [FakeStream(active) for _ in range(count)]
    for stream in made:
        streams.enter(stream, address)
    return made


def test_one_address_may_have_three_times_the_free_streams():
    streams = OpenStreams(16)
    busy = opened(streams, "pc", 12, active=True)

    with pytest.raises(QueueFull, match=r"12 of 16 streams are open from pc alone"):
        streams.enter(FakeStream(), "pc")
    assert streams.enter(FakeStream(), "mac") == []
    streams.leave(busy[0])
    assert len(streams) == 12


def test_the_oldest_idle_stream_of_an_address_makes_room_for_a_new_one():
    streams = OpenStreams(16)
    first, second, third, *_ = opened(streams, "pc", 12)
    other = opened(streams, "mac", 1)[0]
    first.is_active = first.was_active = True

    assert streams.enter(FakeStream(), "pc") == [second]
    first.become_idle(streams)
    third.was_active = True
    third.become_idle(streams)
    ended = streams.enter(FakeStream(), "pc")
    assert len(ended) == 1
    assert ended[0] not in (first, third), "they have been active since, others have not"
    assert other in list(streams)


def test_every_idle_stream_is_ended_before_an_active_one_is_refused():
    streams = OpenStreams(16)
    all_ = opened(streams, "pc", 12, active=True)
    with pytest.raises(QueueFull):
        streams.enter(FakeStream(), "pc")
    for stream in all_[::2]:
        stream.become_idle(streams)
    ended = []
    for _ in range(6):
        ended += streams.enter(FakeStream(active=True), "pc")
        streams.leave(ended[-1])
    assert set(ended) == set(all_[::2])
    with pytest.raises(QueueFull):
        streams.enter(FakeStream(), "pc")


def test_a_neighbours_streams_are_counted_separately_and_its_newest_stay():
    streams = OpenStreams(4)
    opened(streams, "pc", 3, active=True)
    with pytest.raises(QueueFull):
        streams.enter(FakeStream(), "pc")

    links = [FakeStream() for _ in range(5)]
    ended = [streams.enter(link, "pc", "A") for link in links]

    assert ended == [[], [], [], [], [links[0]]]
