"""A process has places for so many streams: who finds none is told, and who left frees one."""

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
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

import overlay
from overlay.client import sync as library
from overlay.model.segments import Executed
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.client.test_sync import HANDLERS, Noted, handlers
from tests.harness.cluster import ROOT, Overlay, free_port, six_processes, until

PLACES = 8
HELD = 6  # of them: as many as one address may have, all at work
MIN_PLACES = f"""
import dataclasses, runpy, sys
from overlay.model.limits import Limits

names = [field.name for field in dataclasses.fields(Limits)]
values = list(Limits.__init__.__defaults__)
values[names.index("streams")] = Limits.streams = {PLACES}
Limits.__init__.__defaults__ = tuple(values)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Narrow(Overlay):
    """Processes with few places for streams."""

    def _node(self, process_id: str) -> list[str]:
        python, *rest = super()._node(process_id)
        return [python, str(self.folder / "few_places.py"), *rest]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noted]:
    folder = tmp_path_factory.mktemp("narrow")
    notes = tmp_path_factory.mktemp("notes") / "notes"
    (folder / "mine.py").write_text(HANDLERS)
    (folder / "few_places.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + MIN_PLACES
    )
    found = Narrow(folder, six_processes(handlers=handlers(notes)))
    try:
        yield Noted(found.start(), notes)
    finally:
        found.stop()


@pytest.fixture
def narrow(shared: Noted) -> Iterator[Noted]:
    shared.forget()
    yield shared
    until(lambda: not (shared.at_work() or shared.overlay.metrics("A").streams), what="all is over")


@contextlib.contextmanager
def all_places_taken(noted: Noted) -> Iterator[list[overlay.Client]]:
    """By clients that wait for an answer each, so that nobody may take theirs for idle."""
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


@pytest.mark.parametrize("verb", VERBS)
def test_who_finds_no_place_is_told_so_within_its_patience(narrow: Noted, verb: str) -> None:
    with all_places_taken(narrow), overlay.connect(narrow.address("A"), patience_s=0.5) as client:
        began = time.monotonic()
        with pytest.raises(library.Refused) as caught:
            VERBS[verb](client)

    assert time.monotonic() - began < 10
    assert str(PLACES) in str(caught.value), "in the words of the process"
    assert "stream" in str(caught.value)
    assert caught.value.executed is Executed.NO
    assert caught.value.retry_after_s is not None


ASYNC_VERBS: dict[str, Any] = {
    "call": lambda client: client.call("x", mode="any"),
    "map": lambda client: _all(client.map(None, ["x"] * 10)),
    "parts": lambda client: _all(client.parts("x")),
}


async def _all(results: Any) -> list[Any]:
    return [result async for result in results]


@pytest.mark.parametrize("verb", ASYNC_VERBS)
def test_a_task_that_finds_no_place_is_told_so(narrow: Noted, verb: str) -> None:
    async def main() -> None:
        async with overlay.connect_async(narrow.address("A"), patience_s=0.5) as client:
            with pytest.raises(library.Refused) as caught:
                await asyncio.wait_for(ASYNC_VERBS[verb](client), 10)
            assert caught.value.executed is Executed.NO

    with all_places_taken(narrow):
        asyncio.run(main())


def test_a_short_deadline_ends_the_wait_for_a_place(narrow: Noted) -> None:
    with (
        all_places_taken(narrow),
        overlay.connect(narrow.address("A"), patience_s=60) as client,
        pytest.raises(library.CallFailed) as caught,
    ):
        client.call("x", mode="any", timeout=1)

    assert caught.value.executed is Executed.NO


def test_a_place_that_becomes_free_is_taken(narrow: Noted) -> None:
    with (
        all_places_taken(narrow) as holders,
        overlay.connect(narrow.address("A"), patience_s=20) as client,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.call, "x", mode="any", timeout=30)
        time.sleep(0.5)
        assert not waiting.done()
        holders[0].close()
        answer = waiting.result(20)

    assert answer.result.endswith(b": x")


def test_map_on_the_command_line_says_that_there_is_no_place(narrow: Noted) -> None:
    host, _, port = narrow.address("A").rpartition(":")
    words = [sys.executable, str(ROOT / "client.py"), host, port, "map"]
    with all_places_taken(narrow):
        done = subprocess.run(words, input=b"a\nb\n", capture_output=True, timeout=30)

    assert done.returncode == 3
    assert b"stream" in done.stderr
    assert b"no handler saw the request, try again in " in done.stderr


def test_the_doctor_says_where_all_places_are_taken(narrow: Noted) -> None:
    found = narrow.overlay
    python, few_places, *_ = found._node("A")
    words = [python, few_places, str(ROOT / "client.py"), "doctor", str(found.path)]
    with all_places_taken(narrow):
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)

    assert done.returncode == 1
    assert f"A: {HELD} of its {PLACES} places for streams are taken" in done.stdout


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_client_that_is_dropped_frees_its_place(narrow: Noted, kind: str) -> None:
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
def test_a_program_may_connect_for_each_request_and_close_nothing(narrow: Noted, kind: str) -> None:
    async def use_async() -> None:
        for n in range(3 * PLACES):
            client = overlay.connect_async(narrow.address("A"))
            assert (await client.call(f"n{n}", handler="upper", mode="any")).result == b"N%d" % n

    if kind == "blocking":
        for n in range(3 * PLACES):
            client = overlay.connect(narrow.address("A"))
            assert client.call(f"n{n}", handler="upper", mode="any").result == b"N%d" % n
        del client
    else:
        asyncio.run(use_async())

    def is_freed() -> bool:
        gc.collect()  # again: a thread that is just ending may have held the last one
        return narrow.overlay.metrics("A").streams == 0

    until(is_freed)


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "os.kill(os.getpid(), 9)",
        pytest.param(
            "os.fork() or time.sleep(60); os.kill(os.getpid(), 9)",  # the child has its socket
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
        ),
    ],
)
def test_a_program_that_ends_without_a_word_frees_its_place(narrow: Noted, end: str) -> None:
    program = (
        "import os, sys, time, overlay; client = overlay.connect(sys.argv[1]); "
        f"print(client.call('x', mode='any').result, flush=True); {end}"
    )
    words = [sys.executable, "-c", program, narrow.address("A")]
    done = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert done.stdout
        assert b": x" in done.stdout.readline()
        done.wait(20)
        until(lambda: narrow.overlay.metrics("A").streams == 0, 20)
    finally:
        if os.name != "nt":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)
        done.stdout.close()


def test_what_a_dropped_client_was_asked_is_still_answered(narrow: Noted) -> None:
    address = narrow.address("A")
    future = overlay.connect(address).submit("patient", "1")
    results = overlay.connect(address).map("upper", ["a", "b"])
    gc.collect()

    assert future.result(20) == b"done"
    assert list(results) == [b"A", b"B"]
    del future, results
    gc.collect()
    until(lambda: narrow.overlay.metrics("A").streams == 0)


# A process that ends streams on which nothing is open: played by a server that can do nothing else


class Sparing(pb2_grpc.OverlayNodeServicer):
    """Answers each request at once, and lets a stream go when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.let_go = threading.Event()
        self.swallowed = 0  # requests that are not read, in the next stream
        self.payloads: list[bytes] = []

    def ForwardStream(self, request_iterator: Any, context: Any) -> Any:
        self.begun += 1
        context.send_initial_metadata(((codec.MAX_BYTES_KEY, str(2**24)),))
        frames: list[Any] = []
        came = threading.Event()

        def read() -> None:
            with contextlib.suppress(Exception):
                for frame in request_iterator:
                    frames.append(frame)
                    came.set()

        threading.Thread(target=read, daemon=True).start()
        while context.is_active() and not self.let_go.is_set():
            if not came.wait(0.02):
                continue
            came.clear()
            while frames and not self.swallowed:
                answer = pb2.Frame()
                for made in frames.pop(0).segments:
                    self.payloads += made.payloads.items
                    slice_ = answer.slices.add(number=made.number, count=made.count)
                    slice_.results.items.extend(made.payloads.items)
                yield answer
            if frames:
                break  # read by nobody
        self.let_go.clear()
        self.swallowed = 0
        context.set_trailing_metadata(((codec.EXECUTED_KEY, "no"), (codec.IDLE_KEY, "1")))
        context.abort(grpc.StatusCode.UNAVAILABLE, "nothing was open on this stream")


