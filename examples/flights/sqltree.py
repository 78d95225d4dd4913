"""A query as DuckDB's syntax tree: parsed, walked, transformed, and written as SQL again.

DuckDB itself parses (json_serialize_sql) and writes (json_deserialize_sql), so that a query is
never understood differently from how it runs. A tree consists of dicts and lists; a dict with a
"class" is an expression. Trees are never modified; `changed` returns a new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import duckdb

Tree = dict[str, Any]
WITHIN = ("from_table", "cte_map", "subquery")  # the keys of subqueries


def walk(tree: Any) -> Iterator[Tree]:
    """Every expression in the tree, from the outside in."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from walk(branch)


def own(tree: Any) -> Iterator[Tree]:
    """Every expression of a query outside its subqueries, from the outside in."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        tree = [branch for key, branch in tree.items() if key not in WITHIN]
    if isinstance(tree, list):
        for branch in tree:
            yield from own(branch)


def changed(tree: Any, change: Callable[[Tree], Tree | None]) -> Any:
    """The tree with expressions replaced by what `change` returns, if not None; outermost first."""
    if isinstance(tree, list):
        return [changed(branch, change) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    if "class" in tree and (other := change(tree)) is not None:
        return other
    return {key: changed(branch, change) for key, branch in tree.items()}


def likeness(tree: Tree) -> str:
    """A key that is equal for equal expressions, whatever their place and alias."""
    return json.dumps(_bare({**tree, "alias": ""}), sort_keys=True)


def arguments(function: Tree) -> list[Tree]:
    return [argument["expression"] for argument in function["arguments"]]


def number(tree: Tree | None) -> int | None:
    """The value of an integer literal, else None."""
    if tree is None or tree["class"] != "CONSTANT":
        return None
    literal = tree.get("literal") or {}
    return int(literal["text"]) if literal.get("kind") == "INTEGER" else None


def column_name(tree: Tree) -> str | None:
    """The name, if the expression is a bare column name, without table or field."""
    is_one = tree["class"] == "COLUMN_REF" and len(tree["column_names"]) == 1
    return tree["column_names"][0] if is_one else None


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """A value of the configuration as SQL."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(k))}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, bool | int | float):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def read(sql: str) -> Tree:
    """{"statements": [{"node": tree}]} or {"error_message": why}; only SELECTs can be read."""
    return json.loads(_one("SELECT json_serialize_sql(?)", sql))  # type: ignore[no-any-return]


def write(node: Tree) -> str:
    whole = json.dumps({"error": False, "statements": [{"node": node}]})
    return _one("SELECT json_deserialize_sql(?::JSON)", whole)  # type: ignore[no-any-return]


@lru_cache(maxsize=1000)
def expression(sql: str) -> Tree:
    (item,) = read(f"SELECT {sql}")["statements"][0]["node"]["select_list"]
    return item  # type: ignore[no-any-return]


def kinds(function: str) -> set[tuple[str, str]]:
    """(type, stability) of DuckDB's functions of this name, such as ("scalar", "CONSISTENT")."""
    return _catalogue().get(function.lower(), set())


def described(db: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[str, str]]:
    """(name, type) of each column of the answer. Raises duckdb.Error for an invalid query."""
    return [(name, type_) for name, type_, *_ in db.execute(f"DESCRIBE {sql}").fetchall()]


def said(error: Exception) -> str:
    """DuckDB's error message in one line, without the marked query and the suggestions."""
    return " ".join(str(error).split("\n\n")[0].split("Candidate functions:")[0].split())


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {}
    asked = "SELECT function_name, function_type, stability FROM duckdb_functions()"
    for name, type_, stability in _empty_database().cursor().execute(asked).fetchall():
        found.setdefault(name.lower(), set()).add((type_, stability))
    return found


@lru_cache(maxsize=1)
def _empty_database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


def _one(sql: str, parameter: str) -> Any:
    row = _empty_database().cursor().execute(sql, [parameter]).fetchone()
    assert row is not None
    return row[0]


def _bare(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_bare(branch) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    return {k: _bare(v) for k, v in tree.items() if not k.startswith("query_location")}
