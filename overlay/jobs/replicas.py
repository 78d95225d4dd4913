"""One leader's part among several that keep the same jobs: it has them, or follows who has.

    follows    --silence, then its takeover is the next entry-->      has the jobs
    has them   --an append fails, or its outcome is not known-->      follows, its own work in doubt
    in doubt   --it is up to date, and nobody has taken over-->       has them again
    in doubt   --it reads another's takeover-->                       follows

The log decides: an entry is appended only behind the last one, which an author must have read. So a
leader that was frozen, or cut off, writes nothing once another has taken over, whatever it thinks.

Runs on the journal's thread, but for the upload of a snapshot, which has one of its own.
"""

from __future__ import annotations

import logging
import random
import secrets
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from overlay.jobs import changes
from overlay.jobs.changes import BadEntry, Change, Entry, Holder, Kind
from overlay.jobs.copy_file import CopyFile, Position
from overlay.jobs.log import Log, LogAway, LogError, LogFull, Outrun
from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.limits import MIB

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0  # after which one who has the jobs says so, if it had nothing else to say
SILENCE_S = 4.0  # of one who has the jobs, after which another takes over, and up to
JITTER_S = 1.0  # so much more, as all others hear the same silence
FREE_JITTER_S = 0.3  # the same when nobody has them
HEAD_START_S = 2.0  # of one who has the jobs, when the log can be written again: a try takes 1.5
SNAPSHOT_BYTES = 64 * MIB  # of the log, below which no snapshot is made
LOOK_S = 5.0  # between two looks at the log's size


def patience_s(holder: Holder | None, me: Holder, chance: float) -> float:
    """Seconds of silence after which to take over. holder: who has the jobs, as far as is known.
    chance: from 0 to 1."""
    if holder is None:
        return chance * FREE_JITTER_S
    if holder.id == me.id:  # this process, before it was started again
        return 0.0
    return SILENCE_S + chance * JITTER_S


def may_take_over(silence_s: float, patience: float, writable_s: float | None) -> bool:
    """writable_s: for how long the log can be written; None: it cannot. One who has the jobs says
    so at once when it can be written again, so it has a head start."""
    if writable_s is None or silence_s < patience:
        return False
    return patience < SILENCE_S or writable_s >= HEAD_START_S


def needs_snapshot(log_bytes: int, file_bytes: int) -> bool:
    return log_bytes > max(SNAPSHOT_BYTES, 2 * file_bytes)


