"""One picture of a whole overlay, for a page, a terminal or a script: pure decisions.

Made of what each process last said of itself and of its neighbours. A picture is plain data, as
JSON has it, and complete in itself: who misses one has lost nothing once the next is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overlay.model.limits import MIB
from overlay.model.topology import ROLES
from overlay.monitor.timeseries import COUNTERS, FIGURES, Timeseries, in_service, waiting
from overlay.observability.events import COME_AGAIN, latest

FORMAT = 1  # rises when a field changes its meaning or goes
EVENTS = 200  # shown
FUNCTIONS = 50  # told, with so many characters of the docstring: each picture has them
LONGEST_DOC = 1000
MODES = ("all", "any")  # as the wire numbers them
SAME_CLOCK_S = 0.5
SHORT = 60  # points of a process's own courses


@dataclass(frozen=True)
class Look:
    """What is known of one process; times are monotonic seconds.

    metrics: its last answer. reason: why there was none the last time, empty when there was.
    """

    since: float  # when it was first asked, or last answered
    metrics: Any = None
    reason: str = ""

    @property
    def answers(self) -> bool:
        return self.metrics is not None and not self.reason


@dataclass(frozen=True)
class Health:
    """well, impaired, stopping, gone, unseen (others see it, this machine does not) or asking.

    why: in words, empty when well. for_s: how long it has given no answer.
    """

    name: str
    why: str = ""
    for_s: float = 0.0


@dataclass(frozen=True)
class Known:
    """What a picture is made of.

    asked: the process at the address that the viewer named; empty, and without processes, before
    its first answer.
    """

    address: str
    asked: str
    processes: Sequence[Any]  # of the topology, in its order
    looks: Mapping[str, Look]
    histories: Mapping[str, Timeseries]
    seen: Sequence[Mapping[str, Any]]  # events that the watch itself has seen
    functions: Sequence[Any] = ()  # as the process asked told of them


@dataclass(frozen=True)
class Wanted:
    """Which requests are to be shown. caller and request_id: a part of it will do."""

    failed: bool = False
    handler: str = ""
    caller: str = ""
    request_id: str = ""

    def has(self, request: Mapping[str, Any]) -> bool:
        return (
            (bool(request["code"]) or not self.failed)
            and self.handler in ("", request["handler"])
            and self.caller in request["caller"]
            and self.request_id.lower() in request["request_id"]
        )


ALL = Wanted()


def picture(known: Known, now: float, wall: float, wanted: Wanted = ALL) -> dict[str, Any]:
    """The picture at `now`, which is `wall` in seconds since 1970.

    Rates are a second; times have their unit in their name, or are of the machine that watches.
    """
    healths = {p.id: health(p.id, known.looks, known.asked, now) for p in known.processes}
    workers = [p.id for p in known.processes if ROLES[p.role].works]
    history = known.histories[known.asked]
    return {
        "format": FORMAT,
        "at": round(wall, 3),
        "asked": {
            "id": known.asked,
            "address": known.address,
            **_as_plain(health(known.asked, known.looks, known.asked, now)),
        },
        "workers": len(workers),
        "workers_ready": sum(healths[w].name in ("well", "impaired") for w in workers),
        "processes": [_process(p, healths[p.id], known) for p in known.processes],
        "links": [
            link for p in known.processes for link in _links(p.id, healths[p.id], known, now)
        ],
        "course": {name: history.course(name) for name in FIGURES},
        "requests": list(filter(wanted.has, _requests(known.looks[known.asked], now, wall))),
        "maps": _maps(known.looks[known.asked], now),
        "events": _events(known, now, wall),
        "functions": [_function(function) for function in known.functions[:FUNCTIONS]],
    }


def health(process_id: str, looks: Mapping[str, Look], asked: str, now: float) -> Health:
    """How a process is, by its own word and by that of those who ask it."""
    look = looks[process_id]
    reports = _reports(process_id, looks)
    if look.reason:
        silent_s = now - look.since
        if look.metrics is None:  # this watch never had an answer; others may know for how long
            down = [r.since_s for r in reports.values() if r.state == "down"]
            silent_s = max([silent_s, *down])
        by = [who for who, report in reports.items() if report.state == "up"]
        if by:
            why = f"{look.reason}; but {' and '.join(by)} can reach it"
            return Health("unseen", why, silent_s)
        return Health("gone", look.reason, silent_s)
    if look.metrics is None:
        return Health("asking")
    if look.metrics.process_id != process_id:
        why = f"process {look.metrics.process_id} answers at its address"
        return Health("gone", why, now - look.since)
    if not look.metrics.is_healthy:
        return Health("stopping", "it finishes what runs and takes no new requests")
    return _impaired(look, looks[asked], reports)


def _impaired(look: Look, asked: Look, reports: Mapping[str, Any]) -> Health:
    if asked.metrics and asked.metrics.config_digest != look.metrics.config_digest:
        return Health("impaired", f"reads another configuration than {asked.metrics.process_id}")
    for who, report in reports.items():
        if report.health in ("slow", "ejected", "half-open"):
            return Health("impaired", f"{who} finds it {report.health}: {report.health_reason}")
    return Health("well")


def _reports(process_id: str, looks: Mapping[str, Look]) -> dict[str, Any]:
    """What the processes that answer now say of this one."""
    return {
        who: neighbour
        for who, look in looks.items()
        if look.answers
        for neighbour in look.metrics.neighbours
        if neighbour.process_id == process_id
    }


def _process(process: Any, health: Health, known: Known) -> dict[str, Any]:
    history = known.histories[process.id]
    return {
        "id": process.id,
        "role": process.role,
        "rank": ROLES[process.role].rank,
        "team": process.team,
        "address": process.address,
        "host": process.address.rpartition(":")[0].strip("[]"),
        "handler": process.handler,
        **_as_plain(health),
        "rates": {name: round(rate, 2) for name, rate in history.rates.items()},
        "course": {name: history.course(name, SHORT) for name in ("completed", "in_service")},
        **_said(known.looks[process.id].metrics, history),
    }


def _said(metrics: Any, history: Timeseries) -> dict[str, Any]:
    """The last that it said of itself; empty when it never did."""
    if metrics is None:
        return {}
    return {
        "waiting": waiting(metrics),
        "queued": metrics.queue_size,
        "queue_slots": metrics.queue_slots,
        "in_service": in_service(metrics),
        "capacity": metrics.max_capacity,
        "slots": metrics.slots,
        "streams": metrics.streams,
        "totals": {name: getattr(metrics, name) for name in COUNTERS},
        "refused_by_reason": dict(sorted(metrics.refused_by_reason.items())),
        "service_ms": _spread(metrics.service_ms),
        "waiting_ms": _spread(metrics.waiting_ms),
        "uptime_s": round(metrics.uptime_s, 1),
        "cores": None if history.cores is None else round(history.cores, 2),
        "memory_mib": round(metrics.memory_bytes / MIB, 1),
        "pid": metrics.pid,
        "version": metrics.version,
        "python": metrics.python,
        "platform": metrics.platform,
        "config": metrics.config_digest,
        "handlers": [
            {
                "name": h.name,
                "run": h.run,
                "slots": h.slots,
                "active": h.active,
                "completed": h.completed,
                "failed": h.failed,
                "rate": round(history.worked.get(h.name, 0.0), 2),
                "worked_ms": _spread(h.worked_ms),
            }
            for h in metrics.handlers
        ],
    }


def _links(who: str, health: Health, known: Known, now: float) -> list[dict[str, Any]]:
    """From this process to those that it asks; `unknown` when it does not tell any more."""
    look, history = known.looks[who], known.histories[who]
    if look.metrics is None:
        return []
    return [
        {
            "from": who,
            "to": n.process_id,
            "state": n.state if look.answers else "unknown",
            "for_s": round(n.since_s, 1),
            "why": (n.reason or n.health_reason) if look.answers else health.why,
            "health": n.health,
            "rate": round(history.asked.get(n.process_id, 0.0), 2),
            "outstanding": n.outstanding if look.answers else 0,
            "rtt_ms": round(n.rtt_ms, 3),
            "asked": n.asked,
            "failed": n.failed,
        }
        for n in look.metrics.neighbours
    ]


def _requests(look: Look, now: float, wall: float) -> list[dict[str, Any]]:
    """The last that ended at the process asked, the oldest first."""
    if look.metrics is None:
        return []
    ahead_s = _ahead_s(look, now, wall)
    return [
        {
            "request_id": f"{story.request_id:016x}",
            "mode": MODES[story.mode],
            "team": story.team,
            "handler": story.handler,
            "caller": story.caller,
            "ended_at": round(story.ended_s - ahead_s, 3),
            "code": story.code,
            "reason": story.reason,
            "count": story.count,
            "total_ms": story.total_us / 1e3,
            "hops": [
                {
                    "id": hop.process_id,
                    "depth": hop.depth,
                    "waited_ms": hop.waited_us / 1e3,
                    "worked_ms": hop.worked_us / 1e3,
                    "away_ms": hop.away_us / 1e3,
                    "code": hop.code,
                }
                for hop in story.hops
            ],
        }
        for story in look.metrics.requests
    ]


def _maps(look: Look, now: float) -> list[dict[str, Any]]:
    """Those that run at the process asked, by their clients' own count."""
    if look.metrics is None:
        return []
    made = []
    for one in look.metrics.maps:
        said = one.progress
        ended, took_s = said.answered + said.failed, said.took_s
        rate = ended / took_s if took_s else 0.0
        left_s = (said.total - ended) / rate if rate and said.total else None
        made.append(
            {
                "handler": said.handler,
                "caller": one.caller,
                "number": said.number,
                "answered": said.answered,
                "failed": said.failed,
                "total": said.total or None,
                "took_s": round(took_s, 1),
                "rate": round(rate, 2),
                "left_s": None if left_s is None else round(left_s, 1),
                "silent_s": round(one.told_s + now - look.since, 1),
            }
        )
    return made


