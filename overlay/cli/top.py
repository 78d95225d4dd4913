"""`client.py HOST PORT top`: the whole overlay in a terminal, or once for a pipe or a script.

Everything happens on the caller's thread; the poller has one of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterator

from rich.console import ConsoleDimensions, Group
from rich.live import Live

from overlay.cli.terminal import Exit, Screen
from overlay.cli.text import clean
from overlay.cli.top_view import Signs, lines
from overlay.cli.usage import Parser, complain, program, shared_options
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.monitor.poller import Poller
from overlay.monitor.snapshot import RequestFilter

ROUNDS = 2  # for one report: rates are differences
ONCE_S = 10.0  # the longest that a report is waited for
KEY_S = 0.1  # how soon a key, or a new size of the window, is noticed
QUIT_KEYS = ("q", "Q", "\x1b", "\x03")  # Windows gives Ctrl-C as a key too
NO_LIMIT = 10_000  # lines, where nothing scrolls

DESCRIPTION = """\
Shows the whole overlay live: the queue, every process and link, the last requests and events. q or
Ctrl-C ends it; the overlay may come and go meanwhile.

With --once it prints one report and exits with 0 when all is well, 1 when something is wrong, and 4
when the process asked cannot be reached. The fields of --json keep their meaning as long as its
"format" stays the same."""


def arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--once", action="store_true", help="print one report, also into a pipe")
    shared_options(parser, json="with --once: print one JSON object")
    only = parser.add_argument_group("which of the last requests to show")
    only.add_argument("--failed", action="store_true", help="only those that failed")
    only.add_argument("--handler", default="", metavar="NAME", help="only those to this handler")
    only.add_argument(
        "--caller", default="", metavar="TEXT", help="only those whose caller contains this"
    )
    only.add_argument(
        "--request", default="", metavar="ID", help="only those whose id contains this"
    )


def run(args: argparse.Namespace) -> int:
    if args.json and not args.once:
        complain(f"--json needs --once; {program()} HOST PORT top --help tells more")
        return Exit.USAGE
    if not (args.once or sys.stdout.isatty()):
        complain("standard output is not a terminal; --once prints one report")
        return Exit.USAGE
    try:
        wanted = RequestFilter(args.failed, args.handler, args.caller, args.request)
        poller = Poller(join_address(args.host, args.port), wanted=wanted).start()
    except ValueError as error:
        complain(str(error))
        return Exit.USAGE
    return _once(poller, args.json) if args.once else _live(poller)


def _once(poller: Poller, as_json: bool) -> int:
    until = time.monotonic() + ONCE_S
    snapshot = poller.newer(0, ONCE_S)
    while (left_s := until - time.monotonic()) > 0:
        known = [one["health"] != "asking" for one in (snapshot["asked"], *snapshot["processes"])]
        if snapshot["round"] >= ROUNDS and all(known):
            break
        snapshot = poller.newer(snapshot["round"], left_s)
    health = snapshot["asked"]["health"]
    is_well = all(process["health"] == "well" for process in snapshot["processes"])
    code = Exit.OK if is_well else Exit.FAILED
    if health in ("gone", "asking"):
        code = Exit.UNREACHABLE
        complain(clean(f"{snapshot['asked']['address']}: {snapshot['asked']['why']}"))
    screen = Screen(sys.stdout)
    if as_json:
        screen.json({"ok": code == Exit.OK, "exit_code": int(code), **snapshot})
    elif snapshot["processes"]:
        for line in lines(snapshot, screen.width, NO_LIMIT, Signs.of(screen.encoding)):
            screen.print(line)
    return code


def _live(poller: Poller) -> int:
    screen = Screen(sys.stdout)
    signs = Signs.of(screen.encoding)
    shown: tuple[int, ConsoleDimensions] | None = None
    live = Live(console=screen, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
        while pressed(KEY_S) not in QUIT_KEYS:
            snapshot, size = poller.newer(within_s=0), screen.size
            if not snapshot or shown == (snapshot["round"], size):
                continue
            shown = snapshot["round"], size
            drawn = lines(snapshot, size.width, size.height, signs)
            live.update(Group(*drawn), refresh=True)
    return Exit.OK


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key and returns it, or an empty string."""
    if not sys.stdin.isatty():
        yield _no_key
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


def _no_key(within_s: float) -> str:
    time.sleep(within_s)
    return ""
