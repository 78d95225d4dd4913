"""The table: what is loaded, what is broken, what answers may say."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faults import breaking, strangers
from faults.breaking import Breaking
from faults.load import Mixture
from faults.overlays import Overlay
from tests.harness import hosts

USUAL = ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
# gRPC's own word for a single call that comes in the moment in which its server closes.
STOPPED = (*USUAL, "CANCELLED")
HORRORS = ("raises", "exits", "wrong_type")
BUSY = Mixture(rate=80, nap_ms=(20, 200))  # so that a kill finds something in flight
CALM = Mixture(timeouts_s=(10,))
APART = (
    ("cut", "is cut off, both ways", breaking.cut),
    ("deaf", "hears nothing any more, and is heard", breaking.deaf),
    ("mute", "is not heard any more, and hears", breaking.mute),
    ("half-open", "is gone without a word, behind a cut wire", breaking.half_open),
)
ROLES = {"leader": "A", "team-leader": "E", "worker": "D"}


@dataclass(frozen=True)
class Scenario:
    """expects: the statuses that are no violation. slots: of each worker's handlers.

    needs: a name of NEEDS, or "". prepare: before the processes start. away: this process is on a
    host of its own, across a wire.
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

    @property
    def why_not(self) -> str:
        """Why it cannot run here; empty when it can."""
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
                f"kill -9 {process} and a new start",
                breaking.kill(process),
                mixture=BUSY,
            ),
            Scenario(
                f"freeze-{role}", f"{process} stands still", breaking.freeze(process), needs="posix"
            ),
            Scenario(
                f"port-{role}",
                f"{process}'s port is taken when it comes back",
                breaking.taken_port(process),
            ),
            Scenario(
                f"garbage-{role}",
                f"80 half-open or nonsensical connections to {process}",
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
                f"the configuration is cut in half, and {process} is to start with it",
                breaking.corrupt_configuration(process),
                expects=STOPPED,
            ),
            *(
                Scenario(f"{name}-{role}", f"{process} {what}", broken(process), away=process)
                for name, what, broken in APART
            ),
        ]
    return found


SCENARIOS = (
    Scenario("calm", "no fault; every answer is OK", mixture=CALM, expects=("OK",)),
    Scenario(
        "overload",
        "more than the workers can do, with short deadlines",
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
        "nearly all have an idempotency key: asked twice, again, or for another payload",
        mixture=Mixture(timeouts_s=(10,), keyed=0.9, handlers=(*["work"] * 4, "raises")),
        expects=("OK",),
    ),
    *_for_each_role(),
    Scenario(
        "rolling-restart",
        "SIGTERM and a new start, one after another",
        breaking.restart_all,
        mixture=BUSY,
        expects=STOPPED,
    ),
    Scenario(
        "vanish",
        "1,000 clients are killed in mid-call",
        breaking.vanish,
        top={"queue_slots": 2000},  # or most of them would have been refused by then
    ),
    Scenario(
        "long-then-short",
        "each team's first request takes 3 s, and those after it 2 to 40 ms",
        mixture=Mixture(rate=20, timeouts_s=(2,), long_first=True),
        expects=("OK",),
    ),
    Scenario(
        "strangers",
        "calls without a message, idle connections and streams, names, resets, unread answers",
        breaking.strangers,
        mixture=Mixture(rate=30, timeouts_s=(2,)),
        expects=("OK",),
        needs="far",
    ),
    Scenario(
        "new-names",
        "another machine asks for three times what there is, each time under a new name",
        breaking.new_names,
        mixture=Mixture(rate=10, timeouts_s=(2,)),
        expects=("OK",),
        slots=2,
        needs="far",
    ),
    *(
        Scenario(
            f"hostile-{role}",
            f"another program answers in {process}'s place, and wrongly",
            breaking.hostile(process),
        )
        for role, process in ROLES.items()
        if process != "A"  # whom no process asks
    ),
    Scenario("slow-worker", "D is ten times slower", breaking.degrade("D", slower=10)),
    Scenario(
        "grey-worker",
        "D answers, and now and then hangs",
        breaking.degrade("D", hangs=0.3, hang_s=4),
    ),
    Scenario(
        "horrors",
        "handlers that raise, exit, return a float, print 200 kB",
        mixture=Mixture(handlers=(*["work"] * 4, *HORRORS, "prints"), timeouts_s=(10,)),
        expects=("OK",),
    ),
    Scenario(
        "full-disk",
        "log files on a full device, and handlers that raise",
        mixture=Mixture(handlers=("work", *HORRORS)),
        needs="linux",
        prepare=breaking.full_disk,
    ),
    Scenario(
        "no-log",
        "log files that cannot be opened, and handlers that raise",
        mixture=Mixture(handlers=("work", *HORRORS)),
        prepare=breaking.no_log,
    ),
    Scenario(
        "unread-output",
        "nobody reads stdout and stderr, and handlers raise",
        mixture=Mixture(handlers=("work", *HORRORS)),
        prepare=breaking.unread,
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def chosen(names: Sequence[str]) -> list[Scenario]:
    """The named ones, or all. Raises ValueError for a name that is not there."""
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"no scenario '{unknown[0]}'; there are {', '.join(BY_NAME)}")
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]
