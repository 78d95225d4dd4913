"""The work, the same in every peer: answer `C: <payload>`, after a nap where the row wants one."""

from __future__ import annotations

import time

from benchmarks.rows import NAP_S


def answer(worker: str, payload: bytes, nap_s: float = 0.0) -> bytes:
    if nap_s:
        time.sleep(nap_s)
    return worker.encode() + b": " + payload


def tiny(payload: bytes, context) -> bytes:
    """The overlay's handler where a set-up says how many slots there are; else its own echo."""
    return answer(context.process_id, payload)


def nap(payload: bytes, context) -> bytes:
    """The overlay's handler for the 5 ms rows."""
    return answer(context.process_id, payload, NAP_S)
