"""An HTTP server whose idle connections do not keep others out.

A connection without a complete request is closed after a few seconds, however slowly it sends one.
When all connections are taken, the oldest idle one of the address that has the most is closed. So
there is always room for one more, unless all of them are being answered.

A server runs on the thread that calls `run`, until any thread sets `should_exit`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from overlay.transport.resolver import look_up, socket_address

# Of each server. A browser opens six connections, and each of up to 32 open pages one more.
MAX_CONNECTIONS = 64  # one more closes an idle one
IDLE_S = 5.0  # until a connection without a request is closed
CLOSE_S = 1  # for answers in progress when the server stops


class Server(uvicorn.Server):
    """app: an ASGI application; it may call `request.state.hang_up` to close a connection."""

    def __init__(self, app: Any) -> None:
        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # malformed requests must not fill the log
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_S,
        )
        super().__init__(settings)


class Connection(H11Protocol):
    """One connection. All methods run on the server's event loop."""

    _since = 0.0  # its last answer, or its opening
    _is_hung_up = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "hang_up": self.hang_up}
        self._since = self.loop.time()
        self._check_idle()
        connections = [c for c in self.connections if isinstance(c, Connection) and c.is_open]
        if len(connections) > MAX_CONNECTIONS:
            self._make_room(connections)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    @property
    def is_open(self) -> bool:
        return not self._is_hung_up

    @property
    def is_idle(self) -> bool:
        """Whether there is no request, or only a complete answer that waits for its reader."""
        return self.cycle is None or self.cycle.response_complete or self.transport.is_closing()

    def hang_up(self) -> None:
        """Closes the connection, whatever is in progress."""
        self._is_hung_up = True
        self.transport.abort()

    def _make_room(self, connections: list[Connection]) -> None:
        counts = Counter(c._address for c in connections)
        idle = [c for c in connections if c.is_idle]  # at least this one is
        max(idle, key=lambda c: (counts[c._address], -c._since)).hang_up()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _check_idle(self) -> None:
        left = self._since + IDLE_S - self.loop.time() if self.is_idle else IDLE_S
        if left > 0:
            self._timer = self.loop.call_later(left, self._check_idle)
        elif self.is_open:
            self.hang_up()


def listen(host: str, port: int) -> socket.socket:
    """A socket listening on the first of the host's addresses that works. Raises OSError."""
    found = look_up(host)
    failed = OSError(found.why)
    for address in found.addresses:
        try:
            return _listening(*socket_address(address, port))
        except OSError as e:
            at = "" if found.is_lone_number else f" ({address})"
            failed = OSError(e.errno, f"{e.strerror or e}{at}")
    raise failed


def _listening(family: int, place: Any) -> socket.socket:
    listening = socket.socket(family)
    try:
        if os.name != "nt":  # on Windows this would let two programs share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening
