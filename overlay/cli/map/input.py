"""What `map` sends: the lines of files and of standard input, or whole files.

Owns `map-reader`, a daemon thread that reads standard input.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from overlay.cli.text import clean
from overlay.cli.usage import complain
from overlay.client import sync as library

MAX_SHOWN = 10  # failures printed each; further ones are counted
READ_BYTES = 256 * 1024
MAX_CHUNKS = 16  # read from stdin and not yet taken
IDLE_S = 0.02  # how long to wait for stdin before looking at results
MAX_COUNTED_BYTES = 512 * 1024 * 1024  # files up to this are read twice, so that the bar has an end


class Input(Protocol):
    """Payloads, each taken once.

    total: how many, None if unknown. again: what another map is to be given for the payload that
    was taken last; unreadable: the same for those that could not be read, which have no index.
    """

    total: int | None
    again: bytes
    unreadable: list[bytes]

    def payloads(self) -> Iterator[bytes]: ...

    def ahead(self) -> Iterator[bytes] | None:
        """The same payloads before they are taken; None for what can be read only once."""

    def name_of(self, index: int) -> str:
        """What a person calls this payload, once it was given."""


def input_of(inputs: Sequence[str]) -> Input:
    """Raises ValueError, or OSError for a file that cannot be read."""
    for text in inputs:
        if text.startswith("@"):
            _check_is_alone(text, "list of files", inputs)
            return FilesInput(_paths_listed_in(Path(text[1:])))
        if text != "-" and Path(text).is_dir():
            _check_is_alone(text, "folder", inputs)
            return FilesInput(_files_of(Path(text)))
    return LinesInput(inputs)


def _check_is_alone(text: str, kind: str, inputs: Sequence[str]) -> None:
    if len(inputs) > 1:
        raise ValueError(f"'{text}' is a {kind}, which has to be the only input")


class LinesInput:
    """The lines of files, one file after the other; - is standard input."""

    again = b""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.unreadable: list[bytes] = []
        for text in inputs:
            if text != "-":
                open(text, "rb").close()  # a missing input is reported before anything runs
        self._inputs = inputs
        self.total = self._count() if sys.stderr.isatty() else None

    def payloads(self) -> Iterator[bytes]:
        for line in self._lines():
            self.again = line
            yield line

    def ahead(self) -> Iterator[bytes] | None:
        return self._lines() if self._are_files else None

    def _lines(self) -> Iterator[bytes]:
        for text in self._inputs:
            if text == "-":
                yield from _stdin_lines()
            else:
                with open(text, "rb") as file:
                    for line in file:
                        yield line.removesuffix(b"\n").removesuffix(b"\r")

    def name_of(self, index: int) -> str:
        return f"line {index + 1}"

    @property
    def _are_files(self) -> bool:
        return "-" not in self._inputs and all(Path(text).is_file() for text in self._inputs)

    def _count(self) -> int | None:
        if not self._are_files:
            return None
        paths = [Path(text) for text in self._inputs]
        if sum(path.stat().st_size for path in paths) > MAX_COUNTED_BYTES:
            return None
        return sum(map(_lines_in, paths))


class FilesInput:
    """Files, each a payload."""

    again = b""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.unreadable: list[bytes] = []
        self._paths = paths
        self.total: int | None = len(paths)
        self._names: list[str] = []  # of those that could be read

    def payloads(self) -> Iterator[bytes]:
        self._names.clear()
        for path in self._paths:
            try:
                payload = path.read_bytes()
            except OSError as e:
                self.unreadable.append(_as_line(path))
                if len(self.unreadable) <= MAX_SHOWN:
                    complain(sentence_of(e))
                continue
            self._names.append(path.name)
            self.again = _as_line(path)
            yield payload

    def ahead(self) -> Iterator[bytes] | None:
        return self._readable()

    def name_of(self, index: int) -> str:
        return self._names[index]

    def _readable(self) -> Iterator[bytes]:
        for path in self._paths:
            with suppress(OSError):
                payload = path.read_bytes()
                self._names.append(path.name)
                yield payload


def _files_of(folder: Path) -> list[Path]:
    """By name, without the hidden ones."""
    names = (e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
    return [folder / name for name in sorted(names)]


def _paths_listed_in(file: Path) -> list[Path]:
    """Raises OSError, or ValueError where two files, so their results too, have one name."""
    paths = [Path(os.fsdecode(line)) for line in file.read_bytes().splitlines() if line]
    (name, times), *_ = Counter(path.name for path in paths).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"'{file}' has {times} files of the name '{name}'")
    return paths


def _as_line(path: Path) -> bytes:
    return os.fsencode(path.absolute())  # the next map may be started in another folder


def _lines_in(path: Path) -> int:
    lines, chunk = 0, b"\n"
    with path.open("rb") as file:
        while more := file.read(READ_BYTES):
            lines, chunk = lines + more.count(b"\n"), more
    return lines + (not chunk.endswith(b"\n"))


def _stdin_lines() -> Iterator[bytes]:
    """Lines as they arrive; NOTHING_YET while none does, so that results are shown meanwhile."""
    chunks: queue.Queue[bytes] = queue.Queue(MAX_CHUNKS)
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


def sentence_of(error: Exception) -> str:
    if isinstance(error, OSError):
        return clean(f"cannot use '{error.filename}': {error.strerror or error}")
    return clean(str(error))
