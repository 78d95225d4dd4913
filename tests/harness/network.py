"""A network in memory: real relays, intakes and messages, without sockets, threads or sleeps.

    network = MemoryNetwork(the_six())
    asked = network.ask("A", b"hi", mode=Mode.ANY)
    asked = network.stream("A", 5)  a segment of five requests over a client's stream
    network.cut("A", "E")           the link is down, and what was under way on it is lost
    network.hold("A", "B")          what is sent there stays on the wire until let_go("A", "B")
    network.keep("A", "B")          the same for its answers, until answer_all("A", "B")
    network.next("A", "B", REFUSED) the fate of the next segment sent there
    network.advance(2)              time passes; deadlines come

Everything happens on the thread that causes it, and time moves only by `advance`.
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

MARGIN_S = 0.05  # what a sender keeps of its time for the way back

DELIVERED = "delivered"
REFUSED = "refused"  # with proof: nothing ran
ANSWER_LOST = "answer lost"  # the segment arrives, its answers do not
REQUEST_LOST = "request lost"  # and the sender cannot tell


def the_six() -> Topology:
    return config.load(ROOT / "two_hosts_config.json")


class Clock:
    """Monotonic seconds that only the test moves, and what is to happen at which of them."""

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
    """All processes of a topology. `sent`, `started` and `executed` tell what happened, in its
    order."""

    def __init__(self, topology: Topology, slots: int = 100) -> None:
        self.topology = topology
        self.clock = Clock()
        self.sent: list[tuple[str, str, int]] = []
        self.executed: list[tuple[str, int]] = []
        self.started: list[tuple[str, float, Segment]] = []  # by whom, when, what
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
        keyed: bool = False,
        early: bool = False,
        chunks: int = 0,
    ) -> Asked:
        """A client's single request. early: wants each part as it comes; chunks: and in chunks, so
        many at once, of which it grants more as the test has it `read` them."""
        route = Route(mode=mode, team=team, handler=handler)
        segment = self._segment(route, (payload,), deadline_s, request_id)
        asked = Asked(replace(segment, idempotent=keyed))
        if early or chunks:
            asked.segment.on_partial = asked.take_early
            asked.segment.chunks = chunks
        asked.ticket = self.nodes[process_id].serve(asked.segment, asked.take)
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
        lane: Flow | None = None,
    ) -> Asked:
        """A client's segment; its payloads are the rows' numbers."""
        node = self.nodes[process_id]
        payloads = tuple(b"%d" % row for row in range(rows))
        route = Route(mode=mode, team=team)
        asked = Asked(self._segment(route, payloads, deadline_s, first_id))
        asked.ticket = node.serve(asked.segment, asked.take, lane or node.lane)
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
        """just_now: so short ago that requests may wait for the link."""
        self.edges[near, far].go_down(just_now)

    def give_up(self, near: str, far: str) -> None:
        """The link has been down for longer than anyone waits for it."""
        self.edges[near, far].awaited = False
        self.nodes[near].intake.kick()

    def heal(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.is_up, edge.is_live, edge.awaited = True, True, False
        self.nodes[near].intake.kick()

    def hold(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.held = edge.held or deque()

    def let_go(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        letters, edge.held = edge.held or (), None
        for letter in letters:
            letter.deliver()

    def keep(self, near: str, far: str) -> None:
        edge = self.edges[near, far]
        edge.kept = edge.kept or []

    def answer_all(self, near: str, far: str, rng: random.Random | None = None) -> None:
        """The answers arrive; with `rng`, in chunks of any size and in any order."""
        edge = self.edges[near, far]
        slices, edge.kept = edge.kept or [], None
        for letter, start, answers in _shuffled(slices, rng) if rng else slices:
            letter.take(start, answers)

    def next(self, near: str, far: str, *fates: str) -> None:
        self.edges[near, far].fates.extend(fates)

    def kill(self, process_id: str) -> None:
        """The process is gone, and everyone has noticed."""
        self.nodes[process_id].alive = False
        for edge in self.into(process_id):
            edge.go_down()

    def drain(self, process_id: str) -> None:
        """The process stops: it refuses what waits and what comes, and its neighbours know."""
        for edge in self.into(process_id):
            edge.is_up = False
        self.nodes[process_id].intake.close()

    def into(self, process_id: str) -> list[Edge]:
        return [edge for edge in self.edges.values() if edge.far == process_id]

    def runs(self, request_id: int) -> Counter[str]:
        """How often each worker ran the request."""
        return Counter(worker for worker, found in self.executed if found == request_id)

    def sent_from(self, near: str) -> list[str]:
        """To whom each request went, once per request."""
        return [far for sender, far, _ in self.sent if sender == near]

    @property
    def left_over(self) -> dict[str, int]:
        """What still waits, runs or is owed anywhere; empty when all is quiet."""
        counts = Counter[str]()
        for process_id, node in self.nodes.items():
            _, waiting, active = node.intake.streamed
            counts[f"{process_id} waiting"] = node.intake.waiting + waiting
            counts[f"{process_id} active"] = node.intake.active + active
            counts[f"{process_id} working"] = node.works.active
        for edge in self.edges.values():
            counts[f"{edge.near}-{edge.far} outstanding"] = sum(edge.outstanding.values())
        return {what: count for what, count in counts.items() if count}


class Asked:
    """What a client asked, and every answer that each row got."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.ticket: QueuedSegment | None = None
        self.answers: list[list[AnswerRow]] = [[] for _ in range(len(segment))]
        self.order: list[int] = []
        self.early: list[list[Part]] = [[] for _ in range(len(segment))]
        self.chunks: dict[str, list[tuple[bytes, Chunk]]] = {}  # by worker, of the one row
        self.unread: deque[Chunk] = deque()

    def take_early(self, start: int, answers: Slice) -> None:
        for row in range(len(answers)):
            assert not self.answers[start + row], "a part came after its row's answer"
            self.early[start + row] += [
                column.at(row) for column in answers.parts if column.is_over
            ]
        self._note_chunks(answers)

    def _note_chunks(self, answers: Slice) -> None:
        for column in answers.parts:
            if column.chunk is not None:
                came = column.results.items[0], column.chunk
                self.chunks.setdefault(column.process_id, []).append(came)
                if column.chunk.more:
                    self.unread.append(column.chunk)

    def read(self, chunks: int = 10**9) -> None:
        """Grants one more for each of so many that came."""
        while self.unread and chunks:
            chunks -= 1
            self.unread.popleft().grant(1)

    def result_of(self, worker: str) -> bytes:
        """What its chunks make, which must follow each other and come to an end."""
        came = self.chunks[worker]
        sizes = [len(result) for result, _ in came]
        assert [chunk.at for _, chunk in came] == list(itertools.accumulate([0, *sizes[:-1]]))
        assert [chunk.more for _, chunk in came] == [True] * (len(came) - 1) + [False]
        return b"".join(result for result, _ in came)

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
        """The client hangs up, or cancels some rows."""
        if self.ticket:
            self.ticket.end(Code.CANCELLED, start, count)


