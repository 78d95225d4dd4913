"""Connections: how many a process can have, and whose go when there are too many.

Each takes a file descriptor. Where these run out nobody can connect any more, and nothing says so;
so gRPC is told how many to let in, and from three quarters of that on the oldest of the address
that has the most are cut: first those on which no call is open.

Owns one thread, "connections", from `start` to `stop`, which does what is due every now and then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection

import psutil

from overlay import wire
from overlay.crowd import Crowd
from overlay.hosts import plain_address
from overlay.record import Record

log = logging.getLogger("overlay.connections")

WANTED_FILES = 10_240  # the most that macOS gives; Linux starts programs with 1,024
OWN_FILES = 200  # for logs, links, handlers
MOST_CONNECTIONS = 8192
LOOK_S = 0.25


def raise_file_limit() -> int:
    """Takes as many descriptors as the system gives without asking, and says how many."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are not counted so
        return WANTED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return WANTED_FILES if soft == resource.RLIM_INFINITY else int(soft)


def most_connections(files: int) -> int:
    """How many may be let in, of a process that may have so many files open."""
    return max(16, min(MOST_CONNECTIONS, files - OWN_FILES))


class Connections:
    """open_peers: who has a call open, as gRPC names them. each_look: is called each 250 ms."""

    def __init__(
        self,
        port: int,
        most: int,
        record: Record,
        open_peers: Callable[[], Collection[str]],
        each_look: Callable[[], None] = lambda: None,
    ) -> None:
        """most: connections that gRPC lets in. record: is told of those that are cut."""
        self._port = port
        self._most = most * 3 // 4
        self._record = record
        self._open_peers = open_peers
        self._each_look = each_look
        self._since: dict[End, float] = {}  # when a connection was first seen
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            try:
                self._each_look()
                if _open_files() > self._most:
                    self._look()
                else:
                    self._since.clear()
            except Exception:  # the next look may find what this one did not
                log.exception("the connections could not be looked at")

    def _look(self) -> None:
        now, found = time.monotonic(), _connections(self._port)
        self._since = {peer: self._since.get(peer, now) for peer in found}
        if len(found) <= self._most:
            return
        busy = {_end_of(peer) for peer in self._open_peers()}
        # The first to go are those that have nothing to do, of them the oldest.
        order = sorted(found, key=lambda peer: (peer in busy, self._since[peer]))
        crowd: Crowd[End] = Crowd(self._most)
        gone = [other for peer in order for other in crowd.add(peer, peer[0])]
        cut = Counter(peer[0] for peer in gone if _cut(found[peer], peer))
        for address, count in cut.items():
            self._record.crowded_out("connections", count, address)


End = tuple[str, int]
"""The other side of a connection: its address and port."""


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):  # Linux, macOS; elsewhere nothing is cut
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return 0


def _connections(port: int) -> dict[End, int]:
    """Those that were let in at the port, each with its descriptor."""
    return {
        _normal(connection.raddr.ip, connection.raddr.port): connection.fd
        for connection in psutil.Process().net_connections("tcp")
        if connection.laddr and connection.raddr and connection.laddr.port == port
        if connection.fd >= 0
    }


def _end_of(peer: str) -> End:
    """Of gRPC's name for a caller."""
    port = peer.rpartition(":")[2]
    return _normal(wire.address_in(peer), int(port) if port.isdigit() else 0)


def _normal(host: str, port: int) -> End:
    with contextlib.suppress(ValueError):
        return plain_address(host), port
    return host, port


def _cut(descriptor: int, peer: End) -> bool:
    """Ends the connection as its other side would; gRPC closes its descriptor itself."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as own:
            if _normal(*own.getpeername()[:2]) != peer:  # closed since, and its number taken
                return False
            own.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
