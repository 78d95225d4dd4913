"""The figures of overload and recovery: targets and arithmetic. Pure.

The load: a handler that sleeps 100 ms, 2 slots on each of three workers, mode any, deadline 1 s. So
the peak is 60 a second, and 10x is 600.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from faults.history import Answer, Call, Execution

WHOLE_S = 1.0  # recovered: one second in which every call is good
PROMPT_S = 0.25  # how long after its deadline a call must have an answer


@dataclass(frozen=True)
class Figure:
    """to_reach: the target, a maximum or (`more`) a minimum."""

    key: str
    name: str
    to_reach: float
    unit: str
    how: str
    more: bool = False


@dataclass(frozen=True)
class Sample:
    """One measured value. invalid: why it proves nothing; note: what went wrong."""

    figure: str
    value: float
    invalid: str = ""
    note: str = ""
    run: int = 0


OK_IN_TIME = "OK answers before their deadline, a second"
PEAK = f"{OK_IN_TIME}, against a closed loop of 12 calls in the same run"
ACCEPTED = "of every call that was not refused"
ONSET = "the queue fills with what it can answer in time before it refuses the first"
DEAD = "of the executions that the handlers recorded"
WHOLE = "until the first second in which every call is answered OK"
SLOW = "and within 0.1 s of what 99 % took before"
ROLES = {"leader": "A", "team leader": "BE", "worker": "CDF"}
RESTARTED = "at 30 a second; the leader is restarted immediately, the others are not; "
CUT = "by the scenarios cut-*; for the leader from when the link is restored; "
THAWED = "at 30 a second; for the leader from when it runs again, after 3 s; "


def _of_way(way: str, said: str) -> tuple[Figure, ...]:
    return (
        Figure(f"goodput-2x-{way}", f"goodput at 2x load, {said}", 95, "% of peak", PEAK, True),
        Figure(f"goodput-10x-{way}", f"goodput at 10x load, {said}", 90, "% of peak", PEAK, True),
        Figure(
            f"accepted-p99-{way}",
            f"accepted p99 at 10x, {said}, after its first second",
            0.75, "s", ACCEPTED,
        ),
        Figure(
            f"accepted-p99-first-{way}", f"the same in its first second, {said}", 0.75, "s", ONSET
        ),
        Figure(
            f"dead-begun-{way}",
            f"executed in vain at 10x, {said}: started after the deadline",
            1, "%", DEAD,
        ),
        Figure(f"dead-ended-{way}", f"the same: ended after the deadline, {said}", 1, "%", DEAD),
    )  # fmt: skip


FIGURES = (
    *_of_way("unary", "single calls"),
    *_of_way("library", "the library's stream"),
    Figure("refusal-p99", "refusal p99 at 10x", 20, "ms", "single calls, also those evicted late"),
    Figure("metrics-p99", "GetMetrics p99 at 10x", 50, "ms", "the leader, 50 calls a second"),
    Figure("answered", "answered at 10x", 100, "%", "calls by their deadline, GetMetrics", True),
    Figure("recovery", "recovery after 10x", 2, "s", f"at half load, {WHOLE} {SLOW}"),
    Figure(
        "recovery-tries",
        "the same, with clients that retry three times",
        2, "s", "each 0.1 s after a failure, ignoring retry-after",
    ),
    Figure(
        "amplification",
        "retry amplification with our client at 10x",
        1.1, "x", "received by the leader / submitted to the library",
    ),
    Figure(
        "memory",
        "memory at 10x with payloads of 64 KiB",
        128, "MiB", "the leader's peak resident memory, minus that before",
    ),
    *(
        Figure(f"kill-{role}", f"kill -9 of a {role}", 3, "s", RESTARTED + WHOLE)
        for role in ROLES
    ),
    *(
        Figure(f"cut-{role}", f"a {role} that is cut off", 3, "s", CUT + WHOLE)
        for role in ROLES
    ),
    *(
        Figure(f"freeze-{role}", f"a frozen {role}", 5, "s", THAWED + WHOLE)
        for role in ROLES
    ),
    Figure(
        "restart-asked",
        "rolling restarts of six, at least three rounds: requests meanwhile",
        10_000, "", "submitted by the library with its defaults, by a schedule", True,
    ),
    Figure("restart-failed", "the same: failed", 0, "", "not OK, or not from every worker asked"),
    Figure("restart-twice", "the same: executed twice", 0, "", "as the handlers recorded"),
    Figure(
        "greedy",
        "one greedy caller at 10x: the nine others answered OK",
        99.9, "%", "each of the nine sends 5 % of the peak, by overlay-caller", True,
    ),
)  # fmt: skip
BY_KEY = {figure.key: figure for figure in FIGURES}


def goodput(calls: Iterable[Call], answers: Iterable[Answer], begin: float, end: float) -> float:
    """OK answers within their deadlines, per second, between the two times."""
    deadlines = {call.id: call.deadline for call in calls}
    good = sum(a.code == "OK" and begin <= a.at <= min(end, deadlines[a.id]) for a in answers)
    return good / (end - begin)


def is_refused(answer: Answer) -> bool:
    return answer.code != "OK" and answer.executed == "no"


def is_complete(answer: Answer) -> bool:
    return answer.code == "OK" and all(code == "OK" for _, code, _ in answer.parts)


def why_not(answers: Iterable[Answer]) -> str:
    """The most common reasons of incomplete answers, with counts."""
    found: Counter[str] = Counter()
    for answer in answers:
        if not is_complete(answer):
            missing = [f"{worker} {code}" for worker, code, _ in answer.parts if code != "OK"]
            words = [answer.code, f"executed: {answer.executed}", *missing, answer.reason]
            found[re.sub(r"[0-9.]+ s\b", "N s", ", ".join(filter(None, words)))] += 1
    return "; ".join(f"{count} {reason}" for reason, count in found.most_common(3))


def times(calls: Iterable[Call], answers: Iterable[Answer], refused: bool) -> list[float]:
    """The durations of the refused calls, or of all others."""
    began = {call.id: call.at for call in calls}
    found = (a for a in answers if a.id in began and is_refused(a) == refused)
    return [a.at - began[a.id] for a in found]


def due_since(calls: Iterable[Call], begin: float) -> list[Call]:
    return [call for call in calls if call.due >= begin]


def p99(values: Sequence[float]) -> float:
    """The value that 1 % exceed; nan without values."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * 0.99) - 1] if ordered else math.nan


