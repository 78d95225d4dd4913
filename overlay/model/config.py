"""Reads the configuration file and reports all problems in it at once.

`load(path)` returns a Topology or raises ConfigError, whose `problems` are sentences that each name
the process, the field and the value. Only the first six keys of a process are required.

These models serve only to read the file. The program uses the frozen dataclasses of `topology`, so
that a handler's process gets its HandlerSpec without importing pydantic, which would cost each one
17 MiB and up to a second.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from overlay.model.access import VERBS, Access, Rights
from overlay.model.errors import ConfigError
from overlay.model.identity import NAME
from overlay.model.jobs_servers import SCHEME, JobsServer, problem_of, servers_in
from overlay.model.limits import MIB, Limits
from overlay.model.topology import BUILT_IN, ROLES, Entry, HandlerSpec, Process, Topology

Name = Annotated[str, Field(pattern=f"^{NAME}$")]
CallerName = Annotated[str, Field(pattern=rf"^({NAME}|\*)$")]
Function = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Seconds = Annotated[float, Field(gt=0, le=86_400, strict=True)]
Host = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\s/\x00]+$")]
Folder = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1000)]
Count = Annotated[int, Field(ge=1, le=10_000, strict=True)]
Places = Annotated[int, Field(ge=1, le=1000, strict=True)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]

Days = Annotated[float, Field(gt=0, le=366 * 86_400, strict=True)]
JobCount = Annotated[int, Field(ge=1, le=100_000_000, strict=True)]
Mib = Annotated[int, Field(ge=1, le=65_536, strict=True)]
MessageMib = Annotated[
    int,
    Field(ge=Limits.min_message_limit // MIB, le=Limits.max_message_limit // MIB, strict=True),
]

ONLY_IN_PROCESSES = {
    "limit_s": "a thread cannot be killed",
    "memory_mib": "threads share this process's memory",
    "max_requests": "a thread is not replaced",
}


class _Entry(BaseModel):
    # Without use_attribute_docstrings, which made each start read this source: see `_explained`.
    model_config = ConfigDict(extra="forbid")


class ProcessEntry(_Entry):
    """One process. The first six keys are required."""

    id: Name
    """Its name in the file; must equal the entry's key. Names consist of letters, digits, dots,
    underscores and hyphens."""
    role: Literal["leader", "team_leader", "worker"]
    """Requests only go down: from the leader to team leaders, and from those to workers."""
    team: Name
    """A request may be narrowed to one team. Each team with workers needs a team_leader."""
    host: Host
    """The address at which other processes reach it: an IP address or a host name."""
    port: Port
    """The port it serves on."""
    neighbors: list[str]
    """The ids of the processes it has links to. It asks those with a lower role."""
    bind: Host | None = None
    """The address to listen on if it is not `host`: behind NAT, or with several network
    cards. Default: `host`."""
    handler: Name = "echo"
    """The handler for requests that name none. `echo` is built in."""
    slots: Count | None = None
    """How many requests may run at once on this worker, of all handlers together and of
    each."""
    in_service: Places | None = None
    """Like the top-level in_service, for this process only."""
    log_dir: Folder | None = None
    """Like the top-level log_dir, for this process only."""
    metrics_port: Port | None = None
    """The port on which Prometheus reads this process. Default: port + metrics_port_offset, if
    that is set."""
    options: dict[str, Any] = {}
    """Override the handler's own options in context.options."""


