"""Raw grpcio, three hops on kept streams that pass frames on unread: what the overlay's route costs
when nothing is done on it.

client -> A -> B -> C          frames in turn; an answer takes the route of its request back
            -> E -> D, F

Not a peer for real use, but the bound that gRPC for Python sets to a design with streams. By what
the overlay's figure is lower, it pays for its queue, its routing, its deadlines and its reports.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import grpc_chain, grpc_common

TITLE = "bare streams, three hops"
PACKAGES = ("grpcio",)
SUPPORTS = {"window", "threads", "unary"}
SETUPS = ("three",)
BULK = 0
NOTES = (
    "Not a peer but a bound: what gRPC for Python allows on the overlay's own route, with nothing "
    "done on it. Frames of requests go over kept streams, to the branches in turn; only the worker "
    "opens them, and answers on the thread that reads. Less: no queue, no bound, no deadline, no "
    "cancel, no status, no routing by load, no provision for a process that dies, no mode all."
)
FRAME = 1024 * 1024  # bytes; gRPC takes four times that
HEAD = struct.Struct("<QI")  # of a record: its number, the length of its body


def missing() -> str:
    return ""


start = grpc_chain.start  # the same processes, each with this module's worker and relay


def worker(ready, address: str, name: str, slots: int | None, nap_s: float) -> None:
    def work(frame: bytes) -> bytes:
        return b"".join(record(n, answer(name, body, nap_s)) for n, body in records(frame))

    def streams(frames: Iterable[bytes], context) -> Iterator[bytes]:
        gathered = Gathered()
        read_on_thread(frames, lambda frame: gathered.put(work(frame)))
        yield from gathered

    grpc_common.serve(ready, address, {}, grpc_common.POOL, {"Streams": streams})


def relay(ready, address: str, below: list[tuple[str, int]]) -> None:
    """below: each branch's address and number of workers, which is its share of the turns."""

    def streams(frames: Iterable[bytes], context) -> Iterator[bytes]:
        gathered = Gathered()
        read_on_thread(frames, branches(below, gathered.put))
        yield from gathered

    calls = Calls()
    calls.send = branches(below, calls.answered)
    single = {"Any": lambda body, context: calls.begin(body).wait()}
    grpc_common.serve(ready, address, single, grpc_common.POOL, {"Streams": streams})


def branches(below: list[tuple[str, int]], sink: Callable[[bytes], None]) -> Callable:
    """A function that sends each frame to the next branch."""
    pipes = [[Pipe(at, sink)] * share for at, share in below]
    turn = itertools.cycle([pipe for share in pipes for pipe in share])
    return lambda frame: next(turn).send(frame)


def record(number: int, body: bytes) -> bytes:
    return HEAD.pack(number, len(body)) + body


def records(frame: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(frame):
        number, size = HEAD.unpack_from(frame, at)
        at += HEAD.size
        yield number, frame[at : at + size]
        at += size


class Gathered:
    """What is put between two frames leaves as one frame, of about FRAME bytes at most."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()

    def put(self, frame: bytes) -> None:
        with self._changed:
            self._waiting.append(frame)
            if len(self._waiting) == 1:
                self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                frame = self._waiting.popleft()
                while self._waiting and len(frame) + len(self._waiting[0]) <= FRAME:
                    frame += self._waiting.popleft()
            yield frame


def read_on_thread(frames: Iterable[bytes], take: Callable[[bytes], None]) -> None:
    def read() -> None:
        for frame in frames:
            take(frame)

    threading.Thread(target=read, name="reader", daemon=True).start()


class Pipe:
    """One stream to a process, which lives as long as this process."""

    def __init__(self, address: str, sink: Callable[[bytes], None]) -> None:
        import grpc

        self._channel = grpc.insecure_channel(address)
        self._gathered = Gathered()
        method = self._channel.stream_stream(f"/{grpc_common.SERVICE}/Streams")
        read_on_thread(method(iter(self._gathered), wait_for_ready=True), sink)
        self.send = self._gathered.put


class Call:
    """One request under way. A bare lock is the cheapest way to wake its thread."""

    def __init__(self) -> None:
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._body = b""

    def set(self, body: bytes) -> None:
        self._body = body
        self._arrived.release()

    def wait(self) -> bytes:
        if not self._arrived.acquire(timeout=TIMEOUT_S):
            raise TimeoutError("no answer")
        return self._body


class Calls:
    """Requests under way, by their numbers."""

    send: Callable[[bytes], None]

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._open: dict[int, Call] = {}

    def begin(self, body: bytes) -> Call:
        number, call = next(self._numbers), Call()
        self._open[number] = call
        self.send(record(number, body))
        return call

    def answered(self, frame: bytes) -> None:
        for number, body in records(frame):
            self._open.pop(number).set(body)


class Caller(FuturesCaller):
    def __init__(self, address: str) -> None:
        self._calls = Calls()
        self._calls.send = Pipe(address, self._calls.answered).send
        self._channel, self._any = grpc_common.method(address, "Any")

    def submit(self, payload: bytes, mode: str) -> Call:
        return self._calls.begin(payload)

    def result(self, handle: Call) -> bytes:
        return handle.wait()

    def unary_of(self, thread: int) -> Callable[[bytes, str], bytes]:
        return lambda payload, mode: self._any(payload, timeout=TIMEOUT_S)

    def close(self) -> None:
        self._channel.close()
