"""Splits a query over a table in shares: partial queries for the shares, a final one over theirs.

    whole    SELECT carrier, avg(arr_delay) FROM flights GROUP BY carrier ORDER BY 2
    partial  SELECT carrier, sum(arr_delay), count(arr_delay) FROM flights GROUP BY 1
    final    SELECT "@k0" AS carrier, sum("@a0") / sum("@a1") … FROM partial0 GROUP BY 1 ORDER BY 2

The argument of a DISTINCT aggregate becomes an additional group of the partial query: the shares
send the values themselves, so any number of such aggregates stays exact beside any others.

If a query has subqueries, each one over the table's rows is split in this way, and the final query
is the whole query with each of them replaced by its final query:

    whole    WITH m AS (SELECT month, count(*) AS n FROM flights GROUP BY 1) SELECT max(n) FROM m
    partial  SELECT month, count(*) FROM flights GROUP BY 1
    final    SELECT max(n) FROM (SELECT "@k0" AS month, sum("@a0") AS n FROM partial0 …) AS m

Columns of the partial answer: @k groups, @d values of DISTINCT aggregates, @a parts of other
aggregates; for a query without aggregates @c its columns, @o further columns that it is ordered by.
Added when they are merged: @m the mean of all rows of a group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
from names import Names
from nesting import is_rows, rows_within, with_in_place
from rules import (
    COUNTS,
    MEANS,
    SPREADS,
    STANDARD,
    CannotMerge,
    Rules,
    aggregate,
    check_clauses,
    puts_rows_together,
    the_query,
)
from sqltree import (
    Tree,
    arguments,
    changed,
    column_name,
    described,
    expression,
    likeness,
    number,
    own,
    quoted,
    read,
    said,
    write,
)

# Types whose values survive a conversion to text and back.
TRAVEL = {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE"}
TRAVEL |= {"UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT", "DECIMAL", "VARCHAR"}
TRAVEL |= {"BLOB", "UUID", "DATE", "TIME", "INTERVAL", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"}
TRAVEL |= {"TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"}
FLOATS = {"FLOAT", "DOUBLE"}
ORDERLESS = {"count", "min", "max"}  # exact in any order, even for DOUBLE


@dataclass(frozen=True)
class Partial:
    """The query for each share. columns: (name, type) of its answer."""

    sql: str
    columns: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Split:
    """final: SQL over the tables partial0, partial1, …, one for each of `partials`.

    output: the names of the answer's columns. inexact: DOUBLEs are added, and the last digits of
    the sum depend on the order.
    """

    partials: Sequence[Partial]
    final: str
    output: Sequence[str]
    inexact: bool


def split(db: duckdb.DuckDBPyConnection, table: str, sql: str) -> Split:
    """Splits the query. db has the table, whose rows are not read. Raises CannotMerge."""
    node = with_in_place(the_query(table, sql))
    parts = _Parts(db, table, sql)
    try:
        final = write(parts.answered(node))
        if not parts.partials:
            raise CannotMerge(f"the one table to select from is {table}")
        output = [name for name, _ in described(db, sql)]
    except duckdb.Error as e:
        raise CannotMerge(said(e)) from None
    return Split(parts.partials, final, output, parts.inexact)


class _Parts:
    """Walks through a query and collects the partial queries."""

    def __init__(self, db: duckdb.DuckDBPyConnection, table: str, sql: str) -> None:
        self.partials: list[Partial] = []
        self.inexact = False
        self._db = db
        self._table = table
        self._sql = sql
        self._rules = Rules(sql)
        self._finals: dict[str, Tree] = {}  # by likeness of the query

    def answered(self, node: Tree) -> Tree:
        """The final query, over the shares' answers."""
        if node["type"] == "SET_OPERATION_NODE":
            self._rules.check({"modifiers": node["modifiers"]}, merged=True)
            return {**node, "children": list(map(self.answered, node["children"]))}
        if node["type"] != "SELECT_NODE":
            raise CannotMerge(f"only a SELECT over the table {self._table} is answered")
        if is_rows(node["from_table"], self._table):
            like = likeness(node)
            if like not in self._finals:
                self._finals[like] = self._asked(node)
            return self._finals[like]
        source = self._source(node["from_table"])
        self._rules.check(node, merged=True)
        return {**self._with_answers({**node, "from_table": None}), "from_table": source}

    def answer(self, tree: Tree) -> Tree:
        """A subquery expression, over the shares' answers."""
        query = tree["subquery"]
        return {**tree, "subquery": {**query, "node": self.answered(query["node"])}}

    def _with_answers(self, tree: Any) -> Any:
        def change(each: Tree) -> Tree | None:
            if each["class"] != "SUBQUERY":
                return None
            return self.answer({**each, "child": self._with_answers(each["child"])})

        return changed(tree, change)

    def _source(self, source: Tree) -> Tree:
        if source.get("sample"):
            raise CannotMerge("samples are not supported")
        if source["type"] == "SUBQUERY":
            query = source["subquery"]
            return {**source, "subquery": {**query, "node": self.answered(query["node"])}}
        if source["type"] == "EMPTY":  # SELECT (SELECT max(n) FROM t) - (SELECT min(n) FROM t)
            return source
        if source["type"] == "JOIN":
            for side in ("left", "right"):
                if is_rows(source[side], self._table):
                    raise CannotMerge(
                        "joins of the table's rows are not supported: they would cross shares; "
                        "what GROUP BY makes of them can be joined"
                    )
            self._rules.check({"modifiers": [], "condition": source["condition"]}, merged=True)
            sides = {side: self._source(source[side]) for side in ("left", "right")}
            return {**source, **sides, "condition": self._with_answers(source["condition"])}
        raise CannotMerge(f"the one table to select from is {self._table}")

    def _asked(self, node: Tree) -> Tree:
        """Adds the partial query of a query over rows; returns its final query."""
        for each in (node, *rows_within(node["from_table"])):
            check_clauses(each)
            self._rules.check(each)
        output = self._output(node)
        columns = [name for name, _ in described(self._db, write(_all_of(node["from_table"])))]
        names = Names(node, self._table, columns, self._rules)
        kind = _Grouped if puts_rows_together(node) else _Listed
        halves = kind(node, names, output, self._rules, self.answer).halves()
        sent = ", ".join(map(quoted, halves.columns))
        asked = f"FROM ({write(halves.partial)}) AS partial({sent})"
        found = self._sent(asked, halves)
        number = len(self.partials)
        self.partials.append(Partial(f"SELECT CAST(COLUMNS(*) AS VARCHAR) {asked}", found))
        self.inexact |= halves.spread or any(
            name in halves.sums and type_ in FLOATS for name, type_ in found
        )
        return {**halves.final, "from_table": _partial(number, halves.added)}

    def _output(self, node: Tree) -> list[str]:
        try:
            return [name for name, _ in described(self._db, write(node))]
        except duckdb.Error:
            described(self._db, self._sql)  # raises if the whole query is wrong
            raise CannotMerge(
                "a query within the query may not use what is outside of it, which the shares "
                "would have to know"
            ) from None

    def _sent(self, asked: str, halves: _Halves) -> list[tuple[str, str]]:
        try:
            found = described(self._db, asked)
        except duckdb.BinderException as e:
            of = re.search(r"'sum\(([A-Z_ ]+)\)'", str(e))
            if not of:
                raise
            why = f"it is made of the shares' sums, and there is no sum of {of[1]}"
            raise CannotMerge(f"avg of {of[1]} is not supported: {why}") from None
        for _, type_ in found:
            if type_.partition("(")[0] not in TRAVEL:
                raise CannotMerge(
                    f"a value of type {type_} cannot travel; select it as text: …::VARCHAR"
                )
        return found


