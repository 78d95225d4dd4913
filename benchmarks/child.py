"""A child process: python -m benchmarks.child PEER ROLE JSON

ROLE is a function of the peer's module, for example `worker(ready, **arguments)`: it calls ready()
once it serves, and serves until it is ended. The role "caller" is the peer's client: it reads works
from stdin, one JSON object a line, and writes its results to stdout in the same way. Both end when
their stdin does, so nothing is left over when the benchmark is killed.
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
    # What libraries print goes to stderr; only results go to the real stdout.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    caller = module.Caller(**given)
    print(json.dumps({"ready": True}), file=results, flush=True)
    for line in sys.stdin:
        print(json.dumps(measured(caller, json.loads(line))), file=results, flush=True)
    caller.close()


def measured(caller: Any, work: dict[str, Any]) -> dict[str, Any]:
    """The tally's report, or {"error": a sentence}."""
    work["workers"] = tuple(work["workers"])
    try:
        return caller.run(Work(**work)).report()
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main(*sys.argv[1:4])
