"""The way in to what is served over HTTP: who holds the door open keeps nobody else out.

A connection on which nothing is asked is closed after some seconds, however slowly it says the
beginning of something; and when all are taken, at once: the oldest such one, of the address that
has the most. So one more is always let in, unless all of them are being answered.

A server runs on the thread that calls `run`, until `should_exit` is set, from any thread.
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

# Of the page and of what Prometheus reads together. A browser has six connections, and 32 pages one
# more.
DOOR_CONNECTIONS = 64  # at once; one more ends an idle one
DOOR_IDLE_S = 5.0  # until a connection on which nothing is asked is closed
CLOSING_S = 1  # for the answers under way when the server stops


class Server(uvicorn.Server):
    """app: an ASGI application; in `request.state.hang_up` it finds how to end a connection."""

    def __init__(self, app: Any) -> None:
        settings = uvicorn.Config(
            app,
            http=Visitor,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # whoever sends nonsense writes no lines
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSING_S,
        )
        super().__init__(settings)


class Visitor(H11Protocol):
    """One connection. All methods are called on the server's event loop."""

    _since = 0.0  # when it had its last answer, or came
    _is_shown_out = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "hang_up": self.hang_up}
        self._since = self.loop.time()
        self._look()
        inside = [one for one in self.connections if isinstance(one, Visitor) and one.is_inside]
        if len(inside) > DOOR_CONNECTIONS:
            self._make_room(inside)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    @property
    def is_inside(self) -> bool:
        return not self._is_shown_out

    @property
    def is_idle(self) -> bool:
        """Nothing is asked, or the answer is made and only its reader is not there."""
        return self.cycle is None or self.cycle.response_complete or self.transport.is_closing()

    def hang_up(self) -> None:
        """Whatever is on its way."""
        self._is_shown_out = True
        self.transport.abort()

    def _make_room(self, inside: list[Visitor]) -> None:
        of = Counter(one._address for one in inside)
        idle = [one for one in inside if one.is_idle]  # this one is
        max(idle, key=lambda one: (of[one._address], -one._since)).hang_up()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _look(self) -> None:
        left = self._since + DOOR_IDLE_S - self.loop.time() if self.is_idle else DOOR_IDLE_S
        if left > 0:
            self._timer = self.loop.call_later(left, self._look)
        elif self.is_inside:
            self.hang_up()


def listen(host: str, port: int) -> socket.socket:
    """At the first of this machine's addresses that the host stands for. Raises OSError."""
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
        if os.name != "nt":  # there it would let two programs share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening
