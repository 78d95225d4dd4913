"""Findings about the NATS servers that keep the jobs of several leaders, by what one says of itself
(`/varz`). What it has confirmed must be on the disks of a majority, or a job that was accepted is
lost with the power.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overlay.model.jobs_servers import FEWEST, JobsServer
from overlay.monitor.diagnosis import Finding, Grade

RESTART = "start it with the overlay's own configuration: run.py stop and start"


@dataclass(frozen=True)
class Certificate:
    """What is wrong with that of a server of an overlay that has certificates. problem: why nobody
    should talk to it. warning: what will be wrong. is_old: it shows another than its file has."""

    problem: str = ""
    warning: str = ""
    is_old: bool = False


def findings(
    server: JobsServer, said: Mapping[str, Any] | None, certificate: Certificate | None = None
) -> list[Finding]:
    """said: None if nothing answers at its monitoring port."""
    if said is None:
        why = f"its monitoring port, 127.0.0.1:{server.monitor_port}, does not answer"
        return [Finding(Grade.BAD, "no answer", why, "start it: run.py start; else see its log")]
    jetstream = _part(said, "jetstream")
    config, meta = _part(jetstream, "config"), _part(jetstream, "meta")
    if not config:
        why = "it runs without JetStream, so it keeps nothing"
        return [Finding(Grade.BAD, "no JetStream", why, RESTART)]
    found = _of_certificate(certificate or Certificate())
    if config.get("sync_always") is not True:
        why = (
            "it confirms before its disk has written: sync_interval is not always, so jobs that "
            "were accepted are lost when the power goes"
        )
        found.append(Finding(Grade.BAD, "unsafe", why, RESTART))
    size = meta.get("cluster_size")
    if not isinstance(size, int) or size < FEWEST:
        servers = size if isinstance(size, int) else 1
        why = f"its cluster has {servers} of at least {FEWEST} servers"
        do = "start the others; their ports for each other are 2000 higher than the servers' own"
        found.append(Finding(Grade.BAD, "no cluster", why, do))
    elif not meta.get("leader"):
        why = "it sees no majority of the servers: nothing can be accepted"
        do = "start the others, and see whether they reach each other"
        found.append(Finding(Grade.BAD, "no majority", why, do))
    leader = meta.get("leader")
    for one in meta.get("replicas") or ():
        # Only the one that leads knows how far all others are; these know that of it alone, and say
        # of each other that they are not current.
        is_known = isinstance(one, dict) and leader in (server.name, one.get("name"))
        if is_known and one.get("current") is not True:
            why = f"it sees that {str(one.get('name'))[:60]} is down or behind"
            do = "start that one; until it has caught up, no other may be lost"
            found.append(Finding(Grade.NOTE, "behind", why, do))
    return found


def _of_certificate(certificate: Certificate) -> list[Finding]:
    found = []
    if certificate.problem:
        found.append(Finding(Grade.BAD, "not protected", certificate.problem, RESTART))
    elif certificate.is_old:
        why = "it shows another certificate than the one in its file, which is newer"
        found.append(Finding(Grade.NOTE, "old certificate", why, "run.py restart has it read that"))
    if certificate.warning:
        found.append(Finding(Grade.NOTE, "certificate", certificate.warning))
    return found


def _part(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = said.get(name)
    return found if isinstance(found, dict) else {}
