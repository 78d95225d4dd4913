"""`client.py HOST PORT check`: the state of one process; `client.py check CONFIG`: of all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from overlay.cli import text
from overlay.cli.doctor import (
    DEADLINE_S,
    Examination,
    examine,
    journal_as_json,
    links_as_json,
    say_summary,
)
from overlay.cli.terminal import Exit, Screen, connected, failed, misconfigured
from overlay.cli.text import counted, span
from overlay.cli.usage import Parser, shared_options
from overlay.client import sync as library
from overlay.model.addresses import join_address
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.topology import Process, Topology
from overlay.monitor.diagnosis import Finding, Observation
from overlay.monitor.protection import protection
from overlay.observability import metric_families
from overlay.observability.metric_families import JOB_STATES
from overlay.transport.codec import pb2


def arguments(parser: Parser) -> None:
    shared_options(parser, deadline_s=DEADLINE_S)


def run(args: argparse.Namespace) -> int:
    return of_configuration(args) if "config" in args else of_process(args)


# One process


def of_process(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        asked = connected(args)
        metrics = asked.metrics(timeout=args.deadline)
    except library.CallFailed as e:
        return failed(e, address, args.json, of_a_request=False)
    is_well = (
        metrics.is_healthy
        and all(n.state == "up" and n.health != "ejected" for n in metrics.neighbours)
        and not unreached_workers(metrics)
    )
    code = Exit.OK if is_well else Exit.FAILED
    report = Screen(sys.stdout)
    if args.json:
        head = {"ok": is_well, "exit_code": int(code), "address": address}
        report.json({**head, **as_plain(metrics)})
    else:
        show_metrics(report, metrics, asked.shown)
    return code


def show_metrics(report: Screen, m: pb2.MetricsResponse, address: str) -> None:
    workers, unreached = expected_workers(m), unreached_workers(m)
    protected = protection([m])
    report.facts(
        ("process", f"{m.process_id}, {m.role} of team {m.team}, at {address}"),
        ("state", f"{'serves' if m.is_healthy else 'stops'}, up for {span(m.uptime_s, 1)}"),
        ("security", protected.text),
        ("warning", m.security.problem),
        ("queue", f"{m.queue_size} of {m.queue_slots} waiting"),
        ("streams", _streams(m) if m.streams else ""),
        ("lanes", _lanes(m) if m.lane_requests or m.lanes else ""),
        ("jobs", _jobs(m.jobs) if m.jobs.max_jobs else ""),
        ("warning", text.no_jobs(m.jobs.problem)),
        ("service", f"{m.active_requests} of {m.max_capacity} in service"),
        ("slots", f"{counted(m.slots, 'handler')} can run at once here or below"),
        ("workers", f"{len(workers) - len(unreached)} of {len(workers)} known to be ready"),
        ("missing", ", ".join(unreached)),
        (
            "requests",
            f"{m.received} received: {m.completed} completed, {m.failed} failed, "
            f"{m.refused} refused, {m.cancelled} cancelled",
        ),
        *metric_families.facts(m),
        ("waiting", _spread(m.waiting_ms)),
        ("serving", _spread(m.service_ms)),
        ("program", f"overlay {m.version}, Python {m.python}, {m.platform}, pid {m.pid}"),
        ("config", m.config_digest),
        ("keys", _keys(m) if m.keys else ""),
    )
    report.table(
        "neighbours asked by this process", NEIGHBOUR_COLUMNS, map(_neighbour, m.neighbours)
    )
    report.table("handlers", HANDLER_COLUMNS, map(_handler, m.handlers))
    report.table("processes of the configuration", PROCESS_COLUMNS, map(_process, m.topology))


NEIGHBOUR_COLUMNS = (
    "id", "address", "state", "since", "health", "outstanding", "slots", "asked", "failed",
    "version", "same config", "reason",
)  # fmt: skip
HANDLER_COLUMNS = (
    "name", "run", "active", "slots", "completed", "failed", "p50 ms", "p99 ms",
)  # fmt: skip
PROCESS_COLUMNS = ("id", "role", "team", "address", "handler", "slots", "neighbors")


def _streams(m: pb2.MetricsResponse) -> str:
    of = f" of {m.streamed_slots:,}" if m.streamed_slots else ""  # an older process does not say
    return f"{m.streams} open: {m.streamed_waiting:,}{of} waiting, {m.streamed_active:,} in service"


def _lanes(m: pb2.MetricsResponse) -> str:
    lent = counted(len(m.lanes), "worker") + " lent to clients now"
    return f"{lent}, {m.lane_requests:,} requests so far" if m.lane_requests else lent


def _jobs(counts: pb2.JobCounts) -> str:
    found = text.jobs({name: getattr(counts, name) for name in JOB_STATES}, counts.schedules)
    return f"{found}; {counts.refused:,} refused" if counts.refused else found


def _keys(m: pb2.MetricsResponse) -> str:
    return (
        f"{m.keys:,} remembered, {m.key_bytes:,} bytes of answers, {m.key_waiters} waiting for one"
    )


def _neighbour(n: pb2.Neighbour) -> tuple[str, ...]:
    return (
        n.process_id, n.address, n.state, span(n.since_s, 1), n.health, str(n.outstanding),
        str(n.slots), str(n.asked), str(n.failed), n.version, "yes" if n.same_config else "no",
        n.reason or n.health_reason,
    )  # fmt: skip


def _handler(h: pb2.HandlerMetrics) -> tuple[str, ...]:
    return (
        h.name, h.run, str(h.active), str(h.slots), str(h.completed), str(h.failed),
        f"{h.worked_ms.p50:.1f}", f"{h.worked_ms.p99:.1f}",
    )  # fmt: skip


def _process(p: pb2.Process) -> tuple[str, ...]:
    slots = str(max(p.slots.values())) if p.slots else ""
    return p.id, p.role, p.team, p.address, p.handler, slots, " ".join(p.neighbors)


def expected_workers(m: pb2.MetricsResponse) -> tuple[str, ...]:
    """The workers that a request to all of this process goes to, in configuration order."""
    topology = Topology.of({p.id: p for p in m.topology})
    if m.process_id not in topology.processes:  # it says nothing of the overlay
        return ()
    return tuple(worker.id for worker in topology.workers_of(m.process_id))


def unreached_workers(m: pb2.MetricsResponse) -> tuple[str, ...]:
    """The expected workers whose slots this process does not know."""
    silent = {p.id for p in m.topology if not p.slots}
    return tuple(worker for worker in expected_workers(m) if worker in silent)


def as_plain(value: Any) -> Any:
    """A message as plain data for JSON: numbers as numbers, every field present."""
    if hasattr(value, "DESCRIPTOR"):
        return {
            field.name: as_plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields
        }
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {key: as_plain(value[key]) for key in sorted(value)}
    return [as_plain(item) for item in value]


# The whole overlay


def of_configuration(args: argparse.Namespace) -> int:
    """The doctor's findings in short, with the load of each process."""
    try:
        topology = load(args.config)
    except ConfigError as e:
        return misconfigured(e)
    found = examine(topology, args.config, args.deadline)
    report = Screen(sys.stdout)
    if args.json:
        report.json(_overall_as_json(topology, found))
        return found.exit_code
    rows = [_overall_row(p, f, found.observed[p.id], topology) for p, f in found.processes]
    report.table("", OVERALL_COLUMNS, rows)
    say_summary(report, found)
    return found.exit_code


