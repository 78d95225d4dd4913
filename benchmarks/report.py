"""The results as a Markdown page. Without I/O: takes the raw results, returns text.

`raw` is what results.json holds: {"about": …, "measurements": [...], "not_run": {...}}.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import peers
from benchmarks.figures import Estimate, estimate, paired_ratios, unevenness
from benchmarks.rows import ROWS, TARGETS, Row, Target, setup_of

Raw = Mapping[str, Any]
OURS = "ours"
SECURED = "ours-tls"
BUSY = 0.25  # cores; if others use more, the figures say little (idle peers use about 0.1)


def rate(found: Raw) -> float:
    return found["answers"] / found["seconds"]


def by_round(raw: Raw, row: str, peer: str, value: Callable[[Raw], float]) -> dict[int, float]:
    """One value for each round without an error."""
    return {
        found["round"]: value(found)
        for found in raw["measurements"]
        if found["row"] == row and found["peer"] == peer and "error" not in found
    }


def ratio(raw: Raw, row: str, peer: str) -> Estimate | None:
    """Our rate over the peer's, paired by round."""
    ours, theirs = (by_round(raw, row, name, rate) for name in (OURS, peer))
    return estimate(paired_ratios(ours, theirs))


def measured(raw: Raw, target: Target) -> Estimate | None:
    """The measured value of a figure to reach."""
    row = next(row for row in ROWS if row.name == target.row)
    setup = setup_of(row)
    if target.kind == "rate":
        return ratio(raw, target.row, target.against)
    if target.kind == "p99":
        here, there = (
            by_round(raw, name, OURS, lambda found: found["p99_ms"])
            for name in (target.row, target.against)
        )
        return estimate(paired_ratios(here, there))
    if target.kind == "ideal":
        ideal = len(setup.workers) * setup.slots / setup.nap_s
        shares = by_round(raw, target.row, OURS, lambda found: rate(found) / ideal)
        return estimate(list(shares.values()))
    spread = by_round(
        raw, target.row, OURS, lambda found: unevenness(found["by_worker"], setup.workers)
    )
    return estimate(list(spread.values()))


def page(raw: Raw, before: Raw | None = None, picture: str = "") -> str:
    """The whole page. before: the raw results of an earlier run, shown beside this one's."""
    parts = [
        _head(raw),
        _targets(raw, before),
        f"![Ours against each peer, by row]({picture})" if picture else "",
        _rates(raw),
        _ratios(raw),
        _price_of_tls(raw),
        _many_clients(raw),
        _tails(raw),
        _naps(raw),
        _cpu(raw),
        _not_run(raw),
        _notes(raw),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def number(value: float) -> str:
    """Three significant figures, thousands with commas."""
    if value >= 1000:
        rounded = round(value, -(len(str(int(value))) - 3))
        return f"{rounded:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(found: Estimate | None, unit: str = "x") -> str:
    if found is None:
        return "not run"
    return f"{number(found.median)}{unit} ({number(found.low)} to {number(found.high)})"


def _head(raw: Raw) -> str:
    about = raw["about"]
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    others = _others(raw)
    lines = [
        f"# Side by side, {about['date']}",
        f"`{about['command']}`: {about['rounds']} rounds of {about['seconds']:g} s each, the order "
        "rotating, one run. Figures are medians over the rounds, in brackets the 95 % interval "
        "(bootstrap of the rounds' own ratios). Every answer was checked.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{machine['os']}; Python {machine['python']}; "
        f"project at {machine['commit'] or 'no commit'} ({about['minutes']:.0f} minutes).",
        f"{versions}.",
        f"Everything else on the machine, including idle peers, used {others:.2f} cores meanwhile"
        + (" (**busy: these figures say little**)." if others > BUSY else "."),
    ]
    if about.get("interrupted"):
        lines.append("**Interrupted: not all rounds are in.**")
    return "\n\n".join(lines)


def _others(raw: Raw) -> float:
    """The mean number of cores that were busy with anything but the peer being measured."""
    shares = [found["other_cores"] for found in raw["measurements"] if "error" not in found]
    return statistics.fmean(shares) if shares else 0.0


def _targets(raw: Raw, before: Raw | None) -> str:
    lines = []
    for target in TARGETS:
        found = measured(raw, target)
        unit = "x" if target.kind in ("rate", "p99") else ""
        bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}{unit}"
        verdict = target.verdict(found.low, found.high) if found else ""
        line = [target.title, bound, spread(found, unit), verdict]
        if before is not None:
            old = measured(before, target)
            line.append(spread(old, unit) if old else "")
        lines.append(line)
    head = ["", "to reach", "measured", ""]
    if before is not None:
        head.append(f"last time ({before['about']['date']})")
    return "## Figures to reach\n\n" + table(head, lines)


def _names(raw: Raw) -> list[str]:
    seen = {found["peer"] for found in raw["measurements"]}
    return [name for name in peers.MODULES if name in seen]


def _rows(raw: Raw) -> list[Row]:
    seen = {found["row"] for found in raw["measurements"]}
    return [row for row in ROWS if row.name in seen]


def _grid(
    raw: Raw, rows: Iterable[Row], cell: Callable[[Row, str], str], skip: Sequence[str] = ()
) -> str:
    names = [name for name in _names(raw) if name not in skip]
    lines = []
    for row in rows:
        cells = [cell(row, name) for name in names]
        if any(cells):
            lines.append([row.title, *cells])
    return table(["", *(peers.load(name).TITLE for name in names)], lines)