class HandlerEntry(_Entry):
    """A handler in full; the text "module:function" alone is enough."""

    call: Function
    """The function, as module:function. The module is also looked for in the configuration's
    folder."""
    merge: Function | None = None
    """A function that merges all workers' parts into one answer, in mode all. Without it they
    are joined by newlines."""
    run: Literal["thread", "process"] = "thread"
    """Where it runs. A process can be killed while it works, a thread cannot."""
    slots: Places | None = None
    """How many may run at once on one worker. Default: on threads 100, or 90 if there are other
    handlers; in processes one per CPU."""
    limit_s: Seconds | None = None
    """Seconds that one request may take before its process is killed. Only in processes."""
    memory_mib: Annotated[int, Field(ge=1, le=1_048_576, strict=True)] | None = None
    """MiB that one process may use, checked ten times a second; the programs it starts are not
    counted. Only in processes."""
    max_requests: Count | None = None
    """A process is replaced after this many requests. Only in processes."""
    options: dict[str, Any] = {}
    """Whatever the function reads from context.options."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"call": value} if isinstance(value, str) else value


class AccessEntry(_Entry):
    """What one caller may do. A key that is left out restricts nothing, an empty list allows
    nothing."""

    handlers: list[str] | None = None
    """The handlers that it may use. A request that names none needs the default handler of each
    worker that it is for."""
    teams: list[str] | None = None
    """The teams that it may ask. A request that names none is for every team with workers that the
    process asked reaches, so all of them must be here."""
    verbs: list[Literal["requests", "metrics", "logs"]] | None = None
    """What it may do at all: send requests; read metrics (`check`, `top`, `web`); read logs.
    Whether a process is healthy and what it serves is answered to every caller."""
    waiting: Count | None = None
    """How many of its requests may wait at one process at once, single and streamed together. More
    are refused as by a full queue; those that find a place at once are not counted."""


class ConfigurationFile(_Entry):
    """The configuration of one overlay: the same file on every machine."""

    schema_: str | None = Field(None, alias="$schema")
    processes: Annotated[dict[str, ProcessEntry], Field(min_length=1)]
    """The processes by id."""
    handlers: dict[Name, HandlerEntry] = {}
    """The functions by the name that requests use: "module:function", or an object in full."""
    queue_slots: Count = Limits.queue_slots
    """How many single calls may wait in the leader's queue."""
    in_service: Places = Limits.in_service
    """How many single calls may be in service at once, per process."""
    default_deadline_s: Seconds = Limits.default_deadline_s
    """Seconds for a request whose client gives no deadline."""
    max_deadline_s: Seconds = Limits.max_deadline_s
    """A longer deadline is cut to this many seconds."""
    drain_grace_s: Seconds = Limits.drain_grace_s
    """Seconds that running requests have to finish when a process stops."""
    max_message_mib: MessageMib = Limits.max_message_bytes // MIB
    """MiB of the largest payload or answer. A larger payload is refused before it runs."""
    max_waiting_mib: Mib = Limits.max_waiting_bytes // MIB
    """MiB of all waiting payloads together, per process."""
    key_window_s: Seconds = Limits.key_window_s
    """Seconds for which an answer is kept for its idempotency key."""
    max_kept_mib: Mib = Limits.kept_bytes // MIB
    """MiB of all answers kept for idempotency keys, per process."""
    journal: Folder = ""
    """The file in which the leader keeps jobs, relative to the configuration file. Without it there
    are no jobs. Not on a network share or in a folder that is synchronised with other machines. Or,
    for several leaders, the NATS servers that keep them: nats://HOST:PORT,HOST:PORT,HOST:PORT."""
    max_jobs: JobCount = Limits.max_jobs
    """How many jobs the journal may have, those that have ended included. More are refused."""
    max_journal_mib: Mib = Limits.journal_bytes // MIB
    """MiB of all their payloads and answers."""
    keep_jobs_s: Days = Limits.keep_jobs_s
    """Seconds for which a job that has ended, and its answer, are kept."""
    log_dir: Folder = "logs"
    """The folder of the logs (process_a.log and so on), relative to the configuration file."""
    metrics_port_offset: Annotated[int, Field(ge=-65_534, le=65_534, strict=True)] | None = None
    """Each process's metrics_port is its port plus this."""
    metrics_bind: Host = "127.0.0.1"
    """The address on which Prometheus reads the processes."""
    tls: Folder = ""
    """The folder of the certificates, relative to the configuration file; `client.py secure CONFIG`
    makes it and writes this line. "required": the folder tls, and no plaintext on 127.0.0.1 either.
    Without it everybody who reaches a process is let in."""
    access: dict[CallerName, AccessEntry] = {}
    """What callers may do, by the name of their certificates; "*" for those without an entry of
    their own and for callers on 127.0.0.1 without a certificate. Operators and processes are not
    restricted. Needs `tls`."""


