"""Raw grpcio, three hops: leader -> team leader -> worker, unary calls over kept channels.

client -> A -> B -> C          any: workers in turn
            -> E -> D, F       all: futures to every branch, answers joined in order
"""

from __future__ import annotations

import itertools

from benchmarks.children import Group
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import grpc_common
from benchmarks.rows import Setup

TITLE = "raw gRPC, chain of three"
PACKAGES = ("grpcio",)
SUPPORTS = {"window", "threads", "unary", "bulk", "all"}
BULK = 2_000
TEAMS = {"B": ("C",), "E": ("D", "F")}
NOTES = (
    "The processes and topology of the overlay, written by hand. Passes the deadline on. Less: no "
    "queue, no bound but the pools, no routing by load, no provision for a process that dies. Mode "
    "all is a fan-out of futures over kept channels at each level."
)


def missing() -> str:
    return ""


def start(group: Group, setup: Setup) -> dict:
    teams = {leader: [w for w in team if w in setup.workers] for leader, team in TEAMS.items()}
    teams = {leader: team for leader, team in teams.items() if team}
    at = {name: grpc_common.address() for name in ("A", *teams, *setup.workers)}
    for name in setup.workers:
        given = {"name": name, "slots": setup.slots, "nap_s": setup.nap_s}
        group.python(name, "worker", address=at[name], **given)
    group.wait_ready(*setup.workers)
    for leader, team in teams.items():
        group.python(leader, "relay", address=at[leader], below=[[at[w], 1] for w in team])
    group.wait_ready(*teams)
    below = [[at[leader], len(team)] for leader, team in teams.items()]
    group.python("A", "relay", address=at["A"], below=below)
    group.wait_ready("A")
    return {"address": at["A"]}


worker = grpc_common.serve_worker


def relay(ready, address: str, below: list[tuple[str, int]]) -> None:
    """below: each branch's address and number of workers, which is its share of the turns."""
    kept = [grpc_common.method(at, "Any") for at, _ in below]  # as long as the process lives
    alls = [channel.unary_unary(f"/{grpc_common.SERVICE}/All") for channel, _ in kept]
    shares = [[ask] * share for (_, ask), (_, share) in zip(kept, below, strict=True)]
    turn = itertools.cycle([ask for share in shares for ask in share])

    def any_(request, context):
        return next(turn)(request, timeout=context.time_remaining())

    def all_(request, context):
        left_s = context.time_remaining()
        futures = [ask.future(request, timeout=left_s) for ask in alls]
        return b"\n".join(future.result() for future in futures)

    grpc_common.serve(ready, address, {"Any": any_, "All": all_}, grpc_common.POOL)


class Caller(FuturesCaller):
    def __init__(self, address: str) -> None:
        self._channel, any_ = grpc_common.method(address, "Any")
        all_ = self._channel.unary_unary(f"/{grpc_common.SERVICE}/All")
        self._methods = {"any": any_, "all": all_}

    def call(self, payload: bytes, mode: str) -> bytes:
        return self._methods[mode](payload, timeout=TIMEOUT_S)

    def submit(self, payload: bytes, mode: str):
        return self._methods[mode].future(payload, timeout=TIMEOUT_S)

    def result(self, handle) -> bytes:
        return handle.result()

    def close(self) -> None:
        self._channel.close()
