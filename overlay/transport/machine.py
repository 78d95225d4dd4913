"""Which addresses this machine has, and which processes of a configuration run on it."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from overlay.model.addresses import is_wildcard, join_address
from overlay.model.topology import Process
from overlay.transport import resolver


def is_here(process: Process, within_s: float = resolver.LOOKUP_S) -> bool:
    """Whether the process belongs to this machine. If it binds to every address, its host decides.

    within_s: how long to wait for a name's address.
    """
    host = process.bind
    if not host or is_wildcard(host):
        host = process.host
    return is_ours(host, within_s)


def is_ours(host: str, within_s: float = resolver.LOOKUP_S) -> bool:
    """Whether a host is this machine, by one of its addresses."""
    return any(map(can_bind, resolver.look_up(host, within_s).addresses))


def asking_address(process: Process) -> str:
    """Where to reach this process from its own machine; its `host` may be outside a NAT."""
    host = process.bind.strip("[]")
    if not host:
        return process.address
    if is_wildcard(host):
        return join_address("::1" if ":" in host else "127.0.0.1", process.port)
    return process.listen_address


def can_bind(address: str) -> bool:
    """Whether it is an address of this machine."""
    try:
        family, place = resolver.socket_address(address, 0)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
            return True
    except OSError:
        return False


def own_addresses() -> list[str]:
    """The addresses by which other machines may know this one."""
    found = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    }
    usable = [n for n in map(ipaddress.ip_address, found) if not n.is_link_local]
    return [str(n) for n in sorted(usable, key=lambda n: (n.is_loopback, n.version, int(n)))]
