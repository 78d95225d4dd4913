"""The addresses of the processes above this one, by which their links are told from clients.

Owns a thread, "hosts", from `start` to `stop`, if a host is a name that has to be looked up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

from overlay.model import addresses
from overlay.model.topology import Process
from overlay.transport.resolver import resolve

LOOKUP_INTERVAL_S = 2.0  # as a name may get another address


class UpstreamHosts:
    """Thread-safe; never blocks."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self._addresses: dict[str, frozenset[str]] = {}
        self._named: list[Process] = []
        for process in processes:
            try:
                self._addresses[process.id] = frozenset([addresses.plain(process.host)])
            except ValueError:
                self._named.append(process)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_up, name="hosts", daemon=True)

    def start(self) -> None:
        if self._named:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def has(self, process_id: str, address: str) -> bool:
        """Whether the process is one of them, and this is its address."""
        with contextlib.suppress(ValueError):
            return addresses.plain(address) in self._addresses.get(process_id, ())
        return False

    def _look_up(self) -> None:
        while True:
            for process in self._named:
                found = resolve(process.host).addresses
                if found:  # else keep the last ones
                    self._addresses[process.id] = frozenset(map(addresses.plain, found))
            if self._stopped.wait(LOOKUP_INTERVAL_S):
                return
