"""The user's functions: found by their configured name, called with a payload and a context.

    def handler(payload: bytes, context: Context) -> bytes

The result of a function that returns an iterator of bytes, such as a generator, is their
concatenation; if the client takes parts as they arrive, it is sent in chunks (transport.chunks).
overlay.workers.typed wraps functions of any other kind as one of these.

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
from overlay.workers import progress, user_modules
from overlay.workers.user_modules import Source, Sources

ROOT = Path(__file__).resolve().parents[2]
RECURSION_LIMIT = sys.getrecursionlimit()  # restored after a handler that changed it


@dataclass
class Context:
    """The facts of one call, for its handler.

    deadline: monotonic seconds of this process. options: the handler's, overridden by the
    process's.
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

        A handler on a thread should check this periodically; one in a process is killed.
        """
        return bool(self._ended[self._row]) or time.monotonic() >= self.deadline

    def progress(self, done: float, total: float = 0.0, text: str = "") -> None:
        """Reports how far the handler has got: `done` of `total`, in any unit; total 0 if it is not
        known. Shown for jobs. Cheap: only the latest of each fifth of a second is passed on.

        Raises TypeError or ValueError for what is not a number from 0, or not a text.
        """
        progress.note(self.request_id, done, total, text)

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that writes to the worker's log and adds the request's id."""
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
    """A function was cancelled or abandoned, because its answer is no longer wanted."""


_log = logging.getLogger("overlay.handler")

Handler = Callable[[bytes, Context], "bytes | Iterator[bytes]"]


def echo(payload: bytes, context: Context) -> bytes:
    """The default handler: returns the payload, prefixed with the worker's id."""
    return context.process_id.encode() + b": " + payload


def add_folder(folder: Path, kept: Mapping[str, Source] = MappingProxyType({})) -> Sources:
    """Adds the configuration file's folder to the module path, for the handlers' modules.

    The folder comes after the standard library and installed packages, so that a user's random.py
    cannot replace Python's, and before our own folder, so that a user's client.py is found. kept:
    the sources of modules that another process has read.
    """
    last = [str(folder)]
    if (ROOT / "node.py").exists():  # a clone, not site-packages
        last.append(str(ROOT))
    moved = {os.path.realpath(path) for path in last}
    others = [path for path in sys.path if os.path.realpath(path) not in moved]
    sys.path[:] = [*others, *dict.fromkeys(last)]
    return user_modules.install(folder, kept)


def find(spec: HandlerSpec, function: str) -> Callable[..., Any]:
    """Imports the function "module:function". Raises ConfigError if that fails."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        _check_not_shadowed(spec, module_name)
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(
            f"handler '{spec.name}': module '{module_name}' cannot be imported ({reason}); "
            f"Python looks for it in the configuration file's folder and on its module path"
            f"{_shadowed_in(reason)}"
        ) from e
    _check_not_shadowed(spec, module_name)
    found = getattr(module, name, None)
    if not callable(found):
        what = f"no function '{name}'" if found is None else f"'{name}', which is not a function"
        raise ConfigError(
            f"handler '{spec.name}': module '{module_name}' has {what} ({_location(module)})"
        )
    return found  # type: ignore[no-any-return]


def _check_not_shadowed(spec: HandlerSpec, module_name: str) -> None:
    """Raises ConfigError if another module shadows the folder's module of that name."""
    top, sources = module_name.partition(".")[0], user_modules.installed()
    if sources is not None and (own := sources.shadowed(top)):
        raise ConfigError(
            f"handler '{spec.name}': module '{top}' is {_location(sys.modules[top])}, which comes "
            f"before {own}: give that another name"
        )


def _shadowed_in(reason: str) -> str:
    """Names the shadowed modules of the folder that an import error mentions."""
    sources, names = user_modules.installed(), re.findall(r"'(\w+)'", reason)
    shadowed = [own for name in dict.fromkeys(names) if sources and (own := sources.shadowed(name))]
    return "".join(
        f"; {own} has the name of another module: give it another one" for own in shadowed
    )


def _location(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "built into Python"
