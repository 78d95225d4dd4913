"""What a program that uses the client does to processes and threads, where it matters to gRPC.

After a fork, gRPC's threads exist only in the parent, but both processes hold its connections: what
the child did on them would look like the parent's. So the child does not touch gRPC at all, and
starts no use of its own.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Protocol

from overlay.model import clocks as time

# After the last close gRPC cleans up on a thread of its own; a child forked meanwhile hangs.
SETTLED_S = 0.2
FORKED = (
    "this process was forked from one in which a client was in use, and gRPC does not survive "
    "that: fork before its first request or after its close(), or start processes by "
    "multiprocessing's 'spawn' or 'forkserver'"
)
is_orphan = False
"""Whether gRPC was in use in the process that this one was forked from."""


class Forkable(Protocol):
    """Holds something that a forked child inherits."""

    def leave_behind(self) -> None:
        """Called in the child: abandons it as it is, without blocking."""


def remember(inherited: Forkable) -> None:
    """Registers it, as long as it lives, for a call of `leave_behind` in a forked child."""
    _remembered.add(inherited)


def begin_use(of: Any) -> None:
    """Call it before `of` uses gRPC. Until `end_use`, a forked child keeps `of` alive."""
    _in_use[id(of)] = of


def end_use(of: Any) -> None:
    """Call it after `of` was closed. May be called twice."""
    global _ended_at
    if _in_use.pop(id(of), None) is not None:
        _ended_at = time.monotonic()


def check_threads() -> None:
    """Raises RuntimeError if gRPC would wait for ever, as there are no real threads."""
    gevent, grpc = sys.modules.get("gevent.monkey"), sys.modules.get("grpc._cython.cygrpc")
    # Set by grpc.experimental.gevent, and read by gRPC itself.
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
    for inherited in list(_remembered):
        inherited.leave_behind()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
