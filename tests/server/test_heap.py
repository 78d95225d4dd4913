"""What a burst has left is given back when it is over."""

from __future__ import annotations

import subprocess
import sys

import pytest

BURST = """
from overlay.server import heap as memory

busy = True
kept = memory.HeapTrimmer(lambda: busy)
busy = False
kept.look()
blocks = [bytes(60_000) for _ in range(4000)]  # below what malloc would map by itself
last = blocks[1::100]  # so that what is freed lies between what is not
del blocks
held = memory.resident()
busy = True
kept.look()
assert memory.resident() > held - 32 * memory.MIB, "nothing is given back while it is busy"
busy = False
kept.look()
print((held - memory.resident()) // memory.MIB)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc keeps it so")
def test_memory_that_a_burst_has_left_goes_back_to_the_system():
    done = subprocess.run(
        [sys.executable, "-c", BURST], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) > 100
