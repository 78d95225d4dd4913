"""Mutated configurations and protobuf messages. The same `rng` makes the same bytes again."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

# Configurations: a few changes to the values, the text or the bytes of the file

STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**70, 1.5, 1e300, "", "x", "A", "B", "C", "worker", "leader"),
    *("team_leader", "a\nb", "\ud800", "\x1b[2J", "\0", "\u202e", "x" * 300, "m:f", "echo", "::1"),
    *([], ["A"], ["A", "A"], [None], [[]], {}, {"A": 1}, {"a\nb": {}}, {"call": "m:f"}),
    *({"id": "Z"}, {"": None}, {"call": "m:f", "limit_s": 1}, {"\ud800": "\udfff"}, "9" * 30),
    *("__proto__", "A" * 64, "A" * 65, "ﬀ", "İ", "é", "e\u0301", "\ufeff", "..", "/", "C:\\x"),
]
KEYS = [
    *("id", "role", "port", "handlers", "options", "x", "a\nb", "", "\ud800", "$schema", "G"),
    *("slots", "bind", "handler", "queue_slots", "log_dir", "processes", "run", "memory_mib"),
]
SCRAPS = [
    *("", ",", ":", "}", "{", "]", "[", '"', "\\", "\\u0000", "\\ud800", "\n", "\r", "é", "null"),
    *("1e999", "-1e999", "NaN", "Infinity", "-0", "00", "0x1", "1.", "+1", "9" * 5000, "1e-400"),
    *("\0", "\ufeff", "\u2028", "\x7f", "/*", "//", "#", "'", "[" * 2000, '{"x":' * 2000),
    *('"processes": {},', '"id": "A",', '"A": {},', "true", "tru"),
]
CODES = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037")


def configuration(good: Any, rng: Random) -> bytes:
    """A mutated copy of the good file."""
    raw = copy.deepcopy(good)
    if rng.random() < 0.7:
        raw = with_changed_values(raw, rng)
    text = json.dumps(raw, ensure_ascii=rng.random() < 0.7, indent=rng.choice([None, 1]))
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 3)):
            text = _with_scrap(text, rng)
    code = rng.choice(CODES) if rng.random() < 0.15 else "utf-8"
    made = text.encode(code, "surrogatepass" if code.startswith("utf") else "replace")
    return mutated(made, rng) if rng.random() < 0.2 else made


def with_changed_values(value: Any, rng: Random) -> Any:
    """Changes the value in one to three places."""
    for _ in range(rng.randint(1, 3)):
        at = value
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            inner = [place for place in places if isinstance(at[place], (dict, list)) and at[place]]
            if not inner or rng.random() < 0.3:
                break
            at = at[rng.choice(inner)]
        _change(at, places, rng)
    return value


def _change(at: Any, places: list[Any], rng: Random) -> None:
    strange = copy.deepcopy(rng.choice(STRANGE))
    place = rng.choice(places) if places else None
    act = rng.choice(["replace", "remove", "add", "move", "nest"])
    if act == "nest" and place is not None:
        for _ in range(rng.choice([1, 2, 50, 500])):
            strange = [strange] if rng.random() < 0.5 else {"x": strange}
        at[place] = strange
    elif isinstance(at, dict):
        if act == "add" or place is None:
            at[rng.choice(KEYS)] = strange
        elif act == "replace":
            at[place] = strange
        elif act == "remove":
            del at[place]
        else:
            at[rng.choice(KEYS)] = at.pop(place)
    elif act == "remove" and places:
        del at[place]
    elif act == "replace" and places:
        at[place] = strange
    else:
        at.append(strange)


def _with_scrap(text: str, rng: Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(SCRAPS) + text[at + rng.choice([0, 0, 1, 5, 500]) :]


# Bytes


def mutated(good: bytes, rng: Random) -> bytes:
    """The bytes with a few flipped, deleted, doubled or replaced."""
    made = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(made) + 1), rng.choice([1, 1, 2, 4, 40])
        chunk = made[at : at + size]
        new = rng.choice([b"", bytes(size), b"\xff" * size, chunk * 2, rng.randbytes(size)])
        if len(chunk) == 1 and rng.random() < 0.5:
            new = bytes([chunk[0] ^ 1 << rng.randrange(8)])
        made[at : at + size] = new
    return bytes(made[: rng.randrange(len(made) + 1)] if rng.random() < 0.1 else made)


# Protobuf messages

EDGES = [2**bits - below for bits in (31, 32, 64) for below in (1, 2)]
NUMBERS = [0, 1, 2, 3, 63, 64, 4095, 4096, 4097, 2**63, *EDGES]
TEXTS = ["", "A", "B", "E", "Z", "green", "echo", "a\nb", "\x1b[2J", "\0", "x" * 64, "x" * 65, "é"]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")]
COUNTS = [0, 1, 1, 1, 2, 3, 64, 65]


def message(kind: type[Message], good: Sequence[Message], rng: Random) -> bytes:
    """The bytes of a message of this kind, of a mutated one, or random bytes."""
    how = rng.random()
    if how < 0.1:
        return rng.randbytes(rng.choice([0, 1, 2, 10, 100, 3000]))
    if how < 0.5:
        made = altered(rng.choice(good), rng)
    else:
        made = rng.choice(good) if how < 0.7 else filled(kind, rng)
    wired = made.SerializeToString()
    if how < 0.4 or how > 0.85:
        return wired
    if rng.random() < 0.3:
        return mutated(wired, rng)
    return _with_changed_records(wired, rng)


def altered(good: Message, rng: Random) -> Message:
    """A copy with strange values in one or two fields at any depth."""
    made = copy.deepcopy(good)
    for _ in range(rng.choice([1, 1, 2])):
        at = made
        while (inner := _inner(at)) and rng.random() < 0.8:
            at = rng.choice(inner)
        if fields := list(at.DESCRIPTOR.fields):
            field = rng.choice(fields)
            at.ClearField(field.name)
            _fill(at, field, rng, depth=2)
    return made


def _inner(message: Message) -> list[Message]:
    fields = [(field, value) for field, value in message.ListFields() if field.message_type]
    return [m for field, value in fields for m in (value if field.is_repeated else [value])]


def filled(kind: type[Message], rng: Random, depth: int = 0) -> Message:
    """A valid message with strange values in random fields."""
    made = kind()
    descriptor: Descriptor = made.DESCRIPTOR
    share = rng.choice([0.2, 0.5, 0.9]) if depth < 2 else 0.3
    for field in descriptor.fields:
        if rng.random() < share:
            _fill(made, field, rng, depth)
    return made


def _fill(made: Message, field: FieldDescriptor, rng: Random, depth: int) -> None:
    if not field.is_repeated:
        if field.message_type is None:
            setattr(made, field.name, _value(field, rng))
        elif depth < 4:
            inner = getattr(made, field.name)
            inner.CopyFrom(filled(type(inner), rng, depth + 1))
        return
    count = rng.choice(COUNTS)
    if field.message_type is None:
        count = 5000 if rng.random() < 0.002 else count
        getattr(made, field.name).extend([_value(field, rng) for _ in range(count)])
    elif depth < 4 and not field.message_type.GetOptions().map_entry:
        for _ in range(min(count, 4)):
            inner = getattr(made, field.name).add()
            inner.CopyFrom(filled(type(inner), rng, depth + 1))


def _value(field: FieldDescriptor, rng: Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        return text if field.type == FieldDescriptor.TYPE_STRING else _bytes(rng)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(FLOATS)
    bits = {FieldDescriptor.CPPTYPE_INT64: 64, FieldDescriptor.CPPTYPE_UINT64: 64}.get(kind, 32)
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        return rng.choice(NUMBERS) % 2**bits
    return (rng.choice(NUMBERS) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def _bytes(rng: Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 1, 10, 10, 100]) * rng.choice([1] * 99 + [200]))


Record = tuple[int, int, bytes]
"""Field number, wire type and encoded value, including its length prefix."""


def _with_changed_records(wired: bytes, rng: Random) -> bytes:
    """The message with fields dropped, doubled, renumbered, retyped, mis-sized or unknown."""
    records = list(_records(wired))
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(records) + 1)
        rng.choice(_CHANGES)(records, at, rng)
    return b"".join(_varint(number << 3 | kind) + value for number, kind, value in records)


def _records(wired: bytes) -> Iterator[Record]:
    at = 0
    while at < len(wired):
        key, at = _read_varint(wired, at)
        began = at
        if key & 7 == 0:
            _, at = _read_varint(wired, at)
        elif key & 7 == 2:
            size, at = _read_varint(wired, at)
            at += size
        else:
            at += {1: 8, 5: 4}[key & 7]
        yield key >> 3, key & 7, wired[began:at]


def _drop(records: list[Record], at: int, rng: Random) -> None:
    del records[at : at + rng.choice([1, 1, 10])]


def _double(records: list[Record], at: int, rng: Random) -> None:
    chunk = records[at : at + 1]
    size = sum(len(value) for _, _, value in chunk)
    records[at:at] = chunk * rng.choice([1, 1, 2, 200 if size < 200 else 3])


def _renumber(records: list[Record], at: int, rng: Random) -> None:
    for _, kind, value in records[at : at + 1]:
        records[at] = rng.choice([0, 1, 2, 3, 4, 7, 13, 99, 2**29 - 1, 2**29]), kind, value


def _retype(records: list[Record], at: int, rng: Random) -> None:
    for number, _, value in records[at : at + 1]:
        records[at] = number, rng.randrange(8), value


def _lie_about_size(records: list[Record], at: int, rng: Random) -> None:
    for number, kind, value in records[at : at + 1]:
        size = rng.choice([0, 1, 127, 128, 2**31 - 1, 2**32, 2**63, 2**64 - 1])
        records[at] = number, kind, _varint(size) + value[1:]


def _mutate_value(records: list[Record], at: int, rng: Random) -> None:
    for number, kind, value in records[at : at + 1]:
        if kind != 2 or not value or value[0] > 127:  # no length prefix of one byte
            records[at] = number, kind, mutated(value, rng)
            continue
        inner = value[1:]
        change = _with_changed_records if _is_message(inner) else mutated
        inner = change(inner, rng)
        records[at] = number, kind, _varint(len(inner)) + inner


def _is_message(wired: bytes) -> bool:
    try:
        return bool(wired) and all(0 < number < 99 for number, _, _ in _records(wired))
    except (IndexError, KeyError):
        return False


def _stray(records: list[Record], at: int, rng: Random) -> None:
    number = rng.choice([1, 2, 3, 4, 5, 8, 100, 19_000, 2**29 - 1])
    text = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5" * 9, rng.randbytes(30)])
    groups = rng.choice([1, 2, 99, 101])
    records[at:at] = rng.choice(
        [
            [(number, 2, _varint(len(text)) + text)],
            [(number, 0, _varint(rng.choice(NUMBERS)))],
            [(number, 0, b"\xff" * 11)],  # longer than a varint can be
            [(number, 1, struct.pack("<d", rng.choice(FLOATS)))],
            [(number, 3, b"")] * groups + [(number, 4, b"")] * rng.choice([groups, 0, 1]),
        ]
    )


_CHANGES: list[Callable[[list[Record], int, Random], None]] = [
    *(_drop, _double, _renumber, _retype, _lie_about_size, _mutate_value, _mutate_value, _stray)
]


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def _read_varint(wired: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (wired[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if wired[at - 1] < 128:
            return number, at
