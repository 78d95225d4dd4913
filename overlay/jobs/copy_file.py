"""A leader's copy of the jobs that several leaders keep: an SQLite file, and which entry of the log
it has got to.

    the holder    its transactions are noted, statement by statement, and are appended to the log
                  before they are committed here: `on_commit`
    the others    `apply` what the log has

So the file holds nothing that the log has not, and may lose its last commits with the power: they
are read from the log again. Belongs to one thread.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from overlay.jobs import journal_file, statements
from overlay.jobs.changes import Change
from overlay.jobs.log import LogAway
from overlay.model.errors import ConfigError

BACKUP_PAGES = 2000  # between two looks at what else is to do

_POSITION = """
create table if not exists copied(
  id integer primary key check(id = 1), sequence integer not null, origin text not null,
  holder blob not null)
"""


class Position(NamedTuple):
    """Up to which entry of which log the file goes, and the entry with which the leader who had the
    jobs there had taken over; empty if none had them."""

    sequence: int = 0
    origin: str = ""
    holder: bytes = b""


class CopyFile:
    """As a connection for JobStore. Raises ConfigError if the file cannot be used.

    on_commit: appends the changes of a transaction to the log and returns the entry's number;
    raises LogError, and the transaction is still open then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.on_commit: Callable[[Sequence[Change]], int] = _nowhere
        self.position = Position()
        self._changes: list[Change] = []
        self._marks: list[int] = []  # how many changes there were at each open savepoint
        self._db = self._opened()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        number = statements.NUMBERS.get(statement)
        if number is not None:
            cursor = self._db.execute(statement, values)
            self._changes.append((number, values))
            return cursor
        verb = statement.split(maxsplit=1)[0]
        if verb == "commit":
            return self._commit()
        if verb not in _HARMLESS:
            raise AssertionError(f"a change that no other leader would make: {statement}")
        cursor = self._db.execute(statement, values)
        if verb == "savepoint":
            self._marks.append(len(self._changes))
        elif verb == "release":
            self._marks.pop()
        elif verb == "begin" or statement == "rollback":
            self._changes.clear()
            self._marks.clear()
        elif verb == "rollback":  # to the last savepoint
            del self._changes[self._marks[-1] :]
        return cursor

    def set_progress_handler(self, handler: Callable[[], Any] | None, n: int) -> None:
        self._db.set_progress_handler(handler, n)

    def close(self) -> None:
        self._db.close()

    def apply(self, transactions: Iterable[Sequence[Change]], position: Position) -> None:
        """What other leaders did, up to there. Raises sqlite3.Error; nothing is changed then."""
        self._db.execute("begin immediate")
        try:
            for changes in transactions:
                for number, values in changes:
                    self._db.execute(statements.ALL[number], values).close()
            self._note(position)
            self._db.execute("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("rollback")
            raise
        self.position = position

    def back_up(self, path: Path, meanwhile: Callable[[], object]) -> int:
        """Writes a copy of the file, and returns up to which entry it goes. meanwhile: called now
        and then, outside of a transaction. Raises sqlite3.Error."""
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as made:
            made.execute("pragma synchronous = off")  # it is read once, by this process
            self._db.backup(made, pages=BACKUP_PAGES, progress=lambda *pages: meanwhile())
        return self.position.sequence

    def replace(self, path: Path) -> None:
        """By a file that another leader has made. Raises ConfigError if it is none; the own file is
        kept then."""
        with contextlib.closing(journal_file.opened(path, lambda db: None, is_copy=True)) as made:
            (whole,) = made.execute("pragma quick_check(1)").fetchone()
            if whole != "ok" or _schema(made) != _schema(self._db):
                raise ConfigError(f"journal: {path} is not a whole copy of the jobs")
        self._db.close()
        for ending in ("-wal", "-shm"):
            Path(f"{self.path}{ending}").unlink(missing_ok=True)
        path.replace(self.path)
        self._db = self._opened()

    @property
    def bytes(self) -> int:
        (pages,), (size,) = (
            self._db.execute(f"pragma {name}").fetchone() for name in ("page_count", "page_size")
        )
        return int(pages * size)

    def _opened(self) -> sqlite3.Connection:
        return journal_file.opened(self.path, self._read_position, is_copy=True)

    def _read_position(self, db: sqlite3.Connection) -> None:
        (has_jobs,) = db.execute("select exists(select 1 from sqlite_sequence)").fetchone()
        (is_copy,) = db.execute(
            "select exists(select 1 from sqlite_master where name = 'copied')"
        ).fetchone()
        if has_jobs and not is_copy:
            raise ConfigError(
                f"journal: {self.path} holds jobs of its own and is no copy of those on the NATS "
                "servers; move it away"
            )
        db.execute(_POSITION)
        found = db.execute("select sequence, origin, holder from copied").fetchone()
        self.position = Position(*(found or ()))

    def _commit(self) -> sqlite3.Cursor:
        if not self._changes:
            return self._db.execute("commit")
        position = self.position._replace(sequence=self.on_commit(self._changes))
        try:
            self._note(position)
            cursor = self._db.execute("commit")
        except sqlite3.Error as e:  # it is read from the log again
            raise LogAway(f"it is in the log, and the leader's own copy has an error: {e}") from e
        self.position = position
        self._changes.clear()
        return cursor

    def _note(self, position: Position) -> None:
        self._db.execute("insert or replace into copied values(1, ?, ?, ?)", position)


def _schema(db: sqlite3.Connection) -> list[Any]:
    """A trigger, say, would be executed with our statements."""
    return db.execute("select type, name, sql from sqlite_master order by 1, 2").fetchall()


_HARMLESS = ("select", "begin", "rollback", "savepoint", "release", "pragma")


def _nowhere(changes: Sequence[Change]) -> int:
    raise LogAway("this leader does not have the jobs")
