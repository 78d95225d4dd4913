"""Whose rights a call has, also when it ends before it is asked."""

from __future__ import annotations

from typing import Any

import pytest

from overlay.calls.gate import Gate
from overlay.model.access import OTHERS, UNRESTRICTED, Access, Rights
from overlay.model.errors import CallCancelled, NotAllowed
from overlay.model.identity import CALLER, Identity
from overlay.security.certificates import new_key, pem_of
from overlay.security.tls_folder import TlsFolder

ALLOWED = Access({"anna": Rights(verbs=("requests",)), OTHERS: Rights(verbs=("metrics",))})


class Context:
    """What a gate asks of a call's context. pem: empty for plaintext."""

    def __init__(self, pem: bytes = b"", peer: str = "ipv4:127.0.0.1:5") -> None:
        self._pem = pem
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]} if self._pem else {}


class Keys:
    """A process's credentials, as far as a gate uses them."""

    def __init__(self, folder: TlsFolder) -> None:
        self.trust = folder.trust()


@pytest.fixture
def folder(tmp_path: Any) -> TlsFolder:
    made = TlsFolder(tmp_path)
    made.create_authority("office")
    return made


@pytest.fixture
def anna(folder: TlsFolder) -> Context:
    signed = folder.authority().issue(new_key().public_key(), Identity("office", CALLER, "anna"))
    return Context(pem_of(signed))


@pytest.fixture
def gate(folder: TlsFolder) -> Gate:
    return Gate(Keys(folder), allowed=ALLOWED)  # type: ignore[arg-type]


def test_a_call_has_the_rights_of_its_certificate(gate: Gate, anna: Context) -> None:
    gate.enter(anna, anna.peer(), "Forward")

    assert gate.rights(anna) == Rights("anna", verbs=("requests",))
    with pytest.raises(NotAllowed, match="anna may not read metrics"):
        gate.check_verb(anna, "GetMetrics")
    gate.check_verb(anna, "Check")


def test_a_call_without_a_certificate_has_those_of_all_others(gate: Gate) -> None:
    plain = Context()
    gate.enter(plain, plain.peer(), "Forward")

    assert gate.rights(plain).verbs == ("metrics",)


def test_a_call_that_is_over_does_not_pass_for_one_without_a_certificate(
    gate: Gate, anna: Context
) -> None:
    gate.enter(anna, anna.peer(), "Forward")
    gate.leave(anna, anna.peer())

    with pytest.raises(CallCancelled):
        gate.rights(anna)


def test_without_access_no_call_is_restricted(folder: TlsFolder, anna: Context) -> None:
    gate = Gate(Keys(folder))  # type: ignore[arg-type]
    gate.enter(anna, anna.peer(), "Forward")

    assert gate.rights(anna) is UNRESTRICTED
    assert Gate(allowed=ALLOWED).rights(anna) is UNRESTRICTED
