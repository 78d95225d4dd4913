"""The client library for asyncio: `connect_async("host:port")` gives an AsyncClient.

    async with overlay.connect_async("192.168.1.1:50051") as client:
        answer = await client.call(b"hello")
        async for thumbnail in client.map("pictures", photos):
            ...

The same verbs, errors and promises as overlay.client. A client belongs to the event loop that uses
it first; nothing here blocks that loop.

What is asked in one turn of the loop leaves together, and what comes in one frame is handed to the
loop together. The threads are those of overlay.calls, and one of the loop's own while a connection
is waited for or closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from overlay.arguments import as_bytes, as_patience, as_timeout, chunk_of, kind_of
from overlay.calls import Calls
from overlay.connection import PATIENCE_S, Connection, ended_early, split
from overlay.limits import Limits
from overlay.orders import Kind, Order
from overlay.outcomes import Answer, CallFailed
from overlay.parts import Parts
from overlay.values import Failure, Part
from overlay.wire import pb2

LOOK_S = 0.25  # how often a map looks whether the process is there
Payloads = Iterable[bytes | str] | AsyncIterable[bytes | str]
Take = Callable[[Sequence[int], Any, int, int], None]
"""As overlay.calls.Deliver, but called on the event loop."""


def connect_async(address: str, *, patience_s: float = PATIENCE_S) -> AsyncClient:
    """A client for the process at `host:port`, as `connect` makes one."""
    split(address)
    return AsyncClient(address, patience_s)


class AsyncClient:
    """The verbs of one kept connection, for the tasks of one event loop."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self._connection = Connection(address, patience_s)
        self._patience_s = patience_s
        self._post = _Post(self._connection, patience_s)

    async def call(
        self,
        payload: bytes | str,
        *,
        mode: str = "all",
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        want_parts: bool = False,
        priority: int = 0,
    ) -> Answer:
        """As Client.call. Cancelling the task that waits ends the work."""
        kind = kind_of(mode, team, handler, want_parts, priority)
        reply = self._post.ask(kind, as_bytes(payload), as_timeout(timeout), self._connection.read)
        answer: Answer = await reply
        return answer

    def submit(
        self,
        handler: str | None,
        payload: bytes | str,
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> asyncio.Future[bytes]:
        """A Future of the result, whose cancel() ends the work; from a task or a callback."""
        kind = kind_of(mode, team, handler or "", False, priority)
        read = self._connection.read_result
        return self._post.ask(kind, as_bytes(payload), as_timeout(timeout), read)

    async def map(
        self,
        handler: str | None,
        payloads: Payloads,
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> AsyncIterator[bytes]:
        """As Client.map; the payloads may come from an async iterable too."""
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        pairs = self._map(handler, payloads, *options, ordered=True)
        async with contextlib.aclosing(pairs):  # type: ignore[type-var]  # a generator
            async for _, result in pairs:
                if isinstance(result, CallFailed):
                    raise result
                yield result

    def map_as_completed(
        self,
        handler: str | None,
        payloads: Payloads,
        *,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        ordered: bool = False,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> AsyncIterator[tuple[int, bytes | CallFailed]]:
        """As Client.map_as_completed."""
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        return self._map(handler, payloads, *options, ordered=ordered)

    def parts(
        self,
        payload: bytes | str,
        *,
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        first: int | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Part]:
        """As Client.parts."""
        kind, parts = kind_of("all", team, handler, False, priority, True), Parts(first)
        return self._parts(kind, as_bytes(payload), as_timeout(timeout), parts)

    async def metrics(
        self, *, timeout: float | None = None, events: int = 0, requests: int = 0
    ) -> pb2.MetricsResponse:
        """What the process says of itself, as overlay.proto describes it."""
        request = pb2.MetricsRequest(events=events, requests=requests)
        return await asyncio.to_thread(self._connection.metrics, request, as_timeout(timeout))

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """What the standard health service says: False while the process stops."""
        return await asyncio.to_thread(self._connection.is_serving, as_timeout(timeout))

    async def close(self) -> None:
        """Ends the connection; what has no answer yet fails with CallCancelled."""
        await self._post.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _parts(
        self, kind: Kind, body: bytes, timeout_s: float, parts: Parts
    ) -> AsyncIterator[Part]:
        box: asyncio.Queue[tuple[bool, Any, int, int]] = asyncio.Queue()

        def put(is_last: bool, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
            box.put_nowait((is_last, came, at, request_id))

        order = self._post.send(
            kind,
            [body],
            timeout_s,
            partial(put, True),
            lambda error: box.put_nowait((True, error, 0, 0)),
            partial(put, False),
        )
        is_last = False
        try:
            while not (is_last or parts.is_over):
                is_last, came, at, request_id = await box.get()
                for part in parts.last(came, at) if is_last else parts.early(came, at):
                    yield part
            if is_last and isinstance(came, Failure):
                raise self._connection.failed(came, timeout_s, request_id)
            if isinstance(came, CallFailed):
                raise came
        finally:
            if not is_last:
                self._post.cancel(order, (0,))

    def _map(
        self,
        handler: str | None,
        payloads: Payloads,
        mode: str,
        team: str,
        timeout: float | None,
        window: int,
        chunksize: int,
        priority: int,
        patience_s: float | None,
        ordered: bool,
    ) -> AsyncIterator[tuple[int, bytes | CallFailed]]:
        kind = kind_of(mode, team, handler or "", False, priority)
        timeout_s, patience_s = as_timeout(timeout), as_patience(patience_s)
        chunk = chunk_of(window, chunksize)
        mapping = _Mapping(self._post, kind, timeout_s, chunk, window, patience_s)
        return mapping.run(payloads, ordered)


class _Reply(asyncio.Future[Any]):
    """The Future of one request."""

    order: Order | None = None
    row = 0

    def __init__(self, post: _Post, payload: bytes, timeout_s: float, read: Any) -> None:
        super().__init__(loop=post.loop)
        self.payload = payload
        self._post = post
        self._timeout_s = timeout_s
        self._read = read

    def take(self, came: Any, at: int, request_id: int) -> None:
        if self.done():
            return
        try:
            self.set_result(self._read(came, at, request_id, self._timeout_s))
        except CallFailed as e:
            self.set_exception(e)

    def fail(self, error: CallFailed) -> None:
        if not self.done():
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.order is not None:
            self._post.cancel(self.order, (self.row,))
        return cancelled


class _Post:
    """Between the loop and the threads: orders go out and answers come in, many at a time."""

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self.connection = connection
        self._patience_s = patience_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[tuple[Kind, float], list[_Reply]] = {}
        self._came: deque[tuple[Take, Sequence[int], Any, int, int]] = deque()
        self._calls: Calls | None = None
        self._is_due = False  # the loop has been told of what came, and has not looked yet
        self._wake_weakly = _weakly(self._wake)
        self._connecting: dict[float, asyncio.Task[None]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that uses this client. Raises RuntimeError in any other, or in none."""
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running
        if self._loop is not running:
            raise RuntimeError("this client belongs to another event loop; make one in each")
        return running

    def ask(self, kind: Kind, payload: bytes, timeout_s: float, read: Any) -> _Reply:
        reply = _Reply(self, payload, timeout_s, read)
        if not self._asked:
            self.loop.call_soon(self._flush)
        self._asked.setdefault((kind, timeout_s), []).append(reply)
        return reply

    def send(
        self,
        kind: Kind,
        payloads: list[bytes],
        timeout_s: float,
        take: Take,
        fail: Callable[[CallFailed], None],
        early: Take | None = None,
        when_back: bool = False,
        keeps_trying: Callable[[], bool] | None = None,
    ) -> Order:
        """fail: called instead of `take` when nothing could be sent. early, keeps_trying: see
        Order. when_back: a process that is not there is not waited for here; what it is to have
        leaves when it is."""
        deliver = partial(self._deliver, take)
        order = Order(kind, payloads, time.monotonic() + timeout_s, deliver)
        order.early = partial(self._deliver, early) if early else None
        order.is_patient = when_back
        if keeps_trying is not None:
            order.keeps_trying = keeps_trying
        try:
            calls = self._calls = self.connection.begin()
        except CallFailed as e:
            fail(e)
            return order
        calls.after_frame = self._wake_weakly
        if when_back or calls.connected.is_set():
            calls.send(order)
        else:
            task = self.loop.create_task(self._send_later(calls, order, timeout_s, fail))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return order

    def cancel(self, order: Order, rows: Iterable[int] = ()) -> None:
        self.connection.cancel(order, tuple(rows))

    async def close(self) -> None:
        self._flush()
        await asyncio.to_thread(self.connection.close)
        if self._sending:
            await asyncio.wait(self._sending)
        self._settle()

    def _flush(self) -> None:
        asked, self._asked = self._asked, {}
        for (kind, timeout_s), replies in asked.items():
            for some in _frames_of([reply for reply in replies if not reply.done()]):
                take, fail = partial(_take_replies, some), partial(_fail_replies, some)
                payloads = [reply.payload for reply in some]
                order = self.send(kind, payloads, timeout_s, take, fail)
                for row, reply in enumerate(some):
                    reply.order, reply.row = order, row

    async def _send_later(
        self, calls: Calls, order: Order, timeout_s: float, fail: Callable[[CallFailed], None]
    ) -> None:
        try:
            await self._connected(calls, min(self._patience_s, timeout_s))
        except CallFailed as e:
            fail(e)
        else:
            calls.send(order)  # cancelled rows among them are never sent

    async def _connected(self, calls: Calls, patience_s: float) -> None:
        # One thread waits for all who ask meanwhile.
        task = self._connecting.get(patience_s)
        if task is None:
            waiting = asyncio.to_thread(self.connection.wait_connected, calls, patience_s)
            task = self._connecting[patience_s] = self.loop.create_task(waiting)
            task.add_done_callback(lambda _: self._connecting.pop(patience_s))
        await asyncio.shield(task)

    def _deliver(
        self, take: Take, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> None:
        # On a thread of overlay.calls.
        self._came.append((take, rows, came, at, request_id))
        if self._calls is None or not self._calls.is_delivering:
            self._wake()

    def _wake(self) -> None:
        # The flag is lowered before the loop looks, so nothing stays.
        if self._came and not self._is_due:
            self._is_due = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle)  # type: ignore[union-attr]

    def _settle(self) -> None:
        self._is_due = False
        came = self._came
        for _ in range(len(came)):
            take, *what = came.popleft()
            take(*what)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """The method, without holding its object: a client that nobody holds is let go."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    return call


def _frames_of(replies: list[_Reply]) -> Iterable[list[_Reply]]:
    """In parts that fit into a frame; usually one."""
    size, first = 0, 0
    for n, reply in enumerate(replies):
        size += len(reply.payload)
        if size > Limits.frame_bytes and n > first:
            yield replies[first:n]
            first, size = n, len(reply.payload)
    if first < len(replies):
        yield replies[first:]


def _take_replies(
    replies: list[_Reply], rows: Sequence[int], came: Any, at: int, request_id: int
) -> None:
    for n, row in enumerate(rows):
        replies[row].take(came, at + n, request_id and request_id + n)


def _fail_replies(replies: list[_Reply], error: CallFailed) -> None:
    for reply in replies:
        reply.fail(error)


class _Mapping:
    """One map: a task feeds it while its results are taken."""

    def __init__(
        self,
        post: _Post,
        kind: Kind,
        timeout_s: float,
        chunk: int,
        window: int,
        patience_s: float | None,
    ) -> None:
        self._post = post
        self._presence = post.connection.presence(patience_s)
        self._kind = kind
        self._timeout_s = timeout_s
        self._chunk = chunk
        self._window = window
        self._rows: list[bytes] = []  # to be sent at the end of this turn of the loop
        self._rows_size = 0
        self._orders: dict[int, list[Any]] = {}  # first index -> the order, rows still open
        self._came: deque[tuple[int, bytes | CallFailed]] = deque()
        self._early: dict[int, bytes | CallFailed] = {}
        self._sent = 0
        self._open = 0  # taken from the payloads and not yet given
        self._bytes = 0  # of payloads on their way and of results in hand
        self._mean_result = 0.0
        self._changed = asyncio.Event()
        self._waiter: asyncio.Future[None] | None = None  # where the feeder waits for room
        self._is_away = False  # nothing can be sent now
        self._over: CallFailed | None = None  # why nothing more is sent
        self._answered = 0
        self._failed = 0
        self._unsent = 0
        self._answered_at = time.monotonic()  # when a payload last was

    async def run(
        self, payloads: Payloads, ordered: bool
    ) -> AsyncIterator[tuple[int, bytes | CallFailed]]:
        feeder = self._post.loop.create_task(self._feed(payloads))
        feeder.add_done_callback(lambda _: self._changed.set())
        looks = self._post.loop.create_task(self._look_again())
        given = 0
        try:
            while self._came or self._open or not feeder.done():
                if feeder.done() and not feeder.cancelled() and (e := feeder.exception()):
                    raise e  # the payloads' own
                while self._came:
                    index, result = self._came.popleft()
                    if ordered and index != given:
                        self._early[index] = result
                        continue
                    self._give(result)
                    yield index, result
                    given += 1
                    while ordered and given in self._early:
                        result = self._early.pop(given)
                        self._give(result)
                        yield given, result
                        given += 1
                if self._over is not None and not self._orders and not self._came:
                    break
                if not self._came and (self._open or not feeder.done()):
                    self._changed.clear()
                    await self._changed.wait()
            if self._over is not None:
                raise self._over
            feeder.result()
        finally:
            looks.cancel()
            feeder.cancel()
            for order, _ in self._orders.values():
                self._post.cancel(order)
            await asyncio.wait([feeder, looks])

    async def _look_again(self) -> None:
        """Whether the process is there: notices its loss, its return, and when it is too late."""
        try:
            why = await self._gone()
            while self._rows or self._orders:  # each payload that was taken has its result
                self._flush()
                orders = [order for order, _ in self._orders.values()]
                self._unsent += self._presence.take_back(orders, why)
                await asyncio.sleep(LOOK_S / 10)
        except CallFailed as e:  # closed meanwhile
            self._end(e)
        else:
            failed = self._failed - self._unsent
            self._end(ended_early(why, self._answered, failed, self._unsent))

    async def _gone(self) -> CallFailed:
        """Returns when the process was waited for in vain."""
        presence = self._presence
        while True:
            await asyncio.sleep(LOOK_S)
            was_away, self._is_away = self._is_away, presence.look_away()
            if was_away and not self._is_away:
                self._wake_feeder()
            if self._is_away and presence.is_over:
                why = await asyncio.to_thread(presence.last_look)
                if why is not None:
                    return why

    def _end(self, why: CallFailed) -> None:
        self._over = why
        self._changed.set()
        self._wake_feeder()

    async def _feed(self, payloads: Payloads) -> None:
        if isinstance(payloads, AsyncIterable):
            async for payload in payloads:
                await self._put(as_bytes(payload))
        else:
            for payload in payloads:
                await self._put(as_bytes(payload))

    async def _put(self, payload: bytes) -> None:
        while not self._has_room() and self._over is None:
            self._flush()
            await self._give_way()
        if self._over is not None:
            raise asyncio.CancelledError  # nothing more can be sent
        if not self._rows:
            self._post.loop.call_soon(self._flush)
        self._rows.append(payload)
        self._rows_size += len(payload)
        self._open += 1
        self._bytes += len(payload)
        if len(self._rows) >= self._chunk or self._rows_size >= Limits.frame_bytes:
            self._flush()
            await asyncio.sleep(0)  # results are given between two chunks

    async def _give_way(self) -> None:
        """Until a result has been given."""
        waiter = self._waiter = self._post.loop.create_future()
        await waiter

    def _has_room(self) -> bool:
        if self._is_away:
            return False
        if not self._open:
            return True
        bytes_ = self._bytes + self._open * self._mean_result
        return self._open < self._window and bytes_ < Limits.window_bytes

    def _flush(self) -> None:
        rows, self._rows, self._rows_size = self._rows, [], 0
        if not rows:
            return
        first = self._sent
        self._sent += len(rows)
        entry: list[Any] = [None, len(rows)]
        self._orders[first] = entry
        take, fail = partial(self._take, first), partial(self._fail, first)
        when_back = self._presence.is_under_way()
        entry[0] = self._post.send(
            self._kind,
            rows,
            self._timeout_s,
            take,
            fail,
            when_back=when_back,
            keeps_trying=self._is_patient,
        )

    def _is_patient(self) -> bool:
        return time.monotonic() - self._answered_at < self._presence.patience_s

    def _take(self, first: int, rows: Sequence[int], came: Any, at: int, request_id: int) -> None:
        entry = self._orders[first]
        entry[1] -= len(rows)
        if not entry[1]:
            self._bytes -= entry[0].size
            del self._orders[first]
        for n, row in enumerate(rows):
            result: bytes | CallFailed
            if isinstance(came, Failure):
                self._failed += 1
                id_ = request_id and request_id + n
                result = self._post.connection.failed(came, self._timeout_s, id_)
            else:
                self._answered += 1
                self._answered_at = time.monotonic()
                result = self._post.connection.read_result(came, at + n, 0, self._timeout_s)
                self._mean_result += (len(result) - self._mean_result) / 16
                self._bytes += len(result)
            self._came.append((first + row, result))
        self._changed.set()

    def _fail(self, first: int, error: CallFailed) -> None:
        del self._orders[first]
        self._end(error)

    def _give(self, result: bytes | CallFailed) -> None:
        self._open -= 1
        self._bytes -= len(result) if isinstance(result, bytes) else 0
        self._wake_feeder()

    def _wake_feeder(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
