"""What every worker does, in every peer: `C: <payload>`, after a nap where the row asks for one."""

from __future__ import annotations

import time

from benchmarks.rows import NAP_S


def answer(worker: str, payload: bytes, nap_s: float = 0.0) -> bytes:
    if nap_s:
        time.sleep(nap_s)
    return worker.encode() + b": " + payload


def nap(payload: bytes, context) -> bytes:
    """The overlay's handler for the rows with 5 ms; without them it runs its built-in echo."""
    return answer(context.process_id, payload, NAP_S)
