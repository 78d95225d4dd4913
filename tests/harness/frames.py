"""HTTP/2 frames, valid and invalid, and other bytes that a broken or hostile program may send.

The same `rng` makes the same bytes again, except for TLS's own random numbers. `talk` sends them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from random import Random

import h2.config
import h2.connection
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.harness.mutants import mutated

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Headers = list[tuple[str, str]]
GOOD: Headers = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/OverlayNode/Forward"),
    (":authority", "127.0.0.1"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("grpc-timeout", "5S"),
]
BODY = b"\x0a\x05hello"  # a Request that carries a payload
# No Drain, which would stop the process.
PATHS = [
    *("/OverlayNode/Forward", "/OverlayNode/GetMetrics", "/OverlayNode/ForwardStream"),
    *("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/OverlayNode/forward", "/"),
    *("", "*", "OverlayNode/Forward", "/OverlayNode/Forward/", "//", "/a b", "/../x", "/%00"),
    *("/OverlayNode/Forward?x=1", "/OverlayAdmin/", "/" + "x" * 5000, "/\x1b[2J", "/é"),
]


def conversation(rng: Random, frames: int) -> bytes:
    """The bytes of a connection: its preface and this many frames of random types."""
    made = _valid_conversation(frames) if rng.random() < 0.3 else _frames(rng, frames)
    return mutated(made, rng) if rng.random() < 0.3 else made


def junk(rng: Random) -> bytes:
    """Bytes of a program that does not speak HTTP/2, or stops doing so."""
    how = rng.random()
    if how < 0.2:
        return client_hello(rng.choice(["localhost", "overlay.example"]))
    if how < 0.3:
        return mutated(client_hello("localhost"), rng)
    if how < 0.5:
        return rng.randbytes(rng.choice([1, 9, 24, 1000, 70_000]))
    if how < 0.6:
        return PREFACE[: rng.randrange(len(PREFACE))]
    if how < 0.7:
        return PREFACE + rng.randbytes(rng.choice([0, 5, 9, 200, 40_000]))
    return rng.choice(OTHERS)


OTHERS = [
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /OverlayNode/Forward HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx",
    b"GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\xff\xff\x01" + b"x" * 300,  # a TLS record above the maximum length
    b"\x00" * 5000,
]


def client_hello(name: str) -> bytes:
    """The first bytes of a real TLS connection."""
    sent = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    connection = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return sent.read()


def talk(port: int, sent: bytes, rng: Random, patience_s: float = 0.05) -> bytes:
    """Sends the bytes on a new connection, returns the reply, and disconnects in a random way."""
    received = bytearray()
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    # OSError: the server has closed the connection, or sends nothing more.
    with connection, contextlib.suppress(OSError):
        for chunk in _chunks(sent, rng):
            connection.sendall(chunk)
        end = rng.choice(["close", "reset", "half-close", "close unread"])
        if end == "half-close":
            connection.shutdown(socket.SHUT_WR)
        if end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(patience_s)
        while end != "close unread" and (chunk := connection.recv(65_536)):
            received += chunk
    return bytes(received)


def _chunks(sent: bytes, rng: Random) -> Iterator[bytes]:
    at = 0
    while at < len(sent):
        size = rng.choice([1, 8, 9, 100]) if rng.random() < 0.2 else len(sent)
        yield sent[at : at + size]
        at += size


def _valid_conversation(requests: int) -> bytes:
    """What a correct client sends; `mutated` breaks it."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    for _ in range(requests):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, GOOD)
        client.send_data(stream, _grpc(BODY), end_stream=True)
    return client.data_to_send()


def _frames(rng: Random, count: int) -> bytes:
    made = bytearray(PREFACE)
    if rng.random() < 0.9:
        made += SettingsFrame(0).serialize()
    encoder = Encoder()
    stream = -1
    for _ in range(count):
        stream += rng.choice([2, 2, 2, 2, 0, 1, 1000, -2])
        made += rng.choice(_MAKERS)(encoder, max(1, stream), rng)
    return bytes(made)


Maker = Callable[[Encoder, int, Random], bytes]


def _opening(
    encoder: Encoder,
    stream: int,
    headers: Headers = GOOD,
    flags: tuple[str, ...] = ("END_HEADERS",),
) -> bytes:
    return HeadersFrame(stream, encoder.encode(headers), flags=flags).serialize()


def _grpc(body: bytes, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(body) if length is None else length) + body


def _data(stream: int, body: bytes, *flags: str) -> bytes:
    return DataFrame(stream, body, flags=flags).serialize()


