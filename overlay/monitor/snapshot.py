"""A snapshot of a whole overlay, for a page, a terminal or a script.

Sans-IO: made from what each process last reported about itself and its neighbours. A snapshot is
plain data for JSON, and complete: a viewer that misses one loses nothing once it gets the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overlay.model.limits import MIB
from overlay.model.topology import ROLES
from overlay.monitor.protection import protection
from overlay.monitor.timeseries import COUNTERS, FIGURES, Timeseries, in_service, waiting
from overlay.observability.events import RECURRING, latest
from overlay.observability.metric_families import JOB_STATES
from overlay.transport.codec import pb2

FORMAT = 1  # rises when a field changes its meaning or is removed
MAX_EVENTS = 200
MAX_FUNCTIONS = 50  # they are in every snapshot
MAX_LANES = 100
MAX_DOC = 1000  # characters of a docstring
MODES = ("all", "any")  # as the wire numbers them
SAME_CLOCK_S = 0.5
SHORT = 60  # points of each process's own series


@dataclass(frozen=True)
class PollResult:
    """What is known about one process; times are monotonic seconds.

    metrics: its last answer. reason: why the last poll failed; empty if it did not.
    """

    since: float  # when it was first polled, or last answered
    metrics: pb2.MetricsResponse | None = None
    reason: str = ""

    @property
    def answers(self) -> bool:
        return self.metrics is not None and not self.reason


@dataclass(frozen=True)
class ProcessHealth:
    """name: well, impaired, stopping, gone, unseen (reached by others, not from here) or asking.

    why: a sentence, empty if well. for_s: how long it has not answered.
    """

    name: str
    why: str = ""
    for_s: float = 0.0


@dataclass(frozen=True)
class Polled:
    """What a snapshot is made from.

    asked: the process at the viewer's address. Before its first answer it is empty, and there are
    no processes.
    """

    address: str
    asked: str
    processes: Sequence[pb2.Process]  # in the order of the topology
    results: Mapping[str, PollResult]
    timeseries: Mapping[str, Timeseries]
    observed: Sequence[Mapping[str, Any]]  # events observed by the poller itself
    functions: Sequence[pb2.Function] = ()  # as described by the process asked


@dataclass(frozen=True)
class RequestFilter:
    """Which requests are shown. caller, request_id: a part is enough."""

    failed: bool = False
    handler: str = ""
    caller: str = ""
    request_id: str = ""

    def matches(self, request: Mapping[str, Any]) -> bool:
        return (
            (bool(request["code"]) or not self.failed)
            and self.handler in ("", request["handler"])
            and self.caller in request["caller"]
            and self.request_id.lower() in request["request_id"]
        )


ALL = RequestFilter()

Snapshot = dict[str, Any]


def snapshot(polled: Polled, now: float, wall: float, wanted: RequestFilter = ALL) -> Snapshot:
    """The snapshot at monotonic `now`, which is `wall` in seconds since 1970.

    Rates are per second. Durations have their unit in their name; points in time are by this
    machine's clock.
    """
    healths = {p.id: health(p.id, polled.results, polled.asked, now) for p in polled.processes}
    workers = [p.id for p in polled.processes if ROLES[p.role].works]
    series = polled.timeseries[polled.asked].series
    return {
        "format": FORMAT,
        "at": round(wall, 3),
        "asked": {
            "id": polled.asked,
            "address": polled.address,
            **_as_plain(health(polled.asked, polled.results, polled.asked, now)),
        },
        "security": _security(polled),
        "workers": len(workers),
        "workers_ready": sum(healths[w].name in ("well", "impaired") for w in workers),
        "processes": [_process(p, healths[p.id], polled) for p in polled.processes],
        "links": [
            link for p in polled.processes for link in _links(p.id, healths[p.id], polled, now)
        ],
        "course": {name: series(name) for name in FIGURES},
        "requests": list(
            filter(wanted.matches, _requests(polled.results[polled.asked], now, wall))
        ),
        "maps": _maps(polled.results[polled.asked], now),
        "lanes": _lanes(polled.results[polled.asked]),
        "jobs": _jobs(polled.results[polled.asked]),
        "events": _events(polled, now, wall),
        "functions": [_function(function) for function in polled.functions[:MAX_FUNCTIONS]],
    }


def _security(polled: Polled) -> dict[str, Any]:
    """Of the processes that answer now."""
    answers = (polled.results[p.id] for p in polled.processes)
    found = protection(one.metrics for one in answers if one.metrics is not None and one.answers)
    return {"mode": found.mode, "text": found.text, "problems": list(found.problems)}


def health(
    process_id: str, results: Mapping[str, PollResult], asked: str, now: float
) -> ProcessHealth:
    """A process's health, as reported by itself and by the processes above it."""
    result = results[process_id]
    reports = _reports(process_id, results)
    if result.reason:
        silent_s = now - result.since
        if result.metrics is None:  # never answered here; others may know for how long
            down = [r.since_s for r in reports.values() if r.state == "down"]
            silent_s = max([silent_s, *down])
        by = [asker for asker, report in reports.items() if report.state == "up"]
        if by:
            why = f"{result.reason}; but {' and '.join(by)} can reach it"
            return ProcessHealth("unseen", why, silent_s)
        return ProcessHealth("gone", result.reason, silent_s)
    if result.metrics is None:
        return ProcessHealth("asking")
    if result.metrics.process_id != process_id:
        why = f"process {result.metrics.process_id} answers at its address"
        return ProcessHealth("gone", why, now - result.since)
    if not result.metrics.is_healthy:
        return ProcessHealth("stopping", "it finishes running requests and takes no new ones")
    return _impaired(result.metrics, results[asked].metrics, reports)


