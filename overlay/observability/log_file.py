"""The log of one process: a line per event, in a file of bounded size.

Logging never blocks or ends the process. Lines pass through a bounded queue to one thread that
writes them; what does not fit, or cannot be written, is dropped and counted. Output of handlers is
limited to a modest rate, so that it neither fills the log nor pushes everything else out.

What a handler's module does to `logging`, as dictConfig does when it disables all loggers that it
does not know, affects the handler's loggers only: ours write to this log whatever is configured.

A log has one writer: the system holds a lock on process_a.lock, beside it, for as long as the
process lives. A second process with the same log refuses to start: that is nearly always a mistake,
and two processes that rotate one file leave a log that is of no use.

Owns that thread, "log", from `start` to `stop`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import logging
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from logging.handlers import QueueHandler, RotatingFileHandler
from pathlib import Path
from typing import Any

from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.observability.log_buffer import LONGEST, OF_HANDLERS, LogBuffer, escaped, texts_of
from overlay.observability.throttle import TokenBucket

WAITING_LINES = 10_000
FILE_BYTES = 5 * 1024 * 1024
OLD_FILES = 3
LONGEST_LINE = LONGEST  # characters; a handler's traceback is cut here
HANDLER_LINES = 1000  # of all handlers together, at once; after that so many a second:
HANDLER_LINES_S = 100
AGAIN_S = 1.0  # from a failed write to the next attempt
LOCK_PATIENCE_S = 3.0  # for a log whose process is about to end
LOCKED_BYTE = 1 << 20  # beyond the pid, as Windows lets no one read a locked byte
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
STOP_S = 2.0  # for the last lines; a disk that hangs does not hold the process longer


class ProcessLog:
    """Where this process's log lines go. `dropped` counts those that were lost.

    recent: the last of them, for the Logs call.
    """

    def __init__(self, path: Path, process_id: str) -> None:
        self.path = path
        self.recent = LogBuffer()
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(WAITING_LINES)
        self._into = _Bounded(self._lines, self.recent)
        self._file = _File(path)
        self._file.setFormatter(_Line(process_id))
        self._outputs = [self._file, *_consoles(process_id)]
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._streams = sys.stdout, sys.stderr
        self._lock: io.FileIO | None = None

    @property
    def dropped(self) -> int:
        return self._into.dropped + self._file.dropped

    def start(self) -> None:
        """Raises ConfigError when another process writes into the same file."""
        self._lock = _locked(self.path)
        logging.raiseExceptions = False  # a full disk would print a traceback per line
        root = logging.getLogger("overlay")
        root.setLevel(logging.INFO)
        root.propagate = False
        root.addHandler(self._into)
        lead_to(self._into)
        if not self._file.opens():
            root.warning("no log file: %s cannot be written", self.path)
        self._thread.start()

    def take_prints(self) -> None:
        """From now on what the process prints goes to the log, unless it goes to a terminal.

        A pipe that is not read would fill up and block every thread that prints.
        """
        log = logging.getLogger("overlay.handler")
        lead_to(self._into)  # the loggers made since the start, too

        def say(text: str) -> None:
            log.info("%s", text, extra={"request_id": _thread.request_id})

        for name, fd in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name) is None or not getattr(sys, name).isatty():
                setattr(sys, name, Printed(say, fd))

    def stop(self) -> None:
        lead_to(None)
        logging.getLogger("overlay").removeHandler(self._into)
        sys.stdout, sys.stderr = self._streams
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=STOP_S)
            self._thread.join(STOP_S)
        if self._lock is not None:
            self._lock.close()

    def _write(self) -> None:
        while (record := self._lines.get()) is not None:
            for output in self._outputs:
                output.handle(record)
        self._file.close()


def lead_to(into: logging.Handler | None) -> None:
    """Everything that our loggers log goes there from now on, however `logging` is configured.

    None: they become ordinary loggers again. Affects the loggers that exist by now.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and f"{name}.".startswith("overlay."):
            logger.__class__ = logging.Logger if into is None else _Ours
            logger.__dict__["into"] = into


class _Ours(logging.Logger):
    into: logging.Handler

    def isEnabledFor(self, level: int) -> bool:
        """INFO and above, and what a logger's own level adds to it."""
        return level >= min(self.level or logging.INFO, logging.INFO)

    def makeRecord(  # as logging does; a record factory set by a handler's module may fail
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: Mapping[str, object] | None = None,
        sinfo: str | None = None,
    ) -> logging.LogRecord:
        record = logging.LogRecord(name, level, fn, lno, msg, args, exc_info, func, sinfo)
        record.__dict__.update(extra or {})
        return record

    def handle(self, record: logging.LogRecord) -> None:
        self.into.handle(record)


