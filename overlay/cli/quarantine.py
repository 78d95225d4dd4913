"""`client.py HOST PORT quarantine`: jobs that may have run, so are not started again.

list      shows them
release   runs them again; those that failed too, if their ids are given
drop      forgets them
"""

from __future__ import annotations

import argparse

from overlay.cli import cancel
from overlay.cli.jobs import change_all, limit_option, listed, show
from overlay.cli.terminal import Exit, connected, failed
from overlay.cli.usage import Parser, complain, job_id, shared_options
from overlay.client import sync as library
from overlay.client.job_status import JobChange
from overlay.model.addresses import join_address

DEADLINE_S = 10.0
STATE = "quarantined"
CHANGES = {
    "release": ("released", "as it is neither in quarantine nor failed"),
    "drop": ("dropped", "as it is not over"),
}


def arguments(parser: Parser) -> None:
    parser.usage = f"{parser.prog} list | release ID ... | drop ID ... [options]"
    add = parser.add_argument
    what = (
        "list: show the jobs in quarantine; release: run them again, with new attempts (also jobs "
        "that failed, if their IDs are given); drop: forget them"
    )
    add("action", choices=("list", *CHANGES), help=what)
    add("ids", metavar="ID", nargs="*", type=job_id, help="of a job, as list prints it")
    add("--all", action="store_true", help="release or drop all that are in quarantine")
    limit_option(parser)
    shared_options(parser, deadline_s=DEADLINE_S)


def run(args: argparse.Namespace) -> int:
    if wrong := _conflict(args):
        complain(wrong)
        return Exit.USAGE
    address = join_address(args.host, args.port)
    try:
        client = connected(args)
        if args.action == "list":
            found = listed(client, (STATE,), "", args.limit, args.deadline)
            show(found, args, address, "none is in quarantine")
            return Exit.OK
        change = _change(client, args)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    return cancel.report(change, *CHANGES[args.action], args)


def _conflict(args: argparse.Namespace) -> str:
    if args.action == "list":
        return "list takes no IDs and no --all" if args.ids or args.all else ""
    if args.limit:
        return f"--limit is for list; {args.action} takes IDs, or --all"
    if bool(args.ids) == args.all:
        return f"{args.action} needs IDs, or --all; list shows which there are"
    return ""


def _change(client: library.Client, args: argparse.Namespace) -> JobChange:
    if args.ids:
        return client.change_jobs(args.action, args.ids, timeout=args.deadline)
    return JobChange(change_all(client, args.action, (STATE,), args.deadline), (), ())
