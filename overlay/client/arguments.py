"""The arguments of the library's verbs, checked here and nowhere else, and made usable.

What leaves has exact types (bytes, str, int, float, bool), whatever was given: the caches, keys and
frames that the requests of a client share see nothing else. Raises TypeError and ValueError that
name the argument.
"""

from __future__ import annotations

import functools
import numbers
import operator
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sized
from typing import Any, NamedTuple

from overlay.client.outbox import CallKind
from overlay.model import json_values
from overlay.model.limits import Limits
from overlay.model.segments import Mode, Route
from overlay.queueing.admission import HIGHEST_PRIORITY
from overlay.transport.codec import pb2

DEFAULT_TIMEOUT_S = Limits().default_deadline_s
LONGEST_TEXT = 1000  # what is longer is neither a name nor a key, and would fill a shared frame
MOST = 2**31 - 1  # of what is counted
HIGHEST_ID = 2**64 - 1


class CallOptions(NamedTuple):
    """A request and how it is asked, checked: what the verbs hand on."""

    kind: CallKind
    body: bytes
    timeout_s: float
    has_values: bool  # of a typed function, whose result is a JSON value


class MapOptions(NamedTuple):
    """A map's payloads and how they are asked, checked: what the verbs hand on.

    bodies: what is sent, as an iterable of the kind that was given. total: how many they are; 0
    where that is not known beforehand. chunk: payloads that travel together. window: payloads in
    flight. patience_s: None for the client's.
    """

    kind: CallKind
    bodies: Any
    total: int
    timeout_s: float
    has_values: bool
    ordered: bool
    chunk: int
    window: int
    patience_s: float | None


def call_options(
    payload: object,
    args: object,
    mode: str,
    team: str,
    handler: str,
    timeout: float | None,
    want_parts: bool,
    priority: int,
) -> CallOptions:
    if args is not None:  # each worker's own value is wanted, where all are asked
        want_parts = as_flag("want_parts", want_parts) or _is_of_all(mode)
    kind = kind_of(mode, team, handler, want_parts, priority)
    return CallOptions(kind, _as_body(payload, args), as_timeout(timeout), args is not None)


def submit_options(
    handler: str | None,
    payload: object,
    args: object,
    mode: str,
    team: str,
    timeout: float | None,
    priority: int,
) -> CallOptions:
    _check_mode_of_args(args, mode)
    kind = kind_of(mode, team, "" if handler is None else handler, False, priority)
    return CallOptions(kind, _as_body(payload, args), as_timeout(timeout), args is not None)


def parts_options(
    payload: object, args: object, team: str, handler: str, timeout: float | None, priority: int
) -> CallOptions:
    kind = kind_of("all", team, handler, False, priority, as_they_come=True)
    return CallOptions(kind, _as_body(payload, args), as_timeout(timeout), args is not None)


