"""Certificates for the overlays of the tests, as `client.py secure` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overlay.model.identity import CALLER, OPERATOR, PROCESS, Identity
from overlay.security.certificates import Authority, key_pem, new_key, pem_of
from overlay.security.tls_folder import USER, TlsFolder

CLUSTER = "office"


def secured(folder: Path, config: dict[str, Any], cluster: str = CLUSTER) -> TlsFolder:
    """The folder `config["tls"]` with an authority and certificates for all its processes; its
    user is an operator."""
    made = TlsFolder(folder / config["tls"])
    made.create_authority(cluster)
    for process_id, entry in config["processes"].items():
        hosts = (entry["host"], "127.0.0.1", "localhost")
        made.issue_here(TlsFolder.stem(process_id), Identity(cluster, PROCESS, process_id), hosts)
    made.issue_here(USER, Identity(cluster, OPERATOR, "root"))
    leader = next(one for one in config["processes"].values() if one["role"] == "leader")
    made.write_about("overlay.json", cluster, f"{leader['host']}:{leader['port']}")
    return made


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
