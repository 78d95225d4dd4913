"""Starts, stops and shows this machine's processes of a configuration.

    launcher.py start CONFIG [IDS]   those whose host is an address of this machine, or the named
    launcher.py stop CONFIG [IDS]    what start has started and nothing else, gently, then firmly
    launcher.py restart CONFIG [IDS] the same one after another, so that no request is lost
    launcher.py status CONFIG        which processes serve, and how others ended

A start succeeds as a whole or not at all: when one process does not come up, the others that this
call started are stopped again; those that ran before stay.

Exit codes: 0 all well, 1 a process is not as it should be (one that was stopped has left requests
behind, or had to be killed), 2 the command could not begin.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]

import overlay  # noqa: E402, F401 - found through the line above

sys.path.append(sys.path.pop(0))  # a random.py of yours in that folder is not Python's

from overlay.cli import stdio  # noqa: E402

stdio.complete()

from jobs_servers import (  # noqa: E402
    is_outdated,
    restart_servers,
    servers_here,
    start_servers,
)
from processes import (  # noqa: E402 - after that, like everything that may open files
    ANSWER_S,
    GRACE_MARGIN_S,
    LEFT_BEHIND,
    LINK_S,
    ROOT,
    Child,
    Files,
    Record,
    Refused,
    ask,
    command,
    config_of,
    end,
    how_it_ended,
    launch,
    not_linked,
    record_of,
    records,
    report_failure,
    shown,
    spawn,
    take_back,
    wait_until_linked,
    wait_until_ready,
)

from overlay.cli.doctor import Examination, advice, closing, examine, say_summary  # noqa: E402
from overlay.cli.terminal import Screen, guarded  # noqa: E402
from overlay.cli.usage import Parser  # noqa: E402
from overlay.model.config import load  # noqa: E402
from overlay.model.errors import ConfigError  # noqa: E402
from overlay.model.topology import Process, Topology  # noqa: E402
from overlay.monitor.diagnosis import Finding, Grade, Observation  # noqa: E402
from overlay.monitor.protection import protection  # noqa: E402
from overlay.security.lookup import credentials_of  # noqa: E402
from overlay.server.shutdown import when_console_ends  # noqa: E402
from overlay.transport import resolver as names  # noqa: E402
from overlay.transport.machine import is_here, own_addresses  # noqa: E402

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

NOTHING_RUNS = "nothing is running that was started here from {}"
WAIT_S = 60.0  # for a process to serve; handlers that load a model take their time


def main(arguments: Sequence[str]) -> int:
    verb, options = _parse(arguments)

    def run() -> int:
        try:
            return verb(find(options.pop("config")), **options)
        except (ConfigError, Refused) as error:
            print(error, file=sys.stderr)
            return 2

    return guarded(run)


# start


def start(config: Path, ids: Sequence[str], wait_s: float) -> int:
    """Starts this machine's processes, or the named ones."""
    given_up = end_on_signal()
    topology = load(config)
    chosen = choose(topology, ids)
    credentials = credentials_of(topology)
    children: list[Child] = []
    servers: list[Record] = []
    try:
        if not ids:
            start_servers(topology, servers)
        running = launch(topology, chosen, children, given_up)
        wait_until_ready(children, wait_s, given_up, credentials)
    except (Refused, ConfigError):
        take_back(children)
        end(servers, GRACE_MARGIN_S)
        raise
    if given_up.is_set():
        print("interrupted; stopping what was started", file=sys.stderr)
        take_back(children)
        return 130
    if any(child.ready_ms is None for child in children):
        report_failure(children, credentials)
        return 1
    wait_until_linked(children, given_up, credentials)
    _print_started(topology, chosen, children)
    for line in _protection(topology, chosen, credentials):
        Screen(sys.stdout).say(line)
    # Those that ran before may be frozen, or have another configuration.
    found = examined(topology).processes if running else ()
    problems = advice([(p.id, f) for p, f in found if p.id in running and f.grade is Grade.BAD])
    problems += [
        f"{shape.id}: it runs with an older configuration; this one is taken up by "
        f"{command('restart')} {shown(config)}"
        for server, shape in servers_here(topology)
        if not ids and is_outdated(topology, server, shape)
    ]
    for line in problems:
        print(line)
    print(f"\nto stop: {command('stop')} {shown(config)}")
    return 1 if problems else 0


def choose(topology: Topology, ids: Sequence[str]) -> list[Process]:
    """The named processes, or those of this machine. Raises Refused when there are none."""
    if ids:
        return [topology.process(process_id) for process_id in dict.fromkeys(ids)]
    names.prefetch(n for p in topology.processes.values() for n in (p.bind, p.host) if n)
    here = [process for process in topology.processes.values() if is_here(process)]
    if not here and not any(servers_here(topology)):
        raise Refused(
            f"no process of {topology.name} belongs to this machine: the file has "
            f"{_hosts(topology)}; this machine has {', '.join(own_addresses()) or 'no address'}. "
            f'Edit "host" in {shown(config_of(topology))}, or name the ids to start'
        )
    return here


