"""The log of several leaders on real NATS servers with certificates: who gets in, and who not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from overlay.jobs.jetstream import JetStreamLog, reload
from overlay.jobs.log import LogAway, Outrun
from overlay.jobs.server_tls import ServerTls
from overlay.model.identity import PROCESS, Identity
from overlay.model.jobs_servers import CLUSTER
from overlay.security.certificates import DAY_S, key_pem, new_key, pem_of
from overlay.security.credentials import Credentials
from overlay.security.tls_folder import USER, TlsFolder
from overlay.transport.tls_check import peer_certificate
from tests.harness.certificates import certify, secured, user_of
from tests.harness.cluster import until
from tests.harness.leaders import LEADERS, three_leaders
from tests.harness.nats_servers import NatsServers, last, log_on


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    """Three servers with certificates, which let in three leaders."""
    made = protected(tmp_path_factory.mktemp("closed"))
    try:
        yield made.start_all()
    finally:
        made.close()


def protected(folder: Path) -> NatsServers:
    made = NatsServers(folder)
    made.tls = secured(folder, three_leaders(made.journal, tls="tls"))
    made.leaders = LEADERS
    return made


def authority(closed: NatsServers) -> TlsFolder:
    assert closed.tls is not None
    return closed.tls


def leader(closed: NatsServers, id_: str = "A1") -> Credentials:
    return Credentials.of_process(authority(closed).path, id_)


def own(closed: NatsServers, number: int = 0) -> Credentials:
    return Credentials.of_server(authority(closed).path, closed.servers[number].name)


@pytest.fixture(scope="module")
def log(closed: NatsServers) -> Iterator[JetStreamLog]:
    made = log_on(closed, "TLS", leader(closed))
    yield made
    made.close()


def test_leaders_read_and_write_the_log(
    closed: NatsServers, log: JetStreamLog, tmp_path: Path
) -> None:
    at = last(log)
    for number in range(3):
        log.append(at + number, b"x" * 300_000)
    (tmp_path / "file").write_bytes(b"snapshot")
    log.save(at + 2, tmp_path / "file")
    other = log_on(closed, "TLS", leader(closed, "A3"))
    try:
        assert [len(body) for _, body in other.entries(at + 1)] == [300_000] * 2
        assert other.load(tmp_path / "read") == at + 2
    finally:
        other.close()


# Who gets in


def options(credentials: Credentials) -> dict[str, Any]:
    return {
        **ServerTls(credentials).options(),
        "allow_reconnect": False,
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": 0.1,
    }


def caller(closed: NatsServers, folder: Path) -> Credentials:
    return Credentials.of_user(user_of(authority(closed), folder / "tls").path)


OTHERS: dict[str, Callable[[NatsServers, Path], Credentials]] = {
    "caller": caller,
    "operator": lambda closed, folder: Credentials.of_user(authority(closed).path),
    "worker": lambda closed, folder: leader(closed, "C"),
    "team leader": lambda closed, folder: leader(closed, "B"),
}


def answer_of(place: tuple[str, int], asked: bytes, holder: Path | None = None) -> bytes:
    """Over TLS, with the key and certificate in the holder; what this side believes is nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if holder is not None:
        context.load_cert_chain(holder)
    said = b""
    with contextlib.suppress(OSError), socket.create_connection(place, 5) as plain:
        plain.settimeout(3)
        with context.wrap_socket(plain) as stream:
            stream.sendall(asked)
            while b"PONG" not in said and (data := stream.recv(65536)):
                said += data
    return said


PLAIN = b"CONNECT {}\r\nPING\r\n"
FORGED = b"CONNECT {}\r\nPUB overlay.jobs.TLS 6\r\nforged\r\nSUB > 1\r\nPING\r\n"


@pytest.mark.parametrize("who", OTHERS)
def test_who_is_no_leader_is_nobody_to_the_servers(
    closed: NatsServers, log: JetStreamLog, tmp_path: Path, who: str
) -> None:
    credentials, at = OTHERS[who](closed, tmp_path), last(log)
    place, folder = ("127.0.0.1", closed.servers[0].port), credentials.folder

    said = answer_of(place, FORGED, folder.holder(credentials.stem))

    assert b"Authorization Violation" in said
    assert b"PONG" not in said
    assert last(log) == at
    assert b"PONG" in answer_of(place, PLAIN, authority(closed).holder(TlsFolder.stem("A1")))


def test_a_servers_own_certificate_reads_and_writes_no_jobs(
    closed: NatsServers, log: JetStreamLog
) -> None:
    at, heard = last(log), []

    async def said(error: Exception) -> None:
        heard.append(str(error))

    async def tries() -> None:
        client = await nats.connect(
            [f"nats://{closed.addresses[0]}"], **options(own(closed)), error_cb=said
        )
        try:
            await client.publish("overlay.jobs.TLS", b"forged")
            await client.publish("$SYS.REQ.SERVER.PING.CONNZ", reply=client.new_inbox())
            await client.subscribe("overlay.jobs.>")
            await client.subscribe("$SYS.>")
            await client.flush(5)
            with pytest.raises(nats.errors.Error):
                await client.jetstream(timeout=2).stream_info("TLS")
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(tries(), 30))
    assert last(log) == at
    for what in ("publish to", "subscription to"):
        assert sum(what in one.lower() for one in heard) >= 2, heard


