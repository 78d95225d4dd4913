"""A process accepts a limited number of streams, refuses more, and notices when one is closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

import overlay
from overlay.client import sync as library
from overlay.model.segments import Executed
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.client.conftest import HANDLERS, Noted, handlers
from tests.harness import same_process
from tests.harness.cluster import ROOT, Overlay, free_port, six_processes, until

LIMIT = 8
HELD = 6  # as many as one address may hold
FEW_STREAMS = f"""
import dataclasses, runpy, sys
from overlay.model.limits import Limits

names = [field.name for field in dataclasses.fields(Limits)]
values = list(Limits.__init__.__defaults__)
values[names.index("streams")] = Limits.streams = {LIMIT}
Limits.__init__.__defaults__ = tuple(values)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Narrow(Overlay):
    """Processes that accept few streams."""

    def _node(self, process_id: str) -> list[str]:
        python, *rest = super()._node(process_id)
        return [python, str(self.folder / "few_streams.py"), *rest]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noted]:
    folder = tmp_path_factory.mktemp("narrow")
    notes = tmp_path_factory.mktemp("notes") / "notes"
    (folder / "mine.py").write_text(HANDLERS)
    (folder / "few_streams.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + FEW_STREAMS
    )
    with Narrow(folder, six_processes(handlers=handlers(notes))) as found:
        yield Noted(found.start(), notes)


@pytest.fixture
def narrow(shared: Noted) -> Iterator[Noted]:
    shared.forget()
    yield shared
    until(lambda: not (shared.at_work() or shared.overlay.metrics("A").streams), what="all is idle")


@contextlib.contextmanager
def all_streams_taken(noted: Noted) -> Iterator[list[overlay.Client]]:
    """By clients that each wait for an answer, so that no stream is idle."""
    holders = [overlay.connect(noted.address("A")) for _ in range(HELD)]
    for holder in holders:
        holder.submit("patient", "60")
    until(lambda: noted.lines()["began"] == HELD)
    try:
        yield holders
    finally:
        for holder in holders:
            holder.close()


VERBS: dict[str, Any] = {
    "call": lambda client: client.call("x", mode="any"),
    "submit": lambda client: client.submit(None, "x").result(),
    "map": lambda client: list(client.map(None, ["x"] * 10)),
    "map_as_completed": lambda client: list(client.map_as_completed(None, ["x"] * 10)),
    "parts": lambda client: list(client.parts("x")),
}


def test_every_call_is_refused_when_no_stream_is_free_within_its_patience(narrow: Noted) -> None:
    def refused(verb: str) -> library.Refused:
        with (
            overlay.connect(narrow.address("A"), patience_s=0.5) as client,
            pytest.raises(library.Refused) as caught,
        ):
            VERBS[verb](client)
        return caught.value

    began = time.monotonic()
    with all_streams_taken(narrow), futures.ThreadPoolExecutor(len(VERBS)) as pool:
        errors = list(pool.map(refused, VERBS))

    assert time.monotonic() - began < 10
    for error in errors:
        assert str(LIMIT) in str(error), "the message is the process's own"
        assert "stream" in str(error)
        assert error.executed is Executed.NO
        assert error.retry_after_s is not None


ASYNC_VERBS: dict[str, Any] = {
    "call": lambda client: client.call("x", mode="any"),
    "map": lambda client: _all(client.map(None, ["x"] * 10)),
    "parts": lambda client: _all(client.parts("x")),
}


async def _all(results: Any) -> list[Any]:
    return [result async for result in results]


def test_every_asyncio_call_is_refused_when_no_stream_is_free(narrow: Noted) -> None:
    async def refused(verb: str) -> None:
        async with overlay.connect_async(narrow.address("A"), patience_s=0.5) as client:
            with pytest.raises(library.Refused) as caught:
                await asyncio.wait_for(ASYNC_VERBS[verb](client), 10)
            assert caught.value.executed is Executed.NO

    async def main() -> None:
        await asyncio.gather(*map(refused, ASYNC_VERBS))

    with all_streams_taken(narrow):
        asyncio.run(main())


def test_a_short_deadline_ends_the_wait_for_a_stream(narrow: Noted) -> None:
    with (
        all_streams_taken(narrow),
        overlay.connect(narrow.address("A"), patience_s=60) as client,
        pytest.raises(library.CallFailed) as caught,
    ):
        client.call("x", mode="any", timeout=1)

    assert caught.value.executed is Executed.NO


