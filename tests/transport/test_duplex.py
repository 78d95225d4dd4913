"""A stream's call is sent on and read without threads of its own, and ends exactly once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from overlay.transport.duplex import DuplexCall
from tests.harness.cluster import NotReached, free_port, until

METHOD = "/Test/Talk"


class Talk:
    """A server of one method, and a channel to it. serve: (messages, context) -> messages."""

    def __init__(self, serve: Callable[..., Iterator[bytes]]) -> None:
        self.port = free_port()
        self.pool = ThreadPoolExecutor(8)
        self.server = grpc.server(self.pool)
        method = grpc.stream_stream_rpc_method_handler(serve)
        found = grpc.method_handlers_generic_handler("Test", {"Talk": method})
        self.server.add_generic_rpc_handlers([found])
        assert self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.read: list[bytes] = []
        self.threads: set[str] = set()
        self.sent = 0
        self.ends = 0

    def call(self, on_message: Callable[[bytes], None] | None = None) -> DuplexCall:
        return DuplexCall(
            self.channel,
            METHOD,
            (("who", "test"),),
            on_message or self.on_message,
            self.on_sent,
            self.on_over,
        )

    def on_message(self, message: bytes) -> None:
        self.read.append(message)

    def on_sent(self) -> None:
        self.sent += 1

    def on_over(self) -> None:
        self.ends += 1

    def send(self, call: DuplexCall, message: bytes) -> None:
        before = self.sent
        assert call.send(message)
        until(lambda: self.sent > before, 10, "gRPC takes the message")

    def close(self) -> None:
        self.channel.close()
        self.server.stop(0)
        self.pool.shutdown(wait=False)


@pytest.fixture
def talks() -> Iterator[Callable[..., Talk]]:
    made: list[Talk] = []

    def make(serve: Callable[..., Iterator[bytes]]) -> Talk:
        made.append(Talk(serve))
        return made[-1]

    yield make
    for talk in made:
        talk.close()


def echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    who = dict(context.invocation_metadata())["who"]
    context.send_initial_metadata((("what", "echo"), ("who", who)))
    for message in messages:
        yield message
        if message == b"end":
            return


def begun(talk: Talk, on_message: Callable[[bytes], None] | None = None) -> DuplexCall:
    call = talk.call(on_message)
    call.wait_accepted()
    call.begin_reading()
    return call


def test_messages_go_both_ways_in_order_until_the_server_ends_the_call(talks):
    talk = talks(echo)
    call = begun(talk)
    sent = [b"%d" % number for number in range(100)] + [b"", b"x" * 1_000_000, b"end"]
    for message in sent:
        talk.send(call, message)

    assert call.wait_over(10)
    assert talk.read == sent
    assert call.error() is None
    assert (talk.ends, talk.sent) == (1, len(sent))


def test_the_server_sees_the_metadata_and_the_caller_its_answer(talks):
    found = talks(echo).call().wait_accepted()
    assert (found["what"], found["who"]) == ("echo", "test")


def test_messages_sent_before_the_end_are_read_and_the_status_is_the_error(talks):
    def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.set_trailing_metadata((("overlay-executed", "no"),))
        yield from (b"1", b"2", b"3")
        context.abort(grpc.StatusCode.UNAVAILABLE, "it is stopping")

    talk = talks(refuse)
    call = begun(talk)

    assert call.wait_over(10)
    error = call.error()
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "it is stopping"
    assert ("overlay-executed", "no") in error.trailing_metadata()


def test_a_refused_call_is_over_without_being_accepted(talks):
    def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        yield b""

    call = talks(refuse).call()
    call.wait_accepted()

    assert call.wait_over(10)
    assert call.error().code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_call_to_a_server_that_is_not_there_yet_waits_for_it(talks):
    talk = talks(echo)
    talk.server.stop(0).wait(10)
    call = talk.call()
    assert not call.wait_over(0.3)

    call.cancel()
    assert call.wait_over(10)
    assert call.error().code() is grpc.StatusCode.CANCELLED


def test_what_the_reader_raises_ends_the_call_and_is_its_error(talks):
    def raises(message: bytes) -> None:
        raise ValueError("not what was asked")

    talk = talks(echo)
    call = begun(talk, raises)
    talk.send(call, b"x")

    assert call.wait_over(10)
    assert str(call.error()) == "not what was asked"
    assert talk.ends == 1
    until(lambda: call.send(b"y") is False, 10, "nothing is sent any more")
    assert begun(talk).send(b"z"), "the channel goes on"


def test_nothing_is_sent_on_a_call_that_is_over(talks):
    talk = talks(echo)
    call = begun(talk)
    talk.send(call, b"end")
    assert call.wait_over(10)

    assert not call.send(b"late")
    assert talk.sent == 1


def test_closing_the_channel_ends_its_calls(talks):
    talk = talks(echo)
    call = begun(talk)

    talk.channel.close()

    assert call.wait_over(10)
    assert call.error().code() is grpc.StatusCode.CANCELLED
    with pytest.raises(ValueError, match="Channel closed"):
        talk.call()


def test_a_call_that_ends_reports_the_message_that_never_left(talks):
    go = threading.Event()

    def never_reads(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("what", "stuck"),))
        go.wait(30)
        yield b""

    talk = talks(never_reads)
    call = begun(talk)
    asked = 0
    while talk.sent == asked:  # until flow control holds one back
        assert call.send(b"x" * 4_000_000)
        asked += 1
        with contextlib.suppress(NotReached):
            until(lambda asked=asked: talk.sent == asked, 0.5)

    talk.server.stop(0)
    go.set()

    assert call.wait_over(10)
    assert talk.sent == asked


def test_reading_stops_while_a_message_is_handled(talks):
    go, entered = threading.Event(), threading.Event()

    def slow(message: bytes) -> None:
        entered.set()
        go.wait(10)

    talk = talks(echo)
    call = begun(talk, slow)
    talk.send(call, b"1")
    assert entered.wait(10)
    assert not call.wait_over(0.1)
    go.set()
    talk.send(call, b"end")
    assert call.wait_over(10)
