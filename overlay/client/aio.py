"""The client library for asyncio: `connect_async("host:port")` returns an AsyncClient.

    async with overlay.connect_async("192.168.1.1:50051") as client:
        answer = await client.call(b"hello")
        async for thumbnail in client.map("pictures", photos):
            ...

It has the same methods, errors and guarantees as Client. A client belongs to the first event loop
that uses it, and never blocks that loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any

from overlay.client import arguments
from overlay.client.arguments import CallOptions, MapOptions, Resume
from overlay.client.async_jobs import AsyncJob
from overlay.client.connection import PATIENCE_S, Connection
from overlay.client.event_loop import LoopBridge, on_a_thread
from overlay.client.job_status import JobChange, JobList, read_change, read_jobs
from overlay.client.jobs import submit_many
from overlay.client.map_run import Chunk, MapRun
from overlay.client.map_window import PAUSE_S
from overlay.client.partials import Parts
from overlay.client.results import Answer, read_value
from overlay.model.errors import CallFailed, ResumeError
from overlay.model.segments import Detail, Part
from overlay.security.lookup import Tls
from overlay.transport.channels import split_all
from overlay.transport.codec import pb2

CHECK_S = 0.25  # how often a map checks that the process is there
Payloads = Iterable[bytes | str] | AsyncIterable[bytes | str]
Args = Mapping[str, Any]
ManyArgs = Iterable[Args] | AsyncIterable[Args]


def connect_async(
    address: str, *, patience_s: float = PATIENCE_S, tls: Tls = None, lanes: bool = True
) -> AsyncClient:
    """A client for the process at `host:port`; the arguments are those of `connect`."""
    address, patience_s = arguments.as_address(address), arguments.as_patience(patience_s)
    split_all(address)
    has_lanes = arguments.as_flag("lanes", lanes)
    return AsyncClient(address, patience_s, arguments.as_tls(tls), has_lanes)


class AsyncClient:
    """One persistent connection, for the tasks of one event loop."""

    def __init__(
        self,
        address: str,
        patience_s: float = PATIENCE_S,
        tls: Tls = None,
        lanes: bool = True,
    ) -> None:
        self.address = address
        self._connection = Connection(address, patience_s, tls, lanes)
        self._patience_s = patience_s
        self._bridge = LoopBridge(self._connection, patience_s)

    @property
    def shown(self) -> str:
        """See Client.shown."""
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
        """See Client.call. Cancelling the waiting task cancels the request."""
        options = arguments.call_options(
            payload, args, mode, team, handler, timeout, want_parts, priority
        )
        answer: Answer = await self._bridge.ask(options, self._connection.read)
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
        """See Client.submit. Call it from a task or a callback of the loop."""
        options = arguments.submit_options(handler, payload, args, mode, team, timeout, priority)
        read = self._read_value if options.has_values else self._connection.read_result
        return self._bridge.ask(options, read)

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
        resume: Resume = None,
    ) -> AsyncIterator[Any]:
        """See Client.map; the payloads, or args, may be an async iterable too."""
        how = mode, team, timeout, window, chunksize, True, priority, patience_s, resume
        return self._map(arguments.map_options(handler, payloads, args, *how), numbered=False)

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
        resume: Resume = None,
    ) -> AsyncIterator[tuple[int, Any]]:
        """See Client.map_as_completed."""
        how = mode, team, timeout, window, chunksize, ordered, priority, patience_s, resume
        return self._map(arguments.map_options(handler, payloads, args, *how), numbered=True)

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
        """See Client.parts."""
        options = arguments.parts_options(payload, args, team, handler, timeout, priority)
        parts = Parts(arguments.as_first(first), in_items=options.has_values)
        return self._parts(options, parts)

    async def later(
        self,
        handler: str | None,
        payload: bytes | str | None = None,
        *,
        args: Args | None = None,
        mode: str = "any",
        team: str = "",
        key: str = "",
        priority: int = 0,
        limit_s: float | None = None,
        expires_s: float | None = None,
        start_at: float | datetime | None = None,
        every_s: float | None = None,
        attempts: int = 0,
        in_parts: bool = False,
        timeout: float | None = None,
    ) -> AsyncJob:
        """See Client.later."""
        options = arguments.job_options(
            handler,
            args is not None,
            mode,
            team,
            priority,
            limit_s,
            expires_s,
            start_at,
            every_s,
            attempts,
            in_parts,
            timeout,
        )
        body, key = arguments.job_payload(payload, args), arguments.job_key(key)
        sent = self._connection, options.request, body, key, options.timeout_s
        id_ = await on_a_thread(self._connection.jobs.submit, *sent)
        return AsyncJob(self._connection, id_, options.has_values)

    async def later_many(
        self,
        handler: str | None,
        payloads: Iterable[bytes | str] | None = None,
        *,
        args: Iterable[Args] | None = None,
        mode: str = "any",
        team: str = "",
        keys: Iterable[str] | None = None,
        priority: int = 0,
        limit_s: float | None = None,
        expires_s: float | None = None,
        start_at: float | datetime | None = None,
        attempts: int = 0,
        in_parts: bool = False,
        timeout: float | None = None,
    ) -> list[AsyncJob]:
        """See Client.later_many."""
        options = arguments.job_options(
            handler,
            args is not None,
            mode,
            team,
            priority,
            limit_s,
            expires_s,
            start_at,
            None,
            attempts,
            in_parts,
            timeout,
        )
        bodies, found = arguments.job_payloads(payloads, args, keys)
        ids = await on_a_thread(submit_many, self._connection, options, bodies, found)
        return [AsyncJob(self._connection, id_, options.has_values) for id_ in ids]

    def job(self, id: str) -> AsyncJob:
        """See Client.job."""
        return AsyncJob(self._connection, arguments.as_job_id(id))

    async def jobs(
        self,
        states: Iterable[str] = (),
        *,
        handler: str = "",
        limit: int = 100,
        before: str = "",
        timeout: float | None = None,
    ) -> JobList:
        """See Client.jobs."""
        request = arguments.jobs_request(states, handler, limit, before)
        asked = self._connection.list_jobs, request, arguments.as_timeout(timeout)
        return read_jobs(await on_a_thread(*asked))

    async def change_jobs(
        self,
        action: str,
        ids: Iterable[str] = (),
        *,
        states: Iterable[str] = (),
        timeout: float | None = None,
    ) -> JobChange:
        """See Client.change_jobs."""
        request = arguments.change_request(action, ids, states)
        asked = self._connection.change_jobs, request, arguments.as_timeout(timeout)
        return read_change(await on_a_thread(*asked))

    async def metrics(
        self,
        *,
        timeout: float | None = None,
        events: int = 0,
        requests: int = 0,
        functions: bool = False,
    ) -> pb2.MetricsResponse:
        """See Client.metrics."""
        request = arguments.metrics_request(events, requests, functions)
        return await on_a_thread(self._connection.metrics, request, arguments.as_timeout(timeout))

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """See Client.is_serving."""
        return await on_a_thread(self._connection.is_serving, arguments.as_timeout(timeout))

    async def close(self) -> None:
        """Closes the connection; open requests fail with CallCancelled."""
        await self._bridge.close()

    def __reduce__(self) -> tuple[type[AsyncClient], tuple[str, float]]:
        return type(self), (self.address, self._patience_s)  # connects anew where it is unpickled

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _parts(self, options: CallOptions, parts: Parts) -> AsyncIterator[Part]:
        inbox: asyncio.Queue[tuple[bool, Any, int, int]] = asyncio.Queue()

        def put(
            is_last: bool, rows: Sequence[int], delivered: Any, at: int, request_id: int
        ) -> None:
            inbox.put_nowait((is_last, delivered, at, request_id))

        submission = self._bridge.send(
            options.kind,
            [options.body],
            options.timeout_s,
            partial(put, True),
            lambda error: inbox.put_nowait((True, error, 0, 0)),
            partial(put, False),
        )
        is_last = False
        try:
            while not (is_last or parts.is_over):
                is_last, delivered, at, request_id = await inbox.get()
                for part in parts.last(delivered, at) if is_last else parts.early(delivered, at):
                    yield part
            if is_last and isinstance(delivered, Detail):
                raise self._connection.error_for(delivered, options.timeout_s, request_id)
            if isinstance(delivered, Exception):
                raise delivered
        finally:
            if not is_last:
                self._connection.cancel(submission)

    def _map(self, options: MapOptions, numbered: bool) -> AsyncIterator[Any]:
        self._connection.check_open()
        return _Map(self._bridge, options).results(numbered)

    def _read_value(self, delivered: Any, at: int, request_id: int, timeout_s: float) -> Any:
        return read_value(self._connection.read_result(delivered, at, request_id, timeout_s))


class _Map:
    """Drives one map: one task feeds it while results are taken, another checks the connection."""

    def __init__(self, bridge: LoopBridge, options: MapOptions) -> None:
        self._bridge = bridge
        self._payloads = options.bodies
        self._run = MapRun(bridge.connection, options, bridge.hand_over(self._read))
        self._unsent: list[bytes] = []  # the next chunk; the map is not done while it has rows
        self._size = 0  # of `_unsent`, in bytes
        self._changed = asyncio.Event()  # there may be results, or the map is over
        self._has_room = asyncio.Event()  # more may be sent, or the map is over

    async def results(self, numbered: bool) -> AsyncIterator[Any]:
        """numbered: gives (index, result) pairs, failures included; else failures are raised."""
        run = self._run
        window = run.window
        if run.record is not None:
            try:
                await on_a_thread(run.check_ahead)
            except BaseException:
                run.close()
                raise
        feeder = self._bridge.loop.create_task(self._feed())
        feeder.add_done_callback(lambda _: self._changed.set())
        checker = self._bridge.loop.create_task(self._check_connection())
        try:
            while True:
                self._changed.clear()
                if feeder.done():
                    feeder.result()  # raises an error of the payloads
                await self._commit_if_due()
                while (ready := run.take()) is not None:
                    first, results = ready
                    last = first + window.taking - 1
                    for index, result in enumerate(results, first):
                        if index == last:  # before the yield, so that more is sent meanwhile
                            window.release()
                            self._has_room.set()
                        if numbered:
                            yield index, result
                        elif isinstance(result, CallFailed):
                            raise result
                        else:
                            yield result
                if run.is_done and not self._unsent:
                    break
                await self._changed.wait()
            if run.record is not None:
                await on_a_thread(run.record.finish)
            run.raise_if_ended_early()
        finally:
            checker.cancel()
            feeder.cancel()
            run.close()
            await asyncio.wait([feeder, checker])

    async def _feed(self) -> None:
        window = self._run.window
        if isinstance(self._payloads, AsyncIterable):
            async for payload in self._payloads:
                if not await self._add(arguments.as_bytes(payload)):
                    return
            window.is_fed = True
        while await self._room_for(window.chunk):
            self._unsent, self._size = window.gather(self._payloads)
            chunk = self._run.recall(self._unsent, self._size)
            if not chunk.is_recorded and not await self._begins():
                self._unsent = []
                return
            self._send(chunk)
            # Lets results be taken between two chunks.
            await (self._bridge.pause(PAUSE_S) if window.pauses else asyncio.sleep(0))

    async def _add(self, payload: bytes) -> bool:
        """Returns False when no more payloads are wanted."""
        if not (await self._room_for(len(self._unsent) + 1) and await self._begins()):
            return False
        if not self._unsent:
            self._bridge.loop.call_soon(self._flush)
        self._unsent.append(payload)
        self._size += len(payload)
        if self._run.window.is_full(len(self._unsent), self._size):
            self._flush()
            await asyncio.sleep(0)
        return True

    async def _room_for(self, rows: int) -> bool:
        """Waits until that many more may be sent; False when the map is over."""
        while not self._run.may_send(rows):
            if self._run.is_over:
                return False
            self._flush()
            self._has_room.clear()
            await self._has_room.wait()
        return True

    async def _begins(self) -> bool:
        """Waits for the connection before the first chunk; False when it fails."""
        if not self._run.has_begun:
            try:
                await self._bridge.wait_ready(self._run.timeout_s)
            except (CallFailed, RuntimeError) as e:  # RuntimeError: no thread can be started
                self._run.fail(e)
                return False
            self._run.begin()
        return True

    def _flush(self) -> None:
        self._send(self._run.recall(self._unsent, self._size))

    def _send(self, chunk: Chunk) -> None:
        self._unsent, self._size = [], 0
        self._run.send(chunk)
        if self._run.is_over or self._run.window.has_ready:
            self._wake()

    async def _commit_if_due(self) -> None:
        record = self._run.record
        if record is not None and record.is_due:
            await on_a_thread(record.commit)

    def _read(self, *delivered: Any) -> None:
        self._run.read(*delivered)
        self._changed.set()

    async def _check_connection(self) -> None:
        run = self._run
        try:
            while True:
                await self._bridge.pause(PAUSE_S if run.is_away else CHECK_S)
                run.check_connection()
                if run.needs_last_check:
                    await on_a_thread(run.last_check)
                await self._commit_if_due()  # also while nobody takes results
                self._wake()
        except (CallFailed, ResumeError) as e:  # CallFailed: the client was closed
            run.fail(e)
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._has_room.set()
