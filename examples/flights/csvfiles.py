"""CSV files as one table: how each is written is found out once, and anew when it has changed.

Left to itself DuckDB opens every file of a folder whenever it looks at a query, which is several
times a query. Told the columns, their types and the delimiters it opens them once, to read them.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
from sqltree import literal, quoted

# What the look at a file finds out, or what only steers it.
FOUND = {"columns", "names", "types", "dtypes", "column_types", "all_varchar", "normalize_names"}
FOUND |= {"delim", "sep", "quote", "escape", "new_line", "skip", "comment", "header"}
FOUND |= {"dateformat", "timestampformat", "auto_type_candidates", "sample_size", "auto_detect"}
FOUND |= {"files_to_sniff", "union_by_name"}
# What sets how files go together and says nothing of the one that is looked at.
TOGETHER = {"union_by_name", "filename", "hive_partitioning", "hive_types", "hive_types_autocast"}
TOGETHER |= {"files_to_sniff", "auto_detect", "parallel", "buffer_size", "store_rejects"}
TOGETHER |= {"rejects_table", "rejects_scan", "rejects_limit"}

MAX_BYTES = 65_536  # of a file's first line
MAX_MODELS = 1000
WIDER = (("BIGINT", "DOUBLE"), ("DATE", "TIMESTAMP"))  # what holds every value of those before it


@dataclass(frozen=True)
class File:
    """As it was when it was looked at. size: bytes."""

    path: str
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: str) -> File:
        about = os.stat(path)
        return cls(path, about.st_size, about.st_mtime_ns)


@dataclass(frozen=True)
class Form:
    """How a file is written. settings: read_csv's. columns: types by name, in the file's order."""

    settings: tuple[tuple[str, Any], ...]
    columns: tuple[tuple[str, str], ...]

    @property
    def has_header(self) -> bool:
        return bool(dict(self.settings)["header"])


class Forms:
    """Of one share's files, as far as they are known. Not safe from several threads."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: how to read CSV files, of the configuration."""
        self._options = options
        self._known: dict[File, Form] = {}
        self._models: dict[bytes, Form] = {}  # by the first line of the file that it is of

    def look(
        self, db: duckdb.DuckDBPyConnection, files: Sequence[File], going_on: Callable[[int], None]
    ) -> None:
        """Looks at those not looked at yet. going_on: is told before each how many are known, and
        ends the look by raising; what is known by then stays so.
        """
        self._known = {file: self._known[file] for file in files if file in self._known}
        if not self._known:
            self._models.clear()
        for file in files:
            if file not in self._known and file.size:
                going_on(len(self._known))
                self._known[file] = self._looked_at(db, file)

    def _looked_at(self, db: duckdb.DuckDBPyConnection, file: File) -> Form:
        """A quarter of the work for a file that begins as another does, and is written like it."""
        line = _first_line(file.path)
        model = self._models.get(line)
        if (
            model
            and _form(db, file.path, {**self._options, **_told(model)}).columns == model.columns
        ):
            return model
        form = _form(db, file.path, self._options)
        if form.has_header and len(self._models) < MAX_MODELS:
            self._models.setdefault(line, form)
        return form

    def reading(self, db: duckdb.DuckDBPyConnection) -> str:
        """All files as one table: a SELECT. Raises ValueError where some have a header only."""
        self._give_headers(db)
        types = self._types(db)
        groups: dict[Form, list[str]] = {}
        for file, form in self._known.items():
            columns = tuple((name, types.get(name, own)) for name, own in form.columns)
            groups.setdefault(Form(form.settings, columns), []).append(file.path)
        if not groups:
            raise ValueError("option files: the CSV files of this worker are all empty")
        return " UNION ALL BY NAME ".join(
            f"SELECT * FROM {self._reader(paths, form)}" for form, paths in groups.items()
        )

    def _give_headers(self, db: duckdb.DuckDBPyConnection) -> None:
        """To the files of texts alone, whose first line looks like any other, as others have it."""
        headed = {
            name for form in self._known.values() if form.has_header for name, _ in form.columns
        }
        if not headed or "header" in self._options:
            return
        for file, form in self._known.items():
            if not form.has_header:
                again = _form(db, file.path, {**self._options, "header": True})
                if not {name for name, _ in again.columns} <= headed:
                    raise ValueError(
                        f"option files: '{file.path}' has no header and others have one; "
                        'say "csv": {"header": false, "names": […]} or leave it out'
                    )
                self._known[file] = again

    def _types(self, db: duckdb.DuckDBPyConnection) -> dict[str, str]:
        """Of the columns about which files do not agree, the type that holds all their values."""
        found: dict[str, dict[str, list[File]]] = {}
        for file, form in self._known.items():
            for name, type_ in form.columns:
                found.setdefault(name, {}).setdefault(type_, []).append(file)
        common = {}
        for name, by_type in found.items():
            if len(by_type) == 1:
                continue
            # Also a column without a value, of a file without a row, is taken for text.
            texts = by_type.get("VARCHAR", [])
            if not any(self._has_text(db, file, name) for file in texts):
                by_type.pop("VARCHAR", None)
            common[name] = _widest(by_type)
        return common

    def _has_text(self, db: duckdb.DuckDBPyConnection, file: File, column: str) -> bool:
        reader = self._reader([file.path], self._known[file])
        found = f"SELECT 1 FROM {reader} WHERE {quoted(column)} IS NOT NULL LIMIT 1"
        return db.execute(found).fetchone() is not None

    def _reader(self, paths: Sequence[str], form: Form) -> str:
        own = {key: value for key, value in self._options.items() if key not in FOUND}
        how = {"auto_detect": False, **dict(form.settings), "columns": dict(form.columns), **own}
        return f"read_csv({literal(paths)}{_arguments(how)})"


