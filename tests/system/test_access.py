"""Who may do what, on real processes: callers with rights of their own, both ways."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from grpc import StatusCode

import overlay
from overlay.model.identity import OPERATOR
from overlay.model.segments import Code
from overlay.security.credentials import Credentials
from overlay.security.tls_folder import TlsFolder
from overlay.transport import endpoints
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.machine import own_addresses
from tests.harness.certificates import user_of
from tests.harness.cluster import ROOT, Overlay, running, six_processes, until
from tests.harness.ways import Outcome, Streamed, Unary, Way

MINE = """
import pathlib
import time

def upper(payload, context):
    return payload.upper()

def held(payload, context):
    while not pathlib.Path("open").exists() and not context.cancelled:
        time.sleep(0.01)
    return payload
"""
LOOPBACK = "127.0.0.1"
# Where this machine is on a network, so that 127.0.0.1 takes plaintext.
HOST = next((a for a in own_addresses() if ":" not in a and not a.startswith("127.")), LOOPBACK)
WAITING = 4
ACCESS = {
    "anna": {"handlers": ["echo", "upper"], "teams": ["green"]},
    "bob": {"handlers": ["upper"]},
    "carol": {"verbs": ["requests"]},
    "dave": {"verbs": ["metrics", "logs"]},
    "erin": {"handlers": ["held"], "waiting": WAITING},
    "frank": {"handlers": [], "verbs": []},
    "*": {"handlers": ["echo"], "verbs": ["requests", "metrics"]},
}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "mine.py").write_text(MINE)
    handlers = {"upper": "mine:upper", "held": {"call": "mine:held", "slots": 1}}
    config = six_processes(tls="tls", handlers=handlers, access=ACCESS)
    for entry in config["processes"].values():
        entry["host"] = HOST
    with running(folder, config) as overlay:
        yield overlay


class Asker:
    """A caller of the closed overlay, where `ways` expects an overlay. keys: None for plaintext."""

    def __init__(self, closed: Overlay, tls: Path | None, host: str = HOST) -> None:
        self.tls = tls
        self._closed = closed
        self._host = host
        self._keys = None if tls is None else Credentials.of_user(tls)
        self._channels: dict[str, grpc.Channel] = {}

    def channel(self, process_id: str) -> grpc.Channel:
        if process_id not in self._channels:
            port, options = self._closed.port(process_id), endpoints.channel_options()
            self._channels[process_id] = endpoints.open_channel(
                (self._host,), port, options, self._keys, process_id
            )
        return self._channels[process_id]

    def stub(self, process_id: str) -> pb2_grpc.OverlayNodeStub:
        return pb2_grpc.OverlayNodeStub(self.channel(process_id))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


class People:
    """Callers by name, with certificates that are made when they are first asked for."""

    def __init__(self, closed: Overlay, folder: Path) -> None:
        self._closed = closed
        self._folder = folder
        self._askers: dict[str, Asker] = {}

    def __getitem__(self, name: str) -> Asker:
        if name not in self._askers:
            self._askers[name] = Asker(self._closed, self.tls(name))
        return self._askers[name]

    def tls(self, name: str, **more: str) -> Path:
        return user_of(
            TlsFolder(self._closed.folder / "tls"), self._folder / name, name, **more
        ).path

    def close(self) -> None:
        for asker in self._askers.values():
            asker.close()


@pytest.fixture
def people(closed: Overlay, tmp_path: Path) -> Iterator[People]:
    with contextlib.closing(People(closed, tmp_path)) as made:
        yield made


@pytest.fixture(params=[Unary, Streamed])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = request.param()
    yield made
    made.close()


# What each may ask

ALLOWED = [
    ("anna", "A", {"team": "green"}),
    ("anna", "A", {"team": "green", "handler": "upper"}),
    ("anna", "C", {}),  # a worker of the green team: no other is in scope
    ("bob", "A", {"handler": "upper"}),
    ("bob", "D", {"handler": "upper"}),
    ("carol", "A", {}),
    ("guest", "A", {"handler": "echo"}),
    ("guest", "F", {}),
]


@pytest.mark.parametrize(("who", "to", "asked"), ALLOWED)
def test_what_is_allowed_is_answered(closed, people, way, who, to, asked):
    (call,) = way.at_once(people[who], 1, to, 10, payload=b"hi", **asked)
    outcome = Outcome(call)

    assert outcome.ok, outcome.details


NAMES_NONE = "which C runs when a request names none; allowed is upper"
REFUSED = [
    ("anna", "A", {"team": "pink"}, "anna may not ask team 'pink'; allowed is green"),
    ("anna", "A", {}, "anna may not ask team 'pink', which a request without a team goes to"),
    ("anna", "A", {"mode": 1}, "anna may not ask team 'pink', which a request without a team"),
    ("anna", "D", {}, "anna may not ask team 'pink', which a request without a team goes to"),
    (
        "anna",
        "A",
        {"team": "green", "handler": "held"},
        "anna may not use handler 'held'; allowed are echo, upper",
    ),
    ("bob", "A", {}, f"bob may not use handler 'echo', {NAMES_NONE}"),
    ("bob", "B", {"mode": 1}, f"bob may not use handler 'echo', {NAMES_NONE}"),
    ("dave", "A", {}, "dave may not send requests here; allowed are metrics, logs"),
    ("frank", "A", {}, "frank may not send requests here; none is allowed"),
    ("guest", "A", {"handler": "upper"}, "guest may not use handler 'upper'; allowed is echo"),
]


@pytest.mark.parametrize(("who", "to", "asked", "says"), REFUSED)
def test_what_is_not_allowed_is_refused_counted_logged_and_shown(
    closed, people, way, who, to, asked, says
):
    before = closed.metrics(to).refused_by_reason["not allowed"]

    (call,) = way.at_once(people[who], 1, to, 10, payload=b"hi", **asked)
    outcome = Outcome(call)

    assert (outcome.code, outcome.executed) == (StatusCode.PERMISSION_DENIED, "no")
    assert outcome.details.startswith(says)
    found = closed.stub(to).GetMetrics(pb2.MetricsRequest(requests=50), timeout=10)
    assert found.refused_by_reason["not allowed"] == before + 1
    summaries = [s for s in found.requests if s.reason == outcome.details]
    assert {(s.code, s.caller) for s in summaries} == {(Code.PERMISSION_DENIED, f"caller {who}")}
    until(lambda: "refused, not allowed: " in closed.log(to), 5, "a line in the log")


def test_only_the_process_that_is_asked_checks(closed, people):
    """The processes below do not know carol's rights, nor whether she asked at all."""
    before = {i: closed.metrics(i).refused for i in "BCDEF"}

    assert len(people["carol"].stub("A").Forward(pb2.Request(), timeout=10).hops) > 1

    assert {i: closed.metrics(i).refused for i in "BCDEF"} == before


