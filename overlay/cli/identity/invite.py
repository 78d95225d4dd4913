"""`client.py invite NAME`: a line that lets one more person, program or machine in, once."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from overlay.cli.identity import folder_option, issuing, joining
from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.usage import Parser
from overlay.model import clocks
from overlay.model.errors import ConfigError
from overlay.model.identity import CALLER, OPERATOR, check_name
from overlay.model.topology import Topology
from overlay.security.certificates import INVITATION_S, fingerprint, pem_of
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import Guest, TlsFolder


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "name",
        metavar="NAME",
        type=identity_name,
        help="of the person or program, for example anna",
    )
    add("--operator", action="store_true", help="who may also drain processes and read all logs")
    add(
        "--host",
        metavar="HOST",
        default="",
        help="the line is for this machine of the configuration, and for its processes and servers",
    )
    folder_option(parser)


def run(args: argparse.Namespace) -> int:
    try:
        folder, topology = issuing(args.tls)
        ids = tuple(p.id for p in topology.processes.values() if p.host == args.host)
        servers = tuple(one.name for one in topology.jobs_servers if one.host == args.host)
        if args.host and not (ids or servers):
            of_processes = [p.host for p in topology.processes.values()]
            of_servers = [one.host for one in topology.jobs_servers]
            hosts = ", ".join(dict.fromkeys(of_processes + of_servers))
            raise ConfigError(f"no process has the host '{args.host}'; there are {hosts}")
        kind = OPERATOR if args.operator else CALLER
        hosts_ = (args.host,) if args.host else ()
        line = invite(folder, topology, Guest(args.name, kind, 0, "", ids, hosts_, servers))
    except ConfigError as e:
        return misconfigured(e)
    report = Screen(sys.stdout)
    also = f" and the processes {', '.join(ids)}" if ids else ""
    also += f" and the servers {', '.join(servers)}" if servers else ""
    report.say(f"Lets {args.name}, {kind},{also} in, once, within 15 minutes:")
    for command in joining(line):
        report.say(f"  {command}")
    return Exit.OK


def invite(folder: TlsFolder, topology: Topology, guest: Guest) -> Invitation:
    """An open invitation for this guest."""
    leader = topology.leader
    server = fingerprint(pem_of(folder.certificate(TlsFolder.stem(leader.id))))
    invitation = Invitation.create(leader.host, leader.port, server)
    until = clocks.time() + INVITATION_S
    authority = pem_of(invitation.authority().certificate).decode()
    folder.invite(invitation, replace(guest, until=until, authority=authority))
    return invitation


def identity_name(text: str) -> str:
    try:
        return check_name(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a name: up to 64 letters, digits, dots, underscores and hyphens"
        ) from None
