"""`client.py HOST PORT map`: many payloads in, their results out, memory bounded by the window.

    lines of files or of stdin, files of a folder --> Client.map_as_completed --> stdout, a file,
                                                                                  files of a folder

Everything happens on the caller's thread. Beside it are "map-reader", which reads stdin, and
"map-flusher", which lets what was written leave while nothing new comes; both end with the program.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from overlay.cli.terminal import (
    Exit,
    Screen,
    connected,
    error_as_json,
    exit_of,
    failed,
    proof,
    result_as_json,
    whose,
)
from overlay.cli.text import clean, counted, shown
from overlay.cli.usage import (
    Parser,
    complain,
    out_file,
    program,
    seconds,
    shared_options,
    whole_number,
)
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.limits import Limits
from overlay.model.topology import join_address

WINDOW = 4096
PATIENCE_S = 30.0
SHOWN_FAILURES = 10  # each in words; beyond, they are counted
REFRESH_S = 0.1  # of the progress bar, and how long a result may wait in our buffer
READ_BYTES = 256 * 1024
CHUNKS = 16  # read from stdin and not yet taken
IDLE_S = 0.02  # stdin is waited for so long before results are looked at
REST_S = 2.0  # after the end, standard input is waited for so long
COUNTED_BYTES = 512 * 1024 * 1024  # files up to this are read twice, for a bar that knows its end

DESCRIPTION = """\
Sends many payloads, each to one worker, and prints the results in the order of the input. Payloads
are the lines of files or of standard input (without their line ends), or the files of a folder
(without the hidden ones).

A failure does not stop the others. In the output of lines it leaves an empty line, so that line n
belongs to line n of the input; --json prints an object for each, whose index counts from 0. A
payload that provably did not run is sent again as long as others are answered, and for --patience
after that.

