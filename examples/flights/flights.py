"""SQL over a table whose rows lie on several machines: each asks its share, the leader merges.

The payload is one SELECT over the table, or for programs {"sql": "SELECT …", "as": "json"}. The
answer is what DuckDB would give on the whole table, to read or as JSON, and says which share is not
in it. What cannot be merged is refused; rules.py says what can, split.py how.

Options, of the handler or of one process:

    files       the share: patterns such as "sales/*.parquet" or "D:/sales/2024-*.csv", all of one
                kind; relative ones from this file's folder
    table       its name in queries; default "flights"
    shares      what each worker has, in words, for the answer: {"C": "January to April", …}
    csv         how to read CSV files, as DuckDB's read_csv takes it: {"nullstr": "NA"}
    most_rows   that a share may send to be merged; default 100,000
    threads     of one query; default 2
    memory_mib  of one query; default 1024
"""

from __future__ import annotations

import glob
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import duckdb
except ImportError as e:
    raise ImportError(
        "the flights example needs DuckDB 2 (Python 3.11 or later); python -m pip install -r "
        f"examples/flights/requirements.txt ({e})"
    ) from None
import rendering
from rules import CannotMerge
from split import split
from sqltree import quoted, said

from overlay import BadRequest

READERS = {".parquet": "read_parquet", ".csv": "read_csv", ".gz": "read_csv", ".tsv": "read_csv"}
MOST_BYTES = 8 * 1024 * 1024  # of a part; max_message_mib is 16 unless the configuration says so
MERGE_S = 10  # a merge runs on the process asked, where no deadline would end it
MERGE_MIB = 512

# What is wrong with a query or with what it meets; the rest is not its sender's to correct.
SENDERS = (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError)


def query(payload: bytes, context: Any) -> bytes:
    """This share's partial answer, and how to make the whole's of all of them.

    Raises BadRequest for a query that cannot be answered, with the words that it is about.
    """
    sql, form = _asked(payload)
    share = Share.of(context.options)
    db = _opened(share).cursor()
    try:
        halves = split(db, share.table, sql)
        rows = db.execute(halves.partial).fetchmany(share.most_rows + 1)
        table = db.execute(f"DESCRIBE {quoted(share.table)}").fetchall()
    except (CannotMerge, *SENDERS) as e:
        raise BadRequest(said(e)) from None
    finally:
        db.close()
    part = {
        "form": form,
        "table": {name: type_ for name, type_, *_ in table},
        "columns": halves.columns,
        "final": halves.final,
        "output": halves.output,
        "inexact": halves.inexact,
        "shares": dict(context.options.get("shares", {})),
        "rows": rows,
    }
    answer = json.dumps(part, separators=(",", ":"), ensure_ascii=False).encode()
    if len(rows) > share.most_rows or len(answer) > MOST_BYTES:
        most = f"{share.most_rows:,} rows or {MOST_BYTES:,} bytes"
        raise BadRequest(
            f"a share has more than {most} to send for this query; add LIMIT, or a WHERE, or have "
            "fewer groups and DISTINCT values"
        )
    return answer


def merge(parts: Sequence[Any]) -> bytes:
    """The whole's answer. Raises BadRequest when the shares' tables differ."""
    answers = {part.process_id: json.loads(part.result) for part in parts}
    asked = next(iter(answers.values()))
    _check_alike(answers)
    with _empty_database() as db:
        columns = [f"{quoted(name)} {type_}" for name, type_ in asked["columns"]]
        db.execute(f"CREATE TABLE partial ({', '.join(columns)})")
        for answer in answers.values():
            _insert(db, asked["columns"], answer["rows"])
        try:
            db.execute(f"CREATE TABLE answer AS {asked['final']}")
        except duckdb.InterruptException:
            raise BadRequest(f"the answers could not be merged within {MERGE_S} s") from None
        except SENDERS as e:
            raise BadRequest(said(e)) from None
        types = [type_ for _, type_, *_ in db.execute("DESCRIBE answer").fetchall()]
        as_text = "SELECT CAST(COLUMNS(*) AS VARCHAR) FROM answer ORDER BY rowid"
        rows = db.execute(as_text).fetchall()
    labels = {**dict.fromkeys(answers, ""), **asked["shares"]}
    told = rendering.Answered(
        columns=list(zip(asked["output"], types, strict=True)),
        rows=rows,
        shares={worker: labels[worker] for worker in labels if worker in answers},
        missing={worker: labels[worker] for worker in labels if worker not in answers},
        inexact=asked["inexact"],
    )
    return (rendering.as_json if asked["form"] == "json" else rendering.as_table)(told).encode()


