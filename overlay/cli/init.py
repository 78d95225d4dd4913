"""`client.py init [CONFIG]`: writes the addresses of this network into a configuration file.

Only the hosts change: the file keeps its layout, and is written completely or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.text import counted
from overlay.cli.usage import Parser, complain, host, is_installed, program
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.topology import Topology
from overlay.transport.machine import own_addresses
from overlay.transport.resolver import look_up, prefetch

OF_ONE_HOST = "one_host_config.json"
HERE = "here"  # an answer that stands for this machine's address
LOOPBACK = ("127.", "::1")


def arguments(parser: Parser) -> None:
    parser.add_argument(
        "--host",
        metavar="OLD=NEW",
        type=_change,
        action="append",
        help="an address in the file and the one to put in its place, instead of being asked; may "
        "be repeated",
    )


def run(args: argparse.Namespace) -> int:
    path = Path(args.config)
    try:
        topology = load(path)
        hosts = _hosts(topology)
        changes = _checked(hosts, args.host) if args.host else _asked(hosts, path)
        write(path, changes)
    except ConfigError as e:
        return misconfigured(e)
    except EOFError:
        print()
        complain(f"an answer is missing; {path} is unchanged")
        return Exit.USAGE
    written: dict[str, list[str]] = {}
    for old, ids in hosts.items():
        written.setdefault(changes.get(old, old), []).extend(ids)
    _say_next(Screen(sys.stdout), path, written, is_closed=bool(topology.tls))
    return Exit.OK


def _hosts(topology: Topology) -> dict[str, list[str]]:
    """The addresses of the file, each with its processes as text."""
    found: dict[str, list[str]] = {}
    for process in topology.processes.values():
        found.setdefault(process.host, []).append(f"{process.id} ({process.role})")
    return found


def _change(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not OLD=NEW, for example 192.168.1.1=10.0.0.5"
        )
    return old, host(new)


def _checked(hosts: Mapping[str, object], changes: list[tuple[str, str]]) -> dict[str, str]:
    for old, _ in changes:
        if old not in hosts:
            raise ConfigError(f"no process has the host '{old}'; there are {', '.join(hosts)}")
    return dict(changes)


def _asked(hosts: Mapping[str, list[str]], path: Path) -> dict[str, str]:
    """What a person at the terminal answers; Enter keeps an address. Raises EOFError."""
    own = [address for address in own_addresses() if not address.startswith(LOOPBACK)]
    print(
        f"{path} has {counted(len(hosts), 'machine')}. This one: {' or '.join(own) or 'no network'}"
    )
    if len(hosts) > 1:
        print(
            f"One machine is enough: answer '{HERE}' each time, or leave this and start "
            f"{OF_ONE_HOST}, which is made for one."
        )
    changes = {}
    for old, ids in hosts.items():
        while True:
            answer = input(f"Address of the machine with {', '.join(ids)} [{old}]: ").strip() or old
            if answer.lower() == HERE:
                answer = (own or ["127.0.0.1"])[0]
            try:
                changes[old] = host(answer)
                break
            except argparse.ArgumentTypeError as e:
                print(f"{e}; write one like 192.168.1.7, a name, or '{HERE}' for this machine")
    return changes


def write(path: Path, changes: Mapping[str, str]) -> None:
    """Changes the hosts of the processes. Raises ConfigError and leaves the file as it was."""
    replace_file(path, _changed(path.read_bytes(), changes))


def replace_file(path: Path, after: bytes, is_configuration: bool = True) -> None:
    """Writes it whole or not at all, a configuration only if it is right. Raises ConfigError."""
    try:
        with tempfile.TemporaryDirectory(prefix=".init-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_bytes(after)
            if is_configuration:
                load(written)
            os.replace(written, path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror or e}") from None


def _changed(before: bytes, changes: Mapping[str, str]) -> bytes:
    wanted = _with_hosts(json.loads(before.decode("utf-8-sig")), changes)

    def replaced(found: re.Match[bytes]) -> bytes:
        old = json.loads(found[2])
        return found[1] + json.dumps(changes.get(old, old)).encode()

    # In the text, so that the file keeps the layout that its owner gave it.
    after = re.sub(rb'("host"\s*:\s*)("(?:[^"\\]|\\.)*")', replaced, before)
    if json.loads(after.decode("utf-8-sig")) == wanted:
        return after
    return json.dumps(wanted, indent=2, ensure_ascii=False).encode() + b"\n"


def _with_hosts(raw: dict[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    processes = {
        key: {**entry, "host": changes.get(entry["host"], entry["host"])}
        for key, entry in raw["processes"].items()
    }
    return {**raw, "processes": processes}


def _say_next(report: Screen, path: Path, hosts: Mapping[str, list[str]], is_closed: bool) -> None:
    own = own_addresses()
    prefetch(hosts)
    named = {address: look_up(address) for address in hosts}
    mine = {address for address, found in named.items() if set(found.addresses) & set(own)}
    for address, ids in hosts.items():
        here = "  (this machine)" if address in mine else ""
        report.say(f"{named[address].shown()}: {', '.join(ids)}{here}")
    for found in named.values():
        if found.why:
            report.say(f"Careful: {found.why}.")
    if not mine:
        report.say(f"Careful: none of them is an address of this machine ({', '.join(own)}).")
    if len(hosts) > 1 and any(found.is_loopback for found in named.values()):
        report.say("Careful: 127.0.0.1 and localhost mean each machine itself, and no other one.")
    if len(hosts) > 1 and not is_closed:
        report.say(f"Written to {path}. Next, on the leader's machine:")
        report.say(f"  {_secure()} {path}")
        report.say("It closes the overlay to everybody else, and prints a line for each machine.")
        report.say("Or, without certificates, copy the file to every machine and start it on each:")
    elif len(hosts) > 1:
        report.say(
            f"Written to {path}. Copy it to every machine and start it on each, in any order:"
        )
    else:
        report.say(f"Written to {path}. It is for one machine; start it there:")
    if is_installed():
        report.say(f"  overlay-node {path} ID   (for each of its processes)")
    else:
        report.say(rf"  Windows   scripts\start_windows.bat {path}")
        report.say(f"  Mac       scripts/start_macos.sh {path}")
    there = "on any of them" if len(hosts) > 1 else "there"
    client = program() if is_installed() else f"python {program()}"
    report.say(f"Then, {there}: {client} doctor {path}")


def _secure() -> str:
    if is_installed():
        return f"{program()} secure"
    return r"py scripts\run.py secure" if os.name == "nt" else "python3 scripts/run.py secure"
