"""Asks an overlay from the command line: `python client.py --help` says how.

A verb is a row in VERBS (asks one process) or in OVERALL (asks every process of a configuration),
and a module of overlay/cli: its arguments, and a function from them to an exit code. Reports go to
stdout, complaints to stderr.
"""

from __future__ import annotations

import sys

import overlay  # noqa: F401 - this folder's, whatever else is installed

if __name__ == "__main__":  # a random.py of yours in this folder is not Python's
    sys.path.append(sys.path.pop(0))

import argparse
import difflib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay.cli import stdio
from overlay.model.errors import ConfigError

stdio.complete()
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its lines go to stderr, ours tell the same


def not_installed(error: ModuleNotFoundError) -> str:
    return (
        f"the package '{error.name}' is not installed for this Python; "
        "use the Python in .venv, or run: python -m pip install -r requirements.txt"
    )


try:
    from overlay.cli.terminal import Exit, Parser, complain, guarded, host, port
except ModuleNotFoundError as e:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {not_installed(e)}\n")
    raise SystemExit(2) from None
except ConfigError as e:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {e}\n")
    raise SystemExit(2) from None
except KeyboardInterrupt:  # half of a short run is importing
    raise SystemExit(130) from None

EXITS = """\
exit codes:
  0    answered, for --mode all by every worker asked; check: all is well
  1    answered with an error (the handler raised, no such team); check: something is not well;
       drain: requests were left behind;
       map: some failed (when all did for one reason, that reason's code)
  2    wrong arguments, or a file that cannot be used
  3    refused truthfully: no handler saw the request, try again later
  4    nobody to ask: nothing serves at the address, or no worker can be reached
  5    the deadline passed first; work may have begun
  6    incomplete: answered, but not by every worker asked
  130  interrupted

The report is the same on a terminal and in a pipe. --out keeps the result's own bytes, --json tells
everything. A character that the output's code page lacks is written as \\uXXXX."""


HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Verb:
    """help: one line. arguments: adds its own to a parser. run: does it and gives the exit code."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def main() -> int:
    parser, verb, words = choose(sys.argv[1:])
    if HELP.intersection(words):  # also with a HOST and a PORT that are none yet
        parser.print_help()
        return Exit.OK
    return verb.run(parser.parse_args(words))


# Which verb, and what belongs to it


def choose(words: list[str]) -> tuple[Parser, Verb, list[str]]:
    """The verb that the words name, its parser, and the words left for it."""
    if words and words[0] in OVERALL:
        verb = OVERALL[words[0]]
        parser = Parser(f"client.py {words[0]}", verb.help, EXITS)
        verb.arguments(parser)
        return parser, verb, words[1:]
    name, rest = "ask", words
    if len(words) > 2 and not any(word.startswith("-") for word in words[:3]):
        name, rest = words[2], [*words[:2], *words[3:]]
    elif words and words[0] in VERBS and HELP.intersection(words):
        name, rest = words[0], words[1:]
    if complaint := _misread(words, name):
        Parser("client.py", overview(), EXITS).error(complaint)
    verb = VERBS[name]
    if rest is words:
        parser = Parser("client.py", overview(), EXITS)
    else:
        parser = Parser(f"client.py HOST PORT {name}", verb.help, EXITS)
        parser.usage = f"{parser.prog} [options]"
    parser.add_argument("host", metavar="HOST", type=host, help="name or address of a process")
    parser.add_argument("port", metavar="PORT", type=port, help="its port")
    verb.arguments(parser)
    return parser, verb, rest


def overview() -> str:
    """The forms that a command can have, one line for each verb."""
    forms = [("HOST PORT [options]", VERBS["ask"].help)]
    forms += [(f"HOST PORT {name}", verb.help) for name, verb in VERBS.items() if name != "ask"]
    forms += [(f"{name} CONFIG", verb.help) for name, verb in OVERALL.items()]
    lines = [f"  client.py {form:<22} {help_line}" for form, help_line in forms]
    return "\n".join(["Asks an overlay. A verb tells its own options with --help.", "", *lines])


def _misread(words: list[str], name: str) -> str:
    """What a slip of the usual kinds meant; empty when the words look right."""
    if name not in VERBS:
        return f"there is no verb '{name}'{_suggestion(name, VERBS)}"
    if not words or words[0].startswith("-"):
        return ""
    near, colon, number = words[0].rpartition(":")
    if len(words) == 1 and colon and number.isdigit():
        return f"write HOST and PORT as two words: client.py {near} {number}"
    if len(words) == 1 and words[0].endswith(".json"):
        return f"a verb is missing before the file: client.py check {words[0]}"
    is_verb = difflib.get_close_matches(words[0], OVERALL, n=1)
    if is_verb and not (len(words) > 1 and words[1].isdigit()):
        return f"there is no verb '{words[0]}'{_suggestion(words[0], OVERALL)}"
    return f"PORT is missing after '{words[0]}'" if len(words) == 1 else ""


def _suggestion(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; '{near[0]}' is one" if near else f"; there are {', '.join(known)}"


def _verb(help_line: str, module: str, kind: str = "") -> Verb:
    """The verb that a module of the package has; imported when it is called: a page's server is
    nothing that a request should wait for."""

    def later(function: str) -> Callable[[Any], Any]:
        def call(given: Any) -> Any:
            try:
                found = importlib.import_module(f"overlay.cli.{module}")
            except ModuleNotFoundError as e:
                complain(not_installed(e))
                raise SystemExit(Exit.USAGE) from None
            return getattr(found, function)(given)

        return call

    return Verb(help_line, later(f"{kind}arguments"), later(f"{kind}run"))


VERBS = {
    "ask": _verb("Sends one request", "ask"),
    "map": _verb("Sends lines or files as they are, results in their order", "map"),
    "check": _verb("What this process says of itself and its neighbours", "check"),
    "handlers": _verb("What the handlers do and take: signature, docstring", "handlers"),
    "logs": _verb("The last lines of this process's log, or of one below it", "logs"),
    "top": _verb("The whole overlay live, in this terminal", "top"),
    "web": _verb("The whole overlay live, as a page on this machine", "web"),
    "drain": _verb("Stops this process: what runs is finished, the rest refused", "drain"),
}
OVERALL = {
    "init": _verb(
        "Asks for the addresses of your machines and writes them into the configuration",
        "init",
    ),
    "check": _verb("Every process of a configuration file, in one table", "check", "all_"),
    "doctor": _verb(
        "What is not well as seen from this machine, the likely cause, and what to do", "doctor"
    ),
}


if __name__ == "__main__":
    guarded(main, "client.py")
