"""Writes the journal: one thread, and one commit for all changes that have gathered.

    do(change)  --> [ thread "jobs": begin, every change, the runner's turn, commit ] --> its Future
    ask(question) ->  the same thread, outside of the transaction                     --> its Future

So the cost of a commit, which waits for the disk, is shared by all who come meanwhile.

Of several leaders one has the jobs (`replicas`): the journals of the others refuse everything, and
say who has them.

Changes of two kinds: `do` is refused when the disk has no room; `record` must not be lost, as it
says how an attempt ended, so it is kept and tried again until there is room. A file beside the
journal, the ballast, is given up to make that room at once. Questions are answered all the time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from overlay.jobs.log import LogError, LogFull, Outrun
from overlay.jobs.replicas import Replica
from overlay.jobs.store import JobStore
from overlay.model import clocks as time
from overlay.model.errors import JournalFull, NoJournal, OverlayError
from overlay.model.jobs import TakenJob
from overlay.model.limits import MIB
from overlay.model.segments import Code, Executed

log = logging.getLogger(__name__)

T = TypeVar("T")
Change = Callable[[JobStore, float], Any]
"""(store, now in seconds since 1970) -> what its Future gets. Raises OverlayError to refuse."""

BATCH = 512  # changes in one commit, at most
BALLAST_BYTES = 8 * MIB
RESERVE_BYTES = 32 * MIB  # free space of the disk below which no job is accepted
LOOK_S = 1.0  # how often the disk and the time are looked at
STEP_S = 2.0  # by which the clock was set, if it and the monotonic one differ so much more
FORGOTTEN = 500  # old jobs in one commit
TIDY_S = 3600.0  # how often what was once asked is forgotten
RETRY_S = 0.5  # until changes are tried again that must not be lost
FOLLOW_S = 0.2  # between two looks at what the leader who has the jobs has done


class Runner(Protocol):
    """What the journal's thread does besides writing; see overlay.jobs.runner."""

    def wants(self, store: JobStore) -> bool:
        """Whether `take` would take any now."""

    def take(self, store: JobStore, now: float) -> Sequence[TakenJob]:
        """In the transaction, after the changes: marks jobs as running."""

    def committed(self, taken: Sequence[TakenJob], over: Sequence[int]) -> None:
        """After the commit. over: the numbers of jobs that have ended or were forgotten."""

    def running(self) -> Collection[int]:
        """The numbers of the jobs that were started here and have not ended."""

    def deposed(self) -> None:
        """Another leader has had the jobs: what was started here has come to nothing."""


