"""The Celery application: imported by its workers and by the caller, set up by the environment."""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.handlers import answer

URL = os.environ["BENCH_REDIS"]
NAP_S = float(os.environ.get("BENCH_NAP_S", "0"))
WORKER = os.environ.get("BENCH_WORKER", "")

app = Celery("benchmark", broker=URL, backend=URL)
app.conf.update(
    # Celery's guide on optimizing: large for many short tasks, 1 for longer ones.
    worker_prefetch_multiplier=1 if NAP_S else 64,
    broker_pool_limit=64,  # the guide: as many as threads that use the connections
    redis_max_connections=512,
    result_expires=120,
    broker_connection_retry_on_startup=True,
)


@app.task(name="echo")
def echo(payload: str) -> str:
    return answer(WORKER, payload.encode(), NAP_S).decode()
