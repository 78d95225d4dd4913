"""The NATS servers that keep the jobs of several leaders: their addresses, and their configuration.

    "journal": "nats://a:4222,b:4222,c:4222"

Each has two more ports, as NATS's own defaults do: 2000 higher for the other servers, 4000 higher,
on 127.0.0.1 only, where `doctor` looks at it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from overlay.model.addresses import join_address
from overlay.model.limits import MIB

SCHEME = "nats://"
FEWEST = 3
PAYLOAD_BYTES = 8 * MIB  # of a message: more than that NATS advises against
CLUSTER, MONITOR = 2000, 4000  # ports above the server's own


class JobsServer(NamedTuple):
    host: str
    port: int

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    @property
    def cluster_address(self) -> str:
        return join_address(self.host, self.port + CLUSTER)

    @property
    def monitor_port(self) -> int:
        return self.port + MONITOR


def servers_in(journal: str) -> tuple[JobsServer, ...]:
    """Those that a journal names; none if it is a file. Raises ValueError."""
    if not journal.startswith(SCHEME):
        return ()
    found = []
    for text in journal[len(SCHEME) :].split(","):
        host, colon, port = text.strip().rpartition(":")
        is_number = port.isascii() and port.isdigit() and len(port) < 6
        if not (colon and host and is_number and 0 < int(port) <= 65535 - MONITOR):
            raise ValueError(
                f"'{text.strip()[:60]}' is not host:port with a port up to {65535 - MONITOR}"
            )
        found.append(JobsServer(host.strip("[]"), int(port)))
    return tuple(found)


def problem_of(servers: Sequence[JobsServer]) -> str:
    """Why these cannot keep jobs; empty if they can."""
    if len(set(servers)) < len(servers):
        return "a server is named twice"
    if len(servers) < FEWEST:
        return (
            f"{len(servers)} servers have no majority when one of them is lost: name at least "
            f"{FEWEST}, on {FEWEST} machines; the journal of one leader can be a file"
        )
    if len({server.host for server in servers}) == 2:
        return (
            "two machines have no majority when the one with more servers is lost: the third "
            "server needs a machine of its own (a small one will do, it need not run a process)"
        )
    return ""


def stream_bytes(journal_bytes: int) -> int:
    """What the servers may keep: the changes since the last snapshot, and as much for snapshots."""
    return 3 * journal_bytes + 256 * MIB


def configuration(
    server: JobsServer, servers: Sequence[JobsServer], folder: str, journal_bytes: int
) -> str:
    """The file of one of them, for nats-server. folder: where it keeps what it is given."""
    routes = ", ".join(f'"nats-route://{one.cluster_address}"' for one in servers)
    most = 2 * stream_bytes(journal_bytes) + 64 * MIB
    name = f"{server.host}-{server.port}".replace(":", "-")
    lines = (
        "# Made by run.py from the overlay's configuration at each start.",
        f"server_name: {_quoted(name)}",
        f"listen: {_quoted(server.address)}",
        f"http: {_quoted(f'127.0.0.1:{server.monitor_port}')}",
        f"max_payload: {PAYLOAD_BYTES}",
        "jetstream {",
        f"  store_dir: {_quoted(folder)}",
        "  sync_interval: always  # or what it has confirmed is lost with the power",
        "  max_memory_store: 64MB",
        f"  max_file_store: {most}",
        "}",
        "cluster {",
        "  name: overlay",
        f"  listen: {_quoted(server.cluster_address)}",
        f"  routes: [{routes}]",
        "}",
    )
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """NATS reads no \\u escapes."""
    return json.dumps(text, ensure_ascii=False)
