"""Property test of the core: real dispatchers, queues and messages on an in-memory network.

Hypothesis sends, cancels, breaks and repairs in any order while time passes, and checks the
invariants after each step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overlay.model.limits import Limits
from overlay.model.segments import Executed, Mode
from overlay.model.topology import Topology
from tests.harness.network import ANSWER_LOST, REFUSED, REQUEST_LOST, Asked, MemoryNetwork, the_six

SIX = the_six()
SIDEWAYS = {"B": "E", "E": "B", "D": "F", "F": "D"}  # neighbours of equal rank: never asked
EDGES = [(near, far.id) for near in SIX.processes for far in SIX.below(near)]
ASKED = st.sampled_from("AAABEDF")  # the leader most often
MODES = st.sampled_from(Mode)
TEAMS = st.sampled_from(["", "green", "pink"])
DEADLINES_S = st.sampled_from([0.1, 1.0, 10.0])
PASSING_S = st.sampled_from([0.05, 0.5, 3.0])
FATES = (REFUSED, ANSWER_LOST, REQUEST_LOST)
TROUBLES = ("cut", "cut just now", "heal", "keep", "answer", *FATES, *FATES)


def small(in_service: int, queue_slots: int) -> Topology:
    """The six with small queues, which fill soon, and with neighbours of equal rank."""
    processes = {
        p.id: replace(p, in_service=in_service, neighbors=(*p.neighbors, *SIDEWAYS.get(p.id, "")))
        for p in SIX.processes.values()
    }
    return replace(SIX, processes=processes, limits=Limits(queue_slots=queue_slots))


class Core(RuleBasedStateMachine):
    """asked: every request. gone: cancelled ids, with the number of starts at that time."""

    @initialize(
        in_service=st.integers(1, 4), queue_slots=st.integers(1, 4), slots=st.integers(1, 3)
    )
    def begin(self, in_service: int, queue_slots: int, slots: int) -> None:
        self.network = MemoryNetwork(small(in_service, queue_slots), slots)
        self.asked: list[Asked] = []
        self.gone: dict[int, int] = {}
        for node in self.network.nodes.values():
            node.executor.hold()

    @rule(
        me=ASKED,
        count=st.integers(1, 4),
        mode=MODES,
        team=TEAMS,
        s=DEADLINES_S,
        idempotent=st.booleans(),
    )
    def ask(self, me: str, count: int, mode: Mode, team: str, s: float, idempotent: bool) -> None:
        how = {"mode": mode, "team": team, "deadline_s": s, "idempotent": idempotent}
        self.asked += [self.network.ask(me, **how) for _ in range(count)]

    @rule(me=ASKED, rows=st.integers(1, 6), mode=MODES, team=TEAMS, s=DEADLINES_S)
    def stream(self, me: str, rows: int, mode: Mode, team: str, s: float) -> None:
        self.asked.append(self.network.stream(me, rows, mode=mode, team=team, deadline_s=s))

    @rule(worker=st.sampled_from("CDF"), count=st.integers(1, 4))
    def finish(self, worker: str, count: int) -> None:
        self.network.nodes[worker].executor.finish(count)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        asked.leave()
        for id_ in asked.segment.all_ids:
            self.gone.setdefault(id_, len(self.network.started))

    @rule(seconds=PASSING_S, timers_run=st.booleans())
    def time_passes(self, seconds: float, timers_run: bool) -> None:
        """timers_run: if not, the thread that expires requests does not get the CPU."""
        if timers_run:
            self.network.advance(seconds)
        else:
            self.network.clock.now += seconds

    @rule(edge=st.sampled_from(EDGES), what=st.sampled_from(TROUBLES))
    def trouble(self, edge: tuple[str, str], what: str) -> None:
        acts = {
            "cut": self.network.cut,
            "cut just now": partial(self.network.cut, just_now=True),
            "heal": self.network.heal,
            "keep": self.network.hold_answers,
            "answer": self.network.release_answers,
        }
        if what in acts:
            acts[what](*edge)
        else:
            self.network.next(*edge, what)

    @invariant()
    def bounded(self) -> None:
        for node in self.network.nodes.values():
            assert node.queue.waiting <= node.queue.slots
            assert node.queue.active <= node.queue.in_service
            assert node.executor.active <= node.executor.slots

    @invariant()
    def conserved(self) -> None:
        for me, node in self.network.nodes.items():
            counts, (_, waiting, active) = node.meter.counts(), node.queue.streamed
            ended = counts.completed + counts.failed + counts.refused + counts.cancelled
            inside = node.queue.waiting + node.queue.active + waiting + active
            assert counts.received == ended + inside, me
        assert all(len(found) <= 1 for asked in self.asked for found in asked.answers)

    @invariant()
    def no_dead_work(self) -> None:
        for me, at, segment in self.network.started:
            assert at < segment.deadline, f"{me} started it after its deadline"
        for id_, before in self.gone.items():
            later = [s for _, _, segment in self.network.started[before:] for s in segment.all_ids]
            assert id_ not in later, "started after it was cancelled"

    @invariant()
    def rank_falls(self) -> None:
        processes = self.network.topology.processes
        assert all(processes[a].rank > processes[b].rank for a, b, _ in self.network.sent)

    def teardown(self) -> None:
        """Delivers all that is held; then nothing may be outstanding."""
        if not hasattr(self, "network"):
            return
        for edge in EDGES:
            self.network.release_answers(*edge)
        for node in self.network.nodes.values():
            node.executor.finish()
        self.network.advance(20)
        self.conserved()
        assert self.network.left_over == {}
        for asked in self.asked:
            assert [len(found) for found in asked.answers] == [1] * len(asked.segment)
            for row, id_ in enumerate(asked.segment.all_ids):
                self._check_executions(asked, row, id_)

    def _check_executions(self, asked: Asked, row: int, id_: int) -> None:
        runs, error = self.network.runs(id_), asked.error_at(row)
        tries = 2 if asked.segment.idempotent else 1
        assert max(runs.values(), default=0) <= 1
        assert asked.mode is Mode.ALL or len(runs) <= tries
        assert error is None or error.executed is not Executed.NO or not runs


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=45, stateful_step_count=40, deadline=None)
