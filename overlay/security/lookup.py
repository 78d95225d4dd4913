"""Which certificates a program of this machine uses for an address; few have any.

So what reads certificates, which takes a while to import, is imported only where there are some.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from overlay.model.addresses import is_loopback, is_wildcard
from overlay.model.errors import ConfigError
from overlay.model.program import CLIENT
from overlay.model.topology import TLS_FOLDER, Topology

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

Tls = str | Path | bool | None
"""A folder of certificates; None: the one that is found, if any; False: plaintext."""

PROJECT = Path(__file__).resolve().parent.parent.parent
USER_FILE, ABOUT_FILE = "user.pem", "overlay.json"


def credentials_for(host: str, port: int, tls: Tls = None) -> Credentials | None:
    """Those of this machine's user for the process there; None for plaintext.

    Without a folder in `tls` it is the folder "tls" in the current folder or the project's, where
    the configuration that belongs to it has a process with this port. On 127.0.0.1 a process that
    has TLS at another address serves plaintext. Raises ConfigError.
    """
    if tls is False:
        return None
    if isinstance(tls, (str, Path)):
        return _of_user(Path(tls))
    for place in dict.fromkeys((Path.cwd(), PROJECT)):
        folder = place / TLS_FOLDER
        if (folder / USER_FILE).exists() and _is_spoken(folder, host, port):
            return _of_user(folder)
    return None


def credentials_of(topology: Topology) -> Credentials | None:
    """Those of this machine's user for an overlay whose configuration is known.

    Raises ConfigError, with what makes them.
    """
    folder = topology.tls_folder
    if folder is None:
        return None
    try:
        return _of_user(folder)
    except ConfigError as e:
        raise needs_certificates(topology, e) from None


def needs_certificates(topology: Topology, problem: ConfigError) -> ConfigError:
    """The same problem, with what makes the certificates that the configuration asks for."""
    return ConfigError(
        f"{topology.name} asks for TLS, and {problem}; the leader's machine makes certificates "
        f"with '{CLIENT} secure {topology.name}', others with '{CLIENT} join LINE'"
    )


def _of_user(folder: Path) -> Credentials:
    from overlay.security.credentials import Credentials

    return Credentials.of_user(folder)


def _is_spoken(folder: Path, host: str, port: int) -> bool:
    """Whether TLS is, by the configuration that the folder belongs to."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
        text = (folder.parent / about["configuration"]).read_text("utf-8-sig")
        entries = [one for one in json.loads(text)["processes"].values() if one["port"] == port]
        listens = {str(one.get("bind") or one["host"]).strip("[]") for one in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return not is_loopback(host)
    if not is_loopback(host):
        return bool(entries)
    return any(is_loopback(one) or is_wildcard(one) for one in listens)
