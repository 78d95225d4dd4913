"""`client.py doctor CONFIG`: every process and link of an overlay as this machine sees them.

Knocks at every address at the same time, asks who answers, and prints a line for each process and
for each link, with the likely cause and the remedy of what is not well; overlay.cli.diagnosis finds
both. Owns a thread per process while it looks.
"""

from __future__ import annotations

import argparse
import errno
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import overlay
from overlay.cli.diagnosis import Diagnosis, Finding, Grade, Link, Reach, Said, Seen
from overlay.cli.terminal import Exit, Screen, asked_at_once, misconfigured
from overlay.cli.text import counted
from overlay.cli.usage import Parser, shared_options
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.topology import Process, Topology
from overlay.transport import codec
from overlay.transport.machine import asking_address, is_here, own_addresses
from overlay.transport.resolver import Named, connect, look_up

DEADLINE_S = 3.0
LOOKS = 3  # the quickest of them tells the round trip

Links = list[tuple[Process, Process, Finding]]


def arguments(parser: Parser) -> None:
    shared_options(parser, deadline_s=DEADLINE_S, deadline="how long to wait for each process")


def run(args: argparse.Namespace) -> int:
    try:
        topology = load(args.config)
    except ConfigError as e:
        return misconfigured(e)
    seen = look_at(topology, args.deadline)
    here = overlay.__version__, codec.FORMAT, platform.system()
    diagnosis = Diagnosis(topology, seen, *here, args.config)
    processes = [(p, diagnosis.of_process(p)) for p in topology.processes.values()]
    links = [
        (asker, asked, diagnosis.of_link(asker, asked))
        for asker in topology.processes.values()
        for asked in topology.below(asker.id)
    ]
    code = _exit_of(seen, [f for _, f in processes] + [f for *_, f in links])
    report = Screen(sys.stdout)
    if args.json:
        report.json(_as_json(code, seen, processes, links))
    else:
        _show(report, seen, processes, links)
    return code


def look_at(topology: Topology, deadline_s: float) -> dict[str, Seen]:
    """What there is of each process; nobody is waited for beyond the deadline."""
    # Knocking and asking may take the deadline each.
    found = asked_at_once(topology, lambda one: _look(one, deadline_s), 2 * deadline_s + 0.5)
    return {id_: found.get(id_) or Seen(Reach.SILENT) for id_ in topology.processes}


def _look(process: Process, deadline_s: float) -> Seen:
    here = is_here(process, deadline_s)
    # A process of this machine may be known to others by an address outside a NAT.
    address = asking_address(process) if here else process.address
    named = look_up(address.rpartition(":")[0], deadline_s)
    reach = _knock(named, process.port, deadline_s)
    said = _asked(address, deadline_s) if reach is Reach.OPEN else None
    own = look_up(process.bind or process.host, deadline_s)
    is_loopback = here and own.is_loopback and not own.is_lone_number
    return Seen(reach, said, here, named.shown(), named.shown(address), is_loopback)


def _knock(named: Named, port: int, deadline_s: float) -> Reach:
    """Opens a plain connection and closes it again: gRPC does not say why it has none."""
    if not named.addresses:
        return Reach.NO_NAME
    try:
        connect(named.addresses, port, deadline_s).close()
        return Reach.OPEN
    except ConnectionRefusedError:
        return Reach.REFUSED
    except OSError as e:
        no_way = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
        return Reach.NO_WAY if e.errno in no_way else Reach.SILENT


def _asked(address: str, deadline_s: float) -> Said | None:
    best: Said | None = None
    until = time.monotonic() + deadline_s
    try:
        asking = library.connect(address)
        for _ in range(LOOKS):
            began, left_s = time.time(), until - time.monotonic()
            if left_s <= 0:
                break
            started = time.monotonic()
            found = asking.metrics(timeout=left_s)
            rtt_s = time.monotonic() - started
            if best is None or rtt_s * 1000 < best.rtt_ms:
                best = _read(found, rtt_s, began + rtt_s / 2)
    except (library.CallFailed, ValueError):
        pass
    return best


def _read(found: Any, rtt_s: float, our_time_s: float) -> Said:
    clock_s = found.wall_time_s - our_time_s if found.wall_time_s else 0.0
    links = tuple(
        Link(n.process_id, n.state, n.since_s, n.reason, n.rtt_ms) for n in found.neighbours
    )
    return Said(
        found.process_id,
        found.version,
        found.platform,
        found.config_digest,
        found.is_healthy,
        rtt_s * 1000,
        clock_s,
        links,
        codec.read_format(found),
        found.streams,
    )


