"""Reads the configuration file and names every problem in it at once.

`load(path)` gives a Topology or raises ConfigError, whose `problems` are sentences that each name
the process, the field and the value. Every key beyond the six of a process is optional.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overlay.model.errors import ConfigError
from overlay.model.limits import MIB, Limits
from overlay.model.topology import BUILT_IN, HandlerSpec, Process, Topology

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Function = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Seconds = Annotated[float, Field(gt=0, le=86_400, strict=True)]
Host = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\s/\x00]+$")]
Folder = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1000)]
Count = Annotated[int, Field(ge=1, le=10_000, strict=True)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]

ONLY_IN_PROCESSES = {
    "limit_s": "a thread cannot be ended",
    "memory_mib": "threads share this process's memory",
    "max_requests": "a thread is not replaced",
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProcessEntry(_Entry):
    """One process. The first six keys are required."""

    id: Name
    role: Literal["leader", "team_leader", "worker"]
    team: Name
    host: Host
    port: Port
    neighbors: list[str]
    bind: Host | None = None
    handler: Name = "echo"
    slots: Count | None = None
    in_service: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    log_dir: Folder | None = None
    metrics_port: Port | None = None
    options: dict[str, Any] = {}


class HandlerEntry(_Entry):
    """A handler in full; "module:function" alone is enough."""

    call: Function
    merge: Function | None = None
    run: Literal["thread", "process"] = "thread"
    slots: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    limit_s: Seconds | None = None
    memory_mib: Annotated[int, Field(ge=1, le=1_048_576, strict=True)] | None = None
    max_requests: Count | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"call": value} if isinstance(value, str) else value


class ConfigurationFile(_Entry):
    """The configuration of one overlay: the same file on every machine."""

    schema_: str | None = Field(None, alias="$schema")
    processes: Annotated[dict[str, ProcessEntry], Field(min_length=1)]
    handlers: dict[Name, HandlerEntry] = {}
    queue_slots: Count = 200
    in_service: Annotated[int, Field(ge=1, le=1000, strict=True)] = 100
    default_deadline_s: Seconds = 30
    max_deadline_s: Seconds = 3600
    drain_grace_s: Seconds = 30
    max_message_mib: Annotated[int, Field(ge=1, le=1024, strict=True)] = 16
    max_waiting_mib: Annotated[int, Field(ge=1, le=65_536, strict=True)] = 256
    key_window_s: Seconds = 600
    max_kept_mib: Annotated[int, Field(ge=1, le=65_536, strict=True)] = 128
    log_dir: Folder = "logs"
    metrics_port_offset: Annotated[int, Field(ge=-65_534, le=65_534, strict=True)] | None = None
    metrics_bind: Host = "127.0.0.1"


def load(path: str | Path) -> Topology:
    """The overlay that the file describes. Raises ConfigError with all problems found."""
    path = Path(path)
    text = _read(path)
    raw = _parse(text, path.name)
    problems = list(_field_problems(raw))
    entries = dict(_good_entries(raw))
    problems += _cross_problems(raw, entries)
    if problems:
        raise ConfigError(*(_printable(f"{path.name}: {problem}") for problem in problems))
    try:
        return _topology(ConfigurationFile.model_validate(raw), path, raw)
    except RecursionError:
        raise ConfigError(f"{path.name} is not usable JSON: it is nested too deeply") from None


def warnings(topology: Topology) -> list[str]:
    """What is allowed and yet probably not meant."""
    return [
        f"process {process.id}: neighbor '{n}' does not name {process.id} back"
        for process in topology.processes.values()
        for n in process.neighbors
        if process.id not in topology.processes[n].neighbors
    ]


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    made = ConfigurationFile.model_json_schema()
    handlers = made["properties"]["handlers"]
    entry = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/HandlerEntry"}]}
    handlers.pop("patternProperties", None)
    handlers["additionalProperties"] = entry
    return made


def _read(path: Path) -> str:
    try:
        # Windows editors put a byte order mark in front.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at '{path}'") from None
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{path.name} is not UTF-8 text (byte {e.start}); save it again as UTF-8"
        ) from None
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"the configuration file '{path}' cannot be read: {reason}") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    twice: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in found]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(found)

    try:
        raw = json.loads(text, object_pairs_hook=pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        raise ConfigError(
            f"{name} is not JSON: line {e.lineno}, column {e.colno}: {e.msg}"
        ) from None
    except (RecursionError, ValueError) as e:
        raise ConfigError(f"{name} is not usable JSON: {_short(str(e))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f'{name} must be an object like {{"processes": {{…}}}}')
    if twice:
        raise ConfigError(*(f"{name}: key '{_short(key)}' is there twice" for key in twice))
    return raw


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _field_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    try:
        ConfigurationFile.model_validate(raw)
    except ValidationError as e:
        seen = set()
        for error in e.errors(include_url=False):
            place, field = _place([str(step) for step in error["loc"]])
            sentence = _sentence(place, field, error)
            if sentence not in seen:
                seen.add(sentence)
                yield sentence


def _place(steps: list[str]) -> tuple[str, str]:
    # ("processes", "C", "port") -> "process C: ", "port"
    kind = {"processes": "process", "handlers": "handler"}.get(steps[0]) if steps else None
    if kind and len(steps) > 1:
        rest = [step for step in steps[2:] if step != "[key]"]
        return f"{kind} {_short(steps[1])}: ", ".".join(rest)
    return "", ".".join(steps)


def _sentence(place: str, field: str, error: Any) -> str:
    kind, value = error["type"], error.get("input")
    field = _short(field)
    if kind == "missing":
        return f"{place}'{field}' is missing"
    if kind == "extra_forbidden":
        return f"{place}unknown key '{field}'{_suggestion(place, field)}"
    if kind == "literal_error":
        return f"{place}{field} {_short(value)!r} is not {error['ctx']['expected']}"
    if field in ("port", "metrics_port") and kind in {"greater_than_equal", "less_than_equal"}:
        return f"{place}{field} {_short(value)} is not 1..65535"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == _pattern(Function):
        return f'{place}{field or "value"} {_short(value)!r} is not "module:function"'
    if kind == "string_pattern_mismatch":
        return (
            f"{place}{field or 'name'} {_short(value)!r} does not match {error['ctx']['pattern']}"
        )
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{place}{field + ': ' if field else ''}{message}, not {_short(value)!r}"


def _pattern(annotated: Any) -> str:
    return str(annotated.__metadata__[0].metadata[0].pattern)


def _suggestion(place: str, field: str) -> str:
    model: type[BaseModel] = ConfigurationFile
    if place:
        model = ProcessEntry if place.startswith("process") else HandlerEntry
    known = [name for name in model.model_fields if name != "schema_"]
    close = difflib.get_close_matches(field.rsplit(".", 1)[-1], known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(value: object) -> str:
    text = _printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _good_entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, ProcessEntry]]:
    # So that one bad field does not hide what is wrong between the other processes.
    processes = raw.get("processes")
    for key, value in processes.items() if isinstance(processes, dict) else ():
        try:
            yield key, ProcessEntry.model_validate(value)
        except ValidationError:
            continue


def _cross_problems(raw: Mapping[str, Any], good: Mapping[str, ProcessEntry]) -> Iterator[str]:
    known = raw.get("processes")
    if not isinstance(known, dict) or not known:
        return
    whole = len(good) == len(known)
    yield from _entry_problems(good, list(known))
    yield from _address_problems(good)
    yield from _metrics_problems(raw, good)
    if whole:
        yield from _shape_problems(good)
    yield from _handler_problems(raw, good)


def _entry_problems(good: Mapping[str, ProcessEntry], known: list[str]) -> Iterator[str]:
    by_lower: dict[str, str] = {}
    for key, entry in good.items():
        other = by_lower.setdefault(key.lower(), key)
        if other != key:
            yield f"process {_short(key)}: only its case differs from {_short(other)}'s"
        if entry.id != key:
            yield f"process {_short(key)}: its id is '{entry.id}'; key and id must be equal"
        for n in entry.neighbors:
            if n == key:
                yield f"process {_short(key)}: it names itself as neighbor"
            elif n not in known:
                yield f"process {_short(key)}: neighbor '{_short(n)}' is not in the file"
        for n in sorted({n for n in entry.neighbors if entry.neighbors.count(n) > 1}):
            yield f"process {_short(key)}: neighbor '{_short(n)}' is there twice"


def _address_problems(good: Mapping[str, ProcessEntry]) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for key, entry in good.items():
        other = taken.setdefault((entry.host.lower(), entry.port), key)
        if other != key:
            yield (
                f"process {_short(key)}: port {entry.port} on {entry.host} "
                f"is process {_short(other)}'s already"
            )


def _metrics_problems(raw: Mapping[str, Any], good: Mapping[str, ProcessEntry]) -> Iterator[str]:
    offset = raw.get("metrics_port_offset")
    offset = offset if isinstance(offset, int) else None
    taken = {(entry.host.lower(), entry.port): f"{key}'s port" for key, entry in good.items()}
    for key, entry in good.items():
        port = _metrics_port(entry, offset)
        if port is None:
            continue
        where = f"process {_short(key)}: metrics_port {port}"
        if entry.metrics_port is None:
            where += f" (port {entry.port} with metrics_port_offset {offset})"
        other = taken.setdefault((entry.host.lower(), port), f"{key}'s metrics_port")
        if not 1 <= port <= 65535:
            yield f"{where} is not 1..65535"
        elif other != f"{key}'s metrics_port":
            yield f"{where} is process {_short(other)} on {entry.host} already"


def _metrics_port(entry: ProcessEntry, offset: int | None) -> int | None:
    return entry.metrics_port or (entry.port + offset if offset is not None else None)


def _shape_problems(processes: Mapping[str, ProcessEntry]) -> Iterator[str]:
    leaders = [key for key, entry in processes.items() if entry.role == "leader"]
    if len(leaders) != 1:
        yield f"there must be one leader, not {len(leaders)} ({', '.join(leaders) or 'none'})"
    led = {entry.team for entry in processes.values() if entry.role == "team_leader"}
    working = {entry.team for entry in processes.values() if entry.role == "worker"}
    for team in sorted(working - led):
        yield f"team '{team}' has workers and no team_leader"
    if len(leaders) == 1:
        reached = Topology.of(processes).reach(leaders[0])
        for key, entry in processes.items():
            if entry.role == "worker" and key not in reached:
                yield (
                    f"process {key}: no way from leader {leaders[0]} down to it; "
                    f"a team_leader that {leaders[0]} has as neighbor must have {key} as neighbor"
                )


def _handler_problems(raw: Mapping[str, Any], good: Mapping[str, ProcessEntry]) -> Iterator[str]:
    configured = raw.get("handlers")
    configured = configured if isinstance(configured, dict) else {}
    yield from _limit_problems(configured)
    names = {*BUILT_IN, *configured}
    for key, entry in good.items():
        if entry.handler not in names:
            close = difflib.get_close_matches(entry.handler, sorted(names), n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(sorted(names))}"
            yield (
                f"process {_short(key)}: handler '{entry.handler}' is not in the file's handlers; "
                f"{hint}"
            )


def _limit_problems(configured: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in configured.items():
        if not isinstance(entry, dict) or entry.get("run", "thread") != "thread":
            continue
        for key, why in ONLY_IN_PROCESSES.items():
            if entry.get(key) is not None:
                yield f'handler {_short(name)}: {key} needs "run": "process"; {why}'


def _topology(file: ConfigurationFile, path: Path, raw: Mapping[str, Any]) -> Topology:
    handlers = {name: _handler(name, entry) for name, entry in file.handlers.items()}
    return Topology(
        processes={key: _process(entry, file) for key, entry in file.processes.items()},
        handlers={**BUILT_IN, **handlers},
        limits=Limits(
            queue_slots=file.queue_slots,
            in_service=file.in_service,
            default_deadline_s=min(file.default_deadline_s, file.max_deadline_s),
            max_deadline_s=file.max_deadline_s,
            drain_grace_s=file.drain_grace_s,
            max_message_bytes=file.max_message_mib * MIB,
            max_waiting_bytes=file.max_waiting_mib * MIB,
            key_window_s=file.key_window_s,
            kept_bytes=file.max_kept_mib * MIB,
        ),
        folder=path.absolute().parent,
        name=path.name,
        digest=_digest(raw),
    )


def _process(entry: ProcessEntry, file: ConfigurationFile) -> Process:
    return Process(
        id=entry.id,
        role=entry.role,
        team=entry.team,
        host=entry.host,
        port=entry.port,
        neighbors=tuple(entry.neighbors),
        bind=entry.bind or "",
        handler=entry.handler,
        slots=entry.slots,
        in_service=entry.in_service or file.in_service,
        log_dir=entry.log_dir or file.log_dir,
        options=entry.options,
        metrics_port=_metrics_port(entry, file.metrics_port_offset),
        metrics_bind=file.metrics_bind,
    )


def _handler(name: str, entry: HandlerEntry) -> HandlerSpec:
    return HandlerSpec(
        name=name,
        call=entry.call,
        merge=entry.merge,
        run=entry.run,
        slots=entry.slots,
        limit_s=entry.limit_s,
        memory_mib=entry.memory_mib,
        max_requests=entry.max_requests,
        options=entry.options,
    )


def _digest(raw: Mapping[str, Any]) -> str:
    """The same for the same content, whatever its layout."""
    text = json.dumps(raw, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
