"""The client library. What programs use of it is here, and made when it is first asked for."""

from __future__ import annotations

_RESULTS = (
    "Answer",
    "CallCancelled",
    "CallFailed",
    "DeadlinePassed",
    "HandlerFailed",
    "Incomplete",
    "InvalidCall",
    "NameNotFound",
    "NoSuchHost",
    "NotReached",
    "Refused",
    "Unavailable",
)


def __getattr__(name: str) -> object:
    # Lazily, as in the package above: an import of one file loads no gRPC beside it.
    if name in {"connect", "Client"}:
        from overlay.client import sync

        return getattr(sync, name)
    if name in {"connect_async", "AsyncClient"}:
        from overlay.client import aio

        return getattr(aio, name)
    if name in _RESULTS:
        from overlay.client import results

        return getattr(results, name)
    raise AttributeError(f"module 'overlay.client' has no attribute '{name}'")