class _Halves(NamedTuple):
    """Both queries as trees. columns: of the partial answer. sums: those of them that are added.

    spread: there is a variance. added: columns to add to the partial answers, as SQL by name.
    """

    columns: Sequence[str]
    partial: Tree
    final: Tree
    sums: Collection[str] = ()
    spread: bool = False
    added: Mapping[str, str] = {}


class _Query:
    """A SELECT that has passed the rules. output: the names of its answer's columns.

    answer: converts a subquery expression to one over the shares' answers.
    """

    def __init__(
        self,
        node: Tree,
        names: Names,
        output: Sequence[str],
        rules: Rules,
        answer: Callable[[Tree], Tree],
    ) -> None:
        self.node = node
        self.names = names
        self.output = output
        self.rules = rules
        self.answer = answer

    def place(self, tree: Tree) -> int | None:
        """The column of the answer, from 0, that ORDER BY refers to by number or name.

        None if it is not selected. In that case, raises CannotMerge for a SELECT DISTINCT, where it
        would be the value of any one of the merged rows.
        """
        if (n := number(tree)) is not None:
            return n - 1
        name, column = column_name(tree), column_name(self.names.expanded(tree))
        if name is None and column and not self.names.hides_a_column(column):
            name = column  # as in ORDER BY flights.month
        if name is not None:
            places = [i for i, label in enumerate(self.output) if label.lower() == name.lower()]
            if len(places) > 1:
                raise self.rules.refusal(tree, "more than one column of the answer is called so")
            if places:
                return places[0]
        if any(modifier["type"] == "DISTINCT_MODIFIER" for modifier in self.node["modifiers"]):
            raise self.rules.refusal(tree, "DISTINCT can be ordered by what it selects only")
        return None


