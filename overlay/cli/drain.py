"""`client.py HOST PORT drain`: stops a process gently and reports what became of its requests."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

import psutil

from overlay.cli.terminal import Exit, Screen, connected, failed
from overlay.cli.text import counted
from overlay.cli.usage import Parser, complain, seconds, shared_options
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.transport.codec import pb2

LONGEST_GRACE_S = 86_400.0
GONE_S = 10.0  # a drained process has ended by then: its watchdog makes sure of that
SAME_START_S = 2.0  # start times of one process differ by as much when the clock is corrected


def arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--grace",
        type=seconds,
        metavar="SECONDS",
        help="how long running requests may take (default: the configured drain_grace_s)",
    )
    add("--no-wait", action="store_true", help="return as soon as stopping has begun")
    shared_options(parser)


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    address = join_address(args.host, args.port)
    try:
        within_s = (args.grace or LONGEST_GRACE_S) + GONE_S
        asked = connected(args)
        drained = asked.drain(grace_s=args.grace, wait=not args.no_wait, timeout=within_s)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    is_gone = not args.no_wait and _has_gone(drained, address)
    took_s = time.monotonic() - began
    code = Exit.FAILED if drained.left else Exit.OK
    if not (is_gone or args.no_wait):
        code = Exit.LATE
        complain(f"process {drained.process_id} (pid {drained.pid}) has drained but does not end")
    report = Screen(sys.stdout)
    if args.json:
        facts = {"process_id": drained.process_id, "pid": drained.pid, "grace_s": drained.grace_s}
        facts |= {"gone": is_gone, "refused": drained.refused, "left": drained.left}
        took = {"drained_s": round(drained.took_s, 3), "took_s": round(took_s, 3)}
        ok = {"ok": code == Exit.OK, "exit_code": int(code), "address": address}
        report.json({**ok, **facts, **took})
        return code
    ended = f"{counted(drained.refused, 'request')} refused, {drained.left} left behind"
    stopping = f"stopping; running requests have up to {drained.grace_s:g} s"
    report.facts(
        ("process", f"{drained.process_id}, pid {drained.pid}, at {asked.shown}"),
        ("state", "gone" if is_gone else stopping),
        ("drained", "" if args.no_wait else f"in {drained.took_s:.1f} s; {ended}"),
        ("time", "" if args.no_wait else f"{took_s:.1f} s until it was gone"),
    )
    return code


def _has_gone(drained: pb2.DrainResponse, address: str) -> bool:
    until = time.monotonic() + GONE_S
    while _is_running(drained, address):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _is_running(drained: pb2.DrainResponse, address: str) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(drained.pid)
        if abs(process.create_time() - drained.started_at) <= SAME_START_S:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
    # Not visible from here, as in a container or behind a tunnel: what answers there decides.
    try:
        return bool(library.connect(address, patience_s=0.2).metrics(timeout=1).pid == drained.pid)
    except library.CallFailed:
        return False
