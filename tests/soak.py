"""Many streamed requests with random cancels, deadlines and killed processes, and what must hold.

    python -m tests.soak 200000          prints what happened and every rule that was broken

Each request carries a number of its own; each execution of the handler writes the number to a file
of its worker before it does anything else. Afterwards the two histories are compared: every request
ended once, no number ran twice, what was refused with proof never ran, every answer is right.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path

import overlay
from overlay.client import CallFailed, Client
from overlay.values import Executed
from tests.cluster import Overlay, running, six_processes

HANDLER = '''
import random, threading, time
local = threading.local()

def work(payload, context):
    """Writes that it ran; takes no time, mostly, and gives the payload back."""
    if not hasattr(local, "file"):
        name = f"{context.options['folder']}/{context.process_id}-{threading.get_ident()}"
        local.file = open(name, "ab", buffering=0)
    local.file.write(payload + b"\\n")
    if random.random() < 0.01:
        time.sleep(0.02)
    return payload
'''
IN_FLIGHT = 2000


@dataclass
class History:
    """What became of each request: outcomes[number] is set exactly once, or a rule is broken."""

    outcomes: dict[int, str] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def ended(self, number: int, future: Future[bytes]) -> None:
        self.ends[number] += 1
        try:
            result = future.result(0)
        except CancelledError:
            self.outcomes[number] = "cancelled"
        except CallFailed as e:
            proof = "refused" if e.executed is Executed.NO else "failed"
            self.outcomes[number] = f"{proof} {e.code.name}"
        else:
            self.outcomes[number] = "ok"
            if result != str(number).encode():
                self.wrong.append(f"request {number} was answered {result!r}")

    def check(self, count: int, runs: Counter[int]) -> list[str]:
        """Every rule that was broken, as sentences."""
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
    """Runs it on six real processes in `folder`; the history, and every rule that was broken."""
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
        finally:
            stop.set()
            killer.join()
        _wait_for(lambda: sum(history.ends.values()) >= count)
    return history, history.check(count, _runs(notes))


def _send(client: Client, history: History, count: int, dice: random.Random) -> None:
    room = threading.Semaphore(IN_FLIGHT)
    open_ones: list[Future[bytes]] = []
    for number in range(count):
        room.acquire()
        timeout = dice.choice((0.01, 0.05, 0.5, 10, 10, 10, 10, 10))
        future = client.submit("work", str(number), timeout=timeout)
        open_ones.append(future)

        def ended(future: Future[bytes], number: int = number) -> None:
            history.ended(number, future)
            room.release()

        future.add_done_callback(ended)
        if dice.random() < 0.05:
            dice.choice(open_ones[-50:]).cancel()
    _wait_for(lambda: all(future.done() for future in open_ones))


def _kill(six: Overlay, stop: threading.Event, seed: int, every_s: float) -> None:
    """Kills a team leader or a worker now and then, and starts it again."""
    dice = random.Random(seed)
    while not stop.wait(every_s):
        victim = dice.choice("BECDF")
        six.kill(victim)
        stop.wait(0.3)
        six.processes[victim] = six._spawn(victim)
        six._wait_ready(victim)


def _runs(notes: Path) -> Counter[int]:
    runs: Counter[int] = Counter()
    for path in notes.iterdir():
        runs.update(int(line) for line in path.read_bytes().split())
    return runs


def _wait_for(condition, within_s: float = 60) -> None:
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        history, broken = soak(Path(folder), count, seed, kill_every_s=2)
    took_s = time.monotonic() - began
    print(f"{count} requests in {took_s:.1f} s, seed {seed}")
    for outcome, number in Counter(history.outcomes.values()).most_common():
        print(f"  {number:>8}  {outcome}")
    for sentence in broken[:20]:
        print(f"BROKEN: {sentence}")
    print(f"{len(broken)} rules broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
