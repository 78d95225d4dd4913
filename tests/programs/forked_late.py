"""A program that forks while its clients are in use: they raise in the child only.

usage: python forked_late.py HOST:PORT
"""

import asyncio
import multiprocessing
import os
import sys

import overlay

sys.stdout.reconfigure(line_buffering=True)  # or a child writes what the parent has kept
ADDRESS = sys.argv[1]
leader = overlay.connect(ADDRESS)
others = overlay.connect_async(ADDRESS)
unused = overlay.connect(ADDRESS)


async def _all(results):
    return [result async for result in results]


def verbs(pending, results):
    """Each must raise in a child without waiting."""
    yield "call", lambda: leader.call("x", timeout=60)
    yield "forward", lambda: leader.forward("x", timeout=60)
    yield "submit", lambda: leader.submit(None, "x").result()
    yield "map", lambda: list(leader.map(None, ["x"]))
    yield "parts", lambda: list(leader.parts("x"))
    yield "metrics", leader.metrics
    yield "is_serving", leader.is_serving
    yield "logs", leader.logs
    yield "an open Future", pending.result
    yield "an open Future's exception", pending.exception
    yield "an open map", lambda: list(results)
    yield "asyncio's call", lambda: asyncio.run(others.call("x"))
    yield "asyncio's metrics", lambda: asyncio.run(others.metrics())
    another = overlay.connect_async(ADDRESS)
    yield "asyncio's map", lambda: asyncio.run(_all(another.map(None, ["x"])))
    yield "a client that was not used", lambda: unused.call("x")
    yield "a client made in the child", lambda: overlay.connect(ADDRESS).call("x")


def child(*open_ones):
    for name, verb in verbs(*open_ones):
        try:
            print("CHILD GOT", name, verb())
        except overlay.CallFailed as e:
            if "forked" not in str(e):
                print("CHILD", name, e)
    leader.close()
    leader.shutdown()
    asyncio.run(others.close())
    unused.close()
    print("child is over", flush=True)


def by_fork(*open_ones):
    pid = os.fork()
    if not pid:
        child(*open_ones)
        sys.exit(7)  # a normal exit, with the interpreter's clean-up
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def by_multiprocessing(*open_ones):
    process = multiprocessing.get_context("fork").Process(target=child, args=open_ones)
    process.start()
    process.join()
    print("exit code", process.exitcode)


async def ask_and_fork(*open_ones):
    slow = others.submit("slow", "1")
    await others.call("x")
    by_multiprocessing(*open_ones)
    print(await slow, (await others.call("x")).result)
    await others.close()


pending = leader.submit("slow", "1")
results = leader.map("slow", ["0"] * 50 + ["1"], window=100)
next(results)
by_fork(pending, results)
asyncio.run(ask_and_fork(pending, results))
# The children have not disturbed the parent.
print(pending.result(), *set(results), leader.call("x").result)
leader.close()
pid = os.fork()  # after all clients are closed
if not pid:
    print("the child:", unused.call("x").result, overlay.connect(ADDRESS).call("y").result)
    sys.exit()
print("exit code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
