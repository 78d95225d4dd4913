"""The record of a map's results in a file, from which the map goes on after an interruption.

    open_record(path, kind) --> check(payloads) --> look_up(payloads) --> add(result) --> commit()

An SQLite file, with a row for each result: the index of its payload, a digest of the payload, and
the result. Its process keeps it locked, and no other can open it. Results are added in memory and
committed together; they are read one by one, so memory does not grow with the file. Owns no thread.

The journal is a write-ahead log (FILE-wal, which the last close removes): what was committed
survives the process, and after a power cut the file is intact but may lack the last seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import sqlite3
import stat
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from overlay.client.outbox import CallKind
from overlay.model import clocks as time
from overlay.model.errors import ResumeError
from overlay.transport import environment

log = logging.getLogger("overlay.client")

COMMIT_S = 0.02  # between two commits: what a kill may lose; a commit takes about 0.2 ms
COMMIT_BYTES = 8 * 1024 * 1024  # or earlier, because they are held in memory
CHECK_ROWS = 512  # compared at once before anything is sent
CHECK_BYTES = 256 * 1024 * 1024  # a file up to this is checked whole when it is opened, in a second
MAX_SHOWN = 3  # payloads that a refusal names

APPLICATION_ID = 0x6F766C79  # "ovly"
FORMAT = 1  # user_version: a release that reads another one refuses this
SCHEMA = """\
CREATE TABLE map (handler TEXT NOT NULL, mode TEXT NOT NULL, team TEXT NOT NULL, input TEXT NOT NULL);
CREATE TABLE results (
    payload INTEGER PRIMARY KEY, digest BLOB NOT NULL, checksum INTEGER NOT NULL, result BLOB NOT NULL
);
"""  # noqa: E501
ABOUT = ("handler", "mode", "team", "input")


def open_record(
    path: str, kind: CallKind, has_values: bool, name_of: Callable[[int], str] | None = None
) -> Record:
    """Opens the record of a map, or begins one if there is no such file.

    has_values: the payloads are the args of a typed function. name_of: what a person calls the
    payload with an index. Raises ResumeError: the file is in use, damaged, another program's or
    another map's (and is left as it is), or it cannot be written.
    """
    path = os.path.abspath(path)
    route = kind.route
    about = (
        route.handler,
        route.mode.name.lower(),
        route.team,
        "args" if has_values else "payloads",
    )
    _check_file(path)
    with _explained(path):
        # One lock of this class guards it: asyncio commits on other threads.
        db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        with _explained(path):
            _lock(db)
            last = _begin(db, about) if _is_empty(db) else _read_about(db, path, about)
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return Record(path, db, last, name_of or _payload)


class Record:
    """An open record. Safe from any thread.

    path: absolute. last: the highest index with a result when the file was opened, -1 without any.
    recalled: results that this map took from the file. added: those that it committed to it.
    """

    def __init__(
        self, path: str, db: sqlite3.Connection, last: int, name_of: Callable[[int], str]
    ) -> None:
        self.path = path
        self.last = last
        self.recalled = self.added = 0
        self._name_of = name_of
        self._db: sqlite3.Connection | None = db
        self._lock = threading.Lock()
        self._pending: list[tuple[int, bytes, int, bytes]] = []
        self._pending_bytes = 0  # about; of the results only
        self._committed_at = -math.inf
        environment.remember(self)

    def __del__(self) -> None:
        self.close()

    @property
    def is_pending(self) -> bool:
        """Whether something was added since the last commit."""
        return bool(self._pending)

    @property
    def is_due(self) -> bool:
        """Whether to call `commit` now."""
        return bool(self._pending) and (
            time.monotonic() - self._committed_at >= COMMIT_S or self._pending_bytes >= COMMIT_BYTES
        )

    def check(self, payloads: Iterable[bytes]) -> None:
        """Compares the payloads, from the first one on, with those that have a result.

        Takes no more of them than that needs. Raises ResumeError that names what differs.
        """
        digests = map(_digest, payloads)
        differing: list[int] = []  # the first of them
        first = compared = changed = 0
        while first <= self.last:
            rows = list(itertools.islice(digests, min(CHECK_ROWS, self.last + 1 - first)))
            known = self._known(first, len(rows))
            compared += len(known)
            others = [index for index, digest in known if rows[index - first] != digest]
            changed += len(others)
            differing += others[: MAX_SHOWN - len(differing)]
            first += len(rows)
            if not rows:
                break
        if changed or first <= self.last:
            raise self._differ(differing, changed, compared, first)

    def check_end(self, count: int) -> None:
        """Raises ResumeError if there is a result beyond the first `count` payloads."""
        if count <= self.last:
            raise self._differ((), 0, 0, count)

    def look_up(self, first: int, payloads: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
        """The digests of consecutive payloads, and which of them have a result.

        first: the index of the first one. Returns rows, ascending, counted from `first`. Raises
        ResumeError if a result is that of another payload.
        """
        digests = [_digest(payload) for payload in payloads]
        if first > self.last:
            return digests, []
        known = self._known(first, len(payloads))
        others = [index for index, digest in known if digests[index - first] != digest]
        if others:
            raise self._differ(others[:MAX_SHOWN], len(others), len(known), self.last + 1)
        return digests, [index - first for index, _ in known]

    def results(self, first: int, count: int) -> Recorded:
        """The results of consecutive payloads that have one."""
        return Recorded(self, first, count)

    def result(self, index: int) -> bytes:
        """Raises ResumeError if it cannot be read, or is not what was written."""
        with self._lock, _explained(self.path):
            if self._db is None:
                raise ResumeError(f"'{self.path}' is closed")
            found = self._db.execute(_RESULT, (index,)).fetchone()
        if found is None or type(found[1]) is not bytes or zlib.crc32(found[1]) != found[0]:
            why = f"the result of {self._name_of(index)} is not what was written"
            raise ResumeError(_damaged(self.path, why))
        self.recalled += 1
        return found[1]

    def add(self, index: int, digest: bytes, result: bytes) -> None:
        """Adds a result to those that are committed next. Does not block."""
        self._pending.append((index, digest, zlib.crc32(result), result))
        self._pending_bytes += len(result)

    def commit(self) -> None:
        """Writes what was added. Raises ResumeError; what was committed before is kept."""
        with self._lock:
            if self._db is None:
                return
            rows = self._pending[:]  # others may be added meanwhile
            self._pending_bytes = 0
            if rows:
                try:
                    _write(self._db, rows)
                except sqlite3.Error as e:
                    raise ResumeError(
                        f"cannot write '{self.path}': {e}; the results that it has stay, and the "
                        "same map goes on from there when this is put right"
                    ) from None
                # Only now: what an interrupted commit did not write is written by the next one.
                del self._pending[: len(rows)]
                self.added += len(rows)
            self._committed_at = time.monotonic()

    def finish(self) -> None:
        """Commits what was added, and closes the file. Raises ResumeError as `commit` does."""
        self.commit()
        self.close()

    def close(self) -> None:
        """The same after an error, of which the caller knows: another one is only logged."""
        if self._db is None:
            return
        try:
            self.commit()
        except ResumeError as e:
            log.warning("%s", e)
        with self._lock:
            db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def leave_behind(self) -> None:
        """See environment.Forkable."""
        self._lock = threading.Lock()  # the parent may have held it during the fork
        db, self._db = self._db, None
        if db is not None:
            # Closing it would write the parent's file, so not even the end of the child may do it.
            import ctypes

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))

    def _known(self, first: int, count: int) -> list[tuple[int, bytes]]:
        """The index and the payload's digest of each result among these, in order."""
        with self._lock, _explained(self.path):
            if self._db is None:
                raise ResumeError(f"'{self.path}' is closed")
            return self._db.execute(_KNOWN, (first, first + count)).fetchall()

    def _differ(self, shown: Sequence[int], changed: int, compared: int, count: int) -> ResumeError:
        """shown: the first of those that changed. count: of the payloads, as far as is known."""
        differences = []
        if changed:
            names = ", ".join(map(self._name_of, shown))
            names += f" and {changed - len(shown):,} more" if changed > len(shown) else ""
            differences.append(f"changed: {names} (of {compared:,} compared)")
        if count <= self.last:
            differences.append(f"there were at least {self.last + 1:,}, and now {count:,}")
        return ResumeError(
            f"'{self.path}' has the results of other payloads; {'; '.join(differences)}: {_REMEDY}"
        )


