"""Who is let in, by what their connection shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from overlay.calls.gate import JOIN, Gate
from overlay.model.errors import NotAllowed
from overlay.model.identity import CALLER, INVITATION, OPERATOR, PROCESS, Identity
from overlay.security.certificates import NotTrusted, key_pem, new_key, pem_of
from overlay.security.credentials import Credentials
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import TlsFolder

PEER = "ipv4:10.0.0.7:4242"


class Connection:
    """As a call's context says it."""

    def __init__(self, pem: bytes = b"", peer: str = PEER) -> None:
        self._pem, self._peer = pem, peer

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]} if self._pem else {}


class Office:
    def __init__(self, path: Path) -> None:
        self.folder = TlsFolder(path)
        self.folder.create_authority("office")
        self.folder.issue_here("process_a", Identity("office", PROCESS, "A"))
        self.gate = Gate(Credentials.of_process(path, "A"))

    def enter(self, connection: Connection, method: str = "Forward") -> None:
        context: Any = connection
        self.gate.enter(context, method)

    def connection(self, kind: str, name: str, peer: str = PEER) -> Connection:
        identity = Identity("office", kind, name)
        return Connection(pem_of(self._signed(identity)), peer)

    def _signed(self, identity: Identity) -> Any:
        return self.folder.authority().issue(new_key().public_key(), identity)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def test_plaintext_on_a_connection_with_anothers_address_and_port_is_not_that_other(
    office: Office,
) -> None:
    """A program of this machine may come from any of its addresses, to 127.0.0.1, in plaintext."""
    office.enter(office.connection(OPERATOR, "root"))

    with pytest.raises(NotAllowed, match="connect again"):
        office.enter(Connection())
    office.gate.leave(PEER)
    assert office.gate.is_operator(PEER)


def test_a_certificate_does_not_stand_for_another_at_the_same_address_and_port(
    office: Office,
) -> None:
    office.enter(office.connection(CALLER, "anna"))

    with pytest.raises(NotAllowed, match="connect again"):
        office.enter(office.connection(OPERATOR, "root"))
    assert not office.gate.is_operator(PEER)


def test_the_next_connection_from_an_address_and_port_has_a_certificate_of_its_own(
    office: Office,
) -> None:
    office.enter(office.connection(OPERATOR, "root"))
    office.gate.leave(PEER)

    office.enter(office.connection(CALLER, "anna"))

    assert str(office.gate.identity(PEER)) == "caller anna"


def test_what_is_refused_leaves_nothing_behind(office: Office) -> None:
    for number in range(100):
        peer = f"ipv4:10.0.0.7:{number}"
        with pytest.raises(NotTrusted):
            office.enter(Connection(b"junk", peer))
        office.gate.leave(peer)

    assert office.gate.peers() == set()
    assert office.gate.certificate("ipv4:10.0.0.7:1") == b""


def test_a_process_is_only_the_one_that_its_certificate_names(office: Office) -> None:
    office.enter(office.connection(PROCESS, "C"))

    assert office.gate.is_process(PEER, "C")
    assert not office.gate.is_process(PEER, "B")
    assert not office.gate.is_operator(PEER)


@pytest.mark.parametrize("kind", [CALLER, OPERATOR])
def test_a_person_with_the_name_of_a_process_is_none(office: Office, kind: str) -> None:
    office.enter(office.connection(kind, "B"))

    assert not office.gate.is_process(PEER, "B")


def test_only_an_invitation_joins_and_it_does_nothing_else(office: Office) -> None:
    invitation = Invitation.create("127.0.0.1", 1, b"h" * 20)
    invited = Connection(invitation.credentials()[1])

    office.enter(invited, JOIN)
    with pytest.raises(NotAllowed, match="only join"):
        office.enter(invited)
    for other in (Connection(peer="ipv4:1.1.1.1:1"), office.connection(OPERATOR, "r", "ipv4:2:2")):
        with pytest.raises(NotAllowed, match="only an invitation joins"):
            office.enter(other, JOIN)


def test_an_invitation_of_our_own_authority_does_no_more_than_another(office: Office) -> None:
    """Even what the authority signed by mistake."""
    with pytest.raises(NotAllowed, match="only join"):
        office.enter(office.connection(INVITATION, "x"))


def test_a_revoked_certificate_counts_no_more_on_an_open_connection(office: Office) -> None:
    key = new_key()
    office.folder.write_holder("user", key_pem(key), b"")
    office.folder.issue_here("user", Identity("office", CALLER, "anna"))
    pem = office.folder.key_and_certificate("user")[1]
    office.enter(Connection(pem))

    office.folder.revoke("anna")
    assert office.gate.credentials is not None
    office.gate.credentials.current()

    with pytest.raises(NotTrusted, match="was revoked"):
        office.gate.identity(PEER)
