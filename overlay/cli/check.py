"""`client.py HOST PORT check` and `client.py check CONFIG`: what one process says, and what all do.

Owns a thread per process while it asks all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overlay.cli.terminal import (
    Exit,
    Parser,
    Screen,
    asked_at_once,
    connected,
    counted,
    deadline_argument,
    failed,
    misconfigured,
)
from overlay.client import sync as library
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.topology import Process, Topology, join_address

DEADLINE_S = 3.0


def arguments(parser: Parser) -> None:
    deadline_argument(parser, DEADLINE_S, "how long to wait for an answer")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    address = join_address(args.host, args.port)
    try:
        asked = connected(args)
        found = asked.metrics(timeout=args.deadline)
    except library.CallFailed as e:
        return failed(e, address, args.json)
    is_well = (
        found.is_healthy
        and all(n.state == "up" and n.health != "ejected" for n in found.neighbours)
        and not unreached_workers(found)
    )
    code = Exit.OK if is_well else Exit.FAILED
    report = Screen(sys.stdout)
    if args.json:
        report.json({"ok": is_well, "exit_code": int(code), "address": address, **as_plain(found)})
    else:
        show_metrics(report, found, asked.shown)
    return code


def show_metrics(report: Screen, m: Any, address: str) -> None:
    refusals = ", ".join(f"{n} {reason}" for reason, n in sorted(m.refused_by_reason.items()))
    workers, unreached = expected_workers(m), unreached_workers(m)
    report.facts(
        ("process", f"{m.process_id}, {m.role} of team {m.team}, at {address}"),
        ("state", f"{'serves' if m.is_healthy else 'stops'}, up for {_span(m.uptime_s)}"),
        ("queue", f"{m.queue_size} of {m.queue_slots} waiting"),
        ("streams", _streams(m) if m.streams else ""),
        ("service", f"{m.active_requests} of {m.max_capacity} in service"),
        ("slots", f"{counted(m.slots, 'handler')} can run at once here or below"),
        ("workers", f"{len(workers) - len(unreached)} of {len(workers)} known to be ready"),
        ("missing", ", ".join(unreached)),
        (
            "requests",
            f"{m.received} received: {m.completed} completed, {m.failed} failed, "
            f"{m.refused} refused, {m.cancelled} cancelled",
        ),
        ("refused", refusals),
        ("waiting", _spread(m.waiting_ms)),
        ("serving", _spread(m.service_ms)),
        ("program", f"overlay {m.version}, Python {m.python}, {m.platform}, pid {m.pid}"),
        ("config", m.config_digest),
        ("keys", _keys(m) if m.keys else ""),
        ("ended", ", ".join(f"{n} {what}" for what, n in sorted(m.crowded_out.items()))),
        ("log", f"{m.log_lines_dropped} lines dropped" if m.log_lines_dropped else ""),
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


def _streams(m: Any) -> str:
    of = f" of {m.streamed_slots:,}" if m.streamed_slots else ""  # an older process does not say
    return f"{m.streams} open: {m.streamed_waiting:,}{of} waiting, {m.streamed_active:,} in service"


def _keys(m: Any) -> str:
    return f"{m.keys:,} remembered, {m.key_bytes:,} bytes of answers, {m.key_waiters} wait for one"


def _neighbour(n: Any) -> tuple[str, ...]:
    return (
        n.process_id, n.address, n.state, _span(n.since_s), n.health, str(n.outstanding),
        str(n.slots), str(n.asked), str(n.failed), n.version, "yes" if n.same_config else "no",
        n.reason or n.health_reason,
    )  # fmt: skip


def _handler(h: Any) -> tuple[str, ...]:
    return (
        h.name, h.run, str(h.active), str(h.slots), str(h.completed), str(h.failed),
        f"{h.worked_ms.p50:.1f}", f"{h.worked_ms.p99:.1f}",
    )  # fmt: skip


def _process(p: Any) -> tuple[str, ...]:
    slots = str(max(p.slots.values())) if p.slots else ""
    return p.id, p.role, p.team, p.address, p.handler, slots, " ".join(p.neighbors)


def expected_workers(m: Any) -> tuple[str, ...]:
    """The workers that a request to all means there, in the order of the configuration."""
    topology = Topology.of({p.id: p for p in m.topology})
    return tuple(worker.id for worker in topology.workers_of(m.process_id))


def unreached_workers(m: Any) -> tuple[str, ...]:
    """The expected workers of which this process has not heard."""
    silent = {p.id for p in m.topology if not p.slots}
    return tuple(worker for worker in expected_workers(m) if worker in silent)


def as_plain(value: Any) -> Any:
    """A message as JSON has it, numbers as numbers, every field present."""
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


@dataclass(frozen=True)
class Look:
    """What one process of the configuration says; metrics is None when it says nothing."""

    process: Process
    state: str = "no answer"
    reason: str = "it gave no answer in time"
    metrics: Any = None
    same_config: bool = False

    @property
    def is_well(self) -> bool:
        return self.state == "serves" and self.same_config


def all_arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the configuration file")
    arguments(parser)


def all_run(args: argparse.Namespace) -> int:
    try:
        topology = load(args.config)
    except ConfigError as e:
        return misconfigured(e)
    looks = look_at(topology, args.deadline)
    code = Exit.OK if all(look.is_well for look in looks) else Exit.FAILED
    if all(look.metrics is None for look in looks):
        code = Exit.UNREACHABLE
    report = Screen(sys.stdout)
    if args.json:
        report.json(_overall_as_json(topology, looks, code))
    else:
        show_overall(report, topology, looks, args.config)
    return code


def look_at(topology: Topology, deadline_s: float) -> list[Look]:
    """Asks every process at the same time; nobody is waited for beyond the deadline."""

    def look(process: Process) -> Look:
        return _look(process, topology, deadline_s)

    found = asked_at_once(topology, look, deadline_s + 0.5)
    return [found.get(process.id, Look(process)) for process in topology.processes.values()]


def _look(process: Process, topology: Topology, deadline_s: float) -> Look:
    try:
        found = library.connect(process.address).metrics(timeout=deadline_s)
    except (library.CallFailed, ValueError) as e:
        return Look(process, reason=str(e))
    same_config = found.config_digest == topology.digest
    state, reason = _judged(found, process, same_config)
    return Look(process, state, reason, found, same_config)


def _judged(found: Any, process: Process, same_config: bool) -> tuple[str, str]:
    if found.process_id != process.id:
        return "other", f"process {found.process_id} answers at {process.address}"
    if not found.is_healthy:
        return "stops", "it is being stopped and takes no new requests"
    return "serves", "" if same_config else "it was started with another configuration file"


OVERALL_COLUMNS = (
    "id", "role", "team", "address", "state", "queue", "service", "completed", "failed", "refused",
    "p50 ms", "p99 ms", "version", "same config",
)  # fmt: skip


def show_overall(report: Screen, topology: Topology, looks: Sequence[Look], config: str) -> None:
    report.table("", OVERALL_COLUMNS, map(_overall_row, looks))
    well = sum(look.is_well for look in looks)
    report.say(f"{well} of {counted(len(looks), 'process')} well")
    for look in looks:
        if not look.is_well:
            report.say(f"{look.process.id}: {look.reason}{_advice(look, topology, config)}")


def _advice(look: Look, topology: Topology, config: str) -> str:
    if look.metrics is not None:
        return ""
    me = look.process
    log = topology.folder / me.log_dir / f"process_{me.id.lower()}.log"
    return f"; start it on {me.host}: python node.py {config} {me.id}; its log there: {log}"


def _overall_row(look: Look) -> tuple[str, ...]:
    me, m = look.process, look.metrics
    place = (me.id, me.role, me.team, me.address, look.state)
    if m is None:
        return (*place, *("-" for _ in OVERALL_COLUMNS[5:]))
    return (
        *place, f"{m.queue_size}/{m.queue_slots}", f"{m.active_requests}/{m.max_capacity}",
        str(m.completed), str(m.failed), str(m.refused),
        f"{m.service_ms.p50:.1f}", f"{m.service_ms.p99:.1f}", m.version,
        "yes" if look.same_config else "no",
    )  # fmt: skip


def _overall_as_json(topology: Topology, looks: Sequence[Look], code: int) -> dict[str, Any]:
    return {
        "ok": code == Exit.OK,
        "exit_code": int(code),
        "config_digest": topology.digest,
        "processes": [
            {
                "id": look.process.id,
                "role": look.process.role,
                "team": look.process.team,
                "address": look.process.address,
                "state": look.state,
                "reason": look.reason,
                "same_config": look.same_config,
                "metrics": None if look.metrics is None else as_plain(look.metrics),
            }
            for look in looks
        ],
    }


def _span(span_s: float) -> str:
    if span_s < 60:
        return f"{span_s:.1f} s"
    minutes = int(span_s // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _spread(spread: Any) -> str:
    if not spread.count:
        return ""
    return (
        f"p50 {spread.p50:.1f} ms, p99 {spread.p99:.1f} ms, mean {spread.mean:.1f} ms "
        f"over the last {spread.count}"
    )
