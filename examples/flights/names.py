"""Resolves the names in a query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rules import Rules
from sqltree import Tree, changed, column_name, kinds, likeness

OURS = re.compile("@[a-z][0-9]+")  # columns of partial answers
MOMENTS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}


class Names:
    """Resolves names to columns of the table or expressions of the SELECT list.

    A name that could be either is the column, as in DuckDB, except in ORDER BY of the name alone.
    Names in subqueries are left alone. Raises CannotMerge if two columns of the answer have the
    same alias.
    """

    def __init__(self, node: Tree, table: str, columns: Sequence[str], rules: Rules) -> None:
        self._columns = {name.lower(): name for name in columns}
        source = node["from_table"]
        self._tables = {(source.get("alias") or table).lower()}
        if source["type"] == "BASE_TABLE":
            self._tables.add(table.lower())
        self._aliases: dict[str, Tree] = {}
        self._rules = rules
        for item in node["select_list"]:
            meant, alias = self.expanded(item), item["alias"].lower()
            if likeness(self._aliases.get(alias, meant)) != likeness(meant):
                raise rules.refusal(item, f"two columns of the answer are called '{alias}'")
            if OURS.fullmatch(alias):
                raise rules.refusal(
                    item, f"'{alias}' is a name that is needed here; use another one"
                )
            if alias:
                self._aliases[alias] = meant

    def hides_a_column(self, name: str) -> bool:
        """Whether a different column of the answer has the name of a column of the table."""
        meant = self._aliases.get(name.lower())
        return meant is not None and column_name(meant) != self._columns.get(name.lower())

    def expanded(self, tree: Any) -> Any:
        """The expression in terms of the table's columns, spelled as in the table."""
        return changed(tree, self._meaning)

    def _meaning(self, tree: Tree) -> Tree | None:
        if tree["class"] == "SUBQUERY":
            return {**tree, "child": self.expanded(tree["child"])}
        if tree["class"] != "COLUMN_REF":
            return None
        names = tree["column_names"]
        if (
            len(names) > 1
            and names[0].lower() in self._tables
            and names[1].lower() in self._columns
        ):
            names = names[1:]
        first = names[0].lower()
        if first in self._columns:
            return {**tree, "column_names": [self._columns[first], *names[1:]]}
        if first in self._aliases and len(names) == 1:
            return {**self._aliases[first], "alias": tree["alias"]}
        raise self._rules.refusal(tree, self._why_not(names))

    def _why_not(self, names: Sequence[str]) -> str:
        """Why a name that is neither a column nor an alias is rejected, even if DuckDB knows it."""
        first = names[0].lower()
        if kinds(first) or first in MOMENTS:
            return f"{first} does not depend on the row alone"
        if first in self._tables and len(names) == 1:
            return "a whole row cannot travel; name the columns"
        there_are = ", ".join(self._columns.values())
        return f"there is no such column in the table; there are {there_are}"
