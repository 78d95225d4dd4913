"""One SELECT over a table that lies in shares, as two: one for each share, one over their answers.

    whole    SELECT carrier, avg(arr_delay) FROM flights GROUP BY carrier ORDER BY 2
    partial  SELECT carrier, sum(arr_delay), count(arr_delay) FROM flights GROUP BY 1
    final    SELECT "@k0" AS carrier, sum("@a0") / sum("@a1") … GROUP BY "@k0" ORDER BY 2

What is counted DISTINCT becomes one more group of the partial query: the shares send the values
themselves, and any number of such counts stays exact beside any other aggregate.

Columns of the partial answer: @k groups, @d values of DISTINCT aggregates, @a parts of the other
aggregates; of a query without aggregates @c its columns, @o what else it is ordered by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import duckdb
from names import Names
from rules import COUNTS, MEANS, CannotMerge, Rules, aggregate, the_select
from sqltree import (
    Tree,
    arguments,
    changed,
    column_name,
    described,
    expression,
    likeness,
    number,
    quoted,
    read,
    said,
    walk,
    write,
)

STANDARD = "STANDARD_HANDLING"  # as opposed to GROUP BY ALL

# Those whose text says all of them, and becomes the same value again.
TRAVEL = {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE"}
TRAVEL |= {"UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT", "DECIMAL", "VARCHAR"}
TRAVEL |= {"BLOB", "UUID", "DATE", "TIME", "INTERVAL", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"}
TRAVEL |= {"TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"}


@dataclass(frozen=True)
class Split:
    """partial, final: SQL; final asks the table `partial`, which has these columns: (name, type).

    output: the names of the answer's columns; in `final` they are @r0, @r1 …, for two may be alike.
    inexact: DOUBLEs are added up, and the last digits of their sum depend on their order.
    """

    partial: str
    columns: Sequence[tuple[str, str]]
    final: str
    output: Sequence[str]
    inexact: bool


def split(db: duckdb.DuckDBPyConnection, table: str, sql: str) -> Split:
    """The query in two. db has the share as `table`; none of its rows is read.

    Raises CannotMerge.
    """
    node = the_select(table, sql)
    rules = Rules(sql)
    rules.check(node)
    try:
        columns = [name for name, _ in described(db, f"FROM {quoted(table)}")]
        output = [name for name, _ in described(db, sql)]
        kind = _Grouped if _puts_rows_together(node) else _Listed
        halves = kind(node, Names(node, table, columns, rules), output, rules).halves()
        sent = ", ".join(map(quoted, halves.columns))
        asked = f"FROM ({write(halves.partial)}) AS partial({sent})"
        found = described(db, asked)
    except duckdb.Error as e:
        raise CannotMerge(said(e)) from None
    for _, type_ in found:
        if type_.partition("(")[0] not in TRAVEL:
            raise CannotMerge(
                f"a value of type {type_} cannot travel; select it as text: …::VARCHAR"
            )
    inexact = any(name in halves.sums and type_ == "DOUBLE" for name, type_ in found)
    as_text = f"SELECT CAST(COLUMNS(*) AS VARCHAR) {asked}"
    return Split(as_text, found, write(halves.final), output, inexact)


def _puts_rows_together(node: Tree) -> bool:
    grouped = node["group_sets"] or node["having"] or node["aggregate_handling"] != STANDARD
    return bool(grouped) or any(aggregate(tree) for tree in walk(node))


class _Halves(NamedTuple):
    """Both queries as trees. columns: of the partial answer. sums: those of them that are sums."""

    columns: Sequence[str]
    partial: Tree
    final: Tree
    sums: Collection[str] = ()


class _Query:
    """A SELECT that has passed the rules. output: the names of its answer's columns."""

    def __init__(self, node: Tree, names: Names, output: Sequence[str], rules: Rules) -> None:
        self.node = node
        self.names = names
        self.output = output
        self.rules = rules

    def place(self, tree: Tree) -> int | None:
        """Which column of the answer, from 0, ORDER BY means by this: by its number or its name.

        None for what is not selected. Raises CannotMerge for that in a SELECT DISTINCT, where it
        would be the value of any of the rows that are put together.
        """
        if (n := number(tree)) is not None:
            return n - 1
        name, column = column_name(tree), column_name(self.names.expanded(tree))
        if name is None and column and not self.names.hides_a_column(column):
            name = column  # as in ORDER BY flights.month
        if name is not None:
            places = [i for i, said in enumerate(self.output) if said.lower() == name.lower()]
            if len(places) > 1:
                raise self.rules.refusal(tree, "more than one column of the answer is called so")
            if places:
                return places[0]
        if any(modifier["type"] == "DISTINCT_MODIFIER" for modifier in self.node["modifiers"]):
            raise self.rules.refusal(tree, "DISTINCT can be ordered by what it selects only")
        return None


