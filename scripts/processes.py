"""The processes of a configuration on this machine: their files, starting them, ending them.

Beside the log of process A (process_a.log) lie process_a.out, what it printed; process_a.pid, which
process it is; and process_a.stop while it stops and after it has ended by itself, with the number
of requests that it left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil

from overlay.cli.terminal import join_all
from overlay.model.errors import ConfigError
from overlay.model.topology import Process, Topology
from overlay.server.shutdown import StopFile
from overlay.transport import codec
from overlay.transport.channels import Channel, split
from overlay.transport.machine import asking_address
from overlay.transport.resolver import look_up
from overlay.transport.tls_check import tls_problem

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

ROOT = Path(__file__).resolve().parent.parent
SAME_START_S = 2.0  # a correction of the clock moves a start time by no more than that
SERVES = " serves on "  # in the line that a process prints and logs once it serves
STOPS = " INFO stopping: "  # in the line that it logs when it begins to stop
LEFT_BEHIND = "left behind"  # of requests, by a process that stopped
GRACE_MARGIN_S = 5.0  # a process that keeps its own drain_grace_s is not killed
LINK_S = 10.0  # for processes that serve to find each other; they try at least once a second
ANSWER_S = 2.0  # for GetMetrics, which answers at once even under load
TOKEN = "OVERLAY_LAUNCH"  # in the environment of a process and of all its children
# A handler's prints reach the .out file whole, also those just before a crash.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


# Files


class Files:
    """The log, and what lies beside it."""

    def __init__(self, topology: Topology, process: Process) -> None:
        stem = str(topology.folder / process.log_dir / f"process_{process.id.lower()}")
        self.log, self.out = Path(stem + ".log"), Path(stem + ".out")
        self.pid, self.stop = Path(stem + ".pid"), Path(stem + ".stop")


@dataclass(frozen=True)
class Record:
    """A pid file: which process was started, for which configuration.

    The pid counts only together with the start time: the system may since have given the same
    number to another program, which must not be touched.
    """

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
        """None when there is no such file, or it is not a pid file of ours."""
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            return replace(record, pid=int(record.pid), create_time=float(record.create_time))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(beside, path)

    def is_of(self, topology: Topology) -> bool:
        return os.path.normcase(self.config) == os.path.normcase(config_of(topology))

    @property
    def stop(self) -> StopFile:
        return StopFile(Path(self.stop_file))

    def process(self) -> psutil.Process | None:
        """The very process that was started, while it lives."""
        try:
            found = psutil.Process(self.pid)
            is_same = abs(found.create_time() - self.create_time) <= SAME_START_S
            return found if is_same and found.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError, OverflowError):
            return None


def config_of(topology: Topology) -> Path:
    return topology.folder / topology.name


def record_of(topology: Topology, process: Process) -> Record | None:
    return Record.read(Files(topology, process).pid)


def records(topology: Topology) -> Iterator[tuple[Path, Record]]:
    """All pid files in its log folders, also those of other configurations."""
    names = {process.log_dir for process in topology.processes.values()} or {"logs"}
    for name in sorted(names):
        for path in (topology.folder / name).glob("process_*.pid"):
            if record := Record.read(path):
                yield path, record


def left_behind(record: Record) -> str:
    """The requests that a stopping process did not finish in time, in words."""
    left = record.stop.left
    return f", {left} request{'s' if left > 1 else ''} {LEFT_BEHIND}" if left > 0 else ""


def how_it_ended(record: Record, files: Files) -> tuple[str, str]:
    """The state of a process that is gone, in a word, and a sentence about its end."""
    if record.stop.is_there:
        return "stopped", f"it stopped{left_behind(record) or ' in order'}"
    return "died", _how_it_died(record, files)


def _how_it_died(record: Record, files: Files) -> str:
    """As far as that can be known: a process that is killed says nothing."""
    if psutil.boot_time() > record.create_time + SAME_START_S:
        return "this machine was restarted while it ran"
    printed = [line for line in last_lines(files.out) if line.strip()]
    if printed and SERVES not in printed[-1]:  # a traceback, or Python's last words
        return f"it died with: {printed[-1].strip()[:100]}; {shown(files.out)} has the rest"
    logged = last_lines(files.log)
    since_start = itertools.takewhile(lambda line: SERVES not in line, reversed(logged))
    if any(STOPS in line for line in since_start):
        return f"it died while it was stopping; see {shown(files.log)}"
    when = f" after {logged[-1][:19]}" if logged else ""
    return f"it died without a message{when}: kill -9, lack of memory or a crash in native code"


def last_lines(path: Path, count: int = 10) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.strip().splitlines()[-count:]


# Starting


class Refused(Exception):
    """Nothing was begun. The message says why and what to do."""


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
        """Whether this is its pid: on Windows a venv's Python runs as a child of itself."""
        with contextlib.suppress(psutil.Error):
            return self.popen.pid in (pid, psutil.Process(pid).ppid())
        return False


