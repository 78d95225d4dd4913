"""RQ with Redis: simple workers, which do not fork for each job."""

from __future__ import annotations

import os
import sys

from benchmarks.children import Group
from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed, redis_server
from benchmarks.rows import Setup

TITLE = "RQ, Redis"
PACKAGES = ("rq", "redis")
SUPPORTS = {"window", "threads", "bulk"}
BULK = 500
NOTES = (
    "SimpleWorker, one job at a time per worker (so the row with 8 slots starts 8 processes for "
    "each); a bulk is one enqueue_many. Less: no mode all; a caller waits by reading the result's "
    "stream. More: jobs outlive the caller, retries, schedules."
)
versions = redis_server.versions


def missing() -> str:
    if sys.platform == "win32":
        return "RQ does not support Windows"
    return redis_server.no_server() or not_installed("rq", "redis")


def start(group: Group, setup: Setup) -> dict:
    url = redis_server.start(group)
    env = {"BENCH_REDIS": url, "BENCH_NAP_S": str(setup.nap_s)}
    argv = [sys.executable, "-m", "rq.cli", "worker", "--url", url]
    argv += ["--worker-class", "rq.SimpleWorker", "--quiet"]
    names = [(worker, f"{worker}-{slot}") for worker in setup.workers for slot in _slots(setup)]
    for worker, name in names:
        group.command(name, [*argv, "--name", name], {**env, "BENCH_WORKER": worker})
    return {"url": url, "processes": len(names)}


def _slots(setup: Setup) -> range:
    return range(setup.slots or 1)


def echo(payload: bytes) -> bytes:
    return answer(os.environ["BENCH_WORKER"], payload, float(os.environ["BENCH_NAP_S"]))


class Caller(FuturesCaller):
    def __init__(self, url: str, processes: int) -> None:
        import time

        from redis import Redis
        from rq import Queue, Worker

        self._queue = Queue(connection=Redis.from_url(url), default_timeout=int(TIMEOUT_S))
        until = time.monotonic() + TIMEOUT_S
        while Worker.count(queue=self._queue) < processes and time.monotonic() < until:
            time.sleep(0.1)

    def submit(self, payload: bytes, mode: str):
        return self._queue.enqueue(echo, payload, result_ttl=120)

    def result(self, handle) -> bytes:
        found = handle.latest_result(timeout=int(TIMEOUT_S))
        if found is None or found.type != found.Type.SUCCESSFUL:
            raise RuntimeError(f"the job has {found.exc_string if found else 'no result'}")
        return found.return_value

    def map(self, items: list[bytes], mode: str):
        from rq import Queue

        data = [Queue.prepare_data(echo, (item,), result_ttl=120) for item in items]
        return [self.result(job) for job in self._queue.enqueue_many(data)]
