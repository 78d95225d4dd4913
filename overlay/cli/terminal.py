"""What the command lines share: arguments, screens, failures in words, exit codes.

Reports go to stdout, complaints to stderr. Nothing here dies on a console's code page, on Ctrl-C or
on a reader that leaves.
"""

from __future__ import annotations

import argparse
import base64
import errno
import ipaddress
import json
import math
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from overlay.cli.usage import Parser as Parser
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.limits import Limits
from overlay.model.segments import Code, Executed
from overlay.model.topology import Process, Topology, join_address
from overlay.queueing.admission import HIGHEST_PRIORITY

Seen = TypeVar("Seen")

PIPE_WIDTH = 2000  # columns; in a pipe nothing is cut or folded


class Exit(IntEnum):
    """What a script learns; client.py's help describes each."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    LATE = 5
    INCOMPLETE = 6
    INTERRUPTED = 130


def guarded(run: Callable[[], int], name: str) -> NoReturn:
    """Ends the program with run()'s code; Ctrl-C and a reader that left leave no traceback."""
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    output: Any = Output(sys.stdout)
    with redirect_stdout(output):
        try:
            code = run()
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
            complain("interrupted", name)
        sys.stdout.flush()
    sys.exit(code)


class Output:
    """Standard output, whose reader may leave as `| head -1` does.

    Then the rest goes nowhere, and the exit code stays true. has_left: whether it did.
    """

    def __init__(self, stream: TextIO) -> None:
        self.has_left = False
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with self.leaving():
            self._stream.write(text)

    def write_bytes(self, data: bytes) -> None:
        with self.leaving():
            self._stream.buffer.write(data)

    def flush(self) -> None:
        with self.leaving():
            self._stream.flush()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EINVAL):  # the second is Windows' word for it
                raise
            self.has_left = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


# Arguments


def host(text: str) -> str:
    if not text.isprintable() or not text or "/" in text or " " in text:
        raise argparse.ArgumentTypeError(f"'{text}' is not a name or an address of a machine")
    if set(text) & set(":[]"):
        try:
            ipaddress.IPv6Address(text[1:-1] if text[0] + text[-1] == "[]" else text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not an address; one with colons is written as ::1 or [::1]"
            ) from None
    if not text.strip("0123456789."):  # no name looks so
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not an address: four numbers from 0 to 255"
            ) from None
    return text


def port(text: str) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not (is_number and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, a number from 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    with suppress(ValueError):
        number = float(text)
        if 0 < number <= 86_400 and math.isfinite(number):
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0, at most 86400")


def route_arguments(parser: Parser, mode: str, modes: str) -> None:
    """--mode, --team and --handler. mode: the default. modes: what each of them means."""
    parser.add_argument("--mode", type=str.lower, choices=("all", "any"), default=mode, help=modes)
    for option, help_ in (
        ("--team", "only the workers of this team"),
        ("--handler", "a handler of the configuration"),
    ):
        parser.add_argument(option, type=name, default="", metavar="NAME", help=help_)


def deadline_argument(parser: Parser, default: float, help_: str) -> None:
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=default,
        metavar="SECONDS",
        help=f"{help_} (default: %(default)g)",
    )


def priority_argument(parser: Parser) -> None:
    parser.add_argument(
        "--priority",
        type=priority,
        default=0,
        metavar="0..9",
        help="before this caller's other requests of less; a step is worth 2 s of waiting",
    )


def priority(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= HIGHEST_PRIORITY):
        raise argparse.ArgumentTypeError(f"'{text}' is not 0 to {HIGHEST_PRIORITY}")
    return int(text)


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to 1000000")
    return int(text)


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
    """As a failure tells it: hexadecimal, 8 digits."""
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


# Asking, and what went wrong


def connected(args: argparse.Namespace) -> library.Client:
    """A client for HOST PORT; raises CallFailed when the two make no address.

    Never closed: gRPC takes 0.2 s for that, and the program ends after its one call.
    """
    try:
        return library.connect(join_address(args.host, args.port))
    except ValueError as e:
        raise library.InvalidCall(str(e), code=Code.INVALID_ARGUMENT) from None


def failed(
    error: library.CallFailed, address: str, as_json: bool, of_a_request: bool = True
) -> int:
    """Says what went wrong, and gives the exit code for it.

    of_a_request: then whether a handler saw it is a question too.
    """
    code = exit_of(error)
    if as_json:
        said = error_as_json(error, address)
        Screen(sys.stdout).json(
            {"ok": False, "exit_code": int(code), "address": address, "error": said}
        )
    complain(f"{clean(str(error))}{proof(error) if of_a_request else ''}{whose(error, address)}")
    return code


def error_as_json(error: library.CallFailed, address: str) -> dict[str, Any]:
    said = {
        "code": error.code.name,
        "message": str(error),
        "executed": error.executed.name,
        "retry_after_s": error.retry_after_s,
    }
    if error.request_id:
        said["request_id"] = f"{error.request_id:016x}"
        said["logs"] = logs_command(error.request_id, address)
    return said