class Node:
    """One process: what service and streams do with a call, on a real relay and a real intake."""

    def __init__(self, network: MemoryNetwork, me: str, slots: int) -> None:
        self.alive = True
        self._network = network
        self._me = me
        process = network.topology.processes[me]
        self.works = Workshop(network, process, slots)
        self.links = Links(network, me)
        self.meter = Meter()
        self.relay = Dispatcher(
            network.topology,
            me,
            self.links,
            self.works if process.works else None,
            clock=network.clock,
        )
        self.intake = RequestQueue(
            me,
            slots=network.topology.queue_slots(me),
            in_service=process.in_service,
            max_bytes=network.topology.limits.max_waiting_bytes,
            claim=self.relay.claim,
            start=self._start,
            on_started=self.links.flush,
            clock=network.clock,
        )
        self.works.on_free = self.intake.kick
        self.lane = self.intake.open_flow()

    def serve(
        self, segment: Segment, reply: OnResult, lane: Flow | None = None
    ) -> QueuedSegment | None:
        """With a lane as a stream does, else as a single request."""
        clock, intake = self._network.clock, self.intake
        self.meter.received(segment.count)
        reply = partial(self._count, reply)
        try:
            planner.check(self._network.topology, self._me, segment.route)
            if lane is None:
                ticket = intake.admit(segment, reply)
            else:
                ticket = intake.admit_to(lane, segment, reply)
        except OverlayError as e:
            refused = Part(self._me, e.code, str(e), executed=e.executed)
            reply(0, Slice(len(segment), (), refused=refused))
            return None
        if lane is not None:
            intake.kick()
        clock.at(segment.deadline, lambda: ticket.end(Code.DEADLINE_EXCEEDED))
        return ticket

    def _start(self, segment: Segment, place: Claimed, waited_s: float, sink: OnResult) -> Cancel:
        self._network.started.append((self._me, self._network.clock.now, segment))
        return self.relay.start(segment, place, waited_s, sink)

    def _count(self, reply: OnResult, start: int, answers: Slice) -> None:
        """As service does, before the answer leaves."""
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


