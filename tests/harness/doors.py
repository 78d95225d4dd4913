"""Who comes to a page and then says nothing, or little, or does not take what he asked for."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

# What is said on each connection, and then no more.
SLOWLY = {
    b"": "nothing",
    b"GET /metrics HT": "the beginning",
    b"GET /snapshot HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n": "a request, and then nothing",
    b"POST /snapshot HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx": "half a body",
}
FRAMES = b"GET /frames HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@contextmanager
def held_open(
    port: int, says: bytes, count: int = 200, source: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """So many connections, as far as they are let in; none of them reads."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            each = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), 5, (source, 0))
            )
            with suppress(OSError):  # it may have been shown the door
                each.sendall(says)
            made.append(each)
        yield made


def timed(act: Callable[[], object]) -> float:
    """Seconds; without end when it raised OSError."""
    began = time.monotonic()
    try:
        act()
    except OSError:
        return float("inf")
    return time.monotonic() - began