def _impaired(
    metrics: pb2.MetricsResponse,
    asked: pb2.MetricsResponse | None,
    reports: Mapping[str, pb2.Neighbour],
) -> ProcessHealth:
    if asked and asked.config_digest != metrics.config_digest:
        why = f"reads another configuration than {asked.process_id}"
        return ProcessHealth("impaired", why)
    for asker, report in reports.items():
        if report.health in ("slow", "ejected", "half-open"):
            why = f"{asker} finds it {report.health}: {report.health_reason}"
            return ProcessHealth("impaired", why)
    return ProcessHealth("well")


def _reports(process_id: str, results: Mapping[str, PollResult]) -> dict[str, pb2.Neighbour]:
    """What the processes that answer now report about this one, by their ids."""
    return {
        id_: neighbour
        for id_, result in results.items()
        if result.metrics is not None and not result.reason
        for neighbour in result.metrics.neighbours
        if neighbour.process_id == process_id
    }


def _process(process: pb2.Process, health: ProcessHealth, polled: Polled) -> dict[str, Any]:
    timeseries = polled.timeseries[process.id]
    return {
        "id": process.id,
        "role": process.role,
        "rank": ROLES[process.role].rank,
        "team": process.team,
        "address": process.address,
        "host": process.address.rpartition(":")[0].strip("[]"),
        "handler": process.handler,
        **_as_plain(health),
        "rates": {name: round(rate, 2) for name, rate in timeseries.rates.items()},
        "course": {name: timeseries.series(name, SHORT) for name in ("completed", "in_service")},
        **_figures(polled.results[process.id].metrics, timeseries),
    }


def _figures(metrics: pb2.MetricsResponse | None, timeseries: Timeseries) -> dict[str, Any]:
    """Its last metrics; empty if it has never answered."""
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
        "cores": None if timeseries.cores is None else round(timeseries.cores, 2),
        "memory_mib": round(metrics.memory_bytes / MIB, 1),
        "pid": metrics.pid,
        "version": metrics.version,
        "python": metrics.python,
        "platform": metrics.platform,
        "config": metrics.config_digest,
        "security": {
            "mode": metrics.security.mode,
            "expires_at": round(metrics.security.expires_s) or None,
            "problem": metrics.security.problem,
        },
        "handlers": [
            {
                "name": h.name,
                "run": h.run,
                "slots": h.slots,
                "active": h.active,
                "completed": h.completed,
                "failed": h.failed,
                "rate": round(timeseries.worked.get(h.name, 0.0), 2),
                "worked_ms": _spread(h.worked_ms),
            }
            for h in metrics.handlers
        ],
    }


def _links(
    process_id: str, health: ProcessHealth, polled: Polled, now: float
) -> list[dict[str, Any]]:
    """The links from this process to those below; `unknown` if it no longer answers."""
    result, timeseries = polled.results[process_id], polled.timeseries[process_id]
    if result.metrics is None:
        return []
    return [
        {
            "from": process_id,
            "to": n.process_id,
            "state": n.state if result.answers else "unknown",
            "for_s": round(n.since_s, 1),
            "why": (n.reason or n.health_reason) if result.answers else health.why,
            "health": n.health,
            "rate": round(timeseries.asked.get(n.process_id, 0.0), 2),
            "outstanding": n.outstanding if result.answers else 0,
            "rtt_ms": round(n.rtt_ms, 3),
            "asked": n.asked,
            "failed": n.failed,
        }
        for n in result.metrics.neighbours
    ]