class _Grouped(_Query):
    """A query with aggregates or groups."""

    def halves(self) -> _Halves:
        node = self.node
        keys = [self.names.expanded(key) for key in self._keys()]
        merging = _Merging(self, keys)
        items = [
            {**merging.merged(item), "alias": name}
            for name, item in zip(self.output, node["select_list"], strict=True)
        ]
        having = node["having"] and merging.merged(node["having"])
        qualify = node["qualify"] and merging.merged(node["qualify"])
        modifiers = [self._ordered(modifier, merging) for modifier in node["modifiers"]]
        where = node["where_clause"] and self.names.expanded(node["where_clause"])
        partial = {
            **node,
            "modifiers": [],
            "select_list": list(merging.partial.values()),
            "where_clause": where,
            "having": None,
            "qualify": None,
            "aggregate_handling": STANDARD,
            **self._groups([_position(n) for n in range(merging.finer)]),
        }
        final = {
            **_over_partial(node),
            "modifiers": modifiers,
            "select_list": items,
            "having": having,
            "qualify": qualify,
            **self._groups([_column(f"@k{i}") for i in range(len(keys))]),
        }
        for tree in (*merging.partial.values(), where):
            self.rules.check_far(tree)
        added = merging.means
        return _Halves(list(merging.partial), partial, final, merging.sums, bool(added), added)

    def _keys(self) -> list[Tree]:
        items = self.node["select_list"]
        if self.node["aggregate_handling"] == STANDARD:
            places = [(key, number(key)) for key in self.node["group_expressions"]]
            return [key if n is None else items[n - 1] for key, n in places]
        expanded = [(item, self.names.expanded(item)) for item in items]
        return [item for item, tree in expanded if not any(map(aggregate, own(tree)))]

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
    """Replaces what the shares compute by expressions over their answers.

    partial: the columns that the shares send. finer: how many of them are groups.
    """

    def __init__(self, query: _Query, keys: Sequence[Tree]) -> None:
        self._query = query
        self._keys = [likeness(key) for key in keys]
        self._groups: dict[str, Tree] = {f"@k{i}": key for i, key in enumerate(keys)}
        self._parts: dict[str, Tree] = {}
        self.sums: set[str] = set()
        self.means: dict[str, str] = {}  # of all rows of a group, by name, as SQL

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
            return self._of_values(name, tree) if tree["distinct"] else self._of_parts(name, tree)
        if tree["class"] == "SUBQUERY":
            child = tree["child"] and self.merged(tree["child"])
            return self._query.answer({**tree, "child": child})
        if tree["class"] == "COLUMN_REF":
            raise self._query.rules.refusal(tree, "stands neither in GROUP BY nor in an aggregate")
        return None

    def _of_values(self, name: str, tree: Tree) -> Tree:
        (value,) = arguments(tree)
        if tree["filter"]:  # other values become NULL, which these aggregates ignore
            value = _filled(expression("CASE WHEN w THEN v END"), w=tree["filter"], v=value)
        sent = self._sent("@d", self._groups, value)
        if name not in ORDERLESS:
            self.sums.add(sent)
        return {
            **tree,
            "filter": None,
            "arguments": [{**tree["arguments"][0], "expression": _column(sent)}],
        }

    def _of_parts(self, name: str, tree: Tree) -> Tree:
        if name in MEANS:
            total, count = self._part("sum", tree), self._part("count", tree)
            return expression(
                f'CASE WHEN sum("{count}") > 0 THEN sum("{total}")::DOUBLE / sum("{count}") END'
            )
        if name in SPREADS:
            return self._spread(name, tree)
        part = self._part(name, tree)
        if name in COUNTS:
            type_ = "HUGEINT" if name in {"count_if", "countif"} else "BIGINT"
            return expression(f'CAST(coalesce(sum("{part}"), 0) AS {type_})')
        return expression(f'{name}("{part}")')

    def _spread(self, name: str, tree: Tree) -> Tree:
        """Merges the shares' counts, means and variances, by Chan, Golub and LeVeque."""
        count, mean, spread = (self._part(f, tree) for f in ("count", "favg", "var_pop"))
        whole = mean.replace("@a", "@m")
        keys = ", ".join(quoted(f"@k{i}") for i in range(len(self._keys)))
        over = f"OVER ({f'PARTITION BY {keys}' if keys else ''})"
        self.means[whole] = (
            f'CASE WHEN min("{mean}") {over} = max("{mean}") {over} THEN "{mean}" '
            f'ELSE sum("{count}" * "{mean}") {over} / sum("{count}") {over} END'
        )
        less, is_root = SPREADS[name]
        off = f'("{mean}" - "{whole}")'
        squares = f'sum("{count}" * ("{spread}" + {off} * {off}))'
        value = f'{squares} / (sum("{count}") - {less})'
        return expression(
            f'CASE WHEN sum("{count}") > {less} THEN {f"sqrt({value})" if is_root else value} END'
        )

    def _part(self, function: str, tree: Tree) -> str:
        call = expression(f"{function}()" if function == "count_star" else f"{function}(0)")
        asked = {**call, "arguments": tree["arguments"], "filter": tree["filter"]}
        name = self._sent("@a", self._parts, asked)
        if function == "sum":
            self.sums.add(name)
        return name

    def _sent(self, prefix: str, columns: dict[str, Tree], tree: Tree) -> str:
        """The partial answer's column for the expression; equal expressions share one."""
        like = likeness(tree)
        for name, column in columns.items():
            if name.startswith(prefix) and likeness(column) == like:
                return name
        name = f"{prefix}{sum(n.startswith(prefix) for n in columns)}"
        columns[name] = tree
        return name


