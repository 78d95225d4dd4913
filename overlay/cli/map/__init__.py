"""`client.py HOST PORT map`: many payloads in, their results out, memory bounded by the window.

    input --> Client.map_as_completed --> output

Everything happens on the caller's thread, but for the two that those modules own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from overlay.cli.map.input import MAX_SHOWN, FilesInput, Input, input_of, sentence_of
from overlay.cli.map.output import Output, Result, Unanswered, check_is_no_input, output_of
from overlay.cli.terminal import Exit, Screen, connected, exit_of, failed, log_hint, proof
from overlay.cli.text import clean, counted
from overlay.cli.usage import (
    Parser,
    complain,
    out_file,
    program,
    request_options,
    seconds,
    shared_options,
    whole_number,
)
from overlay.client import sync as library
from overlay.client.arguments import call_kind
from overlay.model import clocks as time
from overlay.model.addresses import join_address
from overlay.model.limits import Limits

if TYPE_CHECKING:
    from overlay.client.resume import Record

WINDOW = 4096
PATIENCE_S = 30.0
REFRESH_S = 0.1  # of the progress bar

DESCRIPTION = """\
Sends many payloads, each to one worker, and prints the results in the order of the input. Payloads
are the lines of files or of standard input (without their line ends), or the files of a folder
(without the hidden ones).

A failure does not stop the others. In the output of lines it leaves an empty line, so that line n
belongs to line n of the input; --json prints an object for each, whose index counts from 0. A
payload that provably did not run is sent again as long as others are answered, and for --patience
after that.

--failed FILE keeps every payload that has no result, as input for another map: lines as lines; of a
folder, the paths of the files, which map takes as @FILE.

