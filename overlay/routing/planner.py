"""Which neighbours are asked next: pure decisions over the topology and the state of the links.

Requests only go to neighbours of a strictly lower rank (`Topology.below`), so that two requests
can never wait for each other, and never to an id that is already in the hop list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from overlay.model.errors import LoopDetected, OtherConfiguration, UnknownName, Unreachable
from overlay.model.segments import Route, value
from overlay.model.topology import Process, Topology
from overlay.routing.outlier import State


@dataclass(frozen=True)
class Branch:
    """One neighbour to ask, and the workers it shall cover (itself, if it is a worker)."""

    neighbour: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How a request gets to its workers. Each worker in scope is in one branch, local, or missing.

    missing: worker -> why it cannot be asked now. unknown: targets that the configuration here does
    not have as workers, each with that reason.
    """

    branches: tuple[Branch, ...] = ()
    local: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


# Backlog of a branch below which spreading would cost more than it gains; the second figure is for
# items so tiny that their way costs more than their work, and that gain by going together.
QUICK_S, TINY_QUICK_S, TINY_S = 0.0005, 0.002, 0.0001
AHEAD_S = 0.010  # work that a branch may have beyond its slots, so that it never runs dry
MAX_OUTSTANDING = 4096  # of a branch and handler, however quick it is
_HALF_OPEN, _EJECTED = State.HALF_OPEN, State.EJECTED  # looked up once: `pick` is on every way


@value
class Load:
    """What is known of a branch for a handler.

    outstanding: items asked and not answered. slots: handlers it runs at once. asked: recent
    picks. service_s: the recent time of one item, 0 when not known. is_recent: it was measured a
    moment ago, and not of other items long before.
    """

    outstanding: int = 0
    slots: int = 1
    asked: float = 0
    service_s: float = 0.0
    state: State = State.HEALTHY
    is_recent: bool = True

    @property
    def credit(self) -> int:
        """How many more items may go down: free slots, and what it finishes in 10 ms.

        What went down does not come back: by the time of quick items long ago one neighbour would
        get thousands of long ones, while others have nothing to do.
        """
        slots = max(1, self.slots)
        is_known = self.service_s and self.is_recent
        ahead = int(slots * AHEAD_S / self.service_s) if is_known else 0
        return max(0, min(slots + ahead, MAX_OUTSTANDING) - self.outstanding)

    @property
    def is_quick(self) -> bool:
        """Whether it is at work and will be done with it at once."""
        return 0 < self.outstanding * self.service_s < _quick_s(self.service_s)

    @property
    def portion(self) -> int:
        """How many items to hand over at a time, within the credit, so that others get some."""
        return max(1, int(_quick_s(self.service_s) / self.service_s)) if self.service_s else 1


def _quick_s(service_s: float) -> float:
    return TINY_QUICK_S if service_s < TINY_S else QUICK_S


def check(topology: Topology, me: str, route: Route) -> None:
    """Raises what is wrong with asking `me` this, before any place is taken.

    LoopDetected: `me` is in the hop list. UnknownName: no such team or handler, or no worker of the
    team can be asked from here. OtherConfiguration: a process asks for a handler that is not known
    here, or only for workers that are not; it has checked that by its own file.
    """
    if me in route.hops:
        raise LoopDetected(f"{me} is already in the hop list {' '.join(route.hops)}")
    if route.handler and route.handler not in topology.handlers:
        known = ", ".join(sorted(topology.handlers))
        if route.targets is not None:
            raise OtherConfiguration(f"{_other(me)}: it has no handler '{route.handler}'")
        raise UnknownName(f"no handler '{route.handler}' here; there are {known}")
    if not scope(topology, me, route):
        if route.targets is not None:
            raise OtherConfiguration(_unknown(me, route.targets))
        raise UnknownName(_no_worker(topology, me, route.team))


def scope(topology: Topology, me: str, route: Route) -> tuple[str, ...]:
    """The workers that the request means, in the order of the configuration.

    With targets: those, as far as they are known here. Else the process asked decides: the leader
    means every worker, a team leader the workers among its neighbours, a worker itself; `team`
    narrows each.
    """
    if route.targets is not None:
        known = {worker.id for worker in topology.workers}
        return topology.in_order(known.intersection(route.targets))
    return tuple(w.id for w in topology.workers_of(me) if route.team in ("", w.team))


