"""The faults: each is a function of a Stage, and undoes what it did before it returns.

What it does to a process is recorded with its times, so that the checker knows which processes
could not answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import psutil

from faults import crowd
from faults import strangers as strange
from faults.checker import REFUSED
from faults.history import ENDED_LANE, Answer, Call, Fault
from faults.load import Notes
from faults.overlays import Overlay
from overlay.transport import codec as wire
from overlay.transport.codec import pb2
from tests.harness.hosts import Wire
from tests.harness.leaders import holder, leaders_in
from tests.harness.machine import ROOT, until
from tests.harness.nats_servers import NatsServers
from tests.harness.ways import Call as Sent
from tests.harness.ways import Lane, Outcome

LONG_S = 5.0  # longer than it takes to notice a dead peer
TAKEOVER_S, HOLDER_S = 8.0, 30.0  # longer than it takes another leader to have the jobs
CLOCK_STEPS_S = (3600, -3600, 0)  # offsets from the true time
CROWD_KEY = 10_000_000
NAMES_KEY, NAMES_S = 30_000_000, 3
OVERSTAY_KEY, OVERSTAYING, OVERSTAY_S = 50_000_000, 20, 5


@dataclass
class Stage:
    """What a fault may touch. wire: if a process has its own host. servers: if several leaders keep
    their jobs there.

    seconds: how long the load lasts, at least until the fault is undone. freeze_s: None means as
    long as other faults.
    """

    overlay: Overlay
    notes: Notes
    rng: random.Random
    seconds: float
    freeze_s: float | None = None
    wire: Wire | None = None
    servers: NatsServers | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def long_s(self) -> float:
        """The duration of a fault that neighbours must notice."""
        return max(LONG_S, self.seconds / 2)

    @contextlib.contextmanager
    def fault(self, what: str, process: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.faults.append(Fault(what, process, begin, time.monotonic()))


Breaking = Callable[[Stage], None]


def nothing(stage: Stage) -> None:
    """The load alone."""


def kill(process: str, times: int = 2) -> Breaking:
    """kill -9 and restart, `times` times."""

    def play(stage: Stage) -> None:
        for _ in range(times):
            with stage.fault("kill", process):
                stage.overlay.kill(process)
                time.sleep(0.3)
                stage.overlay.serve(process)
            stage.overlay.settle()
            time.sleep(stage.rng.uniform(0.2, 0.6))

    return play


def _in_turn(breakings: Sequence[Breaking]) -> Breaking:
    def play(stage: Stage) -> None:
        for one in breakings:
            one(stage)

    return play


def kill_each(*processes: str) -> Breaking:
    """kill -9 of one after another."""
    return _in_turn([kill(process, times=1) for process in processes])


def kill_all(stage: Stage) -> None:
    """kill -9 of every process at once."""
    overlay = stage.overlay
    with contextlib.ExitStack() as broken:
        for process in overlay.ids:
            broken.enter_context(stage.fault("kill", process))
        for process in overlay.ids:
            overlay.kill(process)
        overlay.serve()
    overlay.settle()


def restart(process: str, times: int = 3) -> Breaking:
    """SIGTERM and restart, `times` times."""

    def play(stage: Stage) -> None:
        for _ in range(times):
            with stage.fault("restart", process):
                stage.overlay.stop_one(process)
                stage.overlay.serve(process)
            stage.overlay.settle()
            time.sleep(stage.rng.uniform(0.2, 0.6))

    return play


def restart_each(*processes: str) -> Breaking:
    """SIGTERM and restart, one after another."""
    return _in_turn([restart(process, times=1) for process in processes])


def freeze(process: str) -> Breaking:
    """SIGSTOP, a few seconds, SIGCONT."""

    def play(stage: Stage) -> None:
        with stage.fault("freeze", process):
            stage.overlay.signal(process, signal.SIGSTOP)
            try:
                time.sleep(stage.freeze_s or stage.long_s)
            finally:
                stage.overlay.signal(process, signal.SIGCONT)

    return play


def kill_holder(stage: Stage) -> None:
    """kill -9 of the leader that has the jobs and of the server beside it, until another has them,
    and restart; twice."""
    overlay, servers = stage.overlay, stage.servers
    assert servers is not None
    for _ in range(2):
        process = _holder(overlay)
        number = leaders_in(overlay.config).index(process)
        with stage.fault("kill", process):
            overlay.kill(process)
            servers.kill(number)
            _holder(overlay)
            servers.start(number)
            servers.wait()
            overlay.serve(process)
        overlay.settle()
        time.sleep(stage.rng.uniform(0.2, 0.6))


def freeze_holder(stage: Stage) -> None:
    """SIGSTOP of the leader that has the jobs, for as long as it takes another to have them."""
    freeze(_holder(stage.overlay))(replace(stage, freeze_s=max(stage.long_s, TAKEOVER_S)))
    _holder(stage.overlay)


def restart_leaders(stage: Stage) -> None:
    """SIGTERM and restart of one leader after another."""
    restart_each(*leaders_in(stage.overlay.config))(stage)


def lose_majority(stage: Stage) -> None:
    """kill -9 and restart of two of the three servers."""
    servers = stage.servers
    assert servers is not None
    with stage.fault("majority", _holder(stage.overlay)):
        for number in (0, 1):
            servers.kill(number)
        try:
            time.sleep(stage.long_s)
        finally:
            for number in (0, 1):
                servers.start(number)
            servers.wait()
        _holder(stage.overlay)


def _holder(overlay: Overlay) -> str:
    """The leader that has the jobs, as soon as one has. Raises NotReached."""

    def look() -> str:
        with contextlib.suppress(grpc.RpcError):
            return holder(overlay)
        return ""

    return str(until(look, HOLDER_S, "a leader has the jobs"))


def cut(process: str) -> Breaking:
    """No packet reaches or leaves its host."""
    return _apart("cut", process, Wire.cut, Wire.heal)


def deaf(process: str) -> Breaking:
    """No packet reaches its host; those that it sends arrive."""
    return _apart("deaf", process, lambda wire: wire.deafen(2), lambda wire: wire.undeafen(2))


def mute(process: str) -> Breaking:
    """No packet from its host arrives; it receives those of the others."""
    return _apart("mute", process, lambda wire: wire.deafen(1), lambda wire: wire.undeafen(1))


def _apart(
    what: str, process: str, part: Callable[[Wire], None], join: Callable[[Wire], None]
) -> Breaking:
    def play(stage: Stage) -> None:
        assert stage.wire is not None
        with stage.fault(what, process):
            part(stage.wire)
            try:
                time.sleep(stage.long_s)
            finally:
                join(stage.wire)

    return play


def half_open(process: str) -> Breaking:
    """It is killed behind a cut link, so that its connections are never closed."""

    def play(stage: Stage) -> None:
        assert stage.wire is not None
        with stage.fault("half open", process):
            stage.wire.cut()
            try:
                stage.overlay.kill(process)
                time.sleep(stage.long_s)
            finally:
                stage.wire.heal()
            stage.overlay.serve(process)

    return play


def clock_steps(process: str) -> Breaking:
    """Its wall clock, from `own_clock`, jumps an hour forward, two hours back, and is reset."""

    def play(stage: Stage) -> None:
        with stage.fault("clock", process):
            for off_s in CLOCK_STEPS_S:
                set_clock(clock_file(stage.overlay, process), off_s)
                time.sleep(stage.long_s / len(CLOCK_STEPS_S))

    return play


def corrupt_configuration(process: str) -> Breaking:
    """Half of the file is lost: running processes continue, but a restart fails."""

    def play(stage: Stage) -> None:
        overlay = stage.overlay
        whole = overlay.path.read_text(encoding="utf-8")
        with stage.fault("configuration", process):
            try:
                _put(overlay.path, whole[: len(whole) // 2])
                time.sleep(1)
                overlay.stop_one(process)
                overlay.spawn(process)
                overlay.wait(process, [REFUSED])
                time.sleep(stage.long_s / 2)
            finally:
                _put(overlay.path, whole)
            overlay.serve(process)

    return play


def restart_all(stage: Stage) -> None:
    """SIGTERM and restart, one process after another, workers first."""
    for process in reversed(stage.overlay.ids):
        with stage.fault("restart", process):
            stage.overlay.stop_one(process)
            stage.overlay.serve(process)
        stage.overlay.settle()


def taken_port(process: str) -> Breaking:
    """Its port is taken while it is down: the restart must fail with a reason."""

    def play(stage: Stage) -> None:
        overlay = stage.overlay
        with stage.fault("taken port", process):
            overlay.kill(process)
            with _silent_listener(overlay.port(process)):
                overlay.spawn(process)
                overlay.wait(process, [REFUSED])
                time.sleep(1)  # so that neighbours connect to the listener
            overlay.serve(process)

    return play


def vanish(stage: Stage, count: int = 1000) -> None:
    """Clients in a process that is killed while their calls are in flight."""
    address, began = stage.overlay.address("A"), time.monotonic()
    with stage.fault("crowd", "A"):
        command = [sys.executable, "-m", "faults.crowd", address, str(count), str(CROWD_KEY)]
        crowd_process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert crowd_process.stdout is not None
        try:
            crowd_process.stdout.readline()
            until(lambda: _in_flight(stage.overlay, "A") > 0.9 * count, 15, "all calls in flight")
        finally:
            crowd_process.kill()
            crowd_process.wait(10)
            crowd_process.stdout.close()
            for key in range(CROWD_KEY, CROWD_KEY + count):
                deadline = time.monotonic() + crowd.TIMEOUT_S  # at the latest
                call = Call(key, key, began, began, deadline, "any", "unary", vanishes=True)
                stage.notes.calls.append(call)


def _in_flight(overlay: Overlay, process: str) -> int:
    metrics = overlay.metrics(process)
    return metrics.queue_size + metrics.active_requests


def degrade(process: str, **how: float) -> Breaking:
    """A worker that is slow (slower=10) or sometimes hangs (hangs=0.3, hang_s=4)."""

    def play(stage: Stage) -> None:
        path = stage.overlay.folder / f"degraded-{process}.json"
        with stage.fault("degraded", process):
            _put(path, json.dumps(how))
            time.sleep(stage.seconds / 2)
            path.unlink()

    return play


def garbage(process: str) -> Breaking:
    """Connections that send nothing, half a preface or garbage, and stay open."""

    def play(stage: Stage) -> None:
        payloads = (b"", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096))
        with stage.fault("garbage", process), contextlib.ExitStack() as open_ones:
            until_ = time.monotonic() + stage.seconds / 2
            for i in range(80):
                address = ("127.0.0.1", stage.overlay.port(process))
                each = open_ones.enter_context(socket.create_connection(address, timeout=5))
                with contextlib.suppress(OSError):  # the server may have closed it
                    each.sendall(payloads[i % len(payloads)])
            time.sleep(max(0.0, until_ - time.monotonic()))

    return play


def strangers(stage: Stage) -> None:
    """Every attack that only needs a port, at once, on the leader and the team leaders."""
    overlay, source = stage.overlay, strange.source()
    echo = pb2.Request(payload=b"x", mode=pb2.ANY, handler="echo")
    keyed = pb2.Request(payload=b"x", mode=pb2.ANY, handler="echo", idempotency_key="again")
    numbers = itertools.count()
    with stage.fault("strangers", "A"), strange.Strangers() as them:
        for process in "ABE":
            port = overlay.port(process)
            for method, count in (*strange.PROBED, ("/OverlayNode/Forward", 60)):
                them.unfinished(port, method, count, source, (b"", strange.half()))
            restless = them.connect(port, source)

            def restlessly(one: strange.Stranger = restless) -> None:
                for request in (echo, keyed):
                    one.leave(one.call(request.SerializeToString()))
                name = b"n%d" % next(numbers)
                named = strange.message(strange.field(1, len(name)) + name)
                one.leave(one.open("/grpc.health.v1.Health/Watch", named))

            them.repeat(restlessly, 0.05)
        them.silent(200, overlay.port("A"), source)
        them.unfinished(overlay.port("A"), "/OverlayNode/ForwardStream", 80, source)
        for one in them.crowd(4, overlay.port("A"), source=source, window=0):
            large = pb2.Request(payload=bytes(1 << 16), mode=pb2.ANY, handler="echo")
            for _ in range(8):
                one.call(large.SerializeToString())  # without reading the answers
        time.sleep(stage.seconds / 2)


def flood(names: int = 0) -> Breaking:
    """An overload of three times the capacity, from another machine under so many caller names.

    names: 0 for a new one for each call.
    """

    def play(stage: Stage) -> None:
        keys = itertools.count(NAMES_KEY)
        with stage.fault("strangers", "A"), strange.Strangers() as them:
            crowd = them.crowd(10, stage.overlay.port("A"), source=strange.source())

            def ask(one: strange.Stranger) -> None:
                key, now = next(keys), time.monotonic()
                deadline = now + NAMES_S
                call = Call(key, key, now, now, deadline, "any", "unary", vanishes=True)
                stage.notes.calls.append(call)
                request = pb2.Request(payload=b"%d 100" % key, mode=pb2.ANY, handler="work")
                name = f"n{key % names if names else key}"
                named = ((wire.CALLER_KEY, name), ("grpc-timeout", f"{NAMES_S}S"))
                one.call(request.SerializeToString(), named)

            def more() -> None:
                for one in (*crowd, *crowd):
                    ask(one)

            them.repeat(more, 0.1)  # 200 a second
            time.sleep(stage.long_s)

    return play


def overstay(stage: Stage) -> None:
    """A client that is lent C sends as much as it likes there when its lease has ended."""
    lane = Lane(stage.overlay, "C", "work", quick=None)
    try:
        until(lambda: lane.is_over, 10, "the lease of a client that sends nothing ends")
        with ThreadPoolExecutor(OVERSTAYING, "overstaying") as pool:
            for key in range(OVERSTAY_KEY, OVERSTAY_KEY + OVERSTAYING):
                now = time.monotonic()
                call = Call(key, key, now, now, now + OVERSTAY_S, "any", ENDED_LANE)
                stage.notes.asked(call)
                request = pb2.Request(payload=b"%d 1" % key, mode=pb2.ANY, handler="work")
                pool.submit(_note_answer, stage.notes, call, lane.send(request, OVERSTAY_S))
    finally:
        lane.close()


def _note_answer(notes: Notes, call: Call, sent: Sent) -> None:
    found = Outcome(sent)
    code, executed = found.code.name, "yes" if found.ok else found.executed
    reason = "" if found.ok else found.details
    notes.answered(Answer(call.id, time.monotonic(), code, executed=executed, reason=reason))


def hostile(process: str) -> Breaking:
    """Another program takes its port, claims to be this process, and answers wrongly."""

    def play(stage: Stage) -> None:
        overlay = stage.overlay
        command = [sys.executable, "-m", "faults.neighbour", str(overlay.path.absolute()), process]
        with stage.fault("hostile", process):
            overlay.kill(process)
            program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
            assert program.stdout is not None
            try:
                program.stdout.readline()  # it serves
                time.sleep(stage.long_s)
            finally:
                program.kill()
                program.wait(10)
                program.stdout.close()
            overlay.serve(process)

    return play


def few_files(process: str) -> Breaking:
    """A process without a free file descriptor, and new connections to it."""

    def play(stage: Stage) -> None:
        overlay = stage.overlay
        victim = psutil.Process(overlay.processes[process].pid)
        soft, hard = victim.rlimit(psutil.RLIMIT_NOFILE)
        limit = victim.num_fds() + 2
        with stage.fault("few files", process), contextlib.ExitStack() as open_ones:
            victim.rlimit(psutil.RLIMIT_NOFILE, (limit, hard))
            try:
                for _ in range(20):
                    each = open_ones.enter_context(socket.socket())
                    each.settimeout(1)
                    with contextlib.suppress(OSError):
                        each.connect(("127.0.0.1", overlay.port(process)))
                until(lambda: victim.num_fds() >= limit, 5, f"{process} has no free descriptor")
                time.sleep(stage.seconds / 2)
            finally:
                victim.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))

    return play


def full_journal(stage: Stage) -> None:
    """The leader's journal cannot grow, as on a full disk: a write beyond its size fails."""
    overlay = stage.overlay
    leader = psutil.Process(overlay.processes["A"].pid)
    soft, hard = leader.rlimit(psutil.RLIMIT_FSIZE)
    with stage.fault("full disk", "A"):
        size = (overlay.folder / "journal.db-wal").stat().st_size
        leader.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
        try:
            time.sleep(stage.seconds / 2)
        finally:
            leader.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))


