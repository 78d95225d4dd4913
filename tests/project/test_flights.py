"""The example of SQL over shares: compared with DuckDB alone, then on six real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.version_info < (3, 11):
    pytest.skip("DuckDB 2 needs Python 3.11", allow_module_level=True)

import duckdb

import overlay
from overlay import BadRequest
from overlay.client.sync import CallFailed
from overlay.model.segments import Part
from tests.harness.cluster import ROOT, free_port, run_without, running

FOLDER = ROOT / "examples" / "flights"
sys.path.insert(0, str(FOLDER))

import csvfiles  # noqa: E402
import flights  # noqa: E402
import prepare  # noqa: E402
import share as shares  # noqa: E402

SHIPPED = json.loads((FOLDER / "flights.json").read_text())
LABELS = SHIPPED["handlers"]["query"]["options"]["shares"]


@dataclass
class Whole:
    """A table in one place, and the same rows in shares. files: of each worker."""

    db: duckdb.DuckDBPyConnection
    files: dict[str, list[str]]
    options: dict[str, Any]

    def at(self, worker: str) -> Any:
        options = {"files": self.files[worker], "shares": LABELS, **self.options}
        return SimpleNamespace(process_id=worker, options=options, remaining_s=lambda: 60.0)

    def shared(self, sql: str, workers: str = "CDF", form: str = "json") -> Any:
        payload = json.dumps({"sql": sql, "as": form}).encode()
        parts = [Part(w, result=flights.query(payload, self.at(w))) for w in workers]
        merged = flights.merge(parts).decode()
        return json.loads(merged) if form == "json" else merged

    def alone(self, sql: str) -> tuple[list[tuple[str, str]], list[tuple[str | None, ...]]]:
        """The answer's columns, and its rows as DuckDB writes them."""
        described = self.db.execute(f"DESCRIBE {sql}").fetchall()
        names = ", ".join(f'"{i}"' for i in range(len(described)))
        self.db.execute(f"CREATE OR REPLACE TEMP TABLE answer AS FROM ({sql}) AS a({names})")
        rows = self.db.execute("SELECT CAST(COLUMNS(*) AS VARCHAR) FROM answer ORDER BY rowid")
        return [(name, type_) for name, type_, *_ in described], rows.fetchall()


def same(whole: Whole, sql: str, *, in_order: bool) -> None:
    columns, rows = whole.alone(sql)
    answer = whole.shared(sql)
    assert [(column["name"], column["type"]) for column in answer["columns"]] == columns
    wanted = [
        [flights.rendering._value(v, t) for v, (_, t) in zip(r, columns, strict=True)] for r in rows
    ]
    found = answer["rows"]
    if not in_order:
        wanted, found = sorted(wanted, key=repr), sorted(found, key=repr)
    assert found == wanted


