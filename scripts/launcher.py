"""Starts, stops and shows this machine's processes of a configuration.

    launcher.py start CONFIG [IDS]   those whose host is an address of this machine, or the named
    launcher.py stop CONFIG [IDS]    exactly what start started, gently, then firmly
    launcher.py restart CONFIG [IDS] the same one after another, so that no request is lost
    launcher.py status CONFIG        who serves, and how others ended

A start is whole or not at all: when one process does not come up, the others that this call started
are stopped again; those that ran before stay. Beside the log of process A lie process_a.out (what
it printed), process_a.pid (which process it is) and process_a.stop, while it stops and when it has
ended by itself, with the number of requests that it left behind. A pid counts only together with
its start time, so a number that the system gave to another program since is never touched.

Exit codes: 0 all well, 1 a process is not as it should be (one that was stopped has left requests
behind, or had to be killed), 2 the command could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import overlay  # noqa: E402, F401 - found through the line above

sys.path.append(sys.path.pop(0))  # a random.py of yours in that folder is not Python's

from overlay.cli import stdio  # noqa: E402

stdio.complete()

import grpc  # noqa: E402 - after that, as all that may open files
import psutil  # noqa: E402

from overlay.cli.usage import Parser  # noqa: E402
from overlay.model.config import load  # noqa: E402
from overlay.model.errors import ConfigError  # noqa: E402
from overlay.model.topology import Process, Topology  # noqa: E402
from overlay.server.shutdown import StopFile, when_console_ends  # noqa: E402
from overlay.transport import codec  # noqa: E402
from overlay.transport import resolver as names  # noqa: E402
from overlay.transport.channels import Channel  # noqa: E402
from overlay.transport.machine import asking_address, is_here, own_addresses  # noqa: E402

WAIT_S = 60.0  # for a process to serve; handlers that load a model take their time
GRACE_MARGIN_S = 5.0  # a process that keeps its own drain_grace_s is not killed
LINK_S = 10.0  # for processes that serve to find each other; they try at least each second
ANSWER_S = 2.0  # for GetMetrics, which answers at once even under load
SAME_START_S = 2.0  # start times of one process differ by as much when the clock is corrected
SERVES = " serves on "  # what a process prints when it does, and nothing after it
STOPS = " INFO stopping: "  # what it logs when it has been told to
LEFT_BEHIND = "left behind"  # requests, by a process that stopped
TOKEN = "OVERLAY_LAUNCH"  # in the environment of a process and of all its children


class Refused(Exception):
    """Nothing was begun; says why and what would do."""


@dataclass(frozen=True)
class Files:
    """What lies in the log folder for one process."""

    log: Path
    out: Path
    pid: Path
    stop: Path

    @staticmethod
    def of(topology: Topology, process: Process) -> Files:
        stem = topology.folder / process.log_dir / f"process_{process.id.lower()}"
        return Files(
            *(stem.with_name(stem.name + end) for end in (".log", ".out", ".pid", ".stop"))
        )


@dataclass(frozen=True)
class Record:
    """A pid file: which process was started, for which configuration."""

    id: str
    rank: int
    pid: int
    create_time: float
    port: int
    config: str
    stop_file: str
    token: str

    @staticmethod
    def read(path: Path) -> Record | None:
        """None when there is none, or it is not one of ours."""
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            return replace(record, pid=int(record.pid), create_time=float(record.create_time))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(beside, path)

    @property
    def stop(self) -> StopFile:
        return StopFile(Path(self.stop_file))

    def process(self) -> psutil.Process | None:
        """The very process that was started, while it lives."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.create_time) <= SAME_START_S
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError, OverflowError):
            return None