def _hosts(topology: Topology) -> str:
    ids: dict[str, list[str]] = {}
    for process in topology.processes.values():
        named = names.look_up(process.bind or process.host)
        unknown = "" if named.addresses else ", a name that this machine does not know"
        ids.setdefault(f"{named.shown()}{unknown}", []).append(process.id)
    return ", ".join(f"{host} ({', '.join(of_host)})" for host, of_host in ids.items())


def _print_started(
    topology: Topology, chosen: Iterable[Process], children: Iterable[Child]
) -> None:
    ready = {child.process.id: f"{child.ready_ms:.0f} ms" for child in children}
    rows = []
    for p in chosen:
        record, log = record_of(topology, p), shown(Files(topology, p).log)
        at = names.look_up(p.bind or p.host).shown(p.listen_address)
        figures = str(record.pid if record else ""), ready.get(p.id, "already running")
        rows.append((p.id, p.role, p.team, at, *figures, log))
    columns = ("id", "role", "team", "address", "pid", "ready", "log")
    Screen(sys.stdout).table("", columns, rows)


def _protection(
    topology: Topology, chosen: Iterable[Process], credentials: Credentials | None
) -> list[str]:
    """Whether the chosen ones are open, and what is wrong with certificates; a line each."""
    answers = [answer for process in chosen if (answer := ask(process, credentials))]
    own_problem = credentials.warning if credentials else ""
    return protection(answers, closing(shown(config_of(topology))), own_problem).lines


# stop


def stop(config: Path, ids: Sequence[str], grace_s: float | None) -> int:
    """Stops what start started, or the named ones."""
    try:
        topology = load(config)
    except ConfigError as error:
        # What runs can still be stopped when its file was broken or removed since.
        print(error, file=sys.stderr)
        topology = Topology({}, folder=config.parent, name=config.name)
    found = _own_records(topology)
    for process_id in ids:
        if process_id not in found:
            topology.process(process_id)  # raises for an id that is not in the file
    asked = [found[n] for n in (ids or found) if n in found]
    if grace_s is None:
        grace_s = topology.limits.drain_grace_s + GRACE_MARGIN_S
    ends = end([record for _, record in asked], grace_s)
    for path, _ in asked:
        path.unlink(missing_ok=True)
    if not asked:
        print(NOTHING_RUNS.format(shown(config)))
        return 0 if topology.processes else 2
    rows = [(record.id, str(record.pid), ends[record.id]) for _, record in asked]
    Screen(sys.stdout).table("", ("id", "pid", "end"), rows)
    return int(any(LEFT_BEHIND in how or how.startswith("killed") for how in ends.values()))


def _own_records(topology: Topology) -> dict[str, tuple[Path, Record]]:
    """The pid files of this configuration, by the ids of their processes."""
    found = records(topology)
    return {record.id: (path, record) for path, record in found if record.is_of(topology)}


# restart


def restart(config: Path, ids: Sequence[str], grace_s: float | None, wait_s: float) -> int:
    """Restarts what start started, or the named ones, one after another: the leader last. The
    servers of the jobs stay as they are, but for what is new in their configuration.

    It goes on with the next one when the last one serves and its neighbours see it. When one does
    not come back, the others stay as they are.
    """
    given_up = end_on_signal()
    topology = load(config)
    credentials = credentials_of(topology)
    if grace_s is None:
        grace_s = topology.limits.drain_grace_s + GRACE_MARGIN_S
    found = _own_records(topology).items()
    is_ours = topology.processes.__contains__  # not a server of the jobs
    running = {n: record for n, (_, record) in found if record.process() and is_ours(n)}
    chosen = [topology.process(n) for n in dict.fromkeys(ids or running)]
    if not chosen and not any(record.process() for _, (_, record) in found):
        print(NOTHING_RUNS.format(shown(config)))
    for server, end_of_it in () if ids else restart_servers(topology):
        print(f"{server}  {end_of_it}")
    for process in sorted(chosen, key=lambda process: process.rank):
        if given_up.is_set():
            print("interrupted; the others were not touched", file=sys.stderr)
            return 130
        record = running.get(process.id)
        if not _restart_one(topology, process, record, credentials, grace_s, wait_s):
            return 1
    return 0


def _restart_one(
    topology: Topology,
    process: Process,
    record: Record | None,
    credentials: Credentials | None,
    grace_s: float,
    wait_s: float,
) -> bool:
    given_up = threading.Event()  # half a restart is of no use: Ctrl-C waits for its end
    before = ask(process, credentials) if record else None
    absent = not_linked(before) if before else {n.id for n in topology.below(process.id)}
    ended = end([record], grace_s, False)[process.id] if record else "was not running"
    child = None
    try:
        child = spawn(topology, process)
        wait_until_ready([child], wait_s, given_up, credentials)
    except Refused as refused:
        print(refused, file=sys.stderr)
    if child is None or child.ready_ms is None:
        report_failure([child] if child else [], credentials)
        print(f"process {process.id} is down; the others were not touched", file=sys.stderr)
        return False
    problems = _wait_until_seen(topology, process, absent, credentials)
    print(
        f"{process.id}  {ended}, serves again after {child.ready_ms:.0f} ms, pid {child.popen.pid}"
    )
    for problem in problems:
        print(f"process {process.id}: {problem}; the others were not touched", file=sys.stderr)
    return not problems


