"""TLS to the servers that keep the jobs: what a holder of a certificate shows them, what they have
to show, and why the two do not come together.

Nothing is sent to a server before its certificate was judged. It is checked for a name that all the
servers' have in common, in place of its address, and then as all certificates of this overlay are:
so one that was revoked does not count here. The servers themselves know no revocations.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from overlay.model.errors import OverlayError
from overlay.model.identity import SERVER, any_server
from overlay.model.jobs_servers import Protection
from overlay.transport.channels import split
from overlay.transport.resolver import look_up
from overlay.transport.tls_check import tls_problem

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials, Shown

RESTART = "run.py restart"
LOOK_S = 1.0  # for each server, when it is asked what is wrong


class ServerTls:
    """credentials: those of this side, as they are at each connection."""

    def __init__(self, credentials: Credentials) -> None:
        logging.getLogger("asyncio").addFilter(_is_of_use)
        self._credentials = credentials
        self._shown: Shown | None = None

    def options(self) -> dict[str, Any]:
        """For nats-py. Raises OSError where the own files cannot be read."""
        self._shown, _ = self._credentials.current()
        return {
            "tls": _context(self._credentials, self._shown),
            "tls_hostname": any_server(self._credentials.identity.cluster),
            "tls_handshake_first": True,
        }

    def newer(self) -> ssl.SSLContext | None:
        """For the connections from now on, if the own certificate, or the authorities, are others
        than those of `options`."""
        shown, _ = self._credentials.current()
        if shown == self._shown:
            return None
        with contextlib.suppress(OSError):  # half replaced: at the next look
            made = _context(self._credentials, shown)
            self._shown = shown
            return made
        return None

    def not_a_leader(self) -> str:
        return (
            f"the servers do not take {self._credentials.identity} for a leader: they run with "
            f"another configuration; {RESTART} on their machines"
        )

    def problem(self, servers: Sequence[str]) -> str:
        """What is wrong between this side and the first of these, host:port, with which something
        is; empty if nothing is found."""
        for server in servers:
            host, port = split(server)
            addresses = look_up(host, LOOK_S).addresses
            found = tls_problem(addresses, port, self._credentials, "", LOOK_S, SERVER)
            if found:
                return f"the server {server}: {found}"
        return ""


def protection_of(credentials: Credentials, leaders: Sequence[str]) -> Protection:
    """What protects the server whose own credentials these are."""
    folder = credentials.folder
    holder, authorities = folder.holder(credentials.stem), folder.path / "ca.pem"
    return Protection(credentials.identity.cluster, holder, authorities, leaders)


def _is_of_use(record: logging.LogRecord) -> bool:
    """nats-py does not tell asyncio's stream that it is over TLS, so each end of a connection would
    be complained about."""
    return "eof_received() has no effect when using ssl" not in str(record.msg)


def _context(credentials: Credentials, shown: Shown) -> ssl.SSLContext:
    class Judged(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            _judge(credentials, self.getpeercert(binary_form=True))

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_verify_locations(cadata=shown.authorities.decode("ascii"))
    made.load_cert_chain(credentials.folder.holder(credentials.stem))
    made.sslobject_class = Judged
    return made


def _judge(credentials: Credentials, certificate: bytes | None) -> None:
    """Raises SSLError."""
    try:
        holder = credentials.trust.identify(ssl.DER_cert_to_PEM_cert(certificate or b"").encode())
    except OverlayError as e:
        raise ssl.SSLCertVerificationError(f"it is not accepted here: {e}") from None
    if holder.kind != SERVER:
        raise ssl.SSLCertVerificationError(f"it shows the certificate of {holder}")
