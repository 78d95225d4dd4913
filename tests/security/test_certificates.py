"""Who is believed to be whom, by certificates that right and wrong authorities have signed."""

from __future__ import annotations

import base64
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.model.identity import CALLER, KINDS, OPERATOR, PROCESS, SERVER, Identity
from overlay.security import certificates
from overlay.security.certificates import (
    DAY_S,
    Authority,
    NotTrusted,
    Trust,
    invitation_id,
    is_signed_by,
    key_pem,
    new_key,
    pem_of,
    read_key,
    read_signing_request,
    signing_request,
)
from overlay.security.invitation import Invitation

OFFICE = Authority.create("office")
ANNA = Identity("office", CALLER, "anna")
REQUEST = b"CERTIFICATE REQUEST"


def certificate(authority: Authority = OFFICE, identity: Identity = ANNA, **more: object) -> bytes:
    return pem_of(authority.issue(new_key().public_key(), identity, **more))


def _der(made: Any) -> bytes:
    return bytes(made.public_bytes(certificates.serialization.Encoding.DER))


def trust(*revoked: bytes, number: int = 2) -> Trust:
    gone = [x509.load_pem_x509_certificate(pem) for pem in revoked]
    return Trust(pem_of(OFFICE.certificate), pem_of(OFFICE.revoke(gone, number)))


@pytest.mark.parametrize("kind", [PROCESS, CALLER, OPERATOR, SERVER])
def test_a_certificate_names_its_holder(kind: str) -> None:
    identity = Identity("office", kind, "C")

    assert trust().identify(certificate(identity=identity)) == identity


def test_a_process_is_checked_by_its_own_name_and_by_that_of_all() -> None:
    made = OFFICE.issue(new_key().public_key(), Identity("office", PROCESS, "C"), ("10.0.0.7",))

    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["c.office.overlay", "office.overlay"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.7"]


def test_a_server_of_jobs_has_a_name_that_no_process_has() -> None:
    server = Identity("office", SERVER, "10.0.0.7-4222")
    made = OFFICE.issue(new_key().public_key(), server, ("10.0.0.7",))

    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["office.overlay-jobs"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.7"]
    assert Identity("office", CALLER, "overlay-jobs").dns_names == ()


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("my-mac.local", ["my-mac.local"]),
        ("büro-pc.local", ["xn--bro-pc-3ya.local"]),
        ("pc_1", ["pc_1"]),
        ("a..b", []),
        ("x" * 70, []),
    ],
)
def test_a_host_is_named_as_far_as_a_certificate_can(host: str, named: list[str]) -> None:
    made = OFFICE.issue(new_key().public_key(), Identity("office", PROCESS, "C"), (host,))

    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName)[2:] == named


@pytest.mark.parametrize("name", ["A", "a_b", "a-b", "a.b", "a..b", ".", "..", "x" * 64])
def test_each_process_id_has_a_name_in_dns_of_its_own(name: str) -> None:
    """DNS has no empty labels, and one id's name must not be below another's."""
    label, *rest = Identity("office", PROCESS, name).dns_name.split(".")

    assert label
    assert rest == ["office", "overlay"]


@pytest.mark.parametrize(
    ("authority", "identity", "more", "says"),
    [
        (Authority.create("office"), ANNA, {}, "issued by another overlay"),
        (OFFICE, Identity("home", CALLER, "anna"), {}, "issued by another overlay (home"),
        (OFFICE, ANNA, {"valid_s": -3 * DAY_S / 4}, "expired on"),
        (OFFICE, ANNA, {"valid_s": -0.5 * DAY_S}, "1 day ago by this machine's clock"),
    ],
)
def test_what_is_not_accepted_says_why(
    authority: Authority, identity: Identity, more: dict[str, float], says: str
) -> None:
    with pytest.raises(NotTrusted) as refused:
        trust().identify(certificate(authority, identity, **more))

    assert says in str(refused.value)


def test_a_clock_that_is_off_by_days_is_said_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pem, now = certificate(), certificates.clocks.time()
    believed = trust()
    monkeypatch.setattr(certificates.clocks, "time", lambda: now - 5 * DAY_S)

    with pytest.raises(NotTrusted, match="in 4 days; one of the two clocks is wrong"):
        believed.identify(pem)


def test_a_clock_that_is_off_by_some_hours_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    pem, now = certificate(), certificates.clocks.time()
    monkeypatch.setattr(certificates.clocks, "time", lambda: now - 20 * 3600)

    assert trust().identify(pem) == ANNA


def test_a_revoked_certificate_counts_no_more_and_a_new_one_of_that_name_does() -> None:
    old, new = certificate(), certificate()

    with pytest.raises(NotTrusted, match="the certificate of caller anna was revoked"):
        trust(old).identify(old)
    assert trust(old).identify(new) == ANNA


def test_a_list_of_revoked_ones_that_another_signed_is_not_read() -> None:
    other = Authority.create("office")

    with pytest.raises(ValueError, match="not signed by this overlay's authority"):
        Trust(pem_of(OFFICE.certificate), pem_of(other.revoke((), 3)))


