"""`client.py doctor CONFIG`: every process and link of an overlay as this machine sees them.

Opens a connection to every address at the same time, asks what answers, and prints a line for each
process and each link, with the likely cause and the remedy of what is wrong (from
monitor.diagnosis). `examine` is the same without the report. Owns a thread per process while it
asks.
"""

from __future__ import annotations

import argparse
import errno
import http.client
import json
import platform
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import overlay
from overlay.cli.terminal import Exit, Screen, join_all, misconfigured
from overlay.cli.text import counted
from overlay.cli.usage import Parser, is_installed, shared_options
from overlay.client import sync as library
from overlay.model import clocks as time
from overlay.model.config import load
from overlay.model.errors import ConfigError
from overlay.model.identity import SERVER
from overlay.model.jobs_servers import JobsServer
from overlay.model.program import CLIENT
from overlay.model.topology import Process, Topology
from overlay.monitor import journal_check, servers_check
from overlay.monitor.diagnosis import Diagnosis, Finding, Grade, Observation, Reach
from overlay.monitor.journal_check import Place
from overlay.monitor.protection import Protection, protection
from overlay.security.lookup import Tls, credentials_of
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.machine import asking_address, is_here, is_ours, own_addresses
from overlay.transport.resolver import Host, connect, look_up
from overlay.transport.tls_check import peer_certificate, tls_problem

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

DEADLINE_S = 3.0
VARZ_BYTES = 1 << 20  # of what a NATS server says of itself
ROUNDS = 3  # the quickest of them is the round trip


def arguments(parser: Parser) -> None:
    shared_options(parser, deadline_s=DEADLINE_S, deadline="how long to wait for each process")


def run(args: argparse.Namespace) -> int:
    try:
        found = examine(load(args.config), args.config, args.deadline)
    except ConfigError as e:
        return misconfigured(e)
    report = Screen(sys.stdout)
    if args.json:
        report.json(_as_json(found))
    else:
        show(report, found)
    return found.exit_code


@dataclass(frozen=True)
class Examination:
    """Which processes and links of an overlay are well, and what is wrong with the others.

    protection: whether those that answer are open, and what is wrong with certificates, this
    user's among them. journal: what is wrong with the leader's, and its jobs.
    """

    observed: Mapping[str, Observation]
    processes: Sequence[tuple[Process, Finding]]
    links: Sequence[tuple[Process, Process, Finding]]
    protection: Protection
    journal: Sequence[tuple[Process, Finding]] = ()

    @property
    def exit_code(self) -> Exit:
        if all(one.metrics is None for one in self.observed.values()):
            return Exit.UNREACHABLE
        findings = [f for _, f in (*self.processes, *self.journal)] + [f for *_, f in self.links]
        return Exit.FAILED if any(f.grade is Grade.BAD for f in findings) else Exit.OK

    def summary(self) -> list[str]:
        """How many are well, who may ask them, then what is wrong and what to do."""
        well = sum(f.grade is not Grade.BAD for _, f in self.processes)
        up = sum(f.grade is Grade.OK for *_, f in self.links)
        lines = [
            f"{well} of {counted(len(self.processes), 'process')} well, "
            f"{up} of {counted(len(self.links), 'link')} up"
        ]
        if not any(one.is_here for one in self.observed.values()):
            lines.append(f"none of them is on this machine, which has {', '.join(own_addresses())}")
        lines += self.protection.lines
        named = [(p.id, f) for p, f in (*self.processes, *self.journal)]
        return lines + advice(named + [(f"{a.id} to {b.id}", f) for a, b, f in self.links])


def examine(topology: Topology, config: str, deadline_s: float = DEADLINE_S) -> Examination:
    """Asks all processes at the same time, each for at most `deadline_s`.

    config: the name of the file, as advice is to repeat it.
    """
    credentials = credentials_of(topology)
    observed = _observe_all(topology, credentials, deadline_s)
    here = overlay.__version__, codec.FORMAT, platform.system()
    diagnosis = Diagnosis(topology, observed, *here, config, is_installed())
    processes = topology.processes.values()
    return Examination(
        observed,
        [(p, diagnosis.of_process(p)) for p in processes],
        [(p, n, diagnosis.of_link(p, n)) for p in processes for n in topology.below(p.id)],
        _protection(observed, credentials, config),
        [
            *(one for leader in topology.leaders for one in _journal(topology, leader, observed)),
            *_servers(topology, credentials, deadline_s),
        ],
    )


def _journal(
    topology: Topology, leader: Process, all_observed: Mapping[str, Observation]
) -> list[tuple[Process, Finding]]:
    """What is wrong with a leader's journal, and its jobs."""
    if not topology.journal:
        return []
    observed, place = all_observed[leader.id], None
    if observed.is_here:
        with suppress(OSError, RuntimeError):  # a folder that may not be read; a loop of links
            place = place_of(topology.journal_of(leader.id))
    metrics = observed.metrics
    if metrics is not None and metrics.process_id != leader.id:
        metrics = None
    return [(leader, one) for one in journal_check.findings(leader, place, metrics)]


