"""The one place that makes gRPC channels and opens gRPC ports: TLS belongs here.

    channels.Channel -> open_channel          listener.Listening -> open_port

Nothing else in the product calls grpc.insecure_channel or add_insecure_port; a test holds it to
that. Addresses arrive as numbers, from the resolver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from overlay.model.limits import MIB, Limits
from overlay.model.topology import join_address

if TYPE_CHECKING:
    Options = Sequence[tuple[str, int | str]]
    """gRPC's channel and server arguments. Of two with one name, gRPC heeds the first."""

NOWHERE = "ipv4:127.0.0.1:0"  # a port that no process has, for a name without an address

# A frozen or vanished peer is noticed within about 2.5 s on every system; see the keepalive test.
_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def open_channel(addresses: Sequence[str], port: int, options: Options) -> grpc.Channel:
    """A channel to the first of these addresses that answers. Connects with the first call."""
    return grpc.insecure_channel(target(addresses, port), options)


def open_port(server: grpc.Server, address: str, port: int) -> None:
    """Makes the server listen there, before it is started. Raises RuntimeError."""
    place = join_address(address, port)
    # Encoded as in a URI, or gRPC takes the number of an IPv6 zone for an encoded character.
    if server.add_insecure_port(place.replace("%", "%25")) != port:
        raise RuntimeError(f"{place} cannot be listened on")


def channel_options(limits: Limits | None = None) -> Options:
    """Options of a channel to a process: quick to notice a dead peer, quick to come back."""
    return [
        *_size_options(limits or Limits()),
        *_KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),  # also the time that one attempt may take
        ("grpc.max_reconnect_backoff_ms", 300),  # a process that is back is not waited for longer
        ("grpc.enable_http_proxy", 0),  # an office's web proxy is not on the way
        ("grpc.enable_retries", 0),  # gRPC's own retries run a request twice
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, not one shared in-process
        # Nothing of ours is compressed: a small message that swells to gigabytes is refused.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def server_options(limits: Limits, connections: int | None = None) -> Options:
    """Options of a process's server: its port is not shared, and no ping is one too many.

    connections: how many may be open at a time; None for any number.
    """
    most = [] if connections is None else [("grpc.max_allowed_incoming_connections", connections)]
    return [
        *most,
        *_size_options(limits),
        *_KEEPALIVE,
        ("grpc.so_reuseport", 0),
        # A compressed message is refused: a few KiB, which many can send at once, become many MiB.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", limits.calls_of_a_connection),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def target(addresses: Sequence[str], port: int) -> str:
    """Several numeric addresses in gRPC's notation, to be tried in their order."""
    if not addresses:
        return NOWHERE
    if not any(":" in address for address in addresses):
        return "ipv4:" + ",".join(f"{address}:{port}" for address in addresses)
    return "ipv6:" + ",".join(f"[{_as_ipv6(address)}]:{port}" for address in addresses)


def _as_ipv6(address: str) -> str:
    if ":" not in address:
        return f"::ffff:{address}"
    return address.replace("%", "%25")


def _size_options(limits: Limits) -> Options:
    return [
        # A frame's other requests and fields come on top of a body of the largest size.
        ("grpc.max_receive_message_length", limits.max_message_bytes + 2 * MIB),
        ("grpc.max_send_message_length", limits.max_message_bytes + 2 * MIB),
        # Or gRPC reads ahead of us, and a stream that is not read would fill the memory.
        ("grpc.http2.bdp_probe", 0),
    ]
