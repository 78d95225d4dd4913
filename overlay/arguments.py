"""What callers of the library give, checked and made usable. Raises TypeError and ValueError."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any

from overlay import jsons
from overlay.admission import HIGHEST_PRIORITY
from overlay.limits import Limits
from overlay.orders import Kind
from overlay.values import Mode, Route

DEFAULT_TIMEOUT_S = Limits().default_deadline_s


def as_bytes(payload: object) -> bytes:
    if isinstance(payload, str):
        return payload.encode()
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    raise TypeError(f"a payload is bytes or str, not {type(payload).__name__}")


def as_body(payload: object, args: object) -> bytes:
    """What is sent for one of the two: bytes, or a typed function's arguments."""
    if args is None:
        if payload is None:
            raise TypeError("a request has a payload, or the args of a typed function")
        return as_bytes(payload)
    if payload is not None:
        raise TypeError("a request has a payload or args, not both")
    return as_json(args)


def as_json(args: object) -> bytes:
    if not isinstance(args, Mapping):
        raise TypeError(
            f"args are a function's arguments by name, a dict, not {type(args).__name__}"
        )
    if wrong := [name for name in args if not isinstance(name, str)]:
        raise TypeError(f"args: {wrong[0]!r} is not the name of an argument")
    try:
        return jsons.write(dict(args))
    except jsons.NotJson as e:
        raise TypeError(f"args: {e}") from None


def as_bodies(payloads: Any, args: Any, mode: str) -> Any:
    """Of a map: its payloads, or its args as JSON, as an iterable of the same kind."""
    check_mode_of_args(args, mode)
    if (payloads is None) == (args is None):
        raise TypeError("a map has payloads, or the args of a typed function")
    if args is None:
        return payloads
    if isinstance(args, Mapping):
        raise TypeError("args of a map are many dicts, one for each call; submit takes one")
    return _later_as_json(args) if isinstance(args, AsyncIterable) else map(as_json, args)


def check_mode_of_args(args: object, mode: str) -> None:
    """A Future or a map has one value for each call, and could not tell who is missing."""
    if args is not None and mode == "all":
        raise ValueError(
            "mode 'all' with args has a value of each worker: use call (its answer's values), "
            "or parts"
        )


async def _later_as_json(args: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    async for one in args:
        yield as_json(one)


@functools.lru_cache(256)
def kind_of(
    mode: str,
    team: str,
    handler: str,
    want_parts: bool,
    priority: int = 0,
    as_they_come: bool = False,
) -> Kind:
    if mode not in ("all", "any"):
        raise ValueError(f"mode {mode!r} is not 'all' or 'any'")
    route = Route(Mode[mode.upper()], _as_name("team", team), _as_name("handler", handler))
    if not 0 <= priority <= HIGHEST_PRIORITY:
        raise ValueError(f"priority {priority} is not 0 to {HIGHEST_PRIORITY}")
    return Kind(route, want_parts, priority, as_they_come)


def _as_name(what: str, name: object) -> str:
    if callable(name):
        raise TypeError(f"code does not travel: name a {what} of the configuration")
    if not isinstance(name, str):
        raise TypeError(f"a {what} is named by a str, not {type(name).__name__}")
    name.encode()  # raises UnicodeEncodeError, a ValueError, for what is not text
    return name


def chunk_of(window: int, chunksize: int) -> int:
    """How many of a map's payloads travel together."""
    if window < 1 or chunksize < 0:
        raise ValueError(f"window {window} is not above 0, or chunksize {chunksize} is below")
    return min(chunksize or max(1, min(512, window // 4)), window)


def as_patience(patience_s: float | None) -> float | None:
    if patience_s is not None and not 0 <= patience_s <= threading.TIMEOUT_MAX:
        raise ValueError(f"a patience of {patience_s:g} s is below 0, or without an end")
    return patience_s


def as_timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"a timeout of {timeout:g} s is not above 0")
    return float(timeout)
