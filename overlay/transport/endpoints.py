"""The only place that makes gRPC channels and opens gRPC ports; TLS belongs here.

    channels.Channel -> open_channel          listener.Listener -> open_port

A test checks that nothing else in the product calls grpc.insecure_channel or add_insecure_port.
Addresses are numeric, from the resolver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from overlay.model.addresses import join_address
from overlay.model.limits import MIB, Limits

if TYPE_CHECKING:
    from overlay.security.credentials import ClientKeys, Credentials

    Options = Sequence[tuple[str, int | str]]
    """gRPC's channel and server arguments. Of two with the same name, gRPC uses the first."""

NOWHERE = "ipv4:127.0.0.1:0"  # a port that nothing listens on, for a name without an address

# Detects a frozen or vanished peer within about 2.5 s on every system; see the keepalive test.
_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def open_channel(
    addresses: Sequence[str],
    port: int,
    options: Options,
    credentials: ClientKeys | None = None,
    process_id: str = "",
) -> grpc.Channel:
    """A channel to the first address that answers. It connects with the first call.

    credentials: for mutual TLS, with a process of the same overlay only. process_id: which one;
    empty for any.
    """
    if credentials is None:
        return grpc.insecure_channel(target(addresses, port), options)
    shown, _ = credentials.current()
    keys = grpc.ssl_channel_credentials(shown.authorities, shown.key, shown.certificate)
    # Instead of the address: a machine with a new address needs no new certificate.
    name = ("grpc.default_authority", credentials.server_name(process_id))
    return grpc.secure_channel(target(addresses, port), keys, [name, *options])


def open_port(
    server: grpc.Server, address: str, port: int, credentials: Credentials | None = None
) -> None:
    """Makes a server listen there before it is started. Raises RuntimeError.

    credentials: for mutual TLS, and nothing else there.
    """
    place = join_address(address, port)
    # Encoded as in a URI, or gRPC reads an IPv6 zone as an encoded character.
    uri = place.replace("%", "%25")
    if credentials is None:
        bound = server.add_insecure_port(uri)
    else:
        bound = server.add_secure_port(uri, _server_credentials(credentials))
    if bound != port:
        raise RuntimeError(f"cannot listen on {place}")


def _server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """gRPC asks at each connection, and takes None for "as before"."""
    last: list[object] = [None]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        shown, stamp = credentials.current()
        if stamp == last[0]:
            return None
        last[0] = stamp
        roots = shown.authorities + shown.invited
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.certificate)], roots)

    return grpc.dynamic_ssl_server_credentials(fetch(), fetch, require_client_authentication=True)


def channel_options(limits: Limits | None = None) -> Options:
    """Options of a channel to a process: detects a dead peer and reconnects quickly."""
    return [
        *_size_options(limits or Limits()),
        *_KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),  # also the timeout of one attempt
        ("grpc.max_reconnect_backoff_ms", 300),  # so that a process that is back is found soon
        ("grpc.enable_http_proxy", 0),  # processes are not behind an office's web proxy
        ("grpc.enable_retries", 0),  # gRPC's own retries may run a request twice
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, not shared in-process
        # We compress nothing, so a small message that inflates to gigabytes is refused.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def server_options(limits: Limits, connections: int | None = None) -> Options:
    """Options of a process's server: its port is not shared, and frequent pings are allowed.

    connections: how many may be open at a time; None for any number.
    """
    most = [] if connections is None else [("grpc.max_allowed_incoming_connections", connections)]
    return [
        *most,
        *_size_options(limits),
        *_KEEPALIVE,
        ("grpc.so_reuseport", 0),
        # Compressed messages are refused: a few KiB, sent by many at once, would inflate to MiBs.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", limits.calls_of_a_connection),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def target(addresses: Sequence[str], port: int) -> str:
    """Numeric addresses in gRPC's notation, to be tried in order. port: 0 if each has its own."""
    if not addresses:
        return NOWHERE
    places = [(one, port) if port else _with_own_port(one) for one in addresses]
    if not any(":" in address for address, _ in places):
        return "ipv4:" + ",".join(f"{address}:{port}" for address, port in places)
    return "ipv6:" + ",".join(f"[{_as_ipv6(address)}]:{port}" for address, port in places)


def _with_own_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _as_ipv6(address: str) -> str:
    if ":" not in address:
        return f"::ffff:{address}"
    return address.replace("%", "%25")


def _size_options(limits: Limits) -> Options:
    return [
        # A frame may hold a body of the largest size, and other requests and fields.
        ("grpc.max_receive_message_length", limits.max_message_bytes + 2 * MIB),
        ("grpc.max_send_message_length", limits.max_message_bytes + 2 * MIB),
        # Or gRPC reads ahead, and a stream that we do not read fills the memory.
        ("grpc.http2.bdp_probe", 0),
    ]
