"""Stopping without loss: the verb drain, what clients and neighbours see, rolling restarts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2

import overlay
from overlay.client.sync import CallFailed
from overlay.model.segments import Executed
from overlay.server.admin import is_on_this_machine
from overlay.transport import codec
from overlay.transport.codec import pb2, pb2_grpc
from tests.harness import same_process
from tests.harness.cluster import Overlay, free_port, running, six_processes, until

MINE = '''
import os, threading, time
local = threading.local()

def work(payload, context):
    """Writes that it ran, and returns the payload."""
    if not hasattr(local, "file"):
        folder = context.options["folder"]
        name = f"{context.process_id}-{os.getpid()}-{threading.get_ident()}"
        local.file = open(os.path.join(folder, name), "ab", buffering=0)
    local.file.write(context.process_id.encode() + b" " + payload + b"\\n")
    time.sleep(0.002)
    return payload

def gate(payload, context):
    """Waits until the test opens the gate."""
    while not os.path.exists(context.options["folder"] + ".open"):
        time.sleep(0.01)
    return payload
'''


class Noted:
    """Six processes whose handler `work` records every execution."""

    def __init__(self, six: Overlay, notes: Path) -> None:
        self.six = six
        self._notes = notes

    @property
    def _gate(self) -> Path:
        return self._notes.with_name(self._notes.name + ".open")

    def open_gate(self) -> None:
        self._gate.touch()

    def is_stopping(self, process_id: str) -> bool:
        if self.six.processes[process_id].poll() is not None:
            return False
        try:
            ask = self.six.stub(process_id).GetMetrics
            return not ask(pb2.MetricsRequest(), timeout=5).is_healthy
        except grpc.RpcError:  # it has just ended
            return True

    def renew(self) -> None:
        """As at the start: all run, the gate is closed, nothing is noted."""
        if gone := [i for i, process in self.six.processes.items() if process.poll() is not None]:
            self.six.start(*gone)
        self._gate.unlink(missing_ok=True)
        for path in self._notes.iterdir():  # emptied, as the handlers keep their files open
            os.truncate(path, 0)

    def executions(self) -> Counter[str]:
        """(worker, payload) as one string -> how often it ran there."""
        found: Counter[str] = Counter()
        for path in self._notes.iterdir():
            found.update(path.read_text().splitlines())
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noted]:
    folder = tmp_path_factory.mktemp("drain")
    notes = folder / "notes"
    notes.mkdir()
    (folder / "mine.py").write_text(MINE)
    options = {"folder": str(notes)}
    handlers: dict[str, Any] = {"work": {"call": "mine:work", "options": options}}
    handlers["gate"] = {"call": "mine:gate", "slots": 1, "options": options}
    with running(folder, six_processes(handlers=handlers)) as six:
        yield Noted(six, notes)


@pytest.fixture
def noted(shared: Noted) -> Iterator[Noted]:
    """What a test stops is started again for the next one."""
    shared.renew()
    yield shared
    shared.open_gate()
    until(lambda: not any(map(shared.is_stopping, shared.six.ids)), 40, "what stops has ended")


def client_py(six: Overlay, process_id: str, *words: object) -> subprocess.CompletedProcess[str]:
    done = same_process.client("127.0.0.1", six.port(process_id), *words, folder=six.folder)
    assert "Traceback" not in done.stderr
    return done


def begin(six: Overlay, process_id: str, count: int, **fields: Any) -> list[Any]:
    """Sends single requests."""
    stub = six.stub(process_id)
    request = pb2.Request(mode=pb2.ANY, **fields)
    return [stub.Forward.future(request, timeout=30) for _ in range(count)]


def proof_of(call: Any) -> str | None:
    return dict(call.trailing_metadata()).get(codec.EXECUTED_KEY)


# The verb


def test_drain_finishes_running_requests_and_refuses_the_rest(noted: Noted) -> None:
    calls = begin(noted.six, "C", 3, handler="gate")
    until(lambda: noted.six.metrics("C").queue_size == 2, what="one runs and two wait at C")
    with ThreadPoolExecutor(1) as pool:
        drain = pool.submit(client_py, noted.six, "C", "drain", "--json")
        until(lambda: sum(call.done() for call in calls) == 2, 30, "those that wait are refused")
        noted.open_gate()
        done = drain.result()
    codes = Counter(call.code() for call in calls)

    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [found[name] for name in ("process_id", "refused", "left", "gone")] == ["C", 2, 0, True]
    assert codes == {grpc.StatusCode.OK: 1, grpc.StatusCode.UNAVAILABLE: 2}
    assert [proof_of(c) for c in calls if c.code() is not grpc.StatusCode.OK] == ["no", "no"]
    assert noted.six.processes["C"].wait(20) == 0
    assert "2 requests refused, 0 left behind" in noted.six.log("C")


def test_drain_reports_what_it_left_behind(noted: Noted) -> None:
    (call,) = begin(noted.six, "C", 1, handler="gate")
    until(lambda: noted.six.metrics("C").active_requests == 1, what="C is busy")
    done = client_py(noted.six, "C", "drain", "--grace", "0.5")

    assert done.returncode == 1
    assert "0 requests refused, 1 left behind" in done.stdout
    assert "gone" in done.stdout
    assert call.code() is not grpc.StatusCode.OK
    assert proof_of(call) != "no"
    assert noted.six.processes["C"].wait(20) == 1


def test_drain_without_waiting_returns_while_requests_are_running(noted: Noted) -> None:
    (call,) = begin(noted.six, "C", 1, payload=b"x", handler="gate")
    until(lambda: noted.six.metrics("C").active_requests == 1, what="C is busy")
    done = client_py(noted.six, "C", "drain", "--no-wait", "--grace", "27")

    assert done.returncode == 0, done.stderr
    assert "stopping; running requests have up to 27 s" in done.stdout
    assert not call.done()
    noted.open_gate()
    assert call.result().result == b"x"
    assert noted.six.processes["C"].wait(10) == 0


def test_a_second_drain_waits_for_the_first(noted: Noted) -> None:
    (call,) = begin(noted.six, "C", 1, payload=b"x", handler="gate")
    admin = pb2_grpc.OverlayAdminStub(noted.six.channel("C"))
    until(lambda: noted.six.metrics("C").active_requests == 1, what="C is busy")
    first = admin.Drain.future(pb2.DrainRequest(grace_s=25), timeout=30)
    until(lambda: not noted.six.metrics("C").is_healthy, what="C stops")
    second = admin.Drain.future(pb2.DrainRequest(grace_s=0), timeout=30)
    time.sleep(0.2)
    assert not second.done()
    noted.open_gate()

    assert call.result().result == b"x"
    assert [one.result().grace_s for one in (first, second)] == [25, 25]


@pytest.mark.skipif(os.name == "nt", reason="there, terminate() is a kill")
def test_the_first_signal_after_a_drain_does_not_cut_it_short(noted: Noted) -> None:
    (call,) = begin(noted.six, "C", 1, payload=b"x", handler="gate")
    until(lambda: noted.six.metrics("C").active_requests == 1, what="C is busy")
    client_py(noted.six, "C", "drain", "--no-wait")
    noted.six.processes["C"].terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        noted.six.processes["C"].wait(0.5)
    noted.open_gate()

    assert call.result().result == b"x"
    assert noted.six.processes["C"].wait(10) == 0


def test_drain_where_nothing_serves_says_so() -> None:
    done = same_process.client("127.0.0.1", free_port(), "drain")

    assert done.returncode == 4
    assert "nothing serves at" in done.stderr


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_an_impossible_grace_is_refused_and_the_process_keeps_serving(
    six: Overlay, grace_s: float
) -> None:
    admin = pb2_grpc.OverlayAdminStub(six.channel("C"))

    with pytest.raises(grpc.RpcError) as caught:
        admin.Drain(pb2.DrainRequest(grace_s=grace_s), timeout=5)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert six.metrics("C").is_healthy


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_each_service_and_itself(six: Overlay, version: str) -> None:
    """With v1alpha's messages for both, as they differ only in their names."""
    itself = f"grpc.reflection.{version}.ServerReflection"
    ask = six.channel("A").stream_stream(
        f"/{itself}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    wanted = [reflection_pb2.ServerReflectionRequest(list_services="")]
    names = ("OverlayNode", "OverlayAdmin", "grpc.health.v1.Health", itself)
    wanted += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=n) for n in names]
    first, *described = ask(iter(wanted), timeout=5)

    assert {s.name for s in first.list_services_response.service} >= set(names)
    for name, answer in zip(names, described, strict=True):
        (file,) = answer.file_descriptor_response.file_descriptor_proto
        read = FileDescriptorProto.FromString(file)
        assert name.rpartition(".")[::2] in {(read.package, s.name) for s in read.service}


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("ipv4:127.0.0.1:4711", True),
        ("ipv4:127.8.9.10:4711", True),
        ("ipv6:%5B::1%5D:4711", True),
        ("ipv6:[::1]:4711", True),
        ("ipv6:[::ffff:127.0.0.1]:4711", True),
        ("unix:/tmp/socket", True),
        ("ipv4:203.0.113.7:4711", False),  # reserved for documentation
        ("ipv6:[2001:db8::7]:4711", False),
        ("ipv6:[::ffff:203.0.113.7]:4711", False),
        ("ipv4:0.0.0.0:4711", False),
        ("ipv4:127.0.0.1.example.org:4711", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_a_caller_on_this_machine_is_recognised_by_its_address(peer: str, here: bool) -> None:
    assert is_on_this_machine(peer) is here


def test_every_address_of_this_machine_is_its_own() -> None:
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family is socket.AF_INET
    ]

    assert [address for address in found if not is_on_this_machine(f"ipv4:{address}:1")] == []


