"""A child process: python -m benchmarks.child PEER ROLE JSON

ROLE is a function of the peer's module: `worker(ready, **arguments)` and the like serve until they
are ended and call ready() when they do. The role "caller" is the peer's client: it takes works on
stdin, one JSON object a line, and answers on stdout in the same way. Either ends with its stdin, so
nothing stays when the benchmark is killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.children import READY
from benchmarks.loads import Work


def main(peer: str, role: str, arguments: str) -> None:
    module = peers.load(peer)
    given = json.loads(arguments)
    if role == "caller":
        serve_caller(module, given)
    else:
        threading.Thread(target=end_with_stdin, name="parent", daemon=True).start()
        getattr(module, role)(Path(os.environ[READY]).touch, **given)


def end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def serve_caller(module: Any, given: dict[str, Any]) -> None:
    # Libraries print; their words go where stderr goes, the answers to the real stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    caller = module.Caller(**given)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measured(caller, json.loads(line))), file=answers, flush=True)
    caller.close()


def measured(caller: Any, work: dict[str, Any]) -> dict[str, Any]:
    """The tally's report, or {"error": sentence}."""
    work["workers"] = tuple(work["workers"])
    try:
        return caller.run(Work(**work)).report()
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main(*sys.argv[1:4])