def _rates(raw: Raw) -> str:
    def cell(row: Row, name: str) -> str:
        rates = by_round(raw, row.name, name, rate)
        if not rates:
            return _why_not(raw, row, name)
        text = number(statistics.median(rates.values()))
        counts = by_round(raw, row.name, name, lambda found: found["answers"])
        short = row.load.startswith("bulk") and max(counts.values()) < _full(raw)
        return text + (f" (of {max(counts.values()):,.0f})" if short else "")

    full = f"{_full(raw):,.0f}"
    about = (
        "Answers per second. Mode any and 16 bytes unless the row says otherwise. The bulk is "
        f"{full} items; a peer that would take minutes gets fewer (their number is in brackets)."
    )
    return f"## Rates\n\n{about}\n\n" + _grid(raw, _rows(raw), cell)


def _full(raw: Raw) -> int:
    bulk = [found["answers"] for found in raw["measurements"] if found.get("row") == "bulk"
            and found["peer"] == OURS and "error" not in found]  # fmt: skip
    return max(bulk, default=0)


def _why_not(raw: Raw, row: Row, name: str) -> str:
    return "failed" if f"{name}, {row.name}" in raw["not_run"] else ""


def _ratios(raw: Raw) -> str:
    def cell(row: Row, name: str) -> str:
        found = ratio(raw, row.name, name)
        return spread(found) if found else ""

    rows = [row for row in _rows(raw) if by_round(raw, row.name, OURS, rate)]
    if not rows or not set(_names(raw)) - {OURS, SECURED}:
        return ""
    about = "Above 1 the overlay is ahead, below 1 the peer."
    return f"## Ours over the peer\n\n{about}\n\n" + _grid(raw, rows, cell, (OURS, SECURED))


def _price_of_tls(raw: Raw) -> str:
    lines = []
    for row in _rows(raw):
        plain, secured = (by_round(raw, row.name, name, rate) for name in (OURS, SECURED))
        if found := estimate(paired_ratios(secured, plain)):
            rates = [number(statistics.median(x.values())) for x in (plain, secured)]
            lines.append([row.title, *rates, spread(found)])
    if not lines:
        return ""
    about = "Answers per second; below 1 is what certificates cost, of all connections on the way."
    head = ["", "plaintext", "mutual TLS", "TLS over plaintext"]
    return f"## Mutual TLS\n\n{about}\n\n" + table(head, lines)


def _many_clients(raw: Raw) -> str:
    lines = []
    for row in (row for row in _rows(raw) if row.over):
        for name in _names(raw):
            below, above = (by_round(raw, each, name, rate) for each in (row.over, row.name))
            if found := estimate(paired_ratios(above, below)):
                rates = [number(statistics.median(x.values())) for x in (below, above)]
                lines.append([row.title, *rates, spread(found)])
    if not lines:
        return ""
    about = (
        "Answers per second over mutual TLS, of all clients together, which are threads of one "
        "process. 16 workers have 2 slots each, 48 have 1."
    )
    head = ["", "without lanes", "with lanes", "with over without"]
    return f"## Many clients\n\n{about}\n\n" + table(head, lines)


def _tails(raw: Raw) -> str:
    def cell(row: Row, name: str) -> str:
        found = by_round(raw, row.name, name, lambda f: f["p99_ms"])
        return number(statistics.median(found.values())) if found else ""

    rows = [row for row in _rows(raw) if row.load in ("threads", "unary")]
    if not rows:
        return ""
    about = "The 99th percentile of a blocking call, in milliseconds; the median of the rounds."
    return f"## Slowest calls\n\n{about}\n\n" + _grid(raw, rows, cell)


def _naps(raw: Raw) -> str:
    rows = [row for row in _rows(raw) if setup_of(row).nap_s]
    if not rows:
        return ""

    def cell(row: Row, name: str) -> str:
        setup = setup_of(row)
        ideal = len(setup.workers) * setup.slots / setup.nap_s
        shares = by_round(raw, row.name, name, lambda f: rate(f) / ideal)
        uneven = by_round(raw, row.name, name, lambda f: unevenness(f["by_worker"], setup.workers))
        if not shares:
            return _why_not(raw, row, name)
        share, off = (statistics.median(x.values()) for x in (shares, uneven))
        return f"{share:.2f}, within {off:.0%}"

    about = "The share of the ideal rate, and how far any worker's share is from an even one."
    return f"## 5 ms of handler time\n\n{about}\n\n" + _grid(raw, rows, cell)


def _cpu(raw: Raw) -> str:
    def cell(row: Row, name: str) -> str:
        found = by_round(raw, row.name, name, lambda f: 1000 * f["cpu_s"] / f["answers"])
        return number(statistics.median(found.values())) if found else ""

    about = (
        "CPU seconds per 1,000 answers, over all processes of the peer, including its servers and "
        "its client."
    )
    # The large calls beside are not counted, nor what several clients send until they have lanes.
    rows = [row for row in _rows(raw) if not row.beside and row.clients == 1]
    if not rows:
        return ""
    return f"## CPU\n\n{about}\n\n" + _grid(raw, rows, cell)


def _not_run(raw: Raw) -> str:
    failures: dict[tuple[str, str], list[str]] = {}
    for found in raw["measurements"]:
        if "error" in found:
            failures.setdefault((found["peer"], found["row"]), []).append(found["error"])
    lines = [f"- not run: {key}: {reason}" for key, reason in raw["not_run"].items()]
    lines += [
        f"- {peer}, {row}: failed in {len(errors)} of {raw['about']['rounds']} rounds: {errors[-1]}"
        for (peer, row), errors in failures.items()
    ]
    return "## Not run\n\n" + "\n".join(lines) if lines else ""


def _notes(raw: Raw) -> str:
    lines = [f"- **{peers.load(n).TITLE}**: {peers.load(n).NOTES}" for n in _names(raw)]
    return "## What each peer is, and does less and more\n\n" + "\n".join(lines) if lines else ""
