"""The outcomes as a Markdown page. Pure: outcomes in, text out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from faults.bench import Outcome

SHOWN = 12  # violations of a scenario; the rest is counted


def line(outcome: Outcome) -> str:
    """One line of progress output, and the first violations."""
    ok, refused, other = answers(outcome)
    counts = f"{ok} OK, {refused} refused, {sum(other.values())} other"
    if outcome.scenario.jobs:
        states = ", ".join(f"{count} {state}" for state, count in jobs(outcome).most_common())
        counts += f"; jobs: {states}"
    text = f"{outcome.scenario.name:<20} {counts}: {verdict(outcome)}"
    return "\n".join([text, *(f"    {v.rule}: {v.sentence}" for v in outcome.violations[:3])])


def page(
    outcomes: Sequence[Outcome],
    not_run: Mapping[str, str],
    seconds: float,
    seed: int,
    where: str = "",
) -> str:
    """where: the date and the machine, in a line."""
    head = ["scenario", "calls", "OK", "refused", "other", "back after", "late p99", "violations"]
    rows = [_row(outcome) for outcome in outcomes]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])
    parts = [
        "# What breaks it",
        f"{seconds:g} s of load each, seed {seed}. Refused: with `executed: no`, and it did not "
        "run; in each scenario this includes a few that reuse a key for a different payload. Back "
        "after: from the end of the load until five complete answers in a row. Late p99: how late "
        "calls were sent; above 20 ms a run is invalid.",
        where,
        table,
        _jobs(outcomes),
        "![Answers over time, by scenario](plot.svg)",
        *(_details(outcome) for outcome in outcomes if outcome.violations or outcome.invalid),
        "\n".join(f"- not run: {name}: {why}" for name, why in not_run.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def answers(outcome: Outcome) -> tuple[int, int, Counter[str]]:
    """The numbers of OK answers, of refusals with proof, and of others by status."""
    found = outcome.history.answers
    refused = sum(a.code != "OK" and a.executed == "no" for a in found)
    other = Counter(a.code for a in found if a.code != "OK" and a.executed != "no")
    return sum(a.code == "OK" for a in found), refused, other


def jobs(outcome: Outcome) -> Counter[str]:
    """Of the jobs that were accepted, how many were in each state at last; and those without."""
    found = outcome.history
    last = {look.job: look.state for look in found.looks if look.is_last and look.code == "OK"}
    counts = Counter(last.values())
    accepted = {submit.id for submit in found.submits if submit.job}
    counts["not accepted"] = len({submit.id for submit in found.submits} - accepted)
    return +counts


def _jobs(outcomes: Sequence[Outcome]) -> str:
    """The scenarios with jobs as a table; empty if there are none."""
    states = ("done", "failed", "cancelled", "expired", "quarantined", "not accepted")
    rows = [
        [outcome.scenario.name, *(f"{jobs(outcome)[state]:,}" for state in states)]
        for outcome in outcomes
        if outcome.scenario.jobs
    ]
    head = [["jobs at last", *states], ["---"] + ["---:"] * len(states)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*head, *rows] if rows)


def verdict(outcome: Outcome) -> str:
    count = len(outcome.violations)
    text = f"**{count}**" if count else "0"
    return text + (f", **invalid**: {outcome.invalid}" if outcome.invalid else "")


def _row(outcome: Outcome) -> list[str]:
    ok, refused, other = answers(outcome)
    others = ", ".join(f"{count} {code}" for code, count in other.most_common())
    back = [f"{r.took_s:.1f} s" if r.ok else "never" for r in outcome.history.recoveries]
    calls = sum(not call.vanishes for call in outcome.history.calls)
    late = f"{outcome.lateness_s * 1e3:.0f} ms"
    cells = [f"{calls:,}", f"{ok:,}", f"{refused:,}", others, ", ".join(back), late]
    return [outcome.scenario.name, *cells, verdict(outcome)]


def _details(outcome: Outcome) -> str:
    lines = [f"## {outcome.scenario.name}: {outcome.scenario.about}", ""]
    if outcome.invalid:
        lines.append(f"- invalid: {outcome.invalid}")
    lines += [f"- {v.rule}: {v.sentence}" for v in outcome.violations[:SHOWN]]
    rest = len(outcome.violations) - SHOWN
    if rest > 0:
        by_rule = Counter(v.rule for v in outcome.violations[SHOWN:])
        lines.append("- and " + ", ".join(f"{n} {rule}" for rule, n in by_rule.most_common()))
    return "\n".join(lines)
