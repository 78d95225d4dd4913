"""Standard input, output and error for a program that may have been started without them.

Cron, services, `>&-` and pythonw start programs that way. The first files that such a program opens
get the numbers 0 to 2: prints then go to a socket, and every child inherits it. This module opens
the null device in place of what is missing, before anything else is opened, and in place of a
terminal once that is gone.
"""

from __future__ import annotations

import io
import os
import sys

_STREAMS = (("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))
_terminals: set[int] = set()


def complete() -> None:
    """Opens what is missing. Every program calls this first; it may be called twice."""
    for fd, (name, mode) in enumerate(_STREAMS):
        if not _is_open(fd):
            _open_null(fd)
        elif os.isatty(fd):
            _terminals.add(fd)
        if getattr(sys, name) is None:
            file = os.fdopen(fd, mode, closefd=False)
            stream = _NullStream(file, "utf-8", "backslashreplace")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def escape_unprintable() -> None:
    """A character that a console's code page lacks is printed as an escape, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_terminal() -> None:
    """Replaces a terminal that is gone, where every print of a handler would be an error."""
    for fd in list(_terminals):
        if not os.isatty(fd):
            _terminals.discard(fd)
            _open_null(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
    os.set_inheritable(fd, True)  # or every child would lack it again


class _NullStream(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False  # Windows says that NUL is a terminal
