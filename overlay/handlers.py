"""The user's functions: found by their configured name, called with a payload and a context.

    def handler(payload: bytes, context: Context) -> bytes

One that gives an iterator of bytes, as a function that yields does, has all of them as its result,
and need not hold them at once where parts are taken as they come (overlay.pieces).

Never a name from the wire: a request names a handler of the configuration, nothing else.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlay import clocks as time
from overlay.errors import ConfigError
from overlay.topology import HandlerSpec

RECURSION = sys.getrecursionlimit()  # what it is again after a handler that changed it


@dataclass
class Context:
    """What a handler may know of its call.

    deadline: monotonic seconds of this process. options: the handler's, overlaid by the process's.
    """

    process_id: str
    team: str
    request_id: int
    attempt: int
    deadline: float
    options: Mapping[str, Any]
    _ended: Sequence[int] = (0,)
    _row: int = 0

    def remaining_s(self) -> float:
        """Seconds until the caller stops waiting; never below 0."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def cancelled(self) -> bool:
        """True once nobody waits for the answer: the caller left or the deadline passed.

        A handler on a thread looks at it now and then and returns; one in a process is ended.
        """
        return bool(self._ended[self._row]) or time.monotonic() >= self.deadline

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """To the worker's log, in lines that carry the request's id."""
        return logging.LoggerAdapter(_log, {"request_id": self.request_id})


_log = logging.getLogger("overlay.handler")

Handler = Callable[[bytes, Context], "bytes | Iterator[bytes]"]


def echo(payload: bytes, context: Context) -> bytes:
    """The default handler: gives the payload back and says which process did."""
    return context.process_id.encode() + b": " + payload


def add_folder(folder: Path) -> None:
    """Puts the configuration's folder on the module path, so that handlers can lie beside it."""
    if str(folder) not in sys.path:
        sys.path.insert(1, str(folder))


def find(spec: HandlerSpec, function: str) -> Callable[..., Any]:
    """The function named "module:function". Raises ConfigError saying why it cannot be had."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(
            f"handler '{spec.name}': module '{module_name}' cannot be imported ({reason}); "
            f"it is looked for in the configuration file's folder and in the Python path"
        ) from e
    found = getattr(module, name, None)
    if not callable(found):
        what = "has no function" if found is None else "is not a function:"
        raise ConfigError(f"handler '{spec.name}': module '{module_name}' {what} '{name}'")
    return found  # type: ignore[no-any-return]
