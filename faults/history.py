"""What happened in one run: calls, executions, answers, faults. Values, and their JSON lines.

Times are seconds of the machine's monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class About:
    """What was run. workers: id -> team, in the order of the configuration.

    expects: the statuses an answer may have. may_raise: the handlers that may end as INTERNAL.
    slots: how many requests a worker's handler takes at once; 0 when nobody wrote it down.
    """

    scenario: str
    seed: int
    workers: dict[str, str]
    expects: list[str]
    may_raise: list[str] = field(default_factory=list)
    slots: int = 0


@dataclass(frozen=True)
class Call:
    """One request as it left. key: what the handler writes down; a repeated request shares it.

    due: when the schedule wanted it to leave. vanishes: its client is killed before the answer.
    idempotency: the key of that name it carries.
    """

    id: int
    key: int
    due: float
    at: float
    deadline: float
    mode: str
    way: str
    team: str = ""
    handler: str = "work"
    asked: str = "A"
    vanishes: bool = False
    idempotency: str = ""


@dataclass(frozen=True)
class Execution:
    """One run of a handler. end: None when it was cut off. told: the deadline it was given."""

    key: int
    worker: str
    begin: float
    end: float | None
    attempt: int
    told: float


@dataclass(frozen=True)
class Answer:
    """What came back. by: "overlay", or "client" when its own side gave up or lost the connection.

    executed: yes, no or unknown, as the answer says. parts: (worker, status, executed) of those
    asked. coverage: the trailer, only of a unary answer. result: lines "WORKER KEY".
    """

    id: int
    at: float
    code: str
    by: str = "overlay"
    executed: str = "unknown"
    coverage: str = ""
    parts: tuple[tuple[str, str, str], ...] = ()
    result: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Fault:
    """Something done to a process, until it was undone."""

    what: str
    process: str
    begin: float
    end: float


@dataclass(frozen=True)
class Stall:
    """The bench itself did not get the processor: nobody can be blamed for this time."""

    begin: float
    end: float


@dataclass(frozen=True)
class Rest:
    """The metrics of a process after the load: each count should be 0."""

    process: str
    counts: dict[str, int]


@dataclass(frozen=True)
class Ending:
    """A process that ended. wanted: the exit codes that were asked for; said: its last words."""

    process: str
    code: int
    wanted: list[int]
    said: str = ""


@dataclass(frozen=True)
class Recovery:
    """Whether the overlay answered completely again by itself, and after how many seconds."""

    ok: bool
    took_s: float
    said: str = ""


@dataclass(frozen=True)
class Trouble:
    """The bench could not do what the scenario says; the run proves nothing."""

    what: str


Record = About | Call | Execution | Answer | Fault | Stall | Rest | Ending | Recovery | Trouble
KINDS = {
    kind.__name__.lower(): kind
    for kind in (About, Call, Execution, Answer, Fault, Stall, Rest, Ending, Recovery, Trouble)
}


@dataclass
class History:
    about: About
    calls: list[Call] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    @staticmethod
    def of(records: Iterable[Any]) -> History:
        """Raises ValueError when no record says what was run."""
        records = list(records)
        about = next((r for r in records if isinstance(r, About)), None)
        if about is None:
            raise ValueError("a history needs a line of kind 'about'")
        history = History(about)
        for record in records:
            name = type(record).__name__.lower()
            if name != "about":
                getattr(history, _PLACES.get(name, name + "s")).append(record)
        return history

    def records(self) -> list[Any]:
        lists: list[list[Any]] = [
            self.faults,
            self.stalls,
            self.calls,
            self.executions,
            self.answers,
        ]
        lists += [self.rests, self.endings, self.recoveries, self.troubles]
        return [self.about, *(record for each in lists for record in each)]


_PLACES = {"recovery": "recoveries"}


def write(history: History, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in history.records():
            kind = type(record).__name__.lower()
            file.write(json.dumps({"kind": kind, **asdict(record)}) + "\n")


def read(path: Path) -> History:
    """Raises ValueError naming the line that is not usable."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}:{number}: not a record of a history ({e})") from None
    return History.of(records)


def _record(fields: dict[str, Any]) -> Any:
    kind = KINDS[fields.pop("kind")]
    if kind is Answer:
        fields["parts"] = tuple(tuple(part) for part in fields["parts"])
    return kind(**fields)


def executions_of(lines: Iterable[str]) -> list[Execution]:
    """The handlers' notes as executions; a last line that a kill has cut is left out."""
    begun: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            note = json.loads(line)
        except ValueError:
            continue
        run = note.pop("run")
        if "end" in note:
            begun[run]["end"] = note["end"]
        else:
            begun[run] = {**note, "end": None}
    return [Execution(**fields) for fields in begun.values()]
