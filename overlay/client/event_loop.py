"""Between an event loop and the library's threads: requests go out, answers come back.

What is asked in one turn of the loop leaves together, and what comes in one frame is handed to the
loop together. Nothing here blocks the loop: "overlay-asyncio" threads wait for a connection, close
one, or make a single call.
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
from overlay.client.multiplexer import Multiplexer
from overlay.client.outbox import CallKind, Submission
from overlay.client.results import NOT_PICKLED
from overlay.model import clocks as time
from overlay.model.errors import CallFailed
from overlay.model.limits import Limits

Said = TypeVar("Said")
Take = Callable[[Sequence[int], Any, int, int], None]
"""As outbox.Deliver, but called on the event loop."""
Read = Callable[[Any, int, int, float], Any]
"""(what came, the row in it, the request id, the timeout in seconds)"""


class AsyncCallFuture(asyncio.Future[Any]):
    """The Future of one request; cancel() ends the work.

    read: makes the result of what was delivered, or raises CallFailed.
    """

    submission: Submission | None = None
    row = 0

    def __init__(self, bridge: LoopBridge, options: CallOptions, read: Read) -> None:
        super().__init__(loop=bridge.loop)
        self.payload = options.body
        self._bridge = bridge
        self._timeout_s = options.timeout_s
        self._read = read

    def take(self, came: Any, at: int, request_id: int) -> None:
        if self.done():
            return
        try:
            self.set_result(self._read(came, at, request_id, self._timeout_s))
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
    """Sends what is asked on one event loop, and delivers there what comes, many at a time."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self.connection = connection
        self._patience_s = patience_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[tuple[CallKind, float], list[AsyncCallFuture]] = {}
        self._came: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._calls: Multiplexer | None = None
        self._is_due = False  # the loop has been told of what came, and has not looked yet
        self._wake_weakly = _weakly(self._wake)
        self._connecting: dict[float, asyncio.Task[None]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.Future[None]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that uses this client. Raises RuntimeError in any other, or in none."""
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running
        if self._loop is not running:
            self.connection.check_here()
            raise RuntimeError("this client belongs to another event loop; make one in each")
        return running

    def ask(self, options: CallOptions, read: Read) -> AsyncCallFuture:
        future = AsyncCallFuture(self, options, read)
        if not self._asked:
            self.loop.call_soon(self._flush)
        self._asked.setdefault((options.kind, options.timeout_s), []).append(future)
        return future

    def send(
        self,
        kind: CallKind,
        payloads: list[bytes],
        timeout_s: float,
        take: Take,
        fail: Callable[[Exception], None],
        early: Take | None = None,
    ) -> Submission:
        """fail: called instead of `take` when nothing could be sent. early: see Submission."""
        submission = Submission(kind, payloads, time.monotonic() + timeout_s, self.hand_over(take))
        submission.early = self.hand_over(early) if early else None
        try:
            calls = self._begin()
        except (CallFailed, RuntimeError) as e:  # the latter when no thread can be had
            fail(e)
            return submission
        if calls.connected.is_set():
            calls.send(submission)
        else:
            task = self.loop.create_task(self._send_later(calls, submission, timeout_s, fail))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return submission

    async def wait_ready(self, timeout_s: float) -> None:
        """As Connection.wait_ready."""
        calls = self._begin()
        if not calls.connected.is_set():
            await self._connected(calls, timeout_s)

    def hand_over(self, take: Callable[..., None]) -> Callable[..., None]:
        """For other threads: has `take` called on the loop, with what this is called with."""
        return partial(self._deliver, take)

    async def pause(self, seconds: float) -> None:
        """As asyncio.sleep, by the machine's clock: a test may have frozen the loop's. Raises
        CallFailed when the client is closed."""
        over = self.loop.create_future()

        def end(*_: object) -> None:
            if not over.done():
                over.set_result(None)

        at = time.monotonic() + seconds
        self._begin().remind(self.hand_over(end), at)
        self._pauses.add(over)
        try:
            await over
        finally:
            self._pauses.discard(over)

    async def close(self) -> None:
        if self.connection.is_left:
            return  # to the parent of this process, with its tasks
        self._flush()
        await on_a_thread(self.connection.close)
        for over in self._pauses:
            if not over.done():
                over.set_result(None)
        if self._sending:
            await asyncio.wait(self._sending)
        self._settle()

    def _begin(self) -> Multiplexer:
        calls = self._calls = self.connection.begin()
        calls.after_frame = self._wake_weakly
        return calls

    def _flush(self) -> None:
        asked, self._asked = self._asked, {}
        for (kind, timeout_s), futures in asked.items():
            for some in _frames_of([future for future in futures if not future.done()]):
                take, fail = partial(_take_all, some), partial(_fail_all, some)
                payloads = [future.payload for future in some]
                submission = self.send(kind, payloads, timeout_s, take, fail)
                for row, future in enumerate(some):
                    future.submission, future.row = submission, row

    async def _send_later(
        self,
        calls: Multiplexer,
        submission: Submission,
        timeout_s: float,
        fail: Callable[[Exception], None],
    ) -> None:
        try:
            await self._connected(calls, timeout_s)
        except (CallFailed, RuntimeError) as e:
            fail(e)
        else:
            calls.send(submission)  # cancelled rows among them are never sent

    async def _connected(self, calls: Multiplexer, timeout_s: float) -> None:
        # One thread waits for all that is asked meanwhile.
        patience_s = min(self._patience_s, timeout_s)
        task = self._connecting.get(patience_s)
        if task is None:
            waiting = on_a_thread(self.connection.wait_connected, calls, patience_s)
            task = self._connecting[patience_s] = self.loop.create_task(waiting)
            task.add_done_callback(lambda _: self._connecting.pop(patience_s))
        await asyncio.shield(task)

    def _deliver(self, take: Callable[..., None], *came: Any) -> None:
        # On a thread of client.multiplexer.
        self._came.append((take, came))
        if self._calls is None or not self._calls.is_delivering:
            self._wake()

    def _wake(self) -> None:
        # The flag is lowered before the loop looks, so nothing stays.
        if self._came and not self._is_due:
            self._is_due = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
                self._loop.call_soon_threadsafe(self._settle)  # type: ignore[union-attr]

    def _settle(self) -> None:
        self._is_due = False
        came = self._came
        for _ in range(len(came)):
            take, what = came.popleft()
            take(*what)


async def on_a_thread(function: Callable[..., Said], *arguments: Any) -> Said:
    """As asyncio.to_thread, but on a thread of its own: the loop's own may all be busy with what
    waits for this."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[Said] = loop.create_future()

    def end(how: Callable[[Any], None], what: Any) -> None:
        if not over.done():
            how(what)

    def run() -> None:
        try:
            said: tuple[Callable[[Any], None], Any] = over.set_result, function(*arguments)
        except BaseException as e:  # noqa: BLE001 - raised where it is awaited
            said = over.set_exception, e
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
            loop.call_soon_threadsafe(end, *said)
        del said  # an error holds this frame, and with it all that was asked

    threading.Thread(target=run, name="overlay-asyncio", daemon=True).start()
    return await over


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """The method, without holding its object: a client that nobody holds is let go."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    return call


def _frames_of(futures: list[AsyncCallFuture]) -> Iterable[list[AsyncCallFuture]]:
    """In parts that fit into a frame; usually one."""
    size, first = 0, 0
    for n, future in enumerate(futures):
        size += len(future.payload)
        if size > Limits.frame_bytes and n > first:
            yield futures[first:n]
            first, size = n, len(future.payload)
    if first < len(futures):
        yield futures[first:]


def _take_all(
    futures: list[AsyncCallFuture], rows: Sequence[int], came: Any, at: int, request_id: int
) -> None:
    for n, row in enumerate(rows):
        futures[row].take(came, at + n, request_id and request_id + n)


def _fail_all(futures: list[AsyncCallFuture], error: Exception) -> None:
    for future in futures:
        future.fail(error)
