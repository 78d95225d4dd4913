"""Finds out why gRPC gets no connection, which it does not say: a name, a port or a firewall.

Owns a thread for each doubt, "overlay-doubt".
"""

from __future__ import annotations

import threading

from overlay.model import clocks as time
from overlay.model.errors import NoSuchHost, NotReached
from overlay.transport.channels import split
from overlay.transport.resolver import Host, connect, look_up


class Doubt:
    """Tries a plain connection on a thread, which ends by `until` (monotonic seconds).

    is_settled: nothing listens there.
    """

    is_settled = False

    def __init__(self, address: str, until: float) -> None:
        self._address = address
        self._host, self._port = split(address)
        self._until = max(until, time.monotonic() + 0.05)  # a refusal nearby takes no longer
        self._said = self._of_name(look_up(self._host, 0))
        self._thread = threading.Thread(target=self._look, name="overlay-doubt", daemon=True)
        self._thread.start()

    def error(self) -> NotReached:
        self._thread.join(max(0.0, self._until - time.monotonic()))
        kind, reason = self._said
        return kind(reason)

    def _of_name(self, found: Host) -> tuple[type[NotReached], str]:
        """What there is to say as long as no connection was tried."""
        if not found.addresses:
            return NoSuchHost, found.why
        shown = found.shown(self._address)
        return NotReached, f"{shown} does not answer: wrong address, machine off, or a firewall"

    def _look(self) -> None:
        found = look_up(self._host, self._left_s)
        self._said = self._of_name(found)
        if found.addresses:
            self._try(found.addresses, found.shown(self._address))

    def _try(self, addresses: tuple[str, ...], shown: str) -> None:
        try:
            connect(addresses, self._port, self._left_s).close()
        except ConnectionRefusedError:
            self._said = NotReached, f"nothing serves at {shown}: the connection was refused"
            self.is_settled = True
        except TimeoutError:
            pass
        except OSError as error:
            self._said = NotReached, f"{shown} cannot be reached: {error.strerror or error}"
        else:
            self._said = NotReached, f"what listens at {shown} does not speak gRPC, or is stuck"

    @property
    def _left_s(self) -> float:
        return max(0.01, self._until - time.monotonic())