def _told(form: Form) -> dict[str, Any]:
    """What need not be found out of a file that is probably written like that one."""
    usual = {"dateformat": "%Y-%m-%d", "timestampformat": "%Y-%m-%d %H:%M:%S"}
    return {**usual, **dict(form.settings)}


def _first_line(path: str) -> bytes:
    opened = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        return bytes(file.readline(MAX_BYTES))


def _form(db: duckdb.DuckDBPyConnection, path: str, options: Mapping[str, Any]) -> Form:
    how = {key: value for key, value in options.items() if key not in TOGETHER}
    found = db.execute(f"FROM sniff_csv({literal(path)}{_arguments(how)})")
    names = [name for name, *_ in found.description]
    row = dict(zip(names, found.fetchone(), strict=True))
    settings = {
        "delim": row["Delimiter"],
        "quote": row["Quote"],
        "escape": row["Escape"],
        "new_line": row["NewLineDelimiter"],
        "comment": row["Comment"],
        "skip": row["SkipRows"],
        "header": row["HasHeader"],
        "dateformat": row["DateFormat"],
        "timestampformat": row["TimestampFormat"],
    }
    said = {key: options[key] for key in settings if key in options}
    # Where no quotes were seen there may be some further on.
    usual = {"quote": '"', "escape": '"'} if row["Quote"] in ("(empty)", '"') else {}
    told = tuple(
        (key, "" if value == "(empty)" else value)
        for key, value in {**settings, **usual, **said}.items()
        if value is not None
    )
    columns = tuple((column["name"], column["type"]) for column in row["Columns"])
    return Form(told, columns)


def _widest(types: Iterable[str]) -> str:
    found = set(types)
    if len(found) == 1:
        return found.pop()
    return next((chain[-1] for chain in WIDER if found <= set(chain)), "VARCHAR")


def _arguments(how: Mapping[str, Any]) -> str:
    return "".join(f", {_identifier(key)} = {literal(value)}" for key, value in how.items())


def _identifier(key: str) -> str:
    if not key.isidentifier():
        raise ValueError(f"option csv: '{key}' is not one of read_csv's parameters")
    return key
