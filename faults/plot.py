"""Answers over time as an SVG: a strip for each scenario, with its faults shaded.

Each strip has its own scale of answers a second, from 0 to its maximum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, log10

from faults.bench import Outcome
from faults.history import Answer

BIN_S = 0.1
SCALE = 40  # pixels a second
LEFT, RIGHT, TOP, STRIP, GAP = 220, 24, 44, 48, 34
KINDS = {"OK": "#3b7dd8", "refused": "#e0a526", "other": "#c23b3b"}
LINE, FAULT, QUIET = "#e4e4e4", "#cfcfcf", "#555555"


def drawn(outcomes: Sequence[Outcome]) -> str:
    """The SVG. Time 0 is the first call."""
    seconds = ceil(max((_length(outcome) for outcome in outcomes), default=1.0))
    width, height = LEFT + seconds * SCALE + RIGHT, TOP + len(outcomes) * (STRIP + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for number, outcome in enumerate(outcomes):
        parts += _strip(outcome, TOP + number * (STRIP + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def kind(answer: Answer) -> str:
    if answer.code == "OK":
        return "OK"
    return "refused" if answer.executed == "no" else "other"


def _begin(outcome: Outcome) -> float:
    return min((call.at for call in outcome.history.calls), default=0.0)


def _length(outcome: Outcome) -> float:
    begin = _begin(outcome)
    return max((answer.at - begin for answer in outcome.history.answers), default=1.0)


def _legend() -> Iterator[str]:
    yield '<text x="4" y="23" font-weight="bold">answers a second</text>'
    for number, (name, colour) in enumerate({**KINDS, "a fault": FAULT}.items()):
        x = LEFT + number * 90
        yield f'<rect x="{x}" y="13" width="11" height="11" fill="{colour}"/>'
        yield f'<text x="{x + 16}" y="23">{name}</text>'


def _strip(outcome: Outcome, top: int) -> Iterator[str]:
    begin, floor = _begin(outcome), top + STRIP
    bins = _bins(outcome, begin)
    most = _ceiling(max((sum(counts.values()) for counts in bins.values()), default=1) / BIN_S)
    broken = len(outcome.violations)
    yield f'<text x="4" y="{top + 20}">{escape(outcome.scenario.name)}</text>'
    if broken:
        yield f'<text x="4" y="{top + 36}" fill="{KINDS["other"]}">{broken} broken</text>'
    for fault in outcome.history.faults:
        x, wide = _x(fault.begin - begin), max(2.0, (fault.end - fault.begin) * SCALE)
        yield (
            f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{STRIP}" fill="{FAULT}">'
            f"<title>{escape(fault.what)} {escape(fault.process)}</title></rect>"
        )
    yield from _axes(ceil(_length(outcome)), most, top)
    for number, counts in sorted(bins.items()):
        yield from _bar(number, counts, STRIP / (most * BIN_S), floor)


def _bins(outcome: Outcome, begin: float) -> dict[int, Counter[str]]:
    bins: dict[int, Counter[str]] = {}
    for answer in outcome.history.answers:
        bins.setdefault(int((answer.at - begin) / BIN_S), Counter())[kind(answer)] += 1
    return bins


def _axes(seconds: int, most: int, top: int) -> Iterator[str]:
    """Horizontal lines at maximum, half and 0, and a vertical one each second, with labels."""
    floor, end = top + STRIP, LEFT + seconds * SCALE
    for part, y in ((1.0, top), (0.5, top + STRIP // 2), (0.0, floor)):
        colour = "#888888" if not part else LINE
        yield f'<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}" stroke="{colour}"/>'
        yield _label(LEFT - 6, y + 4, f"{most * part:,g}", "end")
    for second in range(seconds + 1):
        x = _x(second)
        yield f'<line x1="{x:g}" x2="{x:g}" y1="{top}" y2="{floor}" stroke="{LINE}"/>'
        if second % 2 == 0:
            yield _label(x, floor + 14, f"{second} s", "middle")


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="10" fill="{QUIET}">'
        f"{text}</text>"
    )


def _bar(number: int, counts: Counter[str], of_one: float, floor: int) -> Iterator[str]:
    """The stacked bar of one bin. of_one: the height of one answer."""
    x, y, wide = _x(number * BIN_S), float(floor), BIN_S * SCALE - 1
    for name, colour in KINDS.items():
        if tall := counts[name] * of_one:
            y -= tall
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"/>'
            )


def _x(second: float) -> float:
    return LEFT + second * SCALE


def _ceiling(value: float) -> int:
    """The next 1, 2 or 5 times a power of ten, from 10 on."""
    power: int = 10 ** max(1, int(log10(max(value, 1))))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= value)
