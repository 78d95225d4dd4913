"""The SQL that shares can answer; everything else is rejected, quoting the part concerned.

Allowed are functions that depend on one row only, according to DuckDB's catalogue, and the
aggregates listed here. Over merged answers, where all rows are in one place, some more are allowed.
An expression of any other kind is rejected, even if a later version of DuckDB adds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqltree import Tree, arguments, kinds, number, own, read, walk

# Merged by themselves: the sum of sums is the sum, the minimum of minima is the minimum.
SAME = {"sum", "min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor"}
COUNTS = {"count", "count_star", "count_if", "countif"}
MEANS = {"avg", "mean"}
# What is subtracted from the count in the divisor of the sum of squares; whether it is a root.
SPREADS = {"var_pop": (0, False), "var_samp": (1, False), "variance": (1, False)}
SPREADS |= {"stddev_pop": (0, True), "stddev_samp": (1, True), "stddev": (1, True)}
AGGREGATES = {*SAME, *COUNTS, *MEANS, *SPREADS}
DISTINCT = {"count", "sum", "min", "max", *MEANS, *SPREADS}  # may have DISTINCT
IN_ONE_PLACE = {"median", "quantile_cont", "quantile_disc", "mad"}
WINDOWS = {"row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile", "lag", "lead"}
WINDOWS |= {"first_value", "last_value", "nth_value", *AGGREGATES}

MACROS = {"nullif", "if", "split_part", "days_in_month", "fdiv"}  # depend on one row only
LOOKS_AT_THE_CLOCK = {"age"}  # with one argument

PLAIN = {"COLUMN_REF", "CONSTANT", "FUNCTION", "COMPARISON", "CONJUNCTION", "OPERATOR", "CAST"}
PLAIN |= {"CASE", "BETWEEN", "TYPE"}
OPERATORS = {"OPERATOR_NOT", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_COALESCE"}
OPERATORS |= {"COMPARE_IN", "COMPARE_NOT_IN", "OPERATOR_NULLIF", "OPERATOR_TRY"}
REASONS = {
    "WINDOW": "a window function needs all rows in one place",
    "SUBQUERY": "its answer would have to be known before the shares are asked; ask for it first, "
    "and write the value",
    "PARAMETER": "there are no parameters; write the value",
    "POSITIONAL_REFERENCE": "name the column instead",
}
NEAR = {"SUBQUERY", "WINDOW"}  # can be computed only over merged answers
STANDARD = "STANDARD_HANDLING"  # as opposed to GROUP BY ALL
MODIFIERS = {"DISTINCT_MODIFIER", "ORDER_MODIFIER", "LIMIT_MODIFIER"}


class CannotMerge(ValueError):
    """The query is wrong, or the shares' answers cannot be merged. Quotes the part concerned."""


def aggregate(tree: Tree) -> str:
    """The name of an aggregate, else "". For an expression that has passed the rules."""
    name = tree["function_name"].lower() if tree["class"] == "FUNCTION" else ""
    return name if name in AGGREGATES else ""


def puts_rows_together(node: Tree) -> bool:
    grouped = node["group_sets"] or node["having"] or node["aggregate_handling"] != STANDARD
    return bool(grouped) or any(aggregate(tree) for tree in own(node))


def the_query(table: str, sql: str) -> Tree:
    """The tree of the query. Raises CannotMerge unless it is a single SELECT."""
    found = read(sql)
    if "error_message" in found:
        only = f"only a SELECT over the table {table} is answered"
        raise CannotMerge(
            only if "Only SELECT" in found["error_message"] else found["error_message"]
        )
    if len(found["statements"]) != 1:
        raise CannotMerge(f"{len(found['statements'])} statements; send one SELECT")
    return found["statements"][0]["node"]  # type: ignore[no-any-return]


def check_clauses(node: Tree) -> None:
    """Checks the clauses of a SELECT over the shares' rows. Raises CannotMerge."""
    for refused, why in _clauses(node):
        if refused:
            raise CannotMerge(why)


