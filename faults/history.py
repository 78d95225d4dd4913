"""The history of one run: calls, jobs, executions, answers, faults; values, and their JSON lines.

Times are seconds of the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "FAULTS_FOLDER"  # environment variable: the folder of executions and degradations


@dataclass(frozen=True)
class About:
    """The scenario that was run. workers: id -> team, in the order of the configuration.

    expects: the allowed statuses. may_raise: the handlers that may also give INTERNAL. slots: of
    each worker's handlers; 0 if not recorded. most_lent: how many requests all clients together may
    send straight to one worker; 0 if lending is not looked at.
    """

    scenario: str
    seed: int
    workers: dict[str, str]
    expects: list[str]
    may_raise: list[str] = field(default_factory=list)
    slots: int = 0
    most_lent: int = 0


@dataclass(frozen=True)
class Call:
    """One request as sent. key: identifies it in the handler's record; a repetition has the same.

    due: when it should have been sent. way: as in faults.load, or ENDED_LANE. vanishes: its
    client is killed before the answer. idempotency: its idempotency key.
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
    """One run of a handler. end: None if it was killed. deadline: the one that it was given."""

    key: int
    worker: str
    begin: float
    end: float | None
    attempt: int
    deadline: float


@dataclass(frozen=True)
class Answer:
    """by: "overlay", or "client" if the client gave up or lost the connection.

    executed: yes, no or unknown, as in the answer. parts: (worker, status, executed). coverage: the
    trailer of a unary answer. result: lines "WORKER KEY".
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
class Submit:
    """One job as submitted, and what its client was told.

    id: in the payload, and so the key in the handler's record; a repetition has the same. key: its
    key, which allows a repetition. attempts: how often it may be begun. expires: whether it may.
    job: the id that it was given. code, executed, reason: why there is none.
    """

    id: int
    at: float
    until: float
    mode: str
    team: str
    handler: str
    key: str
    attempts: int
    expires: bool = False
    job: str = ""
    code: str = "OK"
    executed: str = "unknown"
    reason: str = ""


@dataclass(frozen=True)
class Look:
    """What a client was told about a job. code: of the question. failure, reason: of the job.

    with_answer: it was over, and its answer was asked for. is_last: asked after the load, when it
    must be over.
    """

    job: str
    at: float
    until: float
    state: str = ""
    attempts: int = 0
    code: str = "OK"
    failure: str = "OK"
    reason: str = ""
    with_answer: bool = False
    result: str | None = None
    parts: tuple[tuple[str, str, str], ...] = ()
    is_last: bool = False


@dataclass(frozen=True)
class Cancel:
    """changed: the client was told that the job was not over, and is cancelled."""

    job: str
    at: float
    until: float
    code: str
    changed: bool


@dataclass(frozen=True)
class Fault:
    """Something done to a process, until it was undone."""

    what: str
    process: str
    begin: float
    end: float


@dataclass(frozen=True)
class Stall:
    """The bench itself did not get the CPU, so this time counts against no process."""

    begin: float
    end: float


@dataclass(frozen=True)
class Rest:
    """A process's counts after the load; each should be 0.

    completed: how many requests it has answered since its start; None if it did not say.
    """

    process: str
    counts: dict[str, int]
    completed: int | None = None


@dataclass(frozen=True)
class Lending:
    """What the leader had lent at a time. rows: how many requests may go straight to each worker,
    of all clients together. answered: how many have, since its start."""

    at: float
    rows: dict[str, int]
    answered: int


@dataclass(frozen=True)
class Ending:
    """A process that ended. wanted: the expected exit codes. output: its last lines."""

    process: str
    code: int
    wanted: list[int]
    output: str = ""


@dataclass(frozen=True)
class Recovery:
    """Whether and when the overlay gave complete answers again. last: the last answer."""

    ok: bool
    took_s: float
    last: str = ""


@dataclass(frozen=True)
class Trouble:
    """The bench could not carry out the scenario, so the run proves nothing."""

    what: str


ENDED_LANE = "ended lane"  # the way of a call that was sent on a lane after its lease had ended
KINDS: dict[str, type] = {
    kind.__name__.lower(): kind
    for kind in (
        About, Call, Execution, Answer, Submit, Look, Cancel, Fault, Stall, Rest, Lending, Ending,
        Recovery, Trouble,
    )
}  # fmt: skip


@dataclass
class History:
    about: About
    calls: list[Call] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    submits: list[Submit] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    lendings: list[Lending] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    @staticmethod
    def of(records: Iterable[Any]) -> History:
        """Raises ValueError if there is no About."""
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
            self.submits,
            self.looks,
            self.cancels,
        ]
        lists += [self.rests, self.lendings, self.endings, self.recoveries, self.troubles]
        return [self.about, *(record for each in lists for record in each)]


_PLACES = {"recovery": "recoveries"}


def write(history: History, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in history.records():
            kind = type(record).__name__.lower()
            file.write(json.dumps({"kind": kind, **asdict(record)}) + "\n")


def read(path: Path) -> History:
    """Raises ValueError, which names the invalid line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}:{number}: not a record of a history ({e})") from None
    return History.of(records)


def _record(fields: dict[str, Any]) -> Any:
    kind = KINDS[fields.pop("kind")]
    if kind in (Answer, Look):
        fields["parts"] = tuple(tuple(part) for part in fields["parts"])
    return kind(**fields)


def executions_of(lines: Iterable[str]) -> list[Execution]:
    """The handlers' records as executions, without a last line that a kill has cut."""
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
