"""Ways to stop a process in order, besides signals: its stop file, the end of its console."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overlay.model import clocks as time

CONSOLE_GRACE_S = 3.0  # Windows gives 5 s, and refusing requests and closing take some of it
CONSOLE_END_S = 10.0  # Windows ends the process before that
CTRL_CLOSE, CTRL_LOGOFF, CTRL_SHUTDOWN = 2, 5, 6
FOR_GOOD = "for good"


@dataclass(frozen=True)
class StopFile:
    """When it appears, the process stops, and writes into it how many requests it left behind."""

    path: Path

    def ask(self, for_good: bool) -> None:
        """for_good: the process will not be back soon. Raises OSError."""
        beside = self.path.with_name(self.path.name + ".new")
        try:
            beside.write_text(FOR_GOOD if for_good else "", encoding="ascii")
            os.replace(beside, self.path)
        except OSError:  # a full disk may still have room for a name
            self.path.touch()

    @property
    def is_there(self) -> bool:
        return self.path.exists()

    @property
    def is_for_good(self) -> bool:
        return self._text() == FOR_GOOD

    def leave(self, left: int) -> None:
        with contextlib.suppress(OSError):
            self.path.write_text(f"{left}\n", encoding="ascii")

    @property
    def left(self) -> int:
        """Also 0 if the process could not say: it was killed, or ended in a hurry."""
        text = self._text().strip()
        return int(text) if text.isdigit() else 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="ascii")
        except (OSError, UnicodeError):
            return ""


if sys.platform == "win32":
    import ctypes

    _Handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)
    _registered: list[object] = []  # Windows does not keep them

    def when_console_ends(stop: Callable[[float], None]) -> None:
        """Calls `stop` with a grace in seconds when the console's window is closed, its user logs
        off or the machine shuts down; the process must then end by itself.

        Windows reports the last two only to programs that have not loaded a window library. It
        ends the process when the handler returns, so the handler waits. Call this after Python's
        own handlers are set: the newest handler is called first.
        """

        def handle(event: int) -> int:
            if event not in (CTRL_CLOSE, CTRL_LOGOFF, CTRL_SHUTDOWN):
                return 0  # Ctrl-C and Ctrl-Break are Python's
            stop(CONSOLE_GRACE_S)
            time.sleep(CONSOLE_END_S)
            return 1

        handler = _Handler(handle)
        _registered.append(handler)
        ctypes.windll.kernel32.SetConsoleCtrlHandler(handler, 1)

else:

    def when_console_ends(stop: Callable[[float], None]) -> None:
        """Does nothing: elsewhere that is a signal, SIGHUP."""