# Preparations before the start


def own_clock(process: str) -> Callable[[Overlay], None]:
    """Gives the process its own wall clock; its monotonic clock stays the system's."""

    def prepare(overlay: Overlay) -> None:
        library, clock = overlay.folder.absolute() / "wall_clock.so", clock_file(overlay, process)
        source = str(ROOT / "faults" / "wall_clock.c")
        command = [compiler(), "-shared", "-fPIC", "-O2", "-o", str(library), source, "-ldl"]
        subprocess.run(command, check=True)
        set_clock(clock, 0)
        overlay.inside[process] = ["env", f"LD_PRELOAD={library}", f"CLOCK={clock}"]

    return prepare


def compiler() -> str:
    """The C compiler; empty if there is none."""
    return shutil.which("cc") or ""


def clock_file(overlay: Overlay, process: str) -> Path:
    return overlay.folder.absolute() / f"clock-{process}"


def set_clock(path: Path, off_s: int) -> None:
    # In place: the process has mapped this file, and would not see a new one.
    path.touch()
    with path.open("r+b") as file:
        file.write(struct.pack("l", off_s))


def _put(path: Path, text: str) -> None:
    """Atomic: a reader sees the old text or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def full_disk(overlay: Overlay) -> None:
    """Log files on a device that is always full."""
    folder = overlay.folder / "logs"
    folder.mkdir()
    for process in overlay.ids:
        (folder / f"process_{process.lower()}.log").symlink_to("/dev/full")


def no_log(overlay: Overlay) -> None:
    """Log files that not even root can open, because their names are folders."""
    for process in overlay.ids:
        (overlay.folder / "logs" / f"process_{process.lower()}.log").mkdir(parents=True)


def unread(overlay: Overlay) -> None:
    """stdout and stderr are pipes that are not read."""
    overlay.unread.update(overlay.ids)


@contextlib.contextmanager
def _silent_listener(port: int) -> Iterator[None]:
    """Another program that listens on the port and sends nothing."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                return False
            return True

        until(bound, 5, f"port {port} is free")
        listener.listen(16)
        yield