def launch(
    topology: Topology,
    chosen: Iterable[Process],
    children: list[Child],
    given_up: threading.Event,
) -> list[str]:
    """Starts the chosen ones that do not run yet and adds them to children, one by one.

    Returns the ids of those that ran before. Raises Refused, also when some were started.
    """
    _check_folders(topology)
    running = []
    for process in chosen:
        record = record_of(topology, process)
        if record and record.process():
            running.append(process.id)
        elif not given_up.is_set():
            children.append(spawn(topology, process))
    return running


def _check_folders(topology: Topology) -> None:
    """Raises Refused when live processes of another configuration write to the same folder."""
    for path, record in records(topology):
        if not record.is_of(topology) and record.process():
            other = shown(Path(record.config))
            raise Refused(
                f"{shown(path.parent)} is in use: process {record.id} of {other} runs as pid "
                f"{record.pid}; stop it ({command('stop')} {other}) or give {topology.name} "
                f'a "log_dir" of its own'
            )


def spawn(topology: Topology, process: Process) -> Child:
    files, config = Files(topology, process), str(config_of(topology))
    stop_file, token = str(files.stop), secrets.token_hex(8)
    call = [sys.executable, str(ROOT / "node.py"), config, process.id, "--stop-file", stop_file]
    popen = None
    try:
        files.log.parent.mkdir(parents=True, exist_ok=True)
        files.stop.unlink(missing_ok=True)
        files.pid.unlink(missing_ok=True)
        began = time.monotonic()
        with files.out.open("wb") as out:
            popen = subprocess.Popen(
                call,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, TOKEN: token},
                **apart(),
            )
        started = popen.pid, create_time(popen.pid), process.port
        record = Record(process.id, process.rank, *started, config, stop_file, token)
        record.write(files.pid)
    except OSError as e:
        if popen:
            popen.kill()
            popen.wait()
        what = shown(Path(e.filename or sys.executable))
        raise Refused(f"process {process.id} cannot be started: {what}: {e.strerror}") from None
    return Child(process, files, record, popen, began)


def apart() -> dict[str, Any]:
    """For a process group of its own: Ctrl-C and closing this terminal do not reach the child."""
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        return {"creationflags": flags}
    return {"start_new_session": True}


def create_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0  # it has ended already


