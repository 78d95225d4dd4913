"""Jobs for asyncio: waiting for one holds no thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from overlay.client.arguments import as_timeout
from overlay.client.connection import Connection
from overlay.client.event_loop import on_a_thread
from overlay.client.job_status import JobStatus, answer_of, parts_of, read_job, result_of
from overlay.client.job_wait import PART_TIMEOUT_S, JobWait, PartReader
from overlay.client.results import Answer, read_value
from overlay.model.errors import CallFailed, Unavailable
from overlay.model.segments import Part
from overlay.transport.codec import pb2


class AsyncJob:
    """See Job; for the tasks of an event loop."""

    def __init__(self, connection: Connection, id_: str, has_value: bool = False) -> None:
        self.id = id_
        self._connection = connection
        self._has_value = has_value

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    async def status(self, *, timeout: float | None = None) -> JobStatus:
        """See Job.status."""
        request = pb2.ResultRequest(id=self.id, without_answer=True)
        return await self._ask(request, as_timeout(timeout))

    async def wait(self, timeout: float | None = None) -> JobStatus:
        """See Job.wait."""
        limit_s = None if timeout is None else as_timeout(timeout)
        wait = JobWait(self.id, limit_s, self._connection.map_patience(None))
        while True:
            try:
                found = await self._ask(*wait.next())
            except Unavailable as e:
                await asyncio.sleep(wait.pause_s(e))
                continue
            if wait.is_over(found):
                return found

    async def answer(self, timeout: float | None = None) -> Answer:
        """See Job.answer."""
        return answer_of(await self.wait(timeout))

    async def result(self, timeout: float | None = None) -> Any:
        """See Job.result."""
        found = result_of(await self.wait(timeout))
        if not isinstance(found, bytes):
            found = b"".join([chunk async for chunk in self.chunks(found)])
        return read_value(found) if self._has_value else found

    async def parts(self, timeout: float | None = None) -> AsyncIterator[Part]:
        """See Job.parts."""
        for part in parts_of(await self.wait(timeout)):
            chunks = [chunk async for chunk in self.chunks(part)]
            yield replace(part, result=b"".join(chunks))

    async def chunks(self, part: Part) -> AsyncIterator[bytes]:
        """See Job.chunks."""
        reader = PartReader(self.id, part, self._connection.map_patience(None))
        while not reader.is_over:
            asked = self._connection.job_part, reader.next(), PART_TIMEOUT_S
            try:
                chunk = await on_a_thread(*asked)
            except Unavailable as e:
                await asyncio.sleep(reader.pause_s(e))
                continue
            yield reader.take(chunk)

    async def cancel(self, *, timeout: float | None = None) -> bool:
        """See Job.cancel."""
        request = pb2.ChangeRequest(action=pb2.CANCEL, ids=[self.id])
        asked = self._connection.change_jobs, request, as_timeout(timeout)
        return bool((await on_a_thread(*asked)).changed)

    async def _ask(self, request: pb2.ResultRequest, timeout_s: float) -> JobStatus:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[pb2.Job | CallFailed] = loop.create_future()

        def put(found: pb2.Job | CallFailed) -> None:
            if not answered.done():
                answered.set_result(found)

        def done(found: pb2.Job | CallFailed) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(put, found)

        give_up = self._connection.job_result_soon(request, timeout_s, done)
        try:
            found = await answered
        finally:
            give_up()
        if isinstance(found, CallFailed):
            raise found
        return read_job(found)
