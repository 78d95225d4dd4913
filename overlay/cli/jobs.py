"""`client.py HOST PORT jobs`: the newest jobs, and how many there are; --prune forgets those that
are over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.text import Text

from overlay.cli import job_text
from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.text import counted
from overlay.cli.usage import Parser, complain, name, shared_options, whole_number
from overlay.client import sync as library
from overlay.client.job_status import JobList
from overlay.model import clocks as time
from overlay.model.addresses import join_address

DEADLINE_S = 10.0
LIMIT, PAGE = 100, 1000  # PAGE: more than a leader lists at once


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    states = "only jobs in these states: " + ", ".join(job_text.STATES)
    add("--state", type=_states, default=(), metavar="S[,S]", help=states)
    add("--handler", type=name, default="", metavar="NAME", help="only jobs for this handler")
    limit_option(parser)
    add(
        "--prune",
        action="store_true",
        help="forget all jobs that are done, failed, cancelled or expired, or those of them that "
        "--state names, with their answers",
    )
    shared_options(parser, deadline_s=DEADLINE_S)


def limit_option(parser: Parser) -> None:
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help=f"how many are shown, the newest ones (default: {LIMIT})",
    )


def _states(text: str) -> tuple[str, ...]:
    found = tuple(text.lower().split(","))
    for state in found:
        if state not in job_text.STATES:
            known = ", ".join(job_text.STATES)
            raise argparse.ArgumentTypeError(f"'{state}' is no state of a job; there are {known}")
    return found


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    if wrong := _conflict(args):
        complain(wrong)
        return Exit.USAGE
    try:
        if args.prune:
            return _prune(args, address)
        found = listed(connected(args), args.state, args.handler, args.limit, args.deadline)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    show(found, args, address, "there is no such job")
    return Exit.OK


def _conflict(args: argparse.Namespace) -> str:
    if args.prune and (args.handler or args.limit):
        return "--prune forgets all that are over: it excludes --handler and --limit"
    kept = [state for state in args.state if state not in job_text.PRUNED]
    if args.prune and kept:
        return (
            f"--prune forgets no job that is {kept[0]}: cancel ends those that are not over, "
            "quarantine drop forgets those in quarantine"
        )
    return ""


def listed(
    client: library.Client,
    states: tuple[str, ...],
    handler: str,
    limit: int | None,
    deadline_s: float,
) -> JobList:
    """Raises CallFailed."""
    left, before = limit or LIMIT, ""
    every = JobList([], {})
    while True:
        most = min(left, PAGE)
        found = client.jobs(states, handler=handler, limit=most, before=before, timeout=deadline_s)
        every.extend(found)
        every.counts, left = found.counts, left - len(found)
        if left <= 0 or len(found) < most:
            return every
        before = found[-1].id


def show(found: JobList, args: argparse.Namespace, address: str, nothing: str) -> None:
    """The counts of all, and a table of those that were found. nothing: said if none was."""
    report = Screen(sys.stdout)
    if args.json:
        jobs = [job_text.as_json(job) for job in found]
        ok = {"ok": True, "exit_code": int(Exit.OK), "address": address}
        report.json({**ok, "counts": found.counts, "jobs": jobs})
        return
    now, total = time.time(), sum(found.counts[state] for state in job_text.STATES)
    report.say(job_text.counts_line(found.counts))
    if total and not found:
        report.say(nothing)
    report.table("schedules", job_text.SCHEDULE_COLUMNS, job_text.schedule_rows(found, now))
    width = report.width if sys.stdout.isatty() else None
    head, *lines = job_text.table(found, now, width) or [""]
    if head:
        report.print(Text(f"\n{head}", style="bold"))
    for line in lines:
        report.print(Text(line))
    if len(found) == (args.limit or LIMIT) < total:
        report.say(f"\nthe newest {len(found):,}; --limit shows more")


def change_all(
    client: library.Client, action: str, states: Sequence[str], deadline_s: float
) -> int:
    """How many jobs in these states it has changed. Raises CallFailed.

    One call changes some thousands at most. Others may come into these states meanwhile, also those
    that were changed: so no more are changed than there were.
    """
    counts = client.jobs(limit=1, timeout=deadline_s).counts
    wanted, changed = sum(counts[state] for state in set(states)), 0
    while changed < wanted:
        some = client.change_jobs(action, states=states, timeout=deadline_s).changed
        changed += some
        if not some:
            break
    return changed


def _prune(args: argparse.Namespace, address: str) -> int:
    dropped = change_all(connected(args), "drop", args.state or job_text.PRUNED, args.deadline)
    report = Screen(sys.stdout)
    if args.json:
        ok = {"ok": True, "exit_code": int(Exit.OK), "address": address}
        report.json({**ok, "dropped": dropped})
    else:
        report.say(f"{counted(dropped, 'job')} forgotten")
    return Exit.OK
