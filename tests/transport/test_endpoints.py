"""gRPC's channels and ports come from one place."""

from __future__ import annotations

import re
from concurrent import futures

import grpc
import pytest

from overlay.transport import endpoints
from overlay.transport.endpoints import open_port
from tests.harness.machine import ROOT


def test_channels_are_made_and_ports_opened_in_one_module_only() -> None:
    own = [*ROOT.glob("*.py"), *(ROOT / "overlay").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    calls = r"\b(in)?secure_channel\(|\badd_(in)?secure_port\("
    files = {
        path.name
        for path in own
        if not path.name.startswith("overlay_pb2") and re.search(calls, path.read_text("utf-8"))
    }

    assert files == {"endpoints.py"}


def test_the_error_for_a_taken_port_names_it() -> None:
    first, second = (
        grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        for _ in range(2)
    )
    port = first.add_insecure_port("127.0.0.1:0")
    try:
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}"):
            open_port(second, "127.0.0.1", port)
    finally:
        first.stop(0)
        second.stop(0)


@pytest.mark.parametrize(
    ("addresses", "port", "expected"),
    [
        (["10.0.0.1", "10.0.0.2"], 50051, "ipv4:10.0.0.1:50051,10.0.0.2:50051"),
        (["10.0.0.1:50051", "10.0.0.2:50052"], 0, "ipv4:10.0.0.1:50051,10.0.0.2:50052"),
        (["[fd00::1]:50051", "10.0.0.2:50052"], 0, "ipv6:[fd00::1]:50051,[::ffff:10.0.0.2]:50052"),
        ([], 0, endpoints.NOWHERE),
    ],
)
def test_addresses_have_one_port_or_each_its_own(
    addresses: list[str], port: int, expected: str
) -> None:
    assert endpoints.target(addresses, port) == expected
