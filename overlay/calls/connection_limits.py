"""Connections: how many a process can have, and whose go when there are too many.

Each takes a file descriptor. Where these run out nobody can connect any more, and nothing says so;
so gRPC is told how many to let in, and when three quarters of these are there the half is cut: of
the address that has the most, those on which no call is open first, and the oldest of them.

Owns one thread, "connections", from `start` to `stop`, which does what is due every now and then.
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
from overlay.model import clocks as time
from overlay.transport import codec
from overlay.transport.upstream import plain_address

log = logging.getLogger(__name__)

WANTED_FILES = 10_240  # the most that macOS gives; Linux starts programs with 1,024
OWN_FILES = 200  # for logs, links, handlers
MAX_CONNECTIONS = 8192
LOOK_S = 0.25
# After some were cut: their makers come again at once, and would fill the room, so that no other
# caller gets in, long before the usual next look.
BUSY_LOOK_S, BUSY_S = 0.01, 5.0


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
    return max(16, min(MAX_CONNECTIONS, files - OWN_FILES))


class Connections:
    """open_peers: callers with an open call, by gRPC's names. each_look: called every 250 ms."""

    def __init__(
        self,
        port: int,
        most: int,
        record: RequestLog,
        open_peers: Callable[[], Collection[str]],
        each_look: Callable[[], None] = lambda: None,
    ) -> None:
        """most: connections that gRPC lets in. record: counts those that are cut."""
        self._port = port
        self._most = most * 3 // 4
        self._record = record
        self._open_peers = open_peers
        self._each_look = each_look
        self._since: dict[End, float] = {}  # when a connection was first seen
        self._told: set[End] = set()  # of those that were cut and are not closed yet
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        busy_until = next_other = 0.0
        while not self._stopped.wait(BUSY_LOOK_S if time.monotonic() < busy_until else LOOK_S):
            now = time.monotonic()
            try:
                if now >= next_other:
                    next_other = now + LOOK_S * 0.9
                    self._each_look()
                descriptors = _descriptors()
                if len(descriptors) <= self._most:
                    self._since.clear()
                    self._told.clear()
                elif self._look(descriptors):
                    busy_until = now + BUSY_S
            except Exception:  # the next look may find what this one did not
                log.exception("the connections could not be looked at")

    def _look(self, descriptors: list[int]) -> bool:
        """Whether some had to be cut."""
        now, found = time.monotonic(), _connections(descriptors, self._port)
        self._since = {peer: self._since.get(peer, now) for peer in found}
        self._told.intersection_update(found)
        if len(found) <= self._most:
            return False
        busy = {_end_of(peer) for peer in self._open_peers()}
        # The first to go are those that have nothing to do, of them the oldest; and so many that
        # they are not back before somebody else has come.
        order = sorted(found, key=lambda peer: (peer in busy, self._since[peer]))
        crowd: EvictionQueue[End] = EvictionQueue(self._most // 2)
        gone = [other for peer in order for other in crowd.add(peer, peer[0])]
        cut = {peer for peer in gone if _cut(found[peer], peer)} - self._told
        self._told |= cut
        for address, count in Counter(peer[0] for peer in cut).items():
            self._record.crowded_out("connections", count, address)
        return bool(cut)


End = tuple[str, int]
"""The other side of a connection: its address and port."""


def _descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):  # Linux, macOS; elsewhere nothing is cut
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []


def _connections(descriptors: Iterable[int], port: int) -> dict[End, int]:
    """Those that were let in at the port, each with its descriptor."""
    found = {}
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            # There are hundreds: so without a descriptor of our own, and of whatever family it is;
            # the names of AF_INET6 are the longest, and there is room for the others.
            same = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, descriptor)
            try:
                mine = same.getsockname()
                if isinstance(mine, tuple) and mine[1] == port:
                    found[_normal(*same.getpeername()[:2])] = descriptor
            finally:
                same.detach()
    return found


def _own(descriptor: int) -> socket.socket:
    """The same socket under a descriptor of our own. Raises OSError where it is none."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(errno.ENOTSOCK, "not a socket")
    return socket.socket(fileno=os.dup(descriptor))


def _end_of(peer: str) -> End:
    """Of gRPC's name for a caller."""
    port = peer.rpartition(":")[2]
    return _normal(codec.address_in(peer), int(port) if port.isdigit() else 0)


def _normal(host: str, port: int) -> End:
    return _plain(host), port


@lru_cache(1024)
def _plain(host: str) -> str:
    with contextlib.suppress(ValueError):
        return plain_address(host)
    return host


def _cut(descriptor: int, peer: End) -> bool:
    """Ends the connection as its other side would; gRPC closes its descriptor itself."""
    try:
        with _own(descriptor) as own:
            if _normal(*own.getpeername()[:2]) != peer:  # closed since, and its number taken
                return False
            own.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