ROUTE = b'CONNECT {"verbose":false,"pedantic":false,"name":"x","cluster":"overlay"}\r\nPING\r\n'


def joined(closed: NatsServers, holder: Path) -> bytes:
    """What a server says to another server that shows this."""
    return answer_of(("127.0.0.1", closed.servers[0].port + CLUSTER), ROUTE, holder)


@pytest.mark.parametrize("who", OTHERS)
def test_who_is_no_server_joins_no_servers(closed: NatsServers, tmp_path: Path, who: str) -> None:
    credentials = OTHERS[who](closed, tmp_path)

    assert b"Authorization Violation" in joined(closed, credentials.folder.holder(credentials.stem))


def test_a_leader_does_not_join_the_servers_and_a_server_does(closed: NatsServers) -> None:
    folder = authority(closed)

    assert b"Authorization Violation" in joined(closed, folder.holder(TlsFolder.stem("A1")))
    assert b"PONG" in joined(closed, folder.holder(own(closed, 1).stem))


@pytest.mark.parametrize("offset", [0, CLUSTER], ids=["client port", "cluster port"])
def test_a_stranger_is_told_nothing(closed: NatsServers, tmp_path: Path, offset: int) -> None:
    place = "127.0.0.1", closed.servers[0].port + offset
    foreign = TlsFolder(tmp_path / "other")
    foreign.create_authority("office")
    foreign.issue_here(USER, Identity("office", PROCESS, "A1"))
    said = b""
    with contextlib.suppress(OSError), socket.create_connection(place, 5) as plain:
        plain.settimeout(15)
        plain.sendall(ROUTE)
        while data := plain.recv(4096):
            said += data

    assert b"INFO" not in said
    assert answer_of(place, ROUTE) == b""
    assert answer_of(place, ROUTE, foreign.holder(USER)) == b""


# What leaders do not talk to


def _plain(alone: NatsServers) -> Credentials:
    credentials = leader(alone)
    alone.tls = None
    return credentials


def _foreign(alone: NatsServers) -> Credentials:
    other = TlsFolder(alone.folder / "other")
    other.create_authority("office")
    certify(authority(alone), alone.servers[0], signed_by=other.authority())
    return leader(alone)


def _expired(alone: NatsServers) -> Credentials:
    certify(authority(alone), alone.servers[0], valid_s=-DAY_S / 2)
    return leader(alone)


def _revoked(alone: NatsServers) -> Credentials:
    authority(alone).revoke(alone.servers[0].name)
    return leader(alone)


def _process(alone: NatsServers) -> Credentials:
    folder = authority(alone)
    stem = TlsFolder.server_stem(alone.servers[0].name)
    folder.write_holder(stem, *folder.key_and_certificate(TlsFolder.stem("C")))
    return leader(alone)


def _late(alone: NatsServers) -> Credentials:
    _hold(authority(alone), "A1", valid_s=-DAY_S / 2)
    return leader(alone)


def _hold(folder: TlsFolder, process_id: str, **more: Any) -> None:
    key, identity = new_key(), Identity("office", PROCESS, process_id)
    made = folder.authority().issue(key.public_key(), identity, **more)
    folder.write_holder(TlsFolder.stem(process_id), key_pem(key), pem_of(made))


