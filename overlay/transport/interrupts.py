"""Puts off Ctrl-C while the main thread does what must not be left half done.

Python raises KeyboardInterrupt between any two steps of the main thread, also inside gRPC: its
locks then stay locked, and nobody knows whether a message was taken.
"""

from __future__ import annotations

# What `signal` wraps, which makes an enum of each value and takes several times as long.
import _signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable
from types import FrameType


class Uninterrupted:
    """with Uninterrupted(): SIGINT is handled at its end, by whatever handler there is. Costs two
    microseconds on the main thread; does nothing on others, which are never interrupted."""

    __slots__ = ("_came", "_handler")

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if not callable(handler):  # it raises nothing: it ends the program, or is ignored
            return
        self._handler = handler
        try:
            _signal.signal(_signal.SIGINT, self._note)
        except ValueError:  # the main thread of a subinterpreter, which gets no signals
            self._handler = None

    def __exit__(self, *exception: object) -> None:
        handler = self._handler
        if handler is not None:
            _signal.signal(_signal.SIGINT, handler)
            if self._came is not None:
                handler(*self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame
