"""A search that several machines share: each worker searches its part of a folder.

The payload is the pattern: plain text, or a Python regular expression after "re:". Each matching
line is returned as `C: json/decoder.py:12: class JSONDecoder:`, where C is the worker's id. Notes,
such as the names of skipped files, are lines that begin with "# ".

Options of the handler, or of one process:

    folder       what to search; relative to this file's folder; default: Python's library
    share        "2/3": the second of three parts, so that three workers with the same folder search
                 each file once; default "1/1", the whole, for a folder that only this machine has
    suffixes     the suffixes of text files; default: SUFFIXES
    skip         names of folders to skip; default: SKIP
    most         lines per worker in an answer; default 1000
    largest_mib  larger files are skipped; default 8
"""

from __future__ import annotations

import io
import os
import re
import stat
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay import BadRequest

SUFFIXES = (".py", ".txt", ".md", ".rst", ".csv", ".log", ".json", ".toml", ".ini", ".cfg", ".html")
SKIP = ("__pycache__", ".git", ".venv", "node_modules", "site-packages")
RESERVE_S = 0.3  # time kept for the answer: partial results beat none
SHOWN = 200  # characters of a line; a longer one ends with "..."
NOTE = "# "

# Control characters in a file must not reach the reader's terminal: they are shown as "?".
CONTROL = {n: "?" for n in (*range(32), *range(127, 160), 0x2028, 0x2029) if n != ord("\t")}

Matches = Callable[[str], object]


def search(payload: bytes, context: Any) -> bytes:
    """The matching lines of this worker's share, ordered by path and line number.

    Raises BadRequest for an invalid pattern; ValueError or FileNotFoundError for invalid options,
    which fail this worker's part.
    """
    me, scope = context.process_id, Scope.of(context.options)
    text, matches = _pattern(payload)
    found, notes = _find(scope, text, matches, context)
    lines = [f"{me}: {line}" for line in found] + [f"{NOTE}{me}: {note}" for note in notes]
    return "\n".join(lines).encode("utf-8", "replace")


def merge(parts: Sequence[Any]) -> bytes:
    """The workers' lines in the order of a single search over everything, then the notes."""
    lines = [line for part in parts for line in part.result.decode().split("\n") if line]
    found = [line for line in lines if not line.startswith(NOTE)]
    notes = [line for line in lines if line.startswith(NOTE)]
    return "\n".join(sorted(found, key=_path_and_number) + notes).encode()


@dataclass(frozen=True)
class Scope:
    """What one worker searches. share: (2, 3) is the second of three. largest: bytes."""

    folder: Path
    share: tuple[int, int] = (1, 1)
    suffixes: tuple[str, ...] = SUFFIXES
    skip: tuple[str, ...] = SKIP
    most: int = 1000
    largest: int = 8 * 1024 * 1024

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Scope:
        folder = Path(options.get("folder") or sysconfig.get_path("stdlib")).expanduser()
        folder = Path(__file__).parent / folder
        if not folder.is_dir():
            raise FileNotFoundError(f"option folder: '{folder}' is not a folder on this machine")
        return cls(
            folder,
            _share(str(options.get("share", "1/1"))),
            tuple(str(suffix).lower() for suffix in options.get("suffixes", SUFFIXES)),
            tuple(options.get("skip", SKIP)),
            int(options.get("most", 1000)),
            int(options.get("largest_mib", 8) * 1024 * 1024),
        )

    def has(self, name: str) -> bool:
        """Whether this share includes the file; exactly one of the shares does."""
        share, shares = self.share
        # By the name alone, so that all machines and systems agree.
        return zlib.crc32(name.encode("utf-8", "surrogatepass")) % shares == share - 1


def _share(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    share, shares = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= share <= shares:
        raise ValueError(f'option share: \'{text}\' is not like "1/3", "2/3" or "3/3"')
    return share, shares


def _pattern(payload: bytes) -> tuple[str, Matches]:
    """A text that every matching file contains, and the test for a line. Raises BadRequest."""
    try:
        pattern = payload.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise BadRequest("the pattern is not UTF-8 text") from None
    if not pattern:
        raise BadRequest("the pattern is empty; send the text to search for")
    if "\n" in pattern or "\r" in pattern:
        raise BadRequest("the pattern has a line break; the search is line by line")
    if not pattern.startswith("re:"):
        return pattern, lambda line: pattern in line
    try:
        return "", re.compile(pattern[3:]).search
    except (re.error, OverflowError, RecursionError) as e:
        raise BadRequest(f"'{_shown(pattern)}' is not a regular expression: {e}") from None


def _find(scope: Scope, text: str, matches: Matches, context: Any) -> tuple[list[str], list[str]]:
    """The matching lines, at most scope.most of them, and notes on what is not included."""
    lines: list[str] = []
    notes: list[str] = []
    closed: list[str] = []
    too_large: list[str] = []
    files = sorted(_files(scope, closed))
    for done, (name, path) in enumerate(files):
        if context.cancelled or context.remaining_s() < RESERVE_S:
            notes.append(
                f"time was up after {done} of {len(files)} files; the rest is not searched"
            )
            break
        try:
            content = _content(path, scope.largest)
        except OSError:
            closed.append(name)
            continue
        if content is None:
            too_large.append(name)
        elif text in content:
            lines += _matching(name, content, matches)
        if len(lines) > scope.most:
            notes.append(
                f"more lines match than the {scope.most} of option most; these are the first"
            )
            break
    if too_large:
        notes.append(f"larger than {scope.largest} bytes, not searched: {_some(too_large)}")
    if closed:
        notes.append(f"could not be read: {_some(closed)}")
    return lines[: scope.most], notes


def _files(scope: Scope, closed: list[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of each file in the share. Adds folders that cannot be listed to `closed`."""

    def cannot_list(error: OSError) -> None:
        closed.append(_name(scope.folder, error.filename))

    for folder, folders, files in os.walk(scope.folder, onerror=cannot_list):
        folders[:] = [name for name in folders if name not in scope.skip]
        for file in files:
            path = os.path.join(folder, file)
            name = _name(scope.folder, path)
            if file.lower().endswith(scope.suffixes) and scope.has(name):
                yield name, Path(path)


def _name(folder: Path, path: str) -> str:
    """The path in the same form on every system: forward slashes, composed accents (NFC)."""
    relative = Path(os.path.relpath(path, folder)).as_posix()
    return unicodedata.normalize("NFC", relative).translate(CONTROL)


def _content(path: Path, largest: int) -> str | None:
    """The file as text, None if it is too large. Raises OSError if it cannot be read."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(f"{path} is not a file")  # for example a pipe, which might never end
    if about.st_size > largest:
        return None
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _matching(name: str, content: str, matches: Matches) -> Iterator[str]:
    # Not splitlines(): it also splits at form feeds, so line numbers would differ from an editor's.
    for number, line in enumerate(io.StringIO(content), 1):
        line = line.rstrip("\n")
        if matches(line):
            yield f"{name}:{number}: {_shown(line)}"


def _shown(line: str) -> str:
    cut = line if len(line) <= SHOWN else line[:SHOWN] + "..."
    return cut.translate(CONTROL)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


_PLACE = re.compile(r"\S+: (.*?):([0-9]+): ")


def _path_and_number(line: str) -> tuple[str, int]:
    place = _PLACE.match(line)
    return (place[1], int(place[2])) if place else (line, 0)