@pytest.mark.parametrize(
    "asked",
    [
        {"hops": ["A", "E"]},
        {"hops": ["A"], "targets": ["D"]},
        {"hops": ["A"], "targets": ["D"], "team": "green"},
    ],
)
def test_a_caller_that_speaks_as_processes_do_is_judged_by_its_certificate(
    closed, people, way, asked
):
    (call,) = way.at_once(people["anna"], 1, "B", 10, payload=b"hi", **asked)

    assert Outcome(call).code is StatusCode.PERMISSION_DENIED


def test_a_stream_goes_on_after_a_refusal(closed, people):
    with overlay.connect(closed.address("A"), tls=people["anna"].tls) as leader:
        with pytest.raises(overlay.CallFailed, match="anna may not use handler 'held'") as refused:
            leader.call(b"hi", handler="held", team="green")
        assert leader.call(b"hi", handler="upper", team="green").result == b"HI"

    assert refused.value.code is Code.PERMISSION_DENIED


def test_the_rows_of_one_caller_do_not_take_another_ones_rights(closed, people, way):
    asked = {"payload": b"x", "handler": "upper", "team": "green"}
    for who, code in [("anna", "OK"), ("guest", "PERMISSION_DENIED"), ("anna", "OK")]:
        (call,) = way.at_once(people[who], 1, "A", 10, **asked)
        assert Outcome(call).code.name == code


