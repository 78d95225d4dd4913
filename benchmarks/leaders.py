"""How fast several leaders accept jobs together, and for how long none when one of them dies.

    python3 benchmarks/leaders.py [--folder FOLDER] [--deaths 5]

Real processes: three leaders, a team leader, two workers and three NATS servers on this machine,
and one client that knows all leaders. The servers wait for the disk of FOLDER before they confirm.

    accepted    jobs accepted in a second, while no worker runs: by one caller after the other, by
                64 threads, and by one caller who submits many at once
    deaths      64 threads submit jobs with keys; the leader that has the jobs and its NATS server
                are killed: seconds without an accepted job, and those that were accepted and lost
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import overlay
from benchmarks.jobs import show_accepted
from overlay.model.errors import CallFailed
from tests.harness.cluster import Overlay, until
from tests.harness.leaders import LEADERS, everybody, holder, three_leaders
from tests.harness.nats_servers import nats_servers

CALLERS, PAUSE_S = 64, 0.05
BEFORE_S, AFTER_S = 2.0, 3.0  # of a death


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures jobs of several leaders.")
    parser.add_argument("--folder", type=Path, help="where the servers keep the jobs")
    parser.add_argument("--deaths", type=int, default=5, help="of a leader with its server")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rates(folder / "rates")
        for number in range(args.deaths):
            death(folder / f"death{number}")
    finally:
        shutil.rmtree(folder)
    return 0


def rates(folder: Path) -> None:
    folder.mkdir()
    with nats_servers(folder) as servers:
        config = three_leaders(servers.journal, max_jobs=10_000_000)
        with Overlay(folder, config) as cluster, overlay.connect(everybody(cluster)) as client:
            cluster.serve(*LEADERS)
            until(lambda: holder(cluster), 30, "a leader has the jobs")
            show_accepted(client)


def death(folder: Path) -> None:
    folder.mkdir()
    accepted: dict[str, tuple[float, bytes]] = {}
    stopped = threading.Event()
    with nats_servers(folder) as servers:
        config = three_leaders(servers.journal)
        with Overlay(folder, config) as cluster, overlay.connect(everybody(cluster)) as client:
            cluster.start()
            until(lambda: holder(cluster), 30, "a leader has the jobs")

            def call(caller: int) -> None:
                for number in itertools.count():
                    if stopped.wait(PAUSE_S):
                        return
                    key = f"{caller}-{number}"
                    try:
                        job = client.later(None, key.encode(), key=key, timeout=60)
                    except CallFailed:
                        continue
                    accepted[job.id] = time.monotonic(), key.encode()

            with ThreadPoolExecutor(CALLERS) as callers:
                for caller in range(CALLERS):
                    callers.submit(call, caller)
                until(lambda: accepted, 30)
                time.sleep(BEFORE_S)
                at, killed = holder(cluster), time.monotonic()
                os.kill(cluster.processes[at].pid, signal.SIGKILL)
                servers.kill(LEADERS.index(at))
                goes_on = killed + 1.0
                until(lambda: any(when > goes_on for when, _ in list(accepted.values())), 60)
                time.sleep(AFTER_S)
                stopped.set()
            with ThreadPoolExecutor(16) as callers:
                answers = callers.map(lambda id_: client.job(id_).result(60), list(accepted))
                wrong = sum(
                    not answer.endswith(payload)
                    for answer, (_, payload) in zip(answers, accepted.values(), strict=True)
                )
        times = sorted(when for when, _ in accepted.values())
        gap = max(b - a for a, b in itertools.pairwise(times))
        print(f"  {gap:.1f} s without accepts; {len(accepted):,} accepted, {wrong} wrong or lost")


if __name__ == "__main__":
    sys.exit(main())
