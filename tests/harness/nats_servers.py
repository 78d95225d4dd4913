"""Real NATS servers on this machine, configured as `run.py` configures them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from overlay.jobs.jetstream import JetStreamLog
from overlay.jobs.log import LogAway
from overlay.jobs.server_tls import protection_of
from overlay.model.jobs_servers import CLUSTER, MONITOR, JobsServer, configuration
from overlay.security.credentials import Credentials
from overlay.security.tls_folder import TlsFolder
from tests.harness.cluster import until
from tests.harness.machine import own_ports

PROGRAM = str(Path(sys.executable).with_name("nats-server"))
JOURNAL_BYTES = 64 << 20


class NatsServers:
    """Three of them. tls: the folder of their certificates, if they have some; leaders: the ids
    whose certificates they let in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tls: TlsFolder | None = None
        self.leaders: Sequence[str] = ()
        self.servers = [JobsServer("127.0.0.1", port) for port in free_server_ports(3)]
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    @property
    def journal(self) -> str:
        return "nats://" + ",".join(self.addresses)

    def start(self, number: int, sync: str = "always") -> None:
        path = self.configure(number, sync)
        with open(self.folder / f"nats{number}.log", "ab") as out:
            self._running[number] = subprocess.Popen(
                [PROGRAM, "-c", str(path)], stdout=out, stderr=subprocess.STDOUT
            )

    def configure(self, number: int, sync: str = "always") -> Path:
        """Writes the file of one, which it reads when it starts or is told to."""
        path = self.folder / f"nats{number}.conf"
        store = (self.folder / f"store{number}").as_posix()
        server, protection = self.servers[number], None
        if self.tls is not None:
            own = Credentials.of_server(self.tls.path, server.name)
            protection = protection_of(own, self.leaders)
        text = configuration(server, self.servers, store, JOURNAL_BYTES, protection)
        path.write_text(text.replace("sync_interval: always", f"sync_interval: {sync}"), "utf-8")
        return path

    def start_all(self) -> NatsServers:
        for number in range(3):
            self.start(number)
        self.wait()
        return self

    def kill(self, number: int) -> None:
        found = self._running.pop(number, None)
        if found is not None:
            found.kill()
            found.wait()

    def wait(self) -> None:
        """Until all that were started accept connections."""
        for number in self._running:
            until(lambda n=number: _accepts(self.servers[n].port), 20, f"server {number}")

    def close(self) -> None:
        for number in list(self._running):
            self.kill(number)


@contextlib.contextmanager
def nats_servers(folder: Path) -> Iterator[NatsServers]:
    made = NatsServers(folder)
    try:
        yield made.start_all()
    finally:
        made.close()


def log_on(servers: NatsServers, name: str, credentials: Credentials | None = None) -> JetStreamLog:
    """A stream of this name, once the servers have made it."""
    made = JetStreamLog(servers.addresses, 8 << 20, name, credentials)

    def is_there() -> bool:
        try:
            return bool(made.origin())
        except LogAway:
            return False

    until(is_there, 30, f"the stream {name}")
    return made


def last(log: JetStreamLog) -> int:
    """The number of its last entry."""
    after = 0
    while found := log.entries(after):
        after = found[-1][0]
    return after


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def free_server_ports(count: int) -> list[int]:
    """Each with the two more that belong to a server."""
    found: list[int] = []
    ports = own_ports()
    for port in ports[: -max(CLUSTER, MONITOR) : 7]:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for offset in (0, CLUSTER, MONITOR):
                taken = held.enter_context(socket.socket())
                taken.bind(("127.0.0.1", port + offset))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"there are no free ports from {ports[0]} to {ports[-1]}")