def test_a_waiting_call_gets_the_stream_that_another_client_closes(narrow: Noted) -> None:
    with (
        all_streams_taken(narrow) as holders,
        overlay.connect(narrow.address("A"), patience_s=20) as client,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.call, "x", mode="any", timeout=30)
        time.sleep(0.5)
        assert not waiting.done()
        holders[0].close()
        answer = waiting.result(20)

    assert answer.result.endswith(b": x")


def test_map_on_the_command_line_reports_that_no_stream_is_free(
    narrow: Noted, tmp_path: Path
) -> None:
    host, _, port = narrow.address("A").rpartition(":")
    lines = tmp_path / "lines"
    lines.write_text("a\nb\n")
    with all_streams_taken(narrow):
        done = same_process.client(host, port, "map", lines)

    assert done.returncode == 3
    assert "stream" in done.stderr
    assert "no handler saw the request, try again in " in done.stderr


def test_the_doctor_says_where_all_streams_are_taken(narrow: Noted) -> None:
    found = narrow.overlay
    python, few_streams, *_ = found._node("A")
    command = [python, few_streams, str(ROOT / "client.py"), "doctor", str(found.path)]
    with all_streams_taken(narrow):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert done.returncode == 1
    assert f"A: {HELD} of its {LIMIT} places for streams are taken" in done.stdout


def test_a_map_that_failed_keeps_no_client_until_a_garbage_collection(narrow: Noted) -> None:
    def use() -> weakref.ref[overlay.Client]:
        client = overlay.connect(narrow.address("A"), patience_s=0.3)
        with pytest.raises(overlay.client.Refused):
            list(client.map("note", ["a", "b"]))
        return weakref.ref(client)

    with all_streams_taken(narrow):
        gc.disable()
        try:
            assert use()() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_client_that_is_garbage_collected_frees_its_stream(narrow: Noted, kind: str) -> None:
    before = set(threading.enumerate())

    def use() -> None:
        client = overlay.connect(narrow.address("A"))
        client.call("x", mode="any")
        assert narrow.overlay.metrics("A").streams == 1

    async def use_async() -> None:
        client = overlay.connect_async(narrow.address("A"))
        await client.call("x", mode="any")
        assert narrow.overlay.metrics("A").streams == 1

    for _ in range(3):
        use() if kind == "blocking" else asyncio.run(use_async())
        gc.collect()
        until(lambda: narrow.overlay.metrics("A").streams == 0)
    until(lambda: not _ours(set(threading.enumerate()) - before), what="its threads end")