@dataclass
class Child:
    """A process that this call has started."""

    process: Process
    files: Files
    record: Record
    popen: subprocess.Popen[bytes]
    began: float
    ready_ms: float | None = None

    def is_pid(self, pid: int) -> bool:
        """Whether it goes by this pid: on Windows a venv's Python runs as a child of itself."""
        if pid == self.popen.pid:
            return True
        try:
            below = psutil.Process(self.popen.pid).children(recursive=True)
        except psutil.Error:
            return False
        return pid in {child.pid for child in below}


def main(arguments: Sequence[str]) -> int:
    say_safely()
    asked = _asked(arguments)
    try:
        if asked.verb == "start":
            return start(find(asked.config), asked.ids, asked.wait_s)
        if asked.verb == "stop":
            return stop(find(asked.config), asked.ids, asked.grace_s)
        if asked.verb == "restart":
            return restart(find(asked.config), asked.ids, asked.grace_s, asked.wait_s)
        return status(find(asked.config))
    except (ConfigError, Refused) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


# start


def start(config: Path, ids: Sequence[str] = (), wait_s: float = WAIT_S) -> int:
    given_up = end_on_signal()
    topology = load(config)
    chosen = choose(topology, config, ids)
    children: list[Child] = []
    try:
        running = launch(topology, config, chosen, children, given_up)
        wait_until_ready(children, wait_s, given_up)
    except Refused:
        take_back(children)
        raise
    if given_up.is_set():
        print("interrupted; stopping what was started", file=sys.stderr)
        take_back(children)
        return 130
    if any(child.ready_ms is None for child in children):
        report_failure(children)
        return 1
    wait_until_linked(children, given_up)
    print_table(_start_rows(topology, chosen, running, children))
    silent = [n for n in running if not ask(asking_address(topology.processes[n]))]
    for note in _notes(topology, running, silent):
        print(note)
    print(f"\nto stop: {command('stop')} {shown(config)}")
    return 1 if silent else 0


def choose(topology: Topology, config: Path, ids: Sequence[str]) -> list[Process]:
    """The named processes, or those of this machine. Raises Refused when there are none."""
    if ids:
        return [topology.process(process_id) for process_id in dict.fromkeys(ids)]
    names.prefetch(n for p in topology.processes.values() for n in (p.bind, p.host) if n)
    here = [process for process in topology.processes.values() if is_here(process)]
    if not here:
        raise Refused(
            f"no process of {topology.name} belongs to this machine: the file has "
            f"{_hosts(topology)}; this machine has {', '.join(own_addresses()) or 'no address'}. "
            f'Edit "host" in {shown(config)}, or name the ids to start'
        )
    return here


def launch(
    topology: Topology,
    config: Path,
    chosen: Iterable[Process],
    children: list[Child],
    given_up: threading.Event,
) -> dict[str, Record]:
    """Starts the chosen ones that do not run yet and adds them to children, one by one.

    Returns those that ran before. Raises Refused, also when some were started.
    """
    _check_folders(topology, config)
    running: dict[str, Record] = {}
    for process in chosen:
        record = Record.read(Files.of(topology, process).pid)
        if record and record.process():
            running[process.id] = record
        elif not given_up.is_set():
            children.append(_spawn(topology, config, process))
    return running


def wait_until_ready(children: Sequence[Child], wait_s: float, given_up: threading.Event) -> None:
    """Fills in ready_ms of each child that serves within wait_s; all are asked in parallel."""
    if not children:
        return
    until = time.monotonic() + wait_s
    with ThreadPoolExecutor(len(children), "launcher-wait") as pool:
        waits = [pool.submit(_wait_for, child, until, given_up) for child in children]
        while wait(waits, timeout=0.2).not_done:
            pass  # in slices: on Windows a signal waits for the main thread
    for done in waits:
        done.result()


def wait_until_linked(
    children: Sequence[Child], given_up: threading.Event, wait_s: float = LINK_S
) -> bool:
    """Returns when the started ones are connected with each other: then a request reaches all.

    False when that took longer than wait_s; neighbours on other machines may come whenever.
    """
    ours = {child.process.id for child in children}
    until = time.monotonic() + wait_s
    while not given_up.is_set() and time.monotonic() < until:
        answers = [ask(asking_address(child.process)) for child in children]
        if all(answer and not ours & _not_linked(answer) for answer in answers):
            return True
        given_up.wait(0.1)
    return False


