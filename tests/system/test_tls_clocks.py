"""Joining on a machine whose clock is wrong, and the leader's machine after years off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.cli.identity.invite import invite
from overlay.client.enrolment import Joining
from overlay.model import clocks
from overlay.model.config import load
from overlay.model.errors import NotReached
from overlay.model.identity import CALLER, OPERATOR, PROCESS, Identity
from overlay.security.certificates import DAY_S, key_pem, new_key, pem_of
from overlay.security.tls_folder import USER, Guest, TlsFolder
from tests.harness.cluster import Overlay, six_processes
from tests.system.test_tls import client


@pytest.fixture(scope="module")
def leader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """Process A, by the right clock."""
    with Overlay(tmp_path_factory.mktemp("leader"), six_processes(tls="tls")) as made:
        made.serve("A")
        yield made


def line_of(leader: Overlay) -> str:
    guest = Guest("anna", CALLER, 0, "")
    return str(invite(TlsFolder(leader.folder / "tls"), load(leader.path), guest))


def set_clock(monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    """Of this process, as far as the product reads it; the leader is a process of its own."""
    monkeypatch.setattr(clocks, "time", lambda: time.time() + off_s)


@pytest.mark.parametrize("off_s", [-0.95 * DAY_S, 0.95 * DAY_S])
def test_a_machine_whose_clock_is_nearly_a_day_off_joins(
    leader: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    line = line_of(leader)
    set_clock(monkeypatch, off_s)
    joining = Joining(line)
    joining.join(joining.look(), TlsFolder(tmp_path))
    joining.close()

    assert TlsFolder(tmp_path).holder(USER).exists()


@pytest.mark.parametrize("off_s", [-5 * DAY_S, 5 * DAY_S])
def test_a_machine_whose_clock_is_five_days_off_is_told_so(
    leader: Overlay, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    line = line_of(leader)
    set_clock(monkeypatch, off_s)
    joining = Joining(line, within_s=5)
    its_day = clocks.strftime("%Y-%m-%d", clocks.localtime(clocks.time()))

    with pytest.raises(NotReached, match="or one of the two clocks is wrong by more than a day"):
        joining.look()
    with pytest.raises(NotReached, match=rf"\(this one: {its_day} "):
        joining.look()
    joining.close()


def test_the_leaders_machine_renews_its_own_certificates_after_years_off(tmp_path: Path) -> None:
    with Overlay(tmp_path, six_processes(tls="tls")) as made:
        folder = TlsFolder(tmp_path / "tls")
        for process_id in "ABC":
            expire(folder, TlsFolder.stem(process_id), Identity("office", PROCESS, process_id))
        expire(folder, USER, Identity("office", OPERATOR, "root"))

        secured = client(tmp_path, "secure", made.path.name)  # a person's, and those that are off
        assert "user.pem is new: with it, root is an operator" in secured.stdout
        expire(folder, TlsFolder.stem("A"), Identity("office", PROCESS, "A"))
        made.start("A", "B", "C")  # A's by itself

        assert made.ask("A").hops[:3] == ["A", "B", "C"]


def expire(folder: TlsFolder, stem: str, identity: Identity) -> None:
    key = new_key()
    days = {"since_s": -800 * DAY_S, "valid_s": -400 * DAY_S}
    made = folder.authority().issue(key.public_key(), identity, ("127.0.0.1",), **days)
    folder.write_holder(stem, key_pem(key), pem_of(made))
