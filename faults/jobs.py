"""Clients that submit jobs, singly and many at once, and ask what became of them.

Some wait for the end, some look later, some cancel, some submit again with the same key. What each
was told is recorded. Owns its threads "jobs-…" from `start` to `close`.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from faults.history import Cancel, Look, Submit
from faults.load import Notes
from overlay.client.job_status import JobStatus
from overlay.client.jobs import Job
from overlay.client.sync import CallFailed, Client
from tests.harness.cluster import Overlay
from tests.harness.leaders import leaders_in

CLIENTS, THREADS = 2, 3  # calls of one client that come together share a Submit
PAUSE_S = 0.1  # of a thread between two things that it does, on average
WAITERS = 24
SUBMIT_S, WAIT_S = 5.0, 10.0  # what a client allows
OVER_S = 40.0  # after the load, until each job is over
LIMIT_S = 15.0  # of an attempt
FIRST_ID = 40_000_000  # ids of jobs are above those of calls
ATTEMPTS_WITH_KEY = 3  # as documented

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A job before it is submitted; its id is in its payload."""

    id: int
    nap_ms: int
    mode: str
    team: str
    handler: str
    key: str
    expires_s: float | None
    in_parts: bool = False

    @property
    def payload(self) -> bytes:
        return b"%d %d" % (self.id, self.nap_ms)


