"""Several leaders' copies of the same jobs, as their journals keep them, and what they hold."""

from __future__ import annotations

from pathlib import Path

from overlay.jobs.copy_file import CopyFile
from overlay.jobs.log import Log
from overlay.jobs.replicas import Replica
from overlay.jobs.store import JobStore, StoreLimits
from tests.harness.cluster import until


class Leader:
    """A replica without its journal's thread: each test takes the turns."""

    def __init__(
        self, log: Log, path: Path, id_: str = "A", limits: StoreLimits | None = None
    ) -> None:
        self.log, self.file = log, CopyFile(path)
        self.replica = Replica(log, self.file, id_, f"{id_.lower()}.example:50051")
        self.store = JobStore(self.file, limits)

    def takes_over(self, within_s: float = 20.0) -> Leader:
        def has_jobs() -> bool:
            self.replica.turn()
            return self.replica.has_jobs

        until(has_jobs, within_s, f"{self.replica.me} has the jobs; {self.replica.refusal}")
        self.store.begin()
        self.store.take_up((), True, 1.0)
        self.store.commit()
        return self

    def follows(self) -> Leader:
        self.replica.turn()
        assert not self.replica.problem, self.replica.problem
        return self

    @property
    def rows(self) -> list[str]:
        """Everything in the file but how far it has got."""
        tables = ("kind", "job", "payload", "answer", "schedule", "sqlite_sequence")
        return [
            f"{table} {row}"
            for table in tables
            for row in self.file.execute(f"select * from {table} order by 1").fetchall()
        ]

    def close(self) -> None:
        self.replica.close()
        self.file.close()
