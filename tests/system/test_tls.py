"""An overlay with certificates: who gets in, who is refused and why, and what changes live."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import overlay
from overlay.model.identity import CALLER, OPERATOR, PROCESS, Identity
from overlay.security.certificates import (
    DAY_S,
    INVITATION_S,
    key_pem,
    new_key,
    pem_of,
    read_authorities,
    signing_request,
)
from overlay.security.credentials import Credentials, Shown
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import USER, Guest, TlsFolder
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.endpoints import channel_options, open_channel
from tests.harness import same_process
from tests.harness.certificates import user_of
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.hostile import Hostile

MINE = """
import time

def slow(payload, context):
    time.sleep(float(payload))
    return b"slept"
"""


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """All six with certificates. A test that revokes does it to somebody of its own."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "mine.py").write_text(MINE)
    config = six_processes(tls="tls", handlers={"slow": "mine:slow"})
    with running(folder, config) as overlay:
        yield overlay


def tls_of(closed: Overlay) -> TlsFolder:
    return TlsFolder(closed.folder / "tls")


class Keys:
    """What a channel shows, whatever it is; it expects process A."""

    def __init__(self, key: bytes, certificate: bytes, authorities: bytes) -> None:
        self._shown = Shown(key, certificate, authorities)

    def current(self) -> tuple[Shown, object]:
        return self._shown, None

    def server_name(self, process_id: str = "") -> str:
        return "a.office.overlay"

    @staticmethod
    def of(folder: TlsFolder, stem: str = USER) -> Keys:
        return Keys(*folder.key_and_certificate(stem), folder.read("ca.pem"))


def asked(closed: Overlay, keys: Any, process_id: str = "A", **more: Any) -> pb2.Response:
    channel = open_channel(("127.0.0.1",), closed.port(process_id), channel_options(), keys)
    with channel:
        stub = pb2_grpc.OverlayNodeStub(channel)
        return stub.Forward(pb2.Request(payload=b"hi"), timeout=5, **more)


