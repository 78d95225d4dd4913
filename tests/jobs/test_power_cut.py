"""The power goes at any moment: what the journal has told is on the disk, whatever else is lost.

A child runs the real store on a real file, under strace, and says before each commit what it will
change and after it that this is told. From the system calls the disk is built as it may be after a
cut: of each file what was synced, and of the writes since then any pieces; of the folder the files
that were made and removed, as far as they were synced, and a first part of what came after.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from overlay.jobs.store import JobStore
from overlay.model.errors import OverlayError
from overlay.model.jobs import JobState
from tests.harness.cluster import ROOT, tool

CUTS = 150  # so many moments, each with a disk of its own
PIECES = (512, 4096)  # of which a disk writes each whole, or not at all
CALLS = "openat,pwrite64,write,ftruncate,fdatasync,fsync,unlink"

CHILD = """
import json, os, random, sys
from overlay.jobs.store import JobStore
from overlay.model.jobs import JobEnd, JobSpec, JobState, numbers_of
from overlay.model.segments import Caller

path, synchronous, early = sys.argv[1], sys.argv[2], sys.argv[3] == "early"
rng = random.Random(1)
known = {}  # number: [state, attempts, most attempts, body]

def say(**what):
    os.write(1, json.dumps(what).encode() + b"\\n")

def commit(change):
    store.begin()
    changed = change()
    known.update(changed)
    say(will=changed)
    if early:
        say(told=True)
    store.commit()
    if not early:
        say(told=True)

def opened():
    changed = {}
    for number, (state, attempts, most, body) in known.items():
        if state == JobState.RUNNING:
            again = JobState.WAITING if attempts < most else JobState.QUARANTINED
            changed[number] = [again, attempts, most, body]
    known.update(changed)
    say(will=changed)
    found = JobStore(path)
    say(told=True)
    found._db.execute(f"pragma synchronous = {synchronous}")
    found._db.execute("pragma wal_autocheckpoint = 25")  # so that a short run has many of them
    return found

def accept():
    specs = []
    for _ in range(rng.randint(1, 4)):
        body = rng.randbytes(rng.choice((10, 300, 5000))).hex().encode()
        key = body[:20].decode() if rng.random() < 0.5 else ""
        specs.append(JobSpec(b"r", body, "", key, 0, 60.0, 3 if key else 1))
    ids = store.accept(Caller("10.0.0.1", "ann"), specs, 1.0)
    return {
        numbers_of(id_)[0]: [0, 0, spec.max_attempts, spec.payload.decode()]
        for id_, spec in zip(ids, specs)
    }

def take():
    return {
        job.number: [1, job.attempts, job.max_attempts, job.payload.decode()]
        for kind in list(store.waiting) for job in store.take(kind, 4, 10**6, 2.0)
    }

def end():
    changed = {}
    for number, (state, attempts, most, body) in known.items():
        if state == JobState.RUNNING and rng.random() < 0.5:
            after = rng.choice((JobState.DONE, JobState.DONE, JobState.FAILED))
            body = body[::-1] if after is JobState.DONE else body
            store.end(number, JobEnd(after, reason="no", answer=body.encode()), 3.0)
            changed[number] = [after, attempts, most, body]
    return changed

def cancel():
    not_over = JobState.WAITING, JobState.RUNNING
    numbers = [number for number, job in known.items() if job[0] in not_over][-1:]
    store.cancel(numbers, 3.0)
    return {number: [JobState.CANCELLED, *known[number][1:]] for number in numbers}

store = opened()
for step in range(160):
    if step % 60 == 59:
        store.close()
        store = opened()
    commit(rng.choice((accept, accept, take, take, end, end, cancel)))
"""

Jobs = dict[int, tuple[int, int, int, str]]


@dataclass
class Named:
    """A file: its synced bytes, and what was done to it since: (offset, bytes), or a new size."""

    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes] | int] = field(default_factory=list)

    def do(self, step: tuple[int, bytes] | int, body: bytearray) -> None:
        if isinstance(step, int):
            del body[step:]
            body.extend(bytes(step - len(body)))
            return
        at, data = step
        body.extend(bytes(max(0, at + len(data) - len(body))))
        body[at : at + len(data)] = data

    def sync(self) -> None:
        for step in self.since:
            self.do(step, self.synced)
        self.since.clear()

    def after_a_cut(self, rng: random.Random, share: float) -> bytearray:
        """share: of the pieces that have reached the disk, about."""
        body, size = bytearray(self.synced), rng.choice(PIECES)
        for step in self.since:
            for piece in [step] if isinstance(step, int) else _pieces(*step, size):
                if rng.random() < share:
                    self.do(piece, body)
        return body


def _pieces(at: int, data: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    begin = 0
    while begin < len(data):
        end = min(len(data), begin + size - (at + begin) % size)
        yield at + begin, data[begin:end]
        begin = end


@dataclass
class Disk:
    """A folder whose files were made and removed in this order, `synced` of these steps for good.

    told: how the jobs stand by what the child was told. coming: how they will, if the commit that
    is under way succeeds.
    """

    files: dict[str, Named] = field(default_factory=dict)
    folder: list[tuple[str, Named | None]] = field(default_factory=list)
    synced: int = 0
    told: Jobs = field(default_factory=dict)
    coming: Jobs = field(default_factory=dict)

    def do(self, call: str, name: str, arguments: list[str]) -> None:
        if call == "write":
            self._hear(json.loads(_bytes(arguments[0])))
        elif call == "openat" and name not in self.files:
            self.files[name] = Named()
            self.folder.append((name, self.files[name]))
        elif call == "unlink":
            del self.files[name]
            self.folder.append((name, None))
        elif call == "pwrite64":
            self.files[name].since.append((int(arguments[-1]), _bytes(arguments[0])))
        elif call == "ftruncate":
            self.files[name].since.append(int(arguments[-1]))
        elif name in self.files:  # it is synced
            self.files[name].sync()
        else:
            self.synced = len(self.folder)

    def _hear(self, said: dict[str, dict[str, list[int]]]) -> None:
        if "will" in said:
            changed = {int(number): tuple(job) for number, job in said["will"].items()}
            self.coming = {**self.told, **changed}  # type: ignore[dict-item]
        else:
            self.told = self.coming

    def cut(self, folder: Path, rng: random.Random) -> None:
        """Writes the files as they may be after a cut."""
        there: dict[str, Named | None] = {}
        there.update(self.folder[: rng.randint(self.synced, len(self.folder))])
        share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for path in folder.iterdir():
            path.unlink()
        for name, file in there.items():
            if file is not None:
                (folder / Path(name).name).write_bytes(file.after_a_cut(rng, share))


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.strip().strip('"').replace("\\x", ""))


LINE = re.compile(  # call(file or fd, arguments) = result
    r"""(\w+)\((?:AT_FDCWD[^,]*,\ )?(?:\d+<([^>]*)>|"([^"]*)")(?:,\ )?(.*)\)\ +=\ \d+(?:<.*>)?""",
    re.VERBOSE,
)