--resume FILE keeps the results there as they arrive. After an interruption (Ctrl-C, a kill, a
restart of the machine, a leader that is gone) the same command goes on: payloads with a result are
not sent again, and the output is that of a map without an interruption. Failures are tried again,
and more input may follow at the end; any other change of the input, the handler, the team or the
mode is refused. What was under way at the interruption may run twice."""


def arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.usage = f"{parser.prog} [FILE ... | FOLDER | @FILE | -] [options]"
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        default=["-"],
        metavar="FILE|FOLDER|@FILE|-",
        help="lines of files, the files of a folder, the files whose paths are in FILE, or lines "
        "of standard input (default)",
    )
    add("--out", type=out_file, metavar="FILE", help="write the output lines there")
    add(
        "--out-folder",
        type=Path,
        metavar="DIR",
        help="write each result to a file there, named as its input file",
    )
    add(
        "--failed",
        type=out_file,
        metavar="FILE",
        help="write the payloads without a result there, for another map; no file if there are "
        "none",
    )
    add(
        "--resume",
        metavar="FILE",
        help="keep the results in FILE too, and go on from those that it has",
    )
    add("--as-completed", action="store_true", help="print results as they arrive, in no order")
    add(
        "--window",
        type=whole_number,
        default=WINDOW,
        metavar="N",
        help="how many payloads are on their way, or held for their order, at most (default: "
        "%(default)s)",
    )
    add(
        "--patience",
        type=seconds,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="how long to wait for a process that is lost on the way, and to send again what did "
        "not run while no other is answered (default: %(default)g)",
    )
    shared_options(
        parser,
        mode="any",
        deadline_s=Limits.max_deadline_s,
        deadline="how long each may take from when it is sent, waiting included",
        priority=True,
        json="print one JSON object a line",
    )


def run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as closing:
        try:
            source = input_of(args.inputs)
            # First: where it is refused, the output of the first run is still there.
            if record := _record_of(args, source):
                closing.callback(record.close)
            output, unanswered = output_of(args, source), Unanswered(args, source)
            closing.callback(output.close)
        except (OSError, ValueError, ImportError, library.ResumeError) as e:
            complain(sentence_of(e))
            return Exit.USAGE
        try:
            return _Run(args, source, output, unanswered, record).run()
        except OSError as e:
            complain(sentence_of(e))
            return Exit.FAILED


def _record_of(args: argparse.Namespace, source: Input) -> Record | None:
    """Opened, and compared with the input if that can be read twice.

    Raises ValueError, OSError, ResumeError, or ImportError in a Python without SQLite.
    """
    if args.resume is None:
        return None
    from overlay.client.resume import open_record

    _check_is_apart(args)
    kind = call_kind(args.mode, args.team, args.handler, False, args.priority)
    record = open_record(args.resume, kind, False, source.name_of)
    try:
        if (payloads := source.ahead()) is not None:
            record.check(payloads)
    except BaseException:
        record.close()
        raise
    return record


def _check_is_apart(args: argparse.Namespace) -> None:
    """Raises ValueError if the record would be an input or an output as well."""
    path = os.path.realpath(args.resume)
    if args.resume in ("", "-"):
        raise ValueError("--resume needs a file of its own")
    check_is_no_input(args.resume, args.inputs)
    for option, file in (("--out", args.out), ("--failed", args.failed)):
        if file not in (None, "-") and os.path.realpath(file) == path:
            raise ValueError(f"{option} and --resume cannot be one file")
    for folder in (*args.inputs, args.out_folder):
        if folder and os.path.realpath(folder) == os.path.dirname(path):
            raise ValueError(f"--resume cannot be in '{folder}', among the inputs or the results")


class _Run:
    """One map, and its counts so far."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: Input,
        output: Output,
        unanswered: Unanswered,
        record: Record | None,
    ) -> None:
        self._args = args
        self._address = join_address(args.host, args.port)
        self._source = source
        self._output = output
        self._unanswered = unanswered
        self._record = record
        self._began = time.monotonic()
        self._answered = 0
        self._incomplete = 0
        self._failed: Counter[str] = Counter()
        self._exits: set[Exit] = set()
        self._bar = _Bar(source, output)

    def run(self) -> int:
        ended: library.NotReached | library.ResumeError | None = None
        try:
            with self._unanswered, self._bar:
                self._take_all()
        except (library.NotReached, library.ResumeError) as e:
            ended = e
        except library.CallFailed as e:
            if not self._output.reader_left:
                return failed(e, self._address, False)
        except KeyboardInterrupt:
            complain(self._summary())
            raise
        if self._output.reader_left:
            return self._exit()
        if ended is not None:
            is_away = isinstance(ended, library.NotReached)
            self._exits.add(Exit.UNREACHABLE if is_away else Exit.FAILED)
            complain(clean(str(ended)))
        if ended is None or self._answered or self._failed.total():
            complain(self._summary())
        return self._exit(ended is not None)

    def _take_all(self) -> None:
        args = self._args
        logging.getLogger("overlay.client").addHandler(_LibraryLog(self._bar))
        client = connected(args)
        self._output.on_reader_left = client.close  # ends the wait for the next result
        results = client.map_as_completed(
            args.handler or None,
            self._unanswered.noted(self._source.payloads()),
            mode=args.mode,
            window=args.window,
            ordered=not args.as_completed,
            patience_s=args.patience,
            resume=self._record,
            **request_options(args),
        )
        with contextlib.closing(results):  # type: ignore[type-var]  # a generator
            for index, result in results:
                if self._output.reader_left:
                    return
                self._take(index, self._source.name_of(index), result)
                if self._output.reader_left:
                    return

    def _take(self, index: int, name: str, result: Result) -> None:
        if isinstance(result, library.CallFailed):
            reason = f"{clean(str(result))}{proof(result)}{log_hint(result, self._address)}"
            self._fail(result.code.name, f"{name}: {reason}")
            self._exits.add(exit_of(result))
        else:
            self._answered += 1
            if isinstance(result, library.Incomplete):
                self._note_missing(name, result)
        self._unanswered.answered(index, isinstance(result, bytes))
        self._output.write(index, name, result)
        self._bar.advance(self._answered, self._failed.total() + len(self._source.unreadable))

    def _fail(self, reason: str, sentence: str) -> None:
        self._failed[reason] += 1
        self._mention(sentence, self._failed.total())

    def _note_missing(self, name: str, result: library.Incomplete) -> None:
        self._incomplete += 1
        missing = ", ".join(f"{p.process_id} ({p.reason or p.code.name})" for p in result.missing)
        self._mention(f"{name}: not answered by {clean(missing)}", self._incomplete)

    def _mention(self, sentence: str, number: int) -> None:
        if number <= MAX_SHOWN:
            self._bar.complain(sentence)
        elif number == MAX_SHOWN + 1:
            self._bar.complain("further ones are only counted, at the end")

    def _summary(self) -> str:
        took_s = time.monotonic() - self._began
        failures = self._failed + Counter({"unreadable": len(self._source.unreadable)})
        every = self._answered + failures.total()
        text = f"{self._answered:,} of {every:,} answered in {took_s:.1f} s"
        recalled = self._record.recalled if self._record else 0
        if self._answered > recalled:
            text += f", {(self._answered - recalled) / max(took_s, 0.001):,.0f}/s"
        if self._record:
            path, added = clean(self._args.resume), self._record.added
            text += f"; {recalled:,} of them from '{path}', {added:,} recorded there"
        if failures.total():
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in failures.most_common() if n)
            kept, sign = self._args.failed, "@" if isinstance(self._source, FilesInput) else ""
            kept = f" (kept for another map: {sign}{kept})" if kept else ""
            text += f"; {failures.total():,} failed{kept}: {reasons}"
        if self._incomplete:
            text += f"; {counted(self._incomplete, 'result')} incomplete"
        return text

    def _exit(self, ended_early: bool = False) -> int:
        any_failed = self._failed.total() or self._source.unreadable or ended_early
        if any_failed:
            same = len(self._exits) == 1 and not self._answered and not self._source.unreadable
            return self._exits.pop() if same else Exit.FAILED
        return Exit.INCOMPLETE if self._incomplete else Exit.OK


# Progress


class _Bar:
    """On stderr, when that is a terminal where no results scroll by."""

    def __init__(self, source: Input, output: Output) -> None:
        self._total = source.total
        self._progress: Progress | None = None
        self._next = 0.0
        self._began = time.monotonic()
        if sys.stderr.isatty() and not output.to_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Screen(sys.stderr),
                transient=True,
            )
            self._task = self._progress.add_task("", total=self._total, text="")

    def __enter__(self) -> None:
        if self._progress is not None:
            self._progress.start()

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, answered: int, failed: int) -> None:
        if self._progress is None:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REFRESH_S
        done = answered + failed
        of = f" of {self._total:,}" if self._total is not None else ""
        rate = done / max(now - self._began, 0.001)
        text = f"{done:,}{of}, {rate:,.0f}/s, {failed:,} failed"
        self._progress.update(self._task, completed=done, text=text)

    def complain(self, sentence: str) -> None:
        if self._progress is None:
            complain(sentence)
        else:
            self._progress.console.print(f"{program()}: {sentence}")


class _LibraryLog(logging.Handler):
    """Shows what the library warns of: that the process is gone and is being waited for."""

    def __init__(self, bar: _Bar) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.complain(clean(record.getMessage()))
