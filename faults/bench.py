"""Runs one scenario: start, load and break, recover, read the metrics, stop, check.

If a process needs its own host, this file runs as a program inside one of two virtual hosts, and
returns the history.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from faults import checker, history
from faults.breaking import Stage
from faults.checker import Violation
from faults.history import About, History, Lending, Recovery, Rest, Trouble
from faults.jobs import OVER_S, JobLoad
from faults.load import Load, Notes, Planned
from faults.overlays import Overlay
from faults.scenarios import BY_NAME, FAILING, Scenario
from overlay.transport.codec import pb2
from tests.harness.cluster import six_processes
from tests.harness.hosts import ADDRESSES, Hosts, Wire
from tests.harness.leaders import with_more_leaders
from tests.harness.machine import ROOT, NotReached, until
from tests.harness.nats_servers import NatsServers, nats_servers

LATENESS_S = 0.02  # p99; above it the load was not as planned, and the run is invalid
REST_S = 15.0  # for hung handlers to end
RECOVERY_S = 20.0
PROBES = 5
PROBE_ID = 20_000_000
BREAK_AT = 0.15  # of the load's time
LENT_S = 0.01  # of work that a worker may be lent for, beyond its slots
LOOK_S = 0.2  # between two looks at what is lent


@dataclass(frozen=True)
class Outcome:
    """The result of one scenario."""

    scenario: Scenario
    history: History
    violations: list[Violation]

    @property
    def lateness_s(self) -> float:
        """How late calls were sent, p99."""
        late = sorted(c.at - c.due for c in self.history.calls if not c.vanishes)
        return late[int(len(late) * 0.99)] if late else 0.0

    @property
    def invalid(self) -> str:
        """Why the run proves nothing; empty if it is valid."""
        if self.history.troubles:
            return self.history.troubles[0].what
        if self.scenario.lanes and not any(each.answered for each in self.history.lendings):
            return "no call went over a lane"
        if self.lateness_s > LATENESS_S:
            return f"the load left {self.lateness_s * 1e3:.0f} ms late (p99; 20 ms are allowed)"
        return ""


def run(
    scenario: Scenario,
    folder: Path,
    seconds: float,
    seed: int,
    command: Sequence[str] = (),
    freeze_s: float | None = None,
) -> Outcome:
    """Runs it in `folder` and writes history.jsonl there. command: instead of node.py.

    Raises CannotBuild if the scenario needs hosts that this machine cannot have.
    """
    how: dict[str, Any] = {
        "seconds": seconds,
        "seed": seed,
        "command": list(command),
        "freeze_s": freeze_s,
    }
    if scenario.away:
        found = _run_on_hosts(scenario, folder.absolute(), how)
    else:
        found = _run(scenario, folder, **how)
    return Outcome(scenario, found, checker.check(found))


def _run_on_hosts(scenario: Scenario, folder: Path, how: dict[str, Any]) -> History:
    with contextlib.closing(Hosts()) as hosts:
        arguments = json.dumps([scenario.name, str(folder), how, hosts.names])
        program = hosts.popen(1, sys.executable, "-m", "faults.bench", arguments, cwd=ROOT)
        try:
            code = program.wait()
        finally:
            program.terminate()
            program.wait()
    if code == 0:
        return history.read(folder / "history.jsonl")
    about = About(scenario.name, how["seed"], {}, [])
    return History(about, troubles=[Trouble(f"the program in host 1 ended with {code}")])


def _run_inside(arguments: str) -> None:
    name, folder, how, names = json.loads(arguments)
    wire = Wire({int(host): name for host, name in names.items()})
    _run(BY_NAME[name], Path(folder), wire=wire, **how)


def _run(
    scenario: Scenario,
    folder: Path,
    seconds: float,
    seed: int,
    command: Sequence[str],
    freeze_s: float | None,
    wire: Wire | None = None,
) -> History:
    with _servers(scenario, folder) as servers:
        config = configuration(scenario, servers.journal if servers else "journal.db")
        overlay = Overlay(folder, config, command or node_command())
        if wire is not None:
            overlay.inside[scenario.away] = wire.inside(2)
        notes = Notes()
        stage = Stage(overlay, notes, random.Random(seed), seconds, freeze_s, wire, servers)
        about = About(
            scenario.name,
            seed,
            {i: p["team"] for i, p in overlay.config["processes"].items() if p["role"] == "worker"},
            list(scenario.expects),
            list(FAILING),
            scenario.slots,
            _most_lent(scenario),
        )
        found = History(about)
        try:
            _play(scenario, stage, found, seconds, seed)
        except NotReached as e:
            found.troubles.append(Trouble(str(e)))
        finally:
            overlay.note_dead()
            overlay.close()
    found.calls, found.answers, found.stalls = notes.calls, notes.answers, notes.stalls
    found.submits, found.looks, found.cancels = notes.submits, notes.looks, notes.cancels
    found.faults, found.endings = stage.faults, overlay.endings
    found.executions = history.executions_of(
        line
        for path in sorted((folder / "executions").iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    history.write(found, folder / "history.jsonl")
    return found


@contextlib.contextmanager
def _servers(scenario: Scenario, folder: Path) -> Iterator[NatsServers | None]:
    """Those on which several leaders keep their jobs."""
    if not scenario.leaders:
        yield None
        return
    (folder / "nats").mkdir(parents=True)
    with nats_servers(folder / "nats") as servers:
        yield servers


def configuration(scenario: Scenario, journal: str = "journal.db") -> dict[str, Any]:
    """journal: of a scenario with jobs."""
    names = ("work", *FAILING, "prints", "large")
    handlers = {n: {"call": f"faults.handlers:{n}", "slots": scenario.slots} for n in names}
    config = six_processes(**{"handlers": handlers, "drain_grace_s": 10, **scenario.top})
    if scenario.jobs:
        config["journal"] = journal
    if scenario.leaders:
        config = with_more_leaders(config, journal)
    for id_, process in config["processes"].items():
        if scenario.away:
            process["host"] = ADDRESSES[2 if id_ == scenario.away else 1]
        if process["role"] == "worker":
            process["handler"] = "work"
    return config


def _most_lent(scenario: Scenario) -> int:
    """Lent are the slots, and what they do in 10 ms; no call is shorter than the shortest."""
    if not scenario.lanes:
        return 0
    shortest_s = scenario.mixture.nap_ms[0] / 1e3
    return scenario.slots + int(scenario.slots * LENT_S / shortest_s)


def node_command() -> list[str]:
    return [sys.executable, str(ROOT / "node.py")]


def _play(scenario: Scenario, stage: Stage, found: History, seconds: float, seed: int) -> None:
    overlay, notes = stage.overlay, stage.notes
    if scenario.prepare:
        scenario.prepare(overlay)
    overlay.start()
    load = Load(overlay, notes, 1, _scope(found.about), clients=scenario.mixture.clients)
    try:
        load.start()
        with _jobs(scenario, overlay, notes, seed), _lendings(scenario, overlay, found):
            _load_and_break(scenario, stage, load, found, seconds, seed)
        found.recoveries.append(_recovery(overlay, notes, _scope(found.about)))
    finally:
        load.close()
    rest_by = time.monotonic() + REST_S
    found.rests += [_rest(overlay, process, rest_by) for process in overlay.ids]
    overlay.stop_all()


@contextlib.contextmanager
def _lendings(scenario: Scenario, overlay: Overlay, found: History) -> Iterator[None]:
    """Looks meanwhile at what the leader has lent."""
    if not scenario.lanes:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            with contextlib.suppress(grpc.RpcError):  # it is being restarted
                m, rows = overlay.metrics("A"), Counter[str]()
                for lane in m.lanes:
                    rows[lane.process_id] += lane.rows
                found.lendings.append(Lending(time.monotonic(), dict(rows), m.lane_requests))

    looking = threading.Thread(target=look, name="lendings")
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


@contextlib.contextmanager
def _jobs(scenario: Scenario, overlay: Overlay, notes: Notes, seed: int) -> Iterator[None]:
    """Submits jobs meanwhile. Then each must be over, and be told alike after a restart."""
    if not scenario.jobs:
        yield
        return
    jobs = JobLoad(overlay, notes, seed)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # otherwise these threads delay the calls
    try:
        jobs.start()
        yield
        jobs.finish()
        overlay.stop_one("A")
        overlay.serve("A")
        overlay.settle()
        jobs.ask_all(OVER_S)
    finally:
        jobs.close()
        sys.setswitchinterval(interval_s)


def _load_and_break(
    scenario: Scenario, stage: Stage, load: Load, found: History, seconds: float, seed: int
) -> None:
    breaker = threading.Thread(target=_inject, args=(scenario, stage, found), name="breaker")
    load.send(Planned(0, "all", "unary", "", "work", 1, 10))
    rng = random.Random(seed)
    breaker.start()
    try:
        load.run(scenario.mixture.plan(seconds, rng))
        while breaker.is_alive():  # the load lasts as long as the fault
            load.run(scenario.mixture.plan(0.5, rng))
    finally:
        breaker.join()
    # The client gives up soon after a deadline; calls that are still open then have no answer.
    longest_s = scenario.mixture.longest_s + 2 * checker.SILENT_S + 1
    end = time.monotonic() + longest_s
    while stage.notes.open and time.monotonic() < end:
        time.sleep(0.02)


def _inject(scenario: Scenario, stage: Stage, found: History) -> None:
    time.sleep(BREAK_AT * stage.seconds)
    try:
        scenario.breaking(stage)
    except Exception as e:  # noqa: BLE001 - reported, and the run is invalid
        found.troubles.append(Trouble(f"{type(e).__name__}: {e}"))


def _recovery(overlay: Overlay, notes: Notes, scope: Mapping[str, Sequence[str]]) -> Recovery:
    """Sends calls until several in a row have complete answers."""
    began = time.monotonic()
    probing = Load(overlay, notes, PROBE_ID, scope)
    last, good = "", 0
    try:
        while time.monotonic() < began + RECOVERY_S:
            mode = "any" if good % 2 else "all"
            call = probing.send(Planned(0, mode, "unary", "", "work", 1, 5))
            answer = until(partial(_answer_to, notes, call.id), 10, f"an answer to {call.id}")
            complete = answer.code == "OK" and all(code == "OK" for _, code, _ in answer.parts)
            good = good + 1 if complete else 0
            last = f"{answer.code} {answer.coverage} {answer.reason}"
            if good == PROBES:
                return Recovery(True, time.monotonic() - began, last)
            time.sleep(0.05)
    except NotReached as e:
        last = str(e)
    finally:
        probing.close()
    return Recovery(False, time.monotonic() - began, last)


def _scope(about: About) -> dict[str, list[str]]:
    """The workers of each team; "" means all."""
    scope = {"": list(about.workers)}
    for worker, team in about.workers.items():
        scope.setdefault(team, []).append(worker)
    return scope


def _answer_to(notes: Notes, id_: int) -> Any:
    return next((answer for answer in reversed(notes.answers) if answer.id == id_), None)


def _rest(overlay: Overlay, process: str, end: float) -> Rest:
    """Waits until all counts are 0, and returns the last ones."""
    while True:
        completed = None
        try:
            metrics = overlay.metrics(process)
            counts, completed = _counts(metrics), int(metrics.completed)
        except grpc.RpcError as e:
            counts = {f"no metrics ({e.code().name})": 1}
        if not any(counts.values()) or time.monotonic() > end:
            return Rest(process, counts, completed if process == "A" else None)
        time.sleep(0.1)


def _counts(m: pb2.MetricsResponse) -> dict[str, int]:
    ended = m.completed + m.failed + m.refused + m.cancelled
    counts = {
        "active": m.active_requests,
        "waiting": m.queue_size,
        "streamed waiting": int(m.streamed_waiting),
        "streamed active": int(m.streamed_active),
        "handlers": sum(handler.active for handler in m.handlers),
        "lanes": len(m.lanes),
        "jobs that are not over": int(m.jobs.waiting + m.jobs.running),
        "calls that wait for a job": int(m.jobs.waiters),
        "received and not counted as ended": int(m.received) - int(ended),
    }
    counts.update({f"outstanding at {n.process_id}": n.outstanding for n in m.neighbours})
    return counts


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the parent gets it too
        _run_inside(sys.argv[1])