class Workshop:
    """Runs requests at once, or, after `hold`, when the test lets it `finish` them."""

    def __init__(self, network: MemoryNetwork, me: Process, slots: int) -> None:
        self.on_free: Callable[[], None] = lambda: None
        self.active = 0
        self.most = 0
        self.slots = slots
        self.network = network
        self.me = me
        self.seen = SeenIds(network.topology.limits, network.clock)
        self.chunk_bytes = 10**9  # a larger result leaves in chunks of so many, where it may
        self.sent = 0  # chunks
        self.held: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        self.held = self.held or []

    def finish(self, count: int | None = None) -> None:
        """Ends `count` of the held requests, or all and those to come."""
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
    """Rows of one segment at work."""

    def __init__(self, works: Workshop, segment: Segment, sink: OnResult) -> None:
        self._works = works
        self._segment = segment
        self._sink = sink
        self._open = PendingRows(len(segment))
        self._hops = (*segment.route.hops, works.me.id)
        self._sending: dict[int, Callable[[int], None]] = {}

    def finish(self, rows: list[int]) -> None:
        me, segment = self._works.me.id, self._segment
        items = segment.payloads.items
        results = {row: me.encode() + b": " + items[row] for row in rows}
        if (
            segment.chunks
            and segment.on_partial
            and len(results[rows[0]]) > self._works.chunk_bytes
        ):
            (row,) = rows
            self._send(row, cut([results[row]], self._works.chunk_bytes))
            return
        self._works.free(len(rows))
        for first, count in consecutive(rows):
            column = Column([results[row] for row in range(first, first + count)])
            self._answer(first, PartSlice(me, column, self._hops))

    def _send(self, row: int, chunks: Iterator[tuple[bytes, bool]]) -> None:
        """The row's result in chunks, as far as they are granted; its place is free after that."""
        at, room = 0, self._segment.chunks
        is_sending = False

        def grant(more: int) -> None:
            nonlocal at, room, is_sending
            room += more
            if is_sending:  # granted by who just got one
                return
            is_sending = True
            while room and self._open.runs(row, 1):
                result, follows = next(chunks)
                chunk = Chunk(at, follows, grant if follows else None)
                column = PartSlice(
                    self._works.me.id,
                    Column([result]),
                    self._hops,
                    chunk=chunk if at or follows else None,
                )
                at += len(result)
                if not follows:
                    self._works.free(1)
                    self._answer(row, column)
                    break
                room -= 1
                self._works.sent += 1
                assert self._segment.on_partial is not None
                self._segment.on_partial(row, Slice(1, (column,), (self._works.me.id,)))
            is_sending = False

        self._sending[row] = grant
        grant(0)

    def refuse(self, row: int) -> None:
        self._works.free(1)
        self._fail(row, 1, Detail(AlreadyExecuted.code, "again", AlreadyExecuted.executed))

    def end(self, code: Code, start: int, count: int) -> None:
        gone = [row for row in self._sending if self._open.runs(row, 1) and row - start < count]
        self._fail(start, count, Detail(code, "ended", Executed.YES))
        self._works.free(len(gone))

    def _fail(self, start: int, count: int, failure: Detail) -> None:
        self._answer(start, PartSlice.missing(self._works.me.id, count, failure))

    def _answer(self, start: int, column: PartSlice) -> None:
        count = len(column.results)
        answers = Slice(count, (column,), (self._works.me.id,))
        for first, rows in self._open.take(start, count):
            self._sink(first, answers.slice(first - start, rows))


