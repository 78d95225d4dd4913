"""Third-party clients, older clients, and callers that send invalid requests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_tools import protoc

from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, running, six_processes, tool

HERE = Path(__file__).resolve().parent / "interop"
PROTO = ROOT / "overlay.proto"
ALL_HOPS = ["A", "B", "C", "E", "D", "F"]
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def leader_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A without neighbours, which refuses every request."""
    with Overlay(tmp_path_factory.mktemp("alone"), six_processes()) as overlay:
        yield overlay.start("A")


# An older client: string payloads, no parts


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs the older client: older("127.0.0.1:50051", "hi") returns what it received."""
    folder = str(tmp_path_factory.mktemp("older"))
    out = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    assert protoc.main(["protoc", f"-I{HERE}", *out, "older.proto"]) == 0

    def ask(address: str, payload: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "older_client.py"), folder, address, payload]
        return json.loads(printed(command))

    return ask


@pytest.mark.parametrize("payload", ["hi", "", "Grüße, 世界\n\t\x01"])
def test_an_older_client_gets_text_hops_and_coverage(
    six: Overlay, older: Callable[..., dict[str, Any]], payload: str
) -> None:
    seen = older(six.address("A"), payload)

    assert seen["code"] == "OK"
    assert seen["result"] == f"C: {payload}\nD: {payload}\nF: {payload}"
    assert seen["hops"] == ALL_HOPS
    assert seen["trailers"]["overlay-coverage"] == "3/3"


def test_an_older_client_reads_the_eight_metrics_it_knows(
    six: Overlay, older: Callable[..., dict[str, Any]]
) -> None:
    metrics = older(six.address("A"), "hi")["metrics"]

    assert (metrics["process_id"], metrics["role"], metrics["team"]) == ("A", "leader", "green")
    assert (metrics["max_capacity"], metrics["is_healthy"], metrics["queue_size"]) == (100, True, 0)
    assert metrics["active_requests"] == 0
    assert metrics["avg_processing_time_ms"] > 0


def test_an_older_client_sees_a_refusal_as_a_status(
    leader_alone: Overlay, older: Callable[..., dict[str, Any]]
) -> None:
    seen = older(leader_alone.address("A"), "hi")

    assert seen["code"] == "UNAVAILABLE"
    assert "A has no live link to B" in seen["details"]
    assert seen["trailers"]["overlay-executed"] == "no"


# `buf curl`, written in Go


@pytest.fixture(scope="module")
def buf(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `buf curl` over gRPC: buf("http://HOST:PORT/SERVICE/METHOD", {...}, "-v")."""
    home = tmp_path_factory.mktemp("buf")
    # buf walks the schema's folder; in the project it would follow wine's drives to `/`.
    shutil.copy(PROTO, home)

    def ask(url: str, request: object = None, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["curl", "--http2-prior-knowledge", "--protocol", "grpc", *options]
        data = [] if request is None else ["-d", json.dumps(request)]
        return run_buf([*command, *data, url], home)

    return ask


SCHEMA = ("--schema", PROTO.name, "--reflect=false")


@pytest.mark.parametrize("how", [SCHEMA, ()], ids=["from the proto", "by reflection"])
def test_an_outside_client_gets_answers(six: Overlay, buf: Any, how: tuple[str, ...]) -> None:
    text = base64.b64encode(b"hi").decode()

    done = buf(url(six), {"payload": text, "want_parts": True}, "-v", *how)

    answer = json.loads(done.stdout)
    assert base64.b64decode(answer["result"]) == b"C: hi\nD: hi\nF: hi"
    assert answer["hops"] == ALL_HOPS
    assert [(p["processId"], base64.b64decode(p["result"])) for p in answer["parts"]] == [
        ("C", b"C: hi"),
        ("D", b"D: hi"),
        ("F", b"F: hi"),
    ]
    assert "Overlay-Coverage: 3/3" in done.stderr


def test_an_outside_client_can_ask_any_worker(six: Overlay, buf: Any) -> None:
    answer = json.loads(buf(url(six), {"mode": "ANY"}, *SCHEMA).stdout)

    (part,) = answer["parts"]
    assert part["executed"] == "YES"
    assert answer["hops"] in (["A", "B", "C"], ["A", "E", "D"], ["A", "E", "F"])


@pytest.mark.parametrize("service", ["", "OverlayNode"])
@pytest.mark.parametrize("process_id", "ABC")
def test_the_standard_health_check_answers(
    six: Overlay, buf: Any, process_id: str, service: str
) -> None:
    done = buf(url(six, "grpc.health.v1.Health/Check", process_id), {"service": service})

    assert json.loads(done.stdout) == {"status": "SERVING"}


def test_reflection_names_the_services(six: Overlay, buf: Any) -> None:
    done = buf(f"http://{six.address('A')}", None, "--list-services")

    assert {"OverlayNode", "grpc.health.v1.Health"} <= set(done.stdout.split())


def test_an_outside_client_sees_why_a_call_failed(six: Overlay, buf: Any) -> None:
    done = buf(url(six), {"team": "blue"}, "-v", *SCHEMA)

    assert done.returncode == 8 * grpc.StatusCode.NOT_FOUND.value[0]  # buf's convention
    assert "no team 'blue'; there are green, pink" in done.stderr
    assert "Overlay-Executed: no" in done.stderr


def test_an_outside_client_learns_when_to_retry(leader_alone: Overlay, buf: Any) -> None:
    done = buf(url(leader_alone), {}, *SCHEMA)

    error = json.loads(done.stderr)
    assert error["code"] == "unavailable"
    assert "A has no live link to B" in error["message"]
    assert [detail["type"] for detail in error["details"]] == ["google.rpc.RetryInfo"]


# JavaScript


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs client.js with its npm packages. Skipped if they cannot be installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is missing")
    folder = tmp_path_factory.mktemp("javascript")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "@grpc/grpc-js@1"]
    try:
        done = finished(install, cwd=folder)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install @grpc/grpc-js in time")
    if done.returncode:
        pytest.skip(f"npm cannot install @grpc/grpc-js: {done.stderr.strip()[-200:]}")

    def ask(address: str, payload: str, program: Path = HERE / "client.js") -> dict[str, Any]:
        command = [node, str(program), str(PROTO), address, payload]
        return json.loads(printed(command, cwd=folder))

    return ask


