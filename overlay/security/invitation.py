"""The one line that lets another machine, or a person, join: overlay-1.HOST:PORT.HASH.SEED

HASH is that of the certificate which HOST shows, so that the joiner knows whom it talks to. SEED is
128 random bits from which both sides derive the same key: for 15 minutes the host trusts an
authority of that key, and the joiner shows a certificate of it. So the seed itself never travels.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from overlay.model.identity import INVITATION, Identity
from overlay.security.certificates import (
    DAY_S,
    INVITATION_S,
    Authority,
    key_pem,
    new_key,
    pem_of,
)

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
_LINE = re.compile(r"overlay-1\.(.{1,255}):([0-9]{1,5})\.([a-z2-7]{32})\.([a-z2-7]{26})")


@dataclass(frozen=True)
class Invitation:
    """host and port: where to join. server: the hash of the certificate there. seed: the secret."""

    host: str
    port: int
    server: bytes
    seed: bytes

    @staticmethod
    def create(host: str, port: int, server: bytes) -> Invitation:
        return Invitation(host, port, server, secrets.token_bytes(16))

    @staticmethod
    def parse(line: str) -> Invitation:
        """Raises ValueError with a sentence."""
        found = _LINE.fullmatch("".join(line.split()).strip("\"'`"))
        if found is None or not 1 <= int(found[2]) <= 65_535:
            raise ValueError(
                "this is no join line, or not the whole of it: it begins with overlay-1. and "
                "has no spaces"
            )
        return Invitation(found[1], int(found[2]), _unbase32(found[3]), _unbase32(found[4]))

    def __str__(self) -> str:
        return f"overlay-1.{self.host}:{self.port}.{_base32(self.server)}.{_base32(self.seed)}"

    def __repr__(self) -> str:
        return f"<an invitation to {self.host}:{self.port}>"  # a seed belongs into no log

    @property
    def id(self) -> str:
        """A public name, the same on both sides."""
        return hashlib.sha256(b"overlay invitation " + self.seed).hexdigest()[:16]

    def authority(self) -> Authority:
        """The one that the server trusts for a while."""
        return Authority.of_key(f"invitation-{self.id}", _derived(self.seed), INVITATION_S + DAY_S)

    def credentials(self) -> tuple[bytes, bytes]:
        """A key and its certificate of that authority, PEM, for the joiner to show."""
        authority, key = self.authority(), new_key()
        identity = Identity(authority.cluster, INVITATION, self.id)
        made = authority.issue(key.public_key(), identity, valid_s=INVITATION_S + DAY_S)
        return key_pem(key), pem_of(made)


def _derived(seed: bytes) -> ec.EllipticCurvePrivateKey:
    # 384 bits, so that the remainder is as good as uniform (FIPS 186-4, B.4.1).
    made = HKDF(hashes.SHA256(), 48, b"overlay", b"invitation").derive(seed)
    return ec.derive_private_key(int.from_bytes(made, "big") % (_ORDER - 1) + 1, ec.SECP256R1())


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _unbase32(text: str) -> bytes:
    return base64.b32decode(text.upper() + "=" * (-len(text) % 8))