def test_operators_are_not_restricted(closed, people):
    tls = people.tls("frank", kind=OPERATOR)
    with overlay.connect(closed.address("A"), tls=tls) as leader:
        assert leader.call(b"hi", handler="upper", mode="any").result == b"HI"


# Without a certificate, on the machine itself


@pytest.fixture
def local(closed: Overlay) -> Iterator[Asker]:
    if HOST == LOOPBACK:
        pytest.skip("this machine is on no network, so its processes speak TLS on 127.0.0.1")
    with contextlib.closing(Asker(closed, None, LOOPBACK)) as made:
        yield made


def test_a_local_caller_without_a_certificate_has_what_the_others_have(local, way):
    (allowed,) = way.at_once(local, 1, "A", 10, payload=b"hi", handler="echo")
    (refused,) = way.at_once(local, 1, "A", 10, payload=b"hi", handler="upper")

    assert Outcome(allowed).ok
    assert Outcome(refused).details == (
        "a caller without a certificate may not use handler 'upper'; allowed is echo"
    )


def test_a_local_caller_without_a_certificate_may_read_what_the_others_may(local):
    assert local.stub("A").GetMetrics(pb2.MetricsRequest(), timeout=10).process_id == "A"
    with pytest.raises(grpc.RpcError) as refused:
        logs(local)

    assert refused.value.code() is StatusCode.PERMISSION_DENIED


# Metrics, logs, health


def metrics(asker: Asker) -> None:
    asker.stub("A").GetMetrics(pb2.MetricsRequest(), timeout=10)


def logs(asker: Asker) -> None:
    stub = pb2_grpc.OverlayAdminStub(asker.channel("A"))
    stub.Logs(pb2.LogsRequest(), timeout=10)


@pytest.mark.parametrize(
    ("who", "read", "says"),
    [
        ("dave", metrics, ""),
        ("dave", logs, ""),
        ("anna", logs, ""),
        ("guest", metrics, ""),
        ("carol", metrics, "carol may not read metrics here; allowed is requests"),
        ("carol", logs, "carol may not read logs here; allowed is requests"),
        ("guest", logs, "guest may not read logs here; allowed are requests, metrics"),
        ("frank", metrics, "frank may not read metrics here; none is allowed"),
    ],
)
def test_metrics_and_logs_are_read_by_those_who_may(closed, people, who, read, says):
    before = closed.metrics("A")
    if not says:
        read(people[who])
        return

    with pytest.raises(grpc.RpcError) as refused:
        read(people[who])

    assert (refused.value.code(), refused.value.details()) == (StatusCode.PERMISSION_DENIED, says)
    after = closed.metrics("A")
    assert after.refused_by_reason["not allowed"] == (before.refused_by_reason["not allowed"] + 1)
    assert after.received == before.received + 1
    until(lambda: "refused, not allowed: " in closed.log("A"), 5, "a line in the log")


@pytest.mark.parametrize("verb", ["check", "top", "logs"])
def test_the_command_line_says_what_is_not_allowed(closed, people, tmp_path, verb):
    people["carol"].tls.rename(tmp_path / "tls")  # where client.py finds it
    words = (str(ROOT / "client.py"), HOST, str(closed.port("A")), verb)
    more = ("--once",) if verb == "top" else ()
    done = subprocess.run(
        [sys.executable, *words, *more],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )

    assert done.returncode
    assert "carol may not read" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_health_and_reflection_are_open_to_whoever_is_let_in(people):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    channel = people["frank"].channel("A")
    check = health_pb2_grpc.HealthStub(channel).Check
    listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
    )

    assert check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
    assert next(listed).list_services_response.service


def test_a_caller_that_may_not_send_requests_shows_no_map(closed, people):
    with _reports_a_map(people["frank"]) as refused:
        with _reports_a_map(people["anna"]):
            until(lambda: "caller anna" in _maps(closed), 10, "anna's map")
        assert refused.is_active()
        assert "caller frank" not in _maps(closed)


