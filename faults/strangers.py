"""Strangers: attacks by clients that can reach a port, with plain sockets.

    with Strangers() as strangers:
        strangers.unfinished(port, "/OverlayNode/GetMetrics", 8)    # until the end of the block
        ...

They write HTTP/2 frames themselves, and answer pings so that they are not disconnected as dead. A
connection that the server closes is not reopened, except where a method says so. A send waits 2 s
at most, and `close` closes everything.

Owns the thread "strangers", which reads for all of them, and a "stranger-N" for each repeated
action, until `close`.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    *range(2),
    *range(3, 5),
    *range(6, 10),
)
ACK = END_STREAM = 1
END_HEADERS = 4
INITIAL_WINDOW = 4  # a setting: the initial flow-control window of each stream
USUAL_WINDOW = 65_535
FRAME_BYTES = 16_384
SEND_S = 2.0
NEAR = "127.0.0.1"
FAR = "127.0.0.2"  # another address of this machine, if it has one: see `has_far`
BESIDE = 8  # calls on one connection, if many are opened
# The calls of neighbours and monitors; eight of each were once enough to stop an overlay.
PROBED = (("/OverlayNode/GetMetrics", 8), ("/grpc.health.v1.Health/Watch", 8))
Headers = Sequence[tuple[str, str]]


def has_far() -> bool:
    """Whether this machine has a second loopback address; macOS and the BSDs do not by default."""
    with socket.socket() as probe:
        try:
            probe.bind((FAR, 0))
        except OSError:
            return False
    return True


def source() -> str:
    """The strangers' address: different from honest clients' if possible."""
    return FAR if has_far() else NEAR


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def message(body: bytes, packed: bool = False) -> bytes:
    """With gRPC's header."""
    return struct.pack(">BI", packed, len(body)) + body


def half(size: int = 4 << 20) -> bytes:
    """The header of a message that never follows."""
    return struct.pack(">BI", 0, size)


def inflating(mib: int, before: bytes = b"") -> bytes:
    """A gzip stream of `before` and MiB of zeros, compressed to a thousandth."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    made = pack.compress(before) + pack.flush(zlib.Z_FULL_FLUSH)
    zeros, check = bytes(1 << 20), zlib.crc32(before)
    block = pack.compress(zeros) + pack.flush(zlib.Z_FULL_FLUSH)
    for _ in range(mib):
        check = zlib.crc32(zeros, check)
    size = (len(before) + mib * len(zeros)) % 2**32
    tail = pack.flush(zlib.Z_FINISH) + struct.pack("<II", check, size)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + made + block * mib + tail


def field(number: int, size: int) -> bytes:
    """The key and length of a protobuf field of `size` bytes."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])


def block(headers: Headers) -> bytes:
    """HPACK with literal names and values only."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    return b"\x7f" + _varint(len(raw) - 127) + raw


def call_headers(method: str, more: Headers = ()) -> Headers:
    return (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "overlay"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    )


class Stranger:
    """One connection. After the server has closed it, sends are silently dropped."""

    def __init__(self, connection: socket.socket | None, window: int, answers: bool) -> None:
        self.is_gone = connection is None
        self.ended: set[int] = set()  # streams that the server has ended
        self.received: dict[int, bytearray] = {}  # by stream
        self._socket = connection
        self._window = window
        self._answers = answers
        self._next = 1
        self._buffer = bytearray()
        self._changed = threading.Condition(threading.RLock())
        self._initial_room = USUAL_WINDOW
        self._room = {0: USUAL_WINDOW}  # bytes that we may send, by stream; 0: the connection

    def greet(self) -> None:
        first = struct.pack(">HI", INITIAL_WINDOW, self._window)
        self.send(PREFACE + frame(SETTINGS, 0, 0, first))

    def send(self, sent: bytes) -> None:
        with self._changed:
            if self.is_gone or self._socket is None:
                return
            try:
                self._socket.sendall(sent)
            except OSError:  # the server has closed it, or does not read
                self.close()

    def open(self, method: str, *bodies: bytes, end: bool = False, headers: Headers = ()) -> int:
        """Starts a call with these bytes of messages; returns its stream. end: sends no more."""
        with self._changed:
            stream = self.begin()
            self._room[stream] = self._initial_room
            last = END_STREAM if end and not bodies else 0
            made = block(call_headers(method, headers))
            self.send(frame(HEADERS, END_HEADERS | last, stream, made))
        body = b"".join(bodies)
        if body:
            self.say(stream, body, end)
        return stream

    def begin(self) -> int:
        """A stream for frames that are sent by `send`."""
        with self._changed:
            self._next += 2
            return self._next - 2

    def call(self, request: bytes, headers: Headers = ()) -> int:
        """Sends a complete Forward, without waiting for the answer."""
        return self.open("/OverlayNode/Forward", message(request), end=True, headers=headers)

    def say(self, stream: int, body: bytes, end: bool = False) -> None:
        """Sends more of a call, as far as flow control allows it in time."""
        while body:
            size = self._take_room(stream, min(len(body), FRAME_BYTES))
            if not size:
                return
            chunk, body = body[:size], body[size:]
            last = END_STREAM if end and not body else 0
            self.send(frame(DATA, last, stream, chunk))

    def _take_room(self, stream: int, limit: int) -> int:
        until = time.monotonic() + SEND_S
        with self._changed:
            while True:
                size = min(limit, self._room[0], self._room.get(stream, 0))
                if size > 0:
                    self._room[0] -= size
                    self._room[stream] -= size
                    return size
                left = until - time.monotonic()
                if self.is_gone or stream in self.ended or left <= 0:
                    return 0
                self._changed.wait(left)

    def leave(self, stream: int) -> None:
        """Resets the call."""
        self.send(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))

    def ask(self, method: str, body: bytes, headers: Headers = (), within_s: float = 5.0) -> bytes:
        """A complete unary call: the answer, or nothing if it was refused."""
        stream = self.open(method, message(body), end=True, headers=headers)
        until = time.monotonic() + within_s
        with self._changed:
            while stream not in self.ended and not self.is_gone and time.monotonic() < until:
                self._changed.wait(0.1)
            return bytes(self.received.get(stream, b"")[5:])

    def close(self) -> None:
        with self._changed:
            self.is_gone = True
            if self._socket is not None:
                self._socket.close()
            self._changed.notify_all()

    def read(self) -> None:
        """Reads what has arrived; on the reader's thread."""
        try:
            chunk = self._socket.recv(65_536) if self._socket else b""
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return
        self._buffer += chunk
        reply = b""
        with self._changed:
            for kind, flags, stream, body in self._frames():
                reply += self._take(kind, flags, stream, body)
            self._changed.notify_all()
        if reply and self._answers:
            self.send(reply)

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                return
            kind, flags, stream = struct.unpack(">BBI", self._buffer[3:9])
            yield kind, flags, stream & 0x7FFFFFFF, bytes(self._buffer[9 : 9 + size])
            del self._buffer[: 9 + size]

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> bytes:
        """Handles one frame; returns the reply."""
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.ended.add(stream)
            self._room.pop(stream, None)
        if kind == DATA:
            self.received.setdefault(stream, bytearray()).extend(body)
            if self._window and body:
                more = struct.pack(">I", len(body))
                return frame(WINDOW_UPDATE, 0, 0, more) + frame(WINDOW_UPDATE, 0, stream, more)
        if kind == WINDOW_UPDATE and stream in self._room:
            self._room[stream] += struct.unpack(">I", body)[0]
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(body), 6):
                name, value = struct.unpack(">HI", body[at : at + 6])
                if name == INITIAL_WINDOW:
                    self._initial_room = value
            return frame(SETTINGS, ACK, 0)
        if kind == PING and not flags & ACK:
            return frame(PING, ACK, 0, body)
        return b""


