"""Which neighbours are asked next: tables for the six processes, properties of every overlay."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.model.errors import ConfigurationMismatch, LoopDetected, UnknownName
from overlay.model.segments import Route
from overlay.model.topology import Topology
from overlay.routing import planner
from overlay.routing.outlier import State
from overlay.routing.planner import Branch, Load
from tests.harness.network import random_topology, the_six, topologies

SIX = the_six()

# me, links up, hops, team, targets -> branches, local, missing
PLANS = [
    ("A", "BE", "", "", None, {"B": "C", "E": "DF"}, False, ""),
    ("A", "B", "", "", None, {"B": "CD"}, False, "F"),
    ("A", "E", "", "", None, {"E": "DF"}, False, "C"),
    ("A", "", "", "", None, {}, False, "CDF"),
    ("A", "BE", "", "green", None, {"B": "C"}, False, ""),
    ("A", "BE", "", "pink", None, {"E": "DF"}, False, ""),
    ("A", "B", "", "pink", None, {"B": "D"}, False, "F"),
    ("B", "CD", "", "", None, {"C": "C", "D": "D"}, False, ""),
    ("B", "D", "", "", None, {"D": "D"}, False, "C"),
    ("B", "CD", "", "pink", None, {"D": "D"}, False, ""),
    ("B", "CD", "A", "", "C", {"C": "C"}, False, ""),
    ("B", "CD", "A", "", "DC", {"C": "C", "D": "D"}, False, ""),
    ("B", "CD", "A", "", "CF", {"C": "C"}, False, "F"),
    ("B", "CD", "A", "pink", "C", {"C": "C"}, False, ""),
    ("E", "DF", "", "", None, {"D": "D", "F": "F"}, False, ""),
    ("E", "DF", "", "pink", None, {"D": "D", "F": "F"}, False, ""),
    ("E", "F", "A", "", "DF", {"F": "F"}, False, "D"),
    ("E", "DF", "AD", "", "DF", {"F": "F"}, False, "D"),
    ("A", "BE", "E", "", None, {"B": "CD"}, False, "F"),
    ("C", "", "", "", None, {}, True, ""),
    ("D", "", "", "pink", None, {}, True, ""),
    ("D", "BE", "AE", "", "D", {}, True, ""),
    ("C", "", "AB", "", "CD", {}, True, "D"),
]


@pytest.mark.parametrize(
    ("me", "up", "hops", "team", "targets", "branches", "local", "missing"), PLANS
)
def test_the_six_processes_plan_as_the_table_says(
    me, up, hops, team, targets, branches, local, missing
):
    route = Route(team=team, hops=tuple(hops), targets=tuple(targets) if targets else None)

    plan = planner.plan(SIX, me, up, route)

    assert {b.neighbour: "".join(b.targets) for b in plan.branches} == branches
    assert (plan.local, "".join(sorted(plan.missing))) == (local, missing)


# me, the workers in scope for each team
SCOPES = [
    ("A", {"": "CDF", "green": "C", "pink": "DF", "blue": ""}),
    ("B", {"": "CD", "green": "C", "pink": "D"}),
    ("E", {"": "DF", "green": "", "pink": "DF"}),
    ("C", {"": "C", "green": "C", "pink": ""}),
]


@pytest.mark.parametrize(("me", "scopes"), SCOPES)
def test_the_scope_is_the_workers_that_the_process_asked_leads(me, scopes):
    found = {team: "".join(planner.scope(SIX, me, Route(team=team))) for team in scopes}
    assert found == scopes


B_READS = "B reads another configuration: it"
REFUSALS = [
    ("A", Route(hops=("A",)), LoopDetected, "A is already in the hop list A"),
    ("B", Route(hops=("A", "B", "C")), LoopDetected, "B is already in the hop list A B C"),
    ("A", Route(team="blue"), UnknownName, "no team 'blue'; there are green, pink"),
    ("E", Route(team="green"), UnknownName, "no worker of team 'green' can be asked from E"),
    ("D", Route(team="green"), UnknownName, "no worker of team 'green' can be asked from D"),
    ("A", Route(handler="nope"), UnknownName, "no handler 'nope' here; there are echo"),
    ("B", Route(targets=("Z", "E")), ConfigurationMismatch, f"{B_READS} does not know worker Z, E"),
    ("B", Route(handler="x", targets=("C",)), ConfigurationMismatch, f"{B_READS} has no handler"),
]


@pytest.mark.parametrize(("me", "route", "error", "sentence"), REFUSALS)
def test_a_request_that_cannot_be_asked_is_refused_with_its_reason(me, route, error, sentence):
    with pytest.raises(error) as raised:
        planner.check(SIX, me, route)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize("me", SIX.processes)
def test_every_process_accepts_a_plain_request(me):
    planner.check(SIX, me, Route())


def test_unknown_targets_do_not_affect_the_others():
    plan = planner.plan(SIX, "B", "CD", Route(targets=("Z", "C", "E")))
    assert [(b.neighbour, b.targets) for b in plan.branches] == [("C", ("C",))]
    assert plan.missing == {}
    assert plan.unknown == {
        "Z": "B reads another configuration: it does not know worker Z",
        "E": "B reads another configuration: it does not know worker E",
    }


def test_a_missing_worker_has_its_reason():
    plan = planner.plan(SIX, "A", "B", Route())
    assert plan.missing == {"F": "cannot be reached: A has no live link to E"}

    plan = planner.plan(SIX, "A", "", Route())
    assert plan.missing["D"] == "cannot be reached: A has no live link to E or B"

    plan = planner.plan(SIX, "B", "D", Route())
    assert plan.missing == {"C": "C cannot be reached from B"}

    plan = planner.plan(SIX, "B", "CD", Route(targets=("F",)))
    assert plan.missing == {"F": "B has no neighbor that leads to F"}


def situation(seed: int) -> tuple[Topology, str, set[str], Route]:
    """A process of a random overlay, its links that are up, and a request to it."""
    chance = random.Random(seed)
    topology = random_topology(seed)
    ids = list(topology.processes)
    me = chance.choice(ids)
    hops = [n for n in ids if n != me and chance.random() < 0.1]
    workers = [worker.id for worker in topology.workers]
    targets = chance.sample(workers, chance.randint(1, len(workers)))
    route = Route(
        team=chance.choice(["", "green", "pink"]),
        hops=tuple(hops),
        targets=tuple(targets) if chance.random() < 0.5 else None,
    )
    return topology, me, {n for n in ids if chance.random() < 0.7}, route


situations = st.integers(0, 2**32).map(situation)


@given(situations)
@settings(max_examples=300, deadline=None)
def test_each_worker_in_scope_is_in_one_branch_or_local_or_missing(situation):
    topology, me, up, route = situation

    plan = planner.plan(topology, me, up, route)

    covered = [target for branch in plan.branches for target in branch.targets]
    found = Counter([*covered, *plan.missing, *([me] if plan.local else [])])
    assert found == Counter(planner.scope(topology, me, route))
    assert all(plan.missing.values())


@given(situations)
@settings(max_examples=300, deadline=None)
def test_only_live_neighbours_of_lower_rank_outside_the_hop_list_are_asked(situation):
    topology, me, up, route = situation

    for branch in planner.plan(topology, me, up, route).branches:
        asked = topology.processes[branch.neighbour]
        assert asked.rank < topology.processes[me].rank
        assert asked.id in topology.processes[me].neighbors
        assert asked.id in up
        assert asked.id not in route.hops


@given(situations)
@settings(max_examples=300, deadline=None)
def test_branches_and_targets_keep_the_order_of_the_configuration(situation):
    topology, me, up, route = situation
    order = list(topology.processes)

    plan = planner.plan(topology, me, up, route)

    neighbours = [branch.neighbour for branch in plan.branches]
    assert neighbours == sorted(neighbours, key=order.index)
    for branch in plan.branches:
        assert list(branch.targets) == sorted(branch.targets, key=order.index)


@given(situations)
@settings(max_examples=300, deadline=None)
def test_a_worker_is_asked_through_its_own_teams_leader_if_that_is_up(situation):
    topology, me, up, route = situation

    for branch in planner.plan(topology, me, up, route).branches:
        for target in branch.targets:
            near = [n for n in topology.below(me) if target in {b.id for b in topology.below(n.id)}]
            own = {n.id for n in near if n.team == topology.processes[target].team}
            live = own & (up - set(route.hops)) - {target}
            assert not live or branch.neighbour in live


@given(topologies(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_request_runs_once_on_each_worker_in_scope_or_reports_it_missing(topology, data):
    me = data.draw(st.sampled_from(list(topology.processes)))
    links = [(near, far.id) for near in topology.processes for far in topology.below(near)]
    down = set(data.draw(st.lists(st.sampled_from(links), unique=True))) if links else set()
    runs: Counter[str] = Counter()
    missing: set[str] = set()

    def ask(at: str, route: Route) -> None:
        assert at not in route.hops
        up = {far for near, far in links if near == at and (near, far) not in down}
        plan = planner.plan(topology, at, up, route)
        runs.update([at] if plan.local else [])
        missing.update(plan.missing)
        for branch in plan.branches:
            ask(branch.neighbour, Route(hops=(*route.hops, at), targets=branch.targets))

    ask(me, Route())

    scope = planner.scope(topology, me, Route())
    assert max(runs.values(), default=0) <= 1
    assert set(runs) | missing == set(scope)
    assert not set(runs) & missing


BRANCHES = [Branch("B", ("C",)), Branch("E", ("D", "F"))]

PICKS = [
    ({"B": Load(0, 1), "E": Load(0, 2)}, "B"),
    ({"B": Load(0, 1, asked=1), "E": Load(0, 2, asked=1)}, "E"),
    ({"B": Load(0, 1, asked=1), "E": Load(0, 2, asked=2)}, "B"),
    ({"B": Load(1, 4), "E": Load(1, 2)}, "B"),
    ({"B": Load(2, 4), "E": Load(1, 4)}, "E"),
    ({"B": Load(1, 1), "E": Load(1, 2)}, "E"),
    ({"B": Load(1, 1), "E": Load(2, 2)}, None),
    ({"B": Load(0, 0), "E": Load(2, 2)}, "B"),
    ({"B": Load(1, 0), "E": Load(2, 2)}, None),
]


@pytest.mark.parametrize(("loads", "picked"), PICKS)
def test_any_goes_to_the_least_outstanding_work_per_slot(loads, picked):
    found = planner.pick(BRANCHES, lambda branch: loads[branch.neighbour])
    assert (found and found[0].neighbour) == picked


SLOW, EJECTED, HALF_OPEN = State.SLOW, State.EJECTED, State.HALF_OPEN

# A branch of one worker and one of two, by their state.
STATES = [
    ({"B": Load(0, 1, state=SLOW), "E": Load(1, 2)}, "E"),
    ({"B": Load(0, 1, state=SLOW), "E": Load(2, 2)}, "B"),  # too much for the healthy one
    ({"B": Load(0, 1, state=SLOW), "E": Load(0, 2, state=SLOW, asked=1)}, "B"),
    ({"B": Load(0, 1, state=EJECTED), "E": Load(1, 2)}, "E"),
    ({"B": Load(0, 1, state=EJECTED), "E": Load(2, 2)}, None),  # waits for the healthy one
    ({"B": Load(0, 1, state=EJECTED), "E": Load(2, 2, state=SLOW)}, None),
    ({"B": Load(0, 1, state=EJECTED), "E": Load(1, 2, state=SLOW)}, "E"),
    ({"B": Load(0, 1, state=EJECTED), "E": Load(1, 2, state=EJECTED)}, "B"),  # no other is left
    ({"B": Load(1, 1, state=EJECTED), "E": Load(1, 2, state=EJECTED)}, "E"),
    ({"B": Load(0, 1), "E": Load(1, 2, state=HALF_OPEN)}, "E"),
    ({"B": Load(0, 1), "E": Load(2, 2, state=HALF_OPEN)}, "B"),
]


@pytest.mark.parametrize(("loads", "picked"), STATES)
def test_any_goes_to_healthy_then_to_slow_and_only_in_the_end_to_ejected_branches(loads, picked):
    found = planner.pick(BRANCHES, lambda branch: loads[branch.neighbour])
    assert (found and found[0].neighbour) == picked


def test_a_trial_is_one_item():
    loads = {"B": Load(0, 50, state=HALF_OPEN, service_s=1e-5), "E": Load(0, 50)}
    picked = planner.pick(BRANCHES, lambda branch: loads[branch.neighbour])
    assert picked == (BRANCHES[0], 1)


# me -> its neighbours that lead to one worker
LONE = {"A": "B", "B": "CD", "C": "", "E": "DF"}


@pytest.mark.parametrize(("me", "lone"), LONE.items())
def test_workers_and_team_leaders_of_one_worker_are_lone(me, lone):
    assert "".join(sorted(planner.lone(SIX, me))) == lone


def test_no_branch_is_picked_if_there_is_none():
    assert planner.pick([], lambda branch: Load()) is None


@given(
    st.dictionaries(st.sampled_from("BCDEF"), st.tuples(*[st.integers(0, 9)] * 3)),
    st.lists(st.sampled_from(State), min_size=5, max_size=5),
)
def test_a_branch_with_credit_is_picked_if_there_is_one(found, states):
    loads = {
        n: Load(*numbers, state=s) for (n, numbers), s in zip(found.items(), states, strict=False)
    }

    picked = planner.pick([Branch(n, (n,)) for n in loads], lambda branch: loads[branch.neighbour])

    usable = [load for load in loads.values() if load.state is not EJECTED] or loads.values()
    assert (picked is None) == (not any(load.credit for load in usable))
    assert picked is None or 0 < picked[1] <= loads[picked[0].neighbour].credit


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_sequential_requests_spread_by_slots(slots):
    branches = [Branch(str(n), (str(n),)) for n in range(len(slots))]
    asked: Counter[str] = Counter()

    for _ in range(10 * sum(slots)):
        branch, _ = planner.pick(
            branches, lambda b: Load(0, slots[int(b.neighbour)], asked[b.neighbour])
        )
        asked[branch.neighbour] += 1

    assert all(abs(asked[str(n)] - 10 * count) <= count for n, count in enumerate(slots))


LOADS = st.builds(
    Load,
    st.integers(0, 5000),
    st.integers(0, 200),
    st.integers(0, 9),
    st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 0.05, 10]),
)


@given(st.dictionaries(st.sampled_from("BCDEF"), LOADS, min_size=1))
def test_a_portion_is_at_least_one_and_at_most_the_credit(loads):
    picked = planner.pick([Branch(n, (n,)) for n in loads], lambda branch: loads[branch.neighbour])
    if picked is not None:
        branch, portion = picked
        assert 1 <= portion <= loads[branch.neighbour].credit


CREDITS = [
    (Load(0, 4), 4),
    (Load(3, 4), 1),
    (Load(9, 4), 0),
    (Load(0, 0), 1),  # a branch that has reported nothing gets one at a time
    (Load(0, 2, service_s=0.001), 2 + 20),  # two slots, and what they finish in 10 ms
    (Load(22, 2, service_s=0.001), 0),
    (Load(0, 2, service_s=1.0), 2),
    (Load(0, 2, service_s=0.001, is_recent=False), 2),  # other items may have been quicker
    (Load(2, 2, service_s=0.001, is_recent=False), 0),
    (Load(0, 100, service_s=0.000001), 4096),  # the maximum
    (Load(4095, 100, service_s=0.000001), 1),
]


@pytest.mark.parametrize(("load", "credit"), CREDITS)
def test_credit_is_the_free_slots_and_the_items_of_the_next_10_ms(load, credit):
    assert load.credit == credit


PORTIONS = [
    (Load(0, 50), 1),  # while the service time is unknown
    (Load(0, 50, service_s=0.0001), 5),
    (Load(0, 50, service_s=0.00001), 200),
    (Load(0, 50, service_s=0.002), 1),
    (Load(49, 50, service_s=0.002), 1),
]


@pytest.mark.parametrize(("load", "portion"), PORTIONS)
def test_a_portion_is_at_most_half_a_ms_of_work_or_2_ms_of_tiny_items(load, portion):
    assert load.portion == portion


def test_a_branch_that_is_busy_but_quick_keeps_getting_items():
    loads = {"B": Load(3, 1, service_s=0.0001), "E": Load(0, 2, service_s=0.0001)}
    branch, _ = planner.pick(BRANCHES, lambda branch: loads[branch.neighbour])
    assert branch.neighbour == "B"


def test_items_spread_when_the_backlog_is_no_longer_quick():
    loads = {"B": Load(50, 1, service_s=0.0001), "E": Load(0, 2, service_s=0.0001)}
    branch, _ = planner.pick(BRANCHES, lambda branch: loads[branch.neighbour])
    assert branch.neighbour == "E"
