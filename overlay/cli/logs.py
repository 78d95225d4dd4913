"""`client.py HOST PORT logs`: the last log lines of any process, read from one place.

without an ID       of the process at HOST PORT
with an ID          of that process, asked through the one at HOST PORT
--request, --error  of every process that can be asked: the lines about one request, or those that
                    name one error id, by their time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.text import counted
from overlay.cli.usage import (
    Parser,
    complain,
    error_id,
    name,
    request_id,
    shared_options,
    whole_number,
)
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.model.topology import Topology
from overlay.observability.log_buffer import names_error, unfolded
from overlay.transport.codec import pb2

DEADLINE_S = 5.0


@dataclass(frozen=True)
class ProcessLines:
    """The lines of one process; error: why there are none."""

    process_id: str
    lines: Sequence[pb2.LogLine] = ()
    dropped: int = 0
    error: library.CallFailed | None = field(default=None, compare=False)


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    help_ = "the process whose log is read, at or below HOST PORT (default: the one there)"
    add("id", metavar="ID", nargs="?", type=name, default="", help=help_)
    add(
        "--lines",
        "-n",
        type=whole_number,
        default=100,
        metavar="N",
        help="the last N lines of each process (default: %(default)s; a process keeps 1000)",
    )
    add(
        "--request",
        type=request_id,
        default=0,
        metavar="HEX",
        help="only lines about this request; without an ID, of every process",
    )
    add(
        "--error",
        type=error_id,
        metavar="HEX",
        help="only lines with this error id; without an ID, of every process",
    )
    shared_options(
        parser,
        deadline_s=DEADLINE_S,
        deadline="how long to wait for each answer",
        json="print the lines as one JSON object",
    )


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        client = connected(args)
        of_all = (args.request or args.error) and not args.id
        ids = _reachable_ids(client, args.deadline) if of_all else [args.id]
        found = [_ask(client, process_id, args) for process_id in ids]
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    if len(found) == 1 and found[0].error is not None:
        return failed(found[0].error, address, args.json, of_a_request=False)
    code = _exit_code(found, args)
    report = Screen(sys.stdout)
    if args.json:
        lines = [_as_json(*pair) for pair in _by_time(found)]
        report.json({"ok": code is Exit.OK, "exit_code": int(code), "lines": lines})
    else:
        for process_id, line in _by_time(found):
            report.say(shown_line(process_id, line))
    _complain(found, args)
    return code


def shown_line(process_id: str, line: pb2.LogLine) -> str:
    """As in the process's own file, in local time; but a traceback keeps its line ends."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.at_s))
    head = f"{at},{int(line.at_s % 1 * 1000):03d} {process_id} {line.logger} {line.level}"
    return f"{head} {_text_of(line)}"


def _text_of(line: pb2.LogLine) -> str:
    return unfolded(line.text, line.breaks).rstrip("\n")


def _reachable_ids(client: library.Client, deadline_s: float) -> list[str]:
    """The process at the address, and all below it."""
    metrics = client.metrics(timeout=deadline_s)
    topology = Topology.of({process.id: process for process in metrics.topology})
    return list(topology.in_order(topology.reach(metrics.process_id)))


def _ask(client: library.Client, process_id: str, args: argparse.Namespace) -> ProcessLines:
    wanted = {"lines": args.lines, "request_id": args.request, "timeout": args.deadline}
    try:
        found = client.logs(process_id, error_id=args.error or "", **wanted)
    except library.CallFailed as e:
        return ProcessLines(process_id, error=e)
    lines = list(found.lines)
    if args.error:  # an older process returns all
        lines = [line for line in lines if names_error(line.text, args.error)]
    return ProcessLines(found.process_id, lines, found.dropped)


def _exit_code(found: Sequence[ProcessLines], args: argparse.Namespace) -> Exit:
    if any(one.error is not None for one in found):
        return Exit.INCOMPLETE
    is_missed = (args.request or args.error) and not any(one.lines for one in found)
    return Exit.FAILED if is_missed else Exit.OK


def _by_time(found: Sequence[ProcessLines]) -> list[tuple[str, pb2.LogLine]]:
    pairs = [(one.process_id, line) for one in found for line in one.lines]
    return sorted(pairs, key=lambda pair: pair[1].at_s)


def _complain(found: Sequence[ProcessLines], args: argparse.Namespace) -> None:
    for one in found:
        if one.error is not None:
            complain(f"no lines of {one.process_id}: {one.error}")
        if one.dropped:
            complain(f"{counted(one.dropped, 'line')} of {one.process_id} went into no log")
    if any(one.lines for one in found):
        return
    asked = ", ".join(one.process_id for one in found if one.error is None)
    if args.error:
        complain(f"none of the last lines of {asked} has the error id {args.error}")
    elif args.request:
        complain(
            f"none of the last lines of {asked} is about request {args.request:016x}; "
            "a request leaves lines only when it fails, or was sent with --trace"
        )


def _as_json(process_id: str, line: pb2.LogLine) -> dict[str, Any]:
    return {
        "process_id": process_id,
        "at_s": round(line.at_s, 3),
        "level": line.level,
        "logger": line.logger,
        "text": _text_of(line),
        "number": line.number,
        "withheld": line.withheld,
    }
