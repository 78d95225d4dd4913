"""The machine's own clocks, taken once, so that a test which freezes time does not stop our waits.

Used in place of the module `time`: `from overlay.model import clocks as time`.
"""

from __future__ import annotations

import importlib.util
import time as shared
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType

sleep = shared.sleep
localtime, strftime = shared.localtime, shared.strftime  # for times that are passed in


def _copy() -> ModuleType:
    # freezegun replaces a clock by identity wherever a loaded module holds it. It does not know
    # this copy's functions, which are the real ones even if it was loaded before us.
    spec = shared.__spec__
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


_own = _copy()
# On Windows node.py installs a finer clock; a test's replacement is not a builtin.
_name = shared.monotonic.__name__ if isinstance(shared.monotonic, BuiltinFunctionType) else ""
monotonic: Callable[[], float] = getattr(_own, _name or "monotonic")
time: Callable[[], float] = _own.time


class Timeout(float):
    """Seconds for a gRPC call. gRPC adds them to time.time(), which in a test with frozen time has
    stopped, or is in another year."""

    def __radd__(self, now: float) -> float:
        return time() + float(self)
