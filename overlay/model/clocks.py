"""The machine's real clocks, in a private copy: a test that freezes time cannot stop our waits.

Use it in place of the module `time`: `from overlay.model import clocks as time`.
"""

from __future__ import annotations

import importlib.util
import time as shared
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType

sleep = shared.sleep
localtime, strftime = shared.localtime, shared.strftime  # they format times passed to them


def _copy() -> ModuleType:
    # freezegun replaces clock functions by identity, wherever a loaded module holds one. It cannot
    # know the functions of this copy, which are the real ones even if freezegun was loaded first.
    spec = shared.__spec__
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


_own = _copy()
# On Windows node.py installs a finer clock, which is a builtin; a test's replacement is not.
_name = shared.monotonic.__name__ if isinstance(shared.monotonic, BuiltinFunctionType) else ""
monotonic: Callable[[], float] = getattr(_own, _name or "monotonic")
time: Callable[[], float] = _own.time


def utc_day(time_s: float) -> str:
    """The day of a time in seconds since 1970, the same on machines in all time zones."""
    try:
        return shared.strftime("%Y-%m-%d", shared.gmtime(time_s))
    except (ValueError, OverflowError, OSError):  # no date: others write what they like
        return "an unknown day"


class Timeout(float):
    """The timeout of a gRPC call, in seconds.

    gRPC adds it to time.time(), which is wrong while a test freezes time."""

    def __radd__(self, now: float) -> float:
        return time() + float(self)
