"""Numeric addresses as they stand in a configuration, a Host header or gRPC's name of a caller."""

from __future__ import annotations

import ipaddress

Number = ipaddress.IPv4Address | ipaddress.IPv6Address


def number_of(text: str) -> Number | None:
    """The address, without the brackets and the zone of an IPv6 one; IPv4 if it was mapped into
    IPv6. None for a name."""
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(text: str) -> bool:
    """Whether it means "this machine" on every machine."""
    number = number_of(text)
    return text == "localhost" if number is None else number.is_loopback


def is_wildcard(text: str) -> bool:
    """Whether listening there means listening on every address of the machine."""
    number = number_of(text)
    return number is not None and number.is_unspecified


def plain(text: str) -> str:
    """The canonical form of an address. Raises ValueError for a name."""
    number = number_of(text)
    if number is None:
        raise ValueError(f"'{text}' is not a numeric address")
    return str(number)


def join_address(host: str, port: int) -> str:
    """host:port, with an IPv6 host in brackets. host: also "a:50051,b", of several addresses."""
    if "," in host:
        return f"{host}:{port}"
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
