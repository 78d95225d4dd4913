"""Connections are many at most; when there are too many, the idle ones of who has most are cut."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from overlay.calls import connection_limits
from overlay.calls.connection_limits import Connections, most_connections, raise_file_limit
from overlay.calls.request_log import RequestLog
from tests.harness.cluster import until

posix = pytest.mark.skipif(sys.platform == "win32", reason="it counts no descriptors")


class House:
    """A port, with connections from some addresses of this machine."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.listening.getsockname()[1]
        self.inside: list[socket.socket] = []
        self.outside: list[socket.socket] = []

    def let_in(self, address: str, count: int) -> list[socket.socket]:
        came = []
        for _ in range(count):
            out = socket.create_connection(("127.0.0.1", self.port), 5, (address, 0))
            out.setblocking(False)
            came.append(out)
            self.inside.append(self.listening.accept()[0])
        self.outside += came
        return came


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    for one in (made.listening, *made.inside, *made.outside):
        one.close()


def is_cut(one: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return one.recv(1) == b""
    return False


def peer(one: socket.socket) -> str:
    host, port = one.getsockname()
    return f"ipv4:{host}:{port}"


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="it has one loopback address")
def test_the_oldest_idle_connections_of_who_has_most_are_cut(house):
    record = RequestLog("A", works=False)
    first = house.let_in("127.0.0.3", 3)
    many = house.let_in("127.0.0.2", 60)
    busy = {peer(one) for one in many[:5]}
    door = Connections(house.port, 40, record, lambda: busy)  # 30 are too many, 15 may stay
    door.start()
    try:
        until(lambda: record.meter.crowds().get("connections") == 48)
        time.sleep(0.3)
        assert record.meter.crowds() == {"connections": 48}, "those not closed yet count once"
    finally:
        door.stop()

    assert not any(map(is_cut, first + many[:5])), "others, and who has a call open"
    assert sum(map(is_cut, many[5:])) == 48


@posix
def test_few_connections_are_left_alone_and_something_else_is_done_each_look(house):
    record, looks = RequestLog("A", works=False), []
    few = house.let_in("127.0.0.1", 10)
    door = Connections(house.port, 400, record, set, lambda: looks.append(1))
    door.start()
    until(lambda: len(looks) > 2)
    door.stop()

    assert not any(map(is_cut, few))
    assert record.meter.crowds() == {}


@posix
def test_looking_takes_no_descriptors(house):
    house.let_in("127.0.0.1", 20)
    before = len(connection_limits._descriptors())
    for _ in range(5):
        found = connection_limits._connections(connection_limits._descriptors(), house.port)
    assert len(found) == 20
    assert len(connection_limits._descriptors()) == before


@posix
@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_the_other_sides_are_known_where_a_port_takes_both_families():
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.socket(socket.AF_INET6))
        port.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        port.bind(("::", 0))
        port.listen()
        number = port.getsockname()[1]
        wanted = {}
        for address in ("127.0.0.1", "::1"):
            out = stack.enter_context(socket.create_connection((address, number), 5))
            inside = stack.enter_context(port.accept()[0])
            wanted[out.getsockname()[:2]] = inside.fileno()
        others = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pair = socket.socketpair()
        for one in pair:
            stack.enter_context(one)
        beside = [port.fileno(), others.fileno(), pair[0].fileno(), 0]
        found = connection_limits._connections([*wanted.values(), *beside], number)
        assert found == wanted
        assert all(one.fileno() >= 0 and one.getsockname() is not None for one in pair)


def test_some_descriptors_are_kept_for_the_process_itself():
    assert most_connections(1024) == 824
    assert most_connections(100) == 16
    assert most_connections(10**6) == 8192
    assert raise_file_limit() >= 256
