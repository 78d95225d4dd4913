"""Certificates for the overlays of the tests, as `client.py secure` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overlay.model.identity import CALLER, OPERATOR, PROCESS, SERVER, Identity
from overlay.model.jobs_servers import JobsServer, servers_in
from overlay.security.certificates import Authority, key_pem, new_key, pem_of
from overlay.security.tls_folder import USER, TlsFolder

CLUSTER = "office"


def secured(folder: Path, config: dict[str, Any], cluster: str = CLUSTER) -> TlsFolder:
    """The folder `config["tls"]` with an authority and certificates for all its processes and
    servers of jobs; its user is an operator."""
    made = TlsFolder(folder / config["tls"])
    made.create_authority(cluster)
    for process_id, entry in config["processes"].items():
        hosts = (entry["host"], "127.0.0.1", "localhost")
        made.issue_here(TlsFolder.stem(process_id), Identity(cluster, PROCESS, process_id), hosts)
    for server in servers_in(config.get("journal", "")):
        server_identity = Identity(cluster, SERVER, server.name)
        made.issue_here(TlsFolder.stem_of(server_identity), server_identity, (server.host,))
    made.issue_here(USER, Identity(cluster, OPERATOR, "root"))
    leader = next(one for one in config["processes"].values() if one["role"] == "leader")
    made.write_about("overlay.json", cluster, f"{leader['host']}:{leader['port']}")
    return made


def certify(authority: TlsFolder, server: JobsServer, **more: Any) -> None:
    """Another certificate for a server of jobs. more: as for Authority.issue."""
    signs: Authority = more.pop("signed_by", authority.authority())
    identity, key = Identity(signs.cluster, SERVER, server.name), new_key()
    certificate = pem_of(signs.issue(key.public_key(), identity, (server.host,), **more))
    authority.write_holder(TlsFolder.stem_of(identity), key_pem(key), certificate)


def user_of(
    authority: TlsFolder,
    folder: Path,
    name: str = "anna",
    kind: str = CALLER,
    **more: Any,
) -> TlsFolder:
    """Another machine's folder, for a person of this overlay. more: as for Authority.issue."""
    key, cluster = new_key(), authority.authority().cluster
    identity = more.pop("identity", Identity(cluster, kind, name))
    signs: Authority = more.pop("signed_by", authority.authority())
    certificate = pem_of(signs.issue(key.public_key(), identity, **more))
    made = TlsFolder(folder)
    for file in ("ca.pem", "revoked.pem", "overlay.json"):
        made.write(file, authority.read(file))
    made.write_holder(USER, key_pem(key), certificate)
    return made