class Recorded:
    """Results in a record; each is read when it is taken."""

    def __init__(self, record: Record, first: int, count: int) -> None:
        self._record = record
        self._indexes = range(first, first + count)

    def __len__(self) -> int:
        return len(self._indexes)

    def __iter__(self) -> Iterator[bytes]:
        return map(self._record.result, self._indexes)


_KNOWN = "SELECT payload, digest FROM results WHERE payload >= ? AND payload < ? ORDER BY payload"
_RESULT = "SELECT checksum, result FROM results WHERE payload = ?"
_ADD = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)"
_REMEDY = "give the payloads of the first run (more may follow them), or name another file"


def _digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=16).digest()


def _payload(index: int) -> str:
    return f"payload {index}"


def _write(db: sqlite3.Connection, rows: list[tuple[int, bytes, int, bytes]]) -> None:
    if db.in_transaction:  # Ctrl-C interrupted the last one
        db.execute("ROLLBACK")
    try:
        db.execute("BEGIN")
        db.executemany(_ADD, rows)
        db.execute("COMMIT")
    except sqlite3.Error:
        with contextlib.suppress(sqlite3.Error):  # a full disk rolls back by itself
            db.execute("ROLLBACK")
        raise


# Opening


def _check_file(path: str) -> None:
    """Raises ResumeError if the file is neither a record, nor missing or empty."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(path)):
            raise ResumeError(f"cannot use '{path}': there is no such folder") from None
        return
    except OSError as e:
        raise ResumeError(f"cannot use '{path}': {e.strerror or e}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ResumeError(f"'{path}' is not a file: name one for the results")
    if not found.st_size:
        return
    # Immutable: it is neither changed nor locked. Not by open(): the end of that would also end
    # this process's locks, if it uses the same file for another map.
    uri = Path(path).as_uri()
    if not uri.startswith("file:///"):  # a share of Windows, which SQLite writes in this way
        uri = uri.replace("file://", "file:////")
    with (
        _explained(path),
        contextlib.closing(sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)) as db,
    ):
        # A kill may leave a file that is too short until its log is read; this accepts it.
        db.execute("PRAGMA writable_schema = ON")
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise ResumeError(_foreign(path))
    if version != FORMAT:
        raise ResumeError(
            f"'{path}' is of another release of this program (format {version}, this one has "
            f"{FORMAT}): name another file"
        )


def _lock(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA locking_mode = EXCLUSIVE")  # from now on until it is closed
    db.execute("BEGIN EXCLUSIVE")


def _is_empty(db: sqlite3.Connection) -> bool:
    """Also after a kill while it was begun, which is undone when it is opened."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    return not tables and pages <= 1  # a file that lost its tables is damaged, and not empty


