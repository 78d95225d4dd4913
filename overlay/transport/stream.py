"""A ForwardStream call to a process that is restarted whenever it ends.

    kick  --> "there is something to send" --> fill(frame) --> gRPC --> the process
    receive(frame) <------------------------------------------ gRPC <--
    lost(why) when the call has ended; requests that were sent and not answered may have run, unless
              why.executed is NO: then the process has read none of them

If the process violates the protocol, the call ends at once with DATA_LOSS. The next call starts a
second later, the one after that two seconds later, and so on, until `end_pause`.

One frame is in flight at a time: requests that arrive meanwhile share the next one, and those that
may wait for more do so until `send_now`. `fill` runs on the thread that kicks, or, when the frame
before has left, on gRPC's thread of the channel; `receive` on the latter; `live` and `lost` on the
stream's own, "pipe-NAME", from `start` to `end`.

A client's stream may rest: if the process ends it while idle, to make room for another, it restarts
with the next `kick`. The streams of a link always restart at once.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence

import grpc

from overlay.model import clocks as time
from overlay.model.errors import BadRequest, BadResponse
from overlay.model.limits import Limits
from overlay.model.segments import Code, Detail, Executed, Part
from overlay.transport import codec
from overlay.transport.channels import Channel
from overlay.transport.codec import pb2
from overlay.transport.duplex import DuplexCall
from overlay.transport.interrupts import Uninterrupted

log = logging.getLogger(__name__)

FORWARD_STREAM = "/OverlayNode/ForwardStream"
RETRY_S = 0.1  # between two calls, besides gRPC's own backoff
FULL_S = 0.25  # if the process is full and does not say how long to wait
LONGEST_FULL_S = 5.0  # so that a free place is not left unused for longer
REFUSAL_S = 0.02  # to wait for the status of a call whose metadata is empty
FILLED_S = 5.0  # a frame is filled within this time
ROUND_S = 0.005  # between two looks at what is held back, while something often is
IDLE_ROUNDS = 20  # so many without anything, and the stream's thread sleeps


class ReconnectingStream:
    """Sends and receives the frames of one stream. Thread-safe."""

    def __init__(
        self,
        channel: Channel,
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
        patience_s: how long what is to be sent may wait for more; infinity: until `send_now`. Must
        be quick. may_rest: it is a client's stream; if the process refuses it, it waits as long as
        the process asks.
        """
        self.rests = False  # until the next kick; set before `lost` is called
        self._may_rest = may_rest
        self._channel = channel
        self._fill = fill
        self._receive = receive
        self._lost = lost
        self._live = live
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._sending = threading.Lock()  # held from filling a frame until gRPC has taken it
        self._kicked = False
        self._sends_now = False
        self._kicks = 0  # so many, to see whether there was another one
        self._held_until: float | None = None  # when what waits for more is sent all the same
        self._is_timing = False  # the stream's thread looks at that time by itself
        self._ended = False
        self._call: DuplexCall | None = None
        self._live_call: DuplexCall | None = None  # the same, while it can be sent on
        self._metadata = tuple(metadata)
        self._bad_calls = 0  # in a row
        self._thread = threading.Thread(target=self._run, name=f"pipe-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        """Sends what there is to send, on this thread, or soon after the frame in flight."""
        self._kicks += 1
        self._kicked = True
        if self.rests:
            with self._changed:
                self._changed.notify_all()
        self._send_on()

    def send_now(self) -> None:
        """Sends what is waiting for more."""
        if self._kicked:
            self._sends_now = True
            self._send_on()

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
            with Uninterrupted():
                call.cancel()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2)

    def _run(self) -> None:
        while not self._ended:
            began = time.monotonic()
            why = self._one_call()
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
        try:
            error = self._serve_call()
        except ValueError as e:  # the channel is closed
            return Part("", Code.UNAVAILABLE, str(e), executed=Executed.UNKNOWN)
        except Exception as e:  # noqa: BLE001 - it is logged below
            error = e
        if error is None:
            return Part("", Code.DATA_LOSS, _ENDED)
        if isinstance(error, grpc.RpcError):
            self.rests = self._may_rest and codec.was_idle(error)
            return _as_violation(codec.read_error(error))
        if isinstance(error, BadResponse):
            return Part("", error.code, f"it violates the protocol: {error}")
        log.error("a stream failed and is restarted", exc_info=error)
        return Part("", Code.UNAVAILABLE, repr(error), executed=Executed.UNKNOWN)

    def _serve_call(self) -> Exception | None:
        """Makes one call, and returns its error when it is over."""
        channel = self._channel.now()
        callbacks = self._on_message, self._on_sent, self._on_over
        call = DuplexCall(channel, FORWARD_STREAM, self._metadata, *callbacks)
        try:
            with self._changed:
                self._call = call
                if self._ended:
                    call.cancel()
            metadata = call.wait_accepted()
            # A refused call has metadata too, a moment before its status. If it were taken as
            # accepted, requests would be sent on it again and again.
            if not call.is_over and (metadata or not call.wait_over(REFUSAL_S)):
                self._live(metadata)
                self._live_call = call
                call.begin_reading()
                self._send_on()
            self._wait_over(call)
        finally:
            call.cancel()
            call.wait_over()
            # Whoever fills a frame for the call finishes it first, unless a signal ended him.
            if self._sending.acquire(timeout=FILLED_S):
                self._live_call = None
                self._sending.release()
            else:
                self._live_call, self._sending = None, threading.Lock()
            self._channel.doubt()
        return call.error()

    def _wait_over(self, call: DuplexCall) -> None:
        """Waits for the end of the call. Meanwhile sends what has been held back long enough."""
        idle_rounds = 0
        while not call.is_over:
            until, now = self._held_until, time.monotonic()
            if until is not None and until <= now:
                self._send_on()
                continue
            with self._changed:
                # Being woken costs more than looking again a few times.
                idle_rounds = idle_rounds + 1 if until is None else 0
                self._is_timing = idle_rounds < IDLE_ROUNDS
                if call.is_over or self._held_until is not until:
                    continue
                wait_s = ROUND_S if until is None else until - now
                self._changed.wait(wait_s if self._is_timing else None)

    def _on_message(self, message: bytes) -> None:
        try:
            frame = codec.read_frame(message)
        except BadRequest as e:
            raise BadResponse(str(e)) from None
        self._receive(frame)

    def _on_sent(self) -> None:
        self._sending.release()
        self._kicked = True  # for what arrived meanwhile
        self._send_on()

    def _on_over(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send_on(self) -> None:
        """Sends the next frame, unless one is in flight, or what there is may wait for more."""
        if self._kicked and self._live_call is not None and not self._sending.locked():
            with Uninterrupted():
                self._send_frames()

    def _send_frames(self) -> None:
        while self._kicked and self._live_call is not None and self._sending.acquire(False):
            is_sent, kicks, call = False, self._kicks, self._live_call
            try:
                is_held = self._holds_back()
                if call is not None and not (is_held or call.is_ending):
                    self._kicked = self._sends_now = False
                    self._held_until = None
                    frame = pb2.Frame()
                    if self._fill(frame):
                        is_sent = call.send(frame.SerializeToString())
            except BaseException as e:
                # Part of it may be noted as sent; so all that is open on the call ends. The handler
                # of another signal than Ctrl-C may raise here too, if the main thread sends.
                if call is not None:
                    call.cancel()
                if not isinstance(e, Exception):
                    raise
                log.exception("a frame could not be made; its stream is restarted")
                return
            finally:
                if not is_sent:
                    self._sending.release()
            if is_sent or (is_held and kicks == self._kicks) or call is None or call.is_ending:
                return

    def _holds_back(self) -> bool:
        """Whether what there is waits for more to send together."""
        patience_s = 0.0 if self._sends_now else self._patience_s()
        if not patience_s:
            return False
        if patience_s == math.inf:
            return True
        if self._held_until is not None:
            return time.monotonic() < self._held_until
        self._held_until = time.monotonic() + patience_s
        if not self._is_timing:
            with self._changed:
                self._changed.notify_all()
        return True


def is_full(why: Part | Detail) -> bool:
    """Whether a stream was refused because the process has no room for another."""
    return why.code is Code.RESOURCE_EXHAUSTED and why.executed is Executed.NO


def _as_violation(why: Part) -> Part:
    """Reports a message that is not protobuf or too large as a violation of the protocol."""
    if why.code is Code.INTERNAL or "larger than max" in why.reason:
        return Part("", Code.DATA_LOSS, f"it violates the protocol: {why.reason}")
    return why


_ENDED = "it violates the protocol: the stream was ended by the other side"
# Statuses of a call that ended for a violation by either side: the next one may be no better.
_VIOLATIONS = (Code.DATA_LOSS, Code.INVALID_ARGUMENT, Code.UNKNOWN)