class Links:
    """The links of one process, as overlay.peers.peers.Links promises them."""

    def __init__(self, network: MemoryNetwork, me: str) -> None:
        self._network = network
        self._me = me
        self._written: list[_Letter] = []

    def up(self) -> frozenset[str]:
        return frozenset(edge.far for edge in self._mine() if edge.is_up)

    def awaited(self) -> set[str]:
        return {edge.far for edge in self._mine() if edge.awaited}

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        return self._network.nodes[worker].works.slots

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        edge = self._to(neighbour)
        return edge.outstanding[handler], edge.service_s, edge.state, edge.is_recent

    def reserve(self, neighbour: str, handler: str, count: int) -> None:
        self._to(neighbour).outstanding[handler] += count

    def send(self, neighbour: str, segment: Segment, sink: OnResult) -> Cancel:
        letter = _Letter(self._to(neighbour), segment, sink)
        self._written.append(letter)
        return letter.end

    def flush(self) -> None:
        """What was sent since the last flush leaves."""
        letters, self._written = self._written, []
        for letter in letters:
            letter.begin()

    def _to(self, neighbour: str) -> Edge:
        return self._network.edges[self._me, neighbour]

    def _mine(self) -> Iterable[Edge]:
        return [edge for edge in self._network.edges.values() if edge.near == self._me]