@pytest.fixture(scope="module", autouse=True)
def three_shares_in_one_process() -> Iterator[None]:
    """A worker has one share; here one process keeps those of three open, of two tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "MAX_OPEN", 6)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flights") / "data"
    prepare.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def year(data) -> Iterator[Whole]:
    """The flights of 2013, four months at each worker."""
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.execute(f"CREATE VIEW flights AS FROM '{data.as_posix()}/month-*.parquet'")
        files = {
            worker: [
                f"{data.as_posix()}/{Path(pattern).name}" for pattern in entry["options"]["files"]
            ]
            for worker, entry in SHIPPED["processes"].items()
            if entry["role"] == "worker"
        }
        yield Whole(db, files, {})


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM flights",
        "SELECT count(*), sum(distance), avg(air_time), count(DISTINCT dest) FROM flights "
        "WHERE false",
        "SELECT carrier, count(*) AS n, avg(arr_delay), count(DISTINCT tailnum), "
        "count(DISTINCT dest) FROM flights GROUP BY carrier ORDER BY n DESC, carrier",
        "SELECT month, origin, min(dep_delay), max(tailnum), sum(distance) FILTER (WHERE day > 15) "
        "FROM flights f WHERE f.carrier IN ('UA', 'AA') GROUP BY 1, 2 HAVING count(*) > 700 "
        "ORDER BY 2, 1",
        "SELECT date_trunc('week', time_hour) AS week, round(avg(dep_delay), 2), "
        "count_if(dep_delay > 60) FROM flights GROUP BY ALL ORDER BY ALL LIMIT 10 OFFSET 3",
        "SELECT CASE WHEN distance > 1000 THEN 'far' ELSE 'near' END AS kind, "
        "sum(DISTINCT distance), avg(DISTINCT air_time) FILTER (WHERE month = 2) FROM flights "
        "GROUP BY kind ORDER BY kind",
        "SELECT upper(origin) AS o, count(*) AS n, 2 * n FROM flights GROUP BY o ORDER BY sum(day)",
        "SELECT * FROM flights ORDER BY arr_delay DESC NULLS LAST, time_hour, flight LIMIT 7",
        "SELECT DISTINCT origin, dest FROM flights f ORDER BY f.dest, 1 DESC LIMIT 9 OFFSET 2",
        "SELECT DISTINCT month % 4 FROM flights GROUP BY month HAVING month > 1 ORDER BY 1 DESC",
        "SELECT tailnum FROM flights GROUP BY tailnum ORDER BY count(*) DESC, tailnum LIMIT 5",
        "FROM flights SELECT bool_or(month = 3), bit_xor(flight), max(time_hour), min(day::TEXT)",
    ],
)
def test_three_shares_answer_as_the_whole_table_does(year, sql):
    same(year, sql, in_order="ORDER BY" in sql)


def test_sums_of_doubles_agree_but_for_the_order_of_addition_and_say_so(year):
    sql = "SELECT sum(distance / air_time) FROM flights"
    answer = year.shared(sql)
    ((total,),) = answer["rows"]

    assert total == pytest.approx(float(year.alone(sql)[1][0][0]), rel=1e-12)
    assert answer["notes"] == [flights.rendering.INEXACT]
    assert year.shared("SELECT sum(distance) FROM flights")["notes"] == []


VARIANCES = ("stddev", "stddev_samp", "stddev_pop", "variance", "var_samp", "var_pop")


@pytest.mark.parametrize(
    ("values", "rest"),
    [
        (
            ["arr_delay", "year", "distance / air_time", "CASE WHEN flight = 1 THEN 0.1 END"],
            "FROM flights",
        ),
        (["arr_delay", "DISTINCT air_time"], "FROM flights WHERE day > 3 GROUP BY origin"),
        (
            ["epoch(time_hour)", "CASE WHEN month = 3 THEN day END"],
            "FROM flights GROUP BY carrier, month = 2 HAVING stddev(day) > 0",
        ),
        (["dep_time"], "FROM flights WHERE flight = 1 GROUP BY month, day, origin"),
    ],
)
def test_variances_agree_with_those_of_the_whole_table(year, values, rest):
    items = ", ".join(f"{name}({value})" for value in values for name in VARIANCES)
    filtered = "count(*), var_pop(day) FILTER (WHERE month > 6), count(DISTINCT dest)"
    sql = f"SELECT {filtered}, {items} {rest} ORDER BY ALL"
    answer = year.shared(sql)
    assert answer["notes"] == [flights.rendering.INEXACT]
    wanted = [[v and float(v) for v in row] for row in year.alone(sql)[1]]  # NULLs stay
    assert len(answer["rows"]) == len(wanted)
    for row, other in zip(answer["rows"], wanted, strict=True):
        assert row == [v and pytest.approx(v, rel=1e-9, abs=1e-12) for v in other]


NESTED = [
    "WITH late AS (SELECT carrier, arr_delay AS d FROM flights WHERE arr_delay > 60) "
    "SELECT carrier, count(*), max(late.d) FROM late GROUP BY carrier ORDER BY carrier",
    "WITH late(c, d) AS (FROM (SELECT carrier, arr_delay FROM flights) WHERE arr_delay > 60), "
    "far AS (SELECT c, d * 2 AS twice FROM late x WHERE c <> 'UA') "
    "SELECT * FROM far ORDER BY twice DESC, c LIMIT 5",
    "SELECT max(n), avg(n), median(n), count(*) FROM (SELECT tailnum, count(*) AS n FROM flights "
    "GROUP BY tailnum) WHERE n > 10",
    "WITH months AS (SELECT month, count(*) AS n, avg(dep_delay) AS late FROM flights GROUP BY 1) "
    "SELECT month, n, n - lag(n) OVER (ORDER BY month) AS more, rank() OVER (ORDER BY late) "
    "FROM months ORDER BY month",
    "SELECT carrier, count(*) * 100 / (SELECT count(*) FROM flights) AS share FROM flights "
    "GROUP BY carrier HAVING avg(arr_delay) > (SELECT avg(arr_delay) FROM flights) "
    "ORDER BY share DESC, carrier",
    "SELECT carrier, rank() OVER (ORDER BY count(*) DESC) AS place FROM flights GROUP BY carrier "
    "QUALIFY place < 4 ORDER BY place",
    "SELECT count(*) FROM (SELECT DISTINCT origin, dest FROM flights)",
    "SELECT origin, n FROM (SELECT origin, count(*) AS n FROM flights GROUP BY ALL) AS o "
    "WHERE n IN (SELECT max(m) FROM (SELECT count(*) AS m FROM flights GROUP BY origin))",
    "WITH o AS (SELECT origin AS place, count(*) AS away FROM flights GROUP BY 1), "
    "d AS (SELECT dest AS place, count(*) AS here FROM flights GROUP BY 1) "
    "SELECT o.place, away, coalesce(here, 0) AS here FROM o LEFT JOIN d USING (place) ORDER BY ALL",
    "SELECT 'far' AS kind, count(*) AS n FROM flights WHERE distance > 1000 UNION ALL "
    "SELECT 'near', count(*) FROM flights WHERE distance <= 1000 ORDER BY n",
    "SELECT carrier FROM flights WHERE month = 1 GROUP BY 1 EXCEPT "
    "SELECT carrier FROM flights GROUP BY 1 HAVING count(*) > 20000 ORDER BY carrier",
    "WITH a AS (SELECT month, sum(distance) AS s FROM flights GROUP BY month) "
    "SELECT x.month, y.s FROM a x JOIN a y ON x.month = y.month + 1 WHERE EXISTS "
    "(SELECT 1 FROM a z WHERE z.s > y.s AND z.month = x.month) ORDER BY 1",
    "SELECT (SELECT max(day) FROM flights) - (SELECT min(day) FROM flights) AS days UNION SELECT 1",
    "SELECT month, month FROM (SELECT month, month FROM flights GROUP BY 1) ORDER BY 1 LIMIT 3",
]


@pytest.mark.parametrize("sql", NESTED)
def test_nested_queries_are_answered_as_on_the_whole_table(year, sql):
    same(year, sql, in_order="ORDER BY" in sql)


def test_a_query_that_is_used_twice_is_sent_once(year):
    payload = b"WITH a AS (SELECT count(*) AS n FROM flights) SELECT x.n FROM a x, a y"
    assert len(json.loads(flights.query(payload, year.at("C")))["rows"]) == 1


# Every kind of value, in shares of different sizes, one of them empty. The doubles are eighths, so
# that their sums are the same in any order.
ODD = """
SELECT i AS id, i % 3 AS three, (hash(i * 7) % 40)::INTEGER AS n, CASE WHEN i % 7 <> 0 THEN
    (hash(i) % 1000)::BIGINT - 500 END AS big, (hash(i + 1) % 800 / 8)::DOUBLE - 50 AS eighths,
    (hash(i + 2) % 100000 / 1000)::DECIMAL(9, 3) AS price, chr((97 + hash(i + 3) % 5)::INTEGER)
    AS letter, CASE WHEN i % 11 = 0 THEN NULL WHEN i % 5 = 0 THEN ''
    ELSE 'a "b", ' || i % 9 || chr(10) END AS odd, DATE '2024-01-31' + (i % 60)::INTEGER AS date,
    i % 4 = 0 AS fourth,
    (i % 6 * 1.5)::FLOAT AS small, TIMESTAMP '2024-02-28 23:59:59.5' + INTERVAL (i) HOUR AS moment