class _Listed(_Query):
    """A query that returns rows as they are, or the distinct ones."""

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
            "select_list": list(map(_column, columns, self.output)),
        }
        columns += [f"@o{i}" for i in range(len(more))]
        return _Halves(columns, partial, final)

    def _orders(self) -> tuple[list[Tree], list[tuple[Tree, int]]]:
        """The further columns that the shares send, and the columns, from 0, to order by."""
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
        """The limit for a share, which might fill the answer alone: LIMIT plus OFFSET."""
        if modifier["limit"] is None:
            return {**modifier, "offset": None}
        reach = (number(modifier["limit"]) or 0) + (number(modifier["offset"]) or 0)
        return {**modifier, "limit": expression(str(reach)), "offset": None}


def _over_partial(node: Tree) -> Tree:
    return {**node, "where_clause": None, "aggregate_handling": STANDARD}


def _partial(number: int, added: Mapping[str, str]) -> Tree:
    """The partial answers, as a FROM clause."""
    more = "".join(f", {sql} AS {quoted(name)}" for name, sql in added.items())
    source = f"(SELECT *{more} FROM partial{number})" if more else f"partial{number}"
    return read(f"FROM {source}")["statements"][0]["node"]["from_table"]  # type: ignore[no-any-return]


def _all_of(source: Tree) -> Tree:
    """A query for all rows of the FROM clause."""
    return {**read("FROM partial")["statements"][0]["node"], "from_table": source}


def _by(order: Tree, tree: Tree) -> Tree:
    return {**order, "expression": tree}


def _column(name: str, alias: str = "") -> Tree:
    return {**expression(quoted(name)), "alias": alias}


def _position(n: int) -> Tree:
    """The nth column of an answer, from 0, as ORDER BY and GROUP BY refer to it."""
    return expression(str(n + 1))


def _filled(template: Tree, **trees: Tree) -> Tree:
    """The template with its columns of these names replaced."""
    return changed(template, lambda tree: trees.get(column_name(tree) or ""))  # type: ignore[no-any-return]
