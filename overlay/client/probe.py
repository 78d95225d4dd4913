"""Finds out why a connection fails, which gRPC does not say: a name, a port or a firewall.

Each probe owns a thread, "overlay-probe".
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from overlay.model import clocks as time
from overlay.model.errors import NoSuchHost, NotReached
from overlay.transport.channels import split
from overlay.transport.resolver import Host, connect, look_up
from overlay.transport.tls_check import tls_problem

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials


class ConnectionProbe:
    """Tries a TCP connection on a thread, which ends by `until` (monotonic seconds).

    is_refused: nothing is listening there.
    """

    is_refused = False

    def __init__(self, address: str, until: float, credentials: Credentials | None = None) -> None:
        self._address = address
        self._credentials = credentials
        self._host, self._port = split(address)
        self._until = max(until, time.monotonic() + 0.05)  # a refusal on a LAN takes no longer
        self._finding = self._before_connecting(look_up(self._host, 0))
        self._thread = threading.Thread(target=self._run, name="overlay-probe", daemon=True)
        self._thread.start()

    def error(self) -> NotReached:
        self._thread.join(max(0.0, self._until - time.monotonic()))
        kind, reason = self._finding
        return kind(reason)

    def _before_connecting(self, found: Host) -> tuple[type[NotReached], str]:
        """The error to report until a connection has been tried."""
        if not found.addresses:
            return NoSuchHost, found.why
        shown = found.shown(self._address)
        return NotReached, f"{shown} does not answer: wrong address, machine off, or a firewall"

    def _run(self) -> None:
        found = look_up(self._host, self._left_s)
        self._finding = self._before_connecting(found)
        if found.addresses:
            self._try(found.addresses, found.shown(self._address))

    def _try(self, addresses: tuple[str, ...], shown: str) -> None:
        try:
            connect(addresses, self._port, self._left_s).close()
        except ConnectionRefusedError:
            self._finding = NotReached, f"nothing serves at {shown}: the connection was refused"
            self.is_refused = True
        except TimeoutError:
            pass
        except OSError as error:
            self._finding = NotReached, f"{shown} cannot be reached: {error.strerror or error}"
        else:
            self._finding = NotReached, f"what listens at {shown} does not speak gRPC, or is stuck"
            problem = tls_problem(addresses, self._port, self._credentials, within_s=self._left_s)
            if problem:
                self._finding = NotReached, f"{shown} cannot be used: {problem}"

    @property
    def _left_s(self) -> float:
        return max(0.01, self._until - time.monotonic())