def _asked(payload: bytes) -> tuple[str, str]:
    """The query, and "table" or "json"."""
    try:
        text = payload.decode().strip()
        asked = json.loads(text) if text.startswith("{") else {"sql": text}
    except ValueError as e:  # of UTF-8 or of JSON
        raise BadRequest(f"neither SQL nor JSON: {e}") from None
    sql, form = asked.get("sql"), asked.get("as", "table")
    if (
        not isinstance(sql, str)
        or not sql
        or form not in ("table", "json")
        or asked.keys() - {"sql", "as"}
    ):
        raise BadRequest('send a SELECT, or {"sql": "SELECT …", "as": "json" or "table"}')
    return sql, form


# The share.


@dataclass(frozen=True)
class Share:
    """What one worker answers from, and by which means."""

    files: tuple[str, ...]
    table: str = "flights"
    reading: str = ""
    most_rows: int = 100_000
    threads: int = 2
    memory_mib: int = 1024

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Share:
        """Raises ValueError or FileNotFoundError for options that cannot be right."""
        files = _files(options.get("files", []))
        suffixes = {Path(file).suffix.lower() for file in files}
        readers = {READERS.get(suffix, "") for suffix in suffixes}
        if len(readers) != 1 or "" in readers:
            kinds = ", ".join(sorted(suffixes))
            raise ValueError(
                f"option files: {kinds}; they must be all .parquet, or .csv, .csv.gz and .tsv"
            )
        (reader,) = readers
        how = {"union_by_name": True, **(options.get("csv", {}) if reader == "read_csv" else {})}
        settings = "".join(
            f", {_identifier(key)} = {_literal(value)}" for key, value in how.items()
        )
        return cls(
            files,
            str(options.get("table", "flights")),
            f"{reader}({_literal(files)}{settings})",
            int(options.get("most_rows", 100_000)),
            int(options.get("threads", 2)),
            int(options.get("memory_mib", 1024)),
        )


@lru_cache(maxsize=4)
def _opened(share: Share) -> duckdb.DuckDBPyConnection:
    """A database with nothing but the share, which can read nothing else and change nothing."""
    db = _database(share.threads, share.memory_mib)
    db.execute(f"CREATE VIEW {quoted(share.table)} AS SELECT * FROM {share.reading}")
    db.execute(f"SET allowed_paths = {_literal(share.files)}")
    _lock(db)
    return db


def _files(patterns: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for pattern in patterns:
        path = Path(__file__).parent / Path(pattern).expanduser()
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"option files: nothing on this machine matches '{path}'")
        found += files
    if not found:
        raise ValueError('option files: say what this worker has, such as ["sales/*.parquet"]')
    return tuple(Path(file).as_posix() for file in dict.fromkeys(found))


def _database(threads: int, memory_mib: int) -> duckdb.DuckDBPyConnection:
    """An empty one in memory, which loads and fetches nothing because a query names it."""
    db = duckdb.connect(
        config={
            "threads": str(threads),
            "memory_limit": f"{memory_mib}MiB",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
    )
    db.execute("SET TimeZone = 'UTC'")  # or each machine would read and write times in its own
    return db


def _lock(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")


def _literal(value: Any) -> str:
    """The value as SQL; of the configuration, so that what is odd is named and not guessed."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool | int | float):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def _identifier(key: str) -> str:
    if not key.isidentifier():
        raise ValueError(f"option csv: '{key}' is not one of read_csv's parameters")
    return key


# Merging.


def _check_alike(answers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises BadRequest, naming a column, unless all shares have the same columns and types."""
    first, *others = answers
    mine = answers[first]["table"]
    for other in others:
        theirs = answers[other]["table"]
        for name in {**mine, **theirs}:
            if mine.get(name) != theirs.get(name):
                here, there = mine.get(name, "missing"), theirs.get(name, "missing")
                differ = f"{name} is {here} at {first} and {there} at {other}"
                raise BadRequest(f"the shares' tables differ: {differ}")
        if answers[first]["final"] != answers[other]["final"]:
            raise BadRequest(f"{first} and {other} read the query differently; use the same DuckDB")


@contextmanager
def _empty_database() -> Iterator[duckdb.DuckDBPyConnection]:
    """One that can read no file; what runs too long in it is ended."""
    with _database(1, MERGE_MIB) as db:
        _lock(db)
        alarm = threading.Timer(MERGE_S, db.interrupt)
        alarm.daemon = True
        alarm.start()
        try:
            yield db
        finally:
            alarm.cancel()
            alarm.join()  # or it could touch what is closed


def _insert(
    db: duckdb.DuckDBPyConnection, columns: Sequence[tuple[str, str]], rows: Sequence[Any]
) -> None:
    values = ", ".join(f"CAST(r[{i}] AS {type_})" for i, (_, type_) in enumerate(columns, 1))
    from_json = "SELECT unnest(from_json(?::JSON, '[[\"VARCHAR\"]]')) AS r"
    db.execute(f"INSERT INTO partial SELECT {values} FROM ({from_json})", [json.dumps(rows)])
