"""Injected bugs: python faults/seeded.py BUG CONFIG ID runs a process with one of them.

Each replaces a piece of the product by one that breaks a promise. The checker must find it with one
of the table's rules, in the scenario that triggers it.
"""

# mypy: disable-error-code="assignment, method-assign, call-arg, attr-defined"
# It replaces functions that are not meant to be replaced, by wrong ones.

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import node  # first, because it sets gRPC's polling strategy before gRPC is imported

from faults import bench, fitting, scenarios  # noqa: E402
from faults.bench import Outcome  # noqa: E402


@dataclass(frozen=True)
class Bug:
    """rules: the checker's rules that may find it. scenario: the one that triggers it.

    in_client: the bug is in the library of the bench's clients, and not in the processes.
    """

    name: str
    about: str
    scenario: str
    rules: tuple[str, ...]
    apply: Callable[[], None]
    in_client: bool = False


@dataclass(frozen=True)
class Trial:
    bug: Bug
    outcome: Outcome

    @property
    def found(self) -> bool:
        return any(v.rule in self.bug.rules for v in self.outcome.violations)

    @property
    def sentence(self) -> str:
        mine = [v for v in self.outcome.violations if v.rule in self.bug.rules]
        if mine:
            return (
                f"{self.bug.name:<24} found {len(mine)} times: {mine[0].rule}: {mine[0].sentence}"
            )
        others = ", ".join(sorted({v.rule for v in self.outcome.violations})) or "nothing"
        why = f" ({self.outcome.invalid})" if self.outcome.invalid else ""
        return f"{self.bug.name:<24} MISSED in {self.bug.scenario}; seen: {others}{why}"


def chosen(names: Sequence[str]) -> list[Bug]:
    """The named bugs, or all. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"no bug '{unknown[0]}'; there are {', '.join(BY_NAME)}")
    return [bug for bug in BUGS if not names or bug.name in names]


def try_out(bug: Bug, folder: Path, seconds: float, seed: int) -> Trial:
    """Runs the bug's scenario on processes, or with clients, that have it."""
    scenario = scenarios.BY_NAME[bug.scenario]
    if bug.in_client:
        with fitting.applied(bug.apply):
            return Trial(bug, bench.run(scenario, folder, seconds, seed))
    command = [sys.executable, str(HERE), bug.name]
    return Trial(bug, bench.run(scenario, folder, seconds, seed, command))


# The bugs, each applied in a process before it serves, or in the bench before its clients connect


def expired_is_started() -> None:
    from overlay.model import segments
    from overlay.peers import peers
    from overlay.queueing import queued_segment, request_queue

    def end(queued: Any, code: Any, start: int = 0, count: int | None = None) -> None:
        if code is segments.Code.DEADLINE_EXCEEDED:  # answered, but it stays in the queue
            count = queued.segment.count - start if count is None else count
            refused = queued_segment.unstarted(queued._owner.me, code)
            queued._settle(start, segments.Slice(count, (), refused=refused))
        else:
            right(queued, code, start, count)

    def unchecked(self: Any, queued: Any) -> Any:
        now, self._now = self._now, min(self._now, queued.segment.deadline - 1)
        try:
            return claim(self, queued)
        finally:
            self._now = now

    right = queued_segment.QueuedSegment.end
    queued_segment.QueuedSegment.end = end
    claim = request_queue.RequestQueue._claim_locked
    request_queue.RequestQueue._claim_locked = unchecked
    peers._Peer.time_left_s = lambda self, deadline: max(1.0, deadline - time.monotonic())


def retry_without_proof() -> None:
    from overlay.model import segments
    from overlay.routing import aggregate

    def may(answer: Any) -> bool:
        part = answer.refused or (answer.parts[0] if answer.parts else None)
        return part is not None and part.code is segments.Code.UNAVAILABLE

    aggregate.may_try_elsewhere = may


def answer_sent_twice() -> None:
    from overlay.transport import codec

    right = codec.write_client_slice

    def twice(frame: Any, number: int, *rest: Any) -> None:
        right(frame, number, *rest)
        if number % 20 == 0:
            right(frame, number, *rest)

    codec.write_client_slice = twice


