"""The folder of certificates: whole files, private keys, and verbs that run at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overlay.model import clocks
from overlay.model.errors import ConfigError
from overlay.model.identity import CALLER, OPERATOR, PROCESS, Identity
from overlay.security.certificates import (
    DAY_S,
    INVITATION_S,
    NotTrusted,
    Trust,
    new_key,
    pem_of,
    read_certificate,
    signing_request,
)
from overlay.security.credentials import Credentials
from overlay.security.invitation import Invitation
from overlay.security.lookup import credentials_for
from overlay.security.tls_folder import USER, Guest, TlsFolder
from tests.harness.machine import ROOT

ANNA, BOB = Identity("office", CALLER, "anna"), Identity("office", CALLER, "bob")


@pytest.fixture
def folder(tmp_path: Path) -> TlsFolder:
    made = TlsFolder(tmp_path / "tls")
    made.create_authority("office")
    return made


def issued(folder: TlsFolder, identity: Identity = ANNA, valid_s: float = DAY_S) -> bytes:
    return folder.issue(signing_request(new_key()), identity, valid_s=valid_s)


def invited(folder: TlsFolder, guest: Guest | None = None) -> Invitation:
    made = Invitation.create("127.0.0.1", 1, b"h" * 20)
    until = clocks.time() + INVITATION_S
    authority = pem_of(made.authority().certificate).decode()
    folder.invite(made, guest or Guest("anna", CALLER, until, authority))
    return made


def left_over(folder: TlsFolder) -> list[Path]:
    return list(folder.path.rglob(".*"))


# Files


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes; icacls does it there")
def test_secrets_are_for_this_user_only_and_the_rest_is_for_all(folder: TlsFolder) -> None:
    folder.issue_here(USER, ANNA)
    invitation = invited(folder)

    modes = {
        name: (folder.path / name).stat().st_mode & 0o777
        for name in ("ca.key", "user.pem", f"invitations/{invitation.id}.json", "ca.pem")
    }

    assert list(modes.values()) == [0o600, 0o600, 0o600, 0o644]


def test_a_file_is_never_seen_half_written(folder: TlsFolder) -> None:
    texts = {bytes([letter]) * 200_000 for letter in b"ab"}
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for text in texts:
                folder.write("some.pem", text)

    folder.write("some.pem", b"a" * 200_000)
    writer = threading.Thread(target=write)
    writer.start()
    seen = {folder.read("some.pem") for _ in range(300)}
    done.set()
    writer.join(10)

    assert seen <= texts


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    folder: TlsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = folder.read("ca.pem")
    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(ConfigError, match=r"ca\.pem cannot be written: No space left on device"):
        folder.write("ca.pem", b"other")
    assert folder.read("ca.pem") == before
    assert left_over(folder) == []


def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = TlsFolder(tmp_path / "file" / "tls")

    assert not folder.exists
    assert not folder.can_issue
    for use in (folder.trust, folder.authority, lambda: folder.certificate(USER)):
        with pytest.raises(ConfigError, match="cannot be read"):
            use()
    with pytest.raises(ConfigError, match="cannot be written"):
        folder.write("ca.pem", b"x")


def _use_as_another(path: Path, answers: Any) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    folder = TlsFolder(path)
    answers.put((folder.exists, folder.can_issue))
    for use in (
        folder.trust,
        lambda: folder.write("ca.pem", b"x"),
        lambda: Credentials.of_user(path),
        lambda: credentials_for("127.0.0.1", 1, path),
    ):
        try:
            answers.put(use())
        except BaseException as e:  # noqa: BLE001 - the test judges it
            answers.put(f"{type(e).__name__}: {e}")


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_a_folder_of_another_user_is_a_sentence(folder: TlsFolder) -> None:
    folder.issue_here(USER, ANNA)
    folder.path.chmod(0)
    context = multiprocessing.get_context("fork")  # as another user may not read this Python
    answers = context.Queue()
    process = context.Process(target=_use_as_another, args=(folder.path, answers))
    try:
        process.start()
        found = [answers.get(timeout=20) for _ in range(5)]
        process.join(20)
    finally:
        folder.path.chmod(0o700)

    assert found[0] == (False, False)
    for said in found[1:]:
        assert said.startswith("ConfigError: ")
        assert "Permission denied" in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"processes": [], "hosts": []}',
        '{"name": "x", "kind": "caller", "until": 1e999, "authority": "", "processes": 7,'
        ' "hosts": []}',
    ],
)
def test_what_is_no_invitation_invites_nobody(folder: TlsFolder, text: str) -> None:
    good = invited(folder)
    (folder.path / "invitations" / "x.json").write_text(text)

    assert set(folder.guests()) == {good.id}


@pytest.mark.parametrize(
    "change",
    [{"authority": "junk"}, {"authority": 7}, {"name": "a/b"}, {"kind": 1}, {"until": "soon"}],
)
def test_a_guest_is_checked_before_it_is_one(folder: TlsFolder, change: dict[str, Any]) -> None:
    path = folder.path / "invitations" / f"{invited(folder).id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    assert folder.guests() == {}


# What goes away


def test_what_has_expired_by_every_clock_is_dropped(folder: TlsFolder) -> None:
    issued(folder, BOB, valid_s=-DAY_S / 2)  # another clock may still take it for good
    issued(folder, BOB, valid_s=-DAY_S / 2)
    folder.revoke("bob")
    issued(folder, valid_s=-DAY_S + 1)
    assert len(list((folder.path / "revoked").iterdir())) == 2

    later = clocks.time() + DAY_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "time", lambda: later)
        issued(folder)

    assert len(list(folder.issued())) == 1
    assert list((folder.path / "revoked").iterdir()) == []


def test_an_invitation_that_is_over_is_dropped_by_the_next_one(folder: TlsFolder) -> None:
    over = Guest("late", CALLER, clocks.time() - 1, "")
    old = invited(folder, over)

    new = invited(folder)

    files = [path.stem for path in (folder.path / "invitations").iterdir()]
    assert files == [new.id]
    assert old.id not in folder.guests()


# Two at a time


def _accept(path: Path, invitation: str, start: Any, answers: Any) -> None:
    start.wait(30)
    answers.put(TlsFolder(path).accept(invitation) is not None)


def test_of_two_processes_that_accept_an_invitation_one_gets_it(folder: TlsFolder) -> None:
    context = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    answers, starts = context.Queue(), [context.Event() for _ in range(10)]
    invitations = [invited(folder).id for _ in starts]

    def run(invitation_and_start: tuple[str, Any]) -> list[bool]:
        invitation, start = invitation_and_start
        both = [
            context.Process(target=_accept, args=(folder.path, invitation, start, answers))
            for _ in range(2)
        ]
        for one in both:
            one.start()
        start.set()
        got = [answers.get(timeout=30) for _ in both]
        for one in both:
            one.join(30)
        return sorted(got)

    assert list(map(run, zip(invitations, starts, strict=True))) == [[False, True]] * 10


def test_two_revocations_at_a_time_are_both_in_the_list(folder: TlsFolder) -> None:
    for round_ in range(10):
        pems = {name: issued(folder, replace(ANNA, name=name)) for name in (f"a{round_}", "b")}
        both = [threading.Thread(target=folder.revoke, args=(name,)) for name in pems]
        for one in both:
            one.start()
        for one in both:
            one.join(20)

        for pem in pems.values():
            with pytest.raises(NotTrusted, match="was revoked"):
                folder.trust().identify(pem)


def test_a_revocation_that_failed_halfway_is_made_whole_by_the_next(
    folder: TlsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = issued(folder)
    write = TlsFolder.write

    def full(self: TlsFolder, name: str, data: bytes, is_secret: bool = False) -> None:
        if name == "revoked.pem":
            raise ConfigError("revoked.pem cannot be written: No space left on device")
        write(self, name, data, is_secret)

    with monkeypatch.context() as patch:
        patch.setattr(TlsFolder, "write", full)
        with pytest.raises(ConfigError, match="No space"):
            folder.revoke("anna")

    assert folder.revoke("anna") == [ANNA]
    with pytest.raises(NotTrusted, match="was revoked"):
        folder.trust().identify(pem)


def test_a_certificate_that_is_issued_while_its_name_is_revoked_is_revoked_too(
    folder: TlsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued(folder)
    late: list[bytes] = []
    write = TlsFolder.write

    def and_issue(self: TlsFolder, name: str, data: bytes, is_secret: bool = False) -> None:
        write(self, name, data, is_secret)
        if name == "revoked.pem" and not late:
            late.append(b"")
            late[0] = issued(folder)

    monkeypatch.setattr(TlsFolder, "write", and_issue)
    folder.revoke("anna")

    with pytest.raises(NotTrusted, match="was revoked"):
        folder.trust().identify(late[0])


def test_each_list_has_a_higher_number_than_the_one_before(folder: TlsFolder) -> None:
    numbers = [folder.trust().number]
    for name in ("a", "b", "c"):
        issued(folder, replace(ANNA, name=name))
        folder.revoke(name)
        numbers.append(folder.trust().number)

    assert numbers == sorted(set(numbers))


def test_a_holder_is_counted_without_those_whose_names_begin_alike(folder: TlsFolder) -> None:
    for name in ("a", "a", "a_b", "a_b_c"):
        issued(folder, replace(ANNA, name=name))
    issued(folder, Identity("office", OPERATOR, "a"))

    assert folder.count_issued(replace(ANNA, name="a")) == 2
    assert folder.count_issued(replace(ANNA, name="a_b")) == 1


# The authority


@pytest.mark.parametrize("lost", ["ca.pem", "ca.key"])
def test_a_half_authority_is_said(folder: TlsFolder, lost: str) -> None:
    (folder.path / lost).unlink()

    with pytest.raises(ConfigError, match=lost):
        folder.authority()


def test_an_authority_that_is_made_only_in_part_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or `secure` would take it for whole, and join nobody."""
    folder, write = TlsFolder(tmp_path), TlsFolder.write
    written: list[str] = []

    def two(self: TlsFolder, name: str, data: bytes, is_secret: bool = False) -> None:
        if len(written) == 2:
            raise ConfigError("the power went off")
        written.append(name)
        write(self, name, data, is_secret)

    monkeypatch.setattr(TlsFolder, "write", two)
    with pytest.raises(ConfigError):
        folder.create_authority("office")

    assert not folder.exists


