"""The event loop of one async handler, which is called on other threads.

Owns a thread, "handler-NAME-loop", until `close`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from overlay.workers.api import Context, Handler, NotWanted

log = logging.getLogger("overlay.handler")  # a task's traceback may quote the payload

CHECK_S = 0.1  # how often it checks that the caller is still waiting


class EventLoop:
    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        threading.Thread(target=self._serve, name=f"handler-{name}-loop", daemon=True).start()

    def close(self) -> None:
        """Cancels all tasks. May be called twice."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._end)

    def blocking(self, function: Callable[..., Any]) -> Handler:
        """Wraps an async function of bytes as one that blocks its thread until it has a result."""

        def call(payload: bytes, context: Context) -> Any:
            return self.result_of(function(payload, context), context)

        return call

    def result_of(self, found: Any, context: Context) -> Any:
        """Waits for the result of an async function; of an async generator, iterates over items.

        Raises what the function raises, and NotWanted if it is cancelled because its caller left.
        """
        if isinstance(found, AsyncIterator):
            return self._items(found, context)
        return self._run(found, context) if inspect.isawaitable(found) else found

    def _run(self, awaitable: Awaitable[Any], context: Context) -> Any:
        work = asyncio.run_coroutine_threadsafe(_outcome_of(awaitable), self._loop)
        while True:
            try:
                result, error = work.result(CHECK_S)
                break
            except concurrent.futures.TimeoutError:
                if context.cancelled:
                    work.cancel()
                    raise NotWanted from None
            except concurrent.futures.CancelledError:  # by `close`
                raise NotWanted from None
        if error is not None:
            raise error
        return result

    def _items(self, found: AsyncIterator[Any], context: Context) -> Iterator[Any]:
        try:
            while True:
                try:
                    item = self._run(found.__anext__(), context)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if hasattr(found, "aclose"):
                with contextlib.suppress(NotWanted, RuntimeError):  # or it is still running
                    self._run(found.aclose(), context)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._is_closed:
            try:
                self._loop.run_forever()
            except BaseException:
                # For example SystemExit from a task that the function left running.
                log.exception("handler %s: a task ended its event loop", self._name)
        self._loop.close()

    def _end(self) -> None:
        self._is_closed = True
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)


async def _outcome_of(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """The result, or the exception raised: a SystemExit of the task would end the loop."""
    try:
        return await awaitable, None
    except BaseException as e:  # noqa: BLE001 - raised again on the thread that waits
        return None, e