FROM range(400) AS r(i)
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("odd")
    files = {}
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.execute(f"CREATE TABLE t AS {ODD}")
        for worker, which in {"C": "id < 250", "D": "id >= 250", "F": "false"}.items():
            file = (folder / f"{worker}.parquet").as_posix()
            db.execute(f"COPY (FROM t WHERE {which}) TO '{file}' (FORMAT parquet)")
            files[worker] = [file]
        yield Whole(db, files, {"table": "t", "threads": 1})


KEYS = ["three", "letter", "odd", "date", "fourth", "small", "n % 4", "date_trunc('month', date)"]
KEYS += ["upper(letter)", "CASE WHEN big > 0 THEN letter END", "moment::DATE", "coalesce(odd, 'x')"]
VALUES = ["n", "big", "eighths", "price", "big + n", "abs(big)", "price * 2", "small"]
CONDITIONS = [
    "n > 20",
    "big IS NULL",
    "letter IN ('a', 'c')",
    "odd LIKE 'a%'",
    "price BETWEEN 10 AND 60",
]
CONDITIONS += ["NOT fourth", "date >= DATE '2024-02-10' OR three = 1", "length(odd) = 0", "false"]


def sums_of(value: str) -> tuple[str, ...]:
    # The last digit of a DECIMAL's avg differs in DuckDB itself, with and without a sum beside it.
    return ("sum", "count") if "price" in value else ("sum", "avg", "count")


@st.composite
def aggregates(draw) -> str:
    call = draw(
        st.sampled_from(["count(*)"])
        | st.sampled_from(VALUES).flatmap(
            lambda v: st.sampled_from(
                [f"{f}({d}{v})" for f in sums_of(v) for d in ("", "DISTINCT ")]
                + [f"min({v})", f"max({v})"]
            )
        )
        | st.sampled_from(KEYS).flatmap(
            lambda k: st.sampled_from(
                [f"{f}({k})" for f in ("count", "min", "max")] + [f"count(DISTINCT {k})"]
            )
        )
    )
    filtered = draw(st.none() | st.sampled_from(CONDITIONS))
    return f"{call} FILTER (WHERE {filtered})" if filtered else call


@st.composite
def grouped(draw) -> str:
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
    sums = draw(st.lists(aggregates(), min_size=1, max_size=4))
    items = [
        *(f"{k} AS k{i}" for i, k in enumerate(keys)),
        *(f"{a} AS a{i}" for i, a in enumerate(sums)),
    ]
    by = draw(
        st.sampled_from([", ".join(keys), ", ".join(f"k{i}" for i in range(len(keys))), "ALL"])
    )
    having = draw(
        st.sampled_from(["", f"HAVING {draw(aggregates())} IS NOT NULL", "HAVING count(*) > 9"])
    )
    distinct = draw(st.sampled_from(["", "DISTINCT "]))
    return (
        f"SELECT {distinct}{', '.join(draw(st.permutations(items)))} "
        f"FROM t {draw(wheres())} {f'GROUP BY {by}' if keys else ''} {having} {draw(endings())}"
    )


@st.composite
def listed(draw) -> str:
    items = draw(st.lists(st.sampled_from(KEYS + VALUES), min_size=1, max_size=4, unique=True))
    distinct = draw(st.sampled_from(["", "DISTINCT "]))
    return f"SELECT {distinct}{', '.join(items)} FROM t {draw(wheres())} {draw(endings())}"


def wheres() -> st.SearchStrategy[str]:
    return st.just("") | st.sampled_from(CONDITIONS).map("WHERE {}".format)


