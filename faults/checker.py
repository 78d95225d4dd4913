"""Checks the overlay's promises against the history of one run. Pure: history in, violations out.

Each rule is a function that yields the violations of one promise; RULES has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from faults import job_checker
from faults.history import ENDED_LANE, Answer, Call, Execution, History

LATE_S = 0.25  # how late an answer may be
SILENT_S = 1.0  # how long after a deadline the bench's stream client gives up
REFUSED = 2  # the exit code of a process that cannot start
FLOWS_S = {"cut": 3.0, "deaf": 3.0, "mute": 3.0, "half open": 3.0, "freeze": 5.0}
UNHURRIED_S = 2.0  # a call with less time may end before the fault is noticed
MISLED_S = 1.0  # transit time, which hops cannot measure without a common clock
SETTLES_S = 0.1  # until a request that has ended has freed its slots everywhere
HURRIED_S = 0.5  # a call with less time may be refused because its transit took too long
SPREADS_S = 3.0  # after a fault, until dead connections are noticed and nothing more is lost
# Faults that keep a process from keeping time, that lose what is in flight, and that make it
# forget idempotency keys.
HOLDING_UP = frozenset({"freeze", "few files", "cut", "deaf", "mute", "half open"})
LOSING = frozenset({*HOLDING_UP, "kill", "taken port", "hostile"})
SHARES_S = 1.0  # after a client has come, until those before it have been told of smaller shares
FULL = "RESOURCE_EXHAUSTED", "no"  # refused: no free slot or too little time
FORGETTING = frozenset({"kill", "taken port", "restart", "half open", "configuration"})


@dataclass(frozen=True)
class Violation:
    """rule: the function that found it. call: the id of the call or job; 0: it is about neither."""

    rule: str
    sentence: str
    call: int = 0


class _Lists(dict[int, Any]):
    """Gives an empty list for a missing key, without adding it."""

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
        jobs = {submit.id for submit in history.submits}
        for execution in history.executions:
            if execution.key not in jobs:
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
        """The workers of the call's team."""
        workers = self.history.about.workers
        return [worker for worker, team in workers.items() if call.team in ("", team)]

    def place(self, call: Call) -> tuple[float, float]:
        """From when to when the call may have used slots."""
        ends = [answer.at for answer in self.answers[call.id][:1]] or [math.inf]
        runs = self.executions[call.key]
        ends += [math.inf if run.end is None else run.end for run in runs]
        return call.at, max(ends) + SETTLES_S

    def stalled_s(self, begin: float, end: float) -> float:
        """Seconds between begin and end in which the bench itself did not run."""
        return sum(
            max(0.0, min(end, stall.end) - max(begin, stall.begin)) for stall in self.history.stalls
        )

    def held_up(self, begin: float, end: float, process: str = "") -> bool:
        """Whether a fault kept the process (default: any) from keeping time then."""
        return any(
            fault.what in HOLDING_UP
            and process in ("", fault.process)
            and fault.begin < end
            and begin < fault.end + LATE_S
            for fault in self.history.faults
        )

    def disturbed(self, begin: float, end: float) -> bool:
        """Whether any fault was active then or shortly before."""
        return any(
            fault.begin < end and begin < fault.end + SPREADS_S for fault in self.history.faults
        )

    def forgotten(self, calls: list[Call]) -> bool:
        """Whether the process asked was restarted during these calls of one key."""
        begin, end = min(call.at for call in calls), max(call.deadline for call in calls)
        return any(
            fault.what in FORGETTING
            and fault.process == calls[0].asked
            and fault.begin < end
            and begin < fault.end
            for fault in self.history.faults
        )

    def may_be_lost(self, first: Execution, by: float) -> bool:
        """Whether a fault may have lost the result of the run."""
        others = self.history.about.workers.keys() - {first.worker}
        return any(
            fault.what in LOSING
            and fault.process not in others
            and fault.begin < by
            and first.begin < fault.end + SPREADS_S
            for fault in self.history.faults
        )


def check(history: History) -> list[Violation]:
    """All violations."""
    facts, jobs = Facts(history), job_checker.Jobs(history)
    found = [(rule.__name__, *one) for rule in RULES for one in rule(facts)]
    found += [(rule.__name__, *one) for rule in job_checker.RULES for one in rule(jobs)]
    return [Violation(rule, sentence, call) for rule, call, sentence in found]


Found = Iterator[tuple[int, str]]


def unanswered(facts: Facts) -> Found:
    """Each call has an answer."""
    for call in facts.history.calls:
        if not call.vanishes and not facts.answers[call.id]:
            yield call.id, f"call {call.id} ({call.way}, {call.mode}) has no answer"


