"""SQL over a table whose rows are on several machines: each queries its share, the leader merges.

The payload is one SELECT over the table, or for programs {"sql": "SELECT …", "as": "json"}. The
answer is that of DuckDB on the whole table, as text or JSON, and names the missing shares. A query
that cannot be merged is rejected: rules.py defines what can be merged, split.py how, and share.py
what a worker has.

Options of the handler, or of one process:

    files       the share: patterns such as "sales/*.parquet" or "D:/sales/2024-*.csv", all of one
                kind; relative to this file's folder
    table       its name in queries; default "flights"
    shares      a label of each worker's share for the answer: {"C": "January to April", …}
    csv         parameters of DuckDB's read_csv: {"nullstr": "NA"}; for files without a header
                {"header": false, "names": ["day", "shop", "sold"]}
    most_rows   the most rows that a share sends to be merged; default 100,000
    threads     per query; default 2
    memory_mib  per query; default 1024
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from share import CannotRead, Share, TimeIsUp, database, interrupted, lock, opened
from split import split
from sqltree import quoted, said

from overlay import BadRequest

MAX_BYTES = 8 * 1024 * 1024  # of a part; max_message_mib is 16 by default
MAX_ROWS = 500_000  # of an answer, which the process asked holds in memory
MERGE_S = 10  # a merge runs in the process asked, where no deadline would end it
MERGE_MIB = 512
RESERVE_S = 0.5  # of the deadline, for an error message; a fifth of a short deadline
MUCH_CSV = 16 * 1024 * 1024  # bytes read per query; above, the answer suggests Parquet

# Errors in the query or in the data it reads; the sender cannot correct any others.
SENDERS = (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError)


def query(payload: bytes, context: Any) -> bytes:
    """This share's partial answers, and how to merge those of all shares.

    Raises BadRequest for a query that cannot be answered, quoting the part that is wrong, and for
    one that cannot be answered in time.
    """
    sql, form = _asked(payload)
    share = Share.of(context.options)
    with _in_time(share, context) as left_s:
        found = opened(share, left_s)
        halves = split(found.looks.cursor(), share.table, sql)
        with found.rows.cursor() as db, interrupted(db, left_s()):
            rows = [
                db.execute(partial.sql).fetchmany(share.most_rows + 1)
                for partial in halves.partials
            ]
    part = {
        "form": form,
        "table": dict(found.columns),
        "partials": [partial.columns for partial in halves.partials],
        "final": halves.final,
        "output": halves.output,
        "inexact": halves.inexact,
        "shares": dict(context.options.get("shares", {})),
        "csv": share.csv_bytes,
        "rows": rows,
    }
    answer = json.dumps(part, separators=(",", ":"), ensure_ascii=False).encode()
    if max(map(len, rows), default=0) > share.most_rows or len(answer) > MAX_BYTES:
        most = f"{share.most_rows:,} rows or {MAX_BYTES:,} bytes"
        raise BadRequest(
            f"a share has more than {most} to send for this query; add LIMIT, or a WHERE, or have "
            "fewer groups and DISTINCT values"
        )
    return answer


def merge(parts: Sequence[Any]) -> bytes:
    """The answer for the whole table. Raises BadRequest if the shares' tables differ."""
    answers = {part.process_id: json.loads(part.result) for part in parts}
    asked = next(iter(answers.values()))
    _check_alike(answers)
    types, rows = _merged(asked, list(answers.values()))
    labels = {**dict.fromkeys(answers, ""), **asked["shares"]}
    answered = rendering.Answered(
        columns=list(zip(asked["output"], types, strict=True)),
        rows=rows,
        shares={worker: labels[worker] for worker in labels if worker in answers},
        missing={worker: labels[worker] for worker in labels if worker not in answers},
        notes=[*([rendering.INEXACT] if asked["inexact"] else []), *_much_csv(answers)],
    )
    return (rendering.as_json if asked["form"] == "json" else rendering.as_table)(answered).encode()


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