@contextlib.contextmanager
def _reports_a_map(asker: Asker) -> Iterator[grpc.Call]:
    frames: SimpleQueue[pb2.Frame | None] = SimpleQueue()
    frames.put(pb2.Frame(progress=[pb2.Progress(number=1, handler="echo", total=9)]))
    call = asker.stub("A").ForwardStream(iter(frames.get, None))
    call.initial_metadata()  # it is served
    try:
        yield call
    finally:
        frames.put(None)
        call.cancel()


def _maps(closed: Overlay) -> set[str]:
    return {running.caller for running in closed.metrics("A").maps}


def test_the_library_needs_no_metrics(closed, people):
    with overlay.connect(closed.address("A"), tls=people["carol"].tls) as leader:
        assert {part.process_id for part in leader.parts(b"hi")} == set("CDF")
        assert len(list(leader.map("echo", [b"1", b"2"], mode="any"))) == 2


# How many may wait


@pytest.fixture
def shut(closed: Overlay) -> Iterator[None]:
    """The handler `held` holds until the test ends."""
    yield
    (closed.folder / "open").touch()
    until(lambda: _idle(closed), 20, "no request left")
    (closed.folder / "open").unlink()


def _idle(closed: Overlay) -> bool:
    found = closed.metrics("A")
    return not (found.queue_size or found.streamed_waiting or found.active_requests)


def _waiting(closed: Overlay) -> int:
    found = closed.metrics("A")
    return int(found.queue_size + found.streamed_waiting)


HELD = {"payload": b"x", "handler": "held", "mode": 1, "team": "green"}


def test_no_more_of_a_caller_wait_than_it_may(closed, people, way, shut):
    erin = people["erin"]
    calls = way.at_once(erin, 40, "A", 60, **HELD)
    until(lambda: _waiting(closed) == WAITING, 10, lambda: _waiting(closed))
    (one_more,) = way.at_once(erin, 1, "A", 60, **HELD)
    assert not Outcome(one_more).ok
    assert _waiting(closed) == WAITING
    (other,) = way.at_once(people["carol"], 1, "A", 60, **HELD)
    until(lambda: _waiting(closed) == WAITING + 1, 10, "another caller's request waits")
    (closed.folder / "open").touch()

    outcomes = [Outcome(call) for call in (*calls, one_more)]

    refused = [outcome for outcome in outcomes if not outcome.ok]
    assert Outcome(other).ok
    assert WAITING < len(outcomes) - len(refused) < 20  # those that waited, and those with a place
    assert {(o.code, o.executed, o.details) for o in refused} == {
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "no",
            f"erin has {WAITING} requests waiting here, and may have no more",
        )
    }
    assert all(0 < o.retry_after_s <= 30 for o in refused)


def test_both_ways_and_all_names_of_a_caller_count_together(closed, people, shut):
    streamed, unary = Streamed(), Unary()
    try:
        erin = people["erin"]
        first = streamed.at_once(erin, 30, "A", 60, **HELD)
        until(lambda: any(call.done() for call in first), 10, "a refusal on the stream")
        stub = erin.stub("A")
        call = stub.Forward.future(
            pb2.Request(**HELD), timeout=60, metadata=(("overlay-caller", "another name"),)
        )
        outcome = Outcome(call)
    finally:
        streamed.close()
        unary.close()

    assert outcome.code is StatusCode.RESOURCE_EXHAUSTED
    assert outcome.details.startswith(f"erin has {WAITING} requests waiting here")


def test_a_map_of_a_caller_that_may_have_few_waiting_is_answered_in_full(closed, people):
    (closed.folder / "open").touch()
    try:
        with overlay.connect(closed.address("A"), tls=people["erin"].tls) as leader:
            began = time.monotonic()
            found = list(leader.map("held", [b"%d" % n for n in range(300)], mode="any"))
    finally:
        (closed.folder / "open").unlink()

    assert [int(result) for result in found] == list(range(300))
    assert time.monotonic() - began < 20
