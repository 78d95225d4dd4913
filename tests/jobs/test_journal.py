"""The journal's thread: shared commits, a full disk, and what must not be lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from overlay.jobs import journal as journals
from overlay.jobs.journal import Journal
from overlay.jobs.store import JobStore
from overlay.model.errors import BadRequest, JournalFull, NoJournal
from overlay.model.jobs import JobEnd, JobSpec, JobState, TakenJob, numbers_of
from overlay.model.segments import Caller
from tests.harness.cluster import ROOT, until

ANN = Caller("10.0.0.1", "ann")


class Runner:
    """Takes as many as `room` says, and keeps them."""

    def __init__(self) -> None:
        self.room = 0
        self.taken: list[TakenJob] = []
        self.over: list[int] = []
        self.turns = 0

    def wants(self, store: JobStore) -> bool:
        return self.room > 0 and bool(store.waiting)

    def take(self, store: JobStore, now: float) -> Sequence[TakenJob]:
        found: list[TakenJob] = []
        for kind in list(store.waiting) if self.room else ():
            found += store.take(kind, self.room, 10**9, now)
        self.room -= len(found)
        return found

    def committed(self, taken: Sequence[TakenJob], over: Sequence[int]) -> None:
        self.turns += 1
        self.taken += taken
        self.over += over

    def running(self) -> Collection[int]:
        return {job.number for job in self.taken} - set(self.over)

    def deposed(self) -> None:
        self.taken.clear()


class Bench:
    def __init__(self, path: str | Path) -> None:
        self.store = JobStore(path)
        self.runner = Runner()
        self.journal = Journal(self.store, self.runner, reserve_bytes=0)
        self.journal.start()

    def submit(self, payload: bytes = b"x", key: str = "") -> Future[list[str]]:
        spec = JobSpec(b"r", payload, key=key)
        return self.journal.do(lambda store, now: store.accept(ANN, [spec], now))

    def number(self, payload: bytes = b"x") -> int:
        return numbers_of(self.submit(payload).result(10)[0])[0]

    def end(self, number: int, answer: bytes) -> None:
        end = JobEnd(JobState.DONE, answer=answer)
        self.journal.record(lambda store, now: store.end(number, end, now))

    def answer(self, number: int) -> bytes | None:
        record = self.journal.ask(lambda store, now: store.record(number, True)).result(10)
        return None if record is None else record.answer

    def set_pages(self, more: int) -> None:
        """The file may have so many more pages than now."""

        def change(store: JobStore, now: float) -> None:
            (pages,) = store._db.execute("pragma page_count").fetchone()
            store._db.execute(f"pragma max_page_count = {pages + more}")

        self.journal.ask(change).result(10)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "j.db")
    yield made
    made.journal.close()


def test_changes_that_come_together_share_a_commit(bench: Bench) -> None:
    gate = threading.Event()
    bench.journal.do(lambda store, now: gate.wait(10))
    submitted = [bench.submit() for _ in range(300)]
    turns = bench.runner.turns
    gate.set()
    assert len({one.result(10)[0] for one in submitted}) == 300
    assert bench.runner.turns - turns <= 3


def test_an_error_reaches_its_own_change_only(bench: Bench) -> None:
    first = bench.submit(key="k")
    wrong, right = bench.submit(b"another", key="k"), bench.submit()
    with pytest.raises(BadRequest):
        wrong.result(10)
    assert first.result(10) != right.result(10)


def test_a_change_is_told_only_when_another_process_would_find_it(tmp_path: Path) -> None:
    """kill -9 right after each answer; the file then has every job that was told."""
    path = tmp_path / "j.db"
    code = (
        "import os, sys\n"
        "from tests.jobs.test_journal import Bench\n"
        "bench = Bench(sys.argv[1])\n"
        "for n in range(20): print(*bench.submit(b'%d' % n).result(10), flush=True)\n"
        "print(*bench.submit().result(10), flush=True); os.kill(os.getpid(), 9)"
    )
    told: list[str] = []
    for _ in range(3):
        words = [sys.executable, "-c", code, str(path)]
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert found.returncode == -9, found.stderr
        told += found.stdout.split()
    bench = Bench(path)
    known = bench.journal.do(lambda store, now: [store.find(id_, None) for id_ in told]).result(10)
    bench.journal.close()
    assert len(told) == 63
    assert all(known)


def test_jobs_are_started_after_the_commit_that_marks_them(bench: Bench) -> None:
    numbers = [bench.number() for _ in range(5)]
    bench.runner.room = 2
    bench.journal.wake()
    until(lambda: len(bench.runner.taken) == 2)
    assert [job.number for job in bench.runner.taken] == numbers[:2]
    states = bench.journal.do(lambda store, now: [store.state(n) for n in numbers]).result(10)
    assert states == [JobState.RUNNING] * 2 + [JobState.WAITING] * 3
    bench.end(numbers[0], b"a")
    until(lambda: bench.runner.over == [numbers[0]])


def test_when_the_file_cannot_grow_answers_are_kept_and_submits_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "RETRY_S", 0.05)
    numbers = [bench.number(b"x" * 100) for _ in range(3)]
    bench.runner.room = 3
    bench.journal.wake()
    until(lambda: len(bench.runner.taken) == 3)

    bench.set_pages(0)
    refused = [bench.submit(b"x" * 100_000) for _ in range(3)]
    for one in refused:
        with pytest.raises(JournalFull, match="disk is full: nothing was accepted"):
            one.result(10)
    for number in numbers:
        bench.end(number, b"y" * 50_000)  # does not fit either
    time.sleep(0.3)
    assert "disk is full" in bench.journal.problem
    bench.set_pages(1000)
    until(lambda: bench.answer(numbers[-1]) is not None)
    assert [bench.answer(number) for number in numbers] == [b"y" * 50_000] * 3
    until(lambda: bench.journal.problem == "")
    assert bench.number()


def test_closing_writes_what_was_recorded_and_refuses_what_comes_later(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "j.db")
    number = bench.number()
    bench.runner.room = 1
    bench.journal.wake()
    until(lambda: bench.runner.taken)
    bench.end(number, b"last")
    bench.journal.close()
    with pytest.raises(NoJournal):
        bench.submit().result(10)
    again = Bench(tmp_path / "j.db")
    assert again.answer(number) == b"last"
    again.journal.close()


def test_what_starting_a_job_leads_to_while_it_closes_is_written_too(tmp_path: Path) -> None:
    """As a queue that has closed refuses a job at once, on the journal's own thread."""
    bench = Bench(tmp_path / "j.db")
    number, closing = bench.number(), threading.Thread(target=bench.journal.close)

    def committed(taken: Sequence[TakenJob], over: Sequence[int]) -> None:
        if taken:
            closing.start()
            until(lambda: bench.journal._stopped)
            time.sleep(0.1)  # and it has woken the thread
            bench.end(number, b"at the last moment")

    bench.runner.committed = committed  # type: ignore[method-assign]
    bench.runner.room = 1
    bench.journal.wake()
    until(closing.is_alive)
    closing.join(10)
    again = Bench(tmp_path / "j.db")
    assert again.answer(number) == b"at the last moment"
    again.journal.close()


