"""Converts between the messages of overlay.proto and the values of overlay.model.

Reading validates its input; writing never fails.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from overlay.model.errors import BadRequest, ConfigError, MadeRoom, OverlayError
from overlay.model.jobs import MAX_PROGRESS_TEXT, WorkProgress
from overlay.model.leases import LaneOutcome, LaneReport, Lease, LeaseRequest, Lent, LentNow
from overlay.model.limits import Limits
from overlay.model.segments import (
    AnswerRow,
    Chunk,
    Code,
    Column,
    Detail,
    Executed,
    Hop,
    Mode,
    Part,
    PartSlice,
    Progress,
    Route,
    Segment,
    Slice,
)
from overlay.model.signatures import Function
from overlay.observability.log_buffer import LINES, Line
from overlay.transport import message_size, validation
from overlay.transport.older_poller import grpc  # the first import of gRPC by the library
from overlay.transport.validation import Asked

if TYPE_CHECKING:
    import overlay_pb2 as pb2
    import overlay_pb2_grpc as pb2_grpc
else:
    try:
        import overlay_pb2 as pb2
        import overlay_pb2_grpc as pb2_grpc
    except ModuleNotFoundError as e:
        if e.name not in {"overlay_pb2", "overlay_pb2_grpc"}:
            raise
        raise ConfigError(
            f"{e.name} is missing; run ./build_proto.sh (Windows: python -m grpc_tools.protoc "
            f"-I . --python_out=. --pyi_out=. --grpc_python_out=. overlay.proto)"
        ) from None
    except Exception as e:  # noqa: BLE001 - the generated code checks versions with errors of its own
        raise ConfigError(
            f"overlay_pb2 does not fit the installed packages ({e}); run ./build_proto.sh again"
        ) from None

__all__ = ["Asked", "pb2", "pb2_grpc"]

FORMAT = 1  # MetricsResponse.wire_format
EXECUTED_KEY = "overlay-executed"
COVERAGE_KEY = "overlay-coverage"
CALLER_KEY = "overlay-caller"
IDLE_KEY = "overlay-idle"  # the stream was idle, and need not be reopened before it is needed
REQUEST_KEY = "overlay-request"  # the id of a request that failed, in its printed form
PROCESS_KEY = "overlay-process"  # the process that opened a link, as it claims
MAX_BYTES_KEY = "overlay-max-message-bytes"
LEASE_KEY = "overlay-lease"  # the lease whose requests a stream carries, straight to its worker
_STATUS_KEY = "grpc-status-details-bin"
MAX_WITHOUT = 100  # workers that a client cannot reach
LONGEST_ERROR_ID = 32  # characters; ours have 8
MIN_LINES = 100  # of a log, if LogsRequest.lines is 0
LONGEST_REASON = 1000  # characters of a message; gRPC refuses metadata beyond 8 KiB


def read_message(
    message: bytes, parse: Callable[[bytes], Any], shape: message_size.Shape = message_size.FLAT
) -> Any:
    """Raises BadRequest if it is not protobuf, or would take far more memory than its bytes.

    shape: the message fields of the message, for the memory check.
    """
    message_size.check(message, shape)
    try:
        return parse(message)
    except Exception as e:  # noqa: BLE001 - each implementation of protobuf has its own errors
        raise BadRequest(f"a message of {len(message):,} bytes is not protobuf: {e}") from None


def read_frame(message: bytes) -> pb2.Frame:
    """As `read_message`."""
    frame: pb2.Frame = read_message(message, pb2.Frame.FromString, _FRAME)
    return frame


def read_request(
    request: pb2.Request, deadline: float, limits: Limits, traced: bool = False
) -> Segment:
    """A segment of one. Raises BadRequest naming the invalid field.

    deadline: monotonic seconds. traced: trace it even if the client did not ask for it. A request
    without an id gets one here.
    """
    size = len(request.payload)
    if size > limits.max_message_bytes:
        raise BadRequest(too_large(size, limits.max_message_bytes))
    payloads = Column((request.payload,), size=size)
    first_id = request.request_id or new_ids()
    key = request.idempotency_key
    if len(key) > limits.max_key or not key.isprintable():
        raise BadRequest(f"idempotency_key: not a text of at most {limits.max_key} letters")
    return Segment(
        read_route(request, limits),
        payloads,
        deadline,
        first_id,
        request.attempt,
        idempotent=bool(key),
        traced=traced or request.want_trace,
        log_lines=request.want_trace,
        own_ids=not request.request_id,
    )


def write_response(
    answer: AnswerRow, request_id: int, result: bytes, *, with_results: bool
) -> pb2.Response:
    """with_results: include each part's own bytes."""
    return pb2.Response(
        result=result,
        hops=answer.hops,
        parts=[_write_part(part, with_results) for part in answer.parts],
        request_id=request_id,
    )


