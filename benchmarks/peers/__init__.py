"""The peers, one module each, all with the same small interface:

    TITLE                          its name in the table
    PACKAGES                       the distributions whose versions the results name
    SUPPORTS                       the loads that it can do, and "all" for mode all
    BULK                           items of a bulk: 50,000, or fewer where that takes minutes
    NOTES                          what it does less and more than the overlay, and its settings
    missing() -> str               why it cannot run on this machine; empty when it can
    start(group, setup) -> dict    starts its servers and workers; returns the Caller's arguments
    Caller(**arguments)            its client, in a process of its own
    SETUPS, ROWS                   optional: the set-ups and rows in which it runs, when not all
    versions() -> dict             optional: of servers that are not Python packages

The modules import their packages late, so that the driver needs none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

MODULES = {
    "ours": "ours",
    "ours-tls": "ours_tls",
    "ours-no-lanes": "ours_no_lanes",
    "grpc-hop": "grpc_hop",
    "grpc-chain": "grpc_chain",
    "grpc-streams": "grpc_streams",
    "nats": "nats_queue",
    "zeromq": "zeromq",
    "celery": "celery_redis",
    "dask": "dask_cluster",
    "nats-uvloop": "nats_uvloop",
    "ray": "ray_actors",
    "dramatiq": "dramatiq_redis",
    "rq": "rq_redis",
}
EXTRA = ("nats-uvloop", "ray", "dramatiq", "rq")  # only with --all-peers, or when --only names them


def load(peer: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.peers.{MODULES[peer]}")


def not_installed(*modules: str) -> str:
    """A sentence about the first of these modules that is missing; empty when none is."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            return f"the Python package {name} is not installed"
    return ""
