"""gRPC's channels and ports come from one place."""

from __future__ import annotations

import re
from concurrent import futures

import grpc
import pytest

from overlay.transport.endpoints import open_port
from tests.harness.machine import ROOT


def test_every_channel_is_made_and_every_port_opened_in_one_place() -> None:
    own = [*ROOT.glob("*.py"), *(ROOT / "overlay").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    ways = r"\b(in)?secure_channel\(|\badd_(in)?secure_port\("
    past = {
        path.name
        for path in own
        if not path.name.startswith("overlay_pb2") and re.search(ways, path.read_text("utf-8"))
    }

    assert past == {"endpoints.py"}


def test_a_port_that_another_program_has_is_named() -> None:
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