def too_large(size: int, limit: int) -> str:
    """Why the process asked refuses the payload."""
    return f"payload: {size:,} bytes are more than max_message_mib allows ({limit:,})"


def read_response(response: pb2.Response) -> AnswerRow:
    """The answer, at a client. Raises BadResponse."""
    validation.check_response(response)
    return AnswerRow(tuple(map(_read_unary_part, response.parts)), tuple(response.hops))


def route_key(segment: pb2.Segment, limits: Limits) -> object:
    """Equal for segments with the same route, so that each route is read only once. Raises
    BadRequest for lists longer than any route's."""
    _check_count("hops", segment.hops, limits.max_hops)
    _check_count("targets", segment.targets, limits.max_targets)
    hops, targets = tuple(segment.hops), tuple(segment.targets)
    return segment.mode, segment.team, segment.handler, hops, targets


def read_segment(
    segment: pb2.Segment,
    now: float,
    limits: Limits,
    route: Route | None = None,
    traced: bool = False,
) -> Segment:
    """Raises BadRequest naming the invalid field.

    now: monotonic seconds. route: its route, if already read. traced: as in `read_request`.
    """
    count, found = segment.count, len(segment.payloads.items)
    if count != found or not 0 < count <= limits.segment_rows:
        raise BadRequest(
            f"count: {count} is not the number of payloads ({found}), or not 1 to "
            f"{limits.segment_rows}"
        )
    payloads, limit = _read_column(segment.payloads, count), limits.max_message_bytes
    # On the wire each has a few more bytes, for which the largest body must not be refused.
    if payloads.size > limit and (size := sum(map(len, segment.payloads.items))) > limit:
        raise BadRequest(too_large(size, limit))
    if not segment.ids and segment.first_id + count > 2**64:
        raise BadRequest(f"first_id: {segment.first_id} leaves no ids for {count} requests")
    if len(segment.ids) not in (0, count):
        raise BadRequest(f"ids: {len(segment.ids)} are not one for each of {count} payloads")
    ids = tuple(segment.ids) or None
    left_s = segment.remaining_us / 1e6 if segment.remaining_us else limits.default_deadline_s
    return Segment(
        route or read_route(segment, limits),
        payloads,
        now + min(left_s, limits.max_deadline_s),
        segment.first_id or new_ids(),
        segment.attempt,
        ids,
        traced=traced or segment.want_trace,
        log_lines=segment.want_line or (segment.want_trace and not segment.hops),
        chunks=min(segment.chunks, limits.chunks_ahead),
        own_ids=segment.own_ids or not (segment.first_id or ids),
    )


def unread_segment(segment: pb2.Segment, now: float, limits: Limits) -> Segment | None:
    """Stands in for an invalid segment, so that its rows can be refused; None if it has none, or
    too many."""
    if not 0 < segment.count <= limits.segment_rows:
        return None
    return Segment(Route(), Column((b"",) * segment.count), now, 0)


