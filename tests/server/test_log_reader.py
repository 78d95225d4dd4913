"""Which log lines a caller gets, and which way a query goes."""

from __future__ import annotations

import logging

import pytest

from overlay.model.errors import LoopDetected, OverlayError, UnknownName, Unreachable
from overlay.observability.log_buffer import WITHHELD, LogBuffer
from overlay.server.log_reader import MAX_BYTES, LogReader
from overlay.transport.codec import pb2
from tests.harness.network import the_six


class Links:
    """Records what is passed on, and to which neighbour."""

    def __init__(self, *up: str) -> None:
        self.passed: list[tuple[str, pb2.LogsRequest]] = []
        self._up = frozenset(up)

    def up(self) -> frozenset[str]:
        return self._up

    def logs(self, neighbour: str, request: pb2.LogsRequest, timeout_s: float) -> pb2.LogsResponse:
        self.passed.append((neighbour, request))
        return pb2.LogsResponse(process_id=request.process_id)


def log_reader(me: str, links: Links, *texts: str) -> LogReader:
    buffer = LogBuffer()
    for text in texts:
        name = "overlay.handler" if text.startswith("secret") else "overlay.links"
        buffer.handle(logging.makeLogRecord({"name": name, "msg": text, "levelno": 20}))
    return LogReader(the_six(), me, buffer, links)  # type: ignore[arg-type]


def texts(read: pb2.LogsResponse) -> list[str]:
    return [line.text for line in read.lines]


@pytest.mark.parametrize(
    ("me", "target", "up", "neighbour"),
    [("A", "E", "BE", "E"), ("A", "F", "BE", "E"), ("B", "D", "CD", "D"), ("A", "D", "B", "B")],
)
def test_a_query_goes_down_towards_its_process(me, target, up, neighbour):
    links = Links(*up)

    log_reader(me, links).read(pb2.LogsRequest(process_id=target, lines=7), True, 1)

    ((found, request),) = links.passed
    assert found == neighbour
    assert (request.process_id, request.lines, list(request.hops)) == (target, 7, [me])


@pytest.mark.parametrize(
    ("me", "query", "error"),
    [
        ("A", pb2.LogsRequest(process_id="Z"), UnknownName),
        ("E", pb2.LogsRequest(process_id="A"), UnknownName),
        ("C", pb2.LogsRequest(process_id="D"), UnknownName),
        ("A", pb2.LogsRequest(process_id="F"), Unreachable),
        ("A", pb2.LogsRequest(process_id="C", hops=["A"]), LoopDetected),
        ("A", pb2.LogsRequest(process_id="C", hops=["x" * 100]), OverlayError),
    ],
)
def test_a_query_that_leads_nowhere_is_an_error(me, query, error):
    with pytest.raises(error):
        log_reader(me, Links("B")).read(query, True, 1)


def test_what_a_handler_wrote_is_shown_on_its_own_machine_only():
    own = log_reader("C", Links(), "a link", "secret")

    assert texts(own.read(pb2.LogsRequest(), True, 1)) == ["a link", "secret"]
    assert texts(own.read(pb2.LogsRequest(), False, 1)) == ["a link", WITHHELD]
    assert texts(own.read(pb2.LogsRequest(public_only=True), True, 1)) == ["a link", WITHHELD]


@pytest.mark.parametrize(("is_local", "public_only"), [(True, False), (False, True)])
def test_a_remote_caller_gets_no_more_through_a_process_in_between(is_local, public_only):
    links = Links("C")

    log_reader("B", links).read(pb2.LogsRequest(process_id="C"), is_local, 1)

    assert links.passed[0][1].public_only is public_only


def test_the_last_lines_are_returned_as_many_as_asked_for_and_as_fit():
    own = log_reader("C", Links(), *[f"line {n}" for n in range(300)])
    assert texts(own.read(pb2.LogsRequest(lines=2), True, 1)) == ["line 298", "line 299"]
    assert len(own.read(pb2.LogsRequest(), True, 1).lines) == 100

    own = log_reader("C", Links(), *["x" * 4000 for _ in range(1000)])
    found = own.read(pb2.LogsRequest(lines=1000), True, 1)
    assert MAX_BYTES <= found.ByteSize() < MAX_BYTES + 5000