# What clients and neighbours see


def test_a_stream_announces_the_stop_and_its_end_proves_what_was_not_read(noted: Noted) -> None:
    """With overlay.proto alone, as a client in any language would."""
    stub = noted.six.stub("C")
    more = threading.Event()

    def frames() -> Iterator[pb2.Frame]:
        frame = pb2.Frame()
        frame.segments.add(number=1, count=1, handler="gate").payloads.items.append(b"x")
        yield frame
        more.wait(30)

    call = stub.ForwardStream(frames(), timeout=30)
    until(lambda: noted.six.metrics("C").streamed_active == 1, what="C is busy")
    noted.six.processes["C"].terminate()
    frames_read = [next(call)]
    noted.open_gate()
    with pytest.raises(grpc.RpcError) as caught:
        frames_read.extend(call)
    more.set()

    assert [(frame.stopping, frame.for_good) for frame in frames_read] == [(True, False)] * 2
    assert [list(s.results.items) for frame in frames_read for s in frame.slices] == [[b"x"]]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.trailing_metadata())[codec.EXECUTED_KEY] == "no"


def test_draining_a_worker_repeatedly_costs_its_clients_nothing(noted: Noted) -> None:
    """Its neighbour may send it a request at the very moment its stream ends."""
    ended: list[BaseException | None] = []
    with overlay.connect(noted.six.address("A"), patience_s=20) as client:
        for turn in range(2):
            futures = []
            noted.six.processes["C"].terminate()
            while noted.six.processes["C"].poll() is None:
                futures += [client.submit("work", f"{turn}-{len(futures) + i}") for i in range(20)]
                time.sleep(0.004)
            ended += [future.exception(20) for future in futures]
            start_again(noted.six, "C")

    assert len(ended) > 100
    assert [error for error in ended if error] == []
    assert run_twice(noted) == []


