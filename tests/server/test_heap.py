"""Memory that a burst has used is returned when it is over."""

from __future__ import annotations

import subprocess
import sys

import pytest

BURST = """
from overlay.server import heap as memory

busy = True
trimmer = memory.HeapTrimmer(lambda: busy)
busy = False
trimmer.trim()
blocks = [bytes(60_000) for _ in range(4000)]  # below what malloc would map by itself
last = blocks[1::100]  # so that freed blocks lie between used ones
del blocks
used = memory.resident()
busy = True
trimmer.trim()
assert memory.resident() > used - 32 * memory.MIB, "nothing is returned while it is busy"
busy = False
trimmer.trim()
print((used - memory.resident()) // memory.MIB)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc keeps freed memory")
def test_memory_used_by_a_burst_returns_to_the_system():
    done = subprocess.run(
        [sys.executable, "-c", BURST], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 100