def wait_until_ready(
    children: Sequence[Child],
    wait_s: float,
    given_up: threading.Event,
    credentials: Credentials | None,
) -> None:
    """Fills in ready_ms of each child that serves within wait_s; all are asked in parallel."""
    until = time.monotonic() + wait_s
    jobs = [(child, until, given_up, credentials) for child in children]
    threads = [threading.Thread(target=_wait_for, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    join_all(threads, wait_s + 1)


def _wait_for(
    child: Child, until: float, given_up: threading.Event, credentials: Credentials | None
) -> None:
    while time.monotonic() < until and child.popen.poll() is None and not given_up.is_set():
        metrics = ask(child.process, credentials, 0.5)
        if metrics and metrics.process_id == child.process.id and child.is_pid(metrics.pid):
            child.ready_ms = (time.monotonic() - child.began) * 1000
            return
        given_up.wait(0.05)


def wait_until_linked(
    children: Sequence[Child],
    given_up: threading.Event,
    credentials: Credentials | None,
    wait_s: float = LINK_S,
) -> None:
    """Waits until the started ones are connected with each other: then a request reaches all.

    Neighbours on other machines may come at any time.
    """
    ours = {child.process.id for child in children}
    until = time.monotonic() + wait_s
    while not given_up.wait(0.1) and time.monotonic() < until:
        answers = [ask(child.process, credentials) for child in children]
        if all(answer and not ours & not_linked(answer) for answer in answers):
            return


def not_linked(metrics: Any) -> set[str]:
    return {n.process_id for n in metrics.neighbours if n.state != "up"}


def ask(process: Process, credentials: Credentials | None, timeout_s: float = ANSWER_S) -> Any:
    """The metrics of what answers at its address, or None when nothing does.

    With credentials, only that process itself answers.
    """
    # Not through the client library: that waits for a connection, here a refused one is an answer.
    address = asking_address(process)
    keys = credentials and _keys_for(process, credentials)
    with Channel(address, credentials=keys, process_id=process.id) as channel:
        node = codec.pb2_grpc.OverlayNodeStub(channel)
        try:
            return node.GetMetrics(codec.pb2.MetricsRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None


def _keys_for(process: Process, credentials: Credentials) -> Credentials:
    """A process of this machine is asked with its own certificate: the user's may be revoked."""
    try:
        return credentials.of_process(credentials.folder.path, process.id)
    except ConfigError:  # it is on another machine, or says itself what is wrong with its own
        return credentials


def report_failure(children: Sequence[Child], credentials: Credentials | None) -> None:
    """Prints why the failed ones failed, and stops the others: half a start is of no use."""
    for child in children:
        if child.ready_ms is None:
            print(_why_not(child, credentials), file=sys.stderr)
    take_back(children)
    if good := [child.process.id for child in children if child.ready_ms is not None]:
        were = "was" if len(good) == 1 else "were"
        print(f"{', '.join(good)} did start and {were} stopped again", file=sys.stderr)


def _why_not(child: Child, credentials: Credentials | None) -> str:
    code = child.popen.poll()
    what = f"ended with exit code {code}"
    if code is None:
        waited_s = time.monotonic() - child.began
        what = f"does not serve on {child.process.address} after {waited_s:.0f} s"
        if problem := _tls_problem(child.process, credentials):
            what += f": {problem}"
    written = child.files.out if child.files.out.stat().st_size else child.files.log
    lines = last_lines(written)
    end_of = f"; the end of {shown(written)}:" if lines else "; it wrote nothing"
    return "\n    ".join([f"process {child.process.id} {what}{end_of}", *lines])


def _tls_problem(process: Process, credentials: Credentials | None) -> str:
    """Why it and this user do not come together over TLS; empty when that is not the reason."""
    if credentials is None:
        return ""
    host, port = split(asking_address(process))
    return tls_problem(look_up(host).addresses, port, credentials, process.id)


def take_back(children: Sequence[Child]) -> None:
    """Ends what this call has started and removes its pid files."""
    end([child.record for child in children], GRACE_MARGIN_S)
    for child in children:
        child.popen.wait()
        child.files.pid.unlink(missing_ok=True)


# Ending


def end(ended: Sequence[Record], grace_s: float, for_good: bool = True) -> dict[str, str]:
    """Ends these processes with their children. Returns for each id how it went.

    The leader first and the workers last, so that requests in service are still answered. Each rank
    has grace_s; what is left then is killed. for_good: they are not started again at once, so no
    request waits for them.
    """
    ends: dict[str, str] = {}
    for rank in sorted({record.rank for record in ended}, reverse=True):
        tier = [record for record in ended if record.rank == rank]
        ends |= _end_tier(tier, grace_s, for_good)
    return ends


def _end_tier(tier: Sequence[Record], grace_s: float, for_good: bool) -> dict[str, str]:
    began = time.monotonic()
    ends = {record.id: "had ended before" for record in tier}
    alive = [record for record in tier if record.process()]
    for record in alive:
        _ask_to_end(record, for_good)
    while alive and time.monotonic() - began < grace_s:
        for record in [record for record in alive if not record.process()]:
            alive.remove(record)
            took_s = time.monotonic() - began
            ends[record.id] = f"stopped in {took_s:.1f} s{left_behind(record)}"
        time.sleep(0.02)
    ends |= {record.id: f"killed after {grace_s:g} s" for record in alive}
    _kill(tier)
    for record in tier:
        record.stop.remove()
    return ends


def _ask_to_end(record: Record, for_good: bool) -> None:
    with contextlib.suppress(OSError):  # it may then be expected back, or is killed in the end
        record.stop.ask(for_good)
    if os.name == "nt" and record.rank >= 0:
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
    """The processes themselves, their children, and the children of those already killed."""
    tokens = {record.token for record in tier}
    found = {process for process in psutil.process_iter() if _token_of(process) in tokens}
    for record in tier:
        if process := record.process():
            with contextlib.suppress(psutil.Error):
                found |= {process, *process.children(recursive=True)}
    return list(found)


def _token_of(process: psutil.Process) -> str | None:
    try:
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if is_zombie else process.environ().get(TOKEN)
    except (psutil.Error, OSError):
        return None  # another user's, or gone


# Words


def shown(path: Path) -> str:
    """The shortest form that can be typed from the current folder."""
    path = Path(os.path.abspath(path))  # not resolved: the Python of a .venv is a link
    text = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f'"{text}"' if " " in text else text


def command(verb: str) -> str:
    python = "py" if os.name == "nt" else "python3"
    return f"{python} {shown(ROOT / 'scripts' / 'run.py')} {verb}"
