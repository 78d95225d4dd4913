"""How fast jobs are accepted and answered, and what a large journal costs.

    python3 benchmarks/jobs.py [--folder FOLDER] [--waiting 1000000] [--kills 50]

Real processes: a leader, two team leaders and three workers on this machine, and one client. The
journal lies in FOLDER (default: a new folder where temporary files are), whose disk decides much.

    accepted      jobs accepted in a second: by one caller after the other, by 64 threads, and by
                  one caller who submits many at once
    end to end    jobs of `echo` answered in a second, from the first Submit to the last answer
    waiting       a leader with very many waiting jobs: its start, and its memory above that of one
                  with none
    kills         a leader that is killed again and again while jobs are submitted and run: those
                  that were accepted and are lost
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import overlay
from overlay.client.jobs import Job
from overlay.jobs.store import JobStore
from overlay.model.errors import CallFailed
from overlay.model.jobs import JobSpec
from overlay.model.segments import Caller
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, six_processes, until

SECONDS = 5.0
MIB = 1024 * 1024
MANY = [b"x" * 100] * 50_000  # payloads that are submitted at once


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures jobs.")
    parser.add_argument("--folder", type=Path, help="where the journal lies")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="jobs of a large journal")
    parser.add_argument("--kills", type=int, default=50, help="of the leader")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rates(folder / "rates")
        large(folder / "large", args.waiting)
        kills(folder / "kills", args.kills)
    finally:
        shutil.rmtree(folder)
    return 0


def journalled(folder: Path) -> Overlay:
    return Overlay(folder, six_processes(journal="journal.db", max_jobs=10_000_000))


def rates(folder: Path) -> None:
    with journalled(folder) as six, overlay.connect(six.address("A")) as client:
        six.serve("A")  # alone, so that the jobs wait and nothing else is measured
        show_accepted(client)
        client.change_jobs("cancel", states=["waiting"])
        six.start("B", "C", "D", "E", "F")
        drain(six)
        began = time.perf_counter()
        client.later_many(None, MANY)
        drain(six)
        show("end to end, from one caller", len(MANY) / (time.perf_counter() - began))


def show_accepted(client: overlay.Client) -> None:
    """How many jobs are accepted a second, by who submits them."""
    show("accepted, one caller", rate(lambda: client.later(None, b"x" * 100), 1))
    show("accepted, 64 threads", rate(lambda: client.later(None, b"x" * 100), 64))
    began = time.perf_counter()
    client.later_many(None, MANY)
    show("accepted, many at once", len(MANY) / (time.perf_counter() - began))


def rate(submit: object, threads: int) -> float:
    """Calls in a second."""
    assert callable(submit)
    until_, counts = time.perf_counter() + SECONDS, [0] * threads

    def run(n: int) -> None:
        while time.perf_counter() < until_:
            submit()
            counts[n] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    return sum(counts) / (time.perf_counter() - began)


def drain(six: Overlay) -> None:
    """Waits until no job waits or runs."""

    def is_empty() -> bool:
        jobs = six.metrics("A").jobs
        return not (jobs.waiting or jobs.running)

    until(is_empty, 300, "all jobs are answered")


def large(folder: Path, count: int) -> None:
    with journalled(folder) as six:
        six.start("A")
        empty = memory(six)
        six.kill("A")
        (folder / "journal.db").unlink()
        store = JobStore(folder / "journal.db")
        spec = JobSpec(pb2.Request(mode=pb2.ANY).SerializeToString(), b"x" * 100)
        for _ in range(count // 10_000):
            store.begin()
            store.accept(Caller("127.0.0.1"), [spec] * 10_000, time.time())
            store.commit()
        store.close()
        began = time.perf_counter()
        six.serve("A")
        show(f"start with {count:,} waiting jobs", time.perf_counter() - began, "s")
        time.sleep(5)
        assert six.metrics("A").jobs.waiting > count * 0.9
        show("memory above that of an empty one", (memory(six) - empty) / MIB, "MiB")


def memory(six: Overlay) -> float:
    return float(psutil.Process(six.processes["A"].pid).memory_info().rss)


def kills(folder: Path, count: int) -> None:
    """Four threads submit jobs with keys while the leader is killed."""
    stop, accepted, lock = threading.Event(), dict[str, bytes](), threading.Lock()
    with journalled(folder) as six:
        six.start()

        def submit(thread: int) -> None:
            n = 0
            with overlay.connect(six.address("A"), patience_s=20) as client:
                while not stop.is_set():
                    payloads = [b"%d %d" % (thread, n + i) for i in range(50)]
                    keys = [f"{thread} {n + i}" for i in range(50)]
                    try:
                        jobs = client.later_many(None, payloads, keys=keys, attempts=100)
                    except CallFailed:
                        time.sleep(0.1)
                        continue
                    with lock:
                        accepted.update(zip((job.id for job in jobs), payloads, strict=True))
                    n += 50

        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(submit, thread) for thread in range(4)]
            for _ in range(count):
                time.sleep(random.uniform(0.2, 1.0))
                six.kill("A")
                six.serve("A")
            stop.set()
            for thread in threads:
                thread.result()
        drain(six)
        wrong = 0
        with overlay.connect(six.address("A")) as client:
            for id_, payload in accepted.items():
                found = answer_of(client.job(id_))
                wrong += not found.endswith(b": " + payload)
        show(f"accepted over {count} kills", len(accepted), "")
        show("of these lost or wrong", wrong, "")


def answer_of(job: Job) -> bytes:
    try:
        return bytes(job.result(10))
    except CallFailed as e:
        print(f"  {job}: {e}")
        return b""


def show(what: str, figure: float, unit: str = "/s") -> None:
    digits = 2 if figure < 10 and figure != int(figure) else 0
    print(f"{what:<36}{figure:>12,.{digits}f} {unit}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
