"""The table of verbs: which there are, which of them a command line means, and their help.

A verb `v` is a row here and the module overlay.cli.v: `arguments(parser)` adds its own arguments,
`run(args)` does it and returns an exit code (see `EXITS`).
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from typing import Protocol, cast

from overlay.cli import usage
from overlay.cli.usage import Parser, program

OF_A_PROCESS = {  # after HOST PORT; `ask` is what no verb means
    "ask": "Sends one request",
    "map": "Sends many payloads, lines or files; the results keep their order",
    "submit": "Submits a job: a request that the leader keeps on its disk until it is answered",
    "result": "Shows how a job stands, and its answer; --wait waits for its end",
    "jobs": "Shows the newest jobs and schedules, and how many there are in each state",
    "cancel": "Cancels jobs and schedules",
    "quarantine": "Shows jobs that may have run, and runs them again or forgets them",
    "check": "Shows the state of this process and of its neighbours",
    "handlers": "Shows what the handlers do and take: signature, docstring",
    "logs": "Shows the last log lines of this process, or of one below it",
    "top": "Shows the whole overlay live, in this terminal",
    "web": "Shows the whole overlay live, as a page on this machine",
    "drain": "Stops this process: running requests finish, others are refused",
}
OF_ONE_PROCESS = ("check", "handlers", "logs", "top", "web", "drain")  # and not of any leader
OF_A_CONFIGURATION = {  # before CONFIG
    "init": "Asks for the addresses of your machines and writes them into the file",
    "check": "Shows every process of the file, and what is wrong",
    "secure": "Gives the overlay certificates, and closes it to everybody else",
    "doctor": "Finds what is wrong as seen from this machine, the likely cause, and what to do",
}
OF_CERTIFICATES = {  # in the project's folder: what follows the verb, and its help
    "join": ("LINE", "Joins an overlay as a machine or a person, by the line of an invitation"),
    "invite": ("NAME", "Makes a line by which a person, a program or a machine can join"),
    "revoke": ("NAME", "Ends the certificates of a name"),
    "identities": ("", "Shows whose certificates are in use, and until when"),
}
CONFIG_OF_INIT = "two_hosts_config.json"  # may be left out there

EXITS = """\
exit codes:
  0    success; with --mode all, every worker asked has answered; check: all is well
  1    the request failed (the handler raised, no such team); check: something is wrong;
       drain: requests were left behind;
       map: some requests failed (if all failed for one reason, that reason's code);
       result: the job ended without an answer; cancel, quarantine: some IDs were left as they are
  2    wrong arguments, or a file that cannot be used
  3    refused: no handler saw the request, try again later
  4    unreachable: nothing serves at the address, or no worker can be reached
  5    the deadline passed first; work may have begun; result: the job is not over yet
  6    incomplete: answered, but not by every worker asked
  130  interrupted

The report is the same on a terminal and in a pipe. --out keeps the exact bytes of the result, and
--json prints everything. A character that the output's code page lacks is written as \\uXXXX."""

HELP = {"-h", "--help"}


class Verb(Protocol):
    def arguments(self, parser: Parser) -> None: ...

    def run(self, args: object) -> int: ...


def main() -> int:
    """The whole program; returns its exit code."""
    with usage.importing():
        from overlay.cli.terminal import guarded
    return guarded(run)


def run() -> int:
    parser, verb, words = choose(sys.argv[1:])
    if HELP.intersection(words):  # even with a wrong HOST or PORT
        parser.print_help()
        return 0
    return verb.run(parser.parse_args(words))


# Which verb, and what belongs to it


def choose(words: list[str]) -> tuple[Parser, Verb, list[str]]:
    """The verb that the words name, its parser, and the words left for it."""
    if words and words[0] in OF_A_CONFIGURATION:
        return _of_a_configuration(words[0]), _verb(words[0]), words[1:]
    if words and words[0] in OF_CERTIFICATES:
        return _of_certificates(words[0]), _verb(words[0]), words[1:]
    if words and "," in words[0] and ":" in words[0]:  # of several leaders, HOST:PORT,HOST:PORT
        host, _, port = words[0].rpartition(":")
        words = [host, port, *words[1:]]
    name, rest = "ask", words
    if len(words) > 2 and not any(word.startswith("-") for word in words[:3]):
        name, rest = words[2], [*words[:2], *words[3:]]
    elif words and words[0] in OF_A_PROCESS and HELP.intersection(words):
        name, rest = words[0], words[1:]
    if complaint := _misread(words, name):
        Parser(program(), overview(), EXITS).error(complaint)
    return _of_a_process(name, is_named=rest is not words), _verb(name), rest


def _of_a_configuration(name: str) -> Parser:
    parser = Parser(f"{program()} {name}", OF_A_CONFIGURATION[name], EXITS)
    usage.config_argument(parser, CONFIG_OF_INIT if name == "init" else "")
    _verb(name).arguments(parser)
    return parser


def _of_certificates(name: str) -> Parser:
    parser = Parser(f"{program()} {name}", OF_CERTIFICATES[name][1], EXITS)
    _verb(name).arguments(parser)
    return parser


def _of_a_process(name: str, is_named: bool) -> Parser:
    if is_named:
        parser = Parser(f"{program()} HOST PORT {name}", OF_A_PROCESS[name], EXITS)
        parser.usage = f"{parser.prog} [options]"
    else:
        parser = Parser(program(), overview(), EXITS)
    usage.process_arguments(parser)
    _verb(name).arguments(parser)
    return parser


def _verb(name: str) -> Verb:
    """Imported when it is called: a request should not wait for the import of a web server."""
    with usage.importing():
        room = ".identity" if name == "secure" or name in OF_CERTIFICATES else ""
        return cast(Verb, importlib.import_module(f"overlay.cli{room}.{name}"))


def overview() -> str:
    """The forms that a command can have, one line for each verb."""
    forms = [
        (f"HOST PORT {'[options]' if name == 'ask' else name}", help_)
        for name, help_ in OF_A_PROCESS.items()
    ]
    forms += [(f"{name} CONFIG", help_) for name, help_ in OF_A_CONFIGURATION.items()]
    forms += [(f"{name} {word}", help_) for name, (word, help_) in OF_CERTIFICATES.items()]
    lines = [f"  {program()} {form:<22} {help_}" for form, help_ in forms]
    about = (
        "Asks an overlay from the command line. --help after a verb shows its own options. Of "
        "several leaders: HOST:PORT,HOST:PORT in place of HOST PORT."
    )
    return "\n".join([about, "", *lines])


def _misread(words: list[str], name: str) -> str:
    """What a common slip meant; empty when the words look right."""
    if name in OF_ONE_PROCESS and words and "," in words[0]:
        return f"{name} is about one process: give the HOST and PORT of one"
    if name not in OF_A_PROCESS:
        return f"there is no verb '{name}'{_suggestion(name, OF_A_PROCESS)}"
    if not words or words[0].startswith("-"):
        return ""
    near, colon, number = words[0].rpartition(":")
    if len(words) == 1 and colon and number.isdigit():
        return f"write HOST and PORT as two words: {program()} {near} {number}"
    if len(words) == 1 and words[0].endswith(".json"):
        return f"a verb is missing before the file: {program()} check {words[0]}"
    is_verb = difflib.get_close_matches(words[0], OF_A_CONFIGURATION, n=1)
    if is_verb and not (len(words) > 1 and words[1].isdigit()):
        return f"there is no verb '{words[0]}'{_suggestion(words[0], OF_A_CONFIGURATION)}"
    return f"PORT is missing after '{words[0]}'" if len(words) == 1 else ""


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest is '{near[0]}'" if near else f"; there are {', '.join(known)}"
