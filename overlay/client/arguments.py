"""Checks and converts the arguments of the client's methods; no other module does.

The results have exact types (bytes, str, int, float, bool), never subclasses, because all requests
of a client share its caches, keys and frames. Raises TypeError and ValueError that name the
argument.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import os
import threading
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from overlay.client.outbox import CallKind
from overlay.model import json_values
from overlay.model.jobs import MAX_ATTEMPTS, is_job_id
from overlay.model.limits import Limits
from overlay.model.segments import Mode, Route
from overlay.queueing.admission import HIGHEST_PRIORITY
from overlay.security.lookup import Tls
from overlay.transport.codec import pb2

if TYPE_CHECKING:
    from overlay.client.resume import Record

Resume: TypeAlias = "str | os.PathLike[str] | Record | None"
DEFAULT_TIMEOUT_S = Limits().default_deadline_s
MAX_TEXT = 1000  # no name or key is longer, and longer text would fill a shared frame
MAX_COUNT = 2**31 - 1
HIGHEST_ID = 2**64 - 1


class CallOptions(NamedTuple):
    """The checked arguments of one request."""

    kind: CallKind
    body: bytes
    timeout_s: float
    has_values: bool  # for a typed function: the result is a JSON value


class MapOptions(NamedTuple):
    """The checked arguments of one map.

    bodies: what is sent, as an iterator or an async iterable. total: the number of bodies, 0 if
    unknown. chunk: payloads per message. window: payloads in flight. patience_s: None for the
    client's. record: of the map's results, opened. ahead: the bodies once more, to compare them
    with it; None where they can be taken only once.
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
    record: Record | None = None
    ahead: Iterator[bytes] | None = None


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
    if args is not None:  # mode "all": the caller wants each worker's own value
        want_parts = as_flag("want_parts", want_parts) or _asks_all_workers(mode)
    kind = call_kind(mode, team, handler, want_parts, priority)
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
    kind = call_kind(mode, team, "" if handler is None else handler, False, priority)
    return CallOptions(kind, _as_body(payload, args), as_timeout(timeout), args is not None)


