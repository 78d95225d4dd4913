"""The loads, which run in a peer's caller process: they send, check every answer and take times.

    Work -> Caller.run -> Tally

A caller is a FuturesCaller (with submit and result) or a LoopCaller (with an asyncio request); each
peer derives from the one that its own documentation would use. A load counts right answers only; a
wrong one ends it with WrongAnswer.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.figures import quantile

TIMEOUT_S = 30.0  # of one call, where the peer has timeouts
LARGE = 64 * 1024  # bytes of the calls that are made beside small ones
SETTLING_S = 0.5  # until clients have the lanes that they ask for
NUMBER = 16  # digits of the number with which a payload begins
STRIDE = 10**9  # from the first number of a thread to that of the next
now = time.perf_counter


class WrongAnswer(Exception):
    """A peer's answer is not the work's result."""


@dataclass(frozen=True)
class Work:
    """One measurement, as the driver asks for it. count: items of a bulk; 0 for a timed load."""

    load: str
    workers: tuple[str, ...]
    mode: str = "any"
    callers: int = 1
    size: int = NUMBER
    seconds: float = 0.6
    count: int = 0
    beside: int = 0
    clients: int = 1
    lanes: bool = True


@dataclass
class Tally:
    """The right answers and how long they took. latencies: seconds, of blocking calls only."""

    work: Work
    answers: int = 0
    seconds: float = 0.0
    beside: int = 0
    by_worker: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def check(self, payload: bytes, answer: bytes) -> None:
        if self.work.mode == "all":
            self._check_all(payload, answer)
        else:
            worker, mark, rest = answer.partition(b": ")
            if not mark or rest != payload:
                raise WrongAnswer(f"{answer[:40]!r} for {payload[:20]!r}")
            self.by_worker[worker.decode()] += 1
        self.answers += 1

    def _check_all(self, payload: bytes, answer: bytes) -> None:
        wanted = b"\n".join(name.encode() + b": " + payload for name in self.work.workers)
        if answer != wanted:
            raise WrongAnswer(f"{answer[:80]!r} for {payload[:20]!r}")

    def add(self, other: Tally) -> None:
        self.answers += other.answers
        self.by_worker += other.by_worker
        self.latencies += other.latencies

    def report(self) -> dict[str, Any]:
        """For the driver. Raises WrongAnswer when an answer did not come from a worker."""
        strangers = set(self.by_worker) - set(self.work.workers)
        if strangers:
            raise WrongAnswer(f"answers from {', '.join(sorted(strangers))}, not a worker")
        found = {"answers": self.answers, "seconds": self.seconds, "by_worker": self.by_worker}
        if self.latencies:
            found["p50_ms"] = quantile(self.latencies, 0.5) * 1000
            found["p99_ms"] = quantile(self.latencies, 0.99) * 1000
        if self.work.beside:
            found["beside"] = self.beside
        return found


def payloads(work: Work, thread: int = 0, size: int = 0) -> Iterator[bytes]:
    """Numbered payloads until the work's time is over or its count is reached."""
    until = now() + work.seconds
    first = thread * STRIDE
    numbers = range(first, first + work.count) if work.count else itertools.count(first)
    filler = b"." * ((size or work.size) - NUMBER)
    for number in numbers:
        if not work.count and now() >= until:
            return
        yield b"%016d" % number + filler


class Caller:
    """One client of a peer, used by one load at a time. The two classes below implement it."""

    call: Callable[[bytes, str], bytes]  # payload, mode: one blocking call, from any thread
    map: Callable[[list[bytes], str], Iterable[bytes]]  # the answers, in the order of the items
    window: Callable[[Work], Tally]

    def run(self, work: Work) -> Tally:
        loads = {
            "window": self.window,
            "threads": lambda w: threads(self.call_of, w),
            "unary": lambda w: threads(self.unary_of, w),
            "bulk": lambda w: bulk(self.map, w),
            "bulk_singly": lambda w: bulk(self.map_singly, w),
            "clients": lambda w: clients([self.client(n, w.lanes) for n in range(w.clients)], w),
        }
        return loads[work.load](work)

    def client(self, number: int, lanes: bool) -> Caller:
        """One of several clients, which is kept; for peers that support the load "clients"."""
        raise NotImplementedError

    def map_singly(self, items: list[bytes], mode: str) -> Iterable[bytes]:
        return self.map(items, mode)

    def call_of(self, thread: int) -> Callable[[bytes, str], bytes]:
        """What one calling thread uses; a peer whose connections are per thread keeps one each."""
        return self.call

    def unary_of(self, thread: int) -> Callable[[bytes, str], bytes]:
        return self.call_of(thread)

    def close(self) -> None:
        pass


class FuturesCaller(Caller):
    """For clients whose calls return something to wait for."""

    bulk_window = 64  # outstanding in `map`, for peers without a map of their own
    submit: Callable[[bytes, str], Any]  # payload, mode; the peer's; returns what `result` takes

    def result(self, handle: Any) -> bytes:
        return handle.result(TIMEOUT_S)

    def call(self, payload: bytes, mode: str) -> bytes:
        return self.result(self.submit(payload, mode))

    def window(self, work: Work) -> Tally:
        tally = Tally(work)
        began = now()
        for payload, answer in self._windowed(payloads(work), work.mode, work.callers):
            tally.check(payload, answer)
        tally.seconds = now() - began
        return tally

    def map(self, items: list[bytes], mode: str) -> Iterable[bytes]:
        return (answer for _, answer in self._windowed(items, mode, self.bulk_window))

    def _windowed(
        self, items: Iterable[bytes], mode: str, outstanding: int
    ) -> Iterator[tuple[bytes, bytes]]:
        pending: deque[tuple[bytes, Any]] = deque()
        for payload in items:
            pending.append((payload, self.submit(payload, mode)))
            if len(pending) == outstanding:
                oldest, handle = pending.popleft()
                yield oldest, self.result(handle)
        while pending:
            oldest, handle = pending.popleft()
            yield oldest, self.result(handle)