def _exit_of(seen: Mapping[str, Seen], findings: Iterable[Finding]) -> Exit:
    if all(one.said is None for one in seen.values()):
        return Exit.UNREACHABLE
    return Exit.FAILED if any(f.grade is Grade.BAD for f in findings) else Exit.OK


# The report

PROCESS_COLUMNS = (
    "id", "role", "address", "here", "state", "round trip", "clock", "version", "system",
)  # fmt: skip
LINK_COLUMNS = ("from", "to", "state", "round trip")


def _show(
    report: Screen,
    seen: dict[str, Seen],
    processes: list[tuple[Process, Finding]],
    links: Links,
) -> None:
    report.table(
        "processes", PROCESS_COLUMNS, [_process_row(p, f, seen[p.id]) for p, f in processes]
    )
    report.table("links", LINK_COLUMNS, [_link_row(a, b, f, seen[a.id]) for a, b, f in links])
    well = sum(f.grade is not Grade.BAD for _, f in processes)
    up = sum(f.grade is Grade.OK for *_, f in links)
    report.say(
        f"{well} of {counted(len(processes), 'process')} well, "
        f"{up} of {counted(len(links), 'link')} up"
    )
    if not any(one.is_here for one in seen.values()):
        report.say(f"none of them is on this machine, which has {', '.join(own_addresses())}")
    named = [(p.id, f) for p, f in processes] + [(f"{a.id} to {b.id}", f) for a, b, f in links]
    for line in told(named):
        report.say(line)


def told(named: Sequence[tuple[str, Finding]]) -> list[str]:
    """Why, and what to do; once for all that the same is the matter with."""
    groups: dict[str, list[str]] = {}
    for name, finding in named:
        if finding.why:
            do = f". {finding.do[:1].upper()}{finding.do[1:]}" if finding.do else ""
            groups.setdefault(f"{finding.why}{do}", []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in groups.items()]


def _process_row(process: Process, finding: Finding, seen: Seen) -> tuple[str, ...]:
    address = seen.address or process.address
    place = process.id, process.role, address, "yes" if seen.is_here else "no"
    said = seen.said
    if said is None:
        return (*place, finding.state, "-", "-", "-", "-")
    clock = f"{said.clock_s:+.2f} s"
    return *place, finding.state, f"{said.rtt_ms:.1f} ms", clock, said.version, said.platform


def _link_row(asker: Process, asked: Process, finding: Finding, seen: Seen) -> tuple[str, ...]:
    rtt_ms = _rtt_ms(seen, asked)
    return asker.id, asked.id, finding.state, f"{rtt_ms:.1f} ms" if rtt_ms else "-"


def _rtt_ms(seen: Seen, asked: Process) -> float:
    links = seen.said.links if seen.said else ()
    return next((k.rtt_ms for k in links if k.to == asked.id and k.state == "up"), 0.0)


def _as_json(
    code: Exit,
    seen: dict[str, Seen],
    processes: list[tuple[Process, Finding]],
    links: Links,
) -> dict[str, Any]:
    return {
        "ok": code is Exit.OK,
        "exit_code": int(code),
        "processes": [
            {
                "id": p.id,
                "role": p.role,
                "address": p.address,
                "here": seen[p.id].is_here,
                "connection": seen[p.id].reach.value,
                **_finding_as_json(finding),
                **_said_as_json(seen[p.id].said),
            }
            for p, finding in processes
        ],
        "links": [
            {
                "from": asker.id,
                "to": asked.id,
                "round_trip_ms": round(_rtt_ms(seen[asker.id], asked), 3),
                **_finding_as_json(finding),
            }
            for asker, asked, finding in links
        ],
    }


def _finding_as_json(finding: Finding) -> dict[str, str]:
    found = {"grade": finding.grade.value, "state": finding.state}
    return {**found, "why": finding.why, "do": finding.do}


def _said_as_json(said: Said | None) -> dict[str, Any]:
    if said is None:
        return {}
    return {
        "round_trip_ms": round(said.rtt_ms, 3),
        "clock_offset_s": round(said.clock_s, 3),
        "version": said.version,
        "platform": said.platform,
    }