def write_segment(
    frame: pb2.Frame,
    number: int,
    segment: Segment,
    left_s: float,
    want_parts: bool = False,
    priority: int = 0,
    as_they_come: bool = False,
) -> None:
    """Adds the segment to the frame. left_s: seconds until its deadline, more than 0."""
    route = segment.route
    message = frame.segments.add()
    message.number = number
    message.count = segment.payloads.count
    message.remaining_us = max(1, int(left_s * 1e6))
    message.first_id = segment.first_id
    message.mode = _MODES[route.mode]
    message.team = route.team
    message.handler = route.handler
    message.hops.extend(route.hops)
    if route.targets:
        message.targets.extend(route.targets)
    if want_parts:
        message.want_parts = True
    if priority:
        message.priority = priority
    if as_they_come:
        message.as_they_come = True
        message.chunks = segment.chunks
    if segment.attempt:
        message.attempt = min(segment.attempt, 0xFFFFFFFF)
    if segment.ids:
        message.ids.extend(segment.ids)
    if segment.own_ids:
        message.own_ids = True
    if segment.traced:
        message.want_trace = True
        message.want_line = segment.log_lines
    _write_column(message.payloads, segment.payloads)


def size_beside(segment: Segment) -> int:
    """An upper bound on a segment's bytes besides its payloads, if its names are ASCII."""
    route, count = segment.route, segment.payloads.count
    size = 200 + 5 * count + 70 * len(route.hops) + (8 * count if segment.ids else 0)
    return size + sum(map(len, route.targets)) + 3 * len(route.targets) if route.targets else size


def read_slice(message: pb2.Slice, asked: Asked) -> Slice:
    """A slice between processes. Raises BadResponse if it does not fit the request."""
    parts, hops = validation.check_slice(message, asked)
    count, trace = message.count, read_trace(message.trace)
    if message.failures:
        why = read_failure(message.failures[0])
        part = Part("", why.code, why.reason, executed=why.executed)
        return Slice(count, (), hops, part, trace)
    return Slice(count, tuple([_read_part(part, count) for part in parts]), hops, None, trace)


def check_client_slice(message: pb2.Slice, asked: Asked) -> None:
    """Checks a slice for a client. Raises BadResponse if it does not fit the request."""
    validation.check_slice(message, asked, results=False)


def read_client_slice(message: pb2.Slice) -> Slice:
    """The parts for a client, with results only if it asked for them. The slice must have been
    checked."""
    count = message.count
    parts = tuple(_read_part(validation.read_part(part), count) for part in message.parts)
    return Slice(count, parts, tuple(message.hops))


def write_slice(
    frame: pb2.Frame,
    number: int,
    start: int,
    answers: Slice,
    trace: Sequence[Hop] = (),
    more: bool = False,
) -> None:
    """Adds a slice for a process: everything is in the parts, or in a single refusal.

    more: the answer follows later.
    """
    message = frame.slices.add(number=number, start=start, count=answers.count, hops=answers.hops)
    if more:
        message.more = True
    if trace:
        write_trace(message, trace)
    if answers.refused is not None:
        refused = answers.refused
        detail = Detail(refused.code, refused.reason, refused.executed)
        _write_detail(message.failures, 0, 0, detail)
    for column in answers.parts:
        _write_part_slice(message, column, with_results=True)


def write_client_slice(
    frame: pb2.Frame,
    number: int,
    start: int,
    answers: Slice,
    results: Sequence[bytes],
    failures: Iterable[tuple[int, OverlayError]],
    want_parts: bool,
    trace: Sequence[Hop] = (),
) -> None:
    """Adds a slice for a client: a result or a failure per row."""
    message = frame.slices.add(number=number, start=start, count=answers.count, hops=answers.hops)
    if trace:
        write_trace(message, trace)
    message.results.items.extend(results)
    for row, error in failures:
        detail = _write_detail(
            message.failures, row, 1, Detail(error.code, str(error), error.executed)
        )
        detail.retry_after_ms = int((error.retry_after_s or 0) * 1000)
    for column in answers.parts:
        _write_part_slice(message, column, with_results=want_parts)


def read_trace(hops: Sequence[pb2.Hop]) -> tuple[Hop, ...]:
    if not hops:
        return ()
    return tuple([_read_hop(hop) for hop in hops])


def read_metrics(message: pb2.MetricsResponse) -> pb2.MetricsResponse:
    """Validates the message: bounds its lists and numbers, and cuts and escapes its texts. Raises
    BadResponse."""
    validation.check_metrics(message)
    return message


