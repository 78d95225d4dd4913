"""Which workers a client is lent, and for how many requests. Pure decisions.

A lane saves short requests two hops. It is of no use to long ones, and a worker that is busy with
them would be missing elsewhere: so only workers whose requests are known to be short are lent, and
a wrong decision costs other callers milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from overlay.model.leases import LONGEST_S, MAX_LANES
from overlay.routing.planner import Load


class Lendable(NamedTuple):
    """A worker that may be lent. service_s: of a request there; 0 if unknown. lent, borrowers: rows
    that other clients may send there, and how many clients these are."""

    worker: str
    slots: int
    service_s: float
    lent: int = 0
    borrowers: int = 0


def lend(workers: Sequence[Lendable], rows: int, others: int = 0) -> list[tuple[Lendable, int]]:
    """The workers to lend to a client that has `rows` requests unanswered at a time, each with the
    requests that may be unanswered there. The ones that are lent least come first.

    others: how many callers without a lease have requests for these workers now. Each caller of a
    worker gets its part of what keeps it busy for 10 ms, so that whoever comes next waits no longer
    than that.
    """
    usable = [w for w in workers if w.slots > 0 and 0 < w.service_s <= LONGEST_S]
    found: list[tuple[Lendable, int]] = []
    covered = 0
    for one in sorted(usable, key=lambda w: w.lent / w.slots)[:MAX_LANES]:
        load = Load(slots=one.slots, service_s=one.service_s)
        share = max(1, load.credit // (1 + one.borrowers + others))
        found.append((one, share))
        # Quick requests are best kept together; others run at once only if each has a slot.
        covered += min(share, max(one.slots, load.portion))
        if covered >= rows:
            break
    return found
