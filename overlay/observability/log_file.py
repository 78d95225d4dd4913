"""The log of one process: one line per event, in files of bounded size.

Logging never blocks or ends the process. Lines pass through a bounded queue to one thread that
writes them; what does not fit, or cannot be written, is dropped and counted. The output of handlers
is limited to a modest rate, so that it does not displace everything else.

What a handler's module does to `logging` affects only the handler's loggers: the overlay's write to
this log whatever is configured, even if dictConfig disables all loggers that it does not know.

A log has one writer, which holds a lock on process_a.lock beside it for as long as it lives. A
second process with the same log refuses to start: that is nearly always a mistake, and two
processes that rotate one file make a useless log.

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
from overlay.observability.log_buffer import HANDLER_LOGGER, MAX_LINE, LogBuffer, escaped, texts_of
from overlay.observability.throttle import TokenBucket

MAX_QUEUED = 10_000  # lines
FILE_BYTES = 5 * 1024 * 1024
OLD_FILES = 3
HANDLER_LINES = 1000  # of all handlers together, at once; then this many a second:
HANDLER_LINES_S = 100
RETRY_S = 1.0  # from a failed write to the next attempt
LOCK_PATIENCE_S = 3.0  # for a log whose process is about to end
LOCKED_BYTE = 1 << 20  # after the pid, because Windows does not let others read a locked byte
LOCK_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
STOP_S = 2.0  # for the last lines; a hanging disk does not hold up the process for longer


class ProcessLog:
    """The log of this process. dropped: how many lines were lost. recent: the last ones, for the
    Logs call."""

    def __init__(self, path: Path, process_id: str) -> None:
        self.path = path
        self.recent = LogBuffer()
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_QUEUED)
        self._handler = _BoundedHandler(self._lines, self.recent)
        self._file = _FileHandler(path)
        self._file.setFormatter(_LineFormatter(process_id))
        self._outputs = [self._file, *_consoles(process_id)]
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._streams = sys.stdout, sys.stderr
        self._lock: io.FileIO | None = None

    @property
    def dropped(self) -> int:
        return self._handler.dropped + self._file.dropped

    def start(self) -> None:
        """Raises ConfigError when another process writes to the same file."""
        self._lock = _lock(self.path)
        logging.raiseExceptions = False  # a full disk would print a traceback per line
        root = logging.getLogger("overlay")
        root.setLevel(logging.INFO)
        root.propagate = False
        root.addHandler(self._handler)
        redirect_to(self._handler)
        if not self._file.try_open():
            root.warning("no log file: %s cannot be written", self.path)
        self._thread.start()

    def capture_prints(self) -> None:
        """Sends the process's standard output and errors to the log, unless they are a terminal.

        A pipe that is not read would fill up and block every thread that prints.
        """
        log = logging.getLogger(HANDLER_LOGGER)
        redirect_to(self._handler)  # includes loggers made since the start

        def log_line(text: str) -> None:
            log.info("%s", text, extra={"request_id": _thread.request_id})

        for name, fd in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name) is None or not getattr(sys, name).isatty():
                setattr(sys, name, Printed(log_line, fd))

    def stop(self) -> None:
        redirect_to(None)
        logging.getLogger("overlay").removeHandler(self._handler)
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


def redirect_to(handler: logging.Handler | None) -> None:
    """Sends all records of the overlay's existing loggers there, however `logging` is configured.

    None: they become ordinary loggers again.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and f"{name}.".startswith("overlay."):
            logger.__class__ = logging.Logger if handler is None else _OverlayLogger
            logger.__dict__["handler"] = handler


