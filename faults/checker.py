"""The promises of the overlay, held against the history of one run. Pure: history in, list out.

Each rule is a function that yields the violations of one promise; RULES is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from faults.history import Answer, Call, Execution, History

LATE_S = 0.25  # an answer may come so long after its deadline
SILENT_S = 1.0  # so long after it the bench's stream client gives up by itself
REFUSED = 2  # the exit code of a process that cannot begin
FLOWS_S = {"cut": 3.0, "deaf": 3.0, "mute": 3.0, "half open": 3.0, "freeze": 5.0}
UNHURRIED_S = 2.0  # a call with less time may end before whoever is broken is known to be
MISLED_S = 1.0  # what requests may lose on their way: hops have no common clock to notice it
SETTLES_S = 0.1  # after its end until a request has given its place back everywhere
HURRIED_S = 0.5  # a call with less time may lose it on its way, and be refused for that
SPREADS_S = 3.0  # after a fault until nothing is lost by it any more: dead connections are noticed
# Faults under which a process cannot keep time, that lose what was on its way, and after which it
# has forgotten the idempotency keys.
HOLDING_UP = frozenset({"freeze", "few files", "cut", "deaf", "mute", "half open"})
LOSING = frozenset({*HOLDING_UP, "kill", "taken port", "hostile"})
FULL = "RESOURCE_EXHAUSTED", "no"  # a refusal for want of a place or of time
FORGETTING = frozenset({"kill", "taken port", "restart", "half open", "configuration"})


@dataclass(frozen=True)
class Violation:
    """rule: the function that found it. call: its id, 0 when it is not about one."""

    rule: str
    sentence: str
    call: int = 0


class _Lists(dict[int, Any]):
    """Empty for what is not there, without putting it there."""

    def __missing__(self, key: int) -> list[Any]:
        return []


class Facts:
    """A history with its indexes."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.answers: dict[int, list[Answer]] = _Lists()
        self.executions: dict[int, list[Execution]] = _Lists()
        self.calls: dict[int, list[Call]] = _Lists()
        self.keyed: dict[str, list[Call]] = {}
        for answer in history.answers:
            self.answers.setdefault(answer.id, []).append(answer)
        for execution in history.executions:
            self.executions.setdefault(execution.key, []).append(execution)
        for call in history.calls:
            self.calls.setdefault(call.key, []).append(call)
            if call.idempotency:
                self.keyed.setdefault(call.idempotency, []).append(call)
        self.by_id = {call.id: call for call in history.calls}

    def answered(self) -> Iterator[tuple[Call, Answer]]:
        """Each call with its first answer."""
        for call in self.history.calls:
            for answer in self.answers[call.id][:1]:
                yield call, answer

    def scope(self, call: Call) -> list[str]:
        """The workers that the call means."""
        workers = self.history.about.workers
        return [worker for worker, team in workers.items() if call.team in ("", team)]

    def place(self, call: Call) -> tuple[float, float]:
        """From when to when the call may have held places: nothing else tells that it has none."""
        ends = [answer.at for answer in self.answers[call.id][:1]] or [math.inf]
        runs = self.executions[call.key]
        ends += [math.inf if run.end is None else run.end for run in runs]
        return call.at, max(ends) + SETTLES_S

    def stalled_s(self, begin: float, end: float) -> float:
        """Seconds of begin..end in which the bench itself stood still."""
        return sum(
            max(0.0, min(end, stall.end) - max(begin, stall.begin)) for stall in self.history.stalls
        )

    def held_up(self, begin: float, end: float, process: str = "") -> bool:
        """Whether the process (any, when none is named) was kept from keeping time then."""
        return any(
            fault.what in HOLDING_UP
            and process in ("", fault.process)
            and fault.begin < end
            and begin < fault.end + LATE_S
            for fault in self.history.faults
        )

    def disturbed(self, begin: float, end: float) -> bool:
        """Whether anything at all was done to a process then, or shortly before."""
        return any(
            fault.begin < end and begin < fault.end + SPREADS_S for fault in self.history.faults
        )

    def forgotten(self, calls: list[Call]) -> bool:
        """Whether the process asked has lost its memory while these calls of one key were made."""
        begin, end = min(call.at for call in calls), max(call.deadline for call in calls)
        return any(
            fault.what in FORGETTING
            and fault.process == calls[0].asked
            and fault.begin < end
            and begin < fault.end
            for fault in self.history.faults
        )

    def may_be_lost(self, first: Execution, by: float) -> bool:
        """Whether a fault may have kept what came of the run from whoever waited for it."""
        others = self.history.about.workers.keys() - {first.worker}
        return any(
            fault.what in LOSING
            and fault.process not in others
            and fault.begin < by
            and first.begin < fault.end + SPREADS_S
            for fault in self.history.faults
        )