def whose(error: library.CallFailed, address: str) -> str:
    """Which request failed, and how to see what its processes wrote of it."""
    if not error.request_id:
        return ""
    shown_by = logs_command(error.request_id, address)
    return f"; request {error.request_id:016x}, its log lines: {shown_by}"


def logs_command(request_id: int, address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"client.py {host.strip('[]')} {port} logs --request {request_id:016x}"


def exit_of(error: library.CallFailed) -> Exit:
    for kind, code in _EXITS:
        if isinstance(error, kind):
            return code
    return Exit.FAILED


_EXITS: tuple[tuple[type[library.CallFailed], Exit], ...] = (
    (library.Refused, Exit.REFUSED),
    (library.Unavailable, Exit.UNREACHABLE),
    (library.DeadlinePassed, Exit.LATE),
    (library.CallCancelled, Exit.INTERRUPTED),
)


def proof(error: library.CallFailed) -> str:
    """Whether a handler saw the request, where that is a question, and when to try again."""
    if isinstance(error, library.NotReached) or not isinstance(error, _IN_DOUBT):
        return ""
    if error.executed is Executed.NO:
        after_s = error.retry_after_s
        again = "" if after_s is None else f", try again in {max(0.1, after_s):.1f} s"
        return f"; no handler saw the request{again}"
    return "; a handler may have seen the request"


_IN_DOUBT = (library.Refused, library.Unavailable, library.DeadlinePassed)


def complain(sentence: str, name: str = "client.py") -> None:
    with suppress(OSError):
        sys.stderr.write(f"{name}: {sentence}\n")


def misconfigured(error: ConfigError) -> Exit:
    """Says every problem of a file that cannot be used, and gives the exit code for it."""
    for problem in error.problems:
        complain(problem)
    return Exit.USAGE


def asked_at_once(
    topology: Topology, look: Callable[[Process], Seen], within_s: float
) -> dict[str, Seen]:
    """What `look` finds of each process, on a thread each; without those that take longer."""
    found: dict[str, Seen] = {}

    def keep(process: Process) -> None:
        found[process.id] = look(process)

    processes = topology.processes.values()
    threads = [threading.Thread(target=keep, args=(p,), daemon=True) for p in processes]
    for thread in threads:
        thread.start()
    join_all(threads, within_s)
    return dict(found)


def join_all(threads: Sequence[threading.Thread], within_s: float) -> None:
    """Waits for their ends. In slices: before Python 3.14, Windows hears no Ctrl-C in a join."""
    until = time.monotonic() + within_s
    for thread in threads:
        while thread.is_alive() and (left_s := until - time.monotonic()) > 0:
            thread.join(min(0.2, left_s))


# Reports


class Screen(Console):
    """Where a report goes. In a pipe nothing is cut; on a narrow terminal tables become lists."""

    def __init__(self, stream: Any) -> None:
        width = None if stream.isatty() else PIPE_WIDTH
        super().__init__(
            file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True
        )

    def say(self, text: str) -> None:
        self.print(Text(clean(text)))

    def facts(self, *rows: tuple[str, str]) -> None:
        """One fact a line, its label first; a fact without a value is left out."""
        wide = max(len(label) for label, _ in rows) + 2
        for label, value in rows:
            if value:
                text = clean(value).replace("\n", "\n" + " " * wide)
                self.print(Text.assemble((label.ljust(wide), "bold"), text))

    def table(self, title: str, columns: Sequence[str], rows: Any) -> None:
        """A table; where it does not fit, each row as a paragraph. Nothing for no rows."""
        rows = [[clean(cell) for cell in row] for row in rows]
        if not rows:
            return
        if title:
            self.print(Text(f"\n{title}", style="bold"))
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        natural = Measurement.get(self, self.options.update(max_width=PIPE_WIDTH), table)
        if natural.maximum <= self.width:
            self.print(table)
            return
        for row in rows:
            self.facts(*zip(columns, row, strict=True))
            self.print()

    def json(self, value: Any) -> None:
        self.out(json.dumps(value, indent=2), highlight=False)


def shown(result: bytes) -> str:
    """The result as a person reads it; of binary data only the size."""
    if not result:
        return "(empty)"
    try:
        text = result.decode()
    except UnicodeDecodeError:
        return f"{sized(result)}, not text; --out FILE keeps them"
    if "\0" in text:
        return f"{sized(result)}, not text; --out FILE keeps them"
    return text


def clean(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        else c
        for c in text
    )


def sized(result: bytes) -> str:
    return f"{len(result):,} byte{'' if len(result) == 1 else 's'}"


def counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def result_as_json(result: bytes) -> dict[str, str | None]:
    """Text as text; other bytes as null, with result_base64 beside it."""
    try:
        return {"result": result.decode()}
    except UnicodeDecodeError:
        return {"result": None, "result_base64": base64.b64encode(result).decode()}