def _begin(db: sqlite3.Connection, about: Sequence[str]) -> int:
    for statement in SCHEMA.split(";\n"):
        db.execute(statement)
    db.execute("INSERT INTO map VALUES (?, ?, ?, ?)", about)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {FORMAT}")
    return -1


def _read_about(db: sqlite3.Connection, path: str, about: Sequence[str]) -> int:
    """The highest index with a result. Raises ResumeError if it is another map's, or damaged."""
    if os.path.getsize(path) <= CHECK_BYTES:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise ResumeError(_damaged(path, " ".join(found.split())))
    recorded = db.execute("SELECT handler, mode, team, input FROM map").fetchone()
    if recorded is None:
        raise ResumeError(_damaged(path, "it does not say of which map it is"))
    differing = [
        f"{name} {was!r} there, {now!r} now"
        for name, was, now in zip(ABOUT, recorded, about, strict=True)
        if was != now
    ]
    if differing:
        raise ResumeError(
            f"'{path}' has the results of another map: {'; '.join(differing)}: go on with the "
            "options of the first run, or name another file"
        )
    (last,) = db.execute("SELECT max(payload) FROM results").fetchone()
    return -1 if last is None else last


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns an error of SQLite into a ResumeError that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as e:
        if "locked" in str(e):
            raise ResumeError(
                f"'{path}' is in use by another map: wait for its end, or name another file"
            ) from None
        raise ResumeError(f"cannot use '{path}': {e}; its folder must be writable, too") from None
    except sqlite3.DatabaseError as e:
        is_other = "not a database" in str(e)
        raise ResumeError(_foreign(path) if is_other else _damaged(path, str(e))) from None


def _foreign(path: str) -> str:
    return f"'{path}' is not a file of a map's results, and is left as it is: name another file"


def _damaged(path: str, why: str) -> str:
    return (
        f"'{path}' is damaged ({why}), and is left as it is: put back a copy, or name another "
        "file, and all payloads are sent again"
    )