def answered_twice(facts: Facts) -> Found:
    """No call has two answers."""
    for id_, answers in facts.answers.items():
        if len(answers) > 1:
            codes = ", ".join(answer.code for answer in answers)
            yield id_, f"call {id_} was answered {len(answers)} times: {codes}"
        if id_ not in facts.by_id:
            yield id_, f"an answer to {id_}, which is no call"


def late(facts: Facts) -> Found:
    """No answer comes more than 250 ms after its deadline."""
    for call, answer in facts.answered():
        late_s = answer.at - call.deadline - facts.stalled_s(call.at, answer.at)
        own = call.way == "stream" and answer.by == "client"
        if late_s > LATE_S and not own and not facts.held_up(call.at, answer.at, call.asked):
            yield call.id, f"call {call.id} ({call.way}) was answered {late_s:.2f} s late"


def silent(facts: Facts) -> Found:
    """The overlay ends a request at its deadline; the client need not give up."""
    for call, answer in facts.answered():
        gave_up = answer.by == "client" and answer.code == "DEADLINE_EXCEEDED"
        if call.way != "stream" or not gave_up:
            continue
        stalled = facts.stalled_s(call.at, answer.at) > SILENT_S - LATE_S
        if not stalled and not facts.held_up(call.at, answer.at, call.asked):
            yield call.id, f"call {call.id}: {call.asked} was silent for {SILENT_S:g} s"


def false_refusal(facts: Facts) -> Found:
    """What an answer says did not run never runs, neither the whole request nor a part."""
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
                    claim = f"{worker} did not run it ({code}), and it did"
                    yield answer.id, f"call {answer.id}: the answer says {claim}"


def ran_twice(facts: Facts) -> Found:
    """A request runs at most once on a worker, and with mode any on one worker only.

    This also holds for repeated calls with an idempotency key, which may run on a second worker if
    the first is lost.
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


def ran_unrequested(facts: Facts) -> Found:
    """Only what was sent runs, and only on the workers in scope."""
    for key, executions in facts.executions.items():
        if key not in facts.calls:
            yield key, f"request {key} ran and was never sent"
            continue
        scope = facts.scope(facts.calls[key][0])
        for execution in executions:
            if execution.worker not in scope:
                yield key, f"request {key} ran on {execution.worker}, outside of its team"


def ran_after_deadline(facts: Facts) -> Found:
    """No handler starts, or is given time, after the caller has stopped waiting."""
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
                yield key, f"request {key} started on {execution.worker} {after_s:.2f} s too late"
            elif execution.deadline > deadline + patience_s:
                more_s = execution.deadline - deadline
                yield key, f"request {key}: {execution.worker} was given {more_s:.2f} s too much"


def silently_incomplete(facts: Facts) -> Found:
    """An answer of mode all names every worker in scope, and those that it counts have run it."""
    for call, answer in facts.answered():
        if answer.code != "OK":
            continue
        good = [worker for worker, code, _ in answer.parts if code == "OK"]
        asked = [worker for worker, _, _ in answer.parts]
        if call.mode == "all" and asked != facts.scope(call):
            scope = " ".join(facts.scope(call))
            yield call.id, f"call {call.id} names {' '.join(asked)} instead of {scope}"
        if call.way == "unary" and answer.coverage != coverage_of(answer):
            yield call.id, f"call {call.id} says {answer.coverage!r}, not {coverage_of(answer)!r}"
        ended = {e.worker for e in facts.executions[call.key] if e.end is not None}
        for worker in good:
            if worker not in ended:
                yield call.id, f"call {call.id} counts {worker}, which did not finish it"


def wrong_result(facts: Facts) -> Found:
    """The result consists of exactly the parts that it counts."""
    for call, answer in facts.answered():
        if answer.code == "OK":
            good = [worker for worker, code, _ in answer.parts if code == "OK"]
            wanted = "\n".join(f"{worker} {call.key}" for worker in good)
            if answer.result != wanted:
                yield call.id, f"call {call.id} got {answer.result!r} instead of {wanted!r}"


def unexpected_status(facts: Facts) -> Found:
    """An answer has one of the statuses that the scenario allows."""
    about = facts.history.about
    for call, answer in facts.answered():
        allowed = {*about.expects, *(["INTERNAL"] if call.handler in about.may_raise else [])}
        if len({other.key for other in facts.keyed.get(call.idempotency, ())}) > 1:
            allowed.add("INVALID_ARGUMENT")  # one key for two payloads
        if call.way == ENDED_LANE:
            allowed.add("FAILED_PRECONDITION")
        codes = {code for _, code, _ in answer.parts} & {"INTERNAL"} | {answer.code}
        wrong = sorted(codes - allowed)
        if wrong:
            why = f": {answer.reason[:160]}" if answer.reason else ""
            yield call.id, f"call {call.id} ({call.handler}, {call.way}) got {wrong[-1]}{why}"


def blocked_by_fault(facts: Facts) -> Found:
    """Soon after one process has failed, calls that need not pass it are answered."""
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


def refused_with_free_slots(facts: Facts) -> Found:
    """Nothing is refused for lack of slots or time while slots are free.

    Slots are certainly free if fewer requests are open in the whole overlay than one worker has
    slots: the leader has more slots than that for each team.
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
        if facts.history.submits:  # jobs use slots, too, and go into the queue when others end
            continue
        others = 0
        for other in facts.history.calls:
            begin, end = facts.place(other)
            others += other.id != call.id and begin < answer.at and call.at < end
        if others < slots:
            beside = f"{others} other requests were open, and a worker has {slots} slots"
            yield call.id, f"call {call.id} was refused by {' '.join(by)} while {beside}"