def endings() -> st.SearchStrategy[str]:
    """An order of all columns with a limit, or neither: a LIMIT alone may return any rows."""
    orders = st.sampled_from(["ALL", "ALL DESC", "ALL NULLS FIRST", "ALL DESC NULLS LAST"])
    limits = st.sampled_from(["", "LIMIT 3", "LIMIT 20 OFFSET 5", "OFFSET 2", "LIMIT 0"])
    return st.just("") | st.tuples(orders, limits).map(lambda both: "ORDER BY {} {}".format(*both))


@settings(max_examples=20, deadline=None)
@given(sql=grouped() | listed())
def test_any_query_of_the_grammar_is_answered_as_on_the_whole_table(odd, sql):
    same(odd, sql, in_order="ORDER BY" in sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT three, sum(n) AS n FROM t GROUP BY three ORDER BY n",
        "SELECT three, sum(n) AS n FROM t GROUP BY three HAVING sum(n) > 9 ORDER BY sum(n)",
        "SELECT -three AS three, max(n) AS m FROM t GROUP BY three HAVING three > 0 ORDER BY three",
        "SELECT -three AS three, max(n) AS m FROM t GROUP BY three ORDER BY three + 0",
        "SELECT letter = 'a' AS letter, count(*) FROM t GROUP BY letter ORDER BY ALL",
        "SELECT letter = 'a' AS letter, count(*) FROM t GROUP BY 1 ORDER BY letter",
        "SELECT -id AS id, id * 2 AS m FROM t WHERE id > 9 ORDER BY id LIMIT 5",
        "SELECT -id AS id FROM t ORDER BY t.id LIMIT 5",
        "SELECT -id AS id FROM t ORDER BY -id LIMIT 5",
        "SELECT x.three AS x FROM t AS x GROUP BY x.three ORDER BY x",
        "SELECT DISTINCT -three AS three FROM t ORDER BY three",
    ],
)
def test_a_name_of_both_a_column_and_an_alias_means_the_same_as_in_duckdb(odd, sql):
    same(odd, sql, in_order="ORDER BY" in sql)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT median(n) FROM t", "'median(n)': median needs all rows in one place"),
        ("SELECT n, row_number() OVER (ORDER BY n) FROM t", "OVER (ORDER BY n)': a window"),
        (
            "SELECT n FROM t WHERE n > (SELECT avg(n) FROM t)",
            "'(SELECT avg(n) FROM t)': its answer would have to be known before",
        ),
        ("SELECT sum(n) FROM t WHERE EXISTS (FROM t)", "would have to be known before"),
        ("SELECT sum(n - (SELECT min(n) FROM t)) FROM t", "would have to be known before"),
        ("SELECT n + (SELECT min(n) FROM t) FROM t", "would have to be known before"),
        ("SELECT three IN (SELECT 1 FROM t), count(*) FROM t GROUP BY 1", "to be known before"),
        (
            "SELECT three, (SELECT max(n) FROM t u WHERE u.three = t.three) FROM t GROUP BY three",
            "may not use what is outside of it",
        ),
        ("SELECT a.n FROM t a JOIN t b USING (id)", "joins of the table's rows"),
        ("SELECT n FROM t, t b", "joins of the table's rows"),
        ("SELECT u.n FROM t JOIN (SELECT max(n) AS n FROM t) u ON true", "joins of the table's"),
        ("WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL FROM r) FROM r", "WITH RECURSIVE"),
        ("WITH r AS (SELECT n, random() AS x FROM t) SELECT n FROM r", "random does not depend"),
        ("WITH r AS (SELECT count(*) AS n FROM t) SELECT random() FROM r", "random does not dep"),
        ("WITH r AS (SELECT count(*) AS n FROM t) SELECT string_agg(n, '') FROM r", "string_agg"),
        ("SELECT max(x) FROM (SELECT n, sum(n) OVER () AS x FROM t)", "a window function needs"),
        ("WITH r AS (SELECT count(*) AS n FROM t) SELECT n FROM r, range(3)", "the one table"),
        ("SELECT n FROM (SELECT count(*) AS n FROM t) TABLESAMPLE 10%", "samples"),
        ("SELECT n FROM t UNION VALUES (1)", "the one table to select from is t"),
        ("SELECT avg(n) FROM (SELECT 1 AS n)", "the one table to select from is t"),
        ("WITH " + ", ".join(f"a{i + 1} AS (SELECT count(*) FROM a{i}, a{i})" for i in range(30))
         + " SELECT * FROM a30", "more than 100 queries"),
        ("SELECT " + "+".join(["n"] * 900) + " FROM t", "nested too deeply"),
        ("SELECT n FROM t QUALIFY true", "QUALIFY"),
        ("SELECT n FROM t USING SAMPLE 3", "samples"),
        ("SELECT three, sum(n) FROM t GROUP BY ROLLUP (three)", "ROLLUP"),
        ("SELECT DISTINCT ON (three) n FROM t", "DISTINCT ON"),
        ("SELECT DISTINCT three FROM t ORDER BY n", "'n': DISTINCT can be ordered"),
        ("SELECT DISTINCT three % 2 FROM t GROUP BY three ORDER BY max(n)", "'max(n)': DISTINCT"),
        ("SELECT string_agg(letter, ',') FROM t", "string_agg needs all rows"),
        ("SELECT first(n) FROM t", "first needs all rows"),
        ("SELECT sum(n ORDER BY n) FROM t", "sum takes one value and no ORDER BY"),
        ("SELECT max(n, 3) FROM t", "max takes one value"),
        ("SELECT bool_or(DISTINCT fourth) FROM t", "bool_or with DISTINCT"),
        ("SELECT max(COLUMNS(*)) FROM t", "a star stands only by itself"),
        ("SELECT * REPLACE (1 AS n) FROM t", "a star stands only by itself"),
        ("SELECT [n] FROM t", "a value of type INTEGER[] cannot travel"),
        ("SELECT list_transform([n], lambda x: x) FROM t", "lambda is not supported"),
        ("SELECT n FROM t LIMIT 10%", "LIMIT and OFFSET take a whole number"),
        ("SELECT n FROM t WHERE n = $1", "'$1': there are no parameters"),
        ("SELECT random() FROM t", "random does not depend on the row alone"),
        ("SELECT now() FROM t", "now does not depend on the row alone"),
        ("SELECT age(moment) FROM t", "age does not depend on the row alone"),
        ("SELECT current_date FROM t", "'current_date': current_date does not depend on the row"),
        ("SELECT rowid FROM t", "\"rowid\" not found"),
        ("SELECT t FROM t", "'t': a whole row cannot travel"),
        ("SELECT nn FROM t", "\"nn\" not found"),
        ("SELECT n AS \"@k0\" FROM t", "'@k0' is a name that is needed here"),
        ("SELECT *, -n AS n FROM t ORDER BY n", "'n': more than one column of the answer"),
        ("SELECT three, sum(n) AS n FROM t GROUP BY 1 HAVING n > 1", "'n': stands neither in"),
        ("SELECT n AS x, three AS x FROM t", "two columns of the answer are called 'x'"),
        ("SELECT n, count(*) FROM t", "must appear in the GROUP BY clause"),
        ("SELECT no_such(n) FROM t", "there is no function no_such"),
        ("SELECT n FROM t GROUP", "syntax error"),
        ("SELECT letter::DATE FROM t", "invalid date field format"),
        ("", "send a SELECT"),
        ("SELECT n FROM t; SELECT n FROM t", "2 statements"),
        ("SELECT 1", "the one table to select from is t"),
        ("SELECT avg(moment) FROM t", "avg of TIMESTAMP"),
    ],
)  # fmt: skip
def test_a_query_that_cannot_be_merged_is_rejected_with_the_part_that_prevents_it(odd, sql, words):
    with pytest.raises(BadRequest) as refused:
        odd.shared(sql)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT content FROM read_text('/etc/hosts')",
        "FROM '{other}'",
        "SELECT n FROM t WHERE n IN (SELECT id FROM '{other}')",
        "COPY t TO '{other}.copy'",
        "ATTACH '{other}.db'",
        "SET threads = 7",
        "PRAGMA database_list",
        "INSTALL httpfs",
        "DROP VIEW t",
        "SELECT current_setting('memory_limit') FROM t",
        "SELECT getvariable('x') FROM t",
        "FROM duckdb_settings()",
        "FROM information_schema.tables",
        "SELECT query FROM t, query('FROM t')",
    ],
)
def test_a_query_reads_one_table_and_changes_nothing(odd, sql):
    other = odd.files["D"][0]
    with pytest.raises(BadRequest):
        flights.query(sql.format(other=other).encode(), odd.at("C"))
    assert sorted(file.name for file in Path(other).parent.iterdir()) == [
        "C.parquet", "D.parquet", "F.parquet",
    ]  # fmt: skip


