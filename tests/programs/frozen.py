"""Tests of a program that uses an overlay while freezegun stops the clock."""

import asyncio
import contextlib
import datetime
import itertools
import os
import socket
import threading
import time

import pytest
from freezegun import freeze_time

import overlay

ADDRESS = os.environ["OVERLAY_ADDRESS"]


async def _all(results):
    return [result async for result in results]


@freeze_time("2012-01-14")  # overlay's modules are first imported with frozen time
def test_the_first_call():
    with overlay.connect(ADDRESS) as leader:
        assert leader.call("x").result == b"C: x"
    assert time.time() == 1326499200


@pytest.mark.parametrize("frozen", [{}, {"ignore": ["grpc"]}, {"auto_tick_seconds": 15}])
def test_every_verb(frozen):
    with freeze_time("2012-01-14", **frozen), overlay.connect(ADDRESS) as leader:
        assert leader.call("x").result == b"C: x"
        assert leader.forward("x", idempotency_key="").result == b"C: x"
        assert leader.submit(None, "x").result(10) == b"C: x"
        assert list(leader.map(None, ["x"] * 100)) == [b"C: x"] * 100
        assert [part.result for part in leader.parts("x")] == [b"C: x"]
        assert leader.is_serving()
        assert leader.metrics().process_id == "C"
        assert leader.logs().lines


@pytest.mark.parametrize("when", ["2012-01-14", "2099-01-01"])
def test_deadlines_are_kept(when):
    with freeze_time(when), overlay.connect(ADDRESS) as leader:
        for ask in (leader.call, leader.forward):
            with pytest.raises(overlay.CallFailed) as caught:
                ask("20", handler="slow", timeout=0.2)
            assert caught.value.code.name == "DEADLINE_EXCEEDED"


@freeze_time("2012-01-14")
def test_a_refused_connection_is_reported():
    with overlay.connect("127.0.0.1:9", patience_s=0.1) as client:
        for ask in (client.call, client.forward):
            with pytest.raises(overlay.CallFailed, match="refused"):
                ask("x", timeout=5)


@freeze_time("2012-01-14")
def test_asyncio():
    async def main():
        async with overlay.connect_async(ADDRESS) as leader:
            assert (await leader.call("x")).result == b"C: x"
            assert await _all(leader.map(None, ["x"] * 100)) == [b"C: x"] * 100
            assert await leader.is_serving()
            with pytest.raises(overlay.CallFailed):
                await leader.call("20", handler="slow", timeout=0.2)
        assert datetime.date.today() == datetime.date(2012, 1, 14)

    asyncio.run(main())


def test_a_clock_that_is_frozen_for_a_while():
    with overlay.connect(ADDRESS) as leader:
        assert leader.call("x").result == b"C: x"
        with freeze_time("1999-12-31"):
            assert leader.call("x").result == b"C: x"
            assert leader.is_serving()
        assert leader.forward("x").result == b"C: x"


class Proxy:
    """A TCP proxy to the overlay that can be cut."""

    def __init__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ends = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self):
        return "{}:{}".format(*self._listening.getsockname())

    def cut(self):
        self._listening.close()
        while self._ends:
            self._ends.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self):
        one, _ = self._listening.accept()
        host, _, port = ADDRESS.rpartition(":")
        other = socket.create_connection((host, int(port)))
        self._ends += one, other
        for pair in ((one, other), (other, one)):
            threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)


@freeze_time("2012-01-14")
def test_a_lost_process_ends_an_asyncio_map():
    async def main():
        proxy = Proxy()
        async with overlay.connect_async(proxy.address) as leader:
            payloads = itertools.repeat("x")
            async for _ in leader.map_as_completed(None, payloads, window=9, patience_s=0.2):
                proxy.cut()

    with pytest.raises(overlay.CallFailed, match="payloads were answered"):
        asyncio.run(main())
