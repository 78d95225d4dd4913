"""A program's name and arguments: the parser, the types of arguments, the options that verbs share.

Needs no installed package, so that a program can say which one is missing.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from datetime import time as daytime
from pathlib import Path
from typing import Any, NoReturn

from overlay.cli import stdio
from overlay.cli.text import clean
from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.jobs import is_job_id
from overlay.model.limits import Limits
from overlay.queueing.admission import HIGHEST_PRIORITY

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST_S = 366 * 86_400  # of a duration
DAY = r"\d{4}-\d\d-\d\d"


def program() -> str:
    """The program as its user called it: `client.py` in the project's folder, else `overlay`."""
    return Path(sys.argv[0]).name


def is_installed() -> bool:
    """Whether this is the installed program, which has no project folder with scripts."""
    return not program().endswith(".py")


@contextmanager
def importing() -> Iterator[None]:
    """Around a program's first imports: what makes them fail becomes a sentence and exit code 2.

    Before them it opens the standard streams that are missing, as nothing may take their numbers.
    """
    stdio.complete()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our messages say the same as gRPC's lines
    try:
        yield
    except ModuleNotFoundError as e:
        problem = (
            f"the package '{e.name}' is not installed for this Python; "
            "use the Python in .venv, or run: python -m pip install -r requirements.txt"
        )
    except ConfigError as e:  # the generated code is missing or does not fit
        problem = str(e)
    except KeyboardInterrupt:  # half of a short run is importing
        raise SystemExit(130) from None
    else:
        return
    complain(problem)
    raise SystemExit(2)


def complain(sentence: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{program()}: {sentence}\n")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the program ends with exit code 2."""

    def __init__(self, prog: str, description: str, epilog: str = "", **more: Any) -> None:
        """prog: the command up to its verb. more: what argparse itself passes to subparsers."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        name = self.prog.split()[0]
        sentence = re.sub(r"^argument (\S+): ", r"\1: ", message)
        self.exit(2, f"{name}: {sentence}; {self.prog} --help tells more\n")


# Arguments that verbs share


def process_arguments(parser: Parser) -> None:
    parser.add_argument("host", metavar="HOST", type=host, help="name or address of a process")
    parser.add_argument("port", metavar="PORT", type=port, help="its port")


def config_argument(parser: Parser, default: str = "") -> None:
    """default: the file that is meant when none is named; without one it must be."""
    help_ = "the configuration file"
    if default:
        help_ += " (default: %(default)s)"
        parser.add_argument("config", metavar="CONFIG", nargs="?", default=default, help=help_)
    else:
        parser.add_argument("config", metavar="CONFIG", help=help_)


def shared_options(
    parser: Parser,
    *,
    mode: str = "",
    deadline_s: float = 0.0,
    deadline: str = "how long to wait for an answer",
    priority: bool = False,
    json: str = "print the report as one JSON object",
) -> None:
    """The options that have one name and one meaning in every verb, each where it is wanted.

    mode: the default of --mode, with which come --team and --handler. deadline_s: the default of
    --deadline, which `deadline` explains. json: what --json does.
    """
    add = parser.add_argument
    if mode:
        modes = "any: one worker, the least loaded; all: every worker (default: %(default)s)"
        add("--mode", type=str.lower, choices=("all", "any"), default=mode, help=modes)
        add("--team", type=name, default="", metavar="NAME", help="only workers of this team")
        handler = "a handler of the configuration (default: the one of each worker)"
        add("--handler", type=name, default="", metavar="NAME", help=handler)
    if deadline_s:
        help_ = f"{deadline} (default: %(default)g)"
        add("--deadline", type=seconds, default=deadline_s, metavar="SECONDS", help=help_)
    if priority:
        first = (
            "goes before this caller's requests of lower priority; a step is worth 2 s of waiting"
        )
        add("--priority", type=_priority, default=0, metavar="0..9", help=first)
    if json:
        add("--json", action="store_true", help=json)


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the shared options those that every kind of request takes, by the library's names."""
    return {"team": args.team, "timeout": args.deadline, "priority": args.priority}


# Types of arguments


def host(text: str) -> str:
    """Also "a:50051,b", of several leaders: those before the last have their ports."""
    *others, text = text.split(",")
    for other in others:
        at, _, number = other.rpartition(":")
        host(at)
        port(number)
    return ",".join([*others, _host(text)])


def _host(text: str) -> str:
    if not text.isprintable() or not text or "/" in text or " " in text:
        raise argparse.ArgumentTypeError(f"'{text}' is not a name or an address of a machine")
    if set(text) & set(":[]"):
        try:
            ipaddress.IPv6Address(text[1:-1] if text[0] + text[-1] == "[]" else text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not an address; one with colons is written as ::1 or [::1]"
            ) from None
    if not text.strip("0123456789."):  # no name looks like this
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not an address: four numbers from 0 to 255"
            ) from None
    return text


