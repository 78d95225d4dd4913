"""The rules of test_rules.py once more, with mutual TLS on every connection.

Left out are those that one process keeps by itself, where the way that a request came makes no
difference: scopes, invalid requests, failing handlers, slots, the queue and its bounds, counters,
request ids that were used before. test_tls.py has the one bound that depends on a certificate: a
caller's share of the queue.
"""
# ruff: noqa: F401 - pytest finds tests and fixtures by their names

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.cluster import Overlay
from tests.system.test_rules import (
    fresh,
    lend,
    test_a_cancel_at_the_client_ends_the_work_at_every_hop,
    test_a_frozen_worker_costs_only_its_own_part,
    test_a_request_id_runs_once_per_worker,
    test_a_second_signal_ends_the_process_immediately,
    test_a_stopping_process_finishes_running_requests_and_refuses_the_rest,
    test_every_concurrent_request_gets_an_answer,
    test_metrics_describe_the_whole_overlay,
    test_mode_all_asks_every_worker_and_reports_each,
    test_mode_any_asks_exactly_one_worker_and_balances,
    test_mode_any_uses_the_workers_that_are_alive_and_without_any_the_answer_is_unavailable,
    test_neighbours_route_around_a_stopping_team_leader,
    test_the_deadline_ends_the_work_at_every_hop,
    test_when_a_team_leader_is_killed_nothing_runs_twice_and_d_is_reached_through_b,
    way,
    ways,
)


@pytest.fixture(scope="module")
def security() -> dict[str, Any]:
    return {"tls": "tls"}


def test_these_overlays_are_closed(six: Overlay) -> None:
    assert {six.metrics(i).security.mode for i in six.ids} == {"tls"}
