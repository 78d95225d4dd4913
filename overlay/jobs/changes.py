"""What one leader sends to the others: an entry of the log, in bytes. Values, without I/O.

    format, kind, flags, author (8 bytes), body

    CHANGES    statements with their values, of one transaction; in several entries if it is large
    HEARTBEAT  the author still has the jobs
    TAKEOVER   from here on the author has them: its id, and the address where callers find it
    LEAVE      the author gives them up: anybody may take them at once

An entry comes from another machine, so it is judged before it is used: only statements of our own
are ever executed, each with as many values as it takes, and these are None, numbers, text or bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from overlay.jobs import statements

FORMAT = 1
AUTHOR_BYTES = 8
MAX_ID, MAX_ADDRESS = 64, 300  # characters
_FIRST, _LAST = 1, 2
_HEAD = struct.Struct(f">BBB{AUTHOR_BYTES}s")
_CHANGE = struct.Struct(">HB")
_INT, _FLOAT, _SIZE = struct.Struct(">cq"), struct.Struct(">cd"), struct.Struct(">cI")

Value = None | int | float | str | bytes
Change = tuple[int, Sequence[Value]]
"""The number of a statement, and its values."""


class BadEntry(Exception):
    """It is not of a kind that this release reads."""


class Kind(IntEnum):
    CHANGES = 1
    HEARTBEAT = 2
    TAKEOVER = 3
    LEAVE = 4


class Entry(NamedTuple):
    """is_first, is_last: of the entries that hold one transaction together."""

    kind: Kind
    author: bytes
    body: bytes = b""
    is_first: bool = True
    is_last: bool = True

    def written(self) -> bytes:
        flags = _FIRST * self.is_first | _LAST * self.is_last
        return _HEAD.pack(FORMAT, self.kind, flags, self.author) + self.body


class Holder(NamedTuple):
    """Who has the jobs. author: this run of that process."""

    author: bytes
    id: str
    address: str

    def __str__(self) -> str:
        return f"{self.id} at {self.address}"


def read(data: bytes) -> Entry:
    """Raises BadEntry."""
    if len(data) < _HEAD.size:
        raise BadEntry("it is too short")
    version, kind, flags, author = _HEAD.unpack_from(data)
    if version != FORMAT:
        raise BadEntry(f"it is of format {version}, and this release reads {FORMAT}")
    try:
        known = Kind(kind)
    except ValueError:
        raise BadEntry(f"it is of kind {kind}") from None
    body = data[_HEAD.size :]
    return Entry(known, author, body, bool(flags & _FIRST), bool(flags & _LAST))


def parts(author: bytes, body: bytes, most: int) -> list[Entry]:
    """The entries of one transaction, each of at most so many bytes."""
    room = most - _HEAD.size
    cuts = range(0, len(body), room)
    last = cuts[-1]
    return [Entry(Kind.CHANGES, author, body[at : at + room], not at, at == last) for at in cuts]


def takeover(holder: Holder) -> Entry:
    said = json.dumps({"id": holder.id, "address": holder.address})
    return Entry(Kind.TAKEOVER, holder.author, said.encode())


def read_holder(entry: Entry) -> Holder:
    """Of a takeover. Raises BadEntry."""
    try:
        said = json.loads(entry.body)
        id_, address = said["id"], said["address"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise BadEntry("it does not say who takes over") from None
    for text, most in ((id_, MAX_ID), (address, MAX_ADDRESS)):
        if not isinstance(text, str) or not 0 < len(text) <= most or not text.isprintable():
            raise BadEntry("it does not say properly who takes over")
    return Holder(entry.author, id_, address)


def write_changes(changes: Iterable[Change]) -> bytes:
    found = bytearray()
    for number, values in changes:
        found += _CHANGE.pack(number, len(values))
        for value in values:
            if value is None:
                found += b"n"
            elif isinstance(value, int):
                found += _INT.pack(b"i", value)
            elif isinstance(value, float):
                found += _FLOAT.pack(b"f", value)
            elif isinstance(value, str):
                text = value.encode()
                found += _SIZE.pack(b"s", len(text)) + text
            else:
                found += _SIZE.pack(b"b", len(value))
                found += value
    return bytes(found)


def read_changes(body: bytes) -> list[Change]:
    """Raises BadEntry."""
    found: list[Change] = []
    at = 0
    try:
        while at < len(body):
            number, count = _CHANGE.unpack_from(body, at)
            if number >= len(statements.ALL) or count != statements.VALUES[number]:
                raise BadEntry(f"it has statement {number} with {count} values")
            at += _CHANGE.size
            values: list[Value] = []
            for _ in range(count):
                value, at = _read_value(body, at)
                values.append(value)
            found.append((number, values))
    except (struct.error, UnicodeDecodeError):
        raise BadEntry("its changes cannot be read") from None
    return found


def _read_value(body: bytes, at: int) -> tuple[Value, int]:
    kind = body[at : at + 1]
    if kind == b"n":
        return None, at + 1
    if kind == b"i":
        return int(_INT.unpack_from(body, at)[1]), at + _INT.size
    if kind == b"f":
        return float(_FLOAT.unpack_from(body, at)[1]), at + _FLOAT.size
    if kind not in (b"s", b"b"):
        raise BadEntry("it has a value of an unknown type")
    (_, size), at = _SIZE.unpack_from(body, at), at + _SIZE.size
    value = body[at : at + size]
    if len(value) != size:
        raise BadEntry("it ends within a value")
    return (value.decode() if kind == b"s" else value), at + size