class JobLoad:
    """The same seed makes the same choices in each of its threads, but not at the same times."""

    def __init__(self, overlay: Overlay, notes: Notes, seed: int) -> None:
        self._notes = notes
        self._seed = seed
        self._ids = itertools.count(FIRST_ID)
        self._closed = threading.Event()
        leaders = leaders_in(overlay.config)
        self._clients = [overlay.connect(*leaders) for _ in range(CLIENTS)]
        self._waiting = ThreadPoolExecutor(WAITERS, "jobs-wait")
        self._known: list[tuple[Wanted, str]] = []  # with the id that was told
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"jobs-{number}", daemon=True)
            for number in range(CLIENTS * THREADS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Submits no more, and waits until every job that was accepted is over."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self.ask_all(OVER_S)

    def ask_all(self, within_s: float) -> None:
        """Asks once more about every job that was accepted."""
        end = time.monotonic() + within_s
        jobs = dict.fromkeys(job for _, job in self._known)
        asked = [
            self._waiting.submit(self._wait, self._clients[0], job, end, is_last=True)
            for job in jobs
        ]
        for one in asked:
            one.result()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._waiting.shutdown(cancel_futures=True)
        for client in self._clients:
            client.close()

    def _run(self, number: int) -> None:
        rng, client = random.Random(f"{self._seed} {number}"), self._clients[number % CLIENTS]
        while not self._closed.wait(rng.uniform(0, 2 * PAUSE_S)):
            what, before = rng.random(), self._known[-200:]
            if not before or what < 0.6:
                self._submit(client, self._wanted(rng), rng)
            elif what < 0.7:
                keyed = [wanted for wanted, _ in before if wanted.key]
                if keyed:
                    self._submit(client, [rng.choice(keyed)], rng)
            elif what < 0.85:
                self._look(client, rng.choice(before)[1])
            else:
                self._cancel(client, before[-rng.randint(1, min(5, len(before)))][1])

    def _wanted(self, rng: random.Random) -> list[Wanted]:
        """One, or several that differ in their payloads and keys only."""
        mode = "all" if rng.random() < 0.2 else "any"
        team = rng.choice(("", "", "green", "pink"))
        handler = rng.choices(("work", "raises", "large"), (0.85, 0.05, 0.1))[0]
        has_key, expires_s = rng.random() < 0.5, 0.4 if rng.random() < 0.1 else None
        count = rng.randint(2, 12) if rng.random() < 0.25 else 1
        ids = [next(self._ids) for _ in range(count)]
        return [
            Wanted(
                id_, rng.choice((5, 20, 50, 100, 500)), mode, team, handler,
                f"key-{id_}" if has_key else "", expires_s, handler == "large",
            )
            for id_ in ids
        ]  # fmt: skip

    def _submit(self, client: Client, wanted: Sequence[Wanted], rng: random.Random) -> None:
        first = wanted[0]
        how: dict[str, Any] = {
            "mode": first.mode,
            "team": first.team,
            "limit_s": LIMIT_S,
            "expires_s": first.expires_s,
            "in_parts": first.in_parts,
            "timeout": SUBMIT_S,
        }

        def submit() -> list[Job]:
            if len(wanted) == 1:
                return [client.later(first.handler, first.payload, key=first.key, **how)]
            keys = [each.key for each in wanted] if first.key else None
            payloads = [each.payload for each in wanted]
            return client.later_many(first.handler, payloads, keys=keys, **how)

        at, jobs, failure = _told(submit)
        for each, job in itertools.zip_longest(wanted, jobs or ()):
            self._notes.submits.append(_submit_of(each, job, at, failure))
            if job is not None:
                self._known.append((each, job.id))
                if rng.random() < 0.4:
                    end = time.monotonic() + WAIT_S
                    self._waiting.submit(self._wait, client, job.id, end)

    def _wait(self, client: Client, job: str, end: float, is_last: bool = False) -> None:
        left_s = max(0.5, end - time.monotonic())
        handle = client.job(job)
        at, found, failure = _told(lambda: _with_result(handle, handle.wait(left_s)))
        if failure is not None and failure.code.name == "DEADLINE_EXCEEDED":  # it goes on
            at, found, failure = _told(lambda: (handle.status(), None))
        self._notes.looks.append(_look_of(job, found, at, failure, is_last))

    def _look(self, client: Client, job: str) -> None:
        at, found, failure = _told(lambda: (client.job(job).status(), None))
        self._notes.looks.append(_look_of(job, found, at, failure, asked=False))

    def _cancel(self, client: Client, job: str) -> None:
        at, changed, failure = _told(lambda: client.job(job).cancel())
        until = time.monotonic()
        code = "OK" if failure is None else failure.code.name
        self._notes.cancels.append(Cancel(job, at, until, code, bool(changed)))


def _told(ask: Callable[[], T]) -> tuple[float, T | None, CallFailed | None]:
    at = time.monotonic()
    try:
        return at, ask(), None
    except CallFailed as e:
        return at, None, e


def _with_result(job: Job, status: JobStatus) -> tuple[JobStatus, str | None]:
    """Also its answer, as the workers wrote it. Raises CallFailed."""
    if status.answer is None:
        return status, None
    results = [status.answer.result]
    if status.in_parts:
        good = [part for part in status.answer.parts if part.ok]
        results = [b"".join(job.chunks(part)) for part in good]
    return status, "\n".join(result.decode().rstrip() for result in results)


def _submit_of(wanted: Wanted, job: Job | None, at: float, failure: CallFailed | None) -> Submit:
    how: Mapping[str, Any] = {"job": job.id} if job else _failed(failure)
    return Submit(
        wanted.id, at, time.monotonic(), wanted.mode, wanted.team, wanted.handler, wanted.key,
        ATTEMPTS_WITH_KEY if wanted.key else 1, wanted.expires_s is not None, **how,
    )  # fmt: skip


def _look_of(
    job: str,
    found: tuple[JobStatus, str | None] | None,
    at: float,
    failure: CallFailed | None,
    is_last: bool = False,
    asked: bool = True,
) -> Look:
    """asked: for its answer, too."""
    until = time.monotonic()
    if found is None:
        failed = _failed(failure)
        return Look(job, at, until, code=failed["code"], reason=failed["reason"], is_last=is_last)
    status, result = found
    answer = status.answer
    return Look(
        job, at, until, status.state, status.attempts, "OK", status.code.name, status.reason,
        asked and status.is_over, result,
        () if answer is None else tuple(
            (part.process_id, part.code.name, part.executed.name.lower()) for part in answer.parts
        ), is_last,
    )  # fmt: skip


def _failed(failure: CallFailed | None) -> dict[str, str]:
    assert failure is not None
    reason = str(failure)[:300]
    return {"code": failure.code.name, "executed": failure.executed.name.lower(), "reason": reason}
