"""Values as a person reads them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping


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


def sized(result: bytes | int) -> str:
    size = result if isinstance(result, int) else len(result)
    return f"{size:,} byte{'' if size == 1 else 's'}"


def counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def span(span_s: float, decimals: int = 0) -> str:
    """A length of time; `decimals` of its seconds while it is below a minute."""
    if span_s < 60:
        return f"{span_s:.{decimals}f} s"
    minutes = int(span_s // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def jobs(states: Mapping[str, int], schedules: int) -> str:
    """How many jobs there are: by state, and schedules."""
    found = [f"{number:,} {state}" for state, number in states.items() if number]
    if schedules:
        found.append(counted(schedules, "schedule"))
    return ", ".join(found) or "none"


def no_jobs(problem: str) -> str:
    """That a leader accepts no jobs, and why; empty if it does."""
    return f"no jobs are accepted: {problem}" if problem else ""