class _OverlayLogger(logging.Logger):
    handler: logging.Handler

    def isEnabledFor(self, level: int) -> bool:
        """INFO and above, or lower if the logger's own level is."""
        return level >= min(self.level or logging.INFO, logging.INFO)

    def makeRecord(  # without the record factory, which a handler's module may have replaced
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
        self.handler.handle(record)


def _lock(path: Path) -> io.FileIO | None:
    """Locks the log for this process, until the file is closed or the process ends.

    None where a lock is impossible: a read-only folder does not prevent a start. Raises ConfigError
    when another process holds the lock and does not end soon.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device gets no lock file
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path.with_suffix(".lock"), "a+")
    except (OSError, ValueError):
        return None
    until = time.monotonic() + LOCK_PATIENCE_S
    while not _try_lock(file):
        if time.monotonic() > until:
            file.seek(0)
            pid = file.read(20).decode("ascii", "replace").strip()
            file.close()
            owner = f" (pid {pid})" if pid.isdigit() else ""
            raise ConfigError(
                f"{path} is the log of another process that runs{owner}: stop that one, or give "
                'this one a "log_dir" of its own'
            )
        time.sleep(0.1)
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    return file


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: io.FileIO) -> bool:
        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as e:
            return e.errno not in LOCK_TAKEN
        return True
else:
    import fcntl

    def _try_lock(file: io.FileIO) -> bool:
        # Not flock: a handler's child process would inherit it and keep it after this process ends.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            return e.errno not in LOCK_TAKEN  # otherwise the file system does not support locks
        return True


class _Thread(threading.local):
    """The request that a thread works on, and its unfinished lines of output."""

    def __init__(self) -> None:
        self.request_id = 0
        self.unfinished: dict[_LineWriter, bytes] = {}


_thread = _Thread()


def set_request(request_id: int) -> None:
    """Attributes what the calling thread prints from now on to this request."""
    if _thread.unfinished:
        for writer in list(_thread.unfinished):
            writer.end_line()
    _thread.request_id = request_id


class Printed(io.TextIOWrapper):
    """A standard output that passes whole lines to `on_line`. It buffers at most one line of each
    thread, and cannot be closed.

    fd: where programs that inherit this output write.
    """

    def __init__(self, on_line: Callable[[str], None], fd: int) -> None:
        self._writer = _LineWriter(on_line, fd)
        super().__init__(
            self._writer,  # type: ignore[arg-type]
            encoding="utf-8",
            errors="backslashreplace",
            newline="\n",
            write_through=True,
        )

    def end_line(self) -> None:
        """Ends the calling thread's unfinished line."""
        self._writer.end_line()

    def close(self) -> None:
        """Does nothing: a handler must not close it for the others."""


class _LineWriter(io.RawIOBase):
    def __init__(self, on_line: Callable[[str], None], fd: int) -> None:
        self._on_line = on_line
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        left_out = max(0, len(view) - 16 * MAX_LINE)
        text = _thread.unfinished.pop(self, b"") + bytes(view[: len(view) - left_out])
        *lines, rest = text.split(b"\n")
        if rest:
            _thread.unfinished[self] = rest[: 4 * MAX_LINE]
        for line in lines:
            self._pass_on(line)
        if left_out:
            self._on_line(f"{left_out:,} more bytes printed at once are left out")
        return len(view)

    def end_line(self) -> None:
        self._pass_on(_thread.unfinished.pop(self, b""))

    def close(self) -> None:
        pass

    def _pass_on(self, line: bytes) -> None:
        if line.strip():
            self._on_line(cut(line.decode("utf-8", "backslashreplace")))


class _BoundedHandler(QueueHandler):
    def __init__(self, lines: queue.Queue[logging.LogRecord | None], recent: LogBuffer) -> None:
        super().__init__(lines)
        self.dropped = 0
        self._recent = recent
        self._handler_lines = TokenBucket(HANDLER_LINES, HANDLER_LINES_S)
        self._warned = False

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(HANDLER_LOGGER) or self._has_room():
            self._keep(record)
            return
        self.dropped += 1
        if not self._warned:
            self._warned = True
            text = "handlers write more lines than the log takes; the rest is dropped and counted"
            facts = {"name": __name__, "msg": text, "levelno": 30, "levelname": "WARNING"}
            self._keep(logging.makeLogRecord(facts))

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        prepared = copy.copy(record)
        text = "".join(texts_of(record))
        prepared.msg = prepared.message = cut(text)  # the queue may hold ten thousand long lines
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
        self._warned = self._warned and not self._handler_lines.is_half_full(now)
        return self._handler_lines.take(now)


class _FileHandler(RotatingFileHandler):
    """Opens the file when needed, and again after any error."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", delay=True
        )
        self.dropped = 0
        self._retry_at = 0.0

    def try_open(self) -> bool:
        try:
            self._ensure_open()
        except (OSError, ValueError):
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() < self._retry_at:
            self.dropped += 1
            return
        try:
            self._ensure_open()
        except (OSError, ValueError):
            self.handleError(record)
        else:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1
        self._retry_at = time.monotonic() + RETRY_S
        self._close_stream()

    def _ensure_open(self) -> None:
        """Opens the file at the path, also if the open one was moved or deleted."""
        if self.stream is not None and not self._is_current():
            self._close_stream()
        if self.stream is None:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            self.stream = self._open()
            if _ends_within_a_line(self.baseFilename):  # a write was interrupted
                self.stream.write("\n")

    def _is_current(self) -> bool:
        try:
            here, opened = os.stat(self.baseFilename), os.fstat(self.stream.fileno())  # type: ignore[union-attr]
            return os.path.samestat(here, opened)
        except (OSError, ValueError):
            return False

    def _close_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # what it could not write is lost
                stream.close()


class _LineFormatter(logging.Formatter):
    """Time, process, logger, level and message, always on one line."""

    def __init__(self, process_id: str) -> None:
        super().__init__(f"%(asctime)s {process_id} %(name)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def cut(text: str) -> str:
    """The text, cut so that it fits into a line with its time and names."""
    limit = MAX_LINE - 200
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def _consoles(process_id: str) -> list[logging.Handler]:
    # Only a terminal: a pipe that is not read would fill up and block the writing thread.
    if sys.stderr is None or not sys.stderr.isatty():
        return []
    console = logging.StreamHandler()
    console.setFormatter(_LineFormatter(process_id))
    return [console]


def _ends_within_a_line(path: str) -> bool:
    if not stat.S_ISREG(os.stat(path).st_mode):
        return False
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
