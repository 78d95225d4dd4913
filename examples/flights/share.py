"""One worker's share: its files as one table, in a database that can read nothing else.

Queries are analysed in a second database, whose table has the same columns and no rows, so that a
query opens the files only once, for their rows.
"""

from __future__ import annotations

import glob
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
from csvfiles import File, Forms
from sqltree import described, literal, quoted, said

READERS = {".parquet": "read_parquet", ".csv": "read_csv", ".gz": "read_csv", ".tsv": "read_csv"}
MAX_OPEN = 2  # databases: for the current files, and for those before a change

_open: dict[Share, Opened] = {}
_opening = threading.Lock()  # guards _open, and the detection of formats, which is done once


class TimeIsUp(Exception):
    """Not all formats were detected in time. Says how many; the next query goes on from there."""


class CannotRead(Exception):
    """The files, or the options for reading them, are wrong."""


@dataclass(frozen=True)
class Share:
    """A worker's files and settings. csv: parameters of read_csv, as JSON."""

    files: tuple[File, ...]
    table: str = "flights"
    reader: str = "read_parquet"
    csv: str = "{}"
    most_rows: int = 100_000
    threads: int = 2
    memory_mib: int = 1024

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Share:
        """Raises ValueError or FileNotFoundError for invalid options."""
        paths = _paths(options.get("files", []))
        suffixes = {Path(path).suffix.lower() for path in paths}
        readers = {READERS.get(suffix, "") for suffix in suffixes}
        if len(readers) != 1 or "" in readers:
            kinds = ", ".join(sorted(suffixes))
            raise ValueError(
                f"option files: {kinds}; they must be all .parquet, or .csv, .csv.gz and .tsv"
            )
        return cls(
            tuple(map(File.of, paths)),
            str(options.get("table", "flights")),
            readers.pop(),
            json.dumps(options.get("csv", {}), sort_keys=True),
            int(options.get("most_rows", 100_000)),
            int(options.get("threads", 2)),
            int(options.get("memory_mib", 1024)),
        )

    @property
    def csv_bytes(self) -> int:
        """The bytes of CSV that each query reads."""
        return sum(file.size for file in self.files) if self.reader == "read_csv" else 0


@dataclass(frozen=True)
class Opened:
    """rows: the share, where queries run. looks: the same table without rows, to analyse them."""

    rows: duckdb.DuckDBPyConnection
    looks: duckdb.DuckDBPyConnection
    columns: Sequence[tuple[str, str]]


def opened(share: Share, left_s: Callable[[], float]) -> Opened:
    """The databases of the share, which can read nothing else and change nothing.

    Safe from any thread. Raises TimeIsUp if the time is up before all formats are detected, and
    CannotRead.
    """
    if not _opening.acquire(timeout=max(0.0, left_s())):
        raise TimeIsUp("the files are being looked at for another query")
    try:
        if share not in _open:
            made = _opened(share, left_s)
            while len(_open) >= MAX_OPEN:
                del _open[next(iter(_open))]
            _open[share] = made
        return _open[share]
    finally:
        _opening.release()


def _opened(share: Share, left_s: Callable[[], float]) -> Opened:
    try:
        rows = with_table(share, left_s)
    except duckdb.Error as e:
        raise CannotRead(said(e)) from None
    rows.execute(f"SET allowed_paths = {literal([file.path for file in share.files])}")
    lock(rows)
    columns = described(rows, f"FROM {quoted(share.table)}")
    looks = database(1, share.memory_mib)
    empty = ", ".join(f"NULL::{type_} AS {quoted(name)}" for name, type_ in columns)
    looks.execute(f"CREATE VIEW {quoted(share.table)} AS SELECT {empty} WHERE false")
    lock(looks)
    return Opened(rows, looks, columns)


def with_table(share: Share, left_s: Callable[[], float]) -> duckdb.DuckDBPyConnection:
    """A database with the share as its table, not locked yet. Raises TimeIsUp."""

    def going_on(known: int) -> None:
        if left_s() <= 0:
            raise TimeIsUp(f"{known:,} of {len(share.files):,} CSV files were looked at")

    db = database(share.threads, share.memory_mib)
    if share.reader == "read_csv":
        forms = _forms(share.csv)
        forms.look(db, share.files, going_on)
        reading = forms.reading(db)
    else:
        paths = literal([file.path for file in share.files])
        reading = f"SELECT * FROM read_parquet({paths}, union_by_name = true)"
    db.execute(f"CREATE VIEW {quoted(share.table)} AS {reading}")
    return db


@lru_cache(maxsize=2)
def _forms(csv: str) -> Forms:
    return Forms(json.loads(csv))


def _paths(patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        path = Path(__file__).parent / Path(pattern).expanduser()
        paths = sorted(glob.glob(str(path), recursive=True))
        if not paths:
            raise FileNotFoundError(f"option files: nothing on this machine matches '{path}'")
        found += paths
    if not found:
        raise ValueError('option files: say what this worker has, such as ["sales/*.parquet"]')
    return [Path(path).as_posix() for path in dict.fromkeys(found)]


def database(threads: int, memory_mib: int) -> duckdb.DuckDBPyConnection:
    """An empty database in memory; queries cannot make it load or download extensions."""
    db = duckdb.connect(
        config={
            "threads": str(threads),
            "memory_limit": f"{memory_mib}MiB",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
    )
    db.execute("SET TimeZone = 'UTC'")  # otherwise each machine would use its own
    return db


def lock(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")


@contextmanager
def interrupted(db: duckdb.DuckDBPyConnection, after_s: float) -> Iterator[None]:
    """After that time, running queries raise duckdb.InterruptException."""
    ended = threading.Event()

    def alarm() -> None:
        wait_s = max(0.0, after_s)
        while not ended.wait(wait_s):
            db.interrupt()
            wait_s = 0.05  # again, for queries that start later

    thread = threading.Thread(target=alarm, name="alarm", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # otherwise it could use a closed database