OVERALL_COLUMNS = (
    "id", "role", "team", "address", "state", "queue", "service", "completed", "failed", "refused",
    "p50 ms", "p99 ms", "version", "same config",
)  # fmt: skip


def _overall_row(
    process: Process, finding: Finding, observed: Observation, topology: Topology
) -> tuple[str, ...]:
    address = observed.address or process.address
    place = (process.id, process.role, process.team, address, finding.state)
    m = observed.metrics
    if m is None:
        return (*place, *("-" for _ in OVERALL_COLUMNS[5:]))
    return (
        *place, f"{m.queue_size}/{m.queue_slots}", f"{m.active_requests}/{m.max_capacity}",
        str(m.completed), str(m.failed), str(m.refused),
        f"{m.service_ms.p50:.1f}", f"{m.service_ms.p99:.1f}", m.version,
        "yes" if m.config_digest == topology.digest else "no",
    )  # fmt: skip


def _overall_as_json(topology: Topology, found: Examination) -> dict[str, Any]:
    return {
        "ok": found.exit_code is Exit.OK,
        "exit_code": int(found.exit_code),
        "config_digest": topology.digest,
        "security": asdict(found.protection),
        "processes": [
            {
                "id": process.id,
                "role": process.role,
                "team": process.team,
                "address": process.address,
                "state": finding.state,
                "reason": finding.why,
                "do": finding.do,
                "same_config": bool(m and m.config_digest == topology.digest),
                "metrics": None if m is None else as_plain(m),
            }
            for process, finding in found.processes
            for m in [found.observed[process.id].metrics]
        ],
        "journal": journal_as_json(found),
        "links": links_as_json(found),
    }


def _spread(spread: pb2.Spread) -> str:
    if not spread.count:
        return ""
    return (
        f"p50 {spread.p50:.1f} ms, p99 {spread.p99:.1f} ms, mean {spread.mean:.1f} ms "
        f"over the last {spread.count}"
    )
