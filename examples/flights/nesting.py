"""Subqueries of a query: where they are, and which of them produce the table's rows.

rows     the table, or a subquery that filters its rows or computes from each: a query over it is
         sent to the shares, like one over the table
answers  anything else: a query over it runs on merged answers, where all rows are in one place
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from rules import CannotMerge, puts_rows_together
from sqltree import Tree

MOST = 100  # subqueries, after the names of WITH are replaced


def with_in_place(node: Tree) -> Tree:
    """The query with each name of WITH replaced by its subquery. Raises CannotMerge."""
    found: Tree = _in_place(node, {})
    if len(list(islice(_queries(found), MOST + 1))) > MOST:
        raise CannotMerge(f"there are more than {MOST} queries in the query")
    return found


def is_rows(source: Tree, table: str) -> bool:
    """Whether the FROM clause gives rows of the table, of which each share has its own."""
    if source["type"] == "BASE_TABLE":
        return source["table_name"].lower() == table.lower()  # type: ignore[no-any-return]
    if source["type"] != "SUBQUERY":
        return False
    node = source["subquery"]["node"]
    return (
        node["type"] == "SELECT_NODE"
        and not node["modifiers"]
        and not puts_rows_together(node)
        and is_rows(node["from_table"], table)
    )


def rows_within(source: Tree) -> Iterator[Tree]:
    """The nested subqueries that produce the rows, from the outside in."""
    while source["type"] == "SUBQUERY":
        node = source["subquery"]["node"]
        yield node
        source = node["from_table"]


def _in_place(tree: Any, known: Mapping[str, Tree]) -> Any:
    if isinstance(tree, list):
        return [_in_place(branch, known) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    if "cte_map" in tree:
        known = dict(known)
        for each in tree["cte_map"]["map"]:
            known[each["key"].lower()] = _source(each["value"], known)
        tree = {**tree, "cte_map": {"map": []}}
    elif tree.get("type") == "BASE_TABLE":
        return _replaced(tree, known)
    return {key: _in_place(branch, known) for key, branch in tree.items()}


def _source(named: Tree, known: Mapping[str, Tree]) -> Tree:
    """A named query of WITH, as a subquery for the FROM clause."""
    node = named["query_node"]
    if node["type"] not in ("SELECT_NODE", "SET_OPERATION_NODE"):
        raise CannotMerge("WITH RECURSIVE is not supported")
    return {
        "type": "SUBQUERY",
        "alias": "",
        "sample": None,
        "query_location": 0,
        "subquery": {"node": _in_place(node, known)},
        "column_name_alias": named["aliases"],
    }


def _replaced(table: Tree, known: Mapping[str, Tree]) -> Tree:
    name = table["table_name"]
    if table.get("schema_name") or table.get("catalog_name") or name.lower() not in known:
        return table
    if table.get("sample"):
        raise CannotMerge("samples are not supported")
    source = known[name.lower()]
    columns = table.get("column_name_alias") or source["column_name_alias"]
    return {**source, "alias": table["alias"] or name, "column_name_alias": columns}


def _queries(tree: Any) -> Iterator[Tree]:
    if isinstance(tree, dict):
        if "cte_map" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _queries(branch)
