"""What the verbs share: asking a process, failures in words, exit codes, reports.

Reports go to stdout, complaints to stderr. Nothing here fails because of a console's code page, of
Ctrl-C, or of a reader that leaves.
"""

from __future__ import annotations

import argparse
import base64
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import IntEnum
from typing import IO, Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from overlay.cli import stdio
from overlay.cli.text import clean
from overlay.cli.usage import complain, program
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.model.errors import ConfigError
from overlay.model.segments import Code, Executed

PIPE_WIDTH = 2000  # columns; in a pipe nothing is cut or folded


class Exit(IntEnum):
    """What a script learns; overlay.cli.main describes each."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    LATE = 5
    INCOMPLETE = 6
    INTERRUPTED = 130


def guarded(run: Callable[[], int]) -> int:
    """run()'s exit code; Ctrl-C, a ConfigError and a reader that leaves cause no traceback."""
    stdio.escape_unprintable()
    output: Any = StandardOutput(sys.stdout)
    with redirect_stdout(output):
        try:
            code = run()
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
            complain("interrupted")
        except ConfigError as e:  # as of certificates that cannot be used
            code = misconfigured(e)
        sys.stdout.flush()
    return code


class StandardOutput:
    """Standard output, whose reader may leave as `| head -1` does.

    The rest is discarded then, and the exit code stays true. has_left: whether the reader left.
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
            if e.errno not in (errno.EPIPE, errno.EINVAL):  # the second on Windows
                raise
            self.has_left = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


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
    error: library.CallFailed,
    address: str,
    as_json: bool,
    of_a_request: bool = True,
    remark: str = "",
    **more: Any,
) -> int:
    """Prints what went wrong and returns the exit code for it.

    of_a_request: so the message also says whether a handler may have seen it. remark: what else to
    say. more: what else the JSON has.
    """
    code = exit_of(error)
    if as_json:
        found = {"ok": False, "exit_code": int(code), "address": address, **more}
        Screen(sys.stdout).json({**found, "error": error_as_json(error, address)})
    remark = (proof(error) if of_a_request else "") + remark
    complain(f"{clean(str(error))}{remark}{log_hint(error, address)}")
    return code


def error_as_json(error: library.CallFailed, address: str) -> dict[str, Any]:
    found = {
        "code": error.code.name,
        "message": str(error),
        "executed": error.executed.name,
        "retry_after_s": error.retry_after_s,
    }
    if error.request_id:
        found["request_id"] = f"{error.request_id:016x}"
        found["logs"] = logs_command(error.request_id, address)
    return found


def log_hint(error: library.CallFailed, address: str) -> str:
    """Which request failed, and how to see its log lines."""
    if not error.request_id:
        return ""
    shown_by = logs_command(error.request_id, address)
    return f"; request {error.request_id:016x}, its log lines: {shown_by}"


def logs_command(request_id: int, address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{program()} {host.strip('[]')} {port} logs --request {request_id:016x}"


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
    """Whether a handler saw the request, where that is in doubt, and when to try again."""
    if isinstance(error, library.NotReached) or not isinstance(error, _IN_DOUBT):
        return ""
    if error.executed is Executed.NO:
        after_s = error.retry_after_s
        again = "" if after_s is None else f", try again in {max(0.1, after_s):.1f} s"
        return f"; no handler saw the request{again}"
    return "; a handler may have seen the request"


_IN_DOUBT = (library.Refused, library.Unavailable, library.DeadlinePassed)


def misconfigured(error: ConfigError) -> Exit:
    """Prints every problem of a file that cannot be used and returns the exit code for it."""
    for problem in error.problems:
        complain(problem)
    return Exit.USAGE


def join_all(threads: Sequence[threading.Thread], within_s: float) -> None:
    """Waits for them, in slices: on Windows before Python 3.14, Ctrl-C does not end a join."""
    until = time.monotonic() + within_s
    for thread in threads:
        while thread.is_alive() and (left_s := until - time.monotonic()) > 0:
            thread.join(min(0.2, left_s))


# Reports


class Screen(Console):
    """Where a report goes. In a pipe nothing is cut; on a narrow terminal tables become lists."""

    def __init__(self, stream: IO[str]) -> None:
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

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; where it does not fit, each row as a paragraph. Without rows, nothing."""
        rows = list(rows)
        if not rows:
            return
        if title:
            self.print(Text(f"\n{title}", style="bold"))
        head, *lines = aligned(columns, rows)
        has_breaks = any("\n" in cell for row in rows for cell in row)
        if has_breaks or max(map(cell_len, (head, *lines))) > self.width:
            for row in rows:
                self.facts(*zip(columns, row, strict=True))
                self.print()
            return
        self.print(Text(head, style="bold"))
        for line in lines:
            self.print(Text(line))

    def json(self, value: object) -> None:
        self.out(json.dumps(value, indent=2), highlight=False)


def aligned(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()
) -> list[str]:
    """A line for the head and for each row. right: the columns that are aligned to the right."""
    cells = [[clean(cell).replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [
            gap + cell if at in right else cell + gap
            for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def result_as_json(result: bytes) -> dict[str, str | None]:
    """Text as text; other bytes as null, with result_base64 beside it."""
    try:
        return {"result": result.decode()}
    except UnicodeDecodeError:
        return {"result": None, "result_base64": base64.b64encode(result).decode()}
