"""The log of one process: a line per event, in a file that cannot grow for ever.

Logging never stops the process. Lines pass through a bounded queue to one thread that writes them;
what does not fit, or cannot be written, is dropped and counted.

Owns that thread, from `start` to `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path

WAITING_LINES = 10_000
FILE_BYTES = 5 * 1024 * 1024
OLD_FILES = 3
LONGEST_LINE = 4096  # characters; a handler's traceback is cut here


class ProcessLog:
    """Where this process's log lines go. `dropped` counts those that were lost."""

    def __init__(self, path: Path, process_id: str) -> None:
        self.path = path
        self._into = _Bounded(queue.Queue(WAITING_LINES))
        self._file: _File | _Nowhere = _open(path, process_id) or _Nowhere()
        self._started = False
        self._listener = QueueListener(self._into.queue, *self._outputs(process_id))

    @property
    def dropped(self) -> int:
        return self._into.dropped + self._file.dropped

    def start(self) -> None:
        logging.raiseExceptions = False  # a full disk would print a traceback per line
        root = logging.getLogger("overlay")
        root.setLevel(logging.INFO)
        root.propagate = False
        root.addHandler(self._into)
        self._listener.start()
        self._started = True
        if isinstance(self._file, _Nowhere):
            root.warning("no log file: %s cannot be written", self.path)

    def stop(self) -> None:
        logging.getLogger("overlay").removeHandler(self._into)
        if self._started:
            self._started = False
            with contextlib.suppress(queue.Full):
                self._listener.stop()

    def _outputs(self, process_id: str) -> list[logging.Handler]:
        # Only a terminal: an unread pipe would fill up and stop the thread that writes.
        outputs: list[logging.Handler] = [self._file]
        if sys.stderr is not None and sys.stderr.isatty():
            console = logging.StreamHandler()
            console.setFormatter(_Line(process_id))
            outputs.append(console)
        return outputs


class _Bounded(QueueHandler):
    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1


class _Nowhere(logging.Handler):
    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.dropped += 1


class _File(RotatingFileHandler):
    dropped = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1


class _Line(logging.Formatter):
    """Time, process, logger, level, message: on one line, whatever is in the message."""

    def __init__(self, process_id: str) -> None:
        super().__init__(f"%(asctime)s {process_id} %(name)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def escaped(text: str) -> str:
    """The text on one line and without control characters, cut at 4,096 characters."""
    if len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}... ({len(text):,} characters)"
    text = text.replace("\n", " | ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _open(path: Path, process_id: str) -> _File | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _File(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8")
    except (OSError, ValueError):
        return None
    file.setFormatter(_Line(process_id))
    return file