def test_requests_to_a_stopping_leader_are_answered_by_its_successor(noted: Noted) -> None:
    """A window full of requests: far more than a client's budget for retries."""
    payloads = [f"{number}" for number in range(6000)]
    results: list[bytes] = []
    with (
        overlay.connect(noted.six.address("A"), patience_s=20) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        for result in client.map("work", payloads, timeout=60):
            results.append(result)
            if len(results) == 1000:
                noted.six.processes["A"].terminate()
                again = pool.submit(restarted, noted.six, "A")
        again.result()

    assert results == [payload.encode() for payload in payloads]
    assert run_twice(noted) == []
    assert sum(noted.executions().values()) == len(payloads)


def start_again(six: Overlay, process_id: str) -> None:
    six.spawn(process_id)
    six._wait_ready(process_id)
    six.settle(30)


def restarted(six: Overlay, process_id: str) -> None:
    assert six.processes[process_id].wait(40) == 0
    start_again(six, process_id)


def run_twice(noted: Noted) -> list[str]:
    return [where for where, times in noted.executions().items() if times > 1]


# Rolling restarts


class Load:
    """Threads that send requests all the time through one client, until the end."""

    def __init__(self, address: str) -> None:
        # A start on a busy machine may take longer than the default of 2.5 s.
        self.client = overlay.connect(address, patience_s=20)
        self.failures: list[str] = []
        self.incomplete: Counter[str] = Counter()
        self.slowest_s: dict[str, float] = {}
        self.answered: dict[str, list[str]] = {}
        self._ended = threading.Event()
        self.kinds: dict[str, Callable[[str], Any]] = {
            "unary all": lambda p: self.client.forward(p, handler="work"),
            "unary any": lambda p: self.client.forward(p, handler="work", mode="any"),
            "stream all": lambda p: self.client.call(p, handler="work"),
            "stream any": lambda p: self.client.call(p, handler="work", mode="any"),
        }
        self._threads = [
            threading.Thread(target=self._ask, args=(kind, n), daemon=True)
            for kind in self.kinds
            for n in range(2)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(40)
        self.client.close()

    def _ask(self, kind: str, thread: int) -> None:
        answered = self.answered.setdefault(kind, [])
        for number in itertools.count():
            if self._ended.is_set():
                return
            payload = f"{kind}/{thread}/{number}".replace(" ", "-")
            began = time.monotonic()
            try:
                answer = self.kinds[kind](payload)
            except CallFailed as e:
                proof = "" if e.executed is Executed.NO else f" ({e.executed.name})"
                self.failures.append(f"{payload}: {e.code.name}{proof}: {e}")
                continue
            took_s = time.monotonic() - began
            self.slowest_s[kind] = max(took_s, self.slowest_s.get(kind, 0.0))
            answered.append(payload)
            if answer.missing:
                self.incomplete[",".join(part.process_id for part in answer.missing)] += 1
            time.sleep(0.02)


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.name == "nt", reason="there, terminate() is a kill")
def test_a_rolling_restart_fails_no_request_and_runs_none_twice(noted: Noted) -> None:
    six = noted.six
    with Load(six.address("A")) as load:
        # A worker, a team leader and the leader by a signal, and one of each by the verb.
        for turn, process_id in enumerate("CDBEAA"):
            if turn % 2:
                done = client_py(six, process_id, "drain")
                assert done.returncode == 0, done.stdout + done.stderr
            else:
                six.processes[process_id].send_signal(signal.SIGTERM)
            restarted(six, process_id)
        until(lambda: all(len(answered) > 40 for answered in load.answered.values()), 30)
    runs = noted.executions()

    print({kind: len(answered) for kind, answered in load.answered.items()})
    print("incomplete", dict(load.incomplete), "slowest", load.slowest_s)
    assert load.failures == []
    assert len(load.answered) == len(load.kinds)
    assert [where for where, times in runs.items() if times > 1] == []
    by_payload: Counter[str] = Counter(where.split(" ")[1] for where in runs)
    for kind in ("unary any", "stream any"):
        assert {by_payload[payload] for payload in load.answered[kind]} == {1}