def deadline_not_passed_on() -> None:
    from overlay.peers import peers

    peers._Peer.time_left_s = lambda self, deadline: 30.0


def refusal_always_says_no() -> None:
    from overlay.model import errors, segments
    from overlay.transport import codec

    right = codec.trailers

    def trailers(error: Any) -> Any:
        error.executed = segments.Executed.NO
        return right(error)

    assert issubclass(errors.HandlerFailed, errors.OverlayError)
    codec.trailers = trailers


def seen_ids_off() -> None:
    from overlay.workers import request_ids

    request_ids.SeenIds.begin = lambda self, segment: request_ids.Begun()


def cancelled_stays_active() -> None:
    from overlay.queueing import request_queue

    right = request_queue.RequestQueue._release

    def release(self: Any, queued: Any, *rest: Any) -> float:
        return right(self, queued, *rest) if not queued._cancelled else time.monotonic()

    request_queue.RequestQueue._release = release


def dead_link_is_silent() -> None:
    from overlay.peers import outgoing

    def lost(self: Any, why: Any) -> None:
        self._multiplexer.lose()
        self._peer.lost(why)

    outgoing.SegmentSender._lost = lost


def coverage_always_complete() -> None:
    from overlay.routing import aggregate

    aggregate.coverage = lambda answer: f"{len(answer.parts)}/{len(answer.parts)}"


def missing_is_left_out() -> None:
    from overlay.routing import aggregate

    right = aggregate.gathered

    def gathered(*arguments: Any) -> Any:
        answers = right(*arguments)
        good = tuple(column for column in answers.parts if column.failed is None)
        return replace(answers, parts=good or answers.parts)

    aggregate.gathered = gathered


def merge_drops_a_part() -> None:
    from overlay.routing import aggregate

    def plain_results(answers: Any) -> list[bytes]:
        columns = [column.results.items for column in answers.parts]
        return [b"\n".join(row[:2]) for row in zip(*columns, strict=True)]

    aggregate.plain_results = plain_results


def drain_refuses_running() -> None:
    from overlay.model import errors, segments
    from overlay.queueing import queued_segment, request_queue

    running: list[Any] = []
    right_run, right_close = queued_segment.QueuedSegment.run, request_queue.RequestQueue.close

    def run(queued: Any, *rest: Any) -> None:
        running.append(queued)
        right_run(queued, *rest)

    def close(self: Any) -> int:
        error = errors.Draining(f"{self.me} is stopping")
        for queued in running:
            if queued.is_open:
                part = segments.Part(self.me, error.code, str(error), executed=error.executed)
                rows = queued.segment.count
                queued._settle(0, segments.Slice(rows, (), refused=part))
        return int(right_close(self))

    queued_segment.QueuedSegment.run = run
    request_queue.RequestQueue.close = close


def runs_some_twice() -> None:
    from overlay.workers import thread_pool

    right, numbers = thread_pool._called, itertools.count(1)

    def called(*arguments: Any) -> Any:
        if next(numbers) % 10 == 0:
            right(*arguments)
        return right(*arguments)

    thread_pool._called = called


def answers_are_lost() -> None:
    from overlay.calls import stream_session

    right, numbers = stream_session._Session._answer, itertools.count(1)

    def answer(self: Any, accepted: Any, start: int, answers: Any) -> None:
        if next(numbers) % 15:
            right(self, accepted, start, answers)

    stream_session._Session._answer = answer


def deadlines_never_end() -> None:
    from overlay.transport import timers

    timers.Deadlines.watch = lambda self, thing, deadline: None


def internal_errors() -> None:
    from overlay.transport import codec

    right, numbers = codec.write_response, itertools.count(1)

    def write_response(*arguments: Any, **options: Any) -> Any:
        if next(numbers) % 20 == 0:
            raise KeyError("a bug")
        return right(*arguments, **options)

    codec.write_response = write_response


def link_stays_down() -> None:
    from overlay.peers import peers

    right = peers._Peer._set_state

    def set_state(self: Any, state: str, *more: Any, **named: Any) -> None:
        if state == "up" and self.asked and self.state == "down":
            return
        right(self, state, *more, **named)

    peers._Peer._set_state = set_state


