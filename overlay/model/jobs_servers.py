"""The NATS servers that keep the jobs of several leaders: their addresses, and their configuration.

    "journal": "nats://a:4222,b:4222,c:4222"

Each has two more ports, as NATS's own defaults do: 2000 higher for the other servers, 4000 higher,
on 127.0.0.1 only, where `doctor` looks at it.

With certificates all of them want one of this overlay, and map it to a user of theirs: leaders may
do everything with the jobs, a server may be joined by another server, and the holder of a server's
own certificate may make it read its files anew. Everybody else is nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from overlay.model.addresses import join_address
from overlay.model.identity import PROCESS, SERVER, Identity, any_server
from overlay.model.limits import MIB

SCHEME = "nats://"
FEWEST = 3
PAYLOAD_BYTES = 8 * MIB  # of a message: more than that NATS advises against
CLUSTER, MONITOR = 2000, 4000  # ports above the server's own
LONGEST_HOST = 58  # characters of it in the server's name
HANDSHAKE_S = 5  # NATS's 2 are few for a busy machine
ID_SUBJECT, RELOAD_SUBJECT = "$SYS.REQ.SERVER.PING.IDZ", "$SYS.REQ.SERVER.{}.RELOAD"


class JobsServer(NamedTuple):
    host: str
    port: int

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    @property
    def name(self) -> str:
        """By which the other servers know it, and its certificate."""
        return f"{re.sub('[^A-Za-z0-9._-]', '-', self.host)[:LONGEST_HOST]}-{self.port}"

    @property
    def cluster_address(self) -> str:
        return join_address(self.host, self.port + CLUSTER)

    @property
    def monitor_port(self) -> int:
        return self.port + MONITOR


class Protection(NamedTuple):
    """What protects a server. cluster: of the certificates. holder: the file of its own and its
    key; authorities: those it trusts. leaders: the ids of the processes that may use the jobs."""

    cluster: str
    holder: Path
    authorities: Path
    leaders: Sequence[str]


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
    if len({server.name for server in servers}) < len(servers):
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
    server: JobsServer,
    servers: Sequence[JobsServer],
    folder: str,
    journal_bytes: int,
    protection: Protection | None = None,
) -> str:
    """The file of one of them, for nats-server. folder: where it keeps what it is given."""
    routes = ", ".join(f'"nats-route://{one.cluster_address}"' for one in servers)
    most = 2 * stream_bytes(journal_bytes) + 64 * MIB
    lines = (
        "# Made by run.py from the overlay's configuration at each start.",
        f"server_name: {_quoted(server.name)}",
        f"listen: {_quoted(server.address)}",
        f"http: {_quoted(f'127.0.0.1:{server.monitor_port}')}",
        f"max_payload: {PAYLOAD_BYTES}",
        "jetstream {",
        f"  store_dir: {_quoted(folder)}",
        "  sync_interval: always  # or what it has confirmed is lost with the power",
        "  max_memory_store: 64MB",
        f"  max_file_store: {most}",
        "}",
        *(_users(server, protection) if protection else ()),
        "cluster {",
        "  name: overlay",
        f"  listen: {_quoted(server.cluster_address)}",
        f"  routes: [{routes}]",
        *(_joining(protection) if protection else ()),
        "}",
    )
    return "\n".join(lines) + "\n"


def _users(server: JobsServer, protection: Protection) -> Iterator[str]:
    """Who may connect to it, by the URIs of their certificates."""
    cluster = protection.cluster
    leaders = (Identity(cluster, PROCESS, id_).uri for id_ in protection.leaders)
    own = Identity(cluster, SERVER, server.name).uri
    may_publish = [ID_SUBJECT, RELOAD_SUBJECT.format("*")]
    yield "tls {"
    yield from _keys(protection)
    yield "  handshake_first: true  # or a stranger is told about the servers before it"
    yield "}"
    yield "authorization {"
    yield f"  users: [{', '.join(f'{{user: {_quoted(leader)}}}' for leader in leaders)}]"
    yield "}"
    yield "accounts {"  # in the account that the jobs are in without certificates, too
    yield "  $SYS {"
    yield f"    users: [{{user: {_quoted(own)}, permissions: {{"
    yield f'      publish: [{", ".join(map(_quoted, may_publish))}], subscribe: "_INBOX.>"'
    yield "    }}]"
    yield "  }"
    yield "}"


def _joining(protection: Protection) -> Iterator[str]:
    """Only a server's certificate has this name. Without `verify_and_map` any certificate of the
    overlay would do, a caller's too, and who joins sees and writes everything."""
    yield f"  authorization {{user: {_quoted(any_server(protection.cluster))}}}"
    yield "  tls {"
    yield from (f"  {line}" for line in _keys(protection))
    yield "  }"


def _keys(protection: Protection) -> Iterator[str]:
    holder, authorities = (
        _quoted(path.as_posix()) for path in (protection.holder, protection.authorities)
    )
    yield f"  cert_file: {holder}"
    yield f"  key_file: {holder}"
    yield f"  ca_file: {authorities}"
    yield "  verify_and_map: true"
    yield f"  timeout: {HANDSHAKE_S}"


def _quoted(text: str) -> str:
    """NATS reads no \\u escapes."""
    return json.dumps(text, ensure_ascii=False)
