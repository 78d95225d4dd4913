"""The Dramatiq broker and actor: imported by its workers and by the caller."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.handlers import answer

URL = os.environ["BENCH_REDIS"]
NAP_S = float(os.environ.get("BENCH_NAP_S", "0"))
WORKER = os.environ.get("BENCH_WORKER", "")

broker = RedisBroker(url=URL)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def echo(payload: str) -> str:
    return answer(WORKER, payload.encode(), NAP_S).decode()