def exit_ends_the_worker() -> None:
    from overlay.workers import thread_pool

    right = thread_pool.outcome_of_error

    def outcome_of_error(e: BaseException) -> Any:
        if isinstance(e, SystemExit):
            os._exit(3)
        return right(e)

    thread_pool.outcome_of_error = outcome_of_error


def answers_mixed_up() -> None:
    from overlay.workers import thread_pool

    right, last = thread_pool._called, [b"D 0"]

    def called(*arguments: Any) -> Any:
        result = right(*arguments)
        if isinstance(result, bytes):
            result, last[0] = last[0], result
        return result

    thread_pool._called = called


def team_is_ignored() -> None:
    from overlay.routing import planner

    planner.scope = lambda topology, me, route: (
        topology.in_order(set(route.targets))
        if route.targets is not None
        else tuple(worker.id for worker in topology.workers_of(me))
    )


def completed_is_miscounted() -> None:
    from overlay.observability import counters

    right, numbers = counters.Meter.completed, itertools.count(1)

    def completed(self: Any, count: int) -> None:
        if next(numbers) % 10:
            right(self, count)

    counters.Meter.completed = completed


def keys_are_forgotten() -> None:
    from overlay.calls import idempotency

    right = idempotency.IdempotencyKeys._end

    def end(self: Any, named: bytes, asked: Any, outcome: Any) -> None:
        right(self, named, asked, outcome)
        asked.until = 0.0

    idempotency.IdempotencyKeys._end = end


def key_for_any_payload() -> None:
    from overlay.calls import idempotency

    right = idempotency.IdempotencyKeys.enter
    idempotency.IdempotencyKeys.enter = lambda self, caller, key, question: right(
        self, caller, key, (b"",)
    )


def failure_counts_as_lost() -> None:
    from overlay.routing import aggregate

    aggregate.was_lost = lambda answer: not answer.parts or not answer.parts[0].ok


def needless_refusals() -> None:
    """As if recent requests had been too slow, although slots are free."""
    from overlay.model import errors
    from overlay.queueing import request_queue

    numbers = itertools.count(1)

    def refusing(right: Any) -> Any:
        def admit(*arguments: Any, **options: Any) -> Any:
            if next(numbers) % 15 == 0:
                raise errors.NoTimeLeft("recent requests took longer")
            return right(*arguments, **options)

        return admit

    request_queue.RequestQueue.admit = refusing(request_queue.RequestQueue.admit)
    request_queue.RequestQueue.admit_to = refusing(request_queue.RequestQueue.admit_to)


def address_is_ignored() -> None:
    from overlay.model import segments
    from overlay.server import service

    right = service.Service._caller

    def caller(self: Any, context: Any) -> segments.Caller:
        return segments.Caller("", right(self, context).name)

    service.Service._caller = caller


def job_told_early() -> None:
    """The answer leaves before the commit, which comes a tenth of a second later."""
    from overlay.jobs import journal, store

    right = journal._Change.apply

    def apply(self: Any, *arguments: Any) -> Any:
        found = right(self, *arguments)
        self.settle(found, None)
        self.must = True  # it is told once
        return found

    def commit(self: Any) -> None:
        time.sleep(0.1)
        right_commit(self)

    journal._Change.apply = apply
    right_commit = store.JobStore.commit
    store.JobStore.commit = commit


def job_recovered_to_wait() -> None:
    from overlay.jobs import store
    from overlay.model.jobs import JobState

    right = store.JobStore.end

    def end(self: Any, number: int, end: Any, now: float) -> bool:
        if end.reason == store.LEFT_RUNNING:
            end = end._replace(state=JobState.WAITING)
        return right(self, number, end, now)

    store.JobStore.end = end


def job_begun_again() -> None:
    """Whatever became of an attempt, it counts as one that did not run."""
    from overlay.jobs import outcome
    from overlay.model import segments

    right = outcome.after

    def after(error: Any, *rest: Any) -> Any:
        if error.code is segments.Code.UNAVAILABLE:
            error.executed = segments.Executed.NO
        return right(error, *rest)

    outcome.after = after


def job_refusal_unrecorded() -> None:
    """A job that a worker or the queue has refused is not written to wait again."""
    from overlay.jobs import store

    right = store.JobStore.end
    store.JobStore.end = lambda self, number, end, now: end.counts and right(self, number, end, now)


