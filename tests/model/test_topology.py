"""Which processes are above and below which."""

from __future__ import annotations

import pytest
from hypothesis import given

from overlay.model.topology import Process, Topology
from tests.harness.network import the_six, topologies

SIX = the_six()


@pytest.mark.parametrize(
    ("asked", "reached", "workers"),
    [("A", "ABCDEF", "CDF"), ("B", "BCD", "CD"), ("E", "DEF", "DF"), ("C", "C", "C")],
)
def test_a_request_reaches_a_process_and_all_below_it(asked, reached, workers):
    assert SIX.reach(asked) == set(reached)
    assert [worker.id for worker in SIX.workers_of(asked)] == list(workers)


@given(topologies())
def test_reach_is_the_transitive_closure_of_below(topology):
    for asked in topology.processes:
        found, todo = {asked}, [asked]
        while todo:
            lower = {n.id for n in topology.below(todo.pop())} - found
            found |= lower
            todo += lower
        assert topology.reach(asked) == found
        assert topology.reach(asked) == {asked}.union(
            *(topology.reach(n.id) for n in topology.below(asked))
        )


def test_an_unknown_neighbour_is_not_reached():
    topology = Topology.of(
        {
            "A": Process("A", "leader", "green", "", 0, ("B", "X")),
            "B": Process("B", "team_leader", "green", "", 0, ("A", "C")),
            "C": Process("C", "worker", "green", "", 0, ()),
        }
    )
    assert topology.reach("A") == {"A", "B", "C"}
    assert [p.id for p in topology.above("C")] == ["B"]