def check(history: History) -> list[Violation]:
    """Every promise that was broken."""
    facts = Facts(history)
    return [
        Violation(rule.__name__, sentence, call) for rule in RULES for call, sentence in rule(facts)
    ]


Found = Iterator[tuple[int, str]]


def unanswered(facts: Facts) -> Found:
    """Each call has an answer."""
    for call in facts.history.calls:
        if not call.vanishes and not facts.answers[call.id]:
            yield call.id, f"call {call.id} ({call.way}, {call.mode}) has no answer"


def answered_twice(facts: Facts) -> Found:
    """None has two."""
    for id_, answers in facts.answers.items():
        if len(answers) > 1:
            codes = ", ".join(answer.code for answer in answers)
            yield id_, f"call {id_} was answered {len(answers)} times: {codes}"
        if id_ not in facts.by_id:
            yield id_, f"an answer to {id_}, which nobody asked"


def late(facts: Facts) -> Found:
    """None comes more than 250 ms after its deadline."""
    for call, answer in facts.answered():
        late_s = answer.at - call.deadline - facts.stalled_s(call.at, answer.at)
        own = call.way == "stream" and answer.by == "client"
        if late_s > LATE_S and not own and not facts.held_up(call.at, answer.at, call.asked):
            yield call.id, f"call {call.id} ({call.way}) was answered {late_s:.2f} s late"


def silent(facts: Facts) -> Found:
    """The overlay ends a request at its deadline; the client need not do it."""
    for call, answer in facts.answered():
        gave_up = answer.by == "client" and answer.code == "DEADLINE_EXCEEDED"
        if call.way != "stream" or not gave_up:
            continue
        stalled = facts.stalled_s(call.at, answer.at) > SILENT_S - LATE_S
        if not stalled and not facts.held_up(call.at, answer.at, call.asked):
            yield call.id, f"call {call.id}: {call.asked} said nothing {SILENT_S:g} s long"


def lying_refusal(facts: Facts) -> Found:
    """What is said not to have run never runs, neither as a whole nor at a worker."""
    for key, executions in facts.executions.items():
        answers = [a for call in facts.calls[key] for a in facts.answers[call.id]]
        if answers and all(answer.executed == "no" for answer in answers):
            where = ", ".join(execution.worker for execution in executions)
            call, code = answers[0].id, answers[0].code
            yield call, f"call {call} was refused ({code}, executed: no) and ran on {where}"
            continue
        for answer in answers:
            ran = {execution.worker for execution in executions}
            for worker, code, executed in answer.parts:
                alone = len(facts.calls[key]) == 1
                if executed == "no" and worker in ran and alone:
                    said = f"{worker} did not run it ({code}), and it did"
                    yield answer.id, f"call {answer.id}: the answer says {said}"


def ran_twice(facts: Facts) -> Found:
    """A request runs at most once on a worker, and with mode any on one worker only.

    With an idempotency key too, however often it is asked; on a second worker if the first is lost.
    """
    for key, executions in facts.executions.items():
        calls, executions = facts.calls[key], sorted(executions, key=lambda run: run.begin)
        workers = [execution.worker for execution in executions]
        keyed = bool(calls and calls[0].idempotency)
        if keyed and facts.forgotten(calls):
            continue
        for worker in sorted({w for w in workers if workers.count(w) > 1}):
            yield key, f"request {key} ran {workers.count(worker)} times on {worker}"
        if not calls or calls[0].mode != "any" or len(set(workers)) < 2:
            continue
        where = ", ".join(workers)
        if not keyed and len(calls) == 1:
            yield key, f"request {key} (any) ran on {where}"
        elif keyed and len(set(workers)) > 2:
            yield key, f"request {key}, with a key, ran on {where}"
        elif keyed and not facts.may_be_lost(executions[0], executions[-1].begin):
            yield key, f"request {key}, with a key, ran on {where}, and the first was not lost"


