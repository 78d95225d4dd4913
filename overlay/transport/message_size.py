"""Estimates, from a message's bytes, how much memory it will take when parsed.

protobuf makes an object for each nested message: an empty one grows from two bytes to about a
hundred, and 18 MiB of them to 1.3 GiB. Genuine messages have contents, and take hardly more memory
than they have bytes.

The bytes are walked field by field, into messages but not into columns, whose items are bytes. So a
segment of thousands of requests is only a few fields.
"""

from __future__ import annotations

from collections.abc import Mapping

from overlay.model.errors import BadRequest

MIN_BYTES = 16 * 1024  # smaller messages are not checked: they grow to a MiB at most
OBJECT_BYTES = 100  # a nested message, at least
ITEM_BYTES = 24  # a string or bytes field, besides its contents
ROOM_BYTES, ROOM_PER_BYTE = 16 * 1024 * 1024, 2  # memory that a message may take

Shape = Mapping[int, "Shape | None"]
"""The message fields of a message, each with its own shape; None for one not walked into."""

FLAT: Shape = {}


def check(message: bytes, shape: Shape) -> None:
    """Raises BadRequest for a message that would take far more memory than its bytes.

    Truncated ones pass: the parser refuses them.
    """
    if len(message) <= MIN_BYTES:
        return
    room = ROOM_BYTES + ROOM_PER_BYTE * len(message)
    try:
        left = _walk(message, 0, len(message), shape, room)
    except IndexError:  # it is truncated
        return
    if left < 0:
        raise BadRequest(
            f"a message of {len(message):,} bytes has so many parts that it would take more than "
            f"{room:,} bytes of memory"
        )


def _walk(data: bytes, at: int, stop: int, shape: Shape, room: int) -> int:
    """The room left; negative as soon as it is known to be exceeded."""
    while at < stop and room >= 0:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            size, at = _varint(data, at)
            end = min(at + size, stop)
            number = tag >> 3
            if number not in shape:
                room -= ITEM_BYTES
            else:
                room -= OBJECT_BYTES
                below = shape[number]
                if below is not None and end > at:
                    room = _walk(data, at, end, below, room)
            at = end
        else:  # groups, which no message of ours has: the parser refuses them
            return room
    return room


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    shift = 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