class _Grouped(_Query):
    """A query with aggregates, or with groups."""

    def halves(self) -> _Halves:
        node = self.node
        keys = [self.names.expanded(key) for key in self._keys()]
        merging = _Merging(self, keys)
        items = [
            {**merging.merged(item), "alias": f"@r{i}"}
            for i, item in enumerate(node["select_list"])
        ]
        having = node["having"] and merging.merged(node["having"])
        modifiers = [self._ordered(modifier, merging) for modifier in node["modifiers"]]
        where = node["where_clause"] and self.names.expanded(node["where_clause"])
        partial = {
            **node,
            "modifiers": [],
            "select_list": list(merging.partial.values()),
            "where_clause": where,
            "having": None,
            "aggregate_handling": STANDARD,
            **self._groups([_position(n) for n in range(merging.finer)]),
        }
        final = {
            **_over_partial(node),
            "modifiers": modifiers,
            "select_list": items,
            "having": having,
            **self._groups([_column(f"@k{i}") for i in range(len(keys))]),
        }
        return _Halves(list(merging.partial), partial, final, merging.sums)

    def _keys(self) -> list[Tree]:
        items = self.node["select_list"]
        if self.node["aggregate_handling"] == STANDARD:
            places = [(key, number(key)) for key in self.node["group_expressions"]]
            return [key if n is None else items[n - 1] for key, n in places]
        expanded = [(item, self.names.expanded(item)) for item in items]
        return [item for item, tree in expanded if not any(map(aggregate, walk(tree)))]

    def _ordered(self, modifier: Tree, merging: _Merging) -> Tree:
        def by(tree: Tree) -> Tree:
            if tree["class"] == "STAR":
                return tree
            place = self.place(tree)
            return merging.merged(tree) if place is None else _position(place)

        if "orders" not in modifier:
            return modifier
        orders = [{**order, "expression": by(order["expression"])} for order in modifier["orders"]]
        return {**modifier, "orders": orders}

    def _groups(self, keys: list[Tree]) -> Tree:
        return {"group_expressions": keys, "group_sets": [list(range(len(keys)))] if keys else []}


class _Merging:
    """Replaces what the shares work out by what to make of their answers.

    partial: the columns that the shares are to send. finer: how many of them are their groups.
    """

    def __init__(self, query: _Query, keys: Sequence[Tree]) -> None:
        self._query = query
        self._keys = [likeness(key) for key in keys]
        self._groups: dict[str, Tree] = {f"@k{i}": key for i, key in enumerate(keys)}
        self._parts: dict[str, Tree] = {}
        self.sums: set[str] = set()

    @property
    def partial(self) -> dict[str, Tree]:
        return {**self._groups, **self._parts}

    @property
    def finer(self) -> int:
        return len(self._groups)

    def merged(self, tree: Tree) -> Tree:
        """The expression over the shares' answers. Raises CannotMerge."""
        return changed(self._query.names.expanded(tree), self._replacement)  # type: ignore[no-any-return]

    def _replacement(self, tree: Tree) -> Tree | None:
        like = likeness(tree)
        if like in self._keys:
            return _column(f"@k{self._keys.index(like)}")
        if name := aggregate(tree):
            return self._of_values(tree) if tree["distinct"] else self._of_parts(name, tree)
        if tree["class"] == "COLUMN_REF":
            raise self._query.rules.refusal(tree, "stands neither in GROUP BY nor in an aggregate")
        return None

    def _of_values(self, tree: Tree) -> Tree:
        (value,) = arguments(tree)
        if tree["filter"]:  # what does not pass is NULL, which no such aggregate counts
            value = _filled(expression("CASE WHEN w THEN v END"), w=tree["filter"], v=value)
        column = _column(self._sent("@d", self._groups, value))
        return {
            **tree,
            "filter": None,
            "arguments": [{**tree["arguments"][0], "expression": column}],
        }

    def _of_parts(self, name: str, tree: Tree) -> Tree:
        if name in MEANS:
            total, count = self._part("sum", tree), self._part("count", tree)
            return expression(
                f'CASE WHEN sum("{count}") > 0 THEN sum("{total}")::DOUBLE / sum("{count}") END'
            )
        part = self._part(name, tree)
        if name in COUNTS:
            type_ = "HUGEINT" if name in {"count_if", "countif"} else "BIGINT"
            return expression(f'CAST(coalesce(sum("{part}"), 0) AS {type_})')
        return expression(f'{name}("{part}")')

    def _part(self, function: str, tree: Tree) -> str:
        call = expression(f"{function}()" if function == "count_star" else f"{function}(0)")
        asked = {**call, "arguments": tree["arguments"], "filter": tree["filter"]}
        name = self._sent("@a", self._parts, asked)
        if function == "sum":
            self.sums.add(name)
        return name

    def _sent(self, prefix: str, columns: dict[str, Tree], tree: Tree) -> str:
        """The partial answer's column for the expression; the same one for the same."""
        like = likeness(tree)
        for name, column in columns.items():
            if name.startswith(prefix) and likeness(column) == like:
                return name
        name = f"{prefix}{sum(n.startswith(prefix) for n in columns)}"
        columns[name] = tree
        return name


