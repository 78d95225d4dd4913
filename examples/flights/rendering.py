"""Formats an answer as a text table, or as JSON for programs; both name its shares."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDEST = 80  # characters of a value that are shown
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
INTEGERS |= {"UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT"}
FLOATS = {"FLOAT", "DOUBLE"}
INEXACT = "sums and means of DOUBLE differ in their last digits with the order of addition"

# Control characters in a value must not reach the reader's terminal: they are shown as "?".
CONTROL = dict.fromkeys((*range(32), *range(127, 160), 0x2028, 0x2029), "?")


@dataclass(frozen=True)
class Answered:
    """columns: (name, type). rows: text, None for NULL. shares, missing: labels by worker.

    notes: further sentences for the reader.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str | None]]
    shares: Mapping[str, str]
    missing: Mapping[str, str]
    notes: Sequence[str] = ()


def as_table(answered: Answered) -> str:
    header = [_shown(name) for name, _ in answered.columns]
    rows = [["NULL" if value is None else _shown(value) for value in row] for row in answered.rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [_is_number(type_) for _, type_ in answered.columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        ]
        return " | ".join(padded).rstrip()

    rule = "-+-".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows), *_footer(answered)])


def as_json(answered: Answered) -> str:
    types = [type_ for _, type_ in answered.columns]
    content = {
        "columns": [{"name": name, "type": type_} for name, type_ in answered.columns],
        "rows": [list(map(_value, row, types)) for row in answered.rows],
        "shares": answered.shares,
        "missing": answered.missing,
        "notes": list(answered.notes),
    }
    return json.dumps(content, ensure_ascii=False)


def _footer(answered: Answered) -> list[str]:
    count = len(answered.rows)
    lines = [f"({count:,} row{'' if count == 1 else 's'} from {_workers(answered.shares)})"]
    if answered.missing:
        lines.append(f"# NOT in this answer: {_workers(answered.missing)}")
    return [*lines, *(f"# {note}" for note in answered.notes)]


def _workers(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label} ({w})" if label else w for w, label in labels.items())


def _shown(value: str) -> str:
    safe = value[: WIDEST + 1].translate(CONTROL)
    return safe if len(safe) <= WIDEST else f"{safe[: WIDEST - 3]}..."


def _is_number(type_: str) -> bool:
    return type_ in INTEGERS | FLOATS or type_.startswith("DECIMAL")


def _value(text: str | None, type_: str) -> Any:
    if text is None:
        return None
    if type_ in INTEGERS:
        return int(text)
    if type_ == "BOOLEAN":
        return text == "true"
    if type_ in FLOATS and math.isfinite(float(text)):
        return float(text)
    return text  # exactly what DuckDB writes: DECIMAL, dates, NaN, which JSON does not have