def _servers(
    topology: Topology, credentials: Credentials | None, deadline_s: float
) -> list[tuple[Process, Finding]]:
    """What is wrong with the jobs' servers on this machine: others do not show it from outside."""
    found = []
    for server in topology.jobs_servers:
        if is_ours(server.host, deadline_s):
            shown = Process(f"server {server.address}", "worker", "", server.host, server.port)
            said = _varz(server.monitor_port, deadline_s)
            certificate = _certificate_of(server, credentials, deadline_s) if credentials else None
            found += [(shown, one) for one in servers_check.findings(server, said, certificate)]
    return found


def _certificate_of(
    server: JobsServer, credentials: Credentials, deadline_s: float
) -> servers_check.Certificate:
    from overlay.security.certificates import fingerprint  # loads slowly

    addresses = look_up(server.host, deadline_s).addresses
    problem = ""
    if not credentials.certificate_problem:  # which is a finding of its own
        problem = tls_problem(addresses, server.port, credentials, "", deadline_s, SERVER)
    try:
        own = credentials.of_server(credentials.folder.path, server.name)
    except ConfigError as e:
        return servers_check.Certificate(problem, str(e))
    warning, is_old = "" if problem else own.warning, False
    with suppress(OSError):
        is_shown = peer_certificate(addresses, server.port, deadline_s)
        is_old = fingerprint(is_shown) != fingerprint(own.current()[0].certificate)
    return servers_check.Certificate(problem, warning, is_old)