def parts_options(
    payload: object, args: object, team: str, handler: str, timeout: float | None, priority: int
) -> CallOptions:
    kind = call_kind("all", team, handler, False, priority, as_they_come=True)
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
    resume: Resume,
) -> MapOptions:
    """Opens the record, at the end. Raises ResumeError if that fails."""
    kind = call_kind(mode, team, "" if handler is None else handler, False, priority)
    timeout_s = as_timeout(timeout)
    window, chunksize = as_int("window", window, minimum=1), as_int("chunksize", chunksize)
    options = MapOptions(
        kind,
        _as_bodies(payloads, args, mode),
        _length(payloads if args is None else args),
        timeout_s,
        args is not None,
        as_flag("ordered", ordered),
        min(chunksize or max(1, min(512, window // 4)), window),
        window,
        None if patience_s is None else as_patience(patience_s),
    )
    if resume is None:
        return options
    record = _as_record(resume, kind, args is not None)
    return options._replace(record=record, ahead=_bodies_again(payloads, args))


class JobOptions(NamedTuple):
    """The checked arguments of jobs that are submitted together. request: a serialized
    SubmitRequest without their payloads and keys."""

    request: bytes
    timeout_s: float
    has_values: bool


def job_options(
    handler: str | None,
    has_args: bool,
    mode: str,
    team: str,
    priority: int,
    limit_s: float | None,
    expires_s: float | None,
    start_at: float | datetime | None,
    every_s: float | None,
    attempts: int,
    in_parts: bool,
    timeout: float | None,
) -> JobOptions:
    in_parts = as_flag("in_parts", in_parts)
    want_parts = has_args and _asks_all_workers(mode) and not in_parts
    kind = call_kind(mode, team, "" if handler is None else handler, want_parts, priority)
    request = pb2.Request(
        mode=kind.route.mode.name,
        team=kind.route.team,
        handler=kind.route.handler,
        want_parts=kind.want_parts,
        in_parts=in_parts,
        priority=kind.priority,
    )
    made = pb2.SubmitRequest(
        request=request,
        limit_s=_as_duration("limit_s", limit_s),
        expires_s=_as_duration("expires_s", expires_s),
        every_s=_as_duration("every_s", every_s),
        start_at_s=_as_moment("start_at", start_at),
        attempts=as_int("attempts", attempts, maximum=MAX_ATTEMPTS),
    )
    return JobOptions(made.SerializeToString(deterministic=True), as_timeout(timeout), has_args)


def job_payloads(
    payloads: Iterable[bytes | str] | None, args: Iterable[Any] | None, keys: Iterable[str] | None
) -> tuple[list[bytes], list[str]]:
    """keys: "" for each payload if there are none."""
    if (payloads is None) == (args is None):
        raise TypeError("jobs need either payloads, or the args of a typed function")
    if args is None:
        bodies = [as_bytes(payload) for payload in as_iterator(payloads)]
    elif _is_instance(args, Mapping):
        raise TypeError("args of several jobs must be an iterable of dicts, not one dict")
    else:
        bodies = [_as_json(one) for one in args]
    found = [""] * len(bodies) if keys is None else [job_key(key) for key in keys]
    if len(found) != len(bodies):
        raise ValueError(f"keys: {len(found)} for {len(bodies)} jobs")
    if keys is not None and (not all(found) or len(set(found)) < len(found)):
        raise ValueError("keys: each must have at least one character, and no two may be equal")
    return bodies, found


def job_key(key: str) -> str:
    return _as_text("key", key)


def job_payload(payload: object, args: object) -> bytes:
    return _as_body(payload, args)


def job_states(states: Iterable[str]) -> list[Any]:
    """Of their names in lower case."""
    if isinstance(states, str):
        states = (states,)
    known = {name.lower(): value for name, value in pb2.JobState.items()}
    found = []
    for state in states:
        if _as_text("states", state) not in known:
            raise ValueError(f"states: {state[:20]!r} is not {', '.join(known)}")
        found.append(known[state])
    return found


def change_request(action: str, ids: Iterable[str], states: Iterable[str]) -> pb2.ChangeRequest:
    known = {name.lower(): name for name in pb2.JobAction.keys()}  # noqa: SIM118 - no dict
    if _as_text("action", action) not in known:
        raise ValueError(f"action {action[:20]!r} is not {', '.join(known)}")
    found = [as_job_id(id_) for id_ in ((ids,) if isinstance(ids, str) else ids)]
    wanted = job_states(states)
    if bool(found) == bool(wanted):
        raise ValueError("either ids or states are needed, to say which jobs are meant")
    return pb2.ChangeRequest(action=known[action], ids=found, states=wanted)


def jobs_request(states: Iterable[str], handler: str, limit: int, before: str) -> pb2.JobsRequest:
    return pb2.JobsRequest(
        states=job_states(states),
        handler=_as_name("handler", handler),
        limit=as_int("limit", limit, minimum=1),
        before=as_job_id(before, "before") if before else "",
    )


def as_job_id(id_: str, name: str = "id") -> str:
    text = _as_text(name, id_)
    if not is_job_id(text):
        raise ValueError(f"{name} {text[:20]!r} is not the id of a job, 16 digits from 0 to f")
    return text


def _as_duration(name: str, value: float | None) -> float:
    """0 for None."""
    if value is None:
        return 0.0
    number = _as_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a number of seconds above 0, not {number:g}")
    return number


def _as_moment(name: str, value: float | datetime | None) -> float:
    """Seconds since 1970; 0 for None."""
    if value is None:
        return 0.0
    number = value.timestamp() if isinstance(value, datetime) else _as_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a time after 1970, not {number:g}")
    return number


def metrics_request(events: int, requests: int, functions: bool) -> pb2.MetricsRequest:
    return pb2.MetricsRequest(
        events=as_int("events", events),
        requests=as_int("requests", requests),
        functions=as_flag("functions", functions),
    )


def call_kind(
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
        priority = as_int("priority", priority, maximum=HIGHEST_PRIORITY)
    return _cached_kind(mode, team, handler, want_parts, priority, as_they_come)


@functools.lru_cache(256)
def _cached_kind(
    mode: str, team: str, handler: str, want_parts: bool, priority: int, as_they_come: bool
) -> CallKind:
    # Exact types only: 1, 1.0 and True are the same cache key, so one could replace another.
    if mode not in ("all", "any"):
        raise ValueError(f"mode {mode[:20]!r} is not 'all' or 'any'")
    route = Route(Mode[mode.upper()], _as_name("team", team), _as_name("handler", handler))
    priority = as_int("priority", priority, maximum=HIGHEST_PRIORITY)
    return CallKind(route, want_parts, priority, as_they_come)


def as_bytes(payload: object) -> bytes:
    if type(payload) is bytes:
        return payload
    if _is_instance(payload, str):
        try:
            return str.encode(payload)  # type: ignore[arg-type]
        except UnicodeEncodeError as e:
            raise ValueError(f"a payload that is a str must be valid Unicode: {e}") from None
    if _is_instance(payload, (bytes, bytearray, memoryview)):
        try:
            return memoryview(payload).tobytes()  # type: ignore[arg-type]
        except ValueError as e:
            raise ValueError(f"the payload cannot be read: {e}") from None
    raise TypeError(f"a payload must be bytes or str, not {_type_name(payload)}")


def _as_body(payload: object, args: object) -> bytes:
    if args is None:
        if payload is None:
            raise TypeError("a request needs a payload, or the args of a typed function")
        return as_bytes(payload)
    if payload is not None:
        raise TypeError("a request takes a payload or args, not both")
    return _as_json(args)


def _as_bodies(payloads: Any, args: Any, mode: str) -> Any:
    """The bodies of a map's requests, as an iterator or an async iterable."""
    _check_mode_of_args(args, mode)
    if (payloads is None) == (args is None):
        raise TypeError("a map needs either payloads, or the args of a typed function")
    if args is None:
        return payloads if _is_instance(payloads, AsyncIterable) else as_iterator(payloads)
    if _is_instance(args, Mapping):
        raise TypeError("args of a map must be an iterable of dicts, one per call, not one dict")
    if _is_instance(args, AsyncIterable):
        return _each_as_json(args)
    try:
        return map(_as_json, args)
    except TypeError as e:
        raise TypeError(f"args of a map must be an iterable of dicts, one per call: {e}") from None


def _bodies_again(payloads: Any, args: Any) -> Iterator[bytes] | None:
    # Only of a sequence: what else can be iterated may give different items the second time.
    given, convert = (payloads, as_bytes) if args is None else (args, _as_json)
    return map(convert, given) if _is_instance(given, Sequence) else None


def as_iterator(payloads: Any) -> Iterator[Any]:
    try:
        return iter(payloads)
    except TypeError as e:
        raise TypeError(f"payloads must be an iterable of bytes or str: {e}") from None


def _length(bodies: Any) -> int:
    try:
        return len(bodies) if isinstance(bodies, Sized) else 0
    except OverflowError:  # of a range, for example: len() cannot return it
        return 0


def _check_mode_of_args(args: object, mode: str) -> None:
    """A Future or a map gives one value per call, so it could not report a missing worker."""
    if args is not None and _asks_all_workers(mode):
        raise ValueError(
            "mode 'all' with args returns one value per worker: use call (and its answer's "
            "values), or parts"
        )


def _as_json(args: Any) -> bytes:
    if not _is_instance(args, Mapping):
        raise TypeError(f"args must be a dict of arguments by name, not {_type_name(args)}")
    try:
        found = dict(args)
        wrong = [name for name in found if type(name) is not str]
        shown, written = (repr(wrong[0])[:50], b"") if wrong else ("", json_values.write(found))
    except json_values.NotJson as e:
        raise TypeError(f"args: {e}") from None
    except Exception as e:  # noqa: BLE001 - an object that imitates a dict may raise anything
        raise TypeError(f"args cannot be read: {type(e).__name__}: {e}") from None
    if wrong:
        raise TypeError(f"args: {shown} is not the name of an argument")
    return written


def _asks_all_workers(mode: object) -> bool:
    return _is_instance(mode, str) and str.__eq__(mode, "all") is True  # type: ignore[operator]


async def _each_as_json(args: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    async for one in args:
        yield _as_json(one)


def as_address(address: str) -> str:
    """Checks the type only; transport.channels.split checks that it is host:port."""
    return _as_text("address", address)


def as_key(idempotency_key: str) -> str:
    return _as_text("idempotency_key", idempotency_key)


def as_id(process_id: str) -> str:
    return _as_text("process_id", process_id)


def as_flag(name: str, value: bool) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, not {_type_name(value)}")
    return value


def as_int(name: str, value: int, minimum: int = 0, maximum: int = MAX_COUNT) -> int:
    number = value if type(value) is int else _as_index(name, value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {_shown(number)}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, not {_shown(number)}")
    return number


def _as_record(resume: Any, kind: CallKind, has_values: bool) -> Record:
    # Not at the top: it needs SQLite, which some Pythons are built without.
    from overlay.client.resume import Record, open_record

    if isinstance(resume, Record):
        return resume
    if not _is_instance(resume, (str, os.PathLike)):
        raise TypeError(f"resume must be the path of a file, not {_type_name(resume)}")
    path = os.fsdecode(resume)
    if not path or "\0" in path:
        raise ValueError(f"resume must be the path of a file, not {path[:50]!r}")
    return open_record(path, kind, has_values)


def as_first(first: int | None) -> int | None:
    return None if first is None else as_int("first", first, minimum=1)


def as_patience(patience_s: float) -> float:
    number = _as_number("patience_s", patience_s)
    if not 0 <= number <= threading.TIMEOUT_MAX:
        raise ValueError(f"patience_s must be 0 to {threading.TIMEOUT_MAX:.0f}, not {number:g}")
    return number


def as_tls(tls: Tls) -> Tls:
    if tls is None or isinstance(tls, (str, Path)) or tls is False:
        return tls
    raise TypeError(f"a folder of certificates, None or False is needed, not {tls!r:.99} (tls)")


def as_grace(grace_s: float | None) -> float | None:
    """Checks the type only; the process asked knows the bounds."""
    return None if grace_s is None else _as_number("grace_s", grace_s)


def as_timeout(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    number = _as_number("timeout", timeout)
    if not 0 < number <= threading.TIMEOUT_MAX:
        bounds = f"above 0 and at most {threading.TIMEOUT_MAX:.0f}"
        raise ValueError(f"timeout must be {bounds} seconds, not {number:g}")
    return number


def _as_name(kind: str, name: object) -> str:
    if callable(name):
        raise TypeError(f"code cannot be sent: give the name of a configured {kind}")
    return _as_text(kind, name)


def _as_text(name: str, value: object) -> str:
    if not _is_instance(value, str):
        raise TypeError(f"{name} must be a str, not {_type_name(value)}")
    text = str.__str__(value)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name} must have at most {MAX_TEXT:,} characters, not {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} must be valid Unicode: {e}") from None
    return text


def _as_index(name: str, value: Any) -> int:
    try:
        if _is_instance(value, bool):
            raise TypeError
        return int(operator.index(value))  # a plain int, also from a subclass
    except Exception:  # noqa: BLE001 - a foreign type may raise anything
        raise TypeError(f"{name} must be an integer, not {_type_name(value)}") from None


def _as_number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    try:
        if _is_instance(value, bool) or not _is_instance(value, numbers.Real):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a number of seconds") from None
    except Exception:  # noqa: BLE001 - as above
        raise TypeError(f"{name} must be a number of seconds, not {_type_name(value)}") from None


def _is_instance(value: object, kind: Any) -> bool:
    # isinstance() believes an object's __class__, which a mock can set to anything.
    return issubclass(type(value), kind)


def _type_name(value: object) -> str:
    return type(value).__name__


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**20 else f"a number of {number.bit_length()} bits"