def read_function(message: pb2.Function) -> Function:
    """Of metrics from `read_metrics`."""
    texts = message.name, message.signature, message.doc, message.arguments, message.result
    return Function(*texts, tuple(message.workers))


def read_logs(message: pb2.LogsResponse, asked: pb2.LogsRequest) -> pb2.LogsResponse:
    """Validates the message as `read_metrics` does. Raises BadResponse."""
    validation.check_logs(message, asked.process_id, min(asked.lines or MIN_LINES, LINES))
    return message


def read_max_bytes(metadata: Iterable[tuple[str, Any]] | None) -> int | None:
    """The largest body that the other side of a stream accepts; None if it does not say."""
    return validation.max_bytes(dict(metadata or ()).get(MAX_BYTES_KEY))


def max_bytes_metadata(limits: Limits) -> tuple[tuple[str, str], ...]:
    return ((MAX_BYTES_KEY, str(limits.max_message_bytes)),)


def write_trace(into: pb2.Slice | pb2.Response, trace: Iterable[Hop]) -> None:
    into.trace.extend(map(_write_hop, trace))


def write_line(line: Line, public_only: bool) -> pb2.LogLine:
    withheld = public_only and line.public is not None
    return pb2.LogLine(
        at_s=line.at_s,
        level=line.level,
        logger=line.logger,
        text=(line.public if withheld else line.text) or "",
        number=line.number,
        withheld=withheld,
        breaks=() if withheld else line.breaks,
    )


def read_progress(message: pb2.Progress, limits: Limits) -> Progress:
    """Raises BadRequest naming the invalid field."""
    if len(message.handler) > limits.max_name or not message.handler.isprintable():
        raise BadRequest(f"progress: handler is not a name of at most {limits.max_name} characters")
    if not (math.isfinite(message.took_s) and message.took_s >= 0):
        raise BadRequest(f"progress: took_s: {message.took_s} is not a number of seconds")
    total = message.total if message.answered + message.failed <= message.total else 0
    counts = message.answered, message.failed, total
    return Progress(message.number, message.handler, *counts, message.took_s, message.is_over)


def write_progress(progress: Progress) -> pb2.Progress:
    return pb2.Progress(**progress._asdict())


def read_lease_request(message: pb2.LeaseRequest, limits: Limits) -> LeaseRequest:
    """Raises BadRequest naming the invalid field."""
    _check_names("lease_requests: handler", [message.handler], limits)
    _check_names("lease_requests: team", [message.team], limits)
    _check_names("lease_requests: without", message.without, limits, limit=MAX_WITHOUT)
    return LeaseRequest(message.handler, message.team, message.rows, tuple(message.without))


def write_lease_request(request: LeaseRequest) -> pb2.LeaseRequest:
    return pb2.LeaseRequest(**request._asdict())


def read_lease(message: pb2.Lease) -> Lease:
    """At a client. Raises BadResponse."""
    validation.tidy(message)
    names = message.process_id, message.address, message.handler, message.team
    return Lease(message.id, *names, message.rows, message.slots)


def write_lease(lease: Lease) -> pb2.Lease:
    return pb2.Lease(
        id=lease.id,
        process_id=lease.worker,
        address=lease.address,
        handler=lease.handler,
        team=lease.team,
        rows=lease.rows,
        slots=lease.slots,
    )


def read_lent(message: pb2.Lent, limits: Limits) -> Lent:
    """Raises BadRequest naming the invalid field."""
    _check_names("lent: process_id", [message.process_id], limits)
    _check_names("lent: handler", [message.handler], limits)
    for_s = min(message.milliseconds / 1e3, limits.lease_s)
    names = message.process_id, message.handler
    return Lent(message.id, *names, message.rows, for_s, message.caller)


def write_lent(lent: Lent) -> pb2.Lent:
    return pb2.Lent(
        id=lent.id,
        process_id=lent.worker,
        handler=lent.handler,
        rows=lent.rows,
        milliseconds=int(lent.for_s * 1e3),
        caller=lent.caller,
    )


