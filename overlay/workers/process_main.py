"""The main loop of a handler's process: one request after the other, over a pipe to the parent.

    parent -> (payload, facts of the context, seconds left, whether a large result may be sent in
              chunks); None to stop
    child  -> once ("ready", (sources of the modules it has read, description of its function)) or
              ("cannot", problem); then for each request ("begun", None), any number of ("line",
              (level, text)), ("progress", a WorkProgress) and ("chunk", bytes), and one outcome as
              made by workers.job. The pipe buffers little, so that the handler waits until its
              chunks are taken

The process is restored after each request, or replaced, whatever a handler does to it. Its output
and log lines go to the parent's log, limited to the first lines of each request, so that they
cannot fill the disk, the memory or a pipe that is not read.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.jobs import WorkProgress
from overlay.model.topology import HandlerSpec
from overlay.observability.log_file import Printed, cut, redirect_to
from overlay.transport.chunks import Send
from overlay.workers import api, descendants, progress, typed
from overlay.workers.api import RECURSION_LIMIT, Context
from overlay.workers.job import outcome_of, outcome_of_error
from overlay.workers.user_modules import Source

LINES = 200  # logged per request
PROGRESS_S = 0.1  # between two reports of progress

Request = tuple[bytes, tuple[Any, ...], float, bool]
_facts_of = attrgetter(*(f.name for f in fields(Context) if not f.name.startswith("_")))


def request_of(payload: bytes, context: Context, in_chunks: bool) -> Request:
    return payload, _facts_of(context), context.remaining_s(), in_chunks


def serve(
    pipe: Connection, spec: HandlerSpec, folder: str, kept: Mapping[str, Source], max_bytes: int
) -> None:
    """Serves requests until it is stopped. Of results above `max_bytes` only the size is sent.

    kept: the sources to load the folder's modules from.
    """
    _set_up_process()
    parent = _Parent(pipe)
    _log_to(parent)
    progress.send_to(parent.progress)
    sources = api.add_folder(Path(folder), kept)
    try:
        loaded = typed.load(spec)
    except ConfigError as e:
        parent.end_with(("cannot", str(e)))
        return
    sources.keep_imported()
    home, me = os.getcwd(), os.getpid()
    found = {name: sources.kept[name] for name in sources.kept.keys() - kept}
    parent.end_with(("ready", (found, tuple(loaded.function))))
    while (request := _next(pipe)) is not None:
        _restore(parent, home)
        parent.begin()
        outcome = _work(loaded.call, request, max_bytes, parent.chunk)
        if os.getpid() != me:
            os._exit(0)  # a fork that the handler made and did not end must not answer
        parent.end_with(outcome)


class _Parent:
    """The sending end of the pipe, for the handler and for threads that it leaves running."""

    def __init__(self, pipe: Connection) -> None:
        self.out, self.err = Printed(self._printed, 1), Printed(self._printed, 2)
        self._pipe = pipe
        self._lock = threading.Lock()
        self._lines_left = LINES
        self._left_out = 0
        self._next_progress, self._is_running = 0.0, False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._silence)

    def begin(self) -> None:
        with self._lock:
            self._lines_left, self._left_out, self._is_running = LINES, 0, True
            self._pipe.send(("begun", None))

    def line(self, level: int, text: str) -> None:
        """Sends a line if a request is running and has lines left."""
        with self._lock:
            if self._lines_left:
                self._lines_left -= 1
                with contextlib.suppress(OSError):
                    self._pipe.send(("line", (level, cut(text))))
            else:
                self._left_out += 1

    def progress(self, made: WorkProgress) -> None:
        """Sends it, but no more than ten in a second; nothing if no request is running."""
        with self._lock:
            now = time.monotonic()
            if self._is_running and now >= self._next_progress:
                self._next_progress = now + PROGRESS_S
                with contextlib.suppress(OSError):
                    self._pipe.send(("progress", tuple(made)))

    def chunk(self, chunk: bytes) -> bool:
        with self._lock:
            self._pipe.send(("chunk", chunk))
        return True  # if the rest is no longer wanted, the parent kills this process

    def end_with(self, message: tuple[str, Any]) -> None:
        """Sends the last message of a request; no line follows it."""
        for stream in (self.out, self.err):
            stream.end_line()
        with self._lock:
            self._lines_left, self._is_running = 0, False
            if self._left_out:
                text = f"{self._left_out:,} more lines of this request are left out"
                self._pipe.send(("line", (logging.WARNING, text)))
            self._pipe.send(message)

    def _printed(self, text: str) -> None:
        self.line(logging.INFO, text)

    def _silence(self) -> None:
        # A fork's lines could corrupt the bytes of an answer, or belong to no request.
        self._lock = threading.Lock()
        self._lines_left, self._is_running = 0, False
        self._pipe.close()


class _ToParent(logging.Handler):
    def __init__(self, parent: _Parent) -> None:
        super().__init__(logging.INFO)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._parent.line(record.levelno, self.format(record))
        except Exception:  # noqa: BLE001 - a line that cannot be formatted does not fail the handler
            self.handleError(record)


def _set_up_process() -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    if os.name == "posix":
        os.setpgid(0, 0)  # so that programs started by the handler can be killed with it
    descendants.hold_together()
    # Programs that the handler starts inherit these, and must not keep the parent's output open.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.dup2(nowhere, fd)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _end_with_all()


def _end_with_all() -> NoReturn:
    descendants.end()
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _log_to(parent: _Parent) -> None:
    sys.stdout, sys.stderr = parent.out, parent.err
    logging.raiseExceptions = False
    handler = _ToParent(parent)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    redirect_to(handler)


def _next(pipe: Connection) -> Request | None:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, OSError):  # the parent has ended
        _end_with_all()


def _restore(parent: _Parent, home: str) -> None:
    sys.stdout, sys.stderr = parent.out, parent.err
    if sys.getrecursionlimit() != RECURSION_LIMIT:
        sys.setrecursionlimit(RECURSION_LIMIT)
    with contextlib.suppress(OSError):
        os.chdir(home)


def _context_of(facts: tuple[Any, ...], left_s: float) -> Context:
    context = Context(*facts)
    context.deadline = time.monotonic() + left_s  # the parent's may be another clock
    return context


def _work(
    call: Callable[..., Any], request: Request, max_bytes: int, send: Send
) -> tuple[str, Any]:
    payload, facts, left_s, in_chunks = request
    try:
        result = call(payload, _context_of(facts, left_s))
        return outcome_of(result, max_bytes, send if in_chunks else None)
    except BaseException as e:  # noqa: BLE001 - even SystemExit fails only one request
        sys.setrecursionlimit(RECURSION_LIMIT)  # a low one would break the error report
        return outcome_of_error(e)
