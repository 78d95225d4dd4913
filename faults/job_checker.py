"""Checks the promises about jobs against the history of one run. Pure, as faults.checker.

Each rule is a function that yields the violations of one promise; RULES has all of them. A job is
named by the id in its payload.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from faults.history import Cancel, Execution, History, Look, Submit

OPEN = ("waiting", "running")
CANCELLED_S = 1.0  # after a cancel was told, until no worker begins the job any more
# Faults after which it may be unknown whether a job has run. Stopping in order is none of them.
LOSING = frozenset({"kill", "freeze", "majority"})

Found = Iterator[tuple[int, str]]


class Jobs:
    """A history's jobs, with their indexes."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.submits: dict[int, list[Submit]] = defaultdict(list)
        self.ids: dict[str, list[int]] = defaultdict(list)  # by the id that was told
        self.looks: dict[str, list[Look]] = defaultdict(list)
        self.cancels: dict[str, list[Cancel]] = defaultdict(list)
        self.runs: dict[int, list[Execution]] = defaultdict(list)
        for submit in history.submits:
            self.submits[submit.id].append(submit)
            if submit.job and submit.id not in self.ids[submit.job]:
                self.ids[submit.job].append(submit.id)
        for look in sorted(history.looks, key=lambda look: look.at):
            self.looks[look.job].append(look)
        for cancel in history.cancels:
            self.cancels[cancel.job].append(cancel)
        for execution in history.executions:
            if execution.key in self.submits:
                self.runs[execution.key].append(execution)

    def accepted(self) -> Iterator[tuple[str, Submit, list[Look]]]:
        """Each job that has an id, as it was submitted, and what was told of it."""
        for job, ids in self.ids.items():
            yield job, self.submits[ids[0]][0], self.looks[job]

    def scope(self, submit: Submit) -> list[str]:
        workers = self.history.about.workers
        return [worker for worker, team in workers.items() if submit.team in ("", team)]

    def most_runs(self, submit: Submit) -> int:
        """How often it was begun: on one worker, or with mode any on all of them."""
        begun = Counter(run.worker for run in self.runs[submit.id])
        if submit.mode == "any":
            return begun.total()
        return max(begun.values(), default=0)

    @property
    def may_be_unknown(self) -> bool:
        """Whether a fault may have lost a job's end."""
        return any(fault.what in LOSING for fault in self.history.faults)


def job_lost(jobs: Jobs) -> Found:
    """A job that was accepted is known whenever it is asked for."""
    for job, submit, looks in jobs.accepted():
        if any(look.code == "NOT_FOUND" for look in looks):
            yield submit.id, f"job {submit.id} was accepted as {job}, and is not known"


def job_answer_lost(jobs: Jobs) -> Found:
    """An answer that was there is there when it is asked for again."""
    for _, submit, looks in jobs.accepted():
        first = min((look.until for look in looks if look.result is not None), default=None)
        for look in looks if first is not None else ():
            gone = look.code == "NOT_FOUND" or (look.with_answer and look.result is None)
            if first is not None and look.at > first and gone:
                yield submit.id, f"job {submit.id} had an answer, and has none any more"
                break


def job_answer_changed(jobs: Jobs) -> Found:
    """Whoever asks for an answer gets the same."""
    for _, submit, looks in jobs.accepted():
        answers = {(look.result, look.parts) for look in looks if look.result is not None}
        if len(answers) > 1:
            found = " and ".join(sorted(repr(result) for result, _ in answers))
            yield submit.id, f"job {submit.id} was answered with {found}"


def job_wrong_answer(jobs: Jobs) -> Found:
    """An answer is what the workers that it counts returned for this job, and they ran it."""
    for _, submit, looks in jobs.accepted():
        scope, ended = jobs.scope(submit), jobs.runs[submit.id]
        ran = {run.worker for run in ended if run.end is not None}
        for look in looks:
            if look.result is None:
                continue
            good = [worker for worker, code, _ in look.parts if code == "OK"]
            wanted = "\n".join(f"{worker} {submit.id}" for worker in good)
            named = [worker for worker, _, _ in look.parts]
            if look.result != wanted:
                yield submit.id, f"job {submit.id} got {look.result!r} instead of {wanted!r}"
            elif submit.mode == "all" and named != scope:
                yield submit.id, f"job {submit.id} names {named} instead of {scope}"
            elif not good or not ran.issuperset(good):
                yield submit.id, f"job {submit.id} counts {good}, and {sorted(ran)} finished it"
            else:
                continue
            break


def job_ran_twice(jobs: Jobs) -> Found:
    """A job without a key runs at most once: it is begun again only if it had not run."""
    for submit, *_ in jobs.submits.values():
        if not submit.key and jobs.most_runs(submit) > 1:
            where = " ".join(run.worker for run in jobs.runs[submit.id])
            yield submit.id, f"job {submit.id} ({submit.mode}, without a key) ran on {where}"


def job_ran_too_often(jobs: Jobs) -> Found:
    """A job is not begun more often than it may, and no more often than is told."""
    for submit, *_ in jobs.submits.values():
        runs = jobs.most_runs(submit)
        if submit.key and runs > submit.attempts:
            yield submit.id, f"job {submit.id} ran {runs} times, and had {submit.attempts} attempts"
    for _, submit, looks in jobs.accepted():
        for look in looks:
            if look.attempts > submit.attempts:
                more = f"{look.attempts} attempts instead of {submit.attempts}"
                yield submit.id, f"job {submit.id} has had {more}"
                break
            if look.is_last and look.code == "OK" and jobs.most_runs(submit) > look.attempts:
                runs = jobs.most_runs(submit)
                yield submit.id, f"job {submit.id} ran {runs} times in {look.attempts} attempts"
                break


