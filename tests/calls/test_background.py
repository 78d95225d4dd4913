"""A pool of threads for jobs without a result."""

from __future__ import annotations

import logging
import threading
import time
import weakref

import pytest

from overlay.calls.background import BackgroundThreads
from tests.harness.cluster import until


@pytest.fixture
def pool():
    made = BackgroundThreads(3, "job")
    yield made
    made.close()
    until(lambda: not threads_of("job"), 5, "its threads have ended")


def threads_of(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(f"{name}_")]


def test_jobs_run_concurrently_up_to_the_thread_limit(pool):
    meeting = threading.Barrier(3)
    met = [threading.Event() for _ in range(3)]
    for event in met:
        pool.run(lambda event=event: (meeting.wait(5), event.set()))
    assert all(event.wait(5) for event in met)
    assert len(threads_of("job")) == 3


def test_jobs_beyond_the_thread_limit_run_later_in_order(pool):
    release, done = threading.Event(), []
    for _ in range(3):
        pool.run(lambda: release.wait(5))
    for number in range(10_000):
        pool.run(lambda number=number: done.append(number))
    time.sleep(0.05)
    assert done == []
    release.set()
    until(lambda: len(done) == 10_000, 5, "all have run")
    assert len(threads_of("job")) == 3
    assert pool._idle.qsize() <= 3, "what is kept grows with the jobs that waited"


def test_one_thread_serves_jobs_that_arrive_one_by_one(pool):
    for _ in range(200):
        done = threading.Event()
        pool.run(done.set)
        assert done.wait(5)
        until(lambda: pool._idle.qsize(), 5, "the thread is idle")
    assert len(threads_of("job")) == 1


def test_an_exception_in_a_job_is_logged_and_the_next_job_runs(pool, caplog):
    done = threading.Event()
    with caplog.at_level(logging.ERROR):
        pool.run(lambda: 1 // 0)
        pool.run(done.set)
        assert done.wait(5)
        until(lambda: "ZeroDivisionError" in caplog.text, 5)


def test_a_finished_job_is_not_kept_alive(pool):
    class Held:
        def run(self) -> None:
            pass

    held = Held()
    seen = weakref.ref(held)
    pool.run(held.run)
    del held
    until(lambda: seen() is None, 5, "nothing leads to it")


def test_no_job_runs_after_close():
    pool, ran = BackgroundThreads(2, "ended"), []
    pool.run(lambda: ran.append(1))
    until(lambda: ran, 5)
    pool.close()
    until(lambda: not threads_of("ended"), 5)
    pool.run(lambda: ran.append(2))
    time.sleep(0.05)
    assert ran == [1]
    assert not threads_of("ended")