def recorded(folder: Path, *how: str) -> list[tuple[str, str, list[str]]]:
    """The system calls of a child on its journal, (call, file, arguments), in their order."""
    strace = tool("strace", "apt-get install strace")
    inside, trace = folder / "recorded", folder / "trace"
    inside.mkdir()
    command = [strace, "-qq", "-y", "-xx", "-s", "1000000", "-o", str(trace), "-e", CALLS]
    child = [sys.executable, "-c", CHILD, str(inside / "j.db"), *how]
    subprocess.run([*command, *child], cwd=ROOT, check=True, timeout=60, capture_output=True)
    calls = []
    for line in trace.read_text().splitlines():
        found = LINE.fullmatch(line)
        if found is None:
            continue
        call, name = found[1], _bytes(found[2] or found[3]).decode()
        is_ours = name.startswith(str(inside)) or (call == "write" and name.startswith("pipe:"))
        if is_ours and (call != "openat" or "O_CREAT" in found[4]):
            calls.append((call, name, found[4].split(", ")))
    return calls


def broken(folder: Path, calls: list[tuple[str, str, list[str]]], cuts: int) -> list[str]:
    """What the journal broke, of so many cuts."""
    rng, disk, found = random.Random(7), Disk(), list[str]()
    moments = sorted(rng.randrange(1, len(calls)) for _ in range(cuts))
    inside = folder / "cut"
    inside.mkdir()
    for at, call in enumerate(calls):
        disk.do(*call)
        while moments and moments[0] == at:
            del moments[0]
            disk.cut(inside, rng)
            if problem := _problem(inside / "j.db", disk):
                found.append(f"after system call {at} of {len(calls)}: {problem}")
    return found


def _problem(path: Path, disk: Disk) -> str:
    try:
        with contextlib.closing(JobStore(path)) as store:
            (good,) = store._db.execute("pragma integrity_check").fetchone()
            jobs = _read(store)
    except (OverlayError, sqlite3.Error) as e:
        return f"it cannot be opened: {e}"
    if good != "ok":
        return f"it is damaged: {good}"
    if jobs in (_recovered(disk.told), _recovered(disk.coming)):
        return ""
    wanted = _recovered(disk.told)
    wrong = sorted(n for n in jobs.keys() | wanted.keys() if jobs.get(n) != wanted.get(n))
    return f"of {len(wanted)} jobs that were told, {len(wrong)} are not as told, first {wrong[0]}"


def _read(store: JobStore) -> Jobs:
    rows = store._db.execute(
        "select id, state, attempts, max_attempts, coalesce((select body from answer where "
        "job = id), (select body from payload where job = id), x'') from job"
    )
    return {number: (*how, body.decode()) for number, *how, body in rows}


def _recovered(jobs: Jobs) -> Jobs:
    """As the next leader has them."""
    found = dict(jobs)
    for number, (state, attempts, most, body) in jobs.items():
        if state == JobState.RUNNING:
            after = JobState.WAITING if attempts < most else JobState.QUARANTINED
            found[number] = int(after), attempts, most, body
    return found


def test_whenever_the_power_goes_all_that_was_told_is_on_the_disk(tmp_path: Path) -> None:
    calls = recorded(tmp_path, "full", "on time")
    synced = [name for call, name, _ in calls if call in ("fdatasync", "fsync")]
    assert sum(name.endswith("j.db-wal") for name in synced) > 100
    assert sum(name.endswith("j.db") for name in synced) > 10, "it was never checkpointed"

    assert broken(tmp_path, calls, CUTS) == []


@pytest.mark.parametrize(
    ("synchronous", "when", "told"),
    [
        ("normal", "on time", "are not as told"),
        ("off", "on time", "it is damaged|cannot be opened"),
        ("full", "early", "are not as told"),
    ],
)
def test_a_journal_that_tells_before_the_disk_has_it_is_found_out(
    tmp_path: Path, synchronous: str, when: str, told: str
) -> None:
    found = broken(tmp_path, recorded(tmp_path, synchronous, when), 20)
    assert any(re.search(told, problem) for problem in found), found
