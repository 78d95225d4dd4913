"""The trials that measure the figures, each on its own overlay.

Owns the thread "striker" or "restarts" during a trial.
"""

from __future__ import annotations

import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from faults import bench, breaking, figures, scenarios
from faults.figures import ROLES, Sample, p99
from faults.ground import ATTEMPTS, USUAL, Ground, Phase, phase_of
from faults.history import Execution
from faults.load import Notes, evenly
from tests.harness import hosts
from tests.harness.machine import NotReached
from tests.harness.memory import Rss

SECONDS = 10.0  # of a load, by default
PEAK = 60.0  # a second: 3 workers, 2 slots each, 0.1 s
WARM_UP_S = 1.0  # left out of the peak, until connected and all slots are in use
ONSET_S = 1.0  # of an overload, while the queue fills
HEALTHY = 30.0  # a second: two workers can do it, one cannot
AFTER_S = 8.0  # of load after a fault
FROZEN_LEADER_S = 3.0
CUT_LOAD_S = 12.0  # the link is cut in the middle of it
RESTART_RATE = 200.0
RESTARTED = 10_000  # requests, meanwhile
ROUNDS = 3  # at least


@dataclass(frozen=True)
class Asked:
    """How long a load lasts. overload_s: at 10x, in the trials of recovery."""

    seconds: float
    overload_s: float


Trial = Callable[[Ground, Asked], Iterator[Sample]]


def overload(ground: Ground, asked: Asked) -> Iterator[Sample]:
    """Peak, 2x and 10x, with single calls and with the library's stream."""
    for way in ("unary", "library"):
        like = replace(USUAL, way=way)
        peak = ground.peak(way).rate(WARM_UP_S)
        twice = ground.offered(evenly(2 * PEAK, asked.seconds, like))
        yield Sample(f"goodput-2x-{way}", 100 * twice.rate() / peak, twice.invalid)
        tenfold = ground.offered(evenly(10 * PEAK, asked.seconds, like), watched=way == "unary")
        found = {f"goodput-10x-{way}": 100 * tenfold.rate() / peak}
        for figure, value in _of_the_accepted(tenfold, ground.executions()).items():
            found[f"{figure}-{way}"] = value
        if way == "unary":
            found |= _of_the_refused(tenfold)
        else:
            found["amplification"] = tenfold.received / len(tenfold.calls)
        for figure, value in found.items():
            yield Sample(figure, value, tenfold.invalid)


def _of_the_accepted(phase: Phase, executions: Sequence[Execution]) -> dict[str, float]:
    later = figures.due_since(phase.calls, phase.begin + ONSET_S)
    first = phase.calls[: len(phase.calls) - len(later)]  # in the order of their times
    begun, ended = figures.dead(phase.calls, executions)
    return {
        "accepted-p99": p99(figures.times(later, phase.answers, refused=False)),
        "accepted-p99-first": p99(figures.times(first, phase.answers, refused=False)),
        "dead-begun": 100 * begun,
        "dead-ended": 100 * ended,
    }


def _of_the_refused(phase: Phase) -> dict[str, float]:
    calls = figures.answered_share(phase.calls, phase.answers)
    return {
        "refusal-p99": 1e3 * p99(figures.times(phase.calls, phase.answers, refused=True)),
        "metrics-p99": 1e3 * p99(phase.metrics_s),
        "answered": 100 * min(calls, _finite_share(phase.metrics_s)),
    }


def recovery(
    ground: Ground, asked: Asked, tries: int = 0, figure: str = "recovery"
) -> Iterator[Sample]:
    half = evenly(PEAK / 2, asked.seconds, USUAL)
    before = ground.offered(half)
    normal_s = p99(figures.times(before.calls, before.answers, refused=False)) + 0.1
    ten = evenly(10 * PEAK, asked.overload_s, replace(USUAL, tries=tries))
    after = [replace(c, after_s=c.after_s + asked.overload_s, tries=tries) for c in half]
    phase = ground.offered([*ten, *after])
    since = phase.begin + asked.overload_s
    value = figures.whole_again_s(phase.calls, phase.answers, since, normal_s)
    yield Sample(figure, value, phase.invalid)


def recovery_with_tries(ground: Ground, asked: Asked) -> Iterator[Sample]:
    return recovery(ground, asked, tries=3, figure="recovery-tries")


def memory(ground: Ground, asked: Asked) -> Iterator[Sample]:
    ground.peak("unary", asked.seconds)
    large = replace(USUAL, size=64 * 1024)
    with Rss({"A": ground.overlay.processes["A"].pid}) as leader:
        phase = ground.offered(evenly(10 * PEAK, asked.seconds, large))
    yield Sample("memory", leader.grown, phase.invalid)


def greedy(ground: Ground, asked: Asked) -> Iterator[Sample]:
    """One caller sends ten times the peak, and nine send 5 % of it each."""
    ground.peak("unary", asked.seconds)
    planned = evenly(10 * PEAK, asked.seconds, replace(USUAL, caller="greedy"))
    for number in range(9):
        modest = replace(USUAL, caller=f"modest-{number}")
        begin = number / 9 / (PEAK / 20)
        planned += [
            replace(c, after_s=c.after_s + begin) for c in evenly(PEAK / 20, asked.seconds, modest)
        ]
    planned.sort(key=lambda call: call.after_s)
    phase = ground.offered(planned)
    # Calls are recorded in the order in which they were planned.
    callers = zip(phase.calls, planned, strict=True)
    nine = {call.id for call, like in callers if like.caller != "greedy"}
    answers = [answer for answer in phase.answers if answer.id in nine]
    good = sum(map(figures.is_complete, answers))
    yield Sample("greedy", 100 * good / len(nine), phase.invalid, figures.why_not(answers))


