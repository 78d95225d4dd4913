"""The addresses of a machine's name, from the system's own resolver.

gRPC's resolver knows the hosts file and DNS, but not mDNS (my-mac.local), NetBIOS or the system's
other sources. So gRPC gets only numeric addresses: every address passed to gRPC or a socket comes
from here.

A lookup may take many seconds and cannot be interrupted. So each one that is waited for runs on a
thread of its own, "name", one at a time per name, and is abandoned when the wait is over.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from overlay.model import clocks as time
from overlay.model.addresses import is_loopback

LOOKUP_S = 5.0  # for callers that can wait; mDNS gives up after that
SLICE_S = 0.5  # of a wait: before Python 3.14, Windows cannot interrupt a longer one
REUSE_S = 0.5  # how long a result is reused, as several callers may ask about one machine
MAX_LOOKUPS = 256  # names whose last lookup is kept
MAX_SHOWN = 4  # addresses listed in a message
FAMILIES = (socket.AF_INET, socket.AF_INET6)
ADVICE = "correct it, see that its machine is on, or write its address in numbers"


@dataclass(frozen=True)
class Host:
    """A host and its addresses.

    addresses: numeric, without duplicates, in the system's order of preference; an IPv6 one may
    have a zone (fe80::1%2). why: if there are none, the reason.
    """

    host: str
    addresses: tuple[str, ...] = ()
    why: str = ""

    @property
    def is_lone_number(self) -> bool:
        return self.addresses == (self.host,)

    @property
    def is_loopback(self) -> bool:
        """Whether it means "this machine" on every machine."""
        return bool(self.addresses) and all(map(is_loopback, self.addresses))

    def shown(self, text: str = "") -> str:
        """The host, or `text` instead, with its addresses in parentheses."""
        text = text or self.host
        if not self.addresses or self.is_lone_number or self.host == "localhost":
            return text
        more = ["…"] if len(self.addresses) > MAX_SHOWN else []
        return f"{text} ({', '.join([*self.addresses[:MAX_SHOWN], *more])})"


def is_number(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def resolve(host: str) -> Host:
    """Asks the system, however long that takes."""
    host = host.strip("[]")
    if is_number(host):
        return Host(host, (host,))
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as e:  # ValueError: the name is too long or malformed
        again = getattr(e, "errno", None) == socket.EAI_AGAIN
        return Host(host, (), _unknown(host, " (the name servers do not answer)" if again else ""))
    addresses = tuple(
        dict.fromkeys(_numeric(place) for family, *_, place in found if family in FAMILIES)
    )
    return Host(host, addresses, "" if addresses else _unknown(host))


def look_up(host: str, within_s: float = LOOKUP_S) -> Host:
    """As `resolve`, but waits at most `within_s`."""
    host = host.strip("[]")
    if is_number(host):
        return Host(host, (host,))
    lookup, until = _lookup_of(host), time.monotonic() + within_s
    while not lookup.done.wait(max(0.0, min(SLICE_S, until - time.monotonic()))):
        if time.monotonic() >= until:
            return pending(host)
    return lookup.found or pending(host)


def prefetch(hosts: Iterable[str]) -> None:
    """Starts looking up the hosts, so that all take no longer than the slowest."""
    for host in hosts:
        if not is_number(plain := host.strip("[]")):
            _lookup_of(plain)


def pending(host: str) -> Host:
    """The result for a name that is still being looked up."""
    return Host(host, (), _unknown(host, " yet (the system is still looking it up)"))


def socket_address(address: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    """A numeric address in the form that sockets take."""
    flags = socket.AI_NUMERICHOST
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)
    return found[0][0], found[0][4]


def connect(addresses: tuple[str, ...], port: int, within_s: float) -> socket.socket:
    """A connection to the first address that accepts one. Raises OSError, preferably a refusal, as
    that says the most."""
    until = time.monotonic() + within_s
    failed: OSError = TimeoutError()
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        within_s = max(0.01, (until - time.monotonic()) / left)
        try:
            return socket.create_connection((address, port), within_s)
        except OSError as e:
            if not isinstance(failed, ConnectionRefusedError):
                failed = e
    raise failed


def _unknown(host: str, doubt: str = "") -> str:
    return f"{host}: this machine knows no such name{doubt}; {ADVICE}"


def _numeric(place: tuple[object, ...]) -> str:
    zone = place[3] if len(place) == 4 else 0
    return f"{str(place[0]).partition('%')[0]}%{zone}" if zone else str(place[0])


class _Lookup:
    """One lookup, in progress or done."""

    def __init__(self, host: str) -> None:
        self.done = threading.Event()
        self.found: Host | None = None
        self._host = host
        self._ended = 0.0  # monotonic seconds

    @property
    def is_stale(self) -> bool:
        return self.done.is_set() and time.monotonic() - self._ended > REUSE_S

    def run(self) -> None:
        try:
            self.found = resolve(self._host)
        finally:
            self._ended = time.monotonic()
            self.done.set()


_lookups: dict[str, _Lookup] = {}
_lock = threading.Lock()


def _lookup_of(host: str) -> _Lookup:
    with _lock:
        lookup = _lookups.get(host)
        if lookup is None or lookup.is_stale:
            if len(_lookups) >= MAX_LOOKUPS:
                for old in [name for name, one in _lookups.items() if one.is_stale]:
                    del _lookups[old]
            lookup = _lookups[host] = _Lookup(host)
            threading.Thread(target=lookup.run, name="name", daemon=True).start()
        return lookup
