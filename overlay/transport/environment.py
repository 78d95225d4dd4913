"""What the program around a client does to processes and threads, where that matters to gRPC.

When a process forks, gRPC's threads stay with the parent, and both have its connections: what the
child did on them would be said in the parent's name. So the child touches none of gRPC, and begins
nothing of its own beside it.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Protocol

from overlay.model import clocks as time

# After the last close gRPC tidies up on a thread of its own; a child forked meanwhile hangs.
SETTLED_S = 0.2
FORKED = (
    "this process was forked from one in which a client was in use, and gRPC does not survive "
    "that: fork before its first request or after its close(), or start processes by "
    "multiprocessing's 'spawn' or 'forkserver'"
)
is_orphan = False
"""Whether gRPC was in use in the process from which this one was forked."""


class Forkable(Protocol):
    """Has something that a child inherits from its parent."""

    def leave_behind(self) -> None:
        """In the child: lets go of it as it is, and waits for nothing."""


def remember(one: Forkable) -> None:
    """Has its `leave_behind` called in a child, for as long as it lives."""
    _remembered.add(one)


def begin_use(of: Any) -> None:
    """To be called before `of` uses gRPC, until `end_use`; a child keeps it as it is."""
    _in_use[id(of)] = of


def end_use(of: Any) -> None:
    """To be called after `of` was closed. May be called twice."""
    global _ended_at
    if _in_use.pop(id(of), None) is not None:
        _ended_at = time.monotonic()


def check_threads() -> None:
    """Raises RuntimeError where gRPC would wait for ever, since there are no true threads."""
    gevent, grpc = sys.modules.get("gevent.monkey"), sys.modules.get("grpc._cython.cygrpc")
    # As grpc.experimental.gevent sets it, and gRPC itself looks at it.
    is_ready = getattr(grpc, "g_gevent_activated", False)
    if gevent is not None and gevent.is_module_patched("threading") and not is_ready:
        raise RuntimeError(_PATCHED.format("gevent", _GEVENT))
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        raise RuntimeError(_PATCHED.format("eventlet", _EVENTLET))


_PATCHED = "{} has replaced the threads of this program, and gRPC would wait for ever: {}"
_GEVENT = "call grpc.experimental.gevent.init_gevent() after patching, before the first client"
_EVENTLET = "patch with thread=False, or ask from a process that is not patched"
_remembered: weakref.WeakSet[Forkable] = weakref.WeakSet()
_in_use: dict[int, Any] = {}
_ended_at = -SETTLED_S


def _before_fork() -> None:
    if not _in_use:
        time.sleep(max(0.0, _ended_at + SETTLED_S - time.monotonic()))


def _in_child() -> None:
    global is_orphan
    is_orphan = is_orphan or bool(_in_use)
    for one in list(_remembered):
        one.leave_behind()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
