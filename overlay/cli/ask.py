"""`client.py HOST PORT`: one request; its answer, who gave it, and the path that it took.

--as-completed and --first show each worker's own part as soon as it arrives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from overlay.cli.terminal import Exit, Screen, StandardOutput, connected, failed, result_as_json
from overlay.cli.text import counted, shown, sized
from overlay.cli.usage import (
    Parser,
    complain,
    out_file,
    request_options,
    shared_options,
    whole_number,
)
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model import json_values
from overlay.model.addresses import join_address
from overlay.model.segments import Hop, Part
from overlay.observability.trace import lines as trace_lines

TRACE_DEADLINE_S = 3.0  # for the trace of a request that failed
MAX_REQUESTS = 1000  # more than a process keeps


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    payload_options(parser)
    add("--parts", action="store_true", help="show each worker's own result and times")
    add(
        "--trace",
        action="store_true",
        help="show the times at each process on the way, and leave a line in the log of each",
    )
    add(
        "--out",
        type=out_file,
        metavar="FILE",
        help="write the exact bytes of the result there; - is standard output, and the report goes "
        "to standard error then; with --as-completed each worker's as they come, newlines between",
    )
    add(
        "--as-completed",
        action="store_true",
        help="mode all: show each worker's answer as soon as it arrives; nothing is merged",
    )
    add(
        "--first",
        type=whole_number,
        metavar="N",
        help="as --as-completed, until N workers have answered; the others are cancelled",
    )
    shared_options(
        parser,
        mode="all",
        deadline_s=library.DEFAULT_TIMEOUT_S,
        deadline="how long the answer may take",
        priority=True,
        json="print the report as JSON; with --as-completed, an object a line",
    )


def payload_options(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """--payload and --args; of what is added to the group, only one may be given."""
    sent = parser.add_mutually_exclusive_group()
    sent.add_argument(
        "--payload",
        type=payload,
        default=b"hello",
        metavar="TEXT|@FILE|-",
        help="what to send: a text, a file's bytes, or standard input (default: hello)",
    )
    sent.add_argument(
        "--args",
        type=function_arguments,
        metavar="JSON|@FILE|-",
        help="the arguments of a typed function, as a JSON object; the verb handlers lists them",
    )
    return sent


def payload(text: str) -> bytes:
    """TEXT, @FILE or - for standard input."""
    if text == "-":
        return sys.stdin.buffer.read()
    if not text.startswith("@"):
        return text.encode("utf-8", "surrogateescape")
    try:
        return Path(text[1:]).read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise argparse.ArgumentTypeError(f"cannot read '{text[1:]}': {reason}") from None


def function_arguments(text: str) -> dict[str, Any]:
    """As `payload`, but a JSON object."""
    try:
        found = json_values.read(payload(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"not JSON: {e}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('not a JSON object, such as {"path": "a.jpg"}')
    return found


def run(args: argparse.Namespace) -> int:
    if args.as_completed or args.first:
        return ask_for_parts(args)
    started = time.monotonic()
    address = join_address(args.host, args.port)
    request_id = library.new_request_id()
    try:
        client = connected(args)
        answer = client.forward(
            *payload_of(args),
            args=args.args,
            mode=args.mode,
            handler=args.handler,
            want_parts=args.parts,
            want_trace=args.trace,
            request_id=request_id,
            **request_options(args),
        )
    except library.CallFailed as e:
        code = failed(e, address, args.json)
        if args.trace and not isinstance(e, library.NotReached):
            show_failed(client, request_id, args.json)
        return code
    took_ms = (time.monotonic() - started) * 1000
    code = Exit.INCOMPLETE if answer.missing else Exit.OK
    report = Screen(sys.stderr if args.out == "-" else sys.stdout)
    if args.out and not write_result(args.out, [answer.result]):
        return Exit.FAILED
    if args.json:
        values = {} if args.args is None else _values_as_json(answer, args.mode)
        report.json(answer_as_json(answer, address, took_ms, code, args.parts) | values)
    else:
        show_answer(report, answer, took_ms, args)
    return code


def payload_of(args: argparse.Namespace) -> tuple[bytes, ...]:
    return (args.payload,) if args.args is None else ()


def ask_for_parts(args: argparse.Namespace) -> int:
    """Shows each part as it arrives, then which workers did not answer."""
    if args.mode == "any" or args.parts:
        complain("--as-completed and --first need --mode all, and exclude --parts")
        return Exit.USAGE
    started = time.monotonic()
    report = Screen(sys.stderr if args.out == "-" else sys.stdout)
    found: list[Part] = []
    try:
        for part in connected(args).parts(
            *payload_of(args),
            args=args.args,
            handler=args.handler,
            first=args.first,
            **request_options(args),
        ):
            if args.out and part.ok:
                written = [b"\n", part.result] if found else [part.result]
                if not write_result(args.out, written, is_first=not found):
                    return Exit.FAILED
            # Not the result itself, which may be large.
            found.append(replace(part, result=b""))
            took_ms = (time.monotonic() - started) * 1000
            if args.json:
                shown_part = {**_part_as_json(part, not args.out), "after_ms": round(took_ms, 3)}
                print(json.dumps(shown_part), file=report.file)
            elif part.ok:
                kept = f"{sized(part.result)} -> {args.out}"
                report.facts((part.process_id, kept if args.out else shown(part.result)))
            report.file.flush()
    except library.CallFailed as e:
        return failed(e, join_address(args.host, args.port), args.json)
    missing = [part for part in found if not part.ok]
    if not args.json:
        enough = " (the first; the others were cancelled)" if args.first and not missing else ""
        workers = {part.process_id for part in found}  # a generator has a part for each item
        failed_workers = {part.process_id for part in missing}
        good = len(workers - failed_workers)
        answered = f"{good} of {counted(len(workers), 'worker')} answered"
        report.facts(
            ("answers", f"{len(found)}{enough}" if enough else answered),
            ("missing", "\n".join(f"{p.process_id}: {_reason(p)}" for p in missing)),
            ("time", f"{(time.monotonic() - started) * 1000:.1f} ms"),
        )
    return Exit.INCOMPLETE if missing else Exit.OK


def show_answer(
    report: Screen, answer: library.Answer, took_ms: float, args: argparse.Namespace
) -> None:
    report.facts(
        *answer_facts(answer, args.out),
        ("time", f"{took_ms:.1f} ms"),
        ("request", f"{answer.request_id:016x}"),
    )
    if args.parts:
        show_parts(report, answer)
    if args.trace:
        show_trace(report, answer.trace)


def answer_facts(
    answer: library.Answer, out: str | None, in_parts: bool = False
) -> list[tuple[str, str]]:
    """out: the file that has the result. in_parts: it is a job's, and its parts have sizes only."""
    answered, asked = answer.coverage
    size = sum(part.size for part in answer.parts) if in_parts else len(answer.result)
    kept = f"{sized(size)} -> {out}"
    what = shown(answer.result)
    if in_parts:
        what = f"{sized(size)} in {counted(answered, 'part')}; --out FILE writes them"
    return [
        ("result", kept if out else what),
        ("answers", f"{answered} of {counted(asked, 'worker')} answered"),
        ("missing", "\n".join(f"{p.process_id}: {_reason(p)}" for p in answer.missing)),
        ("path", " ".join(answer.hops)),
    ]


