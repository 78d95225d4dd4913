"""Who may do what: the configuration's `access` as values, and the decisions about a caller.

    identity --Access.of--> Rights --> check_verb      before a call is read
                                   --> check_request   each route, at the process that was asked
                                   --> too_many        when what waits of the caller is `waiting`

Only callers are restricted. Operators and processes may do everything; a process has checked what
it passes on. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from overlay.model.errors import NotAllowed, QueueFull
from overlay.model.identity import OPERATOR, PROCESS, Identity
from overlay.model.segments import Route

REQUESTS, METRICS, LOGS = "requests", "metrics", "logs"
VERBS: Mapping[str, str] = {
    REQUESTS: "send requests",
    METRICS: "read metrics",
    LOGS: "read logs",
}
OTHERS = "*"  # the entry of the callers without one of their own; no certificate has this name
WITHOUT_CERTIFICATE = "a caller without a certificate"


class Worker(Protocol):
    """What `check_request` needs of a worker. handler: the one for requests that name none."""

    @property
    def id(self) -> str: ...
    @property
    def team(self) -> str: ...
    @property
    def handler(self) -> str: ...


@dataclass(frozen=True)
class Rights:
    """What a caller may do. None: everything, or any number; an empty collection: nothing.

    who: the caller, as refusals name it. waiting: how many of its requests may wait at once.
    """

    who: str = ""
    handlers: tuple[str, ...] | None = None
    teams: tuple[str, ...] | None = None
    verbs: tuple[str, ...] | None = None
    waiting: int | None = None

    def too_many(self) -> QueueFull:
        """The refusal of a request when `waiting` of this caller's wait already."""
        requests = "1 request" if self.waiting == 1 else f"{self.waiting} requests"
        return QueueFull(f"{self.who} has {requests} waiting here, and may have no more")


UNRESTRICTED = Rights()


@dataclass(frozen=True)
class Access:
    """The rights by the name of a caller's certificate. Without entries no caller is restricted."""

    entries: Mapping[str, Rights] = field(default_factory=dict)

    def of(self, identity: Identity | None) -> Rights:
        """Those of a caller. identity: None for a caller without a certificate."""
        if not self.entries or (identity is not None and identity.kind in (OPERATOR, PROCESS)):
            return UNRESTRICTED
        who = WITHOUT_CERTIFICATE if identity is None else identity.name
        own = None if identity is None else self.entries.get(identity.name)
        return replace(own or self.entries.get(OTHERS, UNRESTRICTED), who=who)


def may(rights: Rights, verb: str) -> bool:
    """Whether the caller may use the verb, one of VERBS."""
    return _allows(rights.verbs, verb)


def check_verb(rights: Rights, verb: str) -> None:
    """Raises NotAllowed when the caller may not use the verb, one of VERBS."""
    if not may(rights, verb):
        raise NotAllowed(f"{rights.who} may not {VERBS[verb]} here; {_allowed(rights.verbs)}")


def check_request(rights: Rights, route: Route, scope: Iterable[Worker]) -> None:
    """Raises NotAllowed when the caller may not ask for this.

    scope: the workers that the request is for; of a request to any, those that may get it. Each
    must be of a team that is allowed, and its default handler too if the request names none.
    """
    if rights is UNRESTRICTED:
        return
    check_verb(rights, REQUESTS)
    for worker in scope:
        handler = route.handler or worker.handler
        if not _allows(rights.handlers, handler):
            default = "" if route.handler else f", which {worker.id} runs when a request names none"
            raise NotAllowed(
                f"{rights.who} may not use handler '{handler}'{default}; "
                f"{_allowed(rights.handlers)}"
            )
        if not _allows(rights.teams, worker.team):
            unnamed = "" if route.team else ", which a request without a team goes to as well"
            raise NotAllowed(
                f"{rights.who} may not ask team '{worker.team}'{unnamed}; {_allowed(rights.teams)}"
            )


def _allows(names: Collection[str] | None, name: str) -> bool:
    return names is None or name in names


def _allowed(names: Collection[str] | None) -> str:
    if not names:
        return "none is allowed"
    return f"allowed {'is' if len(names) == 1 else 'are'} {', '.join(names)}"
