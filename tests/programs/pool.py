"""A pool of forked processes, each with its own client; the parent has none.

usage: python pool.py HOST:PORT
"""

import multiprocessing
import sys

import overlay


def begin(address):
    global leader
    leader = overlay.connect(address)


def work(name):
    return leader.call(name, timeout=10).result.decode()


def fail(name):
    leader.call(name, handler="nowhere", timeout=10)


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2, begin, sys.argv[1:]) as pool:
        print(*pool.map(work, ["a", "b", "c"]))
        try:
            pool.apply(fail, ["d"])  # the child's exception, pickled
        except overlay.CallFailed as e:
            print(type(e).__name__, e.code.name, e.executed.name, e)