def ran_without_lease(facts: Facts) -> Found:
    """A worker refuses what comes on a lane after its lease has ended."""
    for call in facts.history.calls:
        if call.way != ENDED_LANE:
            continue
        ran = [run.worker for run in facts.executions[call.key]]
        codes = [answer.code for answer in facts.answers[call.id]]
        if ran or "OK" in codes:
            yield call.id, f"call {call.id}, without a lease, ran on {' '.join(ran)}: {codes}"


def lent_twice(facts: Facts) -> Found:
    """All clients together are lent no more of a worker than one would be."""
    most, since = facts.history.about.most_lent, dict[str, float]()
    for lending in facts.history.lendings if most else ():
        for worker in facts.history.about.workers:
            rows = lending.rows.get(worker, 0)
            if rows <= most:
                since.pop(worker, None)
            elif lending.at - since.setdefault(worker, lending.at) >= SHARES_S:
                since[worker] = math.inf  # once
                yield 0, f"{worker} was lent for {rows} requests, and {most} are the most"


def miscounted(facts: Facts) -> Found:
    """The leader counts each answer once, by whatever way it came."""
    history = facts.history
    if history.faults or history.submits or facts.keyed:
        return  # a process that was restarted has forgotten; a key's answer counts elsewhere
    ok = sum(answer.code == "OK" for _, answer in facts.answered())
    unknown = sum(answer.by == "client" for _, answer in facts.answered())
    for rest in history.rests:
        if rest.completed is None or any(c.asked != rest.process for c in history.calls):
            continue
        if not ok <= rest.completed <= ok + unknown:
            yield 0, f"{rest.process} counts {rest.completed} answers, and its clients got {ok}"


def leak(facts: Facts) -> Found:
    """Every process is idle after the load."""
    for rest in facts.history.rests:
        left = {name: count for name, count in rest.counts.items() if count}
        if left:
            counts = ", ".join(f"{name} {count}" for name, count in left.items())
            yield 0, f"{rest.process} is not idle: {counts}"


def no_recovery(facts: Facts) -> Found:
    """The overlay recovers by itself: it answers completely again."""
    if not facts.history.recoveries:
        yield 0, "the recovery was not measured"
    for recovery in facts.history.recoveries:
        if not recovery.ok:
            yield 0, f"no complete answer within {recovery.took_s:.0f} s: {recovery.last}"


def bad_exit(facts: Facts) -> Found:
    """A process stops when asked to, and one that cannot start says why."""
    for ending in facts.history.endings:
        if ending.code not in ending.wanted:
            output = f": {ending.output[-300:]}" if ending.output else ""
            yield 0, f"{ending.process} ended with {ending.code}, not {ending.wanted}{output}"
        elif "Traceback" in ending.output:
            yield 0, f"{ending.process} ended with a traceback: {ending.output[-300:]}"
        elif ending.code == REFUSED and not ending.output:
            yield 0, f"{ending.process} refused to start and did not say why"


def coverage_of(answer: Answer) -> str:
    """The coverage trailer that follows from the answer's parts."""
    missing = ",".join(worker for worker, code, _ in answer.parts if code != "OK")
    good = sum(code == "OK" for _, code, _ in answer.parts)
    return f"{good}/{len(answer.parts)}" + (f"; missing={missing}" if missing else "")


RULES: tuple[Callable[[Facts], Found], ...] = (
    unanswered,
    answered_twice,
    late,
    silent,
    false_refusal,
    ran_twice,
    key_misused,
    ran_unrequested,
    ran_after_deadline,
    silently_incomplete,
    wrong_result,
    unexpected_status,
    blocked_by_fault,
    refused_with_free_slots,
    ran_without_lease,
    lent_twice,
    miscounted,
    leak,
    no_recovery,
    bad_exit,
)
# On a machine that is too busy these rules give false violations.
TIMED = frozenset(
    rule.__name__
    for rule in (late, silent, ran_after_deadline, blocked_by_fault, refused_with_free_slots)
)