@pytest.fixture
def sparing() -> Iterator[tuple[Sparing, str]]:
    played = Sparing()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb2_grpc.add_OverlayNodeServicer_to_server(played, server)
    address = f"127.0.0.1:{free_port()}"
    server.add_insecure_port(address)
    server.start()
    yield played, address
    server.stop(0)


def test_a_stream_that_was_let_go_comes_again_with_the_next_request(
    sparing: tuple[Sparing, str],
) -> None:
    played, address = sparing
    with overlay.connect(address) as client:
        for turn in range(2):
            assert client.call(f"{turn}", mode="any").result == b"%d" % turn
            played.let_go.set()
            until(lambda: not played.let_go.is_set())
            time.sleep(0.5)  # five times what a lost stream waits before it comes again
            assert played.begun == turn + 1

    assert played.payloads == [b"0", b"1"]


def test_what_a_stream_that_was_let_go_did_not_read_is_sent_again(
    sparing: tuple[Sparing, str],
) -> None:
    played, address = sparing
    with overlay.connect(address) as client:
        assert client.call("a", mode="any").result == b"a"
        played.swallowed = 1
        assert client.call("b", mode="any", timeout=20).result == b"b"

    assert played.payloads == [b"a", b"b"]
    assert played.begun == 2


def test_a_task_brings_back_a_stream_that_was_let_go(sparing: tuple[Sparing, str]) -> None:
    played, address = sparing

    async def main() -> None:
        async with overlay.connect_async(address) as client:
            assert (await client.call("a", mode="any")).result == b"a"
            played.let_go.set()
            await asyncio.to_thread(until, lambda: not played.let_go.is_set())
            await asyncio.sleep(0.5)
            assert played.begun == 1
            assert [r async for r in client.map(None, ["b", "c"])] == [b"b", b"c"]

    asyncio.run(main())
    assert played.begun == 2


def test_a_map_does_not_take_a_stream_that_was_let_go_for_a_lost_process(
    sparing: tuple[Sparing, str], caplog: pytest.LogCaptureFixture
) -> None:
    played, address = sparing

    def payloads() -> Iterator[str]:
        yield "a"
        until(lambda: played.payloads == [b"a"])
        played.let_go.set()
        until(lambda: not played.let_go.is_set())
        time.sleep(0.5)
        yield "b"

    with overlay.connect(address) as client:
        assert list(client.map(None, payloads(), chunksize=1)) == [b"a", b"b"]
    assert "is gone" not in caplog.text