def show_parts(report: Screen, answer: library.Answer, in_parts: bool = False) -> None:
    rows = [_part_row(part, in_parts) for part in answer.parts]
    report.table("parts", PART_COLUMNS, rows)


def show_trace(report: Screen, trace: Sequence[Hop]) -> None:
    bars = str.maketrans("├└│─", "+`|-" if report.options.ascii_only else "├└│─")
    lines = [
        (shown_id.translate(bars), hop, away_us) for shown_id, hop, away_us in trace_lines(trace)
    ]
    report.table("trace", TRACE_COLUMNS, map(_hop_row, lines))


def show_failed(client: library.Client, request_id: int, as_json: bool) -> None:
    """The trace of a failed request, as the process asked remembers it."""
    with suppress(library.CallFailed):
        summaries = client.metrics(timeout=TRACE_DEADLINE_S, requests=MAX_REQUESTS).requests
        hops = [one.hops for one in summaries if one.request_id == request_id]
        report = Screen(sys.stderr if as_json else sys.stdout)
        report.facts(("request", f"{request_id:016x}"))
        if hops:
            show_trace(report, library.read_trace(hops[0]))


TRACE_COLUMNS = ("process", "status", "waited ms", "worked ms", "on the way ms")


def _hop_row(line: tuple[str, Hop, int | None]) -> tuple[str, ...]:
    shown_name, hop, away_us = line
    on_the_way = "" if away_us is None else f"{away_us / 1000:.1f}"
    times = f"{hop.waited_us / 1000:.1f}", f"{hop.worked_us / 1000:.1f}", on_the_way
    return shown_name, hop.code.name, *times


