"""How much the books of leases cost the leader of a large overlay.

    python3 benchmarks/leases.py [workers] [clients]

The real lender and leases of a leader, on simulated links: no network, no worker, so the figures
are those of the leader's own work. Each client has 8 requests unanswered at a time.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from overlay.calls.leases import Leases
from overlay.calls.lender import Lender
from overlay.calls.request_log import RequestLog
from overlay.model.leases import LaneOutcome, LaneReport, Lease, LeaseRequest, Lent
from overlay.model.limits import Limits
from overlay.model.segments import Caller
from overlay.model.topology import HandlerSpec, Process, Topology
from overlay.queueing.flow import Flow
from overlay.queueing.request_queue import RequestQueue
from overlay.routing.outlier import State

PER_TEAM = 50
SERVICE_S = 0.0002
REPORTS_PER_S = 10


class Links:
    """Team leaders whose workers accept every lease."""

    def __init__(self, teams: int) -> None:
        self._up = frozenset(f"T{n}" for n in range(teams))
        self.lent: dict[int, str] = {}
        self.leases: Leases

    def up(self) -> frozenset[str]:
        return self._up

    def load(self, neighbour: str, handler: str) -> tuple[int, float, State, bool]:
        return 0, SERVICE_S, State.HEALTHY, True

    def slots(self, neighbour: str, worker: str, handler: str) -> int:
        return 8

    def lend(self, neighbour: str, lent: Lent) -> None:
        if lent.id not in self.lent:
            self.lent[lent.id] = neighbour
            self.leases.reported(neighbour, LaneReport(lent.id))

    def note_lane(self, *rest: object) -> None: ...


class Client:
    certificate_name = ""

    def __init__(self, number: int) -> None:
        self.caller = Caller(f"10.0.{number // 250}.{number % 250}")
        self.flow = Flow(self.caller, is_stream=True)
        self.lanes: list[Lease] = []

    def offer(self, lease: Lease) -> None:
        self.lanes.append(lease)


class NoDeadlines:
    def watch(self, thing: object, at: float) -> None: ...


def main(workers: int = 1000, clients: int = 1000) -> None:
    teams = max(1, workers // PER_TEAM)
    topology = _topology(workers, teams)
    links, log = Links(teams), RequestLog("A", False)
    queue = RequestQueue(
        "A",
        slots=200,
        in_service=100,
        max_bytes=2**28,
        claim=lambda *rest: None,
        start=lambda *rest: None,
    )
    tracemalloc.start()
    leases = links.leases = Leases(topology, "A", links, NoDeadlines())
    lender = Lender(topology, "A", queue, links, leases, log, NoDeadlines())
    everyone = [Client(n) for n in range(clients)]
    before, _ = tracemalloc.get_traced_memory()
    took = _timed(lambda: [lender.ask(c, LeaseRequest("shout", "", 8)) for c in everyone])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(len(client.lanes) for client in everyone)
    print(f"{workers:,} workers, {clients:,} clients, {held:,} leases")
    print(f"  asked for and lent: {clients / took:,.0f} clients a second")
    print(f"  memory: {(after - before) / max(1, held) / 1024:.1f} KiB a lease")

    outcome = (LaneOutcome(100, worked_s=SERVICE_S, request_id=1),)

    def report_all() -> None:
        for id_, neighbour in links.lent.items():
            leases.reported(neighbour, LaneReport(id_, False, 8, outcome))

    took = _timed(report_all)
    print(
        f"  reports: {held / took:,.0f} a second; {REPORTS_PER_S} a second of each lease take ",
        end="",
    )
    print(f"{took * REPORTS_PER_S:.2f} of a core")
    time.sleep(0.35)
    took = _timed(lender._look)
    print(f"  a renewal of all: {took * 1e3:.0f} ms, three times a second")


def _topology(workers: int, teams: int) -> Topology:
    made = {"A": _process("A", "leader", "t0", 50000, tuple(f"T{n}" for n in range(teams)))}
    for team in range(teams):
        mine = tuple(f"W{n}" for n in range(team, workers, teams))
        made[f"T{team}"] = _process(f"T{team}", "team_leader", f"t{team}", 50001, ("A", *mine))
        for name in mine:
            made[name] = _process(name, "worker", f"t{team}", 50002, (f"T{team}",))
    return Topology(made, {"shout": HandlerSpec("shout", "mine:shout")}, Limits())


def _process(id_: str, role: str, team: str, port: int, neighbours: tuple[str, ...]) -> Process:
    return Process(id_, role, team, "10.1.0.1", port, neighbours, handler="shout")


def _timed(job: object) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
