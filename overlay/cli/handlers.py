"""`client.py HOST PORT handlers`: what each handler does and takes, and which workers have it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.text import Text

from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.text import clean
from overlay.cli.usage import Parser, complain, shared_options
from overlay.client import sync as library
from overlay.model.addresses import join_address
from overlay.model.signatures import Function
from overlay.transport.codec import pb2

DEADLINE_S = 3.0


def arguments(parser: Parser) -> None:
    json_ = "print one JSON object, with the JSON Schemas of typed functions"
    shared_options(parser, deadline_s=DEADLINE_S, json=json_)


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        found = connected(args).metrics(timeout=args.deadline, functions=True)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    functions: list[pb2.Function | Function] = [*found.functions, *_undescribed(found)]
    code = Exit.OK if functions else Exit.FAILED
    report = Screen(sys.stdout)
    if args.json:
        handlers = [_as_json(function) for function in functions]
        report.json({"ok": bool(functions), "exit_code": int(code), "handlers": handlers})
    for function in functions if not args.json else ():
        _show(report, function)
    if not functions:
        complain(f"{found.process_id} knows of no worker that is ready; the verb check says more")
    return code


def _undescribed(found: pb2.MetricsResponse) -> list[Function]:
    """The handlers of workers that do not describe their functions, as in older releases."""
    known = {(f.name, worker) for f in found.functions for worker in f.workers}
    workers: dict[str, list[str]] = {}
    for process in found.topology:
        for handler in sorted(process.slots):
            if (handler, process.id) not in known:
                workers.setdefault(handler, []).append(process.id)
    return [Function(name, workers=tuple(ids)) for name, ids in workers.items()]


def _show(report: Screen, function: pb2.Function | Function) -> None:
    report.print(Text(clean(function.signature or function.name), style="bold"))
    for line in function.doc.splitlines():
        report.say(f"    {line}" if line else "")
    kind = "typed, called with --args" if function.arguments else "takes the payload's bytes"
    if not function.signature:
        kind = "its workers do not describe it"
    report.say(f"    ({kind}; on {', '.join(function.workers)})")


def _as_json(function: pb2.Function | Function) -> dict[str, Any]:
    return {
        "name": function.name,
        "signature": function.signature,
        "doc": function.doc,
        "workers": list(function.workers),
        "arguments": _schema(function.arguments),
        "result": _schema(function.result),
    }


def _schema(text: str) -> dict[str, Any] | None:
    """None where there is none, or where another process sent something else."""
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