def read_lane_report(message: pb2.LaneReport) -> LaneReport:
    """Raises BadResponse."""
    validation.tidy(message)
    outcomes = tuple(
        LaneOutcome(
            made.count,
            read_code(made.code),
            made.reason,
            read_executed(made),
            made.waited_us / 1e6,
            made.worked_us / 1e6,
            made.request_id,
        )
        for made in message.outcomes
    )
    return LaneReport(message.id, message.is_over, message.unanswered, outcomes)


def write_lane_report(report: LaneReport) -> pb2.LaneReport:
    outcomes = (
        pb2.LaneOutcome(
            count=one.rows,
            code=one.code,
            reason=one.reason,
            executed=_EXECUTED[one.executed],
            waited_us=_as_uint32(int(one.waited_s * 1e6)),
            worked_us=_as_uint32(int(one.worked_s * 1e6)),
            request_id=one.request_id,
        )
        for one in report.outcomes
    )
    return pb2.LaneReport(
        id=report.id, is_over=report.is_over, unanswered=report.unanswered, outcomes=outcomes
    )


def write_progress_of(made: WorkProgress) -> pb2.WorkProgress:
    return pb2.WorkProgress(**made._asdict())


def read_progress_of(message: pb2.WorkProgress) -> WorkProgress:
    """Raises BadResponse."""
    validation.tidy(message)
    text = message.text[:MAX_PROGRESS_TEXT]
    return WorkProgress(message.request_id, message.done, message.total, text)


def write_lane(now: LentNow) -> pb2.Lane:
    return pb2.Lane(**now._asdict())


def lease_metadata(lease_id: int) -> tuple[tuple[str, str], ...]:
    return ((LEASE_KEY, f"{lease_id:016x}"),)


def read_lease_id(metadata: Iterable[tuple[str, Any]] | None) -> int | None:
    """None if the call is not that of a lane; 0 for what is no id."""
    found = next((value for key, value in metadata or () if key == LEASE_KEY), None)
    return None if found is None else validation.request_id(found)


def address_in(peer: str) -> str:
    """The address in gRPC's name for a caller, "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711".

    For a caller without one, as over a Unix socket, gRPC's name itself.
    """
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def new_ids() -> int:
    """The first of a run of random request ids, unique to these requests."""
    return secrets.randbits(62) + 1


def read_route(request: pb2.Request | pb2.Segment, limits: Limits) -> Route:
    """Raises BadRequest naming the invalid field."""
    _check_names("hops", request.hops, limits, limit=limits.max_hops)
    _check_names("targets", request.targets, limits, limit=limits.max_targets)
    _check_names("team", [request.team], limits)
    _check_names("handler", [request.handler], limits)
    mode = int(request.mode)
    if mode not in (Mode.ALL, Mode.ANY):
        raise BadRequest(f"mode {mode} is not 0 (all) or 1 (any)")
    targets = tuple(request.targets)
    return Route(
        mode=Mode(mode),
        team=request.team,
        handler=request.handler,
        hops=tuple(request.hops),
        # Only from processes; the process that a client asks chooses the targets itself.
        targets=(targets or None) if request.hops else None,
    )


