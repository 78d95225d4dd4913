"""What a NATS server that keeps jobs says of itself, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from overlay.model.jobs_servers import JobsServer
from overlay.monitor.servers_check import Certificate, findings

SERVER = JobsServer("10.0.0.1", 4222)


def said(sync_always: Any = True, **meta: Any) -> dict[str, Any]:
    meta = {"cluster_size": 3, "leader": "n1", **meta}
    return {"jetstream": {"config": {"sync_always": sync_always}, "meta": meta}}


@pytest.mark.parametrize(
    ("varz", "states"),
    [
        (said(), []),
        (None, ["no answer"]),
        ({}, ["no JetStream"]),
        ({"jetstream": []}, ["no JetStream"]),
        (said(sync_always=False), ["unsafe"]),
        (said(sync_always="true"), ["unsafe"]),
        (said(cluster_size=2), ["no cluster"]),
        (said(cluster_size=None), ["no cluster"]),
        (said(leader=""), ["no majority"]),
        (said(leader=SERVER.name, replicas=[{"name": "n2", "current": True}]), []),
        (said(leader=SERVER.name, replicas=[{"name": "n2", "current": False}, "x"]), ["behind"]),
        (said(leader="n2", replicas=[{"name": "n2", "current": False}]), ["behind"]),
        (said(leader="n2", replicas=[{"name": "n3", "current": False}]), []),
    ],
)
def test_what_is_wrong_with_a_server(varz: dict[str, Any] | None, states: list[str]) -> None:
    assert [one.state for one in findings(SERVER, varz)] == states


@pytest.mark.parametrize(
    ("certificate", "states"),
    [
        (Certificate(), []),
        (Certificate("it speaks plaintext"), ["not protected"]),
        (Certificate("it expired", "it expires", is_old=True), ["not protected", "certificate"]),
        (Certificate(is_old=True), ["old certificate"]),
        (Certificate(warning="it expires in 9 days"), ["certificate"]),
    ],
)
def test_what_is_wrong_with_a_servers_certificate(
    certificate: Certificate, states: list[str]
) -> None:
    assert [one.state for one in findings(SERVER, said(), certificate)] == states
