"""An overlay and the loads with which the figures are measured.

Owns the thread "metrics" during a phase.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from faults import bench, figures, history
from faults.figures import p99
from faults.history import Answer, Call, Execution
from faults.load import Load, Notes, Planned
from faults.overlays import Overlay
from faults.scenarios import Scenario
from tests.harness.machine import NotReached, until

PEAK_S = 5.0  # of the closed loop
CLOSED = 12  # its calls in flight: each slot has one running and one waiting
ATTEMPTS = 3  # to send a load on time
CALM_S = 1.5  # before a load, so that it meets an overlay without recent refusals
METRICS_S = 0.02  # between two GetMetrics
USUAL = Planned(0, "any", "unary", "", "work", 100, 1.0)
WORKERS = {"": ["C", "D", "F"], "green": ["C"], "pink": ["D", "F"]}


@dataclass
class Phase:
    """A load from its first call to its last answer."""

    calls: list[Call]
    answers: list[Answer]
    begin: float
    end: float
    metrics_s: list[float] = field(default_factory=list)  # infinity: no answer
    received: int = 0  # by the leader
    invalid: str = ""

    def rate(self, skipped_s: float = 0.0) -> float:
        return figures.goodput(self.calls, self.answers, self.begin + skipped_s, self.end)


class Ground:
    def __init__(self, folder: Path) -> None:
        self.overlay = Overlay(
            folder, bench.configuration(Scenario("figures", "", slots=2)), bench.node_command()
        )
        self._first_id = 1

    def __enter__(self) -> Ground:
        try:
            self.overlay.start()
        except BaseException:
            self.overlay.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.overlay.close()

    @contextlib.contextmanager
    def loading(self, way: str = "unary") -> Iterator[tuple[Load, Notes]]:
        """A client that is connected."""
        notes = Notes()
        load = Load(self.overlay, notes, self._first_id, WORKERS)
        self._first_id += 1_000_000
        try:
            load.start()
            load.send(replace(USUAL, way=way, nap_ms=1, timeout_s=20))
            until(lambda: notes.answers, 25, "a first answer")
            notes.calls.clear()
            notes.answers.clear()
            yield load, notes
        finally:
            load.close()

    def offered(self, planned: Sequence[Planned], watched: bool = False) -> Phase:
        """Runs a phase of these calls, again if they were not sent on time.

        watched: GetMetrics is called meanwhile.
        """
        for _ in range(ATTEMPTS):
            time.sleep(CALM_S)
            with self.loading(planned[0].way) as (load, notes), self._asking(watched) as took:
                before = self.overlay.metrics("A").received
                begin = time.monotonic()
                load.run(planned)
                phase = phase_of(notes, begin, max(c.timeout_s for c in planned))
                phase.received = self.overlay.metrics("A").received - before
                phase.metrics_s = took
            if not phase.invalid:
                break
        return phase

    def peak(self, way: str, seconds: float = PEAK_S) -> Phase:
        """A closed loop, from which the overlay also learns how long the work takes."""
        with self.loading(way) as (load, notes):
            begin = time.monotonic()
            load.keep(CLOSED, replace(USUAL, way=way), seconds)
            phase = phase_of(notes, begin, USUAL.timeout_s)
            phase.invalid = ""  # nothing was due
            return phase

    def executions(self) -> list[Execution]:
        time.sleep(0.3)  # for running handlers
        return history.executions_of(
            line
            for path in sorted((self.overlay.folder / "executions").iterdir())
            for line in path.read_text(encoding="utf-8").splitlines()
        )

    @contextlib.contextmanager
    def _asking(self, enabled: bool) -> Iterator[list[float]]:
        took: list[float] = []
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(METRICS_S):
                asked = time.monotonic()
                try:
                    self.overlay.metrics("A")
                    took.append(time.monotonic() - asked)
                except grpc.RpcError:
                    took.append(math.inf)

        thread = threading.Thread(target=ask, name="metrics")
        if enabled:
            thread.start()
        try:
            yield took
        finally:
            ended.set()
            if enabled:
                thread.join()


def phase_of(notes: Notes, begin: float, timeout_s: float) -> Phase:
    end = time.monotonic()
    with contextlib.suppress(NotReached):
        until(lambda: not notes.open, timeout_s + 2, "an answer to every call")
    late = p99([call.at - call.due for call in notes.calls])
    phase = Phase(list(notes.calls), list(notes.answers), begin, end)
    if late > bench.LATENESS_S:
        phase.invalid = f"the load left {late * 1e3:.0f} ms late (p99; 20 ms are allowed)"
    return phase