def key_misused(facts: Facts) -> Found:
    """An idempotency key stands for one payload and has one answer."""
    for calls in facts.keyed.values():
        if facts.forgotten(calls):
            continue
        said = [(call, answer) for call in calls for answer in facts.answers[call.id][:1]]
        good = [(call, answer) for call, answer in said if answer.code == "OK"]
        ran = {call.key for call in calls if facts.executions[call.key]}
        taken = sorted(ran | {call.key for call, _ in good})
        if len(taken) > 1:
            yield taken[-1], f"one key stood for the requests {', '.join(map(str, taken))}"
            continue
        if len({(answer.result, answer.parts) for _, answer in good}) > 1:
            yield good[-1][0].id, f"request {taken[0]}, with a key, has answers that differ"
        for call, answer in said if good else ():
            late = answer.by == "client" or answer.code in ("OK", "DEADLINE_EXCEEDED")
            if not late and answer.executed != "no":
                yield call.id, f"request {taken[0]}, with a key, was answered OK and {answer.code}"


def ran_unasked(facts: Facts) -> Found:
    """Only what was asked runs, and only where it was meant to."""
    for key, executions in facts.executions.items():
        if key not in facts.calls:
            yield key, f"request {key} ran, and nobody asked it"
            continue
        scope = facts.scope(facts.calls[key][0])
        for execution in executions:
            if execution.worker not in scope:
                yield key, f"request {key} ran on {execution.worker}, outside of its team"


def worked_for_nobody(facts: Facts) -> Found:
    """No handler begins, or is told that it has time, once the caller has stopped waiting."""
    for key, executions in facts.executions.items():
        calls = facts.calls[key]
        if not calls:
            continue
        deadline, at = max(c.deadline for c in calls), min(c.at for c in calls)
        for execution in executions:
            patience_s = MISLED_S + facts.stalled_s(at, execution.begin)
            if facts.held_up(at, execution.begin):
                continue
            if execution.begin > deadline + patience_s:
                after_s = execution.begin - deadline
                yield key, f"request {key} began on {execution.worker} {after_s:.2f} s too late"
            elif execution.told > deadline + patience_s:
                more_s = execution.told - deadline
                yield key, f"request {key}: {execution.worker} was told {more_s:.2f} s too much"


def short_in_silence(facts: Facts) -> Found:
    """An answer of all names every worker in scope, and those it counts have worked."""
    for call, answer in facts.answered():
        if answer.code != "OK":
            continue
        good = [worker for worker, code, _ in answer.parts if code == "OK"]
        asked = [worker for worker, _, _ in answer.parts]
        if call.mode == "all" and asked != facts.scope(call):
            scope = " ".join(facts.scope(call))
            yield call.id, f"call {call.id} tells of {' '.join(asked)}, and {scope} were meant"
        if call.way == "unary" and answer.coverage != coverage_of(answer):
            yield call.id, f"call {call.id} says {answer.coverage!r}, not {coverage_of(answer)!r}"
        ended = {e.worker for e in facts.executions[call.key] if e.end is not None}
        for worker in good:
            if worker not in ended:
                yield call.id, f"call {call.id} counts {worker}, which did not finish it"


def wrong_result(facts: Facts) -> Found:
    """The result is made of exactly the parts that it counts."""
    for call, answer in facts.answered():
        if answer.code == "OK":
            good = [worker for worker, code, _ in answer.parts if code == "OK"]
            wanted = "\n".join(f"{worker} {call.key}" for worker in good)
            if answer.result != wanted:
                yield call.id, f"call {call.id} got {answer.result!r} instead of {wanted!r}"


def unexpected_status(facts: Facts) -> Found:
    """An answer has one of the statuses that the scenario names."""
    about = facts.history.about
    for call, answer in facts.answered():
        allowed = {*about.expects, *(["INTERNAL"] if call.handler in about.may_raise else [])}
        if len({other.key for other in facts.keyed.get(call.idempotency, ())}) > 1:
            allowed.add("INVALID_ARGUMENT")  # one key for two payloads
        said = {code for _, code, _ in answer.parts} & {"INTERNAL"} | {answer.code}
        wrong = sorted(said - allowed)
        if wrong:
            why = f": {answer.reason[:160]}" if answer.reason else ""
            yield call.id, f"call {call.id} ({call.handler}, {call.way}) got {wrong[-1]}{why}"


