"""The machine's own clocks, taken once: a test that freezes time stops none of our waits.

Stands in for the module `time`, under its name: `from overlay.model import clocks as time`.
"""

from __future__ import annotations

import importlib.util
import time as shared
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType

sleep = shared.sleep
localtime, strftime = shared.localtime, shared.strftime  # of times that are given


def _copy() -> ModuleType:
    # freezegun replaces a clock by identity, wherever a loaded module has it by name. It knows
    # neither this copy nor its functions, which are also there when it came before us.
    spec = shared.__spec__
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


_own = _copy()
# On Windows node.py puts a finer clock in its place; a replacement of a test's is no builtin.
_name = shared.monotonic.__name__ if isinstance(shared.monotonic, BuiltinFunctionType) else ""
monotonic: Callable[[], float] = getattr(_own, _name or "monotonic")
time: Callable[[], float] = _own.time


class Timeout(float):
    """Seconds for a call of gRPC's, which adds them to the clock that it finds: that has stopped,
    where a test has frozen time, or stands in another year."""

    def __radd__(self, now: float) -> float:
        return time() + float(self)
