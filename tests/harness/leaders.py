"""Several leaders' copies of the same jobs, as their journals keep them, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overlay.jobs.copy_file import CopyFile
from overlay.jobs.log import Log
from overlay.jobs.replicas import Replica
from overlay.jobs.store import JobStore, StoreLimits
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, free_ports, until
from tests.harness.nats_servers import JOURNAL_BYTES

LEADERS = ("A1", "A2", "A3")


class Leader:
    """A replica without its journal's thread: each test takes the turns."""

    def __init__(
        self, log: Log, path: Path, id_: str = "A", limits: StoreLimits | None = None
    ) -> None:
        self.log, self.file = log, CopyFile(path)
        self.replica = Replica(log, self.file, id_, f"{id_.lower()}.example:50051")
        self.store = JobStore(self.file, limits)

    def takes_over(self, within_s: float = 20.0) -> Leader:
        def has_jobs() -> bool:
            self.replica.turn()
            return self.replica.has_jobs

        until(has_jobs, within_s, f"{self.replica.me} has the jobs; {self.replica.refusal}")
        self.store.begin()
        self.store.take_up((), True, 1.0)
        self.store.commit()
        return self

    def follows(self) -> Leader:
        self.replica.turn()
        assert not self.replica.problem, self.replica.problem
        return self

    @property
    def rows(self) -> list[str]:
        """Everything in the file but how far it has got."""
        tables = ("kind", "job", "payload", "answer", "chunk", "schedule", "sqlite_sequence")
        return [
            f"{table} {row}"
            for table in tables
            for row in sorted(map(str, self.file.execute(f"select * from {table}").fetchall()))
        ]

    def close(self) -> None:
        self.replica.close()
        self.file.close()


def three_leaders(journal: str, **top: Any) -> dict[str, Any]:
    """A configuration with a team of two workers below all three; `top` adds top-level keys."""
    roles = {**dict.fromkeys(LEADERS, "leader"), "B": "team_leader", "C": "worker", "D": "worker"}
    neighbors = {
        **{id_: ["B"] for id_ in LEADERS},
        "B": [*LEADERS, "C", "D"],
        "C": ["B"],
        "D": ["B"],
    }
    return {
        "journal": journal,
        **top,
        "max_journal_mib": JOURNAL_BYTES >> 20,
        "processes": {
            id_: {
                "id": id_,
                "role": role,
                "team": "blue",
                "host": "127.0.0.1",
                "port": port,
                "neighbors": neighbors[id_],
            }
            for (id_, role), port in zip(roles.items(), free_ports(len(roles)), strict=True)
        },
    }


def with_more_leaders(config: dict[str, Any], journal: str) -> dict[str, Any]:
    """The configuration with two more leaders beside the first, for the same jobs."""
    processes = config["processes"]
    (first,) = leaders_in(config)
    for number, port in zip((2, 3), free_ports(2), strict=True):
        id_ = f"{first}{number}"
        processes[id_] = {**processes[first], "id": id_, "port": port}
        for neighbour in processes[first]["neighbors"]:
            beside = processes[neighbour]["neighbors"]
            processes[neighbour] = {**processes[neighbour], "neighbors": [*beside, id_]}
    return {**config, "journal": journal, "max_journal_mib": JOURNAL_BYTES >> 20}


def leaders_in(config: dict[str, Any]) -> list[str]:
    return [id_ for id_, entry in config["processes"].items() if entry["role"] == "leader"]


def holder(cluster: Overlay) -> str:
    """The leader that has the jobs; empty if none of those that run has."""
    for id_ in leaders_in(cluster.config):
        process = cluster.processes.get(id_)
        if process is not None and process.poll() is None:
            found = cluster.stub(id_).GetMetrics(pb2.MetricsRequest(), timeout=5)
            if not found.jobs.elsewhere:
                return id_
    return ""


def everybody(cluster: Overlay) -> str:
    return ",".join(cluster.address(id_) for id_ in leaders_in(cluster.config))
