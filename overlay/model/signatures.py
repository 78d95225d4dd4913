"""Descriptions of the functions behind the handlers: signature, docstring, JSON Schema.

Workers report their own; each process above combines the reports of those below it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from overlay.model.limits import Limits

LONGEST_SIGNATURE = 500  # characters
LONGEST_DOC = 4_000
LONGEST_SCHEMA = Limits.function_schema
MAX_CHARACTERS = Limits.functions_characters


class Function(NamedTuple):
    """One handler's function, as those workers run it.

    arguments: of a typed function the JSON Schema, as JSON; "{}" if there is none or it is too long
    to report. Empty for a function of bytes. result: the same, empty if there is none.
    """

    name: str
    signature: str = ""
    doc: str = ""
    arguments: str = ""
    result: str = ""
    workers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Characters."""
        texts = (self.name, self.signature, self.doc, self.arguments, self.result, *self.workers)
        return sum(map(len, texts))


def bounded(function: Function) -> Function:
    """The same, cut to the lengths that may be reported."""
    return function._replace(
        signature=_cut(function.signature, LONGEST_SIGNATURE),
        doc=_cut(function.doc, LONGEST_DOC),
        arguments=function.arguments if len(function.arguments) <= LONGEST_SCHEMA else "{}",
        result=function.result if len(function.result) <= LONGEST_SCHEMA else "",
    )


def gathered(reported: Iterable[Function]) -> tuple[Function, ...]:
    """Equal ones merged, with all their workers, sorted by name; beyond the bound only their names.

    Two with one name remain where workers run different code.
    """
    workers: dict[Function, list[str]] = {}
    for function in reported:
        workers.setdefault(function._replace(workers=()), []).extend(function.workers)
    found, left = [], MAX_CHARACTERS
    for function, names in sorted(workers.items()):
        whole = function._replace(workers=tuple(sorted(set(names))))
        left -= whole.size
        found.append(whole if left >= 0 else Function(whole.name, workers=whole.workers))
    return tuple(found)


def digest(functions: Iterable[Function]) -> int:
    """A 64-bit number, equal for equal functions; 0 for none."""
    functions = tuple(functions)
    if not functions:
        return 0
    made = hashlib.blake2b(repr(functions).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(made.digest(), "big") or 1


def _cut(text: str, most: int) -> str:
    # A lone surrogate cannot be sent, and control characters must not reach a terminal.
    text = text[:most].encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) < most else text[: most - 3] + "..."
