"""The configuration as frozen values: the processes, which may ask which, and the handlers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from overlay.model.access import Access
from overlay.model.addresses import is_wildcard, join_address
from overlay.model.errors import ConfigError
from overlay.model.jobs_servers import JobsServer, servers_in
from overlay.model.limits import Limits

REQUIRED, TLS_FOLDER = "required", "tls"  # the first, as "tls": no plaintext on loopback either
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Role:
    """rank: requests only go to a lower rank. works: runs handlers. queued: has the large queue."""

    rank: int
    works: bool = False
    queued: bool = False


ROLES: Mapping[str, Role] = {
    "leader": Role(rank=2, queued=True),
    "team_leader": Role(rank=1),
    "worker": Role(rank=0, works=True),
}


@dataclass(frozen=True)
class Process:
    """One entry of the configuration. `neighbors` keeps the order of the file."""

    id: str
    role: str
    team: str
    host: str
    port: int
    neighbors: tuple[str, ...] = ()
    bind: str = ""
    handler: str = "echo"
    slots: int | None = None
    in_service: int = 100
    log_dir: str = "logs"
    options: Mapping[str, object] = field(default_factory=dict)
    metrics_port: int | None = None  # for Prometheus
    metrics_bind: str = "127.0.0.1"

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    @property
    def listen_address(self) -> str:
        return join_address(self.bind or self.host, self.port)

    @property
    def certified_hosts(self) -> tuple[str, ...]:
        """The addresses that its certificate names, for clients that check them."""
        hosts = (h for h in (self.host, self.bind, *LOCAL) if h and not is_wildcard(h))
        return tuple(dict.fromkeys(hosts))

    @property
    def rank(self) -> int:
        return ROLES[self.role].rank

    @property
    def works(self) -> bool:
        return ROLES[self.role].works


@dataclass(frozen=True)
class HandlerSpec:
    """A handler as configured. call and merge: "module:function". run: "thread" or "process"."""

    name: str
    call: str
    merge: str | None = None
    run: str = "thread"
    slots: int | None = None  # None: 100 on threads, the number of CPUs in processes
    limit_s: float | None = None
    memory_mib: int | None = None  # of each process
    max_requests: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


BUILT_IN = {"echo": HandlerSpec("echo", "overlay.workers.api:echo")}


class Entry(Protocol):
    """What `Topology.of` needs of a description of a process."""

    @property
    def role(self) -> str: ...
    @property
    def team(self) -> str: ...
    @property
    def neighbors(self) -> Iterable[str]: ...


@dataclass(frozen=True)
class Topology:
    """The whole overlay, in the order of the configuration file."""

    processes: Mapping[str, Process]
    handlers: Mapping[str, HandlerSpec] = field(default_factory=lambda: dict(BUILT_IN))
    limits: Limits = field(default_factory=Limits)
    folder: Path = Path(".")
    name: str = "configuration"
    digest: str = ""
    tls: str = ""
    journal: str = ""  # of the jobs: a file, or nats://…; empty: there are none
    access: Access = field(default_factory=Access)

    @property
    def tls_folder(self) -> Path | None:
        """Where the certificates are; None without TLS."""
        return (
            self.folder / (TLS_FOLDER if self.tls == REQUIRED else self.tls) if self.tls else None
        )

    def process(self, process_id: str) -> Process:
        """Raises ConfigError for an id that is not in the file."""
        try:
            return self.processes[process_id]
        except KeyError:
            known = ", ".join(self.processes)
            raise ConfigError(f"no process '{process_id}' in {self.name}; it has {known}") from None

    def below(self, process_id: str) -> tuple[Process, ...]:
        """The neighbours that `process_id` may ask: those of a strictly lower rank."""
        me = self.processes[process_id]
        return tuple(self.processes[n] for n in me.neighbors if self.processes[n].rank < me.rank)

    def reach(self, process_id: str) -> frozenset[str]:
        """The process itself and everything below it: what a request to it can get to."""
        found = self._reached.get(process_id)
        if found is None:
            below = (self.reach(n.id) for n in self.below(process_id))
            found = self._reached[process_id] = frozenset((process_id,)).union(*below)
        return found

    @cached_property
    def _reached(self) -> dict[str, frozenset[str]]:
        return {}

    def above(self, process_id: str) -> tuple[Process, ...]:
        """The processes that may ask it: of a strictly higher rank, with it as their neighbour."""
        me = self.processes[process_id]
        others = self.processes.values()
        return tuple(p for p in others if process_id in p.neighbors and p.rank > me.rank)

    def hops_below(self, process_id: str) -> int:
        """The number of links on the longest path down from it."""
        return max((1 + self.hops_below(n.id) for n in self.below(process_id)), default=0)

    @staticmethod
    def of(entries: Mapping[str, Entry]) -> Topology:
        """The topology of these descriptions, without neighbours that are not among them."""

        def process(id_: str, entry: Entry) -> Process:
            neighbors = tuple(n for n in entry.neighbors if n in entries)
            return Process(id_, entry.role, entry.team, "", 0, neighbors)

        return Topology({id_: process(id_, entry) for id_, entry in entries.items()})

    def in_order(self, ids: frozenset[str] | set[str]) -> tuple[str, ...]:
        return tuple(process_id for process_id in self.processes if process_id in ids)

    def workers_of(self, process_id: str) -> tuple[Process, ...]:
        """The workers within its reach, in the order of the configuration: those that a request to
        all is for. The leader has every one, a team leader its neighbours, a worker only itself."""
        reached = self.reach(process_id)
        return tuple(worker for worker in self.workers if worker.id in reached)

    @property
    def leaders(self) -> tuple[Process, ...]:
        found = (p for p in self.processes.values() if ROLES[p.role].queued)
        return tuple(found)

    @property
    def leader(self) -> Process:
        """The first in the file: of several, the one that issues certificates and lends workers."""
        return self.leaders[0]

    @property
    def jobs_servers(self) -> tuple[JobsServer, ...]:
        """The NATS servers that keep the jobs; none if they are in a file, or there are none."""
        return servers_in(self.journal)

    def journal_of(self, process_id: str) -> Path:
        """The file in which a leader has the jobs, or its copy of them."""
        name = f"journal-{process_id}.db" if self.jobs_servers else self.journal
        return self.folder / name

    @property
    def workers(self) -> tuple[Process, ...]:
        return tuple(process for process in self.processes.values() if process.works)

    def queue_slots(self, process_id: str) -> int:
        """`queue_slots` of the configuration for the leader; the others have a short queue."""
        me = self.processes[process_id]
        return self.limits.queue_slots if ROLES[me.role].queued else me.in_service

    def handler_slots(self, process: Process, spec: HandlerSpec) -> int:
        """How many requests for this handler run at once on this worker."""
        own = spec.slots or (100 if spec.run == "thread" else os.cpu_count() or 1)
        return min(own, process.slots or own, process.in_service)