def _not_linked(metrics: Any) -> set[str]:
    return {n.process_id for n in metrics.neighbours if n.state != "up"}


def take_back(children: Sequence[Child]) -> None:
    """Ends what this call has started, as if it had not."""
    end([child.record for child in children], GRACE_MARGIN_S)
    for child in children:
        child.popen.wait()
        child.files.pid.unlink(missing_ok=True)


def report_failure(children: Sequence[Child]) -> None:
    """Says why the failed ones failed, and stops the others: half a start helps nobody."""
    bad = [child for child in children if child.ready_ms is None]
    for child in bad:
        print(_why_not(child), file=sys.stderr)
    take_back(children)
    if good := [child.process.id for child in children if child.ready_ms is not None]:
        print(f"{', '.join(good)} did start and {_was(good)} stopped again", file=sys.stderr)


def _was(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _check_folders(topology: Topology, config: Path) -> None:
    """Raises Refused when live processes of another configuration write to the same folder."""
    for folder in log_folders(topology):
        for record in records(folder):
            if not _same_file(record.config, config) and record.process():
                other = shown(Path(record.config))
                raise Refused(
                    f"{shown(folder)} is in use: process {record.id} of {other} runs as pid "
                    f"{record.pid}; stop it ({command('stop')} {other}) or give {topology.name} "
                    f'a "log_dir" of its own'
                )


def _spawn(topology: Topology, config: Path, process: Process) -> Child:
    files = Files.of(topology, process)
    token = secrets.token_hex(8)
    call = [sys.executable, str(ROOT / "node.py"), str(config), process.id]
    try:
        files.log.parent.mkdir(parents=True, exist_ok=True)
        files.stop.unlink(missing_ok=True)
        files.pid.unlink(missing_ok=True)
        out = files.out.open("wb")
    except OSError as e:
        raise Refused(f"{shown(files.log.parent)} cannot be used: {e.strerror or e}") from None
    began = time.monotonic()
    try:
        with out:
            popen = subprocess.Popen(
                [*call, "--stop-file", str(files.stop)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT, TOKEN: token},
                **apart(),
            )
    except OSError as e:
        raise Refused(
            f"process {process.id} cannot be started: {shown(Path(sys.executable))}: "
            f"{e.strerror or e}"
        ) from None
    record = Record(
        id=process.id,
        rank=process.rank,
        pid=popen.pid,
        create_time=_create_time(popen.pid),
        port=process.port,
        config=str(config),
        stop_file=str(files.stop),
        token=token,
    )
    try:
        record.write(files.pid)
    except OSError as e:
        popen.kill()
        popen.wait()
        raise Refused(f"{shown(files.pid)} cannot be written: {e.strerror or e}") from None
    return Child(process, files, record, popen, began)


# A handler's prints reach the .out file whole, also those just before a crash.
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def apart() -> dict[str, Any]:
    """A group of its own: Ctrl-C in this terminal, and the end of it, do not reach the child."""
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        return {"creationflags": flags}
    return {"start_new_session": True}


def _create_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0  # it has ended already


def _wait_for(child: Child, until: float, given_up: threading.Event) -> None:
    address = asking_address(child.process)
    while time.monotonic() < until and child.popen.poll() is None and not given_up.is_set():
        metrics = ask(address, 0.5)
        if metrics and metrics.process_id == child.process.id and child.is_pid(metrics.pid):
            child.ready_ms = (time.monotonic() - child.began) * 1000
            return
        given_up.wait(0.05)


def _why_not(child: Child) -> str:
    code = child.popen.poll()
    if code is None:
        waited_s = time.monotonic() - child.began
        what = f"does not serve on {child.process.address} after {waited_s:.0f} s"
    else:
        what = f"ended with exit code {code}"
    told = child.files.out if child.files.out.stat().st_size else child.files.log
    lines = last_lines(told)
    end_of = f"; the end of {shown(told)}:" if lines else "; it wrote nothing"
    return "\n".join([f"process {child.process.id} {what}{end_of}", *(f"    {n}" for n in lines)])


def _start_rows(
    topology: Topology,
    chosen: Iterable[Process],
    running: Mapping[str, Record],
    children: Iterable[Child],
) -> Iterator[Sequence[object]]:
    yield ("id", "role", "team", "address", "pid", "ready", "log")
    started = {child.process.id: child for child in children}
    for process in chosen:
        if process.id in running:
            pid, ready = running[process.id].pid, "already running"
        else:
            pid, ready = started[process.id].record.pid, f"{started[process.id].ready_ms:.0f} ms"
        log = shown(Files.of(topology, process).log)
        at = names.look_up(process.bind or process.host).shown(process.listen_address)
        yield process.id, process.role, process.team, at, pid, ready, log


def _notes(
    topology: Topology, running: Mapping[str, Record], silent: Sequence[str]
) -> Iterator[str]:
    """What is wrong with those that ran before."""
    for process_id, record in running.items():
        process = topology.processes[process_id]
        metrics = None if process_id in silent else ask(asking_address(process))
        if record.port != process.port or (metrics and metrics.config_digest != topology.digest):
            yield (
                f"process {process_id} was started before {topology.name} was changed; "
                f"stop and start it to use the new one"
            )
        elif process_id in silent:
            yield f"process {process_id} runs as pid {record.pid} but does not answer"


# stop


def stop(config: Path, ids: Sequence[str] = (), grace_s: float | None = None) -> int:
    try:
        topology = load(config)
    except ConfigError as error:
        # What runs must be stoppable, also when the file was broken or removed since.
        print(error, file=sys.stderr)
        topology = Topology({}, folder=config.parent, name=config.name)
    found = {record.id: (path, record) for path, record in _own_records(topology, config)}
    for process_id in ids:
        if process_id not in found:
            topology.process(process_id)  # raises for an id that is not in the file
    asked = [found[n] for n in (ids or found) if n in found]
    if grace_s is None:
        grace_s = topology.limits.drain_grace_s + GRACE_MARGIN_S
    ends = end([record for _, record in asked], grace_s)
    for path, _ in asked:
        path.unlink(missing_ok=True)
    if asked:
        rows = [(record.id, record.pid, ends[record.id]) for _, record in asked]
        print_table([("id", "pid", "end"), *rows])
    else:
        print(f"nothing is running that was started here from {shown(config)}")
    if any(_is_bad_end(how) for how in ends.values()):
        return 1
    return 0 if asked or topology.processes else 2


def _is_bad_end(how: str) -> bool:
    return LEFT_BEHIND in how or how.startswith("killed")


# restart


def restart(
    config: Path, ids: Sequence[str] = (), grace_s: float | None = None, wait_s: float = WAIT_S
) -> int:
    """Restarts what runs here, or the named ones: the workers first and the leader last.

    The next one's turn comes when the last one serves and its neighbours see it; when one does not
    come back, the others stay as they are.
    """
    given_up = end_on_signal()
    topology = load(config)
    if grace_s is None:
        grace_s = topology.limits.drain_grace_s + GRACE_MARGIN_S
    found = {record.id: record for _, record in _own_records(topology, config) if record.process()}
    chosen = [topology.process(n) for n in dict.fromkeys(ids or found)]
    if not chosen:
        print(f"nothing is running that was started here from {shown(config)}")
        return 0
    for process in sorted(chosen, key=lambda process: process.rank):
        if given_up.is_set():
            print("interrupted; the others were not touched", file=sys.stderr)
            return 130
        if not _restart_one(topology, config, process, found.get(process.id), grace_s, wait_s):
            return 1
    return 0


def _restart_one(
    topology: Topology,
    config: Path,
    process: Process,
    record: Record | None,
    grace_s: float,
    wait_s: float,
) -> bool:
    given_up = threading.Event()  # half a restart helps nobody: Ctrl-C waits for its end
    before = ask(asking_address(process)) if record else None
    away = _not_linked(before) if before else {n.id for n in topology.below(process.id)}
    ended = end([record], grace_s, False)[process.id] if record else "was not running"
    try:
        child = _spawn(topology, config, process)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return _stays_down(process)
    wait_until_ready([child], wait_s, given_up)
    if child.ready_ms is None:
        report_failure([child])
        return _stays_down(process)
    unseen = _wait_until_seen(topology, process, away)
    print(
        f"{process.id}  {ended}, serves again after {child.ready_ms:.0f} ms, pid {child.popen.pid}"
    )
    for sentence in unseen:
        print(f"process {process.id}: {sentence}; the others were not touched", file=sys.stderr)
    return not unseen


def _stays_down(process: Process) -> bool:
    print(f"process {process.id} is down; the others were not touched", file=sys.stderr)
    return False


def _wait_until_seen(
    topology: Topology, process: Process, away: set[str], wait_s: float = LINK_S
) -> list[str]:
    """Waits until its neighbours see it, and it sees those it saw before; what is amiss then.

    away: whom it need not see. A neighbour that does not answer is not waited for.
    """
    above = topology.above(process.id)
    until = time.monotonic() + wait_s
    while True:
        amiss = [
            f"{n.id} does not see it"
            for n in above
            if (metrics := ask(asking_address(n))) and process.id in _not_linked(metrics)
        ]
        own = ask(asking_address(process))
        missed = sorted(_not_linked(own) - away) if own else []
        amiss += [f"it does not see {n} any more" for n in missed]
        if own and not amiss:
            return []
        if time.monotonic() > until:
            return amiss or ["it does not answer any more"]
        time.sleep(0.1)


def end(ended: Sequence[Record], grace_s: float, for_good: bool = True) -> dict[str, str]:
    """Ends these processes with their children. Returns for each id how it went.

    The leader first and the workers last, so that what is in service is still answered. Each rank
    has grace_s; what is left then is killed. for_good: they are not started again at once, so that
    no request has to wait for them.
    """
    said: dict[str, str] = {}
    for rank in sorted({record.rank for record in ended}, reverse=True):
        tier = [record for record in ended if record.rank == rank]
        said |= _end_tier(tier, grace_s, for_good)
    return said


def _end_tier(tier: Sequence[Record], grace_s: float, for_good: bool) -> dict[str, str]:
    began = time.monotonic()
    said = {record.id: "had ended before" for record in tier}
    alive = [record for record in tier if record.process()]
    for record in alive:
        _ask_to_end(record, for_good)
    while alive and time.monotonic() - began < grace_s:
        for record in [record for record in alive if not record.process()]:
            alive.remove(record)
            how = f"stopped in {time.monotonic() - began:.1f} s"
            said[record.id] = how + _left_behind(record)
        time.sleep(0.02)
    said |= {record.id: f"killed after {grace_s:g} s" for record in alive}
    _kill(tier)
    for record in tier:
        record.stop.remove()
    return said


def _left_behind(record: Record) -> str:
    """What a process says at its end of requests that did not end in time, in words."""
    left = record.stop.left
    return f", {left} request{'s' if left > 1 else ''} {LEFT_BEHIND}" if left > 0 else ""


def _ask_to_end(record: Record, for_good: bool) -> None:
    with contextlib.suppress(OSError):  # then it may be back, or is killed in the end
        record.stop.ask(for_good)
    if os.name == "nt":
        return  # no signal reaches a process in another console
    if process := record.process():
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            process.terminate()  # sooner than it looks for the file


def _kill(tier: Sequence[Record], within_s: float = 5.0) -> None:
    """Kills what is left of these: the stuck ones, and children that a pool left behind."""
    until = time.monotonic() + within_s
    while (left := _family(tier)) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)  # and look again: one may just have started another


