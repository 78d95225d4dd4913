"""Who may call what: judged by the certificate of the caller's connection, before anything is read.

    plaintext process      everybody is nobody in particular, and may do what the methods allow
    process with TLS       a process, caller or operator of this overlay; invitations only join, and
                           the certificates of the jobs' servers are only renewed
    plaintext on its own
    machine's 127.0.0.1    the users of that machine: requests, and what is public

Each call is judged by its own connection's certificate, and while it is open it is asked again
whether that still counts: it may have expired or been revoked since.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from overlay.model import access
from overlay.model.access import Access, Rights
from overlay.model.errors import CallCancelled, NotAllowed
from overlay.model.identity import OPERATOR, PROCESS, SERVER, Identity

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials
    from overlay.transport.codec import pb2

JOIN, RENEW = "Join", "Renew"  # the one method of an invitation, and of a server of jobs
VERBS = {  # those that are judged by the method; of other requests the route is
    "GetMetrics": access.METRICS,
    "Logs": access.LOGS,
    "Submit": access.REQUESTS,
    "Result": access.REQUESTS,
    "Jobs": access.REQUESTS,
    "Change": access.REQUESTS,
}
KNOWN = 1024  # certificates whose text is not read again


@dataclass(frozen=True)
class _Shown:
    """What a connection shows: its certificate, and which invitation that says it is."""

    pem: bytes
    invitation: str


@functools.lru_cache(KNOWN)
def _shown_by(pem: bytes) -> _Shown:
    from overlay.security.certificates import invitation_id

    return _Shown(pem, invitation_id(pem) if pem else "")


_NOTHING = _Shown(b"", "")


class Gate:
    """Safe from any thread.

    credentials: None where there is no TLS. is_local: only this machine reaches the process.
    allowed: the configuration's `access`.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        is_local: bool = False,
        allowed: Access | None = None,
    ) -> None:
        self.credentials = credentials
        self._allowed = allowed or Access()
        self._is_local = is_local
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._shown: dict[grpc.ServicerContext, _Shown] = {}  # of the open calls

    @property
    def is_open(self) -> bool:
        """Whether everybody who reaches the port is let in."""
        return self.credentials is None

    def enter(self, context: grpc.ServicerContext, peer: str, method: str) -> None:
        """Before each call, on gRPC's serving thread. `leave` follows in any case.

        peer: gRPC's name for the caller. Raises NotTrusted, NotAllowed.
        """
        with self._lock:
            self._open[peer] += 1
        if self.credentials is None:
            return
        # Not remembered by the caller's address and port: connections to two addresses of this
        # process may share them, and one may follow another at once.
        found = context.auth_context().get("x509_pem_cert", ())
        shown = self._shown[context] = _shown_by(bytes(found[0]) if found else b"")
        self._check(context, shown, method)

    def leave(self, context: grpc.ServicerContext, peer: str) -> None:
        self._shown.pop(context, None)
        with self._lock:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

    def peers(self) -> set[str]:
        """The callers with an open call, by gRPC's names for them."""
        with self._lock:
            return set(self._open)

    def identity(self, context: grpc.ServicerContext) -> Identity | None:
        """The identity of the caller of an open call; None where it came in plaintext.

        Raises NotTrusted.
        """
        pem = self.certificate(context)
        if not pem or self.credentials is None:
            return None
        return self.credentials.trust.identify(pem)

    def check_verb(self, context: grpc.ServicerContext, method: str) -> None:
        """Raises NotAllowed when the caller may not read metrics or logs, and NotTrusted. Requests
        are checked by their routes, in request_path."""
        if method in VERBS:
            access.check_verb(self.rights(context), VERBS[method])

    def rights(self, context: grpc.ServicerContext) -> Rights:
        """What the configuration lets the caller do. Raises NotTrusted, CallCancelled."""
        if self.credentials is None or not self._allowed.entries:
            return access.UNRESTRICTED
        identity = self.identity(context)
        # A call that is over has no identity any more. It must not pass for a plaintext one, as
        # with an idempotency key its request would still run.
        if identity is None and context.auth_context().get("x509_pem_cert"):
            raise CallCancelled("the caller left")
        return self._allowed.of(identity)

    def is_operator(self, context: grpc.ServicerContext) -> bool:
        """Whether the caller runs this overlay. Raises NotTrusted."""
        identity = self.identity(context)
        return identity is not None and identity.kind == OPERATOR

    def is_process(self, context: grpc.ServicerContext, process_id: str) -> bool:
        """Whether the caller may speak as this process. Without TLS that cannot be told."""
        if self.credentials is None:
            return True
        identity = self.identity(context)
        return identity is not None and (identity.kind, identity.name) == (PROCESS, process_id)

    def certificate(self, context: grpc.ServicerContext) -> bytes:
        """What the caller of an open call shows, as PEM; empty where it came in plaintext."""
        return self._shown.get(context, _NOTHING).pem

    def invitation(self, context: grpc.ServicerContext) -> tuple[str, bytes]:
        """The id of the invitation that the caller's certificate says it is, and the certificate.

        gRPC has checked that an authority signed it that is trusted now; that it is that of this
        very invitation is for who accepts it. Empty for the certificates of this overlay.
        """
        shown = self._shown.get(context, _NOTHING)
        return shown.invitation, shown.pem

    def fill(self, made: pb2.MetricsResponse) -> None:
        said, credentials = made.security, self.credentials
        if credentials is None:
            said.mode = "local" if self._is_local else "open"
        else:
            said.mode = "tls"
            said.expires_s = credentials.expires_s
            said.problem = credentials.warning
            said.cluster = credentials.identity.cluster

    def _check(self, context: grpc.ServicerContext, shown: _Shown, method: str) -> None:
        is_invited = bool(shown.invitation)
        if is_invited and method != JOIN:
            raise NotAllowed("an invitation may only join, and nothing else")
        if method == JOIN and not is_invited:
            raise NotAllowed("only an invitation joins, and the caller's certificate is none")
        if not is_invited:
            caller = self.identity(context)
            if caller is not None and caller.kind == SERVER and method != RENEW:
                raise NotAllowed(f"{caller} keeps jobs; its certificate is for nothing else here")