def job_ran_unrequested(jobs: Jobs) -> Found:
    """A job runs on the workers of its team only."""
    for submit, *_ in jobs.submits.values():
        outside = {run.worker for run in jobs.runs[submit.id]} - set(jobs.scope(submit))
        if outside:
            yield submit.id, f"job {submit.id} ran on {sorted(outside)}, outside of its team"


def job_wrong_state(jobs: Jobs) -> Found:
    """A state is one that the job can have, for a reason that is told, and once over it stays."""
    for job, submit, looks in jobs.accepted():
        told = [look for look in looks if look.code == "OK"]
        over_at, over = min(
            ((look.until, look.state) for look in told if look.state not in OPEN),
            default=(None, ""),
        )
        cancels = jobs.cancels[job]
        too_late = [c.until for c in cancels if c.code == "OK" and not c.changed]
        for look in told:
            wrong = _wrong(jobs, submit, look, cancels)
            if over_at is not None and look.at > over_at and look.state != over:
                wrong = f"after it was {over}"
            if look.state in OPEN and any(look.at > at for at in too_late):
                wrong = "though it was over when it was to be cancelled"
            if wrong:
                yield submit.id, f"job {submit.id} is {look.state} {wrong}"
                break


def _wrong(jobs: Jobs, submit: Submit, look: Look, cancels: list[Cancel]) -> str:
    """What is wrong about this state; empty: nothing."""
    raises = submit.handler in jobs.history.about.may_raise
    if look.state == "done":
        if look.with_answer and look.result is None:
            return "and has no answer"
        return "though its handler raises" if raises else ""
    if look.state in ("failed", "quarantined") and (look.failure == "OK" or not look.reason):
        return "without a reason"
    if look.state == "failed" and not raises:
        return f"though its handler does not raise: {look.failure}, {look.reason[:160]}"
    if look.state == "quarantined" and not jobs.may_be_unknown:
        return f"though nothing was lost: {look.failure}, {look.reason[:160]}"
    if look.state == "expired":
        if not submit.expires:
            return "though it had all the time"
        return "though it was started" if not submit.key and jobs.runs[submit.id] else ""
    if look.state == "cancelled" and not any(c.changed or c.code != "OK" for c in cancels):
        return "though nobody cancelled it"
    return ""


def job_cancel_forgotten(jobs: Jobs) -> Found:
    """A job whose cancel was told is cancelled from then on, and is not begun any more."""
    for job, submit, looks in jobs.accepted():
        told = min((c.until for c in jobs.cancels[job] if c.changed), default=None)
        if told is None:
            continue
        late = [run for run in jobs.runs[submit.id] if run.begin > told + CANCELLED_S]
        after = [look.state for look in looks if look.code == "OK" and look.at > told]
        if late:
            after_s = late[0].begin - told
            yield submit.id, f"job {submit.id} began {after_s:.1f} s after it was cancelled"
        elif any(state != "cancelled" for state in after):
            yield submit.id, f"job {submit.id} was cancelled, and is {after[-1]}"


def job_refused_and_ran(jobs: Jobs) -> Found:
    """A job that was refused, with proof that it was not accepted, never runs."""
    for submit, *more in jobs.submits.values():
        refused = all(not s.job and s.executed == "no" for s in (submit, *more))
        if refused and jobs.runs[submit.id]:
            where = " ".join(run.worker for run in jobs.runs[submit.id])
            yield submit.id, f"job {submit.id} was refused ({submit.code}) and ran on {where}"


def job_key_ignored(jobs: Jobs) -> Found:
    """Jobs with the same key are one, and other jobs have ids of their own."""
    for submit, *more in jobs.submits.values():
        names = sorted({s.job for s in (submit, *more) if s.job})
        if len(names) > 1:
            yield submit.id, f"job {submit.id}, with one key, was accepted as {' and '.join(names)}"
    for job, ids in jobs.ids.items():
        if len(ids) > 1:
            yield ids[1], f"the jobs {' and '.join(map(str, ids))} were both accepted as {job}"


def job_not_over(jobs: Jobs) -> Found:
    """Soon after the load every job is over."""
    for _, submit, looks in jobs.accepted():
        last = [look for look in looks if look.is_last]
        if not last:
            yield submit.id, f"job {submit.id} was not asked for after the load"
        for look in last:
            if look.code not in ("OK", "NOT_FOUND") or look.state in OPEN:
                how = look.state if look.code == "OK" else f"{look.code}: {look.reason[:160]}"
                yield submit.id, f"job {submit.id} is not over: {how}"
                break


def job_unexpected_status(jobs: Jobs) -> Found:
    """What a client is told instead of an answer is one of the statuses of the scenario."""
    allowed = {*jobs.history.about.expects, "OK", "NOT_FOUND"}
    for submit in jobs.history.submits:
        if submit.code not in allowed:
            yield submit.id, f"job {submit.id} was not accepted: {submit.code}, {submit.reason}"
    for job, submit, looks in jobs.accepted():
        codes = {look.code for look in looks} | {cancel.code for cancel in jobs.cancels[job]}
        for code in sorted(codes - allowed):
            yield submit.id, f"to a question about job {submit.id} came {code}"


RULES: tuple[Callable[[Jobs], Found], ...] = (
    job_lost,
    job_answer_lost,
    job_answer_changed,
    job_wrong_answer,
    job_ran_twice,
    job_ran_too_often,
    job_ran_unrequested,
    job_wrong_state,
    job_cancel_forgotten,
    job_refused_and_ran,
    job_key_ignored,
    job_not_over,
    job_unexpected_status,
)
