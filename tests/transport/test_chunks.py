"""Results in chunks: cut, sent ahead of the reader, passed on, and assembled at the client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.client.partials import Parts
from overlay.client.submitter import Delivery
from overlay.model.errors import BadRequest
from overlay.model.segments import (
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    Part,
    Route,
    Segment,
    Slice,
)
from overlay.model.topology import HandlerSpec, Process
from overlay.transport.chunks import CHUNK_BYTES, ChunkWindow, ChunkWriter, NotBytes, cut
from overlay.transport.codec import pb2
from overlay.workers.job import HandlerJob, HandlerSlots
from overlay.workers.process_pool import ProcessRunner
from overlay.workers.thread_pool import ThreadRunner
from overlay.workers.user_modules import Sources
from tests.harness.cluster import until
from tests.harness.network import MemoryNetwork, the_six

# How a result is cut.


@given(items=st.lists(st.binary(max_size=40), max_size=12), size=st.integers(1, 20))
def test_chunks_add_up_to_the_same_bytes_and_only_the_last_is_smaller(items, size):
    chunks = list(cut(iter(items), size))

    assert b"".join(chunk for chunk, _ in chunks) == b"".join(items)
    assert [more for _, more in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all(len(chunk) == size for chunk, more in chunks if more)
    assert 0 < len(chunks[-1][0]) <= size or items in ([], [b""] * len(items))


def test_chunks_are_sent_before_the_last_item_is_there():
    def items() -> Iterator[bytes]:
        yield bytearray(5)
        yield memoryview(b"abcdef")
        raise AssertionError("asked for more than it needed")

    chunks = cut(items(), 5)
    assert [next(chunks), next(chunks)] == [(bytes(5), True), (b"abcde", True)]


def test_the_error_for_other_items_names_their_type():
    with pytest.raises(NotBytes, match="str"):
        list(cut(iter([b"good", "text"]), 2))


# How far ahead a worker sends.


@pytest.fixture
def sent() -> list[tuple[bytes, Chunk]]:
    return []


def writer_to(sent: list, ahead: int = 1, left_s: float = 20.0) -> ChunkWriter:
    return ChunkWriter(
        ahead, time.monotonic() + left_s, lambda chunk, how: sent.append((chunk, how))
    )


def test_a_sender_waits_for_a_grant_and_the_wait_is_measured(sent):
    writer = writer_to(sent)
    assert writer.send(b"one")
    threading.Timer(0.05, lambda: sent[0][1].grant(1)).start()
    assert writer.send(b"three")
    assert [(chunk, how.at, how.more) for chunk, how in sent] == [(b"one", 0, 1), (b"three", 3, 1)]
    assert writer.at == 8
    assert writer.waited_s > 0.03


@pytest.mark.parametrize("ended", ["closed", "deadline"])
def test_nothing_is_sent_after_the_end(sent, ended):
    writer = writer_to(sent, ahead=1, left_s=0.05 if ended == "deadline" else 20)
    writer.send(b"one")
    if ended == "closed":
        threading.Timer(0.05, writer.close).start()
    assert not writer.send(b"two")
    assert len(sent) == 1


class Worker:
    """The worker of one part: what it may still send, and what is unread."""

    def __init__(self, row: int) -> None:
        self.key = (1, row, "W")
        self.room = 1
        self.unread = self.sent = 0

    def grant(self, chunks: int) -> None:
        self.room += chunks


@given(
    room=st.integers(0, 12),
    ahead=st.integers(0, 4),
    steps=st.lists(st.tuples(st.integers(0, 4), st.sampled_from("srre")), max_size=80),
)
def test_in_transit_are_one_chunk_of_each_part_and_more_as_there_is_room(room, ahead, steps):
    window, workers = ChunkWindow(room), {row: Worker(row) for row in range(5)}

    def grant(call):
        if call:
            call[0](call[1])

    for row, step in steps:
        worker = workers[row]
        if step == "s" and worker.room:
            worker.room, worker.unread = worker.room - 1, worker.unread + 1
            chunk = Chunk(worker.sent, True, worker.grant)
            worker.sent += 1
            grant(window.passes(worker.key, chunk, ahead))
        elif step == "r" and worker.unread:
            worker.unread -= 1
            grant(window.granted(worker.key, 1, True))
        elif step == "e":
            window.end(worker.key)
            workers[row] = Worker(row)
        in_transit = [w.room + w.unread for w in workers.values()]
        assert sum(in_transit) <= len(workers) + room
        assert all(1 <= n <= 1 + ahead for n in in_transit)

    window.end_rows(1, 0, 5)
    assert (len(window), window._room) == (0, room)


def test_a_client_cannot_grant_more_than_it_was_sent_and_late_grants_are_ignored():
    window, worker = ChunkWindow(0), Worker(0)
    window.passes(worker.key, Chunk(0, True, worker.grant), 0)
    with pytest.raises(BadRequest, match="W has sent 1 chunks, not 2"):
        window.granted(worker.key, 2, True)
    assert window.granted(worker.key, 1, True) == (worker.grant, 1)
    window.passes(worker.key, Chunk(9, False), 0)
    assert window.granted(worker.key, 1, True) is None


# In transit.


@pytest.fixture
def network() -> MemoryNetwork:
    made = MemoryNetwork(the_six())
    for worker in "CDF":
        made.nodes[worker].executor.chunk_bytes = 7
    return made


BODY = bytes(range(200))


def sent_by(network: MemoryNetwork) -> dict[str, int]:
    return {worker: network.nodes[worker].executor.sent for worker in "CDF"}


@pytest.mark.parametrize("size", [4, 5, 11, 200])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_large_part_arrives_whole_over_all_hops(network, size, chunks):
    asked = network.ask("A", BODY[:size], chunks=chunks)
    asked.read()

    whole = {part.process_id: part.result for part in asked.partials[0] if not asked.chunks}
    whole |= {worker: asked.result_of(worker) for worker in asked.chunks}
    assert whole == {worker: worker.encode() + b": " + BODY[:size] for worker in "CDF"}
    assert asked.answer.parts == ()
    assert network.left_over == {}


def test_without_a_reader_each_worker_sends_what_it_may_and_waits(network):
    asked = network.ask("A", BODY, chunks=2)
    assert sent_by(network) == {"C": 2, "D": 2, "F": 2}
    asked.read(1)
    assert sum(sent_by(network).values()) == 7
    assert not asked.is_answered


@pytest.mark.parametrize("size", [4, 5, 11, 200])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_chunks_of_any_one_worker_end_with_its_answer(network, size, chunks):
    asked = network.ask("A", BODY[:size], mode=Mode.ANY, chunks=chunks)
    asked.read()

    (part,) = asked.answer.parts
    before = [result for result, _ in asked.chunks.get(part.process_id, [])]
    assert part.ok
    assert b"".join([*before, part.result]) == part.process_id.encode() + b": " + BODY[:size]
    assert all(chunk.more for _, chunk in asked.chunks.get(part.process_id, []))
    assert len(before) == (size + 3 - 1) // 7
    assert asked.answer.hops[0] == "A"
    assert sum(sent_by(network).values()) == len(before)
    assert network.left_over == {}


def test_any_one_worker_waits_for_a_reader_and_ends_with_its_caller(network):
    asked = network.ask("A", BODY, mode=Mode.ANY, chunks=2)
    assert sum(sent_by(network).values()) == 2
    asked.read(1)
    assert sum(sent_by(network).values()) == 3
    asked.leave()
    asked.read()
    assert sum(sent_by(network).values()) == 3
    assert network.left_over == {}


def test_a_worker_lost_among_its_chunks_may_have_run(network):
    asked = network.ask("A", BODY, mode=Mode.ANY, chunks=1)
    for team_leader in "BE":
        network.cut("A", team_leader)
    asked.read()
    assert asked.answer.refused.executed is Executed.UNKNOWN
    assert network.left_over == {}


def test_a_worker_not_asked_for_chunks_sends_its_result_whole(network):
    asked = network.ask("A", BODY, partials=True)
    assert [part.result[3:] for part in asked.partials[0]] == [BODY] * 3
    assert sent_by(network) == {"C": 0, "D": 0, "F": 0}


def test_a_link_that_breaks_during_a_part_costs_only_that_part(network):
    asked = network.ask("A", BODY, chunks=1)
    asked.read(4)

    network.cut("B", "C")
    asked.read()

    failed = [part for part in asked.partials[0] if not part.ok]
    assert [(part.process_id, part.executed) for part in failed] == [("C", Executed.UNKNOWN)]
    assert asked.result_of("D") == b"D: " + BODY
    assert asked.result_of("F") == b"F: " + BODY
    assert network.left_over == {}


@pytest.mark.parametrize("edge", [("A", "B"), ("E", "F")])
def test_no_worker_goes_on_sending_whatever_link_breaks(network, edge):
    asked = network.ask("A", BODY, chunks=1)
    asked.read(2)
    network.cut(*edge)
    network.cut("A", "E")
    before = sent_by(network)
    asked.read()
    after = sent_by(network)
    assert {worker for worker in "CDF" if after[worker] > before[worker]} <= set("C")
    assert network.left_over == {}


def test_a_caller_that_leaves_or_a_deadline_ends_every_part(network):
    leaves = network.ask("A", BODY, chunks=1)
    late = network.ask("A", BODY, chunks=1, deadline_s=1)
    leaves.read(3)

    leaves.leave()
    assert leaves.is_answered
    late.read(3)
    network.advance(2)

    assert [part.code for part in late.answer.parts] == [Code.DEADLINE_EXCEEDED] * 3
    assert network.left_over == {}


# What a handler returns, on threads and in processes.

HANDLERS = """
import time