class LoopCaller(Caller):
    """For asyncio clients: a loop on a thread of its own, which ends with close()."""

    bulk_window = 512  # tried for NATS: 64 is slower, 1,000 is not faster
    request: Callable[[bytes, str], Awaitable[bytes]]  # payload, mode; the peer's

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop", daemon=True)
        self._thread.start()

    def wait(self, coroutine: Any, within_s: float = TIMEOUT_S) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(within_s)

    def call(self, payload: bytes, mode: str) -> bytes:
        return self.wait(self.request(payload, mode))

    def window(self, work: Work) -> Tally:
        return self.wait(self._window(work), work.seconds + TIMEOUT_S)

    def map(self, items: list[bytes], mode: str) -> Iterable[bytes]:
        return self.wait(self._map(items, mode), 10 * TIMEOUT_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    async def _window(self, work: Work) -> Tally:
        tally = Tally(work)
        shared = payloads(work)

        async def one() -> None:
            for payload in shared:
                tally.check(payload, await self.request(payload, work.mode))

        began = now()
        await asyncio.gather(*(one() for _ in range(work.callers)))
        tally.seconds = now() - began
        return tally

    async def _map(self, items: list[bytes], mode: str) -> list[bytes]:
        answers = [b""] * len(items)
        shared = iter(enumerate(items))

        async def one() -> None:
            for place, payload in shared:
                answers[place] = await self.request(payload, mode)

        await asyncio.gather(*(one() for _ in range(self.bulk_window)))
        return answers


def bulk(map_: Callable[[list[bytes], str], Iterable[bytes]], work: Work) -> Tally:
    tally = Tally(work)
    items = list(payloads(work))
    began = now()
    for payload, answer in zip(items, map_(items, work.mode), strict=True):
        tally.check(payload, answer)
    tally.seconds = now() - began
    return tally


def clients(callers: list[Caller], work: Work) -> Tally:
    """Each caller with its window, on a thread. What they send first, until they have lanes, is not
    counted."""
    start = _Start(len(callers))

    def run(caller: Caller) -> tuple[Tally, float]:
        try:
            caller.window(replace(work, seconds=SETTLING_S))
            start.wait()
            return caller.window(work), now()
        except Exception:
            start.abort()
            raise

    with ThreadPoolExecutor(len(callers), "client") as pool:
        done = [pool.submit(run, caller) for caller in callers]
    _raise_cause([error for each in done if isinstance(error := each.exception(), Exception)])
    found = [each.result() for each in done]
    total = Tally(work, seconds=max(ended for _, ended in found) - start.at)
    for tally, _ in found:
        total.add(tally)
    return total


def threads(call_of: Callable[[int], Callable[[bytes, str], bytes]], work: Work) -> Tally:
    """Blocking callers, each on a thread; work.beside more of them send 64 KiB meanwhile."""
    sizes = [work.size] * work.callers + [LARGE] * work.beside
    start = _Start(len(sizes))
    team = [_Thread(call_of(i), work, i, size, start) for i, size in enumerate(sizes)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    _raise_cause([thread.error for thread in team if thread.error])
    total = Tally(work, seconds=max(thread.ended for thread in team) - start.at)
    for thread in team[: work.callers]:
        total.add(thread.tally)
    total.beside = sum(thread.tally.answers for thread in team[work.callers :])
    return total


def _raise_cause(errors: list[Exception]) -> None:
    """One thread's failure breaks the barrier for all others; that failure is the one to raise."""
    broken = threading.BrokenBarrierError
    for error in sorted(errors, key=lambda error: isinstance(error, broken)):
        raise error


class _Start(threading.Barrier):
    """Lets all threads go at once. The last one to arrive notes the time before any of them goes: a
    thread that only watches might run long after the others have begun."""

    def __init__(self, parties: int) -> None:
        super().__init__(parties, action=self._note, timeout=2 * TIMEOUT_S)
        self.at = 0.0

    def _note(self) -> None:
        self.at = now()


class _Thread(threading.Thread):
    """One blocking caller. Its first call, which may connect, is verified but not timed."""

    def __init__(self, call, work: Work, index: int, size: int, start: _Start) -> None:
        super().__init__(name=f"caller-{index}", daemon=True)
        self.error: Exception | None = None
        self.tally = Tally(work)
        self.ended = 0.0
        self._call, self._work, self._index, self._size = call, work, index, size
        self._go = start

    def run(self) -> None:
        try:
            self._warm_up()
            self._go.wait()
            self._repeat()
        except Exception as error:  # noqa: BLE001 - raised again where the threads are joined
            self.error = error
            self._go.abort()

    def _warm_up(self) -> None:
        payload = b"%016d" % (self._index * STRIDE) + b"." * (self._size - NUMBER)
        Tally(self._work).check(payload, self._call(payload, self._work.mode))

    def _repeat(self) -> None:
        call, check, mode = self._call, self.tally.check, self._work.mode
        note = self.tally.latencies.append
        for payload in payloads(self._work, self._index, self._size):
            began = now()
            answer = call(payload, mode)
            note(now() - began)
            check(payload, answer)
        self.ended = now()
