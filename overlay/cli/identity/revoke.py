"""`client.py revoke NAME`: the certificates of that name count no more, within two seconds."""

from __future__ import annotations

import argparse
import sys

from overlay.cli.identity import folder_option, issuing
from overlay.cli.identity.invite import identity_name
from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.usage import Parser, complain, program
from overlay.model.errors import ConfigError
from overlay.model.identity import PROCESS, SERVER, Identity
from overlay.model.topology import Topology


def arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", type=identity_name, help="as 'identities' shows it")
    folder_option(parser)


def run(args: argparse.Namespace) -> int:
    try:
        folder, topology = issuing(args.tls)
        gone = folder.revoke(args.name)
    except ConfigError as e:
        return misconfigured(e)
    if not gone:
        complain(f"no certificate in use is that of '{args.name}'; 'identities' shows which are")
        return Exit.FAILED
    report = Screen(sys.stdout)
    for identity in dict.fromkeys(gone):
        report.say(f"revoked: {identity}")
        if advice := _advice(identity, topology):
            report.say(advice)
    return Exit.OK


def _advice(identity: Identity, topology: Topology) -> str:
    """What else shuts this holder out of the jobs' servers, which know no revocations."""
    if not topology.jobs_servers:
        return ""
    if identity.kind == SERVER:
        return (
            f"The servers of jobs still let it join them until it expires: replace the authority, "
            f"with '{program()} secure {topology.name} --new-authority'"
        )
    leaders = [leader.id for leader in topology.leaders]
    if identity.kind == PROCESS and identity.name in leaders:
        return (
            f"The servers of jobs still let it in until it expires: give this leader another id in "
            f"{topology.name}, on each machine, and restart there, or replace the authority"
        )
    return ""