def _ours(threads: set[threading.Thread]) -> set[threading.Thread]:
    return {t for t in threads if t.name.startswith(("pipe-", "deadlines", "overlay-"))}


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_program_may_connect_for_each_request_without_closing(narrow: Noted, kind: str) -> None:
    async def use_async() -> None:
        for n in range(3 * LIMIT):
            client = overlay.connect_async(narrow.address("A"))
            assert (await client.call(f"n{n}", handler="upper", mode="any")).result == b"N%d" % n

    if kind == "blocking":
        for n in range(3 * LIMIT):
            client = overlay.connect(narrow.address("A"))
            assert client.call(f"n{n}", handler="upper", mode="any").result == b"N%d" % n
        del client
    else:
        asyncio.run(use_async())

    def is_freed() -> bool:
        gc.collect()  # again, because a thread that is ending may hold the last one
        return narrow.overlay.metrics("A").streams == 0

    until(is_freed)


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "os.kill(os.getpid(), 9)",
        pytest.param(
            "os.fork() or time.sleep(60); os.kill(os.getpid(), 9)",  # the child keeps its socket
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
        ),
    ],
)
def test_a_program_that_ends_without_closing_frees_its_stream(narrow: Noted, end: str) -> None:
    program = (
        "import os, sys, time, overlay; client = overlay.connect(sys.argv[1]); "
        f"print(client.call('x', mode='any').result, flush=True); {end}"
    )
    command = [sys.executable, "-c", program, narrow.address("A")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout
        assert b": x" in process.stdout.readline()
        process.wait(20)
        until(lambda: narrow.overlay.metrics("A").streams == 0, 20)
    finally:
        if os.name != "nt":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_calls_of_a_client_without_references_are_still_answered(narrow: Noted) -> None:
    address = narrow.address("A")
    future = overlay.connect(address).submit("patient", "1")
    results = overlay.connect(address).map("upper", ["a", "b"])
    gc.collect()

    assert future.result(20) == b"done"
    assert list(results) == [b"A", b"B"]
    del future, results
    gc.collect()
    until(lambda: narrow.overlay.metrics("A").streams == 0)


# A server that ends idle streams


class IdleCloser(pb2_grpc.OverlayNodeServicer):
    """Answers each request immediately, and ends the stream when `end` is set."""

    def __init__(self) -> None:
        self.streams = 0
        self.end = threading.Event()
        self.ends_unread = False  # the stream ends when the next request comes, without reading it
        self.payloads: list[bytes] = []

    def ForwardStream(self, request_iterator: Any, context: Any) -> Any:
        self.streams += 1
        context.send_initial_metadata(((codec.MAX_BYTES_KEY, str(2**24)),))
        frames: list[Any] = []
        received = threading.Event()

        def read() -> None:
            with contextlib.suppress(Exception):
                for frame in request_iterator:
                    frames.append(frame)
                    received.set()

        threading.Thread(target=read, daemon=True).start()
        while context.is_active() and not self.end.is_set():
            if not received.wait(0.02):
                continue
            received.clear()
            while frames and not self.ends_unread:
                answer = pb2.Frame()
                for made in frames.pop(0).segments:
                    self.payloads += made.payloads.items
                    slice_ = answer.slices.add(number=made.number, count=made.count)
                    slice_.results.items.extend(made.payloads.items)
                yield answer
            if frames:
                break
        self.end.clear()
        self.ends_unread = False
        context.set_trailing_metadata(((codec.EXECUTED_KEY, "no"), (codec.IDLE_KEY, "1")))
        context.abort(grpc.StatusCode.UNAVAILABLE, "nothing was open on this stream")


@pytest.fixture
def closer() -> Iterator[tuple[IdleCloser, str]]:
    made = IdleCloser()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb2_grpc.add_OverlayNodeServicer_to_server(made, server)
    address = f"127.0.0.1:{free_port()}"
    server.add_insecure_port(address)
    server.start()
    yield made, address
    server.stop(0)


def test_a_stream_that_was_ended_when_idle_is_reopened_by_the_next_request(
    closer: tuple[IdleCloser, str],
) -> None:
    server, address = closer
    with overlay.connect(address) as client:
        for number in range(2):
            assert client.call(f"{number}", mode="any").result == b"%d" % number
            server.end.set()
            until(lambda: not server.end.is_set())
            time.sleep(0.5)  # five times the delay before a lost stream reconnects
            assert server.streams == number + 1

    assert server.payloads == [b"0", b"1"]


def test_a_request_that_an_ended_stream_did_not_read_is_sent_again(
    closer: tuple[IdleCloser, str],
) -> None:
    server, address = closer
    with overlay.connect(address) as client:
        assert client.call("a", mode="any").result == b"a"
        server.ends_unread = True
        assert client.call("b", mode="any", timeout=20).result == b"b"

    assert server.payloads == [b"a", b"b"]
    assert server.streams == 2


def test_the_asyncio_client_reopens_a_stream_that_was_ended(closer: tuple[IdleCloser, str]) -> None:
    server, address = closer

    async def main() -> None:
        async with overlay.connect_async(address) as client:
            assert (await client.call("a", mode="any")).result == b"a"
            server.end.set()
            await asyncio.to_thread(until, lambda: not server.end.is_set())
            await asyncio.sleep(0.5)
            assert server.streams == 1
            assert [r async for r in client.map(None, ["b", "c"])] == [b"b", b"c"]

    asyncio.run(main())
    assert server.streams == 2


def test_a_map_does_not_mistake_an_ended_stream_for_a_lost_process(
    closer: tuple[IdleCloser, str], caplog: pytest.LogCaptureFixture
) -> None:
    server, address = closer

    def payloads() -> Iterator[str]:
        yield "a"
        until(lambda: server.payloads == [b"a"])
        server.end.set()
        until(lambda: not server.end.is_set())
        time.sleep(0.5)
        yield "b"

    with overlay.connect(address) as client:
        assert list(client.map(None, payloads(), chunksize=1)) == [b"a", b"b"]
    assert "is gone" not in caplog.text
