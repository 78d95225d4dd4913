"""One ForwardStream call to a process, made again whenever it ends: frames out, frames in.

    kick  --> "there is something to send" --> fill(frame) --> gRPC --> the process
    receive(frame) <------------------------------------------ gRPC <--
    lost(why) when the call has ended; what was handed over and not answered may have run, unless
              why.executed is NO: then the process has read nothing that it did not answer

One frame is in flight at a time: what comes meanwhile leaves together in the next, and what may
wait for company does, until `hurry`. `fill` runs on gRPC's sending thread, `receive` and `lost` on
the pipe's own thread, "pipe-NAME", from `start` to `end`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import grpc

from overlay import wire
from overlay.values import Code, Executed, Part
from overlay.wire import pb2, pb2_grpc

log = logging.getLogger("overlay.links")

RETRY_S = 0.1  # between two attempts; gRPC's own backoff comes on top


class Pipe:
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
    ) -> None:
        """fill: puts what is to be sent into the frame; False when there is nothing.

        live: the other side has accepted the call, with this metadata. patience_s: how long what is
        to be sent may wait for more, at most; must be quick.
        """
        self._stub = pb2_grpc.OverlayNodeStub(channel)
        self._fill = fill
        self._receive = receive
        self._lost = lost
        self._live = live
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._filling = threading.Lock()  # a call's loss waits for what its sender takes just now
        self._kicked = False
        self._hurried = False
        self._ended = False
        self._call: grpc.Call | None = None
        self._attempt = 0
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
        """What waits for more leaves now."""
        if self._kicked:
            with self._changed:
                self._hurried = True
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
            why = self._one_call()
            with self._filling, self._changed:
                self._attempt += 1  # ends the sender of the call that is over
                self._changed.notify_all()
            self._lost(why)
            with self._changed:
                if not self._ended:
                    self._changed.wait(RETRY_S)

    def _one_call(self) -> Part:
        """One call, from its start to its end, and why it ended."""
        try:
            call = self._stub.ForwardStream(self._frames(self._attempt), wait_for_ready=True)
            with self._changed:
                self._call = call
                if self._ended:
                    call.cancel()
            metadata = dict(call.initial_metadata())  # waits until the other side has accepted
            if call.is_active():  # a refused call has metadata too
                self._live(metadata)
            for frame in call:
                self._receive(frame)
        except grpc.RpcError as e:
            return wire.read_error(e)
        except ValueError as e:  # the channel is closed, or a slice made no sense
            return Part("", Code.UNAVAILABLE, str(e), executed=Executed.UNKNOWN)
        except Exception as e:
            log.exception("a pipe broke and starts again")
            return Part("", Code.UNAVAILABLE, repr(e), executed=Executed.UNKNOWN)
        return Part("", Code.UNAVAILABLE, "the stream was ended by the other side")

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
