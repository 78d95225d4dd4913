"""Ray on one machine: an actor per worker, asked in turn."""

from __future__ import annotations

import itertools
import os

from benchmarks.children import Group
from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed
from benchmarks.rows import Setup

TITLE = "Ray"
PACKAGES = ("ray",)
SUPPORTS = {"window", "threads", "bulk", "all"}
BULK = 5_000
NOTES = (
    "An actor per worker with as many threads as slots; calls of kept actors are its fastest. "
    "Less: several hosts on Linux only, the same Python everywhere. More: an object store, any "
    "Python object and function, placement, restarts."
)


def missing() -> str:
    return not_installed("ray")


def start(group: Group, setup: Setup) -> dict:
    # The caller starts the cluster with ray.init, as its documentation shows.
    return {"workers": list(setup.workers), "slots": setup.slots or 1, "nap_s": setup.nap_s}


class Echo:
    def __init__(self, name: str, nap_s: float) -> None:
        self._name, self._nap_s = name, nap_s

    def work(self, payload: bytes) -> bytes:
        return answer(self._name, payload, self._nap_s)


class Caller(FuturesCaller):
    def __init__(self, workers: list[str], slots: int, nap_s: float) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        ray.init(
            num_cpus=len(workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 * 1024 * 1024,
            _node_ip_address="127.0.0.1",
        )
        remote = ray.remote(Echo)
        self._actors = [remote.options(max_concurrency=slots).remote(n, nap_s) for n in workers]
        self._turn = itertools.cycle(self._actors)
        ray.get([actor.work.remote(b"0") for actor in self._actors], timeout=2 * TIMEOUT_S)

    def submit(self, payload: bytes, mode: str):
        asked = self._actors if mode == "all" else [next(self._turn)]
        return [actor.work.remote(payload) for actor in asked]

    def result(self, handle) -> bytes:
        return b"\n".join(self._ray.get(handle, timeout=TIMEOUT_S))

    def map(self, items: list[bytes], mode: str):
        return self._ray.get(
            [next(self._turn).work.remote(item) for item in items], timeout=4 * TIMEOUT_S
        )

    def close(self) -> None:
        self._ray.shutdown()
