"""The NATS servers of this machine that keep the jobs of several leaders.

Each has its configuration and its data in a folder beside the overlay's configuration (nats-4222),
and its log and pid file with those of the processes. They are stopped after all processes, and stay
when those are restarted: nothing of theirs changes with the program.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from processes import TOKEN, Files, Record, Refused, apart, config_of, create_time, record_of, shown

from overlay.model.jobs_servers import JobsServer, configuration
from overlay.model.topology import Process, Topology
from overlay.transport.machine import is_here
from overlay.transport.resolver import connect, look_up

ACCEPTS_S = 15.0  # within which a server that was started accepts connections
RANK = -1  # below the workers: it is ended last


def servers_here(topology: Topology) -> Iterator[tuple[JobsServer, Process]]:
    """Those of this machine, each also as if it were a process of the overlay, for its files."""
    for server in topology.jobs_servers:
        log_dir = topology.leader.log_dir
        shape = Process(
            f"nats-{server.port}", "worker", "", server.host, server.port, log_dir=log_dir
        )
        if is_here(shape):
            yield server, shape


def start_servers(topology: Topology, started: list[Record]) -> None:
    """Starts those of this machine that do not run. Raises Refused."""
    found = list(servers_here(topology))
    for server, shape in found:
        record = record_of(topology, shape)
        if not (record and record.process()):
            started.append(_spawn(topology, server, shape))
    until = time.monotonic() + ACCEPTS_S
    for server, shape in found:
        while not _accepts(server):
            record = record_of(topology, shape)
            if time.monotonic() > until or not (record and record.process()):
                log = shown(Files(topology, shape).out)
                raise Refused(f"the NATS server on {server.address} does not come up; see {log}")
            time.sleep(0.05)


def _spawn(topology: Topology, server: JobsServer, shape: Process) -> Record:
    files, folder = Files(topology, shape), topology.folder / shape.id
    path, token = folder / "nats.conf", secrets.token_hex(8)
    size = topology.limits.journal_bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.out.parent.mkdir(parents=True, exist_ok=True)
        data = (folder / "data").as_posix()
        path.write_text(configuration(server, topology.jobs_servers, data, size), encoding="utf-8")
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
