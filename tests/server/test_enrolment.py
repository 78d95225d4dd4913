"""Joining and renewing where the authority's key is, and the keeper that asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509 import IPAddress, SubjectAlternativeName

from overlay.model import clocks, config
from overlay.model.errors import BadRequest, ConfigError, NotAllowed
from overlay.model.identity import CALLER, PROCESS, SERVER, Identity
from overlay.model.jobs_servers import JobsServer
from overlay.model.topology import Topology
from overlay.security.certificates import (
    DAY_S,
    INVITATION_S,
    NotTrusted,
    Trust,
    key_pem,
    new_key,
    pem_of,
    read_certificate,
    signing_request,
)
from overlay.security.credentials import Credentials
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import Guest, TlsFolder
from overlay.server import enrolment
from overlay.server.enrolment import CertificateKeeper, Enrolment
from overlay.transport.codec import pb2
from tests.harness.machine import ROOT

ANNA = Identity("office", CALLER, "anna")


class Office:
    """Process A with the authority, and process C on another machine."""

    def __init__(self, path: Path) -> None:
        shutil.copy(ROOT / "two_hosts_config.json", path)
        self.topology: Topology = config.load(path / "two_hosts_config.json")
        self.leader = TlsFolder(path / "tls")
        self.leader.create_authority("office")
        self.a = self._process("A", self.leader)
        self.folder = TlsFolder(path / "other")
        for name in ("ca.pem", "revoked.pem"):
            self.folder.write(name, self.leader.read(name))
        self.c = self._process("C", self.folder)
        self.enrolment = Enrolment(self.topology, self.topology.process("A"), self.a)

    def _process(self, process_id: str, folder: TlsFolder) -> Credentials:
        self.hold(process_id, folder)
        return Credentials.of_process(folder.path, process_id)

    def hold(self, process_id: str, folder: TlsFolder, since_s: float = 0.0) -> None:
        key, identity = new_key(), Identity("office", PROCESS, process_id)
        made = self.leader.authority().issue(key.public_key(), identity, since_s=since_s)
        name = f"issued/process_{process_id}_{made.serial_number:x}.pem"
        self.leader.write(name, pem_of(made))
        folder.write_holder(TlsFolder.stem(process_id), key_pem(key), pem_of(made))

    def holder(self, process_id: str = "C") -> bytes:
        folder = self.folder if process_id == "C" else self.leader
        return folder.key_and_certificate(TlsFolder.stem(process_id))[1]

    def invited(self, *processes: str, servers: tuple[str, ...] = ()) -> Invitation:
        made = Invitation.create("127.0.0.1", 1, b"h" * 20)
        authority = pem_of(made.authority().certificate).decode()
        until = clocks.time() + INVITATION_S
        guest = Guest("anna", CALLER, until, authority, processes, ("10.0.0.2",), servers)
        self.leader.invite(made, guest)
        return made

    def join(self, invitation: Invitation, *names: str) -> pb2.JoinResponse:
        requests = {name: signing_request(new_key()) for name in names}
        asked = pb2.JoinRequest(signing_requests=requests)
        return self.enrolment.join(asked, invitation.id, invitation.credentials()[1])


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def renewal() -> pb2.RenewRequest:
    return pb2.RenewRequest(signing_request=signing_request(new_key()))


# Joining


@pytest.mark.parametrize("names", [("", "C", "B"), ("", "B"), ("C",), ("B",), ("", "C", "..")])
def test_the_joiner_gets_what_it_was_invited_for_and_nothing_else(
    office: Office, names: tuple[str, ...]
) -> None:
    invitation = office.invited("C")

    with pytest.raises(BadRequest, match=r"needed are those of \['', 'C'\]"):
        office.join(invitation, *names)
    assert invitation.id in office.leader.guests()


def test_what_a_certificate_says_is_what_the_invitation_said(office: Office) -> None:
    made = office.join(office.invited("C"), "", "C")

    trust = office.leader.trust()
    found = {name: trust.identify(pem) for name, pem in made.certificates.items()}
    assert found == {"": ANNA, "C": Identity("office", PROCESS, "C")}


def test_a_server_of_jobs_joins_with_its_machine(office: Office) -> None:
    made = office.join(office.invited(servers=("10.0.0.2-4222",)), "", "server 10.0.0.2-4222")

    pem = made.certificates["server 10.0.0.2-4222"]
    assert office.leader.trust().identify(pem) == Identity("office", SERVER, "10.0.0.2-4222")
    assert made.servers == ["10.0.0.2-4222"]


def test_a_bad_signing_request_does_not_use_up_the_invitation(office: Office) -> None:
    invitation = office.invited()
    asked = pb2.JoinRequest(signing_requests={"": b"junk"})

    with pytest.raises(BadRequest, match="the signing request cannot be used"):
        office.enrolment.join(asked, invitation.id, invitation.credentials()[1])
    assert office.join(invitation, "").certificates


def test_a_configuration_that_is_gone_is_a_sentence_and_the_invitation_stays(
    office: Office,
) -> None:
    invitation = office.invited()
    (office.topology.folder / office.topology.name).unlink()

    with pytest.raises(ConfigError, match="cannot be read there: No such file"):
        office.join(invitation, "")
    assert invitation.id in office.leader.guests()


# Renewing


def test_who_renews_gets_a_certificate_of_his_own_name(office: Office) -> None:
    """A request says no name, so that C cannot ask for one of B."""
    made = office.enrolment.renew(renewal(), office.holder("C"))

    assert office.leader.trust().identify(made.certificate).name == "C"


def test_a_name_in_the_signing_request_is_not_read(office: Office) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "B")])
    uri = x509.UniformResourceIdentifier("overlay://office/process/B")
    made = x509.CertificateSigningRequestBuilder(name)
    made = made.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    text = made.sign(new_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    answer = office.enrolment.renew(pb2.RenewRequest(signing_request=text), office.holder("C"))

    certificate = x509.load_pem_x509_certificate(answer.certificate)
    assert office.leader.trust().identify(answer.certificate).name == "C"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_who_was_revoked_a_moment_ago_does_not_renew(office: Office) -> None:
    """The leader reads its files from time to time; a renewal does not wait for that."""
    office.leader.revoke("C")

    with pytest.raises(NotTrusted, match="was revoked"):
        office.enrolment.renew(renewal(), office.holder("C"))


def test_who_is_revoked_during_a_renewal_gets_nothing_that_counts(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue, made = TlsFolder.issue, []

    def revoke_first(self: TlsFolder, *args: Any, **more: Any) -> bytes:
        self.revoke("C")
        made.append(issue(self, *args, **more))
        return made[0]

    monkeypatch.setattr(TlsFolder, "issue", revoke_first)

    with pytest.raises(NotTrusted, match="was revoked"):
        office.enrolment.renew(renewal(), office.holder("C"))
    assert made
    assert [one for _, one in office.leader.issued() if "CN=C" in str(one.subject)] == []


def test_renewing_again_and_again_does_not_fill_the_disk(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "MAX_OF_ONE", 5)
    for _ in range(4):
        office.enrolment.renew(renewal(), office.holder("C"))

    with pytest.raises(NotAllowed, match="process C has 5 certificates in use"):
        office.enrolment.renew(renewal(), office.holder("C"))
    assert office.enrolment.renew(renewal(), office.holder("A")).certificate


def test_without_a_certificate_nothing_is_renewed(office: Office) -> None:
    with pytest.raises(NotAllowed, match="only the holder"):
        office.enrolment.renew(renewal(), b"")


# The keeper of process C


class Leader:
    """In place of a channel to the leader. answer: what it says instead of the truth."""

    def __init__(self, office: Office) -> None:
        self.office = office
        self.is_away = False
        self.asked: list[pb2.RenewRequest] = []
        self.answer: Callable[[pb2.RenewResponse], None] = lambda made: None

    def unary_unary(self, *_: object, **__: object) -> Callable[..., pb2.RenewResponse]:
        return self._renew

    def _renew(self, request: pb2.RenewRequest, timeout: float) -> pb2.RenewResponse:
        if self.is_away:
            raise Away
        self.asked.append(request)
        made = self.office.enrolment.renew(request, self.office.holder("C"))
        self.answer(made)
        return made


class Away(grpc.RpcError):  # type: ignore[misc]
    def details(self) -> str:
        return "nothing serves there"


class Kept:
    def __init__(self, office: Office) -> None:
        self.office, self.leader = office, Leader(office)
        self.keeper = CertificateKeeper(office.topology, office.topology.process("C"), office.c)
        channel: Any = self.leader
        self.keeper._channel = channel

    def look(self) -> None:
        """As its thread does."""
        try:
            self.keeper._look()
        except ConfigError as e:
            self.keeper._set_problem(str(e))

    def later(self, seconds: float = enrolment.RETRY_S + 1) -> None:
        self.keeper._next_renewal -= seconds

    def age(self) -> None:
        self.office.hold("C", self.office.folder, -31 * DAY_S)


@pytest.fixture
def kept(office: Office) -> Kept:
    return Kept(office)


def test_a_young_certificate_is_kept(kept: Kept) -> None:
    before = kept.office.holder()

    kept.look()

    assert kept.office.holder() == before
    assert kept.leader.asked[0].signing_request == b""


def test_an_old_certificate_is_replaced(kept: Kept) -> None:
    kept.age()
    before = kept.office.holder()

    kept.look()

    assert kept.office.holder() != before
    assert kept.office.c.age_s < DAY_S
    assert kept.office.c.warning == ""


def test_what_was_revoked_is_known_after_the_next_look(kept: Kept) -> None:
    kept.office.leader.issue_here("user", ANNA)
    pem = kept.office.leader.key_and_certificate("user")[1]
    kept.office.leader.revoke("anna")

    kept.look()

    with pytest.raises(NotTrusted, match="was revoked"):
        kept.office.c.trust.identify(pem)


def test_a_leader_that_is_away_is_asked_again_after_a_while(kept: Kept) -> None:
    kept.age()
    kept.leader.is_away = True
    before = kept.office.holder()
    kept.look()
    kept.leader.is_away = False

    kept.look()
    soon = kept.office.holder()
    kept.later()
    kept.look()

    assert soon == before
    assert kept.office.holder() != before


def test_a_leader_that_lies_is_said_once_and_not_believed(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    def lie(made: pb2.RenewResponse) -> None:
        made.authorities = b"junk"

    before = kept.office.folder.read("ca.pem")
    kept.leader.answer = lie
    for _ in range(5):
        kept.look()

    assert kept.office.folder.read("ca.pem") == before
    assert len(caplog.messages) == 1
    assert "what the leader says of certificates cannot be used" in kept.office.c.warning

    kept.leader.answer = lambda made: None
    kept.look()
    assert kept.office.c.warning == ""


def test_a_full_disk_is_said_and_the_leader_issues_nothing_for_it(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.age()
    issued = len(list(kept.office.leader.issued()))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        for _ in range(3):
            kept.later()
            kept.look()
    assert "No space left on device" in kept.office.c.warning
    assert len(list(kept.office.leader.issued())) == issued

    kept.later()
    kept.look()
    assert kept.office.c.warning == ""
    assert kept.office.c.age_s < DAY_S


def test_a_problem_with_renewing_does_not_keep_a_revocation_out(
    kept: Kept,
) -> None:
    kept.age()
    kept.leader.is_away = True
    kept.look()  # the renewal fails, and waits a minute
    kept.leader.is_away = False
    number = kept.office.c.trust.number
    kept.office.leader.issue_here("user", ANNA)
    kept.office.leader.revoke("anna")

    kept.look()

    assert kept.office.c.trust.number > number


def test_the_authoritys_own_machine_renews_without_asking(office: Office) -> None:
    office.hold("A", office.leader, -31 * DAY_S)
    office.a.current()
    keeper = CertificateKeeper(office.topology, office.topology.process("A"), office.a)

    keeper._look()
    office.a.current()

    assert office.a.age_s < DAY_S


def test_a_servers_certificate_is_renewed_and_the_server_told_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = JobsServer("10.0.0.1", 4222)
    identity, stem = Identity("office", SERVER, server.name), TlsFolder.server_stem(server.name)
    key = new_key()
    old = office.leader.authority().issue(key.public_key(), identity, since_s=-31 * DAY_S)
    office.leader.write_holder(stem, key_pem(key), pem_of(old))
    held = Credentials.of_server(office.leader.path, server.name)
    told: list[bytes] = []
    monkeypatch.setattr(
        enrolment, "reload", lambda server, held: told.append(held.current()[0].certificate)
    )
    topology = replace(office.topology, journal="nats://10.0.0.1:4222,b:4222,c:4222")
    keeper = CertificateKeeper(topology, topology.process("A"), held, False, server)

    for _ in range(3):
        keeper._look()

    new = office.leader.key_and_certificate(stem)[1]
    assert told == [pem_of(old), new]
    names = read_certificate(new).extensions.get_extension_for_class(SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(IPAddress)] == ["10.0.0.1"]


def test_a_certificate_of_an_old_authority_is_replaced_by_one_of_the_new(kept: Kept) -> None:
    office = kept.office
    old = office.leader.read("ca.pem")
    new = TlsFolder(office.leader.path.parent / "new").create_authority("office")
    office.leader.write("ca.pem", pem_of(new.certificate) + old)
    office.leader.write("ca.key", key_pem(new.key), is_secret=True)

    kept.look()  # brings the authority
    kept.look()  # and this the certificate

    assert Trust(pem_of(new.certificate)).identify(office.holder()).name == "C"
    assert office.c.warning == ""


def test_an_enrolment_without_tls_says_what_sets_it_up(office: Office) -> None:
    plain = Enrolment(office.topology, office.topology.process("A"), None)

    with pytest.raises(NotAllowed, match=r"secure two_hosts_config\.json' sets it up"):
        plain.renew(renewal(), b"x")
    away = Enrolment(office.topology, office.topology.process("C"), office.c)
    with pytest.raises(NotAllowed, match="ask A at"):
        away.renew(renewal(), b"x")
