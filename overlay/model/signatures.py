"""Descriptions of the handlers' functions: signature, docstring, JSON Schema.

Workers report their own; each process above combines the reports of those below it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from overlay.model.limits import Limits

MAX_SIGNATURE = 500  # characters
MAX_DOC = 4_000
MAX_SCHEMA = Limits.function_schema
MAX_CHARACTERS = Limits.functions_characters


class Function(NamedTuple):
    """One handler's function, as `workers` run it.

    arguments: the JSON Schema of a typed function's arguments, as JSON; "{}" if there is none or it
    is too long to report. Empty for a function that takes bytes. result: the same for its result,
    empty if there is none.
    """

    name: str
    signature: str = ""
    doc: str = ""
    arguments: str = ""
    result: str = ""
    workers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In characters."""
        texts = (self.name, self.signature, self.doc, self.arguments, self.result, *self.workers)
        return sum(map(len, texts))


def bounded(function: Function) -> Function:
    """The same function, cut to the lengths that may be reported."""
    return function._replace(
        signature=_cut(function.signature, MAX_SIGNATURE),
        doc=_cut(function.doc, MAX_DOC),
        arguments=function.arguments if len(function.arguments) <= MAX_SCHEMA else "{}",
        result=function.result if len(function.result) <= MAX_SCHEMA else "",
    )


def gathered(reported: Iterable[Function]) -> tuple[Function, ...]:
    """Equal functions merged, with all their workers, sorted by name.

    Beyond MAX_CHARACTERS only names are reported. A name appears twice where workers run different
    code.
    """
    workers: dict[Function, list[str]] = {}
    for function in reported:
        workers.setdefault(function._replace(workers=()), []).extend(function.workers)
    merged, left = [], MAX_CHARACTERS
    for function, names in sorted(workers.items()):
        whole = function._replace(workers=tuple(sorted(set(names))))
        left -= whole.size
        merged.append(whole if left >= 0 else Function(whole.name, workers=whole.workers))
    return tuple(merged)


def digest(functions: Iterable[Function]) -> int:
    """A 64-bit number, equal for equal functions; 0 for none."""
    functions = tuple(functions)
    if not functions:
        return 0
    hashed = hashlib.blake2b(repr(functions).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(hashed.digest(), "big") or 1


def _cut(text: str, limit: int) -> str:
    # A lone surrogate cannot be sent, and control characters must not reach a terminal.
    text = text[:limit].encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) < limit else text[: limit - 3] + "..."