def job_attempts_uncounted() -> None:
    from overlay.jobs import store

    right = store.JobStore.take

    def take(self: Any, *arguments: Any) -> Any:
        found = right(self, *arguments)
        for job in found:
            self._db.execute("update job set attempts = 0 where id = ?", (job.number,))
        return found

    store.JobStore.take = take


def job_cancel_lost() -> None:
    from overlay.jobs import store

    store.JobStore.cancel = lambda self, numbers, now: store.Changed(len(list(numbers)), (), ())


def job_answer_overwritten() -> None:
    """Each answer is also written over the one before it."""
    from overlay.jobs import store
    from overlay.model.jobs import JobState

    right = store.JobStore.end

    def end(self: Any, number: int, end: Any, now: float) -> bool:
        if end.state is JobState.DONE:
            earlier = "(select max(job) from answer where job < ?)"
            change = f"update answer set body = ? where job = {earlier}"
            self._db.execute(change, (end.answer, number))
        return right(self, number, end, now)

    store.JobStore.end = end


def job_key_unused() -> None:
    from overlay.jobs import store

    right = store.JobStore._accept
    store.JobStore._accept = lambda self, caller, spec, *rest: right(
        self, caller, replace(spec, key=""), *rest
    )


def job_forgotten_when_read() -> None:
    from overlay.jobs import store

    def note_fetched(self: Any) -> None:
        for number in self._fetched:
            self._forget("id = ?", (number,), 1)
        self._fetched.clear()

    store.JobStore._note_fetched = note_fetched


def job_refused_and_kept() -> None:
    """One Submit in ten is refused after its jobs were accepted."""
    from overlay.jobs import journal
    from overlay.model import errors

    right, numbers = journal._Change.settle, itertools.count(1)

    def settle(self: Any, result: Any, error: Any) -> None:
        if isinstance(result, list) and next(numbers) % 10 == 0:
            error = errors.JournalFull("the journal is full")
        right(self, result, error)

    journal._Change.settle = settle


def job_without_reason() -> None:
    from overlay.jobs import store
    from overlay.model import segments

    right = store.JobStore.end
    store.JobStore.end = lambda self, number, end, now: right(
        self, number, end._replace(code=segments.Code.OK, reason=""), now
    )


def job_answers_mixed_up() -> None:
    from overlay.jobs import outcome

    right, last = outcome.done, [b""]

    def done(answer: bytes) -> Any:
        before, last[0] = last[0], answer
        return right(before or answer)

    outcome.done = done


def job_done_waits_again() -> None:
    """Jobs that were done when the leader ended wait again."""
    from overlay.jobs import store

    right = store.JobStore._recover

    def recover(self: Any, db: Any) -> None:
        db.execute(
            "update job set state = 0, ready = 1, kind = kind where state = 2 and id % 5 = 0"
        )
        db.execute("insert or ignore into payload select job, x'30203020' from answer")
        right(self, db)

    store.JobStore._recover = recover


def job_ends_lost_in_stop() -> None:
    """A leader that stops does not write how its last jobs ended."""
    from overlay.jobs import runner

    right = runner.JobRunner._record

    def record(self: Any, *arguments: Any) -> None:
        if not self.is_stopped:
            right(self, *arguments)

    runner.JobRunner._record = record


def job_part_loses_a_chunk() -> None:
    """Every second chunk of a part is not written."""
    from overlay.jobs import store
    from overlay.transport import chunks

    right = store.JobStore.keep_chunk

    def keep_chunk(self: Any, number: int, worker: str, at: int, chunk: bytes) -> None:
        if at // chunks.CHUNK_BYTES % 2 == 0:
            right(self, number, worker, at, chunk)

    store.JobStore.keep_chunk = keep_chunk


def job_in_any_team() -> None:
    from overlay.jobs import requests

    right = requests.Jobs._specs

    def specs(self: Any, asked: Any, rights: Any) -> Any:
        asked.request.team = ""
        return right(self, asked, rights)

    requests.Jobs._specs = specs