def _raw(kind: int, flags: int, stream: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + body


def _settings(encoder: Encoder, stream: int, rng: Random) -> bytes:
    values = [0, 1, 2, 2**14, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]
    body = b"".join(
        struct.pack(">HI", rng.choice([*range(9), 0xFE03, 0xFFFF]), rng.choice(values))
        for _ in range(rng.choice([0, 1, 2, 10, 1000]))
    )
    return rng.choice(
        [
            _raw(4, 0, 0, body),
            _raw(4, 1, 0, b""),
            _raw(4, 1, 0, body),
            _raw(4, 0, stream, body),
            _raw(4, 0, 0, body + b"x"),
            _raw(4, 0, 0, b"") * 50,
        ]
    )


def _resets(encoder: Encoder, stream: int, rng: Random) -> bytes:
    """Requests that are cancelled immediately, many in a row."""
    made = b""
    for at in range(stream | 1, (stream | 1) + 2 * rng.choice([1, 5, 40]), 2):
        made += _opening(encoder, at)
        if rng.random() < 0.5:
            made += _data(at, _grpc(BODY), *rng.choice([(), ("END_STREAM",)]))
        made += RstStreamFrame(at, rng.choice([0, 5, 8, 2**32 - 1])).serialize()
    return made


def _stray_reset(encoder: Encoder, stream: int, rng: Random) -> bytes:
    return _raw(3, 0, rng.choice([0, stream, 2**31 - 1]), b"\0" * rng.choice([4, 0, 3, 8]))


def _continuation(encoder: Encoder, stream: int, rng: Random) -> bytes:
    block = encoder.encode(GOOD)
    cut = rng.randrange(len(block))
    first = HeadersFrame(stream, block[:cut]).serialize()
    last = ContinuationFrame(stream, block[cut:], flags=["END_HEADERS"]).serialize()
    empty = ContinuationFrame(stream, b"").serialize()
    return rng.choice(
        [
            first + last,
            last,
            first,
            first + empty * 100 + last,
            first + _data(stream, b"x") + last,
            first + ContinuationFrame(stream + 2, block[cut:], flags=["END_HEADERS"]).serialize(),
            first + PingFrame(0, b"12345678").serialize() + last,
            first + ContinuationFrame(stream, rng.randbytes(16_000)).serialize() * 10,
        ]
    )


def _window(encoder: Encoder, stream: int, rng: Random) -> bytes:
    at = rng.choice([0, stream, 2**31 - 1])
    size = rng.choice([1, 65_535, 2**31 - 1])
    return rng.choice(
        [
            WindowUpdateFrame(at, window_increment=size).serialize(),
            WindowUpdateFrame(at, window_increment=2**31 - 1).serialize() * 2,
            _raw(8, 0, at, b"\0\0\0\0"),
            _raw(8, 0, at, b"\xff\xff\xff\xff"),
            _raw(8, 0, at, b"\0" * rng.choice([0, 3, 5])),
        ]
    )


def _goaway(encoder: Encoder, stream: int, rng: Random) -> bytes:
    last, code = rng.choice([0, stream, 2**31 - 1]), rng.choice([0, 1, 11, 2**32 - 1])
    debug_data = rng.randbytes(rng.choice([0, 10, 5000]))
    valid = GoAwayFrame(0, last, code, debug_data).serialize()
    return rng.choice([valid, valid * 3, _raw(7, 0, stream, bytes(8)), _raw(7, 0, 0, b"\0")])


def _ping(encoder: Encoder, stream: int, rng: Random) -> bytes:
    valid = PingFrame(0, rng.randbytes(8), flags=rng.choice([[], ["ACK"]])).serialize()
    return rng.choice([valid, valid * 50, _raw(6, 0, stream, bytes(8)), _raw(6, 0, 0, b"short")])


def _priority(encoder: Encoder, stream: int, rng: Random) -> bytes:
    return PriorityFrame(stream, depends_on=stream, stream_weight=255).serialize()


def _promise(encoder: Encoder, stream: int, rng: Random) -> bytes:
    return PushPromiseFrame(stream, 2, encoder.encode(GOOD)).serialize()


def _unknown(encoder: Encoder, stream: int, rng: Random) -> bytes:
    body = rng.randbytes(rng.choice([0, 1, 8, 100, 16_384]))
    return _raw(rng.randrange(256), rng.randrange(256), stream, body)


def _wrong_length(encoder: Encoder, stream: int, rng: Random) -> bytes:
    length = rng.choice([0, 1, 16_384, 16_385, 2**24 - 1])
    return _raw(rng.randrange(10), rng.choice([0, 1, 4, 5, 8, 32]), stream, b"abc", length)


def _stray_data(encoder: Encoder, stream: int, rng: Random) -> bytes:
    return rng.choice(
        [
            _data(stream, _grpc(BODY), "END_STREAM"),
            _raw(0, 8, stream, b"\xff" + b"x" * 9),  # more padding than payload
            _raw(0, 0, 0, _grpc(BODY)),
            _opening(encoder, stream, flags=("END_HEADERS", "END_STREAM")) + _data(1, b"late"),
        ]
    )


def _large_headers(encoder: Encoder, stream: int, rng: Random) -> bytes:
    extra: Headers = rng.choice(
        [
            [("x", "y" * 7000)],
            [("x", "y" * 15_000)],
            [(f"x{n}", "y") for n in range(1500)],
            [("x", "")] * 2000,
            [("x-bin", "!" * 100)],
        ]
    )
    block = encoder.encode([*GOOD, *extra])
    made = b""
    for at in range(0, len(block), 16_000):
        kind = ContinuationFrame if at else HeadersFrame
        last = ["END_HEADERS"] if at + 16_000 >= len(block) else []
        made += kind(stream, block[at : at + 16_000], flags=last).serialize()
    return made + _data(stream, _grpc(BODY), "END_STREAM")


ODD_HEADERS: list[tuple[str, list[str]]] = [
    (":method", ["GET", "PUT", "", "post", "CONNECT"]),
    (":path", PATHS),
    (":scheme", ["https", "", "ftp"]),
    (":authority", ["", "x" * 3000, "\0"]),
    ("te", ["", "gzip"]),
    ("content-type", ["", "text/html", "application/grpc+json", "application/grpc\0", "a" * 900]),
    ("grpc-timeout", ["", "0n", "1n", "-1S", "99999999H", "999999999H", "abc", "5", "S", "5S "]),
    ("grpc-encoding", ["gzip", "deflate", "identity", "zstd", "nonsense", ""]),
    ("grpc-accept-encoding", ["gzip", ",,,,", "x" * 900]),
    ("overlay-caller", ["", "A", "x" * 900, "a b", "é", "\x1b[2J"]),
    ("grpc-status-details-bin", ["!!", "AAAA", "=" * 9]),
    ("grpc-trace-bin", ["AAAA"]),
    ("user-agent", ["", "x" * 900]),
    ("grpc-previous-rpc-attempts", ["0", "-1", "99999999999"]),
    ("connection", ["close"]),
    ("content-length", ["0", "-1", "99999999999"]),
    ("Upper", ["case"]),
    (":unknown", ["pseudo"]),
]


def _odd_request(encoder: Encoder, stream: int, rng: Random) -> bytes:
    headers = list(GOOD)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name, values = rng.choice(ODD_HEADERS)
        act = rng.choice(["set", "set", "set", "add", "drop"])
        if act != "add":
            headers = [pair for pair in headers if pair[0] != name]
        if act != "drop":
            headers.insert(rng.randrange(len(headers) + 1), (name, rng.choice(values)))
    end = rng.choice([("END_HEADERS",), ("END_HEADERS", "END_STREAM")])
    return _opening(encoder, stream, headers, end) + _data(stream, _grpc(BODY), "END_STREAM")


def _odd_hpack(encoder: Encoder, stream: int, rng: Random) -> bytes:
    block = rng.choice(
        [
            b"\xff\xff\xff\xff\xff\xff",  # an index that does not end
            b"\xc0\xfe",  # an index beyond the table
            b"\x3f\xe1\xff\xff\xff\x0f",  # a table of 4 GiB
            b"\x80",
            b"\x40\x7f\xff\xff\xff\xff\x0f",  # a name of 4 GiB
            rng.randbytes(40),
            mutated(encoder.encode(GOOD), rng),
        ]
    )
    return HeadersFrame(stream, block, flags=["END_HEADERS"]).serialize()


def _odd_message(encoder: Encoder, stream: int, rng: Random) -> bytes:
    packed = [("grpc-encoding", rng.choice(["gzip", "deflate", "identity", "nonsense"]))]
    headers = GOOD + rng.choice([[], packed])
    sizes = [0, 1, 3, 8, 2**20, 2**31 - 1, 2**31, 2**32 - 1]
    body = rng.choice(
        [
            _grpc(BODY, flag=1),
            _grpc(BODY, flag=rng.choice([2, 3, 128, 255])),
            _grpc(BODY, length=rng.choice(sizes)),
            _grpc(BODY, flag=1, length=rng.choice(sizes)),
            _grpc(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + rng.randbytes(30), flag=1),
            _grpc(BODY) * rng.choice([2, 100]),
            _grpc(BODY)[: rng.randrange(10)],
            b"",
            _grpc(b""),
            rng.randbytes(rng.choice([1, 5, 6, 500])),
        ]
    )
    end = rng.choice([("END_STREAM",), ()])
    made = _opening(encoder, stream, headers)
    for at in range(0, len(body), size := rng.choice([1, 4, 16_000])):
        made += _data(stream, body[at : at + size])
    return made + _data(stream, b"", *end)


def _valid(encoder: Encoder, stream: int, rng: Random) -> bytes:
    return _opening(encoder, stream) + _data(stream, _grpc(BODY), "END_STREAM")


_MAKERS: list[Maker] = [
    *(_settings, _resets, _stray_reset, _continuation, _window, _goaway, _ping, _priority),
    *(_promise, _unknown, _wrong_length, _stray_data, _large_headers, _odd_hpack),
    *(_odd_request, _odd_request, _odd_request, _odd_message, _odd_message, _valid, _valid, _valid),
]


def replies(received: bytes) -> Iterator[Frame]:
    """The complete frames that the server sent. Raises hyperframe's errors for an invalid one."""
    at = 0
    while at + 9 <= len(received):
        frame, length = Frame.parse_frame_header(memoryview(received[at : at + 9]))
        if at + 9 + length > len(received):
            return
        frame.parse_body(memoryview(received[at + 9 : at + 9 + length]))
        yield frame
        at += 9 + length