def _family(tier: Sequence[Record]) -> list[psutil.Process]:
    """The processes themselves, their children, and what children a killed one left behind."""
    tokens = {record.token for record in tier}
    found = {process for process in psutil.process_iter() if _token_of(process) in tokens}
    for record in tier:
        if process := record.process():
            with contextlib.suppress(psutil.Error):
                found |= {process, *process.children(recursive=True)}
    return list(found)


def _token_of(process: psutil.Process) -> str | None:
    try:
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if zombie else process.environ().get(TOKEN)
    except (psutil.Error, OSError):
        return None  # another user's, or gone


# status


def status(config: Path) -> int:
    topology = load(config)
    processes = list(topology.processes.values())
    with ThreadPoolExecutor(len(processes), "launcher-ask") as pool:
        answers = list(pool.map(ask, map(asking_address, processes)))
    rows = [("id", "role", "team", "address", "pid", "in service", "waiting", "state")]
    fine = True
    for process, metrics in zip(processes, answers, strict=True):
        record = Record.read(Files.of(topology, process).pid)
        state, serves = _state(topology, process, record, metrics)
        fine = fine and (serves or not (record or is_here(process)))
        at = names.look_up(process.host).shown(process.address)
        place = (process.id, process.role, process.team, at)
        rows.append((*place, *_figures(record, metrics), state))
    print_table(rows)
    return 0 if fine else 1