def lease_lent_twice() -> None:
    """The lender forgets what it has lent of a worker."""
    from overlay.calls import lender

    right = lender.Lender._lendable_locked
    lender.Lender._lendable_locked = lambda self, neighbour, worker, route, lent, borrowers: right(
        self, neighbour, worker, route, 0, 0
    )


def lease_never_over() -> None:
    """A worker serves a lane for as long as its client likes."""
    from overlay.calls import leases

    leases.HeldLease.check = lambda self, route, rows: None


def lease_not_given_back() -> None:
    """What a client has been lent is renewed after it has left."""
    from overlay.calls import lender

    lender.Lender.left = lambda self, borrower: None
    lender.USED_S = float("inf")


def lease_kept_in_drain() -> None:
    """A worker that is stopping does not say so on lanes, and goes on serving them, although nobody
    renews its leases, or they have been ended."""
    from overlay.calls import leases, stream_session
    from overlay.queueing import request_queue

    right_hold, right_look = leases.Leases._hold, leases.Leases._look_at
    right_announce = stream_session._Session.announce_stop
    right_end = stream_session._Session.end

    def announce_stop(self: Any, for_good: bool) -> None:
        if self._lease is None:
            right_announce(self, for_good)

    def end(self: Any) -> None:
        if self._lease is None:
            right_end(self)

    def hold(self: Any, lent: Any, above: Any) -> None:
        if lent.rows:
            right_hold(self, lent, above)

    def look_at(self: Any, held: Any, now: float) -> None:
        held.ends_at = max(held.ends_at, now + 1)
        right_look(self, held, now)

    leases.Leases._hold, leases.Leases._look_at = hold, look_at
    stream_session._Session.announce_stop = announce_stop
    stream_session._Session.end = end
    request_queue.RequestQueue.close = lambda self: 0


def lane_counted_twice() -> None:
    from overlay.calls import leases

    right = leases.HeldLease.note

    def note(self: Any, ended: Any) -> None:
        right(self, ended)
        right(self, ended)

    leases.HeldLease.note = note


def lane_not_counted() -> None:
    """A worker does not report what it has answered on lanes; failures it does."""
    from overlay.calls import leases

    right = leases.HeldLease.note
    leases.HeldLease.note = lambda self, ended: right(self, ended) if ended.failures else None


def lane_repeats_what_was_lost() -> None:
    """What was on a lane that is lost goes the ordinary way, although it may have run."""
    from overlay.client import submitter
    from overlay.model import segments

    right = submitter.Submitter._keep

    def keep(self: Any, submission: Any, rows: Any, failure: Any) -> bool:
        if self.hand_back is None or failure.code is not segments.Code.UNAVAILABLE:
            return right(self, submission, rows, failure)
        self.hand_back(submission.part(rows, submission.attempt))
        return True

    submitter.Submitter._keep = keep


def lane_loses_what_has_no_room() -> None:
    """What no lane can take, as its worker is slow, does not go the ordinary way either."""
    from overlay.client import lanes

    right = lanes.Lanes.take
    lanes.Lanes.take = lambda self, submission: right(self, submission) or bool(self._lanes)


