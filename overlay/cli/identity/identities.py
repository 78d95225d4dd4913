"""`client.py identities`: whose certificates are in use, until when, and who is invited."""

from __future__ import annotations

import argparse
import sys

from overlay.cli.identity import folder_option, issuing
from overlay.cli.terminal import Exit, Screen, misconfigured
from overlay.cli.usage import Parser
from overlay.model import clocks
from overlay.model.errors import ConfigError
from overlay.security.certificates import identity_of, seconds_left, time_problem
from overlay.security.tls_folder import TlsFolder

COLUMNS = ("name", "kind", "until", "")


def arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    folder_option(parser)


def run(args: argparse.Namespace) -> int:
    try:
        folder, _ = issuing(args.tls)
        rows = _rows(folder)
    except ConfigError as e:
        return misconfigured(e)
    report = Screen(sys.stdout)
    if args.json:
        keys = ("name", "kind", "until", "note")
        report.json({"ok": True, "identities": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        report.table("identities", COLUMNS, rows)
    return Exit.OK


def _rows(folder: TlsFolder) -> list[tuple[str, str, str, str]]:
    newest: dict[tuple[str, str], float] = {}
    problems = {}
    for _, certificate in folder.issued():
        identity = identity_of(certificate)
        key = identity.kind, identity.name
        until = clocks.time() + seconds_left(certificate)
        if until > newest.get(key, 0.0):
            newest[key], problems[key] = until, time_problem(certificate)
    rows = [
        (name, kind, clocks.utc_day(until), problems[kind, name])
        for (kind, name), until in sorted(newest.items(), key=lambda one: (one[0][0], one[0][1]))
    ]
    for guest in folder.guests().values():
        minutes = max(1, round((guest.until - clocks.time()) / 60))
        what = ", ".join((guest.name, *guest.processes))
        rows.append((what, guest.kind, f"{minutes} min", "invited, not here yet"))
    return rows
