"""Joins two network namespaces by a link with a delay.

    python slow_link.py HOST1 ADDRESS1/LENGTH HOST2 ADDRESS2/LENGTH DELAY_MS

Each side gets a TUN device `wire` with its address; packets arrive at the other DELAY_MS later, in
order. Prints "joined" when packets pass. Runs until it is killed, which removes the devices. Linux
only, as root. One thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

NEW_NETWORK = 0x40000000  # CLONE_NEWNET, see setns(2)
SET_INTERFACE = 0x400454CA  # TUNSETIFF, see the kernel's networking/tuntap
PLAIN_PACKETS = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI: IP packets without a header
MAX_PACKET = 65_536


def main(host1: str, address1: str, host2: str, address2: str, delay_ms: str) -> None:
    sides = (open_device(host1, address1), open_device(host2, address2))
    print("joined", flush=True)
    relay(sides, float(delay_ms) / 1000)


def open_device(host: str, address: str) -> int:
    """Moves this process into the host and returns the file descriptor of a new TUN device."""
    with open(f"/run/netns/{host}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {host}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, SET_INTERFACE, struct.pack("16sH", b"wire", PLAIN_PACKETS))
    subprocess.run(["ip", "addr", "add", address, "dev", "wire"], check=True)
    subprocess.run(["ip", "link", "set", "wire", "up"], check=True)
    return device


def relay(sides: tuple[int, int], delay_s: float) -> None:
    other = {sides[0]: sides[1], sides[1]: sides[0]}
    in_flight: deque[tuple[float, int, bytes]] = deque()  # due at, destination, packet
    while True:
        wait_s = max(0.0, in_flight[0][0] - time.monotonic()) if in_flight else None
        for side in select.select(sides, (), (), wait_s)[0]:
            packet = os.read(side, MAX_PACKET)
            in_flight.append((time.monotonic() + delay_s, other[side], packet))
        while in_flight and in_flight[0][0] <= time.monotonic():
            _, side, packet = in_flight.popleft()
            os.write(side, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