def act(payload, context):
    what, size = payload.decode().split()
    return globals()[what](int(size), context)

def gives(size, context):
    return bytearray(b"0123456789" * (size // 10))

def yields(size, context):
    try:
        for _ in range(size // 10):
            yield b"0123456789"
    finally:
        with open(context.options["notes"], "a") as notes: notes.write("closed ")

def text(size, context):
    yield b"0" * size
    yield "text"

def fails(size, context):
    yield b"0" * size
    raise ValueError("a secret")
"""
SIZE = 5 * CHUNK_BYTES + 50
MAX_BYTES = 7 * CHUNK_BYTES


class Bench:
    """A runner, and the result of the one row that it has at a time."""

    def __init__(self, runner: ThreadRunner | ProcessRunner, spec: HandlerSpec, notes: str) -> None:
        self.runner = runner
        self.notes = notes
        self._desk = HandlerSlots(spec, 1, {"notes": notes})
        self._ids = 0

    def start(self, what: str, chunks: int = 0, left_s: float = 20.0) -> None:
        self.chunks: list[tuple[bytes, Chunk]] = []
        self.parts: list[Part] = []
        self.free = 0
        self._ids += 1
        until_s = time.monotonic() + left_s
        segment = Segment(Route(), Column((what.encode(),)), until_s, self._ids, chunks=chunks)
        segment.on_partial = self._take
        me = Process("W", "worker", "green", "h", 1)
        rest = self._give_back, self.runner.end
        self.batch = HandlerJob(self._desk, me, segment, 0.0, self._take, *rest)
        self.runner.submit(self.batch)

    def run(self, what: str, chunks: int = 0, left_s: float = 20.0) -> Part:
        """Runs a request and reads all of its chunks. Returns its last part."""
        self.start(what, chunks, left_s)
        read = 0
        while not self.parts:
            until(lambda: self.parts or len(self.chunks) > read, 10, "something comes")  # noqa: B023
            for _, chunk in self.chunks[read:]:
                read += 1
                if chunk.more:
                    chunk.grant(1)
        until(lambda: self.free, 10, "its place is free")
        return self.parts[0]

    @property
    def result(self) -> bytes:
        return b"".join(chunk for chunk, _ in self.chunks)

    def _take(self, start: int, answers: Slice) -> None:
        (column,) = answers.parts
        part = column.at(0)
        if column.chunk is not None and part.ok:
            self.chunks.append((part.result, column.chunk))
        if column.is_over:
            self.parts.append(part)

    def _give_back(self, places: int) -> None:
        self.free += places


@pytest.fixture(scope="module", params=["thread", "process"])
def bench(request, tmp_path_factory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "given.py").write_text(HANDLERS)
    spec = HandlerSpec("h", "given:act", run=request.param, slots=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        if request.param == "thread":
            runner = ThreadRunner(spec, 1, MAX_BYTES)
        else:
            runner = ProcessRunner(spec, 1, Sources(folder, {}), MAX_BYTES)
        made = Bench(runner, spec, str(folder / "notes"))
        yield made
        runner.close()


@pytest.mark.parametrize("what", ["gives", "yields"])
@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_everything_a_handler_returns_arrives(bench, what, chunks):
    part = bench.run(f"{what} {SIZE}", chunks)
    whole = bench.result if chunks else part.result
    assert whole == b"0123456789" * (SIZE // 10)
    assert [chunk.at for _, chunk in bench.chunks] == [
        n * CHUNK_BYTES for n in range(6 * (chunks > 0))
    ]


def test_a_small_result_is_sent_whole(bench):
    assert bench.run("yields 50", chunks=1).result == b"0123456789" * 5
    assert bench.chunks == []


@pytest.mark.parametrize("what", ["gives", "yields"])
def test_too_large_a_whole_result_is_refused_with_a_remedy(bench, what):
    part = bench.run(f"{what} {2 * MAX_BYTES}")
    assert part.code is Code.RESOURCE_EXHAUSTED
    assert "more than max_message_mib allows" in part.reason
    assert "(--as-completed)" in part.reason
    assert bench.run(f"{what} {2 * MAX_BYTES}", chunks=4).code is Code.OK


@pytest.mark.parametrize("chunks", [0, 1])
def test_an_iterator_that_raises_or_yields_other_types_is_a_failure(bench, chunks):
    part = bench.run(f"text {SIZE}", chunks)
    assert (part.code, part.executed) == (Code.INTERNAL, Executed.YES)
    assert "returned an iterator of str, not bytes" in part.reason
    assert "error id" in bench.run(f"fails {SIZE}", chunks).reason


@pytest.mark.parametrize("how", ["leaves", "deadline"])
def test_when_reading_ends_the_slot_is_free_and_the_iterator_closed(bench, how):
    is_a_thread = isinstance(bench.runner, ThreadRunner)
    before = closed(bench)

    bench.start(f"yields {SIZE}", chunks=2, left_s=0.5 if how == "deadline" else 20)
    until(lambda: len(bench.chunks) == 2, 10, "two chunks come")
    if how == "leaves":
        time.sleep(0.05)  # it is waiting for a grant
        bench.batch.end(Code.CANCELLED, 0, 1)
    until(lambda: bench.free, 10, "its place is free")

    assert (len(bench.chunks), bench.parts[0].ok) == (2, False)
    if is_a_thread:  # a process is killed
        assert closed(bench) == before + 1
    assert bench.run("gives 50").ok


def closed(bench: Bench) -> int:
    try:
        with open(bench.notes) as notes:
            return len(notes.read().split())
    except FileNotFoundError:
        return 0


def test_time_waiting_for_a_slow_reader_is_not_the_handlers(bench):
    bench.start(f"gives {SIZE}", chunks=3)
    until(lambda: len(bench.chunks) == 3, 10, "three chunks come")
    time.sleep(0.3)
    bench.chunks[0][1].grant(10)
    until(lambda: bench.parts, 10, "it ends")
    assert bench.parts[0].worked_us < 200_000


# At the client.


def delivery(granted: Callable[[str], None], **chunks: tuple[int, bytes, bool]) -> Delivery:
    made = pb2.Slice(count=1, more=True)
    for worker, (at, result, more) in chunks.items():
        column = pb2.Column(items=[result])
        made.parts.add(process_id=worker, results=column, at=at, more=more)
    return Delivery(made, lambda row, worker: granted(worker))


@given(
    bodies=st.lists(st.binary(max_size=30), min_size=1, max_size=3),
    size=st.integers(1, 9),
    seed=st.randoms(use_true_random=False),
    lost_at=st.none() | st.integers(0, 12),
    repeated_at=st.none() | st.integers(0, 12),
)
def test_a_part_is_yielded_whole_or_not_at_all(bodies, size, seed, lost_at, repeated_at):
    events = []
    for worker, body in zip("CDF", bodies, strict=False):
        at = 0
        for chunk, more in cut([body], size):
            events.append((seed.random(), worker, (at, chunk, more)))
            at += len(chunk)
    order = sorted(worker for _, worker, _ in events)
    seed.shuffle(order)
    remaining = {worker: iter([p for _, w, p in events if w == worker]) for worker in "CDF"}
    arriving = [(worker, next(remaining[worker])) for worker in order]
    if repeated_at is not None and repeated_at < len(arriving):
        arriving.insert(repeated_at, arriving[repeated_at])
    broken = arriving.pop(lost_at)[0] if lost_at is not None and lost_at < len(arriving) else ""

    granted: list[str] = []
    parts, given_parts = Parts(None), []
    for worker, chunk in arriving:
        given_parts += parts.early(delivery(granted.append, **{worker: chunk}), 0)
    given_parts += parts.last(delivery(granted.append), 0)

    whole = dict(zip("CDF", bodies, strict=False))
    for part in given_parts:
        assert part.result == (whole[part.process_id] if part.ok else b"")
    whole_parts = [part.process_id for part in given_parts if part.ok]
    assert len(set(whole_parts)) == len(whole_parts)
    if repeated_at is None:
        assert set(whole) - set(whole_parts) <= {broken}


def test_each_chunk_taken_grants_another_except_the_last():
    granted: list[str] = []
    parts = Parts(None)
    assert (
        list(parts.early(delivery(granted.append, C=(0, b"ab", True), D=(0, b"x", True)), 0)) == []
    )
    (part,) = parts.early(delivery(granted.append, C=(2, b"c", False)), 0)
    assert (part.process_id, part.result, granted) == ("C", b"abc", ["C", "D"])


def test_a_part_that_broke_off_is_reported_at_the_end():
    parts = Parts(None)
    list(parts.early(delivery(lambda worker: None, C=(0, b"ab", True), D=(0, b"x", False)), 0))
    (part,) = parts.last(Detail(Code.UNAVAILABLE, "gone"), 0)
    assert (part.process_id, part.code, part.executed) == ("C", Code.DATA_LOSS, Executed.UNKNOWN)
    assert "broke off after 2 bytes" in part.reason