def _locked(path: Path) -> io.FileIO | None:
    """Locks the log for this process, until the file is closed or the process ends.

    None where a lock is impossible: a read-only folder is no reason not to start. Raises
    ConfigError when another process holds the lock and does not end soon.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device gets no lock file
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path.with_suffix(".lock"), "a+")
    except (OSError, ValueError):
        return None
    until = time.monotonic() + LOCK_PATIENCE_S
    while not _takes(file):
        if time.monotonic() > until:
            file.seek(0)
            pid = file.read(20).decode("ascii", "replace").strip()
            file.close()
            who = f" (pid {pid})" if pid.isdigit() else ""
            raise ConfigError(
                f"{path} is the log of another process that runs{who}: stop that one, or give this "
                'one a "log_dir" of its own'
            )
        time.sleep(0.1)
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    return file


if sys.platform == "win32":
    import msvcrt

    def _takes(file: io.FileIO) -> bool:
        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as e:
            return e.errno not in TAKEN
        return True
else:
    import fcntl

    def _takes(file: io.FileIO) -> bool:
        # Not flock: a handler's child process would inherit that and hold it after we have ended.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            return e.errno not in TAKEN  # on a file system without locks there is none to respect
        return True


class _Thread(threading.local):
    """The request that a thread is working on, and the lines that it has begun to print."""

    def __init__(self) -> None:
        self.request_id = 0
        self.begun: dict[_Lines, bytes] = {}


_thread = _Thread()


def work_on(request_id: int) -> None:
    """From now on, what the calling thread prints is about this request."""
    if _thread.begun:
        for lines in list(_thread.begun):
            lines.end_line()
    _thread.request_id = request_id


class Printed(io.TextIOWrapper):
    """A standard output that passes whole lines to `say`. It holds at most one line of each thread,
    and cannot be closed.

    fd: where programs that inherit this output write.
    """

    def __init__(self, say: Callable[[str], None], fd: int) -> None:
        self._into = _Lines(say, fd)
        super().__init__(
            self._into,  # type: ignore[arg-type]
            encoding="utf-8",
            errors="backslashreplace",
            newline="\n",
            write_through=True,
        )

    def end_line(self) -> None:
        """Ends the line that the calling thread has begun."""
        self._into.end_line()

    def close(self) -> None:
        """Does nothing: a handler must not close it for the others."""


class _Lines(io.RawIOBase):
    def __init__(self, say: Callable[[str], None], fd: int) -> None:
        self._say = say
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        left_out = max(0, len(view) - 16 * LONGEST_LINE)
        text = _thread.begun.pop(self, b"") + bytes(view[: len(view) - left_out])
        *lines, rest = text.split(b"\n")
        if rest:
            _thread.begun[self] = rest[: 4 * LONGEST_LINE]
        for line in lines:
            self._say_bytes(line)
        if left_out:
            self._say(f"{left_out:,} more bytes printed at once are left out")
        return len(view)

    def end_line(self) -> None:
        self._say_bytes(_thread.begun.pop(self, b""))

    def close(self) -> None:
        pass

    def _say_bytes(self, line: bytes) -> None:
        if line.strip():
            self._say(cut(line.decode("utf-8", "backslashreplace")))


class _Bounded(QueueHandler):
    def __init__(self, lines: queue.Queue[logging.LogRecord | None], recent: LogBuffer) -> None:
        super().__init__(lines)
        self.dropped = 0
        self._recent = recent
        self._of_handlers = TokenBucket(HANDLER_LINES, HANDLER_LINES_S)
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(OF_HANDLERS) or self._has_room():
            self._keep(record)
            return
        self.dropped += 1
        if not self._told:
            self._told = True
            text = "handlers write more lines than the log takes; the rest is dropped and counted"
            facts = {"name": __name__, "msg": text, "levelno": 30, "levelname": "WARNING"}
            self._keep(logging.makeLogRecord(facts))

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        prepared = copy.copy(record)
        text = "".join(texts_of(record))
        prepared.msg = prepared.message = cut(text)  # the queue may hold ten thousand long ones
        prepared.args = prepared.exc_info = prepared.exc_text = prepared.stack_info = None
        return prepared

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1

    def _keep(self, record: logging.LogRecord) -> None:
        self._recent.handle(record)
        super().emit(record)

    def _has_room(self) -> bool:
        now = time.monotonic()
        self._told = self._told and not self._of_handlers.is_half_back(now)
        return self._of_handlers.take(now)


class _File(RotatingFileHandler):
    """Opens when it is needed, and again after any error."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", delay=True
        )
        self.dropped = 0
        self._not_before = 0.0

    def opens(self) -> bool:
        try:
            self._follow()
        except (OSError, ValueError):
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() < self._not_before:
            self.dropped += 1
            return
        try:
            self._follow()
        except (OSError, ValueError):
            self.handleError(record)
        else:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1
        self._not_before = time.monotonic() + AGAIN_S
        self._let_go()

    def _follow(self) -> None:
        """Opens the file at the path, also when the open one was moved or deleted."""
        if self.stream is not None and not self._is_open_file():
            self._let_go()
        if self.stream is None:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            self.stream = self._open()
            if _ends_within_a_line(self.baseFilename):  # a write failed half-way
                self.stream.write("\n")

    def _is_open_file(self) -> bool:
        try:
            here, opened = os.stat(self.baseFilename), os.fstat(self.stream.fileno())  # type: ignore[union-attr]
            return os.path.samestat(here, opened)
        except (OSError, ValueError):
            return False

    def _let_go(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # what it has not written is lost
                stream.close()


class _Line(logging.Formatter):
    """Time, process, logger, level and message, on one line whatever the message contains."""

    def __init__(self, process_id: str) -> None:
        super().__init__(f"%(asctime)s {process_id} %(name)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def cut(text: str) -> str:
    """The text, cut so that a line with its time and names is not too long."""
    most = LONGEST_LINE - 200
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _consoles(process_id: str) -> list[logging.Handler]:
    # Only to a terminal: a pipe that is not read would fill up and block the writing thread.
    if sys.stderr is None or not sys.stderr.isatty():
        return []
    console = logging.StreamHandler()
    console.setFormatter(_Line(process_id))
    return [console]


def _ends_within_a_line(path: str) -> bool:
    if not stat.S_ISREG(os.stat(path).st_mode):
        return False
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
