"""What the names in a query stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rules import Rules
from sqltree import Tree, changed, column_name, likeness


class Names:
    """Columns of the table, or expressions of the SELECT list.

    Where a name is both, it is the column, as in DuckDB, but for ORDER BY of the name alone.
    Raises CannotMerge where two columns of the answer have one alias.
    """

    def __init__(self, node: Tree, table: str, columns: Sequence[str], rules: Rules) -> None:
        self._columns = {name.lower(): name for name in columns}
        self._tables = {table.lower(), (node["from_table"].get("alias") or table).lower()}
        self._aliases: dict[str, Tree] = {}
        self._rules = rules
        for item in node["select_list"]:
            meant, alias = self.expanded(item), item["alias"].lower()
            if likeness(self._aliases.get(alias, meant)) != likeness(meant):
                raise rules.refusal(item, f"two columns of the answer are called '{alias}'")
            if alias:
                self._aliases[alias] = meant

    def hides_a_column(self, name: str) -> bool:
        """Whether the answer has something else under the name of a column of the table."""
        meant = self._aliases.get(name.lower())
        return meant is not None and column_name(meant) != self._columns.get(name.lower())

    def expanded(self, tree: Any) -> Any:
        """The same in terms of the table's columns, each written as the table does."""
        return changed(tree, self._meaning)

    def _meaning(self, tree: Tree) -> Tree | None:
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
        raise self._rules.refusal(
            tree, f"there is no such column; there are {', '.join(self._columns.values())}"
        )
