"""Which neighbours are asked next: pure decisions from the topology and the state of the links.

Requests only go to neighbours of a strictly lower rank (`Topology.below`), so no two requests can
wait for each other, and never to a process that is already in the hop list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from overlay.model.errors import ConfigurationMismatch, LoopDetected, UnknownName, Unreachable
from overlay.model.segments import Route, value
from overlay.model.topology import Process, Topology
from overlay.routing.outlier import State


@dataclass(frozen=True)
class Branch:
    """One neighbour to ask, and the workers that it is to cover (itself, if it is a worker)."""

    neighbour: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How a request gets to its workers. Each worker in scope is in one branch, local, or missing.

    missing: worker -> why it cannot be asked now. unknown: target -> why it is none of the workers
    of this process's configuration.
    """

    branches: tuple[Branch, ...] = ()
    local: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


# Backlog of a branch below which spreading would cost more than it gains; the second figure is for
# items shorter than TINY_S, whose transport costs more than their work and is cheaper in batches.
QUICK_S, TINY_QUICK_S, TINY_S = 0.0005, 0.002, 0.0001
AHEAD_S = 0.010  # of work that a branch may have beyond its slots, so that it never runs dry
MAX_OUTSTANDING = 4096  # of a branch and handler, however quick it is
_HALF_OPEN, _EJECTED = State.HALF_OPEN, State.EJECTED  # looked up once: every request calls `pick`


@value
class Load:
    """The load of a branch for a handler, as far as it is known.

    outstanding: items sent and not answered. slots: items it runs at once. asked: recent picks.
    service_s: the recent service time of one item; 0 if unknown. is_recent: it was measured a
    moment ago, so it is not that of other items long before.
    """

    outstanding: int = 0
    slots: int = 1
    asked: float = 0
    service_s: float = 0.0
    state: State = State.HEALTHY
    is_recent: bool = True

    @property
    def credit(self) -> int:
        """How many more items may be sent: as many as fill its slots and as it finishes in 10 ms.

        Sent items do not come back: by an old service time of quick items one neighbour would get
        thousands of long ones while others are idle.
        """
        slots = max(1, self.slots)
        is_known = self.service_s and self.is_recent
        ahead = int(slots * AHEAD_S / self.service_s) if is_known else 0
        return max(0, min(slots + ahead, MAX_OUTSTANDING) - self.outstanding)

    @property
    def is_quick(self) -> bool:
        """Whether it has work outstanding, but so little that it finishes in a moment."""
        return 0 < self.outstanding * self.service_s < _quick_s(self.service_s)

    @property
    def portion(self) -> int:
        """How many items to send at a time, within the credit, so that other branches get some."""
        return max(1, int(_quick_s(self.service_s) / self.service_s)) if self.service_s else 1


def _quick_s(service_s: float) -> float:
    return TINY_QUICK_S if service_s < TINY_S else QUICK_S


def check(topology: Topology, me: str, route: Route) -> None:
    """Raises an error if `me` cannot be asked this, before any place is taken.

    LoopDetected: `me` is in the hop list. UnknownName: no such team or handler, or no worker of the
    team is below `me`. ConfigurationMismatch: another process, which has checked its own file, asks
    for a handler that is unknown here, or only for workers that are.
    """
    if me in route.hops:
        raise LoopDetected(f"{me} is already in the hop list {' '.join(route.hops)}")
    if route.handler and route.handler not in topology.handlers:
        known = ", ".join(sorted(topology.handlers))
        if route.targets is not None:
            raise ConfigurationMismatch(f"{_mismatch(me)}: it has no handler '{route.handler}'")
        raise UnknownName(f"no handler '{route.handler}' here; there are {known}")
    if not scope(topology, me, route):
        if route.targets is not None:
            raise ConfigurationMismatch(_unknown(me, route.targets))
        raise UnknownName(_why_no_worker(topology, me, route.team))


def scope(topology: Topology, me: str, route: Route) -> tuple[str, ...]:
    """The workers that the request is for, in the order of the configuration.

    With targets: those that are known here. Otherwise the process asked decides: for the leader it
    is every worker, for a team leader the workers among its neighbours, for a worker itself; `team`
    narrows each.
    """
    if route.targets is not None:
        known = {worker.id for worker in topology.workers}
        return topology.in_order(known.intersection(route.targets))
    return tuple(w.id for w in topology.workers_of(me) if route.team in ("", w.team))


