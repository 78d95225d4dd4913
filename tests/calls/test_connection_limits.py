"""Beyond the limit, idle connections of the address that has the most are closed."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from overlay.calls import connection_limits
from overlay.calls.connection_limits import Connections, max_connections, raise_file_limit
from overlay.calls.request_log import RequestLog
from tests.harness.cluster import until

posix = pytest.mark.skipif(sys.platform == "win32", reason="it counts no descriptors")


class Port:
    """A port, with connections from some addresses of this machine."""

    def __init__(self) -> None:
        # On every address: so no client, whose own address is chosen, has this port as its own.
        self.listening = socket.create_server(("", 0), backlog=100)
        self.port = self.listening.getsockname()[1]
        self.accepted: list[socket.socket] = []
        self.clients: list[socket.socket] = []

    def connect(self, address: str, count: int) -> list[socket.socket]:
        connected = []
        for _ in range(count):
            out = socket.create_connection(("127.0.0.1", self.port), 5, (address, 0))
            out.setblocking(False)
            connected.append(out)
            self.accepted.append(self.listening.accept()[0])
        self.clients += connected
        return connected


@pytest.fixture
def server() -> Iterator[Port]:
    made = Port()
    yield made
    for one in (made.listening, *made.accepted, *made.clients):
        one.close()


def is_closed(one: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return one.recv(1) == b""
    return False


def peer(one: socket.socket) -> str:
    host, port = one.getsockname()
    return f"ipv4:{host}:{port}"


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="it has one loopback address")
def test_the_oldest_idle_connections_of_the_busiest_address_are_closed(server):
    request_log = RequestLog("A", works=False)
    first = server.connect("127.0.0.3", 3)
    many = server.connect("127.0.0.2", 60)
    busy = {peer(one) for one in many[:5]}
    # Above 30, all but 15 are closed.
    connections = Connections(server.port, 40, request_log, lambda: busy)
    connections.start()
    try:
        until(lambda: request_log.meter.crowds().get("connections") == 48)
        time.sleep(0.3)
        assert request_log.meter.crowds() == {"connections": 48}, "those not closed yet count once"
    finally:
        connections.stop()

    assert not any(map(is_closed, first + many[:5])), "other addresses, and open calls"
    assert sum(map(is_closed, many[5:])) == 48


@posix
def test_few_connections_stay_open_and_on_check_is_called_each_time(server):
    request_log, checks = RequestLog("A", works=False), []
    few = server.connect("127.0.0.1", 10)
    connections = Connections(server.port, 400, request_log, set, lambda: checks.append(1))
    connections.start()
    until(lambda: len(checks) > 2)
    connections.stop()

    assert not any(map(is_closed, few))
    assert request_log.meter.crowds() == {}


@posix
def test_a_check_takes_no_descriptors(server):
    server.connect("127.0.0.1", 20)
    before = len(connection_limits._descriptors())
    for _ in range(50):
        found = connection_limits._connections(connection_limits._descriptors(), server.port)
    assert len(found) == 20
    # Threads of this process may open one meanwhile; 50 checks would leave at least 50.
    assert len(connection_limits._descriptors()) < before + 25


@posix
@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_a_dual_stack_port_finds_ipv4_and_ipv6_peers():
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.socket(socket.AF_INET6))
        port.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        port.bind(("::", 0))
        port.listen()
        number = port.getsockname()[1]
        wanted = {}
        for address in ("127.0.0.1", "::1"):
            out = stack.enter_context(socket.create_connection((address, number), 5))
            accepted = stack.enter_context(port.accept()[0])
            wanted[out.getsockname()[:2]] = accepted.fileno()
        others = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pair = socket.socketpair()
        for one in pair:
            stack.enter_context(one)
        beside = [port.fileno(), others.fileno(), pair[0].fileno(), 0]
        found = connection_limits._connections([*wanted.values(), *beside], number)
        assert found == wanted
        assert all(one.fileno() >= 0 and one.getsockname() is not None for one in pair)


def test_some_descriptors_are_reserved_for_the_process_itself():
    assert max_connections(1024) == 824
    assert max_connections(100) == 16
    assert max_connections(10**6) == 8192
    assert raise_file_limit() >= 256
