"""The client library and client.py, against real processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

import overlay
from overlay.cli import main as script
from overlay.cli.terminal import Exit
from overlay.client import sync as library
from overlay.model.segments import Code, Executed
from overlay.transport.codec import pb2
from tests.harness.cluster import ROOT, Overlay, free_port, running, six_processes, until
from tests.harness.commands import run_client

HANDLERS = """
import time

def boom(payload, context):
    raise ValueError("the secret reason")

def slow(payload, context):
    until = time.monotonic() + float(payload)
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.02)
    return b"slept"

def binary(payload, context):
    return bytes(range(256))
"""
NAMES = {"boom": "mine:boom", "slow": "mine:slow", "binary": "mine:binary"}


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F, echo by default, with a handler that fails, a slow one and a binary one."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(HANDLERS)
    with running(folder, six_processes(handlers=NAMES)) as found:
        yield found


@pytest.fixture(scope="module")
def wounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F, with F killed."""
    with running(tmp_path_factory.mktemp("wounded"), six_processes()) as found:
        found.kill("F")
        until(lambda: _state(found, "E", "F") == "down", what="E sees F down")
        yield found


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A to F and a worker G. Each worker is for one test, which ends it."""
    folder = tmp_path_factory.mktemp("fragile")
    (folder / "mine.py").write_text(HANDLERS)
    config = six_processes(handlers=NAMES)
    processes = config["processes"]
    processes["G"] = {**processes["C"], "id": "G", "port": free_port()}
    processes["B"]["neighbors"].append("G")
    with running(folder, config) as found:
        yield found


def _state(found: Overlay, process_id: str, neighbour: str) -> str:
    neighbours = found.metrics(process_id).neighbours
    return next(n.state for n in neighbours if n.process_id == neighbour)


@pytest.fixture
def to_a(mine: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(mine.address("A")) as found:
        yield found


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and sends nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield listener.getsockname()[1]


def at(found: Overlay, process_id: str) -> tuple[str, int]:
    return "127.0.0.1", found.port(process_id)


# The library


def test_a_request_to_all_is_answered_by_every_worker(to_a: overlay.Client) -> None:
    answer = to_a.call("hi")

    assert answer.result == b"C: hi\nD: hi\nF: hi"
    assert answer.coverage == (3, 3)
    assert answer.missing == ()
    assert answer.hops == ("A", "B", "C", "E", "D", "F")
    assert answer.request_id > 0


def test_a_request_to_any_is_answered_by_one_worker(to_a: overlay.Client) -> None:
    answer = to_a.call(b"hi", mode="any", team="pink")

    assert answer.coverage == (1, 1)
    assert answer.result in (b"D: hi", b"F: hi")


def test_each_workers_own_result_is_sent_only_on_request(to_a: overlay.Client) -> None:
    with_parts = to_a.call("hi", want_parts=True)
    without = to_a.call("hi")

    assert [part.result for part in with_parts.parts] == [b"C: hi", b"D: hi", b"F: hi"]
    assert [part.result for part in without.parts] == [b"", b"", b""]


@pytest.mark.parametrize("payload", ["", b"", "Grüße 中文", bytes(range(256)), b"x" * 5_000_000])
def test_any_payload_arrives_unchanged(to_a: overlay.Client, payload: bytes | str) -> None:
    sent = payload.encode() if isinstance(payload, str) else payload

    answer = to_a.call(payload, mode="any", team="green")

    assert answer.result == b"C: " + sent


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "executed"),
    [
        ({"handler": "boom"}, library.HandlerFailed, Code.INTERNAL, Executed.YES),
        ({"handler": "nope"}, library.NameNotFound, Code.NOT_FOUND, Executed.NO),
        ({"team": "blue"}, library.NameNotFound, Code.NOT_FOUND, Executed.NO),
        ({"team": "t" * 65}, library.InvalidCall, Code.INVALID_ARGUMENT, Executed.NO),
        (
            {"handler": "slow", "timeout": 0.3},
            library.DeadlinePassed,
            Code.DEADLINE_EXCEEDED,
            Executed.YES,
        ),
    ],
)
def test_each_status_has_its_own_error_type(
    to_a: overlay.Client,
    arguments: dict[str, Any],
    kind: type[library.CallFailed],
    code: Code,
    executed: Executed,
) -> None:
    with pytest.raises(library.CallFailed) as caught:
        to_a.call("5", **arguments)

    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.executed) == (code, executed)


def test_the_exception_of_a_handler_is_not_sent_to_the_caller(to_a: overlay.Client) -> None:
    with pytest.raises(library.HandlerFailed) as caught:
        to_a.call("x", handler="boom")

    assert "error id" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"payload": {"a": 1}}, TypeError, "a payload must be bytes or str, not dict"),
        ({"payload": "x", "handler": print}, TypeError, "code cannot be sent"),
        ({"payload": "x", "team": None}, TypeError, "team must be a str, not NoneType"),
        ({"payload": "x", "mode": "some"}, ValueError, "mode 'some' is not 'all' or 'any'"),
        ({"payload": "x", "timeout": 0}, ValueError, "timeout must be above 0"),
        ({"payload": "x", "timeout": float("nan")}, ValueError, "timeout must be .* not nan"),
    ],
)
def test_an_invalid_call_is_rejected_before_anything_is_sent(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    payload = arguments.pop("payload")
    with overlay.connect("127.0.0.1:1") as client, pytest.raises(error, match=message):
        client.call(payload, **arguments)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":5", "host:0", "host:65536", "host:x", "::1:50051"]
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        overlay.connect(address)


def test_a_missing_server_is_reported_soon_and_as_not_run() -> None:
    address = f"localhost:{free_port()}"
    began = time.monotonic()

    with overlay.connect(address) as client, pytest.raises(library.NotReached) as caught:
        client.call("x", timeout=60)

    assert time.monotonic() - began < 30
    assert str(caught.value) == f"nothing serves at {address}: the connection was refused"
    assert caught.value.executed is Executed.NO


def test_a_server_that_does_not_speak_grpc_has_its_own_message(silent_port: int) -> None:
    with (
        overlay.connect(f"127.0.0.1:{silent_port}", patience_s=1) as stranger,
        pytest.raises(library.NotReached, match="does not speak gRPC, or is stuck"),
    ):
        stranger.call("x")


def test_a_short_deadline_is_kept_without_a_connection(silent_port: int) -> None:
    began = time.monotonic()

    with overlay.connect(f"127.0.0.1:{silent_port}", patience_s=60) as stranger:
        with pytest.raises(library.NotReached):
            stranger.call("x", timeout=0.3)
        took_s = time.monotonic() - began

    assert took_s < 30


def test_a_call_waits_for_a_process_that_is_being_restarted(fragile: Overlay) -> None:
    with overlay.connect(fragile.address("C"), patience_s=20) as client:
        client.call("before")
        fragile.kill("C")
        # A request sent before the client notices may have run, and is not sent again.
        with pytest.raises(library.CallFailed):
            client.call("at once", timeout=0.5)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.call, "after", timeout=20)
            fragile.start("C")

            assert waiting.result(20).result == b"C: after"


def test_a_lost_process_is_noticed_by_the_next_call(fragile: Overlay) -> None:
    with overlay.connect(fragile.address("D"), patience_s=0.5) as client:
        client.call("before")
        fragile.kill("D")
        with pytest.raises(library.CallFailed):
            client.call("at once", timeout=1)
        began = time.monotonic()

        with pytest.raises(library.NotReached):
            client.call("after")

        assert time.monotonic() - began < 20


def test_a_connection_lost_during_a_call_leaves_the_outcome_unknown(fragile: Overlay) -> None:
    with overlay.connect(fragile.address("F")) as client, ThreadPoolExecutor(1) as pool:
        running_call = pool.submit(client.call, "20", handler="slow")
        until(lambda: fragile.metrics("F").active_requests, what="F is at work")
        fragile.kill("F")

        with pytest.raises(library.Unavailable, match="no answer from") as caught:
            running_call.result(10)

    assert caught.value.executed is Executed.UNKNOWN


@pytest.mark.skipif(os.name == "nt", reason="there, terminate() is a kill")
def test_a_stopping_process_rejects_requests_with_its_own_reason(fragile: Overlay) -> None:
    with overlay.connect(fragile.address("G")) as client, ThreadPoolExecutor(1) as pool:
        last = pool.submit(client.call, "2", handler="slow")
        until(lambda: fragile.metrics("G").active_requests, what="G is at work")
        fragile.processes["G"].terminate()
        until(lambda: not client.is_serving(), what="G stops")
        # A returned call would wait for G to be back; a new one is rejected at once.
        until(lambda: not client._connection._submitter.connected.is_set())

        with pytest.raises(library.Unavailable) as caught:
            client.call("x")

        assert "is stopping and takes no new requests" in str(caught.value)
        assert caught.value.executed is Executed.NO
        assert last.result(10).result == b"slept"


@pytest.mark.skipif(os.name == "nt", reason="there is no signal to freeze a process")
def test_a_frozen_process_is_reported_as_stuck(fragile: Overlay) -> None:
    fragile.freeze("B")
    try:
        with (
            overlay.connect(fragile.address("B"), patience_s=1) as client,
            pytest.raises(library.NotReached, match="or is stuck"),
        ):
            client.call("x")
    finally:
        fragile.thaw("B")


def test_a_payload_that_is_too_large_is_rejected_by_the_process_asked(to_a: overlay.Client) -> None:
    with pytest.raises(library.CallFailed, match=r"max_message_mib allows \(16,777,216") as caught:
        to_a.call(b"x" * (17 * 1024 * 1024))

    assert type(caught.value) is library.InvalidCall


def test_many_threads_share_one_client(to_a: overlay.Client) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(to_a.call, [f"{n}" for n in range(100)]))

    wanted = [f"C: {n}\nD: {n}\nF: {n}".encode() for n in range(100)]
    assert [answer.result for answer in answers] == wanted


def test_closing_a_client_ends_its_calls_and_rejects_new_ones(mine: Overlay) -> None:
    client = overlay.connect(mine.address("C"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.call, "20", handler="slow")
        until(lambda: mine.metrics("C").active_requests, what="C is at work")
        client.close()
        client.close()

        with pytest.raises(library.CallCancelled):
            waiting.result(5)
    with pytest.raises(library.CallCancelled, match="this client is closed"):
        client.call("x")


def test_metrics_and_health_are_those_of_the_process_asked(to_a: overlay.Client) -> None:
    assert to_a.metrics().process_id == "A"
    assert to_a.is_serving()


def test_an_http_proxy_is_not_used(mine: Overlay) -> None:
    done = run_client(
        *at(mine, "A"), http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"
    )

    assert done.returncode == 0, done.stderr


# Traces and logs of a request


def trace_of(found: Overlay, *words: str) -> list[dict[str, Any]]:
    return json.loads(run_client(*at(found, "A"), "--trace", "--json", *words).stdout)["trace"]


@pytest.mark.parametrize(("encoding", "bars"), [("utf-8", "├└│"), ("cp1252", "+`|")])
def test_a_trace_shows_the_path_as_a_tree_on_every_code_page(
    mine: Overlay, encoding: str, bars: str
) -> None:
    shown = run_client(*at(mine, "A"), "--trace", PYTHONIOENCODING=encoding).stdout

    lines = shown[shown.index("trace\n") :].splitlines()
    names = [line.split(" OK ")[0].rstrip(" |") for line in lines if " OK " in line]
    first, last, on = bars
    tree = ["A", f"{first}- B", f"{on}  {last}- C", f"{last}- E", f"   {first}- D", f"   {last}- F"]
    assert names == [line.replace("-", "─" if encoding == "utf-8" else "-") for line in tree]


def test_the_times_of_a_trace_add_up(mine: Overlay) -> None:
    trace = trace_of(mine, "--handler", "slow", "--payload", "0.3", "--mode", "any")

    asked, team_leader, worker = trace
    assert [hop["depth"] for hop in trace] == [0, 1, 2]
    assert worker["worked_ms"] >= 290
    for above, hop in [(asked, team_leader), (team_leader, worker)]:
        inside = hop["waited_ms"] + hop["worked_ms"]
        assert inside + hop["on_the_way_ms"] <= above["worked_ms"] + 1


def test_a_failed_request_has_a_trace(mine: Overlay) -> None:
    done = run_client(
        *at(mine, "A"), "--trace", "--handler", "boom", "--mode", "any", "--team", "green"
    )

    assert done.returncode == 1
    assert "handler 'boom' failed" in done.stderr
    assert [word for word in done.stdout.split() if word in "ABC"] == ["A", "B", "C"]
    assert done.stdout.count("INTERNAL") == 3


def test_a_missing_worker_is_in_the_trace(wounded: Overlay) -> None:
    trace = trace_of(wounded)

    assert [(hop["process_id"], hop["code"]) for hop in trace[3:]] == [
        ("E", "OK"),
        ("D", "OK"),
        ("F", "UNAVAILABLE"),
    ]


def logs(found: Overlay, asked: str, *words: object, code: int = 0) -> list[dict[str, Any]]:
    done = run_client(*at(found, asked), "logs", *words, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)["lines"]


def test_the_log_of_any_process_can_be_read_at_the_leader(mine: Overlay) -> None:
    for process_id in "ABCDEF":
        lines = logs(mine, "A", process_id)
        assert {line["process_id"] for line in lines} == {process_id}
        assert any("serves on" in line["text"] for line in lines)


def test_log_lines_are_shown_as_in_the_log_file(mine: Overlay) -> None:
    (line,) = [
        line
        for line in run_client(*at(mine, "A"), "logs", "F").stdout.splitlines()
        if "pid" in line
    ]

    assert line in mine.log("F").splitlines()


def test_log_lines_of_a_request_are_found_in_every_process(mine: Overlay) -> None:
    answer = json.loads(run_client(*at(mine, "A"), "--trace", "--json").stdout)

    lines = logs(mine, "A", "--request", answer["request_id"])

    assert sorted(line["process_id"] for line in lines) == list("ABCDEF")
    assert all(answer["request_id"] in line["text"] for line in lines)


def test_a_failure_is_in_the_log_of_each_process_on_its_path(mine: Overlay) -> None:
    failed = run_client(
        *at(mine, "A"), "--trace", "--handler", "boom", "--mode", "any", "--team", "green"
    )
    request_id = failed.stdout.split("request")[1].split()[0]

    lines = logs(mine, "A", "--request", request_id)

    assert [line["process_id"] for line in lines] == ["C", "C", "B", "A"]
    assert "the secret reason" in lines[0]["text"]  # read on the worker's own machine
    assert not any("the secret reason" in line["text"] for line in lines[1:])


@pytest.mark.parametrize("words", [["--mode", "any"], ["--as-completed"], []])
def test_a_failure_names_its_request_and_the_command_for_its_log_lines(
    mine: Overlay, words: list[str]
) -> None:
    done = run_client(*at(mine, "A"), "--handler", "boom", *words, "--json")

    error = json.loads(done.stdout)["error"]
    assert (
        error["logs"]
        == f"client.py 127.0.0.1 {mine.port('A')} logs --request " + (error["request_id"])
    )
    assert f"; request {error['request_id']}, its log lines: {error['logs']}" in done.stderr
    shown = run_client(*error["logs"].split()[1:])
    assert shown.returncode == 0
    (error_id,) = set(re.findall("error id ([0-9a-f]{8})", error["message"])[:1])
    assert re.search(f"{error['request_id']}: error id {error_id}: .*Traceback", shown.stdout)


def test_an_exception_has_the_id_of_its_request(mine: Overlay) -> None:
    async def ask() -> None:
        async with overlay.connect_async(mine.address("A")) as leader:
            await leader.call("x", handler="boom")

    with overlay.connect(mine.address("A")) as leader:
        ways: list[Callable[[], object]] = [
            lambda: leader.call("x", handler="boom"),
            lambda: leader.forward("x", handler="boom"),
            lambda: leader.submit("boom", "x").result(),
            lambda: list(leader.map("boom", ["x"])),
            lambda: list(leader.parts("x", handler="boom")),
            lambda: asyncio.run(ask()),
        ]
        found = []
        for way in ways:
            with pytest.raises(overlay.CallFailed) as failed:
                way()
            found.append(failed.value.request_id)

        assert len(set(found)) == len(ways)
        for request_id in found:
            lines = list(leader.logs("C", request_id=request_id).lines)
            lines += leader.logs("D", request_id=request_id).lines
            lines += leader.logs("F", request_id=request_id).lines
            assert any("handler boom failed" in line.text for line in lines)


def test_the_trailing_metadata_of_a_failure_has_the_request_id(mine: Overlay) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        mine.ask("A", handler="boom")

    request_id = dict(failed.value.trailing_metadata())["overlay-request"]
    assert logs(mine, "A", "--request", request_id)


def test_an_error_id_finds_its_log_lines_with_a_readable_traceback(mine: Overlay) -> None:
    report = run_client(*at(mine, "A"), "--handler", "boom", "--mode", "any").stderr
    (error_id,) = re.findall("error id ([0-9a-f]{8})", report)

    shown = run_client(*at(mine, "A"), "logs", "--error", error_id)
    lines = logs(mine, "A", "--error", error_id)

    assert shown.returncode == 0
    assert 'raise ValueError("the secret reason")\nValueError: the secret reason\n' in re.sub(
        r"\n +", "\n", shown.stdout
    )
    assert all(error_id in line["text"] for line in lines)
    (traceback,) = [line["text"] for line in lines if "\n" in line["text"]]
    assert "Traceback (most recent call last):\n  File " in traceback
    assert traceback.endswith("\nValueError: the secret reason")


def test_an_unknown_error_id_is_reported(mine: Overlay) -> None:
    done = run_client(*at(mine, "A"), "logs", "--error", "0123abcd")

    assert done.returncode == 1
    assert "none of the last lines of A, B, C, D, E, F has the error id 0123abcd" in done.stderr
    assert run_client(*at(mine, "A"), "logs", "--error", "xyz").returncode == 2


def test_events_never_contain_the_text_of_a_handlers_exception(mine: Overlay) -> None:
    run_client(*at(mine, "A"), "--handler", "boom")
    metrics = {i: mine.stub(i).GetMetrics(pb2.MetricsRequest(events=200)) for i in "AC"}

    of_a, of_c = ({event.kind for event in metrics[i].events} for i in "AC")
    assert of_a >= {"started", "link"}
    assert "failure" in of_c - of_a, "only the worker reports it"
    assert not any("secret" in str(found) for found in metrics.values())


def test_metrics_contain_as_many_requests_and_events_as_were_asked_for(mine: Overlay) -> None:
    run_client(*at(mine, "A"))
    ask = mine.stub("A").GetMetrics

    plain, some = ask(pb2.MetricsRequest()), ask(pb2.MetricsRequest(events=1, requests=1))

    assert (len(plain.events), len(plain.requests)) == (0, 0)
    assert (len(some.events), len(some.requests)) == (1, 1)
    assert [hop.process_id for hop in some.requests[0].hops] == list("ABCEDF")
    assert some.service.count == sum(some.service.counts) > 0


def test_the_log_of_a_process_above_must_be_read_there(mine: Overlay) -> None:
    done = run_client(*at(mine, "E"), "logs", "A")

    assert done.returncode == 1
    assert f"ask A itself, at 127.0.0.1 {mine.port('A')}" in done.stderr


def test_the_log_of_a_missing_process_cannot_be_read(wounded: Overlay) -> None:
    done = run_client(*at(wounded, "A"), "logs", "F")

    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "client.py: E: F cannot be reached: E has no live link to F\n"


@pytest.mark.parametrize("text", ["zz", "0", "1" * 17, "-1", ""])
def test_an_invalid_request_id_is_rejected(text: str) -> None:
    done = run_client("127.0.0.1", "50051", "logs", "--request", text)

    assert done.returncode == 2
    assert "--request" in done.stderr


# A request from the command line


def test_an_answer_is_readable(mine: Overlay) -> None:
    done = run_client(*at(mine, "A"))

    lines = done.stdout.splitlines()
    assert lines[:3] == ["result   C: hello", "         D: hello", "         F: hello"]
    assert lines[3:5] == ["answers  3 of 3 workers answered", "path     A B C E D F"]
    assert lines[5].startswith("time")
    assert (done.returncode, done.stderr) == (0, "")


def test_json_output_contains_everything(mine: Overlay) -> None:
    done = run_client(*at(mine, "A"), "--json", "--parts", "--payload", "Grüße", "--team", "green")

    report = json.loads(done.stdout)
    assert set(report) == {
        "ok", "exit_code", "address", "result", "coverage", "missing", "parts", "hops",
        "request_id", "took_ms",
    }  # fmt: skip
    assert report["result"] == "C: Grüße"
    assert report["coverage"] == {"answered": 1, "asked": 1}
    assert set(report["parts"][0]) == {
        "process_id", "code", "reason", "executed", "hops", "waited_ms", "worked_ms", "result",
    }  # fmt: skip
    assert report["parts"][0]["result"] == "C: Grüße"
    assert done.stdout.isascii()


def test_parts_shows_each_workers_own_result(mine: Overlay) -> None:
    done = run_client(*at(mine, "A"), "--parts")

    rows = [line.split() for line in done.stdout.splitlines() if " OK " in line]
    assert [(row[0], row[-2:]) for row in rows] == [(w, [f"{w}:", "hello"]) for w in "CDF"]


def test_a_payload_can_be_read_from_a_file_or_standard_input(mine: Overlay, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(b"from a file")

    from_file = run_client(*at(mine, "C"), "--payload", f"@{tmp_path / 'payload'}")
    from_stdin = run_client(*at(mine, "C"), "--payload", "-", stdin=b"from a pipe")

    assert "C: from a file" in from_file.stdout
    assert "C: from a pipe" in from_stdin.stdout


def test_a_binary_result_is_shown_as_its_size_and_saved_by_out(
    mine: Overlay, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    words = (*at(mine, "C"), "--handler", "binary")

    shown = run_client(*words)
    as_json = run_client(*words, "--json")
    run_client(*words, "--out", kept)

    assert "256 bytes, not text; --out FILE keeps them" in shown.stdout
    assert json.loads(as_json.stdout)["result_base64"].startswith("AAECAwQF")
    assert kept.read_bytes() == bytes(range(256))


def test_out_to_standard_output_writes_only_the_result(mine: Overlay) -> None:
    done = run_client(*at(mine, "A"), "--out", "-")

    assert done.stdout == "C: hello\nD: hello\nF: hello"
    assert "3 of 3 workers answered" in done.stderr


def test_control_characters_of_a_result_do_not_reach_the_terminal(mine: Overlay) -> None:
    done = run_client(*at(mine, "C"), "--payload", "a\x1b[2Jb")

    assert "C: a\\x1b[2Jb" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--handler", "boom"], 1, "error id"),
        (["--handler", "nope"], 1, "no handler 'nope' here; there are"),
        (["--team", "blue"], 1, "no team 'blue'"),
        (["--handler", "slow", "--payload", "9", "--deadline", "0.3"], 5, "a handler may have"),
    ],
)
def test_a_failed_request_has_an_exit_code_and_a_message(
    mine: Overlay, words: list[str], code: int, message: str
) -> None:
    done = run_client(*at(mine, "A"), *words, "--json")

    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["exit_code"] == code
    assert json.loads(done.stdout)["ok"] is False


def test_a_full_queue_rejects_a_request_as_not_run_with_exit_code_3(
    overlays: Callable[..., Overlay],
) -> None:
    found = overlays(HANDLERS, handlers=NAMES, queue_slots=1, in_service=1)
    with overlay.connect(found.address("A")) as client, ThreadPoolExecutor(2) as pool:
        for wanted in ((1, 0), (1, 1)):
            pool.submit(client.forward, "6", handler="slow", timeout=20)
            until(lambda w=wanted: _load(client) == w, what=f"in service, waiting = {wanted}")

        with pytest.raises(library.Refused) as caught:
            client.forward("x", handler="slow")
        done = run_client(*at(found, "A"))
        tried = subprocess.run(
            [sys.executable, str(ROOT / "test_system.py"), *map(str, at(found, "A"))],
            capture_output=True,
            text=True,
        )
        client.close()  # cancels the slow requests

    assert caught.value.executed is Executed.NO
    assert caught.value.retry_after_s is not None
    assert done.returncode == 3
    assert "no handler saw the request, try again in" in done.stderr
    assert tried.returncode == 1
    assert "A is overloaded: wait and try again" in tried.stdout


def _load(client: overlay.Client) -> tuple[int, int]:
    found = client.metrics()
    return found.active_requests, found.queue_size


def test_a_missing_worker_is_named_with_exit_code_6(wounded: Overlay) -> None:
    done = run_client(*at(wounded, "A"))
    as_json = run_client(*at(wounded, "A"), "--json")

    assert "answers  2 of 3 workers answered" in done.stdout
    assert "missing  F: " in done.stdout
    assert (done.returncode, as_json.returncode) == (6, 6)
    assert json.loads(as_json.stdout)["missing"] == ["F"]


def test_a_missing_server_is_exit_code_4(wounded: Overlay) -> None:
    asked = (
        ("127.0.0.1", free_port()),
        (*at(wounded, "F"), "check"),
        ("no-such-host.invalid", 50051),
    )
    with ThreadPoolExecutor(3) as pool:
        nothing, dead, unknown = pool.map(lambda words: run_client(*words), asked)

    assert [done.returncode for done in (nothing, dead, unknown)] == [4, 4, 4]
    assert "nothing serves at" in nothing.stderr
    assert f"nothing serves at {wounded.address('F')}" in dead.stderr
    assert "no-such-host.invalid: this machine knows no such name" in unknown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: HOST, PORT"),
        (["127.0.0.1"], "PORT is missing after '127.0.0.1'"),
        (["127.0.0.1:50051"], "write HOST and PORT as two words: client.py 127.0.0.1 50051"),
        (["overlay.json"], "client.py check overlay.json"),
        (["127.0.0.1", "many"], "'many' is not a port, a number from 1 to 65535"),
        (["127.0.0.1", "0"], "'0' is not a port"),
        (["127.0.0.1", "65536"], "'65536' is not a port"),
        (["127.0.0.1", "-1"], "'-1' is not a port"),
        (["http://127.0.0.1", "1"], "'http://127.0.0.1' is not a name or an address"),
        *(
            ([host, "50051", *words], f"'{host}' is not an address; one with colons is written as")
            for host in (
                "[::1",
                "::1]",
                "[]",
                "[127.0.0.1]",
                "a:b",
                ":",
                "[[::1]]",
                "1:2:3",
                "x[1]",
            )
            for words in (["--trace"],)
        ),
        *(
            (["[::1", "50051", verb], "'[::1' is not an address; one with colons is written as")
            for verb in ("map", "check", "logs", "top", "web", "drain")
        ),
        (["127.0.0.1", "9" * 5000], "is not a port"),
        (["127.0.0.1", "1", "chek"], "no verb 'chek'; the nearest is 'check'"),
        (["127.0.0.1", "1", "fly"], "no verb 'fly'; there are ask, map, submit"),
        (["chek", "overlay.json"], "no verb 'chek'; the nearest is 'check'"),
        (["127.0.0.1", "1", "--payload", "@no-such-file"], "cannot read 'no-such-file'"),
        (["127.0.0.1", "1", "--deadline", "0"], "'0' is not a number of seconds above 0"),
        (["127.0.0.1", "1", "--deadline", "nan"], "'nan' is not a number of seconds"),
        (["127.0.0.1", "1", "--mode", "some"], "invalid choice: 'some'"),
        (["127.0.0.1", "1", "--out", "no-such-folder/x"], "is not a file in a folder that exists"),
        (["127.0.0.1", "1", "--team", "\udcff"], "is not a name"),
        (["127.0.0.1", "1", "--handler", "x" * 2000], "is not a name of at most 64 letters"),
        (["127.0.0.1", "1", "--jsn"], "unrecognized arguments: --jsn"),
        (["check"], "required: CONFIG"),
        (["check", "no-such.json"], "no-such.json"),
    ],
)
def test_invalid_arguments_get_a_one_line_message(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["client.py", *words])

    with pytest.raises(SystemExit) as end:
        sys.exit(script.main())

    report = capsys.readouterr()
    assert end.value.code == 2
    assert message in report.err
    assert len(report.err.splitlines()) == 1
    assert report.out == ""


@pytest.mark.parametrize(
    "verb",
    [["127.0.0.1", "1", name] for name in script.OF_A_PROCESS]
    + [[name] for name in script.OF_A_CONFIGURATION],
)
def test_an_invalid_option_names_a_help_command_that_works(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["client.py", *verb, "--no-such"])
    with pytest.raises(SystemExit):
        sys.exit(script.main())
    hint = capsys.readouterr().err.rpartition("; ")[2]
    assert hint.endswith(" --help tells more\n")
    monkeypatch.setattr(sys, "argv", hint.removesuffix(" tells more\n").split())
    with pytest.raises(SystemExit) as end:
        sys.exit(script.main())

    shown = capsys.readouterr().out
    words = ["client.py", "HOST", "PORT", verb[2]] if len(verb) > 1 else ["client.py", *verb]
    assert end.value.code == 0
    assert shown.startswith(f"usage: {' '.join(words)} ")
    assert "--no-such" not in shown


def test_the_help_names_every_verb_and_every_exit_code() -> None:
    done = run_client("--help")

    for name in script.OF_A_PROCESS.keys() - {"ask"}:
        assert f"client.py HOST PORT {name}" in done.stdout
    for name in script.OF_A_CONFIGURATION:
        assert f"client.py {name} CONFIG" in done.stdout
    for code in Exit:
        assert f"\n  {int(code):<4} " in done.stdout


@pytest.mark.parametrize("verb", [[], ["--json"], ["--out", "-"], ["check"]])
def test_a_closed_output_pipe_does_not_change_the_exit_code(
    mine: Overlay, wounded: Overlay, verb: list[str]
) -> None:
    for found, code in ((mine, 0), (wounded, 1 if verb == ["check"] else 6)):
        words = [sys.executable, str(ROOT / "client.py"), *map(str, at(found, "A")), *verb]
        left = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        left.stdout.close()

        complaint = left.stderr.read()
        left.stderr.close()
        assert left.wait(20) == code, complaint
        assert b"Traceback" not in complaint
        assert b"BrokenPipe" not in complaint


@pytest.mark.skipif(os.name == "nt", reason="there, Ctrl-C reaches the whole console")
def test_ctrl_c_exits_with_a_message_and_code_130(mine: Overlay) -> None:
    words = [*map(str, at(mine, "C")), "--handler", "slow", "--payload", "20"]
    asking = subprocess.Popen(
        [sys.executable, str(ROOT / "client.py"), *words], stderr=subprocess.PIPE, text=True
    )
    until(lambda: mine.metrics("C").active_requests, what="C is at work")
    asking.send_signal(signal.SIGINT)

    _, complaint = asking.communicate(timeout=5)
    assert (asking.returncode, complaint) == (130, "client.py: interrupted\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_works_on_every_code_page(mine: Overlay, encoding: str) -> None:
    asked = run_client(*at(mine, "C"), "--payload", "Grüße 中文", PYTHONIOENCODING=encoding)
    checked = run_client("check", mine.path, PYTHONIOENCODING=encoding)

    assert "\\u4e2d\\u6587" in asked.stdout
    assert [asked.returncode, checked.returncode] == [0, 0]
    assert "6 of 6 processes well" in checked.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_narrow_terminal_shows_all_facts(mine: Overlay, term: str) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    words = [sys.executable, str(ROOT / "client.py"), "check", str(mine.path)]
    checking = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env={**env, "TERM": term}
    )
    os.close(theirs)

    text = _read_all(ours)
    assert checking.wait(20) == 0
    assert all(mine.address(process_id) in text for process_id in "ABCDEF")
    assert "…" not in text


def _read_all(terminal: int) -> str:
    """Reads a pseudo-terminal until its last writer closes it."""
    text = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux reports the end
            chunk = b""
        if not chunk:
            os.close(terminal)
            return text.decode()
        text += chunk


# check


@pytest.mark.parametrize(
    ("process_id", "role", "neighbours", "workers"),
    [("A", "leader", "BE", 3), ("B", "team_leader", "CD", 2), ("C", "worker", "", 1)],
)
def test_check_works_for_every_role(
    mine: Overlay, process_id: str, role: str, neighbours: str, workers: int
) -> None:
    done = run_client(*at(mine, process_id), "check")
    report = json.loads(run_client(*at(mine, process_id), "check", "--json").stdout)

    assert done.returncode == 0
    assert f"{process_id}, {role} of team green, at {mine.address(process_id)}" in done.stdout
    assert f"{workers} of {workers} known to be ready" in done.stdout
    assert " of 100 in service" in done.stdout
    assert [n["process_id"] for n in report["neighbours"]] == list(neighbours)
    assert [p["id"] for p in report["topology"]] == list("ABCDEF")
    assert isinstance(report["received"], int)


def test_check_names_the_neighbour_that_is_down_and_the_missing_worker(wounded: Overlay) -> None:
    of_e, of_a = run_client(*at(wounded, "E"), "check"), run_client(*at(wounded, "A"), "check")

    assert (of_e.returncode, of_a.returncode) == (1, 1)
    (row,) = [line for line in of_e.stdout.splitlines() if f"{wounded.address('F')}  down" in line]
    assert not row.rstrip().endswith("yes"), "the last column is the reason"
    assert "missing   F" in of_a.stdout


def test_check_of_a_configuration_shows_every_process(mine: Overlay) -> None:
    done = run_client("check", mine.path)
    report = json.loads(run_client("check", mine.path, "--json").stdout)

    rows = [line.split() for line in done.stdout.splitlines() if "127.0.0.1:" in line]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        (process_id, mine.address(process_id), "serves") for process_id in "ABCDEF"
    ]
    assert {row[-1] for row in rows} == {"yes"}
    assert rows[0][5] == "0/200"
    assert done.returncode == 0
    assert [p["metrics"]["process_id"] for p in report["processes"]] == list("ABCDEF")


def test_check_of_a_configuration_reports_what_doctor_reports(wounded: Overlay) -> None:
    done = run_client("check", wounded.path, "--deadline", 2)
    report = json.loads(run_client("check", wounded.path, "--deadline", 2, "--json").stdout)

    assert done.returncode == report["exit_code"] == 1
    assert "5 of 6 processes well, 5 of 6 links up" in done.stdout
    assert "F: nothing listens there: it was not started, or has ended. Start it" in done.stdout
    assert f"scripts/run.py start {wounded.path}; its log in logs says more" in done.stdout
    assert "E to F: down for " in done.stdout
    assert [p["state"] for p in report["processes"]] == ["serves"] * 5 + ["not running"]
    assert [link["state"] for link in report["links"]].count("down") == 1


def test_check_detects_another_configuration_and_another_process(
    mine: Overlay, tmp_path: Path
) -> None:
    config = json.loads(mine.path.read_text())
    processes = config["processes"]
    processes["C"]["port"], processes["D"]["port"] = mine.port("D"), mine.port("C")
    config["handlers"] = {}
    (tmp_path / "swapped.json").write_text(json.dumps(config))

    done = run_client("check", tmp_path / "swapped.json")

    assert done.returncode == 1
    assert "A, B, E, F: it was started with another configuration file" in done.stdout
    assert f"C: process D answers at {mine.address('D')}" in done.stdout


def test_check_of_an_overlay_that_is_not_started_is_exit_code_4(tmp_path: Path) -> None:
    path = tmp_path / "overlay.json"
    path.write_text(json.dumps(six_processes()))

    done = run_client("check", path, "--deadline", 1)

    assert done.returncode == 4
    assert "0 of 6 processes well" in done.stdout


def test_check_names_every_problem_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "overlay.json"
    config = six_processes()
    config["processes"]["A"]["port"] = 0
    config["processes"]["B"]["role"] = "boss"
    path.write_text(json.dumps(config))

    done = run_client("check", path)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2


def test_every_verb_has_one_table_row_and_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    hello: Any = ModuleType("overlay.cli.hello")
    hello.arguments = lambda parser: None
    hello.run = lambda args: seen.append(args.host) or 0
    monkeypatch.setitem(sys.modules, "overlay.cli.hello", hello)
    monkeypatch.setitem(script.OF_A_PROCESS, "hello", "Says hello")
    monkeypatch.setattr(sys, "argv", ["client.py", "somewhere", "5", "hello"])

    assert script.main() == 0
    assert "client.py HOST PORT hello" in script.overview()
    assert seen == ["somewhere"]


def test_an_installed_program_uses_the_name_it_was_called_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/overlay", "127.0.0.1", str(free_port()), "check"])
    assert script.main() == 4
    assert capsys.readouterr().err.startswith("overlay: nothing serves at 127.0.0.1:")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/overlay", "--help"])
    assert script.main() == 0
    shown = capsys.readouterr().out
    assert "usage: overlay " in shown
    assert "overlay HOST PORT check " in shown
    assert "client.py" not in shown


def test_a_missing_package_gets_a_message_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no', name='rich')\n")
    for program in ("client.py", "test_system.py"):
        done = subprocess.run(
            [sys.executable, str(ROOT / program), "127.0.0.1", "1"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )

        assert done.returncode == 2
        assert done.stderr.startswith(f"{program}: the package 'rich' is not installed for this")


def test_no_thread_outlives_a_client(mine: Overlay) -> None:
    before = set(threading.enumerate())
    with overlay.connect(mine.address("C")) as client:
        client.call("x")

    until(lambda: not set(threading.enumerate()) - before, 5, "its threads end")
