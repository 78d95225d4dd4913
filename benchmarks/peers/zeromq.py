"""ZeroMQ: the guide's ROUTER/DEALER broker, with zmq.proxy (which runs in C) between the sockets.

DEALER caller -> ROUTER [proxy] DEALER -> REP worker       any
DEALER caller -> ROUTER worker, each directly              all
"""

from __future__ import annotations

import itertools
import threading

from benchmarks.children import Group
from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, FuturesCaller
from benchmarks.peers import not_installed
from benchmarks.rows import Setup
from tests.harness.machine import free_port

TITLE = "ZeroMQ broker"
PACKAGES = ("pyzmq",)
SUPPORTS = {"window", "threads", "bulk", "all"}
BULK = 50_000
NOTES = (
    "A kept socket per calling thread. Less: workers in turn, not by load; no status, no deadline "
    "of a request (the caller's receive has a timeout), no answer when a worker dies with it; a "
    "socket blocks from 1,000 waiting messages on. Mode all is one kept socket per worker, without "
    "the broker: two hops fewer than the overlay. More: nothing between the bytes and the wire."
)


def missing() -> str:
    return not_installed("zmq")


def versions() -> dict:
    import zmq

    return {"libzmq": zmq.zmq_version()}


def start(group: Group, setup: Setup) -> dict:
    front, back = _address(), _address()
    group.python("broker", "broker", front=front, back=back)
    group.wait_ready("broker")
    direct = {name: _address() for name in setup.workers}
    for name, at in direct.items():
        given = {"name": name, "slots": setup.slots or 1, "nap_s": setup.nap_s}
        group.python(name, "worker", back=back, direct=at, **given)
    group.wait_ready(*direct)
    return {"front": front, "direct": list(direct.values())}


def _address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def broker(ready, front: str, back: str) -> None:
    import zmq

    context = zmq.Context()
    callers, workers = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    callers.bind(front)
    workers.bind(back)
    ready()
    zmq.proxy(callers, workers)


def worker(ready, back: str, direct: str, name: str, slots: int, nap_s: float) -> None:
    import zmq

    context = zmq.Context()

    def serve_any() -> None:
        socket = context.socket(zmq.REP)
        socket.connect(back)
        while True:
            socket.send(answer(name, socket.recv(), nap_s))

    for _ in range(slots):
        threading.Thread(target=serve_any, daemon=True).start()
    asked = context.socket(zmq.ROUTER)
    asked.bind(direct)
    ready()
    while True:
        *route, payload = asked.recv_multipart()
        asked.send_multipart([*route, answer(name, payload, nap_s)])


class Caller(FuturesCaller):
    bulk_window = 256  # more is not faster; near the sockets' limit of 1,000, answers were dropped

    def __init__(self, front: str, direct: list[str]) -> None:
        import zmq

        self._context = zmq.Context()
        self._makers = {
            "any": lambda: _Any(self._socket(front)),
            "all": lambda: _All([self._socket(at) for at in direct]),
        }
        self._kept: dict[tuple[int, str], _Any | _All] = {}

    def submit(self, payload: bytes, mode: str):
        asker = self._asker(-1, mode)
        return asker, asker.submit(payload)

    def result(self, handle) -> bytes:
        asker, key = handle
        return asker.result(key)

    def call_of(self, thread: int):
        def call(payload: bytes, mode: str) -> bytes:
            asker = self._asker(thread, mode)
            return asker.result(asker.submit(payload))

        return call

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _asker(self, thread: int, mode: str) -> _Any | _All:
        """A socket is for one thread only: one asker for each, kept for the next row."""
        if (thread, mode) not in self._kept:
            self._kept[thread, mode] = self._makers[mode]()
        return self._kept[thread, mode]

    def _socket(self, address: str):
        import zmq

        socket = self._context.socket(zmq.DEALER)
        socket.rcvtimeo = socket.sndtimeo = int(TIMEOUT_S * 1000)
        socket.connect(address)
        return socket


class _Any:
    """Requests over one socket; answers come back with their keys, in any order."""

    def __init__(self, socket) -> None:
        self._socket = socket
        self._numbers = itertools.count()
        self._answers: dict[bytes, bytes] = {}

    def submit(self, payload: bytes) -> bytes:
        key = b"%d" % next(self._numbers)
        self._socket.send_multipart((key, b"", payload))
        return key

    def result(self, key: bytes) -> bytes:
        while key not in self._answers:
            found, _, found_answer = self._socket.recv_multipart()
            self._answers[found] = found_answer
        return self._answers.pop(key)


class _All:
    """A socket per worker. Each answers in order, so the oldest request's parts come first."""

    def __init__(self, sockets: list) -> None:
        self._sockets = sockets
        self._numbers = itertools.count()

    def submit(self, payload: bytes) -> bytes:
        key = b"%d" % next(self._numbers)
        for socket in self._sockets:
            socket.send_multipart((key, payload))
        return key

    def result(self, key: bytes) -> bytes:
        parts = [socket.recv_multipart() for socket in self._sockets]
        if any(found != key for found, _ in parts):
            raise RuntimeError("answers out of order")
        return b"\n".join(part for _, part in parts)
