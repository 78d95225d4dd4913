"""CSV files as one table: the format of each file is detected once, and again if it has changed.

By default DuckDB opens every file of a folder whenever it analyses a query, which is several times
per query. Given the columns, their types and the delimiters, it opens them once, to read them.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
from sqltree import literal, quoted

# Options that the detection of a file's format finds out, or that control it.
FOUND = {"columns", "names", "types", "dtypes", "column_types", "all_varchar", "normalize_names"}
FOUND |= {"delim", "sep", "quote", "escape", "new_line", "skip", "comment", "header"}
FOUND |= {"dateformat", "timestampformat", "auto_type_candidates", "sample_size", "auto_detect"}
FOUND |= {"files_to_sniff", "union_by_name"}
# Options about the combination of files, which do not apply to a single one.
TOGETHER = {"union_by_name", "filename", "hive_partitioning", "hive_types", "hive_types_autocast"}
TOGETHER |= {"files_to_sniff", "auto_detect", "parallel", "buffer_size", "store_rejects"}
TOGETHER |= {"rejects_table", "rejects_scan", "rejects_limit"}

MAX_BYTES = 65_536  # of a file's first line
MAX_MODELS = 1000
WIDER = (("BIGINT", "DOUBLE"), ("DATE", "TIMESTAMP"))  # the last type can hold all values


@dataclass(frozen=True)
class File:
    """A file as it was when its format was detected. size: bytes."""

    path: str
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: str) -> File:
        about = os.stat(path)
        return cls(path, about.st_size, about.st_mtime_ns)


@dataclass(frozen=True)
class Form:
    """A file's format. settings: read_csv's. columns: types by name, in the file's order."""

    settings: tuple[tuple[str, Any], ...]
    columns: tuple[tuple[str, str], ...]

    @property
    def has_header(self) -> bool:
        return bool(dict(self.settings)["header"])


class Forms:
    """The known formats of one share's files. Not thread-safe."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: read_csv's parameters from the configuration."""
        self._options = options
        self._known: dict[File, Form] = {}
        self._models: dict[bytes, Form] = {}  # by the first line of the file

    def look(
        self, db: duckdb.DuckDBPyConnection, files: Sequence[File], going_on: Callable[[int], None]
    ) -> None:
        """Detects the unknown formats. going_on: called before each with the number known so far;
        it may raise to stop, and the known formats are kept.
        """
        self._known = {file: self._known[file] for file in files if file in self._known}
        if not self._known:
            self._models.clear()
        for file in files:
            if file not in self._known and file.size:
                going_on(len(self._known))
                self._known[file] = self._looked_at(db, file)

    def _looked_at(self, db: duckdb.DuckDBPyConnection, file: File) -> Form:
        """Takes a quarter of the time for a file with the header and format of another one."""
        line = _first_line(file.path)
        model = self._models.get(line)
        if (
            model
            and _form(db, file.path, {**self._options, **_settings(model)}).columns == model.columns
        ):
            return model
        form = _form(db, file.path, self._options)
        if form.has_header and len(self._models) < MAX_MODELS:
            self._models.setdefault(line, form)
        return form

    def reading(self, db: duckdb.DuckDBPyConnection) -> str:
        """A SELECT of all files as one table. Raises ValueError if only some have a header."""
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
        """Assumes a header in files of text columns, where none is detected, if others have one."""
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
        """A type that can hold all values, for each column whose type differs between files."""
        found: dict[str, dict[str, list[File]]] = {}
        for file, form in self._known.items():
            for name, type_ in form.columns:
                found.setdefault(name, {}).setdefault(type_, []).append(file)
        common = {}
        for name, by_type in found.items():
            if len(by_type) == 1:
                continue
            # A column without values, for example in a file without rows, is detected as text.
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


def _settings(form: Form) -> dict[str, Any]:
    """The settings to assume for a file that probably has the same format."""
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
    given = {key: options[key] for key in settings if key in options}
    # If no quotes were detected, there may be some later in the file.
    usual = {"quote": '"', "escape": '"'} if row["Quote"] in ("(empty)", '"') else {}
    chosen = tuple(
        (key, "" if value == "(empty)" else value)
        for key, value in {**settings, **usual, **given}.items()
        if value is not None
    )
    columns = tuple((column["name"], column["type"]) for column in row["Columns"])
    return Form(chosen, columns)


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