def _requests(result: PollResult, now: float, wall: float) -> list[dict[str, Any]]:
    """The last requests that ended at the process asked, oldest first."""
    if result.metrics is None:
        return []
    ahead_s = _ahead_s(result, now, wall)
    return [
        {
            "request_id": f"{request.request_id:016x}",
            "mode": MODES[request.mode],
            "team": request.team,
            "handler": request.handler,
            "caller": request.caller,
            "ended_at": round(request.ended_s - ahead_s, 3),
            "code": request.code,
            "reason": request.reason,
            "count": request.count,
            "total_ms": request.total_us / 1e3,
            "hops": [
                {
                    "id": hop.process_id,
                    "depth": hop.depth,
                    "waited_ms": hop.waited_us / 1e3,
                    "worked_ms": hop.worked_us / 1e3,
                    "away_ms": hop.away_us / 1e3,
                    "code": hop.code,
                }
                for hop in request.hops
            ],
        }
        for request in result.metrics.requests
    ]


def _maps(result: PollResult, now: float) -> list[dict[str, Any]]:
    """The maps running at the process asked, by their clients' own counts."""
    if result.metrics is None:
        return []
    found = []
    for one in result.metrics.maps:
        progress = one.progress
        ended, took_s = progress.answered + progress.failed, progress.took_s
        rate = ended / took_s if took_s else 0.0
        left_s = (progress.total - ended) / rate if rate and progress.total else None
        found.append(
            {
                "handler": progress.handler,
                "caller": one.caller,
                "number": progress.number,
                "answered": progress.answered,
                "failed": progress.failed,
                "total": progress.total or None,
                "took_s": round(took_s, 1),
                "rate": round(rate, 2),
                "left_s": None if left_s is None else round(left_s, 1),
                "silent_s": round(one.told_s + now - result.since, 1),
            }
        )
    return found


def _lanes(result: PollResult) -> list[dict[str, Any]]:
    """The workers that the process asked has lent to clients, by caller, worker and handler."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in result.metrics.lanes if result.metrics is not None else ():
        key = one.caller, one.process_id, one.handler
        names = dict(zip(("caller", "worker", "handler"), key, strict=True))
        start = {"rows": 0, "unanswered": 0, "answered": 0, "since_s": 0.0}
        sums = found.setdefault(key, {**names, **start})
        for name in ("rows", "unanswered", "answered"):
            sums[name] += getattr(one, name)
        sums["since_s"] = max(sums["since_s"], round(one.since_s, 1))
    return list(found.values())[-MAX_LANES:]


def _jobs(result: PollResult) -> dict[str, Any] | None:
    """How many jobs the process asked has, by state; None if it keeps none."""
    counts = result.metrics.jobs if result.metrics is not None else None
    if counts is None or not counts.max_jobs:
        return None
    return {
        "states": {name: getattr(counts, name) for name in JOB_STATES},
        "schedules": counts.schedules,
        "bytes": counts.bytes,
        "max_jobs": counts.max_jobs,
        "max_bytes": counts.max_bytes,
        "accepted": counts.accepted,
        "refused": counts.refused,
        "problem": counts.problem,
    }


def _events(polled: Polled, now: float, wall: float) -> list[Mapping[str, Any]]:
    """The latest events of the processes and the poller, by time."""
    reported = [
        {
            "at": round(event.at_s - _ahead_s(result, now, wall), 3),
            "process": id_,
            "kind": event.kind,
            "text": event.text,
            "level": event.level.lower(),
            "number": event.number,
            "count": event.count,
            "first_at": round((event.first_at_s or event.at_s) - _ahead_s(result, now, wall), 3),
            "is_change": event.kind not in RECURRING,
        }
        for id_, result in polled.results.items()
        if result.metrics is not None
        for event in result.metrics.events
    ]
    by_time = sorted([*reported, *polled.observed], key=lambda event: event["at"])
    return latest(by_time, MAX_EVENTS, lambda event: event["is_change"])


def _function(function: pb2.Function) -> dict[str, Any]:
    return {
        "name": function.name,
        "signature": function.signature,
        "doc": function.doc[:MAX_DOC],
        "workers": list(function.workers),
    }


def _ahead_s(result: PollResult, now: float, wall: float) -> float:
    """How far its clock is ahead of ours; a small difference is transit time."""
    assert result.metrics is not None
    ahead_s = float(result.metrics.wall_time_s) - (wall - (now - result.since))
    return ahead_s if abs(ahead_s) > SAME_CLOCK_S else 0.0


def _spread(spread: pb2.Spread) -> dict[str, float]:
    return {"p50": round(spread.p50, 3), "p99": round(spread.p99, 3), "mean": round(spread.mean, 3)}


def _as_plain(health: ProcessHealth) -> dict[str, Any]:
    return {"health": health.name, "why": health.why, "for_s": round(health.for_s, 1)}