def _figures(record: Record | None, metrics: Any) -> tuple[str, str, str]:
    """(pid, in service, waiting)"""
    if metrics is None:
        return (str(record.pid) if record else "", "", "")
    return (
        str(metrics.pid),
        f"{metrics.active_requests}/{metrics.max_capacity}",
        f"{metrics.queue_size}/{metrics.queue_slots}",
    )


def _state(
    topology: Topology, process: Process, record: Record | None, metrics: Any
) -> tuple[str, bool]:
    """(what to say of it, whether it serves)"""
    alive = record is not None and record.process() is not None
    if metrics and metrics.process_id != process.id:
        return f"process {metrics.process_id} answers at its address", False
    if metrics and not metrics.is_healthy:
        return "stopping", False
    if metrics:
        said = "serves" if alive or not is_here(process) else "serves, not started here"
        away = ", ".join(sorted(_not_linked(metrics)))
        return (f"{said}; no link to {away}" if away else said), True
    if alive:
        return "runs but does not answer", False
    if record and record.stop.is_there:
        return f"stopped{_left_behind(record) or ' in order'}", False
    if record:
        return _how_it_died(topology, process, record), False
    return ("not running" if is_here(process) else "no answer"), False


def _how_it_died(topology: Topology, process: Process, record: Record) -> str:
    """As far as can be known of a process that was not stopped: who is killed says nothing."""
    files = Files.of(topology, process)
    if psutil.boot_time() > record.create_time + SAME_START_S:
        return "died with this machine, which was started anew since"
    printed = [line for line in last_lines(files.out) if line.strip()]
    if printed and SERVES not in printed[-1]:  # a traceback, or Python's last words
        return f"died: {printed[-1].strip()[:100]}; {shown(files.out)} tells more"
    logged = last_lines(files.log)
    since_start = itertools.takewhile(lambda line: SERVES not in line, reversed(logged))
    if any(STOPS in line for line in since_start):
        return f"died while it was stopping; {shown(files.log)} tells more"
    when = f" after {logged[-1][:19]}" if logged else ""
    return f"died: killed without a word{when}, as by kill -9, for lack of memory or in native code"