def _unlisted(alone: NatsServers) -> Credentials:
    alone.leaders = LEADERS[1:]
    return leader(alone)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_plain, "it speaks plaintext, and this side wants TLS"),
        (_foreign, "it is not accepted here: .*issued by another overlay"),
        (_expired, "the certificate of server .* expired on"),
        (_revoked, "the certificate of server .* was revoked"),
        (_process, "it shows the certificate of process C, which is no server"),
        (_late, "the certificate of process A1 expired on"),
        (_unlisted, "the servers do not take process A1 for a leader: they run with another"),
    ],
)
def test_why_a_leader_and_a_server_do_not_come_together_is_said(
    tmp_path: Path,
    change: Callable[[NatsServers], Credentials],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("overlay.jobs.jetstream.APPEND_S", 2.0)
    alone = protected(tmp_path)
    credentials = change(alone)
    alone.start(0)
    alone.wait()
    log = JetStreamLog(alone.addresses[:1], 8 << 20, "ALONE", credentials)
    try:
        with pytest.raises(LogAway, match=says):
            log.origin()
    finally:
        log.close()
        alone.close()


def test_a_server_that_does_not_know_the_authority_is_said(tmp_path: Path) -> None:
    """As when the authority was replaced, and the server has not read that."""
    alone = protected(tmp_path)
    alone.start(0)
    alone.wait()
    folder = authority(alone)
    for _ in range(2):
        folder.change_authority()
    _hold(folder, "A1")
    log = JetStreamLog(alone.addresses[:1], 8 << 20, "ALONE", leader(alone))
    try:
        with pytest.raises(LogAway, match="it does not know the authority of this side's"):
            log.origin()
    finally:
        log.close()
        alone.close()


# What changes while they run


def test_a_server_shows_its_new_certificate_without_a_restart(
    closed: NatsServers, log: JetStreamLog
) -> None:
    server, folder = closed.servers[1], authority(closed)
    before = peer_certificate(("127.0.0.1",), server.port, 5)
    at = log.append(last(log), b"before")
    certify(folder, server)
    assert peer_certificate(("127.0.0.1",), server.port, 5) == before

    reload(server, own(closed, 1))

    shown = peer_certificate(("127.0.0.1",), server.port, 5)
    assert shown.split() == folder.key_and_certificate(own(closed, 1).stem)[1].split()
    assert log.append(at, b"after") == at + 1


def test_a_leader_that_was_shut_out_and_let_in_again_goes_on(
    closed: NatsServers, log: JetStreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overlay.jobs.jetstream.APPEND_S", 2.0)
    at = log.append(last(log), b"before")

    def let_in(leaders: Sequence[str]) -> None:
        closed.leaders = leaders
        for number, server in enumerate(closed.servers):
            closed.configure(number)
            reload(server, own(closed, number))

    def refusal() -> str:
        try:
            log.append(at, b"after")
        except LogAway as e:
            return str(e)
        except Outrun:  # by what it could not write before
            pass
        return ""

    let_in(LEADERS[1:])
    try:
        until(lambda: "do not take process A1 for a leader" in refusal(), 30, "it is shut out")
    finally:
        let_in(LEADERS)
    until(lambda: not refusal(), 30, "it is let in again")


def test_another_authority_shuts_out_a_leader_whose_key_was_stolen(tmp_path: Path) -> None:
    """Which a revocation does not, as the servers know none."""
    servers = protected(tmp_path)
    folder, place = authority(servers), ("127.0.0.1", servers.servers[0].port)
    stolen = tmp_path / "stolen.pem"
    stolen.write_bytes(folder.holder(TlsFolder.stem("A1")).read_bytes())

    def all_read() -> None:
        for number, server in enumerate(servers.servers):
            reload(server, own(servers, number))

    try:
        log = log_on(servers.start_all(), "JOBS", leader(servers))
        at = log.append(last(log), b"before")
        folder.revoke("A1")
        assert b"PONG" in answer_of(place, PLAIN, stolen)
        folder.change_authority()
        all_read()
        folder.change_authority()
        for server in servers.servers:
            identity = own(servers, servers.servers.index(server)).identity
            folder.issue_here(TlsFolder.stem_of(identity), identity, (server.host,))
        folder.issue_here(TlsFolder.stem("A1"), Identity("office", PROCESS, "A1"))
        all_read()
        for person in ("A2", "A3", "B", "C", "D", "root"):
            folder.revoke(person)
        assert folder.change_authority().startswith("step 3 of 3")
        all_read()
        assert answer_of(place, PLAIN, stolen) == b""
        assert b"PONG" in answer_of(place, PLAIN, folder.holder(TlsFolder.stem("A1")))
        assert log.append(at, b"after") == at + 1
        log.close()
    finally:
        servers.close()


def test_a_server_that_does_not_run_is_not_told(tmp_path: Path) -> None:
    alone = protected(tmp_path)

    reload(alone.servers[0], own(alone))


def test_a_leader_shows_its_new_certificate_at_the_next_connection(closed: NatsServers) -> None:
    log = log_on(closed, "RENEWED", leader(closed, "A2"))
    try:
        _hold(authority(closed), "A2")
        _, renewed = authority(closed).key_and_certificate(TlsFolder.stem("A2"))
        at = last(log)
        time.sleep(1.1)  # the certificate is looked at once a second
        at = log.append(at, b"before")
        assert fingerprint_of(renewed) not in shown_to(closed, 0)
        closed.kill(0)

        def appended() -> bool:
            try:
                return log.append(last(log), b"after") > at
            except LogAway:
                return False

        until(appended, 30, "it is connected again")
        assert fingerprint_of(renewed) in shown_to(closed, 1) | shown_to(closed, 2)
    finally:
        log.close()
        closed.start(0)
        closed.wait()


def fingerprint_of(pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()


def shown_to(closed: NatsServers, number: int) -> set[str]:
    """Of which certificates a server has connections."""
    port = closed.servers[number].monitor_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/connz?auth=1", timeout=5) as answer:
        found = json.load(answer)
    return {
        shown["cert_sha256"]
        for one in found["connections"]
        for shown in one.get("tls_peer_certs", ())
    }


def test_the_jobs_of_open_servers_are_there_when_they_are_closed(tmp_path: Path) -> None:
    servers = protected(tmp_path)
    tls, servers.tls = servers.tls, None
    try:
        open_log = log_on(servers.start_all(), "JOBS")
        at = open_log.append(last(open_log), b"before")
        open_log.close()
        for number in range(3):
            servers.kill(number)
        servers.tls = tls
        log = log_on(servers.start_all(), "JOBS", leader(servers))
        assert log.entries(at - 1) == [(at, b"before")]
        assert log.append(at, b"after") == at + 1
        log.close()
    finally:
        servers.close()
