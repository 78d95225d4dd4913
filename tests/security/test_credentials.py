"""What a process takes from its leader, and what it goes on with when that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from overlay.model import clocks
from overlay.model.errors import ConfigError
from overlay.model.identity import PROCESS, Identity
from overlay.security.certificates import (
    DAY_S,
    Authority,
    key_pem,
    new_key,
    pem_of,
    read_authorities,
)
from overlay.security.credentials import Credentials
from overlay.security.tls_folder import TlsFolder

C = Identity("office", PROCESS, "C")


class Office:
    """The leader's folder, and that of the machine of process C."""

    def __init__(self, path: Path) -> None:
        self.leader = TlsFolder(path / "leader")
        self.leader.create_authority("office")
        self.folder = TlsFolder(path / "other")
        for name in ("ca.pem", "revoked.pem"):
            self.folder.write(name, self.leader.read(name))
        self.leader.issue_here("process_c", C)
        key, held = self.leader.key_and_certificate("process_c")
        self.folder.write_holder("process_c", key, held)
        self.c = Credentials.of_process(self.folder.path, "C")

    @property
    def authorities(self) -> bytes:
        return self.leader.read("ca.pem")

    @property
    def revoked(self) -> bytes:
        return self.leader.read("revoked.pem")

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.path.iterdir()}

    def revoke(self, name: str) -> bytes:
        """The list afterwards."""
        self.leader.issue_here("user", Identity("office", "caller", name))
        self.leader.revoke(name)
        return self.revoked

    def renewed(self, identity: Identity = C) -> tuple[bytes, bytes]:
        key = new_key()
        return key_pem(key), pem_of(self.leader.authority().issue(key.public_key(), identity))


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def test_a_new_certificate_is_shown_at_once(office: Office) -> None:
    key, certificate = office.renewed()

    office.c.accept(office.authorities, b"", key, certificate)

    shown, _ = office.c.current()
    assert (shown.key, shown.certificate) == (key, certificate)


def test_an_older_list_of_the_revoked_is_not_taken(office: Office) -> None:
    old = office.revoke("bob")
    new = office.revoke("eve")
    office.c.accept(office.authorities, new, b"", b"")

    office.c.accept(office.authorities, old, b"", b"")

    assert office.folder.read("revoked.pem") == new


def test_a_list_older_than_what_another_process_wrote_is_not_taken(office: Office) -> None:
    old = office.revoke("bob")
    new = office.revoke("eve")
    office.folder.write("revoked.pem", new)

    office.c.accept(office.authorities, old, b"", b"")

    assert office.folder.read("revoked.pem") == new


Said = Callable[[Office], tuple[bytes, bytes, bytes, bytes]]


def _false_list(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    false = Authority.create("office").revoke((), 2**40)
    return office.authorities, pem_of(false), b"", b""


def _anothers(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return office.authorities, b"", *office.renewed(replace(C, name="B"))


def _other_key(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return office.authorities, b"", key_pem(new_key()), office.renewed()[1]


def _other_authority(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return pem_of(Authority.create("office").certificate), b"", b"", b""


def _first_of_another(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return pem_of(Authority.create("home").certificate) + office.authorities, b"", b"", b""


def _without_ours(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return office.authorities, b"", *_renewed_by(Authority.create("office"))


def _renewed_by(authority: Authority) -> tuple[bytes, bytes]:
    key = new_key()
    return key_pem(key), pem_of(authority.issue(key.public_key(), C))


def _nothing(office: Office) -> tuple[bytes, bytes, bytes, bytes]:
    return b"", b"", b"", b""


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (_false_list, "not signed by this overlay's authority"),
        (_anothers, "the certificate is another's"),
        (_other_key, "not for the key that was sent"),
        (_other_authority, "the revocation list is not signed"),
        (_first_of_another, "the authorities are those of home"),
        (_without_ours, "issued by another overlay"),
        (_nothing, "."),
        (lambda office: (b"junk", b"", b"", b""), "."),
        (lambda office: (office.authorities, b"junk", b"", b""), "."),
        (lambda office: (office.authorities, b"", b"junk", b"junk"), "."),
    ],
)
def test_of_a_leader_that_lies_nothing_is_taken(office: Office, lie: Said, says: str) -> None:
    office.revoke("bob")
    before, shown = office.files(), office.c.current()

    with pytest.raises(ConfigError, match=says):
        office.c.accept(*lie(office))

    assert office.files() == before
    assert office.c.current() == shown


@pytest.mark.parametrize("name", ["process_c.pem", "revoked.pem", "ca.pem"])
def test_a_file_that_cannot_be_written_leaves_what_works(
    office: Office, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever of the files is the one that no longer fits on the disk."""
    key, certificate = office.renewed()
    new = Authority.create("office")
    authorities = office.authorities + pem_of(new.certificate)
    write = TlsFolder.write

    def full(self: TlsFolder, file: str, data: bytes, is_secret: bool = False) -> None:
        if file == name:
            raise ConfigError(f"{file} cannot be written: No space left on device")
        write(self, file, data, is_secret)

    listed = pem_of(new.revoke((), int(clocks.time()) + 9))
    with monkeypatch.context() as patch:
        patch.setattr(TlsFolder, "write", full)
        with pytest.raises(ConfigError, match="No space"):
            office.c.accept(authorities, listed, key, certificate)

    again = Credentials.of_process(office.folder.path, "C")
    assert again.certificate_problem == again.problem == ""


def test_old_and_new_authority_are_followed_by_the_new_one_alone(office: Office) -> None:
    new = Authority.create("office")
    both = office.authorities + pem_of(new.certificate)

    office.c.accept(both, b"", b"", b"")
    office.c.accept(both, pem_of(new.revoke((), int(clocks.time()) + 9)), *_renewed_by(new))
    office.c.accept(pem_of(new.certificate), b"", b"", b"")

    assert read_authorities(office.folder.read("ca.pem")) == [new.certificate]
    assert office.c.certificate_problem == ""
    assert office.c.is_of_new_authority


def test_the_new_authority_alone_does_not_replace_the_old_one(office: Office) -> None:
    with pytest.raises(ConfigError, match="not signed by this overlay"):
        office.c.accept(pem_of(Authority.create("office").certificate), b"", b"", b"")


def test_files_that_belong_together_only_in_part_are_not_used_in_part(office: Office) -> None:
    expires = office.c.expires_s
    key, certificate = new_key(), office.leader.authority()
    made = certificate.issue(key.public_key(), C, valid_s=3 * DAY_S)
    office.folder.write("revoked.pem", b"half a li")

    office.folder.write_holder("process_c", key_pem(key), pem_of(made))
    office.c.current()

    assert office.c.expires_s == expires
    assert office.c.problem in office.c.warning != ""


def test_a_change_is_seen_even_if_the_file_is_as_old_and_as_long(office: Office) -> None:
    path = office.folder.path / "revoked.pem"
    before, found = office.c.current()[1], path.stat()

    office.folder.write("revoked.pem", path.read_bytes())
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    assert office.c.current()[1] != before


def test_a_revoked_certificate_of_ones_own_is_said(office: Office) -> None:
    office.leader.revoke("C")

    office.c.accept(office.authorities, office.revoked, b"", b"")

    assert "the certificate of process C was revoked" in office.c.certificate_problem
    assert "invite NAME" in office.c.certificate_problem
