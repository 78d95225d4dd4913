"""Celery with Redis as broker and result backend; three worker nodes."""

from __future__ import annotations

import os
import sys

from benchmarks.children import Group
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed, redis_server
from benchmarks.rows import Setup

TITLE = "Celery, Redis"
PACKAGES = ("celery", "kombu", "redis")
SUPPORTS = {"window", "threads", "bulk", "bulk_singly"}
BULK = 50_000
BULK_SINGLY = 2_000
CHUNK = 1000  # 100 to 2,000 were tried; from 500 on there is little difference
NOTES = (
    "A node per worker, prefork with one child (threads for 8 slots), without gossip, mingle and "
    "heartbeat, JSON, prefetch 64 for tiny tasks and 1 for 5 ms. The bulk is task.chunks of "
    "1,000, singly it is a group. Less: no fast answer to a caller (it is a task queue; results "
    "pass through Redis), no mode all. More: tasks outlive the caller, schedules, retries, "
    "workflows; with a Redis that writes to disk (here it does not) tasks outlive the broker too."
)
versions = redis_server.versions


def missing() -> str:
    if sys.platform == "win32":
        return "Celery does not support Windows"
    return redis_server.no_server() or not_installed("celery", "redis")


def start(group: Group, setup: Setup) -> dict:
    url = redis_server.start(group)
    env = {"BENCH_REDIS": url, "BENCH_NAP_S": str(setup.nap_s)}
    slots = setup.slots or 1
    pool = "prefork" if slots == 1 else "threads"
    options = ["-P", pool, "-c", str(slots), "-l", "info", "--without-gossip", "--without-mingle"]
    options += ["--without-heartbeat"]
    app = [sys.executable, "-m", "celery", "-A", "benchmarks.peers.celery_tasks", "worker"]
    for name in setup.workers:
        argv = [*app, "-n", f"{name}@bench", *options]
        group.command(name, argv, {**env, "BENCH_WORKER": name})
    for name in setup.workers:
        group.wait_for_text(name, " ready.")
    return {"url": url}


class Caller(FuturesCaller):
    def __init__(self, url: str) -> None:
        os.environ["BENCH_REDIS"] = url
        from benchmarks.peers.celery_tasks import echo

        self._echo = echo

    def submit(self, payload: bytes, mode: str):
        return self._echo.delay(payload.decode())

    def result(self, handle) -> bytes:
        return handle.get(timeout=TIMEOUT_S).encode()

    def map(self, items: list[bytes], mode: str):
        chunks = self._echo.chunks(((item.decode(),) for item in items), CHUNK)
        for chunk in chunks.apply_async().get(timeout=4 * TIMEOUT_S):
            yield from (answer.encode() for answer in chunk)

    def map_singly(self, items: list[bytes], mode: str):
        from celery import group

        sent = group(self._echo.s(item.decode()) for item in items).apply_async()
        return [answer.encode() for answer in sent.get(timeout=4 * TIMEOUT_S)]
