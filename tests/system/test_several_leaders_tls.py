"""Several leaders that keep the same jobs, with certificates everywhere, on real processes and real
NATS servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import overlay
from overlay.cli.doctor import examine
from overlay.client.jobs import Job
from overlay.model.config import load
from overlay.model.errors import CallFailed, NameNotFound
from overlay.monitor.diagnosis import Grade
from overlay.security.certificates import DAY_S, age_s, read_certificate
from overlay.security.tls_folder import TlsFolder
from overlay.transport.tls_check import peer_certificate
from tests.harness.certificates import certify, user_of
from tests.harness.cluster import Overlay, until
from tests.harness.leaders import LEADERS, everybody, holder, three_leaders
from tests.harness.nats_servers import NatsServers

MINE = """
def upper(payload, context):
    return payload.upper()
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    made = NatsServers(tmp_path_factory.mktemp("nats"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def closed(servers: NatsServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """The certificate of the first server was made 31 days ago."""
    folder = tmp_path_factory.mktemp("closed") / "three"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    config = three_leaders(servers.journal, tls="tls", handlers={"upper": "mine:upper"})
    with Overlay(folder, config) as found:
        servers.tls, servers.leaders = TlsFolder(folder / "tls"), LEADERS
        certify(servers.tls, servers.servers[0], since_s=-31 * DAY_S)
        servers.start_all()
        found.start()
        until(lambda: holder(found), 60, "a leader has the jobs")
        yield found


def connected(closed: Overlay, tls: Path | None = None) -> overlay.Client:
    return overlay.connect(everybody(closed), tls=tls or closed.folder / "tls")


def test_a_job_belongs_to_its_caller_whichever_leader_has_it(
    closed: Overlay, tmp_path: Path
) -> None:
    authority = TlsFolder(closed.folder / "tls")
    anna, bob = (user_of(authority, tmp_path / name, name).path for name in ("anna", "bob"))
    with connected(closed, anna) as hers, connected(closed, bob) as his:
        job = hers.later("upper", b"hello")
        assert job.result(30) == b"HELLO"
        with pytest.raises(NameNotFound):
            his.job(job.id).status()
    with connected(closed) as operator:
        assert operator.job(job.id).result(30) == b"HELLO"


def test_a_process_renews_the_certificate_of_its_machines_server(
    closed: Overlay, servers: NatsServers
) -> None:
    def age_of_shown() -> float:
        pem = peer_certificate(("127.0.0.1",), servers.servers[0].port, 5)
        return age_s(read_certificate(pem))

    until(lambda: age_of_shown() < DAY_S, 30, "the server shows a new certificate")
    with connected(closed) as leaders:
        assert leaders.later("upper", b"and goes on").result(30) == b"AND GOES ON"


def test_doctor_sees_a_server_that_was_started_without_certificates(
    closed: Overlay, servers: NatsServers
) -> None:
    def bad() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for process, one in examine(load(closed.path), "overlay.json").journal:
            if one.grade is Grade.BAD:
                found.setdefault(process.id, []).append(one.state)
        return found

    until(lambda: bad() == {}, 30, "all is well")
    servers.kill(2)
    tls, servers.tls = servers.tls, None
    servers.start(2)
    servers.wait()
    open_one = f"server {servers.addresses[2]}"
    until(lambda: "not protected" in bad().get(open_one, ()), 30, "it is found")
    servers.kill(2)
    servers.tls = tls
    servers.start(2)
    servers.wait()
    until(lambda: bad() == {}, 60, "all is well again")


def test_when_a_leader_dies_with_its_server_another_goes_on(
    closed: Overlay, servers: NatsServers
) -> None:
    with connected(closed) as leaders:
        before = [leaders.later("upper", b"before %d" % n, key=f"b{n}") for n in range(50)]
        at = holder(closed)
        os.kill(closed.processes[at].pid, signal.SIGKILL)
        servers.kill(LEADERS.index(at))

        def submitted() -> Job | None:
            try:
                return leaders.later("upper", b"after", key="after", timeout=10)
            except CallFailed:
                return None

        after = until(submitted, 60, "jobs are accepted again")
        assert after.result(60) == b"AFTER"
        answers = [job.result(60) for job in before]
    assert answers == [b"BEFORE %d" % n for n in range(50)]
    assert holder(closed) not in ("", at)