def read_hops(hops: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """Raises BadRequest."""
    _check_names("hops", hops, limits, limit=limits.max_hops)
    return tuple(hops)


def _as_uint32(number: int) -> int:
    return max(0, min(number, 0xFFFFFFFF))


def _read_unary_part(part: pb2.Part) -> Part:
    return Part(
        process_id=part.process_id,
        code=read_code(part.code),
        reason=part.reason[:LONGEST_REASON],
        result=part.result,
        hops=tuple(part.hops),
        waited_us=part.waited_us,
        worked_us=part.worked_us,
        executed=read_executed(part),
        size=part.size,
    )


def _read_part(read: validation.ReadPart, count: int) -> PartSlice:
    """The slice must have been checked, so that its row numbers are valid."""
    part, worker, found, details, hops = read
    failures: dict[int, Detail] = {}
    for detail in details:
        failure = read_failure(detail)
        if detail.count == 0:
            return PartSlice.missing(worker, count, failure)
        rows = range(detail.start, detail.start + detail.count)
        failures.update(dict.fromkeys(rows, failure))
    results = _read_column(part.results, count) if found else Column((b"",) * count)
    chunk = Chunk(part.at, part.more) if part.more or part.at else None
    times = part.waited_us, part.worked_us
    return PartSlice(worker, results, hops, failures, None, *times, chunk)


def _write_part_slice(message: pb2.Slice, column: PartSlice, with_results: bool) -> None:
    part = message.parts.add(
        process_id=column.process_id,
        hops=column.hops,
        waited_us=_as_uint32(column.waited_us),
        worked_us=_as_uint32(column.worked_us),
    )
    if column.failed is not None:
        _write_detail(part.failures, 0, 0, column.failed)
        return
    if with_results:
        _write_column(part.results, column.results)
    if column.chunk is not None:
        part.at, part.more = column.chunk.at, column.chunk.more
    for row, failure in column.failures.items():
        _write_detail(part.failures, row, 1, failure)


def _write_detail(details: Any, start: int, count: int, failure: Detail) -> Any:
    return details.add(
        start=start,
        count=count,
        code=failure.code,
        reason=failure.reason[:LONGEST_REASON],
        executed=_EXECUTED[failure.executed],
    )


def read_failure(detail: pb2.Detail) -> Detail:
    retry_after = validation.retry_after_s(detail.retry_after_ms / 1000)
    code, executed = read_code(detail.code), read_executed(detail)
    return Detail(code, detail.reason[:LONGEST_REASON], executed, retry_after)


def read_executed(detail: pb2.Detail | pb2.Part | pb2.LaneOutcome) -> Executed:
    return Executed(detail.executed) if detail.executed in (0, 1, 2) else Executed.UNKNOWN


def _read_column(column: pb2.Column, count: int) -> Column:
    return Column(wired=column, count=count, size=column.ByteSize(), open_wired=_open_column)


def _open_column(column: Any, count: int) -> Sequence[bytes]:
    return list(column.items)


def _write_column(into: pb2.Column, column: Column) -> None:
    if column.wired is not None:
        into.CopyFrom(column.wired)  # type: ignore[arg-type]
    else:
        into.items.extend(column.items)


def _write_part(part: Part, with_result: bool) -> pb2.Part:
    return pb2.Part(
        process_id=part.process_id,
        code=part.code,
        reason=part.reason,
        result=part.result if with_result else b"",
        hops=part.hops,
        waited_us=_as_uint32(part.waited_us),
        worked_us=_as_uint32(part.worked_us),
        executed=_EXECUTED[part.executed],
        size=part.size,
    )


def _read_hop(hop: pb2.Hop) -> Hop:
    times = hop.waited_us, hop.worked_us
    return Hop(hop.process_id, *times, min(hop.depth, 64), read_code(hop.code), hop.away_us)


def _write_hop(hop: Hop) -> pb2.Hop:
    return pb2.Hop(
        process_id=hop.process_id,
        waited_us=_as_uint32(hop.waited_us),
        worked_us=_as_uint32(hop.worked_us),
        depth=hop.depth,
        code=hop.code,
        away_us=_as_uint32(hop.away_us),
    )


def read_code(number: int) -> Code:
    return Code(number) if 0 <= number <= 16 else Code.UNKNOWN


def read_format(metrics: pb2.MetricsResponse) -> int:
    return metrics.wire_format or 1


def grpc_code(code: Code) -> grpc.StatusCode:
    return _GRPC_CODES[code]


def trailers(error: OverlayError) -> list[tuple[str, str | bytes]]:
    """A failed request's trailing metadata: its id, whether anything ran, when to retry."""
    metadata: list[tuple[str, str | bytes]] = [(EXECUTED_KEY, error.executed.name.lower())]
    if error.request_id:
        metadata.append((REQUEST_KEY, f"{error.request_id:016x}"))
    if isinstance(error, MadeRoom):
        metadata.append((IDLE_KEY, "1"))
    if error.retry_after_s is not None:
        metadata.append((_STATUS_KEY, _retry_status(error)))
    return metadata


def read_error(error: grpc.RpcError) -> Part:
    """A failed call as a Part. Only its trailing metadata proves that nothing ran."""
    metadata = dict(error.trailing_metadata() or ())
    proofs = {"no": Executed.NO, "yes": Executed.YES}
    executed = proofs.get(metadata.get(EXECUTED_KEY, ""), Executed.UNKNOWN)
    code, retry_s = Code(error.code().value[0]), retry_after_s(error.trailing_metadata())
    return Part("", code, plain_reason(error), executed=executed, retry_after_s=retry_s)


def was_idle(error: grpc.RpcError) -> bool:
    """Whether a stream was ended in order because it was idle."""
    metadata = dict(error.trailing_metadata() or ())
    return (metadata.get(IDLE_KEY), metadata.get(EXECUTED_KEY)) == ("1", "no")


def plain_reason(error: grpc.RpcError) -> str:
    """Why a call failed, in a few words; gRPC's own reasons describe its internals."""
    details = error.details() or ""
    for sign, words in _PLAIN_REASONS:
        if sign in details:
            return words
    return str(details[:LONGEST_REASON]) or error.code().name.lower().replace("_", " ")


def retry_after_s(trailing_metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    """The seconds of google.rpc.RetryInfo in a failed call's trailing metadata, if present."""
    packed = dict(trailing_metadata or ()).get(_STATUS_KEY)
    if packed is None:
        return None
    status = status_pb2.Status()
    try:
        status.ParseFromString(packed)
        for detail in status.details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                return validation.retry_after_s(info.retry_delay.ToTimedelta().total_seconds())
    except Exception:  # noqa: BLE001 - another program's metadata may contain anything
        return None
    return None


def read_request_id(trailing_metadata: Iterable[tuple[str, Any]] | None) -> int:
    """The request's id in a failed call's trailing metadata; 0 if it has none."""
    return validation.request_id(dict(trailing_metadata or ()).get(REQUEST_KEY))


def _retry_status(error: OverlayError) -> bytes:
    delay = Duration()
    delay.FromMilliseconds(max(1, round((error.retry_after_s or 0) * 1000)))
    # Must equal the call's message, or clients that compare the two see a broken status.
    status = status_pb2.Status(code=int(error.code), message=str(error)[:LONGEST_REASON])
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return bytes(status.SerializeToString())


def _shape_of(message: Any) -> message_size.Shape:
    def below(field: Any) -> message_size.Shape | None:
        found = field.message_type
        return None if found.name == pb2.Column.DESCRIPTOR.name else _shape_of(found)

    return {field.number: below(field) for field in message.fields if field.message_type}


def _check_names(field: str, names: Sequence[str], limits: Limits, limit: int = 1) -> None:
    _check_count(field, names, limit)
    for name in names:
        if len(name) > limits.max_name or not name.isprintable():
            shown = ascii(name[:20])[1:-1]
            raise BadRequest(
                f"{field}: '{shown}' is not a name of at most {limits.max_name} letters"
            )


def _check_count(field: str, names: Sequence[str], limit: int) -> None:
    if len(names) > limit:
        raise BadRequest(f"{field}: {len(names)} entries are more than {limit}")


_PLAIN_REASONS = (
    ("Connection refused", "the connection was refused: nothing serves there"),
    ("timed out before receiving SETTINGS", "it does not answer"),
    ("No route to host", "there is no route to it"),
    ("Network is unreachable", "the network is unreachable"),
    ("Connection reset", "the connection was cut"),
    ("Socket closed", "the connection was closed"),
    ("Connection timed out", "it does not answer any more"),
    ("ping timeout", "it does not answer any more"),
    ("keepalive", "it does not answer any more"),
    ("Deadline Exceeded", "no answer in time"),
    ("GOAWAY", "it is going away"),
    ("Method not found", "it does not know this call: an older release, or no overlay"),
    ("failed to connect to all addresses", "no connection to it"),
)
_FRAME = _shape_of(pb2.Frame.DESCRIPTOR)
_MODES = {Mode.ALL: pb2.ALL, Mode.ANY: pb2.ANY}
_EXECUTED = {Executed.UNKNOWN: pb2.UNKNOWN, Executed.NO: pb2.NO, Executed.YES: pb2.YES}
_GRPC_CODES = {Code(status.value[0]): status for status in grpc.StatusCode}
