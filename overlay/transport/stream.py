"""A ForwardStream call to a process that is restarted whenever it ends.

    kick  --> "there is something to send" --> fill(frame) --> gRPC --> the process
    receive(frame) <------------------------------------------ gRPC <--
    lost(why) when the call has ended; requests that were sent and not answered may have run, unless
              why.executed is NO: then the process has read none of them

If the process violates the protocol, the call ends at once with DATA_LOSS. The next call starts a
second later, the one after that two seconds later, and so on, until `end_pause`.

One frame is in flight at a time: requests that arrive meanwhile share the next one, and those that
may wait for more do so until `send_now`. `fill` runs on gRPC's sending thread, `receive` and `lost`
on the stream's own thread, "pipe-NAME", from `start` to `end`.

A client's stream may rest: if the process ends it while idle, to make room for another, it restarts
with the next `kick`. The streams of a link always restart at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc

from overlay.model import clocks as time
from overlay.model.errors import BadResponse
from overlay.model.limits import Limits
from overlay.model.segments import Code, Detail, Executed, Part
from overlay.transport import codec
from overlay.transport.codec import pb2

log = logging.getLogger(__name__)

FORWARD_STREAM = "/OverlayNode/ForwardStream"
RETRY_S = 0.1  # between two calls, besides gRPC's own backoff
FULL_S = 0.25  # if the process is full and does not say how long to wait
LONGEST_FULL_S = 5.0  # so that a free place is not left unused for longer
REFUSAL_S = 0.02  # to wait for the status of a call whose metadata is empty


class ReconnectingStream:
    """Sends and receives the frames of one stream. Thread-safe."""

    def __init__(
        self,
        channel: grpc.Channel,
        name: str,
        fill: Callable[[pb2.Frame], bool],
        receive: Callable[[pb2.Frame], None],
        lost: Callable[[Part], None],
        live: Callable[[Mapping[str, str]], None] = lambda metadata: None,
        patience_s: Callable[[], float] = lambda: 0.0,
        metadata: Sequence[tuple[str, str]] = (),
        may_rest: bool = False,
    ) -> None:
        """fill: writes what is to be sent into the frame; returns False if there is nothing.

        receive: raises BadResponse for an invalid frame, which ends the call. live: called with the
        metadata when the other side has accepted the call. metadata: sent with the call.
        patience_s: how long what is to be sent may wait for more; must be quick. may_rest: it is a
        client's stream; if the process refuses it, it waits as long as the process asks.
        """
        self.rests = False  # until the next kick; set before `lost` is called
        self._may_rest = may_rest
        # As in the generated stub, but checks a frame's size in memory before parsing it.
        self._forward = channel.stream_stream(
            FORWARD_STREAM, pb2.Frame.SerializeToString, codec.read_frame
        )
        self._fill = fill
        self._receive = receive
        self._lost = lost
        self._live = live
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._filling = threading.Lock()  # a lost call's sender must finish its frame first
        self._kicked = False
        self._sends_now = False
        self._ended = False
        self._call: grpc.Call | None = None
        self._attempt = 0
        self._metadata = tuple(metadata)
        self._bad_calls = 0  # in a row
        self._thread = threading.Thread(target=self._run, name=f"pipe-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        if self._kicked:  # the sender has not woken up yet, and will see this too
            return
        with self._changed:
            self._kicked = True
            self._changed.notify_all()

    def send_now(self) -> None:
        """Sends what is waiting for more."""
        if self._kicked:
            with self._changed:
                self._sends_now = True
                self._changed.notify_all()

    def end_pause(self) -> None:
        """Ends the pause after a violation, as the process may be a different one now."""
        with self._changed:
            self._bad_calls = 0
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            call = self._call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2)

    def _run(self) -> None:
        while not self._ended:
            began = time.monotonic()
            why = self._one_call()
            with self._filling, self._changed:
                self._attempt += 1  # ends the sender of the lost call
                self._changed.notify_all()
            self._lost(why)
            self._pause(why, began)

    def _pause(self, why: Part, began: float) -> None:
        """Waits until the next call is due."""
        is_violation, most_s = why.code in _VIOLATIONS, Limits.most_wrong_s
        with self._changed:
            if not is_violation or time.monotonic() - began > most_s:
                self._bad_calls = 0
            while self.rests and not self._kicked and not self._ended:
                self._changed.wait()
            if self.rests or self._ended:
                self.rests = False
            elif is_violation:  # not shortened by a kick
                pause_s = min(Limits.wrong_s * 2.0**self._bad_calls, most_s)
                self._bad_calls = calls = min(self._bad_calls + 1, 10)
                self._changed.wait_for(lambda: self._ended or self._bad_calls != calls, pause_s)
            elif self._may_rest and is_full(why):
                pause_s = min(why.retry_after_s or FULL_S, LONGEST_FULL_S)
                # Not shortened by a kick: the process would only refuse again.
                self._changed.wait_for(lambda: self._ended, pause_s)
            else:
                self._changed.wait(RETRY_S)

    def _one_call(self) -> Part:
        """Makes one call. Returns why it ended."""
        call = None
        try:
            frames = self._frames(self._attempt)
            call = self._forward(frames, wait_for_ready=True, metadata=self._metadata)
            with self._changed:
                self._call = call
                if self._ended:
                    call.cancel()
            metadata = dict(call.initial_metadata())  # waits until the other side has accepted
            if metadata or not _is_refused(call):
                self._live(metadata)
            for frame in call:
                self._receive(frame)
        except grpc.RpcError as e:
            self.rests = self._may_rest and codec.was_idle(e)
            return _as_violation(codec.read_error(e))
        except BadResponse as e:
            return Part("", e.code, f"it violates the protocol: {e}")
        except ValueError as e:  # the channel is closed
            return Part("", Code.UNAVAILABLE, str(e), executed=Executed.UNKNOWN)
        except Exception as e:
            log.exception("a stream failed and is restarted")
            return Part("", Code.UNAVAILABLE, repr(e), executed=Executed.UNKNOWN)
        finally:
            if call is not None:
                call.cancel()
        return Part("", Code.DATA_LOSS, _ENDED)

    def _frames(self, attempt: int) -> Iterator[pb2.Frame]:
        while True:
            with self._changed:
                while not self._kicked and not self._is_over(attempt):
                    self._changed.wait()
                patience_s = self._patience_s()
                if patience_s and not self._sends_now and not self._is_over(attempt):
                    self._changed.wait(patience_s)
                if self._is_over(attempt):
                    return
                self._kicked = self._sends_now = False
            while (frame := self._next_frame(attempt)) is not None:
                yield frame
                if self._patience_s():  # for what arrived meanwhile
                    self._kicked = True
                    break

    def _is_over(self, attempt: int) -> bool:
        return self._attempt != attempt or self._ended

    def _next_frame(self, attempt: int) -> pb2.Frame | None:
        frame = pb2.Frame()
        with self._filling:
            return frame if self._attempt == attempt and self._fill(frame) else None


def is_full(why: Part | Detail) -> bool:
    """Whether a stream was refused because the process has no room for another."""
    return why.code is Code.RESOURCE_EXHAUSTED and why.executed is Executed.NO


def _is_refused(call: grpc.Call) -> bool:
    """Whether the call is over. A refused call has metadata too, a moment before its status. If it
    were taken as accepted, requests would be sent on it again and again."""
    over = threading.Event()
    return not call.add_callback(over.set) or over.wait(REFUSAL_S)


def _as_violation(why: Part) -> Part:
    """Reports a message that is not protobuf or too large as a violation of the protocol."""
    if why.code is Code.INTERNAL or "larger than max" in why.reason:
        return Part("", Code.DATA_LOSS, f"it violates the protocol: {why.reason}")
    return why


_ENDED = "it violates the protocol: the stream was ended by the other side"
# Statuses of a call that ended for a violation by either side: the next one may be no better.
_VIOLATIONS = (Code.DATA_LOSS, Code.INVALID_ARGUMENT, Code.UNKNOWN)
