"""Dramatiq with Redis as broker and result backend; a worker process per worker."""

from __future__ import annotations

import os
import sys

from benchmarks.children import Group
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed, redis_server
from benchmarks.rows import Setup

TITLE = "Dramatiq, Redis"
PACKAGES = ("dramatiq", "redis")
SUPPORTS = {"window", "threads", "bulk"}
BULK = 2_000
NOTES = (
    "One process per worker, a thread per slot; results awaited through its Redis result backend. "
    "Less: no mode all, results only as an extra. More: tasks outlive the caller, retries, "
    "schedules."
)
versions = redis_server.versions


def missing() -> str:
    return redis_server.no_server() or not_installed("dramatiq", "redis")


def start(group: Group, setup: Setup) -> dict:
    url = redis_server.start(group)
    env = {"BENCH_REDIS": url, "BENCH_NAP_S": str(setup.nap_s)}
    argv = [sys.executable, "-m", "dramatiq", "benchmarks.peers.dramatiq_tasks"]
    argv += ["--processes", "1", "--threads", str(setup.slots or 1)]
    for name in setup.workers:
        group.command(name, argv, {**env, "BENCH_WORKER": name})
    for name in setup.workers:
        group.wait_for_text(name, "ready for action")
    return {"url": url}


class Caller(FuturesCaller):
    def __init__(self, url: str) -> None:
        os.environ["BENCH_REDIS"] = url
        from benchmarks.peers.dramatiq_tasks import echo

        self._echo = echo

    def submit(self, payload: bytes, mode: str):
        return self._echo.send(payload.decode())

    def result(self, handle) -> bytes:
        return handle.get_result(block=True, timeout=int(TIMEOUT_S * 1000)).encode()

    def map(self, items: list[bytes], mode: str):
        from dramatiq import group

        sent = group([self._echo.message(item.decode()) for item in items]).run()
        answers = sent.get_results(block=True, timeout=int(4 * TIMEOUT_S * 1000))
        return (answer.encode() for answer in answers)
