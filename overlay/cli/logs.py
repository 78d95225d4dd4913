"""`client.py HOST PORT logs`: the last lines of any process, read from one place.

without an ID       the process at HOST PORT
with one            that process, asked through the one at HOST PORT
--request, --error  all of them that can be asked, for the lines about one request, or that name one
                    error id, by their time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from overlay.cli.terminal import (
    Exit,
    Parser,
    Screen,
    complain,
    connected,
    counted,
    deadline_argument,
    error_id,
    failed,
    name,
    request_id,
    whole_number,
)
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.topology import Topology, join_address
from overlay.observability.log_buffer import names_error, unfolded

DEADLINE_S = 5.0


@dataclass(frozen=True)
class Said:
    """What one process told of its lines; why: it told nothing."""

    process_id: str
    lines: Sequence[Any] = ()
    dropped: int = 0
    why: library.CallFailed | None = field(default=None, compare=False)


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("id", metavar="ID", nargs="?", type=name, default="", help="whose; one below HOST PORT's")
    add(
        "--lines",
        "-n",
        type=whole_number,
        default=100,
        metavar="N",
        help="the last N lines of each process (default: %(default)s; it keeps 1000)",
    )
    add(
        "--request",
        type=request_id,
        default=0,
        metavar="HEX",
        help="only lines about this request; without an ID those of every process",
    )
    add(
        "--error",
        type=error_id,
        metavar="ID",
        help="only lines that name this error id; without a process those of every one",
    )
    deadline_argument(parser, DEADLINE_S, "how long to wait for each answer")
    add("--json", action="store_true", help="the lines as one JSON object")


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        client = connected(args)
        everybody = (args.request or args.error) and not args.id
        ids = _who_can_be_asked(client, args.deadline) if everybody else [args.id]
        said = [_ask(client, process_id, args) for process_id in ids]
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    if len(said) == 1 and said[0].why is not None:
        return failed(said[0].why, address, args.json, of_a_request=False)
    code = _code(said, args)
    report = Screen(sys.stdout)
    if args.json:
        lines = [_as_json(*pair) for pair in _by_time(said)]
        report.json({"ok": code == Exit.OK, "exit_code": int(code), "lines": lines})
    else:
        for process_id, line in _by_time(said):
            report.say(shown_line(process_id, line))
    _complain(said, args)
    return code


def shown_line(process_id: str, line: Any) -> str:
    """As the process's own file has it, in local time; but for its line ends, as of a traceback."""
    text = _text_of(line)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.at_s))
    return f"{at},{int(line.at_s % 1 * 1000):03d} {process_id} {line.logger} {line.level} {text}"


def _text_of(line: Any) -> str:
    return unfolded(line.text, line.breaks).rstrip("\n")


def _who_can_be_asked(client: library.Client, deadline_s: float) -> list[str]:
    """The process at the address, and all below it."""
    metrics = client.metrics(timeout=deadline_s)
    topology = Topology.of({process.id: process for process in metrics.topology})
    return list(topology.in_order(topology.reach(metrics.process_id)))


def _ask(client: library.Client, process_id: str, args: argparse.Namespace) -> Said:
    wanted = {"lines": args.lines, "request_id": args.request, "timeout": args.deadline}
    try:
        found = client.logs(process_id, error_id=args.error or "", **wanted)
    except library.CallFailed as e:
        return Said(process_id, why=e)
    lines = list(found.lines)
    if args.error:  # an older process gives all
        lines = [line for line in lines if names_error(line.text, args.error)]
    return Said(found.process_id, lines, found.dropped)


def _code(said: Sequence[Said], args: argparse.Namespace) -> Exit:
    if any(one.why is not None for one in said):
        return Exit.INCOMPLETE
    is_missed = (args.request or args.error) and not any(one.lines for one in said)
    return Exit.FAILED if is_missed else Exit.OK


def _by_time(said: Sequence[Said]) -> Iterator[tuple[str, Any]]:
    pairs = [(one.process_id, line) for one in said for line in one.lines]
    yield from sorted(pairs, key=lambda pair: pair[1].at_s)


def _complain(said: Sequence[Said], args: argparse.Namespace) -> None:
    for one in said:
        if one.why is not None:
            complain(f"no lines of {one.process_id}: {one.why}")
        if one.dropped:
            complain(f"{counted(one.dropped, 'line')} of {one.process_id} went into no log")
    if any(one.lines for one in said):
        return
    asked = ", ".join(one.process_id for one in said if one.why is None)
    if args.error:
        complain(f"no line with error id {args.error} is among the last ones of {asked}")
    elif args.request:
        complain(
            f"no line about request {args.request:016x} is among the last ones of {asked}; "
            "a request leaves lines when it fails, or was asked with --trace"
        )


def _as_json(process_id: str, line: Any) -> dict[str, Any]:
    return {
        "process_id": process_id,
        "at_s": round(line.at_s, 3),
        "level": line.level,
        "logger": line.logger,
        "text": _text_of(line),
        "number": line.number,
        "withheld": line.withheld,
    }
