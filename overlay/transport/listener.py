"""Listens with a gRPC server, and with a new one when the machine's addresses change.

A gRPC server keeps the addresses that it was started with. If the host is a name, and this machine
loses those addresses (another network, another lease), the name is looked up again until it has an
address of this machine, and the process listens there too.

Owns a thread, "listening", from `start` to `stop`, if the host is such a name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from overlay.model import clocks as time
from overlay.model.addresses import is_loopback, is_wildcard, join_address
from overlay.transport.endpoints import open_port
from overlay.transport.machine import can_bind
from overlay.transport.resolver import Host, resolve

if TYPE_CHECKING:
    import grpc

    from overlay.security.credentials import Credentials

log = logging.getLogger(__name__)

CHECK_S = 1.0  # between two checks of this machine's addresses
MAX_CLOSE_S = 2.0  # a gRPC server takes less
LOOPBACK = "127.0.0.1"


class Listener:
    """The servers of one process. Methods are added to it as to a single grpc.Server.

    host: with the addresses to start with. make: makes a server without methods or ports.
    """

    def __init__(
        self,
        host: Host,
        port: int,
        make: Callable[[], grpc.Server],
        credentials: Credentials | None = None,
        local_plaintext: bool = True,
    ) -> None:
        """credentials: for mutual TLS. local_plaintext: serve programs of this machine without it
        on 127.0.0.1, if `host` leaves that address free."""
        self._host = host
        self._port = port
        self._make = make
        self._credentials = credentials
        self._local_plaintext = credentials is not None and local_plaintext
        self._methods: list[tuple[str, tuple[Any, ...]]] = []
        self._open: list[tuple[tuple[str, ...], grpc.Server]] = []  # addresses, and their server
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._has_warned = False  # about having no address
        self._thread = threading.Thread(target=self._follow, name="listening", daemon=True)

    def add_generic_rpc_handlers(self, *args: Any) -> None:
        self._methods.append(("add_generic_rpc_handlers", args))

    def add_registered_method_handlers(self, *args: Any) -> None:
        self._methods.append(("add_registered_method_handlers", args))

    def start(self) -> None:
        """Raises RuntimeError when an address cannot be listened on."""
        self._listen(self._host.addresses)
        if not (self._host.is_lone_number or self._host.is_loopback):
            self._thread.start()

    def stop(self, grace_s: float) -> None:
        self._stopped.set()
        with self._lock:
            servers = [server for _, server in self._open]
        until = time.monotonic() + MAX_CLOSE_S
        for ended in [server.stop(grace_s) for server in servers]:
            ended.wait(max(0.0, until - time.monotonic()))

    def _listen(self, numbers: Sequence[str]) -> None:
        server = self._make()
        for add, args in self._methods:
            getattr(server, add)(*args)
        for number in numbers:
            open_port(server, number, self._port, self._credentials)
        if self._local_plaintext and not any(map(_holds_loopback, numbers)):
            with contextlib.suppress(RuntimeError):  # another program has the port
                open_port(server, LOOPBACK, self._port)
        with self._lock:
            if not self._stopped.is_set():
                server.start()
                self._open.append((tuple(numbers), server))

    def _follow(self) -> None:
        while not self._stopped.wait(CHECK_S):
            gone = [one for one in self._open if not any(map(can_bind, one[0]))]
            if len(gone) == len(self._open):
                self._move(gone)
            else:
                self._has_warned = False

    def _move(self, gone: list[tuple[tuple[str, ...], grpc.Server]]) -> None:
        found = resolve(self._host.host)
        # Without a network, some systems resolve a machine's own name to a loopback address.
        usable = tuple(n for n in found.addresses if can_bind(n) and not Host(n, (n,)).is_loopback)
        if not usable:
            if not self._has_warned:
                lost = Host(found.host, gone[-1][0]).shown()
                log.warning("this machine is no longer %s: this process cannot be reached", lost)
            self._has_warned = True
            return
        with contextlib.suppress(RuntimeError):  # taken by another program; it may become free
            self._listen(usable)
            at = Host(found.host, usable).shown(join_address(found.host, self._port))
            log.info("serves on %s now", at, extra={"kind": "started"})
            for one in gone:
                one[1].stop(0)
                with self._lock:
                    self._open.remove(one)


def _holds_loopback(number: str) -> bool:
    """Whether listening there takes 127.0.0.1 too."""
    return is_loopback(number) or is_wildcard(number)
