"""Says why two sides do not come together over TLS, which gRPC calls "Socket closed" or nothing.

A handshake of Python's own, without a request, in which nothing is believed: what the other side
shows is looked at, and whether it takes what this side shows.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overlay.model.errors import OverlayError
from overlay.model.identity import PROCESS
from overlay.model.program import CLIENT
from overlay.transport.resolver import connect

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

REFUSAL_S = 1.0  # a side that does not like a certificate says so this soon
_ALERTS = {
    "CERTIFICATE_EXPIRED": "it takes this side's certificate for expired",
    "UNKNOWN_CA": "it does not know the authority of this side's certificate",
    "CERTIFICATE_UNKNOWN": "it does not accept this side's certificate",
    "BAD_CERTIFICATE": "it does not accept this side's certificate",
    "CERTIFICATE_REQUIRED": "it wants a certificate, and this side shows none",
}


def peer_certificate(addresses: Sequence[str], port: int, within_s: float) -> bytes:
    """PEM of what serves there, not believed yet. Raises OSError; SSLError for what is no TLS."""
    with _handshake(addresses, port, within_s) as stream:
        found = stream.getpeercert(binary_form=True)
    if found is None:
        raise ssl.SSLError("no certificate was shown")
    return ssl.DER_cert_to_PEM_cert(found).encode()


def speaks_tls(addresses: Sequence[str], port: int, within_s: float) -> bool:
    with contextlib.suppress(OSError):
        peer_certificate(addresses, port, within_s)
        return True
    return False


def tls_problem(
    addresses: Sequence[str],
    port: int,
    credentials: Credentials | None,
    process_id: str = "",
    within_s: float = 2.0,
    kind: str = PROCESS,
) -> str:
    """Why TLS fails between this side and what serves there; empty when that is not the reason.

    credentials: those of this side; None where it speaks plaintext. process_id: who is expected.
    kind: what is, one of identity.KINDS.
    """
    if credentials is None:
        if speaks_tls(addresses, port, within_s):
            return (
                "it wants TLS and a certificate, and there are none here: on the leader's machine "
                f"'{CLIENT} invite NAME' makes a line, and '{CLIENT} join LINE' takes it here"
            )
        return ""
    if problem := credentials.certificate_problem:
        return problem
    try:
        pem = peer_certificate(addresses, port, within_s)
    except ssl.SSLError:
        return 'it speaks plaintext, and this side wants TLS: its configuration lacks "tls"'
    except OSError:
        return ""
    return _problem_of(pem, credentials, process_id, kind) or _refusal(
        addresses, port, credentials, within_s
    )


def _problem_of(pem: bytes, credentials: Credentials, process_id: str, kind: str) -> str:
    try:
        identity = credentials.trust.identify(pem)
    except OverlayError as e:
        return f"it is not accepted here: {e}"
    if identity.kind != kind:
        return f"it shows the certificate of {identity}, which is no {kind}"
    if process_id and identity.name != process_id:
        return f"{identity} answers there, and process {process_id} is configured"
    return ""


def _refusal(addresses: Sequence[str], port: int, credentials: Credentials, within_s: float) -> str:
    """Whether it refuses this side's certificate: with TLS 1.3 that comes after the handshake."""
    holder = credentials.folder.holder(credentials.stem)
    try:
        with _handshake(addresses, port, within_s, holder) as stream:
            stream.settimeout(REFUSAL_S)
            stream.recv(1)
    except ssl.SSLError as e:
        for word, sentence in _ALERTS.items():
            if word in (e.reason or "").replace("TLSV1_ALERT_", "").replace("SSLV3_ALERT_", ""):
                return sentence
    except OSError:
        pass
    return ""


@contextlib.contextmanager
def _handshake(
    addresses: Sequence[str], port: int, within_s: float, holder: Path | None = None
) -> Iterator[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if holder is not None:
        context.load_cert_chain(holder)
    plain: socket.socket = connect(tuple(addresses), port, within_s)
    try:
        plain.settimeout(within_s)
        with context.wrap_socket(plain) as stream:
            yield stream
    finally:
        plain.close()