class Strangers:
    """Many of them, until `close`, which may be called twice."""

    def __init__(self) -> None:
        self._all: list[Stranger] = []
        self._lock = threading.Lock()
        self._new: queue.SimpleQueue[tuple[socket.socket, Stranger]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._read, name="strangers", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Strangers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * SEND_S)
        for one in self._all:
            one.close()

    def connect(
        self,
        port: int,
        source: str = FAR,
        first: bytes | None = None,
        window: int = USUAL_WINDOW,
        reads: bool = True,
    ) -> Stranger:
        """A new connection; `is_gone` if it was refused.

        first: all that it sends, instead of HTTP/2. window: of each of its streams. reads: if not,
        it does not answer pings either, and the server drops it after a few seconds.
        """
        connection: socket.socket | None = None
        with contextlib.suppress(OSError):
            connection = socket.create_connection((NEAR, port), SEND_S, (source, 0))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made = Stranger(connection, window, first is None)
        with self._lock:
            self._all = [one for one in self._all if not one.is_gone]
            self._all.append(made)
        if connection is not None and reads:
            self._new.put((connection, made))
        if first is None:
            made.greet()
        else:
            made.send(first)
        return made

    def silent(self, count: int, port: int, source: str = FAR) -> None:
        """Keeps `count` connections open that make no calls; replaces those that are closed."""
        open_ones: list[Stranger] = []

        def fill() -> None:
            open_ones[:] = [one for one in open_ones if not one.is_gone]
            while len(open_ones) < count and not self._closed.is_set():
                open_ones.append(self.connect(port, source))
                if open_ones[-1].is_gone:
                    return

        self.repeat(fill, 0.1)

    def crowd(self, count: int, port: int, **how: Any) -> list[Stranger]:
        return [self.connect(port, **how) for _ in range(count)]

    def repeat(self, act: Callable[[], object], pause_s: float = 0.02) -> None:
        """Does it now, and repeatedly until `close`, with a pause in between."""

        def run() -> None:
            while not self._closed.wait(pause_s):
                act()

        act()
        name = f"stranger-{len(self._threads)}"
        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    def unfinished(
        self,
        port: int,
        method: str,
        count: int,
        source: str = FAR,
        sends: Sequence[bytes] = (b"",),
        beside: int = BESIDE,
    ) -> None:
        """Keeps `count` calls open that never send a complete message, `beside` on a connection;
        replaces those that end. sends: what they send, in turn."""
        calls: list[tuple[Stranger, int]] = []

        def fill() -> None:
            calls[:] = [(one, s) for one, s in calls if not one.is_gone and s not in one.ended]
            lack, one = count - len(calls), None
            for number in range(lack):
                if self._closed.is_set():
                    return
                if number % beside == 0 or one is None:
                    one = self.connect(port, source)
                    if one.is_gone:
                        return  # refused; tried again after the pause
                calls.append((one, one.open(method, sends[number % len(sends)])))

        self.repeat(fill, 0.05)

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            while not self._closed.is_set():
                while not self._new.empty():
                    _register(selector, *self._new.get())
                if not selector.get_map():
                    time.sleep(0.01)
                    continue
                for key, _ in selector.select(0.02):
                    key.data.read()
                    if key.data.is_gone:
                        selector.unregister(key.fileobj)


def _register(selector: selectors.BaseSelector, connection: socket.socket, one: Stranger) -> None:
    with contextlib.suppress(OSError, ValueError):  # it is already closed
        fd = connection.fileno()
        if fd in selector.get_map():  # of an earlier, closed connection
            selector.unregister(fd)
        selector.register(connection, selectors.EVENT_READ, one)
