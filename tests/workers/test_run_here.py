"""A quick handler runs on the thread that has read its request, and holds up no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import overlay
from overlay import client as library
from tests.harness.cluster import Overlay, running_one, until

HANDLERS = """
import os, threading, time

def where(payload, context):
    while payload and not os.path.exists(payload) and not context.cancelled:
        time.sleep(0.005)
    return threading.current_thread().name.encode()
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    with running_one(tmp_path_factory.mktemp("here") / "one", HANDLERS, ["where"]) as found:
        yield found


@pytest.fixture
def client(worker: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(worker.address("C")) as made:
        until(lambda: is_here(made), 20, "the handler is known to be quick")
        yield made


def thread_of(client: overlay.Client) -> str:
    return client.call(b"", handler="where", mode="any").result.decode()


def is_here(client: overlay.Client) -> bool:
    return thread_of(client).startswith("stream_")


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
