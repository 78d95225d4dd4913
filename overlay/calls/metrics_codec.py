"""Converts this process's metrics into the messages of GetMetrics.

Fields with the same name are copied, so a new metric takes one field in the value that holds it and
one in overlay.proto.
"""

from __future__ import annotations

from typing import Any, TypeVar

from overlay.model.signatures import Function
from overlay.observability.counters import BOUNDS_S, Histogram, Spread
from overlay.observability.log_buffer import Line
from overlay.observability.map_progress import RunningMap
from overlay.observability.request_summaries import RequestSummary
from overlay.peers.peers import PeerState
from overlay.transport import codec
from overlay.transport.codec import pb2
from overlay.workers.job import HandlerCounts

M = TypeVar("M")


def copied(kind: type[M], value: object, **others: Any) -> M:
    """A message of this kind with the fields it shares with `value`, and `others`."""
    fields: Any = kind.DESCRIPTOR.fields_by_name  # type: ignore[attr-defined]
    same = {name: getattr(value, name) for name in fields if hasattr(value, name)}
    return kind(**{**same, **others})


def fill(response: pb2.MetricsResponse, value: object, **others: Any) -> None:
    """Sets the fields that the response shares with `value`, and `others`."""
    response.MergeFrom(copied(pb2.MetricsResponse, value, **others))


def write_neighbour(state: PeerState, now: float) -> pb2.Neighbour:
    others = {"since_s": now - state.since, "rtt_ms": state.rtt_s * 1e3}
    return copied(pb2.Neighbour, state, slots=state.total_slots, **others)


def write_handler(counts: HandlerCounts) -> pb2.HandlerMetrics:
    return copied(pb2.HandlerMetrics, counts, worked_ms=write_spread(counts.worked))


def write_function(function: Function) -> pb2.Function:
    return copied(pb2.Function, function)


def write_event(line: Line) -> pb2.Event:
    return copied(pb2.Event, line, first_at_s=line.first_s)


def write_map(running: RunningMap, now: float) -> pb2.RunningMap:
    return pb2.RunningMap(
        progress=codec.write_progress(running.progress),
        caller=str(running.caller),
        told_s=max(0.0, now - running.reported_s),
    )


def write_summary(summary: RequestSummary) -> pb2.RequestSummary:
    trace = pb2.Slice()
    codec.write_trace(trace, summary.hops)
    return copied(
        pb2.RequestSummary,
        summary,
        reason=summary.reason[: codec.LONGEST_REASON],
        hops=trace.trace,
        total_us=max(0, min(summary.total_us, 0xFFFFFFFF)),
    )


def write_histogram(found: Histogram) -> pb2.Histogram:
    return copied(pb2.Histogram, found, bounds_s=BOUNDS_S)


def write_spread(spread: Spread) -> pb2.Spread:
    ms = {"p50": spread.p50 * 1e3, "p99": spread.p99 * 1e3, "mean": spread.mean * 1e3}
    return pb2.Spread(**ms, count=spread.count)
