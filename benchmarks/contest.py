"""Runs the rounds of each set-up: starts its peers, measures them in turn, stops them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import peers
from benchmarks.children import NotStarted
from benchmarks.entrant import Entrant
from benchmarks.figures import rotated
from benchmarks.loads import Work
from benchmarks.rows import SETUPS, Row, Setup

WARM_UP_S = 0.2
WARM_UP_ITEMS = 1_000


@dataclass(frozen=True)
class Plan:
    """seconds: the length of one measurement. share: how much of each bulk is sent, 0 to 1."""

    peers: tuple[str, ...]
    rows: tuple[Row, ...]
    rounds: int
    seconds: float
    share: float = 1.0


@dataclass
class Results:
    """As they will be written. not_run: reasons, by peer or by "peer, row"."""

    measurements: list[dict[str, Any]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, folder: Path, results: Results, say: Callable[[str], None]) -> None:
    """Fills `results` as it goes, so that an interrupted run keeps what it has."""
    able = _able_to_run(plan.peers, results)
    for setup in SETUPS:
        rows = [row for row in plan.rows if row.setup == setup.name]
        if rows:
            rounds = _Rounds(plan, setup, rows, results, say)
            rounds.run(able, folder / setup.name.replace(" ", "-"))


def entered(row: Row, names: Iterable[str]) -> list[str]:
    """The peers that take part in a row, in their order."""
    invited = [name for name in names if row.peers is None or name in row.peers]
    return [name for name in invited if _can(peers.load(name), row)]


def _can(peer: ModuleType, row: Row) -> bool:
    setups, rows = getattr(peer, "SETUPS", (row.setup,)), getattr(peer, "ROWS", (row.name,))
    return row.setup in setups and row.name in rows and row.needs <= peer.SUPPORTS


def _able_to_run(names: Sequence[str], results: Results) -> list[str]:
    reasons = {name: peers.load(name).missing() for name in names}
    results.not_run.update({name: reason for name, reason in reasons.items() if reason})
    return [name for name in names if not reasons[name]]


class _Rounds:
    """All rounds of one set-up, during which every peer stays up."""

    def __init__(
        self,
        plan: Plan,
        setup: Setup,
        rows: list[Row],
        results: Results,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._setup, self._rows = plan, setup, rows
        self._results, self._say = results, say
        self._up: dict[str, Entrant] = {}

    def run(self, names: list[str], folder: Path) -> None:
        started: list[Entrant] = []
        try:
            for name in names:
                if any(name in entered(row, names) for row in self._rows):
                    entrant = Entrant(name, peers.load(name), self._setup, folder / name)
                    started.append(entrant)
                    self._start(entrant)
            self._warm_up()
            for number in range(self._plan.rounds):
                self._round(number)
        finally:
            for entrant in started:
                entrant.stop()

    def _start(self, entrant: Entrant) -> None:
        began = time.monotonic()
        try:
            entrant.start()
        except NotStarted as error:
            self._note(entrant.name, None, str(error))
            return
        self._up[entrant.name] = entrant
        took_s = time.monotonic() - began
        self._say(f"[{self._setup.name}] {entrant.module.TITLE} is up ({took_s:.1f} s)")

    def _warm_up(self) -> None:
        """Every row once, briefly and not counted. A peer that fails at a row is left out of it."""
        for row in self._rows:
            for name in entered(row, self._up):
                work = self._work(row, name, WARM_UP_S, most=WARM_UP_ITEMS)
                found = self._up[name].measure(work)
                if "error" in found:
                    self._note(name, row, found["error"])

    def _round(self, number: int) -> None:
        began = time.monotonic()
        for place, row in enumerate(self._rows):
            able = [n for n in entered(row, self._up) if _key(n, row) not in self._results.not_run]
            for name in rotated(able, number + place):
                work = self._work(row, name, self._plan.seconds)
                found = self._up[name].measure(work)
                about = {"row": row.name, "peer": name, "round": number}
                self._results.measurements.append({**about, **found})
                if "error" in found:
                    self._say(f"{name}, {row.name}: {found['error']}")
        took_s = time.monotonic() - began
        self._say(
            f"[{self._setup.name}] round {number + 1} of {self._plan.rounds} ({took_s:.0f} s)"
        )

    def _work(self, row: Row, name: str, seconds: float, most: int | None = None) -> Work:
        count = 0
        if row.load.startswith("bulk"):
            module = peers.load(name)
            of_peer = getattr(module, row.load.upper(), module.BULK)
            count = max(100, int(of_peer * self._plan.share))
            count = min(count, most) if most else count
        return Work(
            load=row.load,
            workers=self._setup.workers,
            mode=row.mode,
            callers=max(1, row.callers),
            size=row.size,
            seconds=seconds,
            count=count,
            beside=row.beside,
            clients=row.clients,
            lanes=row.lanes,
        )

    def _note(self, name: str, row: Row | None, reason: str) -> None:
        key = _key(name, row) if row else f"{name}, set-up {self._setup.name}"
        self._results.not_run[key] = reason
        self._say(f"not run: {key}: {reason}")


def _key(name: str, row: Row) -> str:
    return f"{name}, {row.name}"
