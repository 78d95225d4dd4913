"""What is measured: the set-ups, the rows, and the figures to reach. Values only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

WORKERS = ("C", "D", "F")  # the workers of the shipped configuration, in its order
NAP_S = 0.005  # how long a handler sleeps, in the rows that have this
OUTSTANDING = 16  # calls of each client, in the rows with several clients
KIB = 1024


@dataclass(frozen=True)
class Setup:
    """How every peer is started for a group of rows.

    slots: handlers that run at once on a worker; None is each peer's own default for tiny work.
    Other workers than those of the shipped configuration take the place of its own, in turn below
    its two team leaders.
    """

    name: str
    workers: tuple[str, ...] = WORKERS
    slots: int | None = None
    nap_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """One kind of work, done in each round by every peer that can do it.

    load: "window" (outstanding without blocking: futures or asyncio), "threads" (blocking), "unary"
    (blocking, one plain Forward each), "bulk" (one map), "bulk_singly" (one message per item) or
    "clients" (several, with a window each). callers: outstanding calls, of each client, or threads.
    size: bytes of a payload. beside: more threads, which send 64 KiB meanwhile. peers: only these;
    None for all that support the load and the mode. lanes: whether the overlay's clients may have
    direct lanes. over: the row whose rate this one's is shown over.
    """

    name: str
    title: str
    load: str
    callers: int = 0
    mode: str = "any"
    size: int = 16
    beside: int = 0
    setup: str = "three"
    peers: tuple[str, ...] | None = None
    quick: bool = False
    clients: int = 1
    lanes: bool = True
    over: str = ""

    @property
    def needs(self) -> frozenset[str]:
        """What a peer must support for this row."""
        return frozenset({self.load, "all"} if self.mode == "all" else {self.load})


SETUPS = (
    Setup("three"),
    Setup("one", workers=("C",)),
    Setup("two", workers=("C", "F")),
    Setup("nap 1", slots=1, nap_s=NAP_S),
    Setup("nap 8", slots=8, nap_s=NAP_S),
    # 32 and 48 slots in all: two cores run two of them at a time, and more only cost memory.
    Setup("16 workers", workers=tuple(f"W{number:02d}" for number in range(16)), slots=2),
    Setup("48 workers", workers=tuple(f"W{number:02d}" for number in range(48)), slots=1),
)


def _of_clients(clients: int, workers: int) -> tuple[Row, Row]:
    """Without lanes and with them, over mutual TLS."""
    about = f"{clients} clients with {OUTSTANDING} outstanding each, {workers} workers"
    without = Row(
        f"{clients}-clients-{workers}-workers-no-lanes",
        f"{about}, without lanes",
        "clients",
        OUTSTANDING,
        setup=f"{workers} workers",
        peers=("ours-tls",),
        clients=clients,
        lanes=False,
    )
    name = without.name.removesuffix("-no-lanes")
    return without, replace(without, name=name, title=about, lanes=True, over=without.name)


# A broker with a task per message is asked only where its figure says something.
FAST = ("ours", "grpc-hop", "grpc-chain", "nats", "nats-uvloop", "zeromq")

ROWS = (
    Row("window-1", "1 outstanding", "window", 1),
    Row("window-16", "16 outstanding", "window", 16),
    Row("window-64", "64 outstanding", "window", 64, quick=True),
    Row("threads-1", "1 blocking caller", "threads", 1, quick=True),
    Row("threads-16", "16 blocking threads", "threads", 16),
    Row("threads-64", "64 blocking threads", "threads", 64, quick=True),
    Row(
        "unary-64",
        "unary Forward, 64 blocking threads",
        "unary",
        64,
        peers=("ours", "ours-tls", "grpc-chain", "grpc-streams"),
        quick=True,
    ),
    Row("bulk", "bulk map (Celery: chunks)", "bulk", quick=True),
    Row("bulk-singly", "bulk, a message per item (Celery: group)", "bulk_singly"),
    Row("all-window-1", "mode all, 1 outstanding", "window", 1, "all"),
    Row("all-window-16", "mode all, 16 outstanding", "window", 16, "all"),
    Row("all-window-64", "mode all, 64 outstanding", "window", 64, "all", quick=True),
    Row("all-threads-1", "mode all, 1 blocking caller", "threads", 1, "all"),
    Row("all-threads-16", "mode all, 16 blocking threads", "threads", 16, "all"),
    Row("all-threads-64", "mode all, 64 blocking threads", "threads", 64, "all"),
    Row("64k", "64 KiB, 16 outstanding", "window", 16, size=64 * KIB),
    Row("1m", "1 MiB, 4 outstanding", "window", 4, size=1024 * KIB),
    Row("small-alone", "small calls, 8 threads", "threads", 8, peers=FAST, quick=True),
    Row(
        "small-beside",
        "small calls, 8 threads, beside 2 threads of 64 KiB",
        "threads",
        8,
        beside=2,
        peers=FAST,
        quick=True,
    ),
    Row("workers-1", "1 worker, 64 outstanding", "window", 64, setup="one", peers=FAST),
    Row("workers-2", "2 workers, 64 outstanding", "window", 64, setup="two", peers=FAST),
    Row(
        "nap-1",
        "5 ms handlers, 3 workers x 1 slot, 64 outstanding",
        "window",
        64,
        setup="nap 1",
        quick=True,
    ),
    Row("nap-8", "5 ms handlers, 3 workers x 8 slots, 64 outstanding", "window", 64, setup="nap 8"),
    *(row for workers in (16, 48) for clients in (4, 8) for row in _of_clients(clients, workers)),
)


@dataclass(frozen=True)
class Target:
    """A figure to reach. kind: "rate" (ours over the peer's), "ideal" (share of the ideal rate),
    "evenness" (how far any worker's share is from an even one) or "p99" (ours in this row over ours
    in `against`).

    bound: to be reached at least; for evenness and p99, at most.
    """

    title: str
    row: str
    against: str
    bound: float
    kind: str = "rate"

    @property
    def at_most(self) -> bool:
        return self.kind in ("evenness", "p99")

    def verdict(self, low: float, high: float) -> str:
        """low, high: the 95 % interval. Missed only when all of it is on the wrong side."""
        missed = low > self.bound if self.at_most else high < self.bound
        if missed:
            return "missed"
        is_certain = high <= self.bound if self.at_most else low >= self.bound
        return "reached" if is_certain else "reached within the interval"


TARGETS = (
    Target("unary Forward, 64 callers, against the chain", "unary-64", "grpc-chain", 1.5),
    Target("one call at a time, against the chain", "threads-1", "grpc-chain", 1.2),
    Target("64 outstanding, against NATS", "window-64", "nats", 1.2),
    Target("64 outstanding, against ZeroMQ", "window-64", "zeromq", 0.7),
    Target("64 blocking threads, against the chain", "threads-64", "grpc-chain", 10),
    Target("64 blocking threads, against NATS", "threads-64", "nats", 1.1),
    Target("bulk, against NATS", "bulk", "nats", 4),
    Target("bulk, against ZeroMQ", "bulk", "zeromq", 1.2),
    Target("bulk, against Celery's chunks", "bulk", "celery", 4),
    Target("bulk, against Dask", "bulk", "dask", 50),
    Target("mode all, 64 outstanding, against the fan-out", "all-window-64", "grpc-chain", 15),
    Target("5 ms handlers, 3 x 1 slot, of the ideal", "nap-1", "", 0.88, "ideal"),
    Target("5 ms handlers, 3 x 1 slot, evenness", "nap-1", "", 0.10, "evenness"),
    Target("small calls' p99 beside 64 KiB ones", "small-beside", "small-alone", 2, "p99"),
)


def setup_of(row: Row) -> Setup:
    return next(setup for setup in SETUPS if setup.name == row.setup)


def chosen(names: Iterable[str], quick: bool) -> tuple[Row, ...]:
    """The rows with these names; without names all, or the quick ones. Raises ValueError."""
    wanted = list(names)
    unknown = [name for name in wanted if name not in {row.name for row in ROWS}]
    if unknown:
        known = ", ".join(row.name for row in ROWS)
        raise ValueError(f"no row '{unknown[0]}'; there are {known}")
    if wanted:
        return tuple(row for row in ROWS if row.name in wanted)
    return tuple(row for row in ROWS if row.quick or not quick)