--failed FILE keeps every payload that has no result, as input for another map: lines as lines; of a
folder, the paths of the files, which map takes as @FILE."""

Result = bytes | library.CallFailed


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
    try:
        source = _source(args)
        target, left = _target(args), _Left(args, source)
    except (OSError, ValueError) as e:
        complain(_words(e))
        return Exit.USAGE
    try:
        return _Run(args, source, target, left).run()
    except OSError as e:
        complain(_words(e))
        return Exit.FAILED
    finally:
        target.close()


class _Run:
    """One map, and what is known of it so far."""

    def __init__(
        self, args: argparse.Namespace, source: _Source, target: _Target, left: _Left
    ) -> None:
        self._args = args
        self._address = join_address(args.host, args.port)
        self._source = source
        self._target = target
        self._left = left
        self._began = time.monotonic()
        self._answered = 0
        self._incomplete = 0
        self._failed: Counter[str] = Counter()
        self._exits: set[Exit] = set()
        self._bar = _Bar(source, target)

    def run(self) -> int:
        ended: library.NotReached | None = None
        try:
            with self._left, self._bar:
                self._take_all()
        except library.NotReached as e:
            ended = e
        except library.CallFailed as e:
            return failed(e, self._address, False)
        except KeyboardInterrupt:
            complain(self._summary())
            raise
        if self._target.reader_left:
            return self._exit()
        if ended is not None:
            self._exits.add(Exit.UNREACHABLE)
            complain(clean(str(ended)))
        if ended is None or self._answered or self._failed.total():
            complain(self._summary())
        return self._exit(ended is not None)

    def _take_all(self) -> None:
        args = self._args
        logging.getLogger("overlay.client").addHandler(_Words(self._bar))
        results = connected(args).map_as_completed(
            args.handler or None,
            self._left.noted(self._source.payloads()),
            mode=args.mode,
            team=args.team,
            timeout=args.deadline,
            window=args.window,
            ordered=not args.as_completed,
            priority=args.priority,
            patience_s=args.patience,
        )
        with contextlib.closing(results):  # type: ignore[type-var]  # a generator
            for index, result in results:
                self._take(index, self._source.name_of(index), result)
                if self._target.reader_left:
                    return

    def _take(self, index: int, name: str, result: Result) -> None:
        if isinstance(result, library.CallFailed):
            said = f"{clean(str(result))}{proof(result)}{whose(result, self._address)}"
            self._fail(result.code.name, f"{name}: {said}")
            self._exits.add(exit_of(result))
        else:
            self._answered += 1
            if isinstance(result, library.Incomplete):
                self._note_missing(name, result)
        self._left.came(index, isinstance(result, bytes))
        self._target.write(index, name, result)
        self._bar.advance(self._answered, self._failed.total() + self._source.unread)

    def _fail(self, reason: str, sentence: str) -> None:
        self._failed[reason] += 1
        self._mention(sentence, self._failed.total())

    def _note_missing(self, name: str, result: library.Incomplete) -> None:
        self._incomplete += 1
        who = ", ".join(f"{p.process_id} ({p.reason or p.code.name})" for p in result.missing)
        self._mention(f"{name}: not answered by {clean(who)}", self._incomplete)

    def _mention(self, sentence: str, number: int) -> None:
        if number <= SHOWN_FAILURES:
            self._bar.complain(sentence)
        elif number == SHOWN_FAILURES + 1:
            self._bar.complain("there are more; they are counted at the end")

    def _summary(self) -> str:
        took_s = time.monotonic() - self._began
        failures = self._failed + Counter({"unreadable": self._source.unread})
        every = self._answered + failures.total()
        said = f"{self._answered:,} of {every:,} answered in {took_s:.1f} s"
        if self._answered:
            said += f", {self._answered / max(took_s, 0.001):,.0f}/s"
        if failures.total():
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in failures.most_common() if n)
            kept, sign = self._args.failed, "@" if isinstance(self._source, _Files) else ""
            kept = f" (kept for another map: {sign}{kept})" if kept else ""
            said += f"; {failures.total():,} failed{kept}: {reasons}"
        if self._incomplete:
            said += f"; {counted(self._incomplete, 'result')} incomplete"
        return said

    def _exit(self, ended_early: bool = False) -> int:
        any_failed = self._failed.total() or self._source.unread or ended_early
        if any_failed:
            same = len(self._exits) == 1 and not self._answered and not self._source.unread
            return self._exits.pop() if same else Exit.FAILED
        return Exit.INCOMPLETE if self._incomplete else Exit.OK


# What is sent


class _Source(Protocol):
    """unread: how many could not be read, which have no index. total: None if not known.

    again: what another map is to be given for the payload that was taken last, and unreadable for
    those that could not be read.
    """

    total: int | None
    again: bytes
    unreadable: list[bytes]

    @property
    def unread(self) -> int: ...

    def payloads(self) -> Iterator[bytes]: ...

    def name_of(self, index: int) -> str:
        """What a person calls this payload. To be asked once for each."""


def _source(args: argparse.Namespace) -> _Source:
    """Raises ValueError, or OSError for a file that cannot be read."""
    inputs = args.inputs
    lists = [text for text in inputs if text.startswith("@")]
    if lists and len(inputs) > 1:
        raise ValueError(f"'{lists[0]}' is a list of files, which has to be the only input")
    if lists:
        return _Files(_paths_in(Path(lists[0][1:])))
    folders = [text for text in inputs if text != "-" and Path(text).is_dir()]
    if folders and len(inputs) > 1:
        raise ValueError(f"'{folders[0]}' is a folder, which has to be the only input")
    if folders:
        return _Files(_paths_of(Path(folders[0])))
    if args.out_folder:
        raise ValueError("--out-folder needs a folder as input; --out FILE keeps results of lines")
    return _Lines(inputs)


class _Lines:
    """The lines of files, one after the other; - is standard input."""

    again = b""
    unread = 0

    def __init__(self, inputs: Sequence[str]) -> None:
        self.unreadable: list[bytes] = []
        for text in inputs:
            if text != "-":
                open(text, "rb").close()  # an input that is missing is told before anything runs
        self._inputs = inputs
        self.total = self._count() if sys.stderr.isatty() else None

    def payloads(self) -> Iterator[bytes]:
        for line in self._lines():
            self.again = line
            yield line

    def _lines(self) -> Iterator[bytes]:
        for text in self._inputs:
            if text == "-":
                yield from _stdin_lines()
            else:
                with open(text, "rb") as file:
                    yield from map(_without_end, file)

    def name_of(self, index: int) -> str:
        return f"line {index + 1}"

    def _count(self) -> int | None:
        paths = [Path(text) for text in self._inputs]
        if "-" in self._inputs or not all(path.is_file() for path in paths):
            return None
        if sum(path.stat().st_size for path in paths) > COUNTED_BYTES:
            return None
        return sum(map(_lines_in, paths))


class _Files:
    """Files, each a payload."""

    again = b""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.unreadable: list[bytes] = []
        self._paths = paths
        self.total: int | None = len(paths)
        self._open: dict[int, str] = {}

    def payloads(self) -> Iterator[bytes]:
        index = 0
        for path in self._paths:
            try:
                payload = path.read_bytes()
            except OSError as e:
                self.unreadable.append(_as_line(path))
                if self.unread <= SHOWN_FAILURES:
                    complain(_words(e))
                continue
            self._open[index] = path.name
            self.again = _as_line(path)
            index += 1
            yield payload

    def name_of(self, index: int) -> str:
        return self._open.pop(index)

    @property
    def unread(self) -> int:
        return len(self.unreadable)


def _paths_of(folder: Path) -> list[Path]:
    """Its files, by name; not the hidden ones."""
    names = (e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
    return [folder / name for name in sorted(names)]


def _paths_in(list_: Path) -> list[Path]:
    """Raises OSError, or ValueError where two have one name: their results could not be told
    apart."""
    paths = [Path(os.fsdecode(line)) for line in list_.read_bytes().splitlines() if line]
    (name, times), *_ = Counter(path.name for path in paths).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"'{list_}' has {times} files of the name '{name}'")
    return paths


def _as_line(path: Path) -> bytes:
    """From wherever the next map is started."""
    return os.fsencode(path.absolute())


def _stdin_lines() -> Iterator[bytes]:
    """Lines as they come, and NOTHING_YET while none does, so that results are shown meanwhile."""
    chunks: queue.Queue[bytes] = queue.Queue(CHUNKS)
    threading.Thread(target=_read_stdin, args=(chunks,), name="map-reader", daemon=True).start()
    rest: list[bytes] = []
    while True:
        try:
            chunk = chunks.get(timeout=IDLE_S)
        except queue.Empty:
            yield library.NOTHING_YET
            continue
        *lines, last = chunk.split(b"\n")
        for line in lines:
            if rest:
                line = b"".join([*rest, line])
                rest = []
            yield line.removesuffix(b"\r")
        if last:
            rest.append(last)
        if not chunk:
            if rest:
                yield b"".join(rest).removesuffix(b"\r")
            return


def _read_stdin(chunks: queue.Queue[bytes]) -> None:
    # Not sys.stdin: a thread that reads it while the program ends would make Python abort.
    while True:
        try:
            chunk = os.read(0, READ_BYTES)
        except OSError:
            chunk = b""
        chunks.put(chunk)
        if not chunk:
            return


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _lines_in(path: Path) -> int:
    lines, chunk = 0, b"\n"
    with path.open("rb") as file:
        while more := file.read(READ_BYTES):
            lines, chunk = lines + more.count(b"\n"), more
    return lines + (not chunk.endswith(b"\n"))


# What comes out


class _Target(Protocol):
    """Where results go. to_terminal: a person sees them come."""

    to_terminal: bool

    @property
    def reader_left(self) -> bool: ...

    def write(self, index: int, name: str, result: Result) -> None: ...

    def close(self) -> None:
        """May be called twice. Raises OSError when something could not be written."""


def _target(args: argparse.Namespace) -> _Target:
    """Raises ValueError or OSError."""
    if args.out and args.out_folder:
        raise ValueError("--out and --out-folder cannot be together")
    if args.out_folder:
        is_list = args.inputs[0].startswith("@")
        if args.out_folder.exists() and not is_list and args.out_folder.samefile(args.inputs[0]):
            raise ValueError("--out-folder is the input folder: its files would be overwritten")
        return _FolderTarget(args)
    if args.out in (None, "-"):
        return _StreamTarget(args, sys.stdout)
    _check_is_no_input(args.out, args.inputs)
    return _FileTarget(args, open(args.out, "wb"))


def _check_is_no_input(out: str, inputs: Sequence[str]) -> None:
    for text in inputs:
        path = text.removeprefix("@")
        if text != "-" and Path(out).exists() and Path(out).samefile(path):
            raise ValueError(f"'{out}' is an input: it would be overwritten")


class _Left:
    """What was taken and has no result, kept in a file for another map, if that is wanted.

    It is written when it has failed, what is still open and what was never taken at the end. Owns
    the file from the first that is written.
    """

    def __init__(self, args: argparse.Namespace, source: _Source) -> None:
        """Raises ValueError, or OSError when the file cannot be written."""
        self._path = Path(args.failed) if args.failed else None
        self._source = source
        self._open: dict[int, bytes] = {}
        self._rest: Iterator[bytes] = iter(())
        self._file: BinaryIO | None = None
        if args.failed == "-":
            raise ValueError("--failed needs a file of its own")
        if self._path is not None:
            is_out = args.out not in (None, "-") and self._path.exists()
            if is_out and self._path.samefile(args.out):
                raise ValueError("--out and --failed cannot be one file")
            _check_is_no_input(args.failed, args.inputs)
            self._file = self._path.open("wb")

    def noted(self, payloads: Iterator[bytes]) -> Iterator[bytes]:
        """The same payloads, each remembered until it has come."""
        if self._path is None:
            return payloads
        self._rest = payloads
        return self._noted()

    def came(self, index: int, is_good: bool) -> None:
        again = self._open.pop(index, None)
        if again is not None and not is_good:
            self._write(again)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._file is None or self._path is None:
            return
        for again in (*self._open.values(), *self._source.unreadable):
            self._write(again)
        if kind is not None and issubclass(kind, library.CallFailed):
            self._write_rest()
        is_empty = not self._file.tell()
        self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)

    def _noted(self) -> Iterator[bytes]:
        index = 0
        for payload in self._rest:
            if payload is not library.NOTHING_YET:
                self._open[index] = self._source.again
                index += 1
            yield payload

    def _write_rest(self) -> None:
        """What was not taken any more; of standard input what there is for now."""
        until = time.monotonic() + REST_S
        for payload in self._rest:
            if payload is not library.NOTHING_YET:
                self._write(self._source.again)
                until = time.monotonic() + REST_S
            elif time.monotonic() > until:
                return

    def _write(self, again: bytes) -> None:
        assert self._file is not None
        self._file.write(again + b"\n")


class _LineForm:
    """A result as a line of bytes."""

    def __init__(self, args: argparse.Namespace, for_people: bool) -> None:
        self._json = args.json
        first = args.inputs[0]
        self._named = first.startswith("@") or (first != "-" and Path(first).is_dir())
        self._address = join_address(args.host, args.port)
        self._in_order = not args.as_completed
        self._for_people = for_people

    def of(self, index: int, name: str, result: Result) -> bytes:
        if self._json:
            return _as_json(index, name if self._named else None, result, self._address)
        if isinstance(result, library.CallFailed):
            return b"\n" if self._in_order and not self._named else b""
        body = clean(shown(result)).encode() if self._for_people or self._named else result
        return os.fsencode(name) + b": " + body + b"\n" if self._named else body + b"\n"


class _FileTarget:
    to_terminal = False
    reader_left = False

    def __init__(self, args: argparse.Namespace, file: BinaryIO) -> None:
        self._form = _LineForm(args, False)
        self._file = file

    def write(self, index: int, name: str, result: Result) -> None:
        self._file.write(self._form.of(index, name, result))

    def close(self) -> None:
        self._file.close()


class _StreamTarget:
    """Standard output; what is written leaves within REFRESH_S."""

    def __init__(self, args: argparse.Namespace, stream: Any) -> None:
        self.to_terminal = stream.isatty()
        self._form = _LineForm(args, self.to_terminal)
        self._stream = stream
        self._dirty = False
        self._closed = threading.Event()
        threading.Thread(target=self._flush_often, name="map-flusher", daemon=True).start()

    @property
    def reader_left(self) -> bool:
        return bool(self._stream.has_left)

    def write(self, index: int, name: str, result: Result) -> None:
        line = self._form.of(index, name, result)
        if self.to_terminal:
            self._stream.write(line.decode(errors="replace"))
        else:
            self._stream.write_bytes(line)
        self._dirty = True

    def close(self) -> None:
        self._closed.set()
        self._stream.flush()

    def _flush_often(self) -> None:
        while not self._closed.wait(REFRESH_S):
            if self._dirty:
                self._dirty = False
                self._stream.flush()


class _FolderTarget:
    """A file for each result; with --json also the lines, without the results."""

    to_terminal = False

    def __init__(self, args: argparse.Namespace) -> None:
        args.out_folder.mkdir(exist_ok=True)
        self._folder = args.out_folder
        self._as_json = args.json
        self._address = join_address(args.host, args.port)

    @property
    def reader_left(self) -> bool:
        return bool(getattr(sys.stdout, "has_left", False))

    def write(self, index: int, name: str, result: Result) -> None:
        if isinstance(result, bytes):
            (self._folder / name).write_bytes(result)
        if self._as_json:
            sys.stdout.write(_as_json(index, name, result, self._address, False).decode())

    def close(self) -> None:
        sys.stdout.flush()


def _as_json(
    index: int, name: str | None, result: Result, address: str, with_result: bool = True
) -> bytes:
    said: dict[str, Any] = {"index": index}
    if name is not None:
        said["name"] = name
    if isinstance(result, library.CallFailed):
        said.update(ok=False, error=error_as_json(result, address))
    else:
        said["ok"] = True
        if with_result:
            said.update(result_as_json(result))
        if isinstance(result, library.Incomplete):
            said["missing"] = [part.process_id for part in result.missing]
    return json.dumps(said).encode() + b"\n"


# How far it is


class _Bar:
    """On stderr, when that is a terminal and the results do not scroll by on it too."""

    def __init__(self, source: _Source, target: _Target) -> None:
        self._total = source.total
        self._progress: Progress | None = None
        self._next = 0.0
        self._began = time.monotonic()
        if sys.stderr.isatty() and not target.to_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[said]}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Screen(sys.stderr),
                transient=True,
            )
            self._task = self._progress.add_task("", total=self._total, said="")

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
        said = f"{done:,}{of}, {rate:,.0f}/s, {failed:,} failed"
        self._progress.update(self._task, completed=done, said=said)

    def complain(self, sentence: str) -> None:
        if self._progress is None:
            complain(sentence)
        else:
            self._progress.console.print(f"{program()}: {sentence}")


class _Words(logging.Handler):
    """What the library has to say meanwhile: that the process is gone, and is waited for."""

    def __init__(self, bar: _Bar) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.complain(clean(record.getMessage()))


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return clean(f"cannot use '{error.filename}': {error.strerror or error}")
    return clean(str(error))