def answered_share(calls: Sequence[Call], answers: Iterable[Answer]) -> float:
    """The share of calls that the overlay itself answered in time."""
    by = {call.id: call.deadline + PROMPT_S for call in calls}
    answered = sum(a.by == "overlay" and a.at <= by[a.id] for a in answers)
    return answered / len(calls) if calls else math.nan


def dead(calls: Iterable[Call], executions: Iterable[Execution]) -> tuple[float, float]:
    """The shares of these calls' executions that started, and that ended, after the deadline.

    One that was killed has no end, and counts as ended late only if it started late.
    """
    deadlines = {call.key: call.deadline for call in calls}
    mine = [run for run in executions if run.key in deadlines]
    if not mine:
        return math.nan, math.nan
    begun = sum(run.begin > deadlines[run.key] for run in mine)
    ended = sum((run.end or run.begin) > deadlines[run.key] for run in mine)
    return begun / len(mine), ended / len(mine)


def executed_twice(calls: Iterable[Call], executions: Iterable[Execution]) -> int:
    """How many ran more than once: of mode all on one worker, of mode any on all together."""
    modes = {call.key: call.mode for call in calls}
    runs = Counter(
        (run.key, run.worker if modes[run.key] == "all" else "")
        for run in executions
        if run.key in modes
    )
    return sum(count > 1 for count in runs.values())


def whole_again_s(
    calls: Sequence[Call], answers: Iterable[Answer], since: float, within_s: float = math.inf
) -> float:
    """Seconds from `since` until the first second in which every call is good.

    Good: answered OK within `within_s` and its deadline. Infinity if there is no such second.
    """
    at = {a.id: a.at for a in answers if a.code == "OK"}

    def is_good(call: Call) -> bool:
        return at.get(call.id, math.inf) <= min(call.deadline, call.due + within_s)

    later = sorted(due_since(calls, since), key=lambda call: call.due)
    if not later:
        return math.inf
    begin = since
    for call in later:
        if call.due > begin + WHOLE_S:
            return begin - since
        if not is_good(call):
            begin = call.due + 1e-9
    return begin - since if later[-1].due >= begin + WHOLE_S else math.inf


# The table


def page(samples: Sequence[Sample], missing: Sequence[str], where: str) -> str:
    """The figures as a Markdown page. missing: why trials gave none. where: date and machine."""
    head = ["figure", "to reach", "measured", "", "how"]
    rows = [_row(figure, samples) for figure in FIGURES]
    lines = [head, ["---", "---:", "---:", "---", "---"], *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    about = (
        "A handler that sleeps 100 ms, 2 slots on each of three workers, mode any, deadline 1 s: "
        "the peak is 60 a second. Medians, with the minimum and maximum of the runs. Calls are "
        "sent by a schedule; a run in which they were more than 20 ms late (p99) is repeated up to "
        "three times and then invalid."
    )
    notes = [f"- {reason}" for reason in missing]
    notes += [f"- {BY_KEY[s.figure].name}, run {s.run}: {s.note}" for s in samples if s.note]
    parts = ["# Overload and recovery in figures", about, where, table, "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def line(sample: Sample) -> str:
    """One line of progress output."""
    figure = BY_KEY[sample.figure]
    facts = [f"{_short(sample.value)} {figure.unit}".rstrip(), sample.note]
    facts.append(f"invalid: {sample.invalid}" if sample.invalid else "")
    return f"{figure.name}: {'; '.join(filter(None, facts))}"


def all_reached(samples: Sequence[Sample]) -> bool:
    """Whether all measured figures reached their targets; false without any."""
    found = {sample.figure for sample in samples}
    return bool(found) and all(verdict(BY_KEY[key], samples) == "reached" for key in found)


def verdict(figure: Figure, samples: Sequence[Sample]) -> str:
    mine = [sample for sample in samples if sample.figure == figure.key]
    valid = [sample.value for sample in mine if not sample.invalid]
    if not valid:
        return f"invalid: {mine[0].invalid}" if mine else "not measured"
    median = statistics.median(valid)
    reached = median >= figure.to_reach if figure.more else median <= figure.to_reach
    return "reached" if reached else "**missed**"


def _row(figure: Figure, samples: Sequence[Sample]) -> list[str]:
    valid = [s.value for s in samples if s.figure == figure.key and not s.invalid]
    unit = f" {figure.unit}" if figure.unit else ""
    bound = f"{'≥' if figure.more else '≤'} {figure.to_reach:g}{unit}"
    return [
        figure.name,
        bound,
        _spread(valid) + (unit if valid else ""),
        verdict(figure, samples),
        figure.how,
    ]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{_short(statistics.median(values))} ({_short(low)} to {_short(high)}, {len(values)}x)"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "never" if value > 0 else "unknown"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
