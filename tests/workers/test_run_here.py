"""A quick handler runs on the thread that has read its request, and holds up no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import overlay
from overlay import client as library
from overlay.workers.executor import MAX_HERE
from tests.harness.cluster import Overlay, running_one, until

HANDLERS = """
import os, threading, time

def where(payload, context):
    while payload and not os.path.exists(payload) and not context.cancelled:
        time.sleep(0.005)
    return threading.current_thread().name.encode()

for number in range(MANY):
    globals()[f"where{number}"] = where
"""
MANY = MAX_HERE + 4
NAMES = ["where", *(f"where{number}" for number in range(MANY))]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    module = HANDLERS.replace("MANY", str(MANY))
    with running_one(tmp_path_factory.mktemp("here") / "one", module, NAMES) as found:
        yield found


@pytest.fixture
def client(worker: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(worker.address("C")) as made:
        for name in NAMES:
            until(lambda name=name: is_here(made, name), 20, f"{name} is known to be quick")
        yield made


def thread_of(client: overlay.Client, handler: str = "where") -> str:
    return client.call(b"", handler=handler, mode="any").result.decode()


def is_here(client: overlay.Client, handler: str) -> bool:
    return thread_of(client, handler).startswith("stream_")


def test_other_requests_of_the_stream_go_on_while_a_quick_handler_is_stuck(
    client: overlay.Client, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    stuck = client.submit("where", bytes(go))
    names = [thread_of(client) for _ in range(20)]

    assert not stuck.done()
    go.touch()
    assert stuck.result(10).startswith(b"stream_"), "it ran where its request was read"
    assert any(name.startswith("handler-where") for name in names), "others had a thread of theirs"


def test_a_stuck_handler_costs_its_own_request_its_deadline_and_no_more(
    client: overlay.Client, tmp_path: Path
) -> None:
    with pytest.raises(library.DeadlinePassed) as late:
        client.call(bytes(tmp_path / "never"), handler="where", mode="any", timeout=0.3)

    assert late.value.executed is not None
    assert thread_of(client)


def test_many_stuck_handlers_leave_threads_for_the_streams(
    worker: Overlay, client: overlay.Client, tmp_path: Path
) -> None:
    go, stuck = tmp_path / "go", []
    for number in range(MANY):  # one by one, as of those in one frame only the last may run here
        stuck.append(client.submit(f"where{number}", bytes(go)))
        until(lambda: worker.metrics("C").active_requests == len(stuck))
    assert thread_of(client)

    go.touch()
    ran = [one.result(10).startswith(b"stream_") for one in stuck]
    assert 0 < sum(ran) <= MAX_HERE