def test_an_authority_between_that_has_our_name_signs_for_nobody() -> None:
    """gRPC accepts the chain: an invitation's authority, one with our name below it, a leaf."""
    invitation = Invitation.create("127.0.0.1", 1, b"x" * 20).authority()
    key = new_key()
    between = (
        x509.CertificateBuilder()
        .subject_name(OFFICE.certificate.subject)
        .issuer_name(invitation.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(OFFICE.certificate.not_valid_before_utc)
        .not_valid_after(OFFICE.certificate.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(invitation.key, hashes.SHA256())
    )
    forged = certificate(Authority(between, key), Identity("office", OPERATOR, "mallory"))

    with pytest.raises(NotTrusted, match="issued by another overlay"):
        trust().identify(forged)


def test_two_authorities_are_trusted_while_one_follows_the_other() -> None:
    new = Authority.create("office")
    both = Trust(pem_of(OFFICE.certificate) + pem_of(new.certificate))

    assert both.identify(certificate()) == both.identify(certificate(new)) == ANNA


@given(st.binary(max_size=300))
def test_no_bytes_are_a_certificate_by_chance(junk: bytes) -> None:
    with pytest.raises(NotTrusted):
        trust().identify(junk)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 2000), st.integers(0, 255), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_stranger_signs_is_judged_and_not_raised(changes: dict[int, int]) -> None:
    """The holder of an invitation can sign anything, and gRPC lets it through."""
    for known, words, read in READERS:
        der = bytearray(known)
        for place, byte in changes.items():
            der[place % len(der)] = byte
        text = base64.encodebytes(der)
        with contextlib.suppress(ValueError, NotTrusted):
            read(b"-----BEGIN %b-----\n%b-----END %b-----\n" % (words, text, words))


READERS: list[tuple[bytes, bytes, Callable[[bytes], object]]] = [
    (_der(x509.load_pem_x509_certificate(certificate())), b"CERTIFICATE", trust().identify),
    (_der(x509.load_pem_x509_certificate(certificate())), b"CERTIFICATE", invitation_id),
    (_der(x509.load_pem_x509_csr(signing_request(new_key()))), REQUEST, read_signing_request),
    (_der(OFFICE.revoke((), 3)), b"X509 CRL", lambda pem: Trust(pem_of(OFFICE.certificate), pem)),
    (_der(OFFICE.certificate), b"CERTIFICATE", lambda pem: is_signed_by(certificate(), pem)),
]


@pytest.mark.parametrize("at", [b"\xa0\x03\x02\x01\x02", b"\x55\x1d\x13", b"\x86\x1c"])
def test_a_certificate_that_cannot_be_read_is_not_trusted(at: bytes) -> None:
    """Of an unknown version, with an extension twice, with a name of an unknown kind."""
    changed = {
        b"\xa0\x03\x02\x01\x02": b"\xa0\x03\x02\x01\x2a",
        b"\x55\x1d\x13": b"\x55\x1d\x11",
        b"\x86\x1c": b"\x85\x1c",
    }
    der = _der(x509.load_pem_x509_certificate(certificate()))
    assert at in der
    broken = ssl.DER_cert_to_PEM_cert(der.replace(at, changed[at])).encode()

    assert invitation_id(broken) == ""
    with pytest.raises(NotTrusted):
        trust().identify(broken)


@given(st.text(max_size=80))
def test_only_an_identity_is_read_as_one(text: str) -> None:
    for uri in (text, f"overlay://office/caller/{text}"):
        try:
            found = Identity.of_uri(uri)
        except ValueError:
            continue
        assert found.uri == uri
        assert found.kind in KINDS


def test_a_request_that_its_own_key_has_not_signed_is_refused() -> None:
    good = signing_request(new_key())
    other = x509.load_pem_x509_csr(signing_request(new_key()))
    assert read_signing_request(good).curve.name == "secp256r1"
    broken = bytearray(other.public_bytes(certificates.serialization.Encoding.DER))
    broken[-5] ^= 1
    pem = x509.load_der_x509_csr(bytes(broken)).public_bytes(
        certificates.serialization.Encoding.PEM
    )

    with pytest.raises(ValueError, match="not signed by its own key"):
        read_signing_request(pem)


def test_a_key_is_read_as_it_was_written_and_nothing_else_is() -> None:
    key = new_key()

    assert read_key(key_pem(key)).public_key() == key.public_key()
    with pytest.raises(ValueError, match="key"):
        read_key(b"-----BEGIN PRIVATE KEY-----\njunk\n-----END PRIVATE KEY-----\n")


# The line of an invitation


def test_both_sides_of_a_line_derive_the_same_authority() -> None:
    made = Invitation.create("192.168.1.1", 50051, b"h" * 20)
    read = Invitation.parse(str(made))
    _, shown = read.credentials()

    assert read == made
    assert len(str(made)) < 95
    assert invitation_id(shown) == made.id
    assert is_signed_by(shown, pem_of(made.authority().certificate))


def test_the_key_of_another_line_is_another() -> None:
    one, other = (Invitation.create("127.0.0.1", 1, b"h" * 20) for _ in range(2))
    _, shown = one.credentials()

    assert not is_signed_by(shown, pem_of(other.authority().certificate))


@pytest.mark.parametrize("host", ["pc.local", "fe80::1%3", "::1", "10.0.0.1", "my-mac"])
def test_a_line_carries_any_host(host: str) -> None:
    made = Invitation.create(host, 50051, b"h" * 20)

    assert Invitation.parse(f'  "{made}"\n') == made


@given(st.text(max_size=100))
def test_what_is_no_line_is_said_so(text: str) -> None:
    with pytest.raises(ValueError, match="this is no join line"):
        Invitation.parse(text)


def test_a_line_that_lost_its_end_is_said_so() -> None:
    line = str(Invitation.create("127.0.0.1", 50051, b"h" * 20))

    for cut in range(len(line)):
        with pytest.raises(ValueError, match="not the whole of it"):
            Invitation.parse(line[:cut])


def test_the_secret_of_a_line_is_in_no_log() -> None:
    made = Invitation.create("127.0.0.1", 50051, b"h" * 20)

    assert str(made).rpartition(".")[2] not in repr(made)