def test_the_database_of_a_share_opens_no_other_file_even_without_the_checks(odd):
    share = flights.Share.of(odd.at("C").options)
    db = shares.opened(share, lambda: 60.0).rows.cursor()
    with pytest.raises(duckdb.PermissionException):
        db.execute(f"FROM '{odd.files['D'][0]}'")
    with pytest.raises(duckdb.InvalidInputException):
        db.execute("SET enable_external_access = true")
    assert db.execute("SELECT count(*) FROM t").fetchone() == (250,)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b'{"sql": 1}',
        b'{"sql": "FROM t", "as": "csv"}',
        b"{",
        b'{"sql": "FROM t", "to": "x"}',
    ],
)
def test_a_payload_that_is_not_a_query_is_rejected(odd, payload):
    with pytest.raises(BadRequest):
        flights.query(payload, odd.at("C"))


def test_an_answer_says_which_months_it_lacks(year):
    answer = year.shared("SELECT max(month) FROM flights", workers="CD")
    assert answer["rows"] == [[8]]
    assert answer["missing"] == {"F": "September to December"}

    text = year.shared("SELECT max(month) AS m FROM flights", workers="DF", form="table")
    assert text.split("\n") == [
        " m",
        "--",
        "12",
        "(1 row from May to August (D), September to December (F))",
        "# NOT in this answer: January to April (C)",
    ]


def test_a_table_is_aligned_and_has_no_control_characters(odd):
    sql = "SELECT odd || chr(27) AS o, id FROM t WHERE id IN (1, 11) ORDER BY id"
    assert odd.shared(sql, form="table").split("\n")[:4] == [
        "o          | id",
        "-----------+---",
        'a "b", 1?? |  1',
        "NULL       | 11",
    ]