# This machine


def _hosts(topology: Topology) -> str:
    hosts: dict[str, list[str]] = {}
    for process in topology.processes.values():
        hosts.setdefault(process.bind or process.host, []).append(process.id)
    return ", ".join(f"{_host(host)} ({', '.join(ids)})" for host, ids in hosts.items())


def _host(host: str) -> str:
    found = names.look_up(host)
    return found.shown() if found.addresses else f"{host}, a name that this machine does not know"


def ask(address: str, timeout_s: float = ANSWER_S) -> Any:
    """The metrics of the process at the address, or None when it does not answer."""
    # Not through the client library: that waits for a connection, here a refused one is an answer.
    with Channel(address) as channel:
        node = codec.pb2_grpc.OverlayNodeStub(channel)
        try:
            return node.GetMetrics(codec.pb2.MetricsRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None


# Pid files


def log_folders(topology: Topology) -> list[Path]:
    dirs = {process.log_dir for process in topology.processes.values()} or {"logs"}
    return [topology.folder / log_dir for log_dir in sorted(dirs)]


def records(folder: Path) -> list[Record]:
    return [record for path in folder.glob("process_*.pid") if (record := Record.read(path))]


def _all_records(topology: Topology) -> Iterator[tuple[Path, Record]]:
    for folder in log_folders(topology):
        for path in folder.glob("process_*.pid"):
            if record := Record.read(path):
                yield path, record


def _own_records(topology: Topology, config: Path) -> Iterator[tuple[Path, Record]]:
    return (
        (path, record)
        for path, record in _all_records(topology)
        if _same_file(record.config, config)
    )


def _same_file(one: str, other: Path) -> bool:
    return os.path.normcase(one) == os.path.normcase(other)


# Words


def find(config: str) -> Path:
    """The configuration as named from here, else from the project's folder."""
    here, there = Path(config).absolute(), ROOT / config
    return (here if here.exists() or not there.exists() else there).resolve()


def last_lines(path: Path, count: int = 10) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.strip().splitlines()[-count:]


def shown(path: Path) -> str:
    """As short as can be typed from here."""
    path = Path(os.path.abspath(path))  # not resolved: the Python of a .venv is a link
    text = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f'"{text}"' if " " in text else text


def command(verb: str) -> str:
    python = "py" if os.name == "nt" else "python3"
    return f"{python} {shown(ROOT / 'scripts' / 'run.py')} {verb}"


def print_table(rows: Iterable[Sequence[object]]) -> None:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def end_on_signal() -> threading.Event:
    """An event that Ctrl-C, a closed terminal and the like set from now on."""
    asked = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: asked.set())
    when_console_ends(lambda grace_s: asked.set())
    return asked


