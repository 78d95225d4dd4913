"""Runs handlers in processes, for functions that compute: a process can be killed.

    one thread per slot  == its own pipe ==>  its own process, started by spawn on every system

The processes share nothing, so each may be killed at any moment, by this pool or by anyone else:
only the request that it is running fails. A request that a process provably did not start is given
to another one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
from multiprocessing import connection
from typing import Any

import psutil

from overlay.model import clocks as time
from overlay.model.errors import ConfigError, HandlerFailed
from overlay.model.limits import MIB, Limits
from overlay.model.segments import Code, Detail, Executed
from overlay.model.signatures import Function
from overlay.model.topology import HandlerSpec
from overlay.transport.chunks import ChunkWriter
from overlay.workers import descendants, progress
from overlay.workers.api import Context
from overlay.workers.job import HandlerJob, read_outcome
from overlay.workers.process_main import request_of, serve
from overlay.workers.user_modules import Sources

log = logging.getLogger(__name__)
handler_log = logging.getLogger("overlay.handler")

IMPORT_S = 60.0  # for importing a handler's modules
CHECK_S = 0.1  # between two checks of a busy process: is it alive, how much memory does it use
TRIES = 3  # processes that a request is given to, if each ends before it starts the request


class ProcessRunner:
    """Owns `slots` threads, "handler-NAME-n", each with a process, until `close`."""

    def __init__(
        self,
        spec: HandlerSpec,
        slots: int,
        sources: Sources,
        max_bytes: int = Limits.max_message_bytes,
    ) -> None:
        """Raises ConfigError if the handler cannot be imported in a child."""
        self.function = Function(spec.name)
        self._spec = spec
        self._slots = slots
        self._sources = sources
        self._max_bytes = max_bytes
        # Each job is in it once for each of its rows.
        self._todo: queue.SimpleQueue[HandlerJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[tuple[HandlerJob, int], _Child] = {}
        self._children: set[_Child] = set()
        self._closed = False
        atexit.register(self.close)  # otherwise multiprocessing would wait for them at exit
        try:
            first = self._new_child()
        except BaseException:
            self.close()
            raise
        for n in range(slots):
            name = f"handler-{spec.name}-{n + 1}"
            args = (first if n == 0 else None,)
            threading.Thread(target=self._serve, args=args, name=name, daemon=True).start()

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [child.pid for child in self._children]

    def submit(self, job: HandlerJob) -> None:
        for _ in range(job.waiting):
            self._todo.put(job)

    def may_run_here(self, job: HandlerJob) -> bool:
        return False

    def run_here(self, job: HandlerJob) -> None:
        self.submit(job)

    def end(self, job: HandlerJob, start: int, count: int) -> None:
        """Kills the processes that work on these rows."""
        rows = range(start, start + count)
        with self._lock:  # without it, a process might go on to another row meanwhile
            for (other, row), child in self._running.items():
                if other is job and row in rows:
                    child.kill()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            children = list(self._children)
        for _ in range(self._slots):
            self._todo.put(None)
        for child in children:
            child.kill()
        for child in children:
            child.wait(5)
        atexit.unregister(self.close)

    def _serve(self, child: _Child | None) -> None:
        while not self._closed:
            child = child or self._maybe_child()
            job = self._todo.get()
            if job is None:
                break
            child = self._work_on(job, child)

    def _work_on(self, job: HandlerJob, child: _Child | None) -> _Child | None:
        """Runs one row; returns the process if it can run another."""
        if child is not None and not child.is_idle:
            log.warning("handler %s: an idle process had ended", self._spec.name)
            self._drop(child)
            child = None
        child = child or self._maybe_child()
        row = job.begin_next()
        if row is None:
            return child
        began, writer = time.monotonic(), job.writer_of(row) if job.in_chunks else None
        outcome, child = self._run(job, row, child, writer)
        with self._lock:
            self._running.pop((job, row), None)
        now = time.monotonic()
        if now >= job.segment.deadline:
            outcome = job.too_late()
        read_s = writer.waited_s if writer else 0.0
        job.done([(row, outcome)], now - began - read_s, began)
        return self._reusable(child)

    def _run(
        self, job: HandlerJob, row: int, child: _Child | None, writer: ChunkWriter | None
    ) -> tuple[bytes | Detail, _Child | None]:
        context = job.context(row)
        payload = job.segment.payloads.items[row]
        for _ in range(TRIES):
            if child is None:
                break
            with self._lock:
                self._running[job, row] = child
            if context.cancelled:  # `end` was called before the process was registered
                return self._ended(), child
            message = child.ask(payload, context, self._spec.limit_s or math.inf, writer)
            if message is not None and message[0] not in _FATAL:
                return read_outcome(self._spec.name, *message, context.request_id), child
            exitcode = self._drop(child)
            if context.cancelled or self._closed:
                return self._ended(), None
            if message is not None:
                return self._fatal(*message, exitcode, context.request_id), None
            child = self._maybe_child()
        reason = f"no process for handler '{self._spec.name}' can be started; see this worker's log"
        return Detail(Code.UNAVAILABLE, reason, Executed.NO), None

    def _ended(self) -> Detail:
        return _failure(f"the process of handler '{self._spec.name}' was ended")

    def _fatal(
        self, kind: str, value: Any, exitcode: int | None, request_id: int
    ) -> bytes | Detail:
        spec = self._spec
        if kind == "late":
            return _failure(f"handler '{spec.name}' ran longer than its limit_s {spec.limit_s:g}")
        if kind == "memory":
            used = f"{value / MIB:,.0f} MiB"
            return _failure(
                f"handler '{spec.name}' used {used}, more than its memory_mib {spec.memory_mib}"
            )
        how = f"its process ended with {_exit(exitcode)}"
        return read_outcome(spec.name, "failed", how, request_id)

    def _reusable(self, child: _Child | None) -> _Child | None:
        """The process, unless it has reached max_requests or uses too much memory."""
        if child is None:
            return None
        is_worn_out = child.requests >= (self._spec.max_requests or math.inf)
        if is_worn_out or child.memory_too_large():
            child.retire()
            self._drop(child)
            return None
        return child

    def _maybe_child(self) -> _Child | None:
        try:
            return self._new_child()
        except ConfigError as e:
            if not self._closed:
                log.error("handler %s: no process can be started: %s", self._spec.name, e)
            return None

    def _new_child(self) -> _Child:
        """Starts a process and waits until it has imported the handler. Raises ConfigError."""
        spec = self._spec
        try:
            child = _Child(spec, self._sources, self._max_bytes)
        except OSError as e:
            raise ConfigError(f"handler '{spec.name}': a process cannot be started: {e}") from None
        with self._lock:
            self._children.add(child)
            closed = self._closed
        if closed:
            child.kill()
        kind, value = child.receive(time.monotonic() + IMPORT_S)
        if kind == "ready":
            found, function = value
            self._sources.add(found)
            self.function = Function(*function)
            return child
        problem = value
        if kind != "cannot":
            problem = f"handler '{spec.name}': the process that imports '{spec.call}' "
            problem += "ended" if kind == "lost" else f"did not end within {IMPORT_S:g} s"
        self._drop(child)
        raise ConfigError(problem)

    def _drop(self, child: _Child) -> int | None:
        """Ends the process; returns its exit code."""
        child.kill()
        child.wait(5)
        child.close_pipe()
        with self._lock:
            self._children.discard(child)
        return child.exitcode


class _Child:
    """One process and the pipe to it. For one thread; `kill` is safe from any."""

    def __init__(self, spec: HandlerSpec, sources: Sources, max_bytes: int) -> None:
        """Starts it. Raises OSError."""
        self.requests = 0
        self._max_memory = (spec.memory_mib or 0) * MIB
        self._next_check = 0.0
        self._kill_lock = threading.Lock()
        self._gone = False
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        args = (theirs, spec, sources.folder, dict(sources.kept), max_bytes)
        self._process = spawn.Process(target=serve, args=args, name=spec.name)
        with theirs, _starting:
            _ensure_folder(sources.folder)
            self._process.start()

    @property
    def is_idle(self) -> bool:
        """Whether it is alive and has sent nothing."""
        return self._process.is_alive() and not self._has_data()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def ask(
        self, payload: bytes, context: Context, limit_s: float, writer: ChunkWriter | None
    ) -> tuple[str, Any] | None:
        """The outcome, or how the process ended; None if it provably did not start the request.

        writer: takes the chunks of a large result, as fast as the caller reads them.
        """
        self.requests += 1
        until, begun = time.monotonic() + limit_s, False
        about = {"request_id": context.request_id}
        try:
            self._pipe.send(request_of(payload, context, writer is not None))
        except (OSError, ValueError):  # the request was not written completely: it cannot start
            return None
        while True:
            kind, value = self.receive(until)
            if kind == "begun":
                begun = True
            elif kind == "line":
                level, text = value
                handler_log.log(level, "%s", text, extra=about)
            elif kind == "progress":
                progress.note(context.request_id, *value[1:])
            elif kind == "chunk" and writer is not None:
                waited_s = writer.waited_s
                if not writer.send(value):
                    return "lost", None
                until += writer.waited_s - waited_s
            elif kind == "lost" and not begun:
                return None
            else:
                return kind, value

    def receive(self, until: float) -> tuple[str, Any]:
        """The next message; "late" at `until`, "lost" if the process ended, "memory" and bytes."""
        while True:
            wait_s = max(0.0, min(CHECK_S, until - time.monotonic()))
            ready = connection.wait([self._pipe, self._process.sentinel], wait_s)
            if self._pipe in ready:
                return self._read()
            if ready:
                return self._read() if self._has_data() else ("lost", None)
            now = time.monotonic()
            if now >= until:
                return "late", None
            if now >= self._next_check:
                self._next_check = now + CHECK_S
                if used := self.memory_too_large():
                    return "memory", used
                # A fork of it may hold the pipe open, which then never reports the end.
                if self._has_ended() and not self._has_data():
                    return "lost", None

    def memory_too_large(self) -> int:
        """Its memory in bytes if that exceeds the limit, else 0."""
        if not self._max_memory:
            return 0
        with contextlib.suppress(psutil.Error):
            used: int = psutil.Process(self._process.pid).memory_info().rss
            return used if used > self._max_memory else 0
        return 0

    def retire(self) -> None:
        """Gives it a second to exit by itself, then kills its descendants."""
        started = descendants.started_by(self._process.pid)
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self.wait(1)
        descendants.kill(started)

    def close_pipe(self) -> None:
        self._pipe.close()

    def kill(self) -> None:
        """Kills it and its descendants."""
        with self._kill_lock:
            if not self._gone:
                started = descendants.started_by(self._process.pid)
                self._process.kill()
                _kill_group(self._process.pid or 0)
                descendants.kill(started)

    def wait(self, within_s: float) -> None:
        """Waits until it has ended, at most for this time."""
        until = time.monotonic() + within_s
        while not self._has_ended() and time.monotonic() < until:
            connection.wait([self._process.sentinel], 0.02)
            time.sleep(0.001)  # the sentinel may be ready shortly before the process has ended
        with self._kill_lock:
            if not self._gone and self._has_ended():
                _kill_group(self._process.pid or 0)  # a group keeps its id while it has members
                self._gone = True  # from now on its pid may be reused

    def _has_ended(self) -> bool:
        # There is no exit code if other code has waited for it, such as os.wait() in a handler.
        return self._process.exitcode is not None or not psutil.pid_exists(self._process.pid or 0)

    def _has_data(self) -> bool:
        """Whether there is something to read, possibly the end of the pipe."""
        with contextlib.suppress(OSError):  # Windows raises it if the other end is closed
            return self._pipe.poll(0)
        return True

    def _read(self) -> tuple[str, Any]:
        try:
            return self._pipe.recv()  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001 - a truncated message, or one that is not ours
            return "lost", None


_FATAL = ("lost", "late", "memory")
_starting = threading.Lock()  # multiprocessing's list of children is not thread-safe


def _failure(reason: str) -> Detail:
    return Detail(HandlerFailed.code, reason, Executed.YES)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _ensure_folder(folder: str) -> None:
    # Spawn calls getcwd, but a handler on a thread may have changed into a folder now removed.
    try:
        os.getcwd()
    except OSError:
        os.chdir(folder)


def _kill_group(pid: int) -> None:
    if os.name == "posix":
        with contextlib.suppress(OSError):  # the group does not exist yet, or no longer
            os.killpg(pid, signal.SIGKILL)
