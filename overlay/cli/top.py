"""`client.py HOST PORT top`: the whole overlay in a terminal, or once for a pipe or a script.

Everything happens on the caller's thread; the watch has one of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.live import Live

from overlay.cli.terminal import Exit, Screen
from overlay.cli.text import clean
from overlay.cli.top_view import Signs, lines
from overlay.cli.usage import Parser, complain, program, shared_options
from overlay.model import clocks as time
from overlay.model.topology import join_address
from overlay.monitor.poller import Poller
from overlay.monitor.snapshot import Wanted

ROUNDS = 2  # for one report: rates are differences
ONCE_S = 10.0  # and at most so long for it
KEY_S = 0.1  # how soon a key, or a new size of the window, is noticed
ENDING_KEYS = ("q", "Q", "\x1b", "\x03")  # Windows gives Ctrl-C as a key too
EVERYTHING = 10_000  # lines, where nothing scrolls by

DESCRIPTION = """\
Shows the whole overlay live: the queue, every process and link, the last requests and events. It
ends with q or Ctrl-C; the overlay may come and go meanwhile.

With --once it prints one report and ends: 0 when all is well, 1 when something is not, 4 when the
process asked cannot be reached. The fields of --json keep their meaning as long as its "format"
stays the same."""


def arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--once", action="store_true", help="one report, also into a pipe")
    shared_options(parser, json="with --once: print one JSON object")
    only = parser.add_argument_group("of the last requests, show only")
    only.add_argument("--failed", action="store_true", help="those that failed")
    only.add_argument("--handler", default="", metavar="NAME", help="those to this handler")
    only.add_argument("--caller", default="", metavar="TEXT", help="those whose caller has this")
    only.add_argument("--request", default="", metavar="ID", help="those with this in their id")


def run(args: argparse.Namespace) -> int:
    if args.json and not args.once:
        complain(f"--json goes with --once; {program()} HOST PORT top --help tells more")
        return Exit.USAGE
    if not (args.once or sys.stdout.isatty()):
        complain("standard output is no terminal; --once prints one report")
        return Exit.USAGE
    try:
        wanted = Wanted(args.failed, args.handler, args.caller, args.request)
        watch = Poller(join_address(args.host, args.port), wanted=wanted).start()
    except ValueError as error:
        complain(str(error))
        return Exit.USAGE
    return _once(watch, args.json) if args.once else _live(watch)


def _once(watch: Poller, as_json: bool) -> int:
    until = time.monotonic() + ONCE_S
    picture = watch.newer(0, ONCE_S)
    while (left_s := until - time.monotonic()) > 0:
        known = [one["health"] != "asking" for one in (picture["asked"], *picture["processes"])]
        if picture["round"] >= ROUNDS and all(known):
            break
        picture = watch.newer(picture["round"], left_s)
    health = picture["asked"]["health"]
    is_well = all(process["health"] == "well" for process in picture["processes"])
    code = Exit.OK if is_well else Exit.FAILED
    if health in ("gone", "asking"):
        code = Exit.UNREACHABLE
        complain(clean(f"{picture['asked']['address']}: {picture['asked']['why']}"))
    screen = Screen(sys.stdout)
    if as_json:
        screen.json({"ok": code == Exit.OK, "exit_code": int(code), **picture})
    elif picture["processes"]:
        for line in lines(picture, screen.width, EVERYTHING, Signs.of(screen.encoding)):
            screen.print(line)
    return code


def _live(watch: Poller) -> int:
    screen = Screen(sys.stdout)
    signs = Signs.of(screen.encoding)
    shown: tuple[Any, ...] = ()
    live = Live(console=screen, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
        while pressed(KEY_S) not in ENDING_KEYS:
            picture, size = watch.newer(within_s=0), screen.size
            if not picture or shown == (picture["round"], size):
                continue
            shown = picture["round"], size
            drawn = lines(picture, size.width, size.height, signs)
            live.update(Group(*drawn), refresh=True)
    return Exit.OK


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and gives it, or nothing."""
    if not sys.stdin.isatty():
        yield lambda within_s: time.sleep(within_s)
    elif sys.platform == "win32":
        import msvcrt

        def pressed(within_s: float) -> str:
            time.sleep(within_s)
            return msvcrt.getwch() if msvcrt.kbhit() else ""

        yield pressed
    else:
        import termios
        import tty

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
        tty.setcbreak(keyboard)

        def read(within_s: float) -> str:
            ready, _, _ = select.select([keyboard], [], [], within_s)
            return os.read(keyboard, 16).decode("utf-8", "replace") if ready else ""

        try:
            yield read
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