def test_a_javascript_client_gets_answers_and_statuses(six: Overlay, javascript: Any) -> None:
    seen = javascript(six.address("A"), "hi")

    assert seen["result"] == "C: hi\nD: hi\nF: hi"
    assert seen["hops"] == ALL_HOPS
    assert seen["coverage"] == "3/3"
    assert seen["refusal"] == {
        "code": grpc.StatusCode.NOT_FOUND.value[0],
        "details": "no team 'blue'; there are green, pink",
        "executed": "no",
    }


# With certificates, as docs/security.md says


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """The six with certificates, and the schema in their folder."""
    folder = tmp_path_factory.mktemp("closed")
    shutil.copy(PROTO, folder)
    with running(folder, six_processes(tls="tls")) as overlay:
        yield overlay


def on_the_page(client: str, closed: Overlay) -> str:
    """What the page says to type for this client, with the names of this overlay."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    fences = re.findall(r"```text\n(.*?)```", page.split("## From other languages")[1], re.DOTALL)
    (text,) = [fence for fence in fences if client in fence]
    cluster = json.loads((closed.folder / "tls" / "overlay.json").read_text())["cluster"]
    return text.replace("192.168.1.1:50051", closed.address("A")).replace("CLUSTER", cluster)


def test_buf_is_answered_over_tls_as_the_page_says(closed: Overlay) -> None:
    done = run_buf(shlex.split(on_the_page("buf curl", closed))[1:], closed.folder)

    assert base64.b64decode(json.loads(done.stdout)["result"]) == b"C: hello\nD: hello\nF: hello"


def test_a_javascript_client_is_answered_over_tls_as_the_page_says(
    closed: Overlay, javascript: Any
) -> None:
    program = closed.folder / "client.js"
    plain = (HERE / "client.js").read_text().splitlines()
    (line,) = [line for line in plain if line.startswith("const client = ")]
    secure = on_the_page("createSsl", closed).replace("'tls/", f"'{closed.folder.as_posix()}/tls/")
    program.write_text("\n".join(plain).replace(line, secure))

    seen = javascript(closed.address("A"), "hi", program)

    assert (seen["result"], seen["hops"]) == ("C: hi\nD: hi\nF: hi", ALL_HOPS)
    assert seen["refusal"]["details"] == "no team 'blue'; there are green, pink"


def test_stock_grpc_for_python_is_answered_over_tls_as_the_page_says(closed: Overlay) -> None:
    ca, user = ((closed.folder / "tls" / name).read_bytes() for name in ("ca.pem", "user.pem"))
    keys = grpc.ssl_channel_credentials(ca, user, user)
    name = [("grpc.ssl_target_name_override", "office.overlay")]
    with grpc.secure_channel(closed.address("A"), keys, name) as channel:
        answer = channel.unary_unary("/OverlayNode/Forward")(b"", timeout=10)

    assert pb2.Response.FromString(answer).result == b"C: \nD: \nF: "


KEYS = ("--cacert", "tls/ca.pem", "--cert", "tls/user.pem", "--key", "tls/user.pem")
CHECK = ("-d", '{"service": "OverlayNode"}')


@pytest.mark.parametrize(
    ("what", "method", "says"),
    [
        (CHECK, "grpc.health.v1.Health/Check", "SERVING"),
        (("--list-services",), "", "grpc.health.v1.Health"),
        (("-d", "{}"), "OverlayNode/GetMetrics", '"mode": "tls"'),
    ],
    ids=["health", "reflection", "metrics by reflection"],
)
@pytest.mark.parametrize("process_id", "ABC")
def test_health_and_reflection_are_served_over_tls(
    closed: Overlay, process_id: str, what: tuple[str, ...], method: str, says: str
) -> None:
    """Without --servername: the host of the configuration is in the certificate too."""
    to = f"https://{closed.address(process_id)}/{method}".rstrip("/")

    done = run_buf(["curl", "--protocol", "grpc", *KEYS, *what, to], closed.folder)

    assert done.returncode == 0, done.stderr
    assert says in done.stdout.replace('":"', '": "')


@pytest.mark.parametrize(
    "how",
    [
        ("http", "--http2-prior-knowledge"),
        ("https", *KEYS[:2]),
        ("https", *KEYS, "--servername", "other.overlay"),
    ],
    ids=["plaintext", "no certificate", "another overlay's name"],
)
@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "OverlayNode/Forward"])
def test_an_outside_client_gets_nothing_without_the_keys_and_the_name(
    closed: Overlay, method: str, how: tuple[str, ...]
) -> None:
    scheme, *options = how
    to = f"{scheme}://{closed.address('A')}/{method}"

    done = run_buf(["curl", "--protocol", "grpc", *options, "-d", "{}", to], closed.folder)

    assert done.returncode != 0
    assert done.stdout == ""


# Well-formed but invalid requests

FAR = ["Z"]  # as if another process had sent it

INVALID = {
    "mode 7": ({"mode": 7}, "INVALID_ARGUMENT", "mode 7 is not 0 (all) or 1 (any)"),
    "mode -1": ({"mode": -1}, "INVALID_ARGUMENT", "mode -1 is not 0 (all) or 1 (any)"),
    "unknown team": ({"team": "blue"}, "NOT_FOUND", "no team 'blue'"),
    "unknown handler": ({"handler": "ocr"}, "NOT_FOUND", "no handler 'ocr' here; there are echo"),
    "import path": ({"handler": "os:system"}, "NOT_FOUND", "no handler 'os:system'"),
    "100 hops": ({"hops": ["Z"] * 100}, "INVALID_ARGUMENT", "100 entries are more than 64"),
    "half a million hops": ({"hops": [""] * 500_000}, "INVALID_ARGUMENT", "more than 64"),
    "a million hops": ({"hops": [""] * 10**6}, "INVALID_ARGUMENT", "has so many parts that it"),
    "newline": ({"team": "pink\nA"}, "INVALID_ARGUMENT", r"team: 'pink\nA' is not a name"),
    "escape": ({"handler": "\x1b[31m"}, "INVALID_ARGUMENT", r"handler: '\x1b[31m' is not a name"),
    "right to left": ({"hops": ["\u202eA"]}, "INVALID_ARGUMENT", r"hops: '\u202eA' is not a name"),
    "null": ({"hops": FAR, "targets": ["C\0"]}, "INVALID_ARGUMENT", r"targets: 'C\x00' is not"),
    "long name": ({"team": "x" * 65}, "INVALID_ARGUMENT", "at most 64 letters"),
    "no such target": ({"hops": FAR, "targets": ["G"]}, "FAILED_PRECONDITION", "know worker G"),
    "not a worker": ({"hops": FAR, "targets": ["B"]}, "FAILED_PRECONDITION", "know worker B"),
}  # fmt: skip


def asked_of(name: str) -> str:
    """The processes; a large request takes each of them as long, and is read by the same code."""
    return "A" if name.endswith("million hops") else "ABC"


@pytest.mark.parametrize(
    ("process_id", "fields", "code", "reason"),
    [
        pytest.param(process_id, *case, id=f"{name}-{process_id}")
        for name, case in INVALID.items()
        for process_id in asked_of(name)
    ],
)
def test_an_invalid_request_is_rejected_before_anything_runs(
    six: Overlay, process_id: str, fields: dict[str, Any], code: str, reason: str
) -> None:
    before = runs(six)

    with pytest.raises(grpc.RpcError) as caught:
        six.ask(process_id, **fields)

    assert caught.value.code().name == code
    assert reason in caught.value.details()
    assert caught.value.details().isprintable()
    assert dict(caught.value.trailing_metadata())[codec.EXECUTED_KEY] == "no"
    assert runs(six) == before
    assert_unharmed(six, process_id)


@pytest.mark.parametrize("process_id", "ABC")
def test_a_process_rejects_a_request_with_itself_in_the_hop_list(
    six: Overlay, process_id: str
) -> None:
    before = runs(six)

    with pytest.raises(grpc.RpcError) as caught:
        six.ask(process_id, hops=["Z", process_id])

    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{process_id} is already in the hop list" in caught.value.details()
    assert dict(caught.value.trailing_metadata())[codec.EXECUTED_KEY] == "no"
    assert runs(six) == before


def test_a_target_that_a_process_cannot_reach_is_missing_with_a_reason(six: Overlay) -> None:
    response = six.ask("E", hops=["A"], targets=["C", "D"])

    assert [(p.process_id, p.code) for p in response.parts] == [("C", 14), ("D", 0)]
    assert response.parts[0].reason == "E has no neighbor that leads to C"
    assert response.parts[0].executed == pb2.NO


def test_a_unary_call_from_a_process_gets_each_workers_bytes(six: Overlay) -> None:
    response = six.ask("B", hops=["A"], targets=["C", "D"])

    assert [part.result for part in response.parts] == [b"C: hi", b"D: hi"]


def test_a_client_cannot_choose_targets(six: Overlay) -> None:
    response = six.ask("A", targets=["C"])

    assert [part.process_id for part in response.parts] == ["C", "D", "F"]


def test_fields_of_a_newer_client_are_ignored(six: Overlay) -> None:
    newer = b"\x0a\x02hi" + b"\xfa\x3e\x05newer" + b"\x18\x00"  # payload, field 1007, mode

    response = pb2.Response.FromString(raw(six, "A", newer))

    assert response.result == b"C: hi\nD: hi\nF: hi"


# Bytes that are not a request

NOT_A_REQUEST = {
    "cut off": (b"\x0a\x05ab", "INVALID_ARGUMENT"),
    "all ones": (b"\xff" * 40, "INVALID_ARGUMENT"),
    "bad utf-8": (b"\x22\x02\xff\xfe", "INVALID_ARGUMENT"),
    "too large": (b"\x0a\x80\x80\xc0\x09" + bytes(19 * MIB), "RESOURCE_EXHAUSTED"),
}


@pytest.mark.parametrize("process_id", "AC")
@pytest.mark.parametrize(("body", "code"), NOT_A_REQUEST.values(), ids=NOT_A_REQUEST)
def test_a_body_that_is_not_a_request_gets_a_status_and_runs_nothing(
    six: Overlay, process_id: str, body: bytes, code: str
) -> None:
    before = runs(six)

    with pytest.raises(grpc.RpcError) as caught:
        raw(six, process_id, body)

    assert caught.value.code().name == code
    assert runs(six) == before
    assert_unharmed(six, process_id)


def test_a_method_that_does_not_exist_is_unimplemented(six: Overlay) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(six, "A", b"", "/OverlayNode/Shutdown")

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert codec.plain_reason(caught.value).startswith("it does not know this call")
    assert_unharmed(six, "A")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

NOT_GRPC = {
    "junk": bytes(range(256)) * 40,
    "zeros": bytes(100_000),
    "http 1": b"GET / HTTP/1.1\r\nHost: overlay\r\n\r\n",
    "http 1 post": b"POST /OverlayNode/Forward HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi",
    "http 2, then junk": PREFACE + bytes([0, 0, 8, 99, 255, 0, 0, 0, 1]) + b"?" * 500,
    "a frame too large": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(50_000),
}


@pytest.mark.parametrize("sent", NOT_GRPC.values(), ids=NOT_GRPC)
def test_bytes_that_are_not_grpc_end_only_their_connection(six: Overlay, sent: bytes) -> None:
    with connect(six, "A") as connection:
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            connection.sendall(sent)

        assert is_closed(connection)
    assert_unharmed(six, "A")


def test_a_caller_that_starts_tls_is_disconnected(six: Overlay) -> None:
    context = ssl._create_unverified_context()

    with connect(six, "A") as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(connection)

    assert_unharmed(six, "A")


def test_silent_and_broken_connections_delay_no_other_caller(six: Overlay) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(connect(six, "A"))
        for _ in range(100):
            with connect(six, "A") as connection:
                connection.sendall(PREFACE[:10])
                reset = struct.pack("ii", 1, 0)  # closing sends RST
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

        assert_unharmed(six, "A")


# Helpers


def run_buf(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """In this folder, which is also its home."""
    program = tool("buf", "pip install -r requirements-dev.txt")
    return finished([program, *words], cwd=folder, env={**os.environ, "HOME": str(folder)})


def finished(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        **options,
    )


def printed(command: list[str], **options: Any) -> str:
    """What the program prints. Fails with its error message."""
    done = finished(command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def url(overlay: Overlay, method: str = "OverlayNode/Forward", process_id: str = "A") -> str:
    return f"http://{overlay.address(process_id)}/{method}"


def raw(
    overlay: Overlay, process_id: str, body: bytes, method: str = "/OverlayNode/Forward"
) -> bytes:
    """Calls the method with these bytes, of any size, on a new connection."""
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(overlay.address(process_id), options) as channel:
        return channel.unary_unary(method)(body, timeout=10)


def connect(overlay: Overlay, process_id: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", overlay.port(process_id)), timeout=5)


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other side to close it. Raises TimeoutError."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionError:
        pass
    return True


def runs(overlay: Overlay) -> int:
    """How many requests the workers' handlers have got."""
    seen = [overlay.metrics(worker).handlers[0] for worker in "CDF"]
    return sum(found.active + found.completed + found.failed for found in seen)


def assert_unharmed(overlay: Overlay, process_id: str) -> None:
    """The process serves a new client, its log has no traceback, and it has printed nothing."""
    response = pb2.Response.FromString(raw(overlay, process_id, b""))
    assert all(part.code == 0 for part in response.parts)
    assert overlay.processes[process_id].poll() is None
    assert "Traceback" not in overlay.log(process_id)
    assert printed_by(overlay, process_id) == ""


def printed_by(overlay: Overlay, process_id: str) -> str:
    """What the process has printed since its line "serves on"."""
    console = overlay.processes[process_id].stdout.buffer
    os.set_blocking(console.fileno(), False)
    return (console.read1(65_536) or b"").decode()
