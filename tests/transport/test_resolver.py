"""Names of machines: looked up by the system's resolver, followed, and shown."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from overlay.model.limits import Limits
from overlay.model.topology import Process
from overlay.peers.peers import Peers
from overlay.transport import channels, endpoints, resolver
from overlay.transport.channels import Channel
from overlay.transport.codec import pb2
from overlay.transport.endpoints import target
from overlay.transport.resolver import Host, look_up, resolve
from tests.harness.cluster import ROOT, Overlay, free_port, until
from tests.harness.fake_resolver import FakeResolver
from tests.harness.hosts import ADDRESSES, Caller, CannotBuild, Hosts, ip

NOWHERE = "2001:db8::9"  # an address that no machine has
UNKNOWN = "this machine knows no such name"


# One name


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("192.168.1.7", ("192.168.1.7",)),
        ("::1", ("::1",)),
        ("[::1]", ("::1",)),
        ("fe80::1%2", ("fe80::1%2",)),
    ],
)
def test_a_numeric_address_needs_no_lookup(host: str, addresses: tuple[str, ...]) -> None:
    assert look_up(host, 0).addresses == resolve(host).addresses == addresses


@pytest.mark.parametrize(
    ("named", "text", "shown"),
    [
        (Host("my-mac.local", ("192.168.1.7",)), "", "my-mac.local (192.168.1.7)"),
        (Host("mac", ("10.0.0.7", "::7")), "mac:50051", "mac:50051 (10.0.0.7, ::7)"),
        (Host("mac", tuple("abcdefg")), "mac", "mac (a, b, c, d, …)"),
        (Host("mac", (), "why"), "mac:50051", "mac:50051"),
        (Host("10.0.0.7", ("10.0.0.7",)), "10.0.0.7:50051", "10.0.0.7:50051"),
        (Host("localhost", ("127.0.0.1",)), "localhost:50051", "localhost:50051"),
    ],
)
def test_messages_show_the_addresses_of_a_name(named: Host, text: str, shown: str) -> None:
    assert named.shown(text) == shown


@pytest.mark.parametrize("host", ["x" * 300, "a..b", "\N{SNOWMAN}" * 70])
def test_an_impossible_name_is_reported_as_unknown(host: str) -> None:
    assert resolve(host) == Host(host, (), f"{host}: {UNKNOWN}; {resolver.ADVICE}")


def test_callers_wait_no_longer_than_asked_and_share_one_lookup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, answer = [], threading.Event()

    def system(host: str, *rest: object, **named: object) -> list[object]:
        if host != "slow.office":  # asked by something that is left of another test
            return []
        asked.append(host)
        answer.wait(10)
        return [(socket.AF_INET, 0, 0, "", ("10.0.0.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", system)
    first, second = look_up("slow.office", 0.05), look_up("slow.office", 0.05)
    answer.set()

    assert first == second == resolver.pending("slow.office")
    assert f"{UNKNOWN} yet" in first.why
    assert look_up("slow.office", 10).addresses == ("10.0.0.7",)
    assert asked == ["slow.office"]


# One channel


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([], endpoints.NOWHERE),
        (["10.0.0.7"], "ipv4:10.0.0.7:5"),
        (["10.0.0.7", "10.0.0.8"], "ipv4:10.0.0.7:5,10.0.0.8:5"),
        (["::1"], "ipv6:[::1]:5"),
        (["fe80::1%2", "10.0.0.7"], "ipv6:[fe80::1%252]:5,[::ffff:10.0.0.7]:5"),
    ],
)
def test_grpc_gets_numeric_addresses_in_order(addresses: list[str], expected: str) -> None:
    assert target(addresses, 5) == expected


@contextmanager
def answering_at(*addresses: str, port: int) -> Iterator[list[str]]:
    """A gRPC server at these addresses that answers with the first one."""
    called: list[str] = []

    def where(request: bytes, context: grpc.ServicerContext) -> bytes:
        called.append(dict(context.invocation_metadata()).get("user", ""))
        return addresses[0].encode()

    def stay(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield addresses[0].encode()
        yield from requests

    methods = {
        "Where": grpc.unary_unary_rpc_method_handler(where),
        "Stay": grpc.stream_stream_rpc_method_handler(stay),
    }
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Test", methods)])
    for address in addresses:
        assert server.add_insecure_port(f"{address}:{port}") == port
    server.start()
    try:
        yield called
    finally:
        server.stop(0).wait(5)


class Office:
    """Resolves names for the channels of this process."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}
        self.lookups = 0

    def resolve(self, host: str) -> Host:
        self.lookups += 1
        addresses = self.names.get(host, ())
        return Host(host, addresses, "" if addresses else f"{host}: {UNKNOWN}")


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Office:
    made = Office()
    monkeypatch.setattr(channels, "resolve", made.resolve)
    monkeypatch.setattr(channels, "LOOKUP_INTERVAL_S", 0.1)
    return made


