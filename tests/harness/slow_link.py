"""Joins two network namespaces by a link that takes its time.

    python slow_link.py HOST1 ADDRESS1/LENGTH HOST2 ADDRESS2/LENGTH DELAY_MS

Each side gets a TUN device `wire` with its address; what one writes, the other reads DELAY_MS
later, in order. Prints "joined" once packets pass. Runs until it is ended; the devices go with it.
Linux only, as root. One thread.
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
PLAIN_PACKETS = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI: IP packets with nothing in front
LONGEST_PACKET = 65_536


def main(host1: str, address1: str, host2: str, address2: str, delay_ms: str) -> None:
    sides = (open_device(host1, address1), open_device(host2, address2))
    print("joined", flush=True)
    relay(sides, float(delay_ms) / 1000)


def open_device(host: str, address: str) -> int:
    """The file of a new TUN device in the host; moves this process into the host."""
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
    under_way: deque[tuple[float, int, bytes]] = deque()  # due at, to which side, what
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for side in select.select(sides, (), (), wait_s)[0]:
            packet = os.read(side, LONGEST_PACKET)
            under_way.append((time.monotonic() + delay_s, other[side], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, side, packet = under_way.popleft()
            os.write(side, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