def kill(ground: Ground, asked: Asked) -> Iterator[Sample]:
    overlay = ground.overlay

    def strike(process: str) -> float:
        since = time.monotonic()
        overlay.kill(process)
        if process == "A":
            overlay.spawn(process)
        return since

    def mend(process: str) -> None:
        if process != "A":
            overlay.serve(process)

    return _each("kill", ground, strike, mend)


def freeze(ground: Ground, asked: Asked) -> Iterator[Sample]:
    overlay = ground.overlay

    def strike(process: str) -> float:
        since = time.monotonic()
        overlay.signal(process, signal.SIGSTOP)
        if process == "A":
            time.sleep(FROZEN_LEADER_S)
            since = time.monotonic()
            overlay.signal(process, signal.SIGCONT)
        return since

    return _each("freeze", ground, strike, lambda p: overlay.signal(p, signal.SIGCONT))


def cut(folder: Path) -> Iterator[Sample]:
    """Runs the bench's scenarios on two hosts; counts their calls of mode any without a team."""
    for role in ROLES:
        scenario = scenarios.BY_NAME[f"cut-{role.replace(' ', '-')}"]
        for attempt in range(ATTEMPTS):
            outcome = bench.run(scenario, folder / f"{role}-{attempt}", CUT_LOAD_S, seed=1)
            if not outcome.invalid:
                break
        if not outcome.history.faults:
            raise NotReached(outcome.invalid)
        (fault,) = outcome.history.faults
        since = fault.end if role == "leader" else fault.begin
        calls = [c for c in outcome.history.calls if c.mode == "any" and not c.team]
        value = figures.whole_again_s(calls, outcome.history.answers, since)
        yield Sample(f"cut-{role}", value, outcome.invalid)


def _each(
    what: str, ground: Ground, strike: Callable[[str], float], mend: Callable[[str], None]
) -> Iterator[Sample]:
    """Strikes one process after another under a healthy load."""
    for role, processes in ROLES.items():
        for process in processes:
            for _ in range(ATTEMPTS):
                ground.overlay.settle()
                phase, since = _struck(ground, partial(strike, process))
                mend(process)
                if not phase.invalid:
                    break
            value = figures.whole_again_s(phase.calls, phase.answers, since)
            yield Sample(f"{what}-{role}", value, phase.invalid)


def _struck(ground: Ground, strike: Callable[[], float]) -> tuple[Phase, float]:
    """The phase, and the time of the strike."""
    with ground.loading() as (load, notes), ThreadPoolExecutor(1, "striker") as pool:
        begin = time.monotonic()
        load.run(evenly(HEALTHY, 1, USUAL))
        since = pool.submit(strike)
        load.run(evenly(HEALTHY, FROZEN_LEADER_S + AFTER_S, USUAL))
        return phase_of(notes, begin, USUAL.timeout_s), since.result()


def restart(ground: Ground, asked: Asked) -> Iterator[Sample]:
    """Rolling restarts of the six while the library sends requests."""
    stage = breaking.Stage(ground.overlay, Notes(), random.Random(1), 0)

    def rounds(notes: Notes) -> None:
        for number in itertools.count():
            if number >= ROUNDS and len(notes.calls) >= RESTARTED:
                return
            breaking.restart_all(stage)

    like = replace(USUAL, way="library", nap_ms=2, timeout_s=30)
    second = [
        replace(c, mode=mode)
        for c, mode in zip(evenly(RESTART_RATE, 1, like), _mixed(), strict=False)
    ]
    with ground.loading("library") as (load, notes), ThreadPoolExecutor(1, "restarts") as pool:
        begin = time.monotonic()
        restarting = pool.submit(rounds, notes)
        while not restarting.done():
            load.run(second)
        phase = phase_of(notes, begin, like.timeout_s)
    restarting.result()
    # Failures count even if the load was sent late.
    good = sum(map(figures.is_complete, phase.answers))
    twice = figures.executed_twice(phase.calls, ground.executions())
    yield Sample("restart-asked", len(phase.calls))
    yield Sample("restart-failed", len(phase.calls) - good, note=figures.why_not(phase.answers))
    yield Sample("restart-twice", twice)


def _mixed() -> Iterator[str]:
    """One in ten has mode all."""
    while True:
        yield from ("all", *["any"] * 9)


def _finite_share(values: Sequence[float]) -> float:
    return sum(map(math.isfinite, values)) / len(values) if values else math.nan


TRIALS: dict[str, Trial] = {
    "overload": overload,
    "recovery": recovery,
    "recovery-tries": recovery_with_tries,
    "memory": memory,
    "greedy": greedy,
    "kill": kill,
    "freeze": freeze,
    "restart": restart,
}
NAMES = (*TRIALS, "cut")


def chosen(names: Sequence[str]) -> list[str]:
    """The named trials, or all. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no trial '{unknown[0]}'; there are {', '.join(NAMES)}")
    return [name for name in NAMES if not names or name in names]


def why_not(name: str) -> str:
    """Why this trial cannot run here; empty if it can."""
    if name == "cut":
        return hosts.why_not()
    return "" if name != "freeze" or hasattr(signal, "SIGSTOP") else "needs a POSIX system"


def measure(name: str, run: int, folder: Path, asked: Asked) -> Iterator[Sample]:
    """One trial on its own overlay, in `folder`. Raises NotReached if it gets stuck."""
    if name == "cut":
        yield from (replace(sample, run=run) for sample in cut(folder))
        return
    with Ground(folder) as ground:
        for sample in TRIALS[name](ground, asked):
            yield replace(sample, run=run)