def where(channel: Channel, timeout: float = 10) -> str:
    outputs: bytes = channel.unary_unary("/Test/Where")(b"", timeout=timeout, wait_for_ready=True)
    return outputs.decode()


def test_several_addresses_are_tried_in_order(office: Office) -> None:
    port = free_port()
    office.names["mac"] = ("::1", "127.0.0.3", "127.0.0.2")
    with (
        answering_at("127.0.0.2", port=port),
        Channel(f"mac:{port}") as channel,
    ):
        assert where(channel) == "127.0.0.2"
        assert channel.shown == f"mac:{port} (::1, 127.0.0.3, 127.0.0.2)"


def test_a_name_that_gets_an_address_later_is_found(office: Office) -> None:
    port = free_port()
    with (
        answering_at("127.0.0.2", port=port),
        Channel(f"mac:{port}") as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        with pytest.raises(grpc.RpcError) as refused:
            where(channel, 0.3)
        problem, waiting = channel.problem, pool.submit(until, lambda: _where_or_not(channel))
        office.names["mac"] = ("127.0.0.2",)

        assert refused.value.code() in channels.SILENT
        assert problem == f"mac: {UNKNOWN}"
        assert waiting.result(10) == "127.0.0.2"
        assert channel.problem == ""


def _where_or_not(channel: Channel) -> str:
    try:
        return where(channel, 1)
    except grpc.RpcError:
        return ""


def test_a_channel_keeps_an_address_that_works_and_leaves_one_that_does_not(office: Office) -> None:
    port = free_port()
    office.names["mac"] = ("127.0.0.2",)
    with (
        answering_at("127.0.0.3", port=port),
        Channel(f"mac:{port}") as channel,
    ):
        with answering_at("127.0.0.2", port=port):
            stream = channel.stream_stream("/Test/Stay")(iter(()), wait_for_ready=True)
            assert next(stream) == b"127.0.0.2"
            office.names["mac"] = ("127.0.0.3",)
            channel.doubt()
            until(lambda: channel._found.addresses == ("127.0.0.3",))

            assert where(channel) == "127.0.0.2"
            future = channel.unary_unary("/Test/Where").future(b"", timeout=10)
            assert future.result(10) == b"127.0.0.2"

        assert until(lambda: _where_or_not(channel)) == "127.0.0.3"


def test_a_channel_leaves_an_address_where_another_program_answers(office: Office) -> None:
    port = free_port()
    office.names["mac"] = ("127.0.0.2",)
    with (
        answering_at("127.0.0.2", port=port),
        answering_at("127.0.0.3", port=port),
        Channel(f"mac:{port}") as channel,
    ):
        assert where(channel) == "127.0.0.2"
        office.names["mac"] = ("127.0.0.3",)
        channel.doubt(is_wrong=True)

        assert until(lambda: _where_or_not(channel) == "127.0.0.3")
        assert channel.shown == f"mac:{port} (127.0.0.3)"


def test_lookups_end_with_their_channel(office: Office) -> None:
    channel = Channel("unknown.office:5")
    channel.doubt()
    until(lambda: "name-unknown.office" in [t.name for t in threading.enumerate()])
    del channel

    until(lambda: "name-unknown.office" not in [t.name for t in threading.enumerate()])


def test_a_neighbour_with_an_unknown_name_is_logged_once(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    neighbour = Process("C", "worker", "green", "mac.office", 5)
    links = Peers([neighbour], replace(Limits(), probe_timeout_s=0.2), "digest")
    links.start()
    try:
        until(lambda: links.states()[0].reason == f"mac.office: {UNKNOWN}")
        before = office.lookups
        until(lambda: office.lookups > before + 5)
    finally:
        links.close()

    assert caplog.text.count(f"link to C: mac.office: {UNKNOWN}\n") == 1


def test_the_server_sees_the_name(office: Office) -> None:
    office.names["my-mac.local"] = ("127.0.0.2",)
    with socket.socket() as listening, ThreadPoolExecutor(1) as pool:
        listening.bind(("127.0.0.2", 0))
        listening.listen()
        port = listening.getsockname()[1]
        headers = pool.submit(first_headers, listening)
        with Channel(f"my-mac.local:{port}") as channel:
            channel.unary_unary("/Test/Where").future(b"", timeout=10, wait_for_ready=True)

            assert headers.result(10)[b":authority"] == f"my-mac.local:{port}".encode()


def first_headers(listening: socket.socket) -> dict[bytes, bytes]:
    """The headers of the first call on the first connection."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    with listening.accept()[0] as accepted:
        while True:
            accepted.sendall(connection.data_to_send())
            for event in connection.receive_data(accepted.recv(65536)):
                if isinstance(event, h2.events.RequestReceived):
                    return dict(event.headers)


# A whole office, whose names only the system's resolver knows (see resolver.c)


class NamedOverlay(Overlay):
    """A leader and a team leader on pc.office, a worker on mac.office."""

    def __init__(self, folder: Path, pc: str = "127.0.0.1", mac: str = "127.0.0.2") -> None:
        self.numbers = {"pc.office": pc, "mac.office": mac}
        spread = {"A": ("leader", "pc", "B"), "B": ("team_leader", "pc", "AC")}
        spread["C"] = ("worker", "mac", "B")
        entries = {
            process_id: {
                "id": process_id,
                "role": role,
                "team": "green",
                "host": f"{machine}.office",
                "port": free_port(),
                "neighbors": list(neighbors),
            }
            for process_id, (role, machine, neighbors) in spread.items()
        }
        super().__init__(folder, {"processes": entries})
        self.names = FakeResolver(folder, pc_office=pc, mac_office=f"{mac} {NOWHERE}")
        self.environment = self.names.environment

    def address(self, process_id: str) -> str:
        """Numeric, as the tests themselves cannot resolve the names."""
        host = self.config["processes"][process_id]["host"]
        return f"{self.numbers[host]}:{self.port(process_id)}"

    def named(self, process_id: str) -> str:
        return f"{self.config['processes'][process_id]['host']}:{self.port(process_id)}"

    def move_mac(self, number: str) -> None:
        self.numbers["mac.office"] = number
        self.names.resolve(mac_office=f"{number} {NOWHERE}")

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env=self.environment,
        )


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamedOverlay]:
    made = NamedOverlay(tmp_path_factory.mktemp("named"))
    try:
        yield made.start()
    finally:
        made.stop()


# All in one interpreter, whose start takes longer than a command.
COMMANDS = """
import contextlib, io, json, sys
import client, test_system
from scripts import launcher

done = []
for program, *words in json.loads(sys.argv[1]):
    sys.argv = [program, *words]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        if program == "launcher":
            code = launcher.main(words)
        else:
            code = {"client": client, "test_system": test_system}[program].main()
    done.append((code, out.buffer.getvalue().decode()))
print(json.dumps(done))
"""


def test_every_command_accepts_names(named: NamedOverlay) -> None:
    port = str(named.port("A"))
    served = ["--bind", "mac.office", "--web-port", "0", "--until-eof"]
    asked = [
        ("client", "pc.office", port, "--payload", "hi"),
        ("client", "pc.office", port, "check"),
        ("client", "pc.office", port, "top", "--once"),
        ("client", "pc.office", port, "web", *served),
        ("client", "doctor", str(named.path), "--json"),
        ("test_system", "pc.office", port),
        ("launcher", "status", str(named.path)),
    ]
    ran = named.run("-c", COMMANDS, json.dumps(asked))
    assert (ran.returncode, ran.stderr) == (0, "")
    codes, outputs = zip(*json.loads(ran.stdout), strict=True)
    answer, check, _, web, doctor, tried, status = outputs

    assert codes == (0,) * len(asked), outputs
    assert "C: hi" in answer
    assert f"at pc.office:{port} (127.0.0.1)" in check
    assert f"watching pc.office:{port}; the page: http://127.0.0.2:" in web
    seen = json.loads(doctor)["processes"]
    assert {process["here"] for process in seen} == {True}
    assert seen[0]["why"].startswith("pc.office (127.0.0.1) leads to this machine only")
    assert f"A (leader) at pc.office:{port} (127.0.0.1)" in tried
    assert status.count("serves") == 3
    c = f"{named.named('C')} (127.0.0.2, {NOWHERE})"
    assert c in check or c in named.metrics("B").neighbours[0].address
    assert f"serves on {named.named('C')} (127.0.0.2)" in named.log("C")


@contextmanager
def silent_program(address: str) -> Iterator[int]:
    """The port of a program that accepts connections and says nothing."""
    with socket.socket() as listening:
        listening.bind((address, 0))
        listening.listen()
        yield listening.getsockname()[1]


FAILING = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import overlay

def why(address):
    with overlay.connect(address) as client:
        try:
            client.call("x", timeout=1.5)
        except overlay.CallFailed as error:
            return [type(error).__name__, str(error)]

with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(why, sys.argv[1:]))))
"""


def test_unknown_names_unused_ports_and_other_programs_are_told_apart(
    named: NamedOverlay,
) -> None:
    unused = free_port()
    named.names.resolve(none_office="", slow_office="~30", away_office="~0")
    with silent_program("127.0.0.2") as stranger, ThreadPoolExecutor(2) as pool:
        cases = {
            "none.office:5": ("NoSuchHost", f"none.office: {UNKNOWN}; correct it"),
            "slow.office:5": ("NoSuchHost", f"slow.office: {UNKNOWN} yet"),
            "away.office:5": ("NoSuchHost", f"away.office: {UNKNOWN} (the name servers"),
            f"pc.office:{unused}": (
                "NotReached",
                f"nothing serves at pc.office:{unused} (127.0.0.1): the connection was refused",
            ),
            f"mac.office:{stranger}": (
                "NotReached",
                f"what listens at mac.office:{stranger} (127.0.0.2, {NOWHERE}) does not speak",
            ),
        }
        program = pool.submit(named.run, "-c", FAILING, *cases)
        command = pool.submit(named.run, ROOT / "client.py", "none.office", 5).result()
        failed = json.loads(program.result().stdout)

    assert [kind for kind, _ in failed] == [kind for kind, _ in cases.values()]
    for (_, expected), (_, outputs) in zip(cases.values(), failed, strict=True):
        assert outputs.startswith(expected)
    assert command.returncode == 4
    assert command.stderr.startswith(f"client.py: none.office: {UNKNOWN}; correct it")


def test_a_process_whose_name_is_another_machines_says_so(
    named: NamedOverlay, tmp_path: Path
) -> None:
    raw = json.loads(named.path.read_text())
    raw["processes"]["B"]["host"], raw["processes"]["C"]["host"] = "other.office", "none.office"
    named.names.resolve(other_office=NOWHERE, none_office="")
    (tmp_path / "other.json").write_text(json.dumps(raw))
    node = (ROOT / "node.py", tmp_path / "other.json")
    with ThreadPoolExecutor(2) as pool:
        other, none = pool.map(lambda process_id: named.run(*node, process_id), "BC")

    assert (other.returncode, none.returncode) == (2, 2)
    assert f"process B: other.office ({NOWHERE}) is not an address of this" in other.stderr
    assert "machine, which has " in other.stderr
    assert f"process C: none.office: {UNKNOWN}; correct it" in none.stderr


PROGRAM = """
import asyncio, sys
import overlay

address = sys.argv[1]

def payloads():
    yield "map before"
    input()
    yield "map after"

def say(result):
    print(result.decode(), flush=True)

loop = asyncio.new_event_loop()
asynchronous = overlay.connect_async(address)
single = overlay.connect(address)
with overlay.connect(address) as client:
    say(loop.run_until_complete(asynchronous.call("async before")).result)
    say(single.forward("single before").result)
    say(client.call("call before").result)
    for result in client.map("echo", payloads(), window=1):
        say(result)
    say(client.call("call after").result)
    say(single.forward("single after").result)
    say(loop.run_until_complete(asynchronous.call("async after")).result)
    loop.run_until_complete(asynchronous.close())
"""


def test_links_and_clients_find_a_machine_with_a_new_address(named: NamedOverlay) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, named.named("C")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=named.environment,
    )
    with program:
        before = [program.stdout.readline().strip() for _ in range(4)]
        named.kill("C")
        named.move_mac("127.0.0.3")
        named._channels.pop("C").close()
        named.start("C")  # waits until its links are up
        after, complaint = program.communicate("\n", timeout=30)

    kinds = ("async", "single", "call", "map")
    assert before == [f"C: {kind} before" for kind in kinds], complaint
    assert sorted(after.splitlines()) == sorted(f"C: {kind} after" for kind in kinds), complaint
    there = f"127.0.0.3, {NOWHERE}"
    assert named.metrics("B").neighbours[0].address == f"{named.named('C')} ({there})"
    assert f"mac.office (127.0.0.2, {NOWHERE}) is now {there}" in named.log("B")
    assert f"link to C ({named.named('C')} ({there})) is up" in named.log("B")


# Two machines, one of which gets a new address while everything is running


class TwoMachines(NamedOverlay):
    """Each in its own network namespace; requests come from the leader's."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        super().__init__(folder, ADDRESSES[1], ADDRESSES[2])
        self.hosts = hosts
        self.caller = Caller(hosts, 1)

    def serve(self) -> None:
        for process_id, host in (("A", 1), ("B", 1), ("C", 2)):
            self.processes[process_id] = self.hosts.popen(
                host,
                *self._node(process_id),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.environment,
            )
        for process_id in self.processes:
            self._wait_ready(process_id)

    def answered(self) -> str:
        """The workers that answered a request to all."""
        request = pb2.Request(payload=b"hi").SerializeToString()
        return self.caller.begin(self.address("A"), "Forward", request, 2).result(10).answered

    def stop(self) -> None:
        self.caller.close()
        super().stop()


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[TwoMachines]:
    try:
        hosts = Hosts()
    except CannotBuild as e:
        pytest.fail(str(e)) if os.environ.get("CI") else pytest.skip(str(e))
    try:
        made = TwoMachines(tmp_path, hosts)
        yield made
        made.stop()
    finally:
        hosts.close()


def test_a_machine_with_a_new_address_rejoins_the_overlay(
    two_machines: TwoMachines,
) -> None:
    two_machines.serve()
    until(lambda: two_machines.answered() == "C")
    inside, mask = two_machines.hosts.names[2], "/24"
    ip("-n", inside, "addr", "del", f"{ADDRESSES[2]}{mask}", "dev", "wire")
    ip("-n", inside, "addr", "add", f"192.168.1.77{mask}", "dev", "wire")
    two_machines.move_mac("192.168.1.77")

    until(lambda: "is now 192.168.1.77" in two_machines.log("B"))
    until(lambda: two_machines.answered() == "C")
    assert f"serves on {two_machines.named('C')} (192.168.1.77) now" in two_machines.log("C")


# Everywhere


def test_every_address_comes_from_the_systems_resolver() -> None:
    own = [*ROOT.glob("*.py"), *(ROOT / "overlay").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    calls = r"insecure_channel\(|secure_channel\(|getaddrinfo\(|create_connection\(|gethostby"
    files = {path.name for path in own if re.search(calls, path.read_text("utf-8"))}

    assert files == {"resolver.py", "endpoints.py"}


def test_a_channel_that_moves_shows_all_its_new_addresses_at_once() -> None:
    shown: list[str] = []

    class OnMove(logging.Handler):
        """Notes the addresses at the moment the channel logs that it has moved."""

        def emit(self, record: logging.LogRecord) -> None:
            shown.append(channel.shown)

    log, handler = logging.getLogger("overlay.transport.channels"), OnMove()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with Channel("mac.office:1", []) as channel:
            channel.on_resolved(Host("mac.office", ("127.0.0.2", "::1")))
            channel.on_resolved(Host("mac.office", ("127.0.0.3", "::1")))
    finally:
        log.removeHandler(handler)
        log.setLevel(before)

    assert shown == ["mac.office:1 (127.0.0.3, ::1)"]