def _varz(port: int, deadline_s: float) -> dict[str, Any] | None:
    """What a NATS server of this machine says of itself; None if it does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/varz", timeout=deadline_s) as answer:
            said = json.loads(answer.read(VARZ_BYTES))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return None
    return said if isinstance(said, dict) else None


def place_of(journal: Path) -> Place:
    """Where this machine has the file. Raises OSError, RuntimeError."""
    folder = journal.resolve().parent
    mounts = [
        (Path(one.mountpoint), one.fstype, one.opts) for one in psutil.disk_partitions(all=True)
    ]
    marks = ((one / ".stfolder").exists() for one in (folder, *folder.parents))
    return Place(folder, *journal_check.volume_of(folder, mounts), any(marks))


def _protection(
    observed: Mapping[str, Observation], credentials: Credentials | None, config: str
) -> Protection:
    answers = [one.metrics for one in observed.values() if one.metrics is not None]
    return protection(answers, closing(config), credentials.warning if credentials else "")


def closing(config: str) -> str:
    """The command that closes an overlay, whichever program says it."""
    return f"{CLIENT} secure {config}"


def _observe_all(
    topology: Topology, credentials: Credentials | None, deadline_s: float
) -> dict[str, Observation]:
    observed = {id_: Observation(Reach.SILENT) for id_ in topology.processes}

    def keep(process: Process) -> None:
        observed[process.id] = _observe(process, credentials, deadline_s)

    processes = topology.processes.values()
    threads = [threading.Thread(target=keep, args=(p,), daemon=True) for p in processes]
    for thread in threads:
        thread.start()
    join_all(threads, 2 * deadline_s + 0.5)  # the lookup of a name may take the deadline, too
    return dict(observed)


def _observe(process: Process, credentials: Credentials | None, deadline_s: float) -> Observation:
    here = is_here(process, deadline_s)
    # Others may know a process of this machine by an address outside a NAT.
    address = asking_address(process) if here else process.address
    named = look_up(address.rpartition(":")[0], deadline_s)
    own = look_up(process.bind or process.host, deadline_s)
    until = time.monotonic() + deadline_s
    reach = _reach(named, process.port, deadline_s)
    tls = credentials.folder.path if credentials else False
    metrics, rtt_ms, clock_s = _ask(address, tls, until) if reach is Reach.OPEN else NO_ANSWER
    problem = ""
    if reach is Reach.OPEN and metrics is None:
        problem = tls_problem(named.addresses, process.port, credentials, process.id, deadline_s)
    is_loopback = here and own.is_loopback and not own.is_lone_number
    at = named.shown(), named.shown(address)
    return Observation(reach, metrics, rtt_ms, clock_s, here, *at, is_loopback, problem)


def _reach(named: Host, port: int, deadline_s: float) -> Reach:
    """Opens a plain connection and closes it again: gRPC does not say why it has none."""
    if not named.addresses:
        return Reach.NO_NAME
    try:
        connect(named.addresses, port, deadline_s).close()
        return Reach.OPEN
    except ConnectionRefusedError:
        return Reach.REFUSED
    except OSError as e:
        no_route = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
        return Reach.NO_ROUTE if e.errno in no_route else Reach.SILENT


Answer = tuple[pb2.MetricsResponse | None, float, float]
NO_ANSWER: Answer = (None, 0.0, 0.0)


def _ask(address: str, tls: Tls, until: float) -> Answer:
    """Its metrics, the shortest round trip in ms, and how far its clock is ahead in s."""
    answers: list[Answer] = []
    try:
        asked = library.connect(address, tls=tls)
        while len(answers) < ROUNDS and (left_s := until - time.monotonic()) > 0:
            wall_s, began = time.time(), time.monotonic()
            metrics = asked.metrics(timeout=left_s)
            rtt_s = time.monotonic() - began
            ahead_s = metrics.wall_time_s - (wall_s + rtt_s / 2) if metrics.wall_time_s else 0.0
            answers.append((metrics, rtt_s * 1000, ahead_s))
    except (library.CallFailed, ValueError):
        pass
    return min(answers, key=lambda answer: answer[1], default=NO_ANSWER)


# The report

PROCESS_COLUMNS = (
    "id", "role", "address", "here", "state", "round trip", "clock", "version", "system",
)  # fmt: skip
LINK_COLUMNS = ("from", "to", "state", "round trip")


def show(report: Screen, found: Examination) -> None:
    processes = [_process_row(p, f, found.observed[p.id]) for p, f in found.processes]
    report.table("processes", PROCESS_COLUMNS, processes)
    links = [_link_row(a, b, f, found.observed[a.id]) for a, b, f in found.links]
    report.table("links", LINK_COLUMNS, links)
    say_summary(report, found)


def say_summary(report: Screen, found: Examination) -> None:
    report.print()
    for line in found.summary():
        report.say(line)


def advice(named: Sequence[tuple[str, Finding]]) -> list[str]:
    """Why, and what to do; one line for all that have the same problem."""
    groups: dict[str, list[str]] = {}
    for name, finding in named:
        if finding.why:
            do = f". {finding.do[:1].upper()}{finding.do[1:]}" if finding.do else ""
            groups.setdefault(f"{finding.why}{do}", []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in groups.items()]


def _process_row(process: Process, finding: Finding, observed: Observation) -> tuple[str, ...]:
    address = observed.address or process.address
    place = process.id, process.role, address, "yes" if observed.is_here else "no"
    metrics = observed.metrics
    if metrics is None:
        return (*place, finding.state, "-", "-", "-", "-")
    times = f"{observed.rtt_ms:.1f} ms", f"{observed.clock_s:+.2f} s"
    return *place, finding.state, *times, metrics.version, metrics.platform


def _link_row(
    asker: Process, asked: Process, finding: Finding, observed: Observation
) -> tuple[str, ...]:
    rtt_ms = _rtt_ms(observed, asked)
    return asker.id, asked.id, finding.state, f"{rtt_ms:.1f} ms" if rtt_ms else "-"


def _rtt_ms(observed: Observation, asked: Process) -> float:
    links = observed.metrics.neighbours if observed.metrics else ()
    return next((n.rtt_ms for n in links if n.process_id == asked.id and n.state == "up"), 0.0)


def _as_json(found: Examination) -> dict[str, Any]:
    return {
        "ok": found.exit_code is Exit.OK,
        "exit_code": int(found.exit_code),
        "security": asdict(found.protection),
        "processes": [
            {
                "id": p.id,
                "role": p.role,
                "address": p.address,
                "here": found.observed[p.id].is_here,
                "connection": found.observed[p.id].reach.value,
                **_finding_as_json(finding),
                **_metrics_as_json(found.observed[p.id]),
            }
            for p, finding in found.processes
        ],
        "journal": journal_as_json(found),
        "links": links_as_json(found),
    }


def journal_as_json(found: Examination) -> list[dict[str, str]]:
    return [_finding_as_json(finding) for _, finding in found.journal]


def links_as_json(found: Examination) -> list[dict[str, Any]]:
    return [
        {
            "from": asker.id,
            "to": asked.id,
            "round_trip_ms": round(_rtt_ms(found.observed[asker.id], asked), 3),
            **_finding_as_json(finding),
        }
        for asker, asked, finding in found.links
    ]


def _finding_as_json(finding: Finding) -> dict[str, str]:
    found = {"grade": finding.grade.value, "state": finding.state}
    return {**found, "why": finding.why, "do": finding.do}


def _metrics_as_json(observed: Observation) -> dict[str, Any]:
    if observed.metrics is None:
        return {}
    return {
        "round_trip_ms": round(observed.rtt_ms, 3),
        "clock_offset_s": round(observed.clock_s, 3),
        "version": observed.metrics.version,
        "platform": observed.metrics.platform,
    }