_KINDS = {"processes": "process", "handlers": "handler", "access": "access"}
_ENTRIES: Mapping[str, type[BaseModel]] = {
    "process": ProcessEntry,
    "handler": HandlerEntry,
    "access": AccessEntry,
}
_OF_THE_FILE = {"handlers": "handlers", "teams": "teams with workers"}


def load(path: str | Path) -> Topology:
    """The overlay that the file describes. Raises ConfigError with every problem in the file."""
    path = Path(path)
    text = _read(path)
    raw = _parse(text, path.name)
    problems = list(_field_problems(raw))
    problems += _cross_problems(raw, dict(_valid_entries(raw)))
    if problems:
        raise ConfigError(*(_printable(f"{path.name}: {problem}") for problem in problems))
    try:
        return _topology(ConfigurationFile.model_validate(raw), path, raw)
    except RecursionError:
        raise ConfigError(f"{path.name} is not usable JSON: it is nested too deeply") from None


def warnings(topology: Topology) -> list[str]:
    """What is allowed but probably a mistake."""
    return [
        f"process {process.id}: neighbor '{n}' does not name {process.id} back"
        for process in topology.processes.values()
        for n in process.neighbors
        if process.id not in topology.processes[n].neighbors
    ]


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    document = ConfigurationFile.model_json_schema()
    for name, part in {ConfigurationFile.__name__: document, **document["$defs"]}.items():
        keys = part["properties"]
        for key, text in _explained(name):
            keys[key] = dict(sorted({**keys[key], "description": text}.items()))
    handlers = document["properties"]["handlers"]
    entry = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/HandlerEntry"}]}
    handlers.pop("patternProperties", None)
    handlers["additionalProperties"] = entry
    return document


