"""A neighbour that violates the protocol: python -m faults.neighbour CONFIG ID

It takes the port of a process, claims to be that process and healthy, and answers each segment with
the next kind of invalid frame. Prints "ready" when it serves, and runs until it is killed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

import overlay
from overlay.model import config
from overlay.transport import codec, endpoints
from overlay.transport.codec import pb2

THREADS = 16
MANY = 2**32 - 1  # the field's maximum; a reader that believes it allocates gigabytes
NAMES = ("work", "echo")


def main(path: str, process_id: str) -> None:
    topology = config.load(Path(path))
    me = topology.process(process_id)
    server = grpc.server(
        ThreadPoolExecutor(THREADS), options=endpoints.server_options(topology.limits)
    )
    methods = {
        "GetMetrics": grpc.unary_unary_rpc_method_handler(
            lambda request, context: _well(topology, process_id).SerializeToString()
        ),
        "ForwardStream": grpc.stream_stream_rpc_method_handler(_wrongly(process_id)),
    }
    service = pb2.DESCRIPTOR.services_by_name["OverlayNode"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    server.add_insecure_port(me.listen_address)
    server.start()
    print("ready", flush=True)
    time.sleep(600)


def _well(topology: Any, process_id: str) -> pb2.MetricsResponse:
    """The metrics of a healthy process with free slots."""
    me = topology.process(process_id)
    found = pb2.MetricsResponse(
        process_id=me.id,
        role=me.role,
        team=me.team,
        is_healthy=True,
        version=overlay.__version__,
        config_digest=topology.digest,
        wire_format=codec.FORMAT,
    )
    for worker in topology.workers:
        if worker.id == me.id or worker.team == me.team:
            found.topology.add(id=worker.id, slots=dict.fromkeys(NAMES, 8))
    return found


Answered = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def _wrongly(me: str) -> Answered:
    kinds = itertools.cycle(WRONG)

    def answers(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata(())
        for sent in frames:
            for segment in pb2.Frame.FromString(sent).segments:
                yield next(kinds)(me, segment)

    return answers


def _of_many_rows(me: str, asked: pb2.Segment) -> bytes:
    return _frame(pb2.Slice(number=asked.number, count=MANY))


def _of_rows_after_the_last(me: str, asked: pb2.Segment) -> bytes:
    return _frame(pb2.Slice(number=asked.number, start=asked.count + 5, count=1))


def _of_fewer_results_than_rows(me: str, asked: pb2.Segment) -> bytes:
    part = pb2.PartSlice(process_id=me, results=pb2.Column(items=[]), hops=[me])
    return _frame(pb2.Slice(number=asked.number, count=asked.count, parts=[part]))


def _of_more_results_than_rows(me: str, asked: pb2.Segment) -> bytes:
    items = pb2.Column(items=[b"x"] * (asked.count + 3))
    part = pb2.PartSlice(process_id=me, results=items, hops=[me])
    return _frame(pb2.Slice(number=asked.number, count=asked.count, parts=[part]))


def _of_a_worker_that_nobody_asked(me: str, asked: pb2.Segment) -> bytes:
    part = pb2.PartSlice(process_id="X", results=pb2.Column(items=[b"x"] * asked.count))
    return _frame(pb2.Slice(number=asked.number, count=asked.count, parts=[part]))


def _of_a_status_that_is_none(me: str, asked: pb2.Segment) -> bytes:
    failure = pb2.Detail(code=77, reason="so", count=asked.count)
    part = pb2.PartSlice(process_id=me, failures=[failure])
    return _frame(pb2.Slice(number=asked.number, count=asked.count, parts=[part]))


def _of_failures_of_other_rows(me: str, asked: pb2.Segment) -> bytes:
    failure = pb2.Detail(start=asked.count + 7, count=MANY, code=14, reason="so")
    part = pb2.PartSlice(process_id=me, failures=[failure])
    return _frame(pb2.Slice(number=asked.number, count=asked.count, parts=[part]))


def _that_is_no_frame(me: str, asked: pb2.Segment) -> bytes:
    return b"\x1a\xff\xff\xff"


def _frame(*slices: pb2.Slice) -> bytes:
    return bytes(pb2.Frame(slices=slices).SerializeToString())


WRONG = (
    _of_many_rows,
    _of_rows_after_the_last,
    _of_fewer_results_than_rows,
    _of_more_results_than_rows,
    _of_a_worker_that_nobody_asked,
    _of_a_status_that_is_none,
    _of_failures_of_other_rows,
    _that_is_no_frame,
)

if __name__ == "__main__":
    main(*sys.argv[1:])