def refusal(closed: Overlay, keys: Any, **more: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        asked(closed, keys, **more)
    return refused.value.code(), refused.value.details()


def client(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """client.py in this folder."""
    return same_process.client(*words, folder=folder)


def as_started(
    program: str, *words: str, folder: Path = ROOT, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """The same, or node.py, as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / program), *words],
        cwd=folder,
        input=typed,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=30,
        check=False,
    )


# Who gets in


@pytest.mark.parametrize("process_id", "ABCDEF")
def test_the_user_of_this_machine_is_answered_by_each_process(
    closed: Overlay, process_id: str
) -> None:
    response = closed.ask(process_id)

    assert response.hops[0] == process_id


@pytest.mark.parametrize("verb", ["call", "map", "forward", "parts"])
def test_the_library_speaks_tls(closed: Overlay, verb: str) -> None:
    with overlay.connect(closed.address("A"), tls=closed.folder / "tls") as leader:
        if verb == "call":
            assert leader.call(b"hi", mode="any").result in (b"C: hi", b"D: hi", b"F: hi")
        elif verb == "map":
            assert len(list(leader.map("echo", [b"1", b"2"], mode="any"))) == 2
        elif verb == "forward":
            assert leader.forward(b"hi").hops[0] == "A"
        else:
            assert {part.process_id for part in leader.parts(b"hi")} == set("CDF")


def test_the_folder_beside_the_configuration_is_found(closed: Overlay) -> None:
    host, port = closed.address("A").split(":")

    done = as_started("client.py", host, port, "--payload", "hi", folder=closed.folder)

    assert done.returncode == 0, done.stderr
    assert "3 of 3 workers answered" in done.stdout


def test_a_caller_may_ask_and_not_drain(closed: Overlay, tmp_path: Path) -> None:
    user_of(tls_of(closed), tmp_path / "tls")
    shutil.copy(closed.path, tmp_path)
    host, port = closed.address("A").split(":")

    asked = client(tmp_path, host, port, "--payload", "hi")
    drained = client(tmp_path, host, port, "drain")

    assert asked.returncode == 0, asked.stderr
    assert drained.returncode == 1
    assert "drain is for operators, and the caller is caller anna" in drained.stderr


# Who does not


def _other(closed: Overlay, folder: Path) -> Keys:
    """Of another authority with the same name."""
    other = TlsFolder(folder / "other")
    other.create_authority("office")
    other.write_about("overlay.json", "office", "127.0.0.1:1")
    user_of(other, folder / "his")
    key, certificate = TlsFolder(folder / "his").key_and_certificate(USER)
    return Keys(key, certificate, tls_of(closed).read("ca.pem"))


def _expired(closed: Overlay, folder: Path) -> Keys:
    return Keys.of(user_of(tls_of(closed), folder / "his", valid_s=-DAY_S / 2))


@pytest.mark.parametrize(
    ("keys", "code", "says"),
    [
        (_other, "UNAVAILABLE", ""),  # gRPC itself refuses these, without a reason
        (_expired, "UNAVAILABLE", ""),
        (lambda closed, folder: None, "UNAVAILABLE", ""),
    ],
    ids=["another authority", "expired", "plaintext"],
)
def test_a_stranger_gets_no_further_than_the_handshake(
    closed: Overlay, tmp_path: Path, keys: Callable[..., Any], code: str, says: str
) -> None:
    received = closed.metrics("A").received

    found, details = refusal(closed, keys(closed, tmp_path))

    assert found.name == code
    assert says in details
    assert closed.metrics("A").received == received


def test_the_certificate_of_another_process_does_not_speak_as_this_one(closed: Overlay) -> None:
    keys = Keys.of(tls_of(closed), TlsFolder.stem("C"))
    link = (("overlay-process", "E"),)
    with open_channel(("127.0.0.1",), closed.port("D"), channel_options(), _as_d(keys)) as channel:
        stream = pb2_grpc.OverlayNodeStub(channel).ForwardStream(iter(()), timeout=5, metadata=link)
        with pytest.raises(grpc.RpcError) as refused:
            list(stream)

    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert refused.value.details() == "the caller says it is process E, and is process C"


def _as_d(keys: Keys) -> Keys:
    keys.server_name = lambda process_id="": "d.office.overlay"  # type: ignore[method-assign]
    return keys


def test_a_process_that_is_not_the_expected_one_is_not_asked(closed: Overlay) -> None:
    channel = open_channel(
        ("127.0.0.1",), closed.port("D"), channel_options(), closed.credentials, "C"
    )
    with channel, pytest.raises(grpc.RpcError) as refused:
        pb2_grpc.OverlayNodeStub(channel).Forward(pb2.Request(payload=b"x"), timeout=5)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_revoked_caller_is_refused_and_its_open_stream_ends_within_two_seconds(
    closed: Overlay, tmp_path: Path
) -> None:
    his = TlsFolder(tmp_path / "tls")
    authority = tls_of(closed)
    authority_key = new_key()
    made = authority.issue(signing_request(authority_key), Identity("office", CALLER, "bob"))
    for file in ("ca.pem", "revoked.pem", "overlay.json"):
        his.write(file, authority.read(file))
    his.write_holder(USER, key_pem(authority_key), made)
    ended: list[tuple[float, overlay.CallFailed]] = []

    with overlay.connect(closed.address("A"), tls=his.path, patience_s=2) as leader:
        assert leader.call(b"hi", mode="any")
        waiting = leader.submit("slow", b"8", timeout=20)
        waiting.add_done_callback(lambda done: ended.append((time.monotonic(), done.exception())))
        time.sleep(0.5)
        began = time.monotonic()
        done = client(closed.folder, "revoke", "bob")
        assert done.stdout == "revoked: caller bob\n", done.stderr
        until(lambda: ended, 6)
        with pytest.raises(overlay.CallFailed, match="certificate of caller bob was revoked"):
            leader.forward(b"hi", timeout=3)

    when, error = ended[0]
    assert when - began < 2 + 1.5  # a second and a half for the command itself
    assert "the certificate of caller bob was revoked" in str(error)


# The words of refusals


def why_not_reached(address: str, tls: Path | bool) -> str:
    """What the library says of its connection."""
    with (
        overlay.connect(address, tls=tls, patience_s=1.5) as leader,
        pytest.raises(overlay.client.NotReached) as refused,
    ):
        leader.call(b"hi", timeout=5)
    return str(refused.value)


def test_the_library_says_what_grpc_does_not(closed: Overlay, tmp_path: Path) -> None:
    expired = user_of(tls_of(closed), tmp_path / "expired" / "tls", valid_s=-DAY_S / 2)
    foreign = _foreign(tmp_path / "tls")
    with Hostile("A") as plain:  # at once, as each fails only after the client's patience
        addresses = [closed.address("A")] * 3 + [plain.address]
        shown = [expired.path, foreign.path, False, tls_of(closed).path]
        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(why_not_reached, addresses, shown))

    assert "the certificate of caller anna expired on" in said[0]
    assert (
        "it is not accepted here: the certificate of process A was issued by another overlay"
        in said[1]
    )
    assert "it wants TLS and a certificate" in said[2]
    assert "it speaks plaintext" in said[3]


def _foreign(folder: Path) -> TlsFolder:
    other = TlsFolder(folder.parent / "elsewhere")
    other.create_authority("home")
    other.write_about("overlay.json", "home", "127.0.0.1:1")
    return user_of(other, folder)


def test_a_certificate_that_cannot_be_used_is_a_sentence_and_exit_code_2(
    closed: Overlay, tmp_path: Path
) -> None:
    shutil.copytree(tls_of(closed).path, tmp_path / "tls")
    shutil.copy(closed.path, tmp_path)
    (tmp_path / "tls" / "user.pem").write_text("nothing")
    host, port = closed.address("A").split(":")

    for words in ([host, port, "check"], [host, port], ["doctor", "overlay.json"]):
        done = client(tmp_path, *words)

        assert done.returncode == 2
        assert "tls/user.pem has no key; join this overlay again" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_every_view_of_a_closed_overlay_says_until_when(closed: Overlay) -> None:
    host, port = closed.address("A").split(":")
    verbs = (
        [host, port, "check"],
        [host, port, "top", "--once"],
        ["check", "overlay.json"],
        ["doctor", "overlay.json"],
    )
    for words in verbs:
        done = client(closed.folder, *words)

        assert done.returncode == 0, done.stdout + done.stderr
        found = re.findall(
            r"closed: mutual TLS, certificates until 20\d\d-\d\d-\d\d\n", done.stdout
        )
        assert len(found) == 1, done.stdout


# Joining


def invited(closed: Overlay, name: str, *words: str) -> str:
    done = client(closed.folder, "invite", name, *words)
    assert done.returncode == 0, done.stderr
    return re.search(r"join (overlay-1\S+)", done.stdout)[1]


def test_a_line_lets_one_person_in_once(closed: Overlay, tmp_path: Path) -> None:
    line = invited(closed, "carol")

    first = client(tmp_path, "join", line)
    (tmp_path / "second").mkdir()
    second = client(tmp_path / "second", "join", line)

    assert first.returncode == 0, first.stderr
    assert "tls has the certificate of carol, caller" in first.stdout
    assert (tmp_path / "overlay.json").read_bytes() == closed.path.read_bytes()
    host, port = closed.address("A").split(":")
    assert client(tmp_path, host, port, "--payload", "hi").returncode == 0
    assert second.returncode == 4
    assert "it was used, or is older than 15 minutes" in second.stderr
    assert not (tmp_path / "second" / "tls" / "user.pem").exists()


def _used(closed: Overlay, line: str, folder: Path) -> str:
    assert client(folder, "join", line).returncode == 0
    (folder / "again").mkdir()
    return line


def _late(closed: Overlay, line: str, folder: Path) -> str:
    authority = tls_of(closed)
    path = authority.path / "invitations" / f"{Invitation.parse(line).id}.json"
    text = path.read_text()
    path.write_text(re.sub(r'"until": [0-9.]+', f'"until": {time.time() - 1}', text))
    return line


def _wrong_seed(closed: Overlay, line: str, folder: Path) -> str:
    other = Invitation.create("127.0.0.1", closed.port("A"), Invitation.parse(line).server)
    return str(other)


def _other_server(closed: Overlay, line: str, folder: Path) -> str:
    made = Invitation.parse(line)
    return str(Invitation(made.host, closed.port("B"), made.server, made.seed))


def _nobody(closed: Overlay, line: str, folder: Path) -> str:
    made = Invitation.parse(line)
    return str(Invitation(made.host, free_port(), made.server, made.seed))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (_used, 4, "it was used, or is older than 15 minutes"),
        (_late, 4, "it was used, or is older than 15 minutes"),
        (_wrong_seed, 4, "it was used, or is older than 15 minutes"),
        (_other_server, 4, "is not the process that made this line"),
        (_nobody, 4, "nothing serves there: start the leader"),
        (lambda closed, line, folder: line[:-3], 1, "this is no join line, or not the whole of it"),
    ],
    ids=["used", "late", "wrong seed", "another server", "nothing there", "cut"],
)
def test_a_line_that_does_not_count_is_refused_with_the_reason(
    closed: Overlay, tmp_path: Path, change: Callable[..., str], code: int, says: str
) -> None:
    line = change(closed, invited(closed, "dave"), tmp_path)
    folder = tmp_path / "again" if (tmp_path / "again").exists() else tmp_path

    done = client(folder, "join", line)

    assert says in done.stderr
    assert done.returncode == code
    assert not (folder / "tls" / "user.pem").exists()


def _invitation(closed: Overlay) -> tuple[Invitation, Keys]:
    made = Invitation.parse(invited(closed, "eve"))
    return made, Keys(*made.credentials(), tls_of(closed).read("ca.pem"))


def test_an_invitation_does_nothing_but_join(closed: Overlay) -> None:
    _, keys = _invitation(closed)

    assert refusal(closed, keys) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "an invitation may only join, and nothing else",
    )


def test_an_invitation_signs_for_nobody_else(closed: Overlay) -> None:
    """Its holder has the key of its authority, and makes an operator with it."""
    made, _ = _invitation(closed)
    key = new_key()
    forged = made.authority().issue(key.public_key(), Identity("office", OPERATOR, "root"))
    code, details = refusal(
        closed, Keys(key_pem(key), pem_of(forged), tls_of(closed).read("ca.pem"))
    )

    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "the certificate of operator root was issued by another overlay" in details


def test_one_invitation_does_not_pass_for_another(closed: Overlay) -> None:
    mine, _ = _invitation(closed)
    other = Invitation.parse(invited(closed, "frank", "--operator"))
    key = new_key()
    forged = mine.authority().issue(
        key.public_key(), Identity("invitation", "invitation", other.id)
    )
    keys = Keys(key_pem(key), pem_of(forged), tls_of(closed).read("ca.pem"))
    channel = open_channel(("127.0.0.1",), closed.port("A"), channel_options(), keys)
    with channel, pytest.raises(grpc.RpcError) as refused:
        pb2_grpc.OverlayAdminStub(channel).Join(pb2.JoinRequest(), timeout=5)

    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert other.id in tls_of(closed).guests()


def test_who_is_in_already_cannot_join(closed: Overlay) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        pb2_grpc.OverlayAdminStub(closed.channel("A")).Join(pb2.JoinRequest(), timeout=5)

    assert "only an invitation joins" in refused.value.details()


# Renewal


def test_certificates_are_renewed_under_load_and_no_request_fails(tmp_path: Path) -> None:
    """Of A, which has the authority's key, of C on another machine, and of the users of both."""
    made = Overlay(tmp_path, six_processes(tls="tls"))
    here, there = tls_of(made), TlsFolder(tmp_path / "other machine" / "tls")
    for process_id in "AC":
        _age(here, TlsFolder.stem(process_id), Identity("office", PROCESS, process_id))
    _age(here, USER, Identity("office", OPERATOR, "root"))
    for file in ("ca.pem", "revoked.pem", "overlay.json", "user.pem", "process_c.pem"):
        there.write(file, here.read(file), is_secret=True)
    shutil.copy(made.path, there.path.parent)
    made.files["C"] = str(there.path.parent / made.path.name)
    old = {(f, s): f.certificate(s) for f, s in ((here, "process_a"), (here, USER))}
    old |= {(f, s): f.certificate(s) for f, s in ((there, "process_c"), (there, USER))}
    failed: list[BaseException] = []
    done = threading.Event()

    def load(leader: overlay.Client) -> None:
        while not done.is_set():
            try:
                leader.call(b"x", timeout=10)
            except BaseException as e:  # noqa: BLE001 - the test judges it
                failed.append(e)
            time.sleep(0.005)

    with made, overlay.connect(made.address("A"), tls=here.path) as leader:
        made.start()
        threads = [threading.Thread(target=load, args=(leader,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            until(
                lambda: all(folder.certificate(s) != old[folder, s] for folder, s in old),
                20,
                "new certificates",
            )
            time.sleep(0.5)
        finally:
            done.set()
        for thread in threads:
            thread.join(15)
        made.kill("C")
        made.start("C")  # with the new one
        assert leader.call(b"x", timeout=10).coverage == (3, 3)
    assert failed == []


def _age(folder: TlsFolder, stem: str, identity: Identity) -> None:
    """Makes its certificate 31 days old."""
    key = new_key()
    signed = folder.authority().issue(
        key.public_key(), identity, ("127.0.0.1",), since_s=-31 * DAY_S
    )
    folder.write_holder(stem, key_pem(key), pem_of(signed))


def test_a_process_without_its_certificate_says_what_makes_it(tmp_path: Path) -> None:
    config = six_processes(tls="required")
    path = tmp_path / "overlay.json"
    path.write_text(json.dumps(config))

    done = as_started("node.py", str(path), "C")

    assert done.returncode == 2
    assert "asks for TLS" in done.stderr
    assert "client.py secure overlay.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_everybody_sees_that_an_overlay_is_closed(closed: Overlay) -> None:
    security = closed.metrics("A").security

    assert (security.mode, security.cluster, security.problem) == ("tls", "office", "")
    assert security.expires_s > time.time() + 300 * DAY_S


def test_an_open_invitation_is_over_after_a_while(closed: Overlay) -> None:
    authority = tls_of(closed)
    invitation = Invitation.create("127.0.0.1", closed.port("A"), b"x" * 20)
    old = Guest(
        "old",
        CALLER,
        time.time() - INVITATION_S,
        pem_of(invitation.authority().certificate).decode(),
    )
    authority.invite(invitation, old)

    assert authority.guest(invitation.id) is None


def test_credentials_that_are_broken_while_they_are_used_stay_as_they_were(tmp_path: Path) -> None:
    folder = TlsFolder(tmp_path)
    folder.create_authority("office")
    folder.issue_here(USER, Identity("office", CALLER, "anna"))
    credentials = Credentials.of_user(tmp_path)
    before, _ = credentials.current()

    folder.write(f"{USER}.pem", b"half a fi")
    after, _ = credentials.current()

    assert after == before
    assert "has no key" in credentials.problem


# What a stranger, a caller and a process try


def refusal_of(closed: Overlay, keys: Any, **fields: Any) -> tuple[grpc.StatusCode, str]:
    channel = open_channel(("127.0.0.1",), closed.port("A"), channel_options(), keys)
    with channel, pytest.raises(grpc.RpcError) as refused:
        pb2_grpc.OverlayAdminStub(channel).Join(pb2.JoinRequest(**fields), timeout=5)
    return refused.value.code(), refused.value.details()


def test_the_joiner_cannot_widen_what_it_was_invited_for(closed: Overlay) -> None:
    invitation, keys = _invitation(closed)
    requests = {name: signing_request(new_key()) for name in ("", "B")}

    code, details = refusal_of(closed, keys, signing_requests=requests)

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "needed are those of ['']" in details
    assert invitation.id in tls_of(closed).guests()


def test_a_worker_that_renews_gets_its_own_name_again(closed: Overlay) -> None:
    keys = Keys.of(tls_of(closed), TlsFolder.stem("C"))
    asked = pb2.RenewRequest(signing_request=signing_request(new_key()))
    with open_channel(("127.0.0.1",), closed.port("A"), channel_options(), keys) as channel:
        made = pb2_grpc.OverlayAdminStub(channel).Renew(asked, timeout=5)

    assert tls_of(closed).trust().identify(made.certificate) == Identity("office", PROCESS, "C")


def test_a_thief_does_not_renew_what_was_revoked_this_moment(
    closed: Overlay, tmp_path: Path
) -> None:
    authority, key = tls_of(closed), new_key()
    made = authority.issue(signing_request(key), Identity("office", CALLER, "thief"))
    keys = Keys(key_pem(key), made, authority.read("ca.pem"))
    with open_channel(("127.0.0.1",), closed.port("A"), channel_options(), keys) as channel:
        stub = pb2_grpc.OverlayAdminStub(channel)
        stub.Renew(pb2.RenewRequest(), timeout=5)  # the connection is open
        authority.revoke("thief")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Renew(pb2.RenewRequest(signing_request=signing_request(key)), timeout=5)

    assert "the certificate of caller thief was revoked" in refused.value.details()


def test_a_process_that_says_in_hops_that_it_is_another_is_shown_as_itself(
    closed: Overlay,
) -> None:
    keys = Keys.of(tls_of(closed), TlsFolder.stem("C"))
    keys.server_name = lambda process_id="": "d.office.overlay"  # type: ignore[method-assign]
    request_id = time.monotonic_ns()
    request = pb2.Request(
        payload=b"x", handler="slow", hops=["A", "B"], targets=["D"], request_id=request_id
    )
    with open_channel(("127.0.0.1",), closed.port("D"), channel_options(), keys) as channel:
        with pytest.raises(grpc.RpcError):  # float(b"x") fails, and failures are remembered
            pb2_grpc.OverlayNodeStub(channel).Forward(request, timeout=5)
        found = closed.stub("D").GetMetrics(pb2.MetricsRequest(requests=40), timeout=5)

    callers = [one.caller for one in found.requests if one.request_id == request_id]
    assert callers
    assert all("process C" in caller for caller in callers), callers


def test_many_names_of_one_caller_take_no_share_from_another(
    closed: Overlay, tmp_path: Path
) -> None:
    greedy = Credentials.of_user(user_of(tls_of(closed), tmp_path / "tls").path)
    request = pb2.Request(payload=b"0.5", mode=pb2.ANY, handler="slow")
    assert closed.ask("A").hops  # so that there is another caller

    with open_channel(("127.0.0.1",), closed.port("A"), channel_options(), greedy) as channel:
        ask = pb2_grpc.OverlayNodeStub(channel).Forward.future
        crowd = [
            ask(request, timeout=20, metadata=(("overlay-caller", f"n{number}"),))
            for number in range(480)
        ]
        assert closed.ask("A", timeout=5).hops
        until(lambda: all(one.done() for one in crowd), 20)
        refused = {one.details() for one in crowd if one.code() is not grpc.StatusCode.OK}

    assert refused == {
        "caller anna has 100 of 200 queue slots, and others have sent requests recently"
    }


# Handshakes

JUNK = [
    b"",
    b"\x16\x03\x01",  # the first bytes of a ClientHello
    b"\x16\x03\x01\x3f\xff" + b"\x01" * 100,  # a long one that does not come
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    bytes(range(256)) * 8,
]


def test_handshakes_that_never_end_keep_nobody_out_and_are_ended(closed: Overlay) -> None:
    import socket

    from tests.harness.under_attack import raise_descriptor_limit

    raise_descriptor_limit(6000)
    before, pid = closed.metrics("A"), closed.metrics("A").pid
    memory = _rss(pid)
    strangers = []
    try:
        for number in range(2400):
            one = socket.create_connection(("127.0.0.1", closed.port("A")), 5)
            strangers.append(one)
            with contextlib.suppress(OSError):
                one.sendall(JUNK[number % len(JUNK)])
        took = []
        for _ in range(5):  # each over a new connection
            began = time.monotonic()
            assert asked(closed, Keys.of(tls_of(closed))).hops[0] == "A"
            took.append(time.monotonic() - began)
        grown = _rss(pid) - memory
        until(lambda: not any(map(_is_open, strangers)), 15, "the strangers' connections closed")
    finally:
        for one in strangers:
            one.close()

    assert min(took) < 1, took
    assert grown < 100 << 20
    assert closed.metrics("A").pid == pid
    assert closed.metrics("A").received - before.received <= 6


def _rss(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).memory_info().rss)


def _is_open(one: Any) -> bool:
    one.setblocking(False)
    try:
        while data := one.recv(4096):
            del data
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# Join lines


def test_the_secret_of_a_line_is_kept_nowhere_on_either_side(
    closed: Overlay, tmp_path: Path
) -> None:
    line = invited(closed, "quiet")
    joined = client(tmp_path, "join", line)
    assert joined.returncode == 0, joined.stderr
    secret = line.rpartition(".")[2]

    for folder in (closed.folder, tmp_path):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in joined.stdout + joined.stderr


def test_a_line_can_be_typed_so_that_no_list_of_processes_has_it(
    closed: Overlay, tmp_path: Path
) -> None:
    line = invited(closed, "typed")

    done = as_started("client.py", "join", folder=tmp_path, typed=line + "\n")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tls" / "user.pem").exists()


def test_a_line_of_another_overlay_replaces_no_certificates(
    closed: Overlay, tmp_path: Path
) -> None:
    folder = _foreign(tmp_path / "tls")
    before = folder.read("user.pem")
    line = invited(closed, "guest")

    done = client(tmp_path, "join", line)

    assert done.returncode == 2
    assert "has the certificates of another overlay, home" in done.stderr
    assert folder.read("user.pem") == before
    assert Invitation.parse(line).id in tls_of(closed).guests()


# At the start


def test_a_process_whose_certificate_expired_says_so_and_what_to_do(tmp_path: Path) -> None:
    made = Overlay(tmp_path, six_processes(tls="tls"))
    folder, key = tls_of(made), new_key()
    identity = Identity("office", PROCESS, "C")
    old = folder.authority().issue(key.public_key(), identity, valid_s=-DAY_S / 2)
    folder.write_holder(TlsFolder.stem("C"), key_pem(key), pem_of(old))
    (folder.path / "ca.key").unlink()  # as on another machine

    done = as_started("node.py", str(made.path), "C")

    assert done.returncode == 2
    assert "the certificate of process C expired on" in done.stderr
    assert "client.py invite NAME" in done.stderr


def test_secure_replaces_what_has_expired_on_its_own_machine(tmp_path: Path) -> None:
    made = Overlay(tmp_path, six_processes(tls="tls"))
    folder, key = tls_of(made), new_key()
    old = folder.authority().issue(
        key.public_key(), Identity("office", PROCESS, "A"), valid_s=-DAY_S / 2
    )
    folder.write_holder("process_a", key_pem(key), pem_of(old))
    kept = folder.read("process_b.pem")

    done = client(tmp_path, "secure", "overlay.json")

    assert done.returncode == 0, done.stderr
    assert "certificates made for 1 process: A" in done.stdout
    assert Credentials.of_process(folder.path, "A").certificate_problem == ""
    assert folder.read("process_b.pem") == kept


# Another authority


def test_the_authority_is_replaced_while_all_serve(tmp_path: Path) -> None:
    """D, E and F are on another machine, with a folder that has no key of an authority."""
    config = six_processes(tls="tls")
    made = Overlay(tmp_path, config)
    here, there = tls_of(made), TlsFolder(tmp_path / "elsewhere" / "tls")
    shutil.copytree(here.path, there.path)
    for name in ("ca.key", "issued"):
        path = there.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(made.path, tmp_path / "elsewhere")
    for process_id in "DEF":
        made.files[process_id] = "elsewhere/overlay.json"
    old = here.read("ca.pem")
    failed: list[BaseException] = []
    done = threading.Event()

    def load() -> None:
        with overlay.connect(made.address("A"), tls=here.path) as leader:
            while not done.is_set():
                try:
                    assert len(leader.call(b"x", timeout=10).missing) == 0
                except BaseException as e:  # noqa: BLE001 - the test judges it
                    failed.append(e)
                time.sleep(0.005)

    def step() -> str:
        found = client(tmp_path, "secure", "overlay.json", "--new-authority")
        assert found.returncode == 0, found.stderr
        return found.stdout

    def is_everywhere() -> bool:
        return there.read("ca.pem") == here.read("ca.pem")

    def are_new() -> bool:
        both = ((here, "ABC"), (there, "DEF"))
        return all(
            folder.trust().is_of_first(folder.certificate(TlsFolder.stem(process_id)))
            for folder, ids in both
            for process_id in ids
        )

    thread = threading.Thread(target=load)
    try:
        made.start()
        thread.start()
        assert "step 1 of 3" in step()
        until(is_everywhere, 10, "the new authority on the other machine")
        assert "step 2 of 3" in step()
        until(lambda: is_everywhere() and are_new(), 20, "certificates of the new authority")
        assert failed == []
        assert "step 3 of 3" in step()  # ends what was opened before step 2
        until(is_everywhere, 10, "the new authority alone")
        time.sleep(1)
        done.set()
        thread.join(15)
        for channel in made._channels.values():  # which know only the old authority
            channel.close()
        made._channels.clear()
        for process_id in "CF":  # with what is in their folders now
            made.kill(process_id)
            made.start(process_id)
        assert made.ask("A").hops[0] == "A"
    finally:
        done.set()
        thread.join(15)
        made.stop()
    assert len(failed) < 10, failed
    assert not set(read_authorities(old)) & set(read_authorities(there.read("ca.pem")))


# Servers of jobs


def test_a_machine_that_runs_a_server_of_jobs_alone_joins_and_is_put_out(tmp_path: Path) -> None:
    journal = "nats://127.0.0.1:4907,127.0.0.2:4907,127.0.0.3:4907"  # nothing serves there
    made = Overlay(tmp_path / "here", six_processes(tls="tls", journal=journal))
    there = tmp_path / "there"
    there.mkdir()
    with made:
        made.start("A")
        unknown = client(made.folder, "invite", "pc", "--host", "127.0.0.9")
        joined = client(there, "join", invited(made, "pc", "--host", "127.0.0.2", "--operator"))
    server, leader = (client(made.folder, "revoke", name) for name in ("127.0.0.2-4907", "A"))

    assert "no process has the host '127.0.0.9'; there are 127.0.0.1, 127.0.0.2" in unknown.stderr
    assert joined.returncode == 0, joined.stderr
    assert "and those of the servers 127.0.0.2-4907. Start them:" in joined.stdout
    held = Credentials.of_server(there / "tls", "127.0.0.2-4907")
    assert str(held.identity) == "server 127.0.0.2-4907"
    assert "still let it join them until it expires: replace the authority" in server.stdout
    assert "give this leader another id in overlay.json" in leader.stdout
