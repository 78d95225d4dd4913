"""Passes requests from an event loop to the library's threads, and answers back to the loop.

Requests of one turn of the loop leave together, and the answers of one frame are delivered
together. Nothing here blocks the loop: waiting for a connection, closing one and unary calls run on
"overlay-asyncio" threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from overlay.client.arguments import CallOptions
from overlay.client.connection import Connection
from overlay.client.outbox import CallKind, Submission
from overlay.client.results import NOT_PICKLED
from overlay.client.submitter import Submitter
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.limits import Limits

Result = TypeVar("Result")
Take = Callable[[Sequence[int], Any, int, int], None]
"""Like outbox.Deliver, but called on the event loop."""
Read = Callable[[Any, int, int, float], Any]
"""(the Delivery or Detail, the row in it, the request id, the timeout in seconds)"""


class AsyncCallFuture(asyncio.Future[Any]):
    """The Future of one request; cancel() cancels the request.

    read: makes the result of a Delivery, or raises CallFailed.
    """

    submission: Submission | None = None
    row = 0

    def __init__(self, bridge: LoopBridge, options: CallOptions, read: Read) -> None:
        super().__init__(loop=bridge.loop)
        self.payload = options.body
        self._bridge = bridge
        self._timeout_s = options.timeout_s
        self._read = read

    def take(self, delivered: Any, at: int, request_id: int) -> None:
        if self.done():
            return
        try:
            self.set_result(self._read(delivered, at, request_id, self._timeout_s))
        except CallFailed as e:
            self.set_exception(e)

    def fail(self, error: Exception) -> None:
        if not self.done():
            self.set_exception(error)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.submission is not None:
            self._bridge.connection.cancel(self.submission, (self.row,))
        return cancelled


class LoopBridge:
    """Sends the requests of one event loop, and delivers their answers to it, in batches."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self.connection = connection
        self._patience_s = patience_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[tuple[CallKind, float], list[AsyncCallFuture]] = {}
        self._deliveries: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._submitter: Submitter | None = None
        self._is_scheduled = False  # the loop has yet to run the deliveries
        self._weak_wake = _weak(self._wake)
        self._connecting: dict[float, asyncio.Task[None]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.Future[None]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that uses this client. Raises RuntimeError in another loop, or in none."""
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running
        if self._loop is not running:
            self.connection.check_same_process()
            raise RuntimeError("this client belongs to another event loop; make one in each")
        return running

    def ask(self, options: CallOptions, read: Read) -> AsyncCallFuture:
        future = AsyncCallFuture(self, options, read)
        if not self._pending:
            self.loop.call_soon(self._flush)
        self._pending.setdefault((options.kind, options.timeout_s), []).append(future)
        return future

    def send(
        self,
        kind: CallKind,
        payloads: list[bytes],
        timeout_s: float,
        take: Take,
        fail: Callable[[Exception], None],
        on_partial: Take | None = None,
    ) -> Submission:
        """fail: called instead of `take` if nothing can be sent. on_partial: see Submission."""
        submission = Submission(kind, payloads, time.monotonic() + timeout_s, self.hand_over(take))
        submission.on_partial = self.hand_over(on_partial) if on_partial else None
        try:
            submitter = self._begin()
        except (CallFailed, RuntimeError) as e:  # RuntimeError: no thread can be started
            fail(e)
            return submission
        if submitter.connected.is_set():
            submitter.send(submission)
        else:
            task = self.loop.create_task(self._send_later(submitter, submission, timeout_s, fail))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return submission

    async def wait_ready(self, timeout_s: float) -> None:
        submitter = self._begin()
        if not submitter.connected.is_set():
            await self._wait_connected(submitter, timeout_s)

    def hand_over(self, take: Callable[..., None]) -> Callable[..., None]:
        """A function for other threads that calls `take` on the loop, with the same arguments."""
        return partial(self._deliver, take)

    async def pause(self, seconds: float) -> None:
        """Like asyncio.sleep, but by the real clock, as a test may have frozen the loop's.

        Raises CallFailed when the client is closed.
        """
        done = self.loop.create_future()

        def end(*_: object) -> None:
            if not done.done():
                done.set_result(None)

        at = time.monotonic() + seconds
        self._begin().remind(self.hand_over(end), at)
        self._pauses.add(done)
        try:
            await done
        finally:
            self._pauses.discard(done)

    async def close(self) -> None:
        if self.connection.belongs_to_parent:
            return
        self._flush()
        await on_a_thread(self.connection.close)
        for done in self._pauses:
            if not done.done():
                done.set_result(None)
        if self._sending:
            await asyncio.wait(self._sending)
        self._run_deliveries()

    def _begin(self) -> Submitter:
        submitter = self._submitter = self.connection.begin()
        submitter.after_frame = self._weak_wake
        return submitter

    def _flush(self) -> None:
        asked, self._pending = self._pending, {}
        for (kind, timeout_s), futures in asked.items():
            for batch in _split_into_frames([future for future in futures if not future.done()]):
                take, fail = partial(_take_all, batch), partial(_fail_all, batch)
                payloads = [future.payload for future in batch]
                submission = self.send(kind, payloads, timeout_s, take, fail)
                for row, future in enumerate(batch):
                    future.submission, future.row = submission, row

    async def _send_later(
        self,
        submitter: Submitter,
        submission: Submission,
        timeout_s: float,
        fail: Callable[[Exception], None],
    ) -> None:
        try:
            await self._wait_connected(submitter, timeout_s)
        except (CallFailed, RuntimeError) as e:
            fail(e)
        else:
            submitter.send(submission)  # without its cancelled rows

    async def _wait_connected(self, submitter: Submitter, timeout_s: float) -> None:
        # One thread waits on behalf of all requests of that time.
        patience_s = min(self._patience_s, timeout_s)
        task = self._connecting.get(patience_s)
        if task is None:
            waiting = on_a_thread(self.connection.wait_connected, submitter, patience_s)
            task = self._connecting[patience_s] = self.loop.create_task(waiting)
            task.add_done_callback(lambda _: self._connecting.pop(patience_s))
        await asyncio.shield(task)

    def _deliver(self, take: Callable[..., None], *arguments: Any) -> None:
        # On a thread of client.submitter.
        self._deliveries.append((take, arguments))
        if self._submitter is None or not self._submitter.is_delivering:
            self._wake()

    def _wake(self) -> None:
        # `_run_deliveries` clears the flag before it reads the queue, so no delivery is missed.
        if self._deliveries and not self._is_scheduled:
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._run_deliveries)  # type: ignore[union-attr]

    def _run_deliveries(self) -> None:
        self._is_scheduled = False
        for _ in range(len(self._deliveries)):
            take, arguments = self._deliveries.popleft()
            take(*arguments)


async def on_a_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Like asyncio.to_thread, but on a new thread: all of the loop's may be waiting for this."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def end(deliver: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            deliver(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = done.set_result, function(*arguments)
        except BaseException as e:  # noqa: BLE001 - raised again by the await
            outcome = done.set_exception, e
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, *outcome)
        del outcome  # an error refers to this frame, and so to the request

    threading.Thread(target=run, name="overlay-asyncio", daemon=True).start()
    return await done


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """Calls the method while its object exists, without keeping a dropped client alive."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    return call


def _split_into_frames(futures: list[AsyncCallFuture]) -> Iterable[list[AsyncCallFuture]]:
    """Splits them into lists that each fit into a frame; usually one."""
    size, first = 0, 0
    for n, future in enumerate(futures):
        size += len(future.payload)
        if size > Limits.frame_bytes and n > first:
            yield futures[first:n]
            first, size = n, len(future.payload)
    if first < len(futures):
        yield futures[first:]


def _take_all(
    futures: list[AsyncCallFuture], rows: Sequence[int], delivered: Any, at: int, request_id: int
) -> None:
    for n, row in enumerate(rows):
        futures[row].take(delivered, at + n, request_id and request_id + n)


def _fail_all(futures: list[AsyncCallFuture], error: Exception) -> None:
    for future in futures:
        future.fail(error)
