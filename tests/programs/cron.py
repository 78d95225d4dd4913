"""A cron job: its output is not read, and it may have neither stdin nor stdout.

usage: python cron.py HOST:PORT FILE
"""

import logging
import sys

import overlay

address, path = sys.argv[1:]
logging.basicConfig(filename=path + ".log", level=logging.INFO)
print("begins")
with overlay.connect(address) as leader:
    results = list(leader.map(None, (f"row {n}" for n in range(1000))))
    assert leader.is_serving()
    try:
        leader.call("x", handler="nowhere")
    except overlay.CallFailed as e:
        logging.error("%s", e)
with open(path, "wb") as file:
    file.writelines(result + b"\n" for result in results)
print("is over")