def _clauses(node: Tree) -> Iterable[tuple[object, str]]:
    source = node["from_table"]
    yield source.get("sample") or node.get("sample"), "samples are not supported"
    named = source.get("schema_name") or source.get("catalog_name") or source.get("at_clause")
    renamed = source["type"] == "BASE_TABLE" and source.get("column_name_alias")
    yield named or renamed, "name the table alone, without schema or columns"
    together = puts_rows_together(node)
    yield (
        node.get("qualify") and not together,
        "QUALIFY is not supported: it needs all rows in one place",
    )
    whole = list(range(len(node["group_expressions"])))
    plain = node["group_sets"] in ([], [whole])
    yield not plain, "ROLLUP, CUBE and GROUPING SETS are not supported; ask once for each"
    for modifier in node["modifiers"]:
        yield modifier["type"] not in MODIFIERS, f"{modifier['type']} is not supported"
        yield modifier.get("distinct_on_targets"), "DISTINCT ON is not supported: it takes any row"
        if modifier["type"] == "LIMIT_MODIFIER":
            amounts = [a for a in (modifier["limit"], modifier["offset"]) if a is not None]
            odd = modifier["limit_type"] != "ROW_COUNT" or None in map(number, amounts)
            yield odd, "LIMIT and OFFSET take a whole number"


class Rules:
    """Checks each expression of a query."""

    def __init__(self, sql: str) -> None:
        self._sql = sql.encode()

    def check(self, node: Tree, *, merged: bool = False) -> None:
        """Raises CannotMerge unless every expression outside subqueries is allowed.

        merged: the query runs over merged answers, where all rows are in one place.
        """
        orders = [o for modifier in node["modifiers"] for o in modifier.get("orders", [])]
        places = [*node.get("select_list", []), *(order["expression"] for order in orders)]
        stars = [tree for tree in places if tree["class"] == "STAR"]
        together = merged or puts_rows_together(node)
        for tree in own(node):
            self._check(tree, stars, merged, together)

    def check_far(self, tree: Any) -> None:
        """Checks what the shares have to compute. Raises CannotMerge."""
        for each in own(tree):
            if each["class"] in NEAR:
                raise self.refusal(each, REASONS[each["class"]])

    def refusal(self, tree: Tree, why: str) -> CannotMerge:
        return CannotMerge(f"'{self._words(tree)}': {why}")

    def _check(self, tree: Tree, stars: list[Tree], merged: bool, together: bool) -> None:
        kind = tree["class"]
        if kind == "FUNCTION":
            self._check_function(tree, merged)
        elif kind == "STAR":
            extras = ("replace_list", "rename_list", "expr", "qualified_exclude_list")
            if not any(tree is star for star in stars) or any(map(tree.get, extras)):
                raise self.refusal(tree, "a star stands only by itself in the SELECT list")
        elif kind in NEAR and together:
            if kind == "WINDOW" and tree["function_name"].lower() not in WINDOWS:
                raise self.refusal(tree, f"{tree['function_name']} OVER … is not supported")
        elif kind not in PLAIN or (kind == "OPERATOR" and tree["type"] not in OPERATORS):
            name = tree["type"].lower().replace("_", " ")
            raise self.refusal(tree, REASONS.get(kind, f"{name} is not supported"))

    def _check_function(self, tree: Tree, merged: bool) -> None:
        name = tree["function_name"].lower()
        found = kinds(name)
        if not found or tree.get("schema") or tree.get("catalog"):
            raise self.refusal(tree, f"there is no function {name} here")
        if any(kind == "aggregate" for kind, _ in found):
            self._check_aggregate(tree, name, merged)
        elif name in LOOKS_AT_THE_CLOCK or not (
            name in MACROS or ("scalar", "CONSISTENT") in found
        ):
            # Some consistent functions have a form that depends on the time zone, which is fixed.
            raise self.refusal(tree, f"{name} does not depend on the row alone")

    def _check_aggregate(self, tree: Tree, name: str, merged: bool) -> None:
        if merged and name in IN_ONE_PLACE:
            return
        if name not in AGGREGATES:
            raise self.refusal(tree, f"{name} needs all rows in one place")
        if tree["distinct"] and (name not in DISTINCT or not arguments(tree)):
            raise self.refusal(tree, f"{name} with DISTINCT is not supported")
        if len(arguments(tree)) > 1 or tree["order_bys"]["orders"] or tree["export_state"]:
            raise self.refusal(tree, f"{name} takes one value and no ORDER BY here")

    def _words(self, tree: Tree) -> str:
        """The text of the expression in the query."""
        places = [(t["query_location"], t["query_location_length"]) for t in walk(tree)]
        places = [(start, start + length) for start, length in places if length]
        if not places:
            return str(tree.get("function_name") or tree["class"].lower())
        words = self._sql[min(place[0] for place in places) : max(place[1] for place in places)]
        return " ".join(words.decode(errors="replace").split())
