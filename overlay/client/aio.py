"""The client library for asyncio: `connect_async("host:port")` gives an AsyncClient.

    async with overlay.connect_async("192.168.1.1:50051") as client:
        answer = await client.call(b"hello")
        async for thumbnail in client.map("pictures", photos):
            ...

The same verbs, errors and promises as overlay.client. A client belongs to the event loop that uses
it first; nothing here blocks that loop.

What is asked in one turn of the loop leaves together, and what comes in one frame is handed to the
loop together. The threads are those of client.submitter, and "overlay-asyncio" while a
connection is waited for or closed, or a single call made.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from overlay.client.arguments import (
    MapAsked,
    as_address,
    as_any_payloads,
    as_body,
    as_bytes,
    as_first,
    as_flag,
    as_patience,
    as_timeout,
    as_whole,
    check_mode_of_args,
    handler_of,
    kind_of,
    map_of,
    parts_wanted,
)
from overlay.client.connection import PATIENCE_S, Connection, ended_early
from overlay.client.outbox import CallKind, Submission
from overlay.client.partials import Parts
from overlay.client.progress import Telling
from overlay.client.results import NOT_PICKLED, Answer, CallFailed, value_of
from overlay.client.submitter import Submitter
from overlay.model import clocks as time
from overlay.model.limits import Limits
from overlay.model.segments import Failure, Part
from overlay.transport.channels import split
from overlay.transport.codec import pb2

Said = TypeVar("Said")

LOOK_S = 0.25  # how often a map looks whether the process is there
Payloads = Iterable[bytes | str] | AsyncIterable[bytes | str]
Args = Mapping[str, Any]
ManyArgs = Iterable[Args] | AsyncIterable[Args]
Take = Callable[[Sequence[int], Any, int, int], None]
"""As overlay.client.submitter.Deliver, but called on the event loop."""


def connect_async(address: str, *, patience_s: float = PATIENCE_S) -> AsyncClient:
    """A client for the process at `host:port`, as `connect` makes one."""
    address, patience_s = as_address(address), as_patience(patience_s)
    split(address)
    return AsyncClient(address, patience_s)


class AsyncClient:
    """The verbs of one kept connection, for the tasks of one event loop."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self._connection = Connection(address, patience_s)
        self._patience_s = patience_s
        self._post = _Post(self._connection, patience_s)

    @property
    def shown(self) -> str:
        """As Client.shown."""
        return self._connection.shown

    async def call(
        self,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "all",
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        want_parts: bool = False,
        priority: int = 0,
    ) -> Answer:
        """As Client.call. Cancelling the task that waits ends the work."""
        want_parts = parts_wanted(want_parts, args, mode)
        kind, body = kind_of(mode, team, handler, want_parts, priority), as_body(payload, args)
        reply = self._post.ask(kind, body, as_timeout(timeout), self._connection.read)
        answer: Answer = await reply
        return answer

    def submit(
        self,
        handler: str | None,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        priority: int = 0,
    ) -> asyncio.Future[Any]:
        """A Future of the result, as Client.submit gives one, whose cancel() ends the work.

        From a task or a callback.
        """
        kind = kind_of(mode, team, handler_of(handler), False, priority)
        check_mode_of_args(args, mode)
        read = self._connection.read_result if args is None else self._read_value
        return self._post.ask(kind, as_body(payload, args), as_timeout(timeout), read)

    def map(
        self,
        handler: str | None,
        payloads: Payloads | None = None,
        *,
        args: ManyArgs | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """As Client.map; the payloads, or args, may come from an async iterable too."""
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        asked = map_of(handler, payloads, args, *options)
        return _raising(self._map(*asked, has_values=args is not None, ordered=True))

    def map_as_completed(
        self,
        handler: str | None,
        payloads: Payloads | None = None,
        *,
        args: ManyArgs | None = None,
        mode: str = "any",
        team: str = "",
        timeout: float | None = None,
        window: int = 4096,
        chunksize: int = 0,
        ordered: bool = False,
        priority: int = 0,
        patience_s: float | None = None,
    ) -> AsyncIterator[tuple[int, Any]]:
        """As Client.map_as_completed."""
        options = (mode, team, timeout, window, chunksize, priority, patience_s)
        asked = map_of(handler, payloads, args, *options)
        return self._map(*asked, has_values=args is not None, ordered=ordered)

    def parts(
        self,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        team: str = "",
        handler: str = "",
        timeout: float | None = None,
        first: int | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Part]:
        """As Client.parts."""
        kind = kind_of("all", team, handler, False, priority, True)
        parts = Parts(as_first(first), in_items=args is not None)
        return self._parts(kind, as_body(payload, args), as_timeout(timeout), parts)

    async def metrics(
        self,
        *,
        timeout: float | None = None,
        events: int = 0,
        requests: int = 0,
        functions: bool = False,
    ) -> pb2.MetricsResponse:
        """What the process says of itself, as overlay.proto describes it."""
        request = pb2.MetricsRequest(
            events=as_whole("events", events),
            requests=as_whole("requests", requests),
            functions=as_flag("functions", functions),
        )
        return await _on_a_thread(self._connection.metrics, request, as_timeout(timeout))

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """What the standard health service says: False while the process stops."""
        return await _on_a_thread(self._connection.is_serving, as_timeout(timeout))

    async def close(self) -> None:
        """Ends the connection; what has no answer yet fails with CallCancelled."""
        await self._post.close()

    def __reduce__(self) -> tuple[type[AsyncClient], tuple[str, float]]:
        return type(self), (self.address, self._patience_s)  # which connects where it arrives

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
        self, kind: CallKind, body: bytes, timeout_s: float, parts: Parts
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
            if isinstance(came, Exception):
                raise came
        finally:
            if not is_last:
                self._post.cancel(order, (0,))

    def _map(
        self, asked: MapAsked, bodies: Any, *, has_values: bool, ordered: bool
    ) -> AsyncIterator[tuple[int, Any]]:
        bodies, ordered = as_any_payloads(bodies), as_flag("ordered", ordered)
        self._connection.check_open()
        pairs = _Mapping(self._post, *asked).run(bodies, ordered)
        return _with_values(pairs) if has_values else pairs

    def _read_value(self, came: Any, at: int, request_id: int, timeout_s: float) -> Any:
        value = value_of(self._connection.read_result(came, at, request_id, timeout_s))
        if isinstance(value, CallFailed):
            raise value
        return value


async def _with_values(
    pairs: AsyncIterator[tuple[int, bytes | CallFailed]],
) -> AsyncIterator[tuple[int, Any]]:
    async with contextlib.aclosing(pairs):  # type: ignore[type-var]  # a generator
        async for index, result in pairs:
            yield index, value_of(result)


async def _raising(pairs: AsyncIterator[tuple[int, bytes | CallFailed]]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(pairs):  # type: ignore[type-var]  # a generator
        async for _, result in pairs:
            if isinstance(result, CallFailed):
                raise result
            yield result


async def _on_a_thread(function: Callable[..., Said], *arguments: Any) -> Said:
    """As asyncio.to_thread, but on a thread of its own: those of the loop may all be busy, and
    wait for us."""
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(end, *said)
        del said  # an error holds this frame, and with it all that was asked

    threading.Thread(target=run, name="overlay-asyncio", daemon=True).start()
    return await over


class _Reply(asyncio.Future[Any]):
    """The Future of one request."""

    order: Submission | None = None
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

    def fail(self, error: Exception) -> None:
        if not self.done():
            self.set_exception(error)

    def __reduce__(self) -> NoReturn:
        raise TypeError(NOT_PICKLED)

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
        self._asked: dict[tuple[CallKind, float], list[_Reply]] = {}
        self._came: deque[tuple[Take, Sequence[int], Any, int, int]] = deque()
        self._calls: Submitter | None = None
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

    def ask(self, kind: CallKind, payload: bytes, timeout_s: float, read: Any) -> _Reply:
        reply = _Reply(self, payload, timeout_s, read)
        if not self._asked:
            self.loop.call_soon(self._flush)
        self._asked.setdefault((kind, timeout_s), []).append(reply)
        return reply

    def send(
        self,
        kind: CallKind,
        payloads: list[bytes],
        timeout_s: float,
        take: Take,
        fail: Callable[[Exception], None],
        early: Take | None = None,
        when_back: bool = False,
        keeps_trying: Callable[[], bool] | None = None,
    ) -> Submission:
        """fail: called instead of `take` when nothing could be sent. early, keeps_trying: see
        Order. when_back: a process that is not there is not waited for here; what it is to have
        leaves when it is."""
        deliver = partial(self._deliver, take)
        order = Submission(kind, payloads, time.monotonic() + timeout_s, deliver)
        order.on_partial = partial(self._deliver, early) if early else None
        order.is_patient = when_back
        if keeps_trying is not None:
            order.keeps_trying = keeps_trying
        try:
            calls = self._calls = self.connection.begin()
        except (CallFailed, RuntimeError) as e:  # the latter when no thread can be had
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

    def cancel(self, order: Submission, rows: Iterable[int] = ()) -> None:
        self.connection.cancel(order, tuple(rows))

    async def pause(self, seconds: float) -> None:
        """As asyncio.sleep, by the machine's clock: a test may have frozen the loop's. Raises
        CallFailed when the client is closed."""
        over = self.loop.create_future()

        def end(*_: object) -> None:
            if not over.done():
                over.set_result(None)

        at = time.monotonic() + seconds
        self.connection.begin().remind(partial(self._deliver, end, (), None, 0, 0), at)
        self._pauses.add(over)
        try:
            await over
        finally:
            self._pauses.discard(over)

    async def close(self) -> None:
        if self.connection.is_left:
            return  # to the parent of this process, with its tasks
        self._flush()
        await _on_a_thread(self.connection.close)
        for over in self._pauses:
            if not over.done():
                over.set_result(None)
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
        self,
        calls: Submitter,
        order: Submission,
        timeout_s: float,
        fail: Callable[[Exception], None],
    ) -> None:
        try:
            await self._connected(calls, min(self._patience_s, timeout_s))
        except (CallFailed, RuntimeError) as e:
            fail(e)
        else:
            calls.send(order)  # cancelled rows among them are never sent

    async def _connected(self, calls: Submitter, patience_s: float) -> None:
        # One thread waits for all who ask meanwhile.
        task = self._connecting.get(patience_s)
        if task is None:
            waiting = _on_a_thread(self.connection.wait_connected, calls, patience_s)
            task = self._connecting[patience_s] = self.loop.create_task(waiting)
            task.add_done_callback(lambda _: self._connecting.pop(patience_s))
        await asyncio.shield(task)

    def _deliver(
        self, take: Take, rows: Sequence[int], came: Any, at: int, request_id: int
    ) -> None:
        # On a thread of overlay.client.submitter.
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


def _fail_replies(replies: list[_Reply], error: Exception) -> None:
    for reply in replies:
        reply.fail(error)


class _Mapping:
    """One map: a task feeds it while its results are taken."""

    def __init__(
        self,
        post: _Post,
        kind: CallKind,
        timeout_s: float,
        chunk: int,
        window: int,
        patience_s: float | None,
        payloads: object,
    ) -> None:
        """payloads: as the map was given them, for how many they are."""
        self._post = post
        self._telling = Telling(post.connection, kind.route.handler, payloads)
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
        self._over: Exception | None = None  # why nothing more is sent
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
            self._telling.end()
            await asyncio.wait([feeder, looks])

    async def _look_again(self) -> None:
        """Whether the process is there: notices its loss, its return, and when it is too late."""
        try:
            why = await self._gone()
            while self._rows or self._orders:  # each payload that was taken has its result
                self._flush()
                orders = [order for order, _ in self._orders.values()]
                self._unsent += self._presence.take_back(orders, why)
                await self._post.pause(LOOK_S / 10)
        except CallFailed as e:  # closed meanwhile
            self._end(e)
        else:
            failed = self._failed - self._unsent
            self._end(ended_early(why, self._answered, failed, self._unsent))

    async def _gone(self) -> CallFailed:
        """Returns when the process was waited for in vain."""
        presence = self._presence
        while True:
            await self._post.pause(LOOK_S)
            self._telling.tell(self._answered, self._failed)
            was_away, self._is_away = self._is_away, presence.look_away()
            if was_away and not self._is_away:
                self._wake_feeder()
            if self._is_away and presence.is_over:
                why = await _on_a_thread(presence.last_look)
                if why is not None:
                    return why

    def _end(self, why: Exception) -> None:
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
        if not isinstance(came, Failure):
            self._presence.was_up = True  # also when it is lost again before the next look
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

    def _fail(self, first: int, error: Exception) -> None:
        del self._orders[first]
        self._end(error)

    def _give(self, result: bytes | CallFailed) -> None:
        self._open -= 1
        self._bytes -= len(result) if isinstance(result, bytes) else 0
        self._wake_feeder()

    def _wake_feeder(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
