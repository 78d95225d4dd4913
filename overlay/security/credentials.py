"""What one holder on this machine shows, and whom it trusts; follows its files as they change.

gRPC asks for it at each new connection, so that a renewed certificate, a new authority and an open
invitation count from the next connection on, without a restart.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography import x509

from overlay.model import clocks
from overlay.model.errors import ConfigError, OverlayError
from overlay.model.identity import PROCESS, SERVER, Identity, any_process
from overlay.model.program import CLIENT
from overlay.security.certificates import (
    DAY_S,
    NotTrusted,
    Trust,
    age_s,
    identity_of,
    read_authorities,
    read_certificate,
    read_key,
)
from overlay.security.tls_folder import USER, TlsFolder

log = logging.getLogger(__name__)

WARN_S = 30 * DAY_S  # before a certificate expires, people are told
INVITE = (
    f"on the leader's machine '{CLIENT} invite {{}}' makes a line, and '{CLIENT} join LINE' takes "
    "it here"
)
RENEW_HERE = f"'{CLIENT} secure CONFIG' makes a new one"

_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Shown:
    """PEM: the holder's key and certificate, the authorities of the overlay, and of invitations."""

    key: bytes
    certificate: bytes
    authorities: bytes
    invited: bytes = b""


class ClientKeys(Protocol):
    """What a channel over mutual TLS shows and expects."""

    def current(self) -> tuple[Shown, object]: ...
    def server_name(self, process_id: str = "") -> str: ...


