"""The client library. Its public names are here, each imported on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "sync": ("Client", "connect"),
    "aio": ("AsyncClient", "connect_async"),
    "results": ("Answer", "Incomplete"),
    "jobs": ("Job", "JobStatus"),
    "async_jobs": ("AsyncJob",),
}
_ERRORS = (
    "CallCancelled",
    "CallFailed",
    "DeadlinePassed",
    "HandlerFailed",
    "InvalidCall",
    "JobExpired",
    "JobQuarantined",
    "NameNotFound",
    "NoSuchHost",
    "NotReached",
    "Refused",
    "ResumeError",
    "Unavailable",
)


def __getattr__(name: str) -> object:
    # Lazily, so that importing one module of this package does not load gRPC.
    if name in _ERRORS:
        from overlay.model import errors

        return getattr(errors, name)
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"overlay.client.{module}"), name)
    raise AttributeError(f"module 'overlay.client' has no attribute '{name}'")
