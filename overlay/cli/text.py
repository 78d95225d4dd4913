"""Values as a person reads them."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        else c
        for c in text
    )


def shown(result: bytes) -> str:
    """A result; of binary data only its size."""
    if not result:
        return "(empty)"
    try:
        text = result.decode()
    except UnicodeDecodeError:
        text = "\0"
    return f"{sized(result)}, not text; --out FILE keeps them" if "\0" in text else text


def sized(result: bytes) -> str:
    return f"{len(result):,} byte{'' if len(result) == 1 else 's'}"


def counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