class Credentials:
    """Safe from any thread. Raises ConfigError where the files cannot be used at first; later the
    last good ones stay in use, and `problem` says why."""

    def __init__(self, folder: TlsFolder, stem: str) -> None:
        self.folder = folder
        self.stem = stem
        self.problem = ""  # with the files that are there
        self.keeping_problem = ""  # with getting newer ones
        self._lock = threading.Lock()
        self._stamp = self._now()
        self._shown, self._trust, self.identity, self._held = self._read()

    @staticmethod
    def of_process(folder: Path, process_id: str) -> Credentials:
        return Credentials(TlsFolder(folder), TlsFolder.stem(process_id))

    @staticmethod
    def of_server(folder: Path, name: str) -> Credentials:
        """name: of a server that keeps jobs."""
        return Credentials(TlsFolder(folder), TlsFolder.server_stem(name))

    @staticmethod
    def of_user(folder: Path) -> Credentials:
        return Credentials(TlsFolder(folder), USER)

    @property
    def trust(self) -> Trust:
        return self._trust

    @property
    def certificate_problem(self) -> str:
        """Why the others will not accept the own certificate now; empty when they will."""
        try:
            self._trust.identify(self._shown.certificate)
        except NotTrusted as e:
            is_early = clocks.time() < self._held.not_valid_before_utc.timestamp()
            do = "set this machine's clock, or the leader's" if is_early else self._remedy
            return f"{e}; {do}"
        return ""

    @property
    def warning(self) -> str:
        """What is wrong with the own certificate, or will be within a month; else empty."""
        if problem := self.certificate_problem or self.problem or self.keeping_problem:
            return problem
        left_s = self.expires_s - clocks.time()
        if left_s > WARN_S:
            return ""
        days = max(1, int(left_s / DAY_S))
        return f"the certificate of {self.identity} expires in {days} days; {self._remedy}"

    @property
    def _remedy(self) -> str:
        """What makes a new certificate of the same holder."""
        if self.folder.can_issue:
            return RENEW_HERE
        if self.identity.kind in (PROCESS, SERVER):
            return f"this machine joins again: {INVITE.format('NAME --host HOST')}"
        return INVITE.format("NAME")

    @property
    def expires_s(self) -> float:
        """Seconds since 1970."""
        return self._held.not_valid_after_utc.timestamp()

    @property
    def age_s(self) -> float:
        return age_s(self._held)

    @property
    def is_of_new_authority(self) -> bool:
        """Whether the authority that signs now has signed the own certificate."""
        return self._trust.is_of_first(self._held)

    def accept(self, authorities: bytes, revoked: bytes, key: bytes, certificate: bytes) -> None:
        """Takes what the leader says of them, after checking it; empty: as before.

        Raises ConfigError, and takes nothing.
        """
        old, listed = self.folder.read("ca.pem"), self.folder.revoked()
        try:
            trust = Trust(authorities, revoked or listed)
            # What is on the disk may be newer than what is in use: other processes write it too.
            if trust.number <= max(self._trust.number, Trust(old, listed).number):
                revoked = b""
                trust = Trust(authorities, listed)
            if not set(read_authorities(old)) & set(read_authorities(authorities)):
                raise ValueError("none of the authorities is one that was trusted before")
            if trust.cluster != self.identity.cluster:
                raise ValueError(f"the authorities are those of {trust.cluster}")
            if certificate:
                self._check_own(trust, key, certificate)
        except (ValueError, OverlayError) as e:
            raise ConfigError(str(e)) from None
        files = {"ca.pem": authorities if authorities != old else b"", "revoked.pem": revoked}
        # In an order that leaves a pair that belongs together if only the first gets written.
        for name in sorted(files, reverse=_is_list_of(old, revoked)):
            if files[name]:
                self.folder.write(name, files[name])
        if certificate:
            self.folder.write_holder(self.stem, key, certificate)
        self.current()

    def _check_own(self, trust: Trust, key: bytes, certificate: bytes) -> None:
        if trust.identify(certificate) != self.identity:
            raise ValueError("the certificate is another's")
        if read_certificate(certificate).public_key() != read_key(key).public_key():
            raise ValueError("the certificate is not for the key that was sent")

    def server_name(self, process_id: str = "") -> str:
        """What the other side's certificate must name: this process, or any of the overlay."""
        cluster = self.identity.cluster
        if process_id:
            return Identity(cluster, PROCESS, process_id).dns_name
        return any_process(cluster)

    def current(self) -> tuple[Shown, object]:
        """What to show now, and something that differs when that has changed."""
        stamp = self._now()
        with self._lock:
            if stamp == self._stamp:
                return self._shown, stamp
            try:
                self._shown, self._trust, self.identity, self._held = self._read()
                self.problem = ""
            except OverlayError as e:
                if str(e) != self.problem:
                    log.error("the certificates changed and cannot be used: %s", e)
                self.problem = str(e)
                return self._shown, self._stamp
            self._stamp = stamp
            return self._shown, stamp

    def _now(self) -> _Stamp:
        paths = [self.folder.path / name for name in ("ca.pem", "revoked.pem", f"{self.stem}.pem")]
        if self.folder.can_issue:
            paths += sorted((self.folder.path / "invitations").glob("*.json"))
        return tuple(_stamp(path) for path in paths)

    def _read(self) -> tuple[Shown, Trust, Identity, x509.Certificate]:
        key, certificate = self.folder.key_and_certificate(self.stem)
        try:
            held = read_certificate(certificate)
            identity = identity_of(held)
            if read_key(key).public_key() != held.public_key():
                raise ValueError("its key is not that of its certificate")
        except ValueError as e:
            raise ConfigError(f"{self.folder.holder(self.stem)}: {e}") from None
        guests = self.folder.guests().values() if self.folder.can_issue else ()
        invited = b"".join(guest.authority.encode() for guest in guests)
        shown = Shown(key, certificate, self.folder.read("ca.pem"), invited)
        return shown, self.folder.trust(), identity, held


def _is_list_of(authorities: bytes, revoked: bytes) -> bool:
    with contextlib.suppress(ValueError):
        Trust(authorities, revoked)
        return True
    return False


def _stamp(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return path.name, 0, 0, 0
    # A file is replaced by another, which two that are as old and as long tell by.
    return path.name, found.st_mtime_ns, found.st_size, found.st_ino
