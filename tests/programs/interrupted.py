"""Ctrl-C, again and again, at any moment of a main thread that sends: as in a notebook.

usage: python interrupted.py HOST:PORT
"""

import logging
import signal
import sys
import threading
import time

import overlay

TIMES = 300
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
caught = 0


def interrupt(main, over):
    # To the thread that sends; any other would only pass it on.
    while not over.wait(0.002):
        signal.pthread_kill(main, signal.SIGINT)


with overlay.connect(sys.argv[1], lanes=False) as leader:
    leader.call("first")
    over = threading.Event()
    interrupting = threading.Thread(target=interrupt, args=(threading.get_ident(), over))
    interrupting.start()
    until = time.monotonic() + 60
    while caught < TIMES and time.monotonic() < until:
        try:
            while True:
                leader.submit("slow", b"0")
                leader.call(b"0", handler="slow", mode="any")
                for _ in leader.map("slow", [b"0"] * 20):
                    pass
        except KeyboardInterrupt:
            caught += 1
    while True:
        try:
            over.set()
            interrupting.join()
            break
        except KeyboardInterrupt:
            continue
    print(leader.call("last", timeout=20).result.decode())
print("closed", caught >= TIMES)
