"""Answers over time as a picture: a strip for each scenario, its faults shaded. Plain SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from faults.bench import Outcome
from faults.history import Answer

BIN_S = 0.1
SCALE = 40  # pixels a second
LEFT, STRIP, GAP = 150, 44, 14
KINDS = {"OK": "#3b7dd8", "refused": "#e0a526", "other": "#c23b3b"}


def drawn(outcomes: Sequence[Outcome]) -> str:
    """The picture's text. Time 0 is the first call."""
    longest = max((_length(outcome) for outcome in outcomes), default=1.0)
    width, height = LEFT + longest * SCALE + 20, 60 + len(outcomes) * (STRIP + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for number, outcome in enumerate(outcomes):
        parts += _strip(outcome, 40 + number * (STRIP + GAP))
    bottom = height - 4
    parts += [
        f'<text x="{LEFT + second * SCALE}" y="{bottom}" text-anchor="middle">{second} s</text>'
        for second in range(0, int(longest) + 1, 2)
    ]
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
    texts = {**KINDS, "a fault": "#dddddd"}
    for number, (name, colour) in enumerate(texts.items()):
        x = LEFT + number * 90
        yield f'<rect x="{x}" y="10" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{x + 14}" y="19">{name}</text>'
    yield '<text x="4" y="19">answers each 0.1 s</text>'


def _strip(outcome: Outcome, top: int) -> Iterator[str]:
    begin, floor = _begin(outcome), top + STRIP
    mark = "" if not outcome.violations else f" ({len(outcome.violations)} broken)"
    yield f'<text x="4" y="{floor - 4}">{escape(outcome.scenario.name + mark)}</text>'
    for fault in outcome.history.faults:
        x, wide = LEFT + (fault.begin - begin) * SCALE, (fault.end - fault.begin) * SCALE
        yield (
            f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{STRIP}" fill="#dddddd">'
            f"<title>{escape(fault.what)} {escape(fault.process)}</title></rect>"
        )
    yield from _bars(outcome, begin, floor)
    yield f'<line x1="{LEFT}" x2="{LEFT + _length(outcome) * SCALE:.0f}" y1="{floor}" ' + (
        f'y2="{floor}" stroke="black" stroke-width="0.5"/>'
    )


def _bars(outcome: Outcome, begin: float, floor: int) -> Iterator[str]:
    bins: dict[int, Counter[str]] = {}
    for answer in outcome.history.answers:
        bins.setdefault(int((answer.at - begin) / BIN_S), Counter())[kind(answer)] += 1
    most = max((sum(counts.values()) for counts in bins.values()), default=1)
    for number, counts in sorted(bins.items()):
        y = float(floor)
        for name, colour in KINDS.items():
            tall = counts[name] * STRIP / most
            y -= tall
            if tall:
                x, wide = LEFT + number * BIN_S * SCALE, BIN_S * SCALE - 1
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                    f'fill="{colour}"/>'
                )
