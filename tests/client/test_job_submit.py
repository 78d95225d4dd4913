"""What the library says of a job that it could not submit, or change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

import overlay
from overlay.model.errors import CallFailed
from overlay.model.segments import Executed
from overlay.transport.codec import pb2, pb2_grpc

REFUSED = (("overlay-executed", "no"),)


class Leader(pb2_grpc.OverlayJobsServicer):
    """Ends each call with the next status: (code, trailing metadata)."""

    def __init__(self) -> None:
        self.ends: list[tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]] = []
        self.asked = 0

    def Submit(self, request: pb2.SubmitRequest, context: grpc.ServicerContext) -> None:
        self._end(context)

    def Change(self, request: pb2.ChangeRequest, context: grpc.ServicerContext) -> None:
        self._end(context)

    def _end(self, context: grpc.ServicerContext) -> None:
        self.asked += 1
        code, metadata = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        context.set_trailing_metadata(metadata)
        context.abort(code, "it ends")


@pytest.fixture
def leader() -> Iterator[Leader]:
    with serving() as leader:
        yield leader


@contextlib.contextmanager
def serving() -> Iterator[Leader]:
    leader, server = Leader(), grpc.server(ThreadPoolExecutor(4))
    pb2_grpc.add_OverlayJobsServicer_to_server(leader, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    leader.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield leader
    finally:
        server.stop(0).wait()


def submitted(leader: Leader, key: str) -> CallFailed:
    address = f"127.0.0.1:{leader.port}"
    with overlay.connect(address, patience_s=1) as client, pytest.raises(CallFailed) as raised:
        client.later("upper", b"x", key=key)
    return raised.value


LOST = grpc.StatusCode.UNAVAILABLE, ()
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED, REFUSED
STOPPING = grpc.StatusCode.UNAVAILABLE, REFUSED


@pytest.mark.parametrize(
    ("ends", "executed"),
    [
        ([FULL], Executed.NO),
        ([STOPPING, FULL], Executed.NO),
        # The first may have been accepted: that the second was refused proves nothing of it.
        ([LOST, FULL], Executed.UNKNOWN),
        ([LOST, STOPPING], Executed.UNKNOWN),
        ([STOPPING, LOST, STOPPING], Executed.UNKNOWN),
    ],
)
def test_a_refusal_after_an_attempt_that_was_lost_is_no_proof(
    leader: Leader, ends: list[tuple[grpc.StatusCode, tuple[()]]], executed: Executed
) -> None:
    leader.ends = list(ends)

    assert submitted(leader, key="one").executed is executed
    assert leader.asked >= len(ends)


def test_a_job_without_a_key_is_not_submitted_again_after_it_was_lost(leader: Leader) -> None:
    leader.ends = [LOST, FULL]

    assert submitted(leader, key="").executed is Executed.UNKNOWN
    assert leader.asked == 1


@pytest.mark.parametrize(("first", "asked"), [(LOST, 0), (STOPPING, 1)])
def test_a_change_that_may_have_been_made_is_not_asked_of_another_leader(
    leader: Leader, first: tuple[grpc.StatusCode, tuple[()]], asked: int
) -> None:
    """It would say that nothing was changed. With proof that nothing was, another is asked."""
    with serving() as another:
        leader.ends, another.ends = [first], [FULL]
        addresses = ",".join(f"127.0.0.1:{one.port}" for one in (leader, another))
        with overlay.connect(addresses, patience_s=1) as client, pytest.raises(CallFailed):
            client.job("0" * 16).cancel()
        assert (leader.asked, another.asked) == (1, asked)
