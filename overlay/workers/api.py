"""The user's functions: found by their configured name, called with a payload and a context.

    def handler(payload: bytes, context: Context) -> bytes

A function that returns an iterator of bytes, as one that yields does, has all of them together as
its result, and need not hold them at once where parts are taken as they come (transport.chunks).
From every other kind of function overlay.workers.typed makes one of these.

No name from the wire is ever imported: a request names a handler of the configuration.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from overlay.model import clocks as time
from overlay.model.errors import ConfigError
from overlay.model.segments import Segment
from overlay.model.topology import HandlerSpec, Process
from overlay.workers import user_modules
from overlay.workers.user_modules import Source, Sources

ROOT = Path(__file__).resolve().parents[2]
RECURSION = sys.getrecursionlimit()  # restored after a handler that changed it


@dataclass
class Context:
    """What a handler is told about its call.

    deadline: monotonic seconds of this process. options: the handler's, then the
    process's, which win.
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
        """Whether the answer is no longer wanted: the caller left or the deadline passed.

        A handler on a thread should check this now and then; one in a process is killed.
        """
        return bool(self._ended[self._row]) or time.monotonic() >= self.deadline

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """Writes to the worker's log, in lines that carry the request's id."""
        return logging.LoggerAdapter(_log, {"request_id": self.request_id})


def context_of(
    process: Process, segment: Segment, row: int, options: Mapping[str, Any], ended: Sequence[int]
) -> Context:
    """What the handler of this row is told. ended: by row, whether its answer is not wanted."""
    return Context(
        process.id,
        process.team,
        segment.all_ids[row],
        segment.attempt,
        segment.deadline,
        options,
        ended,
        row,
    )


class NotWanted(Exception):
    """A function was cancelled, or is left to itself, because its answer is no longer wanted."""


_log = logging.getLogger("overlay.handler")

Handler = Callable[[bytes, Context], "bytes | Iterator[bytes]"]


def echo(payload: bytes, context: Context) -> bytes:
    """The default handler: returns the payload, after the id of the process that did so."""
    return context.process_id.encode() + b": " + payload


def add_folder(folder: Path, kept: Mapping[str, Source] = MappingProxyType({})) -> Sources:
    """Puts the configuration's folder on the module path, so that handlers can lie beside it.

    It comes after the standard library and everything installed, which a random.py or a logging.py
    of the user's would break, and before our own folder, whose client.py is not the user's. kept:
    modules of the folder as another process has found them.
    """
    last = [str(folder)]
    if (ROOT / "node.py").exists():  # a clone, and not where pip installs everything
        last.append(str(ROOT))
    moved = {os.path.realpath(path) for path in last}
    others = [path for path in sys.path if os.path.realpath(path) not in moved]
    sys.path[:] = [*others, *dict.fromkeys(last)]
    return user_modules.keep(folder, kept)


def find(spec: HandlerSpec, function: str) -> Callable[..., Any]:
    """The function named "module:function". Raises ConfigError when it cannot be imported."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        _check_whose(spec, module_name)
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(
            f"handler '{spec.name}': module '{module_name}' cannot be imported ({reason}); "
            f"it is looked for in the configuration file's folder and in the Python path"
            f"{_hidden_in(reason)}"
        ) from e
    _check_whose(spec, module_name)
    found = getattr(module, name, None)
    if not callable(found):
        what = "has no function" if found is None else "is not a function:"
        raise ConfigError(
            f"handler '{spec.name}': module '{module_name}' {what} '{name}' ({_place(module)})"
        )
    return found  # type: ignore[no-any-return]


def _check_whose(spec: HandlerSpec, module_name: str) -> None:
    """Raises ConfigError when another module of that name hides the one in the folder."""
    top, here = module_name.partition(".")[0], user_modules.kept_here()
    if here is not None and (own := here.passed_over(top)):
        raise ConfigError(
            f"handler '{spec.name}': module '{top}' is {_place(sys.modules[top])}, which comes "
            f"before {own}: give that another name"
        )


def _hidden_in(reason: str) -> str:
    """Which names in an error are modules of the folder that another module hides."""
    here, names = user_modules.kept_here(), re.findall(r"'(\w+)'", reason)
    hidden = [own for name in dict.fromkeys(names) if here and (own := here.passed_over(name))]
    return "".join(f"; {own} has the name of another module: give it another one" for own in hidden)


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "built into Python"
