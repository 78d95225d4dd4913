"""Many clients in one process, to be killed in mid-call: python -m faults.crowd ADDRESS COUNT KEY

Each has its own connection and one call in flight. Prints "ready" when all are sent, and waits to
be killed. Request i has the key KEY + i.
"""

from __future__ import annotations

import sys
import time

import grpc

from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc

NAP_MS = 1000
TIMEOUT_S = 120  # with less, the last of them would be refused for lack of time


def main(address: str, count: int, key: int) -> None:
    options = endpoints.channel_options()
    clients = [grpc.insecure_channel(address, options) for _ in range(count)]
    calls = []
    for i, client in enumerate(clients):
        request = pb2.Request(payload=f"{key + i} {NAP_MS}".encode(), mode=pb2.ANY, handler="work")
        ask = pb2_grpc.OverlayNodeStub(client).Forward
        calls.append(ask.future(request, timeout=TIMEOUT_S, wait_for_ready=True))
    print("ready", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
