"""Two ways to send requests: a unary Forward each, or segments on one ForwardStream.

Both give an Outcome, so that one test covers both.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import grpc

from overlay.model.segments import Code, Detail
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay

PATIENCE_S = 5.0  # how long after its deadline an answer is waited for


class Outcome:
    """How one request ended."""

    def __init__(self, call: Call) -> None:
        try:
            self.response = call.result()
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as e:
            self.response = None
            self.code = e.code()
            self.details = e.details()
        self.trailers = dict(call.trailing_metadata() or ())
        again_s = codec.retry_after_s(self.trailers.items())
        self.retry_after_s = getattr(call, "retry_after_s", again_s)

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def executed(self) -> str:
        """Of a failure: "no", "yes" or "unknown"."""
        return self.trailers.get(codec.EXECUTED_KEY, "")

    @property
    def refused(self) -> bool:
        return self.executed == "no"


class Call(Protocol):
    """One request in flight. gRPC's futures satisfy it."""

    def result(self) -> Any: ...
    def cancel(self) -> Any: ...
    def done(self) -> bool: ...
    def trailing_metadata(self) -> Any: ...


class Way:
    def at_once(
        self, overlay: Overlay, count: int, to: str = "A", timeout: float | None = 30, **fields: Any
    ) -> list[Call]:
        """Sends `count` equal requests without waiting for answers."""
        request = pb2.Request(**fields)
        return [self._send(overlay, to, request, timeout) for _ in range(count)]

    def ask(self, overlay: Overlay, to: str, payload: bytes = b"hi", **fields: Any) -> Any:
        """One pb2.Response. Raises grpc.RpcError."""
        timeout = fields.pop("timeout", 10)
        (call,) = self.at_once(overlay, 1, to, timeout, payload=payload, **fields)
        return call.result()

    def close(self) -> None: ...

    def _send(self, overlay: Overlay, to: str, request: Any, timeout: float | None) -> Call:
        raise NotImplementedError


class Unary(Way):
    def _send(self, overlay: Overlay, to: str, request: Any, timeout: float | None) -> Call:
        return overlay.stub(to).Forward.future(request, timeout=timeout)


class Streamed(Way):
    """Each request is a segment of one row, on one stream per process."""

    def __init__(self) -> None:
        self._streams: dict[tuple[int, str], _Stream] = {}

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _send(self, overlay: Overlay, to: str, request: Any, timeout: float | None) -> Call:
        key = id(overlay), to
        stream = self._streams.get(key)
        if stream is None or stream.ended:
            stream = self._streams[key] = _Stream(overlay.stub(to))
        return stream.send(request, timeout)


class _Stream:
    def __init__(self, stub: Any) -> None:
        self.ended = False
        self._frames: SimpleQueue[Any] = SimpleQueue()
        self._numbers = itertools.count(1)
        self._open: dict[int, _Row] = {}
        self._lock = threading.Lock()
        self._call = stub.ForwardStream(iter(self._frames.get, None), wait_for_ready=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, request: Any, timeout: float | None) -> _Row:
        number = next(self._numbers)
        row = self._open[number] = _Row(self, number, timeout)
        segment = pb2.Segment(
            number=number,
            count=1,
            remaining_us=int((timeout or 0) * 1e6),
            first_id=request.request_id,
            mode=request.mode,
            team=request.team,
            handler=request.handler,
            priority=request.priority,
            want_parts=request.want_parts,
            want_trace=request.want_trace,
            hops=request.hops,
            targets=request.targets,
            payloads=pb2.Column(items=[request.payload]),
        )
        self._frames.put(pb2.Frame(segments=[segment]))
        if self.ended:
            self._fail(Detail(Code.UNAVAILABLE, "the stream has ended"))
        return row

    def cancel(self, number: int) -> None:
        self._frames.put(pb2.Frame(cancels=[pb2.Cancel(number=number, start=0, count=1)]))

    def close(self) -> None:
        self._frames.put(None)
        self._call.cancel()
        self._thread.join(5)

    def _read(self) -> None:
        why = Detail(Code.UNAVAILABLE, "the stream has ended")
        try:
            for frame in self._call:
                for made in frame.slices:
                    with self._lock:
                        row = self._open.pop(made.number)  # raises for a second answer
                    row.take(made)
        except grpc.RpcError as e:
            why = Detail(Code(e.code().value[0]), e.details() or "")
        finally:
            self.ended = True
            self._fail(why)

    def _fail(self, why: Detail) -> None:
        with self._lock:
            rest, self._open = self._open, {}
        for row in rest.values():
            row.fail(why)


class StreamError(grpc.RpcError):
    def __init__(self, failure: Detail) -> None:
        super().__init__(failure.reason)
        self._failure = failure

    def code(self) -> grpc.StatusCode:
        return codec.grpc_code(self._failure.code)

    def details(self) -> str:
        return self._failure.reason


class _Row:
    def __init__(self, stream: _Stream, number: int, timeout: float | None) -> None:
        self._stream = stream
        self._number = number
        self._timeout = 60 if timeout is None else timeout
        self._future: Future[Any] = Future()
        self._trailers: dict[str, str] = {}
        self.retry_after_s: float | None = None

    def result(self) -> Any:
        return self._future.result(self._timeout + PATIENCE_S)

    def cancel(self) -> None:
        self._stream.cancel(self._number)

    def done(self) -> bool:
        return self._future.done()

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return list(self._trailers.items())

    def take(self, made: Any) -> None:
        if made.failures:
            self.fail(codec.read_failure(made.failures[0]))
            return
        answer = codec.read_client_slice(made).at(0)
        self._trailers[codec.COVERAGE_KEY] = aggregate.coverage(answer)
        response = codec.write_response(answer, 0, made.results.items[0], with_results=False)
        self._future.set_result(response)

    def fail(self, failure: Detail) -> None:
        self._trailers[codec.EXECUTED_KEY] = failure.executed.name.lower()
        self.retry_after_s = failure.retry_after_s
        self._future.set_exception(StreamError(failure))
