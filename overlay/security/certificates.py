"""The certificates of one overlay: its authority, what it issues and revokes, what is believed.

An authority signs for processes, callers and operators; a certificate names its holder in one URI
(model.identity). All keys are P-256. A certificate begins a day before it is made, because the
clocks of an office differ.

`Authority` has the key and signs. `Trust` has only the public half, and says who holds a
certificate. gRPC checks a chain against all authorities that a port trusts, invitations among them,
and takes an intermediate authority of any name; so `Trust` verifies the signature itself.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import ssl
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from overlay.model import clocks
from overlay.model.clocks import utc_day
from overlay.model.errors import OverlayError
from overlay.model.identity import INVITATION, Identity
from overlay.model.segments import Code

DAY_S = 86_400.0
SKEW_S = DAY_S  # how far apart two clocks may be
AUTHORITY_S = 3650 * DAY_S
HOLDER_S = 365 * DAY_S
INVITATION_S = 900.0
MAX_CACHED = 1024  # certificates whose judgement is remembered
MAX_BYTES = 16_384  # of a certificate or a request for one that is read at all

# What cryptography raises, besides ValueError, for what a stranger may have written.
_UNREADABLE = (
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class NotTrusted(OverlayError):
    """A certificate, or the lack of one, that is not accepted; the message says why."""

    code = Code.UNAUTHENTICATED
    cause = "not trusted"


class Authority:
    """Signs for one overlay, whose name is `cluster`."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self.key = key

    @staticmethod
    def create(cluster: str, valid_s: float = AUTHORITY_S) -> Authority:
        return Authority.of_key(cluster, new_key(), valid_s)

    @staticmethod
    def of_key(cluster: str, key: ec.EllipticCurvePrivateKey, valid_s: float) -> Authority:
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        made = _builder(_name(cluster), _name(cluster), key.public_key(), valid_s)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made = made.add_extension(usage, critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        made = made.add_extension(identifier, critical=False)
        return Authority(made.sign(key, hashes.SHA256()), key)

    @staticmethod
    def read(pem: bytes, key_pem: bytes) -> Authority:
        """pem: one or several; the one of this key. Raises ValueError when none is."""
        key = read_key(key_pem)
        for certificate in read_authorities(pem):
            if certificate.public_key() == key.public_key():
                return Authority(certificate, key)
        raise ValueError("the key is not that of the certificate")

    @property
    def cluster(self) -> str:
        return _common_name(self.certificate.subject)

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        identity: Identity,
        hosts: Iterable[str] = (),
        valid_s: float = HOLDER_S,
        since_s: float = 0.0,
    ) -> x509.Certificate:
        """hosts: the addresses of a process or server, for those of other makes that check them.

        since_s: from when on, in seconds from now; valid_s: until when.
        """
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.dns_names:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names += map(x509.DNSName, identity.dns_names)
            names += filter(None, map(_host_name, dict.fromkeys(hosts)))
        issuer = self.certificate.subject
        made = _builder(_name(identity.name), issuer, public_key, valid_s, since_s)
        for extension, critical in (
            (x509.SubjectAlternativeName(names), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage(usages), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
        ):
            made = made.add_extension(extension, critical)
        return made.sign(self.key, hashes.SHA256())

    def revoke(
        self, certificates: Iterable[x509.Certificate], number: int
    ) -> x509.CertificateRevocationList:
        """The list of all that are revoked. number: higher than that of the list before."""
        now = _at(clocks.time())
        made = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject,
            last_update=now,
            next_update=now + datetime.timedelta(seconds=AUTHORITY_S),
        ).add_extension(x509.CRLNumber(number), critical=False)
        for certificate in certificates:
            one = x509.RevokedCertificateBuilder(certificate.serial_number, now).build()
            made = made.add_revoked_certificate(one)
        return made.sign(self.key, hashes.SHA256())


