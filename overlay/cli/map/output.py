"""Where the results of `map` go, and what is kept of the payloads that have none.

Owns `map-flusher`, a daemon thread that flushes standard output while nothing new is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from overlay.cli.map.input import FilesInput, Input
from overlay.cli.terminal import StandardOutput, error_as_json, result_as_json
from overlay.cli.text import clean, shown
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.addresses import join_address

FLUSH_S = 0.1  # how long a result may wait in our buffer
REST_S = 2.0  # how long to wait for more standard input after the end

Result = bytes | library.CallFailed


class Output(ABC):
    """Takes the results. to_terminal: a person sees them as they arrive.

    on_reader_left: called on a thread of its own when the reader of the results has left while no
    further result was written.
    """

    to_terminal = False

    def __init__(self) -> None:
        self.on_reader_left: Callable[[], None] = lambda: None

    @property
    def reader_left(self) -> bool:
        return False

    @abstractmethod
    def write(self, index: int, name: str, result: Result) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """May be called twice. Raises OSError when something could not be written."""


def output_of(args: argparse.Namespace, source: Input) -> Output:
    """Raises ValueError or OSError."""
    if args.out and args.out_folder:
        raise ValueError("--out and --out-folder exclude each other")
    if args.out_folder:
        if not isinstance(source, FilesInput):
            raise ValueError("--out-folder needs a folder as input; --out FILE keeps lines")
        is_list = args.inputs[0].startswith("@")
        if args.out_folder.exists() and not is_list and args.out_folder.samefile(args.inputs[0]):
            raise ValueError("--out-folder is the input folder: its files would be overwritten")
        return FolderOutput(args)
    is_named = isinstance(source, FilesInput)
    if args.out in (None, "-"):
        return StreamOutput(args, is_named, cast(StandardOutput, sys.stdout))
    check_is_no_input(args.out, args.inputs)
    return FileOutput(args, is_named, open(args.out, "wb"))


def check_is_no_input(out: str, inputs: Sequence[str]) -> None:
    for text in inputs:
        path = text.removeprefix("@")
        if text != "-" and Path(out).exists() and Path(out).samefile(path):
            raise ValueError(f"'{out}' is an input: it would be overwritten")


class LineForm:
    """A result as a line of bytes. is_named: its name stands before it."""

    def __init__(self, args: argparse.Namespace, is_named: bool, for_people: bool) -> None:
        self._json = args.json
        self._is_named = is_named
        self._address = join_address(args.host, args.port)
        self._in_order = not args.as_completed
        self._for_people = for_people

    def of(self, index: int, name: str, result: Result) -> bytes:
        if self._json:
            return _as_json(index, name if self._is_named else None, result, self._address)
        if isinstance(result, library.CallFailed):
            return b"\n" if self._in_order and not self._is_named else b""
        body = clean(shown(result)).encode() if self._for_people or self._is_named else result
        return os.fsencode(name) + b": " + body + b"\n" if self._is_named else body + b"\n"


class FileOutput(Output):
    def __init__(self, args: argparse.Namespace, is_named: bool, file: BinaryIO) -> None:
        super().__init__()
        self._form = LineForm(args, is_named, for_people=False)
        self._file = file

    def write(self, index: int, name: str, result: Result) -> None:
        self._file.write(self._form.of(index, name, result))

    def close(self) -> None:
        self._file.close()


class StreamOutput(Output):
    """Standard output; what is written leaves within FLUSH_S."""

    def __init__(self, args: argparse.Namespace, is_named: bool, stream: StandardOutput) -> None:
        super().__init__()
        self.to_terminal = stream.isatty()
        self._form = LineForm(args, is_named, for_people=self.to_terminal)
        self._stream = stream
        self._is_dirty = False
        self._closed = threading.Event()
        threading.Thread(target=self._flush_often, name="map-flusher", daemon=True).start()

    @property
    def reader_left(self) -> bool:
        return self._stream.has_left

    def write(self, index: int, name: str, result: Result) -> None:
        line = self._form.of(index, name, result)
        if self.to_terminal:
            self._stream.write(line.decode(errors="replace"))
        else:
            self._stream.write_bytes(line)
        self._is_dirty = True

    def close(self) -> None:
        self._closed.set()
        self._stream.flush()

    def _flush_often(self) -> None:
        while not self._closed.wait(FLUSH_S):
            if self._is_dirty:
                self._is_dirty = False
                self._stream.flush()
                if self.reader_left:
                    self.on_reader_left()
                    return


class FolderOutput(Output):
    """A file for each result; with --json also the lines, without the results."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        args.out_folder.mkdir(exist_ok=True)
        self._folder: Path = args.out_folder
        self._json = args.json
        self._address = join_address(args.host, args.port)

    @property
    def reader_left(self) -> bool:
        return bool(getattr(sys.stdout, "has_left", False))

    def write(self, index: int, name: str, result: Result) -> None:
        if isinstance(result, bytes):
            (self._folder / name).write_bytes(result)
        if self._json:
            line = _as_json(index, name, result, self._address, with_result=False)
            sys.stdout.write(line.decode())

    def close(self) -> None:
        sys.stdout.flush()


def _as_json(
    index: int, name: str | None, result: Result, address: str, with_result: bool = True
) -> bytes:
    line: dict[str, Any] = {"index": index}
    if name is not None:
        line["name"] = name
    if isinstance(result, library.CallFailed):
        line |= {"ok": False, "error": error_as_json(result, address)}
    else:
        line["ok"] = True
        if with_result:
            line |= result_as_json(result)
        if isinstance(result, library.Incomplete):
            line["missing"] = [part.process_id for part in result.missing]
    return json.dumps(line).encode() + b"\n"


class Unanswered:
    """Keeps the payloads that have no result in a file for another map, if that is wanted.

    A payload that fails is written then; those without an answer, and those never taken, at the
    end. An empty file is removed.
    """

    def __init__(self, args: argparse.Namespace, source: Input) -> None:
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
            check_is_no_input(args.failed, args.inputs)
            self._file = self._path.open("wb")

    def noted(self, payloads: Iterator[bytes]) -> Iterator[bytes]:
        """The same payloads, each remembered until `answered` is called for it."""
        if self._path is None:
            return payloads
        self._rest = payloads
        return self._noted()

    def answered(self, index: int, is_good: bool) -> None:
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
        """What was never taken; of standard input, what there is for now."""
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
