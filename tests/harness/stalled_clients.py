"""HTTP clients that send nothing, or too little, or do not read the response."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

# What a client sends before it goes silent, and a name for it.
STALLED_REQUESTS = {
    b"": "nothing",
    b"GET /metrics HT": "part of the first line",
    b"GET /snapshot HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n": "a request whose response is not read",
    b"POST /snapshot HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx": "part of a body",
}
FRAMES = b"GET /frames HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@contextmanager
def held_open(
    port: int, sends: bytes, count: int = 200, source: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """Opens connections that send `sends` and never read. The server may close some."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            each = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), 5, (source, 0))
            )
            with suppress(OSError):  # the server may have closed it
                each.sendall(sends)
            made.append(each)
        yield made


def timed(act: Callable[[], object]) -> float:
    """The seconds that it took, or infinity when it raised OSError."""
    began = time.monotonic()
    try:
        act()
    except OSError:
        return float("inf")
    return time.monotonic() - began