def test_a_share_with_too_many_rows_is_rejected_not_cut(year):
    with pytest.raises(BadRequest, match=r"more than 100,000 rows or [0-9,]+ bytes to send"):
        year.shared("FROM flights")
    few = Whole(year.db, year.files, {"most_rows": 12})
    same(few, "SELECT month, count(*) FROM flights GROUP BY 1 ORDER BY 1", in_order=True)
    with pytest.raises(BadRequest, match="more than 12 rows"):
        few.shared("SELECT count(DISTINCT tailnum) FROM flights")


def test_a_merge_that_takes_too_long_is_ended(year, monkeypatch):
    monkeypatch.setattr(flights, "MERGE_S", 0.05)
    with pytest.raises(BadRequest, match=r"could not be merged within 0\.05 s"):
        year.shared("SELECT len(list_sort(range(sum(month)::INT % 2 + 9000000))) FROM flights")


# Your own shares.


def csv_shares(tmp_path: Path, how: dict[str, Any] | None = None, **texts: str) -> Whole:
    """Files of shares by name: C, or C1 and C2 where the share C has several."""
    files: dict[str, list[str]] = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
        files[name[0]] = [str(tmp_path / f"{name[0]}*.cs*")]
    options = {"table": "sales", "csv": how if how is not None else {"nullstr": "-"}}
    return Whole(duckdb.connect(), files, options)


def test_a_folder_of_csv_files_becomes_a_share_by_configuration_alone(tmp_path):
    sales = csv_shares(tmp_path, C="shop,sold\nA,2\nB,-\n", D="shop,sold\nA,40\n")
    answer = sales.shared("SELECT shop, sum(sold) FROM sales GROUP BY shop ORDER BY shop", "CD")
    assert answer["rows"] == [["A", 42], ["B", None]]


@pytest.mark.parametrize(
    ("texts", "columns"),
    [
        # As machines write them: columns in another order, more columns, other delimiters.
        ({"C1": "a,b\n1,x\n", "C2": "b,a\ny,2\n", "C3": "b;a;c\nz;3;4\n"}, "a b c"),
        ({"C1": "a,b\n1,x\n", "C2": "a,b\n1.5,y\n"}, "a b"),
        ({"C1": "a,b\n007,x\n", "C2": "a,b\nx7,y\n"}, "a b"),
        ({"C1": "a,b\n2024-01-31,x\n", "C2": "a,b\n2024-01-31 10:00:00,y\n"}, "a b"),
        ({"C1": "a,b\n31.12.2023,x\n", "C2": "a,b\n12/31/2023,y\n"}, "a b"),
        ({"C1": 'a,b\ntrue,"x, y"\n', "C2": 'a,b\nfalse,"x ""y"""\n'}, "a b"),
        ({"C1": "a\tb\r\n1\tx\r\n", "C2": "a,b\n2,y\n"}, "a b"),
    ],
)
def test_files_of_several_formats_are_read_as_duckdb_alone_reads_them(tmp_path, texts, columns):
    sales = csv_shares(tmp_path, {}, **texts)
    glob = (tmp_path / "C*.csv").as_posix()
    sales.db.execute(f"CREATE VIEW sales AS FROM read_csv('{glob}', union_by_name = true)")
    wanted = sales.db.execute("FROM sales ORDER BY ALL")
    assert [name for name, *_ in wanted.description] == columns.split()

    part = json.loads(flights.query(b"FROM sales ORDER BY ALL", sales.at("C")))
    assert part["table"] == {
        name: type_ for name, type_, *_ in sales.db.execute("DESCRIBE sales").fetchall()
    }
    same_rows = sales.shared("FROM sales ORDER BY ALL", "C")["rows"]
    assert same_rows == [
        [flights.rendering._value(v, t) for v, t in zip(row, part["table"].values(), strict=True)]
        for row in sales.alone("FROM sales ORDER BY ALL")[1]
    ]


def test_the_csv_options_apply_to_every_file(tmp_path):
    how = {"dateformat": "%m/%d/%y", "delim": "|", "sample_size": -1, "filename": True}
    numbers = "01/02/03|1\n" * 30_000
    sales = csv_shares(tmp_path, how, C1=f"a|b\n{numbers}", C2=f"a|b\n{numbers}02/02/03|1.5\n")
    sql = "SELECT max(a), max(b), count(DISTINCT filename), count(*) FROM sales"
    assert sales.shared(sql, "C")["rows"] == [["2003-02-02", 1.5, 2, 60_001]]


def test_a_file_without_rows_or_values_does_not_turn_numbers_into_text(tmp_path):
    texts = {"C1": "a,b\n1,x\n", "C2": "a,b\n", "C3": "", "C4": "a,b\n,y\n,z\n"}
    answer = csv_shares(tmp_path, {}, **texts).shared("SELECT sum(a), count(*) FROM sales", "C")
    assert answer["rows"] == [[1, 3]]


def test_files_without_a_header_get_their_names_from_the_configuration(tmp_path):
    how = {"header": False, "names": ["shop", "sold"]}
    sales = csv_shares(tmp_path, how, C1="A,2\n", C2="B,3\n", D="A,40\n")
    answer = sales.shared("SELECT shop, sum(sold) FROM sales GROUP BY ALL ORDER BY ALL", "CD")
    assert answer["rows"] == [["A", 42], ["B", 3]]

    unnamed = csv_shares(tmp_path, {}, C1="A,2\n", C2="B,3\n")
    assert unnamed.shared("SELECT sum(column1) FROM sales", "C")["rows"] == [[5]]


