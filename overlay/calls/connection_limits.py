"""How many connections a process accepts, and which ones it closes when there are too many.

Each connection takes a file descriptor, and when these run out no client can connect any more and
no error says why. So gRPC gets a limit, and when three quarters of it are in use, half are closed:
those of the address that has the most, connections without an open call first, the oldest first.

Owns one thread, "connections", from `start` to `stop`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

from overlay.calls.eviction import EvictionQueue
from overlay.calls.request_log import RequestLog
from overlay.model import addresses
from overlay.model import clocks as time
from overlay.transport import codec

log = logging.getLogger(__name__)

WANTED_FILES = 10_240  # the most that macOS gives; Linux starts programs with 1,024
OWN_FILES = 200  # for logs, links, handlers
MAX_CONNECTIONS = 8192
CHECK_S = 0.25
# After closing some: their clients reconnect at once and would fill the freed room, locking out
# other callers, long before the next regular check.
BUSY_CHECK_S, BUSY_S = 0.01, 5.0


def raise_file_limit() -> int:
    """Raises the soft limit on open files as far as the system allows. Returns the limit."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return WANTED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return WANTED_FILES if soft == resource.RLIM_INFINITY else int(soft)


def max_connections(files: int) -> int:
    """How many connections to accept when the process may have `files` open."""
    return max(16, min(MAX_CONNECTIONS, files - OWN_FILES))


class Connections:
    """open_peers: callers with an open call, by gRPC's names. on_check: called every 250 ms."""

    def __init__(
        self,
        port: int,
        most: int,
        request_log: RequestLog,
        open_peers: Callable[[], Collection[str]],
        on_check: Callable[[], None] = lambda: None,
    ) -> None:
        """most: connections that gRPC accepts. request_log: counts those that are closed here."""
        self._port = port
        self._most = most * 3 // 4
        self._request_log = request_log
        self._open_peers = open_peers
        self._on_check = on_check
        self._since: dict[Endpoint, float] = {}  # when a connection was first seen
        self._closing: set[Endpoint] = set()  # shut down here, not closed by gRPC yet
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        busy_until = next_on_check = 0.0
        while not self._stopped.wait(BUSY_CHECK_S if time.monotonic() < busy_until else CHECK_S):
            now = time.monotonic()
            try:
                if now >= next_on_check:
                    next_on_check = now + CHECK_S * 0.9
                    self._on_check()
                descriptors = _descriptors()
                if len(descriptors) <= self._most:
                    self._since.clear()
                    self._closing.clear()
                elif self._check(descriptors):
                    busy_until = now + BUSY_S
            except Exception:  # the next check may succeed
                log.exception("could not check the connections")

    def _check(self, descriptors: list[int]) -> bool:
        """Whether any had to be closed."""
        now, found = time.monotonic(), _connections(descriptors, self._port)
        self._since = {peer: self._since.get(peer, now) for peer in found}
        self._closing.intersection_update(found)
        if len(found) <= self._most:
            return False
        busy = {_endpoint_of(peer) for peer in self._open_peers()}
        # The oldest idle ones go first, and enough of them that others can connect before they
        # are back.
        order = sorted(found, key=lambda peer: (peer in busy, self._since[peer]))
        kept: EvictionQueue[Endpoint] = EvictionQueue(self._most // 2)
        evicted = [evictee for peer in order for evictee in kept.add(peer, peer[0])]
        closed = {peer for peer in evicted if _shut_down(found[peer], peer)} - self._closing
        self._closing |= closed
        for address, count in Counter(peer[0] for peer in closed).items():
            self._request_log.crowded_out("connections", count, address)
        return bool(closed)


Endpoint = tuple[str, int]
"""The remote address and port of a connection."""


def _descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):  # Linux, macOS; elsewhere none are closed
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []


def _connections(descriptors: Iterable[int], port: int) -> dict[Endpoint, int]:
    """The connections accepted on the port, each with its descriptor."""
    found = {}
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            # Hundreds are checked, so none is duplicated. AF_INET6 fits every family: its names
            # are the longest.
            borrowed = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, descriptor)
            try:
                mine = borrowed.getsockname()
                if isinstance(mine, tuple) and mine[1] == port:
                    found[_endpoint(*borrowed.getpeername()[:2])] = descriptor
            finally:
                borrowed.detach()
    return found


def _duplicate(descriptor: int) -> socket.socket:
    """The socket under a descriptor of our own. Raises OSError if it is not a socket."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(errno.ENOTSOCK, "not a socket")
    return socket.socket(fileno=os.dup(descriptor))


def _endpoint_of(peer: str) -> Endpoint:
    port = peer.rpartition(":")[2]
    return _endpoint(codec.address_in(peer), int(port) if port.isdigit() else 0)


def _endpoint(host: str, port: int) -> Endpoint:
    return _plain_host(host), port


@lru_cache(1024)
def _plain_host(host: str) -> str:
    with contextlib.suppress(ValueError):
        return addresses.plain(host)
    return host


def _shut_down(descriptor: int, peer: Endpoint) -> bool:
    """Ends the connection as its peer would; gRPC then closes its descriptor."""
    try:
        with _duplicate(descriptor) as own:
            if _endpoint(*own.getpeername()[:2]) != peer:  # closed since, and the descriptor reused
                return False
            own.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
