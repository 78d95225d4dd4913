"""Why a process or a link is not well, and what to do about it: from what was seen to a sentence.

Who looks from one machine sees little: whether a port opens, what answers there, and what the
processes that do answer say of their links. The rest is told apart here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from overlay.model.topology import Process, Topology

CLOCK_S = 2.0  # apart; less is what a call's own way makes of it
MOMENT_S = 10.0  # a link between two that answer is back by then
WINDOWS, MAC, LINUX = "Windows", "Darwin", "Linux"  # as platform.system() has them


class Reach(Enum):
    """What became of opening a connection to the address."""

    OPEN = "open"
    REFUSED = "refused"
    SILENT = "silent"
    NO_WAY = "no way"
    NO_NAME = "no name"


class Grade(Enum):
    OK = "ok"
    NOTE = "note"  # worth knowing, and it works all the same
    BAD = "bad"


@dataclass(frozen=True)
class Link:
    """What a process says of a neighbour that it asks."""

    to: str
    state: str
    since_s: float = 0.0
    reason: str = ""
    rtt_ms: float = 0.0


@dataclass(frozen=True)
class Said:
    """What answered at a process's address. clock_s: its wall clock less ours."""

    process_id: str
    version: str
    platform: str
    digest: str
    is_healthy: bool = True
    rtt_ms: float = 0.0
    clock_s: float = 0.0
    links: tuple[Link, ...] = ()
    wire_format: int = 1
    streams: int = 0  # open there: a client of the library has one, a link two

    @property
    def system(self) -> str:
        return self.platform.partition("-")[0]


@dataclass(frozen=True)
class Seen:
    """What this machine sees of one process; said is None when nothing of ours answers.

    host, address: where it was looked for, a name with what it stands for here. is_loopback: its
    name leads no other machine to it.
    """

    reach: Reach
    said: Said | None = None
    is_here: bool = False
    host: str = ""
    address: str = ""
    is_loopback: bool = False


@dataclass(frozen=True)
class Finding:
    """state: in a word or two. why, do: sentences, empty when all is well."""

    grade: Grade
    state: str
    why: str = ""
    do: str = ""


