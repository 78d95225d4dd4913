"""The ratios as a plot: a row for each kind of work, a mark for each peer; 1 is a tie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.figures import Estimate
from benchmarks.report import OURS, SECURED, ratio
from benchmarks.rows import ROWS

MARKS = "osD^vPX*hd"


def draw(raw: Mapping[str, Any], path: Path) -> bool:
    """Writes an SVG. Returns False when there is no ratio to show."""
    found = _found(raw)
    if not found:
        return False
    import matplotlib

    matplotlib.use("agg")  # no window; the suffix of the path decides the format
    # A fixed salt, so that the same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "overlay", "font.size": 9})
    from matplotlib import pyplot

    titles = [row.title for row in ROWS if any(row.name == name for name, _ in found)]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.34 * len(titles)))
    names = [name for name in peers.MODULES if any(peer == name for _, peer in found)]
    for place, name in enumerate(names):
        _marks(axes, found, titles, name, place, len(names))
    _finish(axes, titles, raw["about"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _found(raw: Mapping[str, Any]) -> dict[tuple[str, str], Estimate]:
    pairs = {(m["row"], m["peer"]) for m in raw["measurements"] if m["peer"] not in (OURS, SECURED)}
    ratios = {pair: ratio(raw, *pair) for pair in sorted(pairs)}
    return {pair: each for pair, each in ratios.items() if each is not None}


def _marks(axes, found, titles: list[str], name: str, place: int, peers_shown: int) -> None:
    title_of = {row.name: row.title for row in ROWS}
    mine = {title_of[row]: each for (row, peer), each in found.items() if peer == name}
    shift = (place - (peers_shown - 1) / 2) * 0.8 / peers_shown
    y = [titles.index(title) + shift for title in mine]
    x = [each.median for each in mine.values()]
    errors = [[e.median - e.low for e in mine.values()], [e.high - e.median for e in mine.values()]]
    label = peers.load(name).TITLE
    axes.errorbar(
        x, y, xerr=errors, fmt=MARKS[place % len(MARKS)], markersize=4, linewidth=1, label=label
    )


def _finish(axes, titles: list[str], about: Mapping[str, Any]) -> None:
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.25)
    for place in range(1, len(titles), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("ours over the peer, answers per second; right of 1 we are ahead")
    axes.set_title(f"{about['date']}, {about['machine']['cores']} cores, {about['rounds']} rounds")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
