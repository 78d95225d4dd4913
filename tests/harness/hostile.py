"""A process that answers whatever a test wants, and random messages.

with Hostile("D", port) as d:            takes D's place in a real overlay
    d.reply = lambda segment: [Slice(...)]     its answer to each segment
    d.metrics = lambda: MetricsResponse(...)  its answer to GetMetrics
    d.turn_good()                             as if restarted, with correct answers
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from overlay.model.limits import Limits
from overlay.transport import codec, endpoints
from overlay.transport.codec import pb2, pb2_grpc

Reply = Callable[[pb2.Segment], Iterable[pb2.Slice]]

# Boundary values of counts, sizes and times
NUMBERS = (0, 1, 2, 3, 5, 64, 4096, 4097, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, 1.0, -1.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "A", "C", "D", "worker", "x" * 65, "x" * 70_000, "\n\x1b[31m", "\u202e", "127.0.0.1:1")
BYTES = (b"", b"a", bytes(1000))


def echo_of(process_id: str) -> Reply:
    """What a worker with the echo handler answers to a process or to a client."""

    def reply(segment: pb2.Segment) -> Iterable[pb2.Slice]:
        rows = [process_id.encode() + b": " + body for body in segment.payloads.items]
        part = pb2.PartSlice(process_id=process_id, hops=[process_id])
        made = pb2.Slice(number=segment.number, count=segment.count, hops=[process_id])
        (part if segment.hops else made).results.items.extend(rows)
        made.parts.append(part)
        return [made]

    return reply


class Hostile(pb2_grpc.OverlayNodeServicer):
    """Serves on the port while `with` lasts. asked: segments received; calls: streams opened."""

    def __init__(self, process_id: str, port: int = 0) -> None:
        self.process_id = process_id
        self.reply: Reply = echo_of(process_id)
        self.metrics: Callable[[], pb2.MetricsResponse] = self.good_metrics
        self.trailers: list[tuple[str, str | bytes]] = []
        self.initial: tuple[tuple[str, str], ...] = ()
        self.asked = self.calls = 0
        self.seen_by: set[str] = set()  # peers that have read this pid
        self._pids = itertools.count(1)
        self._pid = next(self._pids)
        self._pool = ThreadPoolExecutor(16)
        options = [*endpoints.server_options(Limits()), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(self._pool, options=options)
        pb2_grpc.add_OverlayNodeServicer_to_server(self, self._server)
        pb2_grpc.add_OverlayAdminServicer_to_server(_Admin(), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        assert self.port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Hostile:
        self._server.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._server.stop(0).wait(5)
        self._pool.shutdown(wait=False)

    def turn_good(self) -> None:
        """As after a restart: neighbours see a new pid and send to it immediately."""
        self._pid = next(self._pids)
        self.seen_by.clear()
        self.reply, self.metrics = echo_of(self.process_id), self.good_metrics

    def good_metrics(self) -> pb2.MetricsResponse:
        me = pb2.Process(id=self.process_id, role="worker", team="pink", address=self.address)
        me.slots["echo"] = 100
        return pb2.MetricsResponse(
            process_id=self.process_id, role="worker", is_healthy=True, pid=self._pid,
            topology=[me], wire_format=codec.FORMAT,
        )  # fmt: skip

    def GetMetrics(self, request: Any, context: grpc.ServicerContext) -> pb2.MetricsResponse:
        made = self.metrics()
        if made.pid == self._pid:
            self.seen_by.add(context.peer())
        return made

    def Forward(self, request: Any, context: grpc.ServicerContext) -> pb2.Response:
        raise NotImplementedError

    def ForwardStream(
        self, frames: Iterable[pb2.Frame], context: grpc.ServicerContext
    ) -> Iterator[pb2.Frame]:
        self.calls += 1
        context.send_initial_metadata(self.initial)
        for frame in frames:
            for segment in frame.segments:
                self.asked += 1
                yield pb2.Frame(slices=self.reply(segment))


class _Admin(pb2_grpc.OverlayAdminServicer):
    """Answers Logs with thousands of lines, of another process."""

    def Logs(self, request: Any, context: grpc.ServicerContext) -> pb2.LogsResponse:
        lines = [pb2.LogLine(text="\x1b[31m" * 100, at_s=float("nan"))] * 5000
        return pb2.LogsResponse(process_id="Z", lines=lines)


def any_message(rng: random.Random, kind: Any, fill: float = 0.6, depth: int = 0) -> Any:
    """A random message of the class, mostly of boundary values; a list may have 300 entries."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if rng.random() > fill:
            continue
        found = getattr(made, field.name)
        if field.message_type is None:
            if hasattr(found, "extend"):
                found.extend(_value(rng, field) for _ in range(_length(rng, depth)))
            else:
                setattr(made, field.name, _value(rng, field))
        elif hasattr(found, "items") and not hasattr(found, "DESCRIPTOR"):  # a map
            key, value = (field.message_type.fields_by_name[n] for n in ("key", "value"))
            for _ in range(_length(rng, depth)):
                found[_value(rng, key)] = _value(rng, value)
        elif hasattr(found, "add"):
            inner = field.message_type._concrete_class
            for _ in range(_length(rng, depth)):
                found.append(any_message(rng, inner, fill, depth + 1))
        elif depth < 4:
            found.CopyFrom(any_message(rng, type(found), fill, depth + 1))
    return made


def _length(rng: random.Random, depth: int) -> int:
    return rng.choice((0, 1, 1, 2, 3, 5) if depth else (0, 1, 1, 2, 3, 5, 300))


def _value(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice(FLOATS if kind == field.CPPTYPE_DOUBLE else FLOATS[:3] + FLOATS[5:])
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 99, -1, 2**31 - 1, -(2**31)))
    if kind == field.CPPTYPE_STRING:
        return rng.choice(BYTES if field.type == field.TYPE_BYTES else TEXTS)
    bits = {field.CPPTYPE_INT32: 31, field.CPPTYPE_INT64: 63, field.CPPTYPE_UINT32: 32}
    number = rng.choice(NUMBERS) % 2 ** bits.get(kind, 64)
    is_signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return -number if is_signed and rng.random() < 0.3 else number
