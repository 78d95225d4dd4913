"""The table: what is loaded, what is broken, what answers may say."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faults import breaking
from faults.breaking import Breaking
from faults.load import Mixture
from faults.overlays import Overlay

USUAL = ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
HORRORS = ("raises", "exits", "wrong_type")
BUSY = Mixture(rate=80, nap_ms=(20, 200))  # so that a kill finds something in flight
CALM = Mixture(timeouts_s=(10,))
ROLES = {"leader": "A", "team-leader": "E", "worker": "D"}


@dataclass(frozen=True)
class Scenario:
    """expects: the statuses that are no violation. slots: of each worker's handlers.

    needs: "", "posix" or "linux". prepare: before the processes start.
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

    @property
    def runs_here(self) -> bool:
        if self.needs == "linux":
            return sys.platform == "linux"
        return self.needs != "posix" or os.name == "posix"


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
    ),
    Scenario("vanish", "1,000 clients are killed in mid-call", breaking.vanish),
    Scenario("slow-worker", "D is ten times slower", breaking.mood("D", slower=10)),
    Scenario(
        "grey-worker", "D answers, and now and then hangs", breaking.mood("D", hangs=0.3, hang_s=4)
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