class Journal:
    """Thread-safe. Owns the store from `start` to `close`."""

    def __init__(
        self,
        store: JobStore,
        runner: Runner,
        reserve_bytes: int = RESERVE_BYTES,
        replica: Replica | None = None,
    ) -> None:
        """replica: this leader's part among several; the store's file is its copy then."""
        self.problem = ""  # why no jobs are accepted now; empty: they are
        self._store = store
        self._runner = runner
        self._replica = replica
        self._has_jobs = replica is None
        self._term = 0  # that of the jobs that run here
        self._is_taken_up = False  # the store knows how the jobs stand
        self._is_recovered = False  # what another leader left running in this term
        self._reserve_bytes = reserve_bytes
        self._changes: queue.SimpleQueue[_Change] = queue.SimpleQueue()
        self._unwritten: list[_Change] = []  # that must not be lost; older than those in the queue
        self._is_down = False  # the last commit failed
        self._ballast = _Ballast(store.path)
        self._looked = 0.0
        self._next_look_back = self._next_tidying = 0.0
        self._offset = time.time() - time.monotonic()  # changes when the clock is set
        self._stopped = self._is_over = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._ballast.restore(self._reserve_bytes)
        self._thread.start()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._stopped = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(5)
        if self._replica is not None:
            self._replica.close()
        if not self._thread.is_alive():
            self._store.close()

    @property
    def elsewhere(self) -> str:
        """Why nothing can be asked of the jobs here: which leader has them. Empty if it can. Any
        thread."""
        return self._replica.refusal if self._replica is not None else ""

    def do(self, change: Callable[[JobStore, float], T]) -> Future[T]:
        """Its result, once it is on the disk; or the error that it raised, JournalFull if the disk
        has no room, NoJournal if the journal cannot be written."""
        return self._put(_Change(change))

    def ask(self, question: Callable[[JobStore, float], T]) -> Future[T]:
        """Its result. It changes nothing, so it is answered whatever the disk is like."""
        return self._put(_Change(question, asks=True))

    def record(self, change: Change) -> Future[Any]:
        """A change that must not be lost and refuses nothing. Ends when it is on the disk."""
        return self._put(_Change(change, must=True))

    def wake(self) -> None:
        """The runner may take more."""
        self._changes.put(_NOTHING)

    def _put(self, change: _Change) -> Future[Any]:
        self._changes.put(change)
        if self._is_over:  # nobody reads them any more
            self._refuse_all()
        return change.future

    # the thread

    def _run(self) -> None:
        # What is written may lead to more: a job that is started is refused at once, by a queue
        # that has closed, and that must be written too.
        while not (self._stopped and self._changes.empty()):
            self._turn(self._gather())
        self._is_over = True
        self._turn(self._gather())  # what came since
        if self._replica is not None:
            self._replica.leave()
        self._refuse_all()

    def _turn(self, batch: list[_Change]) -> None:
        try:
            if self._replica is not None:
                self._follow(self._replica, batch)
            if self._has_jobs:
                self._write(batch)
            else:
                self._refuse(batch)
        except Exception:  # a bug of ours costs one change, not those that came with it
            log.exception("the journal's thread failed")
            self._store.rollback()
            for one in batch:
                self._write_alone(one)

    def _follow(self, replica: Replica, batch: list[_Change]) -> None:
        """Takes the jobs up, or lays them down, as the log of all leaders has it."""
        replica.turn()
        if replica.has_jobs:
            if self._term != replica.term:
                self._forget_runs()
                self._term, self._is_recovered = replica.term, False
            if not self._is_taken_up:
                # After what is to be recorded: this may end jobs that are thought to be running.
                batch.append(_Change(self._take_up))
        else:
            self._lay_down()
        if self._term and not (replica.has_jobs or replica.is_in_doubt):
            self._forget_runs()
        self._has_jobs = replica.has_jobs

    def _lay_down(self) -> None:
        if self._is_taken_up:
            self._is_taken_up = False
            self._store.lay_down()

    def _forget_runs(self) -> None:
        self._term = 0
        self._runner.deposed()

    def _take_up(self, store: JobStore, now: float) -> None:
        before = store.recovered
        store.take_up(self._runner.running(), not self._is_recovered, now)
        if left := store.recovered - before:
            log.warning(
                "%d jobs were running when another leader had them: those with attempts left run "
                "again, the others are quarantined",
                left,
            )

    def _refuse(self, batch: list[_Change]) -> None:
        assert self._replica is not None
        error = _elsewhere(self._replica.refusal, Executed.NO)
        for one in batch:
            one.fail(error)
        if self._replica.is_in_doubt:
            self._unwritten = [one for one in batch if one.must]

    def _gather(self) -> list[_Change]:
        batch, self._unwritten = self._unwritten, []
        with contextlib.suppress(queue.Empty):
            patience_s = RETRY_S if batch else self._pause_s()
            one = (
                self._changes.get(timeout=patience_s)
                if patience_s and not self._stopped
                else self._changes.get_nowait()
            )
            while True:
                if one is not _NOTHING:
                    batch.append(one)
                if len(batch) >= BATCH:
                    break
                one = self._changes.get_nowait()
        return batch

    def _pause_s(self) -> float:
        if self._is_down:
            return RETRY_S
        if not self._has_jobs:
            return FOLLOW_S
        return 0.0 if not self._stopped and self._runner.wants(self._store) else LOOK_S

    def _write_alone(self, one: _Change) -> None:
        if one.future.done():
            return
        try:
            self._write([one])
        except Exception as e:
            log.exception("a change of the journal failed")
            self._store.rollback()
            one.fail(NoJournal(f"the journal could not be changed: {type(e).__name__}"))

    def _write(self, batch: list[_Change]) -> None:
        now = time.time()
        self._look(now)
        offset = now - time.monotonic()
        if abs(offset - self._offset) > STEP_S:
            log.warning("the clock was set by %+.0f s", offset - self._offset)
            self._next_look_back = self._next_tidying = now
            batch.append(_Change(lambda store, now: store.hurry(), must=True))
            self._offset = offset
        questions = [one for one in batch if one.asks]
        if questions:
            batch = [one for one in batch if not one.asks]
        self._change(batch, now)
        for one in questions:
            try:
                one.settle(one.apply(self._store, now), None)
            except OverlayError as e:
                one.fail(e)
            except sqlite3.Error as e:
                one.fail(NoJournal(f"the journal cannot be read: {e}"))

    def _change(self, batch: list[_Change], now: float) -> None:
        results: list[tuple[_Change, Any, OverlayError | None]] = []
        taken: Sequence[TakenJob] = ()
        is_due = self._store.next_wake <= now
        is_old = now >= self._next_look_back
        may_take = not (self._stopped or self._is_down)
        if not (batch or is_due or is_old or (may_take and self._runner.wants(self._store))):
            return
        try:
            self._store.begin()
            if is_due:
                self._store.wake(now)
            if is_old:
                self._next_look_back = now + self._look_back(now)
            for one in batch:
                try:
                    results.append((one, one.apply(self._store, now), None))
                except OverlayError as e:
                    results.append((one, None, e))
            if may_take:
                taken = self._runner.take(self._store, now)
            self._store.commit()
        except sqlite3.Error as e:
            self._store.rollback()
            self._failed(batch, e, "full" in str(e) or "disk I/O" in str(e))
            return
        except LogFull as e:
            self._store.rollback()
            self._failed(batch, e, is_full=True)
            return
        except LogError as e:
            self._store.rollback()
            self._not_appended(batch, e)
            return
        self._is_taken_up = self._is_recovered = True
        if self._is_down:
            self._is_down = False
            log.info("the journal is written again", extra={"kind": "log"})
        for one, result, error in results:
            one.settle(result, error)
        self._runner.committed(taken, self._store.take_over())

    def _not_appended(self, batch: list[_Change], error: LogError) -> None:
        """Another leader was faster, or it is not known whether it was appended."""
        assert self._replica is not None
        log.warning("the jobs' log: %s", error, extra={"kind": "failure"})
        self._replica.lose()
        self._has_jobs = False
        self._lay_down()
        was_outrun = isinstance(error, Outrun)
        reason = "another leader has them" if was_outrun else str(error)
        executed = Executed.NO if was_outrun else Executed.UNKNOWN
        for one in batch:
            one.fail(_elsewhere(f"the jobs were not changed: {reason}", executed))
        self._unwritten = [one for one in batch if one.must]

    def _failed(self, batch: list[_Change], error: Exception, is_full: bool) -> None:
        """Nothing of the batch is on the disk."""
        self._unwritten = [one for one in batch if one.must]
        if not self._is_down:
            log.error("the journal cannot be written: %s", error, extra={"kind": "failure"})
        self._is_down = bool(self._unwritten) or not is_full
        gave = is_full and bool(self._unwritten) and self._ballast.give_up()
        refused: OverlayError = (
            JournalFull(_FULL_LOG if isinstance(error, LogFull) else _FULL)
            if is_full
            else NoJournal(f"the journal cannot be written: {error}")
        )
        self.problem = str(refused)
        for one in batch:
            if not one.must:
                one.fail(refused)
        if gave:
            log.warning("the disk is full: %d MiB of ballast were given up", BALLAST_BYTES // MIB)

    def _look(self, now: float) -> None:
        """At the disk's free space, and at what is old, once a second."""
        if abs(now - self._looked) < LOOK_S:
            return
        self._looked = now
        free = _free_bytes(self._store.path)
        if free is not None and free < self._reserve_bytes:
            if not self.problem:
                log.warning("the disk has only %d MiB left: no jobs are accepted", free // MIB)
            self.problem = f"the leader's disk has only {free // MIB} MiB left"
        elif not self._is_down:
            self.problem = ""
            self._ballast.restore(self._reserve_bytes)

    def _look_back(self, now: float) -> float:
        """Forgets what is old. Returns after how many seconds to do so again."""
        if now >= self._next_tidying:
            self._next_tidying = now + TIDY_S
            self._store.forget_kinds()
        return 0.0 if self._store.forget_old(now, FORGOTTEN) == FORGOTTEN else LOOK_S

    def _refuse_all(self) -> None:
        while True:
            try:
                one = self._changes.get_nowait()
            except queue.Empty:
                return
            one.fail(NoJournal("the leader is stopping"))


class _Change:
    """must: it must not be lost. asks: it changes nothing."""

    __slots__ = ("_apply", "asks", "future", "must")

    def __init__(self, apply: Change, must: bool = False, asks: bool = False) -> None:
        self.must = must
        self.asks = asks
        self.future: Future[Any] = Future()
        self._apply = apply

    def apply(self, store: JobStore, now: float) -> Any:
        return self._apply(store, now)

    def settle(self, result: Any, error: OverlayError | None) -> None:
        if error is not None:
            self.fail(error)
        elif not self.future.done():
            self.future.set_result(result)

    def fail(self, error: OverlayError) -> None:
        if not self.must and not self.future.done():
            self.future.set_exception(error)


def _elsewhere(reason: str, executed: Executed) -> NoJournal:
    return NoJournal(reason, code=Code.UNAVAILABLE, executed=executed, retry_after_s=RETRY_S)


_FULL = "the leader's disk is full: nothing was accepted"
_FULL_LOG = "the jobs' servers have no room: nothing was accepted"
_NOTHING = _Change(lambda store, now: None, must=True)


class _Ballast:
    """A file that holds room on the disk for the answers of jobs that run."""

    def __init__(self, path: str | Path) -> None:
        self._path = None if str(path) == ":memory:" else Path(f"{path}-ballast")

    def restore(self, reserve_bytes: int) -> None:
        """Makes it if it is not there and the disk has room. It is filled with random bytes, which
        no file system compresses or leaves out."""
        if self._path is None or self._path.exists():
            return
        free = _free_bytes(self._path)
        if free is None or free < reserve_bytes + BALLAST_BYTES:
            return
        try:
            with open(self._path, "xb") as file:
                for _ in range(BALLAST_BYTES // MIB):
                    file.write(os.urandom(MIB))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            log.warning("no ballast beside the journal: %s", e)
            self.give_up()

    def give_up(self) -> bool:
        """Whether there was one."""
        if self._path is None:
            return False
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False


def _free_bytes(path: str | Path) -> int | None:
    if str(path) == ":memory:":
        return None
    try:
        return shutil.disk_usage(Path(path).absolute().parent).free
    except OSError:
        return None