def test_the_authority_that_signs_is_the_one_of_the_key(folder: TlsFolder) -> None:
    other = TlsFolder(folder.path.parent / "other").create_authority("office")
    ours = folder.read("ca.pem")
    folder.write("ca.pem", pem_of(other.certificate) + ours)

    pem = folder.issue(signing_request(new_key()), Identity("office", PROCESS, "C"))

    assert Trust(ours).identify(pem).name == "C"


@pytest.mark.parametrize("make", [lambda f: f.read("ca.key"), lambda f: b"", lambda f: b"junk"])
def test_a_key_file_that_is_not_whole_is_said(
    folder: TlsFolder, make: Callable[[TlsFolder], bytes]
) -> None:
    folder.write(f"{USER}.pem", make(folder))

    with pytest.raises(ConfigError, match="join this overlay again"):
        folder.certificate(USER)


def test_an_authority_that_was_moved_goes_on_where_it_was(folder: TlsFolder) -> None:
    pem, number = issued(folder, BOB), folder.trust().number
    folder.revoke("bob")
    moved = TlsFolder(folder.path.parent / "moved")
    shutil.copytree(folder.path, moved.path)
    for name in ("ca.key", "issued", "revoked", "invitations"):
        left = folder.path / name
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    moved_pem = issued(moved)
    moved.revoke("anna")

    assert not folder.can_issue
    assert moved.trust().number > folder.trust().number > number
    for one in (pem, moved_pem):
        with pytest.raises(NotTrusted, match="was revoked"):
            moved.trust().identify(one)


