"""`client.py secure CONFIG`: gives an overlay its certificates, and closes it to everybody else.

Run on the leader's machine, where the authority's key stays. Running it again changes nothing that
is there, adds what is missing or ends within a month, and prints new lines for the other machines.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
from pathlib import Path

from overlay.cli.identity import joining, starting, this_user
from overlay.cli.identity.invite import invite
from overlay.cli.init import replace_file
from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.text import counted
from overlay.cli.usage import Parser, program
from overlay.model.config import load
from overlay.model.errors import ConfigError, OverlayError
from overlay.model.identity import OPERATOR, PROCESS, SERVER, Identity
from overlay.model.jobs_servers import JobsServer
from overlay.model.topology import TLS_FOLDER, Process, Topology
from overlay.security.certificates import read_certificate, seconds_left
from overlay.security.credentials import WARN_S
from overlay.security.tls_folder import USER, Guest, TlsFolder, cluster_name
from overlay.transport.machine import is_here, is_ours


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "--name",
        type=str,
        metavar="NAME",
        default="",
        help="of the person at this machine, who gets an operator's certificate (default: the "
        "name of this account)",
    )
    parser.add_argument(
        "--new-authority",
        action="store_true",
        help="replace the authority, in three steps with this option, each after the processes "
        "have run for a minute",
    )


def run(args: argparse.Namespace) -> int:
    report = Screen(sys.stdout)
    path = Path(args.config)
    try:
        topology = load(path)
        leader = topology.leader
        here = [p for p in topology.processes.values() if is_here(p)]
        servers = [server for server in topology.jobs_servers if is_ours(server.host)]
        if leader not in here:
            raise ConfigError(
                f"the leader {leader.id} is at {leader.host}, which is not this machine: run this "
                f"there, and '{program()} join LINE' here with the line that it prints"
            )
        folder = TlsFolder(topology.tls_folder or topology.folder / TLS_FOLDER)
        if args.new_authority:
            report.say(folder.change_authority())
        _prepare(report, folder, topology, here, servers, args.name or this_user())
        if not topology.tls:
            _write_key(path)
            report.say(f'{path} says "tls": "{TLS_FOLDER}" now: its processes refuse plaintext')
        _say_next(report, folder, topology, here, servers, path)
    except ConfigError as e:
        return misconfigured(e)
    return Exit.OK


def _prepare(
    report: Screen,
    folder: TlsFolder,
    topology: Topology,
    here: list[Process],
    servers: list[JobsServer],
    name: str,
) -> None:
    """What is missing of the authority, and of this machine's certificates or about to expire."""
    if not folder.exists:
        folder.create_authority(cluster_name(topology.name, secrets.token_hex(2)))
        report.say(f"{folder.path / 'ca.key'} is new: whoever has this file can let anybody in")
    elif not folder.can_issue:
        raise ConfigError(
            f"{folder.path} has certificates but no ca.key: this overlay was secured on another "
            f"machine; do it there"
        )
    cluster = folder.authority().cluster
    folder.write_about(topology.name, cluster, topology.leader.address)
    holders = {Identity(cluster, PROCESS, p.id): p.certified_hosts for p in here}
    holders |= {Identity(cluster, SERVER, one.name): (one.host,) for one in servers}
    made = []
    for holder, hosts_of in holders.items():
        stem = TlsFolder.stem_of(holder)
        if not _is_good(folder, stem):
            folder.issue_here(stem, holder, hosts_of)
            made.append(holder)
    if not _is_good(folder, USER):
        folder.issue_here(USER, Identity(cluster, OPERATOR, name))
        report.say(f"{folder.holder(USER)} is new: with it, {name} is an operator")
    for kind in (PROCESS, SERVER):
        if names := [holder.name for holder in made if holder.kind == kind]:
            report.say(f"certificates made for {counted(len(names), kind)}: {', '.join(names)}")


def _is_good(folder: TlsFolder, stem: str) -> bool:
    """Whether there is a certificate, of the authority that signs now, that lasts a month yet."""
    try:
        held = folder.key_and_certificate(stem)[1]
        trust = folder.trust()
        trust.identify(held)
        certificate = read_certificate(held)
        return trust.is_of_first(certificate) and seconds_left(certificate) > WARN_S
    except OverlayError:  # missing, expired or revoked
        return False


def _write_key(path: Path) -> None:
    """Adds "tls" as the first key; the file keeps its layout."""
    before = path.read_bytes()
    wanted = {"tls": TLS_FOLDER, **json.loads(before.decode("utf-8-sig"))}
    line = f'\n  "tls": "{TLS_FOLDER}",'.encode()
    after = re.sub(rb"^((?:\xef\xbb\xbf)?\s*\{)", lambda found: found[1] + line, before, count=1)
    if json.loads(after.decode("utf-8-sig")) != wanted:
        after = json.dumps(wanted, indent=2, ensure_ascii=False).encode() + b"\n"
    replace_file(path, after)


def _say_next(
    report: Screen,
    folder: TlsFolder,
    topology: Topology,
    here: list[Process],
    servers: list[JobsServer],
    path: Path,
) -> None:
    away = [p for p in topology.processes.values() if p not in here]
    servers_away = [one for one in topology.jobs_servers if one not in servers]
    hosts = dict.fromkeys([p.host for p in away] + [one.host for one in servers_away])
    report.say("Now start this machine's processes, and restart those that run already:")
    for command in starting(str(path)):
        report.say(f"  {command}")
    if not hosts:
        return
    report.say("Then, on each other machine, within 15 minutes, in a copy of this folder:")
    for host in hosts:
        name = f"{this_user()}-{re.sub(r'[^A-Za-z0-9-]+', '-', host)}"[:64].strip("-")
        ids = tuple(p.id for p in away if p.host == host)
        names = tuple(one.name for one in servers_away if one.host == host)
        line = invite(folder, topology, Guest(name, OPERATOR, 0, "", ids, (host,), names))
        report.say(f"  at {host}, for {', '.join((*ids, *names))}:")
        for command in joining(line):
            report.say(f"    {command}")
