"""The verbs about certificates, one file each, and what they share: whose overlay it is."""

from __future__ import annotations

import getpass
import re
from pathlib import Path

from overlay.cli.usage import Parser, is_installed, program
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.topology import TLS_FOLDER, Topology
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import TlsFolder


def folder_option(parser: Parser) -> None:
    parser.add_argument(
        "--tls",
        metavar="FOLDER",
        default=TLS_FOLDER,
        help="the folder of the certificates, beside the configuration (default: %(default)s)",
    )


def issuing(path: str) -> tuple[TlsFolder, Topology]:
    """The folder and the configuration of the overlay that this machine issues for.

    Raises ConfigError.
    """
    folder = TlsFolder(Path(path))
    if not folder.exists:
        raise ConfigError(
            f"there are no certificates in {folder.path.absolute()}; '{program()} secure CONFIG' "
            f"on the leader's machine makes them"
        )
    if not folder.can_issue:
        leader = folder.about().get("leader", "the leader")
        raise ConfigError(
            f"{folder.path} has no ca.key, so nothing can be issued or revoked here; do it on the "
            f"machine of {leader}"
        )
    return folder, load(folder.path.absolute().parent / folder.about().get("configuration", ""))


def joining(line: Invitation) -> list[str]:
    """The commands that take a line; in the project's folder also where nothing is set up yet."""
    if is_installed():
        return [f"{program()} join {line}"]
    return [
        rf"Windows      py scripts\run.py join {line}",
        f"Mac, Linux   python3 scripts/run.py join {line}",
    ]


def starting(config: str) -> list[str]:
    """The commands that start a machine's processes."""
    if is_installed():
        return [f"overlay-node {config} ID   (for each of them)"]
    return [
        rf"Windows      scripts\start_windows.bat {config}",
        f"Mac, Linux   scripts/start_macos.sh {config}",
    ]


def this_user() -> str:
    """A name for the person at this machine, of what may be in a name."""
    try:
        found = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        found = ""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", found).strip("-")[:40] or "me"