class Replica:
    """holder: who has the jobs, as far as is known. has_jobs: this process has. term: rises when it
    gets them from another. problem: why it cannot follow; empty if it can."""

    def __init__(self, log_: Log, file: CopyFile, id_: str, address: str) -> None:
        self.me = Holder(secrets.token_bytes(changes.AUTHOR_BYTES), id_, address)
        self.holder = _holder_in(file)
        self.has_jobs = False
        self.term = 0
        self.problem = ""
        self._log = log_
        self._file = file
        self._read = file.position.sequence  # the last entry that was read, or was appended here
        self._parts: list[bytes] = []  # of a transaction that has not been read to its end
        self._origin = ""
        self._heard = self._spoken = time.monotonic()
        self._writable_since: float | None = None
        self._chance = random.random()
        self._next_look = 0.0
        self._snapshot: threading.Thread | None = None
        file.on_commit = self._append_changes

    def turn(self) -> None:
        """Follows, takes over, or says that it still has the jobs. Never raises."""
        try:
            if self.has_jobs:
                self._keep()
            else:
                self._follow()
        except Outrun:
            pass  # what is there instead is read in the next turn
        except BadEntry as e:
            self._complain(f"what follows entry {self._read} of the jobs' log cannot be used: {e}")
        except LogError as e:
            self._complain(f"no majority of the jobs' servers can be reached: {e}")
        except (sqlite3.Error, ConfigError, OSError) as e:
            self._complain(f"the leader's copy of the jobs cannot be used: {e}")

    def lose(self) -> None:
        """An append failed, or its outcome is not known."""
        if self.has_jobs:
            self.has_jobs = False
            self._read = self._file.position.sequence
            self._parts.clear()
            self._writable_since = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether it had the jobs, and nobody else is known to have taken over."""
        return not self.has_jobs and self._is_mine

    @property
    def _is_mine(self) -> bool:
        return self.holder is not None and self.holder.author == self.me.author

    @property
    def refusal(self) -> str:
        """Why nothing can be asked of the jobs here; empty if it can."""
        if self.has_jobs:
            return ""
        if self.holder is not None and not self._is_mine:
            return f"the jobs are with {self.holder}"
        return self.problem or "no leader has the jobs yet"

    def leave(self) -> None:
        """Gives the jobs up, if it has them."""
        if not self.has_jobs:
            return
        self.has_jobs = False
        try:
            self._append(Entry(Kind.LEAVE, self.me.author))
        except LogError as e:
            log.info("the jobs were not given up in order: %s", e)

    def close(self) -> None:
        self._log.close()
        if self._snapshot is not None:
            self._snapshot.join(5)

    # having the jobs

    def _append_changes(self, made: Sequence[Change]) -> int:
        if not self.has_jobs:
            raise LogAway("this leader does not have the jobs")
        body = changes.write_changes(made)
        for entry in changes.parts(self.me.author, body, self._log.max_bytes):
            self._append(entry)
        return self._read

    def _append(self, entry: Entry) -> None:
        self._read = self._log.append(self._read, entry.written())
        self._spoken = time.monotonic()

    def _keep(self) -> None:
        try:
            self._say_so()
        except LogFull:
            pass  # nobody else can take over either; a snapshot makes room
        except LogError:
            self.lose()
            raise
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._save_if_large()

    def _say_so(self) -> None:
        if time.monotonic() - self._spoken >= HEARTBEAT_S:
            self._append(Entry(Kind.HEARTBEAT, self.me.author))

    def _save_if_large(self) -> None:
        is_busy = self._snapshot is not None and self._snapshot.is_alive()
        if is_busy or not needs_snapshot(self._log.size(), self._file.bytes):
            return
        path = Path(f"{self._file.path}-snapshot")
        self._apply((), self._read, self.me)  # so that heartbeats are purged too
        sequence = self._file.back_up(path, self._say_so)
        self._snapshot = threading.Thread(
            target=self._save, args=(sequence, path), name="jobs-snapshot", daemon=True
        )
        self._snapshot.start()

    def _save(self, sequence: int, path: Path) -> None:
        try:
            self._log.save(sequence, path)
            log.info("a snapshot of the jobs was kept, up to entry %d", sequence)
        except (LogError, OSError) as e:
            log.warning("no snapshot of the jobs could be kept: %s", e, extra={"kind": "failure"})
        finally:
            path.unlink(missing_ok=True)

    # following

    def _follow(self) -> None:
        self._check_origin()
        while found := self._log.entries(self._read):
            if found[0][0] != self._read + 1:
                self._load(found[0][0])
            else:
                self._take_in(found)
            self._heard = time.monotonic()
        if self._is_mine:  # whatever it appended before was read, or will never be there
            self._append(Entry(Kind.HEARTBEAT, self.me.author))
            self.has_jobs = True
        else:
            self._maybe_take_over()
        if self.problem:
            log.info("the jobs are followed again", extra={"kind": "log"})
            self.problem = ""

    def _check_origin(self) -> None:
        self._origin = self._origin or self._log.origin()
        if self._file.position.origin not in ("", self._origin):
            raise ConfigError(
                f"{self._file.path} is of other servers, or these have lost their jobs. If what is "
                "on the servers is right, move this file away"
            )

    def _take_in(self, found: Sequence[tuple[int, bytes]]) -> None:
        """Applies the transactions that end in these entries, all or none."""
        transactions: list[list[Change]] = []
        parts, holder, complete = list(self._parts), self.holder, 0
        for expected, (number, data) in enumerate(found, self._read + 1):
            if number != expected:
                raise BadEntry(f"entry {number} comes where {expected} should")
            entry = changes.read(data)
            if entry.kind is Kind.CHANGES:
                parts = [entry.body] if entry.is_first else [*parts, entry.body]
                if entry.is_last:
                    transactions.append(changes.read_changes(b"".join(parts)))
                    parts, complete = [], number
            elif entry.kind is Kind.TAKEOVER:
                parts, holder = [], changes.read_holder(entry)
            elif entry.kind is Kind.LEAVE:
                holder = None
        is_news = holder != self.holder
        if transactions or is_news:
            sequence = found[-1][0] if not parts else complete or self._file.position.sequence
            self._apply(transactions, sequence, holder)
        self._read, self._parts = found[-1][0], parts
        if is_news:
            self._has_moved(holder)

    def _has_moved(self, holder: Holder | None) -> None:
        self.holder = holder
        self._chance = random.random()
        self.term += self._is_mine
        log.info("%s has the jobs", holder or "no leader", extra={"kind": "log"})

    def _apply(
        self, made: Sequence[Sequence[Change]], sequence: int, holder: Holder | None
    ) -> None:
        said = b"" if holder is None else changes.takeover(holder).written()
        self._file.apply(made, Position(sequence, self._origin, said))

    def _load(self, first: int) -> None:
        """The entries before `first` were purged: everything up to there is in a snapshot."""
        path = Path(f"{self._file.path}-loaded")
        try:
            sequence = self._log.load(path)
            if sequence + 1 < first:
                raise LogAway(f"entry {self._read + 1} is gone, and no snapshot goes so far")
            self._file.replace(path)
        finally:
            for ending in ("", "-wal", "-shm"):
                Path(f"{path}{ending}").unlink(missing_ok=True)
        if self._file.position.sequence != sequence:
            raise BadEntry(f"the snapshot of entry {sequence} says it is of another")
        self._read, self._parts = sequence, []
        log.info("the jobs were read from a snapshot, up to entry %d", sequence)
        self._has_moved(_holder_in(self._file))

    # taking over

    def _maybe_take_over(self) -> None:
        now = time.monotonic()
        silence_s = now - self._heard
        patience = patience_s(self.holder, self.me, self._chance)
        if silence_s + HEAD_START_S < patience:
            self._writable_since = None
            return
        try:
            self._log.size()
        except LogError:
            self._writable_since = None
            raise
        if self._writable_since is None:
            self._writable_since = now
        if may_take_over(silence_s, patience, now - self._writable_since):
            self._append(changes.takeover(self.me))
            self._apply((), self._read, self.me)
            self._has_moved(self.me)
            self.has_jobs = True

    def _complain(self, problem: str) -> None:
        if not self.problem:
            log.warning("%s", problem, extra={"kind": "failure"})
        self.problem = problem


def _holder_in(file: CopyFile) -> Holder | None:
    """Who had the jobs at the entry that the file has got to."""
    try:
        return changes.read_holder(changes.read(file.position.holder))
    except BadEntry:
        return None
