"""Soak tests: many requests with random cancels, deadlines and killed processes.

    python -m tests.soak 200000
    python -m tests.soak distinct 1000000

The first gives each request a number, and each execution writes it to a file. Then it checks that
every request ended once, no number ran twice, what was refused with proof never ran, and every
answer is right.

The second makes single calls from as many callers, some with idempotency keys, then a map; it
prints the rate of each tenth, and each process's memory after the first and the last.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

import overlay
from overlay.client.sync import CallFailed, Client
from overlay.model.segments import Executed
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import NotReached, Overlay, running, six_processes, until

HANDLER = '''
import random, threading, time
local = threading.local()

def work(payload, context):
    """Writes that it ran, and returns the payload, usually at once."""
    if not hasattr(local, "file"):
        name = f"{context.options['folder']}/{context.process_id}-{threading.get_ident()}"
        local.file = open(name, "ab", buffering=0)
    local.file.write(payload + b"\\n")
    if random.random() < 0.01:
        time.sleep(0.02)
    return payload
'''
IN_FLIGHT = 100, 2000  # in turn: few, which go over lanes, and many
TURN = 500  # requests


@dataclass
class History:
    """How each request ended; ends[number] must become 1."""

    outcomes: dict[int, str] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    on_lanes: int = 0  # requests that went straight to a worker

    def ended(self, number: int, future: Future[bytes]) -> None:
        self.ends[number] += 1
        try:
            result = future.result(0)
        except CancelledError:
            self.outcomes[number] = "cancelled"
        except CallFailed as e:
            kind = "refused" if e.executed is Executed.NO else "failed"
            self.outcomes[number] = f"{kind} {e.code.name}"
        else:
            self.outcomes[number] = "ok"
            if result != str(number).encode():
                self.wrong.append(f"request {number} was answered {result!r}")

    def check(self, count: int, runs: Counter[int]) -> list[str]:
        """A sentence for each violation."""
        broken = list(self.wrong)
        for number in range(count):
            ends, ran, outcome = self.ends[number], runs[number], self.outcomes.get(number)
            if ends != 1:
                broken.append(f"request {number} ended {ends} times")
            if ran > 1:
                broken.append(f"request {number} ran {ran} times ({outcome})")
            if outcome == "ok" and ran != 1:
                broken.append(f"request {number} was answered and ran {ran} times")
            if ran and (outcome or "").startswith("refused"):
                broken.append(f"request {number} was refused with proof ({outcome}) and ran")
        return broken


def soak(folder: Path, count: int, seed: int, kill_every_s: float) -> tuple[History, list[str]]:
    """Runs it on six real processes in `folder`; returns the history and the violations."""
    notes = folder / "notes"
    notes.mkdir()
    handlers = {"work": {"call": "mine:work", "slots": 8, "options": {"folder": str(notes)}}}
    (folder / "mine.py").write_text(HANDLER)
    history = History()
    with running(folder, six_processes(handlers=handlers)) as six:
        stop = threading.Event()
        killer = threading.Thread(target=_kill, args=(six, stop, seed, kill_every_s))
        killer.start()
        try:
            with overlay.connect(six.address("A"), patience_s=20) as client:
                _send(client, history, count, random.Random(seed))
                history.on_lanes = client.metrics().lane_requests
        finally:
            stop.set()
            killer.join()
        with contextlib.suppress(NotReached):  # the check reports it
            until(lambda: sum(history.ends.values()) >= count, 60)
    return history, history.check(count, _runs(notes))


def _send(client: Client, history: History, count: int, rng: random.Random) -> None:
    turns = [threading.Semaphore(limit) for limit in IN_FLIGHT]
    futures: list[Future[bytes]] = []
    for number in range(count):
        slots = turns[number // TURN % len(turns)]
        slots.acquire()
        timeout = rng.choice((0.01, 0.05, 0.5, 10, 10, 10, 10, 10))
        future = client.submit("work", str(number), timeout=timeout)
        futures.append(future)

        def ended(
            future: Future[bytes], number: int = number, slots: threading.Semaphore = slots
        ) -> None:
            history.ended(number, future)
            slots.release()

        future.add_done_callback(ended)
        if rng.random() < 0.05:
            rng.choice(futures[-50:]).cancel()
    with contextlib.suppress(NotReached):
        until(lambda: all(future.done() for future in futures), 60)


def _kill(six: Overlay, stop: threading.Event, seed: int, every_s: float) -> None:
    """Kills a random team leader or worker every so often, and restarts it."""
    rng = random.Random(seed)
    while not stop.wait(every_s):
        victim = rng.choice("BECDF")
        six.kill(victim)
        stop.wait(0.3)
        six.serve(victim)


def _runs(notes: Path) -> Counter[int]:
    runs: Counter[int] = Counter()
    for path in notes.iterdir():
        runs.update(int(line) for line in path.read_bytes().split())
    return runs


# Many distinct callers, ids and keys, without faults

TOLERANCE = 0.1  # how much worse the last tenth may be than the first
VARIATION_MIB = 8  # a process's memory varies this much without growing
KEYED = 4  # one request in four has a key
CONCURRENT = 64  # single calls


@dataclass
class Tenths:
    """How long each tenth of a run took, and the processes' memory at the end of each."""

    way: str
    count: int
    seconds: list[float] = field(default_factory=list)
    mib: list[dict[str, float]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def rates(self) -> list[float]:
        """Requests a second."""
        return [self.count / 10 / taken for taken in self.seconds]

    @property
    def slower(self) -> float:
        """How much lower the last rate is than the first, as a share of the first."""
        return 1 - self.rates[-1] / self.rates[0]

    def grown(self, process_id: str) -> float:
        """MiB, from the end of the first tenth to that of the last."""
        return self.mib[-1][process_id] - self.mib[0][process_id]

    def broken(self) -> list[str]:
        found = []
        if self.slower > TOLERANCE:
            first, last = self.rates[0], self.rates[-1]
            found.append(f"{self.way}: {first:.0f} a second at first, {last:.0f} at the end")
        for process_id, first in self.mib[0].items():
            if self.grown(process_id) > max(TOLERANCE * first, VARIATION_MIB):
                last = self.mib[-1][process_id]
                found.append(f"{self.way}: {process_id} grew from {first:.0f} to {last:.0f} MiB")
        return found

    def __str__(self) -> str:
        lines = [f"{self.way}: {self.count}, {dict(self.outcomes)}"]
        lines.append(f"  a second   {' '.join(f'{r:.0f}' for r in self.rates)} {-self.slower:+.1%}")
        for process_id in self.mib[0]:
            first, last = self.mib[0][process_id], self.mib[-1][process_id]
            lines.append(f"  {process_id}, MiB     {first:9.1f} {last:9.1f} {last - first:+8.1f}")
        return "\n".join(lines)


def distinct(folder: Path, singles: int, mapped: int) -> list[Tenths]:
    """Single calls, each with its own caller and id and some with a key, then items of a map."""
    # With a short window, keys expire from the first tenth on, as in a long run with the default.
    with running(folder, six_processes(key_window_s=20)) as six:
        by_calls = _tenths("single calls", singles, six, _single_calls(six))
        with overlay.connect(six.address("A")) as client:
            by_map = _tenths("map", mapped, six, _items_of(client))
    return [by_calls, by_map]


def _tenths(way: str, count: int, six: Overlay, ask: Callable[[int, int], Counter[str]]) -> Tenths:
    """ask(first, count) makes requests with these numbers."""
    found = Tenths(way, count)
    ask(0, count // 50)  # warm-up of connections and threads
    for tenth in range(10):
        began = time.monotonic()
        found.outcomes += ask(count * (tenth + 1), count // 10)
        found.seconds.append(time.monotonic() - began)
        found.mib.append({i: _mib(process.pid) for i, process in six.processes.items()})
    return found


def _single_calls(six: Overlay) -> Callable[[int, int], Counter[str]]:
    base = time.time_ns() << 8 & (2**62 - 1)
    forward = six.stub("A").Forward

    def ask(first: int, count: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        slots, lock = threading.Semaphore(CONCURRENT), threading.Lock()

        def ended(call: grpc.Future) -> None:
            with lock:
                outcomes[call.code().name] += 1
            slots.release()

        for number in range(first, first + count):
            key = f"order {number}" if number % KEYED == 0 else ""
            request = pb2.Request(
                payload=b"hi", mode=pb2.ANY, request_id=base + number, idempotency_key=key
            )
            slots.acquire()
            caller = ((codec.CALLER_KEY, f"caller {number}"),)
            forward.future(request, timeout=30, metadata=caller).add_done_callback(ended)
        for _ in range(CONCURRENT):
            slots.acquire()
        return outcomes

    return ask


def _items_of(client: Client) -> Callable[[int, int], Counter[str]]:
    def ask(first: int, count: int) -> Counter[str]:
        items = client.map("echo", (b"%d" % n for n in range(first, first + count)), timeout=60)
        return Counter(OK=sum(1 for _ in items))

    return ask


def _mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def main() -> int:
    if sys.argv[1:2] == ["distinct"]:
        return _main_distinct(int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        history, broken = soak(Path(folder), count, seed, kill_every_s=2)
    took_s = time.monotonic() - began
    print(f"{count} requests in {took_s:.1f} s, seed {seed}, {history.on_lanes} of them on lanes")
    for outcome, number in Counter(history.outcomes.values()).most_common():
        print(f"  {number:>8}  {outcome}")
    for sentence in broken[:20]:
        print(f"BROKEN: {sentence}")
    print(f"{len(broken)} rules broken")
    return 1 if broken else 0


def _main_distinct(count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        found = distinct(Path(folder), count, 4 * count)
    broken = [sentence for each in found for sentence in each.broken()]
    print(*found, *(f"BROKEN: {sentence}" for sentence in broken), sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
