"""Three ways to send requests: a unary Forward each, segments on one ForwardStream, or segments on
a lane, a ForwardStream to a worker that the leader has lent.

All give an Outcome, so that one test covers them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import grpc

from overlay.calls.leases import REPORT_S
from overlay.model.leases import ENDED_UNRUN
from overlay.model.segments import Code, Detail, Executed
from overlay.routing import aggregate
from overlay.transport import codec
from overlay.transport.codec import pb2
from tests.harness.cluster import Overlay, until

PATIENCE_S = 5.0  # how long after its deadline an answer is waited for
LEADER = "A"  # who lends
LENT_S = 20.0  # within which a worker must be lent, on a machine that is busy
ASK_S = 0.3  # between two requests for a lease
ROWS = 3  # that must be lent: more than the tests have unanswered at a time
QUICK = b"0"  # the payload with which every handler of a lane's tests takes less than 20 ms


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
    is_lane = False

    def ready(self, overlay: Overlay, to: str = "A", handler: str = "") -> None:
        """Sends now what it must send before requests of this handler."""

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


class Laned(Way):
    """Each request is a segment of one row, on a lane to the worker `to`.

    It does what a client in another language would do: asks the leader for a lease of the handler
    (of the default one, if there is none of that name), and opens a stream with the lease's id. The
    worker repeats the id, which proves that the stream is a lane. A lane carries mode any, so a
    request gets that mode unless it has another than all.

    `close` checks the second proof, for each row: the leader, which has seen none of them, has
    counted those that have ended, once each. A refusal is no end, as the client would send the
    request elsewhere.

    learned: requests over the leader that have told it how short a handler is.
    """

    is_lane = True

    def __init__(self) -> None:
        self.learned = 0
        self._lanes: dict[tuple[int, str, str], Lane] = {}
        self._opened: list[Lane] = []
        self._before: dict[int, tuple[Overlay, int]] = {}  # requests on lanes, as the leader counts

    @property
    def ends(self) -> Counter[str]:
        """How rows ended, as the leader counts it: completed, failed, refused, cancelled."""
        return sum((lane.stream.ends for lane in self._opened), Counter[str]())

    def ready(self, overlay: Overlay, to: str = "A", handler: str = "") -> None:
        self._lane(overlay, to, handler)

    def close(self) -> None:
        try:
            for lane in self._opened:
                lane.stream.cancel_rest()
            self._check_counts()
        finally:
            for lane in self._opened:
                lane.close()

    def _check_counts(self) -> None:
        for overlay, before in self._before.values():
            mine = [lane.stream.ends for lane in self._opened if lane.overlay is overlay]
            wanted = sum(ends.total() for ends in mine)

            def counted(of: Overlay = overlay, before: int = before) -> int:
                return int(of.metrics(LEADER).lane_requests) - before

            def are_counted(of: Callable[[], int] = counted, wanted: int = wanted) -> bool:
                return of() >= wanted

            until(are_counted, 10, f"{LEADER} counts the {wanted} requests that were on lanes")
            time.sleep(3 * REPORT_S)  # for a report that must not come
            found = counted()
            assert found == wanted, f"{LEADER} counts {found} requests on lanes, not {wanted}"

    def _send(self, overlay: Overlay, to: str, request: Any, timeout: float | None) -> Call:
        if request.mode == pb2.ALL:
            request.mode = pb2.ANY
        return self._lane(overlay, to, request.handler).send(request, timeout)

    def _lane(self, overlay: Overlay, to: str, handler: str) -> Lane:
        lent = handler if handler in overlay.config["handlers"] else ""
        key = id(overlay), to, lent
        lane = self._lanes.get(key)
        if lane is None or lane.is_over:
            if id(overlay) not in self._before:
                self._before[id(overlay)] = overlay, overlay.metrics(LEADER).lane_requests
            lane = self._lanes[key] = Lane(overlay, to, lent)
            self._opened.append(lane)
            self.learned += lane.learned
        return lane


class Lane:
    """A lease of a worker, and the stream to it. learned: as in Laned."""

    def __init__(
        self, overlay: Overlay, worker: str, handler: str, quick: bytes | None = QUICK
    ) -> None:
        """quick: the payload of a short request; None if the leader knows how short they are."""
        self.overlay = overlay
        self.learned = 0
        self._borrower: _Stream | None = None
        processes = overlay.config["processes"]
        team = processes[worker]["team"]
        learn = pb2.Request(payload=quick, mode=pb2.ANY, handler=handler, team=team)
        others = [i for i, p in processes.items() if p["role"] == "worker" and i != worker]
        asked = pb2.LeaseRequest(handler=handler, rows=1, without=others)

        def lease() -> Any:
            with suppress(grpc.RpcError, Empty):
                if quick is not None:
                    overlay.stub(LEADER).Forward(learn, timeout=5, wait_for_ready=True)
                    self.learned += 1
                if self._borrower is None:
                    self._borrower = _Stream(overlay.stub(LEADER))
                self._borrower.ask_lease(asked)
                offered = self._borrower.leases.get(timeout=ASK_S)
                if offered.rows >= ROWS:
                    return offered
                self._borrower.close()  # so that the lease ends
                self._borrower = None
            return None

        lent = until(lease, LENT_S, f"{worker} is lent for handler '{handler}'")
        assert lent.process_id == worker
        self.stream = _Stream(overlay.stub(worker), lent.id)

    @property
    def is_over(self) -> bool:
        """Whether the worker has said that the lease has ended, or the stream has."""
        return self.stream.is_over or self.stream.ended

    def send(self, request: Any, timeout: float | None) -> Call:
        return self.stream.send(request, timeout)

    def close(self) -> None:
        self.stream.close()
        if self._borrower is not None:
            self._borrower.close()


class _Stream:
    """ends: how rows ended, as in Laned. is_over: its lease is."""

    def __init__(self, stub: Any, lease: int = 0) -> None:
        """lease: whose requests it carries, to a lent worker."""
        self.ended = self.is_over = False
        self.ends: Counter[str] = Counter()
        self.leases: SimpleQueue[Any] = SimpleQueue()  # that were offered
        self._lease = lease
        self._frames: SimpleQueue[Any] = SimpleQueue()
        self._numbers = itertools.count(1)
        self._open: dict[int, _Row] = {}
        self._lock = threading.Lock()
        metadata = codec.lease_metadata(lease) if lease else ()
        self._call = stub.ForwardStream(
            iter(self._frames.get, None), wait_for_ready=not lease, metadata=metadata
        )
        if lease:
            said = codec.read_lease_id(self._call.initial_metadata())
            assert said == lease, "the worker does not say that the stream is a lane"
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

    def ask_lease(self, request: Any) -> None:
        self._frames.put(pb2.Frame(lease_requests=[request]))

    def cancel(self, number: int) -> None:
        self._frames.put(pb2.Frame(cancels=[pb2.Cancel(number=number, start=0, count=1)]))

    def cancel_rest(self) -> None:
        """Cancels what is unanswered, and waits until it is answered."""
        for number in list(self._open):
            self.cancel(number)
        until(lambda: not self._open, PATIENCE_S, "cancelled requests are answered")

    def close(self) -> None:
        self._frames.put(None)
        self._call.cancel()
        self._thread.join(5)

    def _read(self) -> None:
        why = Detail(Code.UNAVAILABLE, "the stream has ended")
        try:
            for frame in self._call:
                for lease in frame.leases:
                    if lease.id == self._lease:
                        self.is_over = not lease.rows
                    else:
                        self.leases.put(lease)
                for made in frame.slices:
                    with self._lock:
                        row = self._open.pop(made.number)  # raises for a second answer
                        self.ends.update(_end_of(made))
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


def _end_of(made: Any) -> list[str]:
    """How the row ended; nothing if it was refused, so that its client may send it elsewhere."""
    if not made.failures:
        return ["completed"]
    failure = codec.read_failure(made.failures[0])
    if failure.code is Code.CANCELLED:
        return ["cancelled"]
    if failure.executed is not Executed.NO:
        return ["failed"]
    return ["refused"] if failure.code in ENDED_UNRUN else []


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
