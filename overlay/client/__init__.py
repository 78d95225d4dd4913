"""The client library. What programs use of it is here, imported when it is first asked for."""

from __future__ import annotations

import importlib

_NAMES = {
    "sync": ("Client", "connect"),
    "aio": ("AsyncClient", "connect_async"),
    "results": ("Answer", "Incomplete"),
}
_ERRORS = (
    "CallCancelled",
    "CallFailed",
    "DeadlinePassed",
    "HandlerFailed",
    "InvalidCall",
    "NameNotFound",
    "NoSuchHost",
    "NotReached",
    "Refused",
    "Unavailable",
)


def __getattr__(name: str) -> object:
    # Lazily, as in the package above: an import of one file loads no gRPC beside it.
    if name in _ERRORS:
        from overlay.model import errors

        return getattr(errors, name)
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"overlay.client.{module}"), name)
    raise AttributeError(f"module 'overlay.client' has no attribute '{name}'")