def say_safely() -> None:
    """Output must not die on a console's code page."""
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)  # as stdio has completed them
        stream.reconfigure(errors="replace")


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser, of_verbs = _parsers()
    asked, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse would name the help of all verbs, which has no options
        of_verbs[asked.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    return asked


def _parsers() -> tuple[Parser, Mapping[str, Parser]]:
    parser = Parser("run.py", "Starts, stops and shows this machine's processes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, about in (
        ("start", "start this machine's processes, or the named ones"),
        ("stop", "stop what start started, or the named ones"),
        ("restart", "restart what start started, or the named ones, one after another"),
        ("status", "show who serves"),
    ):
        sub = verbs.add_parser(verb, help=about, description=about)
        sub.add_argument("config", metavar="CONFIG", help="for example two_hosts_config.json")
        if verb != "status":
            sub.add_argument("ids", metavar="ID", nargs="*", default=[], help="for example A B")
        if verb in ("start", "restart"):
            wait = f"seconds for a process to serve (default {WAIT_S:.0f})"
            sub.add_argument("--wait-s", type=float, default=WAIT_S, metavar="S", help=wait)
        if verb in ("stop", "restart"):
            grace = "seconds before a process is killed (default: its drain_grace_s and 5 more)"
            sub.add_argument("--grace-s", type=float, default=None, metavar="S", help=grace)
    return parser, verbs.choices


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
