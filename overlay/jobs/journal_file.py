"""Opens the file of the jobs, or makes it. One that cannot be used is left as it is.

One connection, which locks the file for itself: so a second leader is kept out, and the fault in
SQLite's write-ahead log that needs two connections (3.7.0 to 3.51.2, "WAL reset") cannot occur. A
commit is on the disk when it returns (synchronous=FULL; on macOS that needs fullfsync).
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from overlay.model.errors import ConfigError

APPLICATION_ID, FORMAT = 0x4F766C4A, 1  # "OvlJ"; FORMAT rises when older releases cannot read it
OLDEST_SQLITE = (3, 35, 0)  # for RETURNING
LOCK_S = 3.0  # how long to wait for a leader that is just ending: it closes its port first

_SCHEMA = """
create table kind(
  id integer primary key, address text not null, name text not null, handler text not null,
  request blob not null, unique(address, name, request));
create table job(
  id integer primary key autoincrement, mark integer not null, kind integer not null,
  state integer not null, ready integer not null, priority integer not null, due real not null,
  expires real, accepted real not null, started real, ended real, limit_s real not null,
  attempts integer not null default 0, max_attempts integer not null, refusals integer not null
  default 0, fetched integer not null default 0, size integer not null, key text, digest blob,
  code integer not null default 0, reason text not null default '', schedule integer,
  story text not null default '[]');
create table payload(job integer primary key, body blob not null);
create table answer(job integer primary key, body blob not null);
create table schedule(
  id integer primary key autoincrement, mark integer not null, kind integer not null,
  priority integer not null, limit_s real not null, max_attempts integer not null, key text,
  every_s real not null, next real not null, expires_s real, accepted real not null,
  missed integer not null default 0, payload blob not null, last integer);
create index job_waiting on job(kind, priority desc, id) where state = 0 and ready = 1;
create index job_due on job(due) where state = 0 and ready = 0;
create index job_expires on job(expires) where state = 0 and expires is not null;
create index job_state on job(state, id);
create index job_ended on job(ended) where ended is not null;
create index job_fetched on job(ended) where fetched = 1;
create unique index job_key on job(kind, key) where key is not null;
create index schedule_next on schedule(next);
"""
# Of the parts of jobs in parts; the first files of this format have no such table.
_CHUNKS = """
create table if not exists chunk(
  job integer not null, worker text not null, at integer not null, body blob not null,
  primary key(job, worker, at))
"""


def opened(
    path: str | Path, recover: Callable[[sqlite3.Connection], None], is_copy: bool = False
) -> sqlite3.Connection:
    """A connection that belongs to the calling process alone. Raises ConfigError.

    path: ":memory:" for a file that is kept nowhere. recover: looks at what is there, and changes
    it, in one transaction with the making of the file. is_copy: of what is kept elsewhere, so a
    commit need not wait for the disk.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ConfigError(
            f"journal: this Python has SQLite {sqlite3.sqlite_version}, and jobs need "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or newer: use a newer Python"
        )
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, timeout=LOCK_S, isolation_level=None, check_same_thread=False)
        db.execute("pragma locking_mode = exclusive")
        is_new = _is_new(db, path)  # before anything that would change another program's file
        db.execute("pragma journal_mode = wal")
        db.execute(f"pragma synchronous = {'normal' if is_copy else 'full'}")
        if sys.platform == "darwin":
            db.execute("pragma fullfsync = 1")
            db.execute("pragma checkpoint_fullfsync = 1")
        db.execute("pragma cache_size = -16000")  # KiB
        with _transaction(db):
            if is_new:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"pragma application_id = {APPLICATION_ID}")
                db.execute(f"pragma user_version = {FORMAT}")
            db.execute(_CHUNKS)
            if not is_copy:  # what is changed here from now on, no other leader has
                db.execute("drop table if exists copied")
            recover(db)
    except BaseException as e:
        if db is not None:
            db.close()
        if isinstance(e, sqlite3.Error):
            raise _unusable(path, e) from None
        raise
    return db


def _is_new(db: sqlite3.Connection, path: str | Path) -> bool:
    """Whether the journal has to be made. Raises ConfigError for a file that is something else."""
    application, version = (
        db.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    (tables,) = db.execute("select count(*) from sqlite_master").fetchone()
    if not tables and not application:
        return True
    if application != APPLICATION_ID:
        raise ConfigError(f"journal: {path} is another program's file")
    if version != FORMAT:
        raise ConfigError(
            f"journal: {path} is of format {version}, and this release reads {FORMAT}"
        )
    return False


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("begin exclusive")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("rollback")
        raise
    db.execute("commit")


def _unusable(path: str | Path, error: sqlite3.Error) -> ConfigError:
    reason = str(error)
    if "locked" in reason:
        why = "another process has it open: is the leader already running?"
    elif "not a database" in reason:
        why = (
            "it is not a journal, or is damaged. Give the journal another name, or restore the file"
        )
    elif "malformed" in reason:
        why = (
            f"it is damaged ({reason}). Nothing in it was changed. Copy it and the file ending in "
            "-wal beside it, and recover what is readable with: "
            f"sqlite3 {path} .recover | sqlite3 recovered.db; then name recovered.db as the journal"
        )
    else:
        why = f"{reason}. Its folder must exist, have room, and be writable"
    return ConfigError(f"journal: {path} cannot be used: {why}")
