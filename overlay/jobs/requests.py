"""The jobs of a leader: the RPCs of OverlayJobs, and the parts behind them.

    Submit   checks the request as Forward does, and answers when it is on the disk
    Result   answers at once, or when the job has ended; meanwhile it holds no thread
    Part     reads the part of one worker, of a job in parts
    Jobs     lists them
    Change   cancels, releases, drops

With TLS a job belongs to the name of its caller's certificate: nobody else but an operator finds
it. Without TLS nothing tells who is calling, and everybody finds every job.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import grpc

from overlay.calls.gate import Gate
from overlay.calls.request_path import RequestPath
from overlay.jobs import messages
from overlay.jobs.copy_file import CopyFile
from overlay.jobs.jetstream import JetStreamLog
from overlay.jobs.journal import Journal
from overlay.jobs.log import Log
from overlay.jobs.replicas import Replica
from overlay.jobs.runner import JobRunner
from overlay.jobs.store import Changed, JobStore, StoreLimits
from overlay.model import clocks as time
from overlay.model.access import UNRESTRICTED, Rights
from overlay.model.errors import BadRequest, JournalFull, UnknownName
from overlay.model.jobs import (
    MAX_ATTEMPTS,
    JobRecord,
    JobSpec,
    JobState,
    WorkProgress,
    numbers_of,
)
from overlay.model.jobs_servers import stream_bytes
from overlay.model.segments import Caller
from overlay.model.topology import Topology
from overlay.queueing.admission import HIGHEST_PRIORITY
from overlay.queueing.request_queue import RequestQueue
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.transport.timers import Deadlines

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

log = logging.getLogger(__name__)

MAX_JOBS = 4096  # of one Submit or Change
MAX_LISTED, LISTED = 1000, 100
PART_BYTES = 1 << 20  # of one answer to Part
MAX_WAIT_S = 60.0  # of one Result; the library asks again
MAX_WAITERS = 10_000  # calls that wait for a job's end; beyond them they are answered at once
ATTEMPTS_WITH_KEY = 3
SHORTEST_EVERY_S, LONGEST_EVERY_S = 1.0, 366 * 86_400.0
LONGEST_S = 10 * 366 * 86_400.0  # of an expiry


class Jobs:
    """Those of the process `me`. Thread-safe. Raises ConfigError if the journal is unusable."""

    def __init__(
        self,
        topology: Topology,
        me: str,
        path: RequestPath,
        queue: RequestQueue,
        deadlines: Deadlines,
        gate: Gate,
    ) -> None:
        self._path = path
        self._limits = topology.limits
        self._gate = gate
        self._deadlines = deadlines
        self._accepted = self._refused = 0
        self._waiters: dict[int, dict[_Waiter, None]] = {}  # the journal's thread only
        self._waiting = 0
        limits = self._limits
        bounds = StoreLimits(limits.max_jobs, limits.journal_bytes, limits.keep_jobs_s)
        file, replica = topology.journal_of(me), None
        if topology.jobs_servers:
            copy = CopyFile(file)
            self._store = JobStore(copy, bounds)
            log_ = _log_of(topology, me, gate.credentials)
            replica = Replica(log_, copy, me, topology.process(me).address)
        else:
            self._store = JobStore(file, bounds)
        self._runner = JobRunner(path, queue, deadlines, self._over)
        self._runner.on_deposed = self._answer_waiters
        self._journal = self._runner.journal = Journal(self._store, self._runner, replica=replica)

    def start(self) -> None:
        if self._store.recovered:
            log.warning(
                "%d jobs were running when the leader ended: those with attempts left run again, "
                "the others are quarantined",
                self._store.recovered,
            )
        self._journal.start()

    def stop(self) -> None:
        """Starts no more jobs."""
        self._runner.stop()

    def progressed(self, made: Sequence[WorkProgress]) -> None:
        """What handlers say about how far they have got. Any thread."""
        self._journal.ask(lambda store, now: self._runner.progressed(made))

    def hurry(self) -> None:
        """A worker may be back, or a queue may have room. Any thread; cheap."""
        self._runner.hurry()

    def close(self) -> None:
        self._journal.close()
        self._runner.close()

    def fill(self, response: pb2.MetricsResponse) -> None:
        found = response.jobs
        messages.write_counts(found, self._store.counts, self._store.limits)
        found.accepted, found.refused = self._accepted, self._refused
        found.repeated, found.waiters = self._runner.repeated, self._waiting
        found.problem = self._journal.problem
        found.elsewhere = self._journal.elsewhere

    # the RPCs

    def submit(
        self, request: pb2.SubmitRequest, caller: Caller, rights: Rights = UNRESTRICTED
    ) -> Future[pb2.SubmitResponse]:
        """Raises BadRequest and the errors of a request that can never be served."""
        specs = self._specs(request, rights)
        if self._journal.problem and not self._journal.elsewhere:
            self._refused += len(specs)
            raise JournalFull(f"no job was accepted: {self._journal.problem}")
        accepted = self._journal.do(lambda store, now: store.accept(caller, specs, now))
        answer: Future[pb2.SubmitResponse] = Future()

        def done(ids: Future[list[str]]) -> None:
            if (error := ids.exception()) is not None:
                self._refused += len(specs)
                answer.set_exception(error)
            else:
                self._accepted += len(specs)
                answer.set_result(pb2.SubmitResponse(ids=ids.result()))

        accepted.add_done_callback(done)
        return answer

    def result(
        self, request: pb2.ResultRequest, context: grpc.ServicerContext, caller: Caller
    ) -> Future[pb2.Job]:
        owner, wait_s = self._owner(context, caller), request.wait_s
        if not (math.isfinite(wait_s) and wait_s >= 0):
            raise BadRequest(f"wait_s: {wait_s:g} is not a number of seconds from 0")
        until = time.monotonic() + min(wait_s, MAX_WAIT_S)
        answer: Future[pb2.Job] = Future()
        read = partial(self._read, request.id, owner, not request.without_answer)

        def look(store: JobStore, now: float) -> pb2.Job | _Waiter:
            found = read(store, now)
            left_s = until - time.monotonic()
            is_over = JobState(found.state).is_over or found.every_s
            if is_over or left_s <= 0 or self._waiting >= MAX_WAITERS:
                return found
            number, _ = numbers_of(request.id)
            return self._wait(_Waiter(number, until, partial(self._reread, read, answer)))

        def looked(found: Future[pb2.Job | _Waiter]) -> None:
            if (error := found.exception()) is not None:
                answer.set_exception(error)
                return
            waiter = found.result()
            if not isinstance(waiter, _Waiter):
                answer.set_result(waiter)
                return
            self._deadlines.watch(waiter.end, until)
            if not context.add_callback(waiter.end):
                waiter.end()

        self._journal.ask(look).add_done_callback(looked)
        return answer

    def part(
        self, request: pb2.PartRequest, context: grpc.ServicerContext, caller: Caller
    ) -> Future[pb2.PartResponse]:
        read = partial(self._read_part, request, self._owner(context, caller))
        return self._journal.ask(read)

    def listed(
        self, request: pb2.JobsRequest, context: grpc.ServicerContext, caller: Caller
    ) -> Future[pb2.JobsResponse]:
        owner, states = self._owner(context, caller), _states(request.states)
        limit = request.limit or LISTED
        if limit > MAX_LISTED:
            raise BadRequest(f"limit: {limit} is more than {MAX_LISTED}")

        def read(store: JobStore, now: float) -> pb2.JobsResponse:
            before = 0
            if request.before:
                found = store.find(request.before, owner)
                if found is None:
                    raise _unknown(request.before)
                before = found
            records = store.listed(owner, states, request.handler, limit, before)
            response = pb2.JobsResponse(jobs=map(self._shown, records))
            messages.write_counts(response.counts, store.counts_of(owner), store.limits)
            return response

        return self._journal.ask(read)

    def change(
        self, request: pb2.ChangeRequest, context: grpc.ServicerContext, caller: Caller
    ) -> Future[pb2.ChangeResponse]:
        owner, states = self._owner(context, caller), _states(request.states)
        if len(request.ids) > MAX_JOBS:
            raise BadRequest(f"ids: {len(request.ids)} are more than {MAX_JOBS}")
        if bool(request.ids) == bool(states):
            raise BadRequest("either ids or states are needed, to say which jobs are meant")
        verbs: dict[int, Callable[[JobStore, Sequence[int], float], Changed]] = {
            pb2.CANCEL: lambda store, numbers, now: store.cancel(numbers, now),
            pb2.RELEASE: lambda store, numbers, now: store.release(numbers, now),
            pb2.DROP: lambda store, numbers, now: store.drop(numbers),
        }
        verb = verbs.get(request.action)
        if verb is None:
            known = ", ".join(pb2.JobAction.keys())
            raise BadRequest(f"action: {request.action} is none of {known}")

        def apply(store: JobStore, now: float) -> tuple[Changed, list[str]]:
            numbers = store.in_states(states, owner, MAX_JOBS) if states else []
            unknown = []
            for id_ in request.ids:
                number = store.find(id_, owner)
                if number is None:
                    unknown.append(id_)
                else:
                    numbers.append(number)
            return verb(store, numbers, now), unknown

        answer: Future[pb2.ChangeResponse] = Future()

        def done(found: Future[tuple[Changed, list[str]]]) -> None:
            if (error := found.exception()) is not None:
                answer.set_exception(error)
                return
            changed, unknown = found.result()
            self._runner.cancel(changed.running)
            answer.set_result(
                pb2.ChangeResponse(
                    changed=changed.changed, unchanged=changed.unchanged, unknown=unknown
                )
            )

        self._journal.do(apply).add_done_callback(done)
        return answer

    # what a Submit says

    def _specs(self, asked: pb2.SubmitRequest, rights: Rights) -> list[JobSpec]:
        request, payloads, keys = asked.request, list(asked.payloads), list(asked.keys)
        if not payloads:
            payloads = [request.payload]
            keys = keys or ([request.idempotency_key] if request.idempotency_key else [])
        elif request.payload or request.idempotency_key:
            raise BadRequest("request: with payloads, it has no payload and no key of its own")
        if len(payloads) > MAX_JOBS:
            raise BadRequest(f"payloads: {len(payloads)} are more than {MAX_JOBS}")
        if keys and len(keys) != len(payloads):
            raise BadRequest(f"keys: {len(keys)} keys for {len(payloads)} payloads")
        if request.request_id or request.hops or request.targets:
            raise BadRequest("request: a job chooses its request ids, and has no hops or targets")
        now = time.time()
        limit_s = _seconds("limit_s", asked.limit_s, self._limits.max_deadline_s, cut=True)
        expires_s = _seconds("expires_s", asked.expires_s, LONGEST_S)
        start_at = _seconds("start_at_s", asked.start_at_s, now + LONGEST_S)
        every_s = _seconds("every_s", asked.every_s, LONGEST_EVERY_S)
        if every_s and every_s < SHORTEST_EVERY_S:
            raise BadRequest(f"every_s: {every_s:g} is less than {SHORTEST_EVERY_S:g} seconds")
        if asked.attempts > MAX_ATTEMPTS:
            raise BadRequest(f"attempts: {asked.attempts} are more than {MAX_ATTEMPTS}")
        if asked.attempts > 1 and not keys:
            raise BadRequest(
                f"attempts: {asked.attempts} need a key, which says that running a job twice does "
                "no harm"
            )
        kind = pb2.Request(
            mode=request.mode,
            team=request.team,
            handler=request.handler,
            want_parts=request.want_parts,
            in_parts=request.in_parts,
        )
        if kind.in_parts and kind.want_parts:
            raise BadRequest("want_parts: in_parts excludes it, as the answer has no results then")
        self._path.check(codec.read_route(kind, self._limits), rights)
        pairs = list(zip(payloads, keys or [""] * len(payloads), strict=True))
        for payload, key in pairs:
            if len(payload) > self._limits.max_message_bytes:
                raise BadRequest(codec.too_large(len(payload), self._limits.max_message_bytes))
            if len(key) > self._limits.max_key or not key.isprintable():
                raise BadRequest(f"key: not a text of at most {self._limits.max_key} letters")
        if keys and not all(keys):
            raise BadRequest("keys: one of them is empty")
        if len(set(keys)) != len(keys):
            raise BadRequest("keys: two jobs have the same key")
        written = kind.SerializeToString(deterministic=True)
        return [
            JobSpec(
                written,
                payload,
                request.handler,
                key,
                min(request.priority, HIGHEST_PRIORITY),
                limit_s or self._limits.max_deadline_s,
                asked.attempts or (ATTEMPTS_WITH_KEY if key else 1),
                start_at,
                (max(now, start_at) + expires_s) if expires_s else None,
                every_s,
            )
            for payload, key in pairs
        ]

    def _owner(self, context: grpc.ServicerContext, caller: Caller) -> str | None:
        """Whose jobs the caller may see; None: everybody's. Raises NotTrusted."""
        if self._gate.is_open or self._gate.is_operator(context):
            return None
        return caller.address

    # the journal's thread

    def _read(
        self, id_: str, owner: str | None, with_answer: bool, store: JobStore, now: float
    ) -> pb2.Job:
        number = store.find(id_, owner)
        record = None if number is None else store.record(number, with_answer)
        if number is None or record is None:
            raise _unknown(id_)
        job = self._shown(record, with_story=True)
        if record.state is JobState.WAITING and not record.every_s:
            job.position, job.position_is_more = store.position(number)
            job.wait_s = self._runner.wait_s(store.kind_of(number), job.position)
        if record.answer is not None:
            job.answer.ParseFromString(record.answer)
            if not any(part.size for part in job.answer.parts):  # else they are to be fetched yet
                store.was_fetched(number)
        return job

    def _read_part(
        self, request: pb2.PartRequest, owner: str | None, store: JobStore, now: float
    ) -> pb2.PartResponse:
        number = store.find(request.id, owner)
        record = None if number is None else store.record(number, with_answer=True)
        if number is None or record is None:
            raise _unknown(request.id)
        answer = pb2.Response.FromString(record.answer or b"")
        sizes = {part.process_id: part.size for part in answer.parts if part.size}
        size = sizes.get(request.process_id)
        if size is None or request.at > size:
            whose = ascii(request.process_id[:40])[1:-1]
            what = f"has {size or 0:,} bytes of '{whose}', and none from {request.at:,} on"
            raise BadRequest(f"job {request.id} is {record.state.name.lower()} and {what}")
        chunk = store.part(number, request.process_id, request.at, PART_BYTES)
        if request.at + len(chunk) == size and request.process_id == list(sizes)[-1]:
            store.was_fetched(number)
        return pb2.PartResponse(chunk=chunk)

    def _shown(self, record: JobRecord, with_story: bool = False) -> pb2.Job:
        job = messages.write_job(record, with_story)
        progress = self._runner.progress_of(numbers_of(record.id)[0])
        if progress is not None:
            job.progress.CopyFrom(codec.write_progress_of(progress))
        return job

    def _wait(self, waiter: _Waiter) -> _Waiter:
        self._waiters.setdefault(waiter.number, {})[waiter] = None
        self._waiting += 1
        return waiter

    def _reread(
        self, read: Callable[[JobStore, float], pb2.Job], answer: Future[pb2.Job], waiter: _Waiter
    ) -> None:
        """Answers a call that waited, with how its job stands now. Any thread."""

        def look(store: JobStore, now: float) -> pb2.Job:
            self._forget(waiter)
            return read(store, now)

        def looked(found: Future[pb2.Job]) -> None:
            self._deadlines.forget(waiter.end, waiter.until)
            if (error := found.exception()) is not None:
                self._forget(waiter)  # the question was not even asked
                answer.set_exception(error)
            else:
                answer.set_result(found.result())

        self._journal.ask(look).add_done_callback(looked)

    def _forget(self, waiter: _Waiter) -> None:
        waiters = self._waiters.get(waiter.number, {})
        if waiter in waiters:
            del waiters[waiter]
            self._waiting -= 1
            if not waiters:
                del self._waiters[waiter.number]

    def _answer_waiters(self) -> None:
        """Another leader has the jobs: they have to wait there."""
        for waiters in list(self._waiters.values()):
            for waiter in list(waiters):
                waiter.end()

    def _over(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for waiter in list(self._waiters.get(number, ())):
                waiter.end()


class _Waiter:
    """A call that waits for a job's end. `end` answers it, once: when the job is over, when its
    time is over, or when its caller has left."""

    __slots__ = ("_answers", "number", "until")

    def __init__(self, number: int, until: float, answer: Callable[[_Waiter], None]) -> None:
        self.number = number
        self.until = until
        self._answers = [answer]

    def end(self) -> None:
        with suppress(IndexError):  # of two threads, one gets it
            self._answers.pop()(self)


def _log_of(topology: Topology, me: str, credentials: Credentials | None) -> Log:
    """On the NATS servers of the configuration, the one on this leader's machine first. Raises
    ConfigError."""
    host = topology.process(me).host
    servers = sorted(topology.jobs_servers, key=lambda server: server.host != host)
    most = stream_bytes(topology.limits.journal_bytes)
    addresses = [server.address for server in servers]
    return JetStreamLog(addresses, most, credentials=credentials)


def _seconds(name: str, value: float, most: float, cut: bool = False) -> float:
    """cut: more than `most` is `most`. Raises BadRequest."""
    if not math.isfinite(value) or value < 0 or (value > most and not cut):
        raise BadRequest(f"{name}: {value:g} is not a number of seconds from 0 to {most:.0f}")
    return min(value, most)


def _states(numbers: Iterable[int]) -> tuple[JobState, ...]:
    """Raises BadRequest."""
    try:
        return tuple(dict.fromkeys(map(JobState, numbers)))
    except ValueError as e:
        raise BadRequest(f"states: {e}") from None


def _unknown(id_: str) -> UnknownName:
    return UnknownName(
        f"there is no job {id_}: it was forgotten some time after its end, or is another caller's, "
        "or the journal is another one"
    )
