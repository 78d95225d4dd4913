"""Raw grpcio, one hop: the client has a kept channel to each worker and asks them in turn."""

from __future__ import annotations

import itertools

from benchmarks.children import Group
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import grpc_common
from benchmarks.rows import Setup

TITLE = "raw gRPC, one hop"
PACKAGES = ("grpcio",)
SUPPORTS = {"window", "threads", "bulk", "all"}
BULK = 8_000
NOTES = (
    "Less: no queue, no bound, no routing by load, no way round a dead worker; the client must "
    "reach and know every worker. It has two hops fewer than the overlay. Mode all: the client "
    "asks all workers with futures."
)


def missing() -> str:
    return ""


def start(group: Group, setup: Setup) -> dict:
    addresses = {worker: grpc_common.address() for worker in setup.workers}
    for name, address in addresses.items():
        given = {"name": name, "slots": setup.slots, "nap_s": setup.nap_s}
        group.python(name, "worker", address=address, **given)
    group.wait_ready(*addresses)
    return {"addresses": list(addresses.values())}


worker = grpc_common.serve_worker


class Caller(FuturesCaller):
    bulk_window = 256  # 32 and 64 were tried and are slower

    def __init__(self, addresses: list[str]) -> None:
        kept = [grpc_common.method(address, "Any") for address in addresses]
        self._channels = [channel for channel, _ in kept]
        self._methods = [method for _, method in kept]
        self._turn = itertools.cycle(self._methods)

    def call(self, payload: bytes, mode: str) -> bytes:
        if mode == "all":
            return self.result(self.submit(payload, mode))
        return next(self._turn)(payload, timeout=TIMEOUT_S)

    def submit(self, payload: bytes, mode: str):
        if mode == "all":
            return [method.future(payload, timeout=TIMEOUT_S) for method in self._methods]
        return [next(self._turn).future(payload, timeout=TIMEOUT_S)]

    def result(self, handle) -> bytes:
        return b"\n".join(future.result() for future in handle)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