def test_old_jobs_are_forgotten_while_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "LOOK_S", 0.05)
    bench = Bench(tmp_path / "j.db")
    bench.store.limits = bench.store.limits._replace(keep_s=0.3)
    number = bench.number()
    bench.runner.room = 1
    bench.journal.wake()
    until(lambda: bench.runner.taken)
    bench.end(number, b"a")
    until(lambda: bench.answer(number) is None and bench.store.jobs == 0)
    bench.journal.close()


FULL = """
import json, os, sys, time
from tests.jobs.test_journal import Bench
from overlay.jobs import journal as journals
from overlay.model.errors import OverlayError

folder = sys.argv[1]
bench = Bench(folder + "/j.db")
has_ballast = os.path.exists(folder + "/j.db-ballast")
first = bench.number(b"x" * 1000)
bench.runner.room = 1
bench.journal.wake()
while not bench.runner.taken: time.sleep(0.01)
accepted, why = [], ""
while not why:
    try: accepted.append(bench.number(b"x" * 100_000))
    except OverlayError as e: why = str(e)
filler = open(folder + "/filler", "wb")  # another program takes what is left
try:
    while True: filler.write(bytes(100_000)); filler.flush()
except OSError: pass
bench.end(first, b"y" * 200_000)
end = time.monotonic() + 10
while (answer := bench.answer(first)) is None and time.monotonic() < end: time.sleep(0.05)
gave = not os.path.exists(folder + "/j.db-ballast")
filler.close(); os.unlink(folder + "/filler")
while bench.journal.problem and time.monotonic() < end + 5: time.sleep(0.05)
later = bench.number()
states = bench.journal.do(lambda store, now: [store.state(n) for n in accepted]).result(10)
bench.journal.close()
print(json.dumps({"accepted": len(accepted), "there": len([s for s in states if s is not None]),
    "why": why, "answer": len(answer or b""), "has_ballast": has_ballast, "gave": gave}))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="it mounts a disk")
def test_on_a_disk_that_fills_up_nothing_accepted_is_lost(tmp_path: Path) -> None:
    """A disk of 24 MiB, 8 of them ballast, in a mount namespace of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = 'mount -t tmpfs -o size=24m small "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "-m", "sh", "-c", mount, "sh", str(folder), sys.executable, FULL]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    told: dict[str, Any] = json.loads(found.stdout)
    assert "disk is full: nothing was accepted" in told["why"]
    assert told["accepted"] == told["there"] > 10
    assert (told["has_ballast"], told["gave"]) == (True, True)
    assert told["answer"] == 200_000


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_when_the_clock_is_set_attempts_are_not_put_off(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    now = time.time
    numbers = [bench.number(), bench.number()]
    later = JobSpec(b"r", b"", due=now() + 10 * 3600)
    bench.journal.do(lambda store, now: store.accept(ANN, [later], now)).result(10)
    bench.runner.room = 2
    bench.journal.wake()
    until(lambda: len(bench.runner.taken) == 2)
    for number, counts in zip(numbers, (True, False), strict=True):
        again = JobEnd(JobState.WAITING, due=now() + 30, counts=counts)
        bench.journal.record(lambda store, now, n=number, e=again: store.end(n, e, now))
    until(lambda: not bench.store.waiting)
    monkeypatch.setattr(journals.time, "time", lambda: now() + step_s)
    until(lambda: sum(bench.store.waiting.values()) == 2)
    bench.runner.room = 5
    bench.journal.wake()
    until(lambda: len(bench.runner.taken) == 4)
    assert [job.number for job in bench.runner.taken[2:]] == numbers


def test_a_bug_in_one_change_costs_no_other(bench: Bench) -> None:
    gate = threading.Event()
    bench.journal.do(lambda store, now: gate.wait(10))

    def broken(store: JobStore, now: float) -> None:
        store.accept(ANN, [JobSpec(b"r", b"half done")], now)
        raise ZeroDivisionError

    before, wrong = bench.submit(), bench.journal.do(broken)
    bench.journal.record(broken)
    after = bench.submit()
    gate.set()
    with pytest.raises(NoJournal, match="ZeroDivisionError"):
        wrong.result(10)
    assert before.result(10) != after.result(10)
    assert bench.journal.ask(lambda store, now: store.jobs).result(10) == 2
