"""Dask distributed: a LocalCluster of processes, asked with submit, map and gather."""

from __future__ import annotations

import os

from benchmarks.children import Group
from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed
from benchmarks.rows import Setup

TITLE = "Dask"
PACKAGES = ("distributed", "dask")
SUPPORTS = {"window", "threads", "bulk"}
BULK = 5_000
NOTES = (
    "A process per worker, no dashboard, no profiler, results gathered to the client. According to "
    "its documentation a task costs the scheduler about a millisecond and should be larger than "
    "these: it is not made for this work. More: any Python function, task graphs, data that stays "
    "on the workers."
)


def missing() -> str:
    return not_installed("distributed")


def start(group: Group, setup: Setup) -> dict:
    # The client starts the cluster, as Dask's documentation shows.
    return {"workers": list(setup.workers), "slots": setup.slots or 1, "nap_s": setup.nap_s}


def echo(payload: bytes, names: list[str], nap_s: float) -> bytes:
    from distributed import get_worker

    return answer(names[int(get_worker().name)], payload, nap_s)


class Caller(FuturesCaller):
    def __init__(self, workers: list[str], slots: int, nap_s: float) -> None:
        # Its workers sample their stacks all the time, which costs CPU even when idle.
        os.environ["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "False"
        from distributed import Client, LocalCluster

        self._given = {"names": workers, "nap_s": nap_s, "pure": False}
        self._cluster = LocalCluster(
            n_workers=len(workers),
            threads_per_worker=slots,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
        )
        self._client = Client(self._cluster)
        self._client.wait_for_workers(len(workers))

    def submit(self, payload: bytes, mode: str):
        return self._client.submit(echo, payload, **self._given)

    def result(self, handle) -> bytes:
        return handle.result(timeout=TIMEOUT_S)

    def map(self, items: list[bytes], mode: str):
        return self._client.gather(self._client.map(echo, items, **self._given))

    def close(self) -> None:
        self._client.close()
        self._cluster.close()
