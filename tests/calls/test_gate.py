"""Who is let in, by what their connection shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from overlay.calls.gate import JOIN, RENEW, Gate
from overlay.model.errors import NotAllowed
from overlay.model.identity import CALLER, INVITATION, OPERATOR, PROCESS, SERVER, Identity
from overlay.security.certificates import NotTrusted, key_pem, new_key, pem_of
from overlay.security.credentials import Credentials
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import TlsFolder

PEER = "ipv4:10.0.0.7:4242"


class Connected:
    """The context of a call: what its connection shows."""

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

    def enter(self, context: Connected, method: str = "Forward") -> Any:
        """The context, as the gate's methods take it."""
        entered: Any = context
        self.gate.enter(entered, context.peer(), method)
        return entered

    def call(self, kind: str, name: str, peer: str = PEER) -> Connected:
        identity = Identity("office", kind, name)
        return Connected(pem_of(self._signed(identity)), peer)

    def _signed(self, identity: Identity) -> Any:
        return self.folder.authority().issue(new_key().public_key(), identity)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def test_calls_from_one_address_and_port_are_each_judged_by_their_own_certificate(
    office: Office,
) -> None:
    """Connections to two addresses of a process may share them, one of them in plaintext."""
    gate = office.gate
    root = office.enter(office.call(OPERATOR, "root"))
    anna = office.enter(office.call(CALLER, "anna"))
    plain = office.enter(Connected())

    assert [str(gate.identity(who)) for who in (root, anna)] == ["operator root", "caller anna"]
    assert gate.identity(plain) is None
    assert [gate.is_operator(who) for who in (root, anna, plain)] == [True, False, False]

    gate.leave(root, PEER)
    assert [gate.is_operator(who) for who in (root, anna, plain)] == [False, False, False]
    assert gate.peers() == {PEER}


def test_what_is_refused_leaves_nothing_behind(office: Office) -> None:
    for number in range(100):
        refused: Any = Connected(b"junk", f"ipv4:10.0.0.7:{number}")
        with pytest.raises(NotTrusted):
            office.enter(refused)
        office.gate.leave(refused, refused.peer())
        assert office.gate.certificate(refused) == b""

    assert office.gate.peers() == set()


def test_a_process_is_only_the_one_that_its_certificate_names(office: Office) -> None:
    call = office.enter(office.call(PROCESS, "C"))

    assert office.gate.is_process(call, "C")
    assert not office.gate.is_process(call, "B")
    assert not office.gate.is_operator(call)


@pytest.mark.parametrize("kind", [CALLER, OPERATOR])
def test_a_person_with_the_name_of_a_process_is_none(office: Office, kind: str) -> None:
    call = office.enter(office.call(kind, "B"))

    assert not office.gate.is_process(call, "B")


@pytest.mark.parametrize("method", ["Forward", "GetMetrics", "Submit", "Check", JOIN])
def test_a_server_of_jobs_does_nothing_but_renew(office: Office, method: str) -> None:
    server = office.call(SERVER, "10.0.0.1-4222")

    office.enter(server, RENEW)
    with pytest.raises(NotAllowed):
        office.enter(server, method)


def test_only_an_invitation_joins_and_it_does_nothing_else(office: Office) -> None:
    invitation = Invitation.create("127.0.0.1", 1, b"h" * 20)
    invited = Connected(invitation.credentials()[1])

    office.enter(invited, JOIN)
    with pytest.raises(NotAllowed, match="only join"):
        office.enter(invited)
    for other in (Connected(peer="ipv4:1.1.1.1:1"), office.call(OPERATOR, "r", "ipv4:2:2")):
        with pytest.raises(NotAllowed, match="only an invitation joins"):
            office.enter(other, JOIN)


def test_an_invitation_of_our_own_authority_does_no_more_than_another(office: Office) -> None:
    """Even what the authority signed by mistake."""
    with pytest.raises(NotAllowed, match="only join"):
        office.enter(office.call(INVITATION, "x"))


def test_a_revoked_certificate_counts_no_more_on_an_open_connection(office: Office) -> None:
    key = new_key()
    office.folder.write_holder("user", key_pem(key), b"")
    office.folder.issue_here("user", Identity("office", CALLER, "anna"))
    pem = office.folder.key_and_certificate("user")[1]
    call = office.enter(Connected(pem))

    office.folder.revoke("anna")
    assert office.gate.credentials is not None
    office.gate.credentials.current()

    with pytest.raises(NotTrusted, match="was revoked"):
        office.gate.identity(call)