def port(text: str) -> int:
    return _whole(text, 1, 65535, "a port, a number from 1 to 65535")


def port_or_any(text: str) -> int:
    return _whole(text, 0, 65535, "a port, a number from 0 to 65535")


def whole_number(text: str) -> int:
    return _whole(text, 1, 1_000_000, "a whole number from 1 to 1000000")


def _priority(text: str) -> int:
    return _whole(text, 0, HIGHEST_PRIORITY, f"0 to {HIGHEST_PRIORITY}")


def _whole(text: str, least: int, most: int, wanted: str) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not (is_number and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}")
    return int(text)


def seconds(text: str) -> float:
    with suppress(ValueError):
        number = float(text)
        if 0 < number <= 86_400 and math.isfinite(number):
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0, at most 86400")


def duration(text: str) -> float:
    """Seconds, of 90, 90s, 15m, 1h or 2d."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)
    span_s = float(found[1]) * UNITS_S[found[2] or "s"] if found else 0.0
    if not 0 < span_s <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"'{clean(text)}' is not a duration such as 90s, 15m, 1h or 2d, at most 366d"
        )
    return span_s


def start_time(text: str) -> float:
    return moment(text, time.time())


def moment(text: str, now: float) -> float:
    """Seconds since 1970 of a local date and time, or of the next time that it is that o'clock."""
    today = datetime.fromtimestamp(now)
    try:
        if re.fullmatch(r"\d\d:\d\d(:\d\d)?", text, re.ASCII):
            at = datetime.combine(today, daytime.fromisoformat(text))
            at += timedelta(days=at <= today)
        elif re.fullmatch(rf"{DAY}[T ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?", text, re.ASCII):
            at = datetime.fromisoformat(text.replace("Z", "+00:00"))
        else:
            raise ValueError
        found = at.timestamp()
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"'{clean(text)}' is not a time such as 22:00 or 2026-11-28T22:00"
        ) from None
    if found <= now:
        raise argparse.ArgumentTypeError(f"'{text}' is in the past")
    return found


def job_id(text: str) -> str:
    if not is_job_id(text):
        raise argparse.ArgumentTypeError(
            f"'{clean(text)}' is not the id of a job, 16 digits from 0 to f"
        )
    return text


def request_id(text: str) -> int:
    """As it is printed: hexadecimal, at most 16 digits."""
    with suppress(ValueError):
        number = int(text, 16)
        if 0 < number < 2**64:
            return number
    raise argparse.ArgumentTypeError(
        f"'{clean(text)}' is not the id of a request, up to 16 digits from 0 to f"
    )


def error_id(text: str) -> str:
    """As a failure has it: hexadecimal, 8 digits."""
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise argparse.ArgumentTypeError(
            f"'{clean(text)}' is not the id of an error, 8 digits from 0 to f"
        )
    return text


def name(text: str) -> str:
    # What a command line holds that is not text is not printable, either.
    if not text.isprintable() or len(text) > Limits.max_name:
        raise argparse.ArgumentTypeError(
            f"'{clean(text[:20])}' is not a name of at most {Limits.max_name} letters"
        )
    return text


def out_file(text: str) -> str:
    path = Path(text)
    if text != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a file in a folder that exists")
    return text