def held_back(facts: Facts) -> Found:
    """Soon after one process has broken, what need not pass it is answered."""
    lost = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    for call, answer in facts.answered():
        if call.mode != "any" or call.team or call.deadline - call.at < UNHURRIED_S:
            continue
        broken = [f for f in facts.history.faults if f.begin < answer.at and call.at < f.end]
        for fault in broken:
            flows = call.at - fault.begin > FLOWS_S.get(fault.what, math.inf)
            if flows and fault.process != call.asked and answer.code in lost:
                after_s = call.at - fault.begin
                yield (
                    call.id,
                    f"call {call.id}: {answer.code} {after_s:.1f} s after the {fault.what}",
                )


def refused_although_free(facts: Facts) -> Found:
    """Nothing is refused for want of a place or of time where places are free.

    Surely free is a place at each worker while fewer requests are open, wherever they may be, than
    one worker takes at once: the leader has more places than that for each team.
    """
    slots = facts.history.about.slots
    for call, answer in facts.answered():
        by = [worker for worker, code, executed in answer.parts if (code, executed) == FULL]
        if (answer.code, answer.executed) == FULL:
            by = [call.asked]
        if answer.by == "client" or not by or call.deadline - call.at < HURRIED_S:
            continue
        if facts.stalled_s(call.at, answer.at) or facts.disturbed(call.at, answer.at):
            continue
        others = 0
        for other in facts.history.calls:
            begin, end = facts.place(other)
            others += other.id != call.id and begin < answer.at and call.at < end
        if others < slots:
            beside = f"{others} other requests were open, and a worker has {slots} places"
            yield call.id, f"call {call.id} was refused by {' '.join(by)} while {beside}"


def leak(facts: Facts) -> Found:
    """Every process is at rest after the load."""
    for rest in facts.history.rests:
        left = {name: count for name, count in rest.counts.items() if count}
        if left:
            counts = ", ".join(f"{name} {count}" for name, count in left.items())
            yield 0, f"{rest.process} is not at rest: {counts}"


def no_recovery(facts: Facts) -> Found:
    """The overlay answers completely again, without a human."""
    if not facts.history.recoveries:
        yield 0, "nobody has looked whether the overlay answers again"
    for recovery in facts.history.recoveries:
        if not recovery.ok:
            yield 0, f"no complete answer within {recovery.took_s:.0f} s: {recovery.said}"


def bad_ending(facts: Facts) -> Found:
    """A process ends when it is asked to, and says in one sentence when it cannot begin."""
    for ending in facts.history.endings:
        if ending.code not in ending.wanted:
            said = f": {ending.said[-300:]}" if ending.said else ""
            yield 0, f"{ending.process} ended with {ending.code}, not {ending.wanted}{said}"
        elif "Traceback" in ending.said:
            yield 0, f"{ending.process} ended with a traceback: {ending.said[-300:]}"
        elif ending.code == REFUSED and not ending.said:
            yield 0, f"{ending.process} refused to start and did not say why"


def coverage_of(answer: Answer) -> str:
    """What the coverage trailer must be, after the answer's own parts."""
    missing = ",".join(worker for worker, code, _ in answer.parts if code != "OK")
    good = sum(code == "OK" for _, code, _ in answer.parts)
    return f"{good}/{len(answer.parts)}" + (f"; missing={missing}" if missing else "")


RULES: tuple[Callable[[Facts], Found], ...] = (
    unanswered,
    answered_twice,
    late,
    silent,
    lying_refusal,
    ran_twice,
    key_misused,
    ran_unasked,
    worked_for_nobody,
    short_in_silence,
    wrong_result,
    unexpected_status,
    held_back,
    refused_although_free,
    leak,
    no_recovery,
    bad_ending,
)
# On a machine that is too busy these find what nobody did.
TIMED = frozenset(
    rule.__name__ for rule in (late, silent, worked_for_nobody, held_back, refused_although_free)
)
