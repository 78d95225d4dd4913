"""Pickling: a client can be pickled, a Future cannot, and an error keeps all its fields.

usage: python pickled.py HOST:PORT
"""

import asyncio
import concurrent.futures
import copy
import multiprocessing
import pickle
import sys

import overlay


def ask(leader, payload):
    with leader:
        return leader.call(payload, timeout=20)


def ask_nowhere(leader):
    with leader:
        leader.call("x", handler="nowhere", timeout=20)


def not_pickled(future):
    try:
        pickle.dumps(future)
    except TypeError as e:
        print("TypeError:", e)


async def pickle_asyncio(address):
    async with overlay.connect_async(address) as leader:
        not_pickled(leader.submit(None, "x"))
        async with pickle.loads(pickle.dumps(leader)) as other:
            print((await other.call("x")).result)


def main(address):
    spawn = multiprocessing.get_context("spawn")
    with (
        overlay.connect(address, patience_s=5) as leader,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        leader.call("x")  # a client in use can still be sent to a spawned process
        answer = pool.submit(ask, leader, "from there").result()
        print(answer.result, answer.coverage, answer.hops)
        try:
            pool.submit(ask_nowhere, leader).result()
        except overlay.CallFailed as e:
            print(type(e).__name__, e.code.name, e.executed.name, e.retry_after_s)
        not_pickled(leader.submit(None, "x"))
        with copy.copy(leader) as other:
            print(other.call("y").result)
    asyncio.run(pickle_asyncio(address))


if __name__ == "__main__":
    main(sys.argv[1])
