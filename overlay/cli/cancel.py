"""`client.py HOST PORT cancel ID...`: ends jobs where they wait or run, and schedules."""

from __future__ import annotations

import argparse
import sys

from overlay.cli import job_text
from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.usage import Parser, complain, job_id, shared_options
from overlay.client import sync as library
from overlay.client.job_status import JobChange
from overlay.model.addresses import join_address

DEADLINE_S = 10.0


def arguments(parser: Parser) -> None:
    parser.usage = f"{parser.prog} ID ... [options]"
    help_ = "of a job or of a schedule, as submit and jobs print it"
    parser.add_argument("ids", metavar="ID", nargs="+", type=job_id, help=help_)
    shared_options(parser, deadline_s=DEADLINE_S)


def run(args: argparse.Namespace) -> int:
    try:
        change = connected(args).change_jobs("cancel", args.ids, timeout=args.deadline)
    except library.CallFailed as e:
        address = join_address(args.host, args.port)
        return failed(e, address, args.json, of_a_request=False)
    return report(change, "cancelled", "as it is over", args)


def report(change: JobChange, verb: str, unless: str, args: argparse.Namespace) -> int:
    """Prints what became of a change and returns the exit code for it; see job_text.complaints."""
    code = Exit.FAILED if change.unchanged or change.unknown else Exit.OK
    screen = Screen(sys.stdout)
    if args.json:
        address = join_address(args.host, args.port)
        ok = {"ok": code is Exit.OK, "exit_code": int(code), "address": address}
        what = {"unchanged": list(change.unchanged), "unknown": list(change.unknown)}
        screen.json({**ok, verb: change.changed, **what})
    else:
        screen.say(f"{change.changed:,} {verb}")
    for sentence in job_text.complaints(change, verb, unless):
        complain(sentence)
    return code