@dataclass(eq=False)
class Edge:
    """The way from `near` down to `far`: a stream, with its lane there."""

    network: MemoryNetwork
    near: str
    far: str
    is_up: bool = True
    is_live: bool = True  # its stream; of one who drains it is still there
    awaited: bool = False
    service_s: float = 0.0
    is_recent: bool = True  # its pace
    state: State = State.HEALTHY
    outstanding: Counter[str] = field(default_factory=Counter)
    fates: deque[str] = field(default_factory=deque)
    held: deque[_Letter] | None = None
    kept: list[tuple[_Letter, int, Slice]] | None = None
    open: list[_Letter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lane = self.network.nodes[self.far].intake.open_flow()

    def go_down(self, just_now: bool = False) -> None:
        self.is_up, self.is_live, self.awaited = False, False, just_now
        for letter in list(self.open):
            letter.lose("the connection is gone")
        self.network.nodes[self.near].intake.kick()


class _Letter:
    """A segment on its way over an edge, until its last answer is back."""

    def __init__(self, edge: Edge, segment: Segment, sink: OnResult) -> None:
        self._edge = edge
        self._segment = segment
        self._sink = sink
        self._fate = DELIVERED
        self._delivered = False
        self._ticket: QueuedSegment | None = None
        self._ended: list[tuple[int, int]] = []
        self._open = PendingRows(len(segment))
        self._passage = ChunkWindow(0)

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
            early = self._segment.on_partial is not None
            codec.write_segment(frame, 1, self._segment, left_s, as_they_come=early)
            (made,) = pb2.Frame.FromString(frame.SerializeToString()).segments
            segment = codec.read_segment(made, network.clock.now, network.topology.limits)
            if made.as_they_come:
                segment = replace(segment, on_partial=self._part_came)
            self._serve(segment)

    def refuse(self) -> None:
        self._refuse_all(Code.UNAVAILABLE, "refused", Executed.NO)

    def end(self, code: Code, start: int, count: int) -> None:
        """A cancel goes after the segment; who is below answers it."""
        self._ended.append((start, count))
        if self._ticket:
            self._ticket.end(Code.CANCELLED, start, count)

    def lose(self, reason: str) -> None:
        """The call ends without answers; whether the requests were run is not known."""
        self._refuse_all(Code.UNAVAILABLE, reason, Executed.UNKNOWN)
        if self._ticket:
            self._ticket.end(Code.CANCELLED)

    @property
    def _asked(self) -> codec.Asked:
        segment, targets = self._segment, frozenset(self._segment.route.targets)
        return codec.Asked(
            segment.count, targets, segment.on_partial is not None, segment.chunks > 0
        )

    def take(self, start: int, answers: Slice) -> None:
        """An answer arrives, through the real messages."""
        frame = pb2.Frame()
        codec.write_slice(frame, 1, start, answers)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).slices
        self._settle(made.start, codec.read_slice(made, self._asked))

    def _serve(self, segment: Segment) -> None:
        far = self._edge.network.nodes[self._edge.far]
        self._ticket = far.serve(segment, self._answered, self._edge.lane)
        for start, count in self._ended if self._ticket else ():
            self._ticket.end(Code.CANCELLED, start, count)
        if self._fate is ANSWER_LOST:
            self.lose("the connection broke")

    def _answered(self, start: int, answers: Slice) -> None:
        if self._fate is ANSWER_LOST:
            return
        if self._edge.kept is None:
            self.take(start, answers)
        else:
            self._edge.kept.append((self, start, answers))

    def _part_came(self, start: int, answers: Slice) -> None:
        """A part before the answer; after it none passes."""
        if self._fate is ANSWER_LOST or not self._open.runs(start, len(answers)):
            return
        frame = pb2.Frame()
        codec.write_slice(frame, 1, start, answers, more=True)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).slices
        assert made.more
        for column in answers.parts:
            if column.chunk is not None:
                self._passage.passes((1, start, column.process_id), column.chunk, 0)
        came = codec.read_slice(made, self._asked).granted_by(partial(self._granted, start))
        self._segment.on_partial(made.start, came)

    def _granted(self, start: int, worker: str, chunks: int) -> None:
        """A grant goes down; nobody hears it when the way is gone."""
        if not self._open.runs(start, 1):
            return
        frame = pb2.Frame()
        frame.grants.add(number=1, row=start, process_id=worker, count=chunks)
        (made,) = pb2.Frame.FromString(frame.SerializeToString()).grants
        told = self._passage.granted((1, made.row, made.process_id), made.count, False)
        if told:
            told[0](told[1])

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
        edge.network.nodes[edge.near].links.flush()  # what was tried elsewhere


def _shuffled(
    slices: list[tuple[_Letter, int, Slice]], rng: random.Random
) -> list[tuple[_Letter, int, Slice]]:
    chunks = []
    for letter, start, answers in slices:
        cuts = sorted(rng.sample(range(1, len(answers)), rng.randint(0, len(answers) - 1)))
        for begin, stop in itertools.pairwise([0, *cuts, len(answers)]):
            chunks.append((letter, start + begin, answers.slice(begin, stop - begin)))
    rng.shuffle(chunks)
    return chunks


def random_topology(seed: int) -> Topology:
    """A small overlay of any shape, in any order, with neighbours up, down and sideways."""
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
    # By a seed: drawing each neighbour by itself takes fifty times as long.
    return st.integers(0, 2**32).map(random_topology)