def map_options(
    handler: str | None,
    payloads: Any,
    args: Any,
    mode: str,
    team: str,
    timeout: float | None,
    window: int,
    chunksize: int,
    ordered: bool,
    priority: int,
    patience_s: float | None,
) -> MapOptions:
    kind = kind_of(mode, team, "" if handler is None else handler, False, priority)
    timeout_s, given = as_timeout(timeout), payloads if args is None else args
    window, chunksize = as_whole("window", window, least=1), as_whole("chunksize", chunksize)
    return MapOptions(
        kind,
        _as_bodies(payloads, args, mode),
        len(given) if isinstance(given, Sized) else 0,
        timeout_s,
        args is not None,
        as_flag("ordered", ordered),
        min(chunksize or max(1, min(512, window // 4)), window),
        window,
        None if patience_s is None else as_patience(patience_s),
    )


def metrics_request(events: int, requests: int, functions: bool) -> pb2.MetricsRequest:
    return pb2.MetricsRequest(
        events=as_whole("events", events),
        requests=as_whole("requests", requests),
        functions=as_flag("functions", functions),
    )


def kind_of(
    mode: str,
    team: str,
    handler: str,
    want_parts: bool,
    priority: int,
    as_they_come: bool = False,
) -> CallKind:
    is_exact = type(mode) is type(team) is type(handler) is str
    if not (is_exact and type(want_parts) is bool and type(priority) is int):
        mode = _as_text("mode", mode)
        team, handler = _as_name("team", team), _as_name("handler", handler)
        want_parts = as_flag("want_parts", want_parts)
        priority = as_whole("priority", priority, most=HIGHEST_PRIORITY)
    return _kept_kind(mode, team, handler, want_parts, priority, as_they_come)


@functools.lru_cache(256)
def _kept_kind(
    mode: str, team: str, handler: str, want_parts: bool, priority: int, as_they_come: bool
) -> CallKind:
    # Of exact types only: 1, 1.0 and True are one key, and the first to come would be all three.
    if mode not in ("all", "any"):
        raise ValueError(f"mode {mode[:20]!r} is not 'all' or 'any'")
    route = Route(Mode[mode.upper()], _as_name("team", team), _as_name("handler", handler))
    priority = as_whole("priority", priority, most=HIGHEST_PRIORITY)
    return CallKind(route, want_parts, priority, as_they_come)


def as_bytes(payload: object) -> bytes:
    if type(payload) is bytes:
        return payload
    if _is_a(payload, str):
        try:
            return str.encode(payload)  # type: ignore[arg-type]
        except UnicodeEncodeError as e:
            raise ValueError(f"a payload that is text has to be Unicode: {e}") from None
    if _is_a(payload, (bytes, bytearray, memoryview)):
        try:
            return memoryview(payload).tobytes()  # type: ignore[arg-type]
        except ValueError as e:
            raise ValueError(f"a payload cannot be read: {e}") from None
    raise TypeError(f"a payload is bytes or str, not {_kind(payload)}")


def _as_body(payload: object, args: object) -> bytes:
    """What is sent for one of the two: bytes, or a typed function's arguments."""
    if args is None:
        if payload is None:
            raise TypeError("a request has a payload, or the args of a typed function")
        return as_bytes(payload)
    if payload is not None:
        raise TypeError("a request has a payload or args, not both")
    return _as_json(args)


def _as_bodies(payloads: Any, args: Any, mode: str) -> Any:
    """Of a map: its payloads, or its args as JSON, as an iterator or an async iterable."""
    _check_mode_of_args(args, mode)
    if (payloads is None) == (args is None):
        raise TypeError("a map has payloads, or the args of a typed function")
    if args is None:
        return payloads if _is_a(payloads, AsyncIterable) else as_iterator(payloads)
    if _is_a(args, Mapping):
        raise TypeError("args of a map are many dicts, one for each call; submit takes one")
    if _is_a(args, AsyncIterable):
        return _later_as_json(args)
    try:
        return map(_as_json, args)
    except TypeError as e:
        raise TypeError(f"args of a map are many dicts, one for each call: {e}") from None


def as_iterator(payloads: Any) -> Iterator[Any]:
    try:
        return iter(payloads)
    except TypeError as e:
        raise TypeError(f"payloads are many, bytes or str: {e}") from None


def _check_mode_of_args(args: object, mode: str) -> None:
    """A Future or a map has one value for each call, and could not tell which worker is missing."""
    if args is not None and _is_of_all(mode):
        raise ValueError(
            "mode 'all' with args has a value of each worker: use call (its answer's values), "
            "or parts"
        )


def _as_json(args: Any) -> bytes:
    if not _is_a(args, Mapping):
        raise TypeError(f"args are a function's arguments by name, a dict, not {_kind(args)}")
    try:
        found = dict(args)
        wrong = [name for name in found if type(name) is not str]
        shown, written = (repr(wrong[0])[:50], b"") if wrong else ("", json_values.write(found))
    except json_values.NotJson as e:
        raise TypeError(f"args: {e}") from None
    except Exception as e:  # noqa: BLE001 - what only looks like a dict may raise anything
        raise TypeError(f"args: they cannot be read: {type(e).__name__}: {e}") from None
    if wrong:
        raise TypeError(f"args: {shown} is not the name of an argument")
    return written


def _is_of_all(mode: object) -> bool:
    return _is_a(mode, str) and str.__eq__(mode, "all") is True  # type: ignore[operator]


async def _later_as_json(args: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    async for one in args:
        yield _as_json(one)


def as_address(address: str) -> str:
    """A str; whether it is host:port is for transport.channels.split to say."""
    return _as_text("address", address)


def as_key(idempotency_key: str) -> str:
    return _as_text("idempotency_key", idempotency_key)


def as_id(process_id: str) -> str:
    return _as_text("process_id", process_id)


def as_flag(what: str, given: bool) -> bool:
    if type(given) is not bool:
        raise TypeError(f"{what} is True or False, not of type {_kind(given)}")
    return given


def as_whole(what: str, given: int, least: int = 0, most: int = MOST) -> int:
    number = given if type(given) is int else _as_index(what, given)
    if number < least:
        bound = f"not above {least - 1}" if least else "below 0"
        raise ValueError(f"{what} {_shown(number)} is {bound}")
    if number > most:
        raise ValueError(f"{what} {_shown(number)} is above {most}")
    return number


def as_first(first: int | None) -> int | None:
    """How many parts are enough; None for all."""
    return None if first is None else as_whole("first", first, least=1)


def as_patience(patience_s: float) -> float:
    number = _as_number("patience_s", patience_s)
    if not 0 <= number <= threading.TIMEOUT_MAX:
        raise ValueError(f"a patience of {number:g} s is below 0, or without an end (patience_s)")
    return number


def as_grace(grace_s: float | None) -> float | None:
    """Its bounds are the process's own."""
    return None if grace_s is None else _as_number("grace_s", grace_s)


def as_timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    number = _as_number("timeout", timeout)
    if number > threading.TIMEOUT_MAX:
        raise ValueError(f"a timeout of {number:g} s has no end")
    if not number > 0:
        raise ValueError(f"a timeout of {number:g} s is not above 0")
    return number


def _as_name(what: str, name: object) -> str:
    if callable(name):
        raise TypeError(f"code does not travel: name a {what} of the configuration")
    if not _is_a(name, str):
        raise TypeError(f"a {what} is named by a str, not {_kind(name)}")
    return _as_text(what, name)


def _as_text(what: str, given: object) -> str:
    if not _is_a(given, str):
        raise TypeError(f"{what} is a str, not {_kind(given)}")
    text = str.__str__(given)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{what}: {len(text):,} letters are more than {LONGEST_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{what}: it is not Unicode: {e}") from None
    return text


def _as_index(what: str, given: Any) -> int:
    try:
        if _is_a(given, bool):
            raise TypeError
        # From an int's subclass, too, the bare number.
        return int(operator.index(given))
    except Exception:  # noqa: BLE001 - what is not a number of ours may raise anything
        raise TypeError(f"{what} is a whole number, not of type {_kind(given)}") from None


def _as_number(what: str, given: Any) -> float:
    if type(given) is float:
        return given
    try:
        if _is_a(given, bool) or not _is_a(given, numbers.Real):
            raise TypeError
        return float(given)
    except OverflowError:
        raise ValueError(f"{what}: no number of seconds is as large") from None
    except Exception:  # noqa: BLE001 - as above
        raise TypeError(f"{what} is a number of seconds, not of type {_kind(given)}") from None


def _is_a(given: object, kind: Any) -> bool:
    # By its real type: isinstance believes what an object says of itself, as a mock does.
    return issubclass(type(given), kind)


def _kind(given: object) -> str:
    return type(given).__name__


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**20 else f"of {number.bit_length()} bits"
