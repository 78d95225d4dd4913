"""`client.py join LINE`: takes this machine, or this person, into an overlay.

Fetches the certificates and the configuration; nothing that is here already is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

from overlay.cli.identity import folder_option, starting
from overlay.cli.init import replace_file
from overlay.cli.terminal import Exit, Screen, exit_of, misconfigured
from overlay.cli.usage import Parser, complain, is_installed, program
from overlay.client.enrolment import Joining, Offer
from overlay.model.errors import CallFailed, ConfigError
from overlay.security.tls_folder import TlsFolder


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "line",
        metavar="LINE",
        nargs="*",
        help="as 'secure' or 'invite' printed it; asked for if missing, so that it is in no list "
        "of processes",
    )
    folder_option(parser)


def run(args: argparse.Namespace) -> int:
    report = Screen(sys.stdout)
    folder = TlsFolder(Path(args.tls))
    try:
        with closing(Joining("".join(args.line) or _asked())) as joining:
            offer = joining.look()
            path = folder.path.absolute().parent / offer.configuration_name
            _check_room(folder, path, joining.cluster)
            joining.join(offer, folder)
        _keep_configuration(report, path, offer)
    except CallFailed as e:
        complain(str(e))
        return exit_of(e)
    except ConfigError as e:
        return misconfigured(e)
    report.say(f"{folder.path} has the certificate of {offer.name}, {offer.kind}")
    config = offer.configuration_name
    if not (offer.processes or offer.servers):
        host, _, port = folder.about()["leader"].rpartition(":")
        python = "" if is_installed() else "python3 "
        report.say(f"Try it: {python}{program()} {host.strip('[]')} {port} check")
        return Exit.OK
    kinds = (("processes", offer.processes), ("servers", offer.servers))
    holders = " and the ".join(f"{kind} {', '.join(names)}" for kind, names in kinds if names)
    report.say(f"and those of the {holders}. Start them:")
    for command in starting(config):
        report.say(f"  {command}")
    return Exit.OK


def _asked() -> str:
    print("The line: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _check_room(folder: TlsFolder, configuration: Path, cluster: str) -> None:
    """Raises ConfigError before the invitation is used up for nothing."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{folder.path} cannot be made: {e.strerror or e}") from None
    for place in (configuration.parent, folder.path):
        if not os.access(place, os.W_OK):
            raise ConfigError(f"{place} cannot be written to")
    if configuration.exists() and not configuration.is_file():
        raise ConfigError(f"{configuration} is in the way: the configuration comes there")
    if folder.can_issue:
        raise ConfigError(
            f"{folder.path} is the folder of an authority, which joins nobody; name another folder "
            f"with --tls, or join in another copy of the project"
        )
    other = folder.about().get("cluster", cluster)
    if other != cluster:
        raise ConfigError(
            f"{folder.path} has the certificates of another overlay, {other}; delete it if that is "
            f"no more, or name another folder with --tls"
        )


def _keep_configuration(report: Screen, path: Path, offer: Offer) -> None:
    try:
        before = path.read_bytes() if path.exists() else None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from None
    if before == offer.configuration:
        return
    if before is not None:
        kept = path.with_name(f"{path.name}.before")
        replace_file(kept, before, is_configuration=False)
        report.say(f"{path.name} was another one here; it is kept as {kept.name}")
    replace_file(path, offer.configuration)
    report.say(f"{path.name} is as on the leader's machine")
