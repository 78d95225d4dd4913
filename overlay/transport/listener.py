"""Where a process listens: a gRPC server, and a new one when its machine has got other addresses.

A server of gRPC keeps the addresses that it was started with. When its host is a name, and this
machine loses them (another network, another lease), the name is looked up again until it stands for
an address that this machine has, and the process listens there too.

Owns a thread, "listening", from `start` to `stop`, where the host is such a name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from overlay.model import clocks as time
from overlay.model.topology import join_address
from overlay.transport.endpoints import open_port
from overlay.transport.machine import can_bind
from overlay.transport.resolver import Named, resolve

log = logging.getLogger(__name__)

LOOK_S = 1.0  # from one look at the own addresses to the next
CLOSE_S = 2.0  # gRPC's server takes less


class Listening:
    """The servers of one process, to those who add methods to a server: as if it were one.

    place: the addresses to begin with. make: a new server, without methods or ports.
    """

    def __init__(self, place: Named, port: int, make: Callable[[], Any]) -> None:
        self._place = place
        self._port = port
        self._make = make
        self._methods: list[tuple[str, tuple[Any, ...]]] = []
        self._open: list[tuple[tuple[str, ...], Any]] = []  # addresses, their server
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._is_told = False  # that there is no address
        self._thread = threading.Thread(target=self._follow, name="listening", daemon=True)

    def add_generic_rpc_handlers(self, *given: Any) -> None:
        self._methods.append(("add_generic_rpc_handlers", given))

    def add_registered_method_handlers(self, *given: Any) -> None:
        self._methods.append(("add_registered_method_handlers", given))

    def start(self) -> None:
        """Raises RuntimeError when an address cannot be had."""
        self._listen(self._place.addresses)
        if not (self._place.is_lone_number or self._place.is_loopback):
            self._thread.start()

    def stop(self, grace_s: float) -> None:
        self._stopped.set()
        with self._lock:
            servers = [server for _, server in self._open]
        until = time.monotonic() + CLOSE_S
        for ended in [server.stop(grace_s) for server in servers]:
            ended.wait(max(0.0, until - time.monotonic()))

    def _listen(self, numbers: Sequence[str]) -> None:
        server = self._make()
        for add, given in self._methods:
            getattr(server, add)(*given)
        for number in numbers:
            open_port(server, number, self._port)
        with self._lock:
            if not self._stopped.is_set():
                server.start()
                self._open.append((tuple(numbers), server))

    def _follow(self) -> None:
        while not self._stopped.wait(LOOK_S):
            gone = [one for one in self._open if not any(map(can_bind, one[0]))]
            if len(gone) == len(self._open):
                self._seek(gone)
            else:
                self._is_told = False

    def _seek(self, gone: list[tuple[tuple[str, ...], Any]]) -> None:
        found = resolve(self._place.host)
        # Without a network some systems give a machine's own name a loopback address.
        own = tuple(n for n in found.addresses if can_bind(n) and not Named(n, (n,)).is_loopback)
        if not own:
            if not self._is_told:
                lost = Named(found.host, gone[-1][0]).shown()
                log.warning("this machine is no longer %s: nobody reaches this process", lost)
            self._is_told = True
            return
        with contextlib.suppress(RuntimeError):  # taken by another program; maybe free at last
            self._listen(own)
            at = Named(found.host, own).shown(join_address(found.host, self._port))
            log.info("serves on %s now", at, extra={"kind": "started"})
            for one in gone:
                one[1].stop(0)
                with self._lock:
                    self._open.remove(one)
