"""A channel, a port, a stream, a message.

Imports gRPC before anything else does, and chooses how it polls while it is imported: its older
poller has half the thread switches of its event engine, and 20 % more requests. A program that has
imported gRPC before, or has set the variable, keeps its choice.
"""

import os
import sys

_VARIABLE = "GRPC_EXPERIMENTS"

if sys.platform == "linux" and "grpc" not in sys.modules and _VARIABLE not in os.environ:
    os.environ[_VARIABLE] = "-event_engine_client,-event_engine_listener"
    import grpc as _grpc  # noqa: F401 - it reads the variable now

    del os.environ[_VARIABLE]  # it is not for this program's children
