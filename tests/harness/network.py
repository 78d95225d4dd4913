"""An in-memory network: real dispatchers, queues and messages without sockets, threads or sleeps.

    network = MemoryNetwork(the_six())
    asked = network.ask("A", b"hi", mode=Mode.ANY)
    asked = network.stream("A", 5)   a segment of five requests on a client's stream
    network.cut("A", "E")            the link goes down, and what is in flight on it is lost
    network.hold("A", "B")           delays what is sent there, until release("A", "B")
    network.hold_answers("A", "B")   delays the answers, until release_answers("A", "B")
    network.next("A", "B", REFUSED)  the fate of the next segment sent there
    network.advance(2)               time passes and deadlines expire

Everything happens on the calling thread, and time moves only by `advance`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from hypothesis import strategies as st

from overlay.model import config
from overlay.model.errors import AlreadyExecuted, OverlayError
from overlay.model.pending import PendingRows, consecutive
from overlay.model.segments import (
    AnswerRow,
    Cancel,
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    Mode,
    OnResult,
    Part,
    PartSlice,
    Route,
    Segment,
    Slice,
)
from overlay.model.topology import Process, Topology
from overlay.observability.counters import Meter
from overlay.queueing.flow import Flow
from overlay.queueing.queued_segment import QueuedSegment
from overlay.queueing.request_queue import RequestQueue
from overlay.routing import aggregate, planner
from overlay.routing.dispatcher import Claimed, Dispatcher
from overlay.routing.outlier import State
from overlay.transport import codec
from overlay.transport.chunks import ChunkWindow, cut
from overlay.transport.codec import pb2
from overlay.workers.request_ids import SeenIds
from tests.harness.machine import ROOT

MARGIN_S = 0.05  # that a sender reserves for the answer's way back

DELIVERED = "delivered"
REFUSED = "refused"  # with proof that nothing ran
ANSWER_LOST = "answer lost"  # the segment arrives, its answers do not
REQUEST_LOST = "request lost"  # the sender cannot tell this from ANSWER_LOST


def the_six() -> Topology:
    return config.load(ROOT / "two_hosts_config.json")


class Clock:
    """Monotonic seconds that only the test advances, with timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), act))

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            when, _, act = heapq.heappop(self._due)
            self.now = max(self.now, when)
            act()
        self.now = until