def _explained(model: str) -> Iterator[tuple[str, str]]:
    """The keys of a model above, each with the text below it."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    classes = {part.name: part.body for part in source.body if isinstance(part, ast.ClassDef)}
    for key, text in itertools.pairwise(classes[model]):
        match key, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                yield name, inspect.cleandoc(words)


def _read(path: Path) -> str:
    try:
        # Windows editors add a byte order mark.
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
    duplicates: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        duplicates.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        raw = json.loads(text, object_pairs_hook=to_dict, parse_constant=_reject_constant)
    except json.JSONDecodeError as e:
        raise ConfigError(
            f"{name} is not JSON: line {e.lineno}, column {e.colno}: {e.msg}"
        ) from None
    except (RecursionError, ValueError) as e:
        raise ConfigError(f"{name} is not usable JSON: {_short(str(e))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f'{name} must be an object like {{"processes": {{…}}}}')
    if duplicates:
        raise ConfigError(*(f"{name}: key '{_short(key)}' appears twice" for key in duplicates))
    return raw


def _reject_constant(word: str) -> None:
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
    kind = _KINDS.get(steps[0]) if steps else None
    if kind and len(steps) > 1:
        rest = [step for step in steps[2:] if step != "[key]"]
        return f"{kind} {_short(steps[1])}: ", ".".join(rest)
    return "", ".".join(steps)


def _sentence(place: str, field: str, error: ErrorDetails) -> str:
    kind, value = error["type"], error.get("input")
    field = _short(field)
    if kind == "missing":
        return f"{place}'{field}' is missing"
    if kind == "extra_forbidden":
        return f"{place}unknown key '{field}'{_suggestion(place, field)}"
    if kind == "literal_error":
        field, is_verb = field.partition(".")[0], field.startswith("verbs")
        hint = _nearest(str(value), VERBS, "") if is_verb else ""
        return f"{place}{field} {_short(value)!r} is not {error['ctx']['expected']}{hint}"
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
    model = _ENTRIES.get(place.partition(" ")[0], ConfigurationFile)
    known = [name for name in model.model_fields if name != "schema_"]
    close = difflib.get_close_matches(field.rsplit(".", 1)[-1], known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys are {', '.join(known)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(value: object) -> str:
    text = _printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _valid_entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, ProcessEntry]]:
    # So that one invalid field does not hide problems between the other processes.
    processes = raw.get("processes")
    for key, value in processes.items() if isinstance(processes, dict) else ():
        try:
            yield key, ProcessEntry.model_validate(value)
        except ValidationError:
            continue


def _cross_problems(raw: Mapping[str, Any], valid: Mapping[str, ProcessEntry]) -> Iterator[str]:
    known = raw.get("processes")
    if not isinstance(known, dict) or not known:
        return
    yield from _entry_problems(valid, list(known))
    yield from _address_problems(valid)
    yield from _metrics_problems(raw, valid)
    servers, problem = _jobs_servers(raw)
    if problem:
        yield f"journal: {problem}"
    if len(valid) == len(known):
        yield from _shape_problems(valid, has_servers=bool(servers))
    yield from _handler_problems(raw, valid)
    yield from _access_problems(raw, valid if len(valid) == len(known) else {})


def _entry_problems(valid: Mapping[str, ProcessEntry], known: list[str]) -> Iterator[str]:
    by_lower: dict[str, str] = {}
    for key, entry in valid.items():
        other = by_lower.setdefault(key.lower(), key)
        if other != key:
            yield f"process {_short(key)}: its id differs from '{_short(other)}' only in case"
        if entry.id != key:
            yield f"process {_short(key)}: its id is '{entry.id}'; key and id must be equal"
        for n in entry.neighbors:
            if n == key:
                yield f"process {_short(key)}: it names itself as neighbor"
            elif n not in known:
                yield f"process {_short(key)}: neighbor '{_short(n)}' is not in the file"
        for n in sorted({n for n in entry.neighbors if entry.neighbors.count(n) > 1}):
            yield f"process {_short(key)}: neighbor '{_short(n)}' appears twice"


def _address_problems(valid: Mapping[str, ProcessEntry]) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for key, entry in valid.items():
        other = taken.setdefault((entry.host.lower(), entry.port), key)
        if other != key:
            yield (
                f"process {_short(key)}: port {entry.port} on {entry.host} "
                f"is process {_short(other)}'s already"
            )


def _metrics_problems(raw: Mapping[str, Any], valid: Mapping[str, ProcessEntry]) -> Iterator[str]:
    offset = raw.get("metrics_port_offset")
    offset = offset if isinstance(offset, int) else None
    taken = {(entry.host.lower(), entry.port): f"{key}'s port" for key, entry in valid.items()}
    for key, entry in valid.items():
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
            yield f"{where} is already process {_short(other)} on {entry.host}"


def _metrics_port(entry: ProcessEntry, offset: int | None) -> int | None:
    return entry.metrics_port or (entry.port + offset if offset is not None else None)


def _jobs_servers(raw: Mapping[str, Any]) -> tuple[tuple[JobsServer, ...], str]:
    """Those of the journal, and what is wrong with them."""
    journal = raw.get("journal")
    if not isinstance(journal, str) or not journal.startswith(SCHEME):
        return (), ""
    try:
        servers = servers_in(journal)
    except ValueError as e:
        return (), str(e)
    return servers, problem_of(servers)


def _shape_problems(processes: Mapping[str, ProcessEntry], has_servers: bool) -> Iterator[str]:
    leaders = [key for key, entry in processes.items() if entry.role == "leader"]
    if not leaders or (len(leaders) > 1 and not has_servers):
        hint = ': several need a journal on NATS servers, "journal": "nats://…"' if leaders else ""
        yield f"there must be one leader, not {len(leaders)} ({', '.join(leaders) or 'none'}){hint}"
    led = {entry.team for entry in processes.values() if entry.role == "team_leader"}
    working = {entry.team for entry in processes.values() if entry.role == "worker"}
    for team in sorted(working - led):
        yield f"team '{team}' has workers but no team_leader"
    for leader in leaders if len(leaders) == 1 or has_servers else ():
        reached = Topology.of(processes).reach(leader)
        for key, entry in processes.items():
            if entry.role == "worker" and key not in reached:
                yield (
                    f"process {key}: leader {leader} has no path down to it; "
                    f"a team_leader among the neighbors of {leader} must have {key} as neighbor"
                )


def _handler_problems(raw: Mapping[str, Any], valid: Mapping[str, ProcessEntry]) -> Iterator[str]:
    configured = raw.get("handlers")
    configured = configured if isinstance(configured, dict) else {}
    yield from _limit_problems(configured)
    names = {*BUILT_IN, *configured}
    for key, entry in valid.items():
        if entry.handler not in names:
            yield (
                f"process {_short(key)}: handler '{entry.handler}' is not in the file's handlers"
                f"{_nearest(entry.handler, names)}"
            )


def _limit_problems(configured: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in configured.items():
        if not isinstance(entry, dict) or entry.get("run", "thread") != "thread":
            continue
        for key, why in ONLY_IN_PROCESSES.items():
            if entry.get(key) is not None:
                yield f'handler {_short(name)}: {key} needs "run": "process"; {why}'


def _access_problems(raw: Mapping[str, Any], processes: Mapping[str, Entry]) -> Iterator[str]:
    """processes: all of them; none if some cannot be read."""
    entries, configured = raw.get("access"), raw.get("handlers")
    if not isinstance(entries, dict) or not entries:
        return
    if not raw.get("tls"):
        yield (
            'access needs "tls", as callers are known by their certificates: run '
            "'client.py secure' on the file without access, then add access"
        )
    known = {
        "handlers": {*BUILT_IN, *(configured if isinstance(configured, dict) else ())},
        "teams": {entry.team for entry in processes.values() if ROLES[entry.role].works},
    }
    for name, entry in entries.items():
        for key, names in known.items():
            found = entry.get(key) if isinstance(entry, dict) else None
            for value in found if names and isinstance(found, list) else ():
                if isinstance(value, str) and value not in names:
                    yield (
                        f"access {_short(name)}: {key} {_short(value)!r} is not among the file's "
                        f"{_OF_THE_FILE[key]}{_nearest(value, names)}"
                    )


def _nearest(value: str, names: Collection[str], otherwise: str = "; it has {}") -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(value, sorted(names), n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return otherwise.format(", ".join(sorted(names)))


def _topology(file: ConfigurationFile, path: Path, raw: Mapping[str, Any]) -> Topology:
    handlers = {name: HandlerSpec(name, **dict(entry)) for name, entry in file.handlers.items()}
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
            max_jobs=file.max_jobs,
            journal_bytes=file.max_journal_mib * MIB,
            keep_jobs_s=file.keep_jobs_s,
        ),
        folder=path.absolute().parent,
        name=path.name,
        digest=_digest(raw),
        tls=file.tls,
        journal=file.journal,
        access=Access({name: _rights(entry) for name, entry in file.access.items()}),
    )


def _rights(entry: AccessEntry) -> Rights:
    def names(found: Collection[str] | None) -> tuple[str, ...] | None:
        return None if found is None else tuple(found)

    return Rights("", names(entry.handlers), names(entry.teams), names(entry.verbs), entry.waiting)


def _process(entry: ProcessEntry, file: ConfigurationFile) -> Process:
    return Process(
        **{
            **dict(entry),
            "neighbors": tuple(entry.neighbors),
            "bind": entry.bind or "",
            "in_service": entry.in_service or file.in_service,
            "log_dir": entry.log_dir or file.log_dir,
            "metrics_port": _metrics_port(entry, file.metrics_port_offset),
            "metrics_bind": file.metrics_bind,
        }
    )


def _digest(raw: Mapping[str, Any]) -> str:
    """Equal for equal content, whatever the layout of the file."""
    text = json.dumps(raw, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