def _wait_until_seen(
    topology: Topology,
    process: Process,
    absent: set[str],
    credentials: Credentials | None,
    wait_s: float = LINK_S,
) -> list[str]:
    """Waits until its neighbours see it and it sees those it saw before. Returns what is missing.

    absent: those that it need not see. A neighbour that does not answer is not waited for.
    """
    until = time.monotonic() + wait_s
    while True:
        problems = [
            f"{n.id} does not see it"
            for n in topology.above(process.id)
            if (metrics := ask(n, credentials)) and process.id in not_linked(metrics)
        ]
        own = ask(process, credentials)
        missing = sorted(not_linked(own) - absent) if own else []
        problems += [f"it does not see {n} any more" for n in missing]
        if own and not problems:
            return []
        if time.monotonic() > until:
            return problems or ["it does not answer any more"]
        time.sleep(0.1)


# status


STATUS_COLUMNS = ("id", "role", "team", "address", "pid", "in service", "waiting", "state")


def status(config: Path) -> int:
    """Shows which processes serve, and how others ended."""
    topology = load(config)
    found = examined(topology)
    rows, code = [], 0
    for process, finding in found.processes:
        observed, record = found.observed[process.id], record_of(topology, process)
        if finding.grade is Grade.BAD and (record or observed.is_here):  # not of another machine
            code = 1
        place = process.id, process.role, process.team, observed.address or process.address
        figures = str(record.pid) if record else "", "", ""
        if m := observed.metrics:
            in_service = f"{m.active_requests}/{m.max_capacity}"
            figures = str(m.pid), in_service, f"{m.queue_size}/{m.queue_slots}"
        rows.append((*place, *figures, finding.state))
    for server, shape in servers_here(topology):
        record = record_of(topology, shape)
        is_up = record is not None and record.process() is not None
        pid, state = (str(record.pid), "runs") if record and is_up else ("", "down")
        if is_up and is_outdated(topology, server, shape):
            state = "older configuration"
        code = code if state == "runs" else 1
        rows.append((shape.id, "jobs' server", "", server.address, pid, "", "", state))
    report = Screen(sys.stdout)
    report.table("", STATUS_COLUMNS, rows)
    say_summary(report, found)
    return code


def examined(topology: Topology) -> Examination:
    """The doctor's findings, with what the pid files add."""
    found = examine(topology, shown(config_of(topology)), ANSWER_S)
    processes = [
        (p, _with_record(topology, p, found.observed[p.id], f)) for p, f in found.processes
    ]
    return replace(found, processes=processes)


def _with_record(
    topology: Topology, process: Process, observed: Observation, finding: Finding
) -> Finding:
    files, record = Files(topology, process), record_of(topology, process)
    is_alive = record is not None and record.process() is not None
    if observed.metrics is not None:
        if observed.is_here and not is_alive:
            return replace(finding, state=f"{finding.state}, not started here")
        return finding
    if record is None:
        return finding
    if not is_alive:
        return Finding(Grade.BAD, *how_it_ended(record, files), finding.do)
    why = f"it runs as pid {record.pid} but does not answer at {observed.address}"
    if record.port != process.port:
        why += f": it was started with port {record.port}"
    elif observed.tls_problem:
        why += f": {observed.tls_problem}"
    again = f"{command('restart')} {shown(config_of(topology))} {process.id}"
    return Finding(Grade.BAD, "no answer", why, f"see {shown(files.log)}, or restart it: {again}")


# The command line

VERBS: dict[str, Callable[..., int]] = {
    "start": start,
    "stop": stop,
    "restart": restart,
    "status": status,
}


def _parse(arguments: Sequence[str]) -> tuple[Callable[..., int], dict[str, Any]]:
    """The verb's function and its arguments."""
    parser = Parser("run.py", "Starts, stops and shows this machine's processes.")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    name = parser.parse_args(arguments[:1]).verb
    verb = VERBS[name]
    parser = Parser(f"run.py {name}", (verb.__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG", help="for example two_hosts_config.json")
    if verb is not status:
        parser.add_argument("ids", metavar="ID", nargs="*", default=[], help="for example A B")
    if verb in (start, restart):
        wait = "seconds for a process to serve (default %(default)g)"
        parser.add_argument("--wait-s", type=float, default=WAIT_S, metavar="S", help=wait)
    if verb in (stop, restart):
        grace = "seconds before a process is killed (default: its drain_grace_s and 5 more)"
        parser.add_argument("--grace-s", type=float, metavar="S", help=grace)
    return verb, vars(parser.parse_args(arguments[1:]))


def find(config: str) -> Path:
    """The configuration of this name in the current folder, else in the project's."""
    here, there = Path(config).absolute(), ROOT / config
    return (here if here.exists() or not there.exists() else there).resolve()


def end_on_signal() -> threading.Event:
    """An event that is set by Ctrl-C, SIGTERM or the closing of the terminal."""
    asked = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: asked.set())
    when_console_ends(lambda grace_s: asked.set())
    return asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