BUGS = (
    Bug(
        "expired-is-started",
        "no check at dequeue: a request that has expired still runs",
        "overload",
        ("false_refusal", "ran_after_deadline"),
        expired_is_started,
    ),
    Bug(
        "retry-without-proof",
        "mode any tries another worker after every lost connection",
        "kill-team-leader",
        ("ran_twice", "unexpected_status"),
        retry_without_proof,
    ),
    Bug(
        "answer-sent-twice",
        "some slices are written twice",
        "calm",
        ("answered_twice",),
        answer_sent_twice,
    ),
    Bug(
        "deadline-not-passed-on",
        "each hop allows 30 s",
        "calm",
        ("ran_after_deadline",),
        deadline_not_passed_on,
    ),
    Bug(
        "refusal-always-says-no",
        "every failure says executed: no",
        "bad-handlers",
        ("false_refusal",),
        refusal_always_says_no,
    ),
    Bug("seen-ids-off", "a worker forgets request ids", "repeats", ("ran_twice",), seen_ids_off),
    Bug(
        "cancelled-stays-active",
        "a cancelled request keeps its slot",
        "overload",
        ("leak",),
        cancelled_stays_active,
    ),
    Bug(
        "dead-link-is-silent",
        "requests on a lost link are never answered",
        "kill-worker",
        ("leak",),
        dead_link_is_silent,
    ),
    Bug(
        "coverage-complete",
        "the trailer always says n of n",
        "kill-worker",
        ("silently_incomplete",),
        coverage_always_complete,
    ),
    Bug(
        "missing-is-left-out",
        "an answer of mode all omits missing workers",
        "kill-worker",
        ("silently_incomplete",),
        missing_is_left_out,
    ),
    Bug(
        "merge-drops-a-part",
        "the joined result lacks the third worker's",
        "calm",
        ("wrong_result",),
        merge_drops_a_part,
    ),
    Bug(
        "drain-refuses-running",
        "a stopping process refuses running requests",
        "rolling-restart",
        ("false_refusal", "ran_twice"),
        drain_refuses_running,
    ),
    Bug("runs-some-twice", "one in ten runs twice", "calm", ("ran_twice",), runs_some_twice),
    Bug(
        "answers-are-lost",
        "one slice in fifteen is not written",
        "calm",
        ("silent", "unexpected_status"),
        answers_are_lost,
    ),
    Bug(
        "deadlines-never-end",
        "streamed requests do not end at their deadline",
        "grey-worker",
        ("late", "silent"),
        deadlines_never_end,
    ),
    Bug(
        "internal-errors",
        "one unary answer in twenty fails",
        "calm",
        ("unexpected_status",),
        internal_errors,
    ),
    Bug(
        "link-stays-down",
        "a lost link never comes up",
        "kill-worker",
        ("no_recovery",),
        link_stays_down,
    ),
    Bug(
        "exit-ends-the-worker",
        "a handler's SystemExit ends the worker",
        "bad-handlers",
        ("bad_exit",),
        exit_ends_the_worker,
    ),
    Bug(
        "answers-mixed-up",
        "each answer is the one before it",
        "calm",
        ("wrong_result",),
        answers_mixed_up,
    ),
    Bug(
        "team-is-ignored",
        "every worker is asked, whatever the team",
        "calm",
        ("ran_unrequested", "silently_incomplete"),
        team_is_ignored,
    ),
    Bug(
        "completed-is-miscounted",
        "one completed request in ten is not counted",
        "calm",
        ("leak",),
        completed_is_miscounted,
    ),
    Bug(
        "keys-are-forgotten",
        "a key is forgotten after its answer",
        "keys",
        ("ran_twice",),
        keys_are_forgotten,
    ),
    Bug(
        "key-for-any-payload",
        "a different payload with the same key gets the first answer",
        "keys",
        ("key_misused",),
        key_for_any_payload,
    ),
    Bug(
        "failure-counts-as-lost",
        "with a key, every failure is retried on a second worker",
        "keys",
        ("ran_twice",),
        failure_counts_as_lost,
    ),
    Bug(
        "needless-refusals",
        "one request in fifteen is refused for lack of time although slots are free",
        "calm",
        ("refused_with_free_slots",),
        needless_refusals,
    ),
    Bug(
        "address-is-ignored",
        "fairness is by caller name only, not by address",
        "many-names",
        ("unexpected_status", "late"),
        address_is_ignored,
    ),
    Bug(
        "reset-keeps-its-slot",
        "a call that a stranger resets keeps its slot",
        "strangers",
        ("leak",),
        cancelled_stays_active,
    ),
    Bug(
        "broken-link-is-silent",
        "requests to a neighbour that violates the protocol are never answered",
        "hostile-worker",
        ("leak", "silent"),
        dead_link_is_silent,
    ),
    Bug(
        "job-told-early",
        "a job is accepted, and its cancel told, before it is on the disk",
        "jobs-kill-leader",
        ("job_lost",),
        job_told_early,
    ),
    Bug(
        "job-recovered-to-wait",
        "jobs without a key that ran when the leader ended wait again",
        "jobs-kill-leader",
        ("job_ran_twice", "job_ran_too_often"),
        job_recovered_to_wait,
    ),
    Bug(
        "job-begun-again",
        "a job whose worker was lost counts as one that did not run",
        "jobs-kill-workers",
        ("job_ran_twice", "job_ran_too_often"),
        job_begun_again,
    ),
    Bug(
        "job-refusal-unrecorded",
        "a job that was refused is never begun again",
        "jobs-kill-workers",
        ("job_not_over",),
        job_refusal_unrecorded,
    ),
    Bug(
        "job-attempts-uncounted",
        "the attempts of a job are not counted",
        "jobs-calm",
        ("job_ran_too_often",),
        job_attempts_uncounted,
    ),
    Bug(
        "job-cancel-lost",
        "a cancel is told, and nothing else",
        "jobs-calm",
        ("job_cancel_forgotten",),
        job_cancel_lost,
    ),
    Bug(
        "job-answer-overwritten",
        "each answer is also written over the one before it",
        "jobs-calm",
        ("job_answer_changed", "job_wrong_answer"),
        job_answer_overwritten,
    ),
    Bug(
        "job-key-unused",
        "a key does not find the job that has it",
        "jobs-calm",
        ("job_key_ignored",),
        job_key_unused,
    ),
    Bug(
        "job-forgotten-when-read",
        "a job is forgotten once its answer was read",
        "jobs-calm",
        ("job_answer_lost",),
        job_forgotten_when_read,
    ),
    Bug(
        "job-refused-and-kept",
        "some jobs are refused after they were accepted",
        "jobs-calm",
        ("job_refused_and_ran",),
        job_refused_and_kept,
    ),
    Bug(
        "job-without-reason",
        "a job that failed does not say why",
        "jobs-calm",
        ("job_wrong_state",),
        job_without_reason,
    ),
    Bug(
        "job-answers-mixed-up",
        "each job has the answer of the one before it",
        "jobs-calm",
        ("job_wrong_answer",),
        job_answers_mixed_up,
    ),
    Bug(
        "job-done-waits-again",
        "some jobs that were done wait again after a restart",
        "jobs-restart",
        ("job_wrong_state",),
        job_done_waits_again,
    ),
    Bug(
        "job-ends-lost-in-stop",
        "a leader that stops does not write how its last jobs ended",
        "jobs-restart",
        ("job_wrong_state",),
        job_ends_lost_in_stop,
    ),
    Bug(
        "job-part-loses-a-chunk",
        "of a job in parts every second chunk is not written",
        "jobs-calm",
        ("job_unexpected_status",),
        job_part_loses_a_chunk,
    ),
    Bug(
        "job-in-any-team",
        "a job runs on every team's workers",
        "jobs-calm",
        ("job_ran_unrequested",),
        job_in_any_team,
    ),
    Bug(
        "lease-lent-twice",
        "the lender forgets what it has lent of a worker",
        "lanes-shared",
        ("lent_twice",),
        lease_lent_twice,
    ),
    Bug(
        "lease-never-over",
        "a worker serves a lane after its lease has ended",
        "lanes-ended",
        ("ran_without_lease",),
        lease_never_over,
    ),
    Bug(
        "lease-not-given-back",
        "a client that has left keeps what it was lent",
        "lanes-calm",
        ("leak",),
        lease_not_given_back,
    ),
    Bug(
        "lease-kept-in-drain",
        "a worker that is stopping goes on serving lanes",
        "lanes-drain",
        ("unexpected_status",),
        lease_kept_in_drain,
    ),
    Bug(
        "lane-counted-twice",
        "an answer on a lane is counted twice",
        "lanes-calm",
        ("miscounted",),
        lane_counted_twice,
    ),
    Bug(
        "lane-not-counted",
        "an answer on a lane is not counted",
        "lanes-calm",
        ("miscounted",),
        lane_not_counted,
    ),
    Bug(
        "lane-repeats-lost",
        "what was on a lane that is lost is sent again, although it may have run",
        "lanes-kill",
        ("ran_twice",),
        lane_repeats_what_was_lost,
        in_client=True,
    ),
    Bug(
        "lane-loses-the-rest",
        "what no lane can take is lost",
        "lanes-grey",
        ("unanswered",),
        lane_loses_what_has_no_room,
        in_client=True,
    ),
)
BY_NAME = {bug.name: bug for bug in BUGS}


def main(arguments: Sequence[str]) -> int:
    BY_NAME[arguments[0]].apply()
    return node.main(list(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
