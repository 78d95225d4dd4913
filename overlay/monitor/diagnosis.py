"""Diagnoses a process or a link from observations: what is wrong, and what to do about it.

One machine observes little: whether a port opens, what answers there, and what the processes that
answer report about their links. This module tells the likely causes apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from overlay.model.topology import Process, Topology
from overlay.transport import codec
from overlay.transport.codec import pb2

MAX_CLOCK_S = 2.0  # difference between clocks; less may be transit time
RECONNECTED_S = 10.0  # a link between two processes that answer is back by then
WINDOWS, MAC, LINUX = "Windows", "Darwin", "Linux"  # from platform.system()


class Reach(Enum):
    """The result of connecting to the address."""

    OPEN = "open"
    REFUSED = "refused"
    SILENT = "silent"
    NO_ROUTE = "no route"
    NO_NAME = "no name"


class Grade(Enum):
    OK = "ok"
    NOTE = "note"  # worth knowing, but it works
    BAD = "bad"


@dataclass(frozen=True)
class Observation:
    """What this machine observes of one process; metrics is None if no overlay process answers.

    clock_s: its wall clock minus ours. host, address: where it was tried; a name with its address
    here. is_loopback: no other machine can reach it by its name. tls_problem: why it and this
    machine do not come together over TLS.
    """

    reach: Reach
    metrics: pb2.MetricsResponse | None = None
    rtt_ms: float = 0.0
    clock_s: float = 0.0
    is_here: bool = False
    host: str = ""
    address: str = ""
    is_loopback: bool = False
    tls_problem: str = ""


@dataclass(frozen=True)
class Finding:
    """state: one or two words. why, do: sentences, empty if all is well."""

    grade: Grade
    state: str
    why: str = ""
    do: str = ""


class Diagnosis:
    """The findings about a whole overlay, observed once.

    version, wire_format, system: of the observing machine. config: the file's name as the user
    wrote it. is_installed: there is no project folder, and so no scripts.
    """

    def __init__(
        self,
        topology: Topology,
        observed: Mapping[str, Observation],
        version: str,
        wire_format: int,
        system: str,
        config: str,
        is_installed: bool = False,
    ) -> None:
        self._topology = topology
        self._observed = observed
        self._version = version
        self._wire_format = wire_format
        self._system = system
        self._config = config
        self._is_installed = is_installed

    def of_process(self, process: Process) -> Finding:
        observed = self._observed[process.id]
        if observed.metrics is None:
            return self._unreached(process, observed)
        return self._answered(process, observed, observed.metrics)

    def of_link(self, asker: Process, asked: Process) -> Finding:
        """The asker's link to the neighbour below it."""
        metrics = self._metrics(asker)
        if metrics is None:
            return Finding(Grade.NOTE, "unknown")  # the finding about the asker says why
        link = next((n for n in metrics.neighbours if n.process_id == asked.id), None)
        if link is None:
            why = f"{asker.id} has no such link: it reads another configuration"
            return Finding(Grade.BAD, "missing", why)
        if link.state == "up":
            return Finding(Grade.OK, "up")
        return self._link_down(asker, asked, link)

    def _metrics(self, process: Process) -> pb2.MetricsResponse | None:
        """The process's metrics, if that process is the one that answers."""
        metrics = self._observed[process.id].metrics
        return metrics if metrics is not None and metrics.process_id == process.id else None

    def _answered(
        self, process: Process, observed: Observation, metrics: pb2.MetricsResponse
    ) -> Finding:
        if metrics.process_id != process.id:
            address = observed.address or process.address
            why = f"process {metrics.process_id} answers at {address}"
            do = "stop that process, or change the port"
            return Finding(Grade.BAD, f"is {metrics.process_id}", why, do)
        version = metrics.version
        if codec.read_format(metrics) != self._wire_format:
            why = f"it runs version {version}, which does not understand {self._version} here"
            return Finding(Grade.BAD, "other release", why, self._same_release())
        if not metrics.is_healthy:
            why = "it is being stopped and takes no new requests"
            return Finding(Grade.BAD, "stopping", why, self._start(process))
        if metrics.config_digest != self._topology.digest:
            why = "it was started with another configuration file"
            do = f"copy {self._topology.name} to every machine, then {self._restart()}"
            return Finding(Grade.BAD, "other config", why, do)
        max_streams = self._topology.limits.streams
        if metrics.streams >= max_streams * 3 // 4:  # the most that one address may have
            why = (
                f"{metrics.streams} of its {max_streams} places for streams are taken: it may "
                "refuse a new map, or a new program that uses the library"
            )
            return Finding(Grade.BAD, "full", why, "end, or close(), clients that are done")
        if version != self._version:
            why = f"it runs version {version}; this machine has {self._version}"
            return Finding(Grade.NOTE, "serves", why, self._same_release())
        if observed.is_loopback and self._has_other_machines(process):
            why = f"{observed.host} leads to this machine only: no other machine reaches it"
            do = "write an address that the others reach, as its host or its bind"
            return Finding(Grade.NOTE, "serves", why, do)
        if abs(observed.clock_s) > MAX_CLOCK_S:
            fast = "ahead of" if observed.clock_s > 0 else "behind"
            why = f"its clock is {abs(observed.clock_s):.0f} s {fast} this one's"
            return Finding(Grade.NOTE, "serves", why, "requests work; only times in logs differ")
        return Finding(Grade.OK, "serves")

    def _unreached(self, process: Process, observed: Observation) -> Finding:
        host = observed.host or process.bind or process.host
        if observed.reach is Reach.NO_NAME:
            why = f"this machine does not know the name '{host}'"
            do = "correct its host, see that its machine is on, or write its address in numbers"
            return Finding(Grade.BAD, "no address", why, do)
        if observed.reach is Reach.REFUSED:
            at = "there" if host in (process.bind, process.host) else f"at {host}"
            why = f"nothing listens {at}: it was not started, or has ended"
            return Finding(Grade.BAD, "not running", why, self._start(process))
        if observed.tls_problem:
            return Finding(Grade.BAD, "not trusted", observed.tls_problem)
        if observed.reach is Reach.OPEN:
            why = (
                "something listens there that does not answer as an overlay process does: another "
                "program, or a process that is frozen"
            )
            do = f"see which program has the port: {self._port_owner(process)}"
            return Finding(Grade.BAD, "no answer", why, do)
        if observed.reach is Reach.NO_ROUTE:
            why = f"{host} cannot be reached from here: off, asleep, or in another network"
            do = f"switch that machine on, or {self._find_address(process)}"
            return Finding(Grade.BAD, "no route", why, do)
        return self._silent(process, host)

    def _silent(self, process: Process, host: str) -> Finding:
        answering = self._others_that_answer(process)
        if answering:
            others = f"{' and '.join(answering)} at {host}"
            why = f"nothing comes back, though {others} can be reached: a firewall closes the port"
            return Finding(Grade.BAD, "silent", why, f"open it {self._firewall(process)}")
        why = f"nothing comes back from {host}: off, another address, or a firewall in between"
        do = f"{self._find_address(process)}, or open the firewall {self._firewall(process)}"
        return Finding(Grade.BAD, "silent", why, do)

    def _link_down(self, asker: Process, asked: Process, link: pb2.Neighbour) -> Finding:
        why = f"{link.state} for {link.since_s:.0f} s" + (f": {link.reason}" if link.reason else "")
        if link.state != "down":
            return Finding(Grade.NOTE, link.state, why)
        if self._metrics(asked) is None:
            return Finding(Grade.BAD, "down", why, f"see {asked.id} above")
        if not self._observed[asker.id].is_here:
            do = f"{asked.id} answers here but not there: open the firewall {self._firewall(asked)}"
        elif link.since_s > RECONNECTED_S:
            do = (
                "it answers here, so no firewall is in the way: put the same folder on every "
                f"machine, or see the log of {asker.id}"
            )
        else:
            do = "it answers here, so the link will be back in a moment: look again"
        return Finding(Grade.BAD, "down", why, do)

    def _has_other_machines(self, process: Process) -> bool:
        return any(other.host != process.host for other in self._topology.processes.values())

    def _others_that_answer(self, process: Process) -> list[str]:
        return [
            other.id
            for other in self._topology.processes.values()
            if other.host == process.host and other.id != process.id and self._metrics(other)
        ]

    def _system_of(self, process: Process) -> str:
        """The system of its machine, if a process that answers from there reports it."""
        if self._observed[process.id].is_here:
            return self._system
        for other_id in self._others_that_answer(process):
            metrics = self._observed[other_id].metrics
            if metrics is not None:
                return metrics.platform.partition("-")[0]
        return ""

    def _where(self, process: Process) -> str:
        here = self._observed[process.id].is_here
        return "here" if here else f"on {process.bind or process.host}"

    def _same_release(self) -> str:
        what = "release" if self._is_installed else "folder"
        return f"put the same {what} on every machine, then {self._restart()}"

    def _restart(self) -> str:
        if self._is_installed:
            return "restart its processes"
        return f"run restart {self._config} (scripts/run.py)"

    def _start(self, process: Process) -> str:
        script = {WINDOWS: r"py scripts\run.py", "": "scripts/run.py"}.get(
            self._system_of(process), "python3 scripts/run.py"
        )
        start = f"{script} start {self._config}"
        if self._is_installed:
            start = f"overlay-node {self._config} {process.id}"
        return f"start it {self._where(process)}: {start}; its log in {process.log_dir} says more"

    def _find_address(self, process: Process) -> str:
        ways = {
            WINDOWS: "ipconfig",
            MAC: "ipconfig getifaddr en0",
            LINUX: "hostname -I",
        }
        shown = ways.get(self._system_of(process)) or (
            "ipconfig on Windows, ipconfig getifaddr en0 on a Mac"
        )
        return f"look up the machine's address there ({shown}) and correct its host in the file"

    def _firewall(self, process: Process) -> str:
        ports = self._ports_beside(process)
        ways = {
            WINDOWS: (
                'as administrator: netsh advfirewall firewall add rule name="overlay" dir=in '
                f"action=allow protocol=TCP localport={ports}"
            ),
            MAC: "System Settings, Network, Firewall, Options: allow incoming connections for "
            "Python",
            LINUX: f"allow TCP {ports}, for example: sudo ufw allow {ports.replace('-', ':')}/tcp",
        }
        system = self._system_of(process)
        way = ways.get(system) or f"Windows, {ways[WINDOWS]}; Mac: {ways[MAC]}"
        return f"{self._where(process)}: {way}"

    def _ports_beside(self, process: Process) -> str:
        """The ports of the process's machine, as a range if they are close together."""
        ports = sorted(
            {p.port for p in self._topology.processes.values() if p.host == process.host}
        )
        if len(ports) > 1 and ports[-1] - ports[0] < 2 * len(ports):
            return f"{ports[0]}-{ports[-1]}"
        return ",".join(map(str, ports))

    def _port_owner(self, process: Process) -> str:
        ways = {
            WINDOWS: f"netstat -ano | findstr :{process.port}",
            MAC: f"lsof -nP -iTCP:{process.port} -sTCP:LISTEN",
            LINUX: f"ss -ltnp 'sport = :{process.port}'",
        }
        way = ways.get(self._system_of(process)) or f"{ways[WINDOWS]} (Mac: {ways[MAC]})"
        return f"{self._where(process)}: {way}"
