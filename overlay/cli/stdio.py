"""Standard input, output and error, of a program that was started without some of them too.

Cron, services, `>&-` and pythonw start programs so. What such a program opens first gets the
numbers 0 to 2: then a socket is what prints are written to, and what each child inherits. Here what
is missing is nowhere, before anything is opened; and so is a terminal, once it is gone.
"""

from __future__ import annotations

import io
import os
import sys

_STREAMS = (("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))
_terminals: set[int] = set()


def complete() -> None:
    """Opens what is missing. Every program calls this first of all; it may be called twice."""
    for fd, (name, mode) in enumerate(_STREAMS):
        if not _is_open(fd):
            _lead_nowhere(fd)
        elif os.isatty(fd):
            _terminals.add(fd)
        if getattr(sys, name) is None:
            file = os.fdopen(fd, mode, closefd=False)
            stream = _Nowhere(file, "utf-8", "backslashreplace")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def leave_terminal() -> None:
    """Where the terminal is gone, each print of a handler would be an error from now on."""
    for fd in list(_terminals):
        if not os.isatty(fd):
            _terminals.discard(fd)
            _lead_nowhere(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _lead_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != fd:
        os.dup2(nowhere, fd)
        os.close(nowhere)
    os.set_inheritable(fd, True)  # or each program that is started lacks it again


class _Nowhere(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False  # Windows takes its NUL for a terminal
