"""`client.py HOST PORT submit`: jobs, accepted once they are on the leader's disk.

Standard output has their ids, one a line, as they are accepted. What a person may do next is said
on standard error, and only where the ids appear on a terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from overlay.cli.ask import payload_of, payload_options
from overlay.cli.job_text import clock, interval
from overlay.cli.map.input import LinesInput, sentence_of
from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.text import counted
from overlay.cli.usage import (
    Parser,
    complain,
    duration,
    program,
    shared_options,
    start_time,
    whole_number,
)
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.model.limits import Limits
from overlay.model.segments import Executed

DEADLINE_S = 30.0
ROWS, BYTES = 1000, 1024 * 1024  # of the lines that are submitted together


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    payload_options(parser).add_argument(
        "--lines",
        metavar="FILE|-",
        help="a job for each line of a file, or of standard input",
    )
    add(
        "--key",
        type=key,
        metavar="KEY",
        help="says that running the job twice does no harm: it is tried 3 times, and the same "
        "command again submits nothing twice; with --lines, the key of line 1 is KEY-1",
    )
    add(
        "--attempts",
        type=whole_number,
        default=0,
        metavar="N",
        help="how often it is started when it is not known how an attempt ended; more than 1 needs "
        "--key (default: 3 with a key, else 1)",
    )
    add(
        "--limit",
        type=duration,
        metavar="SECONDS",
        help="how long one attempt may take; also 15m, 1h (default: the configured max_deadline_s)",
    )
    add(
        "--expires",
        type=duration,
        metavar="SECONDS",
        help="after how long it is not started any more; also 15m, 1h, 2d (default: never)",
    )
    add(
        "--at",
        type=start_time,
        metavar="TIME",
        help="when it is started: 2026-11-28T22:00, or 22:00 for the next time it is 22:00 here",
    )
    add(
        "--every",
        type=duration,
        metavar="DURATION",
        help="again and again, until the verb cancel: 90s, 15m, 1h, 2d; the first at --at, or now",
    )
    add(
        "--in-parts",
        action="store_true",
        help="a result may be larger than a message; with --mode all nothing is merged, and each "
        "worker's part is kept by itself",
    )
    shared_options(
        parser,
        mode="any",
        deadline_s=DEADLINE_S,
        deadline="how long to wait until it is accepted",
        priority=True,
        json="print the ids as one JSON object",
    )


def key(text: str) -> str:
    if not text.isprintable() or not 0 < len(text) <= Limits.max_key:
        raise argparse.ArgumentTypeError(f"not a text of 1 to {Limits.max_key} letters")
    return text


def run(args: argparse.Namespace) -> int:
    if wrong := _conflict(args):
        complain(wrong)
        return Exit.USAGE
    address = join_address(args.host, args.port)
    ids: list[str] = []
    try:
        for some in _submitted(args):
            ids += some
            if not args.json:
                sys.stdout.write("".join(f"{id_}\n" for id_ in some))
                sys.stdout.flush()
    except library.CallFailed as e:
        doubt = _doubt(e, len(ids), bool(args.key))
        return failed(e, address, args.json, of_a_request=False, remark=doubt, ids=ids)
    except (OSError, ValueError) as e:
        complain(sentence_of(e))
        return Exit.USAGE
    if args.json:
        found = {"ok": True, "exit_code": int(Exit.OK), "address": address, "ids": ids}
        Screen(sys.stdout).json(found)
    elif ids and sys.stdout.isatty():
        Screen(sys.stderr).say(_what_next(args, ids))
    return Exit.OK


def _conflict(args: argparse.Namespace) -> str:
    if args.every and args.lines:
        return "--every makes a schedule of one job: it excludes --lines"
    if args.attempts > 1 and not args.key:
        what = "which says that running the job twice does no harm"
        return f"--attempts {args.attempts} needs --key, {what}"
    return ""


def _submitted(args: argparse.Namespace) -> Iterator[list[str]]:
    """The ids, as they are accepted. Raises CallFailed, OSError and ValueError."""
    lines = None if args.lines is None else LinesInput([args.lines])
    client = connected(args)
    options = {
        "mode": args.mode,
        "team": args.team,
        "priority": args.priority,
        "limit_s": args.limit,
        "expires_s": args.expires,
        "start_at": args.at,
        "attempts": args.attempts,
        "in_parts": args.in_parts,
        "timeout": args.deadline,
    }
    handler = args.handler or None
    if lines is None:
        options |= {"key": args.key or "", "every_s": args.every, "args": args.args}
        yield [client.later(handler, *payload_of(args), **options).id]
        return
    first = 1
    for some in _batches(lines.payloads()):
        keys = [f"{args.key}-{n}" for n in range(first, first + len(some))] if args.key else None
        yield [job.id for job in client.later_many(handler, some, keys=keys, **options)]
        first += len(some)


def _batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lines that go together. What is read does not wait for lines that are not there yet.

    Never more than the library sends in one call, so that of a failed one nothing was accepted.
    """
    some: list[bytes] = []
    size = 0
    for line in lines:
        pauses = line is library.NOTHING_YET
        if some and (pauses or len(some) == ROWS or size + len(line) > BYTES):
            yield some
            some, size = [], 0
        if not pauses:
            some.append(line)
            size += len(line)
    if some:
        yield some


def _doubt(error: library.CallFailed, accepted: int, has_key: bool) -> str:
    """What of all this was accepted, and how to go on."""
    remark = f"; {counted(accepted, 'job')} before it accepted" if accepted else ""
    in_doubt = isinstance(error, (library.Unavailable, library.DeadlinePassed))
    if in_doubt and error.executed is not Executed.NO:
        remark += "; it may have been accepted: the verb jobs shows the newest"
    if has_key and (accepted or in_doubt):
        remark += "; the same command again submits nothing twice"
    return remark


def _what_next(args: argparse.Namespace, ids: list[str]) -> str:
    asked = f"{program()} {args.host} {args.port}"
    if args.every:
        first = f"first {clock(args.at, time.time())}" if args.at else "first now"
        return f"every {interval(args.every)}, {first}; to end it: {asked} cancel {ids[0]}"
    if len(ids) > 1:
        return f"{counted(len(ids), 'job')}; how they stand: {asked} jobs"
    return f"its result: {asked} result {ids[0]} --wait"