class Diagnosis:
    """The findings of one look at a whole overlay.

    version, wire_format, system: of the machine that looks. config: the file's name as its user
    wrote it.
    """

    def __init__(
        self,
        topology: Topology,
        seen: Mapping[str, Seen],
        version: str,
        wire_format: int,
        system: str,
        config: str,
    ) -> None:
        self._topology = topology
        self._seen = seen
        self._version = version
        self._wire_format = wire_format
        self._system = system
        self._config = config

    def of_process(self, process: Process) -> Finding:
        seen = self._seen[process.id]
        if seen.said is None:
            return self._unreached(process, seen)
        return self._answered(process, seen.said)

    def of_link(self, asker: Process, asked: Process) -> Finding:
        """How the asker finds the neighbour below it."""
        said = self._said(asker)
        if said is None:
            return Finding(Grade.NOTE, "not known")  # what is said of the asker says it all
        link = next((link for link in said.links if link.to == asked.id), None)
        if link is None:
            why = f"{asker.id} does not name it: it reads another configuration"
            return Finding(Grade.BAD, "not there", why)
        if link.state == "up":
            return Finding(Grade.OK, "up")
        return self._link_down(asker, asked, link)

    def _said(self, process: Process) -> Said | None:
        """What the process says, if it is the right one that answers."""
        said = self._seen[process.id].said
        return said if said is not None and said.process_id == process.id else None

    def _answered(self, process: Process, said: Said) -> Finding:
        if said.process_id != process.id:
            address = self._seen[process.id].address or process.address
            why = f"process {said.process_id} of another start answers at {address}"
            return Finding(
                Grade.BAD, f"is {said.process_id}", why, "stop that one, or change the port"
            )
        if said.wire_format != self._wire_format:
            why = f"it runs version {said.version}, which does not understand {self._version} here"
            return Finding(Grade.BAD, "other release", why, self._same_release())
        if not said.is_healthy:
            return Finding(Grade.BAD, "stops", "it is being stopped", self._start(process))
        if said.digest != self._topology.digest:
            why = "it was started with another configuration"
            do = f"copy {self._topology.name} to every machine, then {self._run('restart')}"
            return Finding(Grade.BAD, "other file", why, do)
        places = self._topology.limits.streams
        if said.streams >= places * 3 // 4:  # as many as those of one address may have
            why = (
                f"{said.streams} of its {places} places for streams are taken: a map, or a program "
                "that uses the library, may be refused when it comes now"
            )
            return Finding(Grade.BAD, "full", why, "end, or close(), clients that are done")
        if said.version != self._version:
            why = f"it runs version {said.version}, here is {self._version}"
            return Finding(Grade.NOTE, "serves", why, self._same_release())
        if self._seen[process.id].is_loopback and self._has_other_machines(process):
            why = f"{self._seen[process.id].host} leads to this machine only: no other reaches it"
            do = "write an address that others reach, as its host or its bind"
            return Finding(Grade.NOTE, "serves", why, do)
        if abs(said.clock_s) > CLOCK_S:
            fast = "ahead of" if said.clock_s > 0 else "behind"
            why = f"its clock is {abs(said.clock_s):.0f} s {fast} this one's"
            return Finding(Grade.NOTE, "serves", why, "no request minds; times in logs differ")
        return Finding(Grade.OK, "serves")

    def _unreached(self, process: Process, seen: Seen) -> Finding:
        host = seen.host or process.bind or process.host
        if seen.reach is Reach.NO_NAME:
            why = f"'{host}' is no name that this machine knows"
            do = "correct its host, see that its machine is on, or write the address in numbers"
            return Finding(Grade.BAD, "no address", why, do)
        if seen.reach is Reach.REFUSED:
            at = "there" if host in (process.bind, process.host) else f"at {host}"
            why = f"nothing listens {at}: not started, or ended"
            return Finding(Grade.BAD, "not running", why, self._start(process))
        if seen.reach is Reach.OPEN:
            why = "something listens there and does not answer as an overlay does: another program"
            do = f"see who has the port: {self._port_owner(process)}"
            return Finding(Grade.BAD, "no answer", f"{why}, or a process that is frozen", do)
        if seen.reach is Reach.NO_WAY:
            why = f"there is no way from here to {host}: off, asleep, or in another network"
            do = f"switch that machine on, or {self._find_address(process)}"
            return Finding(Grade.BAD, "no way", why, do)
        return self._silent(process, host)

    def _silent(self, process: Process, host: str) -> Finding:
        answering = self._others_that_answer(process)
        if answering:
            who = f"{' and '.join(answering)} at {host}"
            why = f"nothing comes back, though {who} can be reached: a firewall closes the port"
            return Finding(Grade.BAD, "silent", why, self._firewall(process))
        why = f"nothing comes back from {host}: off, another address, or a firewall in between"
        do = f"{self._find_address(process)}, or open the firewall {self._firewall(process)}"
        return Finding(Grade.BAD, "silent", why, do)

    def _link_down(self, asker: Process, asked: Process, link: Link) -> Finding:
        why = f"for {link.since_s:.0f} s" + (f": {link.reason}" if link.reason else "")
        if link.state != "down":
            return Finding(Grade.NOTE, link.state, why)
        if self._said(asked) is None:
            return Finding(Grade.BAD, "down", why, f"see {asked.id} above")
        if self._seen[asker.id].is_here and link.since_s > MOMENT_S:
            do = (
                "it answers here, so no firewall is in the way: put the same folder on every "
                f"machine, or see the log of {asker.id}"
            )
        elif self._seen[asker.id].is_here:
            do = "it answers here, so the link will be back in a moment: look again"
        else:
            do = f"{asked.id} answers here, not there: a firewall {self._firewall(asked)}"
        return Finding(Grade.BAD, "down", why, do)

    def _has_other_machines(self, process: Process) -> bool:
        return any(other.host != process.host for other in self._topology.processes.values())

    def _others_that_answer(self, process: Process) -> list[str]:
        return [
            other.id
            for other in self._topology.processes.values()
            if other.host == process.host and other.id != process.id and self._said(other)
        ]

    def _system_of(self, process: Process) -> str:
        """Of the process's machine, as far as anything that runs there has told; else empty."""
        if self._seen[process.id].is_here:
            return self._system
        for other_id in self._others_that_answer(process):
            said = self._seen[other_id].said
            if said is not None:
                return said.system
        return ""

    def _where(self, process: Process) -> str:
        here = self._seen[process.id].is_here
        return "here" if here else f"on {process.bind or process.host}"

    def _same_release(self) -> str:
        return f"put the same folder on every machine, then {self._run('restart')}"

    def _run(self, verb: str) -> str:
        return f"run {verb} {self._config} (scripts/run.py)"

    def _start(self, process: Process) -> str:
        script = {WINDOWS: r"py scripts\run.py", "": "scripts/run.py"}.get(
            self._system_of(process), "python3 scripts/run.py"
        )
        where = self._where(process)
        return f"{where}: {script} start {self._config}; its log in {process.log_dir} says more"

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
        """The ports of the process's machine, as a range when they follow each other."""
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