class _Listed(_Query):
    """A query that gives rows as they are, or the different ones of them."""

    def halves(self) -> _Halves:
        node = self.node
        columns = [f"@c{i}" for i in range(len(self.output))]
        more, orders = self._orders()
        far, near = [], []  # the modifiers of the partial and of the final query
        for modifier in node["modifiers"]:
            far.append(modifier)
            near.append(modifier)
            if "orders" in modifier:
                far[-1] = {**modifier, "orders": [_by(o, _position(n)) for o, n in orders]}
                near[-1] = {**modifier, "orders": [_by(o, self._final(n)) for o, n in orders]}
            elif "limit" in modifier:
                far[-1] = self._reaching(modifier)
        items = [self.names.expanded(item) for item in node["select_list"]]
        partial = {
            **node,
            "modifiers": far,
            "select_list": items + more,
            "where_clause": self.names.expanded(node["where_clause"]),
        }
        final = {
            **_over_partial(node),
            "modifiers": near,
            "select_list": [_column(name, f"@r{i}") for i, name in enumerate(columns)],
        }
        columns += [f"@o{i}" for i in range(len(more))]
        return _Halves(columns, partial, final)

    def _orders(self) -> tuple[list[Tree], list[tuple[Tree, int]]]:
        """What else the shares are to send, and by which of the columns to order, from 0."""
        more: list[Tree] = []
        orders: list[tuple[Tree, int]] = []
        for order in (o for modifier in self.node["modifiers"] for o in modifier.get("orders", [])):
            tree = order["expression"]
            if tree["class"] == "STAR":  # ORDER BY ALL
                orders += [(order, n) for n in range(len(self.output))]
                continue
            place = self.place(tree)
            if place is None:
                place = len(self.output) + len(more)
                more.append(self.names.expanded(tree))
            orders.append((order, place))
        return more, orders

    def _final(self, n: int) -> Tree:
        several = len(self.output)
        return _position(n) if n < several else _column(f"@o{n - several}")

    def _reaching(self, modifier: Tree) -> Tree:
        """The limit by which a share alone could fill the answer, what is skipped included."""
        if modifier["limit"] is None:
            return {**modifier, "offset": None}
        reach = (number(modifier["limit"]) or 0) + (number(modifier["offset"]) or 0)
        return {**modifier, "limit": expression(str(reach)), "offset": None}


def _over_partial(node: Tree) -> Tree:
    source = read("FROM partial")["statements"][0]["node"]["from_table"]
    return {**node, "from_table": source, "where_clause": None, "aggregate_handling": STANDARD}


def _by(order: Tree, tree: Tree) -> Tree:
    return {**order, "expression": tree}


def _column(name: str, alias: str = "") -> Tree:
    return {**expression(quoted(name)), "alias": alias}


def _position(n: int) -> Tree:
    """The nth column of an answer, from 0, as ORDER BY and GROUP BY name it."""
    return expression(str(n + 1))


def _filled(template: Tree, **trees: Tree) -> Tree:
    """The template with its columns of these names replaced."""
    return changed(template, lambda tree: trees.get(column_name(tree) or ""))  # type: ignore[no-any-return]