def test_a_file_with_only_text_has_a_header_if_the_others_have_one(tmp_path):
    sales = csv_shares(tmp_path, {}, C1="shop,sold\nA,2\n", C2="shop,town\nA,Rome\nB,Oslo\n")
    rows = sales.shared("SELECT shop, sold, town FROM sales ORDER BY ALL", "C")["rows"]
    assert rows == [["A", 2, None], ["A", None, "Rome"], ["B", None, "Oslo"]]

    mixed = csv_shares(tmp_path, {}, C1="shop,sold\nA,2\n", C2="B,3\nC,4\n")
    with pytest.raises(ValueError, match=r"C2.csv' has no header and others have one; say \"csv\""):
        mixed.shared("FROM sales", "C")


def test_the_format_of_a_file_is_detected_once_and_again_when_it_changes(tmp_path, monkeypatch):
    detected = []
    form = csvfiles._form
    monkeypatch.setattr(
        csvfiles, "_form", lambda db, path, o: detected.append(path) or form(db, path, o)
    )
    sales = csv_shares(tmp_path, {"quote": '"'}, C1="a,b\n1,x\n", C2="a,b\n2,y\n")
    for _ in range(3):
        assert sales.shared("SELECT sum(a) FROM sales", "C")["rows"] == [[3]]
    assert len(detected) == 2

    (tmp_path / "C2.csv").write_text("b,a\ny,20\nz,30\n")
    (tmp_path / "C3.csv").write_text("a,b\n100,z\n")
    assert sales.shared("SELECT sum(a) FROM sales", "C")["rows"] == [[151]]
    assert [Path(path).name for path in detected[2:]] == ["C2.csv", "C3.csv"]


def test_examining_a_query_opens_no_file(tmp_path):
    sales = csv_shares(tmp_path, {}, C1="a,b\n1,x\n", C2="a,b\n2,y\n")
    share = flights.Share.of(sales.at("C").options)
    looks = shares.opened(share, lambda: 60.0).looks
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    assert flights.split(looks, "sales", "SELECT sum(a) FROM sales").output == ["sum(a)"]


def test_a_value_that_the_first_lines_did_not_suggest_is_reported_with_the_remedy(tmp_path):
    text = "a,b\n" + "1,x\n" * 30_000 + "many,y\n"
    sales = csv_shares(tmp_path, {}, C=text)
    remedy = '{"csv": {"types": {"a": "VARCHAR"}}}'
    with pytest.raises(BadRequest, match=re.escape(remedy)):
        sales.shared("SELECT sum(a) FROM sales", "C")
    sales.options["csv"] = json.loads(remedy)["csv"]
    assert sales.shared("SELECT max(a) FROM sales", "C")["rows"] == [["many"]]


def test_a_query_out_of_time_reports_the_deadline_and_what_would_be_faster(tmp_path):
    sales = csv_shares(tmp_path, {}, C1="a,b\n1,x\n", C2="a,b\n2,y\n")
    context = sales.at("C")
    context.remaining_s = lambda: 0.0
    with pytest.raises(BadRequest) as refused:
        flights.query(b"SELECT sum(a) FROM sales", context)
    assert "C could not answer within the 0.0 s that the request had left of its deadline" in str(
        refused.value
    )
    assert "python to_parquet.py CONFIG C; 0 of 2 CSV files were looked at" in str(refused.value)


def test_a_query_that_runs_too_long_is_ended_before_its_process_is(year):
    context = year.at("C")
    context.remaining_s = lambda: 0.3
    slow = b"SELECT count(DISTINCT md5(repeat(tailnum || flight, 3000))) FROM flights"
    with pytest.raises(BadRequest, match=r"C could not answer within the 0\.3 s that the request"):
        flights.query(slow, context)


