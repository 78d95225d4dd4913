"""Request ids: none runs twice or is forgotten early, and no address takes all the room."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overlay.model.errors import IdsFull
from overlay.model.limits import Limits
from overlay.model.segments import Caller, Code, Column, Executed, Route, Segment
from overlay.transport.codec import pb2
from overlay.workers.request_ids import BLOCK_BITS, Begun, ChosenIds, SeenIds
from tests.harness.cluster import Overlay
from tests.harness.network import Clock

RUN = 1 << BLOCK_BITS
MAC, PC = Caller("10.0.0.1", "mac"), Caller("10.0.0.2", "mac")


class Bench:
    """SeenIds and ChosenIds with a manual clock."""

    def __init__(self, **limits: int) -> None:
        self.clock = Clock()
        self.limits = replace(Limits(), **limits)
        self.seen = SeenIds(self.limits, self.clock)
        self.chosen = ChosenIds(self.limits, self.clock)

    def segment(self, ids, left_s: float = 30.0, own: bool = False, **route) -> Segment:
        deadline, payloads = self.clock.now + left_s, Column((b"",) * len(ids))
        listed = None if isinstance(ids, range) else tuple(ids)
        return Segment(Route(**route), payloads, deadline, ids[0], 0, listed, own_ids=own)

    def begin(self, *ids: int, **more) -> list[int]:
        """The rows that must not start; expects that there is room."""
        begun = self.seen.begin(self.segment(ids, **more))
        assert begun.full is None
        return list(begun.again)

    def forget(self, *ids: int) -> None:
        self.seen.forget(self.segment(ids), range(len(ids)))


@pytest.mark.parametrize("own", [False, True])
def test_an_id_counts_as_seen_once_it_has_started(own):
    bench = Bench()
    assert bench.begin(1, own=own) == []
    assert bench.begin(1, own=own) == [0]
    assert bench.seen.begin(bench.segment(range(2, 5), own=own)) == Begun([])
    assert bench.begin(0, 1, 2, 3, own=own) == [1, 2, 3]
    assert bench.begin(99, 7, 99, 0, own=own) == [2, 3]
    assert bench.begin(99, own=not own) == [0]


@pytest.mark.parametrize("own", [False, True])
def test_only_ids_that_did_not_run_may_be_used_again(own):
    bench = Bench()
    bench.begin(1, 2, 3, own=own)
    bench.forget(1, 3)
    assert bench.begin(1, 2, 3, own=own) == [1]
    assert bench.begin(1, 3, own=own) == [0, 1]


def test_a_forgotten_id_that_is_used_again_is_remembered_for_the_full_time():
    bench = Bench()
    bench.begin(1)
    bench.clock.advance(40)
    bench.forget(1)
    bench.begin(1)
    bench.clock.advance(50)
    assert bench.begin(1) == [0]


@pytest.mark.parametrize(("left_s", "stays_s"), [(0.1, 60), (60, 60), (90, 90), (3600, 3600)])
def test_a_chosen_id_is_remembered_for_a_minute_or_until_its_deadline(left_s, stays_s):
    bench = Bench()
    bench.begin(1, left_s=left_s)
    bench.clock.advance(stays_s - 0.01)
    assert bench.begin(1) == [0]
    bench.clock.advance(stays_s / 2 + 15)
    assert bench.begin(1) == []


def test_random_ids_never_displace_a_chosen_id():
    bench = Bench(own_ids=1000)
    bench.begin(1)
    for n in range(100):
        bench.seen.begin(bench.segment(range(1000 * (n + 1), 1000 * (n + 2)), own=True))
    assert bench.begin(1) == [0]
    assert len(bench.seen) <= 2001


def test_without_room_new_chosen_ids_are_rejected_and_repeated_ones_still_recognised():
    bench = Bench(chosen_ids=3)
    bench.begin(0, RUN, 2 * RUN)
    bench.begin(1)  # in the block of 0

    begun = bench.seen.begin(bench.segment((3 * RUN, RUN, 4 * RUN)))

    assert begun.again == [1]
    assert (begun.full.code, begun.full.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)
    assert 60 <= begun.full.retry_after_s <= 75
    assert str(begun.full).startswith(
        "no room for more request ids chosen by callers: this worker remembers 3 of 3; try again"
    )
    assert bench.begin(3 * RUN, own=True) == []
    bench.clock.advance(begun.full.retry_after_s)
    assert bench.begin(3 * RUN + 1) == []


@pytest.mark.parametrize("first", [0, 5, RUN - 1, 2**64 - 4096])
def test_consecutive_ids_take_little_room(first):
    bench = Bench()
    bench.seen.begin(bench.segment(range(first, first + 4096)))
    assert len(bench.seen) <= 4096 / RUN + 1
    assert bench.begin(first, first + 4095) == [0, 1]


# In the process asked: the count of each address.


def test_one_address_leaves_room_for_others_whatever_client_names_it_uses():
    bench = Bench(chosen_ids=10)
    for n in range(5):
        bench.chosen.take(Caller("10.0.0.1", str(n)), bench.segment((n,)))
    with pytest.raises(IdsFull) as raised:
        bench.chosen.take(MAC, bench.segment((9,)))

    assert raised.value.executed is Executed.NO
    assert 60 <= raised.value.retry_after_s <= 75
    assert "10.0.0.1 has 5 of 10 and asks for 1 more; the 5 that are left" in str(raised.value)
    bench.chosen.take(PC, bench.segment((9,)))
    bench.clock.advance(75)
    bench.chosen.take(MAC, bench.segment((9,)))
    assert len(bench.chosen) == 1


def test_only_ids_chosen_by_a_client_are_counted():
    bench = Bench(chosen_ids=4)
    for n in range(10):
        bench.chosen.take(MAC, bench.segment((n, n + 1), own=True))
        bench.chosen.take(MAC, bench.segment((n, n + 1), hops=("A",), targets=("C",)))
    assert len(bench.chosen) == 0
    bench.chosen.take(MAC, bench.segment(range(7, 200)))
    assert len(bench.chosen) == 1
    with pytest.raises(IdsFull):
        bench.chosen.take(PC, bench.segment((1, 2, 3, 4)))


IDS = st.one_of(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.tuples(st.integers(0, 50), st.integers(1, 12)).map(lambda t: range(t[0], sum(t))),
    st.integers(0, 2000).map(lambda n: [n]),
)


class IdsMachine(RuleBasedStateMachine):
    """SeenIds with little room, compared with a complete record."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(chosen_ids=4, own_ids=20)
        self.chosen: dict[int, tuple[float, float]] = {}  # by id: at least, at most until
        self.own: list[int | None] = []  # None: forgotten

    @rule(ids=IDS, own=st.booleans(), left_s=st.sampled_from([1, 30, 100, 1000]))
    def begin(self, ids, own: bool, left_s: float) -> None:
        now, before = self.bench.clock.now, len(self.bench.seen._chosen)
        begun = self.bench.seen.begin(self.bench.segment(ids, left_s, own))
        latest = set(self.own[-10:])
        here: set[int] = set()
        for row, id_ in enumerate(ids):
            since, until = self.chosen.get(id_, (0, 0))
            if id_ in here or id_ in latest or since > now:
                assert row in begun.again
            elif until <= now and id_ not in self.own:
                assert row not in begun.again
            here.add(id_)
        fresh = [id_ for row, id_ in enumerate(ids) if row not in begun.again]
        if begun.full:
            assert not own
            assert begun.full.executed is Executed.NO
            assert before + len({id_ // RUN for id_ in fresh}) > 4
        elif own:
            self.own += fresh
        else:
            stay_s = max(60, left_s)
            until = now + stay_s, now + 1.5 * stay_s + 15
            self.chosen.update(dict.fromkeys(fresh, until))

    @rule(ids=IDS)
    def forget(self, ids) -> None:
        self.bench.forget(*ids)
        for id_ in ids:
            self.chosen.pop(id_, None)
        self.own = [None if id_ in ids else id_ for id_ in self.own]

    @rule(seconds=st.sampled_from([1, 20, 59, 61, 900]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.advance(seconds)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.bench.seen._chosen) <= 4
        assert len(self.bench.seen._own) <= 20 + 12


TestIdsMachine = IdsMachine.TestCase
TestIdsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([MAC, PC, Caller("10.0.0.3")]),
            IDS,
            st.sampled_from([0, 1, 20, 90]),
            st.sampled_from([1, 100]),
        ),
        max_size=60,
    )
)
def test_the_count_of_each_address_is_what_it_has(calls):
    bench = Bench(chosen_ids=12)
    held: list[tuple[float, str, int]] = []
    for caller, ids, pause_s, left_s in calls:
        bench.clock.advance(pause_s)
        now = bench.clock.now
        segment = bench.segment(ids, left_s)
        count = len({id_ // RUN for id_ in ids}) if isinstance(ids, range) else len(ids)
        try:
            bench.chosen.take(caller, segment)
        except IdsFull:
            live_before = [entry for entry in held if entry[0] + 15 + left_s > now]
            assert sum(n for _, _, n in live_before) + count > 4
        else:
            held.append((now + max(60, left_s), caller.address, count))
        live = [entry for entry in held if entry[0] > now]
        assert sum(n for _, _, n in live) <= len(bench.chosen) <= 12
        for address in {address for _, address, _ in live}:
            mine = sum(n for _, a, n in live if a == address)
            assert mine <= bench.chosen._by_address[address] <= 6 + 6 / 2  # six at once
    bench.clock.advance(10_000)
    bench.chosen.take(PC, bench.segment((1,)))
    assert (len(bench.chosen), len(bench.chosen._by_address), len(bench.chosen._slices.all())) == (
        1,
        1,
        1,
    )


@pytest.mark.parametrize("own", [False, True])
def test_time_and_memory_of_an_id_do_not_grow_with_the_number_seen(own):
    bench, took = Bench(own_ids=5000), []
    for tenth in range(5):
        began = time.process_time()
        for n in range(10_000):
            bench.clock.now += 60 / 2500
            id_ = (tenth * 10_000 + n) * 7919 * RUN  # each in its own block
            bench.seen.begin(bench.segment((id_,), own=own))
        took.append(time.process_time() - began)
        assert len(bench.seen) <= 5000
    assert min(took[1:]) < 2 * took[0]


def test_on_the_wire_an_address_without_room_is_rejected_as_not_run(six: Overlay) -> None:
    stub, most = six.stub("C"), Limits().chosen_ids // 2
    frames: SimpleQueue[pb2.Frame | None] = SimpleQueue()
    answers = stub.ForwardStream(iter(frames.get, None))

    def ask(number: int) -> tuple[int, list[pb2.Detail]]:
        """Sends 4,000 ids, each in its own block; returns the number answered, and the failures."""
        ids = [(number * 4000 + n) << BLOCK_BITS for n in range(4000)]
        items = pb2.Column(items=[b""] * len(ids))
        made = pb2.Segment(number=number, count=len(ids), ids=ids, payloads=items)
        frames.put(pb2.Frame(segments=[made]))
        rows, failures = 0, []
        while rows < len(ids):
            for slice_ in next(answers).slices:
                rows += slice_.count
                failures += slice_.failures
        return rows - len(failures), failures

    good, failures, numbers = 0, [], itertools.count(1)
    while not failures:
        more, failures = ask(next(numbers))
        good += more
    frames.put(None)

    assert most - 4000 <= good <= most + 4000
    assert {(f.code, f.executed) for f in failures} == {(Code.RESOURCE_EXHAUSTED, pb2.NO)}
    assert failures[0].reason.startswith(
        "no room for more request ids chosen by callers: 127.0.0.1"
    )
    assert 0 < failures[0].retry_after_ms <= 75_000
    assert stub.Forward(pb2.Request(payload=b"hi"), timeout=10).result == b"C: hi"
