"""What the functions behind the handlers are like: signature, docstring, JSON Schema. Pure.

Workers tell of theirs; the processes above put together what those below them told.
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
    """One handler's, at those workers.

    arguments: the JSON Schema of a typed one's, as JSON; "{}" where there is none or it is too long
    to be told; empty of a function of bytes. result: the same, empty where there is none.
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
    """The same, as long as it may be told."""
    return function._replace(
        signature=_cut(function.signature, LONGEST_SIGNATURE),
        doc=_cut(function.doc, LONGEST_DOC),
        arguments=function.arguments if len(function.arguments) <= LONGEST_SCHEMA else "{}",
        result=function.result if len(function.result) <= LONGEST_SCHEMA else "",
    )


def gathered(told: Iterable[Function]) -> tuple[Function, ...]:
    """Those that are alike as one with all their workers, by name; of those too many, only names.

    Two of one name are left where workers run different code.
    """
    workers: dict[Function, list[str]] = {}
    for function in told:
        workers.setdefault(function._replace(workers=()), []).extend(function.workers)
    found, left = [], MAX_CHARACTERS
    for function, names in sorted(workers.items()):
        whole = function._replace(workers=tuple(sorted(set(names))))
        left -= whole.size
        found.append(whole if left >= 0 else Function(whole.name, workers=whole.workers))
    return tuple(found)


def digest(functions: Iterable[Function]) -> int:
    """Of 64 bits, the same for the same; 0 for none."""
    functions = tuple(functions)
    if not functions:
        return 0
    made = hashlib.blake2b(repr(functions).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(made.digest(), "big") or 1


def _cut(text: str, most: int) -> str:
    # Half a character cannot be told, and what a terminal would obey is not.
    text = text[:most].encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) < most else text[: most - 3] + "..."