def plan(topology: Topology, me: str, links_up: Iterable[str], route: Route) -> Plan:
    """Which neighbours `me` asks next, and whether it works on the payload itself.

    links_up: ids of the neighbours that can be asked now. A worker is asked through its own team's
    leader; where that link is down, through another live team leader that has it as neighbour; a
    direct link of a leader comes last. Branches and their targets keep the configuration's order.
    Source: the edge B-D of the six processes is such a second way.
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
        ways = _ways(topology, below, worker)
        live = [way for way in ways if way in up]
        if live:
            chosen.setdefault(live[0], []).append(worker)
        else:
            missing[worker] = _no_way(me, worker, ways)
    order = topology.in_order(set(chosen))
    branches = tuple(Branch(n, tuple(chosen[n])) for n in order)
    return Plan(branches, local, missing, _unknown_targets(topology, me, route))


def lone(topology: Topology, me: str) -> frozenset[str]:
    """The neighbours below `me` that stand for one worker each, while all are up."""
    below = topology.below(me)
    branches = plan(topology, me, (n.id for n in below), Route()).branches
    single = {branch.neighbour for branch in branches if len(branch.targets) == 1}
    return frozenset(n.id for n in below if n.works or n.id in single)


def way_to(
    topology: Topology, me: str, links_up: Iterable[str], target: str, hops: Sequence[str] = ()
) -> str:
    """The neighbour that leads down to `target`, of any role: itself, or a team leader above it.

    Raises UnknownName when there is no such process, or none below `me`; LoopDetected;
    Unreachable.
    """
    if target not in topology.processes:
        raise UnknownName(f"no process '{target}' here; there are {', '.join(topology.processes)}")
    if me in hops:
        raise LoopDetected(f"{me} is already in the hop list {' '.join(hops)}")
    ways = [n.id for n in topology.below(me) if target in topology.reach(n.id)]
    ways.sort(key=lambda way: way != target)  # itself first
    if not ways:
        host, port = topology.processes[target].host, topology.processes[target].port
        raise UnknownName(
            f"{me} asks only those below it, and {target} is not; ask {target} itself, "
            f"at {host} {port}"
        )
    up = set(links_up)
    for way in ways:
        if way in up:
            return way
    raise Unreachable(f"{target} cannot be reached: {me} has no live link to {' or '.join(ways)}")


def pick(branches: Sequence[Branch], load: Callable[[Branch], Load]) -> tuple[Branch, int] | None:
    """The branch to ask now and how many items it may get; None when they should wait.

    One that is half-open comes first, with one item; then the healthy ones while they have credit,
    then the slow ones. One that is ejected is asked only when all are.
    Among equals it stays with a branch that is at work and quick; else it takes the one with the
    least outstanding work per slot. Ties go to the one asked the least per slot, so that even
    sparse requests spread.
    """
    best: tuple[tuple[State, bool, float, float], Branch, int] | None = None
    for branch in branches:
        found = load(branch)
        credit = found.credit
        if credit:
            slots = max(1, found.slots)
            rank = found.state, not found.is_quick, found.outstanding / slots, found.asked / slots
            if best is None or rank < best[0]:
                most = 1 if found.state is _HALF_OPEN else found.portion
                best = rank, branch, min(credit, most)
    if best is not None and best[0][0] is _EJECTED and not all(_is_ejected(branches, load)):
        return None  # better to wait for the others
    return best and best[1:]


def _is_ejected(branches: Iterable[Branch], load: Callable[[Branch], Load]) -> Iterator[bool]:
    return (load(branch).state is _EJECTED for branch in branches)


def _unknown_targets(topology: Topology, me: str, route: Route) -> Mapping[str, str]:
    """They cost their own parts, and the others of their branch nothing."""
    known = {worker.id for worker in topology.workers}
    return {t: _unknown(me, (t,)) for t in route.targets or () if t not in known}


def _unknown(me: str, targets: Sequence[str]) -> str:
    names = ", ".join(targets[:5]) + (" and others" if len(targets) > 5 else "")
    return f"{_other(me)}: it does not know worker {names}"


def _other(me: str) -> str:
    return f"{me} reads another configuration"


def _ways(topology: Topology, below: tuple[Process, ...], worker: str) -> list[str]:
    """The neighbours through which `worker` can be reached, best first."""
    team = topology.processes[worker].team
    through = [n for n in below if n.id != worker and worker in topology.reach(n.id)]
    own = [n.id for n in through if n.team == team]
    others = [n.id for n in through if n.team != team]
    return own + others + [n.id for n in below if n.id == worker]


def _no_way(me: str, worker: str, ways: list[str]) -> str:
    if not ways:
        return f"{me} has no neighbor that leads to {worker}"
    if ways == [worker]:
        return f"{worker} cannot be reached from {me}"
    return f"cannot be reached: {me} has no live link to {' or '.join(ways)}"


def _no_worker(topology: Topology, me: str, team: str) -> str:
    if team not in {worker.team for worker in topology.workers}:
        teams = ", ".join(dict.fromkeys(worker.team for worker in topology.workers))
        return f"no team '{team}'; there are {teams}"
    return f"no worker of team '{team}' can be asked from {me}"