PART_COLUMNS = ("worker", "status", "waited ms", "worked ms", "path", "result")


def _part_row(part: Part, in_parts: bool = False) -> tuple[str, ...]:
    result = sized(part.size) if in_parts else shown(part.result)
    return (
        part.process_id,
        part.code.name,
        f"{part.waited_us / 1000:.1f}",
        f"{part.worked_us / 1000:.1f}",
        " ".join(part.hops),
        result if part.ok else _reason(part),
    )


def answer_as_json(
    answer: library.Answer,
    address: str,
    took_ms: float,
    code: int,
    with_results: bool,
    in_parts: bool = False,
) -> dict[str, Any]:
    answered, asked = answer.coverage
    parts = [_part_as_json(part, with_results and not in_parts) for part in answer.parts]
    if in_parts:
        for part, shown_part in zip(answer.parts, parts, strict=True):
            shown_part["size"] = part.size
    lines = list(trace_lines(answer.trace))
    return {
        "ok": True,
        "exit_code": int(code),
        "address": address,
        **({} if in_parts else result_as_json(answer.result)),
        "coverage": {"answered": answered, "asked": asked},
        "missing": [part.process_id for part in answer.missing],
        "parts": parts,
        "hops": list(answer.hops),
        "request_id": f"{answer.request_id:016x}",
        "took_ms": round(took_ms, 3),
        **({"trace": [_hop_as_json(*line) for line in lines]} if lines else {}),
    }


def _values_as_json(answer: library.Answer, mode: str) -> dict[str, Any]:
    """What a typed function returned; nothing for one that returns other bytes."""
    with suppress(ValueError):
        return {"value": answer.value} if mode == "any" else {"values": answer.values}
    return {}


def _hop_as_json(_name: str, hop: Hop, away_us: int | None) -> dict[str, Any]:
    return {
        "process_id": hop.process_id,
        "depth": hop.depth,
        "code": hop.code.name,
        "waited_ms": hop.waited_us / 1000,
        "worked_ms": hop.worked_us / 1000,
        "on_the_way_ms": None if away_us is None else away_us / 1000,
    }


def _part_as_json(part: Part, with_result: bool) -> dict[str, Any]:
    return {
        "process_id": part.process_id,
        "code": part.code.name,
        "reason": part.reason,
        "executed": part.executed.name,
        "hops": list(part.hops),
        "waited_ms": part.waited_us / 1000,
        "worked_ms": part.worked_us / 1000,
        **(result_as_json(part.result) if with_result and part.ok else {}),
    }


def write_result(out: str, results: Iterable[bytes], is_first: bool = True) -> bool:
    """Writes the exact bytes of the results; unless is_first, after those written before."""
    try:
        if out == "-":
            stdout = cast(StandardOutput, sys.stdout)
            for result in results:
                stdout.write_bytes(result)
        else:
            with open(out, "wb" if is_first else "ab") as file:
                file.writelines(results)
    except OSError as e:
        complain(f"cannot write the result to '{out}': {e.strerror or e}")
        return False
    return True


def _reason(part: Part) -> str:
    return part.reason or part.code.name
