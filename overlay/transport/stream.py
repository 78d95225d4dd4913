"""One ForwardStream call to a process, begun again whenever it ends: frames out, frames in.

    kick  --> "there is something to send" --> fill(frame) --> gRPC --> the process
    receive(frame) <------------------------------------------ gRPC <--
    lost(why) when the call has ended; requests that were handed over and not answered may have run,
              unless why.executed is NO: then the process read none of them

A call on which the process sends nonsense ends at once, with the reason DATA_LOSS. The next call
begins a second later, the one after that two seconds later, and so on, until `again` says that the
process may be another one.

One frame is in flight at a time: what comes meanwhile leaves together in the next frame, and what
may wait for more does so until `hurry`. `fill` runs on gRPC's sending thread, `receive` and `lost`
on the stream's own thread, "pipe-NAME", from `start` to `end`.

A client's stream may rest: when the process ends it because nothing was open, to give its place to
another, it comes back with the next `kick`. The streams of a link always come back.
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
RETRY_S = 0.1  # between two calls; gRPC's own backoff is added
REFUSED_S = 0.25  # where all places are taken and the process does not say how long to wait
LONGEST_REFUSED_S = 5.0  # so that a place which becomes free is not left unused for longer
VERDICT_S = 0.02  # for the status of a call whose metadata is empty


class ReconnectingStream:
    """Sends and receives frames of one stream. Its verbs are safe from any thread."""

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
        """fill: puts what is to be sent into the frame; False when there is nothing.

        receive: raises BadResponse for a frame that makes no sense, which ends the call. live: the
        other side has accepted the call, with this metadata. metadata: sent with the call.
        patience_s: how long what is to be sent may wait for more, at most; must be quick. may_rest:
        it is a client's, which also waits as long as a process asks that refuses the stream.
        """
        self.rests = False  # until the next kick; set before `lost` is called
        self._may_rest = may_rest
        # As in the generated stub, but each frame's size in memory is checked before it is parsed.
        self._forward = channel.stream_stream(
            FORWARD_STREAM, pb2.Frame.SerializeToString, codec.read_frame
        )
        self._fill = fill
        self._receive = receive
        self._lost = lost
        self._live = live
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._filling = threading.Lock()  # a call's loss waits while its sender fills a frame
        self._kicked = False
        self._hurried = False
        self._ended = False
        self._call: grpc.Call | None = None
        self._attempt = 0
        self._metadata = tuple(metadata)
        self._wrong_calls = 0  # in a row
        self._thread = threading.Thread(target=self._run, name=f"pipe-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        if self._kicked:  # the sender has not looked yet, and will see this too
            return
        with self._changed:
            self._kicked = True
            self._changed.notify_all()

    def hurry(self) -> None:
        """Sends now what waits for more."""
        if self._kicked:
            with self._changed:
                self._hurried = True
                self._changed.notify_all()

    def again(self) -> None:
        """Ends a pause after nonsense: the process may be another one now."""
        with self._changed:
            self._wrong_calls = 0
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
                self._attempt += 1  # ends the sender of the call that is over
                self._changed.notify_all()
            self._lost(why)
            self._pause(why, began)

    def _pause(self, why: Part, began: float) -> None:
        """Waits until the next call is due."""
        is_wrong, most_s = why.code in _WRONG, Limits.most_wrong_s
        with self._changed:
            if not is_wrong or time.monotonic() - began > most_s:
                self._wrong_calls = 0
            while self.rests and not self._kicked and not self._ended:
                self._changed.wait()
            if self.rests or self._ended:
                self.rests = False
            elif is_wrong:  # no kick shortens it
                pause_s = min(Limits.wrong_s * 2.0**self._wrong_calls, most_s)
                self._wrong_calls = calls = min(self._wrong_calls + 1, 10)
                self._changed.wait_for(lambda: self._ended or self._wrong_calls != calls, pause_s)
            elif self._may_rest and is_full(why):
                pause_s = min(why.retry_after_s or REFUSED_S, LONGEST_REFUSED_S)
                # No kick shortens it: a request given meanwhile is not refused any sooner.
                self._changed.wait_for(lambda: self._ended, pause_s)
            else:
                self._changed.wait(RETRY_S)

    def _one_call(self) -> Part:
        """Makes one call; why it ended."""
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
            return _plain(codec.read_error(e))
        except BadResponse as e:
            return Part("", e.code, f"it speaks wrongly: {e}")
        except ValueError as e:  # the channel is closed
            return Part("", Code.UNAVAILABLE, str(e), executed=Executed.UNKNOWN)
        except Exception as e:
            log.exception("a stream broke and starts again")
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
                if patience_s and not self._hurried and not self._is_over(attempt):
                    self._changed.wait(patience_s)
                if self._is_over(attempt):
                    return
                self._kicked = self._hurried = False
            while (frame := self._next_frame(attempt)) is not None:
                yield frame
                if self._patience_s():  # for what came meanwhile
                    self._kicked = True
                    break

    def _is_over(self, attempt: int) -> bool:
        return self._attempt != attempt or self._ended

    def _next_frame(self, attempt: int) -> pb2.Frame | None:
        frame = pb2.Frame()
        with self._filling:
            return frame if self._attempt == attempt and self._fill(frame) else None


def is_full(why: Part | Detail) -> bool:
    """Whether a stream was refused because the process has no place for one more."""
    return why.code is Code.RESOURCE_EXHAUSTED and why.executed is Executed.NO


def _is_refused(call: grpc.Call) -> bool:
    """Whether the call is over. A refused call has metadata too, a moment before its status; if it
    were taken for accepted, requests would be sent on it again and again."""
    over = threading.Event()
    return not call.add_callback(over.set) or over.wait(VERDICT_S)


def _plain(why: Part) -> Part:
    """Says of a message that is not protobuf, or larger than agreed, what BadResponse says."""
    if why.code is Code.INTERNAL or "larger than max" in why.reason:
        return Part("", Code.DATA_LOSS, f"it speaks wrongly: {why.reason}")
    return why


_ENDED = "it speaks wrongly: the stream was ended by the other side"
# How a call ends when either side found nonsense in it: the next one may be no better.
_WRONG = (Code.DATA_LOSS, Code.INVALID_ARGUMENT, Code.UNKNOWN)