def plan(topology: Topology, me: str, links_up: Iterable[str], route: Route) -> Plan:
    """Which neighbours `me` asks next, and whether it works on the payload itself.

    links_up: ids of the neighbours that can be asked now. A worker is asked through its own team's
    leader; if that link is down, through another reachable team leader that has it as neighbour (as
    over B-D in the six processes); a direct link of the leader comes last. Branches and their
    targets are in the order of the configuration.
    """
    up = set(links_up) - set(route.hops)
    below = topology.below(me)
    chosen: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    local = False
    for worker in scope(topology, me, route):
        if worker == me:
            local = True
            continue
        next_hops = _next_hops(topology, below, worker)
        live = [neighbour for neighbour in next_hops if neighbour in up]
        if live:
            chosen.setdefault(live[0], []).append(worker)
        else:
            missing[worker] = _why_unreachable(me, worker, next_hops)
    order = topology.in_order(set(chosen))
    branches = tuple(Branch(n, tuple(chosen[n])) for n in order)
    return Plan(branches, local, missing, _unknown_targets(topology, me, route))


def lone(topology: Topology, me: str) -> frozenset[str]:
    """The neighbours below `me` that lead to one worker each, while all links are up."""
    below = topology.below(me)
    branches = plan(topology, me, (n.id for n in below), Route()).branches
    single = {branch.neighbour for branch in branches if len(branch.targets) == 1}
    return frozenset(n.id for n in below if n.works or n.id in single)


def next_hop(
    topology: Topology, me: str, links_up: Iterable[str], target: str, hops: Sequence[str] = ()
) -> str:
    """The neighbour that leads down to process `target`: itself, or a team leader above it.

    Raises UnknownName when there is no such process, or none below `me`; LoopDetected;
    Unreachable.
    """
    if target not in topology.processes:
        raise UnknownName(f"no process '{target}' here; there are {', '.join(topology.processes)}")
    if me in hops:
        raise LoopDetected(f"{me} is already in the hop list {' '.join(hops)}")
    next_hops = [n.id for n in topology.below(me) if target in topology.reach(n.id)]
    next_hops.sort(key=lambda neighbour: neighbour != target)  # itself first
    if not next_hops:
        host, port = topology.processes[target].host, topology.processes[target].port
        raise UnknownName(
            f"{me} asks only those below it, and {target} is not; ask {target} itself, "
            f"at {host} {port}"
        )
    up = set(links_up)
    for neighbour in next_hops:
        if neighbour in up:
            return neighbour
    links = " or ".join(next_hops)
    raise Unreachable(f"{target} cannot be reached: {me} has no live link to {links}")


def pick(branches: Sequence[Branch], load: Callable[[Branch], Load]) -> tuple[Branch, int] | None:
    """The branch to ask now and how many items it may get; None if they should wait.

    A half-open branch comes first, with one item; then healthy ones while they have credit, then
    slow ones. An ejected branch is asked only if all are.
    Among equals a branch that is busy but quick keeps getting items; otherwise the one with the
    least outstanding work per slot is next, and after that the one asked least per slot, so that
    even sparse requests spread.
    """
    best: tuple[tuple[State, bool, float, float], Branch, int] | None = None
    for branch in branches:
        found = load(branch)
        credit = found.credit
        if credit:
            slots = max(1, found.slots)
            rank = found.state, not found.is_quick, found.outstanding / slots, found.asked / slots
            if best is None or rank < best[0]:
                portion = 1 if found.state is _HALF_OPEN else found.portion
                best = rank, branch, min(credit, portion)
    if best is None:
        return None
    if best[0][0] is _EJECTED and any(load(branch).state is not _EJECTED for branch in branches):
        return None  # better to wait for the others
    return best[1:]


def _unknown_targets(topology: Topology, me: str, route: Route) -> Mapping[str, str]:
    known = {worker.id for worker in topology.workers}
    return {t: _unknown(me, (t,)) for t in route.targets or () if t not in known}


def _unknown(me: str, targets: Sequence[str]) -> str:
    names = ", ".join(targets[:5]) + (" and others" if len(targets) > 5 else "")
    return f"{_mismatch(me)}: it does not know worker {names}"


def _mismatch(me: str) -> str:
    return f"{me} reads another configuration"


def _next_hops(topology: Topology, below: tuple[Process, ...], worker: str) -> list[str]:
    """The neighbours through which `worker` can be reached, best first."""
    team = topology.processes[worker].team
    through = [n for n in below if n.id != worker and worker in topology.reach(n.id)]
    own = [n.id for n in through if n.team == team]
    others = [n.id for n in through if n.team != team]
    return own + others + [n.id for n in below if n.id == worker]


def _why_unreachable(me: str, worker: str, next_hops: list[str]) -> str:
    if not next_hops:
        return f"{me} has no neighbor that leads to {worker}"
    if next_hops == [worker]:
        return f"{worker} cannot be reached from {me}"
    return f"cannot be reached: {me} has no live link to {' or '.join(next_hops)}"


def _why_no_worker(topology: Topology, me: str, team: str) -> str:
    if team not in {worker.team for worker in topology.workers}:
        teams = ", ".join(dict.fromkeys(worker.team for worker in topology.workers))
        return f"no team '{team}'; there are {teams}"
    return f"no worker of team '{team}' can be asked from {me}"