class Trust:
    """Says who holds a certificate, by the authorities of one overlay. Safe from any thread.

    authorities: PEM, one or several one after another. revoked: the PEM of a revocation list, or
    nothing. Raises ValueError for what is not that.
    """

    def __init__(self, authorities: bytes, revoked: bytes = b"") -> None:
        self._authorities = read_authorities(authorities)
        self.cluster = _common_name(self._authorities[0].subject)
        self.number, self._revoked = 0, frozenset[int]()
        if revoked:
            with _reading():
                self.number, self._revoked = self._read_revoked(revoked)
        self._lock = threading.Lock()
        self._known: dict[bytes, tuple[Identity, x509.Certificate]] = {}

    def has_revoked(self, certificate: x509.Certificate) -> bool:
        return certificate.serial_number in self._revoked

    def is_of_first(self, certificate: x509.Certificate) -> bool:
        """Whether the first of the authorities signed it, which is the one that signs now."""
        return _has_signed(self._authorities[0], certificate)

    def identify(self, pem: bytes) -> Identity:
        """The holder of this certificate. Raises NotTrusted."""
        found = self._known.get(pem)
        if found is None:
            found = self._verified(pem)
            with self._lock:
                if len(self._known) >= MAX_CACHED:
                    self._known.clear()
                self._known[pem] = found
        identity, certificate = found
        if self.has_revoked(certificate):
            raise NotTrusted(f"the certificate of {identity} was revoked")
        if problem := time_problem(certificate):
            raise NotTrusted(f"the certificate of {identity} {problem}")
        return identity

    def _verified(self, pem: bytes) -> tuple[Identity, x509.Certificate]:
        try:
            certificate = read_certificate(pem)
            identity = identity_of(certificate)
        except ValueError as e:
            raise NotTrusted(f"the certificate names no identity: {e}") from None
        is_ours = any(_has_signed(one, certificate) for one in self._authorities)
        if is_ours and identity.cluster == self.cluster:
            return identity, certificate
        raise NotTrusted(
            f"the certificate of {identity} was issued by another overlay ({identity.cluster}, "
            f"and this one is {self.cluster})"
        )

    def _read_revoked(self, pem: bytes) -> tuple[int, frozenset[int]]:
        found = x509.load_pem_x509_crl(pem)
        for authority in self._authorities:
            key = cast(ec.EllipticCurvePublicKey, authority.public_key())
            if found.issuer == authority.subject and found.is_signature_valid(key):
                number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
                return number, frozenset(one.serial_number for one in found)
        raise ValueError("the revocation list is not signed by this overlay's authority")


# Keys and certificates as bytes


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError."""
    with _reading():
        key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic-curve key")
    return key


def pem_of(made: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate in the text. Raises ValueError."""
    if len(pem) > MAX_BYTES:
        raise ValueError(f"a certificate of {len(pem)} bytes")
    with _reading():
        return x509.load_pem_x509_certificate(pem)


def read_authorities(pem: bytes) -> list[x509.Certificate]:
    """Raises ValueError."""
    if len(pem) > 8 * MAX_BYTES:
        raise ValueError(f"authorities of {len(pem)} bytes")
    with _reading():
        return x509.load_pem_x509_certificates(pem)


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PEM of a request for a certificate; what it will say is decided by who signs."""
    made = x509.CertificateSigningRequestBuilder().subject_name(_name("overlay"))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_signing_request(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key that its sender has proved to hold. Raises ValueError."""
    if len(pem) > MAX_BYTES:
        raise ValueError(f"a request of {len(pem)} bytes")
    with _reading():
        found = x509.load_pem_x509_csr(pem)
        key, is_signed = found.public_key(), found.is_signature_valid
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not a P-256 key")
    if not is_signed:
        raise ValueError("the request is not signed by its own key")
    return key


def identity_of(certificate: x509.Certificate) -> Identity:
    """What the certificate says, whoever signed it. Raises ValueError."""
    with _reading():
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise ValueError(f"it has {len(uris)} URIs")
    return Identity.of_uri(uris[0])


def time_problem(certificate: x509.Certificate) -> str:
    """Why the certificate does not count now by this machine's clock; empty when it does."""
    now = clocks.time()
    since, until = (
        when.timestamp()
        for when in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    )
    if now > until:
        return f"expired on {utc_day(until)}, {_days(now - until)} ago by this machine's clock"
    if now < since:
        return (
            f"is valid only from {utc_day(since)} on: by this machine's clock, {utc_day(now)}, "
            f"that is in {_days(since - now)}; one of the two clocks is wrong"
        )
    return ""


def seconds_left(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp() - clocks.time()


def age_s(certificate: x509.Certificate) -> float:
    """How long ago it was made."""
    return clocks.time() - certificate.not_valid_before_utc.timestamp() - SKEW_S


def fingerprint(pem: bytes) -> bytes:
    """20 bytes, of any certificate."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).digest()[:20]


def invitation_id(pem: bytes) -> str:
    """The invitation that a certificate says it is, whoever signed it; else empty."""
    try:
        found = identity_of(read_certificate(pem))
    except ValueError:
        return ""
    return found.name if found.kind == INVITATION else ""


def is_signed_by(pem: bytes, authority: bytes) -> bool:
    try:
        return _has_signed(read_certificate(authority), read_certificate(pem))
    except ValueError:
        return False


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature, *_UNREADABLE):
        return False
    return True


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Makes whatever cryptography raises for what it cannot read a ValueError."""
    try:
        yield
    except _UNREADABLE as e:
        raise ValueError(str(e)) from None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    valid_s: float,
    since_s: float = 0.0,
) -> x509.CertificateBuilder:
    now = clocks.time()
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=_at(now + since_s - SKEW_S),
        not_valid_after=_at(now + valid_s),
    )


def _at(time_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(time_s), datetime.timezone.utc)


def _days(seconds: float) -> str:
    days = max(1, round(seconds / DAY_S))
    return f"{days} day{'s' if days > 1 else ''}"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _common_name(name: x509.Name) -> str:
    found: Sequence[x509.NameAttribute[str | bytes]] = name.get_attributes_for_oid(
        NameOID.COMMON_NAME
    )
    return str(found[0].value) if found else ""


def _host_name(host: str) -> x509.GeneralName | None:
    """None for what is neither an address nor a name that a certificate can hold."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except (UnicodeError, ValueError):
        return None