# Another authority


def test_the_steps_to_another_authority(folder: TlsFolder) -> None:
    old, first = folder.read("ca.pem"), issued(folder)

    assert "step 1" in folder.change_authority()
    before = issued(folder)
    assert folder.trust().is_of_first(read_certificate(before))
    assert "step 2" in folder.change_authority()
    after = issued(folder)
    assert folder.trust().is_of_first(read_certificate(after))
    assert "step 3" in folder.change_authority()

    assert folder.trust().identify(after) == ANNA
    for gone in (first, before):
        with pytest.raises(NotTrusted, match="issued by another overlay"):
            folder.trust().identify(gone)
    with pytest.raises(ValueError, match="not signed by"):
        Trust(old, folder.revoked())


def test_the_old_authority_stays_while_it_is_needed(folder: TlsFolder) -> None:
    pem = issued(folder)
    folder.change_authority()
    folder.change_authority()

    with pytest.raises(ConfigError, match="still needed by caller anna"):
        folder.change_authority()
    assert folder.trust().identify(pem) == ANNA
    folder.revoke("anna")
    assert "step 3" in folder.change_authority()


@pytest.mark.parametrize("at", ["ca.pem", "ca.key", "revoked.pem"])
def test_a_step_that_failed_is_done_by_the_next_try(
    folder: TlsFolder, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    pem, write = issued(folder), TlsFolder.write
    folder.change_authority()

    def full(self: TlsFolder, name: str, data: bytes, is_secret: bool = False) -> None:
        if name == at:
            raise ConfigError(f"{name} cannot be written: No space left on device")
        write(self, name, data, is_secret)

    with monkeypatch.context() as patch:
        patch.setattr(TlsFolder, "write", full)
        with pytest.raises(ConfigError, match="No space"):
            folder.change_authority()
    assert folder.trust().identify(pem) == folder.trust().identify(issued(folder)) == ANNA

    assert "step 2" in folder.change_authority()
    assert folder.trust().is_of_first(read_certificate(issued(folder)))


def test_a_folder_of_certificates_is_not_committed_by_accident() -> None:
    named = ["tls/ca.key", "examples/tls/user.pem"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *named], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 128:
        pytest.skip("no git checkout")

    assert done.stdout.split() == named