@contextmanager
def _in_time(share: Share, context: Any) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds left for the query. Raises BadRequest."""
    had_s = context.remaining_s()
    end = time.monotonic() + had_s - min(RESERVE_S, had_s / 5)
    try:
        yield lambda: end - time.monotonic()
    except TimeIsUp as e:
        raise BadRequest(f"{_late(share, context, had_s)}; {e}, the next query goes on") from None
    except CannotRead as e:
        raise BadRequest(f"what {context.process_id} has cannot be read: {e}") from None
    except duckdb.InterruptException:
        raise BadRequest(_late(share, context, had_s)) from None
    except duckdb.OutOfMemoryException:
        most = f"the {share.memory_mib} MiB of option memory_mib"
        raise BadRequest(f"{context.process_id} needs more for this query than {most}") from None
    except (CannotMerge, *SENDERS) as e:
        raise BadRequest(said(e) + _hint(share, e)) from None
    except RecursionError:
        raise BadRequest("the query is nested too deeply") from None


def _late(share: Share, context: Any, had_s: float) -> str:
    text = (
        f"{context.process_id} could not answer within the {had_s:.1f} s that the request had left "
        "of its deadline; give it a longer one (--deadline)"
    )
    if not share.csv_bytes:
        return text
    return f"{text}, or {_make_parquet(context.process_id, share.csv_bytes)}"


def _make_parquet(workers: str, csv_bytes: int) -> str:
    first = workers.partition(",")[0]
    return (
        f"make Parquet of the {csv_bytes / 1e6:,.0f} MB of CSV that each query reads at {workers}: "
        f"python to_parquet.py CONFIG {first}"
    )


def _hint(share: Share, error: Exception) -> str:
    """A remedy if a CSV file has a value that its detected column type does not allow."""
    column = re.search(r'when converting column "([^"]+)"', str(error))
    if share.reader != "read_csv" or not column:
        return ""
    return _type_hint(column[1])


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
                raise BadRequest(f"the shares' tables differ: {differ}{_type_hint(name)}")
        if answers[first]["final"] != answers[other]["final"]:
            raise BadRequest(f"{first} and {other} read the query differently; use the same DuckDB")


def _merged(
    asked: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[tuple[str | None, ...]]]:
    """The answer's types, and its rows as text. Raises BadRequest."""
    names = ", ".join(quoted(f"@r{i}") for i in range(len(asked["output"])))
    with database(1, MERGE_MIB) as db, interrupted(db, MERGE_S):
        lock(db)
        try:
            for n, columns in enumerate(asked["partials"]):
                defined = ", ".join(f"{quoted(name)} {type_}" for name, type_ in columns)
                db.execute(f"CREATE TABLE partial{n} ({defined})")
                for answer in answers:
                    _insert(db, f"partial{n}", columns, answer["rows"][n])
            db.execute(f"CREATE TABLE answer({names}) AS {asked['final']}")
            types = [type_ for _, type_, *_ in db.execute("DESCRIBE answer").fetchall()]
            as_text = "SELECT CAST(COLUMNS(*) AS VARCHAR) FROM answer ORDER BY rowid"
            rows = db.execute(as_text).fetchmany(MAX_ROWS + 1)
        except duckdb.InterruptException:
            raise BadRequest(f"the answers could not be merged within {MERGE_S} s") from None
        except duckdb.OutOfMemoryException:
            raise BadRequest(f"the answers need more than {MERGE_MIB} MiB to be merged") from None
        except SENDERS as e:
            raise BadRequest(said(e)) from None
    if len(rows) > MAX_ROWS:
        raise BadRequest(f"the answer has more than {MAX_ROWS:,} rows; add LIMIT")
    return types, rows


def _insert(
    db: duckdb.DuckDBPyConnection,
    table: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Any],
) -> None:
    values = ", ".join(f"CAST(r[{i}] AS {type_})" for i, (_, type_) in enumerate(columns, 1))
    from_json = "SELECT unnest(from_json(?::JSON, '[[\"VARCHAR\"]]')) AS r"
    db.execute(f"INSERT INTO {table} SELECT {values} FROM ({from_json})", [json.dumps(rows)])


def _type_hint(column: str) -> str:
    types = json.dumps({"csv": {"types": {column: "VARCHAR"}}}, ensure_ascii=False)
    return f"; where it is read from CSV, its type can be said in the workers' options: {types}"


def _much_csv(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note on how to speed up the next answer."""
    read = {worker: answer["csv"] for worker, answer in answers.items()}
    much = [worker for worker, size in read.items() if size > MUCH_CSV]
    if not much:
        return []
    remedy = _make_parquet(", ".join(much), sum(read[worker] for worker in much))
    return [f"to speed up queries: {remedy}"]
