"""What was asked under an idempotency key: the first asks, those after it get the same answer.

A key belongs to its caller. It is remembered from the first request until some time after its
answer; the oldest are forgotten first when there are too many, or their answers too large.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from overlay.errors import BadRequest, DeadlinePassed
from overlay.values import Caller, Executed

Name = tuple[Caller, str]
"""The caller, and its key."""


class Keys:
    """Safe from any thread."""

    def __init__(
        self,
        window_s: float,
        most: int,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._most = most
        self._most_bytes = most_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: OrderedDict[Name, _Asked] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._asked)

    def answer(
        self, name: Name, question: bytes, deadline: float, ask: Callable[[], tuple[Any, int]]
    ) -> Any:
        """What `ask` gives, or gave another time; with it the bytes that it takes to keep.

        question: all that makes a request another one. Raises what `ask` raised; BadRequest when
        the key was used for another question; DeadlinePassed when the first has no answer in time.
        """
        asked, is_first = self._enter(name, hashlib.sha256(question).digest())
        if is_first:
            return self._ask(name, asked, ask)
        if not asked.done.wait(max(0.0, deadline - self._clock())):
            raise DeadlinePassed("the first request of this key has no answer yet")
        if asked.error is not None:
            raise _bare(asked.error)
        return asked.answer

    def _enter(self, name: Name, digest: bytes) -> tuple[_Asked, bool]:
        with self._lock:
            self._forget_locked()
            asked = self._asked.get(name)
            if asked is None:
                asked = self._asked[name] = _Asked(digest)
                return asked, True
        if asked.digest != digest:
            raise BadRequest(f"idempotency_key: '{name[1]}' was used for another request")
        return asked, False

    def _ask(self, name: Name, asked: _Asked, ask: Callable[[], tuple[Any, int]]) -> Any:
        try:
            asked.answer, size = ask()
        except BaseException as e:
            asked.error = _bare(e)
            # Nothing ran: whoever comes later may ask again.
            self._end(name, asked, 0, keep=getattr(e, "executed", None) is not Executed.NO)
            raise
        self._end(name, asked, size, keep=True)
        return asked.answer

    def _end(self, name: Name, asked: _Asked, size: int, keep: bool) -> None:
        with self._lock:
            if keep:
                asked.until = self._clock() + self._window_s
                asked.size = size
                self._bytes += size
                self._asked.move_to_end(name)
            else:
                del self._asked[name]
        asked.done.set()

    def _forget_locked(self) -> None:
        now = self._clock()
        for name, asked in list(self._asked.items()):
            is_too_much = len(self._asked) >= self._most or self._bytes > self._most_bytes
            if asked.until is None:  # it has no answer yet
                continue
            if asked.until > now and not is_too_much:
                return  # the others' time ends later
            del self._asked[name]
            self._bytes -= asked.size


def _bare(error: BaseException) -> BaseException:
    """The same error without the calls that it has passed through, which hold their requests."""
    made = type(error).__new__(type(error), *error.args)
    made.__dict__.update(error.__dict__)
    return made


class _Asked:
    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.done = threading.Event()
        self.until: float | None = None  # when it is forgotten; None while it has no answer
        self.size = 0
        self.answer: Any = None
        self.error: BaseException | None = None
