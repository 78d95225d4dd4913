"""`client.py revoke NAME`: the certificates of that name count no more, within two seconds."""

from __future__ import annotations

import argparse
import sys

from overlay.cli.identity import folder_option, issuing
from overlay.cli.identity.invite import identity_name
from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.usage import Parser, complain
from overlay.model.errors import ConfigError


def arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", type=identity_name, help="as 'identities' shows it")
    folder_option(parser)


def run(args: argparse.Namespace) -> int:
    try:
        folder, _ = issuing(args.tls)
        gone = folder.revoke(args.name)
    except ConfigError as e:
        return misconfigured(e)
    if not gone:
        complain(f"no certificate in use is that of '{args.name}'; 'identities' shows which are")
        return Exit.FAILED
    for identity in dict.fromkeys(gone):
        Screen(sys.stdout).say(f"revoked: {identity}")
    return Exit.OK