def test_an_answer_from_much_csv_names_the_command_that_converts_it_to_parquet(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(flights, "MUCH_CSV", 7)
    sales = csv_shares(tmp_path, {}, C="a,b\n1,x\n", D="a,b\n2,y\n")
    text = sales.shared("SELECT sum(a) FROM sales", "CD", form="table")
    assert text.endswith("at C, D: python to_parquet.py CONFIG C")


def test_shares_with_different_tables_are_not_merged(tmp_path):
    sales = csv_shares(tmp_path, C="shop,sold\nA,2\n", D="shop,sold\nA,many\n")
    with pytest.raises(BadRequest, match=r"sold is BIGINT at C and VARCHAR at D.*\"types\""):
        sales.shared("SELECT shop, count(*) FROM sales GROUP BY shop", "CD")


def to_parquet(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "to_parquet.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)


def test_the_csv_of_a_worker_can_be_converted_to_parquet(tmp_path):
    sales = csv_shares(tmp_path, C1="a,b\n1,x\n", C2="b;a\ny;-\n")
    config = json.loads(json.dumps(SHIPPED))
    config["processes"]["C"]["options"] = sales.at("C").options
    (tmp_path / "overlay.json").write_text(json.dumps(config))

    done = to_parquet(tmp_path / "overlay.json", "C", tmp_path / "made" / "C.parquet")

    assert (done.returncode, done.stderr) == (0, "")
    named = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    parquet = Whole(sales.db, {"C": named["files"]}, {"table": "sales"})
    sql = "FROM sales ORDER BY a"
    assert parquet.shared(sql, "C") == sales.shared(sql, "C")

    config["processes"]["C"]["options"] = named
    (tmp_path / "overlay.json").write_text(json.dumps(config))
    again = to_parquet(tmp_path / "overlay.json", "C", tmp_path / "made" / "C.parquet")
    unknown = to_parquet(tmp_path / "overlay.json", "X")
    assert (again.returncode, unknown.returncode, to_parquet().returncode) == (2, 2, 2)
    assert again.stderr == "to_parquet.py: what C has is Parquet already\n"
    assert "no process 'X' in overlay.json; it has A, B, C" in unknown.stderr


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["nowhere/*.csv"], "option files: nothing on this machine matches"),
        ([], "option files: say what this worker has"),
        (["flights.py"], "option files: .py; they must be all .parquet"),
        (["flights.json", "../flights/flights.py"], "they must be all .parquet"),
    ],
)
def test_invalid_options_are_named(files, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        flights.Share.of({"files": files})


# Preparing the flights.


def prepared(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)


def test_preparing_a_second_time_changes_nothing(data):
    times = {file: file.stat().st_mtime_ns for file in data.iterdir()}
    done = prepared(data)

    assert (done.returncode, done.stdout) == (0, f"336,776 flights are in {data} already\n")
    assert {file: file.stat().st_mtime_ns for file in data.iterdir()} == times
    assert len(times) == 13


def test_damaged_files_are_found_and_made_again(tmp_path, data, monkeypatch):
    monkeypatch.setattr(prepare, "MONTHS", range(1, 3))
    for month in prepare.MONTHS:
        source = prepare.month_file(data, month + 1)  # each month's rows in the file before
        prepare.month_file(tmp_path, month).write_bytes(source.read_bytes())
    assert not prepare.is_whole(tmp_path)
    assert "month 2: 24,951 fewer than in the package" in prepare.differences(tmp_path)

    prepare.prepare(tmp_path)
    assert prepare.is_whole(tmp_path)
    assert prepare.digests(tmp_path) == prepare.digests(data)
    prepare.month_file(tmp_path, 2).unlink()
    assert prepare.differences(tmp_path) == [f"{prepare.month_file(tmp_path, 2)} is missing"]


def test_preparing_reports_problems_without_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, code in (
        ((tmp_path / "file",), 2),
        (("--chekc",), 2),
        (("--check", tmp_path), 1),
    ):
        done = prepared(*arguments)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


# On six processes.


def with_example(folder: Path) -> Path:
    for file in FOLDER.glob("*.py"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def on_free_ports(year: Whole) -> dict[str, Any]:
    """The shipped configuration, on the test's own data."""
    config = {**json.loads(json.dumps(SHIPPED)), "log_dir": "logs"}
    for worker, entry in config["processes"].items():
        entry["port"] = free_port()
        if worker in year.files:
            entry["options"]["files"] = year.files[worker]
    return config


@pytest.fixture(scope="module")
def six(year, tmp_path_factory):
    folder = with_example(tmp_path_factory.mktemp("six"))
    with running(folder, on_free_ports(year)) as processes:
        yield processes


def test_six_processes_answer_as_one_database(six, year):
    sql = "SELECT carrier, count(*), avg(arr_delay) FROM flights GROUP BY 1 ORDER BY 1"
    with overlay.connect(six.address("A")) as leader:
        answer = leader.call(
            json.dumps({"sql": sql, "as": "json"}).encode(), handler="query", timeout=60
        )
    assert answer.coverage == (3, 3)
    assert json.loads(answer.result) == year.shared(sql)


def test_a_rejected_query_is_a_bad_request_for_the_client(six):
    with overlay.connect(six.address("A")) as leader, pytest.raises(CallFailed) as refused:
        leader.call(b"SELECT median(day) FROM flights", timeout=60)
    assert refused.value.code == 3
    assert "'median(day)': median needs all rows in one place" in str(refused.value)


def test_an_error_in_the_merge_is_a_bad_request_too(six):
    with overlay.connect(six.address("A")) as leader, pytest.raises(CallFailed) as refused:
        leader.call(b"SELECT max(carrier)::INTEGER FROM flights", timeout=60)
    assert refused.value.code == 3
    assert "Could not convert string 'YV' to INT32" in str(refused.value)


def test_without_one_worker_the_answer_names_the_missing_months(six):
    six.kill("F")
    with overlay.connect(six.address("A")) as leader:
        answer = leader.call(b"SELECT count(*) AS n, max(month) FROM flights", timeout=60)
    assert answer.coverage == (2, 3)
    assert answer.result.decode().endswith("# NOT in this answer: September to December (F)")


def test_a_worker_without_duckdb_says_so_when_it_starts(year, tmp_path):
    (with_example(tmp_path) / "overlay.json").write_text(json.dumps(on_free_ports(year)))

    done = run_without("duckdb", tmp_path / "overlay.json")

    assert done.returncode == 2
    assert "the flights example needs DuckDB 2" in done.stderr
    assert "Traceback" not in done.stderr