class MemoryNetwork:
    """All processes of a topology. `sent`, `started` and `executed` record what happened."""

    def __init__(self, topology: Topology, slots: int = 100) -> None:
        self.topology = topology
        self.clock = Clock()
        self.sent: list[tuple[str, str, int]] = []
        self.executed: list[tuple[str, int]] = []
        self.started: list[tuple[str, float, Segment]] = []  # process, time, segment
        self._next_id = 1
        self.nodes = {
            process_id: Node(self, process_id, slots) for process_id in topology.processes
        }
        self.edges = {
            (near, far.id): Edge(self, near, far.id)
            for near in topology.processes
            for far in topology.below(near)
        }

    def ask(
        self,
        process_id: str,
        payload: bytes = b"hi",
        *,
        mode: Mode = Mode.ALL,
        team: str = "",
        handler: str = "",
        deadline_s: float = 10.0,
        request_id: int = 0,
        idempotent: bool = False,
        partials: bool = False,
        chunks: int = 0,
    ) -> Asked:
        """A client's single request. partials: it wants each part as it comes. chunks: in chunks,
        of which this many are granted at first, and more when the test calls `read`."""
        route = Route(mode=mode, team=team, handler=handler)
        segment = self._segment(route, (payload,), deadline_s, request_id)
        asked = Asked(replace(segment, idempotent=idempotent))
        if partials or chunks:
            asked.segment.on_partial = asked.take_partial
            asked.segment.chunks = chunks
        asked.queued = self.nodes[process_id].serve(asked.segment, asked.take)
        return asked

    def stream(
        self,
        process_id: str,
        rows: int,
        *,
        mode: Mode = Mode.ALL,
        team: str = "",
        deadline_s: float = 10.0,
        first_id: int = 0,
        flow: Flow | None = None,
    ) -> Asked:
        """A client's segment; each payload is its row number."""
        node = self.nodes[process_id]
        payloads = tuple(b"%d" % row for row in range(rows))
        route = Route(mode=mode, team=team)
        asked = Asked(self._segment(route, payloads, deadline_s, first_id))
        asked.queued = node.serve(asked.segment, asked.take, flow or node.flow)
        return asked

    def _segment(
        self, route: Route, payloads: tuple[bytes, ...], deadline_s: float, first_id: int
    ) -> Segment:
        first_id = first_id or self._next_id
        self._next_id = max(self._next_id, first_id) + len(payloads)
        return Segment(route, Column(payloads), self.clock.now + deadline_s, first_id)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def cut(self, near: str, far: str, *, just_now: bool = False) -> None:
        """just_now: so recently that requests may wait for the link."""
        self.edges[near, far].go_down(just_now)

    def give_up(self, near: str, far: str) -> None:
        """The link has been down for too long to wait for it."""
        self.edges[near, far].awaited = False
        self.nodes[near].queue.kick()

    def heal(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.is_up, edge.is_live, edge.awaited = True, True, False
        self.nodes[near].queue.kick()

    def hold(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.held = edge.held or deque()

    def release(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        transfers, edge.held = edge.held or (), None
        for transfer in transfers:
            transfer.deliver()

    def hold_answers(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.held_answers = edge.held_answers or []

    def release_answers(self, near: str, far: str, rng: random.Random | None = None) -> None:
        """The answers arrive; with `rng`, in random slices and order."""
        edge = self.edges[near, far]
        slices, edge.held_answers = edge.held_answers or [], None
        for transfer, start, answers in _shuffled(slices, rng) if rng else slices:
            transfer.take(start, answers)

    def next(self, near: str, far: str, *fates: str) -> None:
        self.edges[near, far].fates.extend(fates)

    def kill(self, process_id: str) -> None:
        """The process is gone, and its neighbours have noticed."""
        self.nodes[process_id].alive = False
        for edge in self.edges_to(process_id):
            edge.go_down()

    def drain(self, process_id: str) -> None:
        """The process stops: it refuses waiting and new requests, and its neighbours know."""
        for edge in self.edges_to(process_id):
            edge.is_up = False
        self.nodes[process_id].queue.close()

    def edges_to(self, process_id: str) -> list[Edge]:
        return [edge for edge in self.edges.values() if edge.far == process_id]

    def runs(self, request_id: int) -> Counter[str]:
        """How often each worker ran the request."""
        return Counter(worker for worker, found in self.executed if found == request_id)

    def sent_from(self, near: str) -> list[str]:
        """The destination of each request."""
        return [far for sender, far, _ in self.sent if sender == near]

    @property
    def left_over(self) -> dict[str, int]:
        """All counts of waiting, running and outstanding requests that are not 0."""
        counts = Counter[str]()
        for process_id, node in self.nodes.items():
            _, waiting, active = node.queue.streamed
            counts[f"{process_id} waiting"] = node.queue.waiting + waiting
            counts[f"{process_id} active"] = node.queue.active + active
            counts[f"{process_id} working"] = node.executor.active
        for edge in self.edges.values():
            counts[f"{edge.near}-{edge.far} outstanding"] = sum(edge.outstanding.values())
        return {what: count for what, count in counts.items() if count}


class Asked:
    """A client's segment, and every answer that each row got."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.queued: QueuedSegment | None = None
        self.answers: list[list[AnswerRow]] = [[] for _ in range(len(segment))]
        self.order: list[int] = []
        self.partials: list[list[Part]] = [[] for _ in range(len(segment))]
        self.chunks: dict[str, list[tuple[bytes, Chunk]]] = {}  # by worker, of the one row
        self.unread: deque[Chunk] = deque()

    def take_partial(self, start: int, answers: Slice) -> None:
        for row in range(len(answers)):
            assert not self.answers[start + row], "a part came after its row's answer"
            over = [column for column in answers.parts if column.is_over]
            self.partials[start + row] += [column.at(row) for column in over]
        self._note_chunks(answers)

    def _note_chunks(self, answers: Slice) -> None:
        for column in answers.parts:
            if column.chunk is not None:
                received = column.results.items[0], column.chunk
                self.chunks.setdefault(column.process_id, []).append(received)
                if column.chunk.more:
                    self.unread.append(column.chunk)

    def read(self, chunks: int = 10**9) -> None:
        """Grants one more chunk for each that it reads."""
        while self.unread and chunks:
            chunks -= 1
            self.unread.popleft().grant(1)

    def result_of(self, worker: str) -> bytes:
        """The chunks joined; they must be contiguous and complete."""
        received = self.chunks[worker]
        sizes = [len(result) for result, _ in received]
        assert [chunk.at for _, chunk in received] == list(itertools.accumulate([0, *sizes[:-1]]))
        assert [chunk.more for _, chunk in received] == [True] * (len(received) - 1) + [False]
        return b"".join(result for result, _ in received)

    def take(self, start: int, answers: Slice) -> None:
        for row in range(len(answers)):
            self.answers[start + row].append(answers.at(row))
            self.order.append(start + row)

    @property
    def mode(self) -> Mode:
        return self.segment.route.mode

    @property
    def request_id(self) -> int:
        return self.segment.first_id

    @property
    def is_answered(self) -> bool:
        return all(self.answers)

    @property
    def rows_answered(self) -> list[int]:
        return [row for row, found in enumerate(self.answers) if found]

    @property
    def answer(self) -> AnswerRow:
        ((answer,),) = self.answers
        return answer

    def at(self, row: int) -> AnswerRow:
        (answer,) = self.answers[row]
        return answer

    def error_at(self, row: int) -> OverlayError | None:
        return aggregate.failure(self.at(row), 1.0)

    def result_at(self, row: int) -> bytes:
        return aggregate.result(self.mode, self.at(row), None)

    @property
    def error(self) -> OverlayError | None:
        return aggregate.failure(self.answer, 1.0)

    @property
    def result(self) -> bytes:
        return aggregate.result(self.mode, self.answer, None)

    @property
    def coverage(self) -> str:
        return aggregate.coverage(self.answer)

    def leave(self, start: int = 0, count: int | None = None) -> None:
        """The client cancels all or some rows."""
        if self.queued:
            self.queued.end(Code.CANCELLED, start, count)


class Node:
    """One process: what the server does with a call, on a real dispatcher and a real queue."""

    def __init__(self, network: MemoryNetwork, me: str, slots: int) -> None:
        self.alive = True
        self._network = network
        self._me = me
        process = network.topology.processes[me]
        self.executor = MemoryExecutor(network, process, slots)
        self.peers = MemoryPeers(network, me)
        self.meter = Meter()
        self.dispatcher = Dispatcher(
            network.topology,
            me,
            self.peers,
            self.executor if process.works else None,
            clock=network.clock,
        )
        self.queue = RequestQueue(
            me,
            slots=network.topology.queue_slots(me),
            in_service=process.in_service,
            max_bytes=network.topology.limits.max_waiting_bytes,
            claim=self.dispatcher.claim,
            start=self._start,
            on_started=self.peers.flush,
            clock=network.clock,
        )
        self.executor.on_free = self.queue.kick
        self.flow = self.queue.open_flow()

    def serve(
        self, segment: Segment, reply: OnResult, flow: Flow | None = None
    ) -> QueuedSegment | None:
        """flow: that of a stream; without one, a single request."""
        clock, queue = self._network.clock, self.queue
        self.meter.received(segment.count)
        reply = partial(self._count, reply)
        try:
            planner.check(self._network.topology, self._me, segment.route)
            if flow is None:
                queued = queue.admit(segment, reply)
            else:
                queued = queue.admit_to(flow, segment, reply)
        except OverlayError as e:
            refused = Part(self._me, e.code, str(e), executed=e.executed)
            reply(0, Slice(len(segment), (), refused=refused))
            return None
        if flow is not None:
            queue.kick()
        clock.at(segment.deadline, lambda: queued.end(Code.DEADLINE_EXCEEDED))
        return queued

    def _start(self, segment: Segment, place: Claimed, waited_s: float, sink: OnResult) -> Cancel:
        self._network.started.append((self._me, self._network.clock.now, segment))
        return self.dispatcher.start(segment, place, waited_s, sink)

    def _count(self, reply: OnResult, start: int, answers: Slice) -> None:
        """Counts as the server does, before the answer leaves."""
        for row in range(len(answers)):
            error = aggregate.failure(answers.at(row), 1.0)
            if error is None:
                self.meter.completed(1)
            elif error.code is Code.CANCELLED:
                self.meter.cancelled()
            elif error.executed is Executed.NO:
                self.meter.refused(error.cause)
            else:
                self.meter.failed()
        reply(start, answers)


class MemoryExecutor:
    """Runs requests immediately, or, after `hold`, when the test calls `finish`."""

    def __init__(self, network: MemoryNetwork, me: Process, slots: int) -> None:
        self.on_free: Callable[[], None] = lambda: None
        self.active = 0
        self.most = 0
        self.slots = slots
        self.network = network
        self.me = me
        self.seen = SeenIds(network.topology.limits, network.clock)
        self.chunk_bytes = 10**9  # a larger result is sent in chunks, if the request allows it
        self.sent = 0  # chunks
        self.held: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        self.held = self.held or []

    def finish(self, count: int | None = None) -> None:
        """Ends `count` of the held requests, or all of them and holds no more."""
        jobs = self.held or []
        if count is None:
            self.held = None
        else:
            jobs, self.held = jobs[:count], jobs[count:]
        for job in jobs:
            job()

    def claim(self, handler: str, count: int) -> int:
        count = max(0, min(count, self.slots - self.active))
        self.active += count
        self.most = max(self.most, self.active)
        return count

    def run(self, segment: Segment, waited_s: float, sink: OnResult) -> Cancel:
        job = _Job(self, segment, sink)
        again = set(self.seen.begin(segment).again)
        for row in again:
            job.refuse(row)
        fresh = [row for row in range(len(segment)) if row not in again]
        ids = segment.all_ids
        self.network.executed += [(self.me.id, ids[row]) for row in fresh]
        if self.held is None:
            job.finish(fresh)
        else:
            self.held += [partial(job.finish, [row]) for row in fresh]
        return job.end

    def free(self, count: int) -> None:
        self.active -= count
        self.on_free()


class _Job:
    """The running rows of one segment."""

    def __init__(self, executor: MemoryExecutor, segment: Segment, sink: OnResult) -> None:
        self._executor = executor
        self._segment = segment
        self._sink = sink
        self._open = PendingRows(len(segment))
        self._hops = (*segment.route.hops, executor.me.id)
        self._sending: dict[int, Callable[[int], None]] = {}

    def finish(self, rows: list[int]) -> None:
        me, segment = self._executor.me.id, self._segment
        items = segment.payloads.items
        results = {row: me.encode() + b": " + items[row] for row in rows}
        if (
            segment.chunks
            and segment.on_partial
            and len(results[rows[0]]) > self._executor.chunk_bytes
        ):
            (row,) = rows
            self._send(row, cut([results[row]], self._executor.chunk_bytes))
            return
        self._executor.free(len(rows))
        for first, count in consecutive(rows):
            column = Column([results[row] for row in range(first, first + count)])
            self._answer(first, PartSlice(me, column, self._hops))

    def _send(self, row: int, chunks: Iterator[tuple[bytes, bool]]) -> None:
        """Sends the row's result in chunks as they are granted, and frees its slot at the end."""
        at, granted = 0, self._segment.chunks
        is_sending = False

        def grant(more: int) -> None:
            nonlocal at, granted, is_sending
            granted += more
            if is_sending:  # the receiver grants while a chunk is being sent
                return
            is_sending = True
            while granted and self._open.runs(row, 1):
                result, follows = next(chunks)
                chunk = Chunk(at, follows, grant if follows else None)
                column = PartSlice(
                    self._executor.me.id,
                    Column([result]),
                    self._hops,
                    chunk=chunk if at or follows else None,
                )
                at += len(result)
                if not follows:
                    self._executor.free(1)
                    self._answer(row, column)
                    break
                granted -= 1
                self._executor.sent += 1
                assert self._segment.on_partial is not None
                self._segment.on_partial(row, Slice(1, (column,), (self._executor.me.id,)))
            is_sending = False

        self._sending[row] = grant
        grant(0)

    def refuse(self, row: int) -> None:
        self._executor.free(1)
        self._fail(row, 1, Detail(AlreadyExecuted.code, "again", AlreadyExecuted.executed))

    def end(self, code: Code, start: int, count: int) -> None:
        gone = [row for row in self._sending if self._open.runs(row, 1) and row - start < count]
        self._fail(start, count, Detail(code, "ended", Executed.YES))
        self._executor.free(len(gone))

    def _fail(self, start: int, count: int, failure: Detail) -> None:
        self._answer(start, PartSlice.missing(self._executor.me.id, count, failure))

    def _answer(self, start: int, column: PartSlice) -> None:
        count = len(column.results)
        answers = Slice(count, (column,), (self._executor.me.id,))
        for first, rows in self._open.take(start, count):
            self._sink(first, answers.slice(first - start, rows))


class MemoryPeers:
    """The links of one process, with the interface of overlay.peers.peers.Peers."""

    def __init__(self, network: MemoryNetwork, me: str) -> None:
        self._network = network
        self._me = me
        self._written: list[_Transfer] = []

    def up(self) -> frozenset[str]:
        return frozenset(edge.far for edge in self._mine() if edge.is_up)

    def awaited(self) -> set[str]:
        return {edge.far for edge in self._mine() if edge.awaited}

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        return self._network.nodes[worker].executor.slots

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        edge = self._to(neighbour)
        return edge.outstanding[handler], edge.service_s, edge.state, edge.is_recent

    def reserve(self, neighbour: str, handler: str, count: int) -> None:
        self._to(neighbour).outstanding[handler] += count

    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel:
        transfer = _Transfer(self._to(neighbour), segment, sink)
        self._written.append(transfer)
        return transfer.end

    def flush(self) -> None:
        """Sends what was written since the last flush."""
        transfers, self._written = self._written, []
        for transfer in transfers:
            transfer.begin()

    def _to(self, neighbour: str) -> Edge:
        return self._network.edges[self._me, neighbour]

    def _mine(self) -> Iterable[Edge]:
        return [edge for edge in self._network.edges.values() if edge.near == self._me]


@dataclass(eq=False)
class Edge:
    """The link from `near` down to `far`: a stream and its flow in `far`'s queue."""

    network: MemoryNetwork
    near: str
    far: str
    is_up: bool = True
    is_live: bool = True  # the stream, which a draining process keeps
    awaited: bool = False
    service_s: float = 0.0
    is_recent: bool = True  # service_s is
    state: State = State.HEALTHY
    outstanding: Counter[str] = field(default_factory=Counter)
    fates: deque[str] = field(default_factory=deque)
    held: deque[_Transfer] | None = None
    held_answers: list[tuple[_Transfer, int, Slice]] | None = None
    open: list[_Transfer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flow = self.network.nodes[self.far].queue.open_flow()

    def go_down(self, just_now: bool = False) -> None:
        self.is_up, self.is_live, self.awaited = False, False, just_now
        for transfer in list(self.open):
            transfer.lose("the connection is gone")
        self.network.nodes[self.near].queue.kick()


class _Transfer:
    """A segment in flight on an edge, until its last answer is back."""

    def __init__(self, edge: Edge, segment: Segment, sink: OnResult) -> None:
        self._edge = edge
        self._segment = segment
        self._sink = sink
        self._fate = DELIVERED
        self._delivered = False
        self._queued: QueuedSegment | None = None
        self._ended: list[tuple[int, int]] = []
        self._open = PendingRows(len(segment))
        self._window = ChunkWindow(0)

    def begin(self) -> None:
        edge = self._edge
        edge.open.append(self)
        for request_id in self._segment.all_ids:
            edge.network.sent.append((edge.near, edge.far, request_id))
        self._fate = edge.fates.popleft() if edge.fates else DELIVERED
        if self._fate is REFUSED or not edge.is_live:
            self.refuse()
        elif edge.held is not None:
            edge.held.append(self)
        else:
            self.deliver()

    def deliver(self) -> None:
        edge, network = self._edge, self._edge.network
        if not self._open.left:
            return
        left_s = self._segment.deadline - network.clock.now
        if left_s <= 0:
            self._refuse_all(Code.DEADLINE_EXCEEDED, "no time left", Executed.NO)
        elif self._fate is REQUEST_LOST or not network.nodes[edge.far].alive:
            self.lose("the connection broke")
        else:
            frame = pb2.Frame()
            left_s -= min(MARGIN_S, left_s / 4)
            partials = self._segment.on_partial is not None
            codec.write_segment(frame, 1, self._segment, left_s, as_they_come=partials)
            (made,) = pb2.Frame.FromString(frame.SerializeToString()).segments
            segment = codec.read_segment(made, network.clock.now, network.topology.limits)
            if made.as_they_come:
                segment = replace(segment, on_partial=self._take_partial)
            self._serve(segment)

    def refuse(self) -> None:
        self._refuse_all(Code.UNAVAILABLE, "refused", Executed.NO)

    def end(self, code: Code, start: int, count: int) -> None:
        """A cancel follows the segment; the process below answers it."""
        self._ended.append((start, count))
        if self._queued:
            self._queued.end(Code.CANCELLED, start, count)

    def lose(self, reason: str) -> None:
        """The call ends without answers; it is unknown whether the requests ran."""
        self._refuse_all(Code.UNAVAILABLE, reason, Executed.UNKNOWN)
        if self._queued:
            self._queued.end(Code.CANCELLED)

    @property
    def _asked(self) -> codec.Asked:
        segment, targets = self._segment, frozenset(self._segment.route.targets)
        return codec.Asked(
            segment.count, targets, segment.on_partial is not None, segment.chunks > 0
        )

    def take(self, start: int, answers: Slice) -> None:
        """An answer arrives, encoded and decoded as on the wire."""
        frame = pb2.Frame()
        codec.write_slice(frame, 1, start, answers)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).slices
        self._settle(made.start, codec.read_slice(made, self._asked))

    def _serve(self, segment: Segment) -> None:
        far = self._edge.network.nodes[self._edge.far]
        self._queued = far.serve(segment, self._answered, self._edge.flow)
        for start, count in self._ended if self._queued else ():
            self._queued.end(Code.CANCELLED, start, count)
        if self._fate is ANSWER_LOST:
            self.lose("the connection broke")

    def _answered(self, start: int, answers: Slice) -> None:
        if self._fate is ANSWER_LOST:
            return
        if self._edge.held_answers is None:
            self.take(start, answers)
        else:
            self._edge.held_answers.append((self, start, answers))

    def _take_partial(self, start: int, answers: Slice) -> None:
        """A part arrives before the answer."""
        if self._fate is ANSWER_LOST or not self._open.runs(start, len(answers)):
            return
        frame = pb2.Frame()
        codec.write_slice(frame, 1, start, answers, more=True)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).slices
        assert made.more
        for column in answers.parts:
            if column.chunk is not None:
                self._window.passes((1, start, column.process_id), column.chunk, 0)
        parts = codec.read_slice(made, self._asked).granted_by(partial(self._grant, start))
        self._segment.on_partial(made.start, parts)

    def _grant(self, start: int, worker: str, chunks: int) -> None:
        """A grant goes down, unless the row has ended."""
        if not self._open.runs(start, 1):
            return
        frame = pb2.Frame()
        frame.grants.add(number=1, row=start, process_id=worker, count=chunks)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).grants
        grant = self._window.granted((1, made.row, made.process_id), made.count, False)
        if grant:
            grant[0](grant[1])

    def _refuse_all(self, code: Code, reason: str, executed: Executed) -> None:
        part = Part(self._edge.far, code, reason, executed=executed)
        self._settle(0, Slice(len(self._segment), (), refused=part))

    def _settle(self, start: int, answers: Slice) -> None:
        edge, runs = self._edge, self._open.take(start, len(answers))
        if runs and not self._open.left:
            edge.open.remove(self)
        for first, rows in runs:
            edge.outstanding[self._segment.route.handler] -= rows
            self._sink(first, answers.slice(first - start, rows))
        edge.network.nodes[edge.near].peers.flush()  # retries on other links


def _shuffled(
    slices: list[tuple[_Transfer, int, Slice]], rng: random.Random
) -> list[tuple[_Transfer, int, Slice]]:
    chunks = []
    for transfer, start, answers in slices:
        cuts = sorted(rng.sample(range(1, len(answers)), rng.randint(0, len(answers) - 1)))
        for begin, stop in itertools.pairwise([0, *cuts, len(answers)]):
            chunks.append((transfer, start + begin, answers.slice(begin, stop - begin)))
    rng.shuffle(chunks)
    return chunks


def random_topology(seed: int) -> Topology:
    """A small overlay of random shape and order, with neighbours above, below and of equal rank."""
    rng = random.Random(seed)
    roles = ["leader", *["team_leader"] * rng.randint(0, 3), *["worker"] * rng.randint(1, 5)]
    rng.shuffle(roles)
    ids = [chr(ord("a") + n) for n in range(len(roles))]
    density = rng.choice([0.3, 0.6, 1.0])
    processes = {
        process_id: Process(
            process_id,
            role,
            rng.choice(["green", "pink"]),
            "h",
            1,
            tuple(
                n for n in rng.sample(ids, len(ids)) if n != process_id and rng.random() < density
            ),
        )
        for process_id, role in zip(ids, roles, strict=True)
    }
    return Topology(processes)


def topologies() -> st.SearchStrategy[Topology]:
    # From a seed: drawing each neighbour from hypothesis takes fifty times as long.
    return st.integers(0, 2**32).map(random_topology)