def _events(known: Known, now: float, wall: float) -> list[Mapping[str, Any]]:
    """What the processes tell and what the watch has seen, by time, the latest of them."""
    told = [
        {
            "at": round(event.at_s - _ahead_s(look, now, wall), 3),
            "process": who,
            "kind": event.kind,
            "text": event.text,
            "level": event.level.lower(),
            "number": event.number,
            "count": event.count,
            "first_at": round((event.first_at_s or event.at_s) - _ahead_s(look, now, wall), 3),
            "is_change": event.kind not in COME_AGAIN,
        }
        for who, look in known.looks.items()
        if look.metrics is not None
        for event in look.metrics.events
    ]
    in_time = sorted([*told, *known.seen], key=lambda event: event["at"])
    return latest(in_time, EVENTS, lambda event: event["is_change"])


def _function(function: Any) -> dict[str, Any]:
    return {
        "name": function.name,
        "signature": function.signature,
        "doc": function.doc[:LONGEST_DOC],
        "workers": list(function.workers),
    }


def _ahead_s(look: Look, now: float, wall: float) -> float:
    """How far the process's clock is ahead of this machine's; small differences are travel."""
    ahead_s = float(look.metrics.wall_time_s) - (wall - (now - look.since))
    return ahead_s if abs(ahead_s) > SAME_CLOCK_S else 0.0


def _spread(spread: Any) -> dict[str, float]:
    return {"p50": round(spread.p50, 3), "p99": round(spread.p99, 3), "mean": round(spread.mean, 3)}


def _as_plain(health: Health) -> dict[str, Any]:
    return {"health": health.name, "why": health.why, "for_s": round(health.for_s, 1)}
